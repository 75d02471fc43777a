"""Reading a cohort: volumes, DICOM folders, manifest and splits, and what each refuses."""

import gzip
import struct
from pathlib import Path

import nibabel
import numpy as np
import pandas as pd
import pydicom
import pytest
import SimpleITK as sitk

from ctsma import cohort
from ctsma.common import InputError
from ctsma.files import sha256_file
from ctsma_lab import views
from dicom_import.checks import check_knees


def ct_array(shape=(12, 10, 9)):
    """A volume with the range of a knee CT: fat, marrow, cortex."""
    return np.linspace(-120, 1300, int(np.prod(shape)), dtype=np.float32).reshape(shape)


def volume(array, spacing=(0.5, 0.6, 0.7), origin=(-30.0, 12.0, 5.0)):
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(spacing)
    image.SetOrigin(origin)
    image.SetDirection((0, 0, -1, 1, 0, 0, 0, -1, 0))
    return image


def row(knee_id="K1", subject_id="S1", **changes):
    empty = dict.fromkeys(("oa", "kl_grade", "age", "sex", "bmi", "site", "ct_sha256", "mr_sha256"))
    return {
        "knee_id": knee_id,
        "subject_id": subject_id,
        "side": "R",
        "ct": "ct.nii.gz",
        "mr": None,
        **empty,
        **changes,
    }


def manifest(folder, *rows):
    path = folder / "cohort.csv"
    pd.DataFrame(rows).to_csv(path, index=False)
    return path


# ---------------------------------------------------------------- volumes
def test_nifti_round_trip_keeps_geometry_and_values(tmp_path):
    image = volume(ct_array())
    back = cohort.read_volume(cohort.write_volume(image, tmp_path / "a" / "ct.nii.gz"), "CT")
    np.testing.assert_array_equal(sitk.GetArrayFromImage(back), sitk.GetArrayFromImage(image))
    np.testing.assert_allclose(
        back.GetSpacing(), image.GetSpacing(), rtol=1e-6
    )  # NIfTI stores float32
    np.testing.assert_allclose(back.GetOrigin(), image.GetOrigin(), rtol=1e-6)
    np.testing.assert_allclose(back.GetDirection(), image.GetDirection(), atol=1e-6)
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["ct.nii.gz"]


def write_nifti(path, voxels, *, slope=np.nan, intercept=np.nan, qform=1, sform=1, bytes_left=None):
    """A NIfTI file, oblique, with any storage type, scaling and kind of affine."""
    cos, sin = np.cos(0.3), np.sin(0.3)
    rotation = np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]])
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = rotation * (0.31, 0.42, 0.7), (-11.3, 22.7, 5.123)
    header = nibabel.Nifti1Header()
    header.set_data_shape(voxels.shape)
    header.set_data_dtype(voxels.dtype)
    header.set_qform(affine, qform)
    header.set_sform(affine if sform != 2 else np.diag([0.31, 0.42, 0.7, 1.0]), sform)
    header["scl_slope"], header["scl_inter"], header["vox_offset"] = slope, intercept, 352
    content = (header.binaryblock + bytes(4) + voxels.tobytes("F"))[:bytes_left]
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


