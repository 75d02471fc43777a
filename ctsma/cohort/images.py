"""Volumes from NIfTI files and DICOM folders, checked before anybody computes on them."""

import errno
import os
import tempfile
import zlib
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import SimpleITK as sitk

from .names import InputFault

SPACING_TOLERANCE = 0.01  # relative unevenness of slice gaps that is still rounding (our choice)
TILT_TOLERANCE_DEG = 0.5  # gantry tilt below this shifts a 100 mm stack by less than 1 mm (our choice)
NIFTI_HEADER_BYTES = 352  # NIfTI-1 header and the four bytes before the voxels
MIN_SLICES = 8  # thinner stacks cannot hold a 10 mm patch at routine gaps (our choice)
BONE_HU = 250.0  # cortical bone lies above; the published code's bone threshold
TAGS = [
    "Modality",
    "SeriesInstanceUID",
    "ImagePositionPatient",
    "ImageOrientationPatient",
    "PixelSpacing",
    "EchoNumbers",
    "EchoTime",
    "RescaleSlope",
    "RescaleIntercept",
    "Rows",
    "Columns",
]


def read_volume(path: str | Path, modality: str, echo: int | None = None) -> sitk.Image:
    """Read a CT in HU or an MR from a NIfTI file or a DICOM folder, and refuse what cannot be right.

    Parameters
    ----------
    path : NIfTI file (.nii, .nii.gz; also .nrrd, .mha) or a folder holding one DICOM series.
    modality : "CT" (values in HU) or "MR" (arbitrary units, not negative).
    echo : echo number to take from a multi-echo MR series; None where there is one echo.

    Returns
    -------
    sitk.Image, float32, three-dimensional; geometry in LPS mm.

    Raises
    ------
    InputFault : missing, truncated, empty, constant or NaN volume, CT not in HU, MR given as CT or the
        reverse, mixed series or echoes, uneven slices, gantry tilt.
    """
    path = Path(path)
    if not path.exists():
        raise InputFault(path, "does not exist", "correct the path in the manifest or restore the file")
    image = _read_dicom(path, modality, echo) if path.is_dir() else _read_file(path)
    _check_geometry(path, image)
    _check_values(path, sitk.GetArrayViewFromImage(image), modality)
    return image


def write_volume(image: sitk.Image, path: str | Path) -> Path:
    """Write a volume whole or not at all (temporary file, then rename); gzip level 1, no time stamp.

    Returns the path. The folder is made where it does not exist. OSError when the disk is full.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    suffix = "".join(path.suffixes[-2:])
    handle, temporary = tempfile.mkstemp(suffix=suffix, prefix=".partial-", dir=path.parent)
    os.close(handle)
    try:
        sitk.WriteImage(image, temporary, useCompression=True, compressionLevel=1)
        if suffix == ".nii.gz":
            _check_written(image, Path(temporary))
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    finally:
        Path(temporary).unlink(missing_ok=True)
    return path


def _check_written(image: sitk.Image, file: Path) -> None:
    """ITK's NIfTI writer says nothing of a full disk. The last four bytes of gzip are the length of its content."""
    voxels = image.GetNumberOfPixels() * image.GetNumberOfComponentsPerPixel() * image.GetSizeOfPixelComponent()
    with file.open("rb") as stream:
        stream.seek(-min(4, file.stat().st_size), os.SEEK_END)
        length = int.from_bytes(stream.read(), "little")
    if length != (NIFTI_HEADER_BYTES + voxels) % 2**32:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file))


def anatomical_plane(image: sitk.Image, plane: str, share: float = 0.5) -> tuple[np.ndarray, tuple[float, float]]:
    """A "sagittal" (x), "coronal" (y) or "axial" (z) slice for display, at a share of the image's extent.

    Returns the array (rows from the top or front) and its (row, column) spacing in mm; nothing is resampled.
    """
    image = sitk.DICOMOrient(image, "LPS")
    array, (dx, dy, dz) = sitk.GetArrayViewFromImage(image), image.GetSpacing()
    axis = {"axial": 0, "coronal": 1, "sagittal": 2}[plane]
    chosen = np.take(array, int(share * (array.shape[axis] - 1)), axis=axis)
    spacing_mm = {"axial": (dy, dx), "coronal": (dz, dx), "sagittal": (dz, dy)}[plane]
    return (chosen if plane == "axial" else chosen[::-1]), spacing_mm


