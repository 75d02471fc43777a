"""What is already right is not computed again: one record format for knees, models and stages.

A record is a JSON file with the key it was made under and the fingerprints of the files that belong
to it. The key is a hash over code, parameters and inputs.
"""

import ast
import errno
import hashlib
import importlib.util
import inspect
import json
import time
import traceback
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path

import pandas as pd
import yaml

from ctsma.common import VOLUMES, InputError
from ctsma.files import ROOT, plain, sha256_file, write_json
from ctsma.parallel import run_tasks

SOURCES = ("ctsma", "kneesim", "dicom_import", "ctsma_predict")  # packages whose code is followed
NOT_FOLLOWED = {"arms.yaml", "profiles.yaml"}  # what they say of a run is part of its parameters


def content_hash(*parts: object) -> str:
    """SHA-256 over JSON-able parts; equal content gives an equal hash in any process."""
    text = json.dumps(parts, sort_keys=True, default=plain)
    return hashlib.sha256(text.encode()).hexdigest()


@cache
def source_sha256(module: str) -> str:
    """SHA-256 over the code of a module and of all modules of the project that it imports.

    Comments, docstrings and layout do not count; the YAML files of a package do.
    """
    found: dict[str, list[str]] = {}
    waiting = {module}
    while waiting:
        name = waiting.pop()
        imported, found[name] = _read(name)
        waiting |= imported - set(found)
    return content_hash(sorted(found.items()))


