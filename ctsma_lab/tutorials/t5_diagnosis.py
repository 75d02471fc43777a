"""T5: from the biomarkers of patches to a diagnosis of the knee, and what can go wrong.

Labels (n,) are 1 for osteoarthritis (OA) and 0 else; scores (n,) are probabilities of OA. The
patches and knees are those of a finished simulated run in notebooks/data.
"""

from collections.abc import Callable
from functools import cache

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from numpy import ndarray
from scipy import stats
from scipy.special import expit, logit
from sklearn.feature_selection import SelectKBest
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import KFold, StratifiedKFold, cross_val_predict
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from ctsma.arms import ARMS
from ctsma.common import BIOMARKERS
from ctsma.diagnosis import (
    auc_delong,
    calibration,
    compare_delong,
    compartment_means,
    cross_validate_tabular,
)
from ctsma.diagnosis.statistics import hanley_mcneil_se
from ctsma_lab import diagnosis_views, figures

from .data import read_knees, read_patches
from .exercises import Exercise, number_near
from .sliders import choice, explore, slider

ARM = "ct_sma_plus"
N_NOISE, N_SELECTED = 500, 10  # features of the pipelines C and D; design choice
N_NEIGHBOURS, N_FOLDS = 5, 5  # of the patch classifier; design choice
SENSITIVITY, SPECIFICITY, PREVALENCE = 0.8, 0.8, 0.1  # of exercise T5.2
THRESHOLD, TRUE_POSITIVES, FALSE_POSITIVES = 0.2, 35, 20  # of exercise T5.3
N_OA, N_OTHER = 41, 39  # of exercise T5.3
AUC, HALF_WIDTH = 0.8, 0.05  # of exercise T5.5


@cache
def scores(arm: str = ARM) -> pd.DataFrame:
    """Out-of-fold probability of OA of each knee: knee_id, oa, score.

    Logistic regression on the means of the four biomarkers in the four compartments. `arm` may
    also be `reference`, the biomarkers measured on MR.
    """
    table, knees = read_patches(), read_knees()
    tokens = table[["knee_id", "subject_id", "compartment"]].copy()
    tokens[list(BIOMARKERS)] = table[[f"{name}_{arm}" for name in BIOMARKERS]].to_numpy()
    labels = knees.set_index("knee_id")["oa"]
    splits = knees[["subject_id", "fold"]].drop_duplicates()
    found = cross_validate_tabular(compartment_means(tokens), labels, splits)
    found["oa"] = labels.loc[found["knee_id"]].to_numpy()
    return found[["knee_id", "oa", "score"]]


def at_threshold(labels: ndarray, values: ndarray, threshold: float) -> dict[str, float]:
    """Counts and rates where values above the threshold are called OA; NaN where undefined."""
    labels, positive = np.asarray(labels) == 1, np.asarray(values) > threshold
    tp, fp = np.sum(positive & labels), np.sum(positive & ~labels)
    fn, tn = np.sum(~positive & labels), np.sum(~positive & ~labels)
    return {
        "true positives": tp,
        "false positives": fp,
        "false negatives": fn,
        "true negatives": tn,
        "sensitivity": tp / (tp + fn),
        "specificity": tn / (tn + fp),
        "PPV": tp / (tp + fp) if tp + fp else np.nan,
        "NPV": tn / (tn + fn) if tn + fn else np.nan,
    }


def sharpen(values: ndarray, factor: float) -> ndarray:
    """Probabilities whose logits are multiplied by a factor: above 1 they are more extreme."""
    return expit(factor * logit(np.clip(values, 1e-6, 1 - 1e-6)))


def permuted_labels(seed: int) -> pd.Series:
    """The labels of the knees in random order, by knee_id: no method can predict them."""
    labels = read_knees().set_index("knee_id")["oa"]
    order = np.random.default_rng(seed).permutation(len(labels))
    return pd.Series(labels.to_numpy()[order], labels.index)