def _read_file(path: Path) -> sitk.Image:
    try:
        _check_stored(path)
        image = sitk.ReadImage(str(path), sitk.sitkFloat32)
    except (RuntimeError, OSError, EOFError, zlib.error, nibabel.filebasedimages.ImageFileError) as error:
        fault = "cannot be read as an image (truncated, or of another format)"
        raise InputFault(path, fault, "export it again as NIfTI") from error
    if image.GetDimension() != 3 or image.GetNumberOfComponentsPerPixel() != 1:
        raise InputFault(path, f"has {image.GetDimension()} dimensions", "give one three-dimensional volume")
    return image


def _check_stored(path: Path) -> None:
    """ITK's NIfTI reader fills a truncated file with 0 and turns NaN into 0, both in silence: look first."""
    if path.name.endswith((".nii", ".nii.gz")):
        stored = np.asanyarray(nibabel.load(path).dataobj)
        if stored.dtype.kind == "f":
            _check_finite(path, stored)


def _check_finite(path: Path, array: np.ndarray) -> None:
    count = int(array.size - np.isfinite(array).sum())
    if count:
        raise InputFault(path, f"holds {count} NaN or infinite voxels", "export it again without masking by NaN")


def _check_geometry(path: Path, image: sitk.Image) -> None:
    size, spacing = image.GetSize(), image.GetSpacing()
    if min(size) < MIN_SLICES:
        raise InputFault(path, f"has only {min(size)} slices of {MIN_SLICES}", "give the whole series")
    if not 0.05 < min(spacing) <= max(spacing) < 10:
        shown = " x ".join(f"{value:.4g}" for value in spacing)
        raise InputFault(path, f"has a voxel of {shown} mm", "correct the spacing in its header (mm)")


def _check_values(path: Path, array: np.ndarray, modality: str) -> None:
    if not np.isfinite(array).all():
        count = int((~np.isfinite(array)).sum())
        raise InputFault(path, f"holds {count} NaN or infinite voxels", "export it again without masking by NaN")
    low, high = float(array.min()), float(array.max())
    if low == high:
        raise InputFault(path, f"is constant (every voxel {low:g})", "export the image itself, not an empty one")
    if modality == "CT" and (low >= 0 or high < BONE_HU):
        seen = f"has values from {low:g} to {high:g}, so it is not a CT of bone in HU"
        raise InputFault(path, seen, "apply the rescale slope and intercept, or list an MR in column mr")
    if modality == "MR" and low < -200:
        raise InputFault(path, f"has values down to {low:g}, as a CT has", "list a CT in column ct, an MR in mr")


def _read_dicom(folder: Path, modality: str, echo: int | None) -> sitk.Image:
    slices = _choose_echo(folder, _headers(folder, modality), echo)
    positions = _sorted_positions(folder, slices)
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames([str(entry["file"]) for entry in slices])
    reader.SetOutputPixelType(sitk.sitkFloat32)
    try:
        image = reader.Execute()
    except RuntimeError as error:
        raise InputFault(folder, "cannot be read as a DICOM series (a truncated slice)", "export it again") from error
    # ITK derives the gap from the first two slices only; the checked positions are the better witness.
    image.SetSpacing(
        (*image.GetSpacing()[:2], float(np.linalg.norm(positions[-1] - positions[0])) / (len(positions) - 1))
    )
    return image


