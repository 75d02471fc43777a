"""Arms: every way of estimating the biomarkers, on the same folds, patches and budget; out-of-fold predictions."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path

import joblib
import numpy as np
import pandas as pd
import torch
from pydantic import ValidationError
from torch import nn

from ctsma.biomarkers import bone_volume_fraction
from ctsma.cohort import BIOMARKERS, InputFault, content_key, source_sha256
from ctsma.cohort.provenance import versions
from ctsma.patches import MR_SPACING_MM, Patches, ruler_hu

from .baseline import N_RULER, hu_regression, on_ct_grid, ridge_features
from .checkpoints import Progress, load_model, save_model
from .examples import Examples, Fold, Settings, fold_of, relative_mr
from .training import SAVE_SECONDS, Memory, estimate, train

RIDGES = {"hu_regression": -N_RULER, "ruler_regression": None}  # last column of `Examples.features` that each sees
TEACHER = "mr_teacher"


def recipes_of(arm: str, settings: Settings) -> list[dict[str, float]]:
    """Recipes (term -> weight, see `TERMS`) that an arm tries; the one of least validation error is kept.

    Arms: hu_regression, ruler_regression, mr_teacher, ct_only, ct_sma, ct_residual, ct_sma_plus, names of
    `settings.ablations`. InputFault for any other.
    """
    sma = [{"feature_l1": gamma} for gamma in settings.gammas]
    known = dict.fromkeys(RIDGES, []) | {TEACHER: [{}], "ct_only": [{}], "ct_sma": sma}
    known |= {"ct_residual": [{}], "ct_sma_plus": [settings.plus]}
    known |= {name: [recipe] for name, recipe in settings.ablations.items()}
    if arm not in known:
        raise InputFault("arms", f"hold {arm!r}", f"choose among {', '.join(known)}")
    return known[arm]


def cross_validate(
    patches: Patches,
    splits: pd.DataFrame,
    arms: Sequence[str],
    settings: Settings | Mapping,
    seeds: Sequence[int],
    folder: str | Path,
    n_jobs: int = 1,
    report: Callable[[str], None] | None = None,
) -> pd.DataFrame:
    """Train and predict every arm in every fold; each patch is predicted by a model that never saw its subject.

    Parameters
    ----------
    patches : usable patches with their MR reference biomarkers.
    splits : subject_id, fold.
    arms : of `recipes_of`.
    settings : `Settings`, or a mapping of its fields.
    seeds : each trains every network once, with its own initial weights, batches, augmentation, validation subjects
        and teacher.
    folder : of the models `<arm>_fold<k>_seed<s>`; one made by the same code, data, split and settings is reused.
    n_jobs : processes of one thread each, over (arm, fold, seed).
    report : called with one line per finished (arm, fold, seed).

    Returns
    -------
    DataFrame: arm, fold, seed, knee_id, subject_id, patch_id, the four biomarkers, predicted, and their predicted
    <biomarker>_sd (NaN for a ridge).
    Raises InputFault: NaN in patches, subject without fold, fold without variance or with too few subjects.
    """
    settings = _checked(settings, patches, splits, arms)
    recipes = [recipe for arm in arms for recipe in recipes_of(arm, settings)]
    examples = prepare(patches, detail=any("detail" in recipe for recipe in recipes))
    run = partial(_arm_in_fold, examples, splits, settings, Path(folder), _data_key(examples, splits))
    cost = {arm: sum(1 + _needs_teacher([recipe]) for recipe in recipes_of(arm, settings)) for arm in arms}
    order = sorted((arm for arm in arms if arm != TEACHER), key=cost.get, reverse=True)  # the longest first
    students = [arm for arm in order if _needs_teacher(recipes_of(arm, settings))]
    alone = [arm for arm in order if arm not in students]
    first = [TEACHER] if students or TEACHER in arms else []
    found = []
    waves = (first + alone[:1], students + alone[1:]) if first else (alone,)  # students wait for their fold's teacher
    for wave in waves:
        jobs = product(wave, sorted(splits["fold"].unique()), seeds)
        tasks = [joblib.delayed(run)(arm, int(fold), seed) for arm, fold, seed in jobs if _once(arm, seed, seeds)]
        with joblib.parallel_config(backend="loky", n_jobs=n_jobs, inner_max_num_threads=1):
            for predictions in joblib.Parallel(return_as="generator")(tasks):
                found.append(predictions)
                if report:
                    report("{}, fold {}, seed {}: done".format(*predictions[["arm", "fold", "seed"]].iloc[0]))
    return pd.concat([f for arm in arms for f in found if f["arm"].iloc[0] == arm], ignore_index=True)


def predict_unpaired(
    patches: Patches, splits: pd.DataFrame, arms: Sequence[str], seeds: Sequence[int], folder: str | Path
) -> pd.DataFrame:
    """Predict patches of knees that have no usable MR, by the trained networks of their subjects' folds.

    Parameters
    ----------
    patches : of `load_ct_patches`; arms : networks that read the CT (others are left out).
    splits, seeds, folder : as given to `cross_validate`, which trained them.

    Returns
    -------
    DataFrame as of `cross_validate`. The network of a subject's fold never saw the subject, nor its other knee.
    """
    table = patches.table.assign(**dict.fromkeys(BIOMARKERS, np.nan))
    examples = prepare(replace(patches, table=table), detail=False)
    folds, parts = splits.set_index("subject_id")["fold"].loc[table["subject_id"]].to_numpy(), []
    networks = [arm for arm in arms if arm not in (*RIDGES, TEACHER)]
    for arm, fold, seed in product(networks, np.unique(folds), seeds):
        model, record = load_model(Path(folder) / f"{arm}_fold{fold}_seed{seed}")
        own, settings = np.flatnonzero(folds == fold), Settings(**record["settings"])
        found = estimate(model, record["role"], examples, own, record["scale"], settings)
        parts.append(_predicted(table.iloc[own], arm, fold, seed, *found))
    nothing = _predicted(table[:0], "", 0, 0, table.loc[:, list(BIOMARKERS)][:0], np.nan)
    return pd.concat(parts, ignore_index=True) if parts else nothing


def _predicted(rows: pd.DataFrame, arm: str, fold: int, seed: int, values: np.ndarray, spread) -> pd.DataFrame:
    found = rows[["knee_id", "subject_id", "patch_id"]].reset_index(drop=True)
    found[list(BIOMARKERS)], found[[f"{b}_sd" for b in BIOMARKERS]] = values, spread
    return pd.concat([pd.DataFrame({"arm": arm, "fold": fold, "seed": seed}, index=found.index), found], axis=1)


def over_seeds(predictions: pd.DataFrame) -> pd.DataFrame:
    """One row an arm and patch: mean over the seeds; <biomarker>_sd from the predicted variance and the seeds' own."""
    keys, columns = ["arm", "fold", "knee_id", "subject_id", "patch_id"], list(BIOMARKERS)
    groups = predictions.groupby(keys, sort=False)
    mean, between = groups[columns].mean(), groups[columns].var(ddof=0)
    within = predictions.assign(**{b: predictions[f"{b}_sd"] ** 2 for b in columns}).groupby(keys, sort=False)[columns]
    spread = np.sqrt(within.mean() + between).add_suffix("_sd")
    return pd.concat([mean, spread], axis=1).reset_index()


