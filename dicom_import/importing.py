"""The import: each selected stack becomes NIfTI without identity, with a manifest and a log."""

import json
import os
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pydicom
import SimpleITK as sitk

from ctsma.cache import map_knees
from ctsma.cohort import read_manifest, write_volume
from ctsma.cohort.dicom import ELEMENTS, read_headers, read_stack
from ctsma.cohort.images import check_volume, format_extent
from ctsma.cohort.manifest import SCHEMA
from ctsma.common import InputError
from ctsma.files import sha256_file, write_json, write_text
from dicom_import.sides import split_knees

from . import identity
from .choice import apply_choice, list_stacks, write_choice
from .headers import WHITELIST, removed_elements, scan


@dataclass(frozen=True)
class Imported:
    """What an import did.

    Attributes
    ----------
    table : one row per stack, as of `list_stacks`, and its `status`.
    skipped : number of files left out, by reason.
    manifest : of the cohort; None where nothing is imported.
    """

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
    report: Callable[..., None] | None = None,
) -> Imported:
    """Find the knees of a DICOM tree, write each as NIfTI without identity, extend the manifest.

    Parameters
    ----------
    folder : tree of mixed DICOM, never written to.
    out : the cohort: `images/`, `records/`, `cohort.csv`, `import_log.json`. Existing rows and
        files are kept, and what was imported before is not read again.
    salt_file : outside `out`; made where it does not exist (see `read_salt`).
    choice_file : of `choose`, edited; the rule of `list_stacks` alone where None or absent.
    side, echo : for stacks that do not name their side; of multi-echo MR.
    site : for the manifest's column.
    n_jobs, report : as of `map_knees`.

    Raises
    ------
    InputError : nothing that can be read as DICOM, a bad salt or choice file, a cohort made with
        another salt. A single bad series never raises: it is a row with its reason.
    """
    out = Path(out)
    images, skipped = scan(folder)
    salt = identity.read_salt(salt_file, out)
    _check_cohort(out, salt)
    images["stack"] = [identity.salted_key(salt, key) for key in images["stack"]]
    table = list_stacks(images, salt, side, echo)
    if choice_file and Path(choice_file).exists():
        table = apply_choice(table, choice_file)
    groups = dict(list(images.groupby("stack")))
    selected = table[table["selected"]].to_dict("records")
    if not selected:
        return Imported(table.assign(status=_status(table, {})), skipped, None)
    tasks = pd.DataFrame([_task(stack, groups[stack["stack"]], salt) for stack in selected])
    parameters = {"root": str(out)}
    records = out / "records"
    done = map_knees(import_stack, tasks, records, parameters, n_jobs=n_jobs, report=report)
    done = tasks.merge(done, on="knee_id").to_dict("records")
    problems = {stack["stack"]: stack["error"] for stack in done}
    imported = [stack for stack in done if not stack["error"]]
    problems |= _extend_manifest(out / "cohort.csv", imported, site)
    _write_log(out / "import_log.json", done, problems, salt, skipped)
    for stack, problem in problems.items():
        if problem:
            table.loc[table["stack"] == stack, "note"] = problem
    manifest = out / "cohort.csv"
    status = _status(table, problems)
    return Imported(table.assign(status=status), skipped, manifest if manifest.exists() else None)


def choose(
    folder: str | Path,
    out: str | Path,
    *,
    salt_file: str | Path,
    choice_file: str | Path,
    side: str | None = None,
    echo: int | None = None,
) -> Imported:
    """Write which series `import_dicom` would take, to be edited in columns take and side.

    Nothing else is written but the salt. Raises InputError as `import_dicom`, and where the file
    exists or lies inside the cohort.
    """
    path = Path(choice_file)
    if path.exists():
        raise InputError(path, "exists already", "edit it and import, or remove it")
    if path.resolve().is_relative_to(Path(out).resolve()):
        problem = "names folders and lies inside the cohort"
        raise InputError(path, problem, "give --choice outside it")
    images, skipped = scan(folder)
    salt = identity.read_salt(salt_file, out)
    images["stack"] = [identity.salted_key(salt, key) for key in images["stack"]]
    table = list_stacks(images, salt, side, echo)
    write_choice(table, path)
    status = _status(table, {}).replace("imported", "selected")
    return Imported(table.assign(status=status), skipped, None)


