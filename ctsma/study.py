"""Runs the notebooks in order with papermill: checked parameters, content-hash resume, and a report."""

import difflib
import fcntl
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import nbformat
import papermill
import yaml

from .cohort import IMAGES, InputFault, content_key, sha256_file, source_sha256, write_json
from .cohort.manifest import image_path, read_manifest
from .cohort.provenance import imports
from .simulation.protocol import protocol_sha256

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
# What each stage writes below the run's folder; a stage is skipped only while all of it is as it was left.
OUTPUTS = {
    "01_cohort": ("cohort", "calibration", "results/cohort.json"),
    "02_registration_qa": ("registration", "results/registration.json"),
    "03_distillation_training": ("patches", "ct_only", "models", "results/distillation.json"),
    "04_icc_agreement": ("results/agreement.json",),
    "05_roc_diagnosis": ("results/diagnosis.json",),
}
TYPES = {"int": int, "float": float, "str": str, "bool": bool, "list": list}
# One thread a process: ITK, BLAS, torch and numba would otherwise each start a pool in every worker.
ONE_THREAD = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS")

DEAD_WORKER = ("TerminatedWorkerError", "BrokenProcessPool")  # joblib's words for a process that is gone
DIED = "a process died (killed, or out of memory); free memory or give --jobs 1, and run the same command again"


class StageFailed(RuntimeError):
    """A notebook stopped; the text names the stage, the cell, the error and the partial notebook."""


def profiles() -> dict[str, dict]:
    """The profiles of profiles.yaml by name: about, minutes, disk_gb, parameters."""
    return yaml.safe_load(Path(__file__).with_name("profiles.yaml").read_text())


def stages() -> list[str]:
    """The notebooks' names in the order in which they run."""
    return sorted(path.stem for path in NOTEBOOKS.glob("[0-9][0-9]_*.ipynb"))


def plan(path: Path, profile: str, parameters: dict, start: str | None = None) -> list[dict]:
    """What a run will do, in order: one mapping a stage with stage, key, parameters and state ("done" or "run").

    Parameters
    ----------
    path : folder of the run.
    profile : name of a profile; `parameters` override its values (unknown names and wrong types: InputFault).
    start : first stage that runs again whatever its state, with all after it; None for only what changed.
    """
    run_level = {"run_dir": str(Path(path).resolve()), "profile": profile} | parameters
    given = _checked(_profile(profile)["parameters"] | run_level)
    _check_folder(Path(path), profile, parameters)
    known = _read_state(Path(path)).get("stages", {})
    first = stages().index(_stage(start)) if start else len(stages())
    steps, key = [], content_key(_inputs(parameters))
    for number, stage in enumerate(stages()):
        own = {name: given[name] for name in declared(stage) if name in given}
        key = content_key(key, _code(stage), {k: v for k, v in own.items() if k not in ("run_dir", "n_jobs")})
        done = number < first and _is_done(Path(path), known.get(stage), key)
        state = "done" if done and all(step["state"] == "done" for step in steps) else "run"
        steps.append({"stage": stage, "key": key, "parameters": own, "state": state})
    return steps


def run(path: Path, profile: str, parameters: dict, start: str | None, say: Callable[[str], None]) -> list[Path]:
    """Run what the plan says; returns the executed notebooks in order. Raises StageFailed."""
    steps, path = plan(path, profile, parameters, start), Path(path).resolve()  # papermill changes the folder
    for name in ONE_THREAD:
        os.environ.setdefault(name, "1")
    with _alone(path):
        _write_state(path, profile=profile, protocol_sha256=protocol_sha256(), cohort=_cohort_name(parameters))
        for step in steps:
            if step["state"] == "done":
                say(f"{step['stage']}: unchanged, skipped")
                continue
            seconds = _execute(path, step, say)
            _record(path, step, seconds)
            say(f"{step['stage']}: done in {seconds:.0f} s")
    return [path / "notebooks" / f"{step['stage']}.ipynb" for step in steps]


