"""Writes small DICOM exports for the tests: single slices, or one multi-frame file."""

from pathlib import Path

import numpy as np
import pydicom
import SimpleITK as sitk
from pydicom.dataset import Dataset, FileMetaDataset

CT_CLASS, MR_CLASS = "1.2.840.10008.5.1.4.1.1.2", "1.2.840.10008.5.1.4.1.1.4"
ENHANCED_CT = "1.2.840.10008.5.1.4.1.1.2.1"
PERSON = {
    "PatientID": "4711",
    "PatientName": "Doe^Jane",
    "PatientBirthDate": "19500601",
    "PatientSex": "F",
    "PatientSize": 1.7,
    "PatientWeight": 72.0,
    "StudyDate": "20200315",
    "InstitutionName": "St. Elsewhere",
    "StudyInstanceUID": "1.2",
}


def small(n: int = 10, gap_mm: float = 1.25, offset: float = 0.0) -> sitk.Image:
    """A stack with the values of a knee CT, 9 x 10 pixels."""
    image = sitk.GetImageFromArray(
        np.linspace(-120, 1300, n * 90).reshape(n, 10, 9).astype(np.int16)
    )
    image.SetSpacing((0.5, 0.6, gap_mm))
    image.SetOrigin((-20.0, 5.0, 40.0 + offset))
    return image


def write_series(
    folder: Path, image: sitk.Image, modality: str = "CT", series: str = "1.2.3", **tags
) -> list[Path]:
    """Write each slice as a file without extension; tags that are None are left out.

    Returns the files by position.
    """
    folder.mkdir(parents=True, exist_ok=True)
    array, files = sitk.GetArrayFromImage(image), []
    for number, pixels in enumerate(array):
        data = header(modality, f"{series}.{number + 1}", series, pixels, **tags)
        place(data, image, number)
        data.PixelData = (
            (pixels.astype(np.int32) + (1024 if modality == "CT" else 0)).astype(np.int16).tobytes()
        )
        files.append(folder / f"IM{len(array) - number:04d}_{series}")
        data.save_as(files[-1], enforce_file_format=True)
    return files


def header(modality: str, uid: str, series: str, pixels: np.ndarray, **tags) -> Dataset:
    """A data set without position and pixels."""
    data = Dataset()
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    data.SOPClassUID = data.file_meta.MediaStorageSOPClassUID = (
        CT_CLASS if modality == "CT" else MR_CLASS
    )
    data.SOPInstanceUID = data.file_meta.MediaStorageSOPInstanceUID = uid
    data.SeriesInstanceUID, data.Modality, (data.Rows, data.Columns) = (
        series,
        modality,
        pixels.shape[-2:],
    )
    data.SamplesPerPixel, data.PhotometricInterpretation, data.PixelRepresentation = (
        1,
        "MONOCHROME2",
        1,
    )
    data.BitsAllocated, data.BitsStored, data.HighBit = 16, 16, 15
    if modality == "CT":
        data.RescaleSlope, data.RescaleIntercept, data.ConvolutionKernel = 1, -1024, "BONE"
    for name, value in (
        PERSON | {"SliceThickness": 1.0, "Laterality": "R", "SeriesNumber": 1} | tags
    ).items():
        if value is not None:
            setattr(data, name, value)
    return data


def place(data: Dataset, image: sitk.Image, number: int) -> None:
    """Position, orientation and pixel spacing of a slice, rounded to DICOM's 16 characters."""
    axes = np.reshape(image.GetDirection(), (3, 3))
    data.ImagePositionPatient = [
        round(v, 5) for v in image.TransformIndexToPhysicalPoint((0, 0, number))
    ]
    data.ImageOrientationPatient = [round(v, 9) for v in (*axes[:, 0], *axes[:, 1])]
    data.PixelSpacing = [image.GetSpacing()[1], image.GetSpacing()[0]]


def write_multiframe(file: Path, image: sitk.Image, **tags) -> Path:
    """Write an enhanced CT: all slices in one file, geometry and rescale in functional groups."""
    array, frames = sitk.GetArrayFromImage(image), []
    data = header("CT", "1.2.9.1", "1.2.9", array, **tags)
    data.SOPClassUID = data.file_meta.MediaStorageSOPClassUID = ENHANCED_CT
    del data.RescaleSlope, data.RescaleIntercept
    for number in range(len(array)):
        spot, frame, groups = Dataset(), Dataset(), {}
        place(spot, image, number)
        for group, names in {
            "PlanePositionSequence": ["ImagePositionPatient"],
            "PlaneOrientationSequence": ["ImageOrientationPatient"],
            "PixelMeasuresSequence": ["PixelSpacing"],
        }.items():
            groups[group] = Dataset()
            for name in names:
                setattr(groups[group], name, getattr(spot, name))
        groups["PixelValueTransformationSequence"] = Dataset()
        groups["PixelValueTransformationSequence"].RescaleSlope = 2
        groups["PixelValueTransformationSequence"].RescaleIntercept = -1024
        for group, item in groups.items():
            setattr(frame, group, [item])
        frames.append(frame)
    data.NumberOfFrames, data.PerFrameFunctionalGroupsSequence = len(array), frames
    data.SharedFunctionalGroupsSequence = [Dataset()]
    data.PixelData = ((array.astype(np.int32) + 1024) // 2).astype(np.int16).tobytes()
    file.parent.mkdir(parents=True, exist_ok=True)
    data.save_as(file, enforce_file_format=True)
    return file


def edit(file: Path, **tags) -> None:
    """Set (or, where None, delete) elements of a written file."""
    data = pydicom.dcmread(file)
    for name, value in tags.items():
        if value is None:
            delattr(data, name)
        else:
            setattr(data, name, value)
    data.save_as(file, enforce_file_format=True)
