"""How much do the results of distillation vary between trainings of the same networks?

    python benchmarks/training_variation.py runs/full --other RUN --jobs 2

Intervals of agreement and diagnosis come from the sampling of subjects. This script gives the same
differences for other trainings on the same knees: the networks of each training seed alone, the
mean of all seeds (the run's own estimates), and the estimates of the same study trained on another
machine (`--other`, the folder of a run, as often as there are). A difference that changes its sign
between trainings is not shown by its interval alone. Writes docs/results/training_variation.json:
`trainings`, each with AUC of the Transformer, difference in AUC (DeLong) and difference in r
(bootstrap over subjects) for every pair of `PAIRS`.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd
from diagnosis_checks import RunDiagnosis

from ctsma import agreement
from ctsma.common import BIOMARKERS, InputError
from ctsma.diagnosis import auc_delong, compare_delong, tokens_by_arm
from ctsma.files import git_commit, versions, write_json
from ctsma_lab.run import Run
from ctsma_lab.tables import differences_in_r

OUT = Path(__file__).parents[1] / "docs" / "results" / "training_variation.json"
PAIRS = [("ct_sma", "ct_only"), ("ct_sma_plus", "ct_residual")]
COMPARED = list(dict.fromkeys(arm for pair in PAIRS for arm in pair))
SAME_STUDY = ("manifest_sha256", "protocol_sha256", "parameters", "seed")
NUMBERS = ("difference", "ci_low", "ci_high", "p")


class Trainings(RunDiagnosis):
    """Agreement and diagnosis from the estimates of one training, on the knees of a run."""

    def __init__(self, run: Run, n_jobs: int):
        super().__init__(run, n_jobs)
        self.by_seed = run.read_table("models/predictions_by_seed.csv")

    def of_seed(self, seed: int) -> pd.DataFrame:
        """The run's predictions with the estimates of one training seed."""
        keys, names = ["arm", "knee_id", "patch_id"], list(BIOMARKERS)
        rows = self.by_seed[(self.by_seed["seed"] == seed) & self.by_seed["arm"].isin(COMPARED)]
        return self.predictions.drop(columns=names).merge(rows[[*keys, *names]], on=keys)

    def results(self, estimates: pd.DataFrame) -> dict[str, dict]:
        """AUC, and differences in AUC and r of every pair."""
        estimates = estimates[estimates["arm"].isin(COMPARED)]
        rng, n_resamples = np.random.default_rng(self.seed), self.parameters["n_resamples"]
        drawn = agreement.paired_differences(estimates, PAIRS, rng, n_resamples)
        in_r = differences_in_r({"differences": drawn.to_dict("records")})
        tokens = tokens_by_arm(estimates, self.labels.index)
        scores = self.transformer_scores({arm: tokens[arm] for arm in COMPARED})
        found = {"auc": {arm: auc_delong(self.truth, scores[arm])["auc"] for arm in COMPARED}}
        found |= {"difference_in_auc": {}, "difference_in_r": {}}
        for arm, other in PAIRS:
            name = f"{arm}_vs_{other}"
            in_auc = compare_delong(self.truth, scores[arm], scores[other])
            for statistic, row in (("auc", in_auc), ("r", in_r[name])):
                found[f"difference_in_{statistic}"][name] = {key: row[key] for key in NUMBERS}
        return found


def checked_other(folder: Path, own: Mapping) -> Run:
    """A run of the same study trained elsewhere. Raises InputError where it is of another one."""
    other = Run(folder)
    cohort = other.results("cohort")
    for name in SAME_STUDY:
        if cohort.get(name) != own.get(name):
            raise InputError(
                folder, f"differs from the run in {name}", "give a run of the same study"
            )
    return other


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="folder of a finished run")
    parser.add_argument("--other", type=Path, action="append", default=[], help="other runs")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--jobs", type=int, default=2)
    given = parser.parse_args(arguments)
    run = Run(given.run)
    others = [checked_other(folder, run.results("cohort")) for folder in given.other]
    trainings = Trainings(run, given.jobs)
    training_seeds = sorted(trainings.by_seed["seed"].unique())
    estimates = [(f"seed {seed}", run, trainings.of_seed(seed)) for seed in training_seeds]
    mean = f"mean of {len(training_seeds)} seeds"
    estimates.append((mean, run, trainings.predictions))
    for other in others:
        name = f"{mean}, another machine"
        estimates.append((name, other, other.read_table("models/predictions.csv")))
    found = []
    for name, source, table in estimates:
        about = {"training": name, "git_commit": source.results("distillation")["git_commit"]}
        found.append(about | trainings.results(table))
        print(found[-1], flush=True)
    numbers = {"git_commit": git_commit(), "packages": versions(), "trainings": found}
    numbers |= {"n_knees": len(trainings.labels), "profile": run.results("diagnosis")["profile"]}
    print(write_json(given.out, numbers))


if __name__ == "__main__":
    main()
