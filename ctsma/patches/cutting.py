"""One knee's patches: cut from its images, measured, written to disk (for `map_knees`)."""

from pathlib import Path

import numpy as np
import SimpleITK as sitk

from ctsma.biomarkers import ct_threshold_biomarkers, mr_biomarkers
from ctsma.cohort import BIOMARKERS, BONES, InputFault, read_knee_volume
from ctsma.registration import bone_masks, read_transforms
from ctsma.simulation import read_truth

from .geometry import CT_SHAPE, CT_SPACING_MM, MR_SHAPE, MR_SPACING_MM, centres, cut, trabecular_region
from .truth import write_truth

MIN_VOI = 0.25  # share of a patch that must be trabecular bone (our choice)
SHAFT_MM, DENSEST = 10.0, 99.5  # cortex: the densest half per cent of the bone farthest from the joint (our choice)
LACKING = "trabecular bone fills less than a quarter"
OUTSIDE = "leaves the MR field of view"
OUTSIDE_CT = "leaves the CT field of view"
NO_MARROW, MARROW_SHARE = "no marrow signal", 0.4  # of the knee's median patch; the coil varies by a fifth (our choice)


def knee_patches(
    knee: dict, folder: Path, *, root: str, registration_folder: str, n_per_compartment: int, seed: int, definition: str
) -> dict:
    """Cut and measure the patches of one registered knee (for `map_knees`); writes `<knee>.npz` and `<knee>_table.csv`.

    A flagged or failed registration raises InputFault: the knee becomes a row with that reason.
    """
    ct, mr = (read_knee_volume(knee, column, root) for column in ("ct", "mr"))
    masks = sitk.ReadImage(str(Path(registration_folder) / f"{knee['knee_id']}_mask.nii.gz"))
    pairs = {"": (mr, read_transforms(registration_folder, knee["knee_id"]))}
    if (
        isinstance(knee.get("mr_rescan"), str)
        and (Path(registration_folder) / f"{knee['knee_id']}_rescan_femur.tfm").exists()
    ):
        rescan = read_knee_volume(knee, "mr_rescan", root)
        pairs["rescan_"] = rescan, read_transforms(registration_folder, f"{knee['knee_id']}_rescan")
    return _cut_and_write(knee, folder, ct, masks, pairs, n_per_compartment, seed, definition)


def ct_patches(knee: dict, folder: Path, *, root: str, n_per_compartment: int, seed: int) -> dict:
    """Cut the patches of a knee that has a CT and no usable MR (for `map_knees`); writes files as `knee_patches`.

    The bones are found in the CT alone, so the patches lie where they would lie with an MR. Nothing is measured on
    them but `naive`. InputFault where the CT does not show the joint.
    """
    ct = read_knee_volume(knee, "ct", root)
    return _cut_and_write(knee, folder, ct, bone_masks(ct), {}, n_per_compartment, seed, "")


def true_patches(
    knee: dict, folder: Path, *, root: str, n_per_compartment: int, n_truth: int, seed: int, definition: str
) -> dict:
    """As `knee_patches` with the true bones and transforms of a simulated knee, and the truth of n_truth of them.

    Only quality assurance calls it: it tells how hard a cohort is, whatever the registration does.
    """
    truth = read_truth(root, knee["knee_id"])
    ct = read_knee_volume(knee, "ct", root)
    pairs = {"": (read_knee_volume(knee, "mr", root), truth.transforms)}
    if truth.rescan_transforms:
        pairs["rescan_"] = read_knee_volume(knee, "mr_rescan", root), truth.rescan_transforms
    row = _cut_and_write(knee, folder, ct, truth.labels, pairs, n_per_compartment, seed, definition)
    rng = np.random.default_rng([seed, 1, *knee["knee_id"].encode()])
    write_truth(Path(folder), Path(folder), knee, truth, n_truth, rng)
    return row


