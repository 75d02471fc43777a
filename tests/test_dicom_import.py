"""DICOM exports become cohorts without identities: choice of series, decoding, names, manifest."""

import json
from pathlib import Path

import nibabel
import numpy as np
import pandas as pd
import pydicom
import pytest
import SimpleITK as sitk
from dicom_export import edit, small, write_multiframe, write_series
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom.data import get_testdata_file

import dicom_import
from ctsma import cohort
from ctsma.cohort.dicom import is_dicom, read_headers
from ctsma.common import InputError
from ctsma.files import sha256_file
from dicom_import.checks import check_knees
from dicom_import.choice import COLUMNS, sharpness
from dicom_import.headers import TECHNICAL, WHITELIST


def bring(folder, out, **options):
    return dicom_import.import_dicom(folder, out, salt_file=out.with_suffix(".salt"), **options)


def test_a_series_keeps_its_voxels_and_its_place(tmp_path):
    image = small()
    write_series(tmp_path / "export" / "a", image)
    done = bring(tmp_path / "export", tmp_path / "cohort", site="north")
    assert list(done.table["status"]) == ["imported"]
    manifest = cohort.read_manifest(done.manifest)
    back = cohort.read_knee_volume(manifest.iloc[0], "ct", manifest.attrs["root"])
    np.testing.assert_array_equal(sitk.GetArrayFromImage(back), sitk.GetArrayFromImage(image))
    np.testing.assert_allclose(back.GetOrigin(), image.GetOrigin(), atol=1e-4)
    np.testing.assert_allclose(back.GetSpacing(), image.GetSpacing(), rtol=1e-6)
    row = manifest.iloc[0]
    assert (row["side"], row["sex"], row["age"], row["site"]) == ("R", "F", 69, "north")
    assert row["bmi"] == pytest.approx(72 / 1.7**2, abs=0.05)
    assert row["ct_sha256"] == sha256_file(tmp_path / "cohort" / row["ct"])
    assert not check_knees(manifest, deep=False)["level"].eq("fatal").any()


def test_nothing_that_is_written_identifies_a_person(tmp_path):
    for number, person in enumerate(("4711", "4712")):
        tags = {"PatientID": person, "SeriesDescription": "KNEE Doe", "AccessionNumber": "ACC99"}
        files = write_series(tmp_path / f"Doe{number}", small(), series=f"1.2.77.{number}", **tags)
        edit(files[0], OtherPatientNames="Smith")
    done = bring(tmp_path, tmp_path / "out" / "cohort")
    secrets = [
        "Doe",
        "Jane",
        "4711",
        "4712",
        "19500601",
        "20200315",
        "Elsewhere",
        "ACC99",
        "1.2.77",
        "Smith",
    ]
    for file in (f for f in (tmp_path / "out" / "cohort").rglob("*") if f.is_file()):
        text = str(nibabel.load(file).header) if file.suffix == ".gz" else file.read_text()
        assert not [word for word in secrets if word in text or word in file.name], file
    log = json.loads((tmp_path / "out" / "cohort" / "import_log.json").read_text())
    assert {"PatientName", "AccessionNumber", "InstitutionName", "StudyDate"} <= set(
        log["removed_elements"]
    )
    assert done.table["subject"].nunique() == 2
    nifti = nibabel.load(next((tmp_path / "out" / "cohort" / "images").iterdir())).header
    assert (nifti["descrip"].item(), nifti["aux_file"].item(), len(nifti.extensions)) == (
        b"",
        b"",
        0,
    )


def test_the_same_salt_gives_the_same_names_and_dates_of_a_person_move_together(tmp_path):
    salts = [
        dicom_import.read_salt(tmp_path / name, tmp_path / "cohort") for name in ("a", "a", "b")
    ]
    assert dicom_import.pseudonym(salts[0], "4711") == dicom_import.pseudonym(salts[1], "4711")
    assert dicom_import.pseudonym(salts[0], "4711") != dicom_import.pseudonym(salts[2], "4711")
    assert dicom_import.pseudonym(salts[0], "4711") != dicom_import.pseudonym(salts[0], "4712")
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o600
    days = [
        pd.Timestamp(dicom_import.shifted_date(salts[0], "4711", day))
        for day in ("20200315", "20200401")
    ]
    assert (days[1] - days[0]).days == 17
    assert days[0] < pd.Timestamp("2020-03-15")
    assert dicom_import.new_uid(salts[0], "1.2.3").startswith("2.25.")
    assert len(dicom_import.new_uid(salts[0], "1.2.3")) <= 64


