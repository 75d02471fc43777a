"""Agreement of an estimate with its reference.

Which number answers which question:

- ICC(A,1), two-way random effects, absolute agreement, single measurement: are the values the same?
- Correlation r: is the order right? r ignores bias and scale.
- Relative squared error, mean((estimate - reference)^2) / var(reference): how large are the errors?
  1 is no better than giving the mean reference to every patch.
- Between and within knees: r_between is the correlation of the knees' means (one pair per knee),
  r_within the correlation of the patches' deviations from their knee's mean. A model that knows
  only each knee's mean density reaches a high r_between, and its r_within is near 0.

Why the ICC is not reported alone: it rewards stretching and punishes shrinkage. Without bias, and
with SD(estimate) = s SD(reference), the ICC is 2 r s / (1 + s^2) and the relative error is
1 + s^2 - 2 r s. A least-squares estimate shrinks to the mean, s = r, and has the smallest error,
1 - r^2. Stretched to s = 1 its ICC rises from 2 r^2 / (1 + r^2) to r and its error to 2 (1 - r): it
agrees better and errs more, without any new information.

Patches of one subject resemble each other, so intervals over patches resample *subjects*. These
statistics are functions of the sums of 1, x, y, xx, yy and xy, so all resamples are one matrix
product.

Throughout, reference and estimate are arrays of shape (n,), subjects (n,) name the subject of each
value, and rng is a numpy Generator. Tables of predictions have one row per arm and patch: arm,
knee_id, subject_id, patch_id, the estimated BIOMARKERS and `<biomarker>_reference`; another
reference may stand beside it (`<biomarker>_true`).
"""

import numpy as np
import pandas as pd
import pingouin
from numpy import ndarray
from scipy import stats

from ctsma.common import BIOMARKERS, InputError

MEASURES = (*BIOMARKERS, "mean")
STATISTICS = ("icc", "r", "relative_error", "r_within", "r_between")
DIFFERENCE_COLUMNS = ["arm", "against", "statistic", "biomarker"]
DIFFERENCE_COLUMNS += ["difference", "ci_low", "ci_high", "p"]
_PATCH = ["knee_id", "patch_id"]
_Z95 = stats.norm.ppf(0.975)  # two-sided 95 % normal quantile, 1.96


def icc(reference: ndarray, estimate: ndarray) -> dict[str, float]:
    """ICC(A,1) of independent pairs with its F-based 95 % interval (McGraw & Wong 1996).

    ICC = (MSR - MSE) / (MSR + MSE + 2 (MSC - MSE) / n) for two measurements, shape (n,), of n
    targets. Returns icc, ci_low, ci_high. Raises InputError for NaN, shapes that differ, fewer than
    3 targets, constant values.
    """
    x, y = _varying_pairs(reference, estimate)
    # The ICC ignores a common shift and scale; the rounding errors of the ANOVA do not.
    shift, scale = np.mean([x, y]), np.std([x, y])
    x, y = (x - shift) / scale, (y - shift) / scale
    value, low, high = _icc_pingouin(x, y) if np.var(y - x) > 1e-14 else _icc_pure_offset(x, y)
    return {"icc": float(value), "ci_low": float(low), "ci_high": float(high)}


def _icc_pingouin(x: ndarray, y: ndarray) -> tuple[float, float, float]:
    """ICC(A,1) and interval by pingouin, at full precision (its default rounds to two decimals)."""
    target, rater = np.tile(np.arange(len(x)), 2), np.repeat([0, 1], len(x))
    table = pd.DataFrame({"target": target, "rater": rater, "value": np.r_[x, y]})
    options, before = pingouin.options, dict(pingouin.options)
    try:
        options["round.column.CI95"] = None
        rows = pingouin.intraclass_corr(table, "target", "rater", "value").set_index("Type")
    finally:
        options.clear()
        options.update(before)
    return rows.loc["ICC(A,1)", "ICC"], *rows.loc["ICC(A,1)", "CI95"]


def _icc_pure_offset(x: ndarray, y: ndarray) -> ndarray:
    """Limits of ICC and interval for MSE -> 0 (a pure offset), where the F ratio is infinite."""
    n, signal, offset = len(x), 2 * np.var(x, ddof=1), np.mean(y - x) ** 2
    ratios = np.array([1, stats.f.ppf(0.975, n - 1, 1), stats.f.ppf(0.025, n - 1, 1)])
    return signal / (signal + offset * ratios)


