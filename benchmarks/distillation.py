"""When does distillation help, and what is the information limit of this CT?

    python benchmarks/distillation.py runs/full --folder /tmp/knees
    python benchmarks/distillation.py runs/full --folder /tmp/knees --only oracle --seeds 2

On simulated knees of another seed than the study's, scanned at their patches alone with true
alignment (see calibration.py). Knees 0 to 136 of the seed chose settings and are left out. Writes
docs/results/distillation_evidence.json:

- `oracle`: the large-sample reference model, a CT network that corrects the calibrated ridge,
  trained on ten times the knees; it approximates the information limit of this CT. Its estimates
  for the patches of a run go to docs/results/distillation_oracle.csv;
- `knowledge`: ridge on HU statistics that is also given what no CT shows: where the error is from;
- `learning`: what the teacher adds by number of paired knees (`curve`), and CAM distillation
  compared with the ridge (`versus_ridge`); the same with a teacher that sees another patch, was
  never trained, or sees MR shifted by 2 mm (`controls`); in thirds of the test knees by kernel and
  noise of their CT (`by_kernel`, `by_noise`);
- `terms`: every term of the loss, the ridge that the network corrects, a committee of teachers and
  CT-only knees, one at a time at 80 knees; remove the part from the file to measure it again;
- `displaced_pairs`: the same 80 knees, the MR of each bone displaced by up to 2 mm, evaluated in
  place: what a teacher adds. (The published file also has students that sampled pairs by their
  correlation, an option that gained nothing over no teacher and was removed.);
- `frequency`: the run's own networks on its test patches, their CT blurred more and more.
"""

import argparse
import json
import zlib
from dataclasses import replace
from functools import partial
from pathlib import Path

import joblib
import numpy as np
import pandas as pd
import torch
from calibration import displacements, scanned
from scipy import ndimage
from torch import nn

from ctsma import agreement, patches
from ctsma.cache import map_knees
from ctsma.common import BIOMARKERS
from ctsma.distillation import (
    ARMS,
    Fold,
    Settings,
    TeacherCache,
    TrainingData,
    fit_normalisation,
    load_model,
    predict,
    predict_with_sd,
    prepare,
    train,
)
from ctsma.files import git_commit, write_json, write_text
from ctsma.models import N_CALIBRATED, Network, build, ridge_estimates, ridge_features
from ctsma_lab.training_views import patch_correlation, read_records
from kneesim import draw_subjects, load_protocol, protocol_sha256
from kneesim import knees as simulator
from kneesim.subject import make_subject

SEED, FIRST, LAST = 2000, 137, 880  # of the knees; the first 137 chose settings
SIZES, N_TEST, N_KNOWLEDGE = (10, 20, 40, 80), 200, 240
ORACLE_EPOCHS = 16  # nine times the steps of the study's arms
DISPLACED_MM = 2.0  # largest displacement of a bone's MR
CLASSES_MM = (0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0)
SCANS = {"seed": SEED, "per": 4, "truths": 0, "rescans": 0, "protocol": None}
SHIFT_VOXELS = (3, 9, 9)  # slices, rows, columns of the MR: 2.25, 2 and 2 mm
PUBLISHED = {"feature_l1": {"feature_l1": 0.1}, "feature_l1, gamma 0.01": {"feature_l1": 0.01}}
NO_TEACHER, RIDGE = "no teacher", "calibrated ridge"
CORRECTED, CAM = "ridge + network", "ridge + network, cam_mse"
CAM_MSE = {"cam_mse": 0.3}
COMPARED = [(name, NO_TEACHER) for name in PUBLISHED]
COMPARED += [(RIDGE, NO_TEACHER), (CORRECTED, RIDGE), (CAM, CORRECTED)]
TERMS = {  # weights that were not tuned
    "feature_correlation": {"loss_terms:feature_correlation": 0.1},
    "attention": {"loss_terms:attention": 1.0},
    "relation": {"loss_terms:relation": 0.1},
    "prediction": {"loss_terms:prediction": 1.0},
}
N_CT_ONLY = 160  # CT-only knees beside the 80 paired ones
PARTS = "oracle", "knowledge", "learning", "terms", "displaced_pairs", "frequency"
BLUR_MM = (0.0, 0.25, 0.5, 1.0, 2.0)  # SD in plane
OUT = Path(__file__).parents[1] / "docs" / "results" / "distillation_evidence.json"


