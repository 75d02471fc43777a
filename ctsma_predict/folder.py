"""From CTs on disk to a folder of results each; a CT that is refused is a row with its reason."""

import os
import re
import shutil
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path

import pandas as pd
import papermill
import SimpleITK as sitk
import torch
from nbconvert import HTMLExporter

from ctsma.cache import content_hash, map_knees
from ctsma.cohort import image_path, read_manifest, read_volume, write_volume
from ctsma.cohort.dicom import is_dicom, list_images
from ctsma.common import BIOMARKERS, InputError
from ctsma.files import sha256_file, write_json, write_text

from .knee import biomarker_maps, predict_knee
from .model import ABOUT, Ensemble, load_ensemble, whole_folder

ORIGIN = ("arm", "profile", "git_commit", "simulated")  # of the model, in prediction.json
QUIET = ["--log-level=50"]  # no words on TCP and on the shutdown of the kernel
NOTEBOOK, PAGE = (Path(__file__).with_name(name) for name in ("one_ct.ipynb", "report.html.jinja"))


def listed_cts(paths: Sequence[str], side: str | None = None) -> pd.DataFrame:
    """CTs given by path, with the side as `path:L`, `path:R` or one `side` for all.

    Returns knee_id, side, ct. The knee_id is the name of the file or folder, with its folder
    where names are not unique. Raises InputError: no side, one CT twice.
    """
    rows = []
    for path in paths:
        own, given = (path[:-2], path[-1]) if path.endswith((":L", ":R")) else (path, side)
        if given not in ("L", "R"):
            remedy = "write it as PATH:L or PATH:R, or give --side L or --side R"
            raise InputError(path, "has no side", remedy)
        rows.append({"ct": str(Path(own).resolve()), "side": given})
    table = pd.DataFrame(rows)
    if table.duplicated().any():
        raise InputError("CTs", "hold one twice", "give each CT and side once")
    return table.assign(knee_id=_knee_ids(table))


def manifest_cts(manifest: str | Path, root: str | Path | None = None) -> pd.DataFrame:
    """CTs of a manifest: knee_id, side, ct, ct_labels and the listed checksum, `listed_sha256`.

    Raises InputError as `read_manifest`.
    """
    table = read_manifest(manifest, root)
    table = table[table["ct"].notna()]
    knees, folder = table.to_dict("records"), table.attrs["root"]
    found = table[["knee_id", "side"]].assign(listed_sha256=table["ct_sha256"])
    for column in ("ct", "ct_labels"):
        paths = [image_path(knee, column, folder) for knee in knees]
        found[column] = [path and str(path.resolve()) for path in paths]
    return found


def predict_cts(
    knees: pd.DataFrame,
    model: str | Path,
    out: str | Path,
    n_jobs: int = 1,
    report: Callable[..., None] | None = None,
) -> pd.DataFrame:
    """Estimate every CT and write a folder `<out>/<knee_id>/` each.

    It holds biomarkers.csv (compartments), patches.csv, prediction.json, report.html, maps of the
    biomarkers and bones.nii.gz on the grid of the CT, and joint.nii.gz, the part of the CT that was
    read.

    Parameters
    ----------
    knees : table of `listed_cts` or `manifest_cts`.
    model : model directory. Results of the same CT, side, model and code are kept.
    n_jobs : processes of one thread, one CT each.
    report : called after each CT, as by `map_knees`.

    Returns
    -------
    DataFrame, one row per CT: knee_id, n_patches, oa_probability, warnings,
    `<biomarker>_<compartment>`, seconds, error ("" when good); also written to
    `<out>/predictions.csv`. Raises InputError: the model or the folder cannot be used.
    """
    load_ensemble(model)
    model, out = Path(model).resolve(), Path(out).resolve()
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        problem = f"cannot be made a folder ({error.strerror})"
        raise InputError(out, problem, "give another --out") from error
    knees = knees.assign(ct_sha256=[_sha256(Path(path)) for path in knees["ct"]])
    parameters = {"model": str(model), "model_sha256": sha256_file(model / ABOUT)}
    records = out / "records"
    table = map_knees(predict_ct, knees, records, parameters, n_jobs=n_jobs, report=report)
    write_text(out / "predictions.csv", table.to_csv(index=False))
    return table