@pytest.mark.parametrize(
    ("header", "age"),
    [
        ({"PatientAge": "063Y"}, 63),
        ({"PatientAge": "097Y"}, 90),
        ({"PatientBirthDate": "19500601", "StudyDate": "20200315"}, 69),
        ({"PatientBirthDate": "00010101", "StudyDate": "00010101"}, None),
        ({}, None),
    ],
)
def test_age_is_in_years_and_capped(header, age):
    assert dicom_import.age_years(header) == age


def test_the_thin_bone_kernel_series_is_preferred_and_the_choice_can_be_overridden(tmp_path):
    kinds = [
        ("1.1", 3.0, "BONE"),
        ("1.2", 0.6, "STANDARD"),
        ("1.3", 0.8, "BONE"),
        ("1.4", 0.8, "SOFT"),
    ]
    for number, (series, thickness, kernel) in enumerate(kinds):
        tags = {"SliceThickness": thickness, "ConvolutionKernel": kernel, "SeriesNumber": number}
        write_series(tmp_path / "export" / series, small(), series=series, **tags)
    given = {"salt_file": tmp_path / "salt", "choice_file": tmp_path / "choice.csv"}
    table = dicom_import.choose(tmp_path / "export", tmp_path / "cohort", **given).table
    assert list(table.loc[table["selected"], "series_number"]) == [2]
    assert not (tmp_path / "cohort").exists()
    edited = pd.read_csv(tmp_path / "choice.csv", dtype=str)
    edited.loc[edited["take"] == "1", "take"] = "0"
    edited.loc[edited["series_number"] == "1.0", ["take", "side"]] = ["1", "L"]
    edited.to_csv(tmp_path / "choice.csv", index=False)
    done = dicom_import.import_dicom(tmp_path / "export", tmp_path / "cohort", **given)
    assert list(done.table.loc[done.table["status"] == "imported", "series_number"]) == [1]
    assert list(cohort.read_manifest(done.manifest)["side"]) == ["L"]


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("BONEPLUS", "bone"),
        ("Br64f\\3", "bone"),
        ("B70s", "bone"),
        ("FC35", "bone"),
        ("B30f", "soft"),
        ("FC18", "soft"),
    ]
    + [("SOFT", "soft"), ("STANDARD", ""), ("", ""), ("Hr40", ""), ("YE", "bone")],
)
def test_kernels_of_four_vendors(kernel, kind):
    assert sharpness(kernel) == kind


@pytest.mark.parametrize(
    ("tags", "side"),
    [
        ({"Laterality": "L"}, "L"),
        ({"ImageLaterality": "R"}, "R"),
        ({"SeriesDescription": "CT Knie links 0.6"}, "L"),
        ({"ProtocolName": "KNEE_RT_THIN"}, "R"),
        ({"SeriesDescription": "genou droit"}, "R"),
        ({"BodyPartExamined": "LKNEE"}, "L"),
        ({"SeriesDescription": "both knees, right and left"}, ""),
        ({"SeriesDescription": "PRELIMINARY AXIAL KNEE, L3"}, ""),
    ],
)
def test_the_side_is_read_where_the_header_names_it(tmp_path, tags, side):
    write_series(tmp_path / "a", small(), **({"Laterality": None} | tags))
    images, _ = dicom_import.scan(tmp_path / "a")
    assert list(dicom_import.list_stacks(images, b"0" * 16)["side"]) == [side]


