"""Out-of-fold probability of OA of each knee from a Transformer over its patch tokens.

Tokens, labels and splits as in `ctsma.diagnosis.inputs`. The published Transformer states neither
size nor training, so every setting is a design choice.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from numpy import ndarray
from torch import Tensor, nn

from ctsma.common import BIOMARKERS, COMPARTMENTS, InputError
from ctsma.parallel import run_tasks

from .inputs import POSITION, knee_table


@dataclass(frozen=True)
class TransformerSettings:
    """Size and training of the patch Transformer.

    On synthetic tokens of no cohort more layers, width or dropout gave the same AUC within its
    error. The learning rate was chosen by the validation loss of `mr_reference` inside the training
    folds of a simulated cohort of 80 knees, the number of epochs on other simulated knees
    (benchmarks/diagnosis_training.py).
    """

    width: int = 16
    layers: int = 1
    heads: int = 4
    dropout: float = 0.2
    learning_rate: float = 5e-3
    weight_decay: float = 0.05
    epochs: int = 20  # all of them: a dozen validation subjects stop a training at random
    # Random patches of each knee in one step: regularises, and bounds the cost
    patches_per_step: int = 8
    # Columns of the tokens; empty: biomarkers, and position if present
    features: tuple[str, ...] = ()


@dataclass(frozen=True)
class KneeTokens:
    """Tokens padded to the largest number of patches of a knee.

    knees: subject_id, oa, fold by knee_id. values (knees, patches, features + compartments): the
    features and the one-hot compartment. absent (knees, patches): padding. rows (knees, patches):
    row of each patch in the tokens, -1 for padding.
    """

    knees: pd.DataFrame
    values: ndarray
    absent: ndarray
    rows: ndarray


class PatchTransformer(nn.Module):
    """Encoder over tokens (knees, patches, features) without order, attention pooling, one logit.

    The last features are the one-hot compartment. Each compartment has its own embedding of the
    other features: the same BV/TV means something else in the loaded and the unloaded compartment.
    """

    def __init__(self, n_features: int, settings: TransformerSettings):
        super().__init__()
        width, n_compartments = settings.width, len(COMPARTMENTS)
        self.embed = nn.Linear((n_features - n_compartments + 1) * n_compartments, width)
        layer = nn.TransformerEncoderLayer(
            d_model=width,
            nhead=settings.heads,
            dim_feedforward=2 * width,
            dropout=settings.dropout,
            batch_first=True,
            norm_first=True,
        )
        self.encoder = nn.TransformerEncoder(layer, settings.layers, enable_nested_tensor=False)
        self.attention = nn.Linear(width, 1)
        self.head = nn.Linear(width, 1)

    def forward(self, tokens: Tensor, absent: Tensor) -> tuple[Tensor, Tensor]:
        """Logit (knees,) and pooling weight (knees, patches), 0 where `absent` (knees, patches)."""
        n_compartments = len(COMPARTMENTS)
        features, one_hot = tokens[..., :-n_compartments], tokens[..., -n_compartments:]
        features = torch.cat([features, torch.ones_like(features[..., :1])], dim=2)
        by_compartment = features[..., None] * one_hot[..., None, :]
        hidden = self.encoder(self.embed(by_compartment.flatten(2)), src_key_padding_mask=absent)
        weights = self.attention(hidden).squeeze(-1).masked_fill(absent, -torch.inf).softmax(dim=1)
        pooled = (weights.unsqueeze(-1) * hidden).sum(dim=1)
        return self.head(pooled).squeeze(-1), weights


def cross_validate_arms(
    tokens: Mapping[str, pd.DataFrame], labels, splits, settings, seeds=(0,), n_jobs: int = 1
) -> pd.DataFrame:
    """Score of every knee by a Transformer that never saw its subject, for each arm and seed.

    tokens: by arm; labels and splits as in `ctsma.diagnosis.inputs`; settings: TransformerSettings.

    Standardisation and weights come from the training folds alone. All (arm, seed, fold) run in
    parallel processes of one thread; the same seed gives the same scores.
    Returns DataFrame(arm, seed, knee_id, subject_id, fold, score). Raises InputError for NaN in the
    tokens, an unknown compartment, and as `knee_table`.
    """
    inputs = {arm: pad_tokens(rows, labels, splits, settings) for arm, rows in tokens.items()}
    tasks = []
    for arm, data in inputs.items():
        for seed in seeds:
            for fold in data.knees["fold"].unique():
                tasks.append((arm, fold, settings, seed, *vars(data).values()))
    frames = run_tasks(_fold_scores, tasks, n_jobs)
    return pd.concat(frames).sort_values(["arm", "seed", "knee_id"], ignore_index=True)


def _fold_scores(
    arm: str, fold: int, settings: TransformerSettings, seed: int, *arrays: ndarray
) -> pd.DataFrame:
    data = KneeTokens(*arrays)
    model, tokens = fit_without_fold(data, fold, settings, seed)
    test = (data.knees["fold"] == fold).to_numpy(copy=True)
    with torch.no_grad():
        logit, _ = model(tokens[test], torch.tensor(data.absent[test]))
    knees = data.knees.loc[test, ["subject_id", "fold"]].reset_index()
    score = logit.sigmoid().numpy().astype(float)
    scored = knees.assign(arm=arm, seed=seed, score=score)
    return scored[["arm", "seed", "knee_id", "subject_id", "fold", "score"]]


def pad_tokens(
    tokens: pd.DataFrame, labels: pd.Series, splits: pd.DataFrame, settings: TransformerSettings
) -> KneeTokens:
    """Check tokens and pad them to one array; errors as `cross_validate_arms`."""
    known = (*BIOMARKERS, *POSITION)
    features = list(settings.features) or [name for name in known if name in tokens]
    if not features:
        raise InputError("tokens", "hold no feature", f"give some of {', '.join(known)}")
    for name in features:
        if name not in tokens or not np.isfinite(tokens[name]).all():
            raise InputError("tokens", f"hold NaN or nothing in {name}", "leave such patches out")
    if not set(tokens["compartment"]) <= set(COMPARTMENTS):
        names = ", ".join(COMPARTMENTS)
        raise InputError("tokens", "name an unknown compartment", f"use {names}")
    knees = knee_table(tokens, labels, splits)
    one_hot = tokens["compartment"].to_numpy()[:, None] == np.array(COMPARTMENTS)
    values = np.hstack([tokens[features].to_numpy(dtype=np.float64), one_hot])
    knee = knees.index.get_indexer(tokens["knee_id"])
    place = tokens.groupby("knee_id").cumcount().to_numpy()
    rows = np.full((len(knees), place.max() + 1), -1)
    rows[knee, place] = np.arange(len(tokens))
    return KneeTokens(knees, values[rows], rows < 0, rows)


def train_transformer(
    model: PatchTransformer, tokens: Tensor, absent: Tensor, oa: Tensor, settings
) -> PatchTransformer:
    """Full-batch AdamW on binary cross-entropy, every epoch with other patches of each knee."""
    optimizer = make_optimizer(model, settings)
    model.train()
    for _ in range(settings.epochs):
        training_step(model, optimizer, tokens, absent, oa, settings.patches_per_step)
    return model.eval()


def make_optimizer(model: PatchTransformer, settings: TransformerSettings) -> torch.optim.AdamW:
    """The optimizer of every training."""
    rates = {"lr": settings.learning_rate, "weight_decay": settings.weight_decay}
    return torch.optim.AdamW(model.parameters(), **rates, fused=True)


def training_step(
    model: PatchTransformer, optimizer, tokens: Tensor, absent: Tensor, oa: Tensor, count: int
) -> None:
    """One step on the binary cross-entropy of all knees, each with `count` random patches."""
    logit, _ = model(*_random_patches(tokens, absent, count))
    optimizer.zero_grad()
    nn.functional.binary_cross_entropy_with_logits(logit, oa).backward()
    optimizer.step()


def _random_patches(tokens: Tensor, absent: Tensor, count: int) -> tuple[Tensor, Tensor]:
    chosen = torch.rand(absent.shape).masked_fill(absent, 2).argsort(dim=1)[:, :count]
    tokens = torch.take_along_dim(tokens, chosen[:, :, None], dim=1)
    return tokens, torch.take_along_dim(absent, chosen, dim=1)


def fit_without_fold(
    data: KneeTokens, fold: int, settings: TransformerSettings, seed: int, train=train_transformer
) -> tuple[PatchTransformer, Tensor]:
    """The model trained without this fold, and all tokens standardised by the training folds."""
    knees, n_features = data.knees, data.values.shape[2]
    training = (knees["fold"] != fold).to_numpy(copy=True)
    measured = n_features - len(COMPARTMENTS)  # the one-hot compartment is not standardised
    seen = data.values[training][~data.absent[training]][:, :measured]
    mean, sd = np.zeros(n_features), np.ones(n_features)
    mean[:measured] = seen.mean(axis=0)
    sd[:measured] = np.maximum(seen.std(axis=0), 1e-9)
    tokens = torch.from_numpy(((data.values - mean) / sd).astype(np.float32))
    absent = torch.tensor(data.absent)
    oa = torch.tensor(knees["oa"].to_numpy(np.float32, copy=True))
    with torch.random.fork_rng(devices=[]):  # weights and dropout read torch's global generator
        torch.manual_seed(int(np.random.default_rng([seed, int(fold)]).integers(2**31)))
        model = PatchTransformer(n_features, settings)
        return train(model, tokens[training], absent[training], oa[training], settings), tokens
