"""One CT of a knee in, numbers with intervals and maps out: no MR, no truth, no GPU."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
import SimpleITK as sitk
from numpy import ndarray
from scipy.special import expit

from ctsma import patches
from ctsma.cohort import BIOMARKERS, BONES, COMPARTMENTS, InputFault
from ctsma.intake import side_of
from ctsma.patches import centres, cortex_hu, cut, grid_points, trabecular_region
from ctsma.registration import bone_masks, isotropic

from .ensemble import Ensemble, estimate
from .limits import check_limits, patch_measures, scan_measures

FIELD_MM = np.array(
    [110.0, 110.0, 92.0]
)  # left-right, front-back, head-foot around the joint: a large knee (our choice)
MARGIN_MM = 12.0  # around the bones, so that soft tissue is in view (our choice)
TWO_KNEES_MM = 180.0  # of bone from left to right: more than one knee has (our choice)
BONE_HU = 250.0  # as the bone masks' own
COLUMN_MM = 1.0  # between columns where patch centres are sought (our choice)
EVERYWHERE = 10_000  # patches a compartment: as many as have room 4 mm from each other
OUTSIDE = "leaves the field of view"
HALF_MM = np.array([4.5, 5.25, 5.25])  # of a patch along x, y, z


@dataclass(frozen=True)
class Knee:
    """What was found in a CT: the view of the joint (LPS, HU), bone labels on it, patches, and the numbers.

    patches : one row a patch: compartment, x, y, z, u, v, w, flag, and the biomarkers with `_low`, `_high`.
    compartments : one row each: n_patches, the biomarkers with `_low`, `_high`, `_percentile` among training knees.
    """

    view: sitk.Image
    masks: sitk.Image
    patches: pd.DataFrame
    compartments: pd.DataFrame
    oa_probability: float | None
    measures: dict[str, float]
    warnings: list[str]


def predict_knee(ct: sitk.Image, side: str, ensemble: Ensemble, stated_slice_mm: float = 0.0) -> Knee:
    """Estimate the biomarkers everywhere below a knee's bearing surfaces from its CT alone.

    Parameters
    ----------
    ct : CT in HU, any orientation and field of view that holds the joint; of two knees in view that of `side` is taken.
    side : "L" or "R".
    ensemble : model of `load_ensemble`.
    stated_slice_mm : slice thickness that the file states, where it is more than the slices' distance.

    Raises InputFault: no knee found, no room for a patch, or a CT unlike those the model was trained on.
    """
    view = joint_view(ct, side)
    masks = bone_masks(view)
    check_side(view, masks, side)
    measures = scan_measures(view, masks)
    measures["slice_mm"] = max(measures["slice_mm"], stated_slice_mm)
    limits = ensemble.about["limits"]
    warnings = check_limits(measures, limits)
    table, hu, voi = _cut(view, masks, side)
    usable = (table["flag"] == "").to_numpy()
    if not usable.any():
        raise InputFault("CT", "shows no trabecular bone below the joint", "give a CT that holds both bones' ends")
    found = patch_measures(hu[usable], voi[usable], ensemble.familiar)
    warnings += check_limits(found, limits)
    ruler_hu = np.full(usable.sum(), np.mean(list(cortex_hu(view, masks).values())))
    table.loc[usable, list(BIOMARKERS)] = estimate(ensemble.members, hu[usable], voi[usable], ruler_hu)
    compartments, about = _compartments(table[usable], ensemble.about), ensemble.about
    if absent := [place for place in COMPARTMENTS if not compartments.loc[place, "n_patches"]]:
        warnings.append(f"no patch in {', '.join(absent)}: the field of view may be too small")
    table = _with_intervals(table, about["intervals"]["patch"])
    probability = oa_probability(compartments, about["oa"]) if about["oa"] else None
    return Knee(view, masks, table, compartments, probability, measures | found, warnings)


def joint_view(ct: sitk.Image, side: str) -> sitk.Image:
    """The part of a CT around one knee joint, LPS axes: first where bone is, then where femur faces tibia.

    Coarse steps find it, so that the work does not grow with the field of view. InputFault as of `bone_masks`.
    """
    view = sitk.DICOMOrient(ct, "LPS")
    coarse = isotropic(view, 2 * COLUMN_MM)
    bone = sitk.GetArrayViewFromImage(coarse) > BONE_HU
    if not bone.any():
        raise InputFault("CT", "holds no bone above 250 HU", "give a knee CT in Hounsfield units")
    low, high = _ends(coarse, bone)
    if high[0] - low[0] > TWO_KNEES_MM:  # the patient's right lies at low x
        middle = (low[0] + high[0]) / 2
        x = grid_points(coarse)[..., 0]
        low, high = _ends(coarse, bone & ((x < middle) if side == "R" else (x >= middle)))
    view = _box(view, low - MARGIN_MM, high + MARGIN_MM)
    if (np.multiply(view.GetSize(), view.GetSpacing()) <= FIELD_MM * 1.1).all():
        return view
    labels = bone_masks(isotropic(view, COLUMN_MM))
    points, array = grid_points(labels), sitk.GetArrayViewFromImage(labels)
    tibia = points[array == BONES["tibia"]]
    top = tibia[:, 2].max()
    near = points[(array > 0) & (np.abs(points[..., 2] - top) < FIELD_MM[2] / 4)]
    centre = np.append((near.min(axis=0) + near.max(axis=0))[:2] / 2, top)
    return _box(view, centre - FIELD_MM / 2, centre + FIELD_MM / 2)


def check_side(view: sitk.Image, masks: sitk.Image, side: str) -> None:
    """InputFault where the fibula, if it is in view, lies on the inner side of the tibia."""
    found = side_of(view, masks)
    if found and found != side:
        fault = f"is {side}, but the fibula lies where a knee {found} has it"
        raise InputFault("side", fault, f"give side {found}")


def biomarker_maps(knee: Knee) -> dict[str, sitk.Image]:
    """Maps of the four biomarkers on the grid of `knee.view`, float32; 0 where nothing is estimated.

    A voxel of trabecular bone takes the mean of the patches over it, weighted by a Gaussian of its place in each.
    """
    shape = sitk.GetArrayViewFromImage(knee.view).shape
    maps = np.zeros((len(BIOMARKERS), *shape), np.float32)
    usable = knee.patches[knee.patches["flag"] == ""]
    for bone in BONES:
        rows = usable[usable["compartment"].str.startswith(bone)]
        if len(rows):
            _paint(maps, knee, bone, rows[["x", "y", "z"]].to_numpy(), rows[list(BIOMARKERS)].to_numpy())
    images = {name: sitk.GetImageFromArray(array) for name, array in zip(BIOMARKERS, maps, strict=True)}
    for image in images.values():
        image.CopyInformation(knee.view)
    return images


def oa_probability(compartments: pd.DataFrame, oa: Mapping) -> float:
    """Probability of OA by the model's logistic regression; a compartment without patches counts as the mean."""
    total = oa["intercept"]
    for name, term in oa["features"].items():
        biomarker, compartment = next((b, name.removeprefix(f"{b}_")) for b in BIOMARKERS if name.startswith(f"{b}_"))
        value = compartments.loc[compartment, biomarker]
        total += term["weight"] * ((term["fill"] if np.isnan(value) else value) - term["mean"]) / term["sd"]
    return float(expit(total))


