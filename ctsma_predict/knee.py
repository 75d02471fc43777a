"""One CT of a knee: biomarkers with intervals, maps, and the probability of osteoarthritis (OA)."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
import SimpleITK as sitk
from numpy import ndarray
from scipy.special import expit

from ctsma import patches
from ctsma.common import BIOMARKERS, BONES, COMPARTMENTS, InputError
from ctsma.patches import grid_points
from ctsma.registration.masks import BONE_HU, OWN_LABELS, bone_masks, isotropic, label_masks
from dicom_import.sides import side_of, split_knees

from .limits import check_limits, patch_measures, scan_measures
from .model import Ensemble, estimate

FIELD_MM = np.array([110.0, 110.0, 92.0])  # x, y, z: holds a large knee joint (design choice)
MARGIN_MM = 12.0  # around the bones, so that soft tissue is in view (design choice)
COLUMN_MM = 1.0  # between the columns where patch centres are sought (design choice)
AS_MANY_AS_FIT = 10_000  # patches per compartment
OUTSIDE = "leaves the field of view"
HALF_MM = np.array([4.5, 5.25, 5.25])  # half a patch along x, y, z


@dataclass(frozen=True)
class Knee:
    """What was estimated from a CT.

    joint : CT around the joint (LPS axes, HU). masks : bone labels on its grid.
    patches : one row per patch: patch_id, compartment, x, y, z, u, v, w, flag, and the biomarkers
    with `_low` and `_high`.
    compartments : one row each: n_patches, and the biomarkers with `_low`, `_high` and
    `_percentile` among the training knees.
    """

    joint: sitk.Image
    masks: sitk.Image
    patches: pd.DataFrame
    compartments: pd.DataFrame
    oa_probability: float | None
    measures: dict[str, float]
    warnings: list[str]


def predict_knee(
    ct: sitk.Image,
    side: str,
    ensemble: Ensemble,
    stated_slice_mm: float = 0.0,
    labels: sitk.Image | None = None,
) -> Knee:
    """Estimate the biomarkers everywhere below a knee's bearing surfaces from its CT alone.

    Parameters
    ----------
    ct : CT in HU that holds the joint, of any orientation and size; it may show both knees.
    side : "L" or "R".
    ensemble : of `load_ensemble`.
    stated_slice_mm : slice thickness that the file states; counts where slices overlap.
    labels : own bone labels of this knee (`label_masks`); None: bones by threshold.

    Raises InputError: no knee or not this side found, no patch fits, or a CT unlike those that the
    model was trained on.
    """
    about = ensemble.about
    own = None if labels is None else label_masks(labels, ct)
    joint = joint_view(ct, side, own)
    masks = bone_masks(joint) if own is None else _nearest(own, joint)
    check_side(joint, masks, side)
    measures = scan_measures(joint, masks)
    measures["slice_mm"] = max(measures["slice_mm"], stated_slice_mm)
    warnings = check_limits(measures, about["limits"])

    table, hu, voi = _cut_patches(joint, masks, side)
    usable = (table["flag"] == "").to_numpy()
    if not usable.any():
        remedy = "give a CT that holds both bones' ends"
        raise InputError("CT", "shows no trabecular bone below the joint", remedy)
    hu, voi = hu[usable], voi[usable]
    of_patches = patch_measures(hu, voi, ensemble.detector)
    warnings += check_limits(of_patches, about["limits"])

    cortical_hu = np.mean(list(patches.cortical_hu(joint, masks).values()))
    values = estimate(ensemble.members, hu, voi, np.full(len(hu), cortical_hu))
    table.loc[usable, list(BIOMARKERS)] = values
    _add_intervals(table, about["intervals"]["patch"])
    compartments = _compartments(table[usable], about)
    absent = compartments.index[compartments["n_patches"] == 0].tolist()
    if absent:
        reason = "the field of view is too small or the joint gap closed"
        warnings.append(f"no patch in {', '.join(absent)}: {reason}")
    probability = oa_probability(compartments, about["oa"]) if about["oa"] else None
    return Knee(
        joint=joint,
        masks=masks,
        patches=table,
        compartments=compartments,
        oa_probability=probability,
        measures=measures | of_patches,
        warnings=warnings,
    )


def joint_view(ct: sitk.Image, side: str, own: sitk.Image | None = None) -> sitk.Image:
    """Crop a CT to one knee joint, LPS axes: first to the bone, then to where femur faces tibia.

    Both are found on coarse grids, so that the field of view adds little time. `own` are bone
    labels on the grid of `ct`, which also tell which of two knees is meant; None: bones by
    threshold. Raises InputError as `bone_masks` and `split_knees`.
    """
    knee = split_knees(ct).get(side, ct) if own is None else ct
    view = sitk.DICOMOrient(knee, "LPS")
    coarse = isotropic(view, 2 * COLUMN_MM)
    if own is None:
        bone = sitk.GetArrayViewFromImage(coarse) > BONE_HU
    else:
        bone = sitk.GetArrayFromImage(_nearest(own, coarse)) > 0
    if not bone.any():
        problem = f"holds no bone above {BONE_HU:.0f} HU"
        raise InputError("CT", problem, f"give a knee CT in Hounsfield units, {OWN_LABELS}")
    # 1 % of the bone voxels may lie outside: noise, a table. Along z the whole CT is kept.
    low, high = np.percentile(grid_points(coarse)[bone], (0.5, 99.5), axis=0)
    z = grid_points(coarse)[..., 2]
    low[2], high[2] = z.min(), z.max()
    view = _crop(view, low - MARGIN_MM, high + MARGIN_MM)
    if (np.multiply(view.GetSize(), view.GetSpacing()) <= FIELD_MM * 1.1).all():
        return view
    fine = isotropic(view, COLUMN_MM)
    masks = bone_masks(fine) if own is None else _nearest(own, fine)
    points, labels = grid_points(masks), sitk.GetArrayViewFromImage(masks)
    plateau_z = points[labels == BONES["tibia"]][:, 2].max()
    near = points[(labels > 0) & (np.abs(points[..., 2] - plateau_z) < FIELD_MM[2] / 4)]
    x, y, _ = (near.min(axis=0) + near.max(axis=0)) / 2
    centre = np.array([x, y, plateau_z])
    return _crop(view, centre - FIELD_MM / 2, centre + FIELD_MM / 2)


def check_side(joint: sitk.Image, masks: sitk.Image, side: str) -> None:
    """Raise InputError where the fibula, if it is in view, lies medial of the tibia."""
    found = side_of(joint, masks)
    if found and found != side:
        problem = f"is {side}, but the fibula lies where it lies in a knee {found}"
        raise InputError("side", problem, f"give side {found}")


def biomarker_maps(knee: Knee) -> dict[str, sitk.Image]:
    """Maps of the biomarkers on the grid of `knee.joint`, float32; 0 where nothing is estimated.

    A voxel of trabecular bone takes the mean of the patches that hold it, weighted by a Gaussian of
    its place in each patch (SD: half of half a patch).
    """
    maps = np.zeros((len(BIOMARKERS), *reversed(knee.joint.GetSize())), np.float32)
    usable = knee.patches[knee.patches["flag"] == ""]
    for bone, label in BONES.items():
        rows = usable[usable["compartment"].str.startswith(bone)]
        if rows.empty:
            continue
        centres, values = rows[["x", "y", "z"]].to_numpy(), rows[list(BIOMARKERS)].to_numpy()
        near = _crop(knee.masks, centres.min(axis=0) - HALF_MM, centres.max(axis=0) + HALF_MM)
        depth_mm = sitk.SignedMaurerDistanceMap(near == label, True, False, True)
        inside = sitk.GetArrayFromImage(depth_mm) > patches.PLATE_MM
        points = grid_points(near)[inside]
        weights, sums = np.zeros((len(points), 1)), np.zeros((len(points), len(BIOMARKERS)))
        for centre, value in zip(centres, values, strict=True):
            place = ((points - centre) / HALF_MM) ** 2
            here = np.flatnonzero((place < 1).all(axis=1))
            weight = np.exp(-2 * place[here].sum(axis=1))[:, None]
            weights[here] += weight
            sums[here] += weight * value
        means = np.divide(sums, weights, out=np.zeros_like(sums), where=weights > 0)
        x, y, z = knee.masks.TransformPhysicalPointToIndex(near.GetOrigin())
        depth, height, width = inside.shape
        region = maps[:, z : z + depth, y : y + height, x : x + width]
        region[:, inside] = means.T
    images = {}
    for name, array in zip(BIOMARKERS, maps, strict=True):
        images[name] = sitk.GetImageFromArray(array)
        images[name].CopyInformation(knee.joint)
    return images


def oa_probability(compartments: pd.DataFrame, oa: Mapping) -> float:
    """Probability of OA by the model's logistic regression; an empty compartment is imputed."""
    terms = pd.DataFrame(oa["features"]).T
    values = pd.Series(
        {f"{b}_{place}": compartments.loc[place, b] for b in BIOMARKERS for place in COMPARTMENTS}
    )
    scaled = (values.fillna(terms["imputed"]) - terms["mean"]) / terms["sd"]
    return float(expit(oa["intercept"] + (terms["coefficient"] * scaled).sum()))


