"""Prediction: a model leaves a run whole and checked, reads anybody's CT, and says no with a reason."""

import json
import re
import shutil
import zlib
from pathlib import Path

import numpy as np
import pandas as pd
import pydicom
import pytest
import SimpleITK as sitk
from safetensors.numpy import load_file
from scipy import ndimage
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from ctsma import cli, cohort, patches, prediction, registration
from ctsma.cohort import BIOMARKERS, BONES, COMPARTMENTS, InputFault
from ctsma.diagnosis import compartment_means
from ctsma.distillation import cross_validate
from ctsma.prediction import export, folder, knee, limits
from ctsma.simulation import knees as simulated
from ctsma.simulation.protocol import draw_subjects, load_protocol
from ctsma.simulation.subject import make_subject

REPOSITORY = Path(__file__).parents[1]
ARM, N_KNEES = "ct_only", 6
TINY = {"epochs": 4, "widths": (4, 4, 8), "batch_size": 8, "precision": "float32", "learning_rate": 0.01}
ICC = {name: {"icc": 0.5, "ci_low": 0.4, "ci_high": 0.6} for name in (*BIOMARKERS, "mean")}
AUC = {"auc": 0.7, "ci_low": 0.6, "ci_high": 0.8}
OUTPUTS = {"biomarkers.csv", "patches.csv", "prediction.json", "report.html", "bones.nii.gz"}
OUTPUTS |= {f"{name}.nii.gz" for name in BIOMARKERS}


def simulated_ct(seed, field_mm, anatomy=None):
    """CT of one simulated knee, as the study simulates them, and its side."""
    protocol = load_protocol(None)
    row = draw_subjects(protocol, 1, seed).iloc[0].to_dict()
    streams = [seed, zlib.crc32(row["knee_id"].encode())]
    subject = make_subject(row, protocol, streams, anatomy)
    poses, grids = simulated.settings(subject, protocol, streams, ["ct"], field_mm)
    drawn = simulated.draw_scan("ct", protocol, streams)
    return simulated.scan(subject, poses["ct"], grids["ct"], "ct", drawn, np.random.default_rng(seed))[0], row["side"]


@pytest.fixture(scope="session")
def wide():
    """CT (HU, float32) of one knee with all its flesh, and its side."""
    image, side = simulated_ct(1, (140.0, 124.0, 78.0))
    return sitk.Cast(image, sitk.sitkFloat32), side


@pytest.fixture(scope="session")
def good(wide):
    """The same CT with the field of view of a knee."""
    size = np.array([190, 172, 112])
    first = (np.array(wide[0].GetSize()) - size) // 2
    return sitk.RegionOfInterest(wide[0], size.tolist(), first.tolist()), wide[1]


def changed(image, array=None, spacing=1.0):
    """The image with other values, or with its spacing and origin multiplied."""
    new = sitk.GetImageFromArray(np.asarray(sitk.GetArrayFromImage(image) if array is None else array, np.float32))
    new.CopyInformation(image)
    new.SetSpacing([mm * spacing for mm in image.GetSpacing()])
    new.SetOrigin([mm * spacing for mm in image.GetOrigin()])
    return new


