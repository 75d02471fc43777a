"""All problems of all knees before a run: files, geometry, HU, bones, joint line, side, pair."""

from collections.abc import Callable

import joblib
import numpy as np
import pandas as pd
import SimpleITK as sitk

from ctsma.cohort import read_knee_volume
from ctsma.cohort.images import format_extent
from ctsma.cohort.manifest import check_sha256
from ctsma.common import COMPARTMENTS, IMAGES, InputError
from ctsma.patches import patch_centres
from ctsma.registration import bone_masks, register_knee
from ctsma.registration.sides import side_of, split_knees

FATAL, WARNING, GOOD = "fatal", "warning", "good"
COLUMNS = ["knee_id", "column", "check", "level", "finding"]
MAX_SLICE_MM = 1.5  # design choice: CT slices thicker than a tenth of a patch blur its texture
MAX_PIXEL_MM = 0.6  # of CT in plane; design choice: a knee field of 300 mm on 512 pixels
MAX_MR_PIXEL_MM = 0.35  # design choice: trabeculae are 0.1 to 0.3 mm thick, BFFE has 0.22 mm
METAL_HU, METAL_SHARE = 2500.0, 2e-4  # design choice: cortex stays below 2000 HU
AIR_HU = -1100.0  # below air: padding outside the scanner's circle; design choice
PATCHES_PER_COMPARTMENT = 4  # as the study's default


def check_knees(
    manifest: pd.DataFrame,
    *,
    deep: bool = True,
    n_jobs: int = 1,
    report: Callable[..., None] | None = None,
) -> pd.DataFrame:
    """Check every knee of a manifest and go on after a problem.

    Parameters
    ----------
    manifest : of `read_manifest`.
    deep : also find bones and side, and register each MR with its CT (6 s per pair on one core).
    n_jobs : processes of one thread each.
    report : called as `report(line, done=..., total=...)` after each knee.

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
    tasks = (joblib.delayed(_check_knee)(knee, root, deep) for knee in knees)
    tables = []
    with joblib.parallel_config(backend="loky", n_jobs=n_jobs, inner_max_num_threads=1):
        for table in joblib.Parallel(return_as="generator")(tasks):
            tables.append(table)
            if report:
                n_findings = int((table["level"] != GOOD).sum()) or "no"
                line = f"check {len(tables)}/{len(knees)} {table['knee_id'].iloc[0]}"
                report(f"{line}: {n_findings} findings", done=len(tables), total=len(knees))
    return pd.concat(tables, ignore_index=True)


def _check_knee(knee: dict, root: str, deep: bool) -> pd.DataFrame:
    found, images = [], {}  # found: (column, check, level, finding)
    for column in IMAGES:
        if not isinstance(knee.get(column), str):
            continue
        try:
            check_sha256(knee, column, root)
        except InputError as error:
            found.append((column, "checksum", FATAL, str(error)))
        try:
            images[column] = read_knee_volume(knee, column, root)
        except InputError as error:
            found.append((column, "volume", FATAL, str(error)))
            continue
        found += _check_resolution(images[column], column)
    if "ct" in images:
        found += _check_hu(images["ct"])
        if deep:
            found += _check_bones(knee, images)
    return pd.DataFrame([(knee["knee_id"], *finding) for finding in found], columns=COLUMNS)


def _check_resolution(image: sitk.Image, column: str) -> list[tuple]:
    spacing, limit = image.GetSpacing(), MAX_PIXEL_MM if column == "ct" else MAX_MR_PIXEL_MM
    text = f"{format_extent(image.GetSize())} at {format_extent(spacing)} mm"
    found = [(column, "size", GOOD, text)]
    if column == "ct" and max(spacing) > MAX_SLICE_MM:
        text = f"slices every {max(spacing):.2g} mm hold little texture; export the thin ones."
        found.append((column, "resolution", WARNING, text))
    if min(spacing) > limit:
        text = f"pixels of {min(spacing):.2g} mm are coarser than {limit:g} mm; "
        text += "export a smaller field of view or a finer matrix."
        found.append((column, "resolution", WARNING, text))
    return found


def _check_hu(ct: sitk.Image) -> list[tuple]:
    array, found = sitk.GetArrayViewFromImage(ct), []
    share, lowest = float((array > METAL_HU).mean()), array.min()
    if share > METAL_SHARE:
        text = f"{share:.2%} of the voxels exceed {METAL_HU:g} HU, as metal does; "
        text += "leave the knee out if it has an implant."
        found.append(("ct", "HU", WARNING, text))
    if lowest < AIR_HU:
        text = f"values down to {lowest:g} HU are padding, not air; set them to -1024 if they show."
        found.append(("ct", "HU", WARNING, text))
    return found


def _check_bones(knee: dict, images: dict[str, sitk.Image]) -> list[tuple]:
    """What needs the bones: two knees in view, the joint line, the side, and each MR's pair."""
    ct, found = images["ct"], []
    try:
        if len(split_knees(ct)) > 1:
            text = "two knees are in view; give one volume per knee (ctsma import splits DICOM)."
            return [("ct", "knees", FATAL, text)]
        masks = bone_masks(ct)
    except InputError as error:
        return [("ct", "bones", FATAL, f"{error.problem}; {error.remedy}.")]
    try:
        rng = np.random.default_rng(0)
        centres = patch_centres(masks, knee["side"], PATCHES_PER_COMPARTMENT, rng)
        absent = [name for name in COMPARTMENTS if name not in set(centres["compartment"])]
        if absent:
            text = f"no place for a patch in {', '.join(absent)}; check that the joint is in view."
            found.append(("ct", "joint line", WARNING, text))
    except InputError as error:
        found.append(("ct", "joint line", FATAL, f"{error.problem}; {error.remedy}."))
    side = side_of(ct, masks)
    if side not in ("", knee["side"]):
        text = f"the fibula lies as in side {side}, the manifest names {knee['side']}; "
        text += "correct the side, or export the image again if it is mirrored."
        found.append(("ct", "side", FATAL, text))
    for column in ("mr", "mr_rescan"):
        if column in images:
            reason = register_knee(ct, images[column], masks, seed=0).flagged
            if reason:
                text = f"{reason}; make sure that both images show the same person, knee and side."
                found.append((column, "pair", FATAL, text))
    return found
