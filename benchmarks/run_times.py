"""Minutes of every stage of a finished run, which `ctsma run --dry-run` and the README show.

    python benchmarks/run_times.py runs/quick runs/full

Reads the records of the stages. Each must have run whole: what a stopped run reused is not in its
time. Writes docs/results/run_times.json, one entry per profile; other profiles keep theirs. Beside
the minutes stands the rate of this machine in a matrix product, so run it where the runs were made.
"""

import argparse
import json
import os
import time
from pathlib import Path

import numpy as np
from threadpoolctl import threadpool_limits

from ctsma.common import InputError
from ctsma.files import write_json
from ctsma_lab.profiles import RUN_TIMES
from ctsma_lab.runner import STAGES, status


def measured(run: Path) -> tuple[str, dict]:
    """Profile of a finished run, and its minutes by stage with their origin."""
    rows = {row["stage"]: row for row in status(run)}
    missing = [stage for stage in STAGES if rows[stage]["seconds"] is None]
    if missing:
        raise InputError(run, f"has not finished {', '.join(missing)}", "finish the run first")
    profile = json.loads((run / "run.json").read_text(encoding="utf-8"))["profile"]
    results = json.loads((run / "results" / "cohort.json").read_text(encoding="utf-8"))
    return profile, {
        "minutes": {stage: round(rows[stage]["seconds"] / 60, 2) for stage in STAGES},
        "n_knees": results["n_knees"],
        "cores": os.cpu_count(),
        "gflops_per_core": round(matrix_product_gflops()),
        "git_commit": results["git_commit"],
        "finished": rows[STAGES[-1]]["finished"],
    }


def matrix_product_gflops(size: int = 1024) -> float:
    """Rate of a float32 matrix product on one thread, best of ten."""
    a, seconds = np.ones((size, size), np.float32), []
    with threadpool_limits(1):
        for _ in range(10):
            started = time.perf_counter()
            a @ a
            seconds.append(time.perf_counter() - started)
    return 2 * size**3 / min(seconds) / 1e9


def main() -> None:
    """Read the runs, then write all that could be read."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, help="folders of finished runs")
    times = json.loads(RUN_TIMES.read_text("utf-8")) if RUN_TIMES.exists() else {}
    times |= dict(measured(run) for run in parser.parse_args().runs)
    write_json(RUN_TIMES, times)
    print(json.dumps(times, indent=1))


if __name__ == "__main__":
    main()
