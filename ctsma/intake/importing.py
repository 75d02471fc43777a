"""From a hospital's DICOM export to a cohort: NIfTI without identity, a manifest, a log of what was removed."""

import json
import os
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import pydicom
import SimpleITK as sitk

from ctsma.cohort import (
    InputFault,
    map_knees,
    read_manifest,
    read_volume,
    sha256_file,
    write_json,
    write_text,
    write_volume,
)
from ctsma.cohort.manifest import SCHEMA

from .choice import apply_choice, person, stacks, write_choice
from .headers import WHITELIST, removed_elements, scan
from .identity import age_years, new_uid, read_salt, salt_mark, salted_key, shifted_date
from .knees import split_knees

PIXELS = ["SamplesPerPixel", "PhotometricInterpretation", "BitsAllocated", "BitsStored", "HighBit"]
PIXELS += ["PixelRepresentation"]  # what a pixel of a frame is


@dataclass(frozen=True)
class Imported:
    """What an import did: `table` (one row a stack: take, status, reason), `skipped` files by reason, `manifest`."""

    table: pd.DataFrame
    skipped: Counter
    manifest: Path | None


def import_dicom(
    folder: str | Path,
    out: str | Path,
    *,
    salt_file: str | Path,
    choice_file: str | Path | None = None,
    side: str | None = None,
    echo: int | None = None,
    site: str = "",
    n_jobs: int = 1,
    report: Callable[[str], None] | None = None,
) -> Imported:
    """Find the knees of a DICOM tree, write each as NIfTI without identity, and extend the cohort's manifest.

    Parameters
    ----------
    folder : tree of mixed DICOM, never written to.
    out : the cohort: `images/`, `records/`, `cohort.csv`, `import_log.json`. Existing rows and files are kept.
    salt_file : outside `out`; made where it does not exist (see `read_salt`).
    choice_file : of `choose`, edited; the rule of `stacks` alone where None or absent.
    side, echo, site : for stacks that do not say their side; of multi-echo MR; for the manifest's column.
    n_jobs, report : as of `map_knees`; what was imported before is not read again.

    Raises
    ------
    InputFault : nothing that can be read as DICOM, a bad salt or choice file, a cohort made with another salt. A
        single bad series never raises: it is a row with its reason.
    """
    out = Path(out)
    images, skipped = scan(folder)
    salt = read_salt(salt_file, out)
    _check_cohort(out, salt)
    images = _salted(images, salt)
    table = stacks(images, salt, side, echo)
    table = apply_choice(table, choice_file) if choice_file and Path(choice_file).exists() else table
    groups, taken = dict(list(images.groupby("stack"))), table[table["take"]].to_dict("records")
    tasks = pd.DataFrame([_task(stack, groups[stack["stack"]], salt) for stack in taken])
    if tasks.empty:
        return Imported(table.assign(status=_status(table, {})), skipped, None)
    done = map_knees(import_stack, tasks, out / "records", {"root": str(out)}, n_jobs=n_jobs, report=report)
    faults = dict(zip(tasks["stack"], done["error"], strict=True))
    faults |= _extend(out / "cohort.csv", _volumes(done, tasks, site))
    _write_log(out / "import_log.json", done, tasks, skipped, salt, faults)
    table["note"] = [faults.get(stack) or note for stack, note in zip(table["stack"], table["note"], strict=True)]
    manifest = out / "cohort.csv"
    return Imported(table.assign(status=_status(table, faults)), skipped, manifest if manifest.exists() else None)


def choose(
    folder: str | Path,
    out: str | Path,
    *,
    salt_file: str | Path,
    choice_file: str | Path,
    side: str | None = None,
    echo: int | None = None,
) -> Imported:
    """Write which series `import_dicom` would take, to be edited in columns take and side; nothing else is written.

    Raises InputFault as `import_dicom`, and where the file exists or lies inside the cohort.
    """
    path = Path(choice_file)
    if path.exists():
        raise InputFault(path, "exists already", "edit it and import, or remove it to choose anew")
    if path.resolve().is_relative_to(Path(out).resolve()):
        raise InputFault(path, "names folders and lies inside the cohort", "give --choice outside it")
    images, skipped = scan(folder)
    salt = read_salt(salt_file, out)
    table = stacks(_salted(images, salt), salt, side, echo)
    write_choice(table, path)
    return Imported(table.assign(status=_status(table, None)), skipped, None)


def _status(table: pd.DataFrame, faults: dict[str, str] | None) -> list[str]:
    """imported, failed, refused (burned-in annotation) or left out; chosen where nothing was imported yet."""
    done = [("chosen" if faults is None else "failed" if faults.get(s) else "imported") for s in table["stack"]]
    left = ["refused" if refused else "left out" for refused in table["refused"]]
    return [d if take else kept for d, kept, take in zip(done, left, table["take"], strict=True)]


