"""From CTs on disk to a folder of results each: resumed, whole or not at all, one bad CT a row with its reason."""

import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import pandas as pd
import pydicom
import SimpleITK as sitk
import torch

from ctsma import cohort
from ctsma.cohort import BIOMARKERS, COMPARTMENTS, InputFault, sha256_file, write_text

from .ensemble import ABOUT, Ensemble, load_ensemble
from .knee import Knee, biomarker_maps, predict_knee
from .page import knee_page

SIDES = ("L", "R")


def listed_cts(paths: Sequence[str], side: str | None = None) -> pd.DataFrame:
    """CTs given by path, with the side as `path:L`, `path:R` or one `side` for all: knee_id, side, ct.

    knee_id is the file's or folder's name, with as many parent folders before it as make it unique. InputFault: no
    side, one CT twice.
    """
    parted = [(path[:-2], path[-1]) if path[-2:] in (":L", ":R") else (path, side) for path in paths]
    for path, found in parted:
        if found not in SIDES:
            raise InputFault(path, "has no side", "write it as PATH:L or PATH:R, or give --side L or --side R")
    whole = [Path(path).resolve() for path, _ in parted]
    if len({(path, side) for path, (_, side) in zip(whole, parted, strict=True)}) < len(whole):
        raise InputFault("CTs", "hold one twice", "give each CT and side once")
    rows = [{"ct": str(path), "side": found} for path, (_, found) in zip(whole, parted, strict=True)]
    return pd.DataFrame(rows).assign(knee_id=_names(whole, [found for _, found in parted]))


def manifest_cts(manifest: str | Path, root: str | Path | None = None) -> pd.DataFrame:
    """CTs of a manifest: knee_id, side, ct and the checksum it lists, as `listed_sha256`; faults of `read_manifest`."""
    table = cohort.read_manifest(manifest, root)
    table = table[table["ct"].notna()]
    paths = [str(cohort.image_path(knee, "ct", table.attrs["root"]).resolve()) for knee in table.to_dict("records")]
    return table[["knee_id", "side"]].assign(ct=paths, listed_sha256=table["ct_sha256"])


def predict_cts(
    knees: pd.DataFrame,
    model: str | Path,
    out: str | Path,
    n_jobs: int = 1,
    report: Callable[[str], None] | None = None,
) -> pd.DataFrame:
    """Estimate every CT and write `<out>/<knee_id>/`: biomarkers.csv, patches.csv, prediction.json, report.html, maps.

    Parameters
    ----------
    knees : knee_id, side, ct (path), and `listed_sha256` where a checksum is known; of `listed_cts` or `manifest_cts`.
    model : model directory. A CT whose results are there, of the same content, side, model and code, is left alone.
    n_jobs : processes of one thread, one CT each. report : called with one line a CT.

    Returns
    -------
    DataFrame, one row a CT: knee_id, n_patches, oa_probability, warnings, `<biomarker>_<compartment>`, seconds, error
    ("" when good); also written as `<out>/predictions.csv`. InputFault: the model or the folder cannot be used.
    """
    load_ensemble(model)
    out = _folder(out)
    rows = knees.assign(ct_sha256=[_content(Path(path)) for path in knees["ct"]])
    parameters = {"model": str(Path(model).resolve()), "model_sha256": sha256_file(Path(model) / ABOUT)}
    found = cohort.map_knees(predict_ct, rows, out / "records", parameters, n_jobs=n_jobs, report=report)
    write_text(out / "predictions.csv", found.to_csv(index=False))
    return found


