"""DICOM files as one volume: headers are read and compared, then the pixels are decoded."""

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pydicom
import SimpleITK as sitk

from ctsma.common import InputError

# How many numbers an element holds. The first five place a slice (PS3.3 C.7.6.2), those of rescale
# turn stored values into HU (PS3.3 C.11.1).
SIZES = {"Rows": 1, "Columns": 1, "PixelSpacing": 2, "ImagePositionPatient": 3}
SIZES |= {"ImageOrientationPatient": 6, "RescaleSlope": 1, "RescaleIntercept": 1}
SIZES |= {"SliceThickness": 1}
RESCALE = ("RescaleSlope", "RescaleIntercept")
POSITIVE = ("Rows", "Columns", "PixelSpacing", "RescaleSlope")
# Design choices: by how much elements of a stack may differ, which is rounding; else by nothing.
TOLERANCES = {"PixelSpacing": 1e-4, "ImageOrientationPatient": 1e-3, "SliceThickness": 0.01}
TOLERANCES |= {"ImagePositionPatient": np.inf}
SLICE_ELEMENTS = [*SIZES, "EchoNumbers", "EchoTime"]
TEXTS = {"SeriesInstanceUID": "DICOM series", "FrameOfReferenceUID": "frames of reference"}
TEXTS |= {"PatientID": "patients"}  # of which a stack has one
PIXELS = ["Modality", "PhotometricInterpretation", "BitsAllocated", "PixelData"]
ELEMENTS = [*PIXELS, *SLICE_ELEMENTS, *TEXTS]
GROUPS = ["SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"]
FRAME_NAMES = {"EffectiveEchoTime": "EchoTime"}  # of a frame (PS3.3 C.7.6.16): of a single slice
# A file without preamble begins with an element of group 2 or 8 (PS3.10 section 7.1).
NO_PREAMBLE = re.compile(rb"[\x02\x08]\0.\0[A-Z]{2}|\x08\0.\0[\x01-\x40]\0\0\0", re.DOTALL)
ENCAPSULATED = 0xFFFFFFFF  # stated length of compressed pixels (PS3.5 A.4)
MIN_SLICES = 8  # design choice: thinner stacks cannot hold a 10 mm patch at routine gaps
GRID_TOLERANCE_MM = 0.05  # design choice: positions are rounded to 0.01 mm by some exporters
COSINE_TOLERANCE = 2e-3  # of axes at right angles, written with three decimals
TILT_TOLERANCE_DEG = 0.5  # design choice: less shifts a stack of 100 mm by less than 1 mm
EXPORT = "export the original series again"


def is_dicom(file: Path) -> bool:
    """Whether a file holds DICOM, with or without its preamble of 132 bytes, by its content."""
    try:
        with file.open("rb") as stream:
            start = stream.read(132)
    except OSError as error:
        problem = f"cannot be read ({error.strerror})"
        raise InputError(file, problem, "correct its permissions, or copy it again") from error
    return start[128:] == b"DICM" or NO_PREAMBLE.match(start) is not None


def read_headers(file: Path, names: Sequence[str]) -> list[dict]:
    """Read the elements `names` of each image of a file: one, or as many as it has frames.

    Returns
    -------
    One dictionary per image: each element by name (None where absent; of PixelData its length in
    bytes), `file`, `frame` (None or its number) and `n_frames`. Empty for a DICOMDIR and for a
    file that is not DICOM.

    Raises InputError: the file cannot be read.
    """
    if file.name.upper() == "DICOMDIR" or not is_dicom(file):
        return []
    try:
        tags, without_pixels = [*names, *GROUPS, "NumberOfFrames"], "PixelData" not in names
        options = {"specific_tags": tags, "stop_before_pixels": without_pixels}
        data = pydicom.dcmread(file, force=True, defer_size=65536, **options)  # no long value yet
        pixels = data.pop("PixelData", None)
        shared, frames = (data.get(name) or [{}] for name in GROUPS)
        common = {name: data.get(name) for name in names if name not in GROUPS}
        common |= {"file": file, "n_frames": len(frames), **_elements_of_groups(shared[0], names)}
        if pixels is not None:
            common["PixelData"] = pixels.length
        if len(frames) == 1 and int(data.get("NumberOfFrames") or 1) > 1:
            common["ImagePositionPatient"] = None  # stated for all frames, so for none
        images = [common | _elements_of_groups(frame, names) for frame in frames]
        return [image | {"frame": k if frames[k] else None} for k, image in enumerate(images)]
    except Exception as error:  # pydicom raises errors of many classes on a damaged file
        raise InputError(file, "is not a whole DICOM file", EXPORT) from error


