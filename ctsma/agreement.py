"""Agreement of an estimate with its reference: ICC(A,1), Bland-Altman, Deming line, conformal intervals.

Patches of one subject resemble each other, so intervals over patches resample *subjects*. ICC, limits of agreement
and Deming line are functions of the sums of 1, x, y, xx, yy, xy: all resamples are one matrix product.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import pingouin
from numpy import ndarray
from numpy.random import Generator
from scipy import stats

from .cohort import BIOMARKERS, InputFault

Z95 = stats.norm.ppf(0.975)  # two-sided 95 % normal quantile, 1.96


def icc(reference: ndarray, estimate: ndarray) -> dict[str, float]:
    """ICC(A,1), two-way random, absolute agreement, single, with its F-based 95 % interval (McGraw & Wong 1996).

    ICC = (MSR - MSE) / (MSR + MSE + 2 (MSC - MSE) / n) for two measurements of n independent targets, shape (n,).
    Raises InputFault for NaN, other lengths, fewer than 3 targets, constant values. Returns icc, ci_low, ci_high.
    """
    x, y = _varying(reference, estimate)
    shift, scale = np.mean([x, y]), np.std([x, y])  # ICC ignores both, the rounding of an ANOVA does not
    x, y = (x - shift) / scale, (y - shift) / scale
    limits = _icc_pingouin(x, y) if np.var(y - x) > 1e-14 else _icc_without_residual(x, y)
    return dict(zip(("icc", "ci_low", "ci_high"), map(float, limits), strict=True))


def _icc_pingouin(x: ndarray, y: ndarray) -> tuple[float, float, float]:
    """The one place that knows pingouin's table: row ICC(A,1), ICC2 before 0.6.1; column CI95, CI95% before 0.6."""
    target, rater = np.tile(np.arange(len(x)), 2), np.repeat([0, 1], len(x))
    table = pd.DataFrame({"target": target, "rater": rater, "value": np.r_[x, y]})
    options, kept = pingouin.options, dict(pingouin.options)
    try:
        options["round.column.CI95"] = options["round.column.CI95%"] = None  # the default rounds to 2 decimals
        rows = pingouin.intraclass_corr(table, "target", "rater", "value")
    finally:
        options.clear()
        options.update(kept)
    (row,) = rows[rows["Type"].isin(["ICC(A,1)", "ICC2"])].rename(columns={"CI95%": "CI95"}).to_dict("records")
    return row["ICC"], *row["CI95"]


def _icc_without_residual(x: ndarray, y: ndarray) -> ndarray:
    """Limit of ICC and interval for MSE -> 0, a pure offset, where the F ratio is infinite; 1, 1, 1 without one."""
    n, signal, offset = len(x), 2 * np.var(x, ddof=1), np.mean(y - x) ** 2
    return signal / (signal + offset * np.array([1, stats.f.ppf(0.975, n - 1, 1), stats.f.ppf(0.025, n - 1, 1)]))


def bootstrap_icc(
    reference: ndarray, estimate: ndarray, subjects: Sequence, rng: Generator, n_resamples=2000
) -> dict[str, float]:
    """ICC(A,1) with a 95 % percentile interval from resampling subjects with all their patches.

    Values (n,), or (n, biomarkers): then the statistic is the mean of the columns' ICCs. `subjects` is (n,), at
    least 2 different ones. Returns icc, ci_low, ci_high; faults as `icc`.
    """
    values = _icc_of(_resampled_sums(*_varying(reference, estimate), subjects, rng, n_resamples)).mean(axis=0)
    return {"icc": float(values[0]), **_interval(values)}


def bootstrap_icc_difference(
    reference: ndarray, estimate_a: ndarray, estimate_b: ndarray, subjects: Sequence, rng: Generator, n_resamples=2000
) -> dict[str, float]:
    """Paired ICC(A,1) of a minus that of b, the same resampled subjects in both; shapes as in `bootstrap_icc`.

    Returns difference, ci_low, ci_high and p (two-sided: twice the smaller share of resamples beyond zero).
    """
    seed = rng.integers(2**63)
    a, b = (
        _icc_of(_resampled_sums(*_varying(reference, e), subjects, np.random.default_rng(seed), n_resamples)).mean(0)
        for e in (estimate_a, estimate_b)
    )
    return {"difference": float(a[0] - b[0]), **_interval(a - b), "p": _tail_p(a - b)}


