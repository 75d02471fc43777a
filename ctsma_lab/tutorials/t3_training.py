"""T3: train a teacher on MR and two students on CT, and compare them within and between knees.

96 patches of 24 simulated knees come from notebooks/data. Each of three folds trains networks on 16
knees and tests them on 8, so that every patch is estimated by networks that did not see its knee.
Networks are smaller than those of the study, and trained for fewer steps.
"""

from dataclasses import replace
from functools import cache

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from numpy import ndarray

from ctsma.agreement import agreement_table
from ctsma.arms import ARMS
from ctsma.common import BIOMARKERS, LABELS
from ctsma.distillation import (
    Fold,
    Settings,
    TeacherCache,
    TrainingData,
    make_fold,
    predict_rows,
    prepare,
    train,
)
from ctsma.distillation.losses import knee_level_mse
from ctsma.distillation.training import with_teacher_labels
from ctsma.models import Network
from ctsma.patches import CT_SPACING_MM, MR_SPACING_MM
from ctsma.ridge import quasi_demeaning
from ctsma_lab import figures

from .data import PATCH, read_patch_images, read_patches
from .exercises import Exercise, number_near
from .sliders import choice, explore, slider

ARM = "ct_sma_plus"
TEACHER, ALONE, TAUGHT = "mr_teacher", "ct_only", "ct_sma"  # the networks that are trained here
LABELS_HERE = {
    TEACHER: "teacher (MR)",
    ALONE: "student without teacher",
    TAUGHT: "student with teacher",
}
N_FOLDS = 3
SETTINGS = Settings(
    widths=(8, 8, 16), epochs=16, batch_size=8, patches_per_knee=4, precision="float32"
)  # design choice: about 20 s of one core for all networks
TERMS = {"feature_l1 (published)": "feature_l1", "cam_mse": "cam_mse"}
N_LABELLED = [16, 12, 8]  # of the 16 training knees of a fold
MEASURES = {
    "r_within": "r within knees",
    "r_between": "r between knees",
    "relative_error": "relative error (less is better)",
    "icc": "ICC(A,1)",
}
N_RESAMPLES = 500
GAIN = 0.005  # by which a measure improves in exercise T3.5; design choice
TRIED: dict[tuple, pd.DataFrame] = {}  # settings -> `measures`, of this session
KNEE = np.array([0.3, 0.1, 0.2, 0.2])  # errors of four patches of one knee, in section 3


@cache
def data() -> TrainingData:
    """The patches, ready for training."""
    return prepare(read_patch_images())


@cache
def splits() -> pd.DataFrame:
    """subject_id and fold of the 24 knees."""
    subjects = np.unique(data().subjects)
    return pd.DataFrame({"subject_id": subjects, "fold": np.arange(len(subjects)) % N_FOLDS})


def labelled(fold: int, n_labelled: int) -> TrainingData:
    """The patches; of the training knees of a fold all but `n_labelled` lose their reference."""
    table = splits()
    training = table.loc[table["fold"] != fold, "subject_id"].to_numpy()
    order = np.random.default_rng(fold).permutation(training)
    targets = data().targets.copy()
    targets[np.isin(data().subjects, order[n_labelled:])] = np.nan
    return replace(data(), targets=targets)


def divided(
    arm: str, fold: int, n_labelled: int, rho: float, seed: int
) -> tuple[TrainingData, Fold]:
    """Data and rows for one network; `rho` of its likelihood is given, not estimated."""
    known = labelled(fold, n_labelled)
    rows = make_fold(known, splits(), fold, seed, SETTINGS, ARMS[arm])
    return known, _with_rho(rows, rho)


def _with_rho(fold: Fold, rho: float) -> Fold:
    return replace(fold, scale=fold.scale | {"rho": [rho] * len(BIOMARKERS)})


@cache
def train_teacher(fold: int, n_labelled: int, seed: int) -> tuple[Network, Fold]:
    """The teacher of a fold, trained on the MR of the labelled knees."""
    known, rows = divided(TEACHER, fold, n_labelled, 0.0, seed)
    network, _ = train(known, rows, {}, None, seed, SETTINGS)
    return network.requires_grad_(False), rows