@pytest.fixture(scope="session")
def run(good, tmp_path_factory):
    """Folder of a run with networks: six knees that are the one CT, brighter, noisier, larger or smaller."""
    path, (ct, side), rng = tmp_path_factory.mktemp("runs") / "small", good, np.random.default_rng(0)
    masks = registration.bone_masks(ct)
    for name in ("patches", "registration", "cohort", "notebooks", "results", "models"):
        (path / name).mkdir(parents=True)
    for number, (gain, size) in enumerate(
        zip(rng.uniform(0.85, 1.15, N_KNEES), rng.uniform(0.96, 1.04, N_KNEES), strict=True)
    ):
        hu = sitk.GetArrayViewFromImage(ct) * gain + rng.normal(0, 8, sitk.GetArrayViewFromImage(ct).shape)
        write_knee(path, f"k{number}", side, changed(ct, hu, size), changed(masks, None, size), rng)
    rows = [[f"k{n}", f"s{n}", side, f"k{n}_ct.nii.gz", n % 2] for n in range(N_KNEES)]
    table = pd.DataFrame(rows, columns=["knee_id", "subject_id", "side", "ct", "oa"])
    table = table.reindex(columns=(REPOSITORY / "data_manifest/example.csv").read_text().splitlines()[0].split(","))
    table.to_csv(path / "cohort" / "small.csv", index=False)
    splits = pd.DataFrame({"subject_id": table["subject_id"], "fold": np.arange(N_KNEES) // 3})
    splits.to_csv(path / "cohort" / "small_splits.csv", index=False)
    found = cross_validate(patches.load_patches(path / "patches"), splits, [ARM], TINY, [0], path / "models")
    found.to_csv(path / "models" / "predictions.csv", index=False)
    head = {"profile": "small", "seed": 0, "protocol_sha256": "a" * 64, "manifest_sha256": "b" * 64, "git_commit": "c"}
    for stage, numbers in {
        "cohort": {"manifest": "cohort/small.csv", "root": "cohort", "simulated": True},
        "agreement": {"icc": {ARM: ICC}, "ceiling": dict.fromkeys(BIOMARKERS, 0.9)},
        "diagnosis": {"auc": {ARM: AUC}, "comparators": {f"{ARM}, logistic": AUC}},
    }.items():
        cohort.write_json(path / "results" / f"{stage}.json", head | numbers)
    parameters = {"run_dir": str(path), "epochs": 4}
    notebook = {"metadata": {"papermill": {"parameters": parameters}}}
    cohort.write_json(path / "notebooks" / "03_distillation_training.ipynb", notebook)
    return path


def write_knee(path, name, side, ct, masks, rng):
    """What the study leaves of a knee: CT, bone labels, patches with biomarkers that the CT shows."""
    masks = sitk.Cast(masks, sitk.sitkUInt8)
    cohort.write_volume(ct, path / "cohort" / f"{name}_ct.nii.gz")
    cohort.write_volume(masks, path / "registration" / f"{name}_mask.nii.gz")
    table = patches.centres(masks, side, 4, rng)
    places = list(zip(table["compartment"].str.split("_").str[0], table[["x", "y", "z"]].to_numpy(), strict=True))
    voi = np.array([patches.trabecular_region(masks, bone, centre, side) for bone, centre in places])
    hu = np.array([patches.cut(ct, c, side, patches.CT_SHAPE, patches.CT_SPACING_MM) for _, c in places])
    mean = np.array([h[v[:, ::2, ::2]].mean() for h, v in zip(hu, voi, strict=True)])
    bv_tv = mean / 1200 + rng.normal(0, 0.02, len(mean))
    values = dict(zip(BIOMARKERS, (bv_tv, 0.2 + bv_tv / 3, 0.9 - bv_tv, 1 + bv_tv), strict=True))
    ids = {"knee_id": name, "subject_id": name.replace("k", "s"), "patch_id": np.arange(len(table))}
    values |= patches.cortex_hu(ct, masks)
    table.assign(**ids, **values, flag="").to_csv(path / "patches" / f"{name}_table.csv", index=False)
    mr = np.full(voi.shape, 500, np.float16)
    np.savez(path / "patches" / f"{name}.npz", mr=mr, ct=hu.astype(np.float16), voi=voi)


@pytest.fixture(scope="session")
def model(run, tmp_path_factory):
    """A model directory."""
    return prediction.export_model(run, tmp_path_factory.mktemp("models") / "small", ARM)


@pytest.fixture(scope="session")
def ensemble(model):
    return prediction.load_ensemble(model)


@pytest.fixture(scope="session")
def ct_file(good, tmp_path_factory):
    return cohort.write_volume(good[0], tmp_path_factory.mktemp("ct") / "knee.nii.gz")


@pytest.fixture(scope="session")
def known(good, ensemble):
    """What the good CT gives."""
    return prediction.predict_knee(*good, ensemble)


@pytest.fixture(scope="session")
def predicted(ct_file, good, model, tmp_path_factory):
    """Results of the good CT and of one that does not exist: folder and table."""
    out = tmp_path_factory.mktemp("out")
    cts = prediction.listed_cts([f"{ct_file}:{good[1]}", f"{ct_file.parent}/none.nii.gz:L"])
    return out, prediction.predict_cts(cts, model, out)


# ---------------------------------------------------------------- the model directory
def test_a_model_directory_holds_all_that_is_needed_and_nobody(model, run):
    about = prediction.read_about(model)
    networks = {f"{ARM}_fold{fold}_seed0{suffix}" for fold in (0, 1) for suffix in (".json", ".safetensors")}
    assert set(about["files"]) == networks | {"check.safetensors", "familiar.safetensors"}
    assert {file.name for file in model.iterdir()} == set(about["files"]) | {"model.json", "MODEL_CARD.md"}
    results = json.loads((run / "results" / "agreement.json").read_text())
    assert about["metrics"]["icc"] == results["icc"][ARM]
    assert all(about[name] == results[name] for name in ("protocol_sha256", "manifest_sha256", "git_commit"))
    assert about["splits_sha256"] == cohort.sha256_file(run / "cohort" / "small_splits.csv")
    texts = [file.read_text() for file in model.iterdir() if file.suffix in (".json", ".md")]
    assert not [text for text in texts if re.search(r'"s\d"|"k\d"', text) or str(run) in text]
    assert not list(model.parent.glob(".partial-*"))


def test_the_same_run_gives_the_same_bytes_again(model, run, tmp_path):
    again = Path(shutil.copytree(model, tmp_path / "again"))
    (again / "check.safetensors").write_bytes(b"")
    prediction.export_model(run, again, ARM)
    for file in model.iterdir():
        assert file.read_bytes() == (again / file.name).read_bytes(), file.name


def test_the_card_says_the_numbers_of_model_json(model):
    card, about = (model / "MODEL_CARD.md").read_text(), prediction.read_about(model)
    assert "{" not in card
    assert "**simulated**" in card
    assert "| BV/TV | 0.5 (0.4 to 0.6) | 0.9 |" in card
    assert "AUC 0.7 (0.6 to 0.8)" in card
    assert f"{about['intervals']['patch']['bv_tv']['radius']:.3g}" in card
    assert all(measure.label in card for measure in limits.MEASURES.values())


def test_export_refuses_what_it_cannot_export(run, tmp_path):
    with pytest.raises(InputFault, match="choose among ct_only"):
        prediction.export_model(run, tmp_path / "m", "ct_magic")
    with pytest.raises(InputFault, match="no network ct_only of seed 7"):
        prediction.export_model(run, tmp_path / "m", ARM, seed=7)
    with pytest.raises(InputFault, match="does not exist"):
        prediction.export_model(tmp_path, tmp_path / "m", ARM)
    with pytest.raises(InputFault, match="holds no model"):
        prediction.export_model(run, run, ARM)
    assert list(tmp_path.iterdir()) == []
    assert (run / "results").exists()


def spoil_model_json(folder, **changes):
    about = json.loads((folder / "model.json").read_text()) | changes
    (folder / "model.json").write_text(json.dumps(about))


def flip_byte(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def reseal(folder, **changes):
    """Change model.json or files the way a forger who renews the checksums would."""
    about = json.loads((folder / "model.json").read_text()) | changes
    about["files"] = {name: cohort.sha256_file(folder / name) for name in about["files"]}
    plain = {name: value for name, value in about.items() if name != "content_sha256"}
    cohort.write_json(folder / "model.json", plain | {"content_sha256": cohort.content_key(plain)})


def other_estimates(folder):
    record = json.loads((folder / f"{ARM}_fold0_seed0.json").read_text())
    record["scale"]["low"][0] += 0.1  # both: an estimate that is kept at either end moves too
    record["scale"]["high"][0] += 0.1
    cohort.write_json(folder / f"{ARM}_fold0_seed0.json", record)
    reseal(folder)


def other_architecture(folder):
    record = json.loads((folder / f"{ARM}_fold0_seed0.json").read_text())
    record["settings"]["widths"] = [8, 8, 8]
    cohort.write_json(folder / f"{ARM}_fold0_seed0.json", record)
    reseal(folder)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda f: shutil.rmtree(f), "holds no model"),
        (lambda f: (f / "model.json").write_text("{"), "is damaged"),
        (lambda f: (f / "model.json").write_text("[]"), "is damaged"),
        (lambda f: spoil_model_json(f, schema_version=2), "schema version 2"),
        (lambda f: spoil_model_json(f, git_commit="d"), "was changed since the export"),
        (lambda f: flip_byte(f / f"{ARM}_fold1_seed0.safetensors"), "differs from the checksum"),
        (lambda f: (f / "familiar.safetensors").unlink(), "is missing from the model"),
        (other_estimates, "away from those stored with it"),
        (other_architecture, "another architecture"),
    ],
)
def test_a_model_that_is_not_whole_is_refused(model, tmp_path, spoil, said):
    copy = Path(shutil.copytree(model, tmp_path / "copy"))
    spoil(copy)
    with pytest.raises(InputFault, match=said):
        prediction.load_ensemble(copy)


