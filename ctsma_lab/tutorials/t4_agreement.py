"""T4: agreement of an estimate with a reference, and what it is not.

Arrays are (n,). Made-up pairs have reference and estimate in units of the reference's SD; the
patches of a finished simulated run come from notebooks/data.
"""

from functools import cache

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from numpy import ndarray

from ctsma.agreement import bland_altman, bootstrap_icc, icc
from ctsma.arms import ARMS
from ctsma.common import LABELS
from ctsma_lab import figures

from .data import read_patches
from .exercises import Exercise, number_near
from .sliders import explore, slider

ARM, SHRUNK = "ct_sma_plus", ("ct_sma", "tb_n_per_mm")  # the second: arm and biomarker
N_PAIRS = 300
OFFSET_SD = 1.0  # of exercise T4.1
N_KNEES, N_PER_KNEE, CORRELATION = 80, 16, 0.5  # of exercise T4.5


def pairs(bias: float, scale: float, noise: float, seed: int = 0) -> tuple[ndarray, ndarray]:
    """Reference of SD 1 around 0, and estimate = bias + scale * reference + noise."""
    rng = np.random.default_rng(seed)
    reference = rng.standard_normal(N_PAIRS)
    reference = (reference - reference.mean()) / reference.std(ddof=1)
    return reference, bias + scale * reference + noise * rng.standard_normal(N_PAIRS)


def summary(reference: ndarray, estimate: ndarray) -> dict[str, float]:
    """Correlation r, ICC(A,1) and relative squared error (over the reference's variance)."""
    return {
        "r": float(np.corrcoef(reference, estimate)[0, 1]),
        "ICC": icc(reference, estimate)["icc"],
        "relative error": float(np.mean((estimate - reference) ** 2) / np.var(reference)),
    }


def patches(arm: str = ARM, biomarker: str = "bv_tv") -> pd.DataFrame:
    """Patches of the simulated run: knee_id, subject_id, reference and estimate of a biomarker."""
    table = read_patches()
    columns = {f"{biomarker}_reference": "reference", f"{biomarker}_{arm}": "estimate"}
    return table[["knee_id", "subject_id", *columns]].rename(columns=columns)


def stretch(reference: ndarray, estimate: ndarray, share: float) -> ndarray:
    """The estimate with its SD multiplied by 1 + share (SD(reference) / SD(estimate) - 1).

    The mean stays. At share 1 the SD is that of the reference.
    """
    factor = 1 + share * (np.std(reference) / np.std(estimate) - 1)
    return estimate.mean() + factor * (estimate - estimate.mean())


@cache
def wanted_gain() -> float:
    """By how much exercise T4.4 raises the ICC: nine tenths of what the reference's SD gives."""
    table = patches(*SHRUNK)
    reference, estimate = table["reference"].to_numpy(), table["estimate"].to_numpy()
    stretched = stretch(reference, estimate, 1) + reference.mean() - estimate.mean()
    gain = summary(reference, stretched)["ICC"] - summary(reference, estimate)["ICC"]
    return round(0.9 * gain, 3)


def clustered(between: float, n_knees: int, n_per_knee: int, seed: int = 0) -> pd.DataFrame:
    """Pairs whose reference and error are shared by the patches of a knee to the share `between`.

    The true ICC does not depend on `between`, which is the intraknee correlation of both.
    """
    rng = np.random.default_rng(seed)
    knee = np.repeat(np.arange(n_knees), n_per_knee)
    parts = []
    for sd in (1.0, 0.7):
        shared = rng.standard_normal(n_knees)[knee]
        own = rng.standard_normal(len(knee))
        parts.append(sd * (np.sqrt(between) * shared + np.sqrt(1 - between) * own))
    return pd.DataFrame({"knee": knee, "reference": parts[0], "estimate": parts[0] + parts[1]})


def draw_pairs(bias: float, scale: float, noise: float) -> Figure:
    """Scatter and Bland-Altman plot of `pairs`, with r, ICC and relative error."""
    reference, estimate = pairs(bias, scale, noise)
    title = ", ".join(f"{k} {v:.2f}" for k, v in summary(reference, estimate).items())
    return _draw_both(reference, estimate, title, " (SD of reference)")


def draw_patches(arm: str = ARM) -> Figure:
    """The same two panels for the BV/TV of all patches of one arm of the run."""
    table = patches(arm)
    reference, estimate = table["reference"].to_numpy(), table["estimate"].to_numpy()
    n_knees = table["knee_id"].nunique()
    title = f"BV/TV, {ARMS[arm].label}: {len(table)} patches of {n_knees} simulated knees"
    return _draw_both(reference, estimate, title, "")


def _draw_both(reference: ndarray, estimate: ndarray, title: str, unit: str) -> Figure:
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.4), layout="constrained")
    figures.scatter(left, reference, estimate, "", figures.PALETTE[0])
    left.set(xlabel=f"reference{unit}", ylabel=f"estimate{unit}")
    left.set_title("dashed: identity", fontsize=9)
    limits = bland_altman(reference, estimate)
    figures.bland_altman(right, reference, estimate, limits, "", figures.PALETTE[0])
    right.set(xlabel=f"mean of both{unit}", ylabel=f"estimate - reference{unit}")
    right.set_title("solid: bias, dashed: 95 % limits of agreement", fontsize=9)
    figure.suptitle(f"{title} (n = {len(reference)})" if unit else title)
    return figure


