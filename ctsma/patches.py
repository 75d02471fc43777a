"""The same piece of subchondral bone in CT and MR: where patches lie, how they are cut, and what is measured on them.

A patch is a sagittal stack in CT space, array (slices, rows, columns): slices along x from lateral to medial, rows
along z from top to bottom, columns along y from front to back. MR and CT patches cover the same 9 x 10.5 x 10.5 mm,
the MR on its own voxel (0.75 x 0.21875 x 0.21875 mm, BFFE of the published code), the CT twice as coarse in plane.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import SimpleITK as sitk
from scipy import ndimage

from .biomarkers import ct_threshold_biomarkers, morphometry, mr_biomarkers
from .cohort import BIOMARKERS, BONES, COMPARTMENTS, InputFault, read_knee_volume
from .registration import bone_masks, read_transforms
from .simulation import Truth, read_truth

MR_SHAPE, MR_SPACING_MM = (12, 48, 48), (0.75, 0.21875, 0.21875)
CT_SHAPE, CT_SPACING_MM = (12, 24, 24), (0.75, 0.4375, 0.4375)
HEIGHT_MM = 10.5  # of a patch below the joint surface; trabeculae adapt to load within the first 10 mm (our choice)
GAP_MM = (1.0, 15.0)  # femur and tibia face each other across two cartilages and menisci (our choice)
MIDLINE_MM = 7.0  # half width of notch and spines, which carry no plateau (our choice)
RIM_MM = 4.0  # a patch centre keeps this distance from the rim of the bearing surface (our choice)
APART_MM = 4.0  # least distance between patch centres of a compartment (our choice)
PLATE_MM = 1.5  # below the plate: thicker than the subchondral plate in OA, 0.58 to 0.72 mm (Rapagna 2021), plus blur
MIN_VOI = 0.25  # share of a patch that must be trabecular bone (our choice)
FINE_MM = 0.125  # voxel on which truth is measured; trabeculae are 0.15 to 0.4 mm (our choice)
SHAFT_MM, DENSEST = 10.0, 99.5  # cortex: the densest half per cent of the bone farthest from the joint (our choice)
LACKING = "trabecular bone fills less than a quarter"
OUTSIDE = "leaves the MR field of view"
OUTSIDE_CT = "leaves the CT field of view"
NO_MARROW, MARROW_SHARE = "no marrow signal", 0.4  # of the knee's median patch; the coil varies by a fifth (our choice)


@dataclass(frozen=True)
class Patches:
    """Patches of a cohort, row by row: table, mr (n, 12, 48, 48), ct (n, 12, 24, 24), voi as mr."""

    table: pd.DataFrame
    mr: np.ndarray
    ct: np.ndarray
    voi: np.ndarray


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


def knee_truth(knee: dict, folder: Path, *, root: str, patches_folder: str) -> dict:
    """Measure the true biomarkers of a knee's patches (for `map_knees`); writes `<knee>_truth.csv`. Only for QA."""
    return write_truth(Path(patches_folder), Path(folder), knee, read_truth(root, knee["knee_id"]))


def true_slice(truth: Truth, row: dict, side: str, pixel_mm: float = 0.1) -> np.ndarray:
    """The bone itself (bool, rows, columns) in the middle plane of a patch of the table; only for QA and teaching."""
    size = round(HEIGHT_MM / pixel_mm)
    grid = patch_grid((row["x"], row["y"], row["z"]), side, (1, size, size), (pixel_mm,) * 3)
    points = grid_points(grid).reshape(-1, 3)
    return truth.microstructure(row["compartment"].split("_")[0], points).reshape(size, size)


def centres(masks: sitk.Image, side: str, n_per_compartment: int, rng: np.random.Generator) -> pd.DataFrame:
    """Draw patch centres below the bearing surfaces, where femur and tibia face each other along z.

    Parameters
    ----------
    masks : label image with `BONES` values, any orientation.
    side : "L" or "R"; medial is +x (the patient's left) in a right knee.

    Returns
    -------
    DataFrame: compartment, x, y, z (LPS mm, the centre) and u, v, w: mm to medial, back and head from the middle of
    the bearing surface. Fewer rows where a compartment has no room; InputFault where the bones do not face each other.
    """
    masks = sitk.DICOMOrient(masks, "LPS")
    surface = _facing_surface(masks, side)
    picked = []
    for compartment in COMPARTMENTS:
        bone, place = compartment.split("_")
        chosen = _spread(surface[surface["place"] == place], n_per_compartment, rng)
        depth = HEIGHT_MM / 2 * (1 if bone == "femur" else -1)
        picked.append(chosen.assign(compartment=compartment, z=chosen[bone] + depth))
    found = pd.concat(picked, ignore_index=True)
    return found.assign(w=found["z"] - surface["tibia"].mean())[["compartment", "x", "y", "z", "u", "v", "w"]]


