"""Agreement of estimates with the reference, as ctsma.agreement, with numpy alone.

The same generator gives the same resamples and the same numbers as `agreement_table` and
`bootstrap_differences` there.
"""

import numpy as np
from numpy import ndarray
from packed import BIOMARKERS

STATISTICS = ("icc", "r", "relative_error", "r_within", "r_between")
MEASURES = (*BIOMARKERS, "mean")


def agreement(reference, estimate, subjects, knees, rng, n_resamples=2000) -> dict:
    """Every statistic of values (n, 4), with 95 % intervals from resampling subjects.

    Returns {statistic: {biomarker or "mean": {"value", "ci_low", "ci_high"}}}.
    """
    found = statistics(reference, estimate, subjects, knees, rng, n_resamples)
    return {name: _by_measure(draws, "value") for name, draws in found.items()}


def differences(reference, one, other, subjects, knees, rng, n_resamples=2000) -> dict:
    """Paired differences of every statistic, `one` minus `other`, on the same resamples.

    Returns {statistic: {biomarker or "mean": {"difference", "ci_low", "ci_high"}}}.
    """
    seed, both = rng.integers(2**63), []
    for estimate in (one, other):
        own = np.random.default_rng(seed)
        both.append(statistics(reference, estimate, subjects, knees, own, n_resamples))
    first, second = both
    draws = {name: first[name] - second[name] for name in STATISTICS}
    return {name: _by_measure(values, "difference") for name, values in draws.items()}


def statistics(x, y, subjects, knees, rng, n_resamples) -> dict[str, ndarray]:
    """Each of `STATISTICS` (4, 1 + resamples of subjects); the first is of the data as they are."""
    _, one_per_knee, codes = np.unique(knees, return_index=True, return_inverse=True)
    counts = np.bincount(codes)[:, None]
    means = []
    for values in (x, y):
        sums = np.zeros((len(counts), values.shape[1]))
        np.add.at(sums, codes, values)
        means.append(sums / counts)
    within = x - means[0][codes], y - means[1][codes]
    whole = _moments(x, y, subjects, rng, n_resamples)
    inside = _moments(*within, subjects, rng, n_resamples)
    between = _moments(*means, subjects[one_per_knee], rng, n_resamples)
    n, mean_x, mean_y, var_x, var_y, cov = whole
    spread, offset = var_x + var_y - 2 * cov, (mean_y - mean_x) ** 2
    icc = 2 * cov / (var_x + var_y + offset - spread / n)
    error = (spread + offset * n / (n - 1)) / var_x
    values = [icc, _correlation(whole), error, _correlation(inside), _correlation(between)]
    return dict(zip(STATISTICS, values, strict=True))


def _by_measure(draws: ndarray, name: str) -> dict[str, dict[str, float]]:
    found, every = {}, [*draws, draws.mean(axis=0)]
    for measure, values in zip(MEASURES, every, strict=True):
        low, high = np.nanquantile(values[1:], [0.025, 0.975])
        found[measure] = {name: float(values[0]), "ci_low": float(low), "ci_high": float(high)}
    return found


def _moments(x: ndarray, y: ndarray, subjects, rng, n_resamples) -> tuple:
    """n, mean x, mean y, var x, var y, cov (ddof = 1), each (columns, 1 + resamples)."""
    x, y = x - x.mean(axis=0), y - x.mean(axis=0)
    _, first, codes = np.unique(subjects, return_index=True, return_inverse=True)
    codes = np.argsort(np.argsort(first))[codes]  # numbered in the order of appearance
    n_subjects = len(first)
    draws = rng.multinomial(n_subjects, np.full(n_subjects, 1 / n_subjects), n_resamples)
    weights = np.vstack([np.ones((1, n_subjects)), draws])
    sums = np.zeros((n_subjects, 6, x.shape[1]))
    np.add.at(sums, codes, np.stack([np.ones_like(x), x, y, x * x, y * y, x * y], axis=1))
    n, sum_x, sum_y, *products = np.moveaxis(np.tensordot(weights, sums, 1), 0, -1)
    mean_x, mean_y = sum_x / n, sum_y / n
    pairs = zip(products, (mean_x**2, mean_y**2, mean_x * mean_y), strict=True)
    return n, mean_x, mean_y, *[(total / n - product) * n / (n - 1) for total, product in pairs]


def _correlation(moments: tuple) -> ndarray:
    """NaN for a resample without variance."""
    _, _, _, var_x, var_y, cov = moments
    spread = np.sqrt(np.maximum(var_x * var_y, 0))
    return cov / np.where(spread > 0, spread, np.nan)