def draw_stretch(share: float) -> Figure:
    """Stretched estimates of Tb.N by CT-SMA, and ICC and relative error against the stretch."""
    arm, biomarker = SHRUNK
    table, name = patches(arm, biomarker), LABELS[biomarker]
    reference, estimate = table["reference"].to_numpy(), table["estimate"].to_numpy()
    factors = np.linspace(0, 1.5, 31)
    rows = [summary(reference, stretch(reference, estimate, f)) for f in factors]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    stretched = stretch(reference, estimate, share)
    figures.scatter(left, reference, stretched, "", figures.PALETTE[0])
    left.set(xlabel=f"reference {name}", ylabel=f"stretched estimate of {name}")
    left.set_title(f"SD of estimate / SD of reference: {stretched.std() / reference.std():.2f}")
    for colour, key in zip(figures.PALETTE, ("ICC", "relative error", "r"), strict=False):
        right.plot(factors, [row[key] for row in rows], color=colour, label=key)
    right.axvline(share, color="black", linewidth=0.9, linestyle="--", label="chosen")
    right.set(xlabel="stretch (0: as estimated, 1: SD of reference)", ylabel="value")
    right.set(ylim=(0, 1.2))
    right.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    n_knees = table["knee_id"].nunique()
    figure.suptitle(f"{ARMS[arm].label}: {len(table)} patches of {n_knees} simulated knees")
    return figure


def bootstrap_intervals(table: pd.DataFrame, owner: str, n_resamples: int = 1000) -> pd.DataFrame:
    """ICC with two intervals: patches resampled one by one, and by `owner` (a column)."""
    rows = []
    for label, owners in (("patches", np.arange(len(table))), (f"{owner}s", table[owner])):
        rng = np.random.default_rng(0)
        values = table["reference"].to_numpy(), table["estimate"].to_numpy()
        found = bootstrap_icc(*values, np.asarray(owners), rng, n_resamples)
        rows.append({"label": f"resampled: {label}", "value": found["icc"]})
        rows[-1] |= {"low": found["ci_low"], "high": found["ci_high"]}
    return pd.DataFrame(rows)


def draw_clusters(between: float, n_per_knee: int) -> Figure:
    """Pairs of a few knees by colour, and both bootstrap intervals of the ICC."""
    table = clustered(between, 40, int(n_per_knee))
    figure, (left, right) = plt.subplots(1, 2, figsize=(10.5, 4), layout="constrained")
    left.scatter(table["reference"], table["estimate"], s=6, color="#BBBBBB", label="other knees")
    for colour, (knee, rows) in zip(figures.PALETTE[:4], table.groupby("knee"), strict=False):
        left.scatter(rows["reference"], rows["estimate"], s=18, color=colour, label=f"knee {knee}")
    left.set(xlabel="reference (SD)", ylabel="estimate (SD)")
    left.set_title(f"made-up pairs: 40 knees with {int(n_per_knee)} patches each")
    left.legend(frameon=False, fontsize=8)
    intervals = bootstrap_intervals(table, "knee")
    figures.intervals(right, intervals, "ICC(A,1), 95 % interval").set_xlim(0.4, 1)
    widths = intervals["high"] - intervals["low"]
    right.set_title(f"interval by knees / by patches: {widths[1] / widths[0]:.1f} times as wide")
    return figure


def draw_run_intervals() -> Figure:
    """Both bootstrap intervals of the ICC of BV/TV of the main arm of the run."""
    table = patches().rename(columns={"subject_id": "subject"})
    figure, ax = plt.subplots(figsize=(7, 2.2), layout="constrained")
    figures.intervals(ax, bootstrap_intervals(table, "subject"), "ICC(A,1) of BV/TV")
    n_subjects = table["subject"].nunique()
    ax.set_title(f"{len(table)} patches of {n_subjects} simulated subjects")
    return figure


def explore_pairs() -> None:
    """`draw_pairs` with sliders."""
    explore(
        draw_pairs,
        bias=slider("bias (SD of reference)", -2, 2, 0.1, 0),
        scale=slider("scale (slope)", 0.1, 2, 0.1, 1),
        noise=slider("noise (SD of reference)", 0, 2, 0.1, 0.3),
    )


def explore_stretch() -> None:
    """`draw_stretch` with a slider."""
    explore(draw_stretch, share=slider("stretch", 0, 1.5, 0.1, 0))


def explore_clusters() -> None:
    """`draw_clusters` with sliders."""
    explore(
        draw_clusters,
        between=slider("intraknee correlation", 0, 0.95, 0.05, 0.5),
        n_per_knee=slider("patches per knee", 2, 32, 2, 16),
    )


