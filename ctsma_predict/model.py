"""The model directory: what a finished run exports, and what a prediction loads after checking it.

It holds the networks of all folds (safetensors and their records), model.json with everything else,
the out-of-distribution detector, estimates to check the networks with, and a model card.
"""

import json
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import SimpleITK as sitk
from jinja2 import StrictUndefined, Template
from numpy import ndarray
from safetensors.numpy import load_file, save_file
from scipy.ndimage import gaussian_filter
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from ctsma.cache import content_hash
from ctsma.cohort import read_knee_volume, read_manifest, splits_path
from ctsma.common import BIOMARKERS, BONES, LABELS, InputError
from ctsma.diagnosis import compartment_means
from ctsma.distillation import MAIN_ARM, load_model, predict, prepare
from ctsma.files import sha256_file, write_json, write_text
from ctsma.models import Network
from ctsma.parallel import run_tasks
from ctsma.patches import CT_SHAPE, MR_SHAPE, Patches, load_patches

from . import limits
from .conformal import conformal_radius, cross_conformal

SCHEMA_VERSION = 2
CARD, ABOUT = "MODEL_CARD.md", "model.json"
CHECK, DETECTOR = "check.safetensors", "out_of_distribution.safetensors"
TOLERANCE = 1e-3  # relative: float32 differs less between processors (design choice)
LEVEL = 0.90  # of the intervals, as in the study
ORIGIN = ("profile", "seed", "protocol_sha256", "manifest_sha256", "git_commit", "packages")
OTHER_ARMS = ("hu_regression", "hu_regression_calibrated", "ct_only")  # shown beside it in the card
KEPT = ("arm", "role", "fold", "seed", "loss_weights", "scale", "settings", "weights_sha256")
CHECK_HU, CHECK_SD_HU, CHECK_CORTICAL_HU = (250.0, 350.0, 450.0, 600.0), 150.0, 1400.0  # like bone
COPY_AGAIN = "copy or export the model again"


@dataclass(frozen=True)
class Ensemble:
    """A loaded model directory.

    about : content of model.json. members : networks with their records. detector : of training.
    """

    about: dict
    members: list[tuple[Network, dict]]
    detector: limits.OutOfDistribution


def load_ensemble(folder: str | Path) -> Ensemble:
    """Load a model directory and check that it gives the estimates stored with it.

    Raises InputError as `read_about`, and where the networks do not fit this version of ctsma or
    give other estimates.
    """
    folder, about = Path(folder), read_about(folder)
    try:
        members = [load_model(folder / name) for name in about["members"]]
    except (RuntimeError, TypeError, KeyError) as error:
        problem = "holds networks of another architecture than those of this version"
        remedy = f"use ctsma of commit {about['git_commit'][:12]}, or export the model again"
        raise InputError(folder, problem, remedy) from error
    check = load_file(folder / CHECK)
    found = estimate(members, check["ct"].astype(np.float32), check["voi"], check["cortical_hu"])
    if not np.allclose(found, check["estimate"], rtol=TOLERANCE, atol=0):
        worst = np.abs(found / check["estimate"] - 1).max()
        problem = f"gives estimates {100 * worst:.2g} % away from those stored with it"
        raise InputError(folder, problem, f"use the package versions that {ABOUT} lists")
    return Ensemble(about, members, limits.OutOfDistribution(**load_file(folder / DETECTOR)))


def read_about(folder: str | Path) -> dict:
    """Content of model.json, after checking it and every file that it names.

    Raises InputError: no model there, of another version, or a file damaged, changed or missing.
    """
    path = Path(folder) / ABOUT
    if not path.is_file():
        remedy = "give a folder that ctsma export-model wrote"
        raise InputError(folder, f"holds no model ({ABOUT})", remedy)
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
        version, stated = about["schema_version"], about.pop("content_sha256")
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(path, "is damaged", COPY_AGAIN) from error
    if version != SCHEMA_VERSION:
        problem = f"has schema version {version}, not {SCHEMA_VERSION}"
        raise InputError(path, problem, "export the model again with this version of ctsma")
    if stated != content_hash(about):
        raise InputError(path, "was changed since the export", COPY_AGAIN)
    for name, sha256 in about["files"].items():
        file = path.with_name(name)
        if not file.is_file() or sha256_file(file) != sha256:
            raise InputError(
                file, f"is missing or differs from its checksum in {ABOUT}", COPY_AGAIN
            )
    return about


def estimate(
    members: Sequence[tuple[Network, dict]], ct: ndarray, voi: ndarray, cortical_hu: ndarray
) -> ndarray:
    """Biomarkers (n, 4) in their own units from CT patches: the mean over the members.

    Parameters
    ----------
    members : networks with their records, as of `distillation.load_model`.
    ct : (n, 12, 24, 24) HU. voi : (n, 12, 48, 48) bool, trabecular bone.
    cortical_hu : (n,) HU of the knee's own cortex, mean of femur and tibia.
    """
    table = pd.DataFrame(dict.fromkeys(BIOMARKERS, 0.0), index=range(len(ct)))  # no reference
    table[["knee_id", "subject_id"]] = ""
    for bone in BONES:
        table[f"cortical_hu_{bone}"] = cortical_hu
    data = prepare(Patches(table, np.zeros(voi.shape, np.float16), ct, voi))
    rows = np.arange(len(ct))
    return np.mean([predict(network, record, data, rows) for network, record in members], axis=0)


