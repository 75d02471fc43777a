"""A DICOM folder as one volume: its headers are read and checked, then ITK decodes the pixels."""

from pathlib import Path

import numpy as np
import pydicom
import SimpleITK as sitk
from pydicom.misc import is_dicom

from ctsma.common import InputError

# What places a slice in its volume and turns its pixels into values (PS3.3 C.7.6.2, C.11.1)
SLICE_ELEMENTS = ["Rows", "Columns", "PixelSpacing", "ImagePositionPatient"]
SLICE_ELEMENTS += ["ImageOrientationPatient", "RescaleSlope", "RescaleIntercept"]
SLICE_ELEMENTS += ["EchoNumbers", "EchoTime"]
ELEMENTS = ["Modality", "SeriesInstanceUID", *SLICE_ELEMENTS]
MIN_SLICES = 8  # design choice: thinner stacks cannot hold a 10 mm patch at routine gaps
GAP_TOLERANCE = 0.01  # design choice: relative unevenness of slice gaps that is still rounding
TILT_TOLERANCE_DEG = 0.5  # design choice: less shifts a stack of 100 mm by less than 1 mm


def read_dicom(folder: Path, modality: str, echo: int | None = None) -> sitk.Image:
    """Read the one series of a folder as a float32 volume, rescaled (CT: HU), LPS mm.

    Parameters
    ----------
    folder : holds one series; files that are not DICOM are left out.
    modality : "CT" or "MR".
    echo : echo number to take from a multi-echo MR; None where there is one echo.

    Raises
    ------
    InputError : no DICOM file, another modality, mixed series, echoes or orientations, too few
        or unevenly spaced slices, gantry tilt, a truncated file.
    """
    files = [file for file in sorted(folder.iterdir()) if file.is_file() and is_dicom(file)]
    headers = [_read_header(file) for file in files]
    if not headers:
        remedy = "give the folder of one DICOM series, or a NIfTI file"
        raise InputError(folder, "holds no DICOM file", remedy)
    _check_modality(folder, headers, modality)
    _check_one_series(folder, headers)
    headers = _select_echo(folder, headers, echo)
    orientations = np.array([header["ImageOrientationPatient"] for header in headers], float)
    _check_orientation(folder, orientations)
    normal = np.cross(orientations[0, :3], orientations[0, 3:])
    positions = np.array([header["ImagePositionPatient"] for header in headers], float)
    order = np.argsort(positions @ normal, kind="stable")
    positions = positions[order]
    _check_count(folder, positions)
    _check_gaps(folder, positions, normal)
    _check_tilt(folder, positions, normal)
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames([str(headers[k]["file"]) for k in order])
    reader.SetOutputPixelType(sitk.sitkFloat32)
    try:
        image = reader.Execute()
    except RuntimeError as error:
        problem = "cannot be read as a DICOM series (a truncated slice)"
        raise InputError(folder, problem, "export it again") from error
    # ITK takes the gap between the first two slices; the mean of all gaps rounds less.
    gap = float(np.linalg.norm(positions[-1] - positions[0])) / (len(positions) - 1)
    image.SetSpacing((*image.GetSpacing()[:2], gap))
    return image


def _read_header(file: Path) -> dict:
    """The elements of one slice by name (None where absent), and its `file`."""
    try:
        data = pydicom.dcmread(file, stop_before_pixels=True, specific_tags=ELEMENTS)
    except (pydicom.errors.InvalidDicomError, EOFError, OSError, ValueError) as error:
        raise InputError(file, "is not a whole DICOM file", "export the series again") from error
    header = {name: getattr(data, name, None) for name in ELEMENTS} | {"file": file}
    if header["ImagePositionPatient"] is None or header["ImageOrientationPatient"] is None:
        remedy = "export the original slices, not a screen copy"
        raise InputError(file, "has no slice position or orientation", remedy)
    return header


def _check_modality(folder: Path, headers: list[dict], modality: str) -> None:
    found = {header["Modality"] for header in headers}
    if found != {modality}:
        problem = f"holds modality {', '.join(sorted(map(str, found)))} where {modality} is wanted"
        raise InputError(folder, problem, "correct the manifest's column")


def _check_one_series(folder: Path, headers: list[dict]) -> None:
    series = {header["SeriesInstanceUID"] for header in headers}
    if len(series) > 1:
        raise InputError(folder, f"mixes {len(series)} DICOM series", "keep one series per folder")


def _select_echo(folder: Path, headers: list[dict], echo: int | None) -> list[dict]:
    """The headers of the wanted echo; all where there is one echo and none is asked for."""
    echoes = set()
    for header in headers:
        if header["EchoTime"]:
            echoes.add((int(header["EchoNumbers"] or 1), float(header["EchoTime"])))
    if echo is None and len(echoes) <= 1:
        return headers
    listed = ", ".join(f"echo {number} (TE {time:g} ms)" for number, time in sorted(echoes))
    if echo is None:
        remedy = f"choose one with echo={min(echoes)[0]}, or in the manifest's column mr_echo"
        raise InputError(folder, f"mixes {len(echoes)} echoes: {listed}", remedy)
    selected = [header for header in headers if int(header["EchoNumbers"] or 1) == echo]
    if not selected:
        problem = f"has no echo {echo}, only {listed or 'images without echo number'}"
        raise InputError(folder, problem, "choose one of these")
    return selected


def _check_orientation(folder: Path, orientations: np.ndarray) -> None:
    if np.abs(orientations - orientations[0]).max() > 1e-3:
        problem = "holds slices of different orientation (a localiser?)"
        raise InputError(folder, problem, "keep one stack per folder")


def _check_count(folder: Path, positions: np.ndarray) -> None:
    if len(positions) < MIN_SLICES:
        problem = f"has only {len(positions)} slices, fewer than {MIN_SLICES}"
        raise InputError(folder, problem, "give the whole series")


def _check_gaps(folder: Path, positions: np.ndarray, normal: np.ndarray) -> None:
    gaps = np.diff(positions, axis=0) @ normal
    usual = float(np.median(gaps))
    if usual < 1e-3:
        remedy = "keep one image per position"
        raise InputError(folder, "holds several slices at one position", remedy)
    odd = int(np.argmax(np.abs(gaps - usual)))
    if abs(gaps[odd] - usual) > GAP_TOLERANCE * usual:
        found = f"{gaps[odd]:.2f} mm after slice {odd + 1} where the others are {usual:.2f} mm"
        remedy = "export the whole series again, a slice is missing or doubled"
        raise InputError(folder, f"has uneven slices: a gap of {found}", remedy)


def _check_tilt(folder: Path, positions: np.ndarray, normal: np.ndarray) -> None:
    extent = positions[-1] - positions[0]
    cosine = extent @ normal / np.linalg.norm(extent)
    tilt_deg = np.degrees(np.arccos(np.clip(cosine, -1, 1)))
    if tilt_deg > TILT_TOLERANCE_DEG:
        problem = f"has a gantry tilt of {tilt_deg:.1f} degrees"
        raise InputError(folder, problem, "resample it upright before use")