def _once(arm: str, seed: int, seeds: Sequence[int]) -> bool:
    return arm not in RIDGES or seed == seeds[0]  # a ridge has nothing to draw


def prepare(patches: Patches, detail: bool) -> Examples:
    """What every fold shares: MR over its bright marrow, and its bone volume fraction where `detail` is learned."""
    mr, region, fraction = patches.mr.astype(np.float32), patches.voi.astype(bool), None
    if detail:
        fraction = np.nan_to_num(bone_volume_fraction(mr, region, MR_SPACING_MM)).astype(np.float16)
    targets, ct = patches.table[list(BIOMARKERS)].to_numpy(float), patches.ct.astype(np.float32)
    ruler = ruler_hu(patches.table)
    features = ridge_features(ct, region, ruler)
    relative, mask = relative_mr(mr, region), on_ct_grid(region)
    return Examples(patches.table, targets, ct, relative, region, mask, ruler, features, fraction)


def _arm_in_fold(
    examples: Examples, splits: pd.DataFrame, settings: Settings, folder: Path, key: str, arm: str, fold: int, seed: int
) -> pd.DataFrame:
    torch.set_num_threads(1)  # a fold is a process: threads would only contend, and change the last bits
    parts = fold_of(examples, splits, fold, seed, settings, arm)
    if arm in RIDGES:
        predicted = _ridge(examples, parts, RIDGES[arm]), np.nan
    else:
        model, record = _trained(examples, parts, settings, seed, folder, key, arm)
        predicted = estimate(model, record["role"], examples, parts.test, record["scale"], settings)
    return _predicted(examples.table.iloc[parts.test], arm, fold, seed, *predicted)


