"""The door: volumes, manifest, splits, casework and provenance, each with what it refuses."""

import json
import shutil

import numpy as np
import pandas as pd
import pydicom
import pytest
import SimpleITK as sitk

from ctsma import cohort
from ctsma.cohort import InputFault
from ctsma.cohort.provenance import imports


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
    np.testing.assert_allclose(back.GetSpacing(), image.GetSpacing(), rtol=1e-6)  # NIfTI stores float32
    np.testing.assert_allclose(back.GetOrigin(), image.GetOrigin(), rtol=1e-6)
    np.testing.assert_allclose(back.GetDirection(), image.GetDirection(), atol=1e-6)
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["ct.nii.gz"]


def test_same_volume_gives_the_same_bytes(tmp_path):
    sums = {cohort.sha256_file(cohort.write_volume(volume(ct_array()), tmp_path / f"{i}.nii.gz")) for i in range(2)}
    assert len(sums) == 1


def spoilt(array, index, value):
    array = array.copy()
    array[index] = value
    return array


@pytest.mark.parametrize(
    ("array", "modality", "words"),
    [
        (spoilt(ct_array(), (3, 3, 3), np.nan), "CT", "1 NaN or infinite"),
        (np.zeros((12, 10, 9), np.float32), "CT", "is constant"),
        (ct_array() + 1024, "CT", "not a CT of bone in HU"),
        (np.abs(ct_array()), "CT", "not a CT of bone in HU"),
        (np.clip(ct_array(), -120, 100), "CT", "not a CT of bone in HU"),
        (ct_array() * 2, "MR", "as a CT has"),
        (ct_array((3, 10, 9)), "CT", "only 3 slices"),
    ],
)
def test_wrong_volumes_are_refused_with_the_file_and_the_fault(tmp_path, array, modality, words):
    path = cohort.write_volume(volume(array), tmp_path / "image.nii.gz")
    with pytest.raises(InputFault, match=words) as caught:
        cohort.read_volume(path, modality)
    assert "image.nii.gz" in str(caught.value)


def test_missing_and_truncated_files_are_refused(tmp_path):
    with pytest.raises(InputFault, match="does not exist"):
        cohort.read_volume(tmp_path / "none.nii.gz", "CT")
    noise = np.random.default_rng(0).normal(0, 300, (40, 40, 40)).astype(np.int16)
    path = cohort.write_volume(volume(noise), tmp_path / "ct.nii.gz")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(InputFault, match="cannot be read"):
        cohort.read_volume(path, "CT")


def test_absurd_spacing_is_refused(tmp_path):
    path = cohort.write_volume(volume(ct_array(), spacing=(0.001, 0.5, 0.5)), tmp_path / "ct.nii.gz")
    with pytest.raises(InputFault, match="voxel of"):
        cohort.read_volume(path, "CT")


# ---------------------------------------------------------------- DICOM
def dicom_series(folder, positions, *, modality="CT", slope=1.0, intercept=-1024.0, series="1.2.3", **tags):
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
        data.save_as(folder / f"{len(positions) - number:03d}_{series}.dcm", enforce_file_format=True)
    return folder


def stack(n=10, gap=1.25):
    return [(-20.0, 5.0, 40.0 + gap * k) for k in range(n)]


def test_dicom_slices_are_sorted_by_position_and_rescaled(tmp_path):
    image = cohort.read_volume(dicom_series(tmp_path / "ct", stack(), slope=2.0, intercept=-2000.0), "CT")
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
    with pytest.raises(InputFault, match=words):
        cohort.read_volume(dicom_series(tmp_path / "ct", positions), "CT")


def test_mixed_series_wrong_modality_and_no_dicom_are_refused(tmp_path):
    folder = dicom_series(tmp_path / "ct", stack())
    with pytest.raises(InputFault, match="holds modality CT where MR is wanted"):
        cohort.read_volume(folder, "MR")
    dicom_series(folder, [(x, y, z + 100) for x, y, z in stack()], series="1.2.4")
    with pytest.raises(InputFault, match="mixes 2 DICOM series"):
        cohort.read_volume(folder, "CT")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputFault, match="holds no DICOM file"):
        cohort.read_volume(tmp_path / "empty", "CT")