def export_model(
    run: str | Path, folder: str | Path, arm: str = MAIN_ARM, seed: int = 0, n_jobs: int = 1
) -> Path:
    """Write the networks of one arm and training seed, all folds, as a model directory.

    Parameters
    ----------
    run : folder of a run whose five notebooks have finished.
    folder : model directory to write; an older one there is replaced, anything else is refused.
    arm, seed : which networks. Intervals and OA model come from the arm's out-of-fold predictions.
    n_jobs : processes that measure the training CTs.

    The same run gives the same bytes. Images and subject identifiers are not exported. Returns
    `folder`. Raises InputError: an arm without networks, an unfinished run, a folder with other
    content.
    """
    run, folder = Path(run), Path(folder)
    if folder.exists() and not (folder / ABOUT).is_file():
        raise InputError(folder, "exists and holds no model", "give a new folder")
    cohort, agreement = _read_results(run, "cohort"), _read_results(run, "agreement")
    diagnosis = _read_results(run, "diagnosis")
    manifest = read_manifest(run / cohort["manifest"], run / cohort["root"])
    text = {"knee_id": "str", "subject_id": "str"}
    predictions = pd.read_csv(run / "models" / "predictions.csv", dtype=text)
    if arm not in set(predictions["arm"]):
        choice = ", ".join(predictions["arm"].unique())
        raise InputError("arm", f"{arm!r} is not in the run", f"choose among {choice}")
    predictions = predictions[predictions["arm"] == arm]
    means = compartment_means(predictions)
    data = load_patches(run / "patches")
    detector = limits.fit_out_of_distribution(data.ct[:].astype(np.float32), data.voi[:])
    tasks, root = [], manifest.attrs["root"]
    for knee_id, rows in data.table.groupby("knee_id").indices.items():
        knee = manifest[manifest["knee_id"] == knee_id].iloc[0].to_dict()
        patches = data.ct[rows], data.voi[rows]
        tasks.append((knee, root, run, *patches, detector))
    measures = pd.DataFrame(run_tasks(_measure_ct, tasks, n_jobs))
    with whole_folder(folder) as partial:
        members, record = _copy_networks(run, partial, arm, seed)
        save_file(vars(detector), partial / DETECTOR)
        save_file(_check_estimates(partial, members), partial / CHECK)
        about = {
            "schema_version": SCHEMA_VERSION,
            "arm": arm,
            "training_seed": seed,
            "members": members,
            **{name: agreement[name] for name in ORIGIN},
            "splits_sha256": sha256_file(splits_path(manifest.attrs["path"])),
            "simulated": bool(cohort.get("simulated")),
            "settings": record["settings"],
            "loss_weights": record["loss_weights"],
            "n_patches": len(predictions),
            "n_knees": predictions["knee_id"].nunique(),
            "n_subjects": predictions["subject_id"].nunique(),
            "metrics": _metrics(arm, agreement, diagnosis),
            "intervals": intervals(predictions),
            "oa": oa_model(means, manifest),
            "reference_percentiles": reference_percentiles(means),
            "limits": limits.fit_limits(measures),
            "files": {file.name: sha256_file(file) for file in sorted(partial.iterdir())},
        }
        about = json.loads(write_json(partial / ABOUT, about).read_text("utf-8"))
        write_json(partial / ABOUT, about | {"content_sha256": content_hash(about)})
        write_text(partial / CARD, model_card(about))
    return folder


def intervals(predictions: pd.DataFrame) -> dict:
    """Conformal radii at 90 % for one patch and for a compartment's mean, with their coverage.

    The residuals are those of networks that never saw the subject. Coverage is counted with the
    radii of the other folds.
    """
    columns = [*BIOMARKERS, *(f"{name}_reference" for name in BIOMARKERS)]
    means = predictions.groupby(["knee_id", "fold", "compartment"], as_index=False)[columns].mean()
    found = {"level": LEVEL, "patch": {}, "compartment": {}}
    for unit, table in (("patch", predictions), ("compartment", means)):
        for name in BIOMARKERS:
            reference, given = table[f"{name}_reference"], table[name]
            radius = conformal_radius(np.abs(reference - given), LEVEL)
            covered = cross_conformal(reference, given, table["fold"], level=LEVEL)["covered"]
            coverage = float(covered.mean())
            found[unit][name] = {"radius": radius, "coverage": coverage, "n": len(table)}
    return found