def test_a_second_import_reads_nothing_again_and_keeps_what_a_person_filled_in(tmp_path):
    write_series(tmp_path / "export" / "a", small())
    first = bring(tmp_path / "export", tmp_path / "cohort")
    table = pd.read_csv(first.manifest, dtype=str)
    table["oa"] = "1"
    table.to_csv(first.manifest, index=False)
    image = next((tmp_path / "cohort" / "images").iterdir())
    before = image.stat().st_mtime_ns
    write_series(
        tmp_path / "export" / "b", small(), series="1.2.4", PatientID="4712", Laterality="L"
    )
    again = cohort.read_manifest(bring(tmp_path / "export", tmp_path / "cohort").manifest)
    assert image.stat().st_mtime_ns == before
    assert sorted(again["oa"].fillna(-1)) == [-1, 1]
    image.write_bytes(b"damaged")
    bring(tmp_path / "export", tmp_path / "cohort")
    assert sha256_file(image) == again.set_index("side").loc["R", "ct_sha256"]


def recoded(files, syntax):
    for file in files:
        data = pydicom.dcmread(file)
        if syntax == "RLE":
            data.compress(pydicom.uid.RLELossless)
        else:
            data.file_meta.TransferSyntaxUID = pydicom.uid.DeflatedExplicitVRLittleEndian
        data.save_as(file, enforce_file_format=True)


@pytest.mark.parametrize("syntax", ["RLE", "deflated"])
def test_other_transfer_syntaxes_give_the_same_voxels(tmp_path, syntax):
    image = small()
    recoded(write_series(tmp_path / "export", image), syntax)
    done = bring(tmp_path / "export", tmp_path / "cohort")
    assert list(done.table["status"]) == ["imported"], list(done.table["note"])
    back = sitk.ReadImage(str(next((tmp_path / "cohort" / "images").iterdir())))
    np.testing.assert_array_equal(sitk.GetArrayFromImage(back), sitk.GetArrayFromImage(image))


CODINGS = ["jpeg_ls_lossless", "jp2klossless", "RLE", "bigendian", "implicit"]


@pytest.mark.parametrize("name", [f"MR_small_{coding}.dcm" for coding in CODINGS])
def test_compressed_slices_are_decoded_as_their_plain_twin(tmp_path, name):
    """pydicom's own test image in five transfer syntaxes, stacked ten times."""
    for number in range(10):
        data = pydicom.dcmread(get_testdata_file(name))
        data.SOPInstanceUID = data.file_meta.MediaStorageSOPInstanceUID = f"1.2.3.{number}"
        data.ImagePositionPatient = [0.0, 0.0, 1.5 * number]
        data.Laterality, data.BodyPartExamined = "R", "KNEE"
        data.save_as(tmp_path / f"{number}", enforce_file_format=True)
    plain = pydicom.dcmread(get_testdata_file("MR_small.dcm")).pixel_array
    done = bring(tmp_path, tmp_path / "out" / "cohort")
    assert list(done.table["status"]) == ["imported"], list(done.table["note"])
    back = sitk.GetArrayFromImage(
        sitk.ReadImage(str(next((tmp_path / "out" / "cohort" / "images").iterdir())))
    )
    np.testing.assert_array_equal(back[4], plain)


def test_a_multiframe_ct_is_one_volume_in_hu(tmp_path):
    image = small()
    write_multiframe(tmp_path / "export" / "all", image)
    done = bring(tmp_path / "export", tmp_path / "cohort")
    assert list(done.table["status"]) == ["imported"], list(done.table["note"])
    back = sitk.ReadImage(str(next((tmp_path / "cohort" / "images").iterdir())))
    np.testing.assert_allclose(
        sitk.GetArrayFromImage(back), sitk.GetArrayFromImage(image), atol=1
    )  # slope 2
    np.testing.assert_allclose(back.GetSpacing(), image.GetSpacing(), rtol=1e-6)
    np.testing.assert_allclose(back.GetOrigin(), image.GetOrigin(), atol=1e-4)