def test_truncated_dicom_slice_is_refused(tmp_path):
    folder = dicom_series(tmp_path / "ct", stack())
    file = sorted(folder.iterdir())[4]
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(InputFault, match="ct"):
        cohort.read_volume(folder, "CT")


def test_real_two_echo_series_is_refused_until_an_echo_is_chosen(real_data):
    folder = real_data / "knee_mr_dicom"
    with pytest.raises(InputFault, match=r"TE 6\.312 ms.*TE 12\.624 ms.*echo=1"):
        cohort.read_volume(folder, "MR")
    with pytest.raises(InputFault, match="has no echo 3"):
        cohort.read_volume(folder, "MR", echo=3)


def test_real_series_has_the_geometry_of_its_headers(real_data):
    folder = real_data / "knee_mr_dicom"
    image = cohort.read_volume(folder, "MR", echo=1)
    assert image.GetSize() == (256, 256, 24)
    assert image.GetSpacing() == pytest.approx((0.625, 0.625, 4.0), abs=1e-4)
    headers = [pydicom.dcmread(file, stop_before_pixels=True) for file in folder.iterdir()]
    corners = np.array([header.ImagePositionPatient for header in headers if int(header.EchoNumbers) == 1], float)
    ours = np.array([image.TransformIndexToPhysicalPoint((0, 0, k)) for k in range(24)])
    distances = np.linalg.norm(corners[:, None] - ours[None], axis=2)
    assert distances.min(axis=0).max() < 0.02  # mm: the header rounds positions and directions to 6 digits
    assert sorted(distances.argmin(axis=0)) == list(range(24))


# ---------------------------------------------------------------- manifest
def test_manifest_reads_ids_as_text_and_keeps_the_root(tmp_path):
    frame = cohort.read_manifest(manifest(tmp_path, row("007", "010"), row("008", "011", side="L", oa=1)))
    assert list(frame["knee_id"]) == ["007", "008"]
    assert frame.attrs["root"] == str(tmp_path)


def test_every_manifest_fault_is_reported_at_once(tmp_path):
    bad = [row("K1", "S1", oa=2), row("K1", "S2", side="right"), row("K 3", "S3", kl_grade=7, bmi=900)]
    with pytest.raises(InputFault) as caught:
        cohort.read_manifest(manifest(tmp_path, *bad))
    for words in (
        "row 2: oa = 2",
        "K1 breaks",
        "row 3: side = right",
        "row 4: knee_id = K 3",
        "kl_grade = 7",
        "bmi = 900",
    ):
        assert words in str(caught.value)


def test_missing_and_misspelt_columns_are_named(tmp_path):
    wrong = {("kl" if key == "kl_grade" else key): value for key, value in row().items()}
    with pytest.raises(InputFault, match="column kl_grade is missing") as caught:
        cohort.read_manifest(manifest(tmp_path, wrong))
    assert "column kl is unknown" in str(caught.value)


@pytest.mark.parametrize("path", ["../secret.nii.gz", "/etc/passwd", "link/ct.nii.gz"])
def test_paths_out_of_the_root_are_refused(tmp_path, path):
    root = tmp_path / "root"
    root.mkdir()
    (root / "link").symlink_to(tmp_path)
    with pytest.raises(InputFault, match="leads out of the cohort's root"):
        cohort.read_manifest(manifest(root, row(ct=path)))


def test_a_row_without_image_is_refused(tmp_path):
    with pytest.raises(InputFault, match="ct_or_mr_is_given"):
        cohort.read_manifest(manifest(tmp_path, row(ct=None)))


