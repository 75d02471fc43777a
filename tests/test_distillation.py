"""Distillation: losses in closed form, no leakage, resume, equal bits, and that networks learn."""

import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from joblib.externals.loky import get_reusable_executor
from scipy import ndimage

from ctsma import distillation
from ctsma.common import BIOMARKERS, InputError
from ctsma.distillation import (
    ARMS,
    COMPARISONS,
    MAIN_ARM,
    DistillationBatch,
    Outputs,
    Settings,
    cross_validate,
    distillation_loss,
    make_fold,
    prepare,
    read_arms,
    training,
)
from ctsma.distillation.data import (
    IMAGES,
    Fold,
    MappedImages,
    augment_ct,
    knee_batches,
    make_input,
    prepare_in_files,
)
from ctsma.distillation.losses import knee_level_mse
from ctsma.distillation.training import TeacherCache, predict_rows, train
from ctsma.models import build
from ctsma.patches import Patches, portions, to_ct_grid
from ctsma.ridge import apply_ridge
from ctsma_lab.registration_views import patch_correlation
from ctsma_lab.training_views import read_records
from ctsma_predict.ct_only import predict_ct_only

STUDY_ARMS = ["hu_regression", "hu_regression_calibrated", "mr_teacher", "ct_only", "ct_residual"]
STUDY_ARMS += ["ct_sma", "ct_sma_plus"]
TINY = {"epochs": 1, "widths": (4, 4, 8), "batch_size": 8, "precision": "float32"}
ROOT = Path(__file__).parents[1]


def toy(n_subjects=8, each=3, seed=0):
    """Stripes of drawn width and brightness, sharp in MR, averaged in CT, and their biomarkers."""
    rng = np.random.default_rng(seed)
    share, period = rng.uniform(0.2, 0.6, (2, n_subjects * each))
    y = np.arange(48)
    bone = np.mod(y[None] / (6 + 10 * period[:, None]), 1) < share[:, None]
    bone = np.broadcast_to(bone[:, None, None], (len(share), 12, 48, 48))
    mr = 400 * (1 - bone) + rng.normal(60, 20, bone.shape)
    ct_bone = bone.reshape(-1, 12, 24, 2, 24, 2).mean((3, 5))
    hu = 900.0 * ct_bone + rng.normal(0, 20, ct_bone.shape)
    width = 0.2 * (6 + 10 * period)
    targets = (share, share * width, (1 - share) * width, 1 / width)
    subjects = np.repeat([f"s{i}" for i in range(n_subjects)], each)
    table = pd.DataFrame({"knee_id": subjects, "subject_id": subjects})
    table = table.assign(patch_id=np.tile(range(each), n_subjects), compartment="tibia_medial")
    table = table.assign(**dict(zip(BIOMARKERS, targets, strict=True)), u=1.0, v=2.0, w=3.0)
    table = table.assign(cortical_hu_femur=900.0, cortical_hu_tibia=1100.0, mean_hu=400.0)
    voi = np.ones(bone.shape, bool)
    voi[:, :, :6] = False
    return Patches(table, mr.astype(np.float16), hu.astype(np.float16), voi)


def splits_of(patches, n_folds=2):
    subjects = pd.unique(patches.table["subject_id"])
    return pd.DataFrame({"subject_id": subjects, "fold": np.arange(len(subjects)) % n_folds})


def predictions_of(found, arm):
    return found.loc[found["arm"] == arm, list(BIOMARKERS)].to_numpy()


@pytest.fixture(scope="module")
def patches():
    return toy()