def order_and_error(reference: ndarray, estimate: ndarray) -> dict[str, float]:
    """Why an ICC is high or low: mean over biomarkers, (n, biomarkers), of what tells order from spread.

    correlation (Pearson); sd_ratio, SD over the reference's; relative_error, squared error over the reference's
    variance (1: no better than its mean). Faults as `icc`.
    """
    x, y = _varying(reference, estimate)
    found = {"correlation": np.mean([np.corrcoef(*both)[0, 1] for both in zip(x.T, y.T, strict=True)])}
    found |= {"sd_ratio": (y.std(0) / x.std(0)).mean(), "relative_error": (((y - x) ** 2).mean(0) / x.var(0)).mean()}
    return {name: float(value) for name, value in found.items()}


def icc_table(
    predictions: pd.DataFrame, reference: pd.DataFrame, rng: Generator, by: Sequence[str] = ("arm",), n_resamples=2000
) -> pd.DataFrame:
    """`bootstrap_icc` of every group, for each biomarker and for "mean", the mean over biomarkers.

    predictions: knee_id, subject_id, patch_id and BIOMARKERS; reference (MR, truth or rescan): knee_id, patch_id
    and BIOMARKERS; the columns `by` (arm, seed, compartment, ...) may be in either. A patch twice in one group
    (two seeds, say) is refused: it would count twice. Returns by, biomarker, n_patches, n_subjects, icc, ci_*.
    """
    by, key = list(by), ["knee_id", "patch_id"]
    columns = [*key, *BIOMARKERS, *(column for column in by if column not in predictions)]
    pairs = predictions.merge(reference[columns], on=key, suffixes=("", "_reference"))
    if pairs.duplicated([*by, *key]).any() or len(pairs) != len(predictions):
        raise InputFault("predictions", "and reference do not match one to one", "give each patch once a group")
    rows = []
    for group, frame in pairs.groupby(by):
        x, y = _varying(frame[[f"{b}_reference" for b in BIOMARKERS]], frame[list(BIOMARKERS)])
        values = _icc_of(_resampled_sums(x, y, frame["subject_id"], rng, n_resamples))
        size = {"n_patches": len(frame), "n_subjects": frame["subject_id"].nunique()}
        for name, draw in zip((*BIOMARKERS, "mean"), (*values, values.mean(axis=0)), strict=True):
            where = dict(zip(by, group, strict=True)) | {"biomarker": name} | size
            rows.append(where | {"icc": draw[0]} | _interval(draw))
    return pd.DataFrame(rows)


def icc_gains(
    predictions: pd.DataFrame, reference: pd.DataFrame, pairs: Sequence, rng: Generator, n_resamples: int = 2000
) -> pd.DataFrame:
    """`bootstrap_icc_difference` for each pair (arm, other arm) that is there, on all patches, by biomarker and mean.

    Frames as for `icc_table`. Returns arm, against, biomarker, difference, ci_low, ci_high, p.
    """
    key, columns = ["knee_id", "patch_id"], list(BIOMARKERS)
    known = {arm: rows.set_index(key)[columns] for arm, rows in predictions.groupby("arm", sort=False)}
    index = next(iter(known.values())).index
    target = reference.set_index(key).loc[index]
    rows = []
    for a, b in [(a, b) for a, b in pairs if a in known and b in known]:
        for name, own in {"mean": columns, **{column: [column] for column in columns}}.items():
            both = known[a].loc[index, own], known[b].loc[index, own]
            found = bootstrap_icc_difference(target[own], *both, target["subject_id"], rng, n_resamples)
            rows.append({"arm": a, "against": b, "biomarker": name} | found)
    return pd.DataFrame(rows)


def nested(table: pd.DataFrame) -> dict[str, dict[str, dict[str, float]]]:
    """An `icc_table` by arm as {arm: {biomarker or "mean": {icc, ci_low, ci_high}}}, for a results file."""
    rows = table.set_index(["arm", "biomarker"])[["icc", "ci_low", "ci_high"]]
    return {arm: group.droplevel("arm").to_dict("index") for arm, group in rows.groupby("arm", sort=False)}


