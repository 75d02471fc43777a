"""NIfTI-1 files. Headers are checked first: ITK and nibabel repair many of them silently."""

import gzip
from collections.abc import Sequence
from pathlib import Path

import nibabel
import numpy as np
import SimpleITK as sitk
from nibabel.spatialimages import HeaderDataError

from ctsma.common import InputError

HEADER_BYTES, VOXEL_OFFSET = 348, 352  # NIfTI-1: the header, and the least offset of the voxels
NUMBERS = {2, 4, 8, 16, 64, 256, 512, 768, 1024, 1280}  # data types of one integer or float
SCANNER, ALIGNED = 1, 2  # codes: coordinates of the scanner, or of any other image
SPACING_TOLERANCE = 0.01  # design choice: a relative difference of two spacings that is rounding
AXIS_TOLERANCE = 1e-4  # cosine between two axes; ITK accepts no more


def check_nifti(path: Path) -> bool:
    """Whether a file is NIfTI, whatever its name; a NIfTI file that cannot be right is refused.

    Raises InputError for an ending that does not fit, NIfTI-2, impossible dimensions, an unknown
    data type, a scaling that is no number, voxels without size, and a sheared or contradictory
    orientation.
    """
    with path.open("rb") as stream:
        compressed = stream.read(2) == b"\x1f\x8b"
    with gzip.open(path) if compressed else path.open("rb") as stream:
        raw = stream.read(HEADER_BYTES)
    if raw[4:7] == b"n+2":
        raise InputError(path, "is a NIfTI-2 file", "save it as NIfTI-1")
    has_magic, sized = raw[344:347] == b"n+1", raw[:4] in (b"\x5c\1\0\0", b"\0\0\1\x5c")
    if has_magic != sized or path.name.lower().endswith((".hdr", ".img", ".img.gz")):
        problem = "is an Analyze file, one of a pair of files, or has a damaged header"
        raise InputError(path, problem, "save it as one NIfTI-1 file (.nii.gz)")
    if not has_magic:
        return False
    state, ending = ("gzip-compressed", ".nii.gz") if compressed else ("uncompressed", ".nii")
    if not path.name.lower().endswith(ending):
        raise InputError(path, f"holds {state} NIfTI", f"rename it to end in {ending}")
    header = nibabel.Nifti1Header(raw, check=False)
    problem = _voxel_problem(header) or _orientation_problem(header)
    if problem:
        raise InputError(path, problem, "correct its header, or export it again")
    return True


def read_nifti(path: Path, header: sitk.ImageFileReader) -> sitk.Image:
    """Voxels by nibabel, geometry by ITK's reading of the header (its choice of qform or sform).

    ITK's own decoder fills a truncated file with 0 and turns NaN into 0, both without a warning.
    """
    voxels = np.asanyarray(nibabel.load(path).dataobj).astype(np.float32)
    image = sitk.GetImageFromArray(voxels.reshape(header.GetSize(), order="F").T)
    image.SetSpacing(header.GetSpacing())
    image.SetOrigin(header.GetOrigin())
    image.SetDirection(header.GetDirection())
    return image


def format_extent(values: Sequence[float]) -> str:
    """Size or spacing of an image as text, for example "0.5 x 0.5 x 0.7"."""
    return " x ".join(f"{value:.4g}" for value in values)


def _voxel_problem(header: nibabel.Nifti1Header) -> str:
    """What is wrong with dimensions, place, type or scaling of the voxels; "" where nothing is.

    A slope of 0 means no scaling (NIfTI-1), and so does NaN beside NaN or 0 (nibabel, SPM).
    """
    n_dimensions, *shape = header["dim"].tolist()
    if not 1 <= n_dimensions <= 7 or min(shape[:n_dimensions]) < 1:
        return f"has the impossible dimensions {header['dim'].tolist()}"
    if not header["vox_offset"] >= VOXEL_OFFSET:
        return f"has its voxels at byte {header['vox_offset']:g}, before {VOXEL_OFFSET}"
    if int(header["datatype"]) not in NUMBERS:
        return f"has the data type code {header['datatype']}, not one integer or float per voxel"
    slope, intercept = float(header["scl_slope"]), float(header["scl_inter"])
    unscaled = slope == 0 or (np.isnan(slope) and (np.isnan(intercept) or intercept == 0))
    if not unscaled and not np.isfinite([slope, intercept]).all():
        return f"has a scaling slope of {slope:g} and an intercept of {intercept:g}"
    return ""


def _orientation_problem(header: nibabel.Nifti1Header) -> str:
    """What is wrong with the voxel size and the form that ITK chooses; "" where nothing is.

    ITK takes the sform where it is of the scanner or alone, else the qform.
    """
    header["pixdim"][0] = -1 if header["pixdim"][0] < 0 else 1  # NIfTI-1: 0 means 1
    pixdim = header["pixdim"][1:4].astype(float)
    if not (np.isfinite(pixdim).all() and pixdim.min() > 0):
        return f"has the voxel size {format_extent(pixdim)}"
    try:
        (sform, s_code), (qform, q_code) = header.get_sform(True), header.get_qform(True)
    except (ValueError, HeaderDataError):
        return "has a qform that is no rotation"
    if not s_code and not q_code:
        return ""
    chosen = sform if s_code == SCANNER or q_code == 0 else qform
    size = np.linalg.norm(chosen[:3, :3], axis=0)
    if not (np.isfinite(chosen).all() and np.allclose(size / pixdim, 1, atol=SPACING_TOLERANCE)):
        sizes = format_extent(size), format_extent(pixdim)
        return "has the voxel size {} in its affine, {} in pixdim".format(*sizes)
    cosine = np.abs(chosen[:3, :3].T @ chosen[:3, :3] / np.outer(size, size) - np.eye(3)).max()
    if cosine > AXIS_TOLERANCE:
        angle = np.degrees(np.arccos(cosine))
        return f"is sheared (its axes meet at {angle:.5g} degrees, not 90)"
    if s_code and q_code:
        corners = np.indices((2, 2, 2, 2)).reshape(4, -1)[:, 1::2]  # the last coordinate is 1
        apart = np.abs((sform - qform) @ (corners.T * [*header["dim"][1:4], 1]).T).max()
        mirrored = np.linalg.det(sform) * np.linalg.det(qform) < 0
        if mirrored or (s_code == q_code != ALIGNED and not apart < pixdim.min() / 2):
            return f"has an sform and a qform that place its corners up to {apart:.3g} mm apart"
    return ""
