"""What a study of 720 knees by CT alone says: agreement, and diagnosis with power.

    python benchmarks/large_cohort.py runs/full --folder /tmp/knees --jobs 2
    python benchmarks/large_cohort.py runs/full --folder /tmp/knees --dask tcp://host:8786

The protocol, with the questions, is docs/large_cohort_protocol.md. Networks and ridge come from the
80 pairs of a finished run. Other simulated knees are scanned at their patches, and every arm
estimates their biomarkers. Finished knees and scores are reused. Writes
docs/results/large_cohort.json and, knee by knee, docs/results/large_cohort.csv.
"""

import argparse
import hashlib
import importlib
import time
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

import numpy as np
import pandas as pd
import pingouin
from calibration import without_effects
from diagnosis_checks import mean_interval, subgroup_auc
from distillation import FIRST, SCANS, SEED, drawn_ct, scanned, show
from numpy import ndarray
from torch import nn

from ctsma import agreement, diagnosis, patches
from ctsma.arms import ARMS, COMPARISONS, TRAINED
from ctsma.cache import content_hash, map_knees, read_record, source_sha256, time_left, write_record
from ctsma.cohort import make_splits
from ctsma.common import BIOMARKERS, InputError
from ctsma.diagnosis.transformer import TransformerSettings, cross_validate_arms
from ctsma.distillation import load_model, predict, prepare
from ctsma.distillation.data import ridge_of
from ctsma.files import git_commit, sha256_file, versions, write_json, write_text
from ctsma.ridge import apply_ridge
from ctsma_lab import diagnosis_views
from ctsma_lab.agreement_views import nested
from ctsma_lab.cluster import on_cluster
from ctsma_lab.run import Run
from kneesim import draw_subjects, load_protocol, protocol_sha256

N_KNEES, N_NULL = 720, 240  # of the cohort, and of the one without effects of disease
N_FOLDS, N_SEEDS, N_PERMUTATIONS, N_RESAMPLES = 5, 10, 20, 2000
MAIN, REFERENCE, MEAN_HU, PERSON = "ct_sma_plus", "mr_reference", "mean HU", "age, sex, BMI"
QUESTIONS = [
    ("ct_sma", "ct_only"),
    ("ct_sma_plus", "ct_residual"),
    ("ct_sma_plus", "hu_regression_calibrated"),
    ("mr_reference", "ct_sma_plus"),
]
MODELS = "Transformer", "logistic", "svm"
CLOSE = 0.05  # the whole interval of a difference in AUC within it: as good as the MR reference
THRESHOLDS = np.linspace(0.05, 0.95, 91)
N_GROUPS = 10  # of the calibration curve
SHOWN = "ct_only", "hu_regression_calibrated", MAIN, REFERENCE  # in curves and subgroups
MODULES = "calibration", "distillation", "diagnosis_checks", "large_cohort"  # for the workers
PLACE = ["knee_id", "subject_id", "patch_id", "compartment", *diagnosis.inputs.POSITION, "mean_hu"]
OUT = Path(__file__).parents[1] / "docs" / "results" / "large_cohort.json"


def estimated(
    knee: dict, folder: Path, *, scans: str, models: str, arms: list, ridges: dict, weights: str
) -> dict:
    """Biomarkers of the usable patches of one scanned knee by every arm (for `map_knees`).

    Writes `<knee>_estimates.csv` into `folder`, one row per arm and patch. `ridges` is of
    `fold_ridges`; `weights` is a hash of all networks. Raises InputError without usable patch.
    """
    knee_id = knee["knee_id"]
    table = patches.read_table(Path(scans) / f"{knee_id}_table.csv")
    table = table[table["flag"] == ""].reset_index(drop=True)
    if table.empty:
        raise InputError(knee_id, "has no usable patch", "leave it out")
    with np.load(Path(scans) / f"{knee_id}.npz") as stored:
        mr, ct, voi = (stored[name][table["patch_id"]] for name in ("mr", "ct", "voi"))
    data = prepare(patches.Patches(table, mr=mr, ct=ct, voi=voi))
    rows, parts = np.arange(len(table)), []
    for arm in arms:
        if arm in ridges:
            features = data.ridge_input(ARMS[arm].input)
            values = []
            for weights_of_fold, low, high in ridges[arm]:
                values.append(apply_ridge(np.array(weights_of_fold), features, low, high))
        else:
            values = [predict(*member, data, rows) for member in networks(models, arm)]
        own = table[PLACE].assign(arm=arm)
        own[list(BIOMARKERS)] = np.mean(values, axis=0)
        own[[f"{name}_reference" for name in BIOMARKERS]] = data.targets
        parts.append(own)
    text = pd.concat(parts).to_csv(index=False)
    write_text(Path(folder) / f"{knee_id}_estimates.csv", text)
    return {"n_patches": len(table)}


