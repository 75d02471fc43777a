"""Checks of the diagnosis beyond the main line: what does the Transformer's score rest on?

    python benchmarks/diagnosis_checks.py runs/full --jobs 2

Reads the tables of a finished run (01 to 05) and writes docs/results/diagnosis_checks.json:

- `subgroups`: AUC by sex, age and grade; `compartments`: AUC from one compartment alone;
- `power`: the smallest difference in AUC that a paired test finds, by number of knees;
- `shuffled_patches`: AUC where measurements are exchanged between the patches of all knees;
- `inputs`: AUC without the position, without each biomarker, and from the position alone;
- `attention`: what deleting the most attended patches changes, against deleting random patches;
- `patient`: contribution of each patch of one knee.

All use the main arm, the seeds and the settings of the run's 05_roc_diagnosis.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pingouin
import torch
from numpy.random import Generator
from scipy import optimize, stats

from ctsma.common import BIOMARKERS, COMPARTMENTS, InputError
from ctsma.diagnosis import (
    auc_delong,
    compare_delong,
    compartment_means,
    cross_validate_tabular,
    tokens_by_arm,
)
from ctsma.diagnosis.inputs import POSITION
from ctsma.diagnosis.statistics import checked_labels, hanley_mcneil_se
from ctsma.diagnosis.transformer import (
    TransformerSettings,
    cross_validate_arms,
    fit_without_fold,
    pad_tokens,
)
from ctsma.distillation import MAIN_ARM
from ctsma.files import git_commit, versions, write_json
from ctsma_lab.run import Run

OUT = Path(__file__).parents[1] / "docs" / "results" / "diagnosis_checks.json"
DELETED = ("score_without_attended", "score_without_random")


def mean_interval(values: Sequence[float]) -> dict[str, float]:
    """mean, ci_low, ci_high of independent values: Student's t, infinite for a single value."""
    values = np.asarray(values, dtype=float)
    if not len(values) or not np.isfinite(values).all():
        raise InputError("values", "are empty or hold NaN", "give one number per unit")
    half = np.inf
    if len(values) > 1:
        half = stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)
    mean = values.mean()
    return {"mean": float(mean), "ci_low": float(mean - half), "ci_high": float(mean + half)}


def subgroup_auc(labels: Sequence, scores: Sequence, groups: Mapping[str, Sequence]) -> list[dict]:
    """AUC within groups of knees, given as masks (n,) by name, with DeLong's interval.

    Rows with group, n_oa, n_other, auc, ci_low, ci_high; NaN below two knees of a class.
    """
    labels, scores = checked_labels(labels, scores)
    rows = []
    for group, mask in groups.items():
        mask = np.asarray(mask, dtype=bool)
        n_oa, n_other = int(labels[mask].sum()), int((~labels[mask]).sum())
        found = dict.fromkeys(("auc", "ci_low", "ci_high"), np.nan)
        if min(n_oa, n_other) >= 2:
            delong = auc_delong(labels[mask], scores[mask])
            found = {name: delong[name] for name in found}
        rows.append({"group": group, "n_oa": n_oa, "n_other": n_other} | found)
    return rows


def detectable_auc_difference(
    n_cases: float, n_controls: float, auc: float, correlation=0.5, power=0.80, alpha=0.05
) -> float:
    """Smallest loss of AUC from `auc` that a paired comparison of this size finds.

    Normal approximation with the standard errors of Hanley & McNeil 1982, correlated as in Hanley &
    McNeil 1983. Correlation 0.5, power 80 % and two-sided alpha 5 % are design choices. NaN where
    even a fall to 0.5 would not be found.
    """
    z = stats.norm.ppf(1 - alpha / 2) + stats.norm.ppf(power)

    def excess(loss: float) -> float:
        a = hanley_mcneil_se(auc, n_cases, n_controls)
        b = hanley_mcneil_se(auc - loss, n_cases, n_controls)
        return loss - z * np.sqrt(a**2 + b**2 - 2 * correlation * a * b)

    found = auc > 0.5 and excess(auc - 0.5) > 0
    return float(optimize.brentq(excess, 0, auc - 0.5)) if found else float("nan")