def import_stack(knee: dict, folder: Path, *, root: str) -> dict:
    """Read one stack, check it as any volume, split two knees, write NIfTI below `root` (for `map_knees`).

    Returns `volumes` (side, path, sha256, size, spacing_mm) and `removed`, the names of the elements left behind.
    Raises InputFault that names the stack, never a path: paths of an archive can hold names.
    """
    sitk.ProcessObject.SetGlobalWarningDisplay(False)  # ITK warns of gaps by a thousandth; ours are checked
    slices, name = json.loads(knee["slices"]), f"{knee['modality']} series {knee['stack']}"
    try:
        with tempfile.TemporaryDirectory() as staged:
            _stage(slices, Path(staged), knee)
            image = read_volume(staged, knee["modality"])
        parts = split_knees(image) if knee["modality"] == "CT" else {"": image}
    except InputFault as fault:
        raise InputFault(name, fault.fault, fault.mend) from None  # the cause names files
    parts = {side or knee["side"]: part for side, part in parts.items()}
    if None in parts or "" in parts:
        mend = "give --side L or --side R, or fill column side of the choice file"
        raise InputFault(name, "does not say which knee it shows", mend)
    volumes = [_written(part, side, knee, Path(root)) for side, part in parts.items()]
    files = [os.path.relpath(Path(root) / v["path"], folder) for v in volumes]
    return {"volumes": volumes, "removed": removed_elements(slices[0][0]), "files": files}


def _check_cohort(out: Path, salt: bytes) -> None:
    """Refuse before anything is written: a manifest that is broken, a cohort of another salt."""
    log, manifest = out / "import_log.json", out / "cohort.csv"
    if manifest.exists():
        read_manifest(manifest)
    if log.exists() and json.loads(log.read_text())["salt_mark"] != salt_mark(salt):
        mend = "give the --salt-file of the first import, or another --out"
        raise InputFault(log.parent, "was imported with another salt, so that one person would get two names", mend)


def _salted(images: pd.DataFrame, salt: bytes) -> pd.DataFrame:
    """Stacks named by the salt too: without it nobody can tell which series of an archive a file was."""
    return images.assign(stack=[salted_key(salt, key) for key in images["stack"]])


def _task(stack: dict, images: pd.DataFrame, salt: bytes) -> dict:
    """A chosen stack as a row for `map_knees`: knee_id is the stack's own name, nested parts are JSON text."""
    header = {k: v for k, v in images.iloc[0].items() if v is not None and v == v}
    slices = list(zip(images["file"], images["frame"], strict=True))
    frames = [_known(part, "frame") for part in images[images["frame"].notna()].to_dict("records")]
    stats = [Path(file).stat() for file in dict.fromkeys(images["file"])]
    nested = {"slices": slices, "frames": frames, "technical": _known(header, "logged")}
    nested |= {"stamps": [(stat.st_size, stat.st_mtime_ns) for stat in stats]}
    task = {"knee_id": f"{stack['subject']}-{stack['modality'].lower()}-{stack['stack']}"}
    task |= {name: stack[name] for name in ("stack", "subject", "modality", "side")}
    task |= {"age": age_years(header), **_body(header), "series": new_uid(salt, str(header["SeriesInstanceUID"]))}
    task |= {"date": shifted_date(salt, person(header), str(header.get("StudyDate", "")))}
    return task | {name: json.dumps(value) for name, value in nested.items()}


def _known(header: dict, part: str) -> dict:
    """The elements of a part of the whitelist that a header holds, as plain numbers and texts."""
    return {n: _plain(header[n]) for n in WHITELIST[part] if header.get(n) is not None and header[n] == header[n]}


def _body(header: dict) -> dict:
    """Sex and body mass index, None where the header does not tell or tells nonsense."""
    sex = str(header.get("PatientSex", "")).upper()
    try:
        bmi = float(header["PatientWeight"]) / float(header["PatientSize"]) ** 2
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        bmi = 0.0
    return {"sex": sex if sex in ("F", "M") else None, "bmi": round(bmi, 1) if 10 < bmi < 70 else None}


def _plain(value):
    if isinstance(value, pydicom.multival.MultiValue | list):
        return [_plain(v) for v in value]
    return float(value) if isinstance(value, int | float | pydicom.valuerep.DSdecimal) else str(value)


def _stage(slices: list, folder: Path, knee: dict) -> None:
    """Put the stack alone in a folder, as one file a slice: links, or frames written apart."""
    frames = iter(json.loads(knee["frames"]))
    pixels = {}
    for number, (file, frame) in enumerate(slices):
        target = folder / f"{number:05d}.dcm"
        if frame is None:
            target.symlink_to(Path(file).resolve())
            continue
        pixels = pixels if file in pixels else {file: _decoded(file)}  # one file at a time in memory
        data, array = pixels[file]
        _write_frame(target, data, array[int(frame)], next(frames), number)


def _decoded(file: str) -> tuple[pydicom.Dataset, object]:
    data = pydicom.dcmread(file)
    try:
        return data, data.pixel_array
    except (RuntimeError, ValueError, NotImplementedError, AttributeError) as error:
        fault = f"has frames compressed as {data.file_meta.TransferSyntaxUID.name} that cannot be decoded"
        raise InputFault(file, fault, "decompress it first (gdcmconv --raw), or export single slices") from error


