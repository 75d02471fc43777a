"""Femur and tibia in a knee CT: threshold, fill the marrow, split at the joint, take the pair.

Where this fails (joint gap closed, cast, implant, noise) the user gives labels of another method.

A mask only tells the registration where to look: a margin of 1 mm more or less changes the
transform by hundredths of a millimetre. Everything therefore works on a 1 mm grid and is
resampled to the CT grid at the end.
"""

import numpy as np
import SimpleITK as sitk
from scipy import ndimage

from ctsma.common import BONES, InputError

MASK_SPACING_MM = 1.0  # finer than the joint gap; takes a second (design choice)
# The published code takes 250; soft cortex of 300 HU falls below it once blurred (design choice).
BONE_HU = 200.0
# Every knee holds fat below this; an MR, or a CT with a wrong offset, does not (design choice).
FAT_HU, MIN_FAT_SHARE = -30.0, 0.002
MIN_BONE_SHARE = 0.01  # of the field of view (design choice)
# Erosions tried to separate the bones; 6 mm also separates patella and fibula (design choice).
EROSIONS_MM = (6.0, 5.0, 4.0, 3.0, 2.0, 1.0, 7.0, 8.0)
MIN_BONE_MARKER = 0.15  # of all eroded bone; patella and fibula are 4 to 6 % (design choice)
MIN_MARKER = 0.0004  # of all eroded bone; smaller pieces are noise (design choice)
MIN_FACING_MM2 = 400.0  # femur above tibia; a plateau has about 3000 mm2 (design choice)
# Patella and fibula are thicker than twice this, osteophytes are not (design choice).
THIN_EROSIONS_MM = (4.0, 3.0)
# Own labels. Least share of a bone's outer 2 mm within 1 mm of BONE_HU: 0.9 and more where surfaces
# are 1 mm off, at most 0.76 where labels are displaced by 5 mm (design choice)
RIM_MM, MIN_DENSE_RIM = 2, 0.8
MIN_PIECE = 0.9  # share of a label that its largest piece holds (design choice)
OWN_LABELS = "or give own bone labels (column ct_labels, or predict --labels)"


def isotropic(image: sitk.Image, spacing_mm: float) -> sitk.Image:
    """Resample to an isotropic grid of the same box; float32.

    Averages whole voxels first and interpolates linearly then, so that nothing is aliased. The
    outer half voxel is extrapolated.
    """
    shrink = [max(1, int(spacing_mm / spacing)) for spacing in image.GetSpacing()]
    image = sitk.BinShrink(image, [min(k, n) for k, n in zip(shrink, image.GetSize(), strict=True)])
    extent_mm = np.multiply(image.GetSize(), image.GetSpacing())
    size = np.maximum(np.round(extent_mm / spacing_mm), 1).astype(int)
    first_index = (spacing_mm - np.array(image.GetSpacing())) / 2 / np.array(image.GetSpacing())
    grid = sitk.Image(size.tolist(), sitk.sitkUInt8)
    grid.SetOrigin(image.TransformContinuousIndexToPhysicalPoint(first_index.tolist()))
    grid.SetSpacing([spacing_mm] * 3)
    grid.SetDirection(image.GetDirection())
    linear = sitk.Transform(), sitk.sitkLinear, 0.0, sitk.sitkFloat32, True
    return sitk.Resample(image, grid, *linear)


