"""ICC, correlation, Bland-Altman, conformal intervals: formulas, published tables, invariants."""

import numpy as np
import pandas as pd
import pingouin
import pytest
from scipy import stats

from ctsma import agreement
from ctsma.agreement import (
    agreement_table,
    bland_altman,
    bootstrap_differences,
    bootstrap_icc,
    icc,
    paired_differences,
)
from ctsma.common import BIOMARKERS, InputError
from ctsma_lab.agreement_views import cohort_matches, nested
from ctsma_predict.conformal import conformal_radius, cross_conformal

# Bland & Altman 1986, Lancet: first readings of 17 subjects, peak expiratory flow rate in l/min
WRIGHT = np.array(
    [494, 395, 516, 434, 476, 557, 413, 442, 650, 433, 417, 656, 267, 478, 178, 423, 427], float
)
MINI = np.array(
    [512, 430, 520, 428, 500, 600, 364, 380, 658, 445, 432, 626, 260, 477, 259, 350, 451], float
)
# Shrout & Fleiss 1979, table 2: six targets, four judges
JUDGES = np.array(
    [[9, 2, 5, 8], [6, 1, 3, 2], [8, 4, 6, 8], [7, 1, 2, 6], [10, 5, 6, 9], [6, 2, 4, 7]], float
)
ROUNDING = 1e-10  # float64 rounding of two different orders of summation


def mcgraw_wong(ratings: np.ndarray) -> tuple[float, float, float]:
    """ICC(A,1) and 95 % interval of (n, k) ratings (McGraw & Wong 1996, tables 4 and 7)."""
    n, k = ratings.shape
    rows, columns, grand = (
        ratings.mean(1, keepdims=True),
        ratings.mean(0, keepdims=True),
        ratings.mean(),
    )
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
    assert mcgraw_wong(JUDGES)[1:] == pytest.approx(
        (0.019, 0.761), abs=5e-4
    )  # McGraw & Wong's own method


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
    far = icc(WRIGHT * 1e-3 + 1e6, MINI * 1e-3 + 1e6)  # 1e6 leaves 1e-10 of a value: 1e-8 of its SD
    assert tuple(far.values()) == pytest.approx(expected, abs=1e-7)


def test_perfect_agreement_and_pure_offset_have_an_interval():
    assert tuple(icc(WRIGHT, WRIGHT).values()) == (1, 1, 1)
    nearly = icc(WRIGHT, WRIGHT + 50 + 1e-3 * np.sin(MINI))  # the limit must be continuous
    assert tuple(icc(WRIGHT, WRIGHT + 50).values()) == pytest.approx(
        tuple(nearly.values()), abs=1e-4
    )