def list_images(path: Path, modality: str) -> list[dict]:
    """Headers of a file or of all files of a folder, without those of other objects.

    Reports and annotations, which a study holds beside its images, have another modality and no
    Rows. Raises InputError as `read_headers`.
    """
    images = []
    for file in [path] if path.is_file() else sorted(path.iterdir()):
        for image in read_headers(file, ELEMENTS) if file.is_file() else []:
            if image["Rows"] or image["Modality"] in (None, modality):
                images.append(image)
    return images


def read_dicom(path: Path, modality: str, echo: int | None = None) -> sitk.Image:
    """Read the one series of a folder, or a multi-frame file, as a float32 volume, LPS mm.

    Files that are not DICOM do not matter. Parameters and errors as of `read_stack`; InputError
    also where there is no DICOM image, or where a file cannot be read.
    """
    images = list_images(path, modality)
    if not images:
        remedy = "give the folder of one DICOM series, or a NIfTI file"
        raise InputError(path, "holds no DICOM file", remedy)
    return read_stack(path, images, modality, echo)


def read_stack(
    source: str | Path, images: list[dict], modality: str, echo: int | None = None
) -> sitk.Image:
    """Compare the images of one series and read them, each with its own rescale (CT: HU).

    Parameters
    ----------
    source : name for errors.
    images : of `read_headers` with ELEMENTS, in any order. Positions may be rounded to 0.01 mm; the
        gap between slices is the mean of all gaps.
    modality : "CT" or "MR".
    echo : number of the echo to take from a multi-echo MR; None where there is one echo. Where the
        header does not number them apart, echoes are counted by echo time.

    Raises
    ------
    InputError : another modality; several series, patients or echoes; an element that is absent,
        not a number, or differs between slices; fewer than 8 slices; slices off a regular grid;
        gantry tilt; pixels that are truncated or cannot be decoded.
    """
    _check_texts(source, images, modality)
    images = _select_echo(source, images, echo)
    numbers = _read_numbers(source, images, modality)
    if len(images) < MIN_SLICES:
        problem = f"has only {len(images)} slices, fewer than {MIN_SLICES}"
        raise InputError(source, problem, "give the whole series")
    axes = numbers["ImageOrientationPatient"][0].reshape(2, 3)
    if np.abs(axes @ axes.T - np.eye(2)).max() > COSINE_TOLERANCE:
        raise InputError(source, "has image axes that are not at right angles", EXPORT)
    normal = np.cross(axes[0], axes[1])
    order = np.argsort(numbers["ImagePositionPatient"] @ normal, kind="stable")
    images = [images[k] for k in order]
    numbers = {name: values[order] for name, values in numbers.items()}
    positions = numbers["ImagePositionPatient"]
    _check_grid(source, positions, normal)
    _check_pixels(images)
    if all(image["frame"] is None for image in images):
        volume = _decode_slices(source, images)
    else:
        volume = _decode_frames(images, numbers)
        volume.SetOrigin(positions[0])
        volume.SetDirection(np.column_stack([*axes, normal]).ravel())
        volume.SetSpacing((*numbers["PixelSpacing"][0][::-1], 1.0))
    # ITK takes the gap between the first two slices; the mean of all gaps rounds less.
    gap = float(np.linalg.norm(positions[-1] - positions[0])) / (len(positions) - 1)
    volume.SetSpacing((*volume.GetSpacing()[:2], gap))
    return volume