def fold_of(data: TrainingData, fit: np.ndarray, test: np.ndarray, arm: str = "ct_only") -> Fold:
    """Rows to fit and to predict; a few test rows are the validation rows and choose nothing."""
    return Fold(0, fit, test[:32], test, fit_normalisation(data, fit, ARMS[arm]))


def train_teachers(data: TrainingData, fit: np.ndarray, test: np.ndarray, seeds, settings) -> dict:
    """A frozen teacher by seed."""
    fold, teachers = fold_of(data, fit, test, "mr_teacher"), {}
    for seed in seeds:
        network, _ = train(data, fold, {}, None, seed, settings)
        teachers[seed] = network.requires_grad_(False)
    return teachers


def students(
    data: TrainingData, fold: Fold, losses: dict, teachers: dict, seeds: list, settings: Settings
) -> dict:
    """Mean prediction over seeds (n_test, 4) by name of the loss weights.

    `teachers[name]` is (data that the teacher sees, teacher by seed).
    """
    found = {}
    for name, loss_weights in losses.items():
        seen, by_seed = teachers.get(name, (data, {}))
        networks = []
        for seed in seeds:
            cache = TeacherCache(by_seed[seed], seen, fold, settings) if seed in by_seed else None
            networks.append(train(seen, fold, loss_weights, cache, seed, settings)[0])
        found[name] = mean_prediction(networks, data, fold.test, fold.scale)
    return found


def mean_prediction(networks: list[Network], data, rows: np.ndarray, scale: dict) -> np.ndarray:
    """Mean prediction (n, 4) of networks for rows of the data."""
    options = data, rows, scale, Settings()
    return np.mean([predict_with_sd(network, *options)[0] for network in networks], axis=0)


def calibrated_ridge(data: TrainingData, fit: np.ndarray, test: np.ndarray) -> np.ndarray:
    """Estimates (n_test, 4) of the ridge on HU statistics normalised to cortical HU."""
    x, y, subjects = data.features, data.targets, data.subjects
    return ridge_estimates(x[fit], y[fit], subjects[fit], x[test])


def at_size(
    data: TrainingData, knees: np.ndarray, test: np.ndarray, size: int, seeds: list[int]
) -> dict:
    """Test predictions of all arms trained on `size` knees; at the largest size also controls."""
    torch.set_num_threads(1)
    settings = Settings()
    fit = np.flatnonzero(data.table["knee_id"].isin(knees[:size]))
    teacher = train_teachers(data, fit, test, seeds, settings)
    plain, corrected = {NO_TEACHER: {}} | PUBLISHED, {CORRECTED: {}, CAM: CAM_MSE}
    teachers = dict.fromkeys([*PUBLISHED, CAM], (data, teacher))
    if size == SIZES[-1]:
        untrained = {}
        for seed in seeds:
            untrained[seed] = build("mr", "compact", torch.Generator().manual_seed(seed)).eval()
        order = np.arange(len(data.table))
        order[fit] = np.random.default_rng(SEED).permutation(fit)
        shifted = np.roll(data.mr, SHIFT_VOXELS, axis=(1, 2, 3))
        controls = {
            "another patch's MR": (replace(data, mr=data.mr[order]), teacher),
            "untrained teacher": (data, untrained),
            "MR shifted by 2 mm": (replace(data, mr=shifted), teacher),
        }
        for name, seen_and_teacher in controls.items():
            teachers[name] = teachers[f"{CORRECTED}, {name}"] = seen_and_teacher
            plain[name] = PUBLISHED["feature_l1"]
            corrected[f"{CORRECTED}, {name}"] = CAM_MSE
    fold, with_ridge = fold_of(data, fit, test), fold_of(data, fit, test, "ct_residual")
    found = students(data, fold, plain, teachers, seeds, settings)
    found[RIDGE] = calibrated_ridge(data, fit, test)
    return found | students(data, with_ridge, corrected, teachers, seeds, settings)


