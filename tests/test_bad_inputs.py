"""Bad inputs, one by one: message, exit code, and the files that are left. Then broken machines.

`python tests/test_bad_inputs.py > docs/bad_inputs.md` writes the table of the documents.
"""

import errno
import json
import re
import resource
import shutil
import socket
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import nbformat
import numpy as np
import pytest
import SimpleITK as sitk

sys.path.insert(0, str(Path(__file__).parent))  # to be run as a script too
from dicom_export import edit, header, small, write_multiframe, write_series

from ctsma import cohort
from ctsma_lab import cli, runner
from dicom_import import import_dicom
from dicom_import.checks import check_knees

REPOSITORY = Path(__file__).parents[1]
COLUMNS = "knee_id,subject_id,side,ct,mr,oa,kl_grade,age,sex,bmi,site,ct_sha256,mr_sha256"
IMPORT = ["import", "in", "--out", "out"]
CHECK = ["check-data", "cohort.csv", "--quick"]
DEEP = ["check-data", "cohort.csv"]
NOTHING, SALT = (), ("out.salt",)
RECORD = ("out.salt", "out/import_log.json", "out/records/*.json")
COHORT = (*RECORD, "out/cohort.csv", "out/images/*.nii.gz")


@dataclass(frozen=True)
class Bad:
    """One bad input: `make` puts it into the working folder, then `command` is given."""

    given: str
    make: Callable[[], object]
    command: list[str]
    message: str  # part of what must be printed
    code: int  # exit code
    left: tuple[str, ...] = NOTHING  # patterns of the new files


# ---------------------------------------------------------------- makers
def series(where="in/a", image=None, **tags):
    return lambda: write_series(Path(where), image or small(), **tags)


def both(*makers):
    return lambda: [make() for make in makers]


def damaged(change, **tags):
    """A good series, then `change(files)`."""
    return lambda: change(write_series(Path("in/a"), small(), **tags))


def text(path, content="not an image"):
    def make():
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(content)

    return make


def truncated(file, keep):
    file.write_bytes(file.read_bytes()[: int(file.stat().st_size * keep)])


def manifest(*rows, header_line=COLUMNS):
    return text("cohort.csv", "\n".join([header_line, *rows]) + "\n")


def row(ct="ct.nii.gz", mr="", knee="K1", person="S1", side="R", sums=","):
    return f"{knee},{person},{side},{ct},{mr},,,,,,,{sums}"


def nifti(array, name="ct.nii.gz", spacing=(0.5, 0.5, 0.7)):
    def make():
        image = sitk.GetImageFromArray(np.asarray(array, np.float32), isVector=False)
        image.SetSpacing(spacing[: image.GetDimension()] + (1.0,) * (image.GetDimension() - 3))
        sitk.WriteImage(image, name)

    return make


def knee_ct(shape=(12, 30, 30)):
    return np.linspace(-120, 1300, int(np.prod(shape))).reshape(shape)


def changed(array, value, n=1):
    array = array.copy()
    array.ravel()[:n] = value
    return array


def link(path, target):
    def make():
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).symlink_to(target)

    return make


def imported(**tags):
    """A cohort that an earlier import made."""

    def make():
        write_series(Path("in/a"), small(), **tags)
        assert cli.main(IMPORT) == 0

    return make


def choice_of(**tags):
    """A choice file that takes the one series of the tree, whatever it is."""

    def make():
        write_series(Path("in/a"), small(), **tags)
        cli.main([*IMPORT, "--choose"])
        Path("out-choice.csv").write_text(
            Path("out-choice.csv").read_text().replace("\n0,", "\n1,")
        )

    return make