def _write_frame(target: Path, data: pydicom.Dataset, array, frame: dict, number: int) -> None:
    one = pydicom.Dataset()
    one.file_meta = pydicom.dataset.FileMetaDataset()
    one.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    kind = "1.2.840.10008.5.1.4.1.1.2" if data.Modality == "CT" else "1.2.840.10008.5.1.4.1.1.4"
    one.SOPClassUID = one.file_meta.MediaStorageSOPClassUID = kind
    one.SOPInstanceUID = one.file_meta.MediaStorageSOPInstanceUID = f"2.25.{number + 1}"
    one.StudyInstanceUID, one.SeriesInstanceUID, one.Modality = "2.25.1", "2.25.2", data.Modality
    for name in PIXELS:
        setattr(one, name, data[name].value)
    for name, value in frame.items():
        whole = name in ("Rows", "Columns", "EchoNumbers")
        setattr(one, name, int(value) if whole else value)
    one.PixelData = array.tobytes()
    one.save_as(target, enforce_file_format=True)


def _written(image: sitk.Image, side: str, knee: dict, root: Path) -> dict:
    """Write one knee's volume; a NIfTI header holds geometry alone, and ours no text at all."""
    for key in image.GetMetaDataKeys():
        image.EraseMetaData(key)
    path = f"images/{knee['knee_id']}_{side}.nii.gz"
    write_volume(sitk.Cast(image, sitk.sitkFloat32), root / path)
    shown = " x ".join(f"{value:.4g}" for value in image.GetSpacing())
    size = " x ".join(map(str, image.GetSize()))
    return {"side": side, "path": path, "sha256": sha256_file(root / path), "size": size, "spacing_mm": shown}


def _volumes(done: pd.DataFrame, tasks: pd.DataFrame, site: str) -> list[dict]:
    """One mapping a written volume: what the manifest will say of its knee, and the stack it came from."""
    rows, named = [], tasks.set_index("knee_id")
    for record in done[done["error"] == ""].to_dict("records"):
        task = named.loc[record["knee_id"]]
        column = task["modality"].lower()
        for volume in record["volumes"]:
            row = {"knee_id": f"{task['subject']}-{volume['side']}", "subject_id": task["subject"]}
            row |= {"side": volume["side"], "age": task["age"], "sex": task["sex"], "bmi": task["bmi"], "site": site}
            row |= {column: volume["path"], f"{column}_sha256": volume["sha256"]}
            rows.append({k: str(v) for k, v in row.items() if not pd.isna(v)} | {"stack": task["stack"]})
    return rows


def _extend(path: Path, volumes: list[dict]) -> dict[str, str]:
    """Add volumes to the manifest, whose own entries are never changed; faults by stack where one is in the way."""
    required = [name for name, column in SCHEMA.columns.items() if column.required]
    known = pd.read_csv(path, dtype=str, keep_default_na=False) if path.exists() else pd.DataFrame(columns=required)
    rows = {row["knee_id"]: row for row in known.to_dict("records")}
    faults = {}
    for volume in volumes:
        row, new = rows.setdefault(volume["knee_id"], {}), {k: v for k, v in volume.items() if k != "stack"}
        column = "ct" if "ct" in new else "mr"
        if row.get(column) and (row[column], row[f"{column}_sha256"]) != (new[column], new[f"{column}_sha256"]):
            mend = f"set take of one of them to 0 in the choice file, or empty the cell in {path.name}"
            faults[volume["stack"]] = f"{volume['knee_id']} has another {column.upper()} already; {mend}."
        else:
            rows[volume["knee_id"]] = new | {k: v for k, v in row.items() if v}
    table = pd.DataFrame(rows.values(), columns=[*dict.fromkeys([*required, *known.columns])]).sort_values("knee_id")
    text = table.to_csv(index=False)
    if len(table) and not (path.exists() and path.read_text() == text):
        write_text(path, text)
    return faults


def _write_log(
    path: Path, done: pd.DataFrame, tasks: pd.DataFrame, skipped: Counter, salt: bytes, faults: dict
) -> None:
    """What came in, under new names, and the names of the header elements that stayed out."""
    named, earlier = tasks.set_index("knee_id"), json.loads(path.read_text())["series"] if path.exists() else {}
    series, removed = {}, set()
    for record in done.to_dict("records"):
        task = named.loc[record["knee_id"]]
        told = {"series": task["series"], "date_shifted": task["date"], "technical": json.loads(task["technical"])}
        fault = faults[task["stack"]]
        series[record["knee_id"]] = told | {"fault": fault, "volumes": [] if fault else record["volumes"]}
        removed |= set(record["removed"]) if not record["error"] else set()
    log = {"salt_mark": salt_mark(salt), "series": earlier | series, "skipped_files": dict(skipped)}
    write_json(path, log | {"removed_elements": sorted(removed)})