def learning(data: TrainingData, ids: np.ndarray, seeds: list[int], n_jobs: int) -> dict:
    """Learning curve, controls, and at which scanners the difference lies."""
    test = np.flatnonzero(data.table["knee_id"].isin(ids[-N_TEST:]))
    run = partial(at_size, data, ids, test, seeds=seeds)
    sizes = SIZES[::-1]  # the longest first
    with joblib.parallel_config(backend="loky", n_jobs=n_jobs, inner_max_num_threads=1):
        by_size = joblib.Parallel()(joblib.delayed(run)(size=size) for size in sizes)
    found = dict(zip(sizes, by_size, strict=True))

    curve, versus_ridge = {f"{a} vs {b}": {} for a, b in COMPARED}, {}
    for size in SIZES:
        predicted = found[size]
        for a, b in COMPARED:
            curve[f"{a} vs {b}"][str(size)] = difference(data, test, predicted[a], predicted[b])
        versus_ridge[str(size)] = difference(data, test, predicted[CAM], predicted[RIDGE])
    largest, controls = found[SIZES[-1]], {}
    for name in largest:
        if name not in {NO_TEACHER, *PUBLISHED, RIDGE, CORRECTED, CAM}:
            base = CORRECTED if name.startswith(CORRECTED) else NO_TEACHER
            controls[name] = difference(data, test, largest[name], largest[base])
    scanner = drawn_ct(ids[-N_TEST:])
    return {
        "curve": curve,
        "controls": controls,
        "losses": PUBLISHED | {CAM: CAM_MSE},
        "training_seeds": len(seeds),
        "by_kernel": thirds(data, test, largest, scanner["kernel"]),
        "by_noise": thirds(data, test, largest, scanner["noise"]),
        "versus_ridge": versus_ridge,
    }


def thirds(data: TrainingData, test: np.ndarray, found: dict, by: pd.Series) -> list[dict]:
    """What CAM distillation adds in thirds of the test knees by a property of their CT."""
    knees = data.table["knee_id"].to_numpy()[test]
    value, rows = by.loc[knees].to_numpy(), []
    edges = np.quantile(by.loc[np.unique(knees)], (0, 1 / 3, 2 / 3, 1))
    for low, high in zip(edges[:-1], edges[1:], strict=True):
        own = (value >= low) & (value <= high)
        compared = difference(data, test[own], found[CAM][own], found[CORRECTED][own])
        rows.append({"low": low, "high": high} | compared)
    return rows


class Committee(nn.Module):
    """Several teachers as one: mean prediction, mean activation maps in place of the last map."""

    def __init__(self, teachers: list[Network]) -> None:
        super().__init__()
        self.teachers = nn.ModuleList(teachers)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """(B, 2, ...) MR -> prediction (B, 4), [activation maps (B, 4, ...)]."""
        predictions, cams = [], []
        for teacher in self.teachers:
            prediction, maps = teacher(x)
            predictions.append(prediction)
            cams.append(teacher.class_activation_maps(maps[-1]))
        return torch.stack(predictions).mean(0), [torch.stack(cams).mean(0)]

    def class_activation_maps(self, last_map: torch.Tensor) -> torch.Tensor:
        """The last map holds the activation maps already."""
        return last_map