def bone_masks(ct: sitk.Image) -> sitk.Image:
    """Label femur and tibia (values of `BONES`) in a CT in HU.

    Bone is what exceeds `BONE_HU`, and what that encloses in at least two of the three slice
    directions. It is eroded until two large pieces lie one above the other, and restored by a
    watershed. Patella and fibula are left out.

    Returns
    -------
    uint8 image on the grid of `ct`.

    Raises
    ------
    InputError : no bone, only one bone, or values that are not HU.
    """
    axes = sitk.DICOMOrientImageFilter.GetOrientationFromDirectionCosines(ct.GetDirection())
    head_up = ct if axes.endswith("S") else sitk.DICOMOrient(ct, "LPS")
    coarse = isotropic(head_up, MASK_SPACING_MM)
    hu = sitk.GetArrayViewFromImage(coarse)
    if (hu < FAT_HU).mean() < MIN_FAT_SHARE:
        problem = f"holds nothing below {FAT_HU:.0f} HU, not even fat"
        raise InputError("CT", problem, "give the CT in Hounsfield units")
    bone = fill_marrow(hu > BONE_HU)
    if bone.mean() < MIN_BONE_SHARE:
        problem = f"holds no bone above {BONE_HU:.0f} HU"
        raise InputError("CT", problem, f"give a knee CT in Hounsfield units, {OWN_LABELS}")
    depth_mm = ndimage.distance_transform_edt(bone) * MASK_SPACING_MM
    markers, femur, tibia = split_bones(depth_mm)
    pieces = watershed(depth_mm, markers)
    linear = sitk.Transform(), sitk.sitkLinear, -1.0, sitk.sitkFloat32, True
    masks = sitk.Image(ct.GetSize(), sitk.sitkUInt8)
    masks.CopyInformation(ct)
    for name, marker in (("femur", femur), ("tibia", tibia)):
        parts, _ = ndimage.label(pieces == marker)
        largest = parts == np.bincount(parts[markers == marker]).argmax()
        on_coarse = sitk.GetImageFromArray(largest.astype(np.uint8))
        on_coarse.CopyInformation(coarse)
        inside_mm = sitk.SignedMaurerDistanceMap(on_coarse, True, False, True)
        fine = sitk.Resample(inside_mm, ct, *linear)
        masks = masks + sitk.Cast(fine > 0.0, sitk.sitkUInt8) * BONES[name]
    return masks


def label_masks(labels: sitk.Image, ct: sitk.Image) -> sitk.Image:
    """Bone labels of another method on the grid of `ct` (nearest neighbour), checked against it.

    Parameters
    ----------
    labels : 0 background, `BONES` values; any grid in the coordinates of `ct`.
    ct : HU.

    Returns
    -------
    uint8 image on the grid of `ct`: the largest piece of each bone.

    Raises
    ------
    InputError : other values, a bone absent or in pieces, no dense bone below its surface, or no
        femur above a tibia.
    """
    values = np.unique(sitk.GetArrayViewFromImage(labels))
    if not np.isin(values, (0, *BONES.values())).all():
        problem = f"hold {len(values)} values from {values[0]:g} to {values[-1]:g}"
        raise InputError("bone labels", problem, "write 0 background, 1 femur, 2 tibia, no other")
    options = sitk.Transform(), sitk.sitkNearestNeighbor, 0.0, sitk.sitkUInt8
    labels = sitk.Resample(labels, ct, *options)
    coarse = isotropic(sitk.DICOMOrient(ct, "LPS"), MASK_SPACING_MM)
    dense = ndimage.binary_dilation(sitk.GetArrayViewFromImage(coarse) > BONE_HU)
    masks, pieces = labels * 0, sitk.RelabelComponentImageFilter()
    for name, value in BONES.items():
        largest = pieces.Execute(sitk.ConnectedComponent(labels == value)) == 1
        sizes = pieces.GetSizeOfObjectsInPixels()
        if not sizes:
            problem = f"hold no {name} (value {value}) in the field of view of the CT"
            raise InputError("bone labels", problem, "give labels in the coordinates of this CT")
        if sizes[0] < MIN_PIECE * sum(sizes):
            share = f"{sizes[0] / sum(sizes):.0%} of it (at least {MIN_PIECE:.0%})"
            problem = f"hold a {name} of {len(sizes)} pieces, the largest {share}"
            raise InputError("bone labels", problem, "label one knee, each bone in one piece")
        bone = sitk.GetArrayFromImage(sitk.Resample(largest, coarse, *options)) == 1
        rim = bone & ~ndimage.binary_erosion(bone, iterations=RIM_MM, border_value=1)
        share = dense[rim].mean()
        if share < MIN_DENSE_RIM:
            problem = f"lie off the {name}: {share:.0%} of its outer {RIM_MM} mm are at bone above "
            problem += f"{BONE_HU:.0f} HU (at least {MIN_DENSE_RIM:.0%})"
            raise InputError("bone labels", problem, "give labels in the coordinates of this CT")
        masks = masks + largest * value
    on_coarse = sitk.GetArrayFromImage(sitk.Resample(masks, coarse, *options))
    facing_mm2 = _facing_mm2(on_coarse, BONES["femur"], BONES["tibia"])
    if facing_mm2 < MIN_FACING_MM2:
        problem = f"show {facing_mm2:.0f} mm2 of femur (value 1) above tibia (value 2), too few"
        raise InputError("bone labels", problem, "exchange the values")
    return masks


