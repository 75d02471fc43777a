"""How much do the results of distillation vary between trainings of the same networks?

    python benchmarks/training_variation.py runs/full --other RESULTS --jobs 2

Intervals of agreement and diagnosis come from the sampling of subjects. This script gives the same
differences for other trainings on the same knees: the networks of each training seed alone, the
mean of all seeds (the run's own results), and the results files of the same study trained on
another machine (`--other`, as often as there are). A difference that changes its sign between
trainings is not shown by its interval alone. Writes docs/results/training_variation.json:
`trainings`, each with AUC of the Transformer, difference in AUC (DeLong) and difference in r
(bootstrap over subjects) for every pair of `PAIRS`.
"""

import argparse
import json
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
SAME_STUDY = ("manifest_sha256", "protocol_sha256", "parameters", "seed")
NUMBERS = ("difference", "ci_low", "ci_high", "p")


def of_results(agreed: Mapping, diagnosed: Mapping) -> dict:
    """AUC and differences of one training from its results files."""
    in_r = differences_in_r(agreed)
    found = {"auc": {}, "difference_in_auc": {}, "difference_in_r": {}}
    for pair in PAIRS:
        name = "{}_vs_{}".format(*pair)
        found["auc"] |= {arm: diagnosed["auc"][arm]["auc"] for arm in pair}
        for statistic, row in (("auc", diagnosed["delong"][name]), ("r", in_r[name])):
            found[f"difference_in_{statistic}"][name] = {key: row[key] for key in NUMBERS}
    return found


class OneSeed(RunDiagnosis):
    """Agreement and diagnosis from the networks of one training seed of a run."""

    def __init__(self, run: Run, n_jobs: int):
        super().__init__(run, n_jobs)
        self.by_seed = run.read_table("models/predictions_by_seed.csv")

    def estimates(self, seed: int) -> pd.DataFrame:
        """The run's predictions with the estimates of one training seed."""
        keys, names = ["arm", "knee_id", "patch_id"], list(BIOMARKERS)
        arms = {arm for pair in PAIRS for arm in pair}
        rows = self.by_seed[(self.by_seed["seed"] == seed) & self.by_seed["arm"].isin(arms)]
        return self.predictions.drop(columns=names).merge(rows[[*keys, *names]], on=keys)

    def results(self, seed: int) -> dict:
        """As `of_results`."""
        estimates = self.estimates(seed)
        n_resamples, rng = self.parameters["n_resamples"], np.random.default_rng(seed)
        in_r = agreement.paired_differences(estimates, PAIRS, rng, n_resamples)
        tokens = tokens_by_arm(estimates, self.labels.index)
        tokens.pop("mr_reference", None)
        scores = self.transformer_scores(tokens)
        pairs = {
            f"{arm}_vs_{other}": compare_delong(self.truth, scores[arm], scores[other])
            for arm, other in PAIRS
        }
        auc = {arm: auc_delong(self.truth, scores[arm]) for arm in scores}
        return of_results({"differences": in_r.to_dict("records")}, {"auc": auc, "delong": pairs})


def read_other(folder: Path, own: Mapping) -> tuple[dict, dict]:
    """Agreement and diagnosis of the same study trained elsewhere.

    Raises InputError where the folder lacks them or they are of another study.
    """
    found = {}
    for name in ("cohort", "agreement", "diagnosis"):
        file = folder / f"{name}.json"
        if not file.exists():
            raise InputError(file, "does not exist", "give the folder of a run's results files")
        found[name] = json.loads(file.read_text(encoding="utf-8"))
    for name in SAME_STUDY:
        if found["cohort"].get(name) != own.get(name):
            raise InputError(folder, f"has another {name}", "give results of the same study")
    return found["agreement"], found["diagnosis"]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="folder of a finished run")
    parser.add_argument("--other", type=Path, action="append", default=[], help="results files")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--jobs", type=int, default=2)
    given = parser.parse_args(arguments)
    run = Run(given.run)
    own = {name: run.results(name) for name in ("cohort", "agreement", "diagnosis")}
    others = [read_other(folder, own["cohort"]) for folder in given.other]
    one_seed, trainings = OneSeed(run, given.jobs), []
    commit = own["diagnosis"]["git_commit"]
    training_seeds = sorted(one_seed.by_seed["seed"].unique())
    for seed in training_seeds:
        trainings.append(
            {"training": f"seed {seed}", "git_commit": commit} | one_seed.results(seed)
        )
        print(trainings[-1], flush=True)
    mean = f"mean of {len(training_seeds)} seeds"
    results = of_results(own["agreement"], own["diagnosis"])
    trainings.append({"training": mean, "git_commit": commit} | results)
    for agreed, diagnosed in others:
        about = {"training": f"{mean}, another machine", "git_commit": diagnosed["git_commit"]}
        trainings.append(about | of_results(agreed, diagnosed))
    numbers = {"git_commit": git_commit(), "packages": versions(), "trainings": trainings}
    numbers |= {"n_knees": len(one_seed.labels), "profile": own["diagnosis"]["profile"]}
    print(write_json(given.out, numbers))


if __name__ == "__main__":
    main()