def _headers(folder: Path, modality: str) -> list[dict]:
    """One mapping of tags a file, for every DICOM file of the folder; checked to be one series."""
    slices = [_header(file) for file in sorted(folder.iterdir()) if file.is_file() and _is_dicom(file)]
    if not slices:
        raise InputFault(folder, "holds no DICOM file", "give the folder of one DICOM series, or a NIfTI file")
    found = {entry["Modality"] for entry in slices}
    if found != {modality}:
        names = ", ".join(sorted(map(str, found)))
        raise InputFault(folder, f"holds modality {names} where {modality} is wanted", "correct the manifest's column")
    series = {entry["SeriesInstanceUID"] for entry in slices}
    if len(series) > 1:
        raise InputFault(folder, f"mixes {len(series)} DICOM series", "keep one series a folder")
    return slices


def _is_dicom(file: Path) -> bool:
    with file.open("rb") as stream:
        return stream.read(132)[128:] == b"DICM"


def _header(file: Path) -> dict:
    try:
        data = pydicom.dcmread(file, stop_before_pixels=True, specific_tags=TAGS)
    except (pydicom.errors.InvalidDicomError, EOFError, OSError, ValueError) as error:
        raise InputFault(file, "is not a whole DICOM file", "export the series again") from error
    header = {tag: getattr(data, tag, None) for tag in TAGS} | {"file": file}
    if header["ImagePositionPatient"] is None or header["ImageOrientationPatient"] is None:
        raise InputFault(file, "has no slice position or orientation", "export the original slices, not a screen copy")
    return header


def _choose_echo(folder: Path, slices: list[dict], echo: int | None) -> list[dict]:
    echoes = sorted({(int(e["EchoNumbers"] or 1), float(e["EchoTime"] or 0.0)) for e in slices if e["EchoTime"]})
    if echo is None and len(echoes) <= 1:
        return slices
    listed = ", ".join(f"echo {number} (TE {time:g} ms)" for number, time in echoes) or "no echo number"
    if echo is None:
        mend = f"choose one with echo={echoes[0][0]}, or in the manifest's column mr_echo"
        raise InputFault(folder, f"mixes {len(echoes)} echoes: {listed}", mend)
    chosen = [entry for entry in slices if int(entry["EchoNumbers"] or 1) == echo]
    if not chosen:
        raise InputFault(folder, f"has no echo {echo}, only {listed}", "choose one of these")
    return chosen


def _sorted_positions(folder: Path, slices: list[dict]) -> np.ndarray:
    """Sort the slices in place along their normal; return positions (n, 3) in LPS mm, checked to be even."""
    orientation = np.array([entry["ImageOrientationPatient"] for entry in slices], float)
    if np.abs(orientation - orientation[0]).max() > 1e-3:
        raise InputFault(folder, "holds slices of different orientation (a localiser?)", "keep one stack a folder")
    normal = np.cross(orientation[0, :3], orientation[0, 3:])
    slices.sort(key=lambda entry: float(np.dot(np.array(entry["ImagePositionPatient"], float), normal)))
    positions = np.array([entry["ImagePositionPatient"] for entry in slices], float)
    if len(positions) < MIN_SLICES:
        raise InputFault(folder, f"has only {len(positions)} slices of {MIN_SLICES}", "give the whole series")
    _check_even(folder, positions, normal)
    return positions


def _check_even(folder: Path, positions: np.ndarray, normal: np.ndarray) -> None:
    steps = np.diff(positions, axis=0)
    gaps = steps @ normal
    usual = float(np.median(gaps))
    if usual < 1e-3:
        raise InputFault(folder, "holds several slices at one position", "keep one image a position")
    odd = int(np.argmax(np.abs(gaps - usual)))
    if abs(gaps[odd] - usual) > SPACING_TOLERANCE * usual:
        seen = f"{gaps[odd]:.2f} mm after slice {odd + 1} where the others are {usual:.2f} mm"
        mend = "export the whole series again, a slice is missing or doubled"
        raise InputFault(folder, f"has uneven slices: a gap of {seen}", mend)
    total = positions[-1] - positions[0]
    tilt = np.degrees(np.arccos(np.clip(total @ normal / np.linalg.norm(total), -1, 1)))
    if tilt > TILT_TOLERANCE_DEG:
        raise InputFault(folder, f"has a gantry tilt of {tilt:.1f} degrees", "resample it upright before use")