def patch_classifier_auc(labels: pd.Series, folds_by: str) -> float:
    """AUC of knees whose score is the mean over patches of a nearest-neighbour classifier.

    `folds_by` is "subject" (all patches of a subject are in one fold) or "patch". Features are the
    biomarkers of two arms and the mean HU.
    """
    table = read_patches()
    names = [f"{name}_{arm}" for arm in (ARM, "ct_only") for name in BIOMARKERS]
    x, y = table[[*names, "mean_hu"]].to_numpy(), labels.loc[table["knee_id"]].to_numpy()
    model = make_pipeline(StandardScaler(), KNeighborsClassifier(N_NEIGHBOURS))
    if folds_by == "subject":
        fold = table["fold"].to_numpy()
        parts = [(np.flatnonzero(fold != k), np.flatnonzero(fold == k)) for k in np.unique(fold)]
    else:
        parts = list(KFold(N_FOLDS, shuffle=True, random_state=0).split(x))
    score = cross_val_predict(model, x, y, cv=parts, method="predict_proba")[:, 1]
    by_knee = pd.Series(score).groupby(table["knee_id"]).mean()
    return auc_delong(labels.loc[by_knee.index], by_knee)["auc"]


def selection_auc(labels: pd.Series, select_inside: bool) -> float:
    """AUC of a logistic regression on the 10 best of 500 random features.

    The features are chosen in the training folds alone (`select_inside`) or on all knees.
    """
    y = labels.to_numpy()
    x = np.random.default_rng(0).standard_normal((len(y), N_NOISE))
    selection, model = SelectKBest(k=N_SELECTED), LogisticRegression()
    if select_inside:
        model = make_pipeline(selection, model)
    else:
        x = selection.fit_transform(x, y)
    folds = StratifiedKFold(N_FOLDS, shuffle=True, random_state=0)
    score = cross_val_predict(model, x, y, cv=folds, method="predict_proba")[:, 1]
    return auc_delong(y, score)["auc"]


def pipelines() -> dict[str, Callable[[pd.Series], float]]:
    """Four pipelines from labels by knee_id to an AUC, some of which leak (exercise T5.4)."""
    return {
        "A": lambda labels: patch_classifier_auc(labels, "patch"),
        "B": lambda labels: patch_classifier_auc(labels, "subject"),
        "C": lambda labels: selection_auc(labels, select_inside=True),
        "D": lambda labels: selection_auc(labels, select_inside=False),
    }


def half_width(auc: float, n_knees: float) -> float:
    """Half of the 95 % interval of an AUC with n knees, half of them with OA (Hanley, McNeil)."""
    return stats.norm.ppf(0.975) * hanley_mcneil_se(auc, n_knees / 2, n_knees / 2)


def difference(arm: str, other: str) -> dict[str, float]:
    """AUC of an arm minus that of another with DeLong's paired 95 % interval."""
    first, second = scores(arm), scores(other)
    found = compare_delong(first["oa"], first["score"], second["score"])
    return {name: float(found[name]) for name in ("difference", "ci_low", "ci_high", "p")}


def difference_in_words(arm: str, other: str) -> str:
    """`difference`, and what its interval shows and does not exclude."""
    found = difference(arm, other)
    low, high = found["ci_low"], found["ci_high"]
    text = f"AUC difference {found['difference']:.3f} (95 % CI {low:.3f} to {high:.3f}): "
    if low > 0 or high < 0:
        return text + "the interval does not contain 0; these knees show a difference."
    text += "the interval contains 0; these knees do not show a difference. "
    return text + f"They exclude neither a loss of {-low:.3f} nor a gain of {high:.3f}."