def bootstrap_icc(reference, estimate, subjects, rng, n_resamples=2000) -> dict[str, float]:
    """ICC(A,1) with a 95 % percentile interval from resampling subjects with all their patches.

    Values (n,), or (n, biomarkers): then the statistic is the mean of the columns' ICCs. `subjects`
    (n,) holds at least 2 different ones. Returns icc, ci_low, ci_high; errors as `icc`.
    """
    x, y = _varying_pairs(reference, estimate)
    values = _icc(_resampled_moments(x, y, subjects, rng, n_resamples)).mean(axis=0)
    return {"icc": float(values[0])} | _interval(values)


def bootstrap_differences(
    reference, estimate_a, estimate_b, subjects, knees, rng, n_resamples=2000
) -> pd.DataFrame:
    """Paired differences, a minus b, of all `STATISTICS` on the same resampled subjects.

    Values (n, 4), one column per biomarker; knees (n,) name the knee of each patch. Returns
    statistic, biomarker ("mean" first), difference, ci_low, ci_high and p (two-sided: twice the
    smaller share of resamples beyond zero).
    """
    seed, both = rng.integers(2**63), []
    for estimate in (estimate_a, estimate_b):
        x, y = _varying_pairs(reference, estimate)
        own_rng = np.random.default_rng(seed)
        both.append(_statistics(x, y, subjects, knees, own_rng, n_resamples))
    rows = []
    for statistic in STATISTICS:
        by_biomarker = both[0][statistic] - both[1][statistic]
        every = [by_biomarker.mean(axis=0), *by_biomarker]
        for name, draws in zip(("mean", *BIOMARKERS), every, strict=True):
            row = {"statistic": statistic, "biomarker": name, "difference": float(draws[0])}
            rows.append(row | _interval(draws) | {"p": _bootstrap_p(draws)})
    return pd.DataFrame(rows)


def agreement_table(
    predictions, rng, by=("arm",), against="reference", n_resamples=2000
) -> pd.DataFrame:
    """`STATISTICS` of every group, for each biomarker and for "mean", the mean of the four.

    `by` names the columns that make groups (arm, compartment, seed, ...), `against` the reference:
    columns `<biomarker>_<against>`. Returns by, biomarker, n_patches, n_subjects and each statistic
    with `<statistic>_ci_low` and `<statistic>_ci_high` (bootstrap over subjects). r_within is NaN
    where no knee has two patches. Raises InputError where a group holds a patch twice: it would
    count twice.
    """
    by, rows = list(by), []
    if predictions.duplicated([*by, *_PATCH]).any():
        problem = f"hold a patch twice in a group of {', '.join(by)}"
        raise InputError("predictions", problem, "average over seeds first, or group by seed")
    for group, frame in predictions.groupby(by):
        x, y = _varying_pairs(*_reference_and_estimate(frame, against))
        found = _statistics(x, y, frame["subject_id"], frame["knee_id"], rng, n_resamples)
        about = dict(zip(by, group, strict=True))
        about |= {"n_patches": len(frame), "n_subjects": frame["subject_id"].nunique()}
        for column, name in enumerate(MEASURES):
            row = about | {"biomarker": name}
            for statistic, draws in found.items():
                values = draws.mean(axis=0) if name == "mean" else draws[column]
                row |= {statistic: float(values[0])} | _interval(values, f"{statistic}_")
            rows.append(row)
    return pd.DataFrame(rows)


def paired_differences(predictions, comparisons, rng, n_resamples=2000) -> pd.DataFrame:
    """`bootstrap_differences` of each comparison (arm, other arm) whose arms are both there.

    Returns arm, against, statistic, biomarker ("mean" first), difference, ci_low, ci_high, p.
    """
    by_arm = {arm: rows.set_index(_PATCH) for arm, rows in predictions.groupby("arm", sort=False)}
    tables = [pd.DataFrame(columns=DIFFERENCE_COLUMNS)]
    for arm, other in comparisons:
        if arm in by_arm and other in by_arm:
            a = by_arm[arm]
            reference, estimate = _reference_and_estimate(a, "reference")
            other_estimate = by_arm[other].loc[a.index, list(BIOMARKERS)].to_numpy()
            knees = a.index.get_level_values("knee_id")
            pairs = reference, estimate, other_estimate
            table = bootstrap_differences(*pairs, a["subject_id"], knees, rng, n_resamples)
            tables.append(table.assign(arm=arm, against=other)[DIFFERENCE_COLUMNS])
    return pd.concat(tables[1:] or tables, ignore_index=True)


