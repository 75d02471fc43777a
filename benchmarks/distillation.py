"""When does a teacher help, and what is the information limit of this CT?

    python benchmarks/distillation.py runs/full --folder /tmp/knees
    python benchmarks/distillation.py runs/full --folder /tmp/knees --only few_labels

The protocol is docs/distillation_protocol.md. Simulated knees of another seed than the study's are
scanned at their patches alone with true alignment (see calibration.py). Finished knees and networks
are reused. Writes docs/results/distillation_evidence.json:

- `teacher`: what a teacher adds where every pair has a reference;
- `few_labels`: the same where few pairs have one;
- `oracle`: the large-sample reference model, trained on nine times the knees; it approximates the
  information limit of this CT. Its estimates for the patches of a run go to
  docs/results/distillation_oracle.csv;
- `knowledge`: ridge on HU statistics that is also given what no CT shows: where the error is from;
- `frequency`: the run's own networks on its test patches, their CT blurred more and more.
"""

import argparse
import hashlib
import json
import zlib
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import joblib
import numpy as np
import pandas as pd
import torch
from calibration import scanned
from scipy import ndimage
from torch import nn

from ctsma import agreement, patches
from ctsma.cache import content_hash, map_knees, source_sha256
from ctsma.common import BIOMARKERS
from ctsma.distillation import (
    ARMS,
    Fold,
    Outputs,
    Settings,
    TeacherCache,
    TrainingData,
    fit_normalisation,
    load_model,
    predict,
    predict_rows,
    prepare,
    train,
)
from ctsma.distillation.data import make_input, ridge_prediction
from ctsma.distillation.training import autocast, with_teacher_labels
from ctsma.files import atomic, git_commit, write_json, write_text
from ctsma.models import Network, build
from ctsma.ridge import N_CALIBRATED, fit_ridge, ridge_features
from ctsma_lab.agreement_views import nested
from ctsma_lab.training_views import read_records
from kneesim import draw_subjects, load_protocol, protocol_sha256
from kneesim import knees as simulator
from kneesim.difficulty import ridge_estimates
from kneesim.subject import make_subject

SEED, FIRST, LAST = 2000, 137, 880  # of the knees; the first 137 chose settings
N_TRAINING, N_TEST, N_KNOWLEDGE = 80, 200, 240
N_LABELLED = (5, 10, 20)
N_SHUFFLED = 20  # labelled knees of the control
ORACLE_EPOCHS = 16  # nine times the steps of the study's arms
SCANS = {"seed": SEED, "per": 4, "truths": 0, "rescans": 0, "protocol": None}
CAM, FEATURE_L1 = {"cam_mse": 0.3}, {"feature_l1": 0.1}
RIDGE, GLS_RIDGE, STUDENT = "ridge", "GLS ridge", "student"
ESTIMATES, OWN_TEACHER = "student, teacher's estimates", "student, own teacher, CAM"
ESTIMATES_CAM, ALL_LABELLED = f"{ESTIMATES}, CAM", "student, all labelled"
AWARE = "student, CAM, CT-aware teacher"
TEACHER_COMPARISONS = [
    (GLS_RIDGE, RIDGE),
    ("ridge + network", RIDGE),
    ("ridge + GLS network", "ridge + network"),
    ("GLS ridge + network", GLS_RIDGE),
    (STUDENT, "GLS ridge + network"),
    (STUDENT, GLS_RIDGE),
    *((f"student, {name}", STUDENT) for name in ("CAM", "feature L1", "last-stage L1")),
    (AWARE, STUDENT),
    ("student, CAM, shuffled pairs", STUDENT),
    ("teacher's head", STUDENT),
    ("student, CAM", GLS_RIDGE),
]
FEW_COMPARISONS = [
    (STUDENT, GLS_RIDGE),
    ("feature L1", STUDENT),
    (f"{GLS_RIDGE}, teacher's estimates", GLS_RIDGE),
    (ESTIMATES, STUDENT),
    (ESTIMATES_CAM, STUDENT),
    (ESTIMATES_CAM, ESTIMATES),
    (ESTIMATES_CAM, GLS_RIDGE),
    (ESTIMATES_CAM, f"{GLS_RIDGE}, teacher's estimates"),
    (OWN_TEACHER, STUDENT),
    ("student, shuffled pairs", STUDENT),
    (ALL_LABELLED, ESTIMATES_CAM),
]
PARTS = "teacher", "few_labels", "oracle", "knowledge", "frequency"
BLUR_MM = (0.0, 0.25, 0.5, 1.0, 2.0)  # SD in plane
OUT = Path(__file__).parents[1] / "docs" / "results" / "distillation_evidence.json"