@pytest.fixture(scope="module")
def trained(patches, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return folder, cross_validate(patches, splits_of(patches), STUDY_ARMS, TINY, [3], folder)


# Arms


def test_every_arm_is_described_and_compared():
    assert MAIN_ARM in ARMS
    assert {arm for pair in COMPARISONS for arm in pair} <= set(ARMS)
    assert len({arm.colour for arm in ARMS.values()}) == len(ARMS)
    assert ARMS["ct_sma_plus"].distilled and not ARMS["ct_residual"].distilled
    assert all(ARMS[a.baseline].kind == "ridge" for a in ARMS.values() if a.baseline)


def test_how_to_add_an_arm(patches, tmp_path):
    arms = read_arms(
        {
            "ct_normalised": {
                "label": "CT network, normalised to cortical HU",
                "colour": "#D55E00",
                "kind": "student",
                "input": "ct+cortex",
                "loss_weights": [{"feature_l1": 0.1, "cam_mse": 0.3}],
            }
        }
    )
    arm = arms["ct_normalised"]
    found = cross_validate(patches, splits_of(patches), ["ct_only", arm], TINY, [0], tmp_path)
    assert found["arm"].unique().tolist() == ["ct_only", "ct_normalised"]
    assert np.isfinite(predictions_of(found, "ct_normalised")).all()
    with pytest.raises(InputError, match="arms.bad.kind: input should be 'ridge', 'student'"):
        read_arms({"bad": {"label": "", "colour": "", "kind": "pupil", "input": "ct"}})


def test_how_to_add_a_loss(patches, tmp_path, monkeypatch):
    (tmp_path / "my_mse_loss.py").write_text(
        "def prediction_mse(batch):\n"
        "    return (batch.student.prediction - batch.teacher.prediction).square().mean()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    arm = replace(ARMS["ct_only"], id="ct_mse", loss_weights=[{"my_mse_loss:prediction_mse": 1.0}])
    splits, folder = splits_of(patches), tmp_path / "models"
    get_reusable_executor().shutdown(wait=True)  # new processes take over the path of modules
    found = cross_validate(patches, splits, ["ct_only", arm], TINY, [0], folder, n_jobs=2)
    assert not np.array_equal(predictions_of(found, "ct_mse"), predictions_of(found, "ct_only"))
    record = tmp_path / "models" / "ct_mse_fold0_seed0.json"
    before = json.loads(record.read_text())["key"]
    source = (tmp_path / "my_mse_loss.py").read_text()
    (tmp_path / "my_mse_loss.py").write_text(source.replace("mean()", "sum()"))
    cross_validate(patches, splits, [arm], TINY, [0], folder)
    assert json.loads(record.read_text())["key"] != before  # another loss trains again


# Losses


def outputs(maps, cam=None):
    zero = torch.zeros(2, 4)
    return Outputs(zero, torch.zeros(2, 4, 6, 6, 6) if cam is None else cam, maps)


def batch_of(student, teacher):
    return DistillationBatch(student, teacher, torch.ones(2, 1, 12, 24, 24))


def random_maps(seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand((2, c, 12, s, s), generator=generator) for c, s in ((3, 24), (4, 12))]


def test_published_feature_loss_is_the_sum_of_mean_absolute_differences():
    teacher = random_maps(0)
    same = batch_of(outputs(teacher), outputs(teacher))
    assert distillation_loss(same, {"feature_l1": 0.7}) == 0
    shifted = [m + d for m, d in zip(teacher, (0.25, -0.5), strict=True)]
    batch = batch_of(outputs(shifted), outputs(teacher))
    # 0.1 (0.25 + 0.5); float32 sums over 40000 values
    assert distillation_loss(batch, {"feature_l1": 0.1}).item() == pytest.approx(0.075, rel=1e-5)
    assert distillation_loss(batch, {}) == 0


def test_cam_mse_is_the_mean_squared_difference_in_the_region():
    cam = torch.rand(2, 4, 6, 6, 6, generator=torch.Generator().manual_seed(0))
    assert distillation_loss(batch_of(outputs([], cam), outputs([], cam)), {"cam_mse": 1.0}) == 0
    # an offset of a half everywhere: its square, whatever the number of places
    offset = batch_of(outputs([], cam), outputs([], cam + 0.5))
    assert distillation_loss(offset, {"cam_mse": 1.0}).item() == pytest.approx(0.25, rel=1e-5)


def test_terms_of_the_benchmark_compare_the_last_stage_alone(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    teacher = random_maps(0)
    shifted = [m + d for m, d in zip(teacher, (9.0, -0.5), strict=True)]
    batch = batch_of(outputs(shifted), outputs(teacher))
    for term, value in (("last_stage_l1", 0.5), ("last_stage_mse", 0.25)):
        loss = distillation_loss(batch, {f"benchmarks.loss_terms:{term}": 1.0})
        assert loss.item() == pytest.approx(value, rel=1e-5)


def test_the_knee_level_loss_is_the_quadratic_form_of_a_random_intercept():
    knees = torch.tensor([0, 0, 0, 1, 2, 2])
    error = torch.randn(6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rho = torch.tensor([0.0, 0.3, 0.6, 0.9], dtype=torch.float64)
    expected = 0.0
    for column, r in enumerate(rho):
        same = (knees[:, None] == knees).double()
        covariance = r * same + (1 - r) * torch.eye(6, dtype=torch.float64)
        e = error[:, column]
        # theta makes the errors uncorrelated with variance 1 - rho
        expected += (1 - r) * (e @ torch.linalg.solve(covariance, e))
    loss = knee_level_mse(error, knees, rho)
    assert loss.item() == pytest.approx(expected.item() / error.numel())
    plain = knee_level_mse(error, knees, torch.zeros(4, dtype=torch.float64))
    assert plain.item() == pytest.approx(error.square().mean().item())
    assert knee_level_mse(error[:0], knees[:0], rho) == 0


@pytest.mark.parametrize(("per_knee", "batch_size"), [(1, 8), (2, 8), (8, 8), (8, 2)])
def test_batches_hold_every_row_once_and_keep_parts_of_a_knee_together(per_knee, batch_size):
    data, rows = prepare(toy(6, 5)), np.arange(2, 30)  # a knee of three patches, five of five
    settings = Settings(**TINY | {"patches_per_knee": per_knee, "batch_size": batch_size})
    fold = Fold(0, rows, rows, rows, rows[:0], {"rho": [0.0, 0.0, 0.5, 0.0]})
    batches = knee_batches(data, fold, settings, np.random.default_rng(0))
    np.testing.assert_array_equal(np.sort(np.concatenate(batches)), rows)
    assert all(len(batch) for batch in batches)
    for batch in batches if per_knee == 8 else ():
        whole = {knee: (data.knees[rows] == knee).sum() for knee in data.knees[batch]}
        assert all((data.knees[batch] == knee).sum() == n for knee, n in whole.items())


def test_batches_are_independent_patches_where_no_errors_are_shared():
    data, rows = prepare(toy(6, 5)), np.arange(30)
    settings = Settings(**TINY | {"patches_per_knee": 5, "batch_size": 5})
    fold = Fold(0, rows, rows, rows, rows[:0], {"rho": [0.0] * 4})
    together, apart = (
        knee_batches(data, replace(fold, scale={"rho": rho}), settings, np.random.default_rng(0))
        for rho in ([0.5] * 4, [0.0] * 4)
    )
    assert [len(set(data.knees[batch])) for batch in together] == [1] * 6
    assert max(len(set(data.knees[batch])) for batch in apart) > 2


def test_weight_zero_among_the_candidates_is_the_network_without_teacher(patches, tmp_path):
    candidates = [{"feature_l1": 0.0}, {"feature_l1": 1e6}]  # the second learns nothing
    arm = replace(ARMS["ct_sma"], loss_weights=candidates)
    settings = TINY | {"epochs": 3}
    found = cross_validate(patches, splits_of(patches), ["ct_only", arm], settings, [0], tmp_path)
    np.testing.assert_array_equal(predictions_of(found, "ct_only"), predictions_of(found, "ct_sma"))
    records = [read_records(tmp_path, name)[0] for name in ("ct_only", "ct_sma")]
    assert records[0]["validation_mse"][0] == records[1]["validation_mse"][0]
    assert ARMS["ct_sma"].loss_weights[0] == {}  # so that validation may choose no teacher


# Cross-validation


def test_every_patch_is_predicted_once_per_arm(trained, patches):
    _, found = trained
    assert list(found["arm"].unique()) == STUDY_ARMS
    assert not found.duplicated(["arm", "knee_id", "patch_id"]).any()
    assert len(found) == len(STUDY_ARMS) * len(patches.table)
    assert np.isfinite(found[list(BIOMARKERS)]).all(axis=None)


def test_no_model_saw_the_subjects_that_it_predicts(trained, patches):
    folder, found = trained
    for path in folder.glob("*.json"):
        record = json.loads(path.read_text())
        fit, validation, test = (set(p) for p in record["subjects"].values())
        assert not (fit & validation or fit & test or validation & test)
        rows = found[(found["arm"] == record["arm"]) & (found["fold"] == record["fold"])]
        assert set(rows["subject_id"]) == test
        fitted = patches.table["subject_id"].isin(fit).to_numpy()
        targets = patches.table.loc[fitted, list(BIOMARKERS)]
        np.testing.assert_allclose(record["scale"]["low"], targets.min())
        np.testing.assert_allclose(record["scale"]["high"], targets.max())
        assert record["scale"]["ct"][0] == pytest.approx(patches.ct[fitted].mean(dtype=float))


def test_a_second_run_trains_nothing_and_a_fresh_one_gives_the_same_bits(
    trained, patches, tmp_path
):
    folder, found = trained
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    again = cross_validate(patches, splits_of(patches), STUDY_ARMS, TINY, [3], folder)
    assert before == {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    pd.testing.assert_frame_equal(found, again, check_exact=True)
    arms = ["hu_regression_calibrated", "ct_only"]
    fresh = cross_validate(patches, splits_of(patches), arms, TINY, [3], tmp_path)
    known = found[found["arm"].isin(arms)].reset_index(drop=True)
    pd.testing.assert_frame_equal(known, fresh, check_exact=True)
    record = tmp_path / "ct_only_fold0_seed3.json"
    key = json.loads(record.read_text())["key"]
    other = TINY | {"weight_decay": 0.5}
    cross_validate(patches, splits_of(patches), ["ct_only"], other, [3], tmp_path)
    assert json.loads(record.read_text())["key"] != key


def test_the_weights_of_least_validation_error_are_kept_and_a_finished_candidate_is_not_repeated(
    patches, tmp_path, monkeypatch
):
    gammas = (0.1, 50.0)
    arm = replace(ARMS["ct_sma"], loss_weights=[{"feature_l1": gamma} for gamma in gammas])
    options = splits_of(patches), [arm], TINY | {"epochs": 2}, [0], tmp_path

    def stopped(data, fold, loss_weights, *rest):
        if loss_weights.get("feature_l1") == 50.0:
            raise KeyboardInterrupt
        return train(data, fold, loss_weights, *rest)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("ctsma.distillation.cross_validation.train", stopped)
        cross_validate(patches, *options)
    assert len(list(tmp_path.glob("ct_sma_fold0_seed0_*_0.checkpoint"))) == 1
    cross_validate(patches, *options)
    for record in read_records(tmp_path, "ct_sma"):
        assert len(record["validation_mse"]) == 2
        best = gammas[int(np.argmin(record["validation_mse"]))]
        assert record["loss_weights"] == {"feature_l1": best}
    assert not list(tmp_path.glob("*.checkpoint"))


def test_networks_and_ridge_learn_what_stripes_show(tmp_path):
    patches = toy(8, 4)
    settings = {"epochs": 20, "widths": (4, 8, 8), "learning_rate": 0.02, "batch_size": 4}
    arms = ["hu_regression", "mr_teacher", "ct_only"]
    found = cross_validate(patches, splits_of(patches), arms, TINY | settings, [0], tmp_path)
    joined = distillation.with_reference(found.drop(columns="seed"), patches.table)
    squared = (joined["bv_tv"] - joined["bv_tv_reference"]) ** 2
    # half of what predicting the mean leaves: far from chance
    assert (squared.groupby(joined["arm"]).mean() < 0.5 * patches.table["bv_tv"].var()).all()


def test_bad_input_is_refused_with_a_sentence(patches, tmp_path):
    holed = patches.ct.copy()
    holed[4, 3, 2, 1] = np.nan
    flat, unknown = patches.table.assign(bv_tv=0.3), patches.table.assign(cortical_hu_tibia=np.inf)
    splits, names = splits_of(patches), list(BIOMARKERS)
    second = patches.table["subject_id"].isin(splits.loc[splits["fold"] == 1, "subject_id"])
    partly, none = patches.table.copy(), patches.table.copy()
    partly.loc[0, "bv_tv"] = np.nan
    none.loc[second, names] = np.nan
    without_reference = replace(patches, table=none)

    def run(data=patches, splits=splits, settings=TINY, arms=("ct_only",)):
        return cross_validate(data, splits, arms, settings, [0], tmp_path)

    magic = replace(ARMS["ct_only"], loss_weights=[{"magic": 1.0}])
    for message, arguments in {
        "not finite in ct": {"data": replace(patches, ct=holed)},
        "not finite in cortical HU": {"data": replace(patches, table=unknown)},
        "no variance of bv_tv": {"data": replace(patches, table=flat)},
        "no fold for subject": {"splits": splits.iloc[1:]},
        "too few subjects": {"splits": splits.assign(fold=[0] * 7 + [1])},
        "hold 'ct_magic'": {"arms": ("ct_magic",)},
        "hold 'ct_oracle'": {"arms": ("ct_oracle",)},
        "settings.epoch": {"settings": {"epoch": 3}},
        "unknown term magic": {"arms": (magic,)},
        "batch_size: is 99, more than the": {"settings": TINY | {"batch_size": 99}},
        "has too few subjects with a reference": {"data": without_reference},
        "not finite in reference": {"data": replace(patches, table=partly)},
    }.items():
        with pytest.raises(InputError, match=message):
            run(**arguments)


def test_knees_without_mr_are_predicted_by_the_networks_of_their_folds(trained, patches):
    """As paired knees without their MR they get the predictions of the cross-validation."""
    folder, predictions = trained
    first = patches.table["subject_id"].unique()[:3]
    rows = np.flatnonzero(patches.table["subject_id"].isin(first))
    table = patches.table.iloc[rows].drop(columns=list(BIOMARKERS)).reset_index(drop=True)
    no_mr = Patches(table, np.zeros_like(patches.mr[rows]), patches.ct[rows], patches.voi[rows])
    arms = ["ct_only", "ct_residual", "mr_teacher"]
    found = predict_ct_only(no_mr, splits_of(patches), arms, [3], folder)
    assert set(found["arm"]) == {"ct_only", "ct_residual"}
    keys = ["arm", "fold", "knee_id", "patch_id"]
    both = found.merge(predictions, on=keys, suffixes=("", "_paired"))
    assert len(both) == 2 * len(rows)
    for name in BIOMARKERS:
        np.testing.assert_allclose(both[name], both[f"{name}_paired"], rtol=1e-5)
    joined = distillation.with_reference(distillation.mean_over_seeds(found), table)
    assert "mean_hu" in joined and "bv_tv_reference" not in joined
    nothing = replace(no_mr, table=table[:0])
    empty = predict_ct_only(nothing, splits_of(patches), arms, [3], folder)
    assert distillation.with_reference(distillation.mean_over_seeds(empty), table[:0]).empty


def test_pairs_without_reference_train_the_distilled_arms_by_the_teacher(patches, tmp_path):
    names, splits = list(BIOMARKERS), splits_of(patches)
    hidden = patches.table["subject_id"].isin(["s0", "s1"]).to_numpy()
    table = patches.table.copy()
    table.loc[hidden, names] = np.nan
    rows = np.flatnonzero(~hidden)
    kept = patches.table.iloc[rows].reset_index(drop=True)
    without = Patches(kept, patches.mr[rows], patches.ct[rows], patches.voi[rows])
    arms = ["hu_regression", "ct_residual", "ct_sma_plus"]
    found, few = (
        cross_validate(p, splits, arms, TINY | {"batch_size": 4}, [0], tmp_path / folder)
        for p, folder in ((replace(patches, table=table), "all"), (without, "labelled"))
    )
    assert len(found) == len(arms) * len(table) and np.isfinite(found[names]).all(axis=None)
    joined = found.merge(few, on=["arm", "knee_id", "patch_id"], suffixes=("", "_few"))
    same = {}
    for arm, group in joined.groupby("arm"):
        same[arm] = np.allclose(group[names], group[[f"{name}_few" for name in names]])
    assert same == {"hu_regression": True, "ct_residual": True, "ct_sma_plus": False}


def test_a_pair_without_target_serves_the_distillation_terms_alone(patches):
    settings, data = Settings(**TINY), prepare(patches)
    fold = make_fold(data, splits_of(patches), 0, 0, settings, ARMS["ct_only"])
    hidden = data.targets.copy()
    hidden[fold.fit[:4]] = np.nan
    hidden = replace(data, targets=hidden)
    teacher = build("mr", "compact", torch.Generator().manual_seed(0), settings.widths).eval()
    cache = TeacherCache(teacher.requires_grad_(False), data, fold, settings)
    curves = {}
    for weight in (0.0, 1.0):
        network, found = train(hidden, fold, {"feature_l1": weight}, cache, 0, settings)
        curves[weight] = found
        assert all(torch.isfinite(parameter).all() for parameter in network.parameters())
    assert curves[0.0]["fit_distillation"][0] == 0 < curves[1.0]["fit_distillation"][0]
    assert np.isfinite(curves[0.0]["fit_mse"]).all()


def test_seeds_are_averaged(patches, tmp_path):
    arms = ["hu_regression", "ct_only"]
    found = cross_validate(patches, splits_of(patches), arms, TINY, [0, 1], tmp_path)
    assert found.groupby("arm")["seed"].nunique().to_dict() == {"hu_regression": 1, "ct_only": 2}
    keys = ["arm", "knee_id", "patch_id"]
    mean = distillation.mean_over_seeds(found).set_index(keys).sort_index()
    assert len(mean) == 2 * len(patches.table)
    one = found[(found["arm"] == "ct_only") & (found["knee_id"] == "s0") & (found["patch_id"] == 0)]
    row = mean.loc[("ct_only", "s0", 0)]
    assert row["bv_tv"] == pytest.approx(one["bv_tv"].mean())
    table = patches.table.assign(true_bv_tv=0.5)
    joined = distillation.with_reference(mean.reset_index(), table)
    first = joined[(joined["knee_id"] == "s0") & (joined["patch_id"] == 0)].iloc[0]
    assert first["bv_tv_reference"] == table.loc[0, "bv_tv"] and first["bv_tv_true"] == 0.5


# Training


def test_images_in_files_are_those_in_memory(patches, tmp_path, monkeypatch):
    whole = prepare(patches)
    monkeypatch.setattr(distillation.data, "portions", partial(portions, size=5))
    data = prepare_in_files(patches, tmp_path)
    rows = np.array([7, 3, 20])
    for name, values in vars(whole).items():
        own = getattr(data, name)
        if name in IMAGES:
            assert isinstance(own, MappedImages)
            np.testing.assert_array_equal(own[rows], values[rows])
            own = own[:]
        np.testing.assert_array_equal(own, values)
    for arm in ("ct_only", "mr_teacher"):
        scales = [
            make_fold(d, splits_of(patches), 0, 0, Settings(**TINY), ARMS[arm]).scale
            for d in (whole, data)
        ]
        assert scales[0] == scales[1]


def test_an_interrupted_training_goes_on_to_the_same_bits(patches, tmp_path, monkeypatch):
    settings = Settings(**TINY | {"epochs": 3})
    data = prepare(patches)
    fold = make_fold(data, splits_of(patches), 0, 0, settings, ARMS["ct_only"])
    whole, curves = train(data, fold, {}, None, 0, settings)

    def cut_off(path, parts, rng, curves):
        save(path, parts, rng, curves)
        if len(curves) == 2:
            raise KeyboardInterrupt

    save, checkpoint = training.save_checkpoint, tmp_path / "one.checkpoint"
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(training, "save_checkpoint", cut_off)
        train(data, fold, {}, None, 0, settings, checkpoint)
    resumed, further = train(data, fold, {}, None, 0, settings, checkpoint)
    pd.testing.assert_frame_equal(curves, further, check_exact=True)
    pairs = zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_cortical_hu_is_used_by_calibrated_arms_alone(patches, tmp_path):
    hu = np.linspace(900, 2000, len(patches.table))
    changed = replace(patches, table=patches.table.assign(cortical_hu_femur=hu))
    for arm, same in (("hu_regression", True), ("hu_regression_calibrated", False)):
        before, after = (
            cross_validate(p, splits_of(patches), [arm], TINY, [0], tmp_path)["bv_tv"]
            for p in (patches, changed)
        )
        assert np.array_equal(before, after) == same
    settings, data, other = Settings(**TINY), prepare(patches), prepare(changed)
    for arm, same in (("ct_only", True), ("ct_residual", False)):
        fold = make_fold(data, splits_of(patches), 0, 0, settings, ARMS[arm])
        network, _ = train(data, fold, {}, None, 0, settings)
        before, after = (
            predict_rows(network, d, fold.test, fold.scale, settings) for d in (data, other)
        )
        assert np.array_equal(before, after) == same


def test_a_network_whose_head_is_zero_gives_the_ridge_that_it_corrects(patches):
    data, settings = prepare(patches), Settings(**TINY)
    fold = make_fold(data, splits_of(patches), 0, 0, settings, ARMS["ct_residual"])
    network = build("ct+cortex", "compact", torch.Generator().manual_seed(0), (4, 4, 8)).eval()
    for parameter in network.head.parameters():
        torch.nn.init.zeros_(parameter)
    found = predict_rows(network, data, fold.test, fold.scale, settings)
    weights, low, high = (np.array(fold.scale[name]) for name in ("ridge", "low", "high"))
    ridge = apply_ridge(weights, data.features[fold.test], low, high)
    np.testing.assert_allclose(found, ridge, rtol=1e-5)


def test_cached_teacher_outputs_are_those_of_the_teacher(patches, monkeypatch):
    settings, data = Settings(**TINY | {"epochs": 4}), prepare(patches)
    fold = make_fold(data, splits_of(patches), 0, 3, settings, ARMS["ct_only"])
    teacher = build("mr", "compact", torch.Generator().manual_seed(0), settings.widths).eval()
    cache = TeacherCache(teacher.requires_grad_(False), data, fold, settings)
    rows = fold.fit[[3, 0, 2]]
    for flips in ((), (1,), (1, 3)):
        x = make_input(data, rows, fold.scale | {"input": "mr"}, "cpu", flips)
        prediction, maps = teacher(x)
        cam = teacher.class_activation_maps(maps[-1])
        found = cache.outputs(rows, flips)
        expected = [prediction, cam, *maps]
        torch.testing.assert_close([found.prediction, found.cam, *found.maps], expected)
    weights = {"feature_l1": 0.1, "cam_mse": 0.3}
    cached, curves = train(data, fold, weights, cache, 3, settings)
    monkeypatch.setattr(training, "CACHE_BYTES", 0)
    uncached = TeacherCache(teacher, data, fold, settings)
    live, _ = train(data, fold, weights, uncached, 3, settings)
    assert cache.by_flips and not uncached.by_flips
    for a, b in zip(cached.state_dict().values(), live.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert curves["validation_mse"].notna().tolist() == [True, False, False, True]


def test_augmentation_is_drawn_from_the_generator_alone():
    hu = torch.full((3, 12, 24, 24), 400.0)
    first, again = (augment_ct(hu, np.random.default_rng(5)) for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, augment_ct(hu, np.random.default_rng(6)))


def test_a_missing_or_damaged_model_is_refused(trained, tmp_path):
    for suffix in (".json", ".safetensors"):
        shutil.copy(trained[0] / f"ct_only_fold0_seed3{suffix}", tmp_path / f"m{suffix}")
    network, record = distillation.load_model(tmp_path / "m")
    assert record["role"] == "student" and not network.training
    data = bytearray((tmp_path / "m.safetensors").read_bytes())
    data[-1] ^= 1  # one bit of one weight
    (tmp_path / "m.safetensors").write_bytes(bytes(data))
    with pytest.raises(InputError, match="is missing or damaged; run the stage again"):
        distillation.load_model(tmp_path / "m")
    with pytest.raises(InputError, match="no trained model"):
        distillation.load_model(tmp_path / "nothing")


# Alignment of pairs


def test_patch_correlation_is_one_in_place_and_falls_with_the_shift():
    """Bone that differs from place to place: a seeded field, sharp in MR, averaged in CT."""
    rng = np.random.default_rng(0)
    field = ndimage.gaussian_filter(rng.normal(size=(6, 18, 96, 96)), (0, 0.5, 2, 2))
    bone = (field > 0).astype(np.float32)
    mr = 1 - bone[:, 3:15, 24:72, 24:72]
    voi = np.ones(mr.shape, bool)
    noise = np.random.default_rng(1).normal(0, 150, (6, 12, 24, 24))
    found = {}
    for shift in (0, 2, 4, 8):  # MR pixels of 0.22 mm
        ct = 900 * to_ct_grid(bone[:, 3:15, 24 + shift : 72 + shift, 24:72]) + noise
        found[shift] = patch_correlation(ct, mr, voi)
    np.testing.assert_allclose(found[0], 1, atol=0.02)
    assert (found[0] > found[2]).all() and (found[2] > found[4]).all() and (found[8] < 0.3).all()
    assert not patch_correlation(ct, np.ones_like(mr), voi).any()