@lru_cache
def networks(models: str, arm: str) -> list[tuple[nn.Module, dict]]:
    """All networks of an arm, every fold and training seed, with their records; read once."""
    stems = sorted(file.with_suffix("") for file in Path(models).glob(f"{arm}_fold*_seed*.json"))
    return [load_model(stem) for stem in stems]


def fold_ridges(run: Run, arms: list[str]) -> dict[str, list]:
    """By ridge arm: weights, low and high of the ridge of each fold, fitted as in notebook 03."""
    data, found = prepare(patches.load_patches(run.path / "patches")), {}
    folds = run.splits().set_index("subject_id")["fold"].loc[data.subjects].to_numpy()
    labelled = np.isfinite(data.targets).all(axis=1)
    for arm in arms:
        if ARMS[arm].kind == "ridge":
            found[arm] = []
            for fold in np.unique(folds):
                rows = np.flatnonzero(labelled & (folds != fold))
                fit = ridge_of(data, rows, ARMS[arm].input)
                ends = data.targets[rows].min(axis=0), data.targets[rows].max(axis=0)
                found[arm].append([values.tolist() for values in (fit.weights, *ends)])
    return found


def estimates(
    run: Run, subjects: pd.DataFrame, folder: Path, scans: dict, n_jobs: int
) -> tuple[pd.DataFrame, dict]:
    """Estimates of all arms for the patches of these knees, and the knees left out with reasons."""
    records = map_knees(scanned, subjects, folder, scans, n_jobs=n_jobs, report=show)
    left_out = records[records["error"] != ""]
    done = subjects[~subjects["knee_id"].isin(left_out["knee_id"])]
    models = run.path / "models"
    arms = [arm for arm in TRAINED if arm in set(run.read_table("models/predictions.csv")["arm"])]
    weights = {file.name: sha256_file(file) for file in sorted(models.glob("*.safetensors"))}
    parameters = {
        "scans": str(folder.resolve()),
        "models": str(models),
        "arms": arms,
        "ridges": fold_ridges(run, arms),
        "weights": content_hash(weights),
    }
    own = folder / "estimates"
    read = map_knees(estimated, done, own, parameters, after=[folder], n_jobs=n_jobs, report=show)
    good, text = read.loc[read["error"] == "", "knee_id"], {"knee_id": "str", "subject_id": "str"}
    reasons = pd.concat([left_out, read[read["error"] != ""]])
    if good.empty:
        problem = f"hold no knee that can be read ({reasons['error'].iloc[0]})"
        raise InputError(folder, problem, "correct this and give the command again")
    parts = [pd.read_csv(own / f"{knee}_estimates.csv", dtype=text) for knee in good]
    return pd.concat(parts, ignore_index=True), dict(reasons[["knee_id", "error"]].to_numpy())