@pytest.mark.parametrize(
    ("dtype", "scaling", "forms", "name"),
    [
        (np.int16, {}, {}, "ct.nii.gz"),
        (np.int16, {"slope": 0.5, "intercept": -150.0}, {"sform": 0}, "ct.nii"),
        (np.uint16, {"slope": 1.0371, "intercept": -103.7}, {"qform": 0}, "ct.nii.gz"),
        (np.float32, {}, {"qform": 0, "sform": 0}, "ct.nii.gz"),
        (np.float64, {"slope": 1.3, "intercept": -200.0}, {"sform": 2}, "ct.nii.gz"),
        (np.int32, {"slope": 0.9, "intercept": -1.0}, {"qform": 2, "sform": 2}, "ct.nii"),
    ],
)
def test_nifti_is_read_as_itk_reads_it_to_the_last_bit(tmp_path, dtype, scaling, forms, name):
    voxels = np.random.default_rng(0).uniform(0, 1400, (9, 10, 12)).astype(dtype)
    voxels = voxels - voxels.dtype.type(100) if np.dtype(dtype).kind != "u" else voxels
    path = write_nifti(tmp_path / name, voxels, **scaling, **forms)
    ours, itk = cohort.read_volume(path, "CT"), sitk.ReadImage(str(path), sitk.sitkFloat32)
    np.testing.assert_array_equal(sitk.GetArrayFromImage(ours), sitk.GetArrayFromImage(itk))
    assert ours.GetSpacing() == itk.GetSpacing()
    assert ours.GetOrigin() == itk.GetOrigin()
    assert ours.GetDirection() == itk.GetDirection()
    assert ours.GetPixelID() == sitk.sitkFloat32


def small_ct(shape=(9, 10, 12)):
    return np.random.default_rng(0).integers(-120, 1400, shape).astype(np.int16)


def edited(path, *edits, compress=True):
    """The file of `write_nifti` with some header fields (offset, struct code, value) replaced."""
    content = bytearray(write_nifti(path.with_name("good.nii"), small_ct()).read_bytes())
    for offset, code, value in edits:
        struct.pack_into("<" + code, content, offset, value)
    path.write_bytes(gzip.compress(bytes(content), 1) if compress else bytes(content))
    return path


SLOPE, INTERCEPT, QUATERNION, SROW_X, PIXDIM = 112, 116, 256, 280, 76
NO_QFORM, NO_SFORM = (252, "h", 0), (254, "h", 0)


@pytest.mark.parametrize(
    ("edits", "words"),
    [
        ([(SLOPE, "f", 1.0), (INTERCEPT, "f", np.nan)], "slope of 1 and an intercept of nan"),
        ([(SLOPE, "f", np.inf)], "slope of inf"),
        ([(SLOPE, "f", np.nan), (INTERCEPT, "f", -1024.0)], "slope of nan and an intercept"),
        ([(70, "h", 1)], "data type code 1, not one"),
        ([(70, "h", 7)], "data type code 7, not one"),
        ([(70, "h", 32)], "data type code 32, not one"),  # complex
        ([(70, "h", 128)], "data type code 128, not one"),  # RGB
        ([(42, "h", -9)], "impossible dimensions"),
        ([(40, "h", 0)], "impossible dimensions"),
        ([(42, "h", 30000), (44, "h", 30000), (46, "h", 30000)], "truncated"),
        ([(108, "f", 0.0)], "voxels at byte 0, before 352"),
        ([(108, "f", np.nan)], "voxels at byte nan"),
        ([(PIXDIM + 4, "f", 0.0)], "voxel size 0 x 0.42 x 0.7"),
        ([(PIXDIM + 4, "f", np.nan)], "voxel size nan x"),
        ([(PIXDIM + 4, "f", 0.62)], "0.31 x 0.42 x 0.7 in its affine, 0.62 x 0.42 x 0.7 in pixdim"),
        ([NO_QFORM, (SROW_X, "f", np.nan)], "voxel size nan"),
        ([NO_SFORM, (QUATERNION, "f", np.nan)], "voxel size nan"),
        ([NO_SFORM, (QUATERNION, "f", 3.0)], "qform that is no rotation"),
        ([(SROW_X + 12, "f", 50.0)], "corners up to 61.3 mm apart"),
        ([(254, "h", 2), (SROW_X + 32, "3f", (0.0, 0.0, -0.7))], "corners up to"),
        ([(123, "B", 3)], "a voxel of 0.00031"),  # micrometres
        ([(344, "4s", b"ni1")], "one of a pair of files"),
        ([(344, "4s", bytes(4))], "Analyze"),
        ([(0, "i", 349)], "damaged header"),
        ([(0, "i", 540), (4, "4s", b"n+2")], "NIfTI-2"),
    ],
)
def test_a_nifti_header_that_cannot_be_right_is_refused_with_its_reason(tmp_path, edits, words):
    flat = [
        e if not isinstance(e[2], tuple) else (e[0], "12s", np.float32(e[2]).tobytes())
        for e in edits
    ]
    with pytest.raises(InputError) as caught:
        cohort.read_volume(edited(tmp_path / "ct.nii.gz", *flat), "CT")
    assert words in str(caught.value)


