"""Compare the results and predictions of two runs, up to renamed keys.

    python benchmarks/compare_runs.py runs/before runs/after --renames renames.json

renames.json maps names of the first run to those of the second ({"old_arm": "new_arm"}); keys and
texts are renamed. Numbers of wall and CPU time and the origin are left out. Prints, per file, how
many numbers both runs have, the largest relative difference and where it is, and which keys only
one run has. The exit code is 1 where a shared number differs by more than --tolerance.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import pandas as pd

INTERVALS = ("ci_low", "ci_high", "bootstrap_", "band_", "mean_low", "mean_high", "slope_p")
LEFT_OUT = ("seconds", "cpu_seconds", "git_commit", "packages", "schema_version", "minutes")


def flatten(value, renames: dict, path: str = "") -> dict[str, object]:
    """Numbers and texts of a nested result by the path of their keys."""
    if isinstance(value, dict):
        found = {}
        for key, entry in value.items():
            name = renamed(key, renames)
            if not name.startswith(LEFT_OUT):
                found |= flatten(entry, renames, f"{path}.{name}" if path else name)
        return found
    if isinstance(value, list):
        found = {}
        for number, entry in enumerate(value):
            name = str(number)
            if isinstance(entry, dict):  # a row of a table is named by its texts
                texts = [renamed(v, renames) for v in entry.values() if isinstance(v, str)]
                name = "/".join(texts) or name
            found |= flatten(entry, renames, f"{path}[{name}]")
        return found
    return {path: renamed(value, renames) if isinstance(value, str) else value}


def renamed(text: str, renames: dict) -> str:
    """The text with every old name replaced, the longest first."""
    for old in sorted(renames, key=len, reverse=True):
        text = text.replace(old, renames[old])
    return text


def relative_difference(one: float, other: float) -> float:
    """Difference over the larger magnitude; 0 for equal values."""
    size = max(abs(one), abs(other))
    return abs(one - other) / size if size else 0.0


def compare_results(one: Path, other: Path, renames: dict, point_estimates: bool) -> dict:
    """Shared numbers of two results files, their largest difference, and the keys of one alone."""
    before = flatten(json.loads(one.read_text()), renames)
    after = flatten(json.loads(other.read_text()), {})
    numbers = (int, float)
    shared = [k for k in before if isinstance(before[k], numbers) and k in after]
    shared = [k for k in shared if isinstance(after[k], numbers)]
    if point_estimates:
        shared = [key for key in shared if not any(word in key for word in INTERVALS)]
    differences = {key: relative_difference(before[key], after[key]) for key in shared}
    worst = max(differences, key=differences.get, default="")
    return {
        "file": one.name,
        "n_numbers": len(shared),
        "largest_difference": differences.get(worst, 0.0),
        "where": worst,
        "only_before": sorted({key.split(".")[0] for key in set(before) - set(after)}),
        "only_after": sorted({key.split(".")[0] for key in set(after) - set(before)}),
    }


def compare_predictions(one: Path, other: Path, renames: dict) -> dict:
    """Largest relative difference of the predictions that both runs have."""
    keys = ["arm", "seed", "knee_id", "patch_id"]
    before, after = (pd.read_csv(path) for path in (one, other))
    before["arm"] = [renamed(arm, renames) for arm in before["arm"]]
    columns = ["bv_tv", "tb_th_mm", "tb_sp_mm", "tb_n_per_mm"]
    both = before.merge(after, on=keys, suffixes=("", "_after"))
    largest = 0.0
    for name in columns:
        gap = np.abs(both[name] - both[f"{name}_after"]) / np.abs(both[name])
        largest = max(largest, float(gap.max()))
    return {"file": one.name, "n_rows": len(both), "n_before": len(before)} | {
        "largest_difference": largest
    }


def main() -> int:
    """Compare every results file and the predictions by seed; print one JSON object per file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--renames", type=Path, help="JSON file of old and new names")
    parser.add_argument("--tolerance", type=float, default=1e-6)
    parser.add_argument("--point-estimates", action="store_true", help="leave out intervals")
    given = parser.parse_args()
    renames = json.loads(given.renames.read_text()) if given.renames else {}
    found = []
    for file in sorted((given.before / "results").glob("*.json")):
        other = given.after / "results" / file.name
        found.append(compare_results(file, other, renames, given.point_estimates))
    predictions = Path("models") / "predictions_by_seed.csv"
    found.append(
        compare_predictions(given.before / predictions, given.after / predictions, renames)
    )
    for row in found:
        print(json.dumps(row))
    return int(any(row["largest_difference"] > given.tolerance for row in found))


if __name__ == "__main__":
    sys.exit(main())