def cut(image: sitk.Image, centre: Sequence[float], side: str, shape, spacing_mm, transform=None) -> np.ndarray:
    """Sample an image once on a patch grid: cubic B-spline of the voxels around it, NaN outside the image.

    `transform` maps CT points to the image's points (None: the image is the CT). Returns float32, shape `shape`.
    """
    grid = patch_grid(centre, side, shape, spacing_mm)
    transform = transform or sitk.Transform(3, sitk.sitkIdentity)
    near = _around(image, grid, transform)
    if near is None:
        return np.full(shape, np.nan, np.float32)
    return sitk.GetArrayFromImage(
        sitk.Resample(near, grid, transform, sitk.sitkBSpline, float("nan"), sitk.sitkFloat32)
    )


def patch_grid(centre: Sequence[float], side: str, shape: Sequence[int], spacing_mm: Sequence[float]) -> sitk.Image:
    """Empty image (int8) on the patch grid around `centre` (LPS mm); its slices run from lateral to medial."""
    grid = sitk.Image([int(n) for n in reversed(shape)], sitk.sitkInt8)
    grid.SetSpacing([float(s) for s in reversed(spacing_mm)])
    medial = 1.0 if side == "R" else -1.0
    grid.SetDirection((0, 0, medial, 1, 0, 0, 0, -1, 0))
    middle = np.array(grid.TransformContinuousIndexToPhysicalPoint([(n - 1) / 2 for n in grid.GetSize()]))
    grid.SetOrigin((np.asarray(centre, float) - middle).tolist())
    return grid


def grid_points(grid: sitk.Image) -> np.ndarray:
    """Physical points (slices, rows, columns, 3) of a grid's voxel centres, LPS mm."""
    index = np.stack(np.meshgrid(*(np.arange(n) for n in reversed(grid.GetSize())), indexing="ij"), -1)[..., ::-1]
    axes = np.reshape(grid.GetDirection(), (3, 3)) * np.array(grid.GetSpacing())
    return index @ axes.T + np.array(grid.GetOrigin())


def trabecular_region(masks: sitk.Image, bone: str, centre: Sequence[float], side: str) -> np.ndarray:
    """Part of a patch inside a bone and more than 1.5 mm from its surface: bool on the MR patch grid."""
    grid = patch_grid(centre, side, MR_SHAPE, MR_SPACING_MM)
    near = _around(masks, grid, sitk.Transform(3, sitk.sitkIdentity), margin=8)
    if near is None:
        return np.zeros(MR_SHAPE, bool)
    depth = sitk.SignedMaurerDistanceMap(
        near == BONES[bone], insideIsPositive=True, squaredDistance=False, useImageSpacing=True
    )
    return sitk.GetArrayFromImage(sitk.Resample(depth, grid, sitk.Transform(), sitk.sitkLinear, -1.0)) > PLATE_MM


def keep_only(folder: str | Path, knee_ids: Sequence[str]) -> None:
    """Remove the tables of all other knees: those of a manifest that was changed since, or that fail now.

    Whoever loads the folder then reads the knees of this run alone; a knee that comes back is cut again.
    """
    for file in Path(folder).glob("*_table.csv"):
        if file.name.removesuffix("_table.csv") not in set(knee_ids):
            file.unlink()


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


def ruler_hu(table: pd.DataFrame) -> np.ndarray:
    """The ruler (n,) of a table's patches: mean of both bones' cortex, HU."""
    return table[[f"cortex_{bone}_hu" for bone in BONES]].mean(axis=1).to_numpy(float)


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


def load_table(folder: str | Path, usable: bool = True) -> pd.DataFrame:
    """The table of all patches below a folder, in the order of knees; `usable` leaves flagged patches out."""
    files = sorted(Path(folder).glob("*_table.csv"))
    if not files:
        raise InputFault(folder, "holds no patches", "register and cut at least one knee first")
    table = pd.concat([pd.read_csv(f, dtype={"knee_id": "str", "subject_id": "str"}) for f in files], ignore_index=True)
    table["flag"] = table["flag"].astype(object).fillna("")
    return table[table["flag"] == ""].reset_index(drop=True) if usable else table


