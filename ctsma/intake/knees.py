"""How many knees a CT shows, and which side each is: from the patient's own axes, never from what a label says."""

import numpy as np
import SimpleITK as sitk
from scipy import ndimage

from ctsma.cohort import BONES, InputFault
from ctsma.registration.masks import BONE_HU, MASK_SPACING_MM, isotropic

ONE_KNEE_MM = 140.0  # bone broader than this is more than one knee: tibiae are 60 to 95 mm broad (our choice)
GAP_MM = 10.0  # least breadth without bone between two knees (our choice)
FEW = 0.02  # of the densest column: less bone than this is noise, a table edge or a cable (our choice)
BELOW_MM = 12.0  # the fibula is looked for this far below the plateau (our choice)
FIBULA_MM2 = (40.0, 700.0)  # its axial area: 140 to 290 mm2 in 24 simulated knees (our choice)
LATERAL_MM = 15.0  # its least distance from the tibia's middle, left to right: 29 to 39 mm in these (our choice)
FEWEST = 5  # slices of 1 mm that must show it (our choice)


def split_knees(ct: sitk.Image) -> dict[str, sitk.Image]:
    """Cut a CT that shows both knees at the middle of the boneless strip between them.

    Returns
    -------
    {"": ct} where one knee is in view, else {"R": ..., "L": ...}, oriented LPS: the patient's right is -x.

    Raises
    ------
    InputFault : bone is too broad for one knee, but no strip without bone parts two.
    """
    coarse = isotropic(sitk.DICOMOrient(ct, "LPS"), 2.0)
    columns = (sitk.GetArrayViewFromImage(coarse) > BONE_HU).sum(axis=(0, 1))
    bony = np.flatnonzero(columns > FEW * columns.max())
    if not len(bony) or (bony[-1] - bony[0]) * coarse.GetSpacing()[0] < ONE_KNEE_MM:
        return {"": ct}
    gaps, at = np.diff(bony), int(np.argmax(np.diff(bony)))
    share = columns[: bony[at] + 1].sum() / columns.sum()
    if gaps[at] * coarse.GetSpacing()[0] < GAP_MM or not 0.2 < share < 0.8:
        mend = "crop it to one volume a knee (3D Slicer: Crop Volume) and list these in a manifest"
        raise InputFault("CT", "shows bone too broad for one knee, and no gap between two", mend)
    middle = (bony[at] + bony[at + 1]) / 2 * coarse.GetSpacing()[0]
    return _halves(sitk.DICOMOrient(ct, "LPS"), middle)


def _halves(ct: sitk.Image, middle_mm: float) -> dict[str, sitk.Image]:
    width, *rest = ct.GetSize()
    at = round(middle_mm / ct.GetSpacing()[0])
    parts = {"R": (0, at), "L": (at, width - at)}
    return {side: sitk.RegionOfInterest(ct, [size, *rest], [start, 0, 0]) for side, (start, size) in parts.items()}


def side_of(ct: sitk.Image, masks: sitk.Image) -> str:
    """ "L" or "R" by the fibula, which lies lateral of the tibia; "" where no fibula is in view.

    Parameters
    ----------
    ct : one knee, HU. masks : of `bone_masks`, on its grid.
    """
    coarse = isotropic(sitk.DICOMOrient(ct, "LPS"), MASK_SPACING_MM)
    labels = sitk.GetArrayFromImage(sitk.Resample(masks, coarse, sitk.Transform(), sitk.sitkNearestNeighbor))
    levels = np.flatnonzero((labels == BONES["tibia"]).any(axis=(1, 2)))
    if not len(levels):
        return ""
    shaft = sitk.GetArrayViewFromImage(coarse)[: max(0, round(levels[-1] - BELOW_MM / MASK_SPACING_MM))]
    offsets = [offset for level in shaft for offset in _beside_tibia(level > BONE_HU)]
    if len(offsets) < FEWEST or abs(offset := float(np.median(offsets))) < LATERAL_MM:
        return ""
    return "R" if offset < 0 else "L"  # lateral is away from the other leg: -x in a right knee


def _beside_tibia(bone: np.ndarray) -> list[float]:
    """Distance in x (mm) from the largest bone of an axial slice to those of a fibula's size behind it."""
    pieces, n = ndimage.label(ndimage.binary_opening(ndimage.binary_fill_holes(bone)))
    if n < 2:
        return []
    area = np.bincount(pieces.ravel())[1:] * MASK_SPACING_MM**2
    y, x = np.transpose(ndimage.center_of_mass(pieces > 0, pieces, range(1, n + 1)))
    tibia = int(area.argmax())
    fibula = (area > FIBULA_MM2[0]) & (area < FIBULA_MM2[1]) & (y > y[tibia]) & (area < area[tibia])
    return ((x - x[tibia]) * MASK_SPACING_MM)[fibula].tolist()
