"""Prediction: a run gives a model directory, which reads any CT of a knee or says why it cannot."""

import json
import re
import shutil
import zlib
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import SimpleITK as sitk
from dicom_export import write_series
from safetensors.numpy import load_file
from scipy import ndimage
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from ctsma import patches
from ctsma.cache import content_hash
from ctsma.cohort import write_volume
from ctsma.common import BIOMARKERS, BONES, COMPARTMENTS, InputError
from ctsma.diagnosis import compartment_means
from ctsma.distillation import cross_validate, mean_over_seeds, with_reference
from ctsma.files import sha256_file, write_json
from ctsma.registration import bone_masks
from ctsma_lab import cli
from ctsma_predict import folder, knee, limits
from ctsma_predict import model as model_directory
from ctsma_predict.folder import listed_cts, manifest_cts, predict_cts
from ctsma_predict.knee import biomarker_maps, predict_knee
from ctsma_predict.model import estimate, export_model, load_ensemble, read_about
from kneesim import knees as simulated
from kneesim.protocol import draw_subjects, load_protocol
from kneesim.subject import make_subject

REPOSITORY = Path(__file__).parents[1]
HEADER = (REPOSITORY / "data_manifest/example.csv").read_text().splitlines()[0].split(",")
ARM, N_KNEES = "ct_only", 6
TINY = {
    "epochs": 4,
    "widths": (4, 4, 8),
    "batch_size": 8,
    "precision": "float32",
    "learning_rate": 0.01,
}
ICC = {name: {"icc": 0.5, "ci_low": 0.4, "ci_high": 0.6} for name in (*BIOMARKERS, "mean")}
AUC = {"auc": 0.7, "ci_low": 0.6, "ci_high": 0.8}
OUTPUTS = {"biomarkers.csv", "patches.csv", "prediction.json", "report.html"}
OUTPUTS |= {f"{name}.nii.gz" for name in (*BIOMARKERS, "bones", "joint")}


def simulated_ct(seed, field_mm, anatomy=None):
    """CT of one simulated knee, as the study simulates them, and its side."""
    protocol = load_protocol(None)
    row = draw_subjects(protocol, 1, seed).iloc[0].to_dict()
    streams = [seed, zlib.crc32(row["knee_id"].encode())]
    subject = make_subject(row, protocol, streams, anatomy)
    poses, grids = simulated.settings(subject, protocol, streams, ["ct"], field_mm)
    drawn = simulated.draw_scan("ct", protocol, streams)
    rng = np.random.default_rng(seed)
    ct, _ = simulated.scan(subject, poses["ct"], grids["ct"], "ct", drawn, rng)
    return ct, row["side"]


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
    array = sitk.GetArrayFromImage(image) if array is None else array
    new = sitk.GetImageFromArray(np.asarray(array, np.float32))
    new.CopyInformation(image)
    new.SetSpacing([mm * spacing for mm in image.GetSpacing()])
    new.SetOrigin([mm * spacing for mm in image.GetOrigin()])
    return new