def test_a_sheared_sform_is_refused_with_its_angle(tmp_path):
    affine = np.diag([0.31, 0.42, 0.7, 1.0])
    affine[:2, 1] = 0.42 * np.cos(np.radians(80)), 0.42 * np.sin(np.radians(80))
    nibabel.save(nibabel.Nifti1Image(small_ct(), affine), tmp_path / "ct.nii.gz")
    with pytest.raises(InputError, match="is sheared .its axes meet at 80 degrees, not 90"):
        cohort.read_volume(tmp_path / "ct.nii.gz", "CT")


@pytest.mark.parametrize(
    ("name", "compress", "ending"),
    [("ct.nii.gz", False, ".nii"), ("ct.nii", True, ".nii.gz"), ("ct.mha", False, ".nii")],
)
def test_a_nifti_file_of_another_ending_is_to_be_renamed(tmp_path, name, compress, ending):
    path = edited(tmp_path / name, compress=compress)
    with pytest.raises(InputError, match=f"rename it to end in {ending}[.]$"):
        cohort.read_volume(path, "CT")
    path = path.rename(tmp_path / f"renamed{ending}")
    assert cohort.read_volume(path, "CT").GetSize() == (9, 10, 12)


@pytest.mark.parametrize(
    "edits",
    [
        [(SLOPE, "f", 0.0), (INTERCEPT, "f", np.nan)],
        [(SLOPE, "f", 0.0), (INTERCEPT, "f", -3.0)],
        [(SLOPE, "f", np.nan), (INTERCEPT, "f", np.nan)],
        [(SLOPE, "f", np.nan), (INTERCEPT, "f", 0.0)],
        [NO_SFORM, (PIXDIM, "f", 0.0)],  # qfac 0 means 1
        [(40, "4h", (4, 9, 10, 12)), (48, "h", 1)],  # four dimensions, one volume
    ],
)
def test_odd_headers_that_the_standard_allows_are_read(tmp_path, edits):
    flat = [
        e if not isinstance(e[2], tuple) else (e[0], "8s", np.int16(e[2]).tobytes()) for e in edits
    ]
    image = cohort.read_volume(edited(tmp_path / "ct.nii.gz", *flat), "CT")
    good = cohort.read_volume(edited(tmp_path / "plain.nii.gz"), "CT")
    np.testing.assert_array_equal(sitk.GetArrayFromImage(image), sitk.GetArrayFromImage(good))
    np.testing.assert_allclose(image.GetDirection(), good.GetDirection(), atol=1e-6)
    assert image.GetSpacing() == good.GetSpacing()


def test_a_nifti_header_with_any_damage_is_read_whole_or_refused_in_words(tmp_path):
    rng = np.random.default_rng(0)
    good = bytearray(edited(tmp_path / "good.nii", compress=False).read_bytes())
    voxels, n_read = good[352:], 0
    for _ in range(300):
        content = good.copy()
        for place in rng.integers(0, 348, rng.integers(1, 4)):
            content[place] = rng.integers(256)
        (tmp_path / "ct.nii").write_bytes(content)
        try:
            image = cohort.read_volume(tmp_path / "ct.nii", "CT")
        except InputError as error:
            assert "ct.nii: " in str(error)
            continue
        n_read += 1
        assert np.isfinite(image.GetOrigin() + image.GetDirection()).all()
        assert abs(np.linalg.det(np.reshape(image.GetDirection(), (3, 3)))) == pytest.approx(1)
        assert 0.05 < min(image.GetSpacing()) <= max(image.GetSpacing()) < 10
    assert 50 < n_read < 300
    assert len(voxels) == small_ct().nbytes