def test_the_estimate_is_the_mean_of_the_members_in_their_units(ensemble, run):
    data = patches.load_patches(run / "patches")
    ct, voi = data.ct[:5].astype(np.float32), data.voi[:5]
    ruler = patches.ruler_hu(data.table)
    alone = [prediction.estimate([member], ct, voi, ruler[:5]) for member in ensemble.members]
    np.testing.assert_allclose(
        prediction.estimate(ensemble.members, ct, voi, ruler[:5]), np.mean(alone, axis=0), rtol=1e-12
    )
    assert not np.allclose(*alone)
    # a member's own fold is predicted as it was in the study, where precision is float32 too
    record, rows = ensemble.members[0][1], pd.read_csv(run / "models" / "predictions.csv")
    known = rows[rows["fold"] == record["fold"]].head(3)
    own = known["patch_id"].to_numpy()
    found = prediction.estimate(ensemble.members[:1], data.ct[own].astype(np.float32), data.voi[own], ruler[own])
    np.testing.assert_allclose(found, known[list(BIOMARKERS)], rtol=1e-5)


# ---------------------------------------------------------------- calibration
def out_of_fold(n_knees=60, seed=0):
    rng = np.random.default_rng(seed)
    rows = [(f"k{k}", f"s{k}", p, c, k % 5) for k in range(n_knees) for p, c in enumerate(np.repeat(COMPARTMENTS, 4))]
    table = pd.DataFrame(rows, columns=["knee_id", "subject_id", "patch_id", "compartment", "fold"])
    for name in BIOMARKERS:
        table[f"{name}_reference"] = rng.normal(1, 0.2, len(table))
        table[name] = table[f"{name}_reference"] + rng.normal(0, 0.1, len(table))
    return table