@pytest.fixture(scope="session")
def run(good, tmp_path_factory):
    """Folder of a run with networks; its knees are one CT, brighter, noisier, of another size."""
    path, (ct, side), rng = (
        tmp_path_factory.mktemp("runs") / "small",
        good,
        np.random.default_rng(0),
    )
    masks, array = bone_masks(ct), sitk.GetArrayViewFromImage(ct)
    for name in ("patches", "registration", "cohort", "results", "models"):
        (path / name).mkdir(parents=True)
    gains, sizes = rng.uniform(0.85, 1.15, N_KNEES), rng.uniform(0.96, 1.04, N_KNEES)
    for number in range(N_KNEES):
        hu, size = array * gains[number] + rng.normal(0, 8, array.shape), sizes[number]
        write_knee(path, f"k{number}", side, changed(ct, hu, size), changed(masks, None, size), rng)
    knee_ids = [f"k{number}" for number in range(N_KNEES)]
    table = patches.collect_tables(path / "patches", knee_ids)
    table.to_csv(path / "patches" / "patches.csv", index=False)
    rows = [[f"k{n}", f"s{n}", side, f"k{n}_ct.nii.gz", n % 2] for n in range(N_KNEES)]
    knees = pd.DataFrame(rows, columns=["knee_id", "subject_id", "side", "ct", "oa"])
    knees.reindex(columns=HEADER).to_csv(path / "cohort" / "small.csv", index=False)
    splits = pd.DataFrame({"subject_id": knees["subject_id"], "fold": np.arange(N_KNEES) // 3})
    splits.to_csv(path / "cohort" / "small_splits.csv", index=False)
    data = patches.load_patches(path / "patches")
    found = cross_validate(data, splits, [ARM], TINY, [0], path / "models")
    predictions = with_reference(mean_over_seeds(found), table)
    predictions.to_csv(path / "models" / "predictions.csv", index=False)
    head = {"profile": "small", "seed": 0, "protocol_sha256": "a" * 64, "manifest_sha256": "b" * 64}
    head |= {"git_commit": "c", "packages": {"numpy": "2"}}
    for stage, numbers in {
        "cohort": {"manifest": "cohort/small.csv", "root": "cohort", "simulated": True},
        "agreement": {"icc": {ARM: ICC}, "ceiling": dict.fromkeys(BIOMARKERS, 0.9)},
        "diagnosis": {"auc": {ARM: AUC}, "comparators": {f"{ARM}, logistic": AUC}},
    }.items():
        write_json(path / "results" / f"{stage}.json", head | numbers)
    return path


def write_knee(path, name, side, ct, masks, rng):
    """Files of one knee in a run: CT, bone labels, patches with biomarkers that the CT shows."""
    masks = sitk.Cast(masks, sitk.sitkUInt8)
    write_volume(sitk.Cast(sitk.Round(ct), sitk.sitkInt16), path / "cohort" / f"{name}_ct.nii.gz")
    write_volume(masks, path / "registration" / f"{name}_mask.nii.gz")
    table = patches.patch_centres(masks, side, 4, rng)
    bones, centres = table["compartment"].str.split("_").str[0], table[["x", "y", "z"]].to_numpy()
    shape, spacing = patches.CT_SHAPE, patches.CT_SPACING_MM
    hu = np.array([patches.sample_patch(ct, centre, side, shape, spacing) for centre in centres])
    voi = np.array(
        [
            patches.trabecular_mask(masks, bone, centre, side)
            for bone, centre in zip(bones, centres, strict=True)
        ]
    )
    mean = np.array([h[v[:, ::2, ::2]].mean() for h, v in zip(hu, voi, strict=True)])
    bv_tv = mean / 1200 + rng.normal(0, 0.02, len(mean))
    values = dict(zip(BIOMARKERS, (bv_tv, 0.2 + bv_tv / 3, 0.9 - bv_tv, 1 + bv_tv), strict=True))
    table.insert(0, "patch_id", np.arange(len(table)))
    table.insert(0, "subject_id", name.replace("k", "s"))
    table.insert(0, "knee_id", name)
    table = table.assign(**values, **patches.cortical_hu(ct, masks), mean_hu=mean, flag="")
    table.to_csv(path / "patches" / f"{name}_table.csv", index=False)
    mr = np.full(voi.shape, 500, np.float16)
    np.savez(path / "patches" / f"{name}.npz", mr=mr, ct=hu.astype(np.float16), voi=voi)


@pytest.fixture(scope="session")
def model(run, tmp_path_factory):
    """A model directory."""
    return export_model(run, tmp_path_factory.mktemp("models") / "small", ARM)


@pytest.fixture(scope="session")
def ensemble(model):
    return load_ensemble(model)


@pytest.fixture(scope="session")
def ct_file(good, tmp_path_factory):
    return write_volume(good[0], tmp_path_factory.mktemp("ct") / "knee.nii.gz")


@pytest.fixture(scope="session")
def good_knee(good, ensemble):
    """What the good CT gives."""
    return predict_knee(*good, ensemble)


@pytest.fixture(scope="session")
def predicted(ct_file, good, model, tmp_path_factory):
    """Results of the good CT and of one that does not exist: folder and table."""
    out = tmp_path_factory.mktemp("out")
    cts = listed_cts([f"{ct_file}:{good[1]}", f"{ct_file.parent}/none.nii.gz:L"])
    return out, predict_cts(cts, model, out)


# ---------------------------------------------------------------- the model directory
def test_a_model_directory_is_complete_reproducible_and_names_no_subject(model, run, tmp_path):
    about = read_about(model)
    networks = {
        f"{ARM}_fold{fold}_seed0{end}" for fold in (0, 1) for end in (".json", ".safetensors")
    }
    assert set(about["files"]) == networks | {
        "check.safetensors",
        "out_of_distribution.safetensors",
    }
    assert {f.name for f in model.iterdir()} == {*about["files"], "model.json", "MODEL_CARD.md"}
    results = json.loads((run / "results" / "agreement.json").read_text())
    assert about["metrics"]["icc"] == results["icc"][ARM]
    for name in ("protocol_sha256", "manifest_sha256", "git_commit"):
        assert about[name] == results[name]
    assert about["splits_sha256"] == sha256_file(run / "cohort" / "small_splits.csv")
    assert about["settings"]["epochs"] == TINY["epochs"]
    texts = [file.read_text() for file in model.iterdir() if file.suffix in (".json", ".md")]
    assert not [text for text in texts if re.search(r'"s\d"|"k\d"', text) or str(run) in text]
    assert {file.stat().st_mode & 0o777 for file in model.iterdir()} == {0o644}
    assert not list(model.parent.glob(".partial-*"))

    again = Path(shutil.copytree(model, tmp_path / "again"))
    (again / "check.safetensors").write_bytes(b"")
    export_model(run, again, ARM)
    for file in model.iterdir():
        assert file.read_bytes() == (again / file.name).read_bytes(), file.name


def test_the_card_states_the_numbers_of_model_json(model):
    card, about = (model / "MODEL_CARD.md").read_text(), read_about(model)
    assert "{" not in card
    assert "**simulated**" in card
    assert "| BV/TV | 0.5 (0.4 to 0.6) | 0.9 |" in card
    assert "AUC of 0.7 (0.6 to 0.8)" in card
    assert f"{about['intervals']['patch']['bv_tv']['radius']:.3g}" in card
    assert all(f"| {measure['label']} |" in card for measure in limits.MEASURES.values())


def test_export_refuses_what_it_cannot_export(run, tmp_path):
    with pytest.raises(InputError, match="choose among ct_only"):
        export_model(run, tmp_path / "m", "ct_magic")
    with pytest.raises(InputError, match="no network ct_only of seed 7"):
        export_model(run, tmp_path / "m", ARM, seed=7)
    with pytest.raises(InputError, match="does not exist"):
        export_model(tmp_path, tmp_path / "m", ARM)
    with pytest.raises(InputError, match="holds no model"):
        export_model(run, run, ARM)
    assert list(tmp_path.iterdir()) == []
    assert (run / "results").exists()


def change_json(file, change):
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def flip_byte(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def forge(path, change):
    """Change the record of a network and renew all checksums."""
    change_json(path / f"{ARM}_fold0_seed0.json", change)
    about = json.loads((path / "model.json").read_text())
    del about["content_sha256"]
    about["files"] = {name: sha256_file(path / name) for name in about["files"]}
    write_json(path / "model.json", about | {"content_sha256": content_hash(about)})


def other_scale(record):
    record["scale"]["low"][0] += 0.1  # both ends: an estimate that is clipped at either moves too
    record["scale"]["high"][0] += 0.1


def other_widths(record):
    record["settings"]["widths"] = [8, 8, 8]


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda p: shutil.rmtree(p), "holds no model"),
        (lambda p: (p / "model.json").write_text("{"), "is damaged"),
        (lambda p: (p / "model.json").write_text("[]"), "is damaged"),
        (
            lambda p: change_json(p / "model.json", lambda about: about.update(schema_version=1)),
            "schema version 1",
        ),
        (
            lambda p: change_json(p / "model.json", lambda about: about.update(git_commit="d")),
            "was changed since the export",
        ),
        (lambda p: flip_byte(p / f"{ARM}_fold1_seed0.safetensors"), "differs from its checksum"),
        (lambda p: (p / "out_of_distribution.safetensors").unlink(), "is missing or differs"),
        (lambda p: forge(p, other_scale), "away from those stored with it"),
        (lambda p: forge(p, other_widths), "another architecture"),
    ],
)
def test_a_damaged_or_changed_model_is_refused(model, tmp_path, damage, reason):
    copy = Path(shutil.copytree(model, tmp_path / "copy"))
    damage(copy)
    with pytest.raises(InputError, match=reason):
        load_ensemble(copy)


