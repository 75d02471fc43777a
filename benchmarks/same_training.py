"""Did a change of the code change what is learned? Every arm and term of the loss, by two versions on the same patches.

    python benchmarks/same_training.py runs/quick --commit 38ea535

Takes the first knees of a run that has patches, trains by the working tree and by the commit (checked out beside it)
with few epochs, and compares the estimates. Parts of docs/results/distillation_evidence.json that were measured by that
commit's code stand for this code too if no estimate differs by more than a thousandth of its biomarker's SD; the file
then says so under `same_training`, with the largest difference seen.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd

from ctsma import cohort, patches

N_KNEES, N_FOLDS, EPOCHS, TOLERANCE = 16, 2, 3, 1e-3
ROOT = Path(__file__).parents[1]
EVIDENCE = ROOT / "docs" / "results" / "distillation_evidence.json"
TERMS = "feature_l1", "feature_correlation", "attention", "local_evidence", "relation", "prediction", "detail"
ARMS = "hu_regression", "ruler_regression", "ct_only", "ct_residual", "ct_sma", "ct_sma_plus", "mr_teacher"
CODE = """
import json, sys, pandas as pd
from pathlib import Path
from ctsma import cohort, distillation, patches
work, given = Path(sys.argv[1]), json.loads(sys.argv[2])
data = patches.load_patches(given["folder"])
people = pd.unique(data.table["subject_id"])
splits = pd.DataFrame({"subject_id": people, "fold": [n % given["n_folds"] for n in range(len(people))]})
found = distillation.cross_validate(data, splits, given["arms"], given["settings"], [0], work / "models", n_jobs=2)
found.to_csv(work / "predictions.csv", index=False)
(work / "code").write_text(cohort.source_sha256("ctsma.distillation"))
"""


def trained(tree: Path, folder: Path) -> tuple[pd.DataFrame, str]:
    """Out-of-fold estimates by the code of a tree, and that code's hash."""
    settings = {"epochs": EPOCHS, "ablations": {f"only_{term}": {term: 0.1} for term in TERMS}}
    with tempfile.TemporaryDirectory() as work:
        arms = [*ARMS, *settings["ablations"]]
        given = json.dumps({"folder": str(folder), "n_folds": N_FOLDS, "settings": settings, "arms": arms})
        environment = os.environ | {"PYTHONPATH": str(tree)}
        subprocess.run([sys.executable, "-c", CODE, work, given], cwd=work, env=environment, check=True)
        return pd.read_csv(Path(work) / "predictions.csv"), (Path(work) / "code").read_text()


def first_knees(run: Path, folder: Path) -> None:
    """Link the patches of the first knees of a run into a folder."""
    for table in sorted((run / "patches").glob("*_table.csv"))[:N_KNEES]:
        for file in (table, table.with_name(table.name.replace("_table.csv", ".npz"))):
            (folder / file.name).symlink_to(file.resolve())


def main() -> None:
    """Train by both, compare, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--commit", required=True, help="by whose code the evidence was measured")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder, other = Path(place, "patches"), Path(place, "tree")
        folder.mkdir()
        first_knees(given.run, folder)
        spread = patches.load_table(folder)[list(cohort.BIOMARKERS)].std()
        subprocess.run(["git", "worktree", "add", "--detach", other, given.commit], cwd=ROOT, check=True)
        try:
            (old, code), (new, own) = trained(other, folder), trained(ROOT, folder)
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", other], cwd=ROOT, check=True)
    keys = ["arm", "fold", "knee_id", "patch_id"]
    both = old.set_index(keys)[spread.index] - new.set_index(keys)[spread.index]
    largest = (both.abs() / spread).groupby("arm").max().max(axis=1)
    print(largest.to_string())
    if not np.isfinite(largest).all() or largest.max() > TOLERANCE:
        sys.exit(f"the two versions learn differently: by up to {largest.max():.2g} SD; measure the evidence again")
    content = json.loads(EVIDENCE.read_text())
    made = {"code_sha256": code, "commit": given.commit, "largest_difference_in_sd": float(largest.max())}
    cohort.write_json(EVIDENCE, content | {"same_training": content.get("same_training", {}) | {own: made}})


if __name__ == "__main__":
    main()
