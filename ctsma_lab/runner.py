"""Runs the notebooks in order with papermill: checked parameters, resume by content hash."""

import ast
import difflib
import json
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import filelock
import nbformat
import papermill
import yaml
from traitlets.config import Config

from ctsma import cache
from ctsma.cohort import read_manifest
from ctsma.common import InputError
from ctsma.files import SHARE, sha256_file, write_json
from ctsma_lab.profiles import profiles
from ctsma_lab.run import RESULTS, UNDER_RUNNER

NOTEBOOKS = SHARE / "notebooks"
STAGES = tuple(RESULTS)
FOLDERS = {  # what a stage writes below the run's folder beside its results file and notebook
    "01_cohort": ("cohort", "calibration"),
    "02_registration_qa": ("registration", "patches"),
    "03_distillation_training": ("models",),
    "04_icc_agreement": (),
    "05_roc_diagnosis": (),
}
TYPES = {"int": int, "float": float, "str": str, "bool": bool, "list": list}
LOWEST = {"seed": 0, "n_rescan": 0, "n_permutations": 0, "n_folds": 2}  # 1 of other whole numbers
HIGHEST = 2**32 - 1  # of whole numbers: the seeds that every generator takes
NOT_IN_KEY = ("run_dir", "n_jobs", "overwrite", "profile")  # they change no number
# One thread per process: ITK, BLAS, torch and numba would each start a pool in every worker.
ONE_THREAD = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")
ONE_THREAD += ("ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS",)
QUIET = ["--log-level=50"]  # no words on TCP and on the shutdown of the kernel
# joblib's resource tracker ignores the signal by which a kernel ends the processes that it started.
# The kernel waits for it until Jupyter ends the kernel, after half of this time (default: 5 s).
KERNEL = Config(KernelManager={"shutdown_wait_time": 0.5})
DEAD_WORKER = ("TerminatedWorkerError", "BrokenProcessPool", "KilledWorker")  # a process is gone
DIED = "a process was killed or ran out of memory; free memory or give --jobs 1, and run it again"


class StageFailed(RuntimeError):
    """A notebook stopped; the text names stage, cell, error and the partial notebook."""


def plan(
    path: Path, profile: str, parameters: dict, identity: dict, start: str | None = None
) -> list[dict]:
    """What a run will do, in order: per stage a mapping with stage, key, parameters, state.

    Parameters
    ----------
    path : folder of the run.
    profile : name of a profile; `parameters` override its values.
    identity : what one folder may hold only one of, by name (cohort, simulation protocol).
    start : first stage that runs again whatever its state, with all after it.

    Returns
    -------
    list of dict; `state` is "done", "run", or "copy" where the run in the folder `source` beside
    this one finished the same stage: same code, parameters and input. Raises InputError for unknown
    names, wrong types, and a folder that holds a run of another identity.
    """
    if profile not in profiles():
        remedy = f"choose one of {', '.join(profiles())}"
        raise InputError(f"profile {profile}", "is unknown", remedy)
    common = {"run_dir": str(Path(path).resolve()), "profile": profile, "overwrite": True}
    given = _check_types(profiles()[profile]["parameters"] | common | parameters)
    _check_identity(Path(path), {"profile": profile} | identity)
    first = STAGES.index(_stage_named(start)) if start else len(STAGES)
    key = cache.content_hash(identity, _inputs(parameters))
    steps, state = [], "done"
    for number, stage in enumerate(STAGES):
        own = {name: given[name] for name in notebook_parameters(stage) if name in given}
        counted = {name: value for name, value in own.items() if name not in NOT_IN_KEY}
        key = cache.content_hash(key, _code(stage), counted)
        source = None
        if number >= first or state == "run":
            state = "run"  # and with it every later stage
        elif cache.read_record(_record_path(path, stage), key):
            state = "done"
        else:
            source = _same_stage(path, stage, key)
            state = "copy" if source else "run"
        steps.append(
            {"stage": stage, "key": key, "parameters": own, "state": state, "source": source}
        )
    return steps


def _same_stage(path: Path, stage: str, key: str) -> Path | None:
    """Folder of another run beside this one that finished a stage under the same key."""
    for record in sorted(Path(path).resolve().parent.glob(f"*/{stage}.json")):
        if cache.read_record(record, key):
            return record.parent
    return None


def _copy_stage(source: Path, path: Path, stage: str) -> None:
    """Link the files of a finished stage into another run; copy them where links are refused.

    No file of a run is changed in place, so both runs stay as they are. The record comes last.
    """
    record = _record_path(source, stage)
    for name in [*json.loads(record.read_text(encoding="utf-8"))["files"], record.name]:
        target = path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        try:
            os.link(source / name, target)
        except OSError:
            shutil.copy2(source / name, target)