def test_the_estimate_is_the_mean_of_the_members_in_their_units(ensemble, run):
    data = patches.load_patches(run / "patches")
    ct, voi = data.ct[:].astype(np.float32), data.voi[:]
    cortical_hu = patches.mean_cortical_hu(data.table)
    first = ct[:5], voi[:5], cortical_hu[:5]
    alone = [estimate([member], *first) for member in ensemble.members]
    together = estimate(ensemble.members, *first)
    np.testing.assert_allclose(together, np.mean(alone, axis=0), rtol=1e-12)
    assert not np.allclose(*alone)
    # a member predicts its own test fold as it did in the study, which computed in float32 too
    record, predictions = ensemble.members[0][1], pd.read_csv(run / "models" / "predictions.csv")
    wanted = predictions[predictions["fold"] == record["fold"]].head(3)
    keys = list(zip(data.table["knee_id"], data.table["patch_id"], strict=True))
    rows = [keys.index(key) for key in zip(wanted["knee_id"], wanted["patch_id"], strict=True)]
    found = estimate(ensemble.members[:1], ct[rows], voi[rows], cortical_hu[rows])
    np.testing.assert_allclose(found, wanted[list(BIOMARKERS)], rtol=1e-5)


# ---------------------------------------------------------------- calibration
def out_of_fold(n_knees=60, seed=0):
    rng = np.random.default_rng(seed)
    places = np.repeat(COMPARTMENTS, 4)
    rows = [(f"k{k}", f"s{k}", p, c, k % 5) for k in range(n_knees) for p, c in enumerate(places)]
    columns = ["knee_id", "subject_id", "patch_id", "compartment", "fold"]
    table = pd.DataFrame(rows, columns=columns)
    for name in BIOMARKERS:
        table[f"{name}_reference"] = rng.normal(1, 0.2, len(table))
        table[name] = table[f"{name}_reference"] + rng.normal(0, 0.1, len(table))
    return table


