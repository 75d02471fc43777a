"""CPU seconds per knee of parts of the study, against another commit.

    python benchmarks/speed.py PART [--parent COMMIT] [--knees 4]

simulation    the same knees of the full field of view, by step
ground_truth  true biomarkers of the patches of simulated knees
registration  one MR with its CT, files read and written
training      four epochs of teacher and student on random patches, 16 of a knee
scaling       whole runs of 10, 20, 40 ... knees up to --knees, and the exponent of their cost

All but `scaling` run on one thread: an earlier knee, which is not counted, compiles and fills
caches. With --parent the same is measured with the packages of that commit, in turn with these,
since the speed of a machine varies; of each the fastest of several rounds counts. Writes
docs/results/speed.json, one key per part. Patches per second of training as a share of a plain
convolution's rate are in `training_speed.py`, peers of registration in `registration_peers.py`.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import numpy as np

from ctsma.files import ROOT, git_commit, versions, write_json

OUT = ROOT / "docs" / "results" / "speed.json"
SEED, ROUNDS = 11, 2
ONE_THREAD = ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
ONE_THREAD += ("ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS",)


def simulation(n_knees: int) -> dict[str, float]:
    """CPU seconds per knee: of parts, the rest, and in total."""
    from kneesim import ct, draw_subjects, knees, load_protocol, mr, painting

    seconds, scan = defaultdict(float), {"name": ""}

    def count(module, name: str, part: str) -> None:
        """Add the time of a function of a module, where it has it, to a part."""
        function = getattr(module, name, None)

        def timed(*arguments, **options):
            started = time.process_time()
            result = function(*arguments, **options)
            seconds[part.format(**scan)] += time.process_time() - started
            return result

        if function is not None:
            setattr(module, name, timed)

    def follow(name: str) -> None:
        """Remember which scanner is at work, for the parts that both use."""
        function = getattr(knees, f"scan_{name}")

        def followed(*arguments):
            scan["name"] = name
            return function(*arguments)

        setattr(knees, f"scan_{name}", followed)

    count(knees, "make_subject", "microstructure")
    for name, module in (("ct", ct), ("mr", mr)):
        follow(name)
        count(module, "tissue_fields", "fields")
    count(painting, "paint", "{name}_painting")
    for name in ("write_image", "write_volume", "write_truth", "sha256_file"):
        count(knees, name, "writing")
    rows = draw_subjects(load_protocol(), n_knees + 1, SEED).to_dict("records")
    with tempfile.TemporaryDirectory() as root:
        knees.simulate_knee(rows[-1], Path(root), root=root, seed=SEED)
        seconds.clear()
        started = time.process_time()
        for row in rows[:-1]:
            knees.simulate_knee(row, Path(root), root=root, seed=SEED)
        total = time.process_time() - started
    rest = total - sum(seconds.values())
    return {part: s / n_knees for part, s in seconds.items()} | {
        "rest": rest / n_knees,
        "total": total / n_knees,
    }


def simulated_knees(n_knees: int, root: str) -> list[dict]:
    """Manifest rows of knees of the full field of view, whose files are written below `root`."""
    import kneesim
    from kneesim.knees import simulate_knee

    rows = kneesim.draw_subjects(kneesim.load_protocol(), n_knees, SEED).to_dict("records")
    return [row | simulate_knee(row, Path(root), root=root, seed=SEED) for row in rows]


def ground_truth(n_knees: int) -> dict[str, float]:
    """CPU seconds per knee of the true biomarkers of its patches; the knees are not counted."""
    import kneesim
    from kneesim.patch_truth import write_ground_truth

    def measure_truth(row: dict) -> None:
        folder, truth = Path(root), kneesim.read_truth(root, row["knee_id"])
        write_ground_truth(folder, folder, row, truth, 16, np.random.default_rng(SEED))

    cutting = {"n_per_compartment": 4, "n_truth": 1, "seed": SEED, "definition": "plate"}
    with tempfile.TemporaryDirectory() as root:
        rows = simulated_knees(n_knees + 1, root)
        for row in rows:
            kneesim.extract_true_patches(row, Path(root), root=root, **cutting)
        measure_truth(rows[-1])
        started = time.process_time()
        for row in rows[:-1]:
            measure_truth(row)
        return {"total": (time.process_time() - started) / n_knees}


def registration(n_knees: int) -> dict[str, float]:
    """CPU seconds of registering the MR of a knee with its CT; the simulation is not counted."""
    from ctsma.registration import register_pair

    with tempfile.TemporaryDirectory() as root:
        rows = simulated_knees(n_knees + 1, root)
        for row in rows:
            row.pop("mr_rescan", None)
        register_pair(rows[-1], Path(root), root=root, seed=SEED)
        started = time.process_time()
        for row in rows[:-1]:
            register_pair(row, Path(root), root=root, seed=SEED)
        return {"total": (time.process_time() - started) / n_knees}


def training(n_knees: int) -> dict[str, float]:
    """CPU seconds per knee of four epochs of a teacher and of a student, on random patches."""
    import pandas as pd
    import torch

    from ctsma.arms import ARMS
    from ctsma.common import BIOMARKERS, BONES
    from ctsma.distillation import Settings
    from ctsma.distillation.data import make_fold, prepare
    from ctsma.distillation.training import train
    from ctsma.patches import CT_SHAPE, MR_SHAPE, Patches

    torch.set_num_threads(1)
    rng, n = np.random.default_rng(SEED), 16 * n_knees
    knees = [f"k{row // 16}" for row in range(n)]
    table = pd.DataFrame({"knee_id": knees, "subject_id": knees})
    table[list(BIOMARKERS)] = rng.random((n, len(BIOMARKERS)))
    table[[f"cortical_hu_{bone}" for bone in BONES]] = 1500.0
    ct, mr = 300 + 200 * rng.standard_normal((n, *CT_SHAPE)), rng.random((n, *MR_SHAPE))
    data = prepare(Patches(table, mr=mr, ct=ct, voi=np.ones((n, *MR_SHAPE), bool)))
    subjects = table["subject_id"].unique()
    splits = pd.DataFrame({"subject_id": subjects, "fold": np.arange(len(subjects)) % 4})
    seconds = {}
    for name in ("mr_teacher", "ct_residual"):
        for epochs in (1, 4):  # the first is not counted
            settings = Settings(epochs=epochs, precision="float32")
            fold = make_fold(data, splits, 0, 0, settings, ARMS[name])
            started = time.process_time()
            train(data, fold, {}, None, 0, settings)
            seconds[name] = (time.process_time() - started) / n_knees
    return seconds | {"total": sum(seconds.values())}


def scaling(n_knees: int) -> dict[str, float]:
    """CPU seconds per knee of whole runs by number of knees, and the exponent of their cost."""
    import resource

    counts = [10 * 2**k for k in range(20) if 10 * 2**k <= n_knees]
    if len(counts) < 2:
        sys.exit("scaling: compares runs of 10 and more knees; give --knees 20 or more.")
    per_knee = {}
    for n in counts:
        with tempfile.TemporaryDirectory() as folder:
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            run = [sys.executable, "-m", "ctsma.cli", "run", "--set", f"n_knees={n}"]
            subprocess.run(run, cwd=folder, check=True, stdout=subprocess.DEVNULL)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
        used = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
        per_knee[n] = used / n
    total = np.array([n * seconds for n, seconds in per_knee.items()])
    exponent = np.polyfit(np.log(counts), np.log(total), 1)[0]
    by_count = {str(n): seconds for n, seconds in per_knee.items()}
    return by_count | {"exponent": float(exponent), "total": per_knee[counts[-1]]}


PARTS = {
    "simulation": simulation,
    "ground_truth": ground_truth,
    "registration": registration,
    "training": training,
    "scaling": scaling,
}


def measure(part: str, n_knees: int, tree: Path) -> dict[str, float]:
    """The part measured in a process of one thread, with the packages of a source tree."""
    environment = os.environ | dict.fromkeys(ONE_THREAD, "1") | {"PYTHONPATH": str(tree)}
    command = [sys.executable, __file__, part, "--knees", str(n_knees), "--measure"]
    done = subprocess.run(
        command, env=environment, cwd=tree, check=True, stdout=subprocess.PIPE, text=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def compare(part: str, n_knees: int, parent: str | None) -> dict:
    """Seconds of these packages and, where a commit is given, of its packages and the ratio."""
    with tempfile.TemporaryDirectory() as folder:
        trees = {"now": ROOT}
        if parent:
            trees["parent"] = Path(folder) / "parent"
            git = ["git", "-C", str(ROOT), "worktree"]
            subprocess.run([*git, "add", "--detach", str(trees["parent"]), parent], check=True)
        try:
            runs = {name: [] for name in trees}
            for _ in range(ROUNDS):
                for name, tree in trees.items():
                    runs[name].append(measure(part, n_knees, tree))
        finally:
            if parent:
                subprocess.run([*git, "remove", "--force", str(trees["parent"])], check=False)
    best = {name: min(rounds, key=lambda s: s["total"]) for name, rounds in runs.items()}
    found = {"cpu_seconds_per_knee": best, "knees": n_knees}
    if parent:
        found |= {"parent": parent, "ratio": best["now"]["total"] / best["parent"]["total"]}
    return found


def main() -> None:
    """Measure one part and write its numbers beside those of the others."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--parent", help="commit to compare with")
    parser.add_argument("--knees", type=int, default=4)
    parser.add_argument("--measure", action="store_true", help="print seconds, write nothing")
    given = parser.parse_args()
    if given.measure:
        print(json.dumps(PARTS[given.part](given.knees)))
        return
    found = compare(given.part, given.knees, given.parent)
    print(json.dumps(found, indent=1))
    stored = json.loads(OUT.read_text("utf-8")) if OUT.exists() else {}
    stored[given.part] = found | {"commit": git_commit(), "versions": versions()}
    write_json(OUT, stored)


if __name__ == "__main__":
    main()