def test_intervals_are_quantiles_of_residuals_and_cover():
    table = out_of_fold()
    found = export.intervals(table)
    for name in BIOMARKERS:
        radius = found["patch"][name]["radius"]
        # 1.645 SD of a normal error of 0.1; 960 residuals leave 4 %
        assert radius == pytest.approx(0.1645, rel=0.08)
        assert found["patch"][name]["coverage"] == pytest.approx(0.9, abs=0.03)
        # means of four errors: half as wide
        assert found["compartment"][name]["radius"] == pytest.approx(0.5 * radius, rel=0.2)
        assert found["compartment"][name]["n"] == 240
        fresh = out_of_fold(seed=9)
        assert (np.abs(fresh[name] - fresh[f"{name}_reference"]) <= radius).mean() == pytest.approx(0.9, abs=0.03)


def test_the_oa_model_is_the_studys_logistic_regression_in_plain_numbers():
    table = out_of_fold(30)
    manifest = pd.DataFrame(
        {"knee_id": [f"k{k}" for k in range(30)], "oa": [float(k % 2) for k in range(29)] + [np.nan]}
    )
    found = export.oa_model(table, manifest)
    assert (found["n_knees"], found["n_oa"]) == (29, 14)
    means = compartment_means(table).drop(columns="subject_id")
    steps = SimpleImputer(keep_empty_features=True), StandardScaler(), LogisticRegression()
    labelled = manifest.dropna().set_index("knee_id")["oa"]
    pipeline = make_pipeline(*steps).fit(means.loc[labelled.index].to_numpy(), labelled)
    row = {c: {b: means.loc["k29", f"{b}_{c}"] for b in BIOMARKERS} for c in COMPARTMENTS}
    row["femur_medial"] = dict.fromkeys(BIOMARKERS, np.nan)
    absent = means.loc[["k29"]].copy()
    absent[[f"{b}_femur_medial" for b in BIOMARKERS]] = np.nan
    wanted = pipeline.predict_proba(absent.to_numpy())[0, 1]
    assert knee.oa_probability(pd.DataFrame(row).T, found) == pytest.approx(wanted, rel=1e-12)
    assert export.oa_model(table, manifest.assign(oa=0.0)) is None


def tube(fwhm_mm, spacing_mm=0.4, noise=0.0):
    """Cortex of 1200 HU, 6 mm thick, around marrow of -50 HU in muscle of 50 HU, under a Gaussian blur."""
    y, x = (np.indices((200, 200)) - 99.5) * spacing_mm
    radius = np.hypot(y, x)
    hu = np.where(radius > 25, 50.0, np.where(radius > 19, 1200.0, -50.0))
    hu = ndimage.gaussian_filter(hu, fwhm_mm / 2.3548 / spacing_mm)
    stack = np.repeat(hu[None], 20, axis=0) + np.random.default_rng(0).normal(0, noise, (20, 200, 200))
    return stack, np.repeat((radius <= 25)[None], 20, axis=0), (0.6, spacing_mm, spacing_mm)


@pytest.mark.parametrize("fwhm_mm", [0.8, 1.2, 2.0])
def test_the_width_of_an_edge_is_that_of_its_blur(fwhm_mm):
    hu, bone, spacing = tube(fwhm_mm)
    # the disk's own staircase and linear interpolation widen it by a share of a 0.4 mm pixel
    assert limits.edge_width_mm(hu, bone, spacing) == pytest.approx(np.hypot(fwhm_mm, 0.4), rel=0.12)


def test_noise_is_measured_in_soft_tissue_alone():
    hu, _, _ = tube(1.0, noise=20.0)
    assert limits.noise_hu(hu) == pytest.approx(20, rel=0.03)
    assert np.isnan(limits.noise_hu(np.full((4, 5, 5), 900.0)))


def test_training_patches_are_familiar_and_others_are_not(run):
    data = patches.load_patches(run / "patches")
    ct, voi = data.ct.astype(np.float32), data.voi
    familiar = limits.familiar_of(ct, voi)
    assert np.median(familiar.distance(ct, voi)) == pytest.approx(
        0.7, abs=0.3
    )  # 1 with many more patches than features
    shuffled = np.random.default_rng(0).permuted(ct.reshape(len(ct), -1), axis=1).reshape(ct.shape)
    assert np.median(familiar.distance(shuffled, voi)) > 3 * np.median(familiar.distance(ct, voi))


def test_limits_warn_beyond_training_and_refuse_beyond_the_margin():
    table = pd.DataFrame({name: [1.0, 2.0] for name in limits.MEASURES})
    found = limits.limits_of(table)
    assert found["slice_mm"] == {"low": 1.0, "high": 2.0, "refuse_below": None, "refuse_above": 4.0}
    assert found["mean_hu"] == {"low": 1.0, "high": 2.0, "refuse_below": 0.0, "refuse_above": 3.0}
    assert limits.check_limits({"slice_mm": 2.0, "mean_hu": 1.5}, found) == []
    assert "slices (mm): 3, in training 1 to 2" in limits.check_limits({"slice_mm": 3.0}, found)[0]
    assert limits.check_limits({"slice_mm": 0.5}, found) == []  # finer than training is no fault
    for value in (4.1, np.nan):
        with pytest.raises(InputFault, match="not of the kind"):
            limits.check_limits({"slice_mm": value}, found)


