"""Every arm on the same folds, patches and budget: out-of-fold predictions."""

import hashlib
import inspect
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import joblib
import numpy as np
import pandas as pd
from numpy import ndarray

from ctsma.arms import ARMS, TRAINED, Arm, validated
from ctsma.cache import content_hash, read_record, source_sha256, time_left
from ctsma.common import BIOMARKERS, InputError
from ctsma.files import sha256_file, versions
from ctsma.models import Network
from ctsma.parallel import run_tasks
from ctsma.patches import Patches, mean_cortical_hu, portions
from ctsma.ridge import apply_ridge

from .checkpoints import load_model, save_model
from .data import IMAGES, Fold, TrainingData, make_fold, prepare_in_files, ridge_of
from .losses import loss_term
from .settings import Settings
from .training import TeacherCache, predict_rows, train, with_teacher_labels

TEACHER = ARMS["mr_teacher"]
KEYS = ["arm", "fold", "knee_id", "subject_id", "patch_id"]
PLACE = ["compartment", "u", "v", "w", "mean_hu"]


def cross_validate(
    patches: Patches,
    splits: pd.DataFrame,
    arms: Sequence[str | Arm],
    settings: Settings | Mapping,
    seeds: Sequence[int],
    folder: str | Path,
    n_jobs: int = 1,
    report: Callable[..., None] | None = None,
) -> pd.DataFrame:
    """Train and predict every arm in every fold.

    Each patch is predicted by a model that never saw its subject.

    Parameters
    ----------
    patches : usable patches with their MR reference biomarkers. Pairs without reference (all four
        NaN) train the distilled arms alone, with the teacher's estimates as targets.
    splits : subject_id, fold.
    arms : ids of arms.yaml, or arms of your own (of `read_arms`).
    settings : `Settings`, or a mapping of its fields.
    seeds : each trains every network once, with its own initial weights, batches, augmentation,
        validation subjects and teacher.
    folder : of the models `<arm>_fold<k>_seed<s>`; one of the same code, data, split, arm and
        settings is reused.
    n_jobs : processes of one thread each, over (arm, fold, seed).
    report : called as `report(line, done=..., total=...)` after each (arm, fold, seed).

    Returns
    -------
    DataFrame: arm, fold, seed, knee_id, subject_id, patch_id and the four predicted biomarkers.

    Raises InputError: NaN in patches, a subject without fold, a fold without variance or with too
    few subjects, an unknown arm, setting or loss term.
    """
    if not isinstance(settings, Settings):
        settings = validated(Settings, "settings", settings)
    unknown = [arm for arm in arms if isinstance(arm, str) and arm not in TRAINED]
    if unknown:
        raise InputError("arms", f"hold {unknown[0]!r}", f"choose among {', '.join(TRAINED)}")
    chosen = [ARMS[arm] if isinstance(arm, str) else arm for arm in arms]
    _check(patches, splits, chosen)
    # The slowest first, and students after their teachers: no process waits for the end of another.
    # A student that finds no teacher, as among many processes, trains it itself to the same bits.
    jobs, order = [], {"teacher": 0, "student": 1, "ridge": 2}
    for arm in sorted(chosen, key=lambda arm: (arm.distilled, order[arm.kind])):
        own_seeds = seeds[:1] if arm.kind == "ridge" else seeds  # a ridge draws nothing
        jobs += [(arm, int(k), seed) for k in sorted(splits["fold"].unique()) for seed in own_seeds]
    found, started = [], time.perf_counter()
    Path(folder).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".data-") as shared:
        data, file = prepare_in_files(patches, shared), Path(shared) / "data"
        joblib.dump(data, file)
        study = _Study(file, splits, settings, Path(folder), _data_key(data, splits))
        for predictions in run_tasks(study.run, jobs, n_jobs, ordered=False):
            found.append(predictions)
            if report:
                left = time_left(started, len(found), len(jobs) - len(found))
                job = "{}, fold {}, seed {}".format(*predictions.iloc[0, :3])
                line = f"train {len(found)}/{len(jobs)} {job}: done{left}"
                report(line, done=len(found), total=len(jobs))
    found.sort(key=lambda part: part.iloc[0, 1:3].tolist())
    ordered = [part for arm in chosen for part in found if part["arm"].iloc[0] == arm.id]
    return pd.concat(ordered, ignore_index=True)