def test_intervals_are_quantiles_of_residuals_and_cover():
    found, fresh = model_directory.intervals(out_of_fold()), out_of_fold(seed=9)
    for name in BIOMARKERS:
        radius = found["patch"][name]["radius"]
        # 1.645 SD of a normal error of 0.1; 960 residuals leave 4 %
        assert radius == pytest.approx(0.1645, rel=0.08)
        assert found["patch"][name]["coverage"] == pytest.approx(0.9, abs=0.03)
        # means of four errors: half as wide
        assert found["compartment"][name]["radius"] == pytest.approx(0.5 * radius, rel=0.2)
        assert found["compartment"][name]["n"] == 240
        error = np.abs(fresh[name] - fresh[f"{name}_reference"])
        assert (error <= radius).mean() == pytest.approx(0.9, abs=0.03)


def test_the_oa_model_is_the_logistic_regression_of_the_study_in_plain_numbers():
    means = compartment_means(out_of_fold(30))
    oa = [float(k % 2) for k in range(29)] + [np.nan]
    manifest = pd.DataFrame({"knee_id": [f"k{k}" for k in range(30)], "oa": oa})
    found = model_directory.oa_model(means, manifest)
    assert (found["n_knees"], found["n_oa"]) == (29, 14)
    steps = SimpleImputer(keep_empty_features=True), StandardScaler(), LogisticRegression()
    labelled = manifest.dropna().set_index("knee_id")["oa"]
    features = means.drop(columns="subject_id")
    pipeline = make_pipeline(*steps).fit(features.loc[labelled.index].to_numpy(), labelled)
    one = features.loc[["k29"]].copy()
    one[[f"{name}_femur_medial" for name in BIOMARKERS]] = np.nan
    row = {c: {b: one.loc["k29", f"{b}_{c}"] for b in BIOMARKERS} for c in COMPARTMENTS}
    wanted = pipeline.predict_proba(one.to_numpy())[0, 1]
    assert knee.oa_probability(pd.DataFrame(row).T, found) == pytest.approx(wanted, rel=1e-12)
    assert model_directory.oa_model(means, manifest.assign(oa=0.0)) is None


def tube(fwhm_mm, spacing_mm=0.4, noise=0.0):
    """Cortex of 1200 HU, 6 mm thick, around marrow of -50 HU in muscle of 50 HU, blurred."""
    y, x = (np.indices((200, 200)) - 99.5) * spacing_mm
    radius = np.hypot(y, x)
    hu = np.where(radius > 25, 50.0, np.where(radius > 19, 1200.0, -50.0))
    hu = ndimage.gaussian_filter(hu, fwhm_mm / 2.3548 / spacing_mm)
    stack = np.repeat(hu[None], 20, axis=0)
    stack = stack + np.random.default_rng(0).normal(0, noise, stack.shape)
    return stack, np.repeat((radius <= 25)[None], 20, axis=0), (0.6, spacing_mm, spacing_mm)


@pytest.mark.parametrize("fwhm_mm", [0.8, 1.2, 2.0])
def test_the_width_of_an_edge_is_that_of_its_blur(fwhm_mm):
    hu, bone, spacing = tube(fwhm_mm)
    # the disk's own staircase and linear interpolation widen it by a share of a 0.4 mm pixel
    wanted = pytest.approx(np.hypot(fwhm_mm, 0.4), rel=0.12)
    assert limits.edge_width_mm(hu, bone, spacing) == wanted


def test_noise_is_measured_in_soft_tissue_alone():
    hu, _, _ = tube(1.0, noise=20.0)
    assert limits.noise_hu(hu) == pytest.approx(20, rel=0.03)
    assert np.isnan(limits.noise_hu(np.full((4, 5, 5), 900.0)))


def test_patches_unlike_those_of_training_are_far_from_them(run):
    data = patches.load_patches(run / "patches")
    ct, voi = data.ct[:].astype(np.float32), data.voi[:]
    detector = limits.fit_out_of_distribution(ct, voi)
    own = np.median(detector.distance(ct, voi))
    assert own == pytest.approx(0.7, abs=0.3)  # 1 with many more patches than features
    shuffled = np.random.default_rng(0).permuted(ct.reshape(len(ct), -1), axis=1).reshape(ct.shape)
    assert np.median(detector.distance(shuffled, voi)) > 3 * own