def test_same_volume_gives_the_same_bytes(tmp_path):
    sums = {
        sha256_file(cohort.write_volume(volume(ct_array()), tmp_path / f"{i}.nii.gz"))
        for i in range(2)
    }
    assert len(sums) == 1


def with_value(array, index, value):
    array = array.copy()
    array[index] = value
    return array


@pytest.mark.parametrize(
    ("array", "modality", "words"),
    [
        (with_value(ct_array(), (3, 3, 3), np.nan), "CT", "1 NaN or infinite"),
        (np.zeros((12, 10, 9), np.float32), "CT", "is constant"),
        (ct_array() + 1024, "CT", "not a CT of bone in HU"),
        (np.abs(ct_array()), "CT", "not a CT of bone in HU"),
        (np.clip(ct_array(), -120, 100), "CT", "not a CT of bone in HU"),
        (ct_array() * 2, "MR", "as a CT has"),
        (ct_array((3, 10, 9)), "CT", "only 3 slices"),
    ],
)
def test_wrong_volumes_are_refused_with_file_and_problem(tmp_path, array, modality, words):
    path = cohort.write_volume(volume(array), tmp_path / "image.nii.gz")
    with pytest.raises(InputError, match=words) as caught:
        cohort.read_volume(path, modality)
    assert "image.nii.gz" in str(caught.value)


@pytest.mark.parametrize("name", ["ct.nii", "ct.nii.gz"])
def test_missing_and_truncated_files_are_refused(tmp_path, name):
    with pytest.raises(InputError, match="does not exist"):
        cohort.read_volume(tmp_path / name, "CT")
    voxels = np.random.default_rng(0).normal(0, 300, (40, 40, 40)).astype(np.int16)
    cohort.read_volume(write_nifti(tmp_path / name, voxels), "CT")
    path = write_nifti(tmp_path / name, voxels, bytes_left=60_000)
    with pytest.raises(InputError, match="cannot be read"):
        cohort.read_volume(path, "CT")
    path.write_bytes(write_nifti(path, voxels).read_bytes()[:50_000])  # cut within its compression
    with pytest.raises(InputError, match="cannot be read"):
        cohort.read_volume(path, "CT")


def test_absurd_spacing_is_refused(tmp_path):
    path = cohort.write_volume(
        volume(ct_array(), spacing=(0.001, 0.5, 0.5)), tmp_path / "ct.nii.gz"
    )
    with pytest.raises(InputError, match="voxel of"):
        cohort.read_volume(path, "CT")


# ---------------------------------------------------------------- DICOM
def dicom_series(
    folder, positions, *, modality="CT", slope=1.0, intercept=-1024.0, series="1.2.3", **tags
):
    """Write one small axial DICOM series; `positions` are the (x, y, z) of its slices in LPS mm."""
    folder.mkdir(exist_ok=True)
    for number, position in enumerate(positions):
        data = pydicom.Dataset()
        data.file_meta = pydicom.dataset.FileMetaDataset()
        data.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
        data.SOPClassUID = data.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.2"
        data.SOPInstanceUID = data.file_meta.MediaStorageSOPInstanceUID = f"{series}.{number + 1}"
        data.SeriesInstanceUID, data.StudyInstanceUID, data.Modality = series, "1.2", modality
        data.Rows, data.Columns, data.PixelSpacing = 10, 9, [0.6, 0.5]
        data.ImageOrientationPatient, data.ImagePositionPatient = (
            [1, 0, 0, 0, 1, 0],
            list(map(float, position)),
        )
        data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
        data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 16, 16, 15, 1
        data.RescaleSlope, data.RescaleIntercept = slope, intercept
        for tag, value in tags.items():
            setattr(data, tag, value)
        data.PixelData = np.full((10, 9), 900 + 100 * number, np.int16).tobytes()
        data.save_as(
            folder / f"{len(positions) - number:03d}_{series}.dcm", enforce_file_format=True
        )
    return folder