def run(
    path: Path,
    profile: str,
    parameters: dict,
    identity: dict,
    start: str | None,
    report: Callable[..., None],
) -> None:
    """Run what `plan` says. `report` is called with lines of progress. Raises StageFailed."""
    path = Path(path).resolve()  # papermill changes the working folder
    steps = plan(path, profile, parameters, identity, start)
    for name in ONE_THREAD:
        os.environ.setdefault(name, "1")
    with _locked(path):
        for shared in path.glob("models/.data-*"):  # images of a training that was killed
            shutil.rmtree(shared)
        write_json(path / "run.json", {"profile": profile} | identity)
        for step in steps:
            stage = step["stage"]
            if step["state"] == "done":
                report(f"{stage}: unchanged, skipped")
                continue
            if step["state"] == "copy":
                _copy_stage(step["source"], path, stage)
                report(f"{stage}: taken from {step['source'].name}, which ran it alike")
                continue
            started = time.perf_counter()
            report(f"{stage}: running")
            write_json(path / "run.json", {"profile": profile, "running": stage} | identity)
            _execute(path, step, report)
            seconds = time.perf_counter() - started
            _record(path, step, seconds)
            report(f"{stage}: done in {seconds:.0f} s")


def status(path: Path) -> list[dict]:
    """Per stage of a run: stage, state, seconds, finished.

    States are "done", "changed since", "not run" and, of a run in progress, "running".
    """
    path = Path(path)
    if not (path / "run.json").exists():
        raise InputError(path, "is not the folder of a run", "give the name of a run below runs/")
    rows = []
    for stage in STAGES:
        file = _record_path(path, stage)
        record = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        state = "not run"
        if record:
            whole = all(cache.is_unchanged(file.parent / n, f) for n, f in record["files"].items())
            state = "done" if whole and record["code"] == _code(stage) else "changed since"
        times = {"seconds": record.get("seconds"), "finished": record.get("finished")}
        rows.append({"stage": stage, "state": state} | times)
    if running := _running_stage(path):
        rows[STAGES.index(running)] |= {"state": "running", "seconds": None, "finished": None}
    return rows


def _running_stage(path: Path) -> str:
    """The stage that a process now executes in a run's folder; "" where none does."""
    if not (path / ".lock").exists():
        return ""
    try:
        with filelock.FileLock(path / ".lock").acquire(timeout=0):
            return ""
    except filelock.Timeout:
        record = json.loads((path / "run.json").read_text(encoding="utf-8"))
        return record.get("running") or STAGES[0]


def notebook_parameters(stage: str) -> dict[str, dict]:
    """Parameters of a notebook's tagged cell: name -> {inferred_type_name, default, help}."""
    source = NOTEBOOKS / f"{stage}.ipynb"
    found = papermill.inspect_notebook(_literal(source))
    if not found:
        raise InputError(source, "has no cell tagged parameters", "tag its parameter cell")
    return found


def _stage_named(name: str) -> str:
    for stage in STAGES:
        if name in (stage, stage[:2], stage[3:]):
            return stage
    raise InputError(f"stage {name}", "is unknown", f"choose one of {', '.join(STAGES)}")


def _check_types(given: dict) -> dict:
    """Values cast to the types that the notebooks declare; InputError for unknown names."""
    known = {}
    for stage in STAGES:
        known |= notebook_parameters(stage)
    cast = {}
    for name, value in given.items():
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            remedy = f"did you mean {close[0]}" if close else f"choose among {', '.join(known)}"
            raise InputError(f"parameter {name}", "is declared by no notebook", remedy)
        kind = known[name]["inferred_type_name"]
        wanted = TYPES[kind.split("[")[0]]
        if isinstance(value, str) and wanted is not str:
            value = yaml.safe_load(value)
        if wanted is float and type(value) is int:
            value = float(value)
        if type(value) is not wanted:
            problem = f"is {value!r}, not of type {kind}"
            raise InputError(f"parameter {name}", problem, f"give a {kind}")
        if wanted is int and not LOWEST.get(name, 1) <= value <= HIGHEST:
            problem = f"is {value}, not between {LOWEST.get(name, 1)} and {HIGHEST}"
            raise InputError(f"parameter {name}", problem, "give a number in this range")
        cast[name] = value
    return cast


def _check_identity(path: Path, identity: dict) -> None:
    file = path / "run.json"
    if not file.exists():
        return
    try:
        before = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        remedy = "remove it; finished knees and models are still reused"
        raise InputError(file, "is damaged", remedy) from error
    for name, value in identity.items():
        if before.get(name) != value:
            problem = f"holds a run of another {name} ({before.get(name)}, not {value})"
            raise InputError(path, problem, "choose another --name, or remove the folder")