def status(path: Path) -> list[dict]:
    """One mapping a stage of a run: stage, state ("done", "changed since", "not run"), seconds, finished."""
    state = _read_state(Path(path))
    if not state:
        raise InputFault(path, "is not the folder of a run", "give the name of a run below runs/")
    rows = []
    for stage in stages():
        known = state["stages"].get(stage, {})
        whole = bool(known) and _outputs_whole(Path(path), known["outputs"]) and known["code"] == _code(stage)
        word = "done" if whole else "changed since" if known else "not run"
        rows.append({"stage": stage, "state": word, "seconds": known.get("seconds"), "finished": known.get("finished")})
    return rows


def declared(stage: str) -> dict[str, dict]:
    """Parameters of a notebook's tagged cell: name -> {inferred_type_name, default, help}."""
    found = papermill.inspect_notebook(str(NOTEBOOKS / f"{stage}.ipynb"))
    if not found:
        raise InputFault(NOTEBOOKS / f"{stage}.ipynb", "has no cell tagged parameters", "tag its parameter cell")
    return found


def _profile(name: str) -> dict:
    known = profiles()
    if name not in known:
        raise InputFault(f"profile {name}", "is unknown", f"choose one of {', '.join(known)}")
    return known[name]


def _stage(name: str) -> str:
    matches = [stage for stage in stages() if name in (stage, stage[:2], stage[3:])]
    if not matches:
        raise InputFault(f"stage {name}", "is unknown", f"choose one of {', '.join(stages())}")
    return matches[0]


def _checked(given: dict) -> dict:
    """Cast values to the types the notebooks declare; refuse names that no notebook declares."""
    known = {name: entry for stage in stages() for name, entry in declared(stage).items()}
    for name in given:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            mend = f"did you mean {close[0]}" if close else f"choose among {', '.join(sorted(known))}"
            raise InputFault(f"parameter {name}", "is declared by no notebook", mend)
    return {name: _cast(name, value, known[name]["inferred_type_name"]) for name, value in given.items()}


def _cast(name: str, value, kind: str):
    wanted = TYPES[kind.split("[")[0]]
    value = yaml.safe_load(value) if isinstance(value, str) and wanted is not str else value
    value = float(value) if wanted is float and type(value) is int else value
    if type(value) is not wanted:
        raise InputFault(f"parameter {name}", f"is {value!r}, not of type {kind}", f"give a {kind}")
    return value


def _check_folder(path: Path, profile: str, parameters: dict) -> None:
    state = _read_state(path)
    now = {"protocol_sha256": protocol_sha256(), "profile": profile, "cohort": _cohort_name(parameters)}
    words = {"protocol_sha256": "simulation protocol", "profile": "profile", "cohort": "cohort"}
    for key, value in now.items():
        if state and state[key] != value:
            fault = f"holds a run of another {words[key]} ({state[key][:12]}, not {value[:12]})"
            raise InputFault(path, fault, "choose another --name, or remove the folder")


def _cohort_name(parameters: dict) -> str:
    chosen = {name: str(parameters[name]) for name in ("manifest", "anatomy") if parameters.get(name)}
    return "; ".join(f"{name} {value}" for name, value in chosen.items()) or "simulated"


def _inputs(parameters: dict) -> list:
    """Content of everything a run reads from outside its folder."""
    if parameters.get("anatomy"):
        return [sha256_file(_existing(parameters["anatomy"]))]
    if not parameters.get("manifest"):
        return [protocol_sha256()]
    manifest = read_manifest(parameters["manifest"], parameters.get("root") or None)
    knees, inside = manifest.to_dict("records"), Path(manifest.attrs["root"]).resolve()
    if not knees:
        raise InputFault(parameters["manifest"], "lists no knee", "add one row a knee")
    named = [image_path(knee, column, manifest.attrs["root"]) for knee in knees for column in IMAGES]
    files = sorted(file for path in named if path for file in (path.rglob("*") if path.is_dir() else [path]))
    for file in (file for file in files if not file.resolve().is_relative_to(inside)):
        raise InputFault(file, "is a link out of the cohort's root", "put the file itself there")
    return [sha256_file(parameters["manifest"])] + [sha256_file(file) for file in files if file.is_file()]


def _existing(path: str) -> Path:
    if not Path(path).is_file():
        raise InputFault(path, "does not exist", "give the path of a label map")
    return Path(path)


