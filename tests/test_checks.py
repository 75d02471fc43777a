"""Checks of whole knees: sides, two knees in one CT, wrong pairs; and patches of a CT alone."""

import shutil

import numpy as np
import pandas as pd
import pytest
import SimpleITK as sitk
from dicom_export import write_series

from ctsma import cohort, patches
from ctsma.common import COMPARTMENTS, InputError
from ctsma.registration import bone_masks
from ctsma_lab import cli
from dicom_import import import_dicom
from dicom_import.checks import check_knees
from dicom_import.sides import side_of, split_knees
from kneesim import write_cohort

FIELD_MM = (96.0, 70.0, 62.0)  # a small knee: both plateaus, the head of the fibula


@pytest.fixture(scope="module")
def knee(tmp_path_factory):
    """Manifest (one row) of a simulated knee with CT and MR, small field of view."""
    root = tmp_path_factory.mktemp("knee")
    return cohort.read_manifest(write_cohort(root, "one", 1, 3, FIELD_MM))


@pytest.fixture(scope="module")
def ct(knee):
    return cohort.read_knee_volume(knee.iloc[0], "ct", knee.attrs["root"])


def mirrored(image):
    """The other knee: left and right are exchanged."""
    array = sitk.GetArrayFromImage(sitk.DICOMOrient(image, "LPS"))[:, :, ::-1]
    flipped = sitk.GetImageFromArray(np.ascontiguousarray(array))
    flipped.CopyInformation(sitk.DICOMOrient(image, "LPS"))
    return flipped


def beside(right, left, gap_mm):
    """One CT of two knees: the right at -x, then fat, then the left."""
    parts = [sitk.DICOMOrient(image, "LPS") for image in (right, left)]
    arrays = [sitk.GetArrayFromImage(part) for part in parts]
    width = round(gap_mm / parts[0].GetSpacing()[0])
    strip = np.full((*arrays[0].shape[:2], width), -100.0, np.float32)
    both = sitk.GetImageFromArray(np.concatenate([arrays[0], strip, arrays[1]], axis=2))
    both.SetSpacing(parts[0].GetSpacing())
    both.SetOrigin(parts[0].GetOrigin())
    return both


# ---------------------------------------------------------------- two knees, sides
def test_two_knees_are_split_and_the_patients_right_is_at_minus_x(tmp_path, knee, ct):
    is_right = knee["side"].iloc[0] == "R"
    right, left = (ct, mirrored(ct)) if is_right else (mirrored(ct), ct)
    export = sitk.Cast(sitk.BinShrink(beside(right, left, 30.0), [2, 2, 1]), sitk.sitkInt16)
    tags = {"Laterality": None, "SeriesDescription": "both knees"}
    write_series(tmp_path / "export", export, **tags)
    done = import_dicom(tmp_path / "export", tmp_path / "cohort", salt_file=tmp_path / "salt")
    assert list(done.table["status"]) == ["imported"], list(done.table["note"])
    manifest = cohort.read_manifest(done.manifest)
    assert list(manifest["side"]) == ["L", "R"]
    assert manifest["subject_id"].nunique() == 1
    findings = check_knees(manifest)
    assert not findings["level"].eq("fatal").any(), list(findings["finding"])


@pytest.mark.slow  # simulated knees have a fibula too, see below
def test_the_fibula_of_a_real_right_knee_gives_its_side(real_data):
    labels = sitk.ReadImage(str(real_data / "knee_labels.nrrd"))
    array = sitk.GetArrayFromImage(labels)
    hu = np.where(np.isin(array, (5, 6, 7, 8)), 700.0, -60.0).astype(np.float32)
    bones = sitk.GetImageFromArray(hu)
    masks = sitk.GetImageFromArray(((array == 5) + 2 * (array == 6)).astype(np.uint8))
    for image in (bones, masks):
        image.CopyInformation(labels)
    assert side_of(bones, masks) == "R"
    assert side_of(mirrored(bones), mirrored(masks)) == "L"


def test_knees_that_touch_are_refused(ct):
    near = sitk.DICOMOrient(ct, "LPS")[25:-25, :, :]  # without 11 mm of soft tissue at each side
    with pytest.raises(InputError, match="too broad for one knee, and no gap"):
        split_knees(beside(near, mirrored(near), 0.0))
    assert list(split_knees(ct)) == [""]


# ---------------------------------------------------------------- check_knees
def test_a_good_pair_has_no_finding_a_page_and_its_side_is_found(knee, ct, tmp_path):
    findings = check_knees(knee, pages=tmp_path)
    assert list(findings["level"]) == ["good", "good"], list(findings["finding"])
    knee_id = knee["knee_id"].iloc[0]
    page = (tmp_path / f"{knee_id}.html").read_text()
    assert "passed the failure detection" in page and f"images/{knee_id}_mr.webp" in page
    images = sum(file.stat().st_size for file in (tmp_path / "images").iterdir())
    assert images + len(page) < 60_000
    assert f'href="{knee_id}.html"' in (tmp_path / "index.html").read_text()
    masks = bone_masks(ct)
    assert side_of(ct, masks) == knee["side"].iloc[0]
    assert side_of(ct, masks * 0) == ""  # without a tibia there is no side


