"""From a finished run to a model directory that anybody can use and check: networks, calibration, limits, a card."""

import json
import shutil
import tempfile
from pathlib import Path

import joblib
import numpy as np
import pandas as pd
import SimpleITK as sitk
from numpy import ndarray
from safetensors.numpy import save_file
from scipy.ndimage import gaussian_filter
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from ctsma import cohort
from ctsma.agreement import conformal_radius, cross_conformal
from ctsma.cohort import BIOMARKERS, COMPARTMENTS, InputFault, Run, sha256_file, write_json
from ctsma.diagnosis import compartment_means
from ctsma.distillation import load_model
from ctsma.patches import CT_SHAPE, MR_SHAPE, Patches, load_patches

from .card import model_card
from .ensemble import ABOUT, CARD, CHECK, FAMILIAR, SCHEMA_VERSION, estimate
from .limits import Familiar, familiar_of, limits_of, patch_measures, scan_measures

LEVEL = 0.90  # of the intervals; the study's own
PERCENTILES = np.arange(0, 101, 5)
CHECK_MEANS_HU, CHECK_SD_HU = (250.0, 350.0, 450.0, 600.0), 150.0  # patches of noise, about bone's HU (our choice)
CHECK_SIGMAS, CHECK_RULER_HU = (0.7, 1.0, 1.5, 2.0), 1400.0  # their smoothness in pixels; ruler (our choice)
KEPT = ("key", "arm", "role", "fold", "seed", "recipe", "scale", "validation_mse", "protocol_sha256", "packages")
KEPT += ("weights_sha256",)
KEY = ["knee_id", "patch_id"]