@cache
def train_alone(fold: int, n_labelled: int, rho: float, seed: int) -> tuple[Network, Fold]:
    """The student of a fold that learns from the labelled knees alone."""
    known, rows = divided(ALONE, fold, n_labelled, rho, seed)
    return train(known, rows, {}, None, seed, SETTINGS)[0], rows


@cache
def train_taught(
    fold: int, n_labelled: int, rho: float, seed: int, term: str, gamma: float
) -> tuple[Network, Fold]:
    """The student of a fold that learns from all training knees, under the teacher.

    Pairs without reference have the teacher's estimates as targets. `term` is one of `LOSS_TERMS`,
    `gamma` its weight.
    """
    known, rows = divided(TAUGHT, fold, n_labelled, rho, seed)
    teacher, own = train_teacher(fold, n_labelled, seed)
    known, rows = with_teacher_labels(known, rows, ARMS[TAUGHT], teacher, own.scale, SETTINGS)
    rows = _with_rho(rows, rho)
    outputs = TeacherCache(teacher, known, rows, SETTINGS)
    return train(known, rows, {term: gamma}, outputs, seed, SETTINGS)[0], rows


def estimates(term: str, gamma: float, n_labelled: int, rho: float, seed: int) -> pd.DataFrame:
    """Out-of-fold estimates of the three networks: arm, patch, biomarkers and their reference.

    Trains what was not trained before with these values.
    """
    names = [*PATCH, "subject_id"]
    table = data().table[[*names, *[f"{name}_reference" for name in BIOMARKERS]]]
    parts = []
    for arm in LABELS_HERE:
        values = np.zeros_like(data().targets)
        for fold in range(N_FOLDS):
            if arm == TEACHER:
                network, rows = train_teacher(fold, n_labelled, seed)
            elif arm == ALONE:
                network, rows = train_alone(fold, n_labelled, rho, seed)
            else:
                network, rows = train_taught(fold, n_labelled, rho, seed, term, gamma)
            values[rows.test] = predict_rows(network, data(), rows.test, rows.scale, SETTINGS)
        own = pd.DataFrame(values, columns=list(BIOMARKERS))
        parts.append(pd.concat([table, own], axis=1).assign(arm=arm))
    return pd.concat(parts, ignore_index=True)


def tried() -> pd.DataFrame:
    """One row per training of this session: its settings, r between knees and ICC of both students.

    Columns end in "without" and "with" teacher; the means of the four biomarkers.
    """
    rows = []
    for settings, found in TRIED.items():
        row = dict(zip(("loss", "gamma", "labelled knees", "rho", "seed"), settings, strict=True))
        for measure in ("r_between", "icc"):
            for arm, teacher in ((ALONE, "without"), (TAUGHT, "with")):
                row[f"{MEASURES[measure]}, {teacher}"] = round(found.loc[arm, measure], 2)
        rows.append(row)
    return pd.DataFrame(rows)


def measures(table: pd.DataFrame) -> pd.DataFrame:
    """`MEASURES` by arm with 95 % intervals over subjects, mean of the four biomarkers."""
    rng = np.random.default_rng(0)
    found = agreement_table(table, rng, n_resamples=N_RESAMPLES)
    return found[found["biomarker"] == "mean"].set_index("arm").loc[list(table["arm"].unique())]


def run_estimates(arms: list[str]) -> pd.DataFrame:
    """Estimates of arms of the shipped run (80 knees), in the columns of `estimates`."""
    table, parts = read_patches(), []
    shared = [*PATCH, "subject_id", *[f"{name}_reference" for name in BIOMARKERS]]
    for arm in arms:
        own = table[[f"{name}_{arm}" for name in BIOMARKERS]].set_axis(list(BIOMARKERS), axis=1)
        parts.append(pd.concat([table[shared], own], axis=1).assign(arm=arm))
    return pd.concat(parts, ignore_index=True)


def errors(arm: str = ARM, biomarker: str = "bv_tv") -> pd.DataFrame:
    """knee_id and error (estimate - reference) of every patch of the shipped run."""
    table = read_patches()
    error = table[f"{biomarker}_{arm}"] - table[f"{biomarker}_reference"]
    return pd.DataFrame({"knee_id": table["knee_id"], "error": error})


def share_common(table: pd.DataFrame) -> float:
    """Share of the squared error that remains if every patch has the mean error of its knee."""
    mean = table.groupby("knee_id")["error"].transform("mean")
    return float(np.sum(mean**2) / np.sum(table["error"] ** 2))