def predict_ct(knee: dict, folder: Path, *, model: str, model_sha256: str) -> dict:
    """Estimate one CT (for `map_knees`) and write `<folder>/../<knee_id>/` as a whole."""
    target, path = folder.parent / knee["knee_id"], Path(knee["ct"])
    shutil.rmtree(target, ignore_errors=True)  # no older result may stay beside a new error
    listed = knee.get("listed_sha256")
    if listed and path.exists() and knee["ct_sha256"] != listed:
        remedy = "restore the file or correct the checksum"
        raise InputError(path, "differs from ct_sha256 of the manifest", remedy)
    torch.set_num_threads(1)
    ensemble, ct = _cached_ensemble(model, model_sha256), read_volume(path, "CT")
    own = knee.get("ct_labels")
    labels = read_volume(own, "labels") if own else None
    found = predict_knee(ct, knee["side"], ensemble, _stated_slice_mm(path), labels)
    numbers = {
        "knee_id": knee["knee_id"],
        "side": knee["side"],
        "ct_sha256": knee["ct_sha256"],
        "ct_labels_sha256": _sha256(Path(own)) if own else None,
        "model_sha256": model_sha256,
        "model": {name: ensemble.about[name] for name in ORIGIN},
        "compartments": found.compartments.to_dict("index"),
        "oa_probability": found.oa_probability,
        "measures": found.measures,
        "warnings": found.warnings,
    }
    images = biomarker_maps(found) | {"bones": found.masks}
    joint = sitk.Cast(sitk.Round(found.joint), sitk.sitkInt16)
    with whole_folder(target) as partial:
        for name, image in images.items():
            write_volume(on_grid_of(ct, image), partial / f"{name}.nii.gz")
        write_volume(joint, partial / "joint.nii.gz")
        write_text(partial / "biomarkers.csv", found.compartments.to_csv())
        write_text(partial / "patches.csv", found.patches.to_csv(index=False))
        write_json(partial / "prediction.json", numbers)
        write_report(partial, model)
    row = {
        "n_patches": int(found.compartments["n_patches"].sum()),
        "oa_probability": found.oa_probability,
        "warnings": "; ".join(found.warnings),
    }
    for name in BIOMARKERS:
        row |= {f"{name}_{place}": value for place, value in found.compartments[name].items()}
    return row | {"files": [os.path.relpath(file, folder) for file in sorted(target.iterdir())]}


def write_report(folder: Path, model: str) -> None:
    """Run the notebook one_ct.ipynb on a folder of results; writes report.html without its code."""
    parameters = {"folder": str(folder), "model": model}
    options = {"kernel_name": "python3", "progress_bar": False, "extra_arguments": QUIET}
    source = str(NOTEBOOK).replace("{", "{{").replace("}", "}}")  # papermill fills in braces
    notebook = papermill.execute_notebook(source, None, parameters, **options)
    page = HTMLExporter(template_file=str(PAGE), exclude_input=True, exclude_anchor_links=True)
    write_text(folder / "report.html", page.from_notebook_node(notebook)[0])


def on_grid_of(ct: sitk.Image, part: sitk.Image) -> sitk.Image:
    """`part` (LPS axes, a region of `ct`) on the whole grid of `ct`, 0 elsewhere."""
    code = sitk.DICOMOrientImageFilter.GetOrientationFromDirectionCosines(ct.GetDirection())
    part = sitk.DICOMOrient(part, code)
    whole = sitk.Image(ct.GetSize(), part.GetPixelID())
    whole.CopyInformation(ct)
    first = whole.TransformPhysicalPointToIndex(part.GetOrigin())
    return sitk.Paste(whole, part, part.GetSize(), destinationIndex=first)


@lru_cache(maxsize=1)
def _cached_ensemble(model: str, model_sha256: str) -> Ensemble:
    return load_ensemble(model)


def _knee_ids(table: pd.DataFrame) -> pd.Series:
    """Names of the files or folders; where they are not unique, with folder, side and number."""
    paths = table["ct"].map(Path)
    names = paths.map(lambda path: path.name.split(".")[0] or path.name)
    with_folder = paths.map(lambda path: path.parent.name) + "-" + names
    with_number = with_folder + "-" + table["side"] + "-" + table.index.astype(str)
    for ids in (names, with_folder, with_number):
        ids = ids.map(lambda text: re.sub("[^0-9A-Za-z]+", "-", text).strip("-") or "ct")
        if ids.is_unique:
            break
    return ids


def _sha256(path: Path) -> str | None:
    """Hash of a file, or of all files of a folder; None where there is nothing."""
    if path.is_dir():
        files = [file for file in sorted(path.iterdir()) if file.is_file()]
        return content_hash([(file.name, sha256_file(file)) for file in files])
    return sha256_file(path) if path.is_file() else None


def _stated_slice_mm(path: Path) -> float:
    """Thickest slice that a CT's DICOM states, which counts where slices overlap; else 0."""
    if path.is_file() and not is_dicom(path):
        return 0.0
    return max(float(image["SliceThickness"] or 0) for image in list_images(path, "CT"))