def import_stack(knee: dict, folder: Path, *, root: str) -> dict:
    """Read one stack, check it as any volume, split two knees, write NIfTI (for `map_knees`).

    Returns `volumes` (side, path below `root`, sha256, size, spacing_mm) and `removed`, the names
    of the elements left out. Raises InputError that names the stack and never a path: paths of an
    archive can hold names.
    """
    name = f"{knee['modality']} series {knee['stack']}"
    try:
        image = _read_stack(knee, name)
        parts = split_knees(image) if knee["modality"] == "CT" else {"": image}
    except InputError as error:
        raise InputError(name, error.problem, error.remedy) from None  # the cause names files
    volumes = []
    for part_side, part in parts.items():
        side = part_side or knee["side"]
        if not side:
            remedy = "give --side L or --side R, or fill column side of the choice file"
            raise InputError(name, "does not name the knee it shows", remedy)
        volumes.append(_write_knee(part, side, knee["knee_id"], Path(root)))
    files = [os.path.relpath(Path(root) / volume["path"], folder) for volume in volumes]
    removed = removed_elements(knee["slices"][0][0])
    return {"volumes": volumes, "removed": removed, "files": files}


def _status(table: pd.DataFrame, problems: Mapping[str, str]) -> pd.Series:
    """imported, failed, refused (burned-in annotation) or left out."""
    status = pd.Series("left out", index=table.index)
    status[table["refused"]] = "refused"
    failed = np.array([bool(problems.get(stack)) for stack in table["stack"]], bool)
    status[table["selected"] & failed] = "failed"
    status[table["selected"] & ~failed] = "imported"
    return status


def _check_cohort(out: Path, salt: bytes) -> None:
    """Refuse, before anything is written, a broken manifest and a cohort of another salt."""
    log, manifest = out / "import_log.json", out / "cohort.csv"
    if manifest.exists():
        read_manifest(manifest)
    if log.exists() and json.loads(log.read_text())["salt_mark"] != identity.salt_mark(salt):
        problem = "was imported with another salt, so that one person would get two names"
        remedy = "give the --salt-file of the first import, or another --out"
        raise InputError(out, problem, remedy)


def _task(stack: dict, images: pd.DataFrame, salt: bytes) -> dict:
    """A selected stack as a row for `map_knees`, where knee_id is the name of the stack."""
    header = images.iloc[0].dropna().to_dict()
    stats = [Path(file).stat() for file in images["file"].unique()]
    day = str(header.get("StudyDate", ""))
    return {
        "knee_id": f"{stack['subject']}-{stack['modality'].lower()}-{stack['stack']}",
        "stack": stack["stack"],
        "subject": stack["subject"],
        "modality": stack["modality"],
        "side": stack["side"],
        "age": identity.age_years(header),
        "sex": _sex(header),
        "bmi": _body_mass_index(header),
        "series": identity.new_uid(salt, str(header["SeriesInstanceUID"])),
        "date_shifted": identity.shifted_date(salt, identity.identity_text(header), day),
        "technical": _plain_elements(header, WHITELIST["logged"]),
        "slices": images[["file", "frame"]].to_numpy().tolist(),
        "stamps": [(stat.st_size, stat.st_mtime_ns) for stat in stats],
    }


def _plain_elements(header: Mapping, names: list[str]) -> dict:
    """The elements that a header holds, as plain numbers, texts and lists."""
    found = {}
    for name in names:
        value = header.get(name)
        if isinstance(value, pydicom.multival.MultiValue | list):
            found[name] = [_plain(part) for part in value]
        elif value is not None and not pd.isna(value):
            found[name] = _plain(value)
    return found


def _plain(value: object) -> float | str:
    return float(value) if isinstance(value, int | float) else str(value)


def _sex(header: Mapping) -> str | None:
    sex = str(header.get("PatientSex", "")).upper()
    return sex if sex in ("F", "M") else None