def shuffle_patches(tokens: pd.DataFrame, rng: Generator) -> pd.DataFrame:
    """Biomarkers exchanged between the patches of all knees within a compartment."""
    shuffled, names = tokens.copy(), list(BIOMARKERS)
    columns = tokens.columns.get_indexer(names)
    for rows in tokens.groupby("compartment", observed=True).indices.values():
        shuffled.iloc[rows, columns] = tokens[names].iloc[rng.permutation(rows)]
    return shuffled


def explain_diagnosis(
    tokens: pd.DataFrame,
    labels: pd.Series,
    splits: pd.DataFrame,
    settings: TransformerSettings,
    seed: int = 0,
    share: float = 0.25,
) -> pd.DataFrame:
    """What the out-of-fold score of each knee rests on, patch by patch.

    Returns the rows of tokens with attention (sums to 1 per knee), contribution (logit with all
    patches minus logit without this one), score, and score_without_attended and
    score_without_random: the knee's score after deleting `share` of its patches, those of highest
    attention or random ones. Attention explains the score only if the first deletion changes more.
    """
    data = pad_tokens(tokens, labels, splits, settings)
    rng, frames = np.random.default_rng(seed), []
    for fold in data.knees["fold"].unique():
        model, values = fit_without_fold(data, fold, settings, seed)
        for knee in np.flatnonzero(data.knees["fold"] == fold):
            rows = data.rows[knee, ~data.absent[knee]]
            found = _explain_knee(model, values[knee, : len(rows)], share, rng)
            frames.append(tokens.iloc[rows].assign(**found))
    return pd.concat(frames).sort_index()


@torch.no_grad()
def _explain_knee(model, tokens: torch.Tensor, share: float, rng: Generator) -> dict:
    n = len(tokens)
    logit, attention = model(tokens[None], torch.zeros(1, n, dtype=torch.bool))
    score = logit[0].sigmoid().item()
    if n == 1:  # the single patch is the whole answer
        return {"attention": 1.0, "contribution": logit.item(), "score": score} | dict.fromkeys(
            DELETED, score
        )
    count = min(int(np.ceil(share * n)), n - 1)
    removed = torch.eye(n + 2, n, dtype=torch.bool)  # row k removes patch k
    removed[n, attention[0].argsort(descending=True)[:count]] = True
    removed[n + 1, rng.permutation(n)[:count]] = True
    without, _ = model(tokens.expand(n + 2, -1, -1), removed)
    return {
        "attention": attention[0].numpy(),
        "contribution": (logit - without[:n]).numpy(),
        "score": score,
        "score_without_attended": without[n].sigmoid().item(),
        "score_without_random": without[n + 1].sigmoid().item(),
    }