def multiframe_jpeg_ls():
    file = write_multiframe(Path("in/all"), small())
    data = file.read_bytes()
    file.write_bytes(data.replace(b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.2.4.80"[:20], 1))


def broad():
    """Bone from one side of a 300 mm field to the other."""
    array = np.full((20, 60, 150), 60.0)
    array[:, 15:45, 5:145], array[:, :5] = 900.0, -100.0
    image = sitk.GetImageFromArray(array.astype(np.int16))
    image.SetSpacing((2.0, 2.0, 1.25))
    return image


def tilted(files):
    for number, file in enumerate(files):
        edit(file, ImagePositionPatient=[-20.0, 5.0 + 0.3 * number, 40.0 + 1.25 * number])


def with_changes(**tags):
    """A good series, of which the last five slices are changed (None: the element is deleted)."""
    return damaged(lambda files: [edit(file, **tags) for file in files[5:]])


def in_manifest(make, column="ct"):
    """The series in a manifest of one knee, as a DICOM folder."""
    images = {"ct": "", "mr": "", column: "in/a"}
    return both(make, manifest(row(**images)))


def rounded(files):
    for number, file in enumerate(files):
        z = round(40 + 0.625 * number, 2)
        edit(file, ImagePositionPatient=[-20.0, 5.0, z])


def without_preamble(files):
    for file in files:
        file.write_bytes(file.read_bytes()[132:])


def two_echoes():
    tags = {"modality": "MR", "image": small() + 200, "where": "in/a"}
    first = series(series="1.2.3", EchoNumbers=1, EchoTime=6.0, **tags)
    second = series(series="1.2.3.7", EchoNumbers=2, EchoTime=12.0, **tags)
    files = Path("in/a")
    return both(
        first, second, lambda: [edit(file, SeriesInstanceUID="1.2.3") for file in files.iterdir()]
    )


def frames_without_positions():
    file = write_multiframe(Path("in/a/all"), small())
    tags = {"PixelSpacing": [0.5, 0.5], "ImageOrientationPatient": [1, 0, 0, 0, 1, 0]}
    tags["ImagePositionPatient"] = [0, 0, 0]
    edit(file, PerFrameFunctionalGroupsSequence=None, **tags)


def beside_the_slices():
    """What lies in exported folders beside the slices, and says nothing about them."""
    write_series(Path("in/a"), small())
    Path("in/a/.DS_Store").write_bytes(b"\0\0\0\1Bud1" + bytes(600))
    Path("in/a/notes.txt").write_text("SliceThickness 3")
    Path("in/a/series.json").write_text("{}")
    report = header("SR", "1.2.9", "1.2.3.9", np.zeros((10, 9), np.int16))
    del report.Rows, report.Columns
    report.save_as("in/a/report", enforce_file_format=True)
    report.Modality = "CT"
    report.save_as("in/a/DICOMDIR", enforce_file_format=True)


def screen_copy(files):
    for file in files:
        edit(file, SOPClassUID="1.2.840.10008.5.1.4.1.1.7")


def zipped():
    with zipfile.ZipFile("in", "w") as archive:
        archive.writestr("a", "b")
    Path("in").rename("export.zip")


def tarred():
    with tarfile.open("export.tar.gz", "w:gz"):
        pass


def doubled(files):
    edit_copy = files[3].with_name("copy")
    shutil.copy(files[3], edit_copy)
    edit(edit_copy, SOPInstanceUID="1.2.3.99")


def salted(content, mode=0o600):
    return both(series(), text("out.salt", content), lambda: Path("out.salt").chmod(mode))


def dicomdir():
    data = header("CT", "1.2.3.1", "1.2.3", np.zeros((10, 9), np.int16))
    del data.SeriesInstanceUID, data.Rows, data.Columns
    Path("in").mkdir()
    data.save_as("in/DICOMDIR", enforce_file_format=True)


def linked_slice():
    files = write_series(Path("root/ct"), small())
    files[0].rename("outside")
    files[0].symlink_to(Path("outside").resolve())
    Path("root/cohort.csv").write_text(f"{COLUMNS}\n{row('ct')}\n")


def earlier_run():
    Path("runs/quick").mkdir(parents=True)
    Path("runs/quick/run.json").write_text(json.dumps({"profile": "tiny"}))


OWN = COLUMNS + ",ct_labels"


def knee_blocks(view=np.s_[:, :, :], hu=None, labels=None):
    """ct.nii.gz of two blocks of bone with a notch (voxels of 1 mm), and labels.nii.gz."""

    def make():
        z, y, x = np.indices((70, 70, 90))
        inside = (abs(x - 45) < 35) & (abs(y - 35) < 25) & (abs(z - 35) < 30)
        femur = inside & (z > 37) & ((abs(x - 45) > 8) | (z > 46))
        tibia = inside & (z < 33)
        ct = np.where(femur | tibia, 900.0, np.where(abs(y - 35) > 30, -100.0, 50.0))
        ct = hu(ct, z) if hu else ct
        own = np.where(femur, 1, np.where(tibia, 2, 0))
        own = labels(own) if labels else own
        for array, name in ((ct, "ct.nii.gz"), (own, "labels.nii.gz")):
            sitk.WriteImage(sitk.GetImageFromArray(array[view].astype(np.float32)), name)

    return make


def with_labels(name="labels.nii.gz"):
    return manifest(row() + f",{name}", header_line=OWN)


GOOD = nifti(knee_ct())
BAD = [
    # -------- ctsma import
    Bad(
        "a folder that does not exist",
        lambda: None,
        IMPORT,
        "in: does not exist; give the folder",
        2,
    ),
    Bad(
        "a zip archive",
        zipped,
        ["import", "export.zip", "--out", "out"],
        "is a file, not a folder; unpack it first",
        2,
    ),
    Bad(
        "a tar archive",
        tarred,
        ["import", "export.tar.gz", "--out", "out"],
        "not a folder; unpack it first",
        2,
    ),
    Bad(
        "one file in place of a folder",
        text("in"),
        IMPORT,
        "is a file, not a folder; give a folder of DICOM",
        2,
    ),
    Bad(
        "an empty folder",
        lambda: Path("in").mkdir(),
        IMPORT,
        "holds no DICOM image (it is empty)",
        2,
    ),
    Bad(
        "a folder of other files",
        text("in/notes.txt"),
        IMPORT,
        "holds no DICOM image (1 not DICOM)",
        2,
    ),
    Bad(
        "a DICOMDIR and no images",
        dicomdir,
        IMPORT,
        "(1 DICOM without an image series (DICOMDIR))",
        2,
    ),
    Bad(
        "an archive inside the tree",
        both(series(), text("in/more.zip")),
        IMPORT,
        "1 files skipped: archive, not opened: unpack it first",
        0,
        COHORT,
    ),
    Bad(
        "a link out of the tree",
        both(series(), text("secret"), link("in/b", "../secret")),
        IMPORT,
        "1 files skipped: link that leads out of the tree",
        0,
        COHORT,
    ),
    Bad(
        "a broken link",
        both(series(), link("in/b", "none")),
        IMPORT,
        "1 files skipped: broken link",
        0,
        COHORT,
    ),
    Bad(
        "a link to a folder",
        both(series(), series("other", series="1.9"), link("in/b", "../other")),
        IMPORT,
        "1 files skipped: link to a folder, not followed",
        0,
        COHORT,
    ),
    Bad(
        "one series twice in the tree",
        damaged(lambda files: shutil.copytree("in/a", "in/b")),
        IMPORT,
        "10 files skipped: the same image twice in the tree",
        0,
        COHORT,
    ),
    Bad(
        "a slice that ends in its header",
        damaged(lambda files: truncated(files[5], 0.2)),
        IMPORT,
        "uneven slices: a gap of 2.50 mm after slice 5",
        1,
        RECORD,
    ),
    Bad(
        "a slice that ends in its pixels",
        damaged(lambda files: truncated(files[5], 0.9)),
        IMPORT,
        "cannot be read as a DICOM series (a truncated slice); export the original series",
        1,
        RECORD,
    ),
    Bad(
        "a missing slice",
        damaged(lambda f: f[4].unlink()),
        IMPORT,
        "a gap of 2.50 mm after slice 4",
        1,
        RECORD,
    ),
    Bad("a doubled slice", damaged(doubled), IMPORT, "uneven slices: a gap of 0.00 mm", 1, RECORD),
    Bad(
        "a tilted gantry",
        damaged(tilted),
        IMPORT,
        "has a gantry tilt of 13.5 degrees (limit 0.5); resample it upright",
        1,
        RECORD,
    ),
    Bad(
        "five slices", series(image=small(5)), IMPORT, "a localiser or fragment: 5 images", 1, SALT
    ),
    Bad(
        "a localiser",
        series(ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"]),
        IMPORT,
        "a localiser or fragment: 10 images",
        1,
        SALT,
    ),
    Bad(
        "burned-in annotation",
        series(BurnedInAnnotation="YES"),
        IMPORT,
        "burned-in annotation is declared: blacken it",
        1,
        SALT,
    ),
    Bad(
        "a screen copy",
        damaged(screen_copy),
        IMPORT,
        "a secondary capture (a screen copy)",
        1,
        SALT,
    ),
    Bad("an ultrasound", series(modality="US"), IMPORT, "modality US", 1, SALT),
    Bad(
        "an ankle", series(BodyPartExamined="ANKLE"), IMPORT, "body part ANKLE, not a knee", 1, SALT
    ),
    Bad(
        "no side",
        series(Laterality=None),
        IMPORT,
        "does not name the knee it shows; give --side L or",
        1,
        RECORD,
    ),
    Bad(
        "slices without position",
        damaged(lambda files: [edit(file, ImagePositionPatient=None) for file in files]),
        IMPORT,
        "no slice position: export the original slices",
        1,
        SALT,
    ),
    Bad(
        "a CT without rescale",
        series(RescaleIntercept=0),
        IMPORT,
        "it is not a CT of bone in HU; apply the rescale slope",
        1,
        RECORD,
    ),
    Bad(
        "an image of one value",
        series(image=small() * 0),
        IMPORT,
        "is constant (every voxel is 0)",
        1,
        RECORD,
    ),
    Bad(
        "frames that cannot be decoded",
        multiframe_jpeg_ls,
        IMPORT,
        "decompress it first (gdcmconv --raw)",
        1,
        RECORD,
    ),
    Bad(
        "two knees whose bones touch",
        series(image=broad(), Laterality=None),
        IMPORT,
        "crop it to one volume per knee",
        1,
        RECORD,
    ),
    Bad(
        "an echo that does not exist",
        both(
            series(modality="MR", image=small() + 200, EchoNumbers=1, EchoTime=6.0),
            series(
                "in/b", small() + 200, modality="MR", series="1.2.3.7", EchoNumbers=2, EchoTime=12.0
            ),
            lambda: [edit(file, SeriesInstanceUID="1.2.3") for file in Path("in/b").iterdir()],
        ),
        [*IMPORT, "--echo", "7"],
        "echo 1 of 2 (TE 6 ms); --echo 1 takes it",
        1,
        SALT,
    ),
    Bad(
        "the salt inside the cohort",
        series(),
        [*IMPORT, "--salt-file", "out/salt"],
        "lies inside the cohort, which may be passed on; give --salt-file outside it",
        2,
    ),
    Bad(
        "a salt that others can read",
        salted("x" * 64, 0o644),
        IMPORT,
        "can be read by others; run chmod 600",
        2,
    ),
    Bad(
        "a salt of five bytes",
        salted("12345"),
        IMPORT,
        "holds 5 bytes, too few for a secret; remove it to make a new salt",
        2,
    ),
    Bad(
        "another salt than the cohort's",
        imported(),
        [*IMPORT, "--salt-file", "other"],
        "was imported with another salt, so that one person would get two names",
        2,
        ("other",),
    ),
    Bad(
        "the choice inside the cohort",
        series(),
        [*IMPORT, "--choose", "--choice", "out/choice.csv"],
        "names folders and lies inside the cohort; give --choice outside it",
        2,
    ),
    Bad(
        "a choice made before",
        both(series(), text("out-choice.csv")),
        [*IMPORT, "--choose"],
        "exists already; edit it and import, or remove it",
        2,
    ),
    Bad(
        "a choice file that is none",
        both(series(), text("out-choice.csv")),
        IMPORT,
        "is not a choice file",
        2,
        SALT,
    ),
    Bad(
        "a choice of another tree",
        both(series(), text("out-choice.csv", "take,stack,side\n1,beef,R\n")),
        IMPORT,
        "names stack beef, which is not in the tree; remove its row",
        2,
        SALT,
    ),
    Bad(
        "a choice that takes burned-in annotation",
        choice_of(BurnedInAnnotation="YES"),
        IMPORT,
        "set BurnedInAnnotation to NO first; set its take to 0",
        2,
    ),
    Bad(
        "a choice that takes an ultrasound",
        choice_of(modality="US"),
        IMPORT,
        "modality US; set its take to 0",
        2,
    ),
    Bad(
        "a damaged manifest of the cohort",
        both(series(), text("out/cohort.csv", "knee_id\nK1\n")),
        IMPORT,
        "has one column, knee_id; separate columns by comma, semicolon or tab",
        2,
        SALT,
    ),
    Bad(
        "a second CT of a knee that has one",
        both(
            imported(SliceThickness=3.0),
            series("in/b", small(12), series="1.2.4", SliceThickness=0.6),
        ),
        IMPORT,
        "has another CT already; set take of one of them to 0",
        1,
        ("out/records/*.json", "out/images/*.nii.gz"),
    ),
    # -------- DICOM series, by import and by check-data
    Bad(
        "rescale absent in half of the slices",
        with_changes(RescaleSlope=None, RescaleIntercept=None),
        IMPORT,
        "lacks RescaleSlope in 5 of 10 slices; export the original series again",
        1,
        RECORD,
    ),
    Bad(
        "rescale absent in half of the slices of a listed folder",
        in_manifest(with_changes(RescaleSlope=None, RescaleIntercept=None)),
        CHECK,
        "lacks RescaleSlope in 5 of 10 slices",
        1,
    ),
    Bad(
        "another rescale intercept in half of the slices",
        in_manifest(with_changes(RescaleIntercept=0)),
        CHECK,
        "RescaleIntercept differs by 1024 (limit 0)",
        1,
    ),
    Bad(
        "a rescale slope of 0",
        in_manifest(series(RescaleSlope=0)),
        CHECK,
        "has a RescaleSlope that is no usable number",
        1,
    ),
    Bad(
        "another pixel spacing in half of the slices",
        damaged(lambda files: [edit(file, PixelSpacing=[0.7, 0.7]) for file in files[6:]]),
        IMPORT,
        "holds slices whose PixelSpacing differs by 0.2 (limit 0.0001)",
        1,
        RECORD,
    ),
    Bad(
        "no pixel spacing",
        damaged(lambda files: [edit(file, PixelSpacing=None) for file in files]),
        IMPORT,
        "lacks PixelSpacing in 10 of 10 slices",
        1,
        RECORD,
    ),
    Bad(
        "another matrix in half of the slices",
        in_manifest(with_changes(Rows=9, Columns=10)),
        CHECK,
        "holds slices whose Rows differs by 1 (limit 0)",
        1,
    ),
    Bad(
        "a matrix that its pixels do not fill",
        in_manifest(damaged(lambda files: [edit(file, Rows=9) for file in files])),
        CHECK,
        "holds 180 bytes of pixels where 162 are needed",
        1,
    ),
    Bad(
        "another orientation in half of the slices",
        in_manifest(with_changes(ImageOrientationPatient=[0, 1, 0, 0, 0, -1])),
        CHECK,
        "holds slices whose ImageOrientationPatient differs by 1 (limit 0.001)",
        1,
    ),
    Bad(
        "image axes that are not at right angles",
        in_manifest(
            damaged(
                lambda files: [
                    edit(file, ImageOrientationPatient=[1, 0, 0, 0.6, 0.8, 0]) for file in files
                ]
            )
        ),
        CHECK,
        "has image axes that are not at right angles",
        1,
    ),
    Bad(
        "a slice that is shifted in its plane",
        in_manifest(damaged(lambda files: edit(files[4], ImagePositionPatient=[-18, 5, 45]))),
        CHECK,
        "has slice 5 shifted in its plane by 2.00 mm (limit 0.05 mm)",
        1,
    ),
    Bad(
        "all slices at one position",
        in_manifest(
            damaged(lambda files: [edit(file, ImagePositionPatient=[0, 0, 0]) for file in files])
        ),
        CHECK,
        "holds several slices at one position; keep one per position",
        1,
    ),
    Bad(
        "another slice thickness in half of the slices",
        damaged(lambda files: [edit(file, SliceThickness=3) for file in files[6:]]),
        IMPORT,
        "holds slices whose SliceThickness differs by 2 (limit 0.01)",
        1,
        RECORD,
    ),
    Bad(
        "two patients in one series",
        with_changes(PatientID="4712"),
        IMPORT,
        "mixes 2 patients; keep one series per folder",
        1,
        RECORD,
    ),
    Bad(
        "two series in a listed folder",
        in_manifest(with_changes(SeriesInstanceUID="1.2.4")),
        CHECK,
        "mixes 2 DICOM series; keep one series per folder",
        1,
    ),
    Bad(
        "two frames of reference in one series",
        damaged(
            lambda files: [
                edit(file, FrameOfReferenceUID=f"1.5.{number // 5}")
                for number, file in enumerate(files)
            ]
        ),
        IMPORT,
        "mixes 2 frames of reference",
        1,
        RECORD,
    ),
    Bad(
        "an inverted grey scale",
        with_changes(PhotometricInterpretation="MONOCHROME1"),
        IMPORT,
        "holds PhotometricInterpretation MONOCHROME1, MONOCHROME2 where MONOCHROME2 is wanted",
        1,
        RECORD,
    ),
    Bad(
        "a CT folder listed as MR",
        in_manifest(series(), "mr"),
        CHECK,
        "holds Modality CT where MR is wanted; give one series of MR slices",
        1,
    ),
    Bad(
        "two echoes of which none is chosen",
        in_manifest(two_echoes(), "mr"),
        CHECK,
        "mixes 2 echoes: echo 1 (TE 6 ms), echo 2 (TE 12 ms); choose one",
        1,
    ),
    Bad(
        "a slice of a listed folder that ends in its header",
        in_manifest(damaged(lambda files: truncated(files[9], 0.3))),
        CHECK,
        "Modality CT, not stated where CT is wanted",
        1,
    ),
    Bad(
        "one slice listed for its folder",
        both(
            series(),
            lambda: Path("in/a/IM0003_1.2.3").rename("slice.dcm"),
            manifest(row("slice.dcm")),
        ),
        CHECK,
        "has only 1 slices, fewer than 8; give the whole series",
        1,
    ),
    Bad(
        "frames without positions",
        in_manifest(frames_without_positions),
        CHECK,
        "lacks ImagePositionPatient",
        1,
    ),
    Bad("positions rounded to 0.01 mm", damaged(rounded), IMPORT, "1 series imported", 0, COHORT),
    Bad(
        "slices without the preamble of DICOM files",
        damaged(without_preamble),
        IMPORT,
        "1 series imported",
        0,
        COHORT,
    ),
    Bad(
        "one SOPInstanceUID in all slices",
        damaged(lambda files: [edit(file, SOPInstanceUID="1.2.3") for file in files]),
        IMPORT,
        "1 series imported",
        0,
        COHORT,
    ),
    Bad(
        "other files beside the slices",
        in_manifest(beside_the_slices),
        CHECK,
        "1 knees, 0 fatal findings",
        0,
    ),
    # -------- ctsma check-data
    Bad("no manifest", lambda: None, CHECK, "does not exist; give the path of a CSV table", 2),
    Bad(
        "a manifest that is no table",
        lambda: Path("cohort.csv").write_bytes(b"\xff\xfe\0"),
        CHECK,
        "is not UTF-8 text; save it as CSV UTF-8",
        2,
    ),
    Bad(
        "an empty manifest",
        text("cohort.csv", ""),
        CHECK,
        "is empty; give a table with a header line",
        2,
    ),
    Bad("a manifest of no knees", manifest(), CHECK, "lists no knee; add one row per knee", 2),
    Bad(
        "a column too few",
        manifest(header_line=COLUMNS.replace(",bmi", "")),
        CHECK,
        "column bmi is missing",
        2,
    ),
    Bad(
        "a misspelt column", manifest(header_line=COLUMNS + ",kl"), CHECK, "column kl is unknown", 2
    ),
    Bad(
        "one name for two knees",
        manifest(row(), row(person="S2")),
        CHECK,
        "knee_id = K1 occurs twice",
        2,
    ),
    Bad(
        "one knee twice",
        manifest(row(), row(knee="K2")),
        CHECK,
        "row 3 repeats a subject's side",
        2,
    ),
    Bad(
        "a side in words",
        manifest(row(side="right")),
        CHECK,
        "row 2: side = right is not L or R",
        2,
    ),
    Bad(
        "a name with a path in it",
        manifest(row(knee="../K1")),
        CHECK,
        "knee_id = ../K1 holds more than letters, digits, hyphens, underscores and dots",
        2,
    ),
    Bad(
        "a knee without images",
        manifest(row(ct="")),
        CHECK,
        "row 2 names neither a CT nor an MR",
        2,
    ),
    Bad(
        "a path out by ..", manifest(row("../x.nii.gz")), CHECK, "leads out of the cohort's root", 2
    ),
    Bad(
        "an absolute path", manifest(row("/etc/passwd")), CHECK, "leads out of the cohort's root", 2
    ),
    Bad(
        "a path out by a link",
        both(manifest(row("l/x")), link("l", "/")),
        CHECK,
        "leads out of the cohort's root",
        2,
    ),
    Bad(
        "a link out inside a DICOM folder",
        linked_slice,
        ["check-data", "root/cohort.csv", "--quick"],
        "leads out of the cohort's root",
        2,
    ),
    Bad(
        "an image that does not exist",
        manifest(row()),
        CHECK,
        "does not exist; correct the path, or restore the file",
        1,
    ),
    Bad(
        "half a NIfTI file",
        both(manifest(row()), GOOD, lambda: truncated(Path("ct.nii.gz"), 0.5)),
        CHECK,
        "cannot be read as an image (truncated, or of another format)",
        1,
    ),
    Bad(
        "text named as NIfTI",
        both(manifest(row()), text("ct.nii.gz")),
        CHECK,
        "cannot be read as an image",
        1,
    ),
    Bad(
        "a checksum that differs",
        both(manifest(row(sums=f"{'f' * 64},")), GOOD),
        CHECK,
        "differs from ct_sha256",
        1,
    ),
    Bad(
        "NaN",
        both(manifest(row()), nifti(changed(knee_ct(), np.nan))),
        CHECK,
        "holds 1 NaN or infinite voxels",
        1,
    ),
    Bad(
        "raw values, not HU",
        both(manifest(row()), nifti(knee_ct() + 1024)),
        CHECK,
        "not a CT of bone in HU",
        1,
    ),
    Bad(
        "an MR as CT",
        both(manifest(row()), nifti(abs(knee_ct()))),
        CHECK,
        "list an MR in column mr",
        1,
    ),
    Bad(
        "a CT as MR",
        both(manifest(row("", "ct.nii.gz")), nifti(knee_ct() * 2)),
        CHECK,
        "has values down to -240, as a CT has",
        1,
    ),
    Bad(
        "four dimensions",
        both(manifest(row()), nifti(np.zeros((2, 9, 9, 9)))),
        CHECK,
        "has 4 dimensions and 1 value(s) per voxel; give one volume",
        1,
    ),
    Bad(
        "five slices of CT",
        both(manifest(row()), nifti(knee_ct((5, 30, 30)))),
        CHECK,
        "has only 5 slices, fewer than 8; give the whole series",
        1,
    ),
    Bad(
        "a voxel of a micrometre",
        both(manifest(row()), nifti(knee_ct(), spacing=(0.001, 0.5, 0.5))),
        CHECK,
        "correct the spacing in its header",
        1,
    ),
    Bad(
        "slices of 3 mm",
        both(manifest(row()), nifti(knee_ct(), spacing=(0.5, 0.5, 3.0))),
        CHECK,
        "slices every 3 mm (at most 1.5 mm) hold little texture; export the thin ones",
        0,
    ),
    Bad(
        "metal",
        both(manifest(row()), nifti(changed(knee_ct(), 3071, 99))),
        CHECK,
        "as metal does; leave the knee out if it has an implant",
        0,
    ),
    Bad(
        "padding outside the scanner's circle",
        both(manifest(row()), nifti(changed(knee_ct(), -2000))),
        CHECK,
        "values down to -2000 HU (air has at least -1100 HU) are padding",
        0,
    ),
    Bad(
        "no bone",
        both(manifest(row()), nifti(changed(np.where(knee_ct() < 0, -100, 40), 300))),
        DEEP,
        "holds no bone above 200 HU",
        1,
    ),
    Bad(
        "bone without a joint",
        both(manifest(row()), GOOD),
        DEEP,
        "does not show a femur above a tibia",
        1,
    ),
    Bad(
        "two knees in one volume",
        both(manifest(row()), lambda: nifti(two_blocks(), spacing=(2.0, 2.0, 1.25))()),
        DEEP,
        "two knees are in view; give one volume per knee",
        1,
    ),
    # -------- ctsma run, status, report, simulate
    Bad(
        "an unknown profile",
        lambda: None,
        ["run", "--profile", "fast"],
        "profile fast: is unknown; choose one of",
        2,
    ),
    Bad(
        "an unknown parameter", lambda: None, ["run", "--set", "epoch=1"], "did you mean epochs", 2
    ),
    Bad(
        "a parameter of another type",
        lambda: None,
        ["run", "--set", "epochs=many"],
        "not of type int",
        2,
    ),
    Bad(
        "an unknown stage",
        lambda: None,
        ["run", "--from", "09"],
        "stage 09: is unknown; choose one of",
        2,
    ),
    Bad(
        "a run's name with a path in it",
        lambda: None,
        ["run", "--name", "../x"],
        "give a name without / and ..",
        2,
    ),
    Bad(
        "a run of no manifest",
        lambda: None,
        ["run", "--manifest", "none.csv"],
        "none.csv: does not exist",
        2,
    ),
    Bad(
        "a run whose manifest leads out",
        manifest(row("../x.nii.gz")),
        ["run", "--manifest", "cohort.csv"],
        "leads out of the cohort's root",
        2,
    ),
    Bad(
        "a run of no knees",
        manifest(),
        ["run", "--manifest", "cohort.csv"],
        "lists no knee; add one row per knee",
        2,
    ),
    Bad(
        "a run on a DICOM folder with a link out",
        linked_slice,
        ["run", "--manifest", "root/cohort.csv"],
        "leads out of the cohort's root",
        2,
    ),
    Bad(
        "no label map",
        lambda: None,
        ["run", "--anatomy", "none.nrrd"],
        "does not exist; give the path of a label",
        2,
    ),
    Bad(
        "a folder of another profile",
        earlier_run,
        ["run"],
        "choose another --name, or remove the folder",
        2,
    ),
    Bad(
        "a damaged record of a run",
        text("runs/quick/run.json", "{"),
        ["run"],
        "finished knees and models are still reused",
        2,
    ),
    Bad(
        "the status of no run",
        lambda: None,
        ["status", "--name", "none"],
        "give the name of a run below runs/",
        2,
    ),
    Bad(
        "the report of no run",
        lambda: None,
        ["report", "--name", "none"],
        "run the study first: ctsma run",
        2,
    ),
    # -------- field of view and own bone labels
    Bad(
        "a field of view that ends in the middle of the knee",
        both(knee_blocks(np.s_[:, :, :45]), manifest(row())),
        DEEP,
        "show no notch between two condyles, and 33 mm of a tibia that a side of the image cuts",
        1,
    ),
    Bad(
        "a field of view that ends within one condyle",
        both(knee_blocks(np.s_[:, :, :75]), manifest(row())),
        DEEP,
        "ends in bone at the patient's left over",
        0,
    ),
    Bad(
        "a field of view that cuts the front of the joint",
        both(knee_blocks(np.s_[:, 25:, :]), manifest(row())),
        DEEP,
        "bearing surface ends 0.0 mm from the front of the image (at least 4)",
        0,
    ),
    Bad(
        "bones joined by a cast",
        both(knee_blocks(hu=lambda ct, z: np.where(abs(z - 35) < 25, 300.0, ct)), manifest(row())),
        DEEP,
        "or give own bone labels (column ct_labels, or predict --labels)",
        1,
    ),
    Bad(
        "own labels with other values",
        both(knee_blocks(labels=lambda own: own * 75), with_labels()),
        DEEP,
        "hold 3 values from 0 to 150; write 0 background, 1 femur, 2 tibia, no other",
        1,
    ),
    Bad(
        "own labels without a tibia",
        both(knee_blocks(labels=lambda own: own % 2), with_labels()),
        DEEP,
        "hold no tibia (value 2) in the field of view of the CT",
        1,
    ),
    Bad(
        "own labels with femur and tibia exchanged",
        both(knee_blocks(labels=lambda own: (3 - own) % 3), with_labels()),
        DEEP,
        "show 0 mm2 of femur (value 1) above tibia (value 2), too few",
        1,
    ),
    Bad(
        "own labels of another CT",
        both(knee_blocks(labels=lambda own: np.roll(own, 8, axis=1)), with_labels()),
        DEEP,
        "lie off the femur",
        1,
    ),
    Bad(
        "own labels in pieces",
        both(knee_blocks(labels=lambda own: own * (abs(np.arange(90) - 45) > 3)), with_labels()),
        DEEP,
        "of 2 pieces, the largest 50% of it (at least 90%); label one knee",
        1,
    ),
    Bad(
        "own labels that do not exist",
        both(knee_blocks(), with_labels("none.nii.gz")),
        DEEP,
        "none.nii.gz: does not exist",
        1,
    ),
    Bad(
        "a path of own labels out by ..",
        both(knee_blocks(), with_labels("../labels.nii.gz")),
        DEEP,
        "leads out of the cohort's root",
        2,
    ),
    Bad(
        "own labels for two CTs",
        knee_blocks(),
        ["predict", "a.nii.gz:L", "b.nii.gz:L", "--labels", "labels.nii.gz", "--out", "out"],
        "--labels: belongs to one CT given by its path; list several in column ct_labels",
        2,
    ),
    # -------- options and names
    Bad(
        "no process at all",
        lambda: None,
        ["simulate", "--out", "out", "--jobs", "0"],
        "--jobs 0: is not between 1 and 1024; give a number in this range",
        2,
    ),
    Bad(
        "a negative seed",
        lambda: None,
        ["run", "--seed", "-1"],
        "--seed -1: is not between 0 and 4294967295; give a number in this range",
        2,
    ),
    Bad(
        "a cohort of no knees",
        lambda: None,
        ["simulate", "--out", "out", "--knees", "0"],
        "--knees 0: is not between 1 and 9999; give a number in this range",
        2,
    ),
    Bad(
        "a parameter out of its range",
        lambda: None,
        ["run", "--set", "epochs=0"],
        "parameter epochs: is 0, not between 1 and 4294967295; give a number in this range",
        2,
    ),
    Bad(
        "a parameter that the command sets",
        lambda: None,
        ["run", "--set", "run_dir=x"],
        "is set by ctsma run itself; give --name and --profile instead",
        2,
    ),
    Bad(
        "a run's name with two dots",
        lambda: None,
        ["run", "--name", ".."],
        "give a name without / and ..",
        2,
    ),
    Bad(
        "a manifest's path of Windows that leads out",
        manifest(row("..\\x.nii.gz")),
        ["run", "--manifest", "cohort.csv"],
        "leads out of the cohort's root",
        2,
    ),
    Bad(
        "a file name that is not UTF-8",
        lambda: None,
        ["predict", "kn\udce9e.nii.gz:R", "--out", "out"],
        "is not UTF-8; rename the file or folder",
        2,
    ),
]


def two_blocks():
    array = np.full((20, 60, 150), 60.0)
    array[:, 15:45, 10:50], array[:, 15:45, 100:140], array[:, :5] = 900.0, 900.0, -100.0
    return array


@pytest.mark.parametrize("bad", BAD, ids=[bad.given.replace(" ", "-") for bad in BAD])
def test_bad_input(bad, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    bad.make()
    capsys.readouterr()
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    code = cli.main(bad.command)
    printed = capsys.readouterr()
    assert bad.message in printed.out + printed.err
    assert code == bad.code
    assert "Traceback" not in printed.err
    for path, content in before.items():
        assert path.name == "import_log.json" or path.read_bytes() == content
    new = {path for path in tmp_path.rglob("*") if path.is_file()} - set(before)
    assert new <= {path for pattern in bad.left for path in tmp_path.glob(pattern)}
    for pattern in bad.left:
        assert new & set(tmp_path.glob(pattern)), pattern


def test_the_table_of_the_documents_is_this_one():
    assert len({bad.given for bad in BAD}) == len(BAD)
    assert (REPOSITORY / "docs" / "bad_inputs.md").read_text() == table()


# ---------------------------------------------------------------- broken machines
def ctsma(*arguments, cwd, **options):
    """The command in a process of its own."""
    command = [sys.executable, "-m", "ctsma.cli", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, **options)


def noisy_export(folder):
    noise = np.random.default_rng(0).integers(-500, 1500, (12, 60, 60)).astype(np.int16)
    write_series(folder, sitk.GetImageFromArray(noise))


@pytest.mark.parametrize("bytes_left", [60_000, 500])
def test_a_full_disk_is_reported_and_the_same_command_continues(tmp_path, bytes_left):
    """No file may grow beyond a limit: the image (60 kB and more) or already the first record."""
    noisy_export(tmp_path / "in")
    limit = (bytes_left, bytes_left)
    full = ctsma(
        *IMPORT, cwd=tmp_path, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    )
    assert full.returncode == 2, full.stderr
    assert re.search(r": cannot be written, as the disk of \S+ is full; free space, ", full.stderr)
    assert "Traceback" not in full.stderr
    assert not (tmp_path / "out" / "cohort.csv").exists()
    assert cli.main(["import", str(tmp_path / "in"), "--out", str(tmp_path / "out")]) == 0
    manifest = cohort.read_manifest(tmp_path / "out" / "cohort.csv")
    assert not check_knees(manifest, deep=False)["level"].eq("fatal").any()


def test_an_error_of_the_disk_is_one_sentence(monkeypatch, capsys):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device", "runs/quick/run.json")

    monkeypatch.setattr(runner, "run", full)
    assert cli.main(["run"]) == 1
    printed = capsys.readouterr().err
    assert printed.startswith("runs/quick/run.json: No space left on device; ")
    assert printed.count("\n") == 1


WORKER = (
    "from joblib.externals.loky.process_executor import TerminatedWorkerError as Gone\n"
    "raise Gone('long text')"
)


@pytest.mark.parametrize("cell", ["import os\nos._exit(9)", WORKER], ids=["kernel", "worker"])
def test_a_process_that_dies_is_one_sentence(tmp_path, monkeypatch, capsys, cell):
    parameters = (
        "run_dir: str = ''  # folder\nprofile: str = ''  # name\noverwrite: bool = False  # again"
    )
    code = [nbformat.v4.new_code_cell(source) for source in (parameters, cell)]
    code[0].metadata["tags"] = ["parameters"]
    kernel = {"kernelspec": {"name": "python3", "display_name": "", "language": "python"}}
    notebook = nbformat.v4.new_notebook(cells=code, metadata=kernel)
    nbformat.write(notebook, tmp_path / "01_first.ipynb")
    profile = {"minutes": {"01_first": 1}, "disk_gb": 1, "parameters": {}}
    monkeypatch.setattr(runner, "NOTEBOOKS", tmp_path)
    monkeypatch.setattr(runner, "STAGES", ("01_first",))
    monkeypatch.setattr(runner, "profiles", lambda: {"quick": profile})
    monkeypatch.chdir(tmp_path)
    assert cli.main(["run"]) == 1
    assert capsys.readouterr().err.strip().endswith(f"01_first: {runner.DIED}")


def test_import_and_check_need_no_network(tmp_path, monkeypatch):
    def refused(*_, **__):
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", refused)
    write_series(tmp_path / "in", small())
    done = import_dicom(tmp_path / "in", tmp_path / "out", salt_file=tmp_path / "salt")
    findings = check_knees(cohort.read_manifest(done.manifest), deep=False)
    assert not findings["level"].eq("fatal").any()


HEADER = """# Inputs that are refused, or read in spite of a fault

Each row is a test of tests/test_bad_inputs.py, which writes this page. Exit code 0: the command
continued; 1: a series or an image was refused; 2: the input cannot be used at all. No existing file
is changed but the log of a cohort that an import extends.

| given | command | message (part of it) | exit code | new files |
| --- | --- | --- | --- | --- |
"""


def table():
    """The bad inputs as a Markdown page."""
    rows = []
    for bad in BAD:
        command = " ".join(["ctsma", *bad.command]).encode("utf-8", "backslashreplace").decode()
        left = ", ".join(f"`{name}`" for name in bad.left) or "none"
        rows.append(f"| {bad.given} | `{command}` | {bad.message} | {bad.code} | {left} |\n")
    return HEADER + "".join(rows)


if __name__ == "__main__":
    sys.stdout.write(table())