def test_a_multiframe_ct_is_read_alike_from_file_folder_and_import(tmp_path):
    file = write_multiframe(tmp_path / "in" / "all", small())
    (tmp_path / "in" / ".DS_Store").write_bytes(b"\0\0\0\1Bud1" + bytes(600))
    bring(tmp_path / "in", tmp_path / "cohort")
    imported = next((tmp_path / "cohort" / "images").iterdir())
    volumes = [cohort.read_volume(path, "CT") for path in (file, file.parent, imported)]
    for volume in volumes[1:]:
        np.testing.assert_array_equal(
            sitk.GetArrayFromImage(volume), sitk.GetArrayFromImage(volumes[0])
        )
        np.testing.assert_allclose(volume.GetSpacing(), volumes[0].GetSpacing(), rtol=1e-6)
        np.testing.assert_allclose(volume.GetOrigin(), volumes[0].GetOrigin(), atol=1e-4)
        np.testing.assert_allclose(volume.GetDirection(), volumes[0].GetDirection(), atol=1e-6)


@pytest.mark.parametrize("reverse", [False, True])
def test_frames_and_slices_of_one_oblique_volume_are_the_same_image(tmp_path, reverse):
    image = small() // 2 * 2
    turn = sitk.Euler3DTransform()
    turn.SetRotation(0.3, -0.2, 0.1)
    image.SetDirection(turn.GetMatrix())
    write_series(tmp_path / "slices", image)
    write_multiframe(tmp_path / "frames" / "all", image[:, :, ::-1] if reverse else image)
    slices, frames = (cohort.read_volume(tmp_path / x, "CT") for x in ("slices", "frames"))
    np.testing.assert_array_equal(sitk.GetArrayFromImage(slices), sitk.GetArrayFromImage(frames))
    for point in ((0, 0, 0), (8, 9, 9)):
        np.testing.assert_allclose(
            slices.TransformIndexToPhysicalPoint(point),
            frames.TransformIndexToPhysicalPoint(point),
            atol=1e-4,
        )


def test_each_mr_slice_is_rescaled_by_its_own_slope(tmp_path):
    image = small() + 200
    files = write_series(tmp_path / "a", image, modality="MR", RescaleIntercept=0)
    slopes = 1 + 0.25 * np.arange(len(files))
    for file, slope in zip(files, slopes, strict=True):
        edit(file, RescaleSlope=slope)
    back = sitk.GetArrayFromImage(cohort.read_volume(tmp_path / "a", "MR"))
    expected = sitk.GetArrayFromImage(image) * slopes[:, None, None]
    np.testing.assert_allclose(back, expected, rtol=1e-6)


def test_echoes_without_numbers_are_counted_by_echo_time(tmp_path):
    for name, time, level in (("a", 12.0, 500), ("b", 6.0, 200)):
        write_series(tmp_path / name, small() + level, modality="MR", series=f"1.2.{level}")
        for file in (tmp_path / name).iterdir():
            edit(file, EchoTime=time, EchoNumbers=1, SeriesInstanceUID="1.2.3")
            file.rename(tmp_path / f"{name}{file.name}")
        (tmp_path / name).rmdir()
    with pytest.raises(InputError, match=r"echo 1 \(TE 6 ms\), echo 2 \(TE 12 ms\)"):
        cohort.read_volume(tmp_path, "MR")
    second = cohort.read_volume(tmp_path, "MR", echo=2)
    assert sitk.GetArrayFromImage(second).min() == -120 + 500
    done = bring(tmp_path, tmp_path / "out" / "cohort", echo=2)
    volume = sitk.ReadImage(str(next((tmp_path / "out" / "cohort" / "images").iterdir())))
    assert list(done.table["status"]).count("imported") == 1
    np.testing.assert_array_equal(sitk.GetArrayFromImage(volume), sitk.GetArrayFromImage(second))