def stack(n=10, gap=1.25):
    return [(-20.0, 5.0, 40.0 + gap * k) for k in range(n)]


def test_dicom_slices_are_sorted_by_position_and_rescaled(tmp_path):
    image = cohort.read_volume(
        dicom_series(tmp_path / "ct", stack(), slope=2.0, intercept=-2000.0), "CT"
    )
    values = sitk.GetArrayFromImage(image)[:, 0, 0]
    np.testing.assert_array_equal(values, 2.0 * (900 + 100 * np.arange(10)) - 2000.0)
    assert image.GetOrigin() == pytest.approx((-20, 5, 40))
    assert image.GetSpacing() == pytest.approx((0.5, 0.6, 1.25))


@pytest.mark.parametrize(
    ("positions", "words"),
    [
        (
            stack()[:4] + stack()[5:],
            "uneven slices: a gap of 2.50 mm after slice 4 where the others are 1.25 mm",
        ),
        (stack() + stack()[3:4], "uneven slices"),
        ([(x, y + 0.3 * k, z) for k, (x, y, z) in enumerate(stack())], "gantry tilt of 13"),
        (stack(5), "only 5 slices"),
    ],
)
def test_broken_stacks_are_refused(tmp_path, positions, words):
    with pytest.raises(InputError, match=words):
        cohort.read_volume(dicom_series(tmp_path / "ct", positions), "CT")


def test_mixed_series_wrong_modality_and_no_dicom_are_refused(tmp_path):
    folder = dicom_series(tmp_path / "ct", stack())
    with pytest.raises(InputError, match="holds Modality CT where MR is wanted"):
        cohort.read_volume(folder, "MR")
    dicom_series(folder, [(x, y, z + 100) for x, y, z in stack()], series="1.2.4")
    with pytest.raises(InputError, match="mixes 2 DICOM series"):
        cohort.read_volume(folder, "CT")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no DICOM file"):
        cohort.read_volume(tmp_path / "empty", "CT")


def test_truncated_dicom_slice_is_refused(tmp_path):
    folder = dicom_series(tmp_path / "ct", stack())
    file = sorted(folder.iterdir())[4]
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(InputError, match="ct"):
        cohort.read_volume(folder, "CT")


def test_real_two_echo_series_is_refused_until_an_echo_is_chosen(real_data):
    folder = real_data / "knee_mr_dicom"
    with pytest.raises(InputError, match=r"TE 6\.312 ms.*TE 12\.624 ms.*echo=1"):
        cohort.read_volume(folder, "MR")
    with pytest.raises(InputError, match="has no echo 3"):
        cohort.read_volume(folder, "MR", echo=3)


def test_real_series_has_the_geometry_of_its_headers(real_data):
    folder = real_data / "knee_mr_dicom"
    image = cohort.read_volume(folder, "MR", echo=1)
    assert image.GetSize() == (256, 256, 24)
    assert image.GetSpacing() == pytest.approx((0.625, 0.625, 4.0), abs=1e-4)
    headers = [pydicom.dcmread(file, stop_before_pixels=True) for file in folder.iterdir()]
    corners = np.array(
        [header.ImagePositionPatient for header in headers if int(header.EchoNumbers) == 1], float
    )
    ours = np.array([image.TransformIndexToPhysicalPoint((0, 0, k)) for k in range(24)])
    distances = np.linalg.norm(corners[:, None] - ours[None], axis=2)
    assert (
        distances.min(axis=0).max() < 0.02
    )  # mm: the header rounds positions and directions to 6 digits
    assert sorted(distances.argmin(axis=0)) == list(range(24))


# ---------------------------------------------------------------- manifest
def test_manifest_reads_ids_as_text_and_keeps_the_root(tmp_path):
    frame = cohort.read_manifest(
        manifest(tmp_path, row("007", "010"), row("008", "011", side="L", oa=1))
    )
    assert list(frame["knee_id"]) == ["007", "008"]
    assert frame.attrs["root"] == str(tmp_path)