def _cut_patches(
    joint: sitk.Image, masks: sitk.Image, side: str
) -> tuple[pd.DataFrame, ndarray, ndarray]:
    """All patches that fit: table, CT (n, 12, 24, 24) and trabecular bone (n, 12, 48, 48)."""
    # Every x-th column is enough to find centres, and the search compares each column with each.
    dx, dy = (max(1, int(COLUMN_MM / mm)) for mm in masks.GetSpacing()[:2])
    rng = np.random.default_rng(0)
    table = patches.patch_centres(masks[::dx, ::dy, :], side, AS_MANY_AS_FIT, rng)
    hu, voi = [], []
    for row in table.to_dict("records"):
        centre, bone = (row["x"], row["y"], row["z"]), row["compartment"].split("_")[0]
        shape, spacing_mm = patches.CT_SHAPE, patches.CT_SPACING_MM
        hu.append(patches.sample_patch(joint, centre, side, shape, spacing_mm))
        voi.append(patches.trabecular_mask(masks, bone, centre, side))
    hu, voi = np.array(hu), np.array(voi)
    outside = np.isnan(hu).any(axis=(1, 2, 3))
    lacking = voi.mean(axis=(1, 2, 3)) < patches.MIN_VOI
    table["flag"] = np.where(outside, OUTSIDE, np.where(lacking, patches.LACKING, ""))
    table.insert(0, "patch_id", np.arange(len(table)))
    return table, hu, voi