def _consistency(x: ndarray, y: ndarray) -> float:
    """ICC(C,1): a constant offset does not lower it."""
    return float(2 * np.cov(x, y)[0, 1] / (np.var(x, ddof=1) + np.var(y, ddof=1)))


def _judge_icc(function: object) -> str:
    """Judge icc(reference, estimate) on pairs with bias, scale and few values."""
    for bias, scale, noise, n in ((0, 1, 0.5, 300), (0.8, 1, 0.3, 300), (0.5, 0.5, 0.4, 12)):
        x, y = (values[:n] for values in pairs(bias, scale, noise, seed=1))
        found, expected = float(function(x, y)), icc(x, y)["icc"]
        if abs(found - expected) <= 1e-6:
            continue
        case = f"bias {bias}, scale {scale}, noise {noise}, n = {n}"
        if abs(found - np.corrcoef(x, y)[0, 1]) < 1e-6:
            return f"This is the correlation, {found:.3f} ({case})."
        if abs(found - _consistency(x, y)) < 1e-6:
            return f"This ignores the bias: ICC(C,1) is {found:.3f} ({case}). Add MSC."
        if abs(found - expected) < 0.02:
            return f"Nearly: {found:.4f}, expected {expected:.4f} ({case}). Check the degrees of \
freedom of each mean square: n - 1, 1 and n - 1."
        return f"Your function gives {found:.3f}, expected {expected:.3f} ({case})."
    return ""


@cache
def limits_width_in_sd() -> float:
    """Width of the limits of agreement of BV/TV by the main arm, in SD of the reference."""
    table = patches()
    found = bland_altman(table["reference"], table["estimate"])
    return (found["loa_high"] - found["loa_low"]) / table["reference"].std()


def _judge_stretched(answer: object) -> str:
    """Judge estimates that should be a linear function of those of SHRUNK, with a higher ICC."""
    table = patches(*SHRUNK)
    reference, estimate = table["reference"].to_numpy(), table["estimate"].to_numpy()
    stretched = np.asarray(answer, dtype=float)
    if stretched.shape != estimate.shape:
        return f"Give one value for each of the {len(estimate)} patches."
    if not np.corrcoef(estimate, stretched)[0, 1] > 1 - 1e-9:
        return "This is more than a shift and a stretch of the estimates. A patch's own reference \
is not known when its CT is read."
    before, after = summary(reference, estimate), summary(reference, stretched)
    if after["ICC"] < before["ICC"] + wanted_gain():
        return f"The ICC is {after['ICC']:.3f}, and {before['ICC']:.3f} before. Is the SD of your \
values that of the reference, and their mean?"
    return ""


def _design_effect() -> float:
    return 1 + (N_PER_KNEE - 1) * CORRELATION


EXERCISES = {
    "T4.1": Exercise(
        number_near(
            lambda: 2 / (2 + OFFSET_SD**2),
            0.01,
            "Set scale 1, noise 0 and bias 1 in the figure, and read the ICC.",
            {
                "This is the correlation. It ignores the bias.": lambda: 1.0,
                "Half is near, but two of the three variances in the denominator are those of "
                "reference and estimate: 2 cov / (var x + var y + bias^2).": lambda: 0.5,
            },
        ),
        "An estimate that is wrong by one SD everywhere has r = 1 and an ICC of 2/3.",
    ),
    "T4.2": Exercise(
        _judge_icc,
        "MSC carries the bias. A scale other than 1 enters MSE, because differences then depend "
        "on the size of the value.",
    ),
    "T4.3": Exercise(
        number_near(
            lambda: limits_width_in_sd(),
            0.03,
            "Divide the distance of the two limits of agreement by the SD of the reference.",
            {
                "This is the half width. The limits lie on both sides of the bias.": lambda: (
                    limits_width_in_sd() / 2
                ),
                "This is the width in BV/TV. Divide it by the SD of the reference.": lambda: (
                    limits_width_in_sd() * patches()["reference"].std()
                ),
            },
        ),
        "Whoever gives the mean reference to every patch has limits that are 2 x 1.96 = 3.9 SD "
        "wide. A moderate ICC leaves wide limits for a single patch.",
    ),
    "T4.4": Exercise(
        _judge_stretched,
        "The ICC rose and nothing was learned: r is the same. The squared error rose too. So the "
        "ICC is not reported alone, and a method that shrinks its estimates can have a lower ICC "
        "and smaller errors.",
    ),
    "T4.5": Exercise(
        number_near(
            lambda: N_KNEES * N_PER_KNEE / _design_effect(),
            2,
            "The variance of a mean is multiplied by the design effect, 1 + (m - 1) rho with m "
            "patches per knee. How many independent patches would give the same variance?",
            {
                "This is the number of patches. They are not independent.": lambda: float(
                    N_KNEES * N_PER_KNEE
                ),
                "This is the number of knees. The patches of a knee add something, because rho "
                "is below 1.": lambda: float(N_KNEES),
                "This is the design effect. Divide the number of patches by it.": _design_effect,
            },
        ),
        "1280 patches are worth 151 independent ones. Cutting more patches from the same 80 knees "
        "would not pass 160.",
    ),
}
