"""Patches: the same piece of subchondral bone in CT and MR, cut, measured and read back.

A patch is a sagittal stack placed in CT space, array (slices, rows, columns): slices along x from
lateral to medial, rows along z from top to bottom, columns along y from front to back. MR and CT
patches cover the same 9 x 10.5 x 10.5 mm, the MR on its own voxel (0.75 x 0.21875 x 0.21875 mm,
BFFE of the published code), the CT twice as coarse in plane. Points are (x, y, z) in LPS mm.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import SimpleITK as sitk
from numpy import ndarray
from scipy import ndimage

from ctsma.biomarkers import ct_threshold_biomarkers, mr_biomarkers
from ctsma.cohort import read_knee_volume
from ctsma.common import BIOMARKERS, BONES, COMPARTMENTS, InputError
from ctsma.files import atomic, write_text
from ctsma.registration import knee_masks, read_transforms
from ctsma.registration.masks import OWN_LABELS

MR_SHAPE, MR_SPACING_MM = (12, 48, 48), (0.75, 0.21875, 0.21875)
CT_SHAPE, CT_SPACING_MM = (12, 24, 24), (0.75, 0.4375, 0.4375)
# Depth of a patch below the joint surface: trabeculae adapt to load within the first 10 mm
HEIGHT_MM = 10.5  # design choice
GAP_MM = (1.0, 15.0)  # between facing bones: two cartilages and menisci; design choice
MIDLINE_MM = 7.0  # half width of notch and spines, which carry no plateau; design choice
RIM_MM = 4.0  # from a patch centre to the rim of the bearing surface; design choice
APART_MM = 4.0  # least distance between patch centres of a compartment; design choice
# The notch: least share of each bearing area, and its depth over theirs. Complete knees have 0.45
# and at most 0.4, knees cut at the middle 0.1; design choice
MIN_AREA, MAX_NOTCH = 0.25, 0.7
NOTCH_SD_MM = 2.0  # smoothing of the depth along x; design choice
PLATEAU_MM = 60.0  # least width of a complete tibia; design choice
# Subchondral plate: 0.58 to 0.72 mm thick in OA (Rapagna 2021), plus the blur of the images
PLATE_MM = 1.5

# Images of a patch, as stored
IMAGES = {"mr": (MR_SHAPE, np.float16), "ct": (CT_SHAPE, np.float16), "voi": (MR_SHAPE, np.bool_)}
PORTION = 1024  # patches whose images are in memory at once, about 0.2 GB; design choice

MIN_VOI = 0.25  # share of a patch that must be trabecular bone; design choice
MARROW_SHARE = 0.4  # of the knee's median patch; coil sensitivity varies by a fifth; design choice
SHAFT_MM = 10.0  # length of cortex, at the end of a bone far from the joint; design choice
CORTEX_PERCENTILE = 99.5  # of the HU there; design choice
LACKING = "trabecular bone fills less than a quarter"
OUTSIDE = "leaves the MR field of view"
OUTSIDE_CT = "leaves the CT field of view"
NO_MARROW = "no marrow signal"

TABLE, CT_ONLY_TABLE = "patches.csv", "ct_only.csv"
COLUMNS = ["knee_id", "subject_id", "patch_id", "compartment", "u", "v", "w", "mean_hu", "flag"]


@dataclass(frozen=True)
class StoredImages:
    """Images (n, slices, rows, columns) in the files of their knees, read where they are indexed.

    name : of `IMAGES`. table : knee_id and patch_id of each row.
    """

    folder: Path
    name: str
    table: pd.DataFrame

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, rows: int | slice | ndarray) -> ndarray:
        at, (shape, dtype) = np.arange(len(self))[rows], IMAGES[self.name]
        images = np.empty((at.size, *shape), dtype)
        wanted = self.table.iloc[at.ravel()].reset_index(drop=True)
        for knee_id, own in wanted.groupby("knee_id"):
            with np.load(self.folder / f"{knee_id}.npz") as stored:
                values = stored[self.name][own["patch_id"]]
            images = images.astype(values.dtype, copy=False)
            images[own.index] = values
        return images.reshape(at.shape + shape)


@dataclass(frozen=True)
class Patches:
    """Patches row by row: table, mr and voi (n, 12, 48, 48), ct (n, 12, 24, 24) HU.

    Images are arrays, or `StoredImages` of many knees; `[:]` makes an array of either.
    """

    table: pd.DataFrame
    mr: ndarray | StoredImages
    ct: ndarray | StoredImages
    voi: ndarray | StoredImages

    def take(self, rows: ndarray) -> "Patches":
        """Some rows, with their images in memory."""
        return Patches(self.table.iloc[rows], self.mr[rows], self.ct[rows], self.voi[rows])


def extract_patches(
    knee: Mapping,
    folder: str | Path,
    *,
    root: str | Path,
    registration_folder: str | Path,
    n_per_compartment: int,
    seed: int,
    definition: str,
) -> dict:
    """Cut and measure the patches of one registered knee (for `map_knees`).

    Writes `<knee>.npz` (ct, mr, voi, rescan_mr) and `<knee>_table.csv` into `folder`; `definition`
    is one of `biomarkers.DEFINITIONS`. Returns n_patches and n_flagged. Raises InputError where the
    registration failed or was flagged: the knee becomes a row with that reason.
    """
    registered, knee_id = Path(registration_folder), knee["knee_id"]
    ct, mr = read_knee_volume(knee, "ct", root), read_knee_volume(knee, "mr", root)
    masks = sitk.ReadImage(str(registered / f"{knee_id}_mask.nii.gz"))
    scans = {"": (mr, read_transforms(registered, knee_id))}
    has_rescan = isinstance(knee.get("mr_rescan"), str)
    if has_rescan and (registered / f"{knee_id}_rescan_femur.tfm").exists():
        rescan = read_knee_volume(knee, "mr_rescan", root)
        scans["rescan_"] = rescan, read_transforms(registered, f"{knee_id}_rescan")
    return cut_and_measure(knee, folder, ct, masks, scans, n_per_compartment, seed, definition)


def extract_ct_patches(
    knee: Mapping, folder: str | Path, *, root: str | Path, n_per_compartment: int, seed: int
) -> dict:
    """Cut the patches of a knee that has a CT and no usable MR (for `map_knees`).

    Files and result as of `extract_patches`, without MR and biomarkers. The bones are found as for
    a pair (`knee_masks`), so the patches lie where they would lie with an MR. Raises InputError
    where the CT does not show the joint.
    """
    ct = read_knee_volume(knee, "ct", root)
    masks = knee_masks(knee, ct, root)
    return cut_and_measure(knee, folder, ct, masks, {}, n_per_compartment, seed, "")


def cut_and_measure(
    knee: Mapping,
    folder: str | Path,
    ct: sitk.Image,
    masks: sitk.Image,
    scans: Mapping[str, tuple[sitk.Image, Mapping[str, sitk.Transform]]],
    n_per_compartment: int,
    seed: int,
    definition: str,
) -> dict:
    """Place, cut, measure and write the patches of one knee, as `extract_patches` describes.

    masks : label image with `BONES` values. scans : column prefix ("", "rescan_") -> MR and, by
    bone, the transform from CT points to its points; empty for a knee with CT alone.
    """
    # A generator of the knee's own: its patches do not depend on the other knees of the cohort.
    rng = np.random.default_rng([seed, *knee["knee_id"].encode()])
    side = knee["side"]
    table = patch_centres(masks, side, n_per_compartment, rng)
    table.insert(0, "patch_id", np.arange(len(table)))
    table.insert(0, "subject_id", knee["subject_id"])
    table.insert(0, "knee_id", knee["knee_id"])
    bones = [compartment.split("_")[0] for compartment in table["compartment"]]
    places = list(zip(bones, table[["x", "y", "z"]].to_numpy(), strict=True))

    voi = np.array([trabecular_mask(masks, bone, centre, side) for bone, centre in places])
    grid = CT_SHAPE, CT_SPACING_MM
    ct_patches = np.array([sample_patch(ct, centre, side, *grid) for _, centre in places])
    arrays = {"voi": voi.astype(bool), "ct": ct_patches.astype(np.float16)}
    for prefix, (mr, transforms) in scans.items():
        grid = MR_SHAPE, MR_SPACING_MM
        stack = [sample_patch(mr, centre, side, *grid, transforms[b]) for b, centre in places]
        mr_patches = np.array(stack)
        arrays[f"{prefix}mr"] = mr_patches.astype(np.float16)
        table = table.assign(**measure_reference(mr_patches, voi, definition, prefix))
    if knee.get("has_reference") == 0:
        table[list(BIOMARKERS)] = np.nan  # the pair serves distillation alone
    if not scans:
        table["flag"] = np.where(voi.mean(axis=(1, 2, 3)) < MIN_VOI, LACKING, "")
    outside_ct = np.isnan(ct_patches).any(axis=(1, 2, 3)) & (table["flag"] == "")
    table["flag"] = table["flag"].mask(outside_ct, OUTSIDE_CT)
    table = table.assign(**threshold_baseline(ct_patches, voi), **cortical_hu(ct, masks))

    stem = Path(folder) / knee["knee_id"]
    write_text(f"{stem}_table.csv", table.to_csv(index=False))
    with atomic(f"{stem}.npz") as temporary:
        np.savez(temporary, **arrays)
    files = [f"{knee['knee_id']}_table.csv", f"{knee['knee_id']}.npz"]
    n_flagged = int((table["flag"] != "").sum())
    return {"n_patches": len(table), "n_flagged": n_flagged, "files": files}


def patch_centres(
    masks: sitk.Image, side: str, n_per_compartment: int, rng: np.random.Generator
) -> pd.DataFrame:
    """Draw patch centres below the bearing surfaces, where femur and tibia face each other along z.

    Parameters
    ----------
    masks : label image with `BONES` values, any orientation.
    side : "L" or "R"; medial is +x (the patient's left) in a right knee.

    Returns
    -------
    DataFrame: compartment; x, y, z of the centre (LPS mm); u, v, w: mm to medial, back and head
    from the middle of the bearing surface. Fewer rows where a compartment holds fewer patches.
    Raises InputError as `bearing_surface`.
    """
    surface = bearing_surface(masks, side)
    drawn = []
    for compartment in COMPARTMENTS:
        bone, place = compartment.split("_")
        rows = _apart(surface[surface["place"] == place], n_per_compartment, rng)
        depth = HEIGHT_MM / 2 if bone == "femur" else -HEIGHT_MM / 2
        drawn.append(rows.assign(compartment=compartment, z=rows[bone] + depth))
    centres = pd.concat(drawn, ignore_index=True)
    centres["w"] = centres["z"] - surface["tibia"].mean()
    return centres[["compartment", "x", "y", "z", "u", "v", "w"]]


def bearing_surface(masks: sitk.Image, side: str) -> pd.DataFrame:
    """Columns where femur and tibia face each other, without a rim of 4 mm.

    Returns
    -------
    DataFrame: x, y, and z of both surfaces (femur, tibia), LPS mm; u, v as of `patch_centres`;
    place: "medial", "lateral", or "" between them. Raises InputError where the bones do not face
    each other, or where a bone that is cut shows no notch between two bearing areas.
    """
    masks = sitk.DICOMOrient(masks, "LPS")
    labels = sitk.GetArrayViewFromImage(masks)
    dx, dy, dz = masks.GetSpacing()
    femur, tibia = labels == BONES["femur"], labels == BONES["tibia"]
    femur_low = femur.argmax(axis=0)
    tibia_high = len(labels) - 1 - tibia[::-1].argmax(axis=0)
    gap_mm = (femur_low - tibia_high) * dz
    facing = femur.any(axis=0) & tibia.any(axis=0)
    facing &= (gap_mm >= GAP_MM[0]) & (gap_mm <= GAP_MM[1])
    facing = ndimage.binary_opening(facing)
    inner = ndimage.distance_transform_edt(facing, sampling=(dy, dx)) > RIM_MM
    rows, columns = np.nonzero(inner)
    if not len(rows):
        problem = f"show no femur facing a tibia across {GAP_MM[0]:g} to {GAP_MM[1]:g} mm"
        remedy = f"give a CT that holds the joint line, {OWN_LABELS}"
        raise InputError("bone masks", problem, remedy)
    axes = np.reshape(masks.GetDirection(), (3, 3)) * masks.GetSpacing()
    index = [np.column_stack([columns, rows, k[rows, columns]]) for k in (femur_low, tibia_high)]
    above, below = index @ axes.T + masks.GetOrigin()
    x, y, _ = ((above + below) / 2).T  # of above and below where the image's axes are LPS
    middle = _notch_mm(x)
    if middle is None:  # one bearing area, or no notch: the tibia tells which, if it is whole
        middle = _tibia_middle_mm(masks)
    u = (x - middle) * (1 if side == "R" else -1)
    place = np.where(u > MIDLINE_MM, "medial", np.where(u < -MIDLINE_MM, "lateral", ""))
    surface = {"x": x, "y": y, "femur": above[:, 2], "tibia": below[:, 2]}
    return pd.DataFrame({**surface, "u": u, "v": y - y.mean(), "place": place})


def _notch_mm(x: ndarray) -> float | None:
    """Where the notch separates two bearing areas, from the x of all columns; None without it.

    This is the middle of the bearing surface, unless a cut area moves it off the notch.
    """
    middle = (x.min() + x.max()) / 2
    depth = np.bincount((x - x.min()).astype(int))  # columns per mm
    smooth = ndimage.gaussian_filter1d(depth.astype(float), NOTCH_SD_MM, mode="constant")
    left, right = np.maximum.accumulate(smooth), np.maximum.accumulate(smooth[::-1])[::-1]
    lower = np.minimum(left, right)
    notch = int(np.flatnonzero(lower - smooth >= 0.9 * (lower - smooth).max()).mean())
    share = depth[:notch].sum() / depth.sum()
    if smooth[notch] > MAX_NOTCH * lower[notch] or not MIN_AREA < share < 1 - MIN_AREA:
        return None
    notch_mm = x.min() + notch + 0.5
    return middle if abs(notch_mm - middle) < MIDLINE_MM else notch_mm


def _tibia_middle_mm(masks: sitk.Image) -> float:
    """x of the middle of a tibia that is whole from left to right; `masks` in LPS order."""
    tibia = sitk.GetArrayViewFromImage(masks) == BONES["tibia"]
    extent = np.flatnonzero(tibia.any(axis=(0, 1)))
    width_mm = (np.ptp(extent) + 1) * masks.GetSpacing()[0]
    cut = extent[0] == 0 or extent[-1] == masks.GetSize()[0] - 1
    if cut or width_mm < PLATEAU_MM:
        why = "that a side of the image cuts" if cut else f"(at least {PLATEAU_MM:.0f} mm)"
        problem = f"show no notch between two condyles, and {width_mm:.0f} mm of a tibia {why}"
        raise InputError("bone masks", problem, "give a CT that holds both condyles")
    index = (extent.mean(), *(n / 2 for n in masks.GetSize()[1:]))
    return masks.TransformContinuousIndexToPhysicalPoint(index)[0]


def _apart(surface: pd.DataFrame, n: int, rng: np.random.Generator) -> pd.DataFrame:
    """At most n random rows at least APART_MM from each other."""
    shuffled = surface.iloc[rng.permutation(len(surface))]
    points, kept = shuffled[["x", "y"]].to_numpy(), []
    for candidate, point in enumerate(points):
        if len(kept) == n:
            break
        if all(np.hypot(*(point - points[other])) >= APART_MM for other in kept):
            kept.append(candidate)
    return shuffled.iloc[kept]


def sample_patch(
    image: sitk.Image,
    centre: Sequence[float],
    side: str,
    shape: Sequence[int],
    spacing_mm: Sequence[float],
    transform: sitk.Transform | None = None,
) -> ndarray:
    """Sample an image once on a patch grid by cubic B-splines; NaN outside the image.

    `transform` maps CT points to the image's points (None: the image is the CT). Returns float32
    of `shape`.
    """
    grid = patch_grid(centre, side, shape, spacing_mm)
    transform = transform or sitk.Transform(3, sitk.sitkIdentity)
    region = _region_around(image, grid, transform, margin=6)
    if region is None:
        return np.full(shape, np.nan, np.float32)
    outside = float("nan")
    sampled = sitk.Resample(region, grid, transform, sitk.sitkBSpline, outside, sitk.sitkFloat32)
    return sitk.GetArrayFromImage(sampled)


def trabecular_mask(masks: sitk.Image, bone: str, centre: Sequence[float], side: str) -> ndarray:
    """Part of a patch inside a bone and below its plate: bool on the MR patch grid."""
    grid = patch_grid(centre, side, MR_SHAPE, MR_SPACING_MM)
    region = _region_around(masks, grid, sitk.Transform(3, sitk.sitkIdentity), margin=8)
    if region is None:
        return np.zeros(MR_SHAPE, bool)
    depth = sitk.SignedMaurerDistanceMap(
        region == BONES[bone], insideIsPositive=True, squaredDistance=False, useImageSpacing=True
    )
    depth_mm = sitk.Resample(depth, grid, sitk.Transform(), sitk.sitkLinear, -1.0)
    return sitk.GetArrayFromImage(depth_mm) > PLATE_MM


def patch_grid(
    centre: Sequence[float], side: str, shape: Sequence[int], spacing_mm: Sequence[float]
) -> sitk.Image:
    """Empty image (int8) on the patch grid around `centre`; its slices run to medial."""
    grid = sitk.Image([int(n) for n in reversed(shape)], sitk.sitkInt8)
    grid.SetSpacing([float(s) for s in reversed(spacing_mm)])
    medial = 1.0 if side == "R" else -1.0
    grid.SetDirection((0, 0, medial, 1, 0, 0, 0, -1, 0))
    middle = [(n - 1) / 2 for n in grid.GetSize()]
    offset = np.array(grid.TransformContinuousIndexToPhysicalPoint(middle))
    grid.SetOrigin((np.asarray(centre, float) - offset).tolist())
    return grid


def to_ct_grid(fine: np.ndarray) -> np.ndarray:
    """Mean of an MR patch or mask (n, 12, 48, 48) over each CT voxel: (n, 12, 24, 24) float32."""
    return fine.reshape(len(fine), 12, 24, 2, 24, 2).mean((3, 5), dtype=np.float32)


def grid_points(grid: sitk.Image) -> ndarray:
    """Physical points (slices, rows, columns, 3) of a grid's voxel centres, LPS mm."""
    ranges = [np.arange(n) for n in reversed(grid.GetSize())]
    index = np.stack(np.meshgrid(*ranges, indexing="ij"), -1)[..., ::-1]  # numpy order to (x, y, z)
    axes = np.reshape(grid.GetDirection(), (3, 3)) * np.array(grid.GetSpacing())
    return index @ axes.T + np.array(grid.GetOrigin())


def _region_around(
    image: sitk.Image, grid: sitk.Image, transform: sitk.Transform, margin: int
) -> sitk.Image | None:
    """What a grid covers of `image` through `transform`, plus a margin in voxels; None: nothing."""
    ends = [(-0.5, n - 0.5) for n in grid.GetSize()]
    corners = np.array(np.meshgrid(*ends, indexing="ij")).reshape(3, -1).T
    index = []
    for corner in corners:
        place = grid.TransformContinuousIndexToPhysicalPoint(corner.tolist())
        point = transform.TransformPoint(place)
        index.append(image.TransformPhysicalPointToContinuousIndex(point))
    low = np.maximum(np.floor(np.min(index, axis=0)).astype(int) - margin, 0)
    high = np.ceil(np.max(index, axis=0)).astype(int) + margin + 1
    size = np.minimum(high, image.GetSize()) - low
    if (size < 4).any():
        return None
    return sitk.RegionOfInterest(image, size.tolist(), low.tolist())


def measure_reference(mr: ndarray, voi: ndarray, definition: str, prefix: str = "") -> dict:
    """Columns of the MR reference of a knee's patches (n, 12, 48, 48): four biomarkers and flag.

    NaN and a reason in the flag where a patch cannot be measured. Noise alone (a signal void, or
    solid bone) has texture too: a patch whose brightest voxels lie far below those of the knee's
    other patches holds no marrow to measure against.
    """
    complete = np.nan_to_num(mr)
    measured = mr_biomarkers(complete, voi, MR_SPACING_MM, definition=definition)
    pairs = zip(complete, voi, strict=True)
    bright = [np.quantile(patch[region], 0.95) if region.any() else 0 for patch, region in pairs]
    flag = np.array(measured["flag"], dtype=object)
    flag[np.array(bright) < MARROW_SHARE * np.median(bright)] = NO_MARROW
    flag[np.isnan(mr).any(axis=(1, 2, 3))] = OUTSIDE
    flag[voi.mean(axis=(1, 2, 3)) < MIN_VOI] = LACKING
    columns = {}
    for name in BIOMARKERS:
        columns[f"{prefix}{name}"] = np.where(flag == "", measured[name], np.nan)
    return columns | {f"{prefix}flag": flag}


def threshold_baseline(ct: ndarray, voi: ndarray) -> dict[str, ndarray]:
    """Columns mean_hu and threshold_<biomarker>, measured on the thresholded CT, for comparison."""
    inside = voi[:, :, ::2, ::2]
    hu = np.nan_to_num(ct)
    count = np.maximum(inside.sum(axis=(1, 2, 3)), 1)
    mean_hu = np.where(inside, hu, 0).sum(axis=(1, 2, 3)) / count
    measured = ct_threshold_biomarkers(hu, inside, CT_SPACING_MM)
    return {"mean_hu": mean_hu} | {f"threshold_{name}": measured[name] for name in BIOMARKERS}


def cortical_hu(ct: sitk.Image, masks: sitk.Image) -> dict[str, float]:
    """HU of each bone's dense cortex far from the joint: cortical_hu_femur and cortical_hu_tibia.

    Internal calibration in place of a phantom: the HU of fully mineralised bone differs by a factor
    of two between people and tube voltages, and cortex thicker than the point spread shows it.
    Design choice.
    """
    ct, masks = sitk.DICOMOrient(ct, "LPS"), sitk.DICOMOrient(masks, "LPS")
    hu, labels = sitk.GetArrayViewFromImage(ct), sitk.GetArrayViewFromImage(masks)
    columns = {}
    for bone, value in BONES.items():
        slices = shaft_slices(masks, bone)
        columns[f"cortical_hu_{bone}"] = percentile_hu(hu[slices], labels[slices] == value)
    return columns


def shaft_slices(masks: sitk.Image, bone: str) -> slice:
    """Axial slices of the 10 mm of a bone farthest from the joint; `masks` in LPS order."""
    labels = sitk.GetArrayViewFromImage(masks)
    rows = np.flatnonzero((labels == BONES[bone]).any((1, 2)))
    if not len(rows):
        raise InputError("bone masks", f"hold no {bone}", "give labels of both bones")
    n = max(1, round(SHAFT_MM / masks.GetSpacing()[2]))
    if bone == "femur":
        return slice(max(rows[-1] + 1 - n, rows[0]), rows[-1] + 1)
    return slice(rows[0], rows[0] + n)


def percentile_hu(hu: ndarray, inside: ndarray) -> float:
    """HU exceeded by half a per cent of the voxels inside a bone; arrays of one shape."""
    return float(np.percentile(hu[inside], CORTEX_PERCENTILE))


def mean_cortical_hu(table: pd.DataFrame) -> ndarray:
    """Cortical HU (n,) of the patches' knees: the mean of both bones."""
    return table[[f"cortical_hu_{bone}" for bone in BONES]].mean(axis=1).to_numpy(float)


def collect_tables(folder: str | Path, knee_ids: Iterable[str]) -> pd.DataFrame:
    """One table of all patches of the named knees, flagged ones too, in the order of the ids."""
    parts = [read_table(Path(folder) / f"{knee_id}_table.csv") for knee_id in sorted(knee_ids)]
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=COLUMNS)


