"""The command `ctsma import`: its arguments, and what it prints. Exit code 1: a series failed."""

import argparse
from collections.abc import Callable

from .importing import Imported, choose, import_dicom

SHOWN = ["subject", "side", "modality", "series_number", "n_images", "thickness_mm", "kernel"]
SHOWN += ["echo", "status", "note"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `ctsma import`."""
    add = parser.add_argument
    add("folder", help="tree of mixed DICOM files")
    add("--out", required=True, help="folder of the cohort, made or extended")
    add("--choice", help="CSV that overrides the choice of series (default: OUT-choice.csv)")
    add("--choose", action="store_true", help="write that CSV, to be edited, and stop")
    add("--side", choices=["L", "R"], help="of the series that do not name it")
    add("--echo", type=int, help="of multi-echo MR (default: the shortest)")
    add("--site", default="", help="for the manifest's column site")
    add("--salt-file", help="secret of the pseudonyms, made if absent (default: OUT.salt)")
    add("--jobs", type=int, default=1, help="processes, one thread each")


def run(arguments: argparse.Namespace, progress: Callable[..., None]) -> int:
    """Run `ctsma import`; returns the exit code."""
    choice_file = arguments.choice or f"{arguments.out}-choice.csv"
    common = {
        "salt_file": arguments.salt_file or f"{arguments.out}.salt",
        "choice_file": choice_file,
        "side": arguments.side,
        "echo": arguments.echo,
    }
    if arguments.choose:
        result = choose(arguments.folder, arguments.out, **common)
        progress(f"choice: {choice_file} (edit take and side, then import without --choose)")
    else:
        options = {"site": arguments.site, "n_jobs": arguments.jobs, "report": progress}
        result = import_dicom(arguments.folder, arguments.out, **common, **options)
    _print(result)
    failed = result.table["status"].isin(["failed", "refused"]).any()
    return 1 if failed or not result.table["selected"].any() else 0


def _print(result: Imported) -> None:
    print(result.table[SHOWN].to_string(index=False, na_rep=""))
    for reason, count in sorted(result.skipped.items()):
        print(f"{count} files skipped: {reason}")
    counts = result.table["status"].value_counts()
    print(", ".join(f"{count} series {status}" for status, count in counts.items()))
    if not {"imported", "selected"} & set(counts.index):
        print("no series was imported: see column note; --choose writes a table to edit")
    if result.manifest:
        path = result.manifest
        print(f"manifest: {path} (fill in oa and kl_grade, then run ctsma check-data {path})")