def _code(stage: str) -> str:
    """Content of a stage's code: the notebook's cells and every ctsma module that they import."""
    cells = nbformat.read(NOTEBOOKS / f"{stage}.ipynb", as_version=4).cells
    modules = sorted(imports("\n".join(cell.source for cell in cells if cell.cell_type == "code")))
    return content_key([cell.source for cell in cells], [source_sha256(module) for module in modules])


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Hold the run's folder: a second run in it is refused. The lock ends with the process, however it ends."""
    path.mkdir(parents=True, exist_ok=True)
    with (path / ".lock").open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputFault(path, "is in use by another run", "wait for its end, or choose another --name") from error
        yield


def _execute(path: Path, step: dict, say: Callable[[str], None]) -> float:
    stage, started = step["stage"], time.perf_counter()
    partial = path / "notebooks" / f"{stage}.partial.ipynb"
    partial.parent.mkdir(parents=True, exist_ok=True)
    say(f"{stage}: running")
    with _Follower(path / "progress.log", say):
        try:
            source = str(NOTEBOOKS / f"{stage}.ipynb")
            options = {"cwd": str(NOTEBOOKS), "progress_bar": False, "kernel_name": "python3"}
            papermill.execute_notebook(source, str(partial), step["parameters"], **options)
        except papermill.PapermillExecutionError as error:
            if error.ename in DEAD_WORKER:
                raise StageFailed(f"{stage}: {DIED}") from error
            place = f"cell [{error.exec_count}] failed with {error.ename}: {error.evalue}"
            raise StageFailed(f"{stage}: {place}; the notebook as far as it came: {partial}") from error
        except RuntimeError as error:  # nbclient's DeadKernelError, or a kernel that never answered
            raise StageFailed(f"{stage}: {DIED}") from error
    partial.replace(path / "notebooks" / f"{stage}.ipynb")
    return time.perf_counter() - started


def _is_done(path: Path, known: dict | None, key: str) -> bool:
    return known is not None and known["key"] == key and _outputs_whole(path, known["outputs"])


def _outputs_whole(path: Path, outputs: dict) -> bool:
    return all(_unchanged(path / name, *recorded) for name, recorded in outputs.items())


def _unchanged(file: Path, size: int, mtime_ns: int, sha256: str) -> bool:
    """Same content; the time stamp only spares the hashing of files that nobody touched."""
    if not file.exists() or file.stat().st_size != size:
        return False
    return file.stat().st_mtime_ns == mtime_ns or sha256_file(file) == sha256


def _record(path: Path, step: dict, seconds: float) -> None:
    named = [path / name for name in (*OUTPUTS[step["stage"]], f"notebooks/{step['stage']}.ipynb")]
    files = [file for name in named for file in (sorted(name.rglob("*")) if name.is_dir() else [name])]
    outputs = {str(f.relative_to(path)): _fingerprint(f) for f in files if f.is_file()}
    finished = datetime.now(UTC).isoformat(timespec="seconds")
    stage = {"key": step["key"], "code": _code(step["stage"]), "seconds": seconds, "finished": finished}
    known = _read_state(path)["stages"]
    _write_state(path, stages=known | {step["stage"]: stage | {"outputs": outputs}})


def _fingerprint(file: Path) -> list:
    return [file.stat().st_size, file.stat().st_mtime_ns, sha256_file(file)]


def _read_state(path: Path) -> dict:
    file = path / "state.json"
    try:
        return json.loads(file.read_text()) if file.exists() else {}
    except ValueError as error:
        raise InputFault(file, "is damaged", "remove it; finished knees and models are still reused") from error


def _write_state(path: Path, **changes) -> None:
    write_json(path / "state.json", {"stages": {}} | _read_state(path) | changes)


class _Follower:
    """Shows the lines that a running notebook adds to the progress log."""

    def __init__(self, log: Path, say: Callable[[str], None]):
        self.log, self.say, self.stop = log, say, threading.Event()
        self.thread = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self):
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self.log.touch()
        self.offset = self.log.stat().st_size
        self.thread.start()

    def __exit__(self, *error):
        self.stop.set()
        self.thread.join()

    def _follow(self):
        while not self.stop.wait(0.5):
            self._show()
        self._show()

    def _show(self):
        with self.log.open() as stream:
            stream.seek(self.offset)
            for line in stream:
                self.say("  " + line.rstrip())
            self.offset = stream.tell()
