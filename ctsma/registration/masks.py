"""Femur and tibia in a knee CT: threshold, filled marrow, split at the joint, the pair that faces each other.

A mask only tells registration where to look (1 mm of margin more or less changes the transform by hundredths of
a millimetre), so everything works on a 1 mm grid and is carried back to the CT grid at the end.
"""

import numpy as np
import SimpleITK as sitk
from scipy import ndimage

from ctsma.cohort import BONES, InputFault

MASK_SPACING_MM = 1.0  # our choice: finer than the joint gap, a second of work
BONE_HU = 200.0  # 250 in the published code; soft cortex of 300 HU needs less once blurred (our choice)
FAT_HU = -30.0  # every knee holds fat below this; an MR or a CT with a wrong offset does not (our choice)
EDGE_MM = 0.0  # the 250 HU contour of a cortex blurred to 1 mm lies about this far outside it (our choice)
SMALLEST_BONE = 0.15  # of all bone in view; patella and fibula are 4-6 % of a knee (our choice)
SMALLEST_MARKER = 0.0004  # of all bone, eroded: smaller pieces are noise and join a bone (our choice)
FACING_MM2 = 400.0  # femur above tibia, axial area; a whole plateau has about 3000 mm2 (our choice)
THIN_MM = (4.0, 3.0)  # patella and fibula are thicker than twice this, osteophytes are not (our choice)
SPLIT_MM = (6.0, 5.0, 4.0, 3.0, 2.0, 1.0, 7.0, 8.0)  # erosions tried: 6 mm also parts patella and fibula (our choice)


def isotropic(image: sitk.Image, spacing_mm: float) -> sitk.Image:
    """Image on an isotropic grid of the same box: averaged over whole voxels first, then linear (no aliasing)."""
    shrink = [max(1, int(spacing_mm / s)) for s in image.GetSpacing()]
    image = sitk.BinShrink(image, [min(k, n) for k, n in zip(shrink, image.GetSize(), strict=True)])
    extent_mm = np.multiply(image.GetSize(), image.GetSpacing())
    size = np.maximum(np.round(extent_mm / spacing_mm), 1).astype(int)
    first = (spacing_mm - np.array(image.GetSpacing())) / 2 / np.array(image.GetSpacing())
    origin = image.TransformContinuousIndexToPhysicalPoint(first.tolist())
    size, direction = size.tolist(), image.GetDirection()
    args = (sitk.Transform(), sitk.sitkLinear, origin, [spacing_mm] * 3, direction, 0.0, sitk.sitkFloat32, True)
    return sitk.Resample(image, size, *args)  # True: half a voxel beyond the outermost centres is extrapolated


def bone_masks(ct: sitk.Image) -> sitk.Image:
    """Label femur and tibia (values of `BONES`) on the CT grid, from a CT in HU alone.

    Bone is what exceeds 250 HU plus what it encloses in at least two of the three slice directions; eroded until
    two large pieces lie one above the other, and grown back by watershed. Patella and fibula are left out.

    Returns a uint8 image on the grid of `ct`.
    Raises InputFault: no bone, only one bone, or values that are not HU.
    """
    coarse = isotropic(ct, MASK_SPACING_MM)
    hu = sitk.GetArrayViewFromImage(coarse)
    if (hu < FAT_HU).mean() < 0.002:
        raise InputFault("CT", "holds nothing below -30 HU, not even fat", "give the CT in Hounsfield units")
    solid = _filled(hu > BONE_HU)
    labels = _grown(solid, *_parted(solid))
    return _on_grid(labels, coarse, ct)


def _filled(bone: np.ndarray) -> np.ndarray:
    """Bone and what it encloses. Gaps of a thin cortex are closed to find marrow, but stay open between bones."""
    closed = ndimage.binary_closing(np.pad(bone, 3, mode="edge"), iterations=2)[3:-3, 3:-3, 3:-3]
    for wall in (closed, bone):
        bone = bone | (sum(_enclosed(wall, axis).astype(np.uint8) for axis in range(3)) >= 2)
    return ndimage.binary_opening(np.pad(bone, 1, mode="edge"))[1:-1, 1:-1, 1:-1]


