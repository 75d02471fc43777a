"""ROC statistics against published data and brute force; the Transformer against invariants."""

import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import pandas as pd
import pytest
import torch

from ctsma.common import BIOMARKERS, COMPARTMENTS, InputError
from ctsma.diagnosis import (
    auc_delong,
    bootstrap_auc,
    calibration,
    compare_delong,
    compartment_means,
    cross_validate_tabular,
    roc_band,
    tokens_by_arm,
)
from ctsma.diagnosis.statistics import hanley_mcneil_se
from ctsma.diagnosis.transformer import PatchTransformer, TransformerSettings, cross_validate_arms
from ctsma_lab.diagnosis_views import (
    calibration_curve,
    label_problem,
    net_benefit,
    permute_labels,
    sensitivity_at_specificity,
)

# Hanley & McNeil 1982, Radiology 143, table I: CT ratings 1..5 of 58 normal and 51 abnormal
# patients
RATINGS = np.repeat([1, 2, 3, 4, 5] * 2, [33, 6, 6, 11, 2, 3, 2, 2, 11, 33]).astype(float)
ABNORMAL = np.repeat([0, 1], [58, 51])
SMALL = TransformerSettings(width=16, layers=1, epochs=12, learning_rate=1e-2)


def brute_force(labels: np.ndarray, scores: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
    """AUC and its structural components by the double loop of DeLong 1988."""
    kernel = np.array(
        [[(a > b) + 0.5 * (a == b) for b in scores[labels == 0]] for a in scores[labels == 1]]
    )
    return kernel.mean(), kernel.mean(axis=1), kernel.mean(axis=0)


def two_scores(n: int = 60) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(4)
    labels, truth = np.arange(n) % 2, rng.normal(size=n)
    a = np.round(labels + truth + 0.5 * rng.normal(size=n), 1)  # rounded: ties
    return labels, a, np.round(0.7 * labels + truth + 0.5 * rng.normal(size=n), 1)


def test_hanley_and_mcneil_1982():
    result = auc_delong(ABNORMAL, RATINGS)
    assert (result["auc"], result["se"]) == pytest.approx(
        (0.8932, 0.0307), abs=5e-5
    )  # published rounding
    assert (result["ci_low"], result["ci_high"]) == pytest.approx((0.833, 0.953), abs=5e-4)
    assert hanley_mcneil_se(result["auc"], 51, 58) == pytest.approx(0.0325, abs=5e-5)
    assert result["flag"] == ""


def test_delong_is_the_u_statistic_of_the_double_loop():
    labels, a, b = two_scores()
    (auc_a, cases_a, controls_a), (auc_b, cases_b, controls_b) = (
        brute_force(labels, s) for s in (a, b)
    )
    variance = np.cov(cases_a, cases_b) / 30 + np.cov(controls_a, controls_b) / 30
    result, pair = auc_delong(labels, a), compare_delong(labels, a, b)
    assert (result["auc"], result["se"] ** 2) == pytest.approx((auc_a, variance[0, 0]), rel=1e-12)
    z = (auc_a - auc_b) / np.sqrt(variance[0, 0] + variance[1, 1] - 2 * variance[0, 1])
    assert (pair["z"], pair["difference"]) == pytest.approx((z, auc_a - auc_b), rel=1e-12)
    assert pair["ci_low"] < pair["difference"] < pair["ci_high"] and 0 < pair["p"] < 1


def test_auc_keeps_its_symmetries():
    labels, a, b = two_scores()
    assert auc_delong(labels, np.exp(a)) == auc_delong(labels, a)  # ranks only
    assert auc_delong(1 - labels, -a)["auc"] == pytest.approx(auc_delong(labels, a)["auc"])
    assert compare_delong(labels, b, a)["z"] == -compare_delong(labels, a, b)["z"]
    same = compare_delong(labels, a, 2 * a + 1)
    assert (same["z"], same["p"], same["difference"]) == (0, 1, 0)


def test_perfect_and_constant_scores_are_flagged_and_keep_an_open_interval():
    labels = np.repeat([0, 1], 20)
    for scores, auc in ((labels, 1), (1 - labels, 0), (np.zeros(40), 0.5)):
        result = auc_delong(labels, scores)
        assert (result["auc"], result["se"]) == (auc, 0) and "zero DeLong variance" in result[
            "flag"
        ]
        assert result["ci_high"] - result["ci_low"] > 0.05
    perfect = auc_delong(labels, labels)
    assert (
        0.85 < perfect["ci_low"] < 0.95
    )  # Wilson for 20 of 20 is 0.84; two samples of 20 know a little more
    assert auc_delong(labels, 1 - labels)["ci_high"] == pytest.approx(1 - perfect["ci_low"])
    undecided = compare_delong(labels, labels, np.zeros(40))
    assert undecided["z"] == np.inf and np.isnan(undecided["p"])


@pytest.mark.parametrize(
    ("labels", "scores", "words"),
    [
        ([0, 1, np.nan, 1], [1, 2, 3, 4], "not 0 or 1"),
        ([0, 1, 2, 1], [1, 2, 3, 4], "not 0 or 1"),
        ([0, 0, 1, 1], [1, 2, np.nan, 4], "NaN"),
        ([0, 0, 1, 1], [1, 2, 3], "length"),
        ([1, 1, 1, 1], [1, 2, 3, 4], "at least 2 of each"),
    ],
)
def test_auc_refuses(labels, scores, words):
    with pytest.raises(InputError, match=words):
        auc_delong(labels, scores)


def test_bootstrap_agrees_with_delong_and_resamples_subjects():
    labels, a, _ = two_scores(200)
    known = auc_delong(labels, a)
    alone = bootstrap_auc(labels, a, np.arange(200), np.random.default_rng(0))
    assert alone["auc"] == pytest.approx(known["auc"])
    # both estimate the same SE; at 100 + 100 the two half-widths differ by a few per cent
    assert alone["ci_high"] - alone["ci_low"] == pytest.approx(
        known["ci_high"] - known["ci_low"], rel=0.15
    )
    twins = [np.tile(v, 2) for v in (labels, a, np.arange(200))]  # every knee twice adds nothing
    assert bootstrap_auc(*twins, np.random.default_rng(0)) == pytest.approx(alone)
    band = roc_band(labels, a, np.arange(200), np.random.default_rng(0), 200)
    assert (band["low"] <= band["tpr"]).all() and (band["tpr"] <= band["high"]).all()
    assert np.trapezoid(band["tpr"], band["fpr"]) == pytest.approx(
        known["auc"], abs=0.005
    )  # grid of 1 %


def test_sensitivity_and_net_benefit_by_counting():
    labels, scores = np.repeat([0, 1], 10), np.r_[np.arange(10), np.arange(5, 15)] / 20
    result = sensitivity_at_specificity(labels, scores, 0.90)
    assert (result["threshold"], result["specificity"], result["sensitivity"]) == (0.4, 0.9, 0.6)
    assert result["ci_low"] < 0.6 < result["ci_high"]
    curve = net_benefit(labels, scores, [0.2, 0.4])
    assert curve["model"].to_numpy() == pytest.approx(
        [0.5 - 0.3 / 4, 0.35 - 0.1 / 1.5]
    )  # TP/n - FP/n t/(1-t)
    assert curve["treat_all"].to_numpy() == pytest.approx([0.5 - 0.5 / 4, 0.5 - 0.5 / 1.5])


def test_calibration_recovers_a_known_distortion():
    rng, n = np.random.default_rng(0), 20000
    logit = rng.normal(size=n)
    labels = (rng.random(n) < 1 / (1 + np.exp(-logit))).astype(int)
    stretched = 1 / (1 + np.exp(-2 * logit))
    shifted = 1 / (1 + np.exp(-logit + 0.5))
    assert calibration(labels, stretched)["slope"] == pytest.approx(
        0.5, abs=0.03
    )  # 3 SE of the fit
    assert calibration(labels, shifted)["intercept"] == pytest.approx(0.5, abs=0.05)
    assert calibration([0, 0, 1, 1], [0.1, 0.4, 0.3, 0.9])["brier"] == pytest.approx(
        (0.01 + 0.16 + 0.49 + 0.01) / 4
    )
    assert np.isnan(
        calibration([0, 0, 1, 1], [0.1, 0.2, 0.8, 0.9])["slope"]
    )  # separated: no slope exists
    curve = calibration_curve(labels, stretched)
    assert (curve["ci_low"] < curve["observed"]).all() and curve["n"].sum() == n
    with pytest.raises(InputError, match="outside"):
        calibration([0, 0, 1, 1], [0.1, 0.2, 0.8, 1.9])


def cohort(
    n: int = 40, effect: float = 3.0, seed: int = 0
) -> tuple[pd.DataFrame, pd.Series, pd.DataFrame]:
    """Tokens of n knees of n subjects, 3 patches per compartment; OA changes the medial ones."""
    rng, rows = np.random.default_rng(seed), []
    for knee in range(n):
        for name in COMPARTMENTS:
            shift = effect * (knee % 2) * name.endswith("medial") * np.array([1, 0.5, -0.5, 0.2])
            for values in rng.normal(size=(3, 7)):
                rows.append(
                    (f"k{knee:02d}", f"s{knee:02d}", name, *values[:3], *(values[3:] + shift))
                )
    tokens = pd.DataFrame(
        rows, columns=["knee_id", "subject_id", "compartment", "u", "v", "w", *BIOMARKERS]
    )
    labels = pd.Series(np.arange(n) % 2, index=[f"k{knee:02d}" for knee in range(n)])
    splits = pd.DataFrame(
        {"subject_id": [f"s{knee:02d}" for knee in range(n)], "fold": np.arange(n) // 2 % 4}
    )
    return tokens, labels, splits


def cross_validate(tokens, labels, splits, settings=SMALL, seed: int = 0) -> pd.DataFrame:
    scores = cross_validate_arms({"arm": tokens}, labels, splits, settings, [seed])
    return scores.drop(columns=["arm", "seed"])


def auc_of(scores: pd.DataFrame, labels: pd.Series) -> float:
    return auc_delong(labels[scores["knee_id"]], scores["score"])["auc"]


def test_tokens_of_an_arm_and_of_the_reference():
    rng = np.random.default_rng(0)
    place, _, _ = cohort(4)
    place["patch_id"] = place.groupby("knee_id").cumcount()
    references = [f"{name}_reference" for name in BIOMARKERS]
    place[references] = rng.normal(size=(len(place), 4))
    predictions = pd.concat([place.assign(arm="ct_sma"), place.assign(arm="ct_only", bv_tv=0.5)])
    tokens = tokens_by_arm(predictions.assign(further=1.0), ["k01", "k03"])
    assert list(tokens) == ["ct_sma", "ct_only", "mr_reference"]
    columns = {"knee_id", "subject_id", "patch_id", "compartment", "u", "v", "w", *BIOMARKERS}
    assert all(set(rows) == columns and len(rows) == 24 for rows in tokens.values())
    assert tokens["ct_only"]["bv_tv"].eq(0.5).all()
    kept = place[place["knee_id"].isin(["k01", "k03"])]
    assert np.array_equal(tokens["mr_reference"][list(BIOMARKERS)], kept[references])


def test_transformer_finds_oa_on_knees_it_never_saw_and_repeats_itself():
    tokens, labels, splits = cohort()
    first = cross_validate(tokens, labels, splits, seed=3)
    assert auc_of(first, labels) > 0.9  # the effect is 3 SD on six patches
    assert first["knee_id"].tolist() == labels.index.tolist() and first["score"].between(0, 1).all()
    assert first["fold"].tolist() == splits["fold"].tolist()
    state = torch.random.get_rng_state()
    again = cross_validate(tokens, labels, splits, seed=3)
    assert first.equals(again) and torch.equal(state, torch.random.get_rng_state())
    assert not first.equals(cross_validate(tokens, labels, splits, seed=4))


def test_each_compartment_has_its_own_embedding():
    torch.manual_seed(0)
    model, tokens = (
        PatchTransformer(3 + len(COMPARTMENTS), SMALL).eval(),
        torch.randn(2, 5, 3 + len(COMPARTMENTS)),
    )
    tokens[..., 3:] = torch.eye(len(COMPARTMENTS))[1]  # all patches lie in the second compartment
    model(tokens, torch.zeros(2, 5, dtype=torch.bool))[0].sum().backward()
    reached = (
        model.embed.weight.grad.abs().sum(dim=0).reshape(4, len(COMPARTMENTS)) > 0
    )  # three features and the place
    assert reached[:, 1].all() and reached.sum() == 4


def test_arms_of_one_call_equal_the_arms_one_by_one():
    tokens, labels, splits = cohort()
    noise = tokens.copy()
    noise[list(BIOMARKERS)] = np.random.default_rng(0).normal(size=(len(tokens), 4))
    arms = {"mr_reference": tokens, "ct_only": noise}
    sweep = cross_validate_arms(arms, labels, splits, SMALL, seeds=[0, 1])
    part = (
        sweep.query("arm == 'mr_reference' and seed == 1")
        .drop(columns=["arm", "seed"])
        .reset_index(drop=True)
    )
    assert part.equals(cross_validate(tokens, labels, splits, seed=1))
    assert auc_of(sweep.query("arm == 'ct_only' and seed == 0"), labels) < 0.8  # 3 SE above 0.5


def test_a_test_knee_cannot_reach_its_own_model():
    tokens, labels, splits = cohort(16)
    strange = tokens.copy()
    test_rows = strange["knee_id"].isin(["k00", "k01"])  # two knees of fold 0
    strange.loc[test_rows, list(BIOMARKERS)] = 1e3
    flipped = labels.copy()
    flipped[["k00", "k01"]] = [1, 0]
    kept = splits.set_index("subject_id")["fold"].eq(0).to_numpy() & ~labels.index.isin(
        ["k00", "k01"]
    )
    before = cross_validate(tokens, labels, splits)["score"][kept]
    after = cross_validate(strange, flipped, splits)["score"][kept]
    assert before.equals(after)


def test_order_and_padding_of_patches_do_not_matter():
    torch.manual_seed(0)
    model = PatchTransformer(5, SMALL).eval()
    tokens, absent = torch.randn(3, 7, 5), torch.zeros(3, 7, dtype=torch.bool)
    absent[1, 4:] = True
    logit, weights = model(tokens, absent)
    order = torch.randperm(7)
    # float32 sums in another order
    torch.testing.assert_close(
        model(tokens[:, order], absent[:, order])[0], logit, atol=1e-5, rtol=1e-5
    )
    torch.testing.assert_close(
        model(tokens[1:2, :4], absent[1:2, :4])[0], logit[1:2], atol=1e-5, rtol=1e-5
    )
    assert weights[1, 4:].eq(0).all() and torch.allclose(weights.sum(dim=1), torch.ones(3))


def test_missing_compartments_and_uneven_knees_are_accepted():
    tokens, labels, splits = cohort()
    few = tokens[~((tokens["knee_id"] < "k10") & tokens["compartment"].str.startswith("tibia"))]
    few = few.drop(few.index[(few["knee_id"] == "k20")][1:]).sample(
        frac=1, random_state=0
    )  # one patch, any order
    assert auc_of(cross_validate(few, labels, splits), labels) > 0.85
    features = compartment_means(few)
    assert (
        features.loc["k00", "bv_tv_tibia_medial"] != features.loc["k00", "bv_tv_tibia_medial"]
    )  # NaN: absent
    assert auc_of(cross_validate_tabular(features, labels, splits), labels) > 0.85


def test_the_smallest_cohort_has_scores():
    tokens, labels, splits = cohort(4)
    scores = cross_validate(tokens, labels, splits.assign(fold=[0, 0, 1, 1]))
    assert scores["score"].between(0, 1).all()


@pytest.mark.parametrize("model", ["logistic", "svm"])
def test_tabular_comparators(model):
    tokens, labels, splits = cohort()
    features = compartment_means(tokens)
    assert features.shape == (40, 17)
    scores = cross_validate_tabular(features, labels, splits, model)
    assert auc_of(scores, labels) > 0.9
    assert scores["knee_id"].tolist() == labels.index.tolist()
    with pytest.raises(InputError, match="choose one of"):
        cross_validate_tabular(features, labels, splits, "forest")


def test_permuted_labels_keep_folds_and_bilateral_subjects_whole():
    knees = [f"k{i:02d}" for i in range(40)]
    owners = [f"s{i // 2:02d}" for i in range(20)] + [
        f"s{i:02d}" for i in range(20, 40)
    ]  # ten of them bilateral
    subjects = pd.Series(owners, index=knees)
    splits = pd.DataFrame({"subject_id": subjects.unique()}).assign(
        fold=lambda s: np.arange(len(s)) // 2 % 2
    )
    labels = pd.Series(np.r_[np.tile([0, 1, 1, 1], 5), np.arange(20) % 2], index=knees)
    permuted = permute_labels(labels, subjects, splits, np.random.default_rng(0))
    assert not permuted.equals(labels) and permuted.index.equals(labels.index)
    fold = subjects.map(splits.set_index("subject_id")["fold"])
    assert permuted.groupby(fold).sum().equals(labels.groupby(fold).sum())
    pairs = [sorted(zip(v[:20:2], v[1:20:2], strict=True)) for v in (labels, permuted)]
    assert pairs[0] == pairs[1]  # a subject's two labels travel together


def test_permuted_labels_give_an_auc_of_one_half():
    tokens, labels, splits = cohort()
    subjects, rng = tokens.groupby("knee_id")["subject_id"].first(), np.random.default_rng(0)
    features, aucs = compartment_means(tokens), []
    for _ in range(20):
        permuted = permute_labels(labels, subjects, splits, rng)
        aucs.append(auc_of(cross_validate_tabular(features, permuted, splits), permuted))
    assert np.mean(aucs) == pytest.approx(
        0.5, abs=0.08
    )  # SE of one is 0.09: 4 SE of the mean of 20


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda t, y, s: (t[t["knee_id"] != "k03"], y, s), "k03 lack a patch"),
        (lambda t, y, s: (t, y.drop("k03"), s), "k03 lack a patch or a label"),
        (lambda t, y, s: (t, y.astype(float).replace({1: np.nan}), s), "not 0 or 1"),
        (lambda t, y, s: (t, y + 1, s), "not 0 or 1"),
        (lambda t, y, s: (t.assign(tb_th_mm=np.nan), y, s), "nothing in tb_th_mm"),
        (lambda t, y, s: (t[["knee_id", "subject_id", "compartment"]], y, s), "no feature"),
        (lambda t, y, s: (t.assign(compartment="patella"), y, s), "unknown compartment"),
        (lambda t, y, s: (t, y, pd.concat([s, s[:1].assign(fold=1)])), "s00 in two folds"),
        (lambda t, y, s: (t, y, s[1:]), "no fold for subject s00"),
        (
            lambda t, y, s: (t, y, s.assign(fold=(y == 0).to_numpy().astype(int))),
            "one class only for training",
        ),
        (lambda t, y, s: (t[:0], y[:0], s), "0 OA and 0 other"),
        (
            lambda t, y, s: (t.assign(subject_id=["s00", *t["subject_id"][:-1]]), y, s),
            "named twice",
        ),
    ],
)
def test_wrong_inputs_raise_one_sentence(spoil, words):
    tokens, labels, splits = spoil(*cohort(8))
    with pytest.raises(InputError, match=words):
        cross_validate(tokens, labels, splits)