def _body_mass_index(header: Mapping) -> float | None:
    """Body mass index (kg/m2); None where the header does not give it or gives nonsense."""
    try:
        bmi = float(header["PatientWeight"]) / float(header["PatientSize"]) ** 2
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        return None
    return round(bmi, 1) if 10 < bmi < 70 else None


def _read_stack(knee: dict, name: str) -> sitk.Image:
    """The volume of the files, or frames of files, that make a stack."""
    wanted, images = {}, []
    for file, frame in knee["slices"]:
        wanted.setdefault(file, set()).add(frame)
    for file, frames in wanted.items():
        headers = read_headers(Path(file), ELEMENTS)
        images += [header for header in headers if header["frame"] in frames]
    image = read_stack(name, images, knee["modality"])
    return check_volume(name, image, knee["modality"])


def _write_knee(image: sitk.Image, side: str, name: str, root: Path) -> dict:
    """Write one knee's volume without any text in its header; returns what the record keeps."""
    for key in image.GetMetaDataKeys():
        image.EraseMetaData(key)
    path = f"images/{name}_{side}.nii.gz"
    write_volume(image, root / path)
    return {
        "side": side,
        "path": path,
        "sha256": sha256_file(root / path),
        "size": format_extent(image.GetSize()),
        "spacing_mm": format_extent(image.GetSpacing()),
    }


def _extend_manifest(path: Path, imported: list[dict], site: str) -> dict[str, str]:
    """Add the written volumes to the manifest, whose filled cells are never changed.

    Returns the problems by stack: a knee that has another CT or MR already.
    """
    columns = [name for name, column in SCHEMA.columns.items() if column.required]
    rows, problems = {}, {}
    if path.exists():
        known = pd.read_csv(path, dtype=str, keep_default_na=False)
        columns += [name for name in known if name not in columns]
        rows = {row["knee_id"]: row for row in known.to_dict("records")}
    for stack in imported:
        column = stack["modality"].lower()
        for volume in stack["volumes"]:
            new = _manifest_row(stack, volume, site)
            row = rows.get(new["knee_id"], {})
            image = (column, f"{column}_sha256")
            if row.get(column) and any(row[name] != new[name] for name in image):
                problems[stack["stack"]] = (
                    f"{new['knee_id']} has another {column.upper()} already; set take of one of "
                    f"them to 0 in the choice file, or empty the cell in {path.name}."
                )
                continue
            rows[new["knee_id"]] = new | {name: value for name, value in row.items() if value}
    if rows:
        table = pd.DataFrame(list(rows.values()), columns=columns).sort_values("knee_id")
        text = table.to_csv(index=False)
        if not path.exists() or path.read_text() != text:
            write_text(path, text)
    return problems


def _manifest_row(stack: dict, volume: dict, site: str) -> dict[str, str]:
    """What the manifest will hold of a volume's knee, as text; unknown cells are absent."""
    column = stack["modality"].lower()
    row = {
        "knee_id": f"{stack['subject']}-{volume['side']}",
        "subject_id": stack["subject"],
        "side": volume["side"],
        "age": stack["age"],
        "sex": stack["sex"],
        "bmi": stack["bmi"],
        "site": site,
        column: volume["path"],
        f"{column}_sha256": volume["sha256"],
    }
    return {name: str(value) for name, value in row.items() if not pd.isna(value)}


def _write_log(
    path: Path, done: list[dict], problems: Mapping[str, str], salt: bytes, skipped: Counter
) -> None:
    """What was imported, under new names, and the names of the header elements left out."""
    series = json.loads(path.read_text())["series"] if path.exists() else {}
    removed = set()
    for stack in done:
        problem = problems[stack["stack"]]
        entry = {name: stack[name] for name in ("series", "date_shifted", "technical")}
        entry |= {"problem": problem, "volumes": [] if problem else stack["volumes"]}
        series[stack["knee_id"]] = entry
        removed |= set() if stack["error"] else set(stack["removed"])
    log = {
        "salt_mark": identity.salt_mark(salt),
        "series": series,
        "skipped_files": dict(skipped),
        "removed_elements": sorted(removed),
    }
    write_json(path, log)
