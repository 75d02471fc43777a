"""CPU seconds of the simulation of a knee, by part, against another commit.

    python benchmarks/speed.py simulation [--parent COMMIT] [--knees 4]

Simulates the same knees of the full field of view on one thread: an earlier knee, which is not
counted, compiles and fills caches. With --parent the same is measured with the packages of that
commit, in turn with these, since the speed of a machine varies; of each the fastest of several
rounds counts. Writes docs/results/speed.json, one key per part.
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


PARTS = {"simulation": simulation}


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