def test_two_fields_of_view_in_one_series_are_two_stacks(tmp_path):
    fine, coarse = small(), small()
    coarse.SetSpacing((1.0, 1.2, 1.25))
    write_series(tmp_path / "in" / "a", fine)
    for file in write_series(tmp_path / "in" / "b", coarse, series="1.2.9"):
        edit(file, SeriesInstanceUID="1.2.3")
    done = bring(tmp_path / "in", tmp_path / "cohort")
    assert sorted(done.table["spacing_mm"]) == [0.6, 1.2]
    assert sorted(done.table["status"]) == ["imported", "left out"]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"text",
        b"\0\0\0\1Bud1" + bytes(200),
        b'{"SliceThickness": 3}',
        b"\x5c\1\0\0" + bytes(344) + b"n+1\0",  # a NIfTI header
        np.full(400, 2, np.uint16).tobytes(),  # a raw label map
        np.full(400, 8, np.uint16).tobytes(),
    ],
)
def test_other_files_are_not_taken_for_dicom_without_preamble(tmp_path, content):
    (tmp_path / "a").write_bytes(content)
    assert not is_dicom(tmp_path / "a")
    assert read_headers(tmp_path / "a", ["Modality"]) == []


# ---------------------------------------------------------------- changed at random
NUMBERS = st.sampled_from([0, 1, -1, 2, 0.5, 1e-5, 1e6, 1024])
CHANGES = {  # element: what it becomes; None deletes it
    "PixelSpacing": st.one_of(st.none(), st.lists(NUMBERS, min_size=1, max_size=3)),
    "ImageOrientationPatient": st.sampled_from(
        [None, [0, 1, 0, 1, 0, 0], [1, 0, 0, 0, 0, -1], [-1, 0, 0, 0, 1, 0], [1, 0, 0, 0, 0.9, 0]]
        + [[1, 0, 0], [0, 0, 0, 0, 0, 0], [1, 0, 0, 0.0005, 1, 0]]
    ),
    "ImagePositionPatient": st.one_of(
        st.none(), st.tuples(NUMBERS, NUMBERS, NUMBERS).map(list), st.lists(NUMBERS, max_size=2)
    ),
    "RescaleSlope": st.one_of(st.none(), NUMBERS),
    "RescaleIntercept": st.one_of(st.none(), NUMBERS),
    "SliceThickness": st.one_of(st.none(), NUMBERS),
    "Rows": st.sampled_from([None, 0, 9, 10, 5, 60000]),
    "Columns": st.sampled_from([None, 0, 9, 10, 18]),
    "BitsAllocated": st.sampled_from([None, 8, 32]),
    "PixelRepresentation": st.sampled_from([0, 1]),
    "SamplesPerPixel": st.sampled_from([1, 3]),
    "PhotometricInterpretation": st.sampled_from([None, "MONOCHROME1", "RGB", "PALETTE COLOR"]),
    "NumberOfFrames": st.sampled_from([0, 1, 2, 10]),
    "Modality": st.sampled_from([None, "MR", "SR", ""]),
    "SeriesInstanceUID": st.sampled_from([None, "1.2.4"]),
    "SOPInstanceUID": st.sampled_from([None, "1.2.4"]),
    "FrameOfReferenceUID": st.sampled_from(["1.7", "1.8"]),
    "EchoTime": st.sampled_from([0, 6, "6.5"]),
    "EchoNumbers": st.one_of(NUMBERS.map(int), st.just([1, 2])),
}
CHANGE = st.sampled_from(sorted(CHANGES)).flatmap(
    lambda name: st.tuples(st.just(name), CHANGES[name], st.sampled_from([1, 3, 10]))
)


def changed_series(folder, changes, cut):
    """A good series with its first 1, 3 or all 10 slices changed, and one file cut short."""
    files = write_series(folder, small())
    for name, value, n_slices in changes:
        for file in files[:n_slices]:
            data = pydicom.dcmread(file)
            if value is not None:
                setattr(data, name, value)
            elif name in data:
                delattr(data, name)
            pydicom.dcmwrite(file, data, enforce_file_format=False)
    if cut is not None:
        share, shown = cut
        content = files[4].read_bytes()
        files[4].write_bytes(content[132:] if shown else content[: int(len(content) * share)])
    return files