def _elements_of_groups(groups: pydicom.Dataset, names: Sequence[str]) -> dict:
    """The elements `names` of functional groups, without the groups (PS3.3 C.7.6.16)."""
    found = {}
    for group in groups:
        for element in group.value[0] if group.VR == "SQ" and group.value else []:
            name = FRAME_NAMES.get(element.keyword, element.keyword)
            if name in names and element.VR != "SQ" and element.value is not None:
                found[name] = element.value
    return found


def _check_texts(source: str | Path, images: list[dict], modality: str) -> None:
    for name, wanted in {"Modality": modality, "PhotometricInterpretation": "MONOCHROME2"}.items():
        found = {str(image[name] or "not stated") for image in images}
        if found != {wanted}:
            problem = f"holds {name} {', '.join(sorted(found))} where {wanted} is wanted"
            raise InputError(source, problem, f"give one series of {modality} slices")
    for name, kind in TEXTS.items():
        found = {str(image[name]) for image in images} - {"None"}
        if len(found) > 1:
            raise InputError(source, f"mixes {len(found)} {kind}", "keep one series per folder")


def _select_echo(source: str | Path, images: list[dict], echo: int | None) -> list[dict]:
    """The images of the wanted echo; all where there is one echo and none is asked for."""
    try:
        pairs = [(float(im["EchoTime"] or 0), int(im["EchoNumbers"] or 1)) for im in images]
    except (TypeError, ValueError) as error:
        raise InputError(source, "has an echo time or number that is no number", EXPORT) from error
    echoes = sorted(set(pairs))
    numbers = [number for _, number in echoes]
    if len(set(numbers)) < len(numbers):
        numbers = list(range(1, len(echoes) + 1))
    if echo is None and len(echoes) <= 1:
        return images
    found = [f"echo {n} (TE {time:g} ms)" for n, (time, _) in zip(numbers, echoes, strict=True)]
    if echo is None:
        remedy = f"choose one, as echo={numbers[0]} or, in a manifest, in column mr_echo"
        raise InputError(source, f"mixes {len(echoes)} echoes: {', '.join(found)}", remedy)
    if echo not in numbers:
        raise InputError(source, f"has no echo {echo}, only {', '.join(found)}", "choose one")
    wanted = echoes[numbers.index(echo)]
    return [image for image, pair in zip(images, pairs, strict=True) if pair == wanted]


def _read_numbers(source: str | Path, images: list[dict], modality: str) -> dict[str, np.ndarray]:
    """The elements NUMBERS, one row per image; an MR may be rescaled slice by slice."""
    numbers = {}
    for name, size in SIZES.items():
        values = [image[name] for image in images if image[name] is not None]
        if not values and name in (*RESCALE, "SliceThickness"):
            continue
        if len(values) < len(images):
            n_absent = len(images) - len(values)
            raise InputError(source, f"lacks {name} in {n_absent} of {len(images)} slices", EXPORT)
        try:
            array = np.array(values, float).reshape(len(images), size)
        except (TypeError, ValueError):
            array = np.array([np.nan])
        if not np.isfinite(array).all() or (name in POSITIVE and array.min() <= 0):
            raise InputError(source, f"has a {name} that is no usable number", EXPORT)
        difference, limit = np.ptp(array, axis=0).max(), TOLERANCES.get(name, 0.0)
        if difference > limit and not (modality == "MR" and name in RESCALE):
            problem = f"holds slices whose {name} differs by {difference:g} (limit {limit:g})"
            raise InputError(source, problem, "keep one stack per folder")
        numbers[name] = array
    return numbers


