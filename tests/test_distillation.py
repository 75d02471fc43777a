"""Distillation: losses in closed form, no leakage, resume, bit-identical runs, and that something is learned."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import ndimage
from sklearn.linear_model import Ridge
from sklearn.model_selection import GridSearchCV, GroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from ctsma import distillation
from ctsma.cohort import BIOMARKERS, InputFault
from ctsma.distillation import Lesson, cross_validate, distillation_loss, training
from ctsma.distillation.baseline import ALPHAS, fit_ridge, on_ct_grid, read_ridge
from ctsma.distillation.checkpoints import Progress
from ctsma.distillation.examples import fold_of, image_of
from ctsma.distillation.training import _spread_loss, train
from ctsma.networks import build
from ctsma.patches import Patches

ARMS = ["hu_regression", "ruler_regression", "mr_teacher", "ct_only", "ct_residual", "ct_sma", "ct_sma_plus"]
TINY = {"epochs": 1, "widths": (4, 4, 8), "batch_size": 8, "precision": "float32"}


def toy(n_subjects=8, each=3, seed=0):
    """Stripes of drawn width and brightness: sharp in MR, averaged in CT; the biomarkers are their measures."""
    rng = np.random.default_rng(seed)
    share, period = rng.uniform(0.2, 0.6, (2, n_subjects * each))
    y = np.arange(48)
    bone = np.mod(y[None] / (6 + 10 * period[:, None]), 1) < share[:, None]
    bone = np.broadcast_to(bone[:, None, None], (len(share), 12, 48, 48))
    mr = 400 * (1 - bone) + rng.normal(60, 20, bone.shape)
    hu = 900.0 * bone.reshape(-1, 12, 24, 2, 24, 2).mean((3, 5)) + rng.normal(0, 20, (len(share), 12, 24, 24))
    width = 0.2 * (6 + 10 * period)
    targets = dict(zip(BIOMARKERS, (share, share * width, (1 - share) * width, 1 / width), strict=True))
    subjects = np.repeat([f"s{i}" for i in range(n_subjects)], each)
    table = pd.DataFrame({"knee_id": subjects, "subject_id": subjects, "patch_id": np.tile(range(each), n_subjects)})
    voi = np.ones(bone.shape, bool)
    voi[:, :, :6] = False
    table = table.assign(**targets, cortex_femur_hu=900.0, cortex_tibia_hu=1100.0)
    return Patches(table, mr.astype(np.float16), hu.astype(np.float16), voi)


def splits_of(patches, n_folds=2):
    subjects = pd.unique(patches.table["subject_id"])
    return pd.DataFrame({"subject_id": subjects, "fold": np.arange(len(subjects)) % n_folds})


@pytest.fixture(scope="module")
def patches():
    return toy()


@pytest.fixture(scope="module")
def trained(patches, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return folder, cross_validate(patches, splits_of(patches), ARMS, TINY, [3], folder)


def lesson(maps, teacher_maps, **further):
    zero = torch.zeros(2, 4)
    return Lesson(zero, maps, torch.ones(2, 1, 12, 24, 24), zero, teacher_maps, **further)


def random_maps(seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand((2, c, 12, s, s), generator=generator) for c, s in ((3, 24), (4, 12))]


def test_published_feature_loss_is_the_sum_of_mean_absolute_differences():
    a = random_maps(0)
    assert distillation_loss(lesson(a, a), {"feature_l1": 0.7}) == 0
    shifted = [m + d for m, d in zip(a, (0.25, -0.5), strict=True)]
    # 0.1 (0.25 + 0.5); float32 sums over 40000 values
    assert distillation_loss(lesson(shifted, a), {"feature_l1": 0.1}).item() == pytest.approx(0.075, rel=1e-5)
    assert distillation_loss(lesson(shifted, a), {}) == 0


def test_correlation_and_relation_do_not_ask_for_the_teachers_scale():
    a = random_maps(0)
    scaled = [3 * m + 2 for m in a]
    assert distillation_loss(lesson(scaled, a), {"feature_correlation": 1.0}).item() == pytest.approx(0, abs=1e-5)
    assert distillation_loss(lesson(scaled, a), {"relation": 1.0}).item() == pytest.approx(0, abs=1e-5)
    # independent maps: correlation 0, hence loss 1; 600 to 7000 values a channel leave a few hundredths
    assert distillation_loss(lesson(random_maps(1), a), {"feature_correlation": 1.0}).item() == pytest.approx(
        1, abs=0.1
    )


def test_detail_loss_is_the_entropy_where_nothing_is_known():
    fraction, flat = torch.full((2, 12, 48, 48), 0.5), torch.zeros(2, 4, 12, 24, 24)
    loss = distillation_loss(lesson([], [], detail_logits=flat, bone_fraction=fraction), {"detail": 1.0})
    assert loss.item() == pytest.approx(np.log(2), rel=1e-6)


def test_local_evidence_is_zero_for_equal_networks():
    one = torch.rand(2, 4, 6, 6, 6, generator=torch.Generator().manual_seed(0))
    assert distillation_loss(lesson([], [], evidence=one, teacher_evidence=one), {"local_evidence": 1.0}).item() == 0
    # an offset of a half everywhere: its square, whatever the number of places
    apart = distillation_loss(lesson([], [], evidence=one, teacher_evidence=one + 0.5), {"local_evidence": 1.0})
    assert apart.item() == pytest.approx(0.25, rel=1e-5)


def test_attention_asks_where_and_not_how_much():
    a = random_maps(0)
    assert distillation_loss(lesson([-2 * m for m in a], a), {"attention": 1.0}).item() == pytest.approx(0, abs=1e-6)
    # energy in one half against energy in the other: unit vectors at right angles, squared distance 2
    left, right = torch.zeros(2, 1, 2, 2, 2), torch.zeros(2, 1, 2, 2, 2)
    left[..., 0], right[..., 1] = 1.0, 1.0
    assert distillation_loss(lesson([left], [right]), {"attention": 1.0}).item() == pytest.approx(2)


def test_gamma_zero_is_ct_only(patches, tmp_path):
    settings = TINY | {"gammas": (0.0,)}
    found = cross_validate(patches, splits_of(patches), ["ct_only", "ct_sma"], settings, [0], tmp_path)
    alone, taught = (found.loc[found["arm"] == arm, list(BIOMARKERS)].to_numpy() for arm in ("ct_only", "ct_sma"))
    np.testing.assert_array_equal(alone, taught)


def test_of_several_gammas_the_least_validation_error_is_kept_and_a_finished_trial_not_repeated(
    patches, tmp_path, monkeypatch
):
    settings = TINY | {"gammas": (0.0, 50.0), "epochs": 2}

    def stopped(role, recipe, *rest):
        if recipe.get("feature_l1") == 50.0:
            raise KeyboardInterrupt
        return train(role, recipe, *rest)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("ctsma.distillation.arms.train", stopped)
        cross_validate(patches, splits_of(patches), ["ct_sma"], settings, [0], tmp_path)
    assert len(list(tmp_path.glob("ct_sma_fold0_seed0_0.unfinished"))) == 1  # the first gamma's network is kept
    cross_validate(patches, splits_of(patches), ["ct_sma"], settings, [0], tmp_path)
    for record in distillation.read_records(tmp_path, "ct_sma"):
        kept = settings["gammas"][int(np.argmin(record["validation_mse"]))]
        assert len(record["validation_mse"]) == 2 and record["recipe"] == {"feature_l1": kept}
    assert not list(tmp_path.glob("*.unfinished"))


def test_every_patch_is_predicted_once_an_arm_in_its_own_units(trained, patches):
    _, found = trained
    assert list(found["arm"].unique()) == ARMS
    assert not found.duplicated(["arm", "knee_id", "patch_id"]).any()
    assert len(found) == len(ARMS) * len(patches.table)
    assert np.isfinite(found[list(BIOMARKERS)]).all(axis=None)


def test_no_model_saw_the_subjects_that_it_predicts(trained):
    folder, found = trained
    for path in folder.glob("*.json"):
        record = json.loads(path.read_text())
        parts = [set(record["subjects"][part]) for part in ("fit", "validation", "test")]
        assert not (parts[0] & parts[1] or parts[0] & parts[2] or parts[1] & parts[2])
        rows = found[(found["arm"] == record["arm"]) & (found["fold"] == record["fold"])]
        assert set(rows["subject_id"]) == parts[2]


def test_scales_come_from_the_fitting_subjects_alone(trained, patches):
    record = json.loads((trained[0] / "ct_only_fold0_seed3.json").read_text())
    fit = patches.table["subject_id"].isin(record["subjects"]["fit"]).to_numpy()
    targets = patches.table.loc[fit, list(BIOMARKERS)]
    np.testing.assert_allclose(record["scale"]["low"], targets.min())
    np.testing.assert_allclose(record["scale"]["high"], targets.max())
    assert record["scale"]["ct"][0] == pytest.approx(patches.ct[fit].mean(dtype=float))


def test_a_second_run_trains_nothing_and_a_fresh_one_gives_the_same_bits(trained, patches, tmp_path):
    folder, found = trained
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    again = cross_validate(patches, splits_of(patches), ARMS, TINY, [3], folder)
    assert before == {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    pd.testing.assert_frame_equal(found, again, check_exact=True)
    fresh = cross_validate(patches, splits_of(patches), ARMS[1:3], TINY, [3], tmp_path)
    known = found[found["arm"].isin(ARMS[1:3])].reset_index(drop=True)
    pd.testing.assert_frame_equal(known, fresh, check_exact=True)


def test_other_settings_train_again(trained, patches, tmp_path):
    cross_validate(patches, splits_of(patches), ["ct_only"], TINY, [3], tmp_path)
    first = json.loads((tmp_path / "ct_only_fold0_seed3.json").read_text())["key"]
    cross_validate(patches, splits_of(patches), ["ct_only"], TINY | {"weight_decay": 0.5}, [3], tmp_path)
    assert json.loads((tmp_path / "ct_only_fold0_seed3.json").read_text())["key"] != first


def test_a_model_of_another_protocol_is_refused(trained):
    stem = trained[0] / "ct_only_fold0_seed3"
    model, record = distillation.load_model(stem, {"protocol_sha256": ""})
    assert record["role"] == "student"
    assert not model.training
    with pytest.raises(InputFault, match="another protocol_sha256"):
        distillation.load_model(stem, {"protocol_sha256": "f" * 64})
    with pytest.raises(InputFault, match="no trained model"):
        distillation.load_model(trained[0] / "nothing")


def test_networks_and_ridge_learn_what_stripes_show(tmp_path):
    patches = toy(10, 5)
    settings = TINY | {"epochs": 40, "widths": (4, 8, 8), "learning_rate": 0.01, "batch_size": 4}
    found = cross_validate(
        patches, splits_of(patches), ["hu_regression", "mr_teacher", "ct_only"], settings, [0], tmp_path
    )
    truth = patches.table[["knee_id", "patch_id", "bv_tv"]]
    for arm, rows in found.groupby("arm"):
        joined = rows.merge(truth, on=["knee_id", "patch_id"], suffixes=("", "_true"))
        error = ((joined["bv_tv"] - joined["bv_tv_true"]) ** 2).mean()
        assert error < 0.5 * truth["bv_tv"].var(), arm  # half of what the mean leaves: far from chance


def test_ct_features_do_not_see_outside_the_region(patches):
    changed = patches.ct.copy()
    changed[:, :, :3] = 1000
    wanted, found = (distillation.ct_features(ct[:4], patches.voi[:4]) for ct in (patches.ct, changed))
    columns = np.isclose(wanted, found).all(0)
    assert columns[:14].all()  # intensities and share; smoothing reaches over the edge
    assert np.isfinite(distillation.ct_features(patches.ct[:2], np.zeros_like(patches.voi[:2]))).all()


def test_augmentation_is_drawn_from_the_generator_alone():
    hu = torch.full((3, 12, 24, 24), 400.0)
    a, b = (distillation.augment_ct(hu, np.random.default_rng(5)) for _ in range(2))
    assert torch.equal(a, b)
    assert not torch.equal(a, distillation.augment_ct(hu, np.random.default_rng(6)))


def faulty(patches, **changes):
    return Patches(**({"table": patches.table, "mr": patches.mr, "ct": patches.ct, "voi": patches.voi} | changes))


def test_bad_input_is_refused_with_a_sentence(patches, tmp_path):
    holed = patches.ct.copy()
    holed[4, 3, 2, 1] = np.nan
    flat, unruled = patches.table.assign(bv_tv=0.3), patches.table.assign(cortex_tibia_hu=np.inf)
    run = lambda p, s, settings=TINY, arms=("ct_only",): cross_validate(p, s, arms, settings, [0], tmp_path)  # noqa: E731
    splits = splits_of(patches)
    crowded = pd.concat([splits, splits.assign(subject_id="x", fold=range(8, 16))])
    for fault, call in {
        "not finite in ct": lambda: run(faulty(patches, ct=holed), splits),
        "not finite in ruler": lambda: run(faulty(patches, table=unruled), splits),
        "no variance of bv_tv": lambda: run(faulty(patches, table=flat), splits),
        "no fold for subject": lambda: run(patches, splits.iloc[1:]),
        "folds for 8 subjects": lambda: run(patches, crowded),
        "too few subjects": lambda: run(patches, splits.assign(fold=[0] * 7 + [1])),
        "hold 'ct_magic'": lambda: run(patches, splits, arms=("ct_magic",)),
        "settings.epoch": lambda: run(patches, splits, {"epoch": 3}),
        "weighed: names ct_magic, ct_only, which": lambda: run(
            patches, splits, TINY | {"weighed": ("ct_magic", "ct_only")}
        ),
        "unknown terms": lambda: run(patches, splits, TINY | {"plus": {"magic": 1.0}}, ("ct_sma_plus",)),
    }.items():
        with pytest.raises(InputFault, match=fault):
            call()


def test_knees_without_mr_are_read_by_the_networks_of_their_folds(trained, patches):
    """As paired knees without their MR they must get the very predictions that cross-validation gave them."""
    folder, predictions = trained
    rows = np.flatnonzero(patches.table["subject_id"].isin(patches.table["subject_id"].unique()[:3]))
    bare = Patches(
        patches.table.iloc[rows].drop(columns=list(BIOMARKERS)).reset_index(drop=True),
        np.zeros_like(patches.mr[rows]),
        patches.ct[rows],
        patches.voi[rows],
    )
    found = distillation.predict_unpaired(
        bare, splits_of(patches), ["ct_only", "ct_residual", "mr_teacher"], [3], folder
    )
    assert set(found["arm"]) == {"ct_only", "ct_residual"}
    both = found.merge(predictions, on=["arm", "fold", "knee_id", "patch_id"], suffixes=("", "_paired"))
    assert len(both) == 2 * len(rows)
    for name in BIOMARKERS:
        np.testing.assert_allclose(both[name], both[f"{name}_paired"], rtol=1e-5)
    assert distillation.predict_unpaired(bare, splits_of(patches), ["hu_regression"], [3], folder).empty


def test_damaged_weights_are_refused(trained, tmp_path):
    for suffix in (".json", ".safetensors"):
        shutil.copy(trained[0] / f"ct_only_fold0_seed3{suffix}", tmp_path / f"m{suffix}")
    distillation.load_model(tmp_path / "m")
    data = bytearray((tmp_path / "m.safetensors").read_bytes())
    data[-1] ^= 1  # one bit of one weight
    (tmp_path / "m.safetensors").write_bytes(bytes(data))
    with pytest.raises(InputFault, match="is missing or damaged; run the stage again"):
        distillation.load_model(tmp_path / "m")


def test_seeds_are_averaged_and_their_spread_is_kept(patches, tmp_path):
    found = cross_validate(patches, splits_of(patches), ["hu_regression", "ct_only"], TINY, [0, 1], tmp_path)
    assert found.groupby("arm")["seed"].nunique().to_dict() == {"hu_regression": 1, "ct_only": 2}
    mean = distillation.over_seeds(found).set_index(["arm", "knee_id", "patch_id"]).sort_index()
    assert len(mean) == 2 * len(patches.table)
    one = found[(found["arm"] == "ct_only")].groupby(["knee_id", "patch_id"])
    row = mean.loc[("ct_only", *next(iter(one.groups)))]
    values = one.get_group(next(iter(one.groups)))
    assert row["bv_tv"] == pytest.approx(values["bv_tv"].mean())
    variance = (values["bv_tv_sd"] ** 2).mean() + values["bv_tv"].var(ddof=0)
    assert row["bv_tv_sd"] == pytest.approx(variance**0.5)
    assert mean.loc["hu_regression", "bv_tv_sd"].isna().all()


def test_an_interrupted_training_goes_on_to_the_same_bits(patches, tmp_path):
    settings = distillation.Settings(**TINY | {"epochs": 3})
    examples = distillation.prepare(patches, detail=False)
    fold = fold_of(examples, splits_of(patches), 0, 0, settings, "ct_only")
    options = examples, fold, 0, settings
    whole, curves = train("student", {}, None, *options)

    class Cut(Progress):
        def keep(self, parts, rng, curves, finished):
            super().keep(parts, rng, curves, finished)
            if len(curves) == 2:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train("student", {}, None, *options, Cut(tmp_path / "one", "key", 0.0))
    resumed = Progress(tmp_path / "one", "key", 1e9)
    again, further = train("student", {}, None, *options, resumed)
    pd.testing.assert_frame_equal(curves, further, check_exact=True)
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), again.state_dict().values(), strict=True))
    other = Progress(tmp_path / "one", "another key", 1e9)
    assert other.resume({}, np.random.default_rng(0)) == []
    resumed.path.write_bytes(resumed.path.read_bytes()[:100])
    assert resumed.resume({}, np.random.default_rng(0)) == []
    resumed.done()
    assert not resumed.path.exists()


def test_the_ruler_is_seen_by_the_arms_that_have_one_and_by_no_other(patches, tmp_path):
    longer = patches.table.assign(cortex_femur_hu=np.linspace(900, 2000, len(patches.table)))
    other = Patches(longer, patches.mr, patches.ct, patches.voi)
    examples = [distillation.prepare(p, detail=False) for p in (patches, other)]
    settings = distillation.Settings(**TINY)
    for arm, same in (("hu_regression", True), ("ruler_regression", False)):
        a, b = (cross_validate(p, splits_of(patches), [arm], TINY, [0], tmp_path)["bv_tv"] for p in (patches, other))
        assert np.array_equal(a, b) == same
    for arm, ruled in (("ct_only", False), ("ct_residual", True)):
        fold = fold_of(examples[0], splits_of(patches), 0, 0, settings, arm)
        model, _ = train("student", {}, None, examples[0], fold, 0, settings)
        a, b = (distillation.predict(model, "student", e, fold.test, fold.scale, settings) for e in examples)
        assert np.array_equal(a, b) != ruled


def test_the_ridge_is_the_one_of_scikit_learn_and_a_ruled_student_starts_from_it(patches):
    examples, subjects = distillation.prepare(patches, detail=False), patches.table["subject_id"].to_numpy(str)
    x, y, own = examples.features, examples.targets, subjects != subjects[0]
    pipeline, grid = make_pipeline(StandardScaler(), Ridge()), {"ridge__alpha": ALPHAS}
    search = GridSearchCV(pipeline, grid, cv=GroupKFold(5), scoring="neg_mean_squared_error")
    wanted = np.column_stack([search.fit(x[own], t[own], groups=subjects[own]).predict(x) for t in y.T])
    weights = fit_ridge(x[own], y[own], subjects[own])
    low, high = y[own].min(0), y[own].max(0)
    np.testing.assert_allclose(read_ridge(weights, x, -np.inf, np.inf), wanted, rtol=1e-9)
    np.testing.assert_allclose(read_ridge(weights, x, low, high), wanted.clip(low, high), rtol=1e-9)
    settings = distillation.Settings(**TINY)
    fold = fold_of(examples, splits_of(patches), 0, 0, settings, "ct_residual")
    silent = build("student", "compact", torch.Generator().manual_seed(0), (4, 4, 8), ruler=True).eval()
    for parameter in silent.head.parameters():
        torch.nn.init.zeros_(parameter)
    found = distillation.predict(silent, "student", examples, fold.test, fold.scale, settings)
    ridge = read_ridge(
        *(np.array(v) for v in (fold.scale["ridge"], x[fold.test], fold.scale["low"], fold.scale["high"]))
    )
    np.testing.assert_allclose(found, ridge, rtol=1e-5)


def test_a_teacher_that_is_remembered_teaches_what_it_says(patches, monkeypatch):
    splits, settings = splits_of(patches), distillation.Settings(**TINY | {"epochs": 4})
    examples = distillation.prepare(patches, detail=False)
    fold = fold_of(examples, splits, 0, 3, settings, "ct_only")
    teacher = (
        build("teacher", "compact", torch.Generator().manual_seed(0), settings.widths).eval().requires_grad_(False)
    )
    memory, asked = training.Memory(teacher, examples, fold, settings), fold.fit[[3, 0, 2]]
    for flips in ((), (1,), (1, 3)):
        with torch.no_grad():
            wanted, maps = teacher(image_of("teacher", examples, asked, fold.scale, "cpu", flips))
            evidence = teacher.evidence(maps[-1])
        said = memory(asked, flips)
        torch.testing.assert_close([said.prediction, said.evidence, *said.maps], [wanted, evidence, *maps])
    recipe, options = {"feature_l1": 0.1, "local_evidence": 0.3}, (examples, fold, 3, settings)
    remembered, curves = train("student", recipe, memory, *options)
    monkeypatch.setattr(training, "MEMORY_BYTES", 0)
    forgetful = training.Memory(teacher, examples, fold, settings)
    live, _ = train("student", recipe, forgetful, *options)
    assert memory.kept and not forgetful.kept
    for a, b in zip(remembered.state_dict().values(), live.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert curves["validation_mse"].notna().tolist() == [True, False, False, True]


def test_the_predicted_spread_learns_from_errors_and_leaves_predictions_alone():
    model = build("student", "compact", torch.Generator().manual_seed(0), (4, 4, 8))
    maps, x, error = model(torch.rand(3, 2, 12, 24, 24))[1], torch.ones(3, 2, 12, 24, 24), torch.full((3, 4), 0.1)
    torch.nn.init.zeros_(model.spread.weight)
    # likelihood of an error e under log variance s: (e^2 exp(-s) + s) / 2, least at s = log e^2
    for s in (0.0, float(np.log(0.01))):
        torch.nn.init.constant_(model.spread.bias, s)
        loss = _spread_loss(model, maps, x, error)
        assert loss.item() == pytest.approx(0.5 * (0.01 * np.exp(-s) + s), rel=1e-4)
    loss.backward()
    assert model.spread.bias.grad.abs().max() < 1e-5  # the minimum
    assert all(p.grad is None for name, p in model.named_parameters() if not name.startswith("spread"))


def test_the_mr_of_a_pair_teaches_as_often_as_its_weight_says(patches):
    examples = distillation.prepare(patches, detail=False)
    whole = fold_of(examples, splits_of(patches), 0, 0, distillation.Settings(**TINY), "ct_sma")
    n, rng = len(whole.fit), np.random.default_rng(0)
    np.testing.assert_array_equal(whole.taught(rng), whole.fit)
    np.testing.assert_array_equal(replace(whole, weights=np.ones(n)).taught(rng), whole.fit)
    weights = np.arange(n) / (n - 1)  # of the first no MR is ever seen, of the last always
    shares = np.mean([np.isin(whole.fit, replace(whole, weights=weights).taught(rng)) for _ in range(400)], axis=0)
    assert shares[0] == 0 and shares[-1] == 1
    np.testing.assert_allclose(shares, weights, atol=0.1)  # SD of a mean of 400: at most 0.025


@pytest.mark.parametrize("term", distillation.TERMS)
def test_a_lesson_of_some_pairs_is_theirs_alone_times_their_share(term):
    """Whatever stands in the other pairs, even NaN, does not count."""
    pairs, generator = np.array([True, False, True, True, False, True]), torch.Generator().manual_seed(0)
    any_of = lambda *shape: torch.rand((6, *shape), generator=generator)  # noqa: E731
    fine, coarse, places = (3, 12, 24, 24), (4, 12, 12, 12), (4, 6, 6, 6)
    maps = [[any_of(*fine), any_of(*coarse)] for _ in range(2)]
    parts = [any_of(4), maps[0], torch.ones(6, 1, 12, 24, 24), any_of(4), maps[1], any_of(*places), any_of(*places)]
    parts += [any_of(4, 12, 24, 24), any_of(12, 48, 48)]
    whole, recipe = Lesson(*parts), {term: 0.5}
    own, every = distillation_loss(whole.of(pairs), recipe), distillation_loss(whole, recipe)
    assert distillation_loss(whole, recipe, np.ones(6, bool)) == every != own
    for values in [*maps[0], *maps[1], *(part for part in parts if torch.is_tensor(part))]:
        values[~torch.from_numpy(pairs)] = np.nan
    assert distillation_loss(whole, recipe, pairs).item() == pytest.approx(own.item() * 4 / 6, rel=1e-6)
    assert distillation_loss(whole, recipe, np.arange(6) == 2) == 0  # of a single pair nothing is said


def test_alignment_is_one_in_place_and_falls_with_the_shift(patches):
    """Bone that differs from place to place: a seeded field, sharp in MR, averaged in CT."""
    field = ndimage.gaussian_filter(np.random.default_rng(0).normal(size=(6, 18, 96, 96)), (0, 0.5, 2, 2))
    bone = (field > 0).astype(np.float32)
    mr = 1 - bone[:, 3:15, 24:72, 24:72]
    voi, noise = np.ones(mr.shape, bool), np.random.default_rng(1).normal(0, 150, (6, 12, 24, 24))
    found = {}
    for shift in (0, 2, 4, 8):  # MR pixels of 0.22 mm
        moved = bone[:, 3:15, 24 + shift : 72 + shift, 24:72]
        found[shift] = distillation.alignment(900 * on_ct_grid(moved) + noise, mr, voi)
    np.testing.assert_allclose(found[0], 1, atol=0.02)
    assert (found[0] > found[2]).all() and (found[2] > found[4]).all() and (found[8] < 0.3).all()
    assert not distillation.alignment(900 * on_ct_grid(bone[:, 3:15, 24:72, 24:72]), np.ones_like(mr), voi).any()


@pytest.mark.parametrize("all_match", [True, False])
def test_weighed_arms_alone_are_weighed(patches, tmp_path, all_match):
    """To the same bits: an arm that is not weighed, and every arm where all pairs match, as the toy's do."""
    splits, arms, mr = splits_of(patches), ["ct_sma", "ct_sma_plus"], patches.mr.copy()
    mr[::2] = mr[::2] if all_match else 1  # an MR that shows nothing matches nowhere
    plain, weighed = (
        cross_validate(
            replace(patches, mr=mr), splits, arms, TINY | {"weighed": names}, [0], tmp_path / str(len(names))
        )
        for names in ((), ("ct_sma_plus",))
    )
    for arm, same in zip(arms, (True, all_match), strict=True):
        a, b = (found.loc[found["arm"] == arm, list(BIOMARKERS)].to_numpy() for found in (plain, weighed))
        assert np.array_equal(a, b) == same


def test_weights_are_refused_where_no_pair_matches(patches, tmp_path):
    splits = splits_of(patches)
    blank = replace(patches, mr=np.ones_like(patches.mr))
    with pytest.raises(InputFault, match="fold 0: has no pair whose CT and MR match"):
        cross_validate(blank, splits, ["ct_sma"], TINY | {"weighed": ("ct_sma",)}, [0], tmp_path)