def draw_pairs(knee: int = 0) -> Figure:
    """CT and MR of the four patches of one knee."""
    patches = read_patch_images()
    name = patches.table["knee_id"].unique()[knee]
    rows = np.flatnonzero(patches.table["knee_id"] == name)
    figure, axes = plt.subplots(2, len(rows), figsize=(12, 6.2), layout="constrained")
    ct_mm, mr_mm = CT_SPACING_MM[1:], MR_SPACING_MM[1:]
    edges = figures.ORIENTATION["sagittal"]
    for (upper, lower), row in zip(axes.T, rows, strict=True):
        place = patches.table.loc[row, "compartment"].replace("_", ", ")
        hu = {"limits": (-100, 700), "orientation": edges}
        figures.image(upper, patches.ct[row][6], ct_mm, f"CT, {place}", **hu)
        figures.image(lower, patches.mr[row][6], mr_mm, f"MR, {place}", orientation=edges)
        for ax in (upper, lower):
            figures.contour(ax, patches.voi[row][6], mr_mm, figures.PALETTE[4])
    figure.suptitle(f"simulated knee {name}; CT from -100 to 700 HU; orange: region measured")
    return figure


def draw_errors(arm: str = ARM, biomarker: str = "bv_tv") -> Figure:
    """Errors of all patches by knee, knees in the order of their mean error."""
    table = errors(arm, biomarker)
    by_knee = table.groupby("knee_id")["error"].mean().sort_values()
    place = by_knee.index.get_indexer(table["knee_id"])
    figure, ax = plt.subplots(figsize=(11, 4), layout="constrained")
    ax.scatter(place, table["error"], s=8, color=figures.PALETTE[5], label="patch")
    ax.plot(by_knee.to_numpy(), ".", color=figures.PALETTE[0], label="mean of the knee")
    ax.axhline(0, color="black", linewidth=0.8)
    ax.set(xlabel="knee, by its mean error", ylabel=f"error of {LABELS[biomarker]}")
    ax.set_title(f"{ARMS[arm].label}: {len(table)} patches of {len(by_knee)} simulated knees")
    ax.legend(frameon=False)
    return figure


def knee_loss(error: ndarray, knees: ndarray, rho: float) -> float:
    """The study's `knee_level_mse` of errors (n,) of one biomarker."""
    _, codes = np.unique(knees, return_inverse=True)
    values = torch.tensor(np.asarray(error, dtype=float))[:, None]
    return float(knee_level_mse(values, torch.from_numpy(codes), torch.tensor([rho])))