class Trainer:
    """Trains networks of one seed; a finished one is read from `folder`."""

    def __init__(self, folder: Path, seed: int, test: np.ndarray):
        self.folder, self.seed, self.test = folder, seed, test

    def once(self, name: str, make: Callable[[], object]) -> object:
        """What `make` returns, stored under a name."""
        path = self.folder / f"{name}, seed {self.seed}.pt".replace(" ", "_")
        if not path.exists():
            with atomic(path) as temporary:
                torch.save(make(), temporary)
            print(f"{path.stem}: done", flush=True)
        return torch.load(path, weights_only=False)

    def fold(self, fit: np.ndarray, scale: dict, unlabelled: np.ndarray | None = None) -> Fold:
        """Rows to fit and to predict; a few test rows are the validation rows, choosing nothing."""
        unlabelled = np.zeros(0, int) if unlabelled is None else unlabelled
        return Fold(0, fit, self.test[:32], self.test, unlabelled, scale)

    def teacher(self, name: str, data: TrainingData, fit: np.ndarray, **options) -> tuple:
        """A frozen teacher, trained on the MR of rows `fit`, and its scale."""
        scale = fit_normalisation(data, fit, ARMS["mr_teacher"])
        fold, settings = self.fold(fit, scale), Settings()
        loss_weights, cache = options.get("loss_weights", {}), options.get("cache")
        network = self.once(
            name, lambda: train(data, fold, loss_weights, cache, self.seed, settings)[0]
        )
        return network.requires_grad_(False), scale

    def student(self, name: str, data: TrainingData, fold: Fold, **options) -> tuple:
        """A student, and its predictions (n_test, 4)."""
        settings, teacher = options.get("settings", Settings()), options.get("teacher")
        cache = TeacherCache(teacher, data, fold, settings) if teacher else None
        weights, start = options.get("loss_weights", {}), options.get("network")
        network = self.once(
            name, lambda: train(data, fold, weights, cache, self.seed, settings, network=start)[0]
        )
        return network, predict_rows(network, data, fold.test, fold.scale, settings)


class StudentOutputs:
    """Outputs of a trained student, in the place of a `TeacherCache`: for a CT-aware teacher."""

    def __init__(self, network: Network, data: TrainingData, scale: dict):
        self.network, self.data, self.scale = network.requires_grad_(False), data, scale

    def outputs(self, rows: np.ndarray, flips: tuple[int, ...]) -> Outputs:
        """For rows of the data, flipped."""
        with torch.no_grad(), autocast(Settings()):
            x = make_input(self.data, rows, self.scale, "cpu", flips)
            ridge = ridge_prediction(self.data, rows, self.scale, "cpu")
            prediction, maps = self.network(x)
            cam = self.network.class_activation_maps(maps[-1])
        return Outputs(prediction + ridge, cam + ridge[..., None, None, None], maps)