def _inputs(parameters: dict) -> list:
    """What a run reads from outside its folder: anatomy, or manifest and images."""
    if anatomy := parameters.get("anatomy"):
        if not Path(anatomy).is_file():
            raise InputError(anatomy, "does not exist", "give the path of a label map")
        return [sha256_file(anatomy)]
    if not parameters.get("manifest"):
        return []
    manifest = read_manifest(parameters["manifest"], parameters.get("root") or None)
    if manifest.empty:
        raise InputError(parameters["manifest"], "lists no knee", "add one row per knee")
    found = [sha256_file(parameters["manifest"])]
    for knee in manifest.to_dict("records"):
        found += cache.image_fingerprints(knee, manifest.attrs["root"])
    return found


def _code(stage: str) -> str:
    """Hash of a notebook's cells and of every module of the project that they import."""
    cells = nbformat.read(NOTEBOOKS / f"{stage}.ipynb", as_version=4).cells
    source = "\n".join(cell.source for cell in cells if cell.cell_type == "code")
    modules = sorted(cache.imported_modules(ast.parse(source)))
    return cache.content_hash(
        [cell.source for cell in cells], [cache.source_sha256(m) for m in modules]
    )


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the run's folder: a second run in it is refused. The lock ends with the process."""
    path.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(path / ".lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout as error:
        remedy = "wait for its end, or choose another --name"
        raise InputError(path, "is in use by another run", remedy) from error
    try:
        yield
    finally:
        lock.release()


def _execute(path: Path, step: dict, report: Callable[..., None]) -> None:
    stage = step["stage"]
    partial = path / "notebooks" / f"{stage}.partial.ipynb"
    partial.parent.mkdir(parents=True, exist_ok=True)
    os.environ[UNDER_RUNNER] = "1"  # the kernel inherits it
    options = {"cwd": str(NOTEBOOKS), "progress_bar": False, "kernel_name": "python3"}
    options |= {"extra_arguments": QUIET, "config": KERNEL}
    source, target = _literal(NOTEBOOKS / f"{stage}.ipynb"), _literal(partial)
    try:
        with _followed(path / "progress.log", report):
            papermill.execute_notebook(source, target, step["parameters"], **options)
    except papermill.PapermillExecutionError as error:
        if error.ename in DEAD_WORKER:
            raise StageFailed(f"{stage}: {DIED}") from error
        place = f"cell [{error.exec_count}] failed with {error.ename}: {error.evalue}"
        kept = f"the notebook up to there: {partial}"
        raise StageFailed(f"{stage}: {place}; {kept}") from error
    except KeyboardInterrupt:  # the cell fails too, which asyncio would report when it is deleted
        logging.getLogger("asyncio").setLevel(logging.CRITICAL)
        raise
    except RuntimeError as error:  # nbclient's DeadKernelError, or a kernel that never answered
        raise StageFailed(f"{stage}: {DIED}") from error
    finally:
        del os.environ[UNDER_RUNNER]
    partial.replace(path / "notebooks" / f"{stage}.ipynb")


def _literal(path: Path) -> str:
    """A path as papermill takes it, which would fill in what stands in braces."""
    return str(path).replace("{", "{{").replace("}", "}}")


def _record_path(path: Path, stage: str) -> Path:
    return Path(path) / f"{stage}.json"


def _record(path: Path, step: dict, seconds: float) -> None:
    stage = step["stage"]
    named = [path / folder for folder in FOLDERS[stage]]
    named += [path / "results" / f"{RESULTS[stage]}.json", path / "notebooks" / f"{stage}.ipynb"]
    files = []
    for entry in named:
        files += [file for file in [entry, *sorted(entry.rglob("*"))] if file.is_file()]
    relative = [file.relative_to(path) for file in files]
    content = {
        "code": _code(stage),
        "seconds": seconds,
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    cache.write_record(_record_path(path, stage), step["key"], content, relative)


@contextmanager
def _followed(log: Path, report: Callable[..., None]) -> Iterator[None]:
    """Pass on the lines that a running notebook adds to the progress log."""
    log.parent.mkdir(parents=True, exist_ok=True)
    log.touch()
    stop = threading.Event()
    with log.open(encoding="utf-8") as stream:
        stream.seek(0, os.SEEK_END)

        def pass_on() -> None:
            while (line := stream.readline()).endswith("\n"):
                entry = json.loads(line)
                report("  " + entry["line"], done=entry["done"], total=entry["total"])

        def follow() -> None:
            while not stop.wait(0.5):
                pass_on()

        thread = threading.Thread(target=follow, daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
            pass_on()
