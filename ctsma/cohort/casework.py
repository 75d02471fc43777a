"""One function over many knees: in parallel, resumable, and one bad knee is a row that says why."""

import inspect
import json
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path

import joblib
import pandas as pd
import SimpleITK as sitk

from .names import IMAGES, InputFault
from .provenance import content_key, sha256_file, source_sha256, write_json


def map_knees(
    function: Callable[..., dict],
    knees: pd.DataFrame,
    folder: str | Path,
    parameters: dict,
    *,
    after: Iterable[str | Path] = (),
    n_jobs: int = 1,
    report: Callable[[str], None] | None = None,
) -> pd.DataFrame:
    """Call `function(knee, folder, **parameters)` for each knee; keep and reuse what is already right.

    Parameters
    ----------
    function : returns a mapping of numbers and texts; it may write files `<knee_id>_*` or `<knee_id>.*` into
        `folder`, or name others (relative to `folder`) in the list `files`.
    knees : manifest rows with `knee_id`.
    folder : where `<knee_id>.json` (the record of a finished knee) is kept.
    parameters : keyword arguments, JSON-able.
    after : folders of earlier `map_knees` whose record of the same knee is an input of this one.
    n_jobs : processes, one thread each (joblib; a Dask cluster through joblib's own backend).
    report : called with one line a knee.

    Returns
    -------
    DataFrame, one row a knee in the order of `knees`: the mapping, knee_id, seconds, error ("" when good).
    A record is reused when code, parameters, knee row, earlier records and the files written are unchanged.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    rows = knees.astype(object).where(knees.notna(), None).to_dict("records")
    keys = {row["knee_id"]: _key(function, row, parameters, after) for row in rows}
    done = {row["knee_id"]: record for row in rows if (record := _reusable(folder, row["knee_id"], keys)) is not None}
    waiting = [row for row in rows if row["knee_id"] not in done]
    tasks = [joblib.delayed(_work)(function, row, folder, parameters, keys[row["knee_id"]]) for row in waiting]
    with joblib.parallel_config(backend="loky", n_jobs=n_jobs, inner_max_num_threads=1):
        for count, record in enumerate(joblib.Parallel(return_as="generator_unordered")(tasks), len(done) + 1):
            done[record["knee_id"]] = record
            if report:
                report(_line(function, record, count, len(rows)))
    return pd.DataFrame([done[row["knee_id"]] for row in rows]).drop(columns=["key", "files"], errors="ignore")


def recorded_seconds(folder: str | Path) -> pd.Series:
    """Seconds by knee_id of the records in a `map_knees` folder, whenever they were made; empty without records."""
    records = sorted(file for file in Path(folder).glob("*.json") if "_" not in file.stem)  # ids hold no underscore
    return pd.Series({file.stem: json.loads(file.read_text())["seconds"] for file in records}, dtype=float)


def _key(function: Callable, row: dict, parameters: dict, after: Iterable[str | Path]) -> str:
    records = [Path(folder) / f"{row['knee_id']}.json" for folder in after]
    inputs = [json.loads(record.read_text())["key"] if record.exists() else None for record in records]
    images = _unsummed(row, Path(parameters.get("root", ".")))
    return content_key(_code(function), function.__qualname__, row, parameters, inputs, images)


def _unsummed(row: dict, root: Path) -> list:
    """Name, size and time of the images without checksum in the manifest: one that was replaced is another input."""
    paths = [root / row[c] for c in IMAGES if row.get(c) and not row.get(f"{c}_sha256")]
    files = sorted(file for path in paths for file in ([path, *path.glob("*")] if path.exists() else []))
    return [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.is_file()]


def _code(function: Callable) -> str:
    module = function.__module__
    return source_sha256(module) if module.startswith("ctsma.") else inspect.getsource(function)


def _reusable(folder: Path, knee_id: str, keys: dict[str, str]) -> dict | None:
    path = folder / f"{knee_id}.json"
    try:
        record = json.loads(path.read_text())
        same = record["key"] == keys[knee_id] and not record["error"]
        return record if same and all(sha256_file(folder / n) == s for n, s in record["files"].items()) else None
    except (FileNotFoundError, ValueError, KeyError):
        return None  # never finished, or damaged since: worth computing again


def _work(function: Callable, row: dict, folder: Path, parameters: dict, key: str) -> dict:
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    started = time.perf_counter()
    outcome = _attempt(function, row, folder, parameters)
    files = outcome.pop("files", None) or [file.name for file in _written(folder, row["knee_id"])]
    record = {"knee_id": row["knee_id"], "key": key, "error": "", **outcome}
    record["seconds"] = time.perf_counter() - started
    record["files"] = {name: sha256_file(folder / name) for name in files}
    write_json(folder / f"{row['knee_id']}.json", record)
    return record


def _attempt(function: Callable, row: dict, folder: Path, parameters: dict) -> dict:
    try:
        return dict(function(row, folder, **parameters))
    except InputFault as fault:
        return {"error": str(fault)}
    except Exception as error:  # one bad knee never stops a cohort; the row keeps where it happened
        place = traceback.extract_tb(error.__traceback__)[-1]
        return {"error": f"{type(error).__name__} in {place.name}, line {place.lineno}: {error}"}


def _written(folder: Path, knee_id: str) -> list[Path]:
    record = folder / f"{knee_id}.json"
    return sorted({*folder.glob(f"{knee_id}_*"), *folder.glob(f"{knee_id}.*")} - {record})


def _line(function: Callable, record: dict, count: int, total: int) -> str:
    outcome = record["error"] or f"{record['seconds']:.1f} s"
    return f"{function.__name__} {count}/{total} {record['knee_id']}: {outcome}"
