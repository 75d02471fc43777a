"""What a notebook shows of trained models: their curves, and the feature maps of one patch."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from ctsma.patches import Patches

from .arms import prepare
from .checkpoints import load_model
from .examples import image_of


def read_curves(folder: str | Path, arms: Sequence[str], seed: int) -> pd.DataFrame:
    """Training curves of every fold of the named arms: arm, fold, epoch, fit_mse, fit_distillation, validation_mse."""
    parts = []
    for arm in arms:
        for file in sorted(Path(folder).glob(f"{arm}_fold*_seed{seed}.csv")):
            fold = int(file.stem.split("_fold")[1].split("_")[0])
            parts.append(pd.read_csv(file).assign(arm=arm, fold=fold))
    return pd.concat(parts, ignore_index=True)


def read_records(folder: str | Path, arm: str) -> list[dict]:
    """Records (fold, seed, recipe, validation_mse of every recipe tried, ...) of all models of an arm in a folder."""
    return [json.loads(file.read_text(encoding="utf-8")) for file in sorted(Path(folder).glob(f"{arm}_fold*.json"))]


def feature_maps(
    folder: str | Path, arms: Sequence[str], patches: Patches, patch: int, fold: int, seed: int
) -> dict[str, np.ndarray]:
    """Middle slice (rows, columns) of the first shared map of one patch, arm by arm, standardised.

    The channel is the one that varies most in the first arm (the teacher's), the same for all arms.
    """
    one = Patches(patches.table.iloc[[patch]], *(a[[patch]] for a in (patches.mr, patches.ct, patches.voi)))
    examples, maps = prepare(one, detail=False), {}
    for arm in arms:
        model, record = load_model(Path(folder) / f"{arm}_fold{fold}_seed{seed}")
        x = image_of(record["role"], examples, np.array([0]), record["scale"], record["settings"]["device"])
        with torch.no_grad():
            maps[arm] = model(x)[1][0][0].float().cpu().numpy()
    channel = int(np.argmax(maps[arms[0]].std(axis=(1, 2, 3))))
    slices = {arm: values[channel, values.shape[1] // 2] for arm, values in maps.items()}
    return {arm: (values - values.mean()) / (values.std() + 1e-9) for arm, values in slices.items()}