def bland_altman(
    reference: ndarray,
    estimate: ndarray,
    subjects: Sequence | None = None,
    rng: Generator | None = None,
    n_resamples: int = 2000,
) -> dict[str, float]:
    """Bias and 95 % limits of agreement of estimate - reference (n,): bias -+ 1.96 SD, ddof = 1.

    `slope` is the proportional bias: difference regressed on the mean of both. Intervals `<name>_ci_low/high` of
    bias, loa_low, loa_high and slope, and slope_p: for independent pairs from Student's t with SE(limit)^2 =
    SD^2 (1/n + 1.96^2 / (2 (n - 1))) (Bland & Altman 1999); for patches give `subjects` and `rng`: bootstrap.
    """
    x, y = _pairs(reference, estimate)
    sums = _resampled_sums(x, y, subjects, rng, n_resamples)[:, 0]
    n, values = len(x), _bland_altman_of(sums)
    result = {"n": n} | {name: float(value[0]) for name, value in values.items()}
    if subjects is not None:
        return result | _intervals(values) | {"slope_p": _tail_p(values["slope"])}
    line = stats.linregress((x + y) / 2, y - x) if np.ptp(x + y) > 0 else None  # no range of sizes: no slope
    se_limit = result["sd"] * np.sqrt(1 / n + Z95**2 / (2 * (n - 1)))
    errors = {"bias": result["sd"] / np.sqrt(n), "loa_low": se_limit, "loa_high": se_limit}
    errors["slope"] = line.stderr if line else np.nan
    for name, error in errors.items():
        half = error * stats.t.ppf(0.975, n - 2 if name == "slope" else n - 1)
        result |= {f"{name}_ci_low": float(result[name] - half), f"{name}_ci_high": float(result[name] + half)}
    return result | {"slope_p": float(line.pvalue) if line else np.nan}


def deming(
    reference: ndarray,
    estimate: ndarray,
    ratio=1.0,
    subjects: Sequence | None = None,
    rng: Generator | None = None,
    n_resamples: int = 2000,
) -> dict[str, float]:
    """Deming line estimate = intercept + slope * reference, (n,) both with error (Linnet 1993).

    ratio = error variance of estimate / that of reference (1: orthogonal). With `subjects` and `rng` also
    `<name>_ci_low/high` by subject bootstrap. Raises InputFault where the two do not vary together.
    """
    x, y = _pairs(reference, estimate)
    values = _deming_of(_resampled_sums(x, y, subjects, rng, n_resamples)[:, 0], ratio, x.mean())
    if not np.isfinite(values["slope"][0]):
        raise InputFault("reference, estimate", "do not vary together", "give two measurements of one thing")
    line = {name: float(value[0]) for name, value in values.items()}
    return line | ({} if subjects is None else _intervals(values))


def conformal_radius(scores: ndarray, level: float = 0.90) -> float:
    """Split-conformal radius: the ceil((n + 1) level)-th smallest calibration score, infinite when that exceeds n.

    Scores |reference - estimate| (n,), or divided by the predicted SD. Covers a new, exchangeable target with
    probability >= level (Vovk 2005; Lei 2018).
    """
    scores = np.sort(np.asarray(scores, dtype=float))
    if np.isnan(scores).any() or not 0 < level < 1:
        raise InputFault("conformal interval", f"NaN score or level {level}", "give numbers and 0 < level < 1")
    rank = int(np.ceil(round((len(scores) + 1) * level, 9)))  # 10 * 0.9 must not become rank 10 by rounding
    return float(scores[rank - 1]) if rank <= len(scores) else np.inf


def cross_conformal(
    reference: ndarray, estimate: ndarray, folds: ndarray, sd: ndarray | None = None, level=0.90
) -> pd.DataFrame:
    """Interval of each out-of-fold estimate, calibrated on the other folds' residuals: DataFrame(low, high, covered).

    folds (n,): subject-wise folds. sd (n,): predicted SD, so that uncertain patches get wider intervals.
    """
    x, y = _pairs(reference, estimate)
    folds, sd = np.asarray(folds), np.ones_like(x) if sd is None else np.asarray(sd, dtype=float)
    radius = {fold: conformal_radius((np.abs(x - y) / sd)[folds != fold], level) for fold in np.unique(folds)}
    half = sd * np.array([radius[fold] for fold in folds])
    return pd.DataFrame({"low": y - half, "high": y + half, "covered": np.abs(x - y) <= half})


def restored_spread(reference: ndarray, estimate: ndarray, folds: ndarray) -> ndarray:
    """Out-of-fold estimates, (n,) or (n, k), given the reference's mean and SD; each fold by those of the others.

    The reduced major axis: it undoes the shrinkage to the mean of a least-squares fit, which ICC(A,1) punishes, and
    pays with squared error. folds (n,): subject-wise folds; where the others' estimates are all equal, nothing says how
    to stretch, and the mean is given. Raises InputFault for constant values, NaN.
    """
    x, y = _varying(reference, estimate)
    folds, restored = np.asarray(folds), np.empty_like(y)
    for own in [folds == fold for fold in np.unique(folds)]:
        varies, zero = np.ptp(y[~own], axis=0) > 0, np.zeros(y.shape[1:])
        stretch = np.divide(x[~own].std(axis=0), y[~own].std(axis=0), out=zero, where=varies)
        restored[own] = x[~own].mean(axis=0) + stretch * (y[own] - y[~own].mean(axis=0))
    return restored