@pytest.fixture(scope="module")
def checks() -> ModuleType:
    """The module benchmarks/diagnosis_checks.py."""
    path = Path(__file__).parents[1] / "benchmarks" / "diagnosis_checks.py"
    spec = importlib.util.spec_from_file_location("diagnosis_checks", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_detectable_difference_has_the_power_it_promises(checks):
    loss = checks.detectable_auc_difference(40, 40, 0.88, correlation=0.5)
    a, b = hanley_mcneil_se(0.88, 40, 40), hanley_mcneil_se(0.88 - loss, 40, 40)
    assert loss / np.sqrt(a**2 + b**2 - a * b) == pytest.approx(1.960 + 0.8416, abs=1e-3)
    larger = checks.detectable_auc_difference(400, 400, 0.88)
    assert larger < loss / 2.5  # about the root of ten
    assert np.isnan(checks.detectable_auc_difference(4, 4, 0.88))
    assert np.isnan(checks.detectable_auc_difference(40, 40, 0.45))


def test_mean_interval_by_hand_and_refusal(checks):
    found = checks.mean_interval([1, 2, 3, 4, 5])  # SD 1.5811, SE 0.7071, t(4) 2.776
    assert list(found.values()) == pytest.approx((3, 1.0367, 4.9633), abs=1e-3)
    assert checks.mean_interval([0.5])["ci_low"] == -np.inf  # one value has no standard error
    for values in ([], [0.5, np.nan]):
        with pytest.raises(InputError, match="empty or hold NaN"):
            checks.mean_interval(values)


def test_subgroups_are_the_auc_of_their_knees_and_small_ones_stay_empty(checks):
    labels, scores, _ = two_scores()
    half = np.arange(60) < 30
    groups = {"all": np.ones(60), "half": half, "one": np.arange(60) < 3}
    found = pd.DataFrame(checks.subgroup_auc(labels, scores, groups)).set_index("group")
    whole, part = auc_delong(labels, scores), auc_delong(labels[half], scores[half])
    names = ["auc", "ci_low", "ci_high"]
    for group, known in (("all", whole), ("half", part)):
        assert found.loc[group, names].tolist() == [known[name] for name in names]
    assert found.loc["one", ["n_oa", "n_other"]].tolist() == [1, 2]
    assert np.isnan(found.loc["one", "auc"])


def test_shuffling_moves_whole_measurements_within_a_compartment(checks):
    tokens, _, _ = cohort(8)
    names = list(BIOMARKERS)
    shuffled = checks.shuffle_patches(tokens, np.random.default_rng(0))
    assert shuffled.drop(columns=names).equals(tokens.drop(columns=names))
    for rows in tokens.groupby("compartment").indices.values():
        before, after = (set(map(tuple, t[names].to_numpy()[rows])) for t in (tokens, shuffled))
        assert before == after


def test_explanation_is_the_score_and_its_deletions(checks):
    tokens, labels, splits = cohort()
    table = checks.explain_diagnosis(tokens, labels, splits, SMALL, seed=2)
    assert table.index.equals(tokens.index)
    knees = table.groupby("knee_id")
    assert knees["attention"].sum().to_numpy() == pytest.approx(1, abs=1e-5)
    score = knees["score"].first()
    expected = cross_validate(tokens, labels, splits, seed=2)["score"]
    assert score.to_numpy() == pytest.approx(expected.to_numpy(), abs=1e-5)  # float32, other batch
    medial = table["compartment"].str.endswith("medial")
    size = table["contribution"].abs().groupby(medial).mean()
    assert size[True] > size[False]  # OA changes the medial compartments
    for name in checks.DELETED:
        removed = knees[name].first()
        assert removed.between(0, 1).all() and (removed != score).mean() > 0.8  # few are saturated


# ---------------------------------------------------------------- small and odd cohorts
def test_the_other_knee_of_each_subject_may_be_the_control():
    labels, subjects = np.tile([1, 0], 12), np.repeat(np.arange(12), 2)
    scores = np.random.default_rng(0).normal(labels)
    found = bootstrap_auc(labels, scores, subjects, np.random.default_rng(0), 500)
    assert found["auc"] == pytest.approx(brute_force(labels, scores)[0])
    assert 0 < found["ci_low"] < found["auc"] < found["ci_high"] <= 1
    # Each OA knee is above its own control and those of all earlier subjects: with shares w of the
    # subjects the AUC is the sum of w_j w_k over j <= k, (1 + sum of w^2) / 2.
    apart = np.repeat(np.arange(12.0), 2) + np.tile([0.5, 0], 12)
    rng = np.random.default_rng(1)
    shares = rng.multinomial(12, np.full(12, 1 / 12), 500) / 12
    expected = 0.5 + (shares**2).sum(axis=1) / 2
    found = bootstrap_auc(labels, apart, subjects, np.random.default_rng(1), 500)
    limits = np.percentile(expected, [2.5, 97.5])
    assert [found["ci_low"], found["ci_high"]] == pytest.approx(list(limits))
    band = roc_band(labels, scores, subjects, np.random.default_rng(0), 200)
    assert band.notna().all(axis=None)
    assert (band["low"] <= band["tpr"]).all()


def test_resamples_without_controls_are_left_out():
    # Subjects 0 to 2 have two OA knees, subject 3 one of each and subject 4 too: no healthy subject
    labels = np.array([1, 1, 1, 1, 1, 1, 1, 0, 1, 0])
    subjects = np.repeat(np.arange(5), 2)
    found = bootstrap_auc(labels, labels + 0.0, subjects, np.random.default_rng(0), 200)
    assert found == {"auc": 1.0, "ci_low": 1.0, "ci_high": 1.0}


def test_a_knee_without_subject_is_refused():
    labels, scores = np.tile([1, 0], 6), np.arange(12.0)
    subjects = np.where(np.arange(12) < 2, np.nan, np.arange(12.0))
    for function in (bootstrap_auc, roc_band):
        with pytest.raises(InputError, match="owner of 10 of 12"):
            function(labels, scores, subjects, np.random.default_rng(0), 50)


def test_labels_that_cannot_be_diagnosed_are_named_before_training():
    knees = pd.DataFrame({"knee_id": [f"K{k}" for k in range(6)], "ct": "ct", "mr": "mr"})
    knees["subject_id"] = [f"S{k}" for k in range(6)]
    splits = pd.DataFrame({"subject_id": knees["subject_id"], "fold": [0, 1, 0, 1, 0, 1]})
    assert label_problem(knees.assign(oa=[0, 0, 1, 1, 0, 1]), splits) == ""
    assert "one class only" in label_problem(knees.assign(oa=[0, 1, 0, 1, 0, 1]), splits)
    assert "0 OA and 6 other" in label_problem(knees.assign(oa=0.0), splits)
    assert "0 OA and 0 other" in label_problem(knees.assign(oa=np.nan), splits)
    with pytest.raises(InputError, match="no patch of a knee with an OA label"):
        tokens_by_arm(pd.DataFrame({"arm": ["a"], "knee_id": ["K0"]}), [])