def test_limits_warn_outside_training_and_refuse_beyond_the_margin():
    found = limits.fit_limits(pd.DataFrame({name: [1.0, 2.0] for name in limits.MEASURES}))
    none = {"refuse_below": None, "refuse_above": None}
    assert found["slice_mm"] == none | {"low": 1.0, "high": 2.0, "refuse_above": 4.0}
    assert found["metal_mm3"]["refuse_above"] == 20.0
    ends = {"refuse_below": 0.0, "refuse_above": 3.0}
    assert found["mean_hu"] == {"low": 1.0, "high": 2.0} | ends
    assert limits.check_limits({"slice_mm": 2.0, "mean_hu": 1.5}, found) == []
    warning = limits.check_limits({"slice_mm": 3.0}, found)[0]
    assert "slice thickness (mm) is 3, in training 1 to 2" in warning
    assert limits.check_limits({"slice_mm": 0.5}, found) == []  # finer than training is good
    for value in (4.1, np.nan):
        with pytest.raises(InputError, match=r"unlike the CTs .* in training 1 to 2, at most 4\)"):
            limits.check_limits({"slice_mm": value}, found)


# ---------------------------------------------------------------- one CT
def test_a_good_ct_gives_every_number_with_its_interval(good_knee, ensemble):
    found, about = good_knee, ensemble.about
    assert found.compartments["n_patches"].min() >= 5
    usable = found.patches[found.patches["flag"] == ""]
    for name in BIOMARKERS:
        radius = about["intervals"]["patch"][name]["radius"]
        low, high = usable[f"{name}_low"], usable[f"{name}_high"]
        np.testing.assert_allclose(high - usable[name], radius, rtol=1e-9)
        np.testing.assert_allclose(low, (usable[name] - radius).clip(lower=0), rtol=1e-9)
        means = usable.groupby("compartment")[name].mean()
        np.testing.assert_allclose(found.compartments[name], means[list(COMPARTMENTS)], rtol=1e-9)
        assert found.compartments[f"{name}_percentile"].between(0, 100).all()
    assert 0 < found.oa_probability < 1


def test_maps_hold_the_estimates_below_the_joint_and_zero_elsewhere(good_knee):
    usable = good_knee.patches[good_knee.patches["flag"] == ""]
    masks = sitk.GetArrayViewFromImage(good_knee.masks)
    for name, image in biomarker_maps(good_knee).items():
        values = sitk.GetArrayViewFromImage(image)
        inside = values != 0
        assert not (inside & (masks == 0)).any()
        assert usable[name].min() - 1e-6 <= values[inside].min()
        assert values[inside].max() <= usable[name].max() + 1e-6
        volume_cm3 = inside.sum() * np.prod(image.GetSpacing()) / 1000
        assert 8 < volume_cm3 < 80  # two bones, some 20 cm2 each, up to 9 mm deep
        # a map is the average of the patches, so that it follows them
        points = usable[["x", "y", "z"]].to_numpy().tolist()
        shown = np.array([image[image.TransformPhysicalPointToIndex(point)] for point in points])
        assert np.corrcoef(shown[shown > 0], usable[name][shown > 0])[0, 1] > 0.7


def both_knees(image, side):
    """Both knees of a person: the CT and its mirror image beside it; the right knee at low x."""
    array = sitk.GetArrayFromImage(image)
    gap = np.full((*array.shape[:2], 40), -1000, np.float32)
    parts = [array, gap, array[:, :, ::-1]]
    both = sitk.GetImageFromArray(np.concatenate(parts if side == "R" else parts[::-1], axis=2))
    both.SetSpacing(image.GetSpacing())
    both.SetOrigin(image.GetOrigin())
    return both


def test_orientation_changes_nothing(good, good_knee, ensemble):
    columns = list(BIOMARKERS)
    turned = predict_knee(sitk.DICOMOrient(good[0], "PIR"), good[1], ensemble).compartments
    pd.testing.assert_frame_equal(good_knee.compartments[columns], turned[columns], rtol=1e-5)


@pytest.mark.parametrize("side", ["L", pytest.param("R", marks=pytest.mark.slow)])
def test_field_of_view_and_the_other_knee_change_nothing(wide, good_knee, ensemble, side):
    """Another view moves a mask by a part of a voxel; each knee is the other's mirror image."""
    columns = list(BIOMARKERS)
    found = predict_knee(both_knees(*wide), side, ensemble).compartments
    pd.testing.assert_frame_equal(good_knee.compartments[columns], found[columns], rtol=0.02)


def scaled(ct, gain=1.0, shift=0.0, noise=0.0):
    array = sitk.GetArrayFromImage(ct)
    return changed(
        ct, array * gain + shift + np.random.default_rng(0).normal(0, noise, array.shape)
    )