class Scorer:
    """Out-of-fold scores of the Transformer; finished ones are read from `folder`."""

    def __init__(self, folder: Path, subjects: pd.DataFrame, n_jobs: int, total: int):
        self.folder, self.n_jobs, self.total, self.done, self.fitted = folder, n_jobs, total, 0, 0
        self.splits = make_splits(subjects, N_FOLDS, SEED)
        self.labels = subjects.set_index("knee_id")["oa"].astype(int).sort_index()
        self.settings, self.started = TransformerSettings(), time.perf_counter()
        folder.mkdir(parents=True, exist_ok=True)

    def scores(
        self, name: str, tokens: pd.DataFrame, labels: pd.Series, seeds: list[int]
    ) -> pd.DataFrame:
        """DataFrame(arm, seed, knee_id, subject_id, fold, score) for one arm."""
        read = hashlib.sha256(pd.util.hash_pandas_object(tokens, index=False).to_numpy().tobytes())
        given = labels.to_dict(), self.splits.to_numpy().tolist(), vars(self.settings), seeds
        key = content_hash(read.hexdigest(), *given, source_sha256("ctsma.diagnosis"))
        record = self.folder / f"{name.replace(' ', '_')}.json"
        table = record.with_suffix(".csv")
        if read_record(record, key) is None:
            found = cross_validate_arms(
                {name: tokens}, labels, self.splits, self.settings, seeds, self.n_jobs
            )
            write_text(table, found.to_csv(index=False))
            write_record(record, key, {}, [table.name])
            self.fitted += 1
        self.done += 1
        left = time_left(self.started, max(self.fitted, 1), self.total - self.done)
        print(f"Transformer {self.done}/{self.total} {name}: done{left}", flush=True)
        return pd.read_csv(table, dtype={"knee_id": "str", "subject_id": "str"})


def agreement_of(estimated_patches: pd.DataFrame) -> dict:
    """All statistics of each arm with the MR reference, and paired differences of the mean."""
    rng, names = np.random.default_rng(SEED), list(agreement.STATISTICS)
    table = agreement.agreement_table(estimated_patches, rng, n_resamples=N_RESAMPLES)
    columns = [name + end for name in names for end in ("", "_ci_low", "_ci_high")]
    pairs = list(dict.fromkeys([*QUESTIONS, *COMPARISONS]))
    found = agreement.paired_differences(estimated_patches, pairs, rng, N_RESAMPLES)
    differences = found[found["biomarker"] == "mean"].drop(columns="biomarker")
    arms = nested(table, columns)
    return {"arms": arms, "differences": differences.to_dict("records")}