def _cut(view: sitk.Image, masks: sitk.Image, side: str) -> tuple[pd.DataFrame, ndarray, ndarray]:
    # Fewer columns than the CT has: the search for room compares each with each, and depth needs only z.
    step = [max(1, int(COLUMN_MM / mm)) for mm in masks.GetSpacing()[:2]]
    table = centres(masks[:: step[0], :: step[1], :], side, EVERYWHERE, np.random.default_rng(0))
    places = [(row["compartment"].split("_")[0], (row["x"], row["y"], row["z"])) for row in table.to_dict("records")]
    voi = np.array([trabecular_region(masks, bone, centre, side) for bone, centre in places])
    hu = np.array([cut(view, centre, side, patches.CT_SHAPE, patches.CT_SPACING_MM) for _, centre in places])
    outside, lacking = np.isnan(hu).any(axis=(1, 2, 3)), voi.mean(axis=(1, 2, 3)) < patches.MIN_VOI
    table["flag"] = np.where(outside, OUTSIDE, np.where(lacking, patches.LACKING, ""))
    table.insert(0, "patch_id", np.arange(len(table)))
    return table.assign(**dict.fromkeys(BIOMARKERS, np.nan)), hu, voi


def _compartments(usable: pd.DataFrame, about: dict) -> pd.DataFrame:
    grouped = usable.groupby("compartment")[list(BIOMARKERS)]
    table = grouped.mean().reindex(list(COMPARTMENTS))
    table.insert(0, "n_patches", grouped.size().reindex(table.index, fill_value=0))
    table = _with_intervals(table, about["intervals"]["compartment"])
    for name in BIOMARKERS:
        known = [about["compartments"][place][name] for place in table.index]
        table[f"{name}_percentile"] = [_percentile(v, p) for v, p in zip(table[name], known, strict=True)]
    return table


