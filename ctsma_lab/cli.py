"""The command line. Exit codes: 0 good, 1 a stage or a knee failed, 2 the input cannot be used,
130 stopped by the user.

A command is a module with `add_arguments(parser)` and `run(arguments, progress) -> exit code`. It
is imported only when it is given, so that `ctsma` itself needs none of the packages beside it.
"""

import argparse
import importlib
import sys
from collections.abc import Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from ctsma import __version__
from ctsma.common import BAD_INPUT, FAILED, STOPPED, InputError
from ctsma_lab import terminal

COMMANDS = {  # name: (module, help)
    "run": ("ctsma_lab.commands.run", "run the study's notebooks, resuming what is done"),
    "status": ("ctsma_lab.commands.status", "which stages of a run are done"),
    "report": ("ctsma_lab.commands.report", "write a run's HTML report again"),
    "simulate": ("kneesim.command", "write a simulated cohort to disk"),
    "import": ("dicom_import.command", "make a de-identified cohort from a DICOM export"),
    "check-data": ("dicom_import.check_command", "every problem of every knee of a manifest"),
    "predict": ("ctsma_predict.predict_command", "estimate biomarkers from CT alone"),
    "export-model": ("ctsma_predict.export_command", "write a run's networks for predict"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code. A problem of the input never shows a traceback."""
    argv = sys.argv[1:] if argv is None else list(argv)
    try:
        arguments = build_parser(argv).parse_args(argv)
        terminal.check_arguments(arguments)
        with terminal.Progress() as progress, _cluster(arguments):
            return arguments.command(arguments, progress)
    except InputError as error:
        print(error, file=sys.stderr)
        return BAD_INPUT
    except OSError as error:  # a full disk, a folder without permission
        place, reason = error.filename or "disk", error.strerror or error
        print(f"{place}: {reason}; correct this and give the command again.", file=sys.stderr)
        return FAILED
    except (MemoryError, BrokenProcessPool):
        remedy = "free memory or give --jobs 1, and give the command again."
        print(f"ctsma: a process was killed or ran out of memory; {remedy}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print("stopped; the same command continues where it stopped", file=sys.stderr)
        return STOPPED


def _cluster(arguments: argparse.Namespace) -> AbstractContextManager:
    """Where the command's tasks run: on the cluster of --dask, or on this machine."""
    if not vars(arguments).get("dask"):
        return nullcontext()
    return importlib.import_module("ctsma_lab.cluster").on_cluster(arguments.dask, Path())


def build_parser(argv: Sequence[str]) -> argparse.ArgumentParser:
    """The parser for a command line; only the module of its command is imported."""
    about = "Trabecular biomarkers from knee CT, learned from MR."
    parser = argparse.ArgumentParser(prog="ctsma", description=about)
    parser.add_argument("--version", action="version", version=f"ctsma {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, (module, text) in COMMANDS.items():
        subparser = commands.add_parser(name, help=text)
        if name in argv[:1]:
            command = importlib.import_module(module)
            command.add_arguments(subparser)
            if "--jobs" in subparser.format_help():
                about = "address of a Dask scheduler, in place of --jobs, see docs/cluster.md"
                subparser.add_argument("--dask", metavar="tcp://HOST:PORT", help=about)
            subparser.set_defaults(command=command.run)
    return parser
