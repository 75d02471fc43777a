"""What a study costs by its size: time, memory and disk of 100, 1,000 and 8,000 knees.

    python benchmarks/cost_by_size.py runs/full --folder /tmp/cost

Simulated load: every step that handles all knees at once, with a real manifest, splits, tables,
training set and diagnosis. Images are those of a few knees of a finished run, repeated. What is
done knee by knee (registration, cutting) and the steps of training are not repeated here: their
time is that of run_times.json and training_speed.json. Every step is a process of its own, whose
largest memory is reported. Writes docs/results/cost_by_size.json.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import joblib
import numpy as np
import pandas as pd
import torch

from ctsma import agreement, diagnosis, patches
from ctsma.arms import ARMS
from ctsma.cache import map_knees
from ctsma.cohort import make_splits, read_manifest, read_splits, splits_path, stored_splits
from ctsma.common import BIOMARKERS
from ctsma.diagnosis.transformer import TransformerSettings, cross_validate_arms
from ctsma.distillation import Settings, TeacherCache, make_fold
from ctsma.distillation.data import IMAGES, knee_batches, make_batch, prepare_in_files
from ctsma.files import git_commit, versions, write_json, write_text
from ctsma.models import build
from ctsma_lab import diagnosis_views
from dicom_import.checks import check_knees
from kneesim import draw_subjects, load_protocol

SIZES = 100, 1000, 8000
PER_KNEE = 16  # patches of the study
CUT = 2  # of them per knee that are cut and prepared; the training set repeats them
N_SAMPLE = 10  # knees of the finished run whose images are repeated
N_BATCHES = 50  # of a training, read and augmented
SEED = 0
OUT = Path(__file__).parents[1] / "docs" / "results" / "cost_by_size.json"
HEADER = ["knee_id", "subject_id", "side", "ct", "mr", "oa", "kl_grade", "age", "sex", "bmi"]
HEADER += ["site", "ct_sha256", "mr_sha256"]


def manifest(run: Path, folder: Path, n: int) -> None:
    """Write and read the manifest, deal and store the folds."""
    knees = draw_subjects(load_protocol(), n, SEED)
    knees["ct"], knees["mr"] = ("images/" + knees["knee_id"] + end for end in ("_ct", "_mr"))
    write_text(folder / "cohort.csv", knees.reindex(columns=HEADER).to_csv(index=False))
    stored_splits(read_manifest(folder / "cohort.csv"), 5, SEED)


def check_data(run: Path, folder: Path, n: int) -> None:
    """`check-data` of all rows; their images are not there, which it says of each."""
    found = check_knees(read_manifest(folder / "cohort.csv"), deep=False)
    assert found["knee_id"].nunique() == n


def link_patches(knee: dict, folder: Path, *, sample: str) -> dict:
    """Patches of a knee as `extract_patches` writes them, its images a link to those of another."""
    number = int(knee["knee_id"][1:]) % N_SAMPLE
    table = pd.read_csv(Path(sample) / f"{number}.csv")
    table = table.assign(knee_id=knee["knee_id"], subject_id=knee["subject_id"])
    files = [f"{knee['knee_id']}_table.csv", f"{knee['knee_id']}.npz"]
    write_text(folder / files[0], table.to_csv(index=False))
    (folder / files[1]).unlink(missing_ok=True)
    os.link(Path(sample) / f"{number}.npz", folder / files[1])
    return {"n_patches": len(table), "files": files}


def patch_tables(run: Path, folder: Path, n: int) -> None:
    """Records and tables of all knees: written, found unchanged by a second call, collected."""
    knees, given = read_manifest(folder / "cohort.csv"), {"sample": str(folder.parent / "sample")}
    for _ in range(2):
        map_knees(link_patches, knees, folder / "patches", given)
    table = patches.collect_tables(folder / "patches", knees["knee_id"])
    write_text(folder / "patches" / patches.TABLE, table.to_csv(index=False))


def training_set(run: Path, folder: Path, n: int) -> None:
    """Read all patches and write what training processes map."""
    (folder / "data").mkdir()
    data = prepare_in_files(patches.load_patches(folder / "patches"), folder / "data")
    joblib.dump(data, folder / "data" / "data")


def repeated(folder: Path) -> None:
    """Repeat the prepared patches to `PER_KNEE` of each knee (not measured)."""
    data, times = joblib.load(folder / "data" / "data"), PER_KNEE // CUT
    images = {}
    for name in IMAGES:
        stored = getattr(data, name)
        with stored.file.open("rb") as source, (folder / name).open("wb") as target:
            for _ in range(times):
                source.seek(0)
                shutil.copyfileobj(source, target, 2**24)
        shape = len(data.table) * times, *stored.shape[1:]
        images[name] = replace(stored, file=folder / name, shape=shape)
    rest = {name: values for name, values in vars(data).items() if name not in (*IMAGES, "table")}
    rest = {name: np.concatenate([values] * times) for name, values in rest.items()}
    table = pd.concat([data.table] * times, ignore_index=True)
    joblib.dump(type(data)(table=table, **images, **rest), folder / "repeated")


def training(run: Path, folder: Path, n: int) -> None:
    """A training process: data, fold, ridge, normalisation, teacher outputs, batches."""
    data, settings = joblib.load(folder / "repeated"), Settings()
    splits = read_splits(splits_path(folder / "cohort.csv"), read_manifest(folder / "cohort.csv"))
    fold = make_fold(data, splits, 0, SEED, settings, ARMS["ct_sma_plus"])
    teacher = build("mr", "compact", torch.Generator().manual_seed(SEED)).eval()
    cache = TeacherCache(teacher.requires_grad_(False), data, fold, settings)
    rng = np.random.default_rng(SEED)
    for rows in knee_batches(data, fold, settings, rng)[:N_BATCHES]:
        batch = make_batch(data, rows, fold.scale, settings, rng)
        cache.outputs(rows, batch.flips)


def diagnose(run: Path, folder: Path, n: int) -> None:
    """Agreement, Transformer (2 epochs), logistic regression, AUC and control of two arms."""
    table, rng = patches.load_table(folder / "patches"), np.random.default_rng(SEED)
    knees = read_manifest(folder / "cohort.csv").set_index("knee_id")
    labels, splits = knees["oa"].astype(int), make_splits(knees.reset_index(), 5, SEED)
    parts = []
    for arm in ("ct_only", "ct_sma"):
        own = table[["knee_id", "subject_id", "patch_id", "compartment", "u", "v", "w"]]
        reference = table[list(BIOMARKERS)]
        noisy = reference * rng.normal(1, 0.1, reference.shape)
        parts.append(own.assign(arm=arm).join(noisy).join(reference.add_suffix("_reference")))
    predictions = pd.concat(parts, ignore_index=True)
    agreement.agreement_table(predictions, rng)
    agreement.paired_differences(predictions, [("ct_sma", "ct_only")], rng)
    tokens = diagnosis.tokens_by_arm(predictions, labels.index)
    settings = TransformerSettings(epochs=2)
    found = cross_validate_arms(tokens, labels, splits, settings)
    features = diagnosis.compartment_means(tokens["ct_only"])
    diagnosis.cross_validate_tabular(features, labels, splits, "logistic")
    scores = found.pivot(index="knee_id", columns="arm", values="score").loc[labels.index]
    subjects = knees.loc[labels.index, "subject_id"]
    diagnosis.bootstrap_auc(labels, scores["ct_only"], subjects.to_numpy(), rng)
    diagnosis.compare_delong(labels, scores["ct_only"], scores["ct_sma"])
    diagnosis_views.permute_labels(labels, subjects, splits, rng)


STEPS = {
    "manifest": manifest,
    "check_data": check_data,
    "patch_tables": patch_tables,
    "training_set": training_set,
    "training": training,
    "diagnosis": diagnose,
}


def write_sample(run: Path, folder: Path) -> None:
    """`CUT` patches of `N_SAMPLE` knees of the run, table and images."""
    folder.mkdir(parents=True, exist_ok=True)
    whole = patches.load_patches(run / "patches")
    groups = list(whole.table.groupby("knee_id").indices.values())[:N_SAMPLE]
    for number, rows in enumerate(groups):
        some = whole.take(rows[:: len(rows) // CUT][:CUT])
        some.table.assign(patch_id=range(CUT)).to_csv(folder / f"{number}.csv", index=False)
        np.savez(folder / f"{number}.npz", mr=some.mr, ct=some.ct, voi=some.voi)


def measured(step: str, run: Path, folder: Path, n: int) -> dict:
    """Cost of one step, in this process."""
    torch.set_num_threads(1)
    wall, cpu = time.perf_counter(), time.process_time()
    STEPS[step](run, folder, n)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # kB on Linux
    return {"wall_s": wall, "cpu_s": cpu, "largest_memory_gb": largest}


def growth(by_size: dict) -> dict:
    """Exponent of CPU time between the two largest sizes, by step: 1 is linear."""
    small, large = list(by_size)[-2:]
    found = {}
    for step in STEPS:
        ratio = by_size[large][step]["cpu_s"] / by_size[small][step]["cpu_s"]
        found[step] = float(np.log(ratio) / np.log(int(large) / int(small)))
    return found


def main() -> None:
    """Measure every step of every size, show, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="folder of a run with patches")
    parser.add_argument("--folder", type=Path, required=True, help="for files, removed at the end")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--step", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=OUT)
    given = parser.parse_args()
    if given.step:
        found = measured(given.step, given.run, given.folder, given.sizes[0])
        print(json.dumps(found))
        return
    write_sample(given.run, given.folder / "sample")
    by_size = {}
    for n in given.sizes:
        folder, by_step = given.folder / str(n), {}
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for step in STEPS:
            if step == "training":
                repeated(folder)
            command = [sys.executable, __file__, str(given.run), "--folder", str(folder)]
            command += ["--sizes", str(n), "--step", step]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            by_step[step] = json.loads(done.stdout.splitlines()[-1])
            print(n, step, by_step[step], flush=True)
        images = {name: (folder / name).stat().st_size / 1e9 for name in IMAGES}
        by_size[str(n)] = by_step | {"training_set_gb": sum(images.values())}
        shutil.rmtree(folder)
    shutil.rmtree(given.folder / "sample")
    content = {
        "patches_per_knee": PER_KNEE,
        "patches_per_knee_prepared": CUT,
        "by_size": by_size,
        "growth_exponent": growth(by_size),
        "git_commit": git_commit(),
        "packages": versions(),
    }
    print(write_json(given.out, content))


if __name__ == "__main__":
    main()