def draw_threshold(threshold: float) -> Figure:
    """Scores of both classes with the threshold, its point on the ROC curve, and the counts."""
    table = scores()
    labels, values = table["oa"].to_numpy(), table["score"].to_numpy()
    found, area = at_threshold(labels, values, threshold), auc_delong(labels, values)
    figure, axes = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    for colour, oa, name in zip(figures.PALETTE, (0, 1), ("no OA", "OA"), strict=False):
        height = np.random.default_rng(0).uniform(-0.25, 0.25, np.sum(labels == oa)) + oa
        axes[0].scatter(values[labels == oa], height, s=14, color=colour, label=name)
    axes[0].axvline(threshold, color="black", linestyle="--", linewidth=0.9)
    axes[0].set_yticks([0, 1], [f"no OA, n = {np.sum(labels == 0)}", f"OA, n = {labels.sum()}"])
    axes[0].set(xlabel="probability of OA", xlim=(0, 1), title="simulated knees")
    steps = np.r_[np.inf, np.sort(np.unique(values))[::-1], -np.inf]
    rates = [at_threshold(labels, values, step) for step in steps]
    false_positive = np.array([1 - rate["specificity"] for rate in rates])
    true_positive = np.array([rate["sensitivity"] for rate in rates])
    label = "AUC {auc:.2f} ({ci_low:.2f} to {ci_high:.2f})".format(**area)
    figures.roc(axes[1], false_positive, true_positive, label, figures.PALETTE[0])
    point = 1 - found["specificity"], found["sensitivity"]
    axes[1].plot(*point, "o", color=figures.PALETTE[1], label="threshold")
    axes[1].legend(frameon=False, loc="lower right", fontsize=8)
    lines = [f"{name}: {value:.2f}" for name, value in list(found.items())[4:]]
    lines = [f"{name}: {value}" for name, value in list(found.items())[:4]] + [""] + lines
    axes[2].text(0.05, 0.95, "\n".join(lines), va="top", fontsize=11)
    axes[2].set_axis_off()
    return figure


def draw_prevalence(sensitivity: float, specificity: float) -> Figure:
    """Predictive values against the prevalence."""
    prevalence = np.linspace(0.005, 0.995, 199)
    tp, fp = sensitivity * prevalence, (1 - specificity) * (1 - prevalence)
    tn, fn = specificity * (1 - prevalence), (1 - sensitivity) * prevalence
    figure, ax = plt.subplots(figsize=(6.5, 3.8), layout="constrained")
    ax.plot(prevalence, tp / (tp + fp), color=figures.PALETTE[0], label="PPV: OA, if positive")
    ax.plot(prevalence, tn / (tn + fn), color=figures.PALETTE[1], label="NPV: no OA, if negative")
    ax.axvline(read_knees()["oa"].mean(), color="#888888", linestyle=":", label="this cohort")
    ax.set(xlabel="prevalence of OA", ylabel="probability", xlim=(0, 1), ylim=(0, 1.02))
    ax.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def draw_calibration(factor: float) -> Figure:
    """Calibration curve of sharpened probabilities, with AUC, slope and Brier score."""
    table = scores()
    values = sharpen(table["score"].to_numpy(), factor)
    found = calibration(table["oa"], values)
    area = auc_delong(table["oa"], values)["auc"]
    figure, ax = plt.subplots(figsize=(4.8, 4.8), layout="constrained")
    title = f"AUC {area:.3f}, slope {found['slope']:.2f}, Brier score {found['brier']:.3f}"
    curve = diagnosis_views.calibration_curve(table["oa"], values)
    figures.calibration(ax, curve, title, figures.PALETTE[0])
    return figure