def read_table(path: str | Path) -> pd.DataFrame:
    """A table of patches with ids as text and the flag "" where there is none."""
    if not Path(path).exists():
        raise InputError(path, "does not exist", "run notebook 02 first, which cuts the patches")
    table = pd.read_csv(path, dtype={"knee_id": "str", "subject_id": "str"})
    return table.assign(flag=table["flag"].astype(object).fillna(""))


def load_table(folder: str | Path, usable: bool = True) -> pd.DataFrame:
    """patches.csv of a folder; `usable` leaves flagged patches out."""
    table = read_table(Path(folder) / TABLE)
    return table[table["flag"] == ""].reset_index(drop=True) if usable else table


def load_patches(folder: str | Path) -> Patches:
    """The usable patches of a folder with their images, in the order of `load_table`."""
    table = load_table(folder)
    return Patches(table, *(StoredImages(Path(folder), name, table) for name in IMAGES))


def load_ct_only_patches(folder: str | Path) -> Patches:
    """The usable patches of knees with CT alone; `mr` is zero. May be empty.

    `folder` is that of the paired knees; it holds ct_only.csv and the images in ct_only/.
    """
    table = read_table(Path(folder) / CT_ONLY_TABLE)
    table = table[table["flag"] == ""].reset_index(drop=True)
    ct, voi = (StoredImages(Path(folder) / "ct_only", name, table) for name in ("ct", "voi"))
    return Patches(table, mr=np.zeros((len(table), *MR_SHAPE), np.float16), ct=ct, voi=voi)


def portions(rows: ndarray, size: int = PORTION) -> Iterator[ndarray]:
    """Rows in their order, `size` at a time."""
    for start in range(0, len(rows), size):
        yield rows[start : start + size]
