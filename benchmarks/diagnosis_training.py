"""How should the Transformer of the diagnosis be trained, that its AUC does not depend on the seed?

    python benchmarks/diagnosis_training.py runs/full --folder /tmp/knees --jobs 2

Simulated knees of another seed than the study's are scanned at their patches, and the networks of a
finished run estimate their biomarkers. They are in no reported result. Five cohorts of 80 knees are
diagnosed in five folds from the MR reference and from the CT network's estimates, and all knees
together once more, by each way of training: early stopping on a fifth of the training knees, and a
fixed number of epochs with a constant or a falling learning rate.

Rule: of the ways whose log loss of the mean score is within one standard error of the least
(paired, over the cohorts of 80), the one whose AUC varies least between seeds at equal cost: of
least SD times the root of its CPU seconds. Finished knees are reused. Writes
docs/results/diagnosis_training.json.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from large_cohort import REFERENCE, SCANS, estimates
from sklearn.metrics import log_loss, roc_auc_score
from torch import Tensor, nn

from ctsma.cohort import make_splits
from ctsma.common import InputError
from ctsma.diagnosis import tokens_by_arm
from ctsma.diagnosis.transformer import (
    KneeTokens,
    PatchTransformer,
    TransformerSettings,
    fit_without_fold,
    make_optimizer,
    pad_tokens,
    train_transformer,
    training_step,
)
from ctsma.files import git_commit, versions, write_json
from ctsma.parallel import run_tasks
from ctsma_lab.run import Run
from kneesim import draw_subjects, load_protocol, protocol_sha256

SEED, N_KNEES, COHORT = 3000, 400, 80
N_FOLDS, N_SEEDS, GROUP = 5, 10, 5  # seeds whose scores are averaged
INPUTS = REFERENCE, "ct_only"
EPOCHS = 10, 20, 40, 80
PATIENCE, VALIDATION = 20, 0.2  # of early stopping: epochs, share of the training knees
OUT = Path(__file__).parents[1] / "docs" / "results" / "diagnosis_training.json"


def early_stopping(
    model: PatchTransformer, tokens: Tensor, absent: Tensor, oa: Tensor, settings
) -> PatchTransformer:
    """As `train_transformer`; keeps the weights of least loss on a fifth of each class."""
    held_out = torch.zeros(len(oa), dtype=torch.bool)
    for label in (0, 1):
        knees = torch.nonzero(oa == label).flatten()
        count = int(np.ceil(len(knees) * VALIDATION))
        held_out[knees[torch.randperm(len(knees))[:count]]] = True
    fitting = tokens[~held_out], absent[~held_out], oa[~held_out]
    cross_entropy = nn.functional.binary_cross_entropy_with_logits
    optimizer = make_optimizer(model, settings)
    best_loss, best_epoch, best_state = np.inf, 0, {}
    for epoch in range(settings.epochs):
        model.train()
        training_step(model, optimizer, *fitting, settings.patches_per_step)
        model.eval()
        with torch.no_grad():
            loss = cross_entropy(model(tokens[held_out], absent[held_out])[0], oa[held_out]).item()
        if loss < best_loss:
            best_loss, best_epoch = loss, epoch
            best_state = {name: value.clone() for name, value in model.state_dict().items()}
        elif epoch - best_epoch >= PATIENCE:
            break
    model.load_state_dict(best_state)
    return model


def falling_rate(
    model: PatchTransformer, tokens: Tensor, absent: Tensor, oa: Tensor, settings
) -> PatchTransformer:
    """As `train_transformer`, with a learning rate that falls to 0 along a half cosine."""
    optimizer = make_optimizer(model, settings)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.epochs)
    model.train()
    for _ in range(settings.epochs):
        training_step(model, optimizer, tokens, absent, oa, settings.patches_per_step)
        schedule.step()
    return model.eval()


@dataclass(frozen=True)
class Candidate:
    """One way of training."""

    name: str
    train: Callable
    epochs: int


CANDIDATES = (
    Candidate("early stopping", early_stopping, 80),
    *(Candidate(f"{n} epochs", train_transformer, n) for n in EPOCHS),
    *(Candidate(f"{n} epochs, falling rate", falling_rate, n) for n in EPOCHS),
)


def held_out_scores(data: KneeTokens, fold: int, candidate: Candidate, seed: int) -> tuple:
    """Probabilities of the knees of a fold (n,), and CPU seconds of the training."""
    started = time.process_time()
    settings = replace(TransformerSettings(), epochs=candidate.epochs)
    model, tokens = fit_without_fold(data, fold, settings, seed, candidate.train)
    seconds = time.process_time() - started
    test = (data.knees["fold"] == fold).to_numpy(copy=True)
    with torch.no_grad():
        logit, _ = model(tokens[test], torch.tensor(data.absent[test]))
    return logit.sigmoid().numpy().astype(float), seconds


def diagnosed(data: KneeTokens, candidate: Candidate, n_jobs: int) -> dict[str, float]:
    """Loss, AUC and their variation between seeds of one cohort and input."""
    folds, truth = data.knees["fold"].to_numpy(), data.knees["oa"].to_numpy()
    places = [(fold, seed) for seed in range(N_SEEDS) for fold in np.unique(folds)]
    tasks = [(data, fold, candidate, seed) for fold, seed in places]
    scores, seconds = np.zeros((N_SEEDS, len(folds))), []
    for (fold, seed), (found, spent) in zip(
        places, run_tasks(held_out_scores, tasks, n_jobs), strict=True
    ):
        scores[seed, folds == fold] = found
        seconds.append(spent)
    single = [roc_auc_score(truth, score) for score in scores]
    groups = scores.reshape(-1, GROUP, len(folds)).mean(axis=1)
    in_groups = [roc_auc_score(truth, score) for score in groups]
    return {
        "log_loss": log_loss(truth, scores.mean(axis=0)),
        "log_loss_single": float(np.mean([log_loss(truth, score) for score in scores])),
        "auc": roc_auc_score(truth, scores.mean(axis=0)),
        "auc_single": float(np.mean(single)),
        "sd_single": float(np.std(single, ddof=1)),
        f"sd_of_{GROUP}": float(np.std(in_groups, ddof=1)),
        "cpu_seconds": float(np.mean(seconds)),
    }


def padded(estimated: pd.DataFrame, subjects: pd.DataFrame, name: str) -> KneeTokens:
    """Tokens of one input of these knees, with folds by subject."""
    labels = subjects.set_index("knee_id")["oa"].astype(int).sort_index()
    tokens = tokens_by_arm(estimated, labels.index)[name]
    return pad_tokens(tokens, labels, make_splits(subjects, N_FOLDS, SEED), TransformerSettings())


def chosen(rows: pd.DataFrame) -> str:
    """The way of training that the rule takes, from the rows of the small cohorts."""
    loss = rows.groupby(["candidate", "cohort"])["log_loss"].mean().unstack("candidate")
    excess = loss.sub(loss[loss.mean().idxmin()], axis=0)
    allowed = excess.columns[excess.mean() <= excess.sem()]
    means = rows.groupby("candidate")[["sd_single", "cpu_seconds"]].mean().loc[allowed]
    return (means["sd_single"] * np.sqrt(means["cpu_seconds"])).idxmin()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="folder of a finished run")
    parser.add_argument("--folder", type=Path, required=True, help="of the scanned knees, kept")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--jobs", type=int, default=2)
    given = parser.parse_args()
    run = Run(given.run)
    trained = run.results("distillation")
    if trained["seed"] == SEED:
        raise InputError(given.run, f"has seed {SEED}, as the knees here", "give another run")
    given.folder.mkdir(parents=True, exist_ok=True)
    subjects = draw_subjects(load_protocol(), N_KNEES, SEED)
    scans = SCANS | {"seed": SEED}
    estimated, left_out = estimates(run, subjects, given.folder, scans, given.jobs)
    subjects = subjects[subjects["knee_id"].isin(estimated["knee_id"])]
    cohorts = {f"{k + 1}": subjects.iloc[k * COHORT : (k + 1) * COHORT] for k in range(5)}
    cohorts["all"] = subjects
    rows = []
    for candidate in CANDIDATES:
        for cohort, knees in cohorts.items():
            for name in INPUTS:
                found = diagnosed(padded(estimated, knees, name), candidate, given.jobs)
                about = {"candidate": candidate.name, "input": name, "cohort": cohort}
                rows.append(about | {"n_knees": len(knees)} | found)
        print(pd.DataFrame(rows[-2 * len(cohorts) :]).round(4).to_string(), flush=True)
    table = pd.DataFrame(rows)
    content = {
        "protocol_sha256": protocol_sha256(),
        "seed": SEED,
        "git_commit": git_commit(),
        "packages": versions(),
        "run": {name: trained[name] for name in ("profile", "seed", "git_commit")},
        "left_out": left_out,
        "n_seeds": N_SEEDS,
        "chosen": chosen(table[table["cohort"] != "all"]),
        "rows": rows,
    }
    print(write_json(given.out, content), content["chosen"])


if __name__ == "__main__":
    main()