def test_every_problem_of_a_manifest_is_reported_at_once(tmp_path):
    bad = [
        row("K1", "S1", oa=2, age="old"),
        row("K1", "S2", side="right"),
        row("K 3", "S3", kl_grade=7, bmi=900, ct=None),
        row("K4", "S1"),
    ]
    with pytest.raises(InputError) as caught:
        cohort.read_manifest(manifest(tmp_path, *bad))
    for words in (
        "row 2: oa = 2.0 is not 0 or 1",
        "row 2: age = old is not a number",
        "row 2: knee_id = K1 occurs twice",
        "row 3: side = right is not L or R",
        "row 4: knee_id = K 3 holds more than letters, digits, hyphens, underscores and dots",
        "row 4: kl_grade = 7.0 is not 0, 1, 2, 3 or 4",
        "row 4: bmi = 900.0 is not between 8 and 100",
        "row 4 names neither a CT nor an MR",
        "row 5 repeats a subject's side",
    ):
        assert caught.value.problem.count(words) == 1, caught.value.problem


def as_text(*rows):
    return pd.DataFrame(rows).to_csv(index=False)


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace(",", ";").replace("63.5", "63,5"),
        lambda text: text.replace(",", "\t").replace("63.5", "63,5"),
        lambda text: text.replace("63.5", '"63,5"'),
        lambda text: "\ufeff" + text,
        lambda text: "sep=;\n" + text.replace(",", ";"),
        lambda text: "\n\n" + text.replace("\n", "\n\n" + "," * 12 + "\n"),
        lambda text: text.replace("\n", ",\n"),
        lambda text: text.replace(",", ", ").replace("\n", "\r\n"),
    ],
)
def test_a_manifest_is_read_however_a_spreadsheet_saves_it(tmp_path, change):
    rows = row("sub-01_R", "OAI_9014797", ct="0001", site="007", age=63.5), row("a.b", "S2")
    (tmp_path / "good.csv").write_text(as_text(*rows))
    (tmp_path / "cohort.csv").write_bytes(change(as_text(*rows)).encode())
    found = cohort.read_manifest(tmp_path / "cohort.csv")
    pd.testing.assert_frame_equal(found, cohort.read_manifest(tmp_path / "good.csv"))
    assert list(found.loc[0, ["knee_id", "ct", "site", "age"]]) == ["sub-01_R", "0001", "007", 63.5]


def test_row_numbers_are_those_of_the_file(tmp_path):
    text = "\n" + as_text(row("K1", "S1"), row("K 2", "S2")).replace("\n", "\n\n")
    (tmp_path / "cohort.csv").write_text(text)
    with pytest.raises(InputError, match="row 6: knee_id = K 2 holds more than"):
        cohort.read_manifest(tmp_path / "cohort.csv")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is empty; give a table"),
        ("\n,,,\n", "is empty; give a table"),
        ("knee_id|subject_id\nK1|S1\n", "has one column, knee_id|subject_id; separate columns by"),
        ("knee_id,age,age\nK1,1,2\n", "names age twice"),
        ("knee_id,age\nK1,63,5\n", "Expected 2 fields in line 2, saw 3"),
    ],
)
def test_what_is_no_table_is_refused_in_one_sentence(tmp_path, text, words):
    (tmp_path / "cohort.csv").write_text(text)
    with pytest.raises(InputError) as caught:
        cohort.read_manifest(tmp_path / "cohort.csv")
    assert words in str(caught.value)


@pytest.mark.parametrize("other", ["K1_rescan", "K1_stages", "K1_rescan_stages", "k1"])
def test_two_knees_never_share_file_names(tmp_path, other):
    with pytest.raises(InputError, match=f"row 3: knee_id = {other} would share its files"):
        cohort.read_manifest(manifest(tmp_path, row("K1", "S1"), row(other, "S2")))
    assert len(cohort.read_manifest(manifest(tmp_path, row("K2", "S1"), row("K1_rescan", "S2"))))