def load_truth(folder: str | Path) -> pd.DataFrame:
    """True biomarkers of all patches: knee_id, patch_id and the four, as `knee_truth` or `true_patches` wrote them."""
    files = sorted(Path(folder).glob("*_truth.csv"))
    table = pd.concat([pd.read_csv(file, dtype={"knee_id": "str"}) for file in files], ignore_index=True)
    return table.dropna(subset=list(BIOMARKERS)).reset_index(drop=True)


def load_patches(folder: str | Path, usable: bool = True) -> Patches:
    """All patches below a folder with their images, in the order of `load_table`."""
    table, arrays = load_table(folder, usable), {"mr": [], "ct": [], "voi": []}
    for knee_id, rows in table.groupby("knee_id", sort=False):
        with np.load(Path(folder) / f"{knee_id}.npz") as stored:
            for name, parts in arrays.items():
                parts.append(stored[name][rows["patch_id"].to_numpy()])
    return Patches(table, **{name: np.concatenate(parts) for name, parts in arrays.items()})


def load_ct_patches(folder: str | Path, knee_ids: Sequence[str]) -> Patches:
    """Usable patches of the named knees without MR, as `ct_patches` cut them; `mr` is zero. May be empty."""
    table, ct, voi = [], [np.zeros((0, *CT_SHAPE), np.float16)], [np.zeros((0, *MR_SHAPE), bool)]
    for file in (Path(folder) / f"{knee_id}_table.csv" for knee_id in knee_ids):
        if not file.exists():
            continue  # its CT could not be cut; the row of `map_knees` says why
        rows = pd.read_csv(file, dtype={"knee_id": "str", "subject_id": "str"})
        rows = rows[rows["flag"].isna()]
        with np.load(file.with_name(file.name.replace("_table.csv", ".npz"))) as stored:
            ct.append(stored["ct"][rows["patch_id"].to_numpy()])
            voi.append(stored["voi"][rows["patch_id"].to_numpy()])
        table.append(rows)
    columns = ["knee_id", "subject_id", "patch_id", "compartment", "u", "v", "w"]
    columns += [f"cortex_{bone}_hu" for bone in BONES]
    table = pd.concat(table, ignore_index=True) if table else pd.DataFrame(columns=columns)
    return Patches(table, np.zeros((len(table), *MR_SHAPE), np.float16), np.concatenate(ct), np.concatenate(voi))


def load_rescans(folder: str | Path, table: pd.DataFrame) -> np.ndarray:
    """The second MR (n, 12, 48, 48) of the patches in `table`; KeyError for a knee that has none."""
    stacks = []
    for knee_id, patch_id in zip(table["knee_id"], table["patch_id"], strict=True):
        with np.load(Path(folder) / f"{knee_id}.npz") as stored:
            stacks.append(stored["rescan_mr"][patch_id])
    return np.array(stacks)


def with_truth(patches: Patches, truth: pd.DataFrame) -> Patches:
    """The patches whose truth is known, with columns true_bv_tv, ... in their table; `truth` as of `load_truth`."""
    named = truth.rename(columns={name: f"true_{name}" for name in BIOMARKERS})
    table = patches.table.merge(named, on=["knee_id", "patch_id"], how="left")
    kept = table["true_bv_tv"].notna().to_numpy()
    return Patches(table[kept].reset_index(drop=True), patches.mr[kept], patches.ct[kept], patches.voi[kept])


def tokens_by_arm(predictions: pd.DataFrame, reference: pd.DataFrame, knees: Sequence[str]) -> dict[str, pd.DataFrame]:
    """Patch tokens of every arm for the named knees: knee_id, subject_id, compartment, u, v, w and the biomarkers.

    `mr_reference` takes the biomarkers measured on the MR; the other arms their out-of-fold predictions.
    """
    place = ["knee_id", "patch_id", "compartment", "u", "v", "w"]
    own = ["knee_id", "subject_id", "patch_id", *BIOMARKERS]
    frames = {arm: rows[own] for arm, rows in predictions.groupby("arm", sort=False)} | {"mr_reference": reference[own]}
    joined = {arm: rows.merge(reference[place], on=["knee_id", "patch_id"]) for arm, rows in frames.items()}
    return {arm: rows[rows["knee_id"].isin(set(knees))].reset_index(drop=True) for arm, rows in joined.items()}


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