def terms(data: TrainingData, ids: np.ndarray, seeds: list[int], n_jobs: int) -> dict:
    """Difference from the student without a teacher, by term and other changes, at 80 knees."""
    settings = Settings()
    paired, ct_only = ids[: SIZES[-1]], ids[SIZES[-1] : SIZES[-1] + N_CT_ONLY]
    fit, more, test = (
        np.flatnonzero(data.table["knee_id"].isin(group))
        for group in (paired, ct_only, ids[-N_TEST:])
    )
    fold, with_ridge = fold_of(data, fit, test), fold_of(data, fit, test, "ct_residual")

    def by_seed(loss_weights, teachers=None, data=data, fold=fold, settings=settings) -> list:
        options = [
            (data, fold, loss_weights, teachers[seed] if teachers else None, seed, settings)
            for seed in seeds
        ]
        return joblib.Parallel(n_jobs)(joblib.delayed(train_one)(*option) for option in options)

    trained = by_seed({}, fold=fold_of(data, fit, test, "mr_teacher"))
    frozen = [teacher.requires_grad_(False) for teacher in trained]
    teachers = dict(zip(seeds, frozen, strict=True))
    committee = dict.fromkeys(seeds, Committee(frozen).eval())
    no_teacher = by_seed({})
    targets = data.targets.copy()  # of CT-only knees the student's own estimates, not their MR
    targets[more] = mean_prediction(no_teacher, data, more, fold.scale)
    both = np.concatenate([fit, more])
    steps = max(1, round(settings.epochs * len(fit) / len(both)))  # as many steps as without

    tried = {}
    for name, loss_weights in TERMS.items():
        tried[name] = {"loss_weights": loss_weights, "teachers": teachers}
    tried["prediction, committee"] = tried["prediction"] | {"teachers": committee}
    tried["cam_mse"] = {"loss_weights": CAM_MSE, "teachers": teachers}
    tried["cam_mse, committee"] = {"loss_weights": CAM_MSE, "teachers": committee}
    tried["no augmentation"] = {"loss_weights": {}, "settings": Settings(augment=False)}
    tried[CORRECTED] = {"loss_weights": {}, "fold": with_ridge}
    tried[CAM] = {"loss_weights": CAM_MSE, "teachers": teachers, "fold": with_ridge}
    tried[f"{CAM}, committee"] = tried[CAM] | {"teachers": committee}
    tried["CT-only knees"] = {
        "loss_weights": {},
        "data": replace(data, targets=targets),
        "fold": replace(fold, fit=both),
        "settings": Settings(epochs=steps),
    }
    about = {"n_knees": len(paired), "n_ct_only": len(ct_only), "training_seeds": len(seeds)}
    about["weights"] = {"cam_mse": CAM_MSE["cam_mse"]}
    about["weights"] |= {name: next(iter(weights.values())) for name, weights in TERMS.items()}
    found = measured("terms").get("versus_no_teacher", {})
    baseline = mean_prediction(no_teacher, data, test, fold.scale)
    found[RIDGE] = difference(data, test, calibrated_ridge(data, fit, test), baseline)
    for name, options in tried.items():
        if name not in found:
            scale = options.get("fold", fold).scale
            predicted = mean_prediction(by_seed(**options), data, test, scale)
            found[name] = difference(data, test, predicted, baseline)
            keep("terms", about | {"versus_no_teacher": found})  # an hour's work, in pieces
    return about | {"versus_no_teacher": found}


def train_one(data, fold: Fold, loss_weights: dict, teacher, seed: int, settings) -> Network:
    """`train` in a process of one thread; the network alone."""
    torch.set_num_threads(1)
    cache = TeacherCache(teacher, data, fold, settings) if teacher else None
    return train(data, fold, loss_weights, cache, seed, settings)[0]


def displaced_pairs(
    folder: Path, ids: np.ndarray, subjects: pd.DataFrame, seeds: list[int], n_jobs: int
) -> dict:
    """What a teacher adds where pairs are displaced, and how their correlation falls."""
    own, beside = ids[: SIZES[-1]], folder / "displaced"
    options = SCANS | {"displaced_mm": DISPLACED_MM}
    moved = subjects[subjects["knee_id"].isin(own)]
    displaced = scan_patches(moved, beside, options, n_jobs)
    whole = patches.load_patches(folder)
    there, evaluated = only(whole, own), only(whole, ids[-N_TEST:])
    in_place = patch_correlation(there.ct, there.mr, there.voi)
    data = prepare(joined(displaced, evaluated))
    fit, rows = np.split(np.arange(len(data.table)), [len(displaced.table)])
    with joblib.parallel_config(backend="loky", n_jobs=n_jobs, inner_max_num_threads=1):
        tasks = [joblib.delayed(with_and_without)(data, fit, rows, seed) for seed in seeds]
        by_seed = joblib.Parallel()(tasks)
    found = {name: np.mean([seed[name] for seed in by_seed], axis=0) for name in by_seed[0]}
    versus_no_teacher = {}
    for name, base in (dict.fromkeys(PUBLISHED, NO_TEACHER) | {CAM: CORRECTED}).items():
        versus_no_teacher[name] = difference(data, rows, found[name], found[base])
    return {
        "n_knees": len(own),
        "training_seeds": len(seeds),
        "largest_mm": DISPLACED_MM,
        "correlation_by_distance": by_distance(displaced),
        "in_place": {"n_patches": len(in_place), "least_correlation": in_place.min()},
        "versus_no_teacher": versus_no_teacher,
    }