def test_pingouin_options_are_restored_also_after_an_error(monkeypatch):
    kept = dict(pingouin.options)
    icc(WRIGHT, MINI)
    assert pingouin.options == kept
    monkeypatch.setattr(agreement.pingouin, "intraclass_corr", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        icc(WRIGHT, MINI)
    assert pingouin.options == kept


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
    with pytest.raises(InputError, match=words):
        icc(x, y)
    with pytest.raises(InputError, match=words):
        bootstrap_icc(x, y, np.arange(len(x)), np.random.default_rng(0), 10)


@pytest.fixture(scope="module")
def patches() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Reference, estimate (480, 4), subjects (480,): 40 subjects of 12 correlated patches."""
    rng, subjects = np.random.default_rng(3), np.repeat([f"s{i:02d}" for i in range(40)], 12)
    reference = np.repeat(rng.normal(size=(40, 4)), 12, axis=0) + rng.normal(size=(480, 4))
    offset = np.repeat(rng.normal(size=(40, 4)), 12, axis=0)
    return (
        reference,
        0.2 + 0.7 * reference + 0.5 * offset + 0.5 * rng.normal(size=(480, 4)),
        subjects,
    )


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
    # 400 and 2000 resamples: the Monte Carlo SE of a 2.5 % quantile is about 0.13 of the bootstrap
    # SD; 4 of them
    tolerance = 0.5 * np.std(slow)
    assert (result["ci_low"], result["ci_high"]) == pytest.approx(
        np.percentile(slow, [2.5, 97.5]), abs=tolerance
    )
    naive = bootstrap_icc(x, y, np.arange(480), np.random.default_rng(0))
    assert result["ci_high"] - result["ci_low"] > 1.3 * (naive["ci_high"] - naive["ci_low"])


def test_mean_over_biomarkers_and_same_generator_same_numbers(patches):
    reference, estimate, subjects = patches
    result = bootstrap_icc(reference, estimate, subjects, np.random.default_rng(1))
    assert result["icc"] == pytest.approx(
        np.mean([icc(*c)["icc"] for c in zip(reference.T, estimate.T, strict=True)])
    )
    assert result == bootstrap_icc(reference, estimate, subjects, np.random.default_rng(1))


def test_paired_differences_are_zero_for_equal_arms_and_significant_for_a_worse_one(patches):
    reference, estimate, subjects = patches
    rng = np.random.default_rng(2)
    options = {"subjects": subjects, "knees": subjects, "rng": rng, "n_resamples": 200}
    same = bootstrap_differences(reference, estimate, estimate, **options)
    assert (same[["difference", "ci_low", "ci_high"]] == 0).all(axis=None) and (
        same["p"] == 1
    ).all()
    worse = estimate + rng.normal(size=estimate.shape)
    table = bootstrap_differences(reference, estimate, worse, **options)
    gain = table[table["biomarker"] == "mean"].set_index("statistic")
    better = gain.loc[["icc", "r", "r_within"]]
    assert (better["ci_low"] > 0).all() and (better["p"] < 0.05).all()
    assert gain.loc["relative_error", "ci_high"] < 0
    parts = [bootstrap_icc(reference, e, subjects, rng, 10)["icc"] for e in (estimate, worse)]
    assert gain.loc["icc", "difference"] == pytest.approx(parts[0] - parts[1])


@pytest.fixture(scope="module")
def predictions(patches) -> pd.DataFrame:
    """The patches as a table of one arm: two knees per subject, six patches per knee."""
    reference, estimate, subjects = patches
    table = pd.DataFrame({"arm": "ct_only", "subject_id": subjects})
    table["knee_id"] = table["subject_id"] + np.tile(np.repeat(["L", "R"], 6), 40)
    table["patch_id"] = np.tile(np.arange(6), 80)
    table["bone"] = np.tile(["femur", "tibia"], 240)
    table[list(BIOMARKERS)] = estimate
    table[[f"{name}_reference" for name in BIOMARKERS]] = reference
    return table


def table_of(x, y):
    """Predictions of one patch per knee, the four biomarkers alike."""
    table = pd.DataFrame({"arm": "ct_only", "subject_id": np.arange(len(x)), "patch_id": 0})
    table["knee_id"] = table["subject_id"]
    for name in BIOMARKERS:
        table[name], table[f"{name}_reference"] = y, x
    return table


def test_correlation_and_error_of_a_straight_line():
    x = np.random.default_rng(0).normal(size=50)
    x = (x - x.mean()) / x.std()
    # r = 1; mean of (0.5 x - 0.1)^2 for x of mean 0 and variance 1: 0.25 + 0.01
    for estimate, r, error in ((0.5 * x + 0.1, 1, 0.26), (-x, -1, 4)):
        found = agreement_table(
            table_of(x, estimate), np.random.default_rng(0), n_resamples=20
        ).iloc[-1]
        assert list(found[["r", "relative_error"]]) == pytest.approx([r, error])


def test_stretching_raises_icc_and_error_as_the_module_states():
    x, noise = np.random.default_rng(0).normal(size=(2, 100_000))
    r = 0.6
    # least squares: SD is r times the reference's
    shrunken = r * (r * x + np.sqrt(1 - r**2) * noise)
    for s, estimate in ((r, shrunken), (1, shrunken / r)):
        error = np.mean((estimate - x) ** 2) / x.var()
        # SE of a correlation of 100,000 pairs is 0.002; 5 of them
        assert icc(x, estimate)["icc"] == pytest.approx(2 * r * s / (1 + s**2), abs=0.01)
        assert error == pytest.approx(1 + s**2 - 2 * r * s, abs=0.01)


def test_the_table_separates_within_from_between_knees(predictions):
    names, references = list(BIOMARKERS), [f"{name}_reference" for name in BIOMARKERS]
    means = predictions.groupby("knee_id")[names + references].transform("mean")
    deviations = predictions[names + references] - means
    one_per_knee = ~predictions["knee_id"].duplicated()
    table = agreement_table(predictions, np.random.default_rng(0), n_resamples=500)
    table = table.set_index("biomarker")
    for name in names:
        pair = [name, f"{name}_reference"]
        row, (x, y) = table.loc[name], predictions[pair].to_numpy().T
        assert row["r"] == pytest.approx(np.corrcoef(x, y)[0, 1])
        assert row["relative_error"] == pytest.approx(np.mean((x - y) ** 2) / np.var(y))
        within, between = deviations[pair].corr(), means[one_per_knee][pair].corr()
        assert row["r_within"] == pytest.approx(within.iloc[0, 1])
        assert row["r_between"] == pytest.approx(between.iloc[0, 1])
        for statistic in ("r", "relative_error", "r_within", "r_between"):
            low, high = row[f"{statistic}_ci_low"], row[f"{statistic}_ci_high"]
            assert low < row[statistic] < high
    assert table.loc["mean", "r_within"] == pytest.approx(table.loc[names, "r_within"].mean())


def test_a_density_per_knee_correlates_between_knees_only(predictions):
    names, rng = list(BIOMARKERS), np.random.default_rng(1)
    references = predictions[[f"{name}_reference" for name in names]]
    means = references.groupby(predictions["knee_id"]).transform("mean").to_numpy()
    density = predictions.assign(**dict(zip(names, means.T, strict=True)))
    density[names] += 0.01 * rng.normal(size=means.shape)
    table = agreement_table(density, rng, n_resamples=50).set_index("biomarker")
    assert table.loc["mean", "r_between"] > 0.99
    assert abs(table.loc["mean", "r_within"]) < 0.1  # 4 biomarkers of 480 patches: 4 SE
    single = predictions.drop_duplicates("knee_id")
    assert agreement_table(single, rng, n_resamples=50)["r_within"].isna().all()


def test_the_table_gives_each_group_and_refuses_a_patch_counted_twice(predictions, patches):
    reference, estimate, _ = patches
    shuffled = predictions.sample(frac=1, random_state=0)
    table = agreement_table(shuffled, np.random.default_rng(0), ["arm", "bone"], n_resamples=50)
    row = table.set_index(["arm", "bone", "biomarker"]).loc[("ct_only", "tibia", "bv_tv")]
    assert row["icc"] == pytest.approx(icc(reference[1::2, 0], estimate[1::2, 0])["icc"])
    assert (row["n_patches"], row["n_subjects"], len(table)) == (240, 40, 10)
    two_seeds = pd.concat([predictions.assign(seed=0), predictions.assign(seed=1)])
    assert (
        len(agreement_table(two_seeds, np.random.default_rng(0), ["arm", "seed"], n_resamples=9))
        == 10
    )
    with pytest.raises(InputError, match="a patch twice"):
        agreement_table(two_seeds, np.random.default_rng(0))
    true = predictions.rename(columns=lambda name: name.replace("_reference", "_true"))
    against_truth = agreement_table(true, np.random.default_rng(0), against="true", n_resamples=50)
    assert against_truth.equals(
        agreement_table(predictions, np.random.default_rng(0), n_resamples=50)
    )


def test_tables_nest_for_a_results_file(predictions):
    table = agreement_table(predictions, np.random.default_rng(0), n_resamples=50)
    found = nested(table, ["icc", "icc_ci_low"])["ct_only"]
    assert set(found) == {*BIOMARKERS, "mean"} and set(found["mean"]) == {"icc", "icc_ci_low"}
    assert nested(table, "icc")["ct_only"]["bv_tv"] == found["bv_tv"]["icc"]


def test_differences_pair_arms_by_patch(predictions):
    names = list(BIOMARKERS)
    worse = predictions.assign(arm="ct_sma").sample(frac=1, random_state=0)
    worse[names] += np.random.default_rng(1).normal(size=(480, 4))
    both = pd.concat([predictions, worse])
    comparisons = [("ct_only", "ct_sma"), ("ct_only", "mr_teacher")]
    table = paired_differences(both, comparisons, np.random.default_rng(0), 200)
    assert len(table) == 25 and set(table["against"]) == {"ct_sma"}  # no teacher there: left out
    rng, keys = np.random.default_rng(0), ["arm", "biomarker"]
    values = agreement_table(both, rng, n_resamples=50).set_index(keys)
    for row in table.to_dict("records"):
        a, b = (values.loc[(arm, row["biomarker"]), row["statistic"]] for arm in comparisons[0])
        assert row["difference"] == pytest.approx(a - b)
    assert paired_differences(both, [], rng).empty


def test_a_cohort_matches_itself_after_rounding_only(predictions):
    references = [f"{name}_reference" for name in BIOMARKERS]
    assert cohort_matches(predictions, predictions.round(5))
    assert not cohort_matches(predictions, predictions[1:])
    rescanned = predictions.copy()
    rescanned[references[0]] += 0.3 * np.random.default_rng(0).normal(size=480)
    assert not cohort_matches(predictions, rescanned)


def test_bland_altman_1986():
    result = bland_altman(MINI, WRIGHT)  # the paper's difference is Wright minus mini
    printed = {"bias": -2.12, "sd": 38.77, "loa_low": -78.10, "loa_high": 73.86}
    assert {name: result[name] for name in printed} == pytest.approx(printed, abs=0.005)
    assert (result["bias_ci_low"], result["bias_ci_high"]) == pytest.approx((-22.0, 17.8), abs=0.06)
    # the paper rounds the limits' variance to 3 SD^2 / n (half-width 34.5) and the 1.96 to 2
    assert result["loa_low"] - result["loa_low_ci_low"] == pytest.approx(34.5, rel=0.02)
    line = stats.linregress((WRIGHT + MINI) / 2, WRIGHT - MINI)
    assert result["slope"] == pytest.approx(line.slope)


def test_bland_altman_slope_of_shrinkage_and_wider_intervals_for_clusters(patches):
    reference, estimate, subjects = patches
    x, y = reference[:, 0], estimate[:, 0]
    assert bland_altman(x, 0.5 * x)["slope"] == pytest.approx(-2 / 3)  # -0.5 x on 0.75 x
    equal = bland_altman(x, x)
    assert (equal["bias"], equal["sd"], equal["slope"]) == (0, 0, 0)
    alone, clustered = bland_altman(x, y), bland_altman(x, y, subjects, np.random.default_rng(0))
    assert clustered["sd"] == pytest.approx(alone["sd"]) and set(alone) <= set(clustered)
    width = [r["bias_ci_high"] - r["bias_ci_low"] for r in (alone, clustered)]
    assert width[1] > 1.3 * width[0]


def test_conformal_rank_is_exact():
    scores = np.arange(1.0, 20)
    assert conformal_radius(scores, 0.90) == 18  # ceil(20 * 0.9)
    assert conformal_radius(scores[:9], 0.90) == 9
    assert conformal_radius(scores[:8], 0.90) == np.inf  # ceil(9 * 0.9) = 9 > 8
    assert conformal_radius([], 0.90) == np.inf
    with pytest.raises(InputError):
        conformal_radius([1, np.nan], 0.90)


def test_cross_conformal_covers_and_calibrates_on_the_other_folds_only():
    rng, n = np.random.default_rng(5), 2000
    reference, folds = rng.normal(size=n), np.arange(n) % 5
    estimate = reference + rng.normal(size=n)
    table = cross_conformal(reference, estimate, folds)
    assert table["covered"].mean() == pytest.approx(0.90, abs=0.02)  # 3 binomial SE of 2000
    inside = (table["low"] <= reference) & (reference <= table["high"])
    assert (table["covered"] == inside).mean() > 0.999  # rounding at an end
    spoiled = estimate + 100.0 * (folds == 0)
    assert not cross_conformal(reference, spoiled, folds)["covered"][folds == 0].any()


# ---------------------------------------------------------------- what is refused
@pytest.mark.parametrize("missing", [np.nan, None])
def test_values_without_a_subject_are_refused_and_never_pooled(missing):
    rng = np.random.default_rng(0)
    x = rng.normal(size=30)
    y = x + rng.normal(0, 0.5, 30)
    named = np.repeat([f"S{k}" for k in range(6)], 5).astype(object)
    unnamed = np.where(named == "S0", missing, named)
    good = bootstrap_icc(x, y, named, np.random.default_rng(0), 100)
    assert good == bootstrap_icc(x, y, pd.Series(named, index=x), np.random.default_rng(0), 100)
    for subjects in (unnamed, list(unnamed), named[:-1]):
        with pytest.raises(InputError, match=r"owner of (25|29) of 30"):
            bootstrap_icc(x, y, subjects, np.random.default_rng(0), 100)
        with pytest.raises(InputError, match="subjects"):
            bland_altman(x, y, subjects, np.random.default_rng(0), 100)
    with pytest.raises(InputError, match="at least 2"):
        bootstrap_icc(x, y, np.repeat("S0", 30), np.random.default_rng(0), 100)


def test_cross_conformal_refuses_missing_folds():
    x = np.arange(6.0)
    for folds in (np.array([0, 0, 1, 1, 2, np.nan]), np.arange(5)):
        with pytest.raises(InputError, match="give one per estimate"):
            cross_conformal(x, x + 1, folds)