def write_truth(
    patches_folder: Path, folder: Path, knee: dict, truth: Truth, n: int | None = None, rng: np.random.Generator = None
) -> dict:
    """Measure and write the truth of a knee's usable patches, or of n of them drawn by `rng`."""
    knee_id, side = knee["knee_id"], knee["side"]
    table = pd.read_csv(patches_folder / f"{knee_id}_table.csv", dtype={"knee_id": "str", "subject_id": "str"})
    with np.load(patches_folder / f"{knee_id}.npz") as stored:
        voi = stored["voi"]
    table = table[table["flag"].isna()]
    if n is not None:
        table = table.iloc[np.sort(rng.permutation(len(table))[:n])]
    table = table.reset_index(drop=True)
    rows = [_true_biomarkers(row, voi[row["patch_id"]], side, truth) for row in table.to_dict("records")]
    found = pd.DataFrame(rows, columns=list(BIOMARKERS))
    pd.concat([table[["knee_id", "patch_id"]], found], axis=1).to_csv(folder / f"{knee_id}_truth.csv", index=False)
    return {"n_patches": len(rows)}


def _true_biomarkers(row: dict, voi: np.ndarray, side: str, truth: Truth) -> dict:
    shape = tuple(round(n * s / FINE_MM) for n, s in zip(MR_SHAPE, MR_SPACING_MM, strict=True))
    grid = patch_grid((row["x"], row["y"], row["z"]), side, shape, (FINE_MM,) * 3)
    bone = truth.microstructure(row["compartment"].split("_")[0], grid_points(grid).reshape(-1, 3)).reshape(shape)
    nearest = [((np.arange(n) + 0.5) * m / n).astype(int) for n, m in zip(shape, MR_SHAPE, strict=True)]
    found = morphometry(bone, FINE_MM, voi[np.ix_(*nearest)], further=False)
    return {name: found[name] for name in BIOMARKERS}


def _around(image: sitk.Image, grid: sitk.Image, transform: sitk.Transform, margin: int = 6) -> sitk.Image | None:
    """What a grid reaches of `image` through `transform`, plus a margin in voxels; None where it reaches nothing."""
    corners = np.array(np.meshgrid(*([-0.5, n - 0.5] for n in grid.GetSize()), indexing="ij")).reshape(3, -1).T
    points = [transform.TransformPoint(grid.TransformContinuousIndexToPhysicalPoint(c.tolist())) for c in corners]
    index = np.array([image.TransformPhysicalPointToContinuousIndex(point) for point in points])
    low = np.maximum(np.floor(index.min(axis=0)).astype(int) - margin, 0)
    high = np.minimum(np.ceil(index.max(axis=0)).astype(int) + margin + 1, image.GetSize())
    if (high - low < 4).any():
        return None
    return sitk.RegionOfInterest(image, (high - low).tolist(), low.tolist())


def _facing_surface(masks: sitk.Image, side: str) -> pd.DataFrame:
    """Columns where the bones face each other: x, y, femur and tibia (z of their surfaces), u, v (mm), place."""
    array, (dx, dy, dz) = sitk.GetArrayViewFromImage(masks), masks.GetSpacing()
    femur, tibia = array == BONES["femur"], array == BONES["tibia"]
    low, high = femur.argmax(axis=0), len(array) - 1 - tibia[::-1].argmax(axis=0)
    gap = (low - high) * dz
    facing = femur.any(axis=0) & tibia.any(axis=0) & (gap >= GAP_MM[0]) & (gap <= GAP_MM[1])
    inner = ndimage.distance_transform_edt(ndimage.binary_opening(facing), sampling=(dy, dx)) > RIM_MM
    rows, columns = np.nonzero(inner)
    if not len(rows):
        raise InputFault("bone masks", "show no femur facing a tibia", "give a CT that holds the joint line")
    z = {bone: masks.GetOrigin()[2] + k[rows, columns] * dz for bone, k in (("femur", low), ("tibia", high))}
    x, y = masks.GetOrigin()[0] + columns * dx, masks.GetOrigin()[1] + rows * dy
    u = (x - (x.min() + x.max()) / 2) * (1 if side == "R" else -1)
    place = np.where(u > MIDLINE_MM, "medial", np.where(u < -MIDLINE_MM, "lateral", ""))
    return pd.DataFrame({"x": x, "y": y, **z, "u": u, "v": y - y.mean(), "place": place})


def _spread(surface: pd.DataFrame, n: int, rng: np.random.Generator) -> pd.DataFrame:
    """At most n random columns at least APART_MM from each other."""
    shuffled = surface.iloc[rng.permutation(len(surface))]
    points, kept = shuffled[["x", "y"]].to_numpy(), []
    for candidate in range(len(points)):
        if len(kept) == n:
            break
        if all(np.hypot(*(points[candidate] - points[other])) >= APART_MM for other in kept):
            kept.append(candidate)
    return shuffled.iloc[kept]
