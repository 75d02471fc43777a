"""How many knees a CT shows and which side each is, from the patient's axes, not from labels."""

import numpy as np
import SimpleITK as sitk
from scipy import ndimage

from ctsma.common import BONES, InputError
from ctsma.registration.masks import BONE_HU, MASK_SPACING_MM, isotropic

COLUMN_MM = 2.0  # design choice: grid on which bone is counted along x
ONE_KNEE_MM = 140.0  # design choice: bone broader than this is two knees; tibiae are 60 to 95 mm
GAP_MM = 10.0  # design choice: least breadth without bone between two knees
NOISE_SHARE = 0.02  # design choice: of the fullest column; less bone is noise, a table or a cable
KNEE_SHARE = 0.2  # design choice: each of two knees holds at least this share of all bone
BELOW_MM = 12.0  # design choice: the fibula is looked for this far below the plateau
FIBULA_MM2 = (40.0, 700.0)  # design choice: axial area; 140 to 290 mm2 in 24 simulated knees
LATERAL_MM = 15.0  # design choice: least distance from the tibia in x; 29 to 39 mm in these knees
MIN_FIBULA_SLICES = 5  # design choice: slices of 1 mm that must show it


def split_knees(ct: sitk.Image) -> dict[str, sitk.Image]:
    """Cut a CT that shows both knees at the middle of the boneless strip between them.

    Returns
    -------
    {"": ct} where one knee is in view, else {"R": ..., "L": ...}, oriented LPS: the patient's
    right is -x.

    Raises
    ------
    InputError : bone is too broad for one knee, but no strip without bone separates two.
    """
    oriented = sitk.DICOMOrient(ct, "LPS")
    coarse = isotropic(oriented, COLUMN_MM)
    spacing_mm = coarse.GetSpacing()[0]
    columns = (sitk.GetArrayViewFromImage(coarse) > BONE_HU).sum(axis=(0, 1))
    bony = np.flatnonzero(columns > NOISE_SHARE * columns.max())
    if not len(bony) or (bony[-1] - bony[0]) * spacing_mm < ONE_KNEE_MM:
        return {"": ct}
    gaps = np.diff(bony)
    widest = int(np.argmax(gaps))
    share = columns[: bony[widest] + 1].sum() / columns.sum()
    if gaps[widest] * spacing_mm < GAP_MM or not KNEE_SHARE < share < 1 - KNEE_SHARE:
        problem = "shows bone too broad for one knee, and no gap between two"
        remedy = "crop it to one volume per knee (3D Slicer: Crop Volume) and list these"
        raise InputError("CT", problem, remedy)
    middle_mm = (bony[widest] + bony[widest + 1]) / 2 * spacing_mm
    cut = round(middle_mm / oriented.GetSpacing()[0])
    return {"R": oriented[:cut, :, :], "L": oriented[cut:, :, :]}


def side_of(ct: sitk.Image, masks: sitk.Image) -> str:
    """ "L" or "R" by the fibula, which lies lateral of the tibia; "" where no fibula is in view.

    Parameters
    ----------
    ct : one knee, HU.
    masks : of `bone_masks`, on the grid of `ct`.
    """
    coarse = isotropic(sitk.DICOMOrient(ct, "LPS"), MASK_SPACING_MM)
    labels = sitk.Resample(masks, coarse, sitk.Transform(), sitk.sitkNearestNeighbor)
    tibia = sitk.GetArrayViewFromImage(labels) == BONES["tibia"]
    levels = np.flatnonzero(tibia.any(axis=(1, 2)))
    if not len(levels):
        return ""
    top = max(0, round(levels[-1] - BELOW_MM / MASK_SPACING_MM))
    offsets_mm = []
    for level in sitk.GetArrayViewFromImage(coarse)[:top]:
        offsets_mm += _fibula_offsets_mm(level > BONE_HU)
    offset_mm = float(np.median(offsets_mm)) if len(offsets_mm) >= MIN_FIBULA_SLICES else 0.0
    if abs(offset_mm) < LATERAL_MM:
        return ""
    return "R" if offset_mm < 0 else "L"  # lateral is away from the other leg: -x in a right knee


def _fibula_offsets_mm(bone: np.ndarray) -> list[float]:
    """Distances in x from the largest bone of an axial slice to those like a fibula behind it."""
    pieces, n = ndimage.label(ndimage.binary_opening(ndimage.binary_fill_holes(bone)))
    if n < 2:
        return []
    area = np.bincount(pieces.ravel())[1:] * MASK_SPACING_MM**2
    y, x = np.transpose(ndimage.center_of_mass(pieces > 0, pieces, range(1, n + 1)))
    tibia = int(area.argmax())
    fibula = (area > FIBULA_MM2[0]) & (area < FIBULA_MM2[1]) & (y > y[tibia]) & (area < area[tibia])
    return ((x - x[tibia]) * MASK_SPACING_MM)[fibula].tolist()
