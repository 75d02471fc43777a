"""What notebook 3 shows of trained networks."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from numpy import ndarray

from ctsma.distillation import load_model, prepare
from ctsma.distillation.data import make_input
from ctsma.patches import Patches


def read_records(folder: str | Path, arm: str) -> list[dict]:
    """Records of all networks of an arm: fold, seed, loss_weights, validation_mse, curves, ..."""
    files = sorted(Path(folder).glob(f"{arm}_fold*.json"))
    return [json.loads(file.read_text(encoding="utf-8")) for file in files]


def read_curves(folder: str | Path, arms: Sequence[str]) -> pd.DataFrame:
    """Training curves of all networks of the named arms.

    Columns: arm, fold, seed, epoch, fit_mse, fit_distillation, validation_mse.
    """
    parts = []
    for record in (record for arm in arms for record in read_records(folder, arm)):
        heads = {name: record[name] for name in ("arm", "fold", "seed")}
        parts.append(pd.DataFrame(record["curves"]).assign(**heads))
    return pd.concat(parts, ignore_index=True)


def feature_maps(
    folder: str | Path, arms: Sequence[str], patches: Patches, patch: int, fold: int, seed: int
) -> dict[str, ndarray]:
    """Middle slice (rows, columns) of the first stage's map of one patch, by arm, standardised.

    All arms show the channel that varies most in the first arm.
    """
    data, maps = prepare(patches.take([patch])), {}
    for arm in arms:
        network, record = load_model(Path(folder) / f"{arm}_fold{fold}_seed{seed}")
        x = make_input(data, np.array([0]), record["scale"], record["settings"]["device"])
        with torch.no_grad():
            maps[arm] = network(x)[1][0][0].float().cpu().numpy()
    channel = int(np.argmax(maps[arms[0]].std(axis=(1, 2, 3))))
    slices = {arm: values[channel, values.shape[1] // 2] for arm, values in maps.items()}
    return {arm: (v - v.mean()) / (v.std() + 1e-9) for arm, v in slices.items()}
