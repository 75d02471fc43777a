"""Every fault of every knee before a run: files, geometry, HU, bones, joint line, side, and whether MR and CT match."""

from collections.abc import Callable, Iterator
from pathlib import Path

import joblib
import numpy as np
import pandas as pd
import SimpleITK as sitk

from ctsma.cohort import COMPARTMENTS, IMAGES, InputFault, image_path, read_knee_volume, sha256_file
from ctsma.patches import centres
from ctsma.registration import bone_masks, register_knee

from .knees import side_of, split_knees

FATAL, WARNING, GOOD = "fatal", "warning", "good"
COLUMNS = ["knee_id", "column", "check", "level", "finding"]
MAX_SLICE_MM = 1.5  # CT slices thicker than a tenth of a patch blur its texture (our choice)
MAX_PIXEL_MM = 0.6  # of CT in plane; a knee field of 300 mm on 512 pixels (our choice)
MAX_MR_PIXEL_MM = 0.35  # of MR in plane: trabeculae are 0.1 to 0.3 mm thick, BFFE has 0.22 (our choice)
METAL_HU, METAL_SHARE = 2500.0, 2e-4  # cortex stays below 2000 HU (our choice)
AIR_HU = -1100.0  # below air: padding outside the scanner's circle (our choice)
PATCHES_WANTED = 4  # of each compartment, as the study's default


def check_knees(
    manifest: pd.DataFrame, *, deep: bool = True, n_jobs: int = 1, report: Callable[[str], None] | None = None
) -> pd.DataFrame:
    """Check every knee of a manifest and go on after a fault.

    Parameters
    ----------
    manifest : of `read_manifest`.
    deep : also find the bones, the side, and register each MR with its CT (about 6 s a pair on one core).
    n_jobs, report : processes, one thread each; called with one line a knee.

    Returns
    -------
    DataFrame: knee_id, column (ct, mr, mr_rescan or pair), check, level ("fatal": the image or the pair cannot be
    used; "warning": look at it; "good": the size of the image), finding (one sentence with the mend).
    Raises InputFault where the manifest lists no knee.
    """
    if manifest.empty:
        raise InputFault(manifest.attrs["path"], "lists no knee", "add one row a knee")
    knees, root = manifest.to_dict("records"), manifest.attrs["root"]
    rows, tasks = [], (joblib.delayed(_check_knee)(knee, root, deep) for knee in knees)
    with joblib.parallel_config(backend="loky", n_jobs=n_jobs, inner_max_num_threads=1):
        for count, found in enumerate(joblib.Parallel(return_as="generator")(tasks), 1):
            rows += found
            if report:
                faults = sum(row["level"] != GOOD for row in found)
                report(f"check {count}/{len(knees)} {found[0]['knee_id']}: {faults or 'no'} findings")
    return pd.DataFrame(rows, columns=COLUMNS)


def _check_knee(knee: dict, root: str, deep: bool) -> list[dict]:
    rows, images = [], {}
    for column in (c for c in IMAGES if isinstance(knee.get(c), str)):
        found = list(_file(knee, column, root))
        try:
            images[column] = read_knee_volume(knee, column, root)
            found += [(GOOD, "size", _shown(images[column])), *_resolution(images[column], column)]
        except InputFault as fault:
            found.append((FATAL, "volume", str(fault)))
        rows += [(column, *entry) for entry in found]
    if "ct" in images:
        rows += [("ct", *entry) for entry in _hu(images["ct"])]
        rows += list(_bones(knee, images)) if deep else []
    return [dict(zip(COLUMNS, (knee["knee_id"], c, check, level, text), strict=True)) for c, level, check, text in rows]


def _file(knee: dict, column: str, root: str) -> Iterator[tuple[str, str, str]]:
    path, wanted = image_path(knee, column, root), knee.get(f"{column}_sha256")
    if isinstance(wanted, str) and path.is_file() and sha256_file(path) != wanted:
        mend = "restore the file, or correct the sum if the change is meant"
        yield FATAL, "checksum", f"{path}: differs from {column}_sha256 of the manifest; {mend}."
    out = [file for file in (path.rglob("*") if path.is_dir() else []) if _leads_out(file, root)]
    if out:
        yield FATAL, "link", f"{out[0]}: is a link out of the cohort's root; put the file itself there."


def _leads_out(file: Path, root: str) -> bool:
    return file.is_symlink() and not file.resolve().is_relative_to(Path(root).resolve())


def _shown(image: sitk.Image) -> str:
    spacing = " x ".join(f"{value:.4g}" for value in image.GetSpacing())
    return f"{' x '.join(map(str, image.GetSize()))} at {spacing} mm"


def _resolution(image: sitk.Image, column: str) -> Iterator[tuple[str, str, str]]:
    fine, slices = sorted(image.GetSpacing())[0], max(image.GetSpacing())
    if column == "ct" and slices > MAX_SLICE_MM:
        yield (
            WARNING,
            "resolution",
            f"slices every {slices:.2g} mm hold little texture; export the thin reconstruction.",
        )
    limit = MAX_PIXEL_MM if column == "ct" else MAX_MR_PIXEL_MM
    if fine > limit:
        text = f"pixels of {fine:.2g} mm are coarser than {limit:g} mm; export a smaller field of view or finer matrix."
        yield WARNING, "resolution", text


def _hu(ct: sitk.Image) -> Iterator[tuple[str, str, str]]:
    array = sitk.GetArrayViewFromImage(ct)
    if (share := float((array > METAL_HU).mean())) > METAL_SHARE:
        text = (
            f"{share:.2%} of the voxels exceed {METAL_HU:g} HU, as metal does; leave the knee out if it has an implant."
        )
        yield WARNING, "HU", text
    if array.min() < AIR_HU:
        yield WARNING, "HU", f"values down to {array.min():g} HU are padding, not air; set them to -1024 if they show."


def _bones(knee: dict, images: dict) -> Iterator[tuple[str, str, str, str]]:
    """What needs the bones: two knees, femur and tibia, joint line, side, and the pair."""
    try:
        if len(split_knees(images["ct"])) > 1:
            yield "ct", FATAL, "knees", "two knees are in view; give one volume a knee (ctsma import splits DICOM)."
            return
        masks = bone_masks(images["ct"])
    except InputFault as fault:
        yield "ct", FATAL, "bones", f"{fault.fault}; {fault.mend}."
        return
    yield from (("ct", *entry) for entry in _joint(masks, knee["side"]))
    seen = side_of(images["ct"], masks)
    if seen and seen != knee["side"]:
        text = f"the fibula says side {seen}, the manifest {knee['side']}; correct the side, or the image is mirrored."
        yield "ct", FATAL, "side", text
    for column in (c for c in ("mr", "mr_rescan") if c in images):
        reason = register_knee(images["ct"], images[column], masks, seed=0).flagged
        if reason:
            yield column, FATAL, "pair", f"{reason}; make sure that both are of the same knee, side and person."


def _joint(masks: sitk.Image, side: str) -> Iterator[tuple[str, str, str]]:
    try:
        found = centres(masks, side, PATCHES_WANTED, np.random.default_rng(0))["compartment"].value_counts()
    except InputFault as fault:
        yield FATAL, "joint line", f"{fault.fault}; {fault.mend}."
        return
    if lacking := [place for place in COMPARTMENTS if not found.get(place)]:
        text = f"no room for a patch in {', '.join(lacking)}; the field of view may cut the joint."
        yield WARNING, "joint line", text