def draw_likelihood(rho: float, n_patches: int) -> Figure:
    """Loss of a common and of an own error of SD 1 against rho, and what is left of four errors."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10.5, 3.8), layout="constrained")
    rhos = np.linspace(0, 0.95, 96)
    kept = np.array([(1 - quasi_demeaning(value, n_patches)) ** 2 for value in rhos])
    left.plot(rhos, kept, color=figures.PALETTE[0], label="common to the knee")
    left.plot(
        rhos, np.ones_like(rhos), color=figures.PALETTE[1], label="own to each patch (mean 0)"
    )
    left.axvline(rho, color="black", linewidth=0.9, linestyle="--", label="chosen")
    left.set(xlabel="rho", ylabel="loss of an error of size 1", ylim=(0, 1.1))
    left.set_title(f"{int(n_patches)} patches of the knee in the batch")
    left.legend(frameon=False, loc="lower left")
    theta = quasi_demeaning(rho, len(KNEE))
    at = np.arange(len(KNEE))
    right.bar(at - 0.2, KNEE, 0.38, color=figures.PALETTE[5], label="error e")
    after = KNEE - theta * KNEE.mean()
    right.bar(at + 0.2, after, 0.38, color=figures.PALETTE[0], label="e - theta x mean of e")
    right.axhline(0, color="black", linewidth=0.8)
    right.set(xlabel="patch of one made-up knee", ylabel="error", ylim=(-0.12, 0.42))
    right.set_xticks(at, [f"{number + 1}" for number in at])
    right.set_title(f"theta = {theta:.2f}, loss {np.mean(after**2):.4f}")
    right.legend(frameon=False, ncols=2, loc="upper center")
    return figure


def draw_training(term: str, gamma: float, n_labelled: int, rho: float, seed: float) -> Figure:
    """Train with these values; BV/TV of both students, and the measures of all three networks."""
    table = estimates(term, float(gamma), int(n_labelled), float(rho), int(seed))
    figure = plt.figure(figsize=(13, 6.6), layout="constrained")
    grid = figure.add_gridspec(2, 4, height_ratios=(2, 1.1))
    for place, arm in enumerate((ALONE, TAUGHT)):
        own = table[table["arm"] == arm]
        ax = figure.add_subplot(grid[0, 2 * place : 2 * place + 2])
        colour = figures.COLOURS[arm]
        figures.scatter(ax, own["bv_tv_reference"], own["bv_tv"], LABELS_HERE[arm], colour)
        ax.set(xlabel="reference BV/TV", ylabel="estimate of BV/TV", xlim=(0.3, 0.65))
        ax.set(ylim=(0.3, 0.65))
    found = measures(table)
    TRIED[term, float(gamma), int(n_labelled), float(rho), int(seed)] = found
    _draw_measures(figure, grid[1, :], found, LABELS_HERE)
    n_knees, n_patches = data().table["knee_id"].nunique(), len(data().table)
    figure.suptitle(
        f"{n_patches} patches of {n_knees} simulated knees; {n_labelled} of 16 training knees "
        f"labelled, {term} {gamma:g}, rho {rho:g}, seed {int(seed)}"
    )
    return figure


def _draw_measures(figure: Figure, place: object, found: pd.DataFrame, labels: dict) -> None:
    """One panel for each of `MEASURES`: a row for each arm of `found`, with its interval."""
    axes = place.subgridspec(1, len(MEASURES)).subplots(sharey=True)
    for ax, (name, title) in zip(axes, MEASURES.items(), strict=True):
        rows = found.rename(columns={name: "value", f"{name}_ci_low": "low"})
        rows = rows.rename(columns={f"{name}_ci_high": "high"})
        rows["label"] = [labels[arm] for arm in rows.index]
        rows["colour"] = [figures.COLOURS[arm] for arm in rows.index]
        figures.intervals(ax, rows[["label", "value", "low", "high", "colour"]], title)


def draw_run() -> Figure:
    """The measures of the shipped run: four arms, 80 knees."""
    arms = [ALONE, TAUGHT, "hu_regression_calibrated", ARM]
    table = run_estimates(arms)
    figure = plt.figure(figsize=(13, 2.8), layout="constrained")
    labels = {arm: ARMS[arm].label.replace(", ", ",\n") for arm in arms}
    _draw_measures(figure, figure.add_gridspec(1, 1)[0], measures(table), labels)
    n_patches, n_knees = len(table) // len(arms), table["knee_id"].nunique()
    figure.suptitle(
        f"shipped run: {n_patches} patches of {n_knees} simulated knees, 95 % intervals"
    )
    return figure


def explore_errors() -> None:
    """`draw_errors` for any arm and biomarker."""
    arms = [(ARMS[arm].label, arm) for arm in (ALONE, TAUGHT, ARM, TEACHER)]
    biomarkers = [(LABELS[name], name) for name in BIOMARKERS]
    explore(
        draw_errors,
        arm=choice("estimates", arms, ARM),
        biomarker=choice("biomarker", biomarkers, "bv_tv"),
    )


def explore_likelihood() -> None:
    """`draw_likelihood` with sliders."""
    explore(
        draw_likelihood,
        rho=slider("rho", 0, 0.95, 0.05, 0.5),
        n_patches=slider("patches in the batch", 2, 16, 1, 4),
    )


def explore_training() -> None:
    """`draw_training` with controls; the button trains."""
    explore(
        draw_training,
        button="Train",
        term=choice("distillation loss", list(TERMS.items()), "feature_l1"),
        gamma=choice("gamma", [0.0, 0.01, 0.1, 0.3, 1.0], 0.1),
        n_labelled=choice("labelled training knees", N_LABELLED, 16),
        rho=choice("rho", [0.0, 0.3, 0.6], 0.3),
        seed=slider("training seed", 0, 9, 1, 0),
    )


def _judge_knee_loss(function: object) -> str:
    """Judge knee_loss(error, knees, rho) on knees of equal and unequal size."""
    rng = np.random.default_rng(0)
    cases = {
        "rho 0": (rng.normal(0.2, 1, 12), np.repeat([0, 1, 2], 4), 0.0),
        "three knees with four patches": (rng.normal(0.5, 1, 12), np.repeat([0, 1, 2], 4), 0.5),
        "knees of unequal size": (rng.normal(0.5, 1, 9), np.repeat([4, 7, 9], [1, 2, 6]), 0.7),
    }
    for case, (error, knees, rho) in cases.items():
        found, expected = float(function(error, knees, rho)), knee_loss(error, knees, rho)
        if abs(found - expected) <= 1e-5:
            continue
        if abs(found - np.mean(error**2)) <= 1e-5:
            return f"This is the mean squared error ({case}). Subtract theta times the knee's mean."
        hint = "Is m the number of patches of this knee?" if "unequal" in case else ""
        return f"Your function gives {found:.4f}, expected {expected:.4f} ({case}). {hint}"
    return ""


def _judge_teaching(answer: object) -> str:
    given = set(answer)
    if given == {"A", "D"}:
        return ""
    if not given <= set("ABCD"):
        return "Give a set of names out of A, B, C, D."
    return f"{len(given & {'A', 'D'})} of the 2 right statements are in your set, and \
{len(given - {'A', 'D'})} wrong ones. After training the student sees the CT alone."


@cache
def change_of(measure: str) -> float:
    """What the published distillation changes in a measure, mean of the four biomarkers."""
    found = measures(run_estimates([ALONE, TAUGHT]))[measure]
    return float(found[TAUGHT] - found[ALONE])


def improved(arm: str, against: str) -> set[str]:
    """Which of `MEASURES` are better by more than `GAIN` for one arm of the run."""
    found = measures(run_estimates([against, arm]))[list(MEASURES)]
    change = found.loc[arm] - found.loc[against]
    change["relative_error"] *= -1
    return set(change.index[change > GAIN])


def _judge_improved(answer: object) -> str:
    given, right = set(answer), improved(ARM, "hu_regression_calibrated")
    if not given <= set(MEASURES):
        return f"Give a set of names out of {', '.join(MEASURES)}; set() if none."
    if given == right:
        return ""
    return f"{len(given - right)} of your measures do not improve by more than {GAIN}, and \
{len(right - given)} that do are missing. A relative error improves where it falls."


EXERCISES = {
    "T3.1": Exercise(
        number_near(
            lambda: share_common(errors()),
            0.01,
            "Replace every error by the mean error of its knee. Divide the sum of their squares by "
            "the sum of the squared errors.",
            {
                "This is the share that is not common to the knee.": lambda: (
                    1 - share_common(errors())
                ),
                "This is the square root of the share.": lambda: share_common(errors()) ** 0.5,
            },
        ),
        "This share of the squared error is the same for all patches of a knee. More patches of "
        "the same knee do not reduce it.",
    ),
    "T3.2": Exercise(
        _judge_knee_loss,
        "With rho = 0 this is the mean squared error. With a larger rho an error that all patches "
        "of a knee share costs less, and the network fits differences within knees first.",
    ),
    "T3.3": Exercise(
        _judge_teaching,
        "The teacher adds a value for every place of a patch, and targets for pairs that have no "
        "reference. It cannot put into the CT what the CT does not show, and it does not know the "
        "calibration of the CT scanner.",
    ),
    "T3.4": Exercise(
        number_near(
            lambda: change_of("r_within"),
            0.0015,
            "`t3.measures(t3.run_estimates([...]))` has a row for each arm and a column r_within. "
            "Subtract the arm without teacher from the arm with it.",
            {
                "This is the change between knees.": lambda: change_of("r_between"),
                "This is the change of the ICC.": lambda: change_of("icc"),
                "Mind the sign: with teacher minus without.": lambda: -change_of("r_within"),
            },
        ),
        "Compare it with the change between knees. A loss can act on the pattern within a knee and "
        "on the level of the knee in different ways, and a mean over all patches hides this.",
    ),
    "T3.5": Exercise(
        _judge_improved,
        "Where the ICC improves and the squared error does not, the estimates only vary more: a "
        "larger SD raises the ICC (tutorial T4). Report all four.",
    ),
}