def predict_ct(knee: dict, folder: Path, *, model: str, model_sha256: str) -> dict:
    """Estimate one CT (for `map_knees`); results go to `../<knee_id>/`, all of them or none."""
    target = Path(folder).parent / knee["knee_id"]
    shutil.rmtree(target, ignore_errors=True)  # what an older CT or model gave must not stay under a new fault
    if knee.get("listed_sha256") and Path(knee["ct"]).is_file() and knee["listed_sha256"] != knee["ct_sha256"]:
        raise InputFault(knee["ct"], "differs from ct_sha256 of the manifest", "restore the file or correct the sum")
    torch.set_num_threads(1)
    ensemble, ct = _loaded(model, model_sha256), cohort.read_volume(knee["ct"], "CT")
    found = predict_knee(ct, knee["side"], ensemble, _stated_slice_mm(Path(knee["ct"])))
    partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=target.parent))
    try:
        _write(partial, knee, ct, found, ensemble, model_sha256)
        partial.chmod(0o755)
        partial.replace(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    numbers = {f"{b}_{c}": float(found.compartments.loc[c, b]) for b in BIOMARKERS for c in COMPARTMENTS}
    head = {"n_patches": int(found.compartments["n_patches"].sum()), "oa_probability": found.oa_probability}
    files = [os.path.relpath(file, folder) for file in sorted(target.iterdir())]
    return head | {"warnings": "; ".join(found.warnings)} | numbers | {"files": files}


def _write(folder: Path, knee: dict, ct: sitk.Image, found: Knee, ensemble: Ensemble, model_sha256: str) -> None:
    maps = biomarker_maps(found)
    for name, image in maps.items():
        cohort.write_volume(on_whole_grid(image, ct), folder / f"{name}.nii.gz")
    cohort.write_volume(on_whole_grid(found.masks, ct), folder / "bones.nii.gz")
    write_text(folder / "biomarkers.csv", found.compartments.to_csv())
    write_text(folder / "patches.csv", found.patches.to_csv(index=False))
    about = ensemble.about
    origin = {"arm": about["arm"], "profile": about["profile"], "sha256": model_sha256, "commit": about["git_commit"]}
    oa = about["metrics"]["oa_auc"]
    numbers = {"schema_version": 1, "knee_id": knee["knee_id"], "side": knee["side"], "ct_sha256": knee["ct_sha256"]}
    numbers |= {"model": origin | {"simulated": about["simulated"]}, "interval_level": about["intervals"]["level"]}
    numbers |= {"compartments": found.compartments.to_dict("index"), "warnings": found.warnings}
    numbers |= {"oa": {"probability": found.oa_probability, "auc": oa}, "measures": found.measures}
    cohort.write_json(folder / "prediction.json", numbers)
    write_text(folder / "report.html", knee_page(numbers, found, maps, about))


def on_whole_grid(part: sitk.Image, whole: sitk.Image) -> sitk.Image:
    """`part` (LPS axes, a region of `whole`) on the grid of `whole`, 0 elsewhere."""
    code = sitk.DICOMOrientImageFilter.GetOrientationFromDirectionCosines(whole.GetDirection())
    canvas = sitk.Image(whole.GetSize(), part.GetPixelID())
    canvas.CopyInformation(whole)
    canvas = sitk.DICOMOrient(canvas, "LPS")
    first = canvas.TransformPhysicalPointToIndex(part.GetOrigin())
    image = sitk.DICOMOrient(sitk.Paste(canvas, part, part.GetSize(), destinationIndex=first), code)
    image.CopyInformation(whole)  # the same grid; turning it twice left rounding in the header
    return image


@lru_cache(maxsize=1)
def _loaded(model: str, model_sha256: str) -> Ensemble:
    return load_ensemble(model)


def _names(paths: Sequence[Path], sides: Sequence[str]) -> list[str]:
    stems = [[*path.parts[1:-1], path.name.split(".")[0] or path.name] for path in paths]
    for depth in range(1, max(map(len, stems)) + 1):
        names = ["-".join(parts[-depth:]) for parts in stems]
        names = ["".join(c if c.isascii() and c.isalnum() else "-" for c in name).strip("-") or "ct" for name in names]
        if len(set(names)) == len(names):
            return names
    return [f"{name}-{side}-{n}" for n, (name, side) in enumerate(zip(names, sides, strict=True))]


def _content(path: Path) -> str | None:
    """Hash of a file, or of all files of a folder; None where there is nothing, which reading will say."""
    if path.is_dir():
        return cohort.content_key([(file.name, sha256_file(file)) for file in sorted(path.iterdir()) if file.is_file()])
    return sha256_file(path) if path.is_file() else None


def _folder(out: str | Path) -> Path:
    try:
        Path(out).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputFault(out, f"cannot be made a folder ({error.strerror})", "give another --out") from error
    return Path(out)


def _stated_slice_mm(path: Path) -> float:
    """Slice thickness that a DICOM series states: slices may overlap. 0 for other files."""
    if not path.is_dir():
        return 0.0
    tags = ["SliceThickness"]
    files = [file for file in sorted(path.iterdir()) if file.is_file()]
    stated = [pydicom.dcmread(f, stop_before_pixels=True, specific_tags=tags, force=True) for f in files[:1]]
    return float(np.nan_to_num(float(getattr(stated[0], "SliceThickness", None) or 0.0)))
