"""ICC, Bland-Altman, Deming and conformal intervals against formulas, published tables and their own invariants."""

import numpy as np
import pandas as pd
import pingouin
import pytest
from scipy import stats

from ctsma import agreement
from ctsma.agreement import (
    bland_altman,
    bootstrap_icc,
    bootstrap_icc_difference,
    conformal_radius,
    cross_conformal,
    deming,
    icc,
    icc_table,
)
from ctsma.cohort import BIOMARKERS, InputFault

# Bland & Altman 1986, Lancet: first readings of 17 subjects, peak expiratory flow rate in l/min
WRIGHT = np.array([494, 395, 516, 434, 476, 557, 413, 442, 650, 433, 417, 656, 267, 478, 178, 423, 427], float)
MINI = np.array([512, 430, 520, 428, 500, 600, 364, 380, 658, 445, 432, 626, 260, 477, 259, 350, 451], float)
# Shrout & Fleiss 1979, table 2: six targets, four judges
JUDGES = np.array([[9, 2, 5, 8], [6, 1, 3, 2], [8, 4, 6, 8], [7, 1, 2, 6], [10, 5, 6, 9], [6, 2, 4, 7]], float)
ROUNDING = 1e-10  # float64 rounding of two different orders of summation


def mcgraw_wong(ratings: np.ndarray) -> tuple[float, float, float]:
    """ICC(A,1) and 95 % interval of (n, k) ratings, from the ANOVA table (McGraw & Wong 1996, tables 4 and 7)."""
    n, k = ratings.shape
    rows, columns, grand = ratings.mean(1, keepdims=True), ratings.mean(0, keepdims=True), ratings.mean()
    msr = k * np.sum((rows - grand) ** 2) / (n - 1)
    msc = n * np.sum((columns - grand) ** 2) / (k - 1)
    mse = np.sum((ratings - rows - columns + grand) ** 2) / ((n - 1) * (k - 1))
    value = (msr - mse) / (msr + (k - 1) * mse + k * (msc - mse) / n)
    a, b = k * value / (n * (1 - value)), 1 + k * value * (n - 1) / (n * (1 - value))
    v = (a * msc + b * mse) ** 2 / ((a * msc) ** 2 / (k - 1) + (b * mse) ** 2 / ((n - 1) * (k - 1)))
    lower, upper = stats.f.ppf(0.975, n - 1, v), stats.f.ppf(0.975, v, n - 1)
    rest = k * msc + (k * n - k - n) * mse
    low = n * (msr - lower * mse) / (lower * rest + n * msr)
    return value, low, n * (upper * msr - mse) / (rest + n * upper * msr)


def test_the_formulas_used_as_check_reproduce_shrout_and_fleiss():
    assert mcgraw_wong(JUDGES)[0] == pytest.approx(0.29, abs=0.005)  # printed with two decimals
    assert mcgraw_wong(JUDGES)[1:] == pytest.approx((0.019, 0.761), abs=5e-4)  # McGraw & Wong's own method


@pytest.mark.parametrize("pair", [(0, 1), (0, 3), (1, 2), (2, 3)])
def test_icc_is_the_anova_at_full_precision(pair):
    x, y = JUDGES[:, pair[0]], JUDGES[:, pair[1]]
    result = icc(x, y)
    assert (result["icc"], result["ci_low"], result["ci_high"]) == pytest.approx(
        mcgraw_wong(np.column_stack([x, y])), abs=ROUNDING
    )


def test_icc_of_pefr_and_of_values_far_from_zero():
    expected = mcgraw_wong(np.column_stack([WRIGHT, MINI]))
    assert tuple(icc(WRIGHT, MINI).values()) == pytest.approx(expected, abs=ROUNDING)
    far = icc(WRIGHT * 1e-3 + 1e6, MINI * 1e-3 + 1e6)  # 1e6 leaves 1e-10 of a value: 1e-8 of its spread
    assert tuple(far.values()) == pytest.approx(expected, abs=1e-7)


def test_perfect_agreement_and_pure_offset_have_an_interval():
    assert tuple(icc(WRIGHT, WRIGHT).values()) == (1, 1, 1)
    nearly = icc(WRIGHT, WRIGHT + 50 + 1e-3 * np.sin(MINI))  # the limit must be continuous
    assert tuple(icc(WRIGHT, WRIGHT + 50).values()) == pytest.approx(tuple(nearly.values()), abs=1e-4)


