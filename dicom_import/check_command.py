"""`ctsma check-data`: every problem of every knee of a manifest."""

import argparse
from collections.abc import Callable
from pathlib import Path

from ctsma.cohort import read_manifest
from ctsma.common import FAILED, InputError
from ctsma.files import write_text
from dicom_import.checks import check_knees


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `ctsma check-data`."""
    add = parser.add_argument
    add("manifest", help="CSV of knees; columns: data_manifest/datapackage.json")
    add("--root", help="folder that the image paths are relative to (default: the manifest's)")
    add("--quick", action="store_true", help="only read the images: no bones, no registration")
    add("--out", help="also write the table to this CSV")
    add("--report", help="also write a page of each registration to this folder")
    add("--jobs", type=int, default=1, help="processes, one thread each (default: 1)")


def run(arguments: argparse.Namespace, progress: Callable[..., None]) -> int:
    """Print one line per finding; the exit code is 1 where one of them is fatal."""
    if arguments.quick and arguments.report:
        remedy = "leave out one of them"
        raise InputError("--report", "needs the registration that --quick leaves out", remedy)
    manifest = read_manifest(arguments.manifest, arguments.root)
    deep = not arguments.quick
    options = {"n_jobs": arguments.jobs, "report": progress, "pages": arguments.report}
    table = check_knees(manifest, deep=deep, **options)
    for row in table.to_dict("records"):
        print("{knee_id}  {column:10}{level:8} {check}: {finding}".format(**row))
    if arguments.out:
        write_text(arguments.out, table.to_csv(index=False))
    if arguments.report:
        print(f"registration, knee by knee: {Path(arguments.report, 'index.html')}")
    n_fatal = int((table["level"] == "fatal").sum())
    n_warnings = int((table["level"] == "warning").sum())
    print(f"{len(manifest)} knees, {n_fatal} fatal findings, {n_warnings} warnings")
    return FAILED if n_fatal else 0