def imported_modules(tree: ast.AST, package: str = "") -> set[str]:
    """Modules of the project that parsed code imports; `package` resolves relative imports."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            names |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    ours = {name for name in names if name.partition(".")[0] in SOURCES and name != "ctsma"}
    return {name for name in ours if _source(name).exists()}


def _source(module: str) -> Path:
    path = ROOT.joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


@cache
def _read(module: str) -> tuple[set[str], list[str]]:
    """Modules of the project that a module imports, and its code as `source_sha256` counts it."""
    source = _source(module)
    is_package = source.name == "__init__.py"
    tree = ast.parse(source.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        holds_docstring = isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef)
        if holds_docstring and ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    data = sorted(source.parent.glob("*.yaml")) if is_package else []
    read = [yaml.safe_load(file.read_bytes()) for file in data if file.name not in NOT_FOLLOWED]
    package = module if is_package else module.rpartition(".")[0]
    code = [ast.unparse(tree), json.dumps(read, sort_keys=True, default=str)]
    return imported_modules(tree, package), code


def read_record(path: str | Path, key: str) -> dict | None:
    """The record at `path`; None where absent, damaged, of another key, or where a file changed."""
    path = Path(path)
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        same_key = record["key"] == key
        files = record["files"].items()
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None
    return record if same_key and all(is_unchanged(path.parent / n, f) for n, f in files) else None


def write_record(
    path: str | Path, key: str, content: dict, files: Iterable[str | Path] = ()
) -> dict:
    """Write `content`, the key and the fingerprints of `files` (relative to the record's folder).

    The record is written last: where there is none, the result is not there. Returns the record.
    """
    path = Path(path)
    fingerprints = {Path(name).as_posix(): _fingerprint(path.parent / name) for name in files}
    record = {**content, "key": key, "files": fingerprints}
    write_json(path, record)
    return record


def _fingerprint(file: Path) -> list:
    status = file.stat()
    return [status.st_size, status.st_mtime_ns, sha256_file(file)]


def is_unchanged(file: Path, fingerprint: list) -> bool:
    """Whether a file has the recorded content; equal size and time stamp spare the hashing."""
    size, mtime_ns, sha256 = fingerprint
    if not file.exists() or file.stat().st_size != size:
        return False
    return file.stat().st_mtime_ns == mtime_ns or sha256_file(file) == sha256


def map_knees(
    function: Callable[..., dict],
    knees: pd.DataFrame,
    folder: str | Path,
    parameters: dict,
    *,
    after: Iterable[str | Path] = (),
    n_jobs: int = 1,
    report: Callable[..., None] | None = None,
) -> pd.DataFrame:
    """Call `function(knee, folder, **parameters)` for each knee; reuse what is already right.

    Parameters
    ----------
    function : returns a mapping of numbers and texts, and in the list `files` the names of what it
        wrote, relative to `folder`. No two knees may write one file.
    knees : manifest rows with `knee_id`.
    folder : where `<knee_id>.json`, the record of a finished knee, is kept.
    parameters : keyword arguments, JSON-able. Of `root` and those whose names end in `_folder` the
        text does not count, so that a folder that was moved is not computed again.
    after : folders of earlier `map_knees` whose record of the same knee is an input of this one.
    n_jobs : processes on this machine, as of `ctsma.parallel.run_tasks`.
    report : called as `report(line, done=..., total=...)` after each knee.

    Returns
    -------
    DataFrame, one row per knee in the order of `knees`: the mapping, knee_id, seconds, and error
    ("" when good). One bad knee is a row with its reason and never stops the others. A record is
    reused while code, parameters, knee row, earlier records and the files written are unchanged.
    Raises InputError for a full disk: finished knees are kept.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    rows = knees.astype(object).where(knees.notna(), None).to_dict("records")
    keys = {row["knee_id"]: _knee_key(function, row, parameters, after) for row in rows}
    done = {}
    for knee_id, key in keys.items():
        record = read_record(folder / f"{knee_id}.json", key)
        if record is not None and not record["error"]:
            done[knee_id] = record
    waiting = [row for row in rows if row["knee_id"] not in done]
    n_reused, started = len(done), time.perf_counter()
    tasks = [(function, row, folder, parameters, keys[row["knee_id"]]) for row in waiting]
    for record in run_tasks(_compute, tasks, n_jobs, ordered=False):
        done[record["knee_id"]] = record
        if report:
            left = time_left(started, len(done) - n_reused, len(rows) - len(done))
            outcome = record["error"] or f"{record['seconds']:.1f} s{left}"
            line = f"{function.__name__} {len(done)}/{len(rows)} {record['knee_id']}: {outcome}"
            report(line, done=len(done), total=len(rows))
    table = pd.DataFrame([done[row["knee_id"]] for row in rows])
    return table.drop(columns=["key", "files"], errors="ignore")


def time_left(started: float, n_done: int, n_left: int) -> str:
    """End of a progress line, for example ", about 4 min left"; "" when nothing is left.

    started : `time.perf_counter()` before the first of n_done.
    """
    if not n_left:
        return ""
    seconds = (time.perf_counter() - started) / n_done * n_left
    left = f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"
    return f", about {left} left"


def _knee_key(function: Callable, row: dict, parameters: dict, after: Iterable) -> str:
    module = function.__module__
    followed = module.partition(".")[0] in SOURCES
    code = source_sha256(module) if followed else inspect.getsource(function)
    inputs = []
    for earlier in after:
        record = Path(earlier) / f"{row['knee_id']}.json"
        inputs.append(json.loads(record.read_text("utf-8"))["key"] if record.exists() else None)
    # A checksum in the manifest, which is part of the row, stands for the content of its image.
    unchecked = [column for column in VOLUMES if not row.get(f"{column}_sha256")]
    images = image_fingerprints(row, parameters.get("root", "."), unchecked)
    chosen = {k: v for k, v in parameters.items() if k != "root" and not k.endswith("_folder")}
    return content_hash(code, function.__qualname__, row, chosen, inputs, images)


def image_fingerprints(knee: dict, root: str | Path, columns: Iterable[str] = VOLUMES) -> list:
    """Name, size and time of a knee's image files: one that was replaced is another input."""
    found = []
    for column in columns:
        if isinstance(knee.get(column), str):
            path = Path(root) / knee[column]
            found += [file for file in [path, *sorted(path.glob("*"))] if file.is_file()]
    return [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in found]


def _compute(function: Callable, row: dict, folder: Path, parameters: dict, key: str) -> dict:
    started, knee_id = time.perf_counter(), row["knee_id"]
    outcome = {"knee_id": knee_id, "error": ""} | _attempt(function, row, folder, parameters)
    outcome["seconds"] = time.perf_counter() - started
    return write_record(folder / f"{knee_id}.json", key, outcome, outcome.pop("files", ()))


def _attempt(function: Callable, row: dict, folder: Path, parameters: dict) -> dict:
    try:
        return dict(function(row, folder, **parameters))
    except InputError as error:
        return {"error": str(error)}
    except Exception as error:  # one bad knee never stops a cohort; the row says where it happened
        if getattr(error, "errno", None) == errno.ENOSPC:
            raise  # a full disk is not the knee's fault
        place = traceback.extract_tb(error.__traceback__)[-1]
        return {"error": f"{type(error).__name__} in {place.name}, line {place.lineno}: {error}"}