def draw_decision(threshold: float) -> Figure:
    """Decision curve of the main arm and of the MR reference, with one threshold."""
    figure, ax = plt.subplots(figsize=(8, 4), layout="constrained")
    thresholds = np.linspace(0.05, 0.85, 81)
    curves = {}
    for arm in (ARM, "reference"):
        table = scores(arm)
        name = arm if arm in ARMS else "MR reference"
        curves[name] = diagnosis_views.net_benefit(table["oa"], table["score"], thresholds)
    figures.decision(ax, curves)
    ax.lines[-1].set_color(figures.PALETTE[6])
    ax.axvline(threshold, color="black", linestyle="--", linewidth=0.9)
    one = diagnosis_views.net_benefit(scores()["oa"], scores()["score"], [threshold]).iloc[0]
    ax.set_title(f"threshold {threshold:.2f}: {one['model']:.3f}, treat all {one['treat_all']:.3f}")
    ax.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def draw_leak(folds_by: str, labels: str) -> Figure:
    """AUC of the patch classifier with true or permuted labels."""
    figure, ax = plt.subplots(figsize=(7, 2.4), layout="constrained")
    if labels == "true":
        found = [patch_classifier_auc(read_knees().set_index("knee_id")["oa"], folds_by)]
    else:
        found = [patch_classifier_auc(permuted_labels(seed), folds_by) for seed in range(10)]
    ax.plot(found, np.zeros(len(found)), "o", color=figures.PALETTE[0], label="AUC")
    ax.axvline(0.5, color="black", linestyle="--", linewidth=0.9, label="chance")
    times = "once" if labels == "true" else "ten permutations"
    ax.set(xlim=(0.2, 1), yticks=[], xlabel="AUC for OA, 80 simulated knees")
    ax.set_title(f"folds by {folds_by}, {labels} labels ({times}): mean {np.mean(found):.2f}")
    ax.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def draw_sample_size(auc: float, n_knees: float) -> Figure:
    """AUCs of simulated studies of n knees, and half of the 95 % interval against n."""
    rng, n = np.random.default_rng(0), int(n_knees) // 2
    shift = np.sqrt(2) * stats.norm.ppf(auc)  # two normal distributions have this AUC
    cases, others = rng.standard_normal((500, n)) + shift, rng.standard_normal((500, n))
    found = [stats.mannwhitneyu(a, b).statistic / n**2 for a, b in zip(cases, others, strict=True)]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10.5, 3.8), layout="constrained")
    left.hist(found, bins=np.linspace(0.4, 1, 41), color=figures.PALETTE[0])
    left.axvline(auc, color="black", linestyle="--", linewidth=0.9, label="true AUC")
    low, high = np.percentile(found, [2.5, 97.5])
    left.set(xlabel="AUC found", ylabel="studies (of 500, made up)")
    left.set_title(f"{2 * n} knees: 95 % of studies find {low:.2f} to {high:.2f}", fontsize=10)
    left.legend(frameon=False, loc="upper left")
    sizes = np.arange(20, 1001, 10)
    right.plot(sizes, [half_width(auc, size) for size in sizes], color=figures.PALETTE[0])
    right.plot(2 * n, half_width(auc, 2 * n), "o", color=figures.PALETTE[1], label="chosen n")
    right.set(xlabel="knees, half of them with OA", ylabel="half of the 95 % interval of the AUC")
    right.set_ylim(0, 0.25)
    right.legend(frameon=False)
    return figure


def explore_threshold() -> None:
    """`draw_threshold` with a slider."""
    explore(draw_threshold, threshold=slider("threshold", 0.02, 0.98, 0.02, 0.5))


def explore_prevalence() -> None:
    """`draw_prevalence` with sliders."""
    explore(
        draw_prevalence,
        sensitivity=slider("sensitivity", 0.5, 1, 0.05, 0.75),
        specificity=slider("specificity", 0.5, 1, 0.05, 0.75),
    )


def explore_calibration() -> None:
    """`draw_calibration` with a slider."""
    explore(draw_calibration, factor=slider("factor on the logits", 0.1, 3, 0.1, 1))


def explore_decision() -> None:
    """`draw_decision` with a slider."""
    explore(draw_decision, threshold=slider("threshold probability", 0.05, 0.85, 0.05, 0.5))


def explore_leak() -> None:
    """`draw_leak` with two lists."""
    explore(
        draw_leak,
        folds_by=choice("folds by", ["subject", "patch"], "subject"),
        labels=choice("labels", ["true", "permuted"], "true"),
    )


def explore_sample_size() -> None:
    """`draw_sample_size` with sliders."""
    explore(
        draw_sample_size,
        auc=slider("true AUC", 0.55, 0.95, 0.05, 0.8),
        n_knees=slider("knees", 20, 1000, 20, 80),
    )


def _judge_auc(function: object) -> str:
    """Judge auc(labels, scores) on scores without ties, with ties, and in wrong order."""
    rng = np.random.default_rng(1)
    labels = rng.permutation(np.repeat([0, 1], [17, 23]))
    for case, values in (
        ("no ties", rng.standard_normal(40) + labels),
        ("ties", np.round(rng.standard_normal(40) + labels)),
        ("low scores for OA", rng.standard_normal(40) - labels),
    ):
        found, expected = float(function(labels, values)), auc_delong(labels, values)["auc"]
        if not abs(found - expected) <= 1e-9:
            hint = "Count a pair with equal scores as half." if case == "ties" else ""
            hint = hint or "Compare every knee with OA with every knee without."
            return f"Your function gives {found:.3f}, expected {expected:.3f} ({case}). {hint}"
    return ""