def _cut_and_write(
    knee: dict, folder, ct, masks, pairs: dict, n_per_compartment: int, seed: int, definition: str
) -> dict:
    # The knee's own stream: its patches do not depend on which other knees the cohort has.
    rng = np.random.default_rng([seed, *knee["knee_id"].encode()])
    table = centres(masks, knee["side"], n_per_compartment, rng)
    table.insert(0, "patch_id", np.arange(len(table)))
    table.insert(0, "subject_id", knee["subject_id"])
    table.insert(0, "knee_id", knee["knee_id"])
    places = [(row["compartment"].split("_")[0], (row["x"], row["y"], row["z"])) for row in table.to_dict("records")]
    arrays = {"voi": np.array([trabecular_region(masks, bone, centre, knee["side"]) for bone, centre in places])}
    arrays["ct"] = np.array([cut(ct, centre, knee["side"], CT_SHAPE, CT_SPACING_MM) for _, centre in places])
    for prefix, (mr, transforms) in pairs.items():
        stack = [cut(mr, c, knee["side"], MR_SHAPE, MR_SPACING_MM, transforms[bone]) for bone, c in places]
        arrays[f"{prefix}mr"] = np.array(stack)
        table = table.assign(**measured(arrays[f"{prefix}mr"], arrays["voi"], definition, prefix))
    if not pairs:
        beyond = np.where(np.isnan(arrays["ct"]).any(axis=(1, 2, 3)), OUTSIDE_CT, "")
        table["flag"] = np.where(arrays["voi"].mean(axis=(1, 2, 3)) < MIN_VOI, LACKING, beyond)
    table = table.assign(**naive(arrays["ct"], arrays["voi"]), **cortex_hu(ct, masks))
    table.to_csv(Path(folder) / f"{knee['knee_id']}_table.csv", index=False)
    stored = {name: a.astype(bool if name == "voi" else np.float16) for name, a in arrays.items()}
    np.savez(Path(folder) / f"{knee['knee_id']}.npz", **stored)
    return {"n_patches": len(table), "n_flagged": int((table["flag"] != "").sum())}


def measured(mr: np.ndarray, voi: np.ndarray, definition: str, prefix: str) -> dict:
    """The MR reference columns of a knee's patches; NaN and a flag where one cannot be measured.

    Noise alone (a signal void, or bone through and through) has texture too: a patch whose brightest voxels lie far
    below those of the knee's other patches is flagged, since it holds no marrow to measure against.
    """
    lacking, outside = voi.mean(axis=(1, 2, 3)) < MIN_VOI, np.isnan(mr).any(axis=(1, 2, 3))
    found = mr_biomarkers(np.nan_to_num(mr), voi, MR_SPACING_MM, definition=definition)
    bright = np.array([np.quantile(p[v], 0.95) if v.any() else 0 for p, v in zip(np.nan_to_num(mr), voi, strict=True)])
    dark = bright < MARROW_SHARE * np.median(bright)
    flag = np.where(dark, NO_MARROW, np.asarray(found["flag"], dtype=object))
    flag = np.where(lacking, LACKING, np.where(outside, OUTSIDE, flag))
    columns = {f"{prefix}{name}": np.where(flag == "", found[name], np.nan) for name in BIOMARKERS}
    return columns | {f"{prefix}flag": flag}


def naive(ct: np.ndarray, voi: np.ndarray) -> dict:
    """Mean HU, and what thresholding the CT would say; for comparison only."""
    inside = voi[:, :, ::2, ::2]
    count = np.maximum(inside.sum(axis=(1, 2, 3)), 1)
    found = ct_threshold_biomarkers(np.nan_to_num(ct), inside, CT_SPACING_MM)
    mean = np.where(inside, np.nan_to_num(ct), 0).sum(axis=(1, 2, 3)) / count
    return {"mean_hu": mean} | {f"threshold_{name}": found[name] for name in BIOMARKERS}


def cortex_hu(ct: sitk.Image, masks: sitk.Image) -> dict[str, float]:
    """HU of each bone's dense cortex far from the joint: {"cortex_femur_hu", "cortex_tibia_hu"}.

    The knee's own ruler, for want of a phantom: what HU full bone has differs between people and tube voltages by a
    factor of two, and cortex that is thicker than the point spread shows it (our choice).
    """
    ct, masks = (sitk.DICOMOrient(image, "LPS") for image in (ct, masks))
    hu, labels, found = sitk.GetArrayViewFromImage(ct), sitk.GetArrayViewFromImage(masks), {}
    for bone, value in BONES.items():
        slices = shaft_slices(masks, bone)
        found[f"cortex_{bone}_hu"] = densest(hu[slices], labels[slices] == value)
    return found


def shaft_slices(masks: sitk.Image, bone: str) -> slice:
    """Axial slices of the 10 mm of a bone farthest from the joint: femur at the head end, tibia at the foot end."""
    rows = np.flatnonzero((sitk.GetArrayViewFromImage(masks) == BONES[bone]).any((1, 2)))
    if not len(rows):
        raise InputFault("bone masks", f"hold no {bone}", "give labels of both bones")
    n = max(1, round(SHAFT_MM / masks.GetSpacing()[2]))
    return slice(max(rows[-1] + 1 - n, rows[0]), rows[-1] + 1) if bone == "femur" else slice(rows[0], rows[0] + n)


def densest(hu: np.ndarray, inside: np.ndarray) -> float:
    """HU above which the densest half per cent of the voxels inside a bone lie; arrays of one shape."""
    return float(np.percentile(hu[inside], DENSEST))