def _check_grid(source: str | Path, positions: np.ndarray, normal: np.ndarray) -> None:
    """Positions must advance by equal steps, at right angles to the slices."""
    gaps = np.diff(positions @ normal)
    usual = float(np.median(gaps))
    if usual < 1e-3:
        raise InputError(source, "holds several slices at one position", "keep one per position")
    step = (positions[-1] - positions[0]) / (len(positions) - 1)
    offsets = positions - positions[0] - np.outer(np.arange(len(positions)), step)
    along = offsets @ normal
    in_plane = np.linalg.norm(offsets - np.outer(along, normal), axis=1)
    tilt_deg = np.degrees(np.arccos(np.clip(step @ normal / np.linalg.norm(step), -1, 1)))
    odd, limit = int(np.argmax(np.abs(gaps - usual))), min(GRID_TOLERANCE_MM, usual / 4)
    if np.abs(along).max() > limit:
        problem = f"has uneven slices: a gap of {gaps[odd]:.2f} mm after slice {odd + 1} where the "
        problem += f"others are {usual:.2f} mm (limit: {limit:.2g} mm off a regular grid)"
        raise InputError(source, problem, f"{EXPORT}, a slice is missing or doubled")
    if in_plane.max() > GRID_TOLERANCE_MM:
        problem = f"has slice {in_plane.argmax() + 1} shifted in its plane by {in_plane.max():.2f}"
        raise InputError(source, f"{problem} mm (limit {GRID_TOLERANCE_MM} mm)", EXPORT)
    if tilt_deg > TILT_TOLERANCE_DEG:
        problem = f"has a gantry tilt of {tilt_deg:.1f} degrees (limit {TILT_TOLERANCE_DEG})"
        raise InputError(source, problem, "resample it upright before use")


def _check_pixels(images: list[dict]) -> None:
    """The stated length of the pixels must be what the matrix needs."""
    for image in images:
        bits = image["Rows"] * image["Columns"] * image["n_frames"] * (image["BitsAllocated"] or 0)
        needed, found = bits // 8, image["PixelData"] or 0
        if found not in (needed, needed + needed % 2, ENCAPSULATED):
            problem = f"holds {found} bytes of pixels where {needed} are needed (a truncated slice)"
            raise InputError(image["file"], problem, EXPORT)


def _decode_slices(source: str | Path, images: list[dict]) -> sitk.Image:
    """Single slices by ITK."""
    sitk.ProcessObject.SetGlobalWarningDisplay(False)  # ITK warns of rounded positions
    reader = sitk.ImageSeriesReader()
    reader.SetImageIO("GDCMImageIO")  # which ITK finds by the preamble
    reader.SetFileNames([str(image["file"]) for image in images])
    reader.SetOutputPixelType(sitk.sitkFloat32)
    try:
        return reader.Execute()
    except RuntimeError as error:
        problem = "cannot be read as a DICOM series (a truncated slice)"
        raise InputError(source, problem, EXPORT) from error


def _decode_frames(images: list[dict], numbers: dict[str, np.ndarray]) -> sitk.Image:
    """Frames of multi-frame files by pydicom, without geometry; one file at a time in memory."""
    shape = (len(images), images[0]["Rows"], images[0]["Columns"])
    voxels = np.empty(shape, np.float32)
    slopes = numbers.get("RescaleSlope", np.ones(len(images)))
    intercepts = numbers.get("RescaleIntercept", np.zeros(len(images)))
    for file in {image["file"] for image in images}:
        try:
            pixels = pydicom.dcmread(file, force=True).pixel_array.reshape(-1, *shape[1:])
        except Exception as error:  # each codec raises its own
            remedy = "decompress it first (gdcmconv --raw), or export single slices"
            raise InputError(file, "has frames that cannot be decoded", remedy) from error
        for number, image in enumerate(images):
            if image["file"] == file:
                frame = pixels[image["frame"] or 0].astype(float)
                voxels[number] = frame * slopes[number] + intercepts[number]
    return sitk.GetImageFromArray(voxels)