def with_metal(ct):
    array = sitk.GetArrayFromImage(ct)
    middle = np.array(array.shape) // 2
    array[10:25, middle[1] - 4 : middle[1] + 4, middle[2] - 4 : middle[2] + 4] = 3071
    return changed(ct, array)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda ct: sitk.BinShrink(ct, [1, 1, 5]), r"slice thickness \(mm\) is 3.12"),
        (lambda ct: sitk.BinShrink(ct, [3, 3, 2]), r"slice thickness \(mm\) is 1.35"),
        (lambda ct: sitk.DiscreteGaussian(ct, [1.2, 1.2, 0]), "width of bone edges"),
        (with_metal, "volume above 3000 HU.*without metal"),
        (lambda ct: changed(ct, spacing=0.6), "width of the femur.*knee joint"),
        (lambda ct: changed(ct, spacing=1.5), r"\(mm\)"),
        (lambda ct: scaled(ct, shift=1024), "Hounsfield units"),
        (lambda ct: scaled(ct, gain=1.6), "mean HU|volume above"),
        (lambda ct: scaled(ct, noise=150), "noise|distance"),
        (lambda ct: changed(ct, sitk.GetArrayFromImage(ct)[::-1]), "depth of the femur.*head up"),
        (lambda ct: changed(ct, sitk.GetArrayFromImage(ct).clip(max=150)), "no bone above 200 HU"),
        (lambda ct: ct[:, :, : ct.GetSize()[2] // 3], "femur"),
        (lambda ct: ct[: ct.GetSize()[0] * 11 // 20], "width of the femur.*whole knee joint"),
    ],
)
def test_a_ct_unlike_those_of_training_is_refused_with_the_reason(good, ensemble, spoil, reason):
    with pytest.raises(InputError, match=reason):
        predict_knee(spoil(good[0]), good[1], ensemble)


def test_the_wrong_side_is_noticed_by_the_fibula(good):
    ct, side = good
    masks, other = bone_masks(ct), {"L": "R", "R": "L"}[side]
    knee.check_side(ct, masks, side)
    with pytest.raises(InputError, match=f"side: is {other}, but the fibula .* in a knee {side}"):
        knee.check_side(ct, masks, other)
    mirrored = [changed(image, sitk.GetArrayFromImage(image)[:, :, ::-1]) for image in (ct, masks)]
    knee.check_side(*mirrored, other)
    with pytest.raises(InputError, match=f"side: is {side}, but the fibula .* in a knee {other}"):
        knee.check_side(*mirrored, side)
    # no fibula: nothing to compare with
    alone = np.where(sitk.GetArrayFromImage(masks) > 0, sitk.GetArrayFromImage(ct), 40)
    knee.check_side(changed(ct, alone), masks, other)


def test_own_labels_replace_the_threshold_and_tell_which_knee_is_meant(
    wide, good, good_knee, ensemble
):
    ct, side = good
    labels = sitk.DICOMOrient(bone_masks(ct), "RAI")
    found = predict_knee(ct, side, ensemble, labels=labels)
    error = found.compartments[list(BIOMARKERS)] / good_knee.compartments[list(BIOMARKERS)] - 1
    assert error.abs().to_numpy().max() < 0.02
    noisy = scaled(ct, noise=150)  # threshold masks may fail, the limits still hold
    with pytest.raises(InputError, match="noise|distance"):
        predict_knee(noisy, side, ensemble, labels=labels)
    joint = knee.joint_view(wide[0], side, sitk.Resample(labels, wide[0]))
    assert np.less(np.multiply(joint.GetSize(), joint.GetSpacing()), 125).all()


# ---------------------------------------------------------------- many CTs, on disk
def test_results_are_complete_and_on_the_grid_of_the_ct(predicted, ct_file, good):
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
        value = table.loc[0, f"bv_tv_{place}"]
        assert numbers["compartments"][place]["bv_tv"] == value
        assert saved.loc[place, "bv_tv"] == pytest.approx(value, rel=1e-12)
    assert numbers["ct_sha256"] == sha256_file(ct_file)

    page = (out / "knee" / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 2
    assert not re.search(r"https?://|src=['\"](?!data:)|<link|<script", page)
    assert str(out) not in page
    text = re.sub(r"<[^>]*>", "", page.partition("<body>")[2]).strip()
    assert text.startswith("Research use only. The model was trained on simulated knees.")
    for words in ("femur, medial", "probability of osteoarthritis", "not a medical device"):
        assert words in text
    for words in ("There is no interval", "Figure 1.", "Figure 2.", "patches, "):
        assert words in text
    assert "import " not in page  # no code


def test_maps_keep_an_oblique_grid_in_another_order(good, ensemble):
    ct = sitk.DICOMOrient(good[0], "ASL")
    turn = sitk.Euler3DTransform()
    turn.SetRotation(0.02, 0.03, -0.02)
    direction = np.reshape(turn.GetMatrix(), (3, 3)) @ np.reshape(ct.GetDirection(), (3, 3))
    ct.SetDirection(direction.ravel())
    found = predict_knee(ct, good[1], ensemble)
    whole = folder.on_grid_of(ct, found.masks)
    assert whole.GetSize() == ct.GetSize()
    labels = sitk.GetArrayViewFromImage(whole)
    assert labels.any()
    for index in np.argwhere(labels > 0)[::50_000].tolist():
        point = whole.TransformIndexToPhysicalPoint(index[::-1])
        part = found.masks[found.masks.TransformPhysicalPointToIndex(point)]
        assert part == labels[tuple(index)]


def time_stamps(out):
    return {path: path.stat().st_mtime_ns for path in (out / "knee").iterdir()}


def test_a_second_call_keeps_right_results_and_renews_others(
    predicted, ct_file, good, model, tmp_path, in_process
):
    out = Path(shutil.copytree(predicted[0], tmp_path / "out"))
    cts, before = listed_cts([f"{ct_file}:{good[1]}"]), time_stamps(out)
    ct_file.touch()  # the content is the same
    again = predict_cts(cts, model, out)
    assert time_stamps(out) == before
    assert again.loc[0, "seconds"] == predicted[1].loc[0, "seconds"]
    (out / "knee" / "bv_tv.nii.gz").write_bytes(b"damaged")
    predict_cts(cts, model, out)
    assert sitk.ReadImage(str(out / "knee" / "bv_tv.nii.gz")).GetSize() == good[0].GetSize()
    truncated = tmp_path / "knee.nii.gz"
    truncated.write_bytes(ct_file.read_bytes()[:1000])
    table = predict_cts(listed_cts([str(truncated)], good[1]), model, out)
    assert table.loc[0, "error"].startswith(str(truncated))
    assert not (out / "knee").exists()  # no result of the older CT beside the new error


def test_an_unfinished_write_leaves_nothing(ct_file, good, model, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(folder, "write_report", full)
    cts = listed_cts([f"{ct_file}:{good[1]}"])
    with pytest.raises(
        InputError, match="cannot be written, as the disk of .* is full; free space"
    ):
        predict_cts(cts, model, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"records"}
    assert not list((tmp_path / "records").iterdir())


def test_sides_and_names_are_read_from_the_command():
    table = listed_cts(["a/ct.nii.gz:L", "b/ct.nii.gz", "b/my_knee.v2:R"], "R")
    assert table["side"].tolist() == ["L", "R", "R"]
    assert table["knee_id"].tolist() == ["a-ct", "b-ct", "b-my-knee"]
    with pytest.raises(InputError, match="has no side"):
        listed_cts(["a.nii.gz"])
    with pytest.raises(InputError, match="hold one twice"):
        listed_cts(["a.nii.gz:L", "./a.nii.gz:L"])
    both = listed_cts(["legs.nii.gz:L", "legs.nii.gz:R"])
    assert both["knee_id"].nunique() == 2


def test_the_command_reports_the_outcome_of_each_ct(
    predicted, ct_file, good, model, tmp_path, capsys
):
    shutil.copytree(predicted[0], tmp_path / "out")
    common = ["--model", str(model), "--out", str(tmp_path / "out"), "--jobs", "1"]
    assert cli.main(["predict", f"{ct_file}:{good[1]}", *common]) == 0
    assert "report.html" in capsys.readouterr().out
    assert cli.main(["predict", str(tmp_path / "none.nii.gz"), "--side", "L", *common]) == 1
    assert "does not exist" in capsys.readouterr().out
    no_model = ["--model", str(tmp_path), "--out", str(tmp_path)]
    no_folder = ["--model", str(model), "--out", str(ct_file)]
    for arguments, reason in (
        ([str(ct_file), *common], "has no side"),
        (common, "CTs or a manifest"),
        ([f"{ct_file}:L", "b.nii:L", "--labels", "c.nii", *common], "--labels: belongs to one CT"),
        ([f"{ct_file}:L", *no_model], "holds no model"),
        ([f"{ct_file}:L", *no_folder], "cannot be made a folder"),
    ):
        assert cli.main(["predict", *arguments]) == 2
        assert reason in capsys.readouterr().err


def test_the_cts_of_a_manifest_are_read_and_their_checksums_compared(
    ct_file, good, model, tmp_path
):
    one = {"knee_id": "one", "subject_id": "a", "side": good[1], "ct": ct_file.name}
    two = {"knee_id": "two", "subject_id": "b", "side": good[1], "mr": "mr.nii.gz"}  # no CT
    rows = pd.DataFrame([one | {"ct_sha256": "ab" * 32}, two]).reindex(columns=HEADER)
    rows.to_csv(tmp_path / "own.csv", index=False)
    cts = manifest_cts(tmp_path / "own.csv", ct_file.parent)
    assert cts[["knee_id", "side", "ct"]].to_numpy().tolist() == [["one", good[1], str(ct_file)]]
    table = predict_cts(cts, model, tmp_path / "out")
    assert "differs from ct_sha256" in table.loc[0, "error"]
    assert not (tmp_path / "out" / "one").exists()
    rows.assign(ct_sha256="", ct_labels="none.nii.gz").to_csv(tmp_path / "own.csv", index=False)
    cts = manifest_cts(tmp_path / "own.csv", ct_file.parent)
    assert cts["ct_labels"].tolist() == [str(ct_file.parent / "none.nii.gz")]
    table = predict_cts(cts, model, tmp_path / "out")
    assert "none.nii.gz: does not exist" in table.loc[0, "error"]


def test_a_dicom_folder_gives_what_the_nifti_file_gives_without_the_name(
    predicted, good, model, tmp_path
):
    ct = sitk.Cast(good[0] + 0.5, sitk.sitkInt16)
    for name, thickness_mm in (("series", 0.625), ("thick", 3.0)):
        write_series(tmp_path / name, ct, SliceThickness=thickness_mm)
        (tmp_path / name / ".DS_Store").write_bytes(b"\0\0\0\1Bud1" + bytes(200))
    cts = listed_cts([str(tmp_path / "series"), str(tmp_path / "thick")], good[1])
    table = predict_cts(cts, model, tmp_path / "out")
    columns = [f"{name}_{place}" for name in BIOMARKERS for place in COMPARTMENTS]
    found, wanted = (one.loc[0, columns].astype(float) for one in (table, predicted[1]))
    np.testing.assert_allclose(found, wanted, rtol=1e-3)
    # slices that overlap are still thick
    assert "slice thickness (mm) is 3," in table.loc[1, "error"]
    for file in (tmp_path / "out").rglob("*.*"):
        assert b"Doe^" not in file.read_bytes(), file


@pytest.mark.slow
def test_a_ct_simulated_from_a_real_knee_is_read(real_data, ensemble):
    image, side = simulated_ct(1, (92.0, 84.0, 72.0), real_data / "knee_labels.nrrd")
    found = predict_knee(sitk.Cast(image, sitk.sitkFloat32), side, ensemble)
    assert found.compartments["n_patches"].sum() >= 20
    assert np.isfinite(found.compartments["bv_tv"]).all()


# ---------------------------------------------------------------- the shipped model
SHIPPED = sorted(path.parent for path in REPOSITORY.glob("models/*/model.json"))


@pytest.fixture(params=SHIPPED or [None], ids=lambda path: path.name if path else "none")
def shipped(request):
    if request.param is None:
        pytest.skip("models/ holds no model: ctsma export-model --name full --out models/full")
    return request.param


def test_the_shipped_model_is_the_one_reported(shipped):
    about = read_about(shipped)
    results = REPOSITORY / "docs" / "results" / shipped.name
    agreement, diagnosis = (
        json.loads((results / f"{name}.json").read_text()) for name in ("agreement", "diagnosis")
    )
    for name in ("profile", "seed", "protocol_sha256", "manifest_sha256", "git_commit"):
        assert about[name] == agreement[name] == diagnosis[name], name
    assert about["metrics"]["icc"] == agreement["icc"][about["arm"]]
    assert about["metrics"]["ceiling"] == agreement["ceiling"]
    assert about["metrics"]["auc"] == diagnosis["auc"][about["arm"]]
    assert about["metrics"]["oa_auc"] == diagnosis["comparators"][f"{about['arm']}, logistic"]
    for name in about["members"]:
        record = json.loads((shipped / f"{name}.json").read_text())
        assert record["arm"] == about["arm"]
        assert record["settings"]["protocol_sha256"] == about["protocol_sha256"]
    assert (shipped / "MODEL_CARD.md").read_text() == model_directory.model_card(about)


def test_the_shipped_model_is_small_and_reproduces_its_stored_estimates(shipped):
    assert sum(file.stat().st_size for file in shipped.iterdir()) < 8e6
    assert {file.suffix for file in shipped.iterdir()} == {".json", ".safetensors", ".md"}
    members = load_ensemble(shipped).members
    check = load_file(shipped / "check.safetensors")
    ct = check["ct"].astype(np.float32)
    found = estimate(members, ct, check["voi"], check["cortical_hu"])
    np.testing.assert_allclose(found, check["estimate"], rtol=1e-4)


def test_the_shipped_model_reads_a_simulated_knee(shipped, good):
    found = predict_knee(*good, load_ensemble(shipped))
    assert found.compartments["n_patches"].min() > 0
    # the range of the simulated cohort
    assert found.compartments["bv_tv"].between(0.1, 0.6).all()