def _pairs(reference: ndarray, estimate: ndarray) -> tuple[ndarray, ndarray]:
    x, y = np.asarray(reference, dtype=float), np.asarray(estimate, dtype=float)
    if x.shape != y.shape:
        raise InputFault("reference, estimate", f"have shapes {x.shape} and {y.shape}", "give pairs")
    if len(x) < 3:
        raise InputFault("reference, estimate", f"have {len(x)} values", "give at least 3 pairs")
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise InputFault("reference, estimate", "hold NaN or infinity", "leave out, and count, missing values")
    return x, y


def _varying(reference: ndarray, estimate: ndarray) -> tuple[ndarray, ndarray]:
    x, y = _pairs(reference, estimate)
    for name, values in (("reference", x), ("estimate", y)):
        if (np.ptp(values, axis=0) == 0).any():
            raise InputFault(name, "is constant", "give values that differ between targets")
    return x, y


def _resampled_sums(
    x: ndarray, y: ndarray, subjects: Sequence | None, rng: Generator | None, n_resamples: int
) -> ndarray:
    """Sums of 1, x, y, xx, yy, xy, (6, columns, 1 + resamples of subjects); the first are the data as they are.

    x, y (n,) or (n, columns), less the mean of x against rounding. Without subjects: no resample.
    """
    x, y = (v.reshape(len(v), -1) for v in _pairs(x, y))
    x, y = x - x.mean(axis=0), y - x.mean(axis=0)
    codes, names = pd.factorize(np.zeros(len(x)) if subjects is None else np.asarray(subjects))
    n = len(names)
    if n < 2 and subjects is not None:
        raise InputFault("subjects", f"are {n}", "give at least 2 to resample")
    sums = np.zeros((n, 6, x.shape[1]))
    np.add.at(sums, codes, np.stack([np.ones_like(x), x, y, x * x, y * y, x * y], axis=1))
    draws = [np.ones((1, n))] + ([] if subjects is None else [rng.multinomial(n, np.full(n, 1 / n), n_resamples)])
    return np.moveaxis(np.tensordot(np.vstack(draws), sums, 1), 0, -1)


def _variances(sums: ndarray) -> tuple[ndarray, ...]:
    """n, mean x, mean y, var x, var y, cov (ddof = 1) of `_resampled_sums`."""
    n, mx, my = sums[0], sums[1] / sums[0], sums[2] / sums[0]
    return n, mx, my, *((sums[3:] / n - np.stack([mx * mx, my * my, mx * my])) * n / (n - 1))


def _icc_of(sums: ndarray) -> ndarray:
    n, mx, my, vx, vy, cov = _variances(sums)
    return 2 * cov / (vx + vy + (my - mx) ** 2 - (vx + vy - 2 * cov) / n)


def _bland_altman_of(sums: ndarray) -> dict[str, ndarray]:
    _, mx, my, vx, vy, cov = _variances(sums)
    bias, sd = my - mx, np.sqrt(np.maximum(vx + vy - 2 * cov, 0))
    with np.errstate(invalid="ignore"):
        slope = 2 * (vy - vx) / (vx + vy + 2 * cov)
    return {"bias": bias, "sd": sd, "loa_low": bias - Z95 * sd, "loa_high": bias + Z95 * sd, "slope": slope}


def _deming_of(sums: ndarray, ratio: float, shift: float) -> dict[str, ndarray]:
    _, mx, my, vx, vy, cov = _variances(sums)
    with np.errstate(invalid="ignore", divide="ignore"):
        slope = (vy - ratio * vx + np.hypot(vy - ratio * vx, 2 * np.sqrt(ratio) * cov)) / (2 * cov)
        return {"slope": slope, "intercept": (my + shift) - slope * (mx + shift)}


def _interval(draws: ndarray, name: str = "") -> dict[str, float]:
    """95 % percentile interval of the resamples (all rows but the first), Efron & Tibshirani 1993."""
    low, high = np.nanpercentile(draws[1:], [2.5, 97.5])
    return {f"{name}ci_low": float(low), f"{name}ci_high": float(high)}


def _intervals(values: dict[str, ndarray]) -> dict[str, float]:
    return {k: v for name, draws in values.items() for k, v in _interval(draws, f"{name}_").items()}


def _tail_p(draws: ndarray) -> float:
    tail = min(np.sum(draws[1:] <= 0), np.sum(draws[1:] >= 0))
    return float(min(1.0, 2 * (tail + 1) / len(draws)))