def export_model(run: str | Path, folder: str | Path, arm: str = "ct_sma_plus", seed: int = 0, n_jobs: int = 1) -> Path:
    """Write the networks of one arm and seed, all folds, as a model directory; the same run gives the same bytes.

    Parameters
    ----------
    run : folder of a run whose five notebooks are done.
    folder : model directory to write; an older one there is replaced, anything else refused.
    arm, seed : which networks; the intervals and the OA model come from the arm's out-of-fold estimates.
    n_jobs : processes that measure the training CTs.

    Returns `folder`. Raises InputFault: an arm without networks, an unfinished run, a folder with other content.
    Subject ids and images stay behind.
    """
    folder = Path(folder)
    if folder.exists() and not (folder / ABOUT).is_file():
        raise InputFault(folder, "exists and holds no model", "give a new folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=folder.parent))
    try:
        _write(Run(Path(run), "", 0), partial, arm, seed, n_jobs)
        partial.chmod(0o755)
        shutil.rmtree(folder, ignore_errors=True)
        partial.replace(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def _write(run: Run, folder: Path, arm: str, seed: int, n_jobs: int) -> None:
    first, agreement, diagnosis = (run.results(stage) for stage in ("cohort", "agreement", "diagnosis"))
    found, manifest = out_of_fold(run, arm), run.manifest()
    members, record = _copy_members(run, folder, arm, seed)
    data = load_patches(run.path / "patches")
    familiar = familiar_of(data.ct.astype(np.float32), data.voi)
    save_file({"centre": familiar.centre, "whitening": familiar.whitening}, folder / FAMILIAR)
    _write_check(folder, members)
    heads = ("profile", "seed", "protocol_sha256", "manifest_sha256", "git_commit")
    about = {"schema_version": SCHEMA_VERSION, "arm": arm, "member_seed": seed, "members": [m.name for m in members]}
    about |= {name: agreement[name] for name in heads} | {"simulated": bool(first.get("simulated"))}
    about |= {"splits_sha256": sha256_file(cohort.splits_path(manifest.attrs["path"])), "packages": record["packages"]}
    about |= {"settings": record["settings"], "recipe": record["recipe"], "training": _training(run, found, agreement)}
    about |= {"metrics": _metrics(arm, agreement, diagnosis), "intervals": intervals(found)}
    about |= {"oa": oa_model(found, manifest), "compartments": _distribution(found)}
    about["limits"] = limits_of(_training_measures(run, manifest, data, familiar, n_jobs))
    about["files"] = {file.name: sha256_file(file) for file in sorted(folder.iterdir())}
    plain = json.loads(write_json(folder / ABOUT, about).read_text())
    write_json(folder / ABOUT, plain | {"content_sha256": cohort.content_key(plain)})
    cohort.write_text(folder / CARD, model_card(plain))


def out_of_fold(run: Run, arm: str) -> pd.DataFrame:
    """Out-of-fold estimates of an arm, mean over seeds, beside `<biomarker>_reference`: one row a usable patch."""
    text = dict.fromkeys(("knee_id", "subject_id"), "str")
    rows = pd.read_csv(run.path / "models" / "predictions.csv", dtype=text)
    data = load_patches(run.path / "patches").table[[*KEY, "compartment", *BIOMARKERS]]
    arms, rows = rows["arm"].unique(), rows[rows["arm"] == arm]
    if rows.empty:
        raise InputFault("arm", f"{arm!r} is not in the run", f"choose among {', '.join(arms)}")
    mean = rows.groupby([*KEY, "subject_id", "fold"], as_index=False)[list(BIOMARKERS)].mean()
    return mean.merge(data, on=KEY, suffixes=("", "_reference"), validate="one_to_one")


def intervals(found: pd.DataFrame) -> dict:
    """Conformal radii at 90 % of one patch and of a compartment's mean, with the coverage reached on other folds.

    `found` as of `out_of_fold`. The residuals are those of networks that never saw the subject; the ensemble of all
    folds errs no more on average, so that its intervals are rather too wide. Patches of one knee depend on each other.
    """
    references = [f"{name}_reference" for name in BIOMARKERS]
    group = ["knee_id", "fold", "compartment"]
    frames = {"patch": found, "compartment": found.groupby(group, as_index=False)[[*BIOMARKERS, *references]].mean()}
    result = {"level": LEVEL}
    for unit, frame in frames.items():
        result[unit] = {name: _interval(frame, name) for name in BIOMARKERS}
    return result


def _interval(frame: pd.DataFrame, name: str) -> dict:
    reference, given = frame[f"{name}_reference"], frame[name]
    covered = cross_conformal(reference, given, frame["fold"], level=LEVEL)["covered"]
    radius = conformal_radius(np.abs(reference - given), LEVEL)
    return {"radius": radius, "coverage": float(covered.mean()), "n": len(frame)}


def oa_model(found: pd.DataFrame, manifest: pd.DataFrame) -> dict | None:
    """Logistic regression (ridge, C = 1) of the OA label on compartment means of out-of-fold estimates, as numbers.

    The same model whose cross-validated AUC the study reports, here fitted on all labelled knees. None without at
    least two knees of each label.
    """
    labels = manifest.set_index("knee_id")["oa"].dropna()
    means = compartment_means(found).drop(columns="subject_id")
    labels = labels[labels.index.isin(means.index)].astype(int)
    if min((labels == 0).sum(), (labels == 1).sum()) < 2:
        return None
    steps = SimpleImputer(keep_empty_features=True), StandardScaler(), LogisticRegression()
    make_pipeline(*steps).fit(means.loc[labels.index].to_numpy(), labels)
    imputer, scaler, logistic = steps
    numbers = {"fill": imputer.statistics_, "mean": scaler.mean_, "sd": scaler.scale_, "weight": logistic.coef_[0]}
    features = {name: dict(zip(numbers, row, strict=True)) for name, *row in zip(means, *numbers.values(), strict=True)}
    return {
        "features": features,
        "intercept": float(logistic.intercept_[0]),
        "n_knees": len(labels),
        "n_oa": int(labels.sum()),
    }


def _copy_members(run: Run, folder: Path, arm: str, seed: int) -> tuple[list[Path], dict]:
    stems = sorted(file.with_suffix("") for file in (run.path / "models").glob(f"{arm}_fold*_seed{seed}.json"))
    if not stems:
        raise InputFault(run.path / "models", f"holds no network {arm} of seed {seed}", "choose another arm or seed")
    for stem in stems:
        record = load_model(stem)[1]
        # Any processor must give the numbers of the check, so float32; subject ids are nobody's business.
        settings = record["settings"] | {"device": "cpu", "precision": "float32"}
        kept = {name: record[name] for name in KEPT if name in record} | {"settings": settings}
        write_json(folder / f"{stem.name}.json", kept)
        shutil.copyfile(f"{stem}.safetensors", folder / f"{stem.name}.safetensors")
    return [folder / stem.name for stem in stems], kept


def _write_check(folder: Path, members: list[Path]) -> None:
    """Estimates to compare with at every load, on patches of smooth noise: no image of a patient goes along."""
    rng = np.random.default_rng(0)
    noise = np.stack([gaussian_filter(rng.standard_normal(CT_SHAPE), (0, s, s)) for s in CHECK_SIGMAS])
    noise *= CHECK_SD_HU / noise.std(axis=(1, 2, 3), keepdims=True)
    ct = (np.reshape(CHECK_MEANS_HU, (-1, 1, 1, 1)) + noise).astype(np.float16)
    voi, ruler = np.ones((len(ct), *MR_SHAPE), bool), np.full(len(ct), CHECK_RULER_HU)
    found = estimate([load_model(stem) for stem in members], ct.astype(np.float32), voi, ruler)
    save_file({"ct": ct, "voi": voi, "ruler_hu": ruler, "estimate": found.astype(np.float64)}, folder / CHECK)


def _training(run: Run, found: pd.DataFrame, agreement: dict) -> dict:
    notebook = json.loads((run.path / "notebooks" / "03_distillation_training.ipynb").read_text(encoding="utf-8"))
    given = notebook["metadata"]["papermill"]["parameters"]
    parameters = {name: value for name, value in sorted(given.items()) if name not in ("run_dir", "n_jobs", "profile")}
    command = f"ctsma run --profile {agreement['profile']} --seed {agreement['seed']}"
    sizes = {"n_knees": found["knee_id"].nunique(), "n_subjects": found["subject_id"].nunique()}
    return sizes | {"n_patches": len(found), "command": command, "parameters": parameters}


def _metrics(arm: str, agreement: dict, diagnosis: dict) -> dict:
    """What the study reports of this arm, and of those beside it that a user should know of; nothing is computed."""
    beside = [
        name for name in ("hu_regression", "ruler_regression", "ct_only") if name in agreement["icc"] and name != arm
    ]
    metrics = {"icc": agreement["icc"][arm], "icc_beside": {name: agreement["icc"][name]["mean"] for name in beside}}
    metrics |= {"icc_truth": agreement.get("icc_truth", {}).get(arm), "ceiling": agreement.get("ceiling")}
    metrics |= {"auc": diagnosis.get("auc", {}).get(arm)}
    logistic = f"{arm}, logistic"
    metrics |= {"oa_auc": diagnosis.get("comparators", {}).get(logistic)}
    return metrics | {"oa_calibration": diagnosis.get("calibration", {}).get(logistic)}


def _distribution(found: pd.DataFrame) -> dict:
    """Percentiles 0, 5, ... 100 of the training knees' compartment means, by compartment and biomarker."""
    means = compartment_means(found)
    return {
        place: {name: _percentiles(means[f"{name}_{place}"].dropna().to_numpy()) for name in BIOMARKERS}
        for place in COMPARTMENTS
    }


def _percentiles(values: ndarray) -> list[float]:
    return np.percentile(values, PERCENTILES).tolist() if len(values) else []


def _training_measures(
    run: Run, manifest: pd.DataFrame, data: Patches, familiar: Familiar, n_jobs: int
) -> pd.DataFrame:
    knees = manifest[manifest["knee_id"].isin(data.table["knee_id"])].to_dict("records")
    folder, root = run.path / "registration", manifest.attrs["root"]
    with joblib.parallel_config(backend="loky", n_jobs=n_jobs, inner_max_num_threads=1):
        scans = joblib.Parallel()(joblib.delayed(_knee_measures)(knee, root, folder) for knee in knees)
    places = data.table.groupby("knee_id").indices
    rows = [places[knee["knee_id"]] for knee in knees]
    patches = [patch_measures(data.ct[i].astype(np.float32), data.voi[i], familiar) for i in rows]
    return pd.DataFrame([scan | patch for scan, patch in zip(scans, patches, strict=True)])


def _knee_measures(knee: dict, root: str, folder: Path) -> dict[str, float]:
    masks = sitk.ReadImage(str(folder / f"{knee['knee_id']}_mask.nii.gz"))
    return scan_measures(cohort.read_knee_volume(knee, "ct", root), masks)
