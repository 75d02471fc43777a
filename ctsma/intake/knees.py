"""How many knees a CT shows, and which side each is: from the patient's own axes, never from what a label says."""

import numpy as np
import SimpleITK as sitk
from scipy import ndimage

from ctsma.cohort import BONES, InputFault
from ctsma.registration.masks import BONE_HU, MASK_SPACING_MM, isotropic

ONE_KNEE_MM = 140.0  # bone broader than this is more than one knee: tibiae are 60 to 95 mm broad (our choice)
GAP_MM = 10.0  # least breadth without bone between two knees (our choice)
FEW = 0.02  # of the densest column: less bone than this is noise, a table edge or a cable (our choice)
BELOW_MM = 10.0  # the fibula's head lies this far below the plateau (Pietrzak: 8 to 15 mm; our choice)
FIBULA_MM3 = (400.0, 60_000.0)  # of what the field of view shows of it; 10.4 cm3 in one real knee (our choice)
LATERAL_MM = 12.0  # least distance of the fibula from the tibia's middle, left to right (our choice)
THIN_ERODE_MM = 1.0


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
    return _halves(sitk.DICOMOrient(ct, "LPS"), round(middle / ct_spacing(ct)))


def ct_spacing(ct: sitk.Image) -> float:
    """Voxel size of a CT from right to left, in mm."""
    return sitk.DICOMOrient(ct, "LPS").GetSpacing()[0]


def _halves(ct: sitk.Image, at: int) -> dict[str, sitk.Image]:
    width, *rest = ct.GetSize()
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
    tibia = labels == BONES["tibia"]
    if not tibia.any():
        return ""
    z, y, x = (axis.astype(float) for axis in np.nonzero(tibia))
    bone = (sitk.GetArrayViewFromImage(coarse) > BONE_HU) & ~ndimage.binary_dilation(labels > 0, iterations=2)
    bone[int(z.max() - BELOW_MM / MASK_SPACING_MM) :] = False  # above the head of the fibula: patella, femur
    pieces, n = ndimage.label(ndimage.binary_closing(bone, iterations=2))
    found = [_lateral(pieces == k, (x.mean(), y.mean())) for k in range(1, n + 1)]
    found = [(size, offset) for size, offset in found if FIBULA_MM3[0] < size < FIBULA_MM3[1]]
    if not found or abs(offset := max(found)[1]) < LATERAL_MM:
        return ""
    return "R" if offset < 0 else "L"  # lateral is away from the body: -x in a right knee


def _lateral(piece: np.ndarray, middle: tuple[float, float]) -> tuple[float, float]:
    """Volume in mm3 of a piece (0 where it lies in front of the tibia) and its distance in x from it in mm."""
    z, y, x = np.nonzero(piece)
    behind = y.mean() > middle[1]
    return float(len(x) * MASK_SPACING_MM**3 * behind), float((x.mean() - middle[0]) * MASK_SPACING_MM)