def assert_as_in_the_headers(image, files):
    """Each slice has the place and the values that its own header gives it."""
    array, found = sitk.GetArrayFromImage(image), set()
    for file in files:
        data = pydicom.dcmread(file, force=True)
        rows, columns = np.reshape(np.array(data.ImageOrientationPatient, float), (2, 3))
        corner = np.array(data.ImagePositionPatient, float)
        last = corner + rows * (data.Columns - 1) * float(data.PixelSpacing[1])
        last += columns * (data.Rows - 1) * float(data.PixelSpacing[0])
        k = round(image.TransformPhysicalPointToContinuousIndex(corner)[2])
        size = image.GetSize()
        ours = image.TransformIndexToPhysicalPoint((0, 0, k))
        np.testing.assert_allclose(ours, corner, atol=0.1)
        ours = image.TransformIndexToPhysicalPoint((size[0] - 1, size[1] - 1, k))
        np.testing.assert_allclose(ours, last, atol=0.1)
        stored = np.frombuffer(data.PixelData, np.int16).reshape(data.Rows, data.Columns)
        slope = float(data.get("RescaleSlope", 1))
        expected = stored * slope + float(data.get("RescaleIntercept", 0))
        np.testing.assert_allclose(array[k], expected, rtol=1e-5, atol=1e-3)
        found.add(k)
    assert found == set(range(len(array)))


@pytest.mark.filterwarnings("ignore")  # pydicom warns of the values that are written here
@settings(max_examples=80, deadline=None, derandomize=True, database=None)
@given(
    changes=st.lists(CHANGE, min_size=1, max_size=2),
    cut=st.one_of(st.none(), st.tuples(st.floats(0, 1), st.booleans())),
)
def test_a_changed_series_is_read_as_its_headers_say_or_refused(tmp_path_factory, changes, cut):
    folder = tmp_path_factory.mktemp("series")
    files = changed_series(folder, changes, cut)
    try:
        image = cohort.read_volume(folder, "CT")
    except InputError as error:
        assert error.problem
        assert error.remedy
        return
    assert_as_in_the_headers(image, files)


def test_one_bad_series_never_stops_the_rest(tmp_path):
    write_series(tmp_path / "export" / "a", small())
    bad = write_series(tmp_path / "export" / "b", small(), series="1.2.4", PatientID="4712")
    bad[4].unlink()
    done = bring(tmp_path / "export", tmp_path / "cohort")
    assert sorted(done.table["status"]) == ["failed", "imported"]
    assert "a gap of 2.50 mm after slice 4" in done.table.set_index("status").loc["failed", "note"]
    assert len(cohort.read_manifest(done.manifest)) == 1


def test_the_real_series_is_imported_once_side_and_echo_are_given(real_data, tmp_path):
    options = {"salt_file": tmp_path / "salt"}
    without_side = dicom_import.import_dicom(real_data / "knee_mr_dicom", tmp_path / "a", **options)
    assert "does not name the knee" in " ".join(without_side.table["note"])
    done = dicom_import.import_dicom(
        real_data / "knee_mr_dicom", tmp_path / "b", side="R", echo=2, **options
    )
    assert list(done.table.loc[done.table["status"] == "imported", "echo"]) == [2]
    manifest = cohort.read_manifest(done.manifest)
    back = cohort.read_knee_volume(manifest.iloc[0], "mr", manifest.attrs["root"])
    direct = cohort.read_volume(real_data / "knee_mr_dicom", "MR", echo=2)
    np.testing.assert_array_equal(sitk.GetArrayFromImage(back), sitk.GetArrayFromImage(direct))
    np.testing.assert_allclose(back.GetDirection(), direct.GetDirection(), atol=1e-6)
    found = check_knees(manifest)
    assert list(found["level"]) == ["good", "warning"]
    assert "pixels are 0.62 mm, at most 0.35 mm" in found["finding"][1]


def test_the_whitelist_keeps_no_identifying_element():
    assert not set(TECHNICAL) & set(WHITELIST["identifying"])
    assert set(WHITELIST["logged"]) <= set(TECHNICAL)


def test_the_columns_of_the_choice_are_in_the_data_dictionary():
    folder = Path(__file__).parents[1] / "data_manifest"
    fields = json.loads((folder / "datapackage.json").read_text())["resources"][2]["schema"][
        "fields"
    ]
    assert [field["name"] for field in fields] == COLUMNS
    assert list(pd.read_csv(folder / "example_choice.csv")) == COLUMNS
