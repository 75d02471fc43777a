"""Sizes of simulated bones, and biomarkers of simulated patches, for comparison with publications.

    ctsma simulate --out /tmp/cohort --knees 16
    python benchmarks/simulator_checks.py /tmp/cohort/simulated.csv

Reads the ground truth of the first knees of a simulated cohort and measures their patches, cut at
ground-truth positions; about 10 s per knee. Writes docs/results/simulator.json.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd

from ctsma.cache import map_knees
from ctsma.cohort import read_manifest
from ctsma.common import BIOMARKERS
from ctsma.files import ROOT, git_commit, versions, write_json
from ctsma.patches import collect_tables
from kneesim import extract_true_patches, load_ground_truth, protocol_sha256, read_truth

OUT = ROOT / "docs" / "results" / "simulator.json"
N_BINS = 20
OPTIONS = {"n_per_compartment": 4, "n_truth": 4, "seed": 0, "definition": "plate"}


def bone_sizes(knees: pd.DataFrame) -> dict:
    """Mean and SD of the bones' sizes (mm) by sex, with the number of knees."""
    root = knees.attrs["root"]
    sizes = [read_truth(root, knee_id).sizes_mm() for knee_id in knees["knee_id"]]
    table = pd.DataFrame(sizes).assign(sex=knees["sex"].to_numpy())
    found = {}
    for sex, rows in table.groupby("sex"):
        values = rows.drop(columns="sex")
        summary = {name: {"mean": v.mean(), "sd": v.std()} for name, v in values.items()}
        found[sex] = {"n": len(rows), "mm": summary}
    return found


def biomarker_histograms(knees: pd.DataFrame, folder: Path, n_jobs: int) -> dict:
    """By biomarker: bin edges, and counts of patches of the ground truth and the MR reference."""
    options = OPTIONS | {"root": str(knees.attrs["root"])}
    rows = map_knees(extract_true_patches, knees, folder, options, n_jobs=n_jobs)
    done = rows.loc[rows["error"] == "", "knee_id"]
    table = collect_tables(folder, done)
    table = table[table["flag"] == ""].merge(load_ground_truth(folder), how="left")
    found = {}
    for name in BIOMARKERS:
        truth, reference = table[f"true_{name}"].dropna(), table[name]
        edges = np.histogram_bin_edges([*truth, *reference], bins=N_BINS)
        found[name] = {
            "edges": edges,
            "truth": np.histogram(truth, edges)[0],
            "mr_reference": np.histogram(reference, edges)[0],
        }
    return {"n_truth": int(len(truth)), "n_reference": len(table), "histograms": found}


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("manifest", type=Path, help="CSV of a simulated cohort")
    parser.add_argument("--knees", type=int, default=16, help="its first knees (default: 16)")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--out", type=Path, default=OUT)
    given = parser.parse_args()
    every = read_manifest(given.manifest)
    knees = every.head(given.knees)
    knees.attrs.update(every.attrs)
    with tempfile.TemporaryDirectory() as folder:
        biomarkers = biomarker_histograms(knees, Path(folder), given.jobs)
    content = {
        "n_knees": len(knees),
        "protocol_sha256": protocol_sha256(),
        "git_commit": git_commit(),
        "packages": versions(),
        "sizes": bone_sizes(knees),
        "biomarkers": biomarkers,
    }
    write_json(given.out, content)


if __name__ == "__main__":
    main()
