"""Does a study survive kill -9? Kills at random moments of a tiny run, then one clean resume.

    python benchmarks/soak.py --kills 20

First a run that nothing disturbs. Then the same run in another folder: each stage is killed
equally often, at a moment drawn evenly over the time the stage took undisturbed, but at most
--window seconds after it continued. Each start continues where the last kill left it, so the kills
spread over the stage. The victim is drawn too: the command alone, its kernel, or the whole process
group at once, as when the machine loses power. Writes docs/results/soak.json: every kill, which
results differ afterwards (times left out), and which finished knees or models were computed twice.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil

from ctsma.files import git_commit, sha256_file, write_json
from ctsma_lab.run import RESULTS
from ctsma_lab.runner import status
from kneesim import protocol_sha256

OUT = Path(__file__).parents[1] / "docs" / "results" / "soak.json"
VICTIMS = ("command", "kernel", "process group")
TIMES = ("seconds", "finished", "cpu_seconds")  # keys that hold or begin so are wall or CPU time


def started(base: Path, name: str) -> subprocess.Popen:
    """A tiny run in its own process group, one process at a time; its output can be read."""
    options = ["--profile", "tiny", "--name", name, "--jobs", "1"]
    command = [sys.executable, "-u", "-m", "ctsma.cli", "run", *options]
    piped = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=base, start_new_session=True, **piped)


def finished(process: subprocess.Popen) -> None:
    """Wait for the end of a run that must succeed."""
    output = process.communicate()[0]
    if process.returncode:
        raise SystemExit(f"the run failed ({process.returncode}):\n{output}")


def kill(process: subprocess.Popen, victim: str) -> str:
    """SIGKILL without warning; returns whom it hit (the command where there is no kernel yet)."""
    kernels = [
        c
        for c in psutil.Process(process.pid).children(recursive=True)
        if "ipykernel_launcher" in c.cmdline()
    ]
    if victim == "kernel" and kernels:
        kernels[0].kill()
    elif victim == "process group":
        for child in psutil.Process(process.pid).children(recursive=True):
            child.kill()
        process.kill()
    else:
        process.kill()
    process.communicate(timeout=60)
    return victim if victim != "kernel" or kernels else "command"


def disturbed(
    base: Path, stage: str, seconds: float, victim: str, rng: np.random.Generator
) -> dict:
    """Start a run, wait for a stage to begin, kill at a random moment of it; what happened."""
    process, moment = started(base, "disturbed"), float(rng.uniform(0, seconds))
    for line in process.stdout:
        if line.startswith(f"{stage}: running"):
            break
    if process.poll() is None:
        time.sleep(moment)
    event = {"stage": stage, "after_seconds": round(moment, 2)}
    if (
        process.poll() is not None
    ):  # what was left of the stage, and all after it, took less than the moment drawn
        return event | {"victim": "none: finished before", "exit_code": process.returncode}
    hit = kill(process, victim)
    return event | {"victim": hit, "exit_code": process.returncode}


def kept(run: Path) -> dict[str, int]:
    """Time stamps of what is finished: records of knees and of models."""
    folders = ("cohort/records", "calibration", "registration", "patches", "models")
    files = [
        file
        for folder in folders
        for file in (run / folder).glob("*.json")
        if "_stages" not in file.name
    ]
    return {str(file.relative_to(run)): file.stat().st_mtime_ns for file in files}


def timeless(value):
    """A result without wall and CPU times."""
    if isinstance(value, dict):
        return {k: timeless(v) for k, v in value.items() if not k.startswith(TIMES)}
    return [timeless(v) for v in value] if isinstance(value, list) else value


def differing(one: Path, other: Path) -> list[str]:
    """Results, predictions and images of two runs that are not the same."""
    names = sorted(file.relative_to(one) for file in (one / "results").glob("*.json"))
    texts = [
        n
        for n in names
        if timeless(json.loads((one / n).read_text()))
        != timeless(json.loads((other / n).read_text()))
    ]
    images = [file.relative_to(one) for file in (one / "cohort" / "images").iterdir()]
    exact = [*images, Path("cohort/simulated.csv"), Path("models/predictions.csv")]
    return [
        str(n) for n in texts + [n for n in exact if sha256_file(one / n) != sha256_file(other / n)]
    ]


def main() -> None:
    """Run undisturbed, run disturbed, compare, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--window", type=float, default=30.0)
    parser.add_argument(
        "--folder", type=Path, help="work here, and reuse a run calm that is done here"
    )
    given = parser.parse_args()
    rng, kills, twice = np.random.default_rng(given.seed), [], set()
    with tempfile.TemporaryDirectory() as folder:
        base = given.folder or Path(folder)
        base.mkdir(parents=True, exist_ok=True)
        finished(started(base, "calm"))
        calm, run = base / "runs" / "calm", base / "runs" / "disturbed"
        seconds = {row["stage"]: row["seconds"] for row in status(calm)}
        for number in range(given.kills):
            stage = list(RESULTS)[number * len(seconds) // given.kills]
            before, window = kept(run), min(seconds[stage], given.window)
            kills.append(disturbed(base, stage, window, str(rng.choice(VICTIMS)), rng))
            now = kept(run)
            twice |= {name for name, stamp in before.items() if now.get(name) != stamp}
            print(kills[-1], flush=True)
        before = kept(run)
        finished(started(base, "disturbed"))
        twice |= {name for name, stamp in before.items() if kept(run).get(name) != stamp}
        left = sorted(str(file.relative_to(run)) for file in run.rglob(".partial-*"))
        found = {
            "kills": kills,
            "seed": given.seed,
            "window_seconds": given.window,
            "undisturbed_seconds": seconds,
        }
        found |= {
            "n_results": len(list((calm / "results").glob("*.json"))),
            "differing": differing(calm, run),
        }
        found |= {
            "computed_twice": sorted(twice),
            "temporary_files_left": len(left),
            "signal": "SIGKILL",
        }
        found |= {"protocol_sha256": protocol_sha256(), "git_commit": git_commit()}
    print(json.dumps(found, indent=1))
    write_json(OUT, found)


if __name__ == "__main__":
    main()