def _compartments(usable: pd.DataFrame, about: Mapping) -> pd.DataFrame:
    """Means of the usable patches per compartment, with intervals and percentiles."""
    grouped = usable.groupby("compartment")[list(BIOMARKERS)]
    table = grouped.mean().reindex(list(COMPARTMENTS))
    table.insert(0, "n_patches", grouped.size().reindex(table.index, fill_value=0))
    _add_intervals(table, about["intervals"]["compartment"])
    percents = np.linspace(0, 100, 21)
    for name in BIOMARKERS:
        for place, value in table[name].items():
            known = about["reference_percentiles"][f"{name}_{place}"]
            table.loc[place, f"{name}_percentile"] = np.interp(value, known, percents)
    return table


def _add_intervals(table: pd.DataFrame, intervals: Mapping) -> None:
    """Add columns `<biomarker>_low` (at least 0) and `_high`; NaN where there is no interval."""
    for name in BIOMARKERS:
        radius = intervals[name]["radius"]
        radius = np.nan if radius is None else radius  # JSON has no infinity
        table[f"{name}_low"] = (table[name] - radius).clip(lower=0)
        table[f"{name}_high"] = table[name] + radius


def _nearest(labels: sitk.Image, grid: sitk.Image) -> sitk.Image:
    return sitk.Resample(labels, grid, sitk.Transform(), sitk.sitkNearestNeighbor)


def _crop(image: sitk.Image, low: ndarray, high: ndarray) -> sitk.Image:
    """The voxels of an image (LPS axes, small rotation) between two points in mm."""
    corners = np.array(np.meshgrid(*zip(low, high, strict=True), indexing="ij")).reshape(3, -1).T
    index = np.array([image.TransformPhysicalPointToContinuousIndex(c.tolist()) for c in corners])
    first = np.clip(np.floor(index.min(axis=0)), 0, None).astype(int)
    last = np.minimum(np.ceil(index.max(axis=0)).astype(int) + 1, image.GetSize())
    return sitk.RegionOfInterest(image, (last - first).tolist(), first.tolist())