def test_one_subject_may_bring_two_knees_but_not_twice_the_same(tmp_path):
    both = manifest(tmp_path, row("K1", "S1", side="L"), row("K2", "S1", side="R"))
    assert len(cohort.read_manifest(both)) == 2
    with pytest.raises(InputFault, match="one_row_per_subject_and_side"):
        cohort.read_manifest(manifest(tmp_path, row("K1", "S1"), row("K2", "S1")))


def test_check_data_names_every_bad_image_and_goes_on(tmp_path):
    good = cohort.write_volume(volume(ct_array()), tmp_path / "good.nii.gz")
    cohort.write_volume(volume(ct_array() + 1024), tmp_path / "raw.nii.gz")
    rows = [
        row("K1", "S1", ct="good.nii.gz", ct_sha256=cohort.sha256_file(good)),
        row("K2", "S2", ct="raw.nii.gz"),
        row("K3", "S3", ct="absent.nii.gz"),
        row("K4", "S4", ct="good.nii.gz", ct_sha256="0" * 64),
    ]
    faults = cohort.check_data(cohort.read_manifest(manifest(tmp_path, *rows)))["fault"]
    assert faults[0] == ""
    assert ["HU" in faults[1], "does not exist" in faults[2], "differs from ct_sha256" in faults[3]] == [True] * 3


