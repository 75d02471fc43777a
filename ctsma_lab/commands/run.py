"""`ctsma run`: run the study's notebooks in order, resuming what is done."""

import argparse
import importlib
import sys
from collections.abc import Callable
from pathlib import Path

from ctsma.common import FAILED, InputError
from ctsma_lab import runner
from ctsma_lab.commands import run_folder
from ctsma_lab.report import write_report

SET_BY_RUN = ("run_dir", "profile", "overwrite")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `ctsma run`."""
    add = parser.add_argument
    add("--profile", default="quick", help="tiny, quick, full or paper (default: quick)")
    add("--name", help="folder below runs/ (default: the profile's name)")
    add("--from", dest="start", metavar="STAGE", help="run this stage again, and all after it")
    add("--manifest", help="your own cohort instead of the simulated one")
    add("--root", help="folder that the manifest's paths are relative to (default: its own)")
    add("--anatomy", help="label map of a knee, the template of the simulated ones")
    add("--seed", type=int, help="seed of cohort, folds and networks (default: 0)")
    add("--jobs", type=int, dest="n_jobs", help="processes, one thread each (default: 2)")
    add("--set", action="append", default=[], metavar="NAME=VALUE", help="a notebook parameter")
    add("--dry-run", action="store_true", help="show what would run, with time and disk, and stop")


def run(arguments: argparse.Namespace, progress: Callable[..., None]) -> int:
    """Run the notebooks and write the report; returns the exit code."""
    path = run_folder(arguments.name or arguments.profile)
    parameters = _given_parameters(arguments)
    identity = _identity(parameters)
    profile, start = arguments.profile, arguments.start
    if arguments.dry_run:
        _print_plan(runner.plan(path, profile, parameters, identity, start), profile)
        return 0
    try:
        runner.run(path, profile, parameters, identity, start, progress)
    except runner.StageFailed as failure:
        print(failure, file=sys.stderr)
        return FAILED
    n_jobs = int(parameters.get("n_jobs", 2))  # of --jobs or --set
    progress(f"report: {write_report(path, progress, n_jobs)}")
    return 0


def _given_parameters(arguments: argparse.Namespace) -> dict:
    """Notebook parameters that the command line sets; paths are absolute."""
    given = {}
    for pair in arguments.set:
        name, equals, value = pair.partition("=")
        if not equals:
            raise InputError(f"--set {pair}", "has no value", "write --set NAME=VALUE")
        if name in SET_BY_RUN:
            problem = "is set by ctsma run itself"
            raise InputError(f"--set {name}", problem, "give --name and --profile instead")
        given[name] = value
    for name in ("seed", "n_jobs"):
        if getattr(arguments, name) is not None:
            given[name] = getattr(arguments, name)
    for name in ("manifest", "root", "anatomy"):
        if value := getattr(arguments, name) or given.get(name):
            given[name] = str(Path(value).resolve())
    return given


def _identity(parameters: dict) -> dict:
    """What a run's folder may hold only one of: the cohort, and the protocol of a simulated one."""
    if parameters.get("manifest"):
        return {"cohort": f"manifest {parameters['manifest']}"}
    anatomy = parameters.get("anatomy")
    cohort = f"simulated from {anatomy}" if anatomy else "simulated"
    protocol = importlib.import_module("kneesim").protocol_sha256()
    return {"cohort": cohort, "simulation protocol": protocol}


def _print_plan(steps: list[dict], profile: str) -> None:
    about = runner.profiles()[profile]
    minutes = {step["stage"]: about["minutes"].get(step["stage"]) for step in steps}
    waiting = [step["stage"] for step in steps if step["state"] == "run"]
    for step in steps:
        measured = step["stage"] in waiting and minutes[step["stage"]] is not None
        estimate = f"about {round(minutes[step['stage']], 1):g} min" if measured else ""
        if step["state"] == "copy":
            estimate = f"from {step['source']}"
        print(f"{step['stage']:28}{step['state']:6}{estimate}")
    time = "time not measured"
    if all(minutes[stage] is not None for stage in waiting):
        total = sum(minutes[stage] for stage in waiting)
        time = f"in all about {round(total, 1):g} minutes on two cores"
    print(f"{time}, {about['disk_gb']:g} GB on disk")