def test_a_wrong_side_and_an_mr_of_another_knee_are_fatal(knee, tmp_path):
    shutil.copytree(knee.attrs["root"], tmp_path / "c")
    mr = cohort.read_knee_volume(knee.iloc[0], "mr", knee.attrs["root"])
    cohort.write_volume(mirrored(mr), tmp_path / "c" / "images" / "other.nii.gz")
    other_side = {"L": "R", "R": "L"}[knee["side"].iloc[0]]
    wrong = knee.assign(side=other_side, mr="images/other.nii.gz", mr_sha256="")
    wrong.to_csv(tmp_path / "c" / "wrong.csv", index=False)
    progress = []
    manifest = cohort.read_manifest(tmp_path / "c" / "wrong.csv")
    findings = check_knees(manifest, report=lambda line, done, total: progress.append(line))
    fatal = set(findings.loc[findings["level"] == "fatal", "check"])
    assert {"side", "pair"} <= fatal, list(findings["finding"])
    n = int((findings["level"] != "good").sum())
    assert progress == [f"check 1/1 {knee['knee_id'].iloc[0]}: {n} findings"]


def test_check_data_writes_its_table_and_exits_with_1_when_fatal(knee, tmp_path, capsys):
    path = knee.attrs["path"]
    assert cli.main(["check-data", path, "--quick", "--out", str(tmp_path / "found.csv")]) == 0
    assert list(pd.read_csv(tmp_path / "found.csv")["level"]) == ["good", "good"]
    pd.read_csv(path).assign(ct_sha256="f" * 64).to_csv(tmp_path / "wrong.csv", index=False)
    arguments = [str(tmp_path / "wrong.csv"), "--root", knee.attrs["root"], "--quick"]
    assert cli.main(["check-data", *arguments]) == 1
    assert "differs from ct_sha256" in capsys.readouterr().out
    assert cli.main(["check-data", *arguments, "--report", str(tmp_path / "pages")]) == 2
    assert "--report: needs the registration that --quick leaves out" in capsys.readouterr().err


def findings_of(knee, folder, image, **columns):
    """Findings of the knee's row with another CT, without MR."""
    cohort.write_volume(image, folder / "ct.nii.gz")
    columns = {"ct": "ct.nii.gz", "ct_sha256": "", "mr": None, "mr_sha256": ""} | columns
    knee.assign(**columns).to_csv(folder / "one.csv", index=False)
    findings = check_knees(cohort.read_manifest(folder / "one.csv"))
    return findings[findings["level"] != "good"]


def test_a_field_of_view_that_ends_in_the_knee_is_found(knee, ct, tmp_path):
    ct = sitk.DICOMOrient(ct, "LPS")
    width, depth, _ = ct.GetSize()
    for half in (ct[: width // 2], ct[width // 2 :]):
        found = findings_of(knee, tmp_path, half)
        assert found["level"].tolist() == ["fatal"]
        assert "no notch between two condyles" in found["finding"].iloc[0]
    found = findings_of(knee, tmp_path, ct[: int(0.8 * width)])
    assert found["level"].tolist() == ["warning"]
    assert "ends in bone at the patient's left over" in found["finding"].iloc[0]
    found = findings_of(knee, tmp_path, ct[:, depth // 2 :])
    assert "bearing surface ends 0.0 mm from the front of the image" in found["finding"].iloc[0]


def test_own_labels_are_used_where_no_threshold_separates_the_bones(knee, ct, tmp_path):
    masks = bone_masks(ct)
    array, labels = (sitk.GetArrayFromImage(image) for image in (ct, masks))
    rows = np.flatnonzero((labels == 2).any(axis=(1, 2)))
    cast = array.copy()
    cast[rows[-1] - 20 : rows[-1] + 30] = np.maximum(cast[rows[-1] - 20 : rows[-1] + 30], 300)
    image = sitk.GetImageFromArray(cast)
    image.CopyInformation(ct)
    found = findings_of(knee, tmp_path, image)
    assert "column ct_labels" in " ".join(found["finding"])
    cohort.write_volume(masks, tmp_path / "labels.nii.gz")
    found = findings_of(knee, tmp_path, image, ct_labels="labels.nii.gz")
    assert found.empty, list(found["finding"])
    (tmp_path / "labels.nii.gz").write_text("no image")
    found = findings_of(knee, tmp_path, image, ct_labels="labels.nii.gz")
    assert "labels.nii.gz: cannot be read" in found["finding"].iloc[0]


# ---------------------------------------------------------------- CT alone
def test_a_knee_with_ct_alone_is_cut_where_a_paired_one_is(knee, tmp_path):
    row = knee.iloc[0].to_dict() | {"mr": None}
    options = {"root": knee.attrs["root"], "n_per_compartment": 2, "seed": 0}
    (tmp_path / "ct_only").mkdir()
    outcome = patches.extract_ct_patches(row, tmp_path / "ct_only", **options)
    table = patches.collect_tables(tmp_path / "ct_only", [row["knee_id"]])
    table.to_csv(tmp_path / "ct_only.csv", index=False)
    found = patches.load_ct_only_patches(tmp_path)
    assert len(found.table) == outcome["n_patches"] - outcome["n_flagged"] > 0
    assert set(found.table["compartment"]) <= set(COMPARTMENTS)
    assert np.isfinite(found.ct).all()
    assert found.voi[:].mean(axis=(1, 2, 3)).min() >= patches.MIN_VOI
    assert not found.mr.any()