def fill_marrow(bone: np.ndarray) -> np.ndarray:
    """Bone and what it encloses in at least two slice directions; (z, y, x) bool.

    Gaps of a thin cortex are closed to find the marrow, but stay open between bones.
    """
    closed = ndimage.binary_closing(np.pad(bone, 3, mode="edge"), iterations=2)[3:-3, 3:-3, 3:-3]
    for wall in (closed, bone):
        directions = sum(_enclosed(wall, axis).astype(np.uint8) for axis in range(3))
        bone = bone | (directions >= 2)
    return ndimage.binary_opening(np.pad(bone, 1, mode="edge"))[1:-1, 1:-1, 1:-1]


def _enclosed(bone: np.ndarray, axis: int) -> np.ndarray:
    """Background that bone encloses in each slice across `axis`.

    A background region may touch one side of the slice: there the image border cuts the bone.
    """
    in_plane = ndimage.generate_binary_structure(3, 1)
    np.moveaxis(in_plane, axis, 0)[[0, 2]] = False
    labels, n = ndimage.label(~bone, in_plane)
    sides_touched = np.zeros(n + 1, int)
    for other_axis in {0, 1, 2} - {axis}:
        for end in (0, -1):
            sides_touched[np.unique(np.take(labels, end, other_axis))] += 1
    enclosed = sides_touched <= 1
    enclosed[0] = False  # bone itself
    return enclosed[labels]


def split_bones(depth_mm: np.ndarray) -> tuple[np.ndarray, int, int]:
    """Separate the bones by erosion; `depth_mm` (z, y, x): distance to the surface, 0 outside.

    Returns
    -------
    markers (z, y, x) int, one number for each eroded bone; the numbers of femur and tibia.
    """
    for erosion_mm in EROSIONS_MM:
        markers, n = ndimage.label(depth_mm > erosion_mm)
        share = np.bincount(markers.ravel(), minlength=n + 1) / max((markers > 0).sum(), 1)
        large = [k for k in range(1, n + 1) if share[k] > MIN_BONE_MARKER]
        pairs = [(upper, lower) for upper in large for lower in large if upper != lower]
        facing_mm2 = {pair: _facing_mm2(markers, *pair) for pair in pairs}
        if facing_mm2 and max(facing_mm2.values()) > MIN_FACING_MM2:
            femur, tibia = max(facing_mm2, key=facing_mm2.get)
            markers[np.isin(markers, np.flatnonzero(share < MIN_MARKER))] = 0
            return _add_thin_bones(markers, depth_mm), femur, tibia
    problem = f"does not show a femur above a tibia that erosion by {min(EROSIONS_MM):g} to "
    problem += f"{max(EROSIONS_MM):g} mm separates"
    remedy = "give a CT of both bones without cast, implant or strong noise"
    raise InputError("CT", problem, f"{remedy}, {OWN_LABELS}")


def _facing_mm2(markers: np.ndarray, upper: int, lower: int) -> float:
    """Axial area where all of `upper` lies above all of `lower` (index z increases to the head)."""
    above, below = markers == upper, markers == lower
    bottom = np.where(above.any(0), above.argmax(0), -1)
    top = np.where(below.any(0), len(below) - 1 - below[::-1].argmax(0), len(below))
    return float((bottom > top).sum()) * MASK_SPACING_MM**2


def _add_thin_bones(markers: np.ndarray, depth_mm: np.ndarray) -> np.ndarray:
    """Add markers of the bones that the erosion removed (patella, fibula)."""
    for erosion_mm in THIN_EROSIONS_MM:
        pieces, _ = ndimage.label(depth_mm > erosion_mm)
        known = np.append(np.unique(pieces[markers > 0]), 0)
        markers = np.where(np.isin(pieces, known), markers, pieces + markers.max())
    return markers


def watershed(depth_mm: np.ndarray, markers: np.ndarray) -> np.ndarray:
    """Assign every bone voxel to a marker, along the distance to the surface; 0 outside bone."""
    depth = sitk.GetImageFromArray(-depth_mm.astype(np.float32))
    seeds = sitk.GetImageFromArray(markers.astype(np.uint16))
    labels = sitk.MorphologicalWatershedFromMarkers(depth, seeds, False, True)
    return np.where(depth_mm > 0, sitk.GetArrayFromImage(labels), 0)