def with_teacher(
    data: TrainingData, fit: np.ndarray, test: np.ndarray, folder: Path, seed: int
) -> dict[str, np.ndarray]:
    """Predictions (n_test, 4) of every arm of experiment 1, by name."""
    torch.set_num_threads(1)
    trainer, x, y = Trainer(folder, seed, test), data.features, data.targets
    gls = fit_normalisation(data, fit, ARMS["ct_residual"])
    ordinary = fit_ridge(x[fit], y[fit], data.subjects[fit])
    ols, zero = {"ridge": ordinary.weights.tolist()}, {"rho": [0.0] * len(BIOMARKERS)}
    independent = {"settings": Settings(patches_per_knee=1)}
    found = {
        RIDGE: ridge_estimates(x[fit], y[fit], data.subjects[fit], x[test]),
        GLS_RIDGE: gls_ridge(data, fit, test),
    }
    for name, scale, options in (
        ("ridge + network", gls | ols | zero, independent),
        ("ridge + GLS network", gls | ols, {}),
        ("GLS ridge + network", gls | zero, independent),
    ):
        _, found[name] = trainer.student(name, data, trainer.fold(fit, scale), **options)
    fold = trainer.fold(fit, gls)
    network, found[STUDENT] = trainer.student(STUDENT, data, fold)
    teacher, _ = trainer.teacher("teacher", data, fit)
    aware, _ = trainer.teacher(
        "CT-aware teacher", data, fit, loss_weights=CAM, cache=StudentOutputs(network, data, gls)
    )
    order = np.arange(len(y))
    order[fit] = np.random.default_rng(SEED).permutation(fit)
    shuffled = replace(data, mr=data.mr[order])
    for name, loss_weights, own_teacher, seen in (
        ("student, CAM", CAM, teacher, data),
        ("student, feature L1", FEATURE_L1, teacher, data),
        ("student, last-stage L1", {"loss_terms:last_stage_l1": 0.1}, teacher, data),
        (AWARE, CAM, aware, data),
        ("student, CAM, shuffled pairs", CAM, teacher, shuffled),
    ):
        options = {"loss_weights": loss_weights, "teacher": own_teacher}
        _, found[name] = trainer.student(name, seen, fold, **options)
    projected = build("ct+cortex", "compact", torch.Generator().manual_seed(seed))
    channels = teacher.head.in_features
    projected.stages[-1] = nn.Sequential(projected.stages[-1], nn.Conv3d(channels, channels, 1))
    projected.head = teacher.head
    options = {"loss_weights": {"loss_terms:last_stage_mse": 1.0}, "teacher": teacher}
    no_ridge = trainer.fold(fit, gls | {"ridge": None})
    _, found["teacher's head"] = trainer.student(
        "teacher's head", data, no_ridge, network=projected, **options
    )
    return found


def with_few_labels(
    data: TrainingData,
    fit: np.ndarray,
    others: np.ndarray,
    test: np.ndarray,
    folder: Path,
    n_labelled: int,
    seed: int,
) -> dict[str, np.ndarray]:
    """Predictions (n_test, 4) of every arm of experiment 2, by name.

    `fit` holds the rows of the paired knees, the labelled knees first; `others` the rows of the
    knees of the teacher.
    """
    torch.set_num_threads(1)
    trainer, arm = Trainer(folder, seed, test), ARMS["ct_residual"]
    labelled, unlabelled = by_knee(data, fit, n_labelled)
    teacher, scale = trainer.teacher("other teacher", data, others)
    own, own_scale = trainer.teacher(f"own teacher, {n_labelled}", data, labelled)
    hidden = data.targets.copy()
    hidden[unlabelled] = np.nan
    known = replace(data, targets=hidden)
    fold = trainer.fold(labelled, fit_normalisation(known, labelled, arm), unlabelled)
    found = {GLS_RIDGE: gls_ridge(known, labelled, test)}

    def student(name: str, seen: TrainingData, own_fold: Fold, **options) -> None:
        found[name] = trainer.student(f"{name}, {n_labelled}", seen, own_fold, **options)[1]

    student(STUDENT, known, fold)
    every = replace(fold, fit=fit)
    student("feature L1", known, every, loss_weights=FEATURE_L1, teacher=teacher)
    taught, taught_fold = with_teacher_labels(known, fold, arm, teacher, scale, Settings())
    found[f"{GLS_RIDGE}, teacher's estimates"] = gls_ridge(taught, taught_fold.fit, test)
    student(ESTIMATES, taught, taught_fold)
    student(ESTIMATES_CAM, taught, taught_fold, loss_weights=CAM, teacher=teacher)
    taught, taught_fold = with_teacher_labels(known, fold, arm, own, own_scale, Settings())
    student(OWN_TEACHER, taught, taught_fold, loss_weights=CAM, teacher=own)
    if n_labelled == N_SHUFFLED:
        order = np.arange(len(hidden))
        order[unlabelled] = np.random.default_rng(SEED).permutation(unlabelled)
        shuffled = replace(known, mr=data.mr[order])
        taught, taught_fold = with_teacher_labels(shuffled, fold, arm, teacher, scale, Settings())
        options = {"loss_weights": CAM, "teacher": teacher}
        student("student, shuffled pairs", taught, taught_fold, **options)
    gls = fit_normalisation(data, fit, arm)
    _, found[ALL_LABELLED] = trainer.student(STUDENT, data, trainer.fold(fit, gls))
    return found