def _statistics(x, y, subjects, knees, rng, n_resamples) -> dict[str, ndarray]:
    """Each of `STATISTICS` (columns, 1 + resamples of subjects) of values (n, columns)."""
    subjects, knees = np.asarray(subjects), np.asarray(knees)
    mean_x = pd.DataFrame(x).groupby(knees).transform("mean").to_numpy()
    mean_y = pd.DataFrame(y).groupby(knees).transform("mean").to_numpy()
    _, one_per_knee = np.unique(knees, return_index=True)
    whole = _resampled_moments(x, y, subjects, rng, n_resamples)
    within = _resampled_moments(x - mean_x, y - mean_y, subjects, rng, n_resamples)
    knee_values = mean_x[one_per_knee], mean_y[one_per_knee], subjects[one_per_knee]
    between = _resampled_moments(*knee_values, rng, n_resamples)
    values = [_icc(whole), _correlation(whole), _relative_error(whole)]
    values += [_correlation(within), _correlation(between)]
    return dict(zip(STATISTICS, values, strict=True))


def bland_altman(
    reference, estimate, subjects=None, rng=None, n_resamples=2000
) -> dict[str, float]:
    """Bias and 95 % limits of agreement of estimate - reference, (n,): bias -+ 1.96 SD, ddof = 1.

    `slope` is the proportional bias: the difference regressed on the mean of both. Returns n, bias,
    sd, loa_low, loa_high, slope, and `<name>_ci_low`, `<name>_ci_high`. For patches give `subjects`
    and `rng`: intervals (and slope_p) are bootstrapped over subjects. Without them pairs are taken
    as independent, and bias and limits get Student's t with SE(limit)^2 = SD^2 (1/n + 1.96^2 /
    (2 (n - 1))) (Bland & Altman 1999). Errors as `icc`, but constant values are allowed.
    """
    x, y = checked_pairs(reference, estimate)
    _, mean_x, mean_y, var_x, var_y, cov = _resampled_moments(x, y, subjects, rng, n_resamples)
    bias, sd = (mean_y - mean_x)[0], np.sqrt(np.maximum(var_x + var_y - 2 * cov, 0))[0]
    with np.errstate(invalid="ignore"):
        slope = (2 * (var_y - var_x) / (var_x + var_y + 2 * cov))[0]
    draws = {"bias": bias, "sd": sd, "loa_low": bias - _Z95 * sd, "loa_high": bias + _Z95 * sd}
    draws["slope"] = slope
    n = len(x)
    result = {"n": n} | {name: float(values[0]) for name, values in draws.items()}
    if subjects is not None:
        for name, values in draws.items():
            result |= _interval(values, f"{name}_")
        return result | {"slope_p": _bootstrap_p(slope)}
    for name in ("bias", "loa_low", "loa_high"):
        variance = 1 / n if name == "bias" else 1 / n + _Z95**2 / (2 * (n - 1))
        half = stats.t.ppf(0.975, n - 1) * result["sd"] * np.sqrt(variance)
        result |= {f"{name}_ci_low": result[name] - half, f"{name}_ci_high": result[name] + half}
    return result


def _reference_and_estimate(frame: pd.DataFrame, against: str) -> tuple[ndarray, ndarray]:
    names = list(BIOMARKERS)
    return frame[[f"{name}_{against}" for name in names]].to_numpy(), frame[names].to_numpy()


def checked_pairs(reference: ndarray, estimate: ndarray) -> tuple[ndarray, ndarray]:
    """Both as floats. Raises InputError for shapes that differ, fewer than 3 values, or NaN."""
    x, y = np.asarray(reference, dtype=float), np.asarray(estimate, dtype=float)
    source = "reference, estimate"
    if x.shape != y.shape:
        raise InputError(source, f"have shapes {x.shape} and {y.shape}", "give pairs")
    if len(x) < 3:
        raise InputError(source, f"have {len(x)} values", "give at least 3 pairs")
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise InputError(source, "hold NaN or infinity", "leave missing values out and count them")
    return x, y


