"""python -m ctsma_lab.tutorials.make_data runs/full: cut the tutorials' data from a finished run.

The run must be one of simulated knees. Files go to notebooks/data, whose README.md describes them.
"""

import argparse
from pathlib import Path

from ctsma.common import BIOMARKERS, InputError
from ctsma.files import write_text
from ctsma_lab.run import Run

from .data import DATA

ARMS = ("hu_regression_calibrated", "ct_only", "ct_sma", "ct_sma_plus")
PATCH = ["knee_id", "patch_id"]
PLACE = ["knee_id", "subject_id", "patch_id", "fold", "compartment", "u", "v", "w", "mean_hu"]


def main(arguments: list[str] | None = None) -> None:
    """Read the command line and write all files."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("run", type=Path, help="folder of a finished run of simulated knees")
    parser.add_argument("--out", type=Path, default=DATA, help="folder of the files")
    given = parser.parse_args(arguments)
    run = Run(given.run)
    write_tables(run, given.out)


def write_tables(run: Run, out: Path) -> None:
    """Write patches.csv and knees.csv.

    Raises InputError where an arm or the ground truth is missing.
    """
    predictions = run.read_table("models/predictions.csv")
    missing = [arm for arm in ARMS if arm not in set(predictions["arm"])]
    if missing or "bv_tv_true" not in predictions:
        lacking = ", ".join(missing) or "the ground truth"
        problem, remedy = f"lacks {lacking}", "give a finished run of simulated knees"
        raise InputError(run.path / "models" / "predictions.csv", problem, remedy)
    arms = {name: rows.set_index(PATCH).sort_index() for name, rows in predictions.groupby("arm")}
    first = arms[ARMS[0]]
    table = first.reset_index()[PLACE].set_index(PATCH, drop=False)
    for source in ("reference", "true"):
        names = {f"{biomarker}_{source}" for biomarker in BIOMARKERS}
        table = table.join(first[[name for name in first if name in names]])
    for arm in ARMS:
        table = table.join(arms[arm][list(BIOMARKERS)].add_suffix(f"_{arm}"))
    rounding = dict.fromkeys(table.columns, 4) | {"mean_hu": 1, "u": 1, "v": 1, "w": 1}
    text = table.round(rounding).to_csv(index=False, lineterminator="\n")
    write_text(out / "patches.csv", text)

    knees = run.manifest().dropna(subset=["oa"])
    knees = knees.merge(run.splits(), on="subject_id").sort_values("knee_id")
    knees = knees[knees["knee_id"].isin(table["knee_id"])].astype({"oa": int})
    columns = ["knee_id", "subject_id", "fold", "oa", "age", "sex", "bmi"]
    write_text(out / "knees.csv", knees[columns].to_csv(index=False, lineterminator="\n"))


if __name__ == "__main__":
    main()