def test_missing_and_misspelt_columns_are_named(tmp_path):
    wrong = {("kl" if key == "kl_grade" else key): value for key, value in row().items()}
    with pytest.raises(InputError, match="column kl_grade is missing") as caught:
        cohort.read_manifest(manifest(tmp_path, wrong))
    assert "column kl is unknown" in str(caught.value)


@pytest.mark.parametrize("path", ["../secret.nii.gz", "/etc/passwd", "link/ct.nii.gz"])
def test_paths_out_of_the_root_are_refused(tmp_path, path):
    root = tmp_path / "root"
    root.mkdir()
    (root / "link").symlink_to(tmp_path)
    with pytest.raises(InputError, match="leads out of the cohort's root"):
        cohort.read_manifest(manifest(root, row(ct=path)))


def test_one_subject_may_have_two_knees(tmp_path):
    both = manifest(tmp_path, row("K1", "S1", side="L"), row("K2", "S1", side="R"))
    assert len(cohort.read_manifest(both)) == 2


def test_the_check_of_images_names_every_bad_one_and_goes_on(tmp_path):
    good = cohort.write_volume(volume(ct_array()), tmp_path / "good.nii.gz")
    cohort.write_volume(volume(ct_array() + 1024), tmp_path / "raw.nii.gz")
    rows = [
        row("K1", "S1", ct="good.nii.gz", ct_sha256=sha256_file(good)),
        row("K2", "S2", ct="raw.nii.gz"),
        row("K3", "S3", ct="absent.nii.gz"),
        row("K4", "S4", ct="good.nii.gz", ct_sha256="0" * 64),
    ]
    table = check_knees(cohort.read_manifest(manifest(tmp_path, *rows)), deep=False)
    sizes = table[table["check"] == "size"].set_index("knee_id")["finding"]
    assert sizes["K1"].startswith("9 x 10 x 12 at ")
    fatal = table[table["level"] == "fatal"].set_index("knee_id")["finding"]
    for knee_id, words in {
        "K2": "HU",
        "K3": "does not exist",
        "K4": "differs from ct_sha256",
    }.items():
        assert words in fatal[knee_id]
    assert "K1" not in fatal