# ---------------------------------------------------------------- one CT
def test_a_good_ct_gives_every_number_with_its_interval(known, ensemble):
    found = known
    assert found.compartments["n_patches"].min() >= 5
    usable, radii = found.patches[found.patches["flag"] == ""], ensemble.about["intervals"]
    for name in BIOMARKERS:
        radius = radii["patch"][name]["radius"]
        np.testing.assert_allclose(usable[f"{name}_high"] - usable[name], radius, rtol=1e-9)
        np.testing.assert_allclose(usable[f"{name}_low"], (usable[name] - radius).clip(lower=0), rtol=1e-9)
        means = usable.groupby("compartment")[name].mean()
        np.testing.assert_allclose(found.compartments[name], means[list(COMPARTMENTS)], rtol=1e-9)
        assert found.compartments[f"{name}_percentile"].between(0, 100).all()
    assert 0 < found.oa_probability < 1


def test_maps_hold_the_estimates_below_the_joint_and_zero_elsewhere(known):
    found = known
    usable = found.patches[found.patches["flag"] == ""]
    masks = sitk.GetArrayViewFromImage(found.masks)
    for name, image in prediction.biomarker_maps(found).items():
        values = sitk.GetArrayViewFromImage(image)
        inside = values != 0
        assert not (inside & (masks == 0)).any()
        assert usable[name].min() - 1e-6 <= values[inside].min() <= values[inside].max() <= usable[name].max() + 1e-6
        volume_cm3 = inside.sum() * np.prod(image.GetSpacing()) / 1000
        assert 8 < volume_cm3 < 80  # two bones, some 20 cm2 each, up to 9 mm deep
        # a map is the patches' average, so that it follows them
        at = [image.TransformPhysicalPointToIndex(point) for point in usable[["x", "y", "z"]].to_numpy().tolist()]
        shown = np.array([image[index] for index in at])
        kept = shown > 0
        assert np.corrcoef(shown[kept], usable[name][kept])[0, 1] > 0.7


def both_knees(image, side):
    """Both knees of a person: the CT and its mirror image beside it, air between; the right knee at low x."""
    array = sitk.GetArrayFromImage(image)
    gap = np.full((*array.shape[:2], 40), -1000, np.float32)
    parts = [array, gap, array[:, :, ::-1]]
    both = sitk.GetImageFromArray(np.concatenate(parts if side == "R" else parts[::-1], axis=2))
    both.SetSpacing(image.GetSpacing())
    both.SetOrigin(image.GetOrigin())
    return both


def test_orientation_and_field_of_view_change_nothing(good, wide, known, ensemble):
    ct, side = good
    wanted = known.compartments[list(BIOMARKERS)]
    turned = prediction.predict_knee(sitk.DICOMOrient(ct, "PIR"), side, ensemble).compartments[list(BIOMARKERS)]
    pd.testing.assert_frame_equal(wanted, turned, rtol=1e-5)
    whole = prediction.predict_knee(*wide, ensemble).compartments[list(BIOMARKERS)]
    pd.testing.assert_frame_equal(wanted, whole, rtol=0.02)  # another view moves a mask by a part of a voxel


def test_of_two_knees_the_one_of_the_side_is_read(wide, known, ensemble):
    both = both_knees(*wide)
    for side in ("L", "R"):  # one is the mirror image of the other
        found = prediction.predict_knee(both, side, ensemble).compartments[list(BIOMARKERS)]
        pd.testing.assert_frame_equal(known.compartments[list(BIOMARKERS)], found, rtol=0.02)


def soft(ct):
    return sitk.DiscreteGaussian(ct, [1.2, 1.2, 0])


def with_metal(ct):
    array = sitk.GetArrayFromImage(ct)
    middle = np.array(array.shape) // 2
    array[10:25, middle[1] - 4 : middle[1] + 4, middle[2] - 4 : middle[2] + 4] = 3071
    return changed(ct, array)


def upside_down(ct):
    return changed(ct, sitk.GetArrayFromImage(ct)[::-1])


def without_bone(ct):
    return changed(ct, sitk.GetArrayFromImage(ct).clip(max=150))