def test_pingouin_options_are_restored_also_after_an_error(monkeypatch):
    kept = dict(pingouin.options)
    icc(WRIGHT, MINI)
    assert pingouin.options == kept
    monkeypatch.setattr(agreement.pingouin, "intraclass_corr", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        icc(WRIGHT, MINI)
    assert pingouin.options == kept


def test_icc_finds_its_row_under_the_older_labels(monkeypatch):
    new = pingouin.intraclass_corr
    older = {"ICC(1,1)": "ICC1", "ICC(A,1)": "ICC2", "ICC(C,1)": "ICC3"}

    def old(*arguments):
        return new(*arguments).replace({"Type": older}).rename(columns={"CI95": "CI95%"})

    expected = icc(WRIGHT, MINI)
    monkeypatch.setattr(agreement.pingouin, "intraclass_corr", old)
    assert icc(WRIGHT, MINI) == expected


@pytest.mark.parametrize(
    ("x", "y", "words"),
    [
        ([1, 2, np.nan], [1, 2, 3], "NaN"),
        ([1, 2, 3], [1, 2], "shapes"),
        ([1, 2], [1, 3], "at least 3"),
        ([1, 1, 1], [1, 2, 3], "reference: is constant"),
        ([1, 2, 3], [2, 2, 2], "estimate: is constant"),
    ],
)
def test_icc_refuses(x, y, words):
    with pytest.raises(InputFault, match=words):
        icc(x, y)
    with pytest.raises(InputFault, match=words):
        bootstrap_icc(x, y, np.arange(len(x)), np.random.default_rng(0), 10)


@pytest.fixture(scope="module")
def patches() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Reference, estimate (480, 4) and subjects (480,): 40 subjects of 12 patches that resemble each other."""
    rng, subjects = np.random.default_rng(3), np.repeat([f"s{i:02d}" for i in range(40)], 12)
    reference = np.repeat(rng.normal(size=(40, 4)), 12, axis=0) + rng.normal(size=(480, 4))
    offset = np.repeat(rng.normal(size=(40, 4)), 12, axis=0)
    return reference, 0.2 + 0.7 * reference + 0.5 * offset + 0.5 * rng.normal(size=(480, 4)), subjects


def test_bootstrap_point_is_the_icc_and_resampling_is_of_whole_subjects(patches):
    reference, estimate, subjects = patches
    x, y, rng = reference[:, 0], estimate[:, 0], np.random.default_rng(0)
    result = bootstrap_icc(x, y, subjects, rng, 2000)
    assert result["icc"] == pytest.approx(icc(x, y)["icc"], abs=ROUNDING)
    names, groups = np.unique(subjects), pd.Series(np.arange(480)).groupby(subjects).indices
    slow = []
    for _ in range(400):
        rows = np.concatenate([groups[s] for s in rng.choice(names, len(names))])
        slow.append(mcgraw_wong(np.column_stack([x[rows], y[rows]]))[0])
    # 400 and 2000 resamples: Monte Carlo SE of a 2.5 % quantile is about 0.13 of the bootstrap SD; 4 of them
    tolerance = 0.5 * np.std(slow)
    assert (result["ci_low"], result["ci_high"]) == pytest.approx(np.percentile(slow, [2.5, 97.5]), abs=tolerance)
    naive = bootstrap_icc(x, y, np.arange(480), np.random.default_rng(0))
    assert result["ci_high"] - result["ci_low"] > 1.3 * (naive["ci_high"] - naive["ci_low"])


def test_mean_over_biomarkers_and_same_generator_same_numbers(patches):
    reference, estimate, subjects = patches
    result = bootstrap_icc(reference, estimate, subjects, np.random.default_rng(1))
    assert result["icc"] == pytest.approx(np.mean([icc(*c)["icc"] for c in zip(reference.T, estimate.T, strict=True)]))
    assert result == bootstrap_icc(reference, estimate, subjects, np.random.default_rng(1))


def test_paired_difference_is_zero_for_equal_arms_and_sure_for_a_worse_one(patches):
    reference, estimate, subjects = patches
    rng = np.random.default_rng(2)
    same = bootstrap_icc_difference(reference, estimate, estimate, subjects, rng, 200)
    assert same == {"difference": 0, "ci_low": 0, "ci_high": 0, "p": 1}
    worse = estimate + rng.normal(size=estimate.shape)
    gain = bootstrap_icc_difference(reference, estimate, worse, subjects, rng)
    assert gain["ci_low"] > 0 and gain["p"] < 0.05
    parts = [bootstrap_icc(reference, e, subjects, rng, 10)["icc"] for e in (estimate, worse)]
    assert gain["difference"] == pytest.approx(parts[0] - parts[1])


def test_order_and_error_of_a_straight_line():
    x = np.random.default_rng(0).normal(size=(50, 2)) * (1, 3)
    x = (x - x.mean(0)) / x.std(0)
    found = agreement.order_and_error(x, 0.5 * x + 0.1)
    # r = 1; SD halved; mean of (0.5 x - 0.1)^2 for x of mean 0 and variance 1: 0.25 + 0.01
    assert found == pytest.approx({"correlation": 1, "sd_ratio": 0.5, "relative_error": 0.26})
    assert agreement.order_and_error(x, -x) == pytest.approx({"correlation": -1, "sd_ratio": 1, "relative_error": 4})


def test_icc_table_gives_each_group_and_refuses_a_patch_counted_twice(patches):
    reference, estimate, subjects = patches
    key = {"knee_id": subjects, "subject_id": subjects, "patch_id": np.tile(np.arange(12), 40)}
    truth = pd.DataFrame(key | dict(zip(BIOMARKERS, reference.T, strict=True))).assign(bone=["femur", "tibia"] * 240)
    guess = pd.DataFrame(key | dict(zip(BIOMARKERS, estimate.T, strict=True))).assign(arm="ct_only", seed=0)
    table = icc_table(guess.sample(frac=1, random_state=0), truth, np.random.default_rng(0), ("arm", "bone"), 50)
    row = table.set_index(["arm", "bone", "biomarker"]).loc[("ct_only", "tibia", "bv_tv")]
    assert row["icc"] == pytest.approx(icc(reference[1::2, 0], estimate[1::2, 0])["icc"])
    assert (row["n_patches"], row["n_subjects"], len(table)) == (240, 40, 10)
    both = pd.concat([guess, guess.assign(seed=1)])
    assert len(icc_table(both, truth, np.random.default_rng(0), ("arm", "seed"), 50)) == 10
    for predictions, answers in ((both, truth), (guess, truth[5:]), (guess, pd.concat([truth, truth[:1]]))):
        with pytest.raises(InputFault, match="one to one"):
            icc_table(predictions, answers, np.random.default_rng(0))


def test_bland_altman_1986():
    result = bland_altman(MINI, WRIGHT)  # the paper's difference is Wright minus mini
    printed = {"bias": -2.12, "sd": 38.77, "loa_low": -78.10, "loa_high": 73.86}
    assert {name: result[name] for name in printed} == pytest.approx(printed, abs=0.005)
    assert (result["bias_ci_low"], result["bias_ci_high"]) == pytest.approx((-22.0, 17.8), abs=0.06)
    # the paper rounds the limits' variance to 3 SD^2 / n (half-width 34.5) and the 1.96 to 2
    assert result["loa_low"] - result["loa_low_ci_low"] == pytest.approx(34.5, rel=0.02)
    difference, middle = WRIGHT - MINI, (WRIGHT + MINI) / 2
    line = stats.linregress(middle, difference)
    assert (result["slope"], result["slope_p"]) == pytest.approx((line.slope, line.pvalue))


def test_bland_altman_knows_shrinkage_from_agreement_and_clusters_from_pairs(patches):
    reference, estimate, subjects = patches
    x, y = reference[:, 0], estimate[:, 0]
    assert bland_altman(x, 0.5 * x)["slope"] == pytest.approx(-2 / 3)  # -0.5 x on 0.75 x
    equal = bland_altman(x, x)
    assert (equal["bias"], equal["sd"], equal["slope"]) == (0, 0, 0)
    alone, clustered = bland_altman(x, y), bland_altman(x, y, subjects, np.random.default_rng(0))
    assert clustered["sd"] == pytest.approx(alone["sd"]) and set(alone) <= set(clustered)
    width = [r["bias_ci_high"] - r["bias_ci_low"] for r in (alone, clustered)]
    assert width[1] > 1.3 * width[0]


def test_deming_closed_forms(patches):
    reference, estimate, subjects = patches
    x, y = reference[:, 0] + 5, estimate[:, 0]
    line, swapped = deming(x, y, ratio=2.0), deming(y, x, ratio=0.5)
    assert line["slope"] == pytest.approx(1 / swapped["slope"])
    assert line["intercept"] == pytest.approx(y.mean() - line["slope"] * x.mean())
    principal = np.linalg.eigh(np.cov(x, y))[1][:, -1]
    assert deming(x, y)["slope"] == pytest.approx(principal[1] / principal[0])
    assert deming(x, y, ratio=1e9)["slope"] == pytest.approx(stats.linregress(x, y).slope, rel=1e-6)
    assert deming(x, 3 - 2 * x) == pytest.approx({"slope": -2, "intercept": 3})
    bounds = deming(x, y, 1.0, subjects, np.random.default_rng(0))
    assert bounds["slope_ci_low"] < bounds["slope"] < bounds["slope_ci_high"]
    with pytest.raises(InputFault, match="together"):
        deming([1, 2, 3], [1, 1, 1])


def test_conformal_rank_is_exact():
    scores = np.arange(1.0, 20)
    assert conformal_radius(scores, 0.90) == 18  # ceil(20 * 0.9)
    assert conformal_radius(scores[:9], 0.90) == 9
    assert conformal_radius(scores[:8], 0.90) == np.inf  # ceil(9 * 0.9) = 9 > 8
    assert conformal_radius([], 0.90) == np.inf
    with pytest.raises(InputFault):
        conformal_radius([1, np.nan], 0.90)


def test_cross_conformal_covers_and_calibrates_on_the_other_folds_only():
    rng, n = np.random.default_rng(5), 2000
    reference, sd, folds = rng.normal(size=n), rng.uniform(0.5, 2, n), np.arange(n) % 5
    estimate = reference + sd * rng.normal(size=n)
    table = cross_conformal(reference, estimate, folds, sd)
    assert table["covered"].mean() == pytest.approx(0.90, abs=0.02)  # 3 binomial SE of 2000
    assert table["covered"].equals((table["low"] <= reference) & (reference <= table["high"]))
    spoiled = estimate + 100.0 * (folds == 0)
    assert not cross_conformal(reference, spoiled, folds, sd)["covered"][folds == 0].any()


def test_a_shrunken_estimate_gets_its_spread_back_from_the_other_folds_alone():
    rng = np.random.default_rng(0)
    true, folds = rng.normal(5, 2, (60, 2)), np.repeat(np.arange(3), 20)
    shrunken = true.mean(0) + 0.5 * (true - true.mean(0))
    # half the spread: 2 s / (1 + s^2) = 0.8, and 1 once it is undone; up to (n - 1) / n
    assert agreement.icc(true[:, 0], shrunken[:, 0])["icc"] == pytest.approx(0.8, abs=0.01)
    np.testing.assert_allclose(agreement.restored_spread(true, shrunken, folds), true)
    spoilt = np.where((folds == 0)[:, None], 9 * true, true)  # a fold's own reference must not be looked at
    own = folds == 0
    np.testing.assert_allclose(agreement.restored_spread(spoilt, shrunken, folds)[own], true[own])


def test_estimates_without_spread_in_the_other_folds_become_the_mean():
    reference, folds = np.array([1.0, 2, 3, 4, 5, 9]), np.array([0, 0, 0, 1, 1, 1])
    estimate = np.array([0.1, 0.1, 0.1, 1.0, 2.0, 4.0])
    found = agreement.restored_spread(reference, estimate, folds)
    np.testing.assert_allclose(found[3:], 2)  # the first fold's estimates are all equal: its mean of the reference
    stretch = np.std([4, 5, 9]) / np.std([1, 2, 4])
    np.testing.assert_allclose(found[:3], 6 + stretch * (0.1 - 7 / 3))
    both = agreement.restored_spread(np.c_[reference, reference], np.c_[estimate, estimate[::-1]], folds)
    assert np.isfinite(both).all()