def with_and_without(data: TrainingData, fit: np.ndarray, test: np.ndarray, seed: int) -> dict:
    """Predictions of students with and without a teacher."""
    torch.set_num_threads(1)
    settings, found = Settings(), {}
    teacher = train_teachers(data, fit, test, [seed], settings)
    teachers = dict.fromkeys([*PUBLISHED, CAM], (data, teacher))
    for arm, base, losses in (
        ("ct_only", NO_TEACHER, PUBLISHED),
        ("ct_residual", CORRECTED, {CAM: CAM_MSE}),
    ):
        fold = fold_of(data, fit, test, arm)
        found |= students(data, fold, {base: {}} | losses, teachers, [seed], settings)
    return found


def by_distance(data: patches.Patches) -> list[dict]:
    """Quartiles of the correlation of displaced patches, by displacement of their bone."""
    distances = []
    for knee_id, compartment in zip(data.table["knee_id"], data.table["compartment"], strict=True):
        rng = np.random.default_rng([SEED, zlib.crc32(knee_id.encode()), 10])
        shift = displacements(DISPLACED_MM, rng)[compartment.split("_")[0]]
        distances.append(np.linalg.norm(shift))
    correlation = pd.Series(patch_correlation(data.ct, data.mr, data.voi))
    rows = []
    for interval, values in correlation.groupby(pd.cut(distances, CLASSES_MM)):
        quartiles = values.quantile([0.25, 0.5, 0.75]).set_axis(["25%", "50%", "75%"])
        row = {"from_mm": interval.left, "to_mm": interval.right, "n_patches": len(values)}
        rows.append(row | quartiles.to_dict())
    return rows


def only(data: patches.Patches, knee_ids: np.ndarray) -> patches.Patches:
    """Patches of the named knees."""
    rows = np.flatnonzero(data.table["knee_id"].isin(knee_ids))
    table = data.table.iloc[rows].reset_index(drop=True)
    return patches.Patches(table, data.mr[rows], data.ct[rows], data.voi[rows])


def joined(a: patches.Patches, b: patches.Patches) -> patches.Patches:
    """Patches of both, one after the other."""
    return patches.Patches(
        table=pd.concat([a.table, b.table], ignore_index=True),
        mr=np.concatenate([a.mr, b.mr]),
        ct=np.concatenate([a.ct, b.ct]),
        voi=np.concatenate([a.voi, b.voi]),
    )


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


def oracle(data: TrainingData, run: Path, seeds: list[int]) -> dict:
    """The large-sample reference model: trained on all knees here, applied to a run's patches."""
    torch.set_num_threads(1)
    other = prepare(patches.load_patches(run / "patches"))
    arrays = {}
    for name in ("subjects", "targets", "ct", "mr", "voi", "region", "cortical_hu", "features"):
        arrays[name] = np.concatenate([getattr(data, name), getattr(other, name)])
    table = pd.concat([data.table, other.table], ignore_index=True)
    whole, n = TrainingData(table=table, **arrays), len(data.table)
    fold = fold_of(whole, np.arange(n), np.arange(n, len(table)), "ct_residual")
    settings = Settings(epochs=ORACLE_EPOCHS)
    predicted = students(whole, fold, {"ct_oracle": {}}, {}, seeds, settings)["ct_oracle"]
    rows = other.table[["knee_id", "subject_id", "patch_id"]].assign(arm="ct_oracle")
    rows[list(BIOMARKERS)] = predicted
    rows[[f"{name}_reference" for name in BIOMARKERS]] = other.targets  # to recognise the patches
    text = rows.to_csv(index=False, float_format="%.5g")
    write_text(OUT.with_name("distillation_oracle.csv"), text)
    n_knees = int(data.table["knee_id"].nunique())
    return {"n_knees": n_knees, "epochs": ORACLE_EPOCHS, "training_seeds": len(seeds)}