def _ppv() -> float:
    tp, fp = SENSITIVITY * PREVALENCE, (1 - SPECIFICITY) * (1 - PREVALENCE)
    return tp / (tp + fp)


def _benefit(true_positives: int, false_positives: int) -> float:
    odds = THRESHOLD / (1 - THRESHOLD)
    return (true_positives - false_positives * odds) / (N_OA + N_OTHER)


def _benefit_over_all() -> float:
    return _benefit(TRUE_POSITIVES, FALSE_POSITIVES) - _benefit(N_OA, N_OTHER)


def _judge_leaks(answer: object) -> str:
    given = set(answer)
    if given == {"A", "D"}:
        return ""
    if not given <= set("ABCD"):
        return "Give a set of names out of A, B, C, D."
    if given == set():
        return "Run each pipeline with permuted_labels(seed) for several seeds, and average."
    return f"{len(given & {'A', 'D'})} of the 2 leaking pipelines are in your set, and \
{len(given - {'A', 'D'})} that do not leak. With permuted labels an honest AUC is about 0.5."


@cache
def _needed_knees() -> float:
    sizes = np.arange(20, 5000, 2)
    return float(next(n for n in sizes if half_width(AUC, n) <= HALF_WIDTH))


EXERCISES = {
    "T5.1": Exercise(
        _judge_auc,
        "The AUC is the probability that a random knee with OA scores higher than a random knee "
        "without. No threshold enters.",
    ),
    "T5.2": Exercise(
        number_near(
            _ppv,
            0.006,
            "Think of 1000 knees: how many have OA, how many of these are positive, and how many "
            "of the others?",
            {
                "This is the PPV at a prevalence of 50 %.": lambda: SENSITIVITY,
                "This is the NPV.": lambda: 0.9 * 0.8 / (0.9 * 0.8 + 0.1 * 0.2),
                "This is the share of knees that are called positive.": lambda: (
                    SENSITIVITY * PREVALENCE + (1 - SPECIFICITY) * (1 - PREVALENCE)
                ),
            },
        ),
        "More than two thirds of the positive knees have no OA. A study with as many cases as "
        "controls does not show this; sensitivity and specificity look the same.",
    ),
    "T5.3": Exercise(
        number_near(
            _benefit_over_all,
            0.002,
            "Net benefit: TP / n - FP / n * t / (1 - t). Treating all has TP = 41 and FP = 39.",
            {
                "This is the net benefit of the model. Subtract that of treating all.": lambda: (
                    _benefit(TRUE_POSITIVES, FALSE_POSITIVES)
                ),
                "This is treating all minus the model. Mind the sign.": lambda: (
                    -_benefit_over_all()
                ),
                "Weigh the false positives by the odds t / (1 - t), not by t.": lambda: (
                    (TRUE_POSITIVES - N_OA - THRESHOLD * (FALSE_POSITIVES - N_OTHER)) / 80
                ),
            },
        ),
        "It is negative: whoever would treat at a risk of 20 % does better without this model, by "
        "treating everybody. A good AUC does not exclude that.",
    ),
    "T5.4": Exercise(
        _judge_leaks,
        "A has patches of the same knee in training and test, so it recognises the knee. D chose "
        "its features with the labels of the test knees. Permuted labels reveal both, because "
        "nothing can be learned from them.",
    ),
    "T5.5": Exercise(
        number_near(
            _needed_knees,
            12,
            "Increase n until half_width(0.8, n) is 0.05.",
            {
                "This is the number in each group. Both groups count.": lambda: _needed_knees() / 2,
                "This is for a half width of 0.1.": lambda: next(
                    float(n) for n in range(20, 500, 2) if half_width(AUC, n) <= 2 * HALF_WIDTH
                ),
            },
        ),
        "The published cohort of 80 knees gives a half width of about 0.1. Half the width needs "
        "four times the knees.",
    ),
}
