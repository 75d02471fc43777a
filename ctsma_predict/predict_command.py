"""`ctsma predict`: estimate the biomarkers of knees from their CT alone."""

import argparse
from collections.abc import Callable
from pathlib import Path

from ctsma.common import FAILED, InputError
from ctsma.files import SHARE
from ctsma_predict.folder import listed_cts, manifest_cts, predict_cts

SHIPPED_MODEL = SHARE / "models" / "full"  # trained by the published run


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `ctsma predict`."""
    add = parser.add_argument
    add("ct", nargs="*", metavar="CT[:L|:R]", help="NIfTI file or DICOM folder, with its side")
    add("--side", choices=["L", "R"], help="side of the CTs that name none")
    add("--manifest", help="predict every CT of this manifest instead")
    add("--labels", help="own bone labels of one CT: 1 femur, 2 tibia (docs/own_data.md)")
    add("--root", help="folder that the manifest's paths are relative to (default: its own)")
    add("--model", default=str(SHIPPED_MODEL), help="model directory (default: the shipped one)")
    add("--out", required=True, help="folder of the results, one folder per CT")
    add("--jobs", type=int, default=2, help="CTs at a time, one thread each (default: 2)")


def run(arguments: argparse.Namespace, progress: Callable[..., None]) -> int:
    """Estimate the CTs and print where the results are; the exit code is 1 where one failed."""
    if bool(arguments.ct) == bool(arguments.manifest):
        remedy = "write ctsma predict CT:R ..., or --manifest FILE"
        raise InputError("predict", "needs either CTs or a manifest", remedy)
    if arguments.manifest:
        knees = manifest_cts(arguments.manifest, arguments.root)
    else:
        knees = listed_cts(arguments.ct, arguments.side)
    if arguments.labels:
        if arguments.manifest or len(knees) > 1:
            problem = "belongs to one CT given by its path"
            raise InputError("--labels", problem, "list several in column ct_labels of a manifest")
        knees["ct_labels"] = str(Path(arguments.labels).resolve())
    table = predict_cts(knees, arguments.model, arguments.out, arguments.jobs, progress)
    for row in table.to_dict("records"):
        page = Path(arguments.out) / row["knee_id"] / "report.html"
        print(f"{row['knee_id']}: {row['error'] or page}")
        if not row["error"] and row["warnings"]:
            print("\n".join(f"  warning: {text}" for text in row["warnings"].split("; ")))
    return FAILED if (table["error"] != "").any() else 0