def half_a_knee(ct):
    return ct[:, :, : ct.GetSize()[2] // 3]


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda ct: sitk.BinShrink(ct, [1, 1, 5]), r"slices \(mm\): 3.12"),
        (lambda ct: sitk.BinShrink(ct, [3, 3, 2]), r"slices \(mm\): 1.35"),
        (soft, "width of bone edges"),
        (with_metal, "volume above 3000 HU.*without metal"),
        (lambda ct: changed(ct, spacing=0.6), "width of the femur.*knee joint"),
        (lambda ct: changed(ct, spacing=1.5), r"\(mm\)"),
        (lambda ct: changed(ct, sitk.GetArrayFromImage(ct) + 1024), "Hounsfield units"),
        (lambda ct: changed(ct, sitk.GetArrayFromImage(ct) * 1.6), "mean HU|volume above"),
        (
            lambda ct: changed(
                ct, np.random.default_rng(0).normal(0, 150, ct.GetSize()[::-1]) + sitk.GetArrayFromImage(ct)
            ),
            "noise|distance",
        ),
        (upside_down, "depth of the femur over"),
        (without_bone, "no bone above 250 HU"),
        (half_a_knee, "femur"),
    ],
)
def test_a_ct_it_was_not_trained_for_is_refused_with_the_reason(good, ensemble, spoil, said):
    with pytest.raises(InputFault, match=said):
        prediction.predict_knee(spoil(good[0]), good[1], ensemble)


def test_the_wrong_side_is_noticed_by_the_fibula(good):
    ct, side = good
    masks, other = registration.bone_masks(ct), {"L": "R", "R": "L"}[side]
    knee.check_side(ct, masks, side)
    with pytest.raises(InputFault, match=f"side: is {other}, but the fibula lies where a knee {side} has it"):
        knee.check_side(ct, masks, other)
    mirrored = [changed(image, sitk.GetArrayFromImage(image)[:, :, ::-1]) for image in (ct, masks)]
    knee.check_side(*mirrored, other)
    with pytest.raises(InputFault, match=f"side: is {side}, but the fibula lies where a knee {other} has it"):
        knee.check_side(*mirrored, side)
    alone = np.where(sitk.GetArrayFromImage(masks) > 0, sitk.GetArrayFromImage(ct), 40)  # no fibula: nothing to say
    knee.check_side(changed(ct, alone), masks, other)


# ---------------------------------------------------------------- many CTs, on disk
def test_results_are_whole_and_on_the_grid_of_the_ct(predicted, ct_file, good):
    out, table = predicted
    assert table["error"].tolist()[0] == ""
    assert "none.nii.gz: does not exist" in table["error"].tolist()[1]
    assert {path.name for path in out.iterdir()} == {"knee", "records", "predictions.csv"}
    assert {path.name for path in (out / "knee").iterdir()} == OUTPUTS
    for name in (*BIOMARKERS, "bones"):
        image = sitk.ReadImage(str(out / "knee" / f"{name}.nii.gz"))
        assert image.GetSize() == good[0].GetSize()
        np.testing.assert_allclose(image.GetOrigin(), good[0].GetOrigin(), atol=1e-4)
        np.testing.assert_allclose(image.GetDirection(), good[0].GetDirection(), atol=1e-6)
    bones = sitk.GetArrayFromImage(sitk.ReadImage(str(out / "knee" / "bones.nii.gz")))
    assert set(np.unique(bones)) == {0, *BONES.values()}
    numbers = json.loads((out / "knee" / "prediction.json").read_text())
    saved = pd.read_csv(out / "knee" / "biomarkers.csv", index_col="compartment")
    for place in COMPARTMENTS:
        assert numbers["compartments"][place]["bv_tv"] == saved.loc[place, "bv_tv"] == table.loc[0, f"bv_tv_{place}"]
    assert numbers["ct_sha256"] == cohort.sha256_file(ct_file)