def _varying_pairs(reference: ndarray, estimate: ndarray) -> tuple[ndarray, ndarray]:
    x, y = checked_pairs(reference, estimate)
    for name, values in (("reference", x), ("estimate", y)):
        if (np.ptp(values, axis=0) == 0).any():
            raise InputError(name, "is constant", "give values that differ between targets")
    return x, y


def subject_codes(subjects, n_values: int) -> ndarray:
    """Number of the subject of each value, from 0 (n,).

    Raises InputError where a subject is missing (NaN, None) or there are fewer than 2.
    """
    codes, names = pd.factorize(pd.Series(subjects))
    if len(codes) != n_values or (codes < 0).any():
        problem = f"name the owner of {(codes >= 0).sum()} of {n_values} values"
        raise InputError("subjects", problem, "name one subject for each, without NaN")
    if len(names) < 2:
        raise InputError("subjects", f"are {len(names)}", "give at least 2 to resample")
    return codes


def _resampled_moments(x: ndarray, y: ndarray, subjects=None, rng=None, n_resamples=2000) -> tuple:
    """n, mean x, mean y, var x, var y, cov (ddof = 1), each (columns, 1 + resamples of subjects).

    x, y are (n,) or (n, columns); the first value of each is of the data as they are. Without
    `subjects` nothing is resampled. The data's mean of x is taken off both against rounding.
    """
    x, y = x.reshape(len(x), -1), y.reshape(len(y), -1)
    x, y = x - x.mean(axis=0), y - x.mean(axis=0)
    codes = np.zeros(len(x), int) if subjects is None else subject_codes(subjects, len(x))
    n_subjects = codes.max() + 1
    weights = np.ones((1, n_subjects))
    if subjects is not None:
        draws = rng.multinomial(n_subjects, np.full(n_subjects, 1 / n_subjects), n_resamples)
        weights = np.vstack([weights, draws])
    sums = np.zeros((n_subjects, 6, x.shape[1]))
    np.add.at(sums, codes, np.stack([np.ones_like(x), x, y, x * x, y * y, x * y], axis=1))
    n, sum_x, sum_y, *sums_of_products = np.moveaxis(np.tensordot(weights, sums, 1), 0, -1)
    mean_x, mean_y = sum_x / n, sum_y / n
    products_of_means = mean_x * mean_x, mean_y * mean_y, mean_x * mean_y
    pairs = zip(sums_of_products, products_of_means, strict=True)
    var_x, var_y, cov = [(total / n - product) * n / (n - 1) for total, product in pairs]
    return n, mean_x, mean_y, var_x, var_y, cov


def _icc(moments: tuple) -> ndarray:
    n, mean_x, mean_y, var_x, var_y, cov = moments
    return 2 * cov / (var_x + var_y + (mean_y - mean_x) ** 2 - (var_x + var_y - 2 * cov) / n)


def _correlation(moments: tuple) -> ndarray:
    """NaN for a resample without variance."""
    _, _, _, var_x, var_y, cov = moments
    spread = np.sqrt(np.maximum(var_x * var_y, 0))
    return cov / np.where(spread > 0, spread, np.nan)


def _relative_error(moments: tuple) -> ndarray:
    """Mean squared difference over the variance of x, both with ddof = 0."""
    n, mean_x, mean_y, var_x, var_y, cov = moments
    return (var_x + var_y - 2 * cov + (mean_y - mean_x) ** 2 * n / (n - 1)) / var_x


def _interval(draws: ndarray, prefix: str = "") -> dict[str, float]:
    """95 % percentile interval of the resamples, all but the first (Efron & Tibshirani 1993)."""
    low, high = pd.Series(draws[1:]).quantile([0.025, 0.975])  # NaN is left out
    return {f"{prefix}ci_low": float(low), f"{prefix}ci_high": float(high)}


def _bootstrap_p(draws: ndarray) -> float:
    draws = draws[~np.isnan(draws)]  # resamples without variance
    tail = min(np.sum(draws[1:] <= 0), np.sum(draws[1:] >= 0))
    return float(min(1.0, 2 * (tail + 1) / len(draws)))
