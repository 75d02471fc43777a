"""Volumes from image files and DICOM folders, checked before any computation."""

import errno
import os
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from ctsma.common import InputError
from ctsma.files import atomic

from .dicom import MIN_SLICES, is_dicom, read_dicom
from .nifti import VOXEL_OFFSET, check_nifti, format_extent, read_nifti

VOXEL_MM = (0.05, 10.0)  # design choice: a spacing beyond these is not in mm
CORTICAL_HU = 250.0  # cortical bone lies above; the published code's bone threshold
LOWEST_MR = -200.0  # design choice: MR is not negative, interpolation may ring below 0


def read_volume(path: str | Path, modality: str, echo: int | None = None) -> sitk.Image:
    """Read a CT in HU or an MR from an image file or a DICOM folder; refuse what cannot be right.

    Parameters
    ----------
    path : NIfTI file (.nii, .nii.gz; also .nrrd, .mha), a multi-frame DICOM file, or a folder of
        one DICOM series.
    modality : "CT" (values in HU) or "MR" (arbitrary units, not negative).
    echo : echo number to take from a multi-echo MR series; None where there is one echo.

    Returns
    -------
    sitk.Image, float32, three-dimensional; geometry in LPS mm.

    Raises
    ------
    InputError : missing, truncated, empty, constant or NaN volume, CT not in HU, MR given as CT or
        the reverse, and the problems of a DICOM folder (see `read_dicom`).
    """
    path = Path(path)
    if not path.exists():
        raise InputError(path, "does not exist", "correct the path, or restore the file")
    has_dicom = path.is_dir() or is_dicom(path)
    image = read_dicom(path, modality, echo) if has_dicom else _read_file(path)
    return check_volume(path, image, modality)


def check_volume(source: str | Path, image: sitk.Image, modality: str) -> sitk.Image:
    """The image, where it can be right; InputError, which names `source`, as of `read_volume`."""
    _check_geometry(source, image)
    _check_values(source, sitk.GetArrayViewFromImage(image), modality)
    return image


def write_volume(image: sitk.Image, path: str | Path) -> Path:
    """Write a .nii, or a .nii.gz (gzip level 1, no time stamp), whole or not at all.

    Returns the path. Raises OSError when the disk is full.
    """
    with atomic(path) as temporary:
        sitk.WriteImage(image, str(temporary), useCompression=True, compressionLevel=1)
        _check_written(image, temporary)
    return Path(path)


def _read_file(path: Path) -> sitk.Image:
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    reader.SetOutputPixelType(sitk.sitkFloat32)
    try:
        is_nifti = check_nifti(path)
        reader.ReadImageInformation()
        dimensions, channels = reader.GetDimension(), reader.GetNumberOfComponents()
        if (dimensions, channels) != (3, 1):
            problem = f"has {dimensions} dimensions and {channels} value(s) per voxel"
            raise InputError(path, problem, "give one volume of one value per voxel")
        return read_nifti(path, reader) if is_nifti else reader.Execute()
    except InputError:
        raise
    except Exception as error:  # of ITK, nibabel, gzip, zlib or numpy, by the place of the damage
        problem = "cannot be read as an image (truncated, or of another format)"
        raise InputError(path, problem, "export it again as NIfTI") from error


def _check_geometry(path: str | Path, image: sitk.Image) -> None:
    size, spacing = image.GetSize(), image.GetSpacing()
    if min(size) < MIN_SLICES:
        problem = f"has only {min(size)} slices, fewer than {MIN_SLICES}"
        raise InputError(path, problem, "give the whole series")
    if not VOXEL_MM[0] < min(spacing) <= max(spacing) < VOXEL_MM[1]:
        problem = f"has a voxel of {format_extent(spacing)} mm"
        raise InputError(path, problem, "correct the spacing in its header")


def _check_values(path: str | Path, array: np.ndarray, modality: str) -> None:
    n_bad = array.size - int(np.isfinite(array).sum())
    if n_bad:
        problem = f"holds {n_bad} NaN or infinite voxels"
        raise InputError(path, problem, "export it again without masking by NaN")
    low, high = float(array.min()), float(array.max())
    if low == high:
        problem = f"is constant (every voxel is {low:g})"
        raise InputError(path, problem, "export the image itself, not an empty one")
    if modality == "CT" and (low >= 0 or high < CORTICAL_HU):
        problem = f"has values from {low:g} to {high:g}, so it is not a CT of bone in HU"
        remedy = "apply the rescale slope and intercept, or list an MR in column mr"
        raise InputError(path, problem, remedy)
    if modality == "MR" and low < LOWEST_MR:
        problem = f"has values down to {low:g}, as a CT has"
        raise InputError(path, problem, "list a CT in column ct, an MR in column mr")


def _check_written(image: sitk.Image, file: Path) -> None:
    """Raise OSError where a NIfTI file is incomplete: ITK's writer does not report a full disk.

    The last four bytes of gzip are the length of its content, modulo 2^32.
    """
    voxel_bytes = image.GetNumberOfComponentsPerPixel() * image.GetSizeOfPixelComponent()
    length = file.stat().st_size
    if file.suffix == ".gz":
        with file.open("rb") as stream:
            stream.seek(-min(4, length), os.SEEK_END)
            length = int.from_bytes(stream.read(), "little")
    if (length - VOXEL_OFFSET - image.GetNumberOfPixels() * voxel_bytes) % 2**32:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file))