def oa_model(means: pd.DataFrame, manifest: pd.DataFrame) -> dict | None:
    """Logistic regression (ridge, C = 1) of OA on the knees' compartment means, as numbers.

    It is the model whose cross-validated AUC the study reports, fitted to all labelled knees. None
    without at least two knees of each label. `means` as of `compartment_means`.
    """
    labels = manifest.set_index("knee_id")["oa"].reindex(means.index).dropna().astype(int)
    n_oa = int(labels.sum())
    if min(n_oa, len(labels) - n_oa) < 2:
        return None
    features = means.loc[labels.index].drop(columns="subject_id")
    imputer, scaler = SimpleImputer(keep_empty_features=True), StandardScaler()
    logistic = LogisticRegression()
    make_pipeline(imputer, scaler, logistic).fit(features.to_numpy(), labels)
    terms = pd.DataFrame({"coefficient": logistic.coef_[0]}, index=features.columns)
    terms["imputed"], terms["mean"], terms["sd"] = imputer.statistics_, scaler.mean_, scaler.scale_
    numbers = {"intercept": float(logistic.intercept_[0]), "n_knees": len(labels), "n_oa": n_oa}
    return numbers | {"features": terms.to_dict("index")}


def reference_percentiles(means: pd.DataFrame) -> dict[str, list[float]]:
    """Percentiles 0, 5, ... 100 of the training knees by `<biomarker>_<compartment>`."""
    return means.drop(columns="subject_id").quantile(np.linspace(0, 1, 21)).to_dict("list")


def model_card(about: dict) -> str:
    """Markdown of the model card (Mitchell 2019): what a model is for, reached and refuses."""
    text = Path(__file__).with_name("model_card.md.jinja").read_text(encoding="utf-8")
    template = Template(text, trim_blocks=True, undefined=StrictUndefined)
    labels = {name: LABELS[name] for name in BIOMARKERS}
    return template.render(about, measures=limits.MEASURES, labels=labels)


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """Give a temporary folder that replaces `target` at the end; after an error it is removed."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=target.parent))
    try:
        yield partial
        partial.chmod(0o755)
        for file in partial.iterdir():
            file.chmod(0o644)
        shutil.rmtree(target, ignore_errors=True)
        partial.replace(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _read_results(run: Path, stage: str) -> dict:
    path = run / "results" / f"{stage}.json"
    if not path.exists():
        raise InputError(path, "does not exist", "export from a run whose notebooks have finished")
    return json.loads(path.read_text(encoding="utf-8"))


def _copy_networks(run: Path, folder: Path, arm: str, seed: int) -> tuple[list[str], dict]:
    """Copy the networks of all folds; returns their names and the last record."""
    stems = sorted(f.with_suffix("") for f in run.glob(f"models/{arm}_fold*_seed{seed}.json"))
    if not stems:
        problem = f"holds no network {arm} of seed {seed}"
        raise InputError(run / "models", problem, "choose another arm or seed")
    for stem in stems:
        record = load_model(stem)[1]
        kept = {name: record[name] for name in KEPT}  # no subject identifiers
        # float32 on the CPU, so that every computer can check the stored estimates
        kept["settings"] = record["settings"] | {"device": "cpu", "precision": "float32"}
        write_json(folder / f"{stem.name}.json", kept)
        shutil.copyfile(f"{stem}.safetensors", folder / f"{stem.name}.safetensors")
    return [stem.name for stem in stems], kept


def _check_estimates(folder: Path, members: list[str]) -> dict[str, ndarray]:
    """Estimates on smooth noise, to compare with at every load; no image is exported."""
    noise = np.random.default_rng(0).standard_normal((len(CHECK_HU), *CT_SHAPE))
    noise = gaussian_filter(noise, (0, 0, 1, 1))
    ct = np.reshape(CHECK_HU, (-1, 1, 1, 1)) + CHECK_SD_HU * noise / noise.std()
    voi, cortical_hu = np.ones((len(ct), *MR_SHAPE), bool), np.full(len(ct), CHECK_CORTICAL_HU)
    networks = [load_model(folder / name) for name in members]
    check = {"ct": ct.astype(np.float32), "voi": voi, "cortical_hu": cortical_hu}
    return check | {"estimate": estimate(networks, **check)}


def _metrics(arm: str, agreement: dict, diagnosis: dict) -> dict:
    """What the study reports of this arm and of the arms that it is compared with."""
    icc, logistic = agreement["icc"], f"{arm}, logistic"
    others = [other for other in OTHER_ARMS if other in icc and other != arm]
    return {
        "icc": icc[arm],
        "mean_icc_of_other_arms": {other: icc[other]["mean"] for other in others},
        "icc_truth": agreement.get("icc_truth", {}).get(arm),
        "ceiling": agreement.get("ceiling"),
        "auc": diagnosis.get("auc", {}).get(arm),
        "oa_auc": diagnosis.get("comparators", {}).get(logistic),
        "oa_calibration": diagnosis.get("calibration", {}).get(logistic),
    }


def _measure_ct(
    knee: dict, root: str, run: Path, hu: ndarray, voi: ndarray, detector
) -> dict[str, float]:
    """Measures of a training CT; hu and voi are its patches."""
    masks = sitk.ReadImage(str(run / "registration" / f"{knee['knee_id']}_mask.nii.gz"))
    measures = limits.scan_measures(read_knee_volume(knee, "ct", root), masks)
    return measures | limits.patch_measures(hu.astype(np.float32), voi, detector)