@dataclass(frozen=True)
class _Study:
    """What all folds of a cross-validation share; the data are read by every process itself."""

    data_file: Path
    splits: pd.DataFrame
    settings: Settings
    folder: Path
    data_key: str

    @cached_property
    def data(self) -> TrainingData:
        """Its images stay in their files."""
        return joblib.load(self.data_file)

    def run(self, arm: Arm, number: int, seed: int) -> pd.DataFrame:
        """Predictions of one arm for the test rows of one fold."""
        data = self.data
        fold = make_fold(data, self.splits, number, seed, self.settings, arm)
        if arm.kind == "ridge":
            rows = np.concatenate([fold.fit, fold.validation])
            low, high = data.targets[rows].min(axis=0), data.targets[rows].max(axis=0)
            weights = ridge_of(data, rows, arm.input).weights
            values = apply_ridge(weights, data.ridge_input(arm.input)[fold.test], low, high)
        else:
            network, record = self.network(arm, fold, seed)
            values = predict_rows(network, data, fold.test, record["scale"], self.settings)
        return prediction_rows(data.table.iloc[fold.test], arm.id, number, seed, values)

    def network(self, arm: Arm, fold: Fold, seed: int) -> tuple[Network, dict]:
        """The arm's network and its record: read where it was trained before, else trained.

        Of several candidate loss weights those of the least validation error are kept.
        """
        stem = self.folder / f"{arm.id}_fold{fold.number}_seed{seed}"
        terms = {name for weights in arm.loss_weights for name in weights if ":" in name}
        code = {name: sha256_file(inspect.getfile(loss_term(name))) for name in terms}
        description = [arm.id, arm.input, arm.baseline, arm.loss_weights, code]
        choices = self.settings.model_dump()
        key = content_hash(self.data_key, description, fold.number, seed, choices)
        if read_record(f"{stem}.json", key) is None:
            self._train(arm, fold, seed, stem, key)
        return load_model(stem)

    def _train(self, arm: Arm, fold: Fold, seed: int, stem: Path, key: str) -> None:
        data, settings, cache = self.data, self.settings, None
        if arm.distilled:
            own = make_fold(data, self.splits, fold.number, seed, settings, TEACHER)
            teacher, record = self.network(TEACHER, own, seed)
            teacher.requires_grad_(False)
            data, fold = with_teacher_labels(data, fold, arm, teacher, record["scale"], settings)
            cache = TeacherCache(teacher, data, fold, settings)
        trials, checkpoints = [], []
        for candidate, loss_weights in enumerate(arm.loss_weights):
            if arm.without_teacher and not any(loss_weights.values()) and data is self.data:
                network, record = self.network(ARMS[arm.without_teacher], fold, seed)
                trials.append((network, pd.DataFrame(record["curves"])))
            else:
                checkpoint = Path(f"{stem}_{key[:16]}_{candidate}.checkpoint")
                trials.append(train(data, fold, loss_weights, cache, seed, settings, checkpoint))
                checkpoints.append(checkpoint)
        errors = [float(curves["validation_mse"].iloc[-1]) for _, curves in trials]
        best = int(np.argmin(errors))
        parts = {"fit": fold.fit, "validation": fold.validation, "test": fold.test}
        record = {
            "arm": arm.id,
            "role": arm.kind,
            "fold": fold.number,
            "seed": seed,
            "loss_weights": arm.loss_weights[best],
            "scale": fold.scale,
            "validation_mse": errors,
            "subjects": {n: np.unique(data.subjects[rows]).tolist() for n, rows in parts.items()},
            "settings": settings.model_dump(),
            "packages": versions(),
            "curves": trials[best][1].to_dict("list"),
        }
        save_model(stem, trials[best][0], key, record)
        for checkpoint in checkpoints:
            checkpoint.unlink(missing_ok=True)


def _check(patches: Patches, splits: pd.DataFrame, arms: Sequence[Arm]) -> None:
    """InputError for what would fail later, or give numbers that mean nothing."""
    for term in {name for arm in arms for weights in arm.loss_weights for name in weights}:
        loss_term(term)
    missing = sorted(set(patches.table["subject_id"]) - set(splits["subject_id"]))
    if missing:
        problem = f"have no fold for subject {', '.join(missing[:3])}"
        raise InputError("splits", problem, "make the splits again")
    arrays = {"mr": patches.mr, "ct": patches.ct, "cortical HU": mean_cortical_hu(patches.table)}
    arrays["reference"] = patches.table[list(BIOMARKERS)].dropna(how="all").to_numpy()
    for name, values in arrays.items():
        some = portions(np.arange(len(values)))
        if not all(np.isfinite(values[rows]).all() for rows in some):
            problem = f"hold a value that is not finite in {name}"
            raise InputError("patches", problem, "leave flagged patches out")


def _data_key(data: TrainingData, splits: pd.DataFrame) -> str:
    arrays = data.targets, data.cortical_hu
    digests = [hashlib.sha256(np.ascontiguousarray(array)).hexdigest() for array in arrays]
    digests += [sha256_file(getattr(data, name).file) for name in IMAGES]
    folds = splits[["subject_id", "fold"]].sort_values("subject_id").to_numpy().tolist()
    return content_hash(digests, folds, source_sha256("ctsma.distillation"))


def prediction_rows(
    table: pd.DataFrame, arm: str, fold: int, seed: int, values: ndarray
) -> pd.DataFrame:
    """Predicted biomarkers (n, 4) of the patches of a table, as `cross_validate` returns them."""
    patches = table[["knee_id", "subject_id", "patch_id"]].reset_index(drop=True)
    heads = pd.DataFrame({"arm": arm, "fold": fold, "seed": seed}, index=patches.index)
    return pd.concat([heads, patches, pd.DataFrame(values, columns=list(BIOMARKERS))], axis=1)


def mean_over_seeds(predictions: pd.DataFrame) -> pd.DataFrame:
    """One row per arm and patch: the mean over the seeds."""
    return predictions.groupby(KEYS, sort=False)[list(BIOMARKERS)].mean().reset_index()


def with_reference(predictions: pd.DataFrame, table: pd.DataFrame) -> pd.DataFrame:
    """Predictions beside what is known of their patches.

    Adds compartment, u, v, w, mean_hu, <biomarker>_reference (the MR) and, for simulated knees,
    <biomarker>_true, as far as the table of patches has them.
    """
    names = {name: f"{name}_reference" for name in BIOMARKERS}
    names |= {f"true_{name}": f"{name}_true" for name in BIOMARKERS}
    names = {name: new for name, new in names.items() if name in table}
    known = table[["knee_id", "patch_id", *PLACE, *names]].rename(columns=names)
    joined = predictions.merge(known, on=["knee_id", "patch_id"], how="left", validate="m:1")
    order = [*KEYS, *PLACE, *predictions.columns.difference(KEYS, sort=False), *names.values()]
    return joined[order]
