"""Where patches lie and how they are cut.

A patch is a sagittal stack in CT space, array (slices, rows, columns): slices along x from lateral to medial, rows
along z from top to bottom, columns along y from front to back. MR and CT patches cover the same 9 x 10.5 x 10.5 mm,
the MR on its own voxel (0.75 x 0.21875 x 0.21875 mm, BFFE of the published code), the CT twice as coarse in plane.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import SimpleITK as sitk
from scipy import ndimage

from ctsma.cohort import BONES, COMPARTMENTS, InputFault

MR_SHAPE, MR_SPACING_MM = (12, 48, 48), (0.75, 0.21875, 0.21875)
CT_SHAPE, CT_SPACING_MM = (12, 24, 24), (0.75, 0.4375, 0.4375)
HEIGHT_MM = 10.5  # of a patch below the joint surface; trabeculae adapt to load within the first 10 mm (our choice)
GAP_MM = (1.0, 15.0)  # femur and tibia face each other across two cartilages and menisci (our choice)
MIDLINE_MM = 7.0  # half width of notch and spines, which carry no plateau (our choice)
RIM_MM = 4.0  # a patch centre keeps this distance from the rim of the bearing surface (our choice)
APART_MM = 4.0  # least distance between patch centres of a compartment (our choice)
PLATE_MM = 1.5  # below the plate: thicker than the subchondral plate in OA, 0.58 to 0.72 mm (Rapagna 2021), plus blur


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