def test_maps_keep_an_oblique_grid_in_another_order(good, ensemble):
    ct = sitk.DICOMOrient(good[0], "ASL")
    turn = sitk.Euler3DTransform()
    turn.SetRotation(0.02, 0.03, -0.02)
    direction = np.reshape(turn.GetMatrix(), (3, 3)) @ np.reshape(ct.GetDirection(), (3, 3))
    ct.SetDirection(direction.ravel())
    found = prediction.predict_knee(ct, good[1], ensemble)
    whole = folder.on_whole_grid(found.masks, ct)
    assert whole.GetSize() == ct.GetSize()
    point = np.array(ct.TransformIndexToPhysicalPoint([n // 2 for n in ct.GetSize()]))
    labels = sitk.GetArrayViewFromImage(whole)
    for index in np.argwhere(labels > 0)[::50_000].tolist():
        point = whole.TransformIndexToPhysicalPoint(index[::-1])
        assert found.masks[found.masks.TransformPhysicalPointToIndex(point)] == labels[tuple(index)]


def test_the_page_needs_nothing_from_elsewhere(predicted):
    page = (predicted[0] / "knee" / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 2
    assert not re.search(r"https?://|src='(?!data:)|<link|<script", page)
    for words in ("femur, medial", "Probability of osteoarthritis", "Not a medical device", "simulated knees"):
        assert words in page


def stamps(out):
    return {path: path.stat().st_mtime_ns for path in (out / "knee").iterdir()}


def test_a_second_call_leaves_right_results_alone_and_renews_others(predicted, ct_file, good, model, tmp_path):
    out = Path(shutil.copytree(predicted[0], tmp_path / "out"))
    cts, before = prediction.listed_cts([f"{ct_file}:{good[1]}"]), stamps(out)
    ct_file.touch()  # the content is the same
    again = prediction.predict_cts(cts, model, out)
    assert stamps(out) == before
    assert again.loc[0, "seconds"] == predicted[1].loc[0, "seconds"]
    (out / "knee" / "bv_tv.nii.gz").write_bytes(b"damaged")
    prediction.predict_cts(cts, model, out)
    assert sitk.ReadImage(str(out / "knee" / "bv_tv.nii.gz")).GetSize() == good[0].GetSize()
    truncated = tmp_path / "knee.nii.gz"
    truncated.write_bytes(ct_file.read_bytes()[:1000])
    table = prediction.predict_cts(prediction.listed_cts([str(truncated)], good[1]), model, out)
    assert "cannot be read" in table.loc[0, "error"]
    assert not (out / "knee").exists()  # nothing of the older CT stays under the new fault


def test_an_unfinished_write_leaves_nothing(ct_file, good, model, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(folder, "knee_page", full)
    table = prediction.predict_cts(prediction.listed_cts([f"{ct_file}:{good[1]}"]), model, tmp_path)
    assert "No space left on device" in table.loc[0, "error"]
    assert {path.name for path in tmp_path.iterdir()} == {"records", "predictions.csv"}


def test_sides_and_names_are_read_from_the_command(tmp_path):
    table = prediction.listed_cts(["a/ct.nii.gz:L", "b/ct.nii.gz", "b/my_knee.v2:R"], "R")
    assert table["side"].tolist() == ["L", "R", "R"]
    assert table["knee_id"].tolist() == ["a-ct", "b-ct", "b-my-knee"]
    for paths, side, said in (
        (["a.nii.gz"], None, "has no side"),
        (["a.nii.gz:L", "./a.nii.gz:L"], None, "hold one twice"),
    ):
        with pytest.raises(InputFault, match=said):
            prediction.listed_cts(paths, side)
    both = prediction.listed_cts(["legs.nii.gz:L", "legs.nii.gz:R"])
    assert both["knee_id"].nunique() == 2


def test_the_command_says_what_came_of_each_ct(predicted, ct_file, good, model, tmp_path, capsys):
    shutil.copytree(predicted[0], tmp_path / "out")
    common = ["--model", str(model), "--out", str(tmp_path / "out"), "--jobs", "1"]
    assert cli.main(["predict", f"{ct_file}:{good[1]}", *common]) == 0
    assert "report.html" in capsys.readouterr().out
    assert cli.main(["predict", str(tmp_path / "none.nii.gz"), "--side", "L", *common]) == 1
    assert "does not exist" in capsys.readouterr().out
    for arguments, said in {
        ("predict", str(ct_file), *common): "has no side",
        ("predict", *common): "takes CTs or a manifest",
        ("predict", f"{ct_file}:L", "--model", str(tmp_path), "--out", str(tmp_path)): "holds no model",
        ("predict", f"{ct_file}:L", "--model", str(model), "--out", str(ct_file)): "cannot be made a folder",
    }.items():
        assert cli.main(arguments) == 2
        assert said in capsys.readouterr().err


def test_the_cts_of_a_manifest_are_read_and_their_checksums_kept(ct_file, good, model, tmp_path):
    header = (REPOSITORY / "data_manifest" / "example.csv").read_text().splitlines()[0].split(",")
    rows = [{"knee_id": "one", "subject_id": "a", "side": good[1], "ct": ct_file.name, "ct_sha256": "ab" * 32}]
    rows.append({"knee_id": "two", "subject_id": "b", "side": good[1], "mr": "mr.nii.gz"})  # no CT: not listed
    pd.DataFrame(rows).reindex(columns=header).to_csv(tmp_path / "own.csv", index=False)
    cts = prediction.manifest_cts(tmp_path / "own.csv", ct_file.parent)
    assert cts[["knee_id", "side", "ct"]].to_numpy().tolist() == [["one", good[1], str(ct_file)]]
    table = prediction.predict_cts(cts, model, tmp_path / "out")
    assert "differs from ct_sha256" in table.loc[0, "error"]
    assert not (tmp_path / "out" / "one").exists()


def dicom_series(image, path, **tags):
    """Write a CT as one axial DICOM series of 16-bit slices."""
    path.mkdir()
    array = np.rint(sitk.GetArrayFromImage(image)).astype(np.int16)
    (dx, dy, _), (x, y, z), depth = image.GetSpacing(), image.GetOrigin(), image.GetSpacing()[2]
    for number, pixels in enumerate(array):
        data = pydicom.Dataset()
        data.file_meta = pydicom.dataset.FileMetaDataset()
        data.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
        data.SOPClassUID = data.file_meta.MediaStorageSOPClassUID = pydicom.uid.CTImageStorage
        data.SOPInstanceUID = data.file_meta.MediaStorageSOPInstanceUID = f"1.2.3.{number + 1}"
        data.SeriesInstanceUID, data.StudyInstanceUID, data.Modality = "1.2.3", "1.2", "CT"
        data.PatientName, data.SliceThickness, data.InstanceNumber = "Doe^Jane", depth, number + 1
        data.Rows, data.Columns, data.PixelSpacing = *pixels.shape, [dy, dx]
        data.ImageOrientationPatient, data.ImagePositionPatient = [1, 0, 0, 0, 1, 0], [x, y, z + depth * number]
        data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
        data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 16, 16, 15, 1
        data.RescaleSlope, data.RescaleIntercept = 1, -1024
        for tag, value in tags.items():
            setattr(data, tag, value)
        data.PixelData = (pixels + 1024).tobytes()
        data.save_as(path / f"{number:04d}.dcm", enforce_file_format=True)
    return path


def test_a_dicom_folder_gives_what_the_nifti_file_gives_and_nobodys_name(predicted, good, model, tmp_path):
    series = dicom_series(good[0], tmp_path / "series")
    thick = dicom_series(good[0][:, :, ::1], tmp_path / "thick", SliceThickness=3.0)
    cts = prediction.listed_cts([str(series), str(thick)], good[1])
    table = prediction.predict_cts(cts, model, tmp_path / "out")
    columns = [f"{b}_{c}" for b in BIOMARKERS for c in COMPARTMENTS]
    np.testing.assert_allclose(
        table.loc[0, columns].astype(float), predicted[1].loc[0, columns].astype(float), rtol=1e-3
    )
    assert "slices (mm): 3," in table.loc[1, "error"]  # slices that overlap are still thick
    for file in (tmp_path / "out").rglob("*.*"):
        assert b"Doe^" not in file.read_bytes(), file


def test_the_real_knee_becomes_a_ct_and_is_read_as_dicom(real_data, model, tmp_path):
    image, side = simulated_ct(1, (92.0, 84.0, 72.0), real_data / "knee_labels.nrrd")
    series = dicom_series(sitk.Cast(image, sitk.sitkFloat32), tmp_path / "series")
    table = prediction.predict_cts(prediction.listed_cts([str(series)], side), model, tmp_path / "out")
    assert table.loc[0, "error"] == ""
    assert table.loc[0, "n_patches"] >= 20
    assert np.isfinite(table.loc[0, [f"bv_tv_{c}" for c in COMPARTMENTS]].astype(float)).all()


# ---------------------------------------------------------------- the model that comes along
SHIPPED = sorted(path.parent for path in REPOSITORY.glob("models/*/model.json"))


@pytest.fixture(params=SHIPPED or [None], ids=lambda path: path.name if path else "none")
def shipped(request):
    if request.param is None:
        pytest.skip("models/ holds no model yet: ctsma export-model --name quick --out models/quick")
    return request.param


def test_the_shipped_model_is_the_one_reported(shipped):
    about = prediction.read_about(shipped)
    results = REPOSITORY / "docs" / "results" / about["profile"]
    agreement, diagnosis = (json.loads((results / f"{name}.json").read_text()) for name in ("agreement", "diagnosis"))
    for name in ("profile", "seed", "protocol_sha256", "manifest_sha256", "git_commit"):
        assert about[name] == agreement[name] == diagnosis[name], name
    assert about["metrics"]["icc"] == agreement["icc"][about["arm"]]
    assert about["metrics"]["ceiling"] == agreement["ceiling"]
    assert about["metrics"]["auc"] == diagnosis["auc"][about["arm"]]
    assert about["metrics"]["oa_auc"] == diagnosis["comparators"][f"{about['arm']}, logistic"]
    for name in about["members"]:
        record = json.loads((shipped / f"{name}.json").read_text())
        assert (record["arm"], record["protocol_sha256"]) == (about["arm"], about["protocol_sha256"])
    assert (shipped / "MODEL_CARD.md").read_text() == export.model_card(about)


def test_the_shipped_model_reproduces_what_is_stored_with_it(shipped):
    ensemble, check = prediction.load_ensemble(shipped), load_file(shipped / "check.safetensors")
    found = prediction.estimate(ensemble.members, check["ct"].astype(np.float32), check["voi"], check["ruler_hu"])
    np.testing.assert_allclose(found, check["estimate"], rtol=1e-4)


def test_the_shipped_model_is_small_and_holds_no_pickle(shipped):
    assert sum(file.stat().st_size for file in shipped.iterdir()) < 8e6
    assert {file.suffix for file in shipped.iterdir()} == {".json", ".safetensors", ".md"}


def test_the_shipped_model_reads_a_simulated_knee(shipped, good):
    found = prediction.predict_knee(*good, prediction.load_ensemble(shipped))
    assert found.compartments["n_patches"].min() > 0
    assert found.compartments["bv_tv"].between(0.1, 0.6).all()  # the range of the simulated cohort