def all_scores(
    scorer: Scorer, tokens: Mapping, mean_hu: pd.DataFrame, subjects: pd.DataFrame
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Scores (knees, models) as in notebook 05, and those of each Transformer by arm and seed."""
    seeds, labels = list(range(N_SEEDS)), scorer.labels
    scored = [scorer.scores(arm, rows, labels, seeds) for arm, rows in tokens.items()]
    by_seed = pd.concat(scored)
    scores = by_seed.groupby(["arm", "knee_id"])["score"].mean().unstack("arm")
    scores = scores.loc[labels.index, list(tokens)]
    features = {arm: diagnosis.compartment_means(rows) for arm, rows in tokens.items()}
    features[MEAN_HU] = diagnosis.compartment_means(mean_hu, ["mean_hu"])
    people = subjects.set_index("knee_id").loc[labels.index]
    female = (people["sex"] == "F").astype(float)
    features[PERSON] = people[["age", "bmi", "subject_id"]].assign(female=female)
    for arm, x in features.items():
        for model in MODELS[1:]:
            found = diagnosis.cross_validate_tabular(x, labels, scorer.splits, model)
            scores[f"{arm}, {model}"] = found.set_index("knee_id")["score"]
    return scores, by_seed


def auc_of(truth: ndarray, scores: pd.DataFrame, subjects: ndarray) -> dict:
    """AUC of every column with DeLong's interval and the bootstrap's."""
    rng, found = np.random.default_rng(SEED), {}
    for name in scores:
        drawn = diagnosis.bootstrap_auc(truth, scores[name].to_numpy(), subjects, rng, N_RESAMPLES)
        ends = {"bootstrap_low": drawn["ci_low"], "bootstrap_high": drawn["ci_high"]}
        found[name] = diagnosis.auc_delong(truth, scores[name]) | ends
    return found


def answers(truth: ndarray, scores: pd.DataFrame) -> list[dict]:
    """DeLong's paired test of each question and model; Holm's correction within a model."""
    rows = []
    for model in MODELS:
        end, tests = "" if model == MODELS[0] else f", {model}", []
        for a, b in QUESTIONS:
            if a + end in scores and b + end in scores:
                test = diagnosis.compare_delong(truth, scores[a + end], scores[b + end])
                close = max(-test["ci_low"], test["ci_high"]) < CLOSE
                tests.append({"model": model, "a": a, "b": b} | test | {"within_0.05": close})
        adjusted = pingouin.multicomp([test["p"] for test in tests], method="holm")[1]
        rows += [test | {"p_holm": p} for test, p in zip(tests, adjusted, strict=True)]
    return rows


def thirds(values: pd.Series, name: str, unit: str) -> dict[str, ndarray]:
    """Knees in the lower, middle and upper third of a property of their CT, as masks by name."""
    low, high = values.quantile([1 / 3, 2 / 3])
    return {
        f"{name} up to {low:.2f} {unit}": (values <= low).to_numpy(),
        f"{name} {low:.2f} to {high:.2f} {unit}": values.between(low, high, "neither").to_numpy(),
        f"{name} from {high:.2f} {unit}": (values >= high).to_numpy(),
    }


def subgroups(truth: ndarray, scores: pd.DataFrame, scanner: pd.DataFrame) -> list[dict]:
    """AUC by kernel and noise of the CT."""
    groups = thirds(scanner["kernel"], "kernel FWHM", "mm")
    groups |= thirds(scanner["noise"], "noise", "HU")
    rows = []
    for arm in SHOWN:
        if arm in scores:
            rows += [{"arm": arm} | row for row in subgroup_auc(truth, scores[arm], groups)]
    return rows


def permuted(scorer: Scorer, tokens: pd.DataFrame, owners: pd.Series) -> dict:
    """Control: AUC of Transformers of one seed that are trained on permuted labels."""
    rng, aucs = np.random.default_rng(SEED), []
    for draw in range(N_PERMUTATIONS):
        labels = diagnosis_views.permute_labels(scorer.labels, owners, scorer.splits, rng)
        found = scorer.scores(f"permuted {draw}", tokens, labels, [draw])
        aucs.append(diagnosis.auc_delong(labels.loc[found["knee_id"]], found["score"])["auc"])
    low, high = np.percentile(aucs, [2.5, 97.5])
    interval = mean_interval(aucs)
    ends = {"mean_low": interval["ci_low"], "mean_high": interval["ci_high"]}
    return {"auc": interval["mean"], "ci_low": low, "ci_high": high, "n": len(aucs)} | ends


def without_disease(
    run: Run, subjects: pd.DataFrame, folder: Path, given: argparse.Namespace
) -> dict:
    """Control: AUC in knees whose severity, age, sex and BMI have no effect on the images."""
    folder.mkdir(parents=True, exist_ok=True)
    scans = SCANS | {"protocol": str(without_effects(folder / "null.yaml"))}
    found, left_out = estimates(run, subjects, folder, scans, given.jobs)
    judged = subjects[subjects["knee_id"].isin(found["knee_id"])]
    arms = [arm for arm in SHOWN if arm == REFERENCE or arm in set(found["arm"])]
    scorer = Scorer(folder / "scores", judged, given.jobs, len(arms))
    tokens = diagnosis.tokens_by_arm(found, scorer.labels.index)
    some = {arm: tokens[arm] for arm in arms}
    scores, _ = all_scores(scorer, some, one_arm(found), judged)
    truth = scorer.labels.to_numpy()
    owners = judged.set_index("knee_id").loc[scorer.labels.index, "subject_id"].to_numpy()
    # Age, sex and BMI predict OA in these knees too: no effect on the images is what is tested.
    shown = scores[[name for name in scores if not name.startswith(PERSON)]]
    return {"n_knees": len(judged), "left_out": left_out, "auc": auc_of(truth, shown, owners)}


def one_arm(estimated_patches: pd.DataFrame) -> pd.DataFrame:
    """One row per patch."""
    first = estimated_patches["arm"] == estimated_patches["arm"].iloc[0]
    return estimated_patches[first].reset_index(drop=True)


def checked_run(path: Path) -> Run:
    """The finished run. Raises InputError where its knees are not others of the same protocol."""
    run = Run(path)
    cohort, trained = run.results("cohort"), run.results("distillation")
    if cohort["protocol_sha256"] != protocol_sha256():
        raise InputError(path, "is of another simulation protocol", "run the study again")
    if trained["seed"] == SEED:
        raise InputError(path, f"has seed {SEED}, as the knees here", "give a run of another seed")
    return run


def measure(given: argparse.Namespace) -> tuple[dict, pd.DataFrame]:
    """The results, and the scores of every knee."""
    run = checked_run(given.run)
    subjects = draw_subjects(load_protocol(), FIRST + given.knees, SEED).iloc[FIRST:]
    found, left_out = estimates(run, subjects, given.folder, SCANS, given.jobs)
    judged = subjects[subjects["knee_id"].isin(found["knee_id"])]
    tokens = diagnosis.tokens_by_arm(found, judged["knee_id"])
    n_runs = len(tokens) + N_PERMUTATIONS
    scorer = Scorer(given.folder / "scores", judged, given.jobs, n_runs)
    scores, by_seed = all_scores(scorer, tokens, one_arm(found), judged)
    truth = scorer.labels.to_numpy()
    owners = judged.set_index("knee_id").loc[scorer.labels.index, "subject_id"]
    scanner = drawn_ct(scorer.labels.index.to_numpy())
    single = {}
    for key, rows in by_seed.groupby(["arm", "seed"]):
        auc = diagnosis.auc_delong(scorer.labels.loc[rows["knee_id"]], rows["score"])
        single.setdefault(key[0], []).append(auc["auc"])
    shown = [name for name in SHOWN if name in scores]
    probabilities = [name for name in scores if not name.endswith(", svm")]
    main = MAIN if MAIN in tokens else list(tokens)[0]
    trained, rows = run.results("distillation"), one_arm(found)
    results = {
        "run": {name: trained[name] for name in ("profile", "seed", "git_commit")},
        "n_pairs": trained["n_knees"],
        "n_knees": len(judged),
        "n_oa": int(truth.sum()),
        "n_patches": len(rows),
        "left_out": left_out,
        "n_seeds": N_SEEDS,
        "agreement": agreement_of(found),
        "auc": auc_of(truth, scores, owners.to_numpy()),
        "auc_by_seed": single,
        "questions": answers(truth, scores),
        "calibration": {name: diagnosis.calibration(truth, scores[name]) for name in probabilities},
        "calibration_curve": {
            name: diagnosis_views.calibration_curve(truth, scores[name], N_GROUPS).to_dict("list")
            for name in shown
        },
        "decision": {
            name: diagnosis_views.net_benefit(truth, scores[name], THRESHOLDS).to_dict("list")
            for name in shown
        },
        "subgroups": subgroups(truth, scores, scanner),
        "permuted_labels": permuted(scorer, tokens[main], owners) | {"arm": main},
    }
    if given.null:
        null = subjects.iloc[: given.null]
        results["zero_effect"] = without_disease(run, null, given.folder / "zero_effect", given)
    about = scorer.labels.to_frame().join(scanner[["kernel", "noise"]])
    return results, about.join(scores)


def main() -> None:
    """Scan, estimate, diagnose, write; what is finished is reused."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="folder of a finished run")
    parser.add_argument("--folder", type=Path, required=True, help="of the scanned knees, kept")
    parser.add_argument("--jobs", type=int, default=2, help="processes on this machine")
    parser.add_argument("--dask", help="address of a Dask scheduler, in place of --jobs")
    parser.add_argument("--knees", type=int, default=N_KNEES)
    parser.add_argument("--null", type=int, default=N_NULL, help="knees without effects of disease")
    parser.add_argument("--out", type=Path, default=OUT)
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    with on_cluster(given.dask, given.folder) as client:
        for module in MODULES if client else ():
            client.upload_file(str(Path(__file__).with_name(f"{module}.py")))
        results, scores = measure(given)
    header = {
        "protocol_sha256": protocol_sha256(),
        "seed": SEED,
        "git_commit": git_commit(),
        "packages": versions(),
    }
    print(write_json(given.out, header | results))
    write_text(given.out.with_suffix(".csv"), scores.to_csv(float_format="%.4g"))


if __name__ == "__main__":
    # By its name, so that other processes find the functions of this file.
    importlib.import_module("large_cohort").main()