def frequency(run: Path) -> dict:
    """Mean ICC of a run's CT arms on its test patches with blurred CT, and differences there."""
    data, folder = prepare(patches.load_patches(run / "patches")), run / "models"
    rows, found = np.arange(len(data.table)), {}
    compared = [("ct_sma", "ct_only"), ("ct_residual", "ct_only"), ("ct_sma_plus", "ct_residual")]
    for blur_mm in BLUR_MM:
        sigma = (0, 0, *[blur_mm / spacing for spacing in patches.CT_SPACING_MM[1:]])
        ct = ndimage.gaussian_filter(data.ct, sigma, mode="nearest")
        features = ridge_features(ct, data.voi, data.cortical_hu)
        blurred = replace(data, ct=ct, features=features)
        predicted = {arm: np.zeros_like(data.targets) for pair in compared for arm in pair}
        for arm, values in predicted.items():
            records = read_records(folder, arm)
            n_seeds = len({record["seed"] for record in records})
            for record in records:
                stem = folder / f"{arm}_fold{record['fold']}_seed{record['seed']}"
                own = np.flatnonzero(np.isin(data.subjects, record["subjects"]["test"]))
                values[own] += predict(*load_model(stem), blurred, own) / n_seeds
        found[str(blur_mm)] = {
            f"{a}_vs_{b}": difference(data, rows, predicted[a], predicted[b]) for a, b in compared
        }
    return found


def difference(data: TrainingData, rows: np.ndarray, a: np.ndarray, b: np.ndarray) -> dict:
    """Mean ICC of both, their paired difference with a subject-bootstrap interval, and why.

    Also `correlation_and_error` of both: an ICC can rise by ranking or by less shrinkage.
    """
    reference, subjects = data.targets[rows], data.subjects[rows]
    rng = np.random.default_rng(SEED)
    found = agreement.bootstrap_icc_difference(reference, a, b, subjects, rng)
    for suffix, estimate in (("", a), ("_other", b)):
        iccs = [agreement.icc(reference[:, j], estimate[:, j])["icc"] for j in range(4)]
        found[f"icc{suffix}"] = np.mean(iccs)
        details = correlation_and_error(reference, estimate)
        found |= {f"{key}{suffix}": value for key, value in details.items()}
    return found | {"n_knees": len(set(subjects))}


def correlation_and_error(reference: np.ndarray, estimate: np.ndarray) -> dict[str, float]:
    """correlation, sd_ratio (SD of the estimate over the reference's) and relative_error.

    Values (n, biomarkers); each number is the mean over biomarkers.
    """
    pairs = list(zip(reference.T, estimate.T, strict=True))
    found = {"correlation": [np.corrcoef(x, y)[0, 1] for x, y in pairs]}
    found["sd_ratio"] = [y.std() / x.std() for x, y in pairs]
    found["relative_error"] = [np.mean((y - x) ** 2) / x.var() for x, y in pairs]
    return {name: float(np.mean(values)) for name, values in found.items()}


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


def measured(part: str) -> dict:
    """What was written of a part so far."""
    return json.loads(OUT.read_text()).get(part, {}) if OUT.exists() else {}


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
    parser.add_argument("--seeds", type=int, default=1, help="networks that are averaged")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--only", choices=PARTS, help="one part; the others are kept")
    given = parser.parse_args()
    subjects = draw_subjects(load_protocol(), LAST, SEED).iloc[FIRST:]
    ids = np.random.default_rng(SEED).permutation(np.unique(subjects["knee_id"].to_numpy(str)))
    needed = ids
    if given.only == "displaced_pairs":
        needed = np.r_[ids[: SIZES[-1]], ids[-N_TEST:]]
    elif given.only == "frequency":
        needed = ids[:1]
    own, seeds = subjects[subjects["knee_id"].isin(needed)], list(range(given.seeds))
    data = prepare(scan_patches(own, given.folder, SCANS, given.jobs))
    parts = {
        "oracle": partial(oracle, data, given.run, seeds),
        "knowledge": partial(knowledge, data, subjects, ids[:N_KNOWLEDGE]),
        "learning": partial(learning, data, ids, seeds, given.jobs),
        "terms": partial(terms, data, ids, seeds, given.jobs),
        "displaced_pairs": partial(displaced_pairs, given.folder, ids, subjects, seeds, given.jobs),
        "frequency": partial(frequency, given.run),
    }
    for name in [given.only] if given.only else parts:
        keep(name, parts[name]())


if __name__ == "__main__":
    main()
