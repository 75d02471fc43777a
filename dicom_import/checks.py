"""All problems of all knees before a run: files, geometry, HU, bones, joint line, side, pair."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import SimpleITK as sitk

from ctsma.cohort import image_path, read_knee_volume
from ctsma.cohort.images import format_extent
from ctsma.common import COMPARTMENTS, IMAGES, InputError
from ctsma.files import sha256_file
from ctsma.parallel import run_tasks
from ctsma.patches import RIM_MM, bearing_surface, patch_centres
from ctsma.registration import knee_masks, register_knee
from dicom_import.registration_pages import draw_images, metrics_row, write_pages
from dicom_import.sides import side_of, split_knees

FATAL, WARNING, GOOD = "fatal", "warning", "good"
COLUMNS = ["knee_id", "column", "check", "level", "finding"]
MAX_SLICE_MM = 1.5  # design choice: CT slices thicker than a tenth of a patch blur its texture
MAX_PIXEL_MM = 0.6  # of CT in plane; design choice: a knee field of 300 mm on 512 pixels
MAX_MR_PIXEL_MM = 0.35  # design choice: trabeculae are 0.1 to 0.3 mm thick, BFFE has 0.22 mm
METAL_HU, METAL_SHARE = 2500.0, 2e-4  # design choice: cortex stays below 2000 HU
MAX_CUT_MM2 = 400.0  # design choice: 200 where a whole condyle touches the image's side
AIR_HU = -1100.0  # below air: padding outside the scanner's circle; design choice
PATCHES_PER_COMPARTMENT = 4  # as the study's default


def check_knees(
    manifest: pd.DataFrame,
    *,
    deep: bool = True,
    n_jobs: int = 1,
    report: Callable[..., None] | None = None,
    pages: str | Path | None = None,
) -> pd.DataFrame:
    """Check every knee of a manifest and go on after a problem.

    Parameters
    ----------
    manifest : of `read_manifest`.
    deep : also find bones and side, and register each MR with its CT (6 s per pair on one core).
    n_jobs : processes of one thread each.
    report : called as `report(line, done=..., total=...)` after each knee.
    pages : folder for one page per registered pair and one of all (`write_pages`); None: no pages.

    Returns
    -------
    DataFrame: knee_id, column (ct, mr or mr_rescan), check, level ("fatal": the image or the pair
    cannot be used; "warning": look at it; "good": the size of the image), finding (one sentence
    with its remedy).

    Raises
    ------
    InputError : the manifest lists no knee.
    """
    if manifest.empty:
        raise InputError(manifest.attrs["path"], "lists no knee", "add one row per knee")
    knees, root = manifest.to_dict("records"), manifest.attrs["root"]
    tasks, tables, registered = [(knee, root, deep, pages) for knee in knees], [], []
    for table, metrics in run_tasks(_check_knee, tasks, n_jobs):
        tables.append(table)
        registered += metrics
        if report:
            n_findings = int((table["level"] != GOOD).sum()) or "no"
            line = f"check {len(tables)}/{len(knees)} {table['knee_id'].iloc[0]}"
            report(f"{line}: {n_findings} findings", done=len(tables), total=len(knees))
    if pages is not None:
        write_pages(pages, registered)
    return pd.concat(tables, ignore_index=True)


def _check_knee(
    knee: dict, root: str, deep: bool, pages: str | Path | None
) -> tuple[pd.DataFrame, list[dict]]:
    """Findings of a knee, and the row of its registration for `write_pages` if there was one."""
    found, images = [], {}  # found: (column, check, level, finding)
    registered = []
    for column in IMAGES:
        if not isinstance(knee.get(column), str):
            continue
        try:
            check_sha256(knee, column, root)
        except (InputError, OSError) as error:
            found.append((column, "checksum", FATAL, str(error)))
        try:
            images[column] = read_knee_volume(knee, column, root)
        except Exception as error:  # one file never ends the table
            text = f"{type(error).__name__}: {error}; export it again."
            text = str(error) if isinstance(error, InputError) else text
            found.append((column, "volume", FATAL, text))
            continue
        found += _check_resolution(images[column], column)
    if "ct" in images:
        found += _check_hu(images["ct"])
        try:
            found += _check_bones(knee, images, root, registered, pages) if deep else []
        except Exception as error:  # one knee never ends the table
            text = f"the bones cannot be checked ({type(error).__name__}: {error}); look at the CT."
            found.append(("ct", "bones", FATAL, text))
    table = pd.DataFrame([(knee["knee_id"], *finding) for finding in found], columns=COLUMNS)
    shown = table[table["level"] != GOOD]["finding"].tolist()
    return table, [row | {"findings": shown} for row in registered]


def _check_resolution(image: sitk.Image, column: str) -> list[tuple]:
    spacing, limit = image.GetSpacing(), MAX_PIXEL_MM if column == "ct" else MAX_MR_PIXEL_MM
    text = f"{format_extent(image.GetSize())} at {format_extent(spacing)} mm"
    found = [(column, "size", GOOD, text)]
    if column == "ct" and max(spacing) > MAX_SLICE_MM:
        text = f"slices every {max(spacing):.2g} mm (at most {MAX_SLICE_MM:g} mm) "
        text += "hold little texture; export the thin ones."
        found.append((column, "resolution", WARNING, text))
    if min(spacing) > limit:
        text = f"pixels are {min(spacing):.2g} mm, at most {limit:g} mm; "
        text += "export a smaller field of view or a finer matrix."
        found.append((column, "resolution", WARNING, text))
    return found


def _check_hu(ct: sitk.Image) -> list[tuple]:
    array, found = sitk.GetArrayViewFromImage(ct), []
    share, lowest = float((array > METAL_HU).mean()), array.min()
    if share > METAL_SHARE:
        text = f"{share:.2%} of the voxels (at most {METAL_SHARE:.2%}) exceed {METAL_HU:g} HU, "
        text += "as metal does; "
        text += "leave the knee out if it has an implant."
        found.append(("ct", "HU", WARNING, text))
    if lowest < AIR_HU:
        text = f"values down to {lowest:g} HU (air has at least {AIR_HU:g} HU) are padding; "
        text += "set them to -1024 if they show."
        found.append(("ct", "HU", WARNING, text))
    return found


def _check_bones(
    knee: dict,
    images: dict[str, sitk.Image],
    root: str,
    registered: list[dict],
    pages: str | Path | None,
) -> list[tuple]:
    """What needs the bones: two knees in view, the joint line, the side, and each MR's pair.

    The metrics of the pair of CT and MR are added to `registered`, its images go to `pages`.
    """
    ct, found = images["ct"], []
    try:
        if not isinstance(knee.get("ct_labels"), str) and len(split_knees(ct)) > 1:
            text = "two knees are in view; give one volume per knee (ctsma import splits DICOM)."
            return [("ct", "knees", FATAL, text)]
        masks = knee_masks(knee, ct, root)
    except InputError as error:
        return [("ct", "bones", FATAL, str(error))]
    try:
        rng = np.random.default_rng(0)
        centres = patch_centres(masks, knee["side"], PATCHES_PER_COMPARTMENT, rng)
        absent = [name for name in COMPARTMENTS if name not in set(centres["compartment"])]
        if absent:
            text = f"no place for a patch in {', '.join(absent)}; check that the joint is in view "
            text += "and its gap is open."
            found.append(("ct", "joint line", WARNING, text))
        found += [("ct", "field of view", WARNING, text) for text in _cut(masks, knee["side"])]
    except InputError as error:
        found.append(("ct", "joint line", FATAL, str(error)))
    side = side_of(ct, masks)
    if side not in ("", knee["side"]):
        text = f"the fibula lies as in side {side}, the manifest names {knee['side']}; "
        text += "correct the side, or export the image again if it is mirrored."
        found.append(("ct", "side", FATAL, text))
    for column in ("mr", "mr_rescan"):
        if column in images:
            result = register_knee(ct, images[column], masks, seed=0)
            if column == "mr" and pages is not None:
                draw_images(knee, ct, images["mr"], masks, result.transforms, Path(pages, "images"))
                row = {"knee_id": knee["knee_id"], "side": knee["side"], "error": ""}
                registered.append(row | metrics_row(result))
            if result.flagged:
                text = f"{result.flagged}; "
                text += "make sure that both images show the same person, knee and side."
                found.append((column, "pair", FATAL, text))
    return found


def _cut(masks: sitk.Image, side: str) -> list[str]:
    """Warnings of bones that the image cuts left or right, and of a joint cut in front or behind.

    A femur may be cut in front or behind without loss, as long as the bearing surface is whole.
    """
    masks, texts = sitk.DICOMOrient(masks, "LPS"), []
    _, dy, dz = masks.GetSpacing()
    bone = sitk.GetArrayViewFromImage(masks) > 0
    for name, column in (("right", 0), ("left", -1)):
        area_mm2 = bone[:, :, column].sum() * dy * dz
        if area_mm2 > MAX_CUT_MM2:
            text = f"the image ends in bone at the patient's {name} over {area_mm2:.0f} mm2 "
            texts.append(f"{text}(at most {MAX_CUT_MM2:g}); export the whole width of the knee.")
    y = bearing_surface(masks, side)["y"]
    front = masks.GetOrigin()[1]
    back = front + (masks.GetSize()[1] - 1) * dy
    for name, distance_mm in (("front", y.min() - front), ("back", back - y.max())):
        if distance_mm < RIM_MM:
            text = f"the bearing surface ends {distance_mm:.1f} mm from the {name} of the image "
            texts.append(f"{text}(at least {RIM_MM:g}); export the whole depth of the knee.")
    return texts


def check_sha256(knee: dict | pd.Series, column: str, root: str | Path) -> None:
    """InputError where an image file differs from the checksum that the manifest gives."""
    expected, path = knee.get(f"{column}_sha256"), image_path(knee, column, root)
    if isinstance(expected, str) and path.is_file() and sha256_file(path) != expected:
        problem = f"differs from {column}_sha256 of the manifest"
        remedy = "restore the file, or correct the checksum if the change is meant"
        raise InputError(path, problem, remedy)