def _enclosed(bone: np.ndarray, axis: int) -> np.ndarray:
    """Background of each slice across `axis` that bone closes in; one side may be the image border (a cut bone)."""
    plane = ndimage.generate_binary_structure(3, 1)
    plane[tuple(slice(None) if a != axis else [0, 2] for a in range(3))] = False
    labels, n = ndimage.label(~bone, plane)
    sides = np.zeros(n + 1, int)
    for across in {0, 1, 2} - {axis}:
        for end in (0, -1):
            sides[np.unique(np.take(labels, end, across))] += 1
    sides[0] = 9
    return (sides <= 1)[labels]


def _parted(solid: np.ndarray) -> tuple[np.ndarray, int, int]:
    """Markers of the parted bones, and the numbers of femur and tibia among them."""
    depth_mm = ndimage.distance_transform_edt(solid) * MASK_SPACING_MM
    if solid.mean() < 0.01:
        raise InputFault("CT", "holds no bone above 250 HU", "give a knee CT in Hounsfield units")
    for erosion_mm in SPLIT_MM:
        markers, n = ndimage.label(depth_mm > erosion_mm)
        share = np.bincount(markers.ravel(), minlength=n + 1) / max((markers > 0).sum(), 1)
        large = [i for i in range(1, n + 1) if share[i] > SMALLEST_BONE]
        facing = {(a, b): _facing_mm2(markers, a, b) for a in large for b in large if a != b}
        if facing and max(facing.values()) > FACING_MM2:
            small = np.flatnonzero(share < SMALLEST_MARKER)
            markers = np.where(np.isin(markers, small), 0, markers)
            return _thin_bones(markers, depth_mm), *max(facing, key=facing.get)
    raise InputFault("CT", "does not show femur above tibia", "give a CT with both bones, patient's head up")


def _thin_bones(markers: np.ndarray, depth_mm: np.ndarray) -> np.ndarray:
    """Add markers of pieces that the erosion which parted femur and tibia had wiped out (patella, fibula)."""
    for erosion_mm in THIN_MM:
        pieces, _ = ndimage.label(depth_mm > erosion_mm)
        fresh = ~np.isin(pieces, np.append(np.unique(pieces[markers > 0]), 0))
        markers = np.where(fresh, pieces + markers.max(), markers)
    return markers


def _facing_mm2(markers: np.ndarray, upper: int, lower: int) -> float:
    """Axial area where all of `upper` lies above all of `lower` (index z grows to the head)."""
    above, below = markers == upper, markers == lower
    bottom = np.where(above.any(0), above.argmax(0), -1)
    top = np.where(below.any(0), len(below) - 1 - below[::-1].argmax(0), len(below))
    return float((bottom > top).sum()) * MASK_SPACING_MM**2


def _grown(solid: np.ndarray, markers: np.ndarray, femur: int, tibia: int) -> np.ndarray:
    depth = sitk.GetImageFromArray(-ndimage.distance_transform_edt(solid).astype(np.float32))
    seeds = sitk.GetImageFromArray(markers.astype(np.uint16))
    grown = sitk.GetArrayFromImage(sitk.MorphologicalWatershedFromMarkers(depth, seeds, False, True))
    labels = np.zeros(solid.shape, np.uint8)
    for marker, value in ((femur, BONES["femur"]), (tibia, BONES["tibia"])):
        pieces, _ = ndimage.label((grown == marker) & solid)
        labels[pieces == np.bincount(pieces[markers == marker]).argmax()] = value
    return labels


def _on_grid(labels: np.ndarray, coarse: sitk.Image, ct: sitk.Image) -> sitk.Image:
    out = sitk.Image(ct.GetSize(), sitk.sitkUInt8)
    out.CopyInformation(ct)
    for value in BONES.values():
        one = sitk.GetImageFromArray((labels == value).astype(np.uint8))
        one.CopyInformation(coarse)
        depth_mm = sitk.SignedMaurerDistanceMap(one, True, False, True)
        fine = sitk.Resample(depth_mm, ct, sitk.Transform(), sitk.sitkLinear, -1.0, sitk.sitkFloat32, True)
        out = out + sitk.Cast(fine > EDGE_MM, sitk.sitkUInt8) * value
    return out