def test_table_one_gives_means_shares_and_standardised_differences():
    frame = pd.DataFrame(
        [
            row(f"K{i}", f"S{i}", oa=i // 2, age=50 + 10 * i, sex="FFMM"[i], bmi=25 + i)
            for i in range(4)
        ]
    )
    table = views.table_one(frame)
    assert table.loc["age", "no OA"] == "55.0 (7.1)"
    assert table.loc["age", "SMD"] == pytest.approx(
        20 / np.sqrt(50), abs=0.01
    )  # means 55 and 75, variance 50 each
    assert list(table.loc["female_pct", ["no OA", "OA"]]) == ["100.0", "0.0"]
    assert list(table.loc["n", ["no OA", "OA"]]) == [2, 2]


# ---------------------------------------------------------------- splits
def subjects(n=23):
    rng = np.random.default_rng(1)
    rows = [
        row(f"K{i}{s}", f"S{i}", side=s, oa=int(i % 2))
        for i in range(n)
        for s in ("L", "R")[: 1 + rng.integers(2)]
    ]
    return pd.DataFrame(rows)


def test_splits_keep_subjects_whole_and_classes_balanced():
    frame = subjects()
    splits = cohort.make_splits(frame, 5, seed=3)
    assert splits["subject_id"].is_unique
    assert set(splits["subject_id"]) == set(frame["subject_id"])
    labels = frame.drop_duplicates("subject_id").set_index("subject_id")["oa"]
    share = splits.groupby("fold")["subject_id"].agg(lambda s: labels.loc[s].mean())
    assert splits["fold"].value_counts().max() - splits["fold"].value_counts().min() <= 1
    assert share.between(0.25, 0.75).all()  # 4 or 5 subjects a fold, 2 or 3 of them with OA


def test_every_fold_gets_its_share_of_the_knees_with_a_reference(tmp_path):
    rows = [row(f"K{i}", f"S{i}", oa=i % 2, mr="mr.nii.gz") for i in range(20)]
    frame = cohort.read_manifest(manifest(tmp_path, *rows))
    few = frame.assign(has_reference=[1.0] * 8 + [0.0] * 12)
    folds = cohort.make_splits(few, 4, seed=0).set_index("subject_id")["fold"]
    assert folds.loc[few["subject_id"][:8]].value_counts().eq(2).all()
    same = cohort.make_splits(frame.assign(has_reference=np.nan), 4, seed=0)
    pd.testing.assert_frame_equal(same, cohort.make_splits(frame, 4, seed=0))
    with pytest.raises(InputError, match="leaves 1 subjects with CT, MR and a reference"):
        cohort.stored_splits(frame.assign(has_reference=[1.0, 1.0] + [0.0] * 18), 2, seed=0)


def test_splits_depend_on_the_seed_alone():
    frame = subjects()
    same = cohort.make_splits(frame.sample(frac=1, random_state=1), 4, seed=9)
    pd.testing.assert_frame_equal(cohort.make_splits(frame, 4, seed=9), same)
    assert not same.equals(cohort.make_splits(frame, 4, seed=10))


def test_stored_splits_are_never_overwritten(tmp_path):
    frame = cohort.read_manifest(
        manifest(tmp_path, *(row(f"K{i}", f"S{i}", oa=i % 2) for i in range(6)))
    )
    first = cohort.stored_splits(frame, 3, seed=0)
    pd.testing.assert_frame_equal(cohort.stored_splits(frame, 2, seed=1), first)


def test_wrong_splits_are_refused(tmp_path):
    frame = subjects(6)
    splits = cohort.make_splits(frame, 3, seed=0)
    with pytest.raises(InputError, match="S0 in two folds"):
        cohort.check_splits(pd.concat([splits, splits[:1].assign(fold=2)]), frame)
    with pytest.raises(InputError, match="no fold for subject S0"):
        cohort.check_splits(splits[1:], frame)
    with pytest.raises(InputError, match="number its folds"):
        cohort.check_splits(splits.assign(fold=splits["fold"] + 1), frame)
    with pytest.raises(InputError, match="n_folds"):
        cohort.make_splits(frame, 7, seed=0)


def test_folds_without_enough_training_subjects_are_refused_at_once(tmp_path):
    rows = [row(f"K{i}", f"S{i}", oa=i % 2, mr="mr.nii.gz") for i in range(5)]
    frame = cohort.read_manifest(manifest(tmp_path, *rows))
    with pytest.raises(InputError, match="leaves 2 subjects with CT, MR and a reference"):
        cohort.stored_splits(frame, 2, seed=0)
    assert not cohort.splits_path(tmp_path / "cohort.csv").exists()
    assert cohort.stored_splits(frame, 5, seed=0)["fold"].nunique() == 5
    text = cohort.splits_path(tmp_path / "cohort.csv").read_text()
    cohort.splits_path(tmp_path / "cohort.csv").write_text(text.replace(",", ";") + "\n")
    assert cohort.stored_splits(frame, 5, seed=0)["fold"].dtype == np.int64
    with pytest.raises(InputError, match="missing for a knee"):
        cohort.check_splits(cohort.make_splits(frame, 5, seed=0), frame.assign(subject_id=None))


NIBABELS_FILES = sorted(Path(nibabel.__file__).parent.glob("tests/data/*.nii*"))


@pytest.mark.parametrize("path", NIBABELS_FILES, ids=lambda path: path.name)
def test_nibabels_own_files_are_read_as_stored_or_refused(path):
    try:
        image = cohort.read_volume(path, "MR")
    except InputError as error:
        assert error.source == str(path)
        return
    stored = np.asanyarray(nibabel.load(path).dataobj, dtype=np.float32).squeeze()
    assert np.array_equal(sitk.GetArrayFromImage(image).T, stored)