class RunDiagnosis:
    """Tokens, labels, folds and settings of the diagnosis of a run."""

    def __init__(self, run: Run, n_jobs: int):
        self.knees, self.splits, self.n_jobs = run.manifest(), run.splits(), n_jobs
        diagnosis = run.results("diagnosis")
        self.parameters = parameters = diagnosis.get("parameters", {})
        self.seed = diagnosis["seed"]
        self.seeds = [self.seed + k for k in range(parameters["n_seeds"])]
        self.settings = TransformerSettings(epochs=parameters["diagnosis_epochs"])
        self.predictions = run.read_table("models/predictions.csv")
        labelled = self.knees.dropna(subset=["oa"]).set_index("knee_id")["oa"].astype(int)
        self.every_tokens = tokens_by_arm(self.predictions, labelled.index)
        judged = labelled.index.isin(self.every_tokens[MAIN_ARM]["knee_id"])
        self.labels = labelled[judged].sort_index()
        self.truth = self.labels.to_numpy()

    def transformer_scores(self, tokens: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
        """Mean score over seeds, knees by arms."""
        scores = cross_validate_arms(
            tokens, self.labels, self.splits, self.settings, self.seeds, self.n_jobs
        )
        scores = scores.groupby(["arm", "knee_id"])["score"].mean().unstack("arm")
        return scores.loc[self.labels.index, list(tokens)]


class Checks(RunDiagnosis):
    """The checks, and the scores that several of them share."""

    def __init__(self, run: Run, n_jobs: int):
        super().__init__(run, n_jobs)
        self.n_draws = self.parameters.get("n_permutations", 20)
        arms = "ct_only", MAIN_ARM, "mr_reference"
        self.tokens = {arm: self.every_tokens[arm] for arm in arms}
        self.rows = self.knees.set_index("knee_id").loc[self.labels.index]
        self.scores = self.transformer_scores(self.tokens)

    def subgroups(self) -> list[dict]:
        """By sex, by age, and mild and advanced OA each against all knees without OA."""
        rows, no_oa = self.rows, self.truth == 0
        age = rows["age"].median()
        groups = {
            "women": rows["sex"] == "F",
            "men": rows["sex"] == "M",
            f"age above {age:.0f}": rows["age"] > age,
            f"age up to {age:.0f}": rows["age"] <= age,
            "KL up to 2, or no OA": (rows["kl_grade"] <= 2) | no_oa,
            "KL 3-4, or no OA": (rows["kl_grade"] > 2) | no_oa,
        }
        found = []
        for arm in self.tokens:
            for row in subgroup_auc(self.truth, self.scores[arm], groups):
                found.append({"arm": arm} | row)
        return found

    def compartments(self) -> list[dict]:
        """Logistic regression on the four biomarkers of one compartment."""
        found = []
        for arm, tokens in self.tokens.items():
            means = compartment_means(tokens)
            for compartment in COMPARTMENTS:
                x = means.filter(regex=f"_{compartment}$|^subject_id$")
                scored = cross_validate_tabular(x, self.labels, self.splits, "logistic", self.seed)
                auc = auc_delong(self.truth, scored["score"])
                row = {name: auc[name] for name in ("auc", "ci_low", "ci_high")}
                found.append({"arm": arm, "compartment": compartment} | row)
        return found

    def power(self) -> list[dict]:
        """Two markers: correlation 0.5. Same patches: that of ct_only and the main arm here."""
        first, second = (auc_delong(self.truth, self.scores[a]) for a in ("ct_only", MAIN_ARM))
        paired = compare_delong(self.truth, self.scores["ct_only"], self.scores[MAIN_ARM])
        covariance = (first["se"] ** 2 + second["se"] ** 2 - paired["se"] ** 2) / 2
        correlation = covariance / max(first["se"] * second["se"], 1e-12)
        correlations = {"two_markers": 0.5, "same_patches": float(np.clip(correlation, 0, 0.99))}
        found = []
        for n in (len(self.truth), 200, 400, 800, 1600):
            row = {"knees": n}
            for name, value in correlations.items():
                n_oa = n * self.truth.mean()
                row[name] = detectable_auc_difference(n_oa, n - n_oa, second["auc"], value)
            found.append(row)
        return found

    def shuffled_patches(self, rng: Generator) -> dict:
        """AUC of the main arm after shuffling, without position, one seed per draw."""
        bare = self.tokens[MAIN_ARM].drop(columns=list(POSITION))
        shuffled = {draw: shuffle_patches(bare, rng) for draw in range(self.n_draws)}
        scores = cross_validate_arms(
            shuffled, self.labels, self.splits, self.settings, [self.seed], self.n_jobs
        )
        aucs = []
        for _, rows in scores.groupby("arm"):
            aucs.append(auc_delong(self.labels.loc[rows["knee_id"]], rows["score"])["auc"])
        low, high = np.percentile(aucs, [2.5, 97.5])
        interval = mean_interval(aucs)
        ends = {"mean_low": interval["ci_low"], "mean_high": interval["ci_high"]}
        return {"auc": interval["mean"], "ci_low": low, "ci_high": high, "n": len(aucs)} | ends

    def inputs(self) -> list[dict]:
        """AUC without an input, and its paired difference from the whole input."""
        tokens = self.tokens[MAIN_ARM]
        reduced = {"without position": tokens.drop(columns=list(POSITION))}
        reduced |= {f"without {name}": tokens.drop(columns=name) for name in BIOMARKERS}
        reduced["position alone"] = tokens.drop(columns=list(BIOMARKERS))
        scores, found = self.transformer_scores(reduced), []
        for name in reduced:
            auc = auc_delong(self.truth, scores[name])
            change = compare_delong(self.truth, scores[name], self.scores[MAIN_ARM])
            row = {"input": name} | {key: auc[key] for key in ("auc", "ci_low", "ci_high")}
            row |= {"difference": change["difference"], "p": change["p"]}
            row |= {f"difference_{end}": change[f"ci_{end}"] for end in ("low", "high")}
            found.append(row)
        _, adjusted = pingouin.multicomp([row["p"] for row in found], method="holm")
        return [row | {"p_holm": p} for row, p in zip(found, adjusted, strict=True)]

    def explained(self) -> pd.DataFrame:
        """`explain_diagnosis` of the main arm, all seeds."""
        frames = []
        for seed in self.seeds:
            found = explain_diagnosis(
                self.tokens[MAIN_ARM], self.labels, self.splits, self.settings, seed
            )
            frames.append(found.assign(seed=seed))
        return pd.concat(frames, ignore_index=True)

    def attention(self, explained: pd.DataFrame) -> dict[str, dict]:
        """Change of the score by deletion: moved (absolute) and lost (of the true class).

        Means over seeds, then over knees; the interval is of the difference attended - random.
        """
        scores = explained.groupby(["knee_id", "seed"])[["score", *DELETED]].first()
        change = scores[list(DELETED)].sub(scores["score"], axis=0)
        sign = 2 * self.labels.loc[scores.index.get_level_values("knee_id")].to_numpy() - 1
        found = {}
        for name, size in (("moved", change.abs()), ("lost", change.mul(-sign, axis=0))):
            excess = (size[DELETED[0]] - size[DELETED[1]]).groupby("knee_id").mean()
            means = size.mean().rename({DELETED[0]: "attended", DELETED[1]: "random"})
            found[name] = mean_interval(excess) | means.to_dict()
        return found

    def patient(self, explained: pd.DataFrame) -> dict:
        """The knee with OA whose score is the median of all knees with OA, patch by patch."""
        of_oa = self.scores.loc[self.truth == 1, MAIN_ARM].sort_values()
        knee_id = of_oa.index[len(of_oa) // 2]
        rows = explained[explained["knee_id"] == knee_id].groupby("patch_id")
        patches = rows["contribution"].agg(value="mean", low="min", high="max")
        patches = patches.join(rows[["compartment", *BIOMARKERS]].first()).reset_index()
        score = float(of_oa[knee_id])
        return {"knee_id": knee_id, "score": score, "patches": patches.to_dict("records")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("run", type=Path, help="folder of a finished run")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--jobs", type=int, default=2)
    arguments = parser.parse_args()
    run = Run(arguments.run)
    checks = Checks(run, arguments.jobs)
    explained = checks.explained()
    diagnosis = run.results("diagnosis")
    numbers = {
        "profile": diagnosis["profile"],
        "manifest_sha256": diagnosis["manifest_sha256"],
        "git_commit": git_commit(),
        "packages": versions(),
        "arm": MAIN_ARM,
        "n_knees": len(checks.labels),
        "auc": {arm: auc_delong(checks.truth, checks.scores[arm]) for arm in checks.tokens},
        "subgroups": checks.subgroups(),
        "compartments": checks.compartments(),
        "power": checks.power(),
        "shuffled_patches": checks.shuffled_patches(np.random.default_rng(checks.seed)),
        "inputs": checks.inputs(),
        "attention": checks.attention(explained),
        "patient": checks.patient(explained),
    }
    print(write_json(arguments.out, numbers))


if __name__ == "__main__":
    main()