def test_table_one_gives_means_shares_and_standardised_differences():
    frame = pd.DataFrame(
        [row(f"K{i}", f"S{i}", oa=i // 2, age=50 + 10 * i, sex="FFMM"[i], bmi=25 + i) for i in range(4)]
    )
    table = cohort.table_one(frame)
    assert table.loc["age", "no OA"] == "55.0 (7.1)"
    assert table.loc["age", "SMD"] == pytest.approx(20 / np.sqrt(50), abs=0.01)  # means 55 and 75, variance 50 each
    assert list(table.loc["female_pct", ["no OA", "OA"]]) == ["100.0", "0.0"]
    assert list(table.loc["n", ["no OA", "OA"]]) == [2, 2]


# ---------------------------------------------------------------- splits
def subjects(n=23):
    rng = np.random.default_rng(1)
    rows = [
        row(f"K{i}{s}", f"S{i}", side=s, oa=int(i % 2)) for i in range(n) for s in ("L", "R")[: 1 + rng.integers(2)]
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


def test_splits_depend_on_the_seed_alone():
    frame = subjects()
    same = cohort.make_splits(frame.sample(frac=1, random_state=1), 4, seed=9)
    pd.testing.assert_frame_equal(cohort.make_splits(frame, 4, seed=9), same)
    assert not same.equals(cohort.make_splits(frame, 4, seed=10))


def test_stored_splits_are_never_overwritten(tmp_path):
    frame = cohort.read_manifest(manifest(tmp_path, *(row(f"K{i}", f"S{i}", oa=i % 2) for i in range(6))))
    first = cohort.stored_splits(frame, 3, seed=0)
    pd.testing.assert_frame_equal(cohort.stored_splits(frame, 2, seed=1), first)


def test_wrong_splits_are_refused(tmp_path):
    frame = subjects(6)
    splits = cohort.make_splits(frame, 3, seed=0)
    with pytest.raises(InputFault, match="S0 in two folds"):
        cohort.check_splits(pd.concat([splits, splits[:1].assign(fold=2)]), frame)
    with pytest.raises(InputFault, match="no fold for subject S0"):
        cohort.check_splits(splits[1:], frame)
    with pytest.raises(InputFault, match="number its folds"):
        cohort.check_splits(splits.assign(fold=splits["fold"] + 1), frame)
    with pytest.raises(InputFault, match="n_folds"):
        cohort.make_splits(frame, 7, seed=0)


# ---------------------------------------------------------------- casework
def square(knee, folder, *, power):
    """Case function of the tests: writes a file, leaves a trace of each call, fails on one knee."""
    with (folder / "calls.txt").open("a") as stream:
        stream.write(knee["knee_id"] + "\n")
    if knee["knee_id"] == "K2":
        raise ZeroDivisionError("no bone")
    (folder / f"{knee['knee_id']}_out.txt").write_text(str(power))
    return {"value": int(knee["knee_id"][1:]) ** power}


def rooted(knee, folder, root):
    return square(knee, folder, power=1)


def calls(folder):
    return sorted((folder / "calls.txt").read_text().split())


def test_one_bad_knee_is_a_row_and_finished_knees_are_not_recomputed(tmp_path):
    knees = pd.DataFrame([row(f"K{i}", f"S{i}") for i in range(4)])
    lines = []
    table = cohort.map_knees(square, knees, tmp_path, {"power": 2}, report=lines.append)
    assert list(table["knee_id"]) == ["K0", "K1", "K2", "K3"]
    assert list(table["value"].dropna()) == [0, 1, 9]
    assert "ZeroDivisionError" in table["error"][2]
    assert len(lines) == 4
    cohort.map_knees(square, knees, tmp_path, {"power": 2})
    assert calls(tmp_path) == ["K0", "K1", "K2", "K2", "K3"]


def test_changed_parameters_and_damaged_files_are_recomputed(tmp_path):
    knees = pd.DataFrame([row("K1", "S1"), row("K3", "S3")])
    cohort.map_knees(square, knees, tmp_path, {"power": 2})
    (tmp_path / "K3_out.txt").write_text("damaged")
    (tmp_path / "K1.json").write_text('{"half": ')
    cohort.map_knees(square, knees, tmp_path, {"power": 2})
    assert calls(tmp_path) == ["K1", "K1", "K3", "K3"]
    assert list(cohort.map_knees(square, knees, tmp_path, {"power": 3})["value"]) == [1, 27]


def test_a_changed_earlier_record_counts_as_a_changed_input(tmp_path):
    knees = pd.DataFrame([row("K1", "S1")])
    for power in (2, 3, 3):
        cohort.map_knees(square, knees, tmp_path / "a", {"power": power})
        cohort.map_knees(square, knees, tmp_path / "b", {"power": 1}, after=[tmp_path / "a"])
    assert calls(tmp_path / "b") == ["K1", "K1"]


# ---------------------------------------------------------------- provenance
def test_json_is_written_whole_with_plain_numbers(tmp_path):
    path = cohort.write_json(tmp_path / "a.json", {"x": np.float32(0.5), "n": np.nan, "v": np.arange(2), "p": tmp_path})
    assert json.loads(path.read_text()) == {"x": 0.5, "n": None, "v": [0, 1], "p": str(tmp_path)}
    assert [file.name for file in tmp_path.iterdir()] == ["a.json"]
    with pytest.raises(TypeError):
        cohort.write_json(path, {"x": object()})
    assert json.loads(path.read_text())["x"] == 0.5


def test_source_key_follows_imports():
    assert imports("from . import names\nfrom ..cohort.images import x\nimport ctsma.cohort", "ctsma.cohort") == {
        "ctsma.cohort.names",
        "ctsma.cohort.images",
        "ctsma.cohort",
    }
    assert cohort.source_sha256("ctsma.cohort.manifest") != cohort.source_sha256("ctsma.cohort.names")


def test_results_carry_their_origin(tmp_path):
    path = cohort.write_results(tmp_path / "r.json", {"n_knees": 3}, {"profile": "tiny", "seed": 0})
    result = json.loads(path.read_text())
    assert {"schema_version", "profile", "seed", "git_commit", "packages", "n_knees"} <= set(result)
    assert result["packages"]["torch"].startswith("2.13.0")
    shutil.rmtree(tmp_path)


def test_a_replaced_image_without_checksum_is_a_changed_input(tmp_path):
    knees = pd.DataFrame([row("K1", "S1") | {"ct": "a.nii.gz", "ct_sha256": None}])
    for content in (b"one", None, b"longer"):
        if content:
            (tmp_path / "a.nii.gz").write_bytes(content)
        cohort.map_knees(rooted, knees, tmp_path, {"root": str(tmp_path)})
    assert calls(tmp_path) == ["K1", "K1"]