def by_knee(data: TrainingData, rows: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the first n knees of `rows`, and the other rows."""
    first = np.isin(data.knees[rows], pd.unique(data.knees[rows])[:n])
    return rows[first], rows[~first]


def gls_ridge(data: TrainingData, fit: np.ndarray, test: np.ndarray) -> np.ndarray:
    """Estimates (n_test, 4) of the calibrated ridge with a random intercept per knee."""
    x, y = data.features, data.targets
    return ridge_estimates(x[fit], y[fit], data.subjects[fit], x[test], data.knees[fit])


def rows_of(data: TrainingData, knees: np.ndarray) -> np.ndarray:
    """Rows of the named knees, in the order of their names."""
    return np.concatenate([np.flatnonzero(data.knees == knee) for knee in knees])


def trained_folder(data: TrainingData, folder: Path) -> Path:
    """Folder of the networks of these data, this code and these settings."""
    digest = hashlib.sha256(np.ascontiguousarray(data.ct)).hexdigest()
    code = (
        source_sha256("ctsma.distillation"),
        Path(__file__).with_name("loss_terms.py").read_text(),
    )
    key = content_hash(digest, code, Settings().model_dump(), data.knees.tolist())
    path = folder / "trained" / key[:16]
    path.mkdir(parents=True, exist_ok=True)
    return path


def mean_of(by_seed: list[dict]) -> dict[str, np.ndarray]:
    """Mean prediction over seeds by name."""
    return {name: np.mean([found[name] for found in by_seed], axis=0) for name in by_seed[0]}


def compared(data: TrainingData, test: np.ndarray, found: dict, comparisons: list) -> dict:
    """All statistics of each arm, and the paired differences of the mean of the biomarkers."""
    heads = data.table.iloc[test][["knee_id", "subject_id", "patch_id"]].reset_index(drop=True)
    heads[[f"{name}_reference" for name in BIOMARKERS]] = data.targets[test]
    parts = []
    for name, values in found.items():
        parts.append(heads.assign(arm=name, **dict(zip(BIOMARKERS, values.T, strict=True))))
    predictions, rng = pd.concat(parts, ignore_index=True), np.random.default_rng(SEED)
    table = agreement.agreement_table(predictions, rng)
    statistics = [
        c
        for c in table
        if c.removesuffix("_ci_low").removesuffix("_ci_high") in agreement.STATISTICS
    ]
    differences = agreement.paired_differences(predictions, comparisons, rng)
    means = differences[differences["biomarker"] == "mean"].drop(columns="biomarker")
    return {"arms": nested(table, statistics), "differences": means.to_dict("records")}


def teacher(data: TrainingData, ids: np.ndarray, folder: Path, seeds: list, n_jobs: int) -> dict:
    """Experiment 1: what a teacher adds where every pair has a reference."""
    fit, test = rows_of(data, ids[:N_TRAINING]), rows_of(data, ids[-N_TEST:])
    run = joblib.delayed(partial(with_teacher, data, fit, test, trained_folder(data, folder)))
    by_seed = joblib.Parallel(n_jobs)(run(seed) for seed in seeds)
    about = {"n_training": N_TRAINING, "n_test": N_TEST, "training_seeds": len(seeds)}
    return about | compared(data, test, mean_of(by_seed), TEACHER_COMPARISONS)


def few_labels(data: TrainingData, ids: np.ndarray, folder: Path, seeds: list, n_jobs: int) -> dict:
    """Experiment 2: what a teacher adds where few pairs have a reference."""
    groups = ids[:N_TRAINING], ids[N_TRAINING : 2 * N_TRAINING], ids[-N_TEST:]
    fit, others, test = (rows_of(data, group) for group in groups)
    trained = trained_folder(data, folder)
    run = joblib.delayed(partial(with_few_labels, data, fit, others, test, trained))
    jobs = [(n_labelled, seed) for seed in seeds for n_labelled in N_LABELLED]
    found = joblib.Parallel(n_jobs)(run(*job) for job in jobs)
    sizes = {}
    for n_labelled in N_LABELLED:
        own = [part for (n, _), part in zip(jobs, found, strict=True) if n == n_labelled]
        sizes[str(n_labelled)] = compared(data, test, mean_of(own), FEW_COMPARISONS)
    about = {"n_pairs": N_TRAINING, "n_test": N_TEST, "training_seeds": len(seeds)}
    return about | {"by_labelled_knees": sizes}


def oracle(data: TrainingData, run: Path, folder: Path, seeds: list, n_jobs: int) -> dict:
    """The large-sample reference model: trained on all knees here, applied to a run's patches."""
    other = prepare(patches.load_patches(run / "patches"))
    arrays = {}
    for name in ("subjects", "knees", "targets", "ct", "mr", "voi", "region", "cortical_hu"):
        arrays[name] = np.concatenate([getattr(data, name), getattr(other, name)])
    arrays["features"] = np.concatenate([data.features, other.features])
    table = pd.concat([data.table, other.table], ignore_index=True)
    whole, n = TrainingData(table=table, **arrays), len(data.table)
    trained = trained_folder(whole, folder)
    train_one = joblib.delayed(partial(oracle_network, whole, n, trained))
    predicted = np.mean(joblib.Parallel(n_jobs)(train_one(seed) for seed in seeds), axis=0)
    rows = other.table[["knee_id", "subject_id", "patch_id"]].assign(arm="ct_oracle")
    rows[list(BIOMARKERS)] = predicted
    rows[[f"{name}_reference" for name in BIOMARKERS]] = other.targets  # to recognise the patches
    text = rows.to_csv(index=False, float_format="%.5g")
    write_text(OUT.with_name("distillation_oracle.csv"), text)
    n_knees = int(data.table["knee_id"].nunique())
    return {"n_knees": n_knees, "epochs": ORACLE_EPOCHS, "training_seeds": len(seeds)}


def oracle_network(whole: TrainingData, n: int, folder: Path, seed: int) -> np.ndarray:
    """Predictions of the rows from n on by one network trained on the rows before."""
    torch.set_num_threads(1)
    fit, test = np.arange(n), np.arange(n, len(whole.table))
    trainer = Trainer(folder, seed, test)
    fold = trainer.fold(fit, fit_normalisation(whole, fit, ARMS["ct_residual"]))
    options = {"settings": Settings(epochs=ORACLE_EPOCHS)}
    return trainer.student("ct_oracle", whole, fold, **options)[1]


def knowledge(data: TrainingData, subjects: pd.DataFrame, ids: np.ndarray) -> dict:
    """Mean ICC of the ridge when it is given HU of mineralised bone, susceptibility, or both."""
    rows = np.flatnonzero(data.table["knee_id"].isin(ids))
    knees, own_subjects = data.table["knee_id"].to_numpy(str)[rows], data.subjects[rows]
    features, calibrated = np.split(data.features[rows], [-N_CALIBRATED], axis=1)
    constants, drawn = load_protocol(), {}
    for knee in subjects[subjects["knee_id"].isin(ids)].to_dict("records"):
        streams = [SEED, zlib.crc32(knee["knee_id"].encode())]
        drawn[knee["knee_id"]] = make_subject(knee, constants, streams, None).drawn
    bone = drawn_ct(ids).loc[knees, "bone_hu"].to_numpy()
    mineralised = [bone, 1000 / bone, features[:, 0] / bone]
    susceptibility = [np.array([drawn[knee]["susceptibility"] for knee in knees])]
    given = {
        "HU statistics": [],
        "+ HU of mineralised bone": mineralised,
        "+ cortical HU (measured)": [calibrated],
        "+ susceptibility of the MR": susceptibility,
        "+ both": mineralised + susceptibility,
    }
    first, targets, found = np.isin(knees, ids[: len(ids) // 2]), data.targets[rows], {}
    for name, columns in given.items():
        x = np.column_stack([features, *columns])
        predicted = ridge_estimates(x[first], targets[first], own_subjects[first], x[~first])
        rng = np.random.default_rng(SEED)
        found[name] = agreement.bootstrap_icc(targets[~first], predicted, own_subjects[~first], rng)
    return found


def frequency(run: Path) -> dict:
    """Mean ICC of a run's CT arms on its test patches with blurred CT, and differences there."""
    data, folder = prepare(patches.load_patches(run / "patches")), run / "models"
    rows, found = np.arange(len(data.table)), {}
    pairs = [("ct_sma", "ct_only"), ("ct_residual", "ct_only"), ("ct_sma_plus", "ct_residual")]
    for blur_mm in BLUR_MM:
        sigma = (0, 0, *[blur_mm / spacing for spacing in patches.CT_SPACING_MM[1:]])
        ct = ndimage.gaussian_filter(data.ct, sigma, mode="nearest")
        features = ridge_features(ct, data.voi, data.cortical_hu)
        blurred = replace(data, ct=ct, features=features)
        predicted = {arm: np.zeros_like(data.targets) for pair in pairs for arm in pair}
        for arm, values in predicted.items():
            records = read_records(folder, arm)
            n_seeds = len({record["seed"] for record in records})
            for record in records:
                stem = folder / f"{arm}_fold{record['fold']}_seed{record['seed']}"
                own = np.flatnonzero(np.isin(data.subjects, record["subjects"]["test"]))
                values[own] += predict(*load_model(stem), blurred, own) / n_seeds
        found[str(blur_mm)] = compared(data, rows, predicted, pairs)
    return found


def drawn_ct(knee_ids: np.ndarray) -> pd.DataFrame:
    """What the CT scanner drew for each knee."""
    constants, rows = load_protocol(), []
    for knee_id in knee_ids:
        streams = [SEED, zlib.crc32(knee_id.encode())]
        drawn = simulator.draw_scan("ct", constants, streams)
        bone_hu = drawn["hu"]["bone"] * drawn["scale"]
        rows.append([bone_hu, drawn["fwhm_in_plane"], drawn["noise"]])
    return pd.DataFrame(rows, index=knee_ids, columns=["bone_hu", "kernel", "noise"])


def scan_patches(knees: pd.DataFrame, folder: Path, options: dict, n_jobs: int) -> patches.Patches:
    """Scan the patches of the knees, where that is not done, and read the usable ones."""
    done = map_knees(scanned, knees, folder, options, n_jobs=n_jobs, report=show)
    finished = done.loc[done["error"] == "", "knee_id"]
    patches.collect_tables(folder, finished).to_csv(folder / "patches.csv", index=False)
    return patches.load_patches(folder)


def show(line: str, done: int, total: int) -> None:
    """Print a line of progress."""
    print(f"{done}/{total} {line}", flush=True)


def keep(part: str, found: dict) -> None:
    """Write one part beside the others."""
    content = json.loads(OUT.read_text()) if OUT.exists() else {}
    content |= {"protocol_sha256": protocol_sha256(), "seed": SEED}
    content["git_commit"] = content.get("git_commit", {}) | {part: git_commit()}
    write_json(OUT, content | {part: found})


def main() -> None:
    """Scan (finished knees are reused), measure, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("--folder", type=Path, required=True, help="of the scanned knees, kept")
    parser.add_argument("--seeds", type=int, default=4, help="networks that are averaged")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--only", choices=PARTS, help="one part; the others are kept")
    given = parser.parse_args()
    subjects = draw_subjects(load_protocol(), LAST, SEED).iloc[FIRST:]
    ids = np.random.default_rng(SEED).permutation(np.unique(subjects["knee_id"].to_numpy(str)))
    needed = {
        "teacher": np.r_[ids[:N_TRAINING], ids[-N_TEST:]],
        "few_labels": np.r_[ids[: 2 * N_TRAINING], ids[-N_TEST:]],
        "knowledge": ids[:N_KNOWLEDGE],
        "oracle": ids,
    }
    work = given.folder, list(range(given.seeds)), given.jobs
    for part in [given.only] if given.only else PARTS:
        if part == "frequency":
            keep(part, frequency(given.run))
            continue
        own = subjects[subjects["knee_id"].isin(needed[part])]
        data = prepare(scan_patches(own, given.folder, SCANS, given.jobs))
        if part == "oracle":
            keep(part, oracle(data, given.run, *work))
        elif part == "knowledge":
            keep(part, knowledge(data, subjects, needed[part]))
        else:
            measure = {"teacher": teacher, "few_labels": few_labels}[part]
            keep(part, measure(data, ids, *work))


if __name__ == "__main__":
    main()