def _ridge(examples: Examples, fold: Fold, n_columns: int | None) -> np.ndarray:
    training, features = np.concatenate([fold.fit, fold.validation]), examples.features[:, :n_columns]
    subjects = examples.table["subject_id"].to_numpy(str)[training]
    return hu_regression(features[training], examples.targets[training], subjects, features[fold.test])


def _trained(
    examples: Examples, fold: Fold, settings: Settings, seed: int, folder: Path, key: str, arm: str
) -> tuple[nn.Module, dict]:
    """The arm's model and record: read where the same was trained before, else trained, chosen and written."""
    recipes, stem = recipes_of(arm, settings), folder / f"{arm}_fold{fold.number}_seed{seed}"
    choices = settings.model_dump(exclude={"gammas", "plus", "ablations", "ruled", "weighed"})
    choices |= {"recipes": recipes, "ruled": arm in settings.ruled, "weighed": arm in settings.weighed}  # its own alone
    key = content_key(key, arm, fold.number, seed, choices)
    try:
        return load_model(stem, {"key": key})
    except InputFault:  # none there, or another one: train
        pass
    memory, role = None, "teacher" if arm == TEACHER else "student"
    if _needs_teacher(recipes):
        teacher = load_model(folder / f"{TEACHER}_fold{fold.number}_seed{seed}")[0].requires_grad_(False)
        memory = Memory(teacher, examples, fold, settings)
    kept = [Progress(stem.with_name(f"{stem.name}_{n}"), f"{key}-{n}", SAVE_SECONDS) for n in range(len(recipes))]
    trials = [
        train(role, recipe, memory, examples, fold, seed, settings, progress)
        for recipe, progress in zip(recipes, kept, strict=True)
    ]
    errors = [float(curves["validation_mse"].iloc[-1]) for _, curves in trials]
    best = int(np.argmin(errors))
    subjects = examples.table["subject_id"].to_numpy(str)
    record = {"key": key, "arm": arm, "role": role, "fold": fold.number, "seed": seed}
    record |= {"recipe": recipes[best], "scale": fold.scale, "validation_mse": errors}
    record |= {"subjects": {p: np.unique(subjects[getattr(fold, p)]).tolist() for p in ("fit", "validation", "test")}}
    record |= {"settings": settings.model_dump(), "protocol_sha256": settings.protocol_sha256, "packages": versions()}
    save_model(stem, *trials[best], record)
    for progress in kept:
        progress.done()
    return load_model(stem)


def _needs_teacher(recipes: list[dict[str, float]]) -> bool:
    return any(weight and term != "detail" for recipe in recipes for term, weight in recipe.items())


def _data_key(examples: Examples, splits: pd.DataFrame) -> str:
    arrays = examples.targets, examples.ct, examples.mr, examples.voi, examples.ruler
    digests = [hashlib.sha256(np.ascontiguousarray(array)).hexdigest() for array in arrays]
    folds = splits[["subject_id", "fold"]].sort_values("subject_id").to_numpy().tolist()
    return content_key(digests, folds, source_sha256("ctsma.distillation"))


def _checked(settings: Settings | Mapping, patches: Patches, splits: pd.DataFrame, arms: Sequence[str]) -> Settings:
    try:
        settings = settings if isinstance(settings, Settings) else Settings(**settings)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(["settings", *map(str, first["loc"])])
        raise InputFault(where, first["msg"].lower(), "choose a value that Settings allows") from error
    if idle := [arm for arm in settings.weighed if arm not in arms or not any(recipes_of(arm, settings))]:
        raise InputFault("weighed", f"names {', '.join(idle)}, which learns from no MR here", "name arms that do")
    subjects, n_folds = set(patches.table["subject_id"]), splits["fold"].nunique()
    if missing := sorted(subjects - set(splits["subject_id"])):
        raise InputFault("splits", f"have no fold for subject {', '.join(missing[:3])}", "make the splits again")
    if n_folds > len(subjects):
        raise InputFault("splits", f"have {n_folds} folds for {len(subjects)} subjects", "use fewer folds")
    arrays = {"mr": patches.mr, "ct": patches.ct, "ruler": ruler_hu(patches.table)}
    arrays["reference"] = patches.table[list(BIOMARKERS)].to_numpy(float)
    for name, values in arrays.items():
        if len(bad := np.flatnonzero(~np.isfinite(values.reshape(len(values), -1)).all(1))):
            where = "patch {1} of knee {0}".format(*patches.table.iloc[bad[0]][["knee_id", "patch_id"]])
            raise InputFault(where, f"has a value that is not finite in {name}", "leave flagged patches out")
    return settings