def _percentile(value: float, percentiles: list[float]) -> float:
    return float(np.interp(value, percentiles, np.linspace(0, 100, len(percentiles)))) if percentiles else np.nan


def _with_intervals(table: pd.DataFrame, radii: dict) -> pd.DataFrame:
    """Columns `<biomarker>_low`, `_high`; no biomarker is negative. A radius of None is infinite: no interval."""
    for name in BIOMARKERS:
        radius = radii[name]["radius"] if radii[name]["radius"] is not None else np.nan
        table[f"{name}_low"], table[f"{name}_high"] = (table[name] - radius).clip(lower=0), table[name] + radius
    return table


def _ends(image: sitk.Image, bone: ndarray) -> tuple[ndarray, ndarray]:
    """Ends of the bone along x, y, z in mm; one voxel in a hundred may lie beyond (noise, a table)."""
    points = grid_points(image)[bone]
    low, high = np.percentile(points, (0.5, 99.5), axis=0)
    whole = grid_points(image).reshape(-1, 3)[:, 2]
    low[2], high[2] = whole.min(), whole.max()
    return low, high


def _box(image: sitk.Image, low: ndarray, high: ndarray) -> sitk.Image:
    """The voxels of an image in LPS axes between two points (mm), as far as there are any."""
    corners = np.array(np.meshgrid(*zip(low, high, strict=True), indexing="ij")).reshape(3, -1).T
    index = np.array([image.TransformPhysicalPointToContinuousIndex(corner.tolist()) for corner in corners])
    first = np.clip(np.floor(index.min(axis=0)), 0, None).astype(int)
    last = np.minimum(np.ceil(index.max(axis=0)).astype(int) + 1, image.GetSize())
    return sitk.RegionOfInterest(image, (last - first).tolist(), first.tolist())


def _paint(maps: ndarray, knee: Knee, bone: str, at: ndarray, values: ndarray) -> None:
    near = _box(knee.masks, at.min(axis=0) - HALF_MM, at.max(axis=0) + HALF_MM)
    x, y, z = knee.masks.TransformPhysicalPointToIndex(near.GetOrigin())
    region = tuple(slice(i, i + n) for i, n in zip((z, y, x), near.GetSize()[::-1], strict=True))
    depth = sitk.SignedMaurerDistanceMap(near == BONES[bone], True, False, True)  # inside positive, mm
    inside = sitk.GetArrayFromImage(depth) > patches.PLATE_MM
    points = grid_points(near)[inside]
    total, sums = np.zeros(len(points)), np.zeros((len(points), len(BIOMARKERS)))
    for centre, value in zip(at, values, strict=True):
        place = ((points - centre) / HALF_MM) ** 2
        here = np.flatnonzero((place < 1).all(axis=1))
        weight = np.exp(-2 * place[here].sum(axis=1))  # SD of half a patch's half width, as sliding windows weigh
        total[here] += weight
        sums[here] += weight[:, None] * value
    mean = np.divide(sums, total[:, None], out=np.zeros_like(sums), where=total[:, None] > 0)
    for array, column in zip(maps, mean.T, strict=True):
        array[region][inside] = column
