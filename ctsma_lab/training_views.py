"""What notebooks 2 and 3 show of pairs and of trained networks."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from numpy import ndarray
from scipy import ndimage, signal

from ctsma.distillation import load_model, prepare
from ctsma.distillation.data import make_input
from ctsma.models import to_ct_grid
from ctsma.patches import CT_SPACING_MM, Patches, portions
from ctsma.registration.trabeculae import HIGHPASS_SD_MM

# CT voxels, about 2 mm each way, in which a better match is searched; design choice
REACH_VOXELS = 3, 5, 5


def patch_correlation(ct: ndarray, mr: ndarray, voi: ndarray) -> ndarray:
    """How well the trabeculae of pairs match in place: (n,), 1 aligned, 0 no match. Design choice.

    ct (n, 12, 24, 24); mr, voi (n, 12, 48, 48). The match is minus the correlation of detail finer
    than 1 mm, as bone is bright in CT and dark in MR; it is divided by the best match within 2 mm,
    which a soft kernel or noise lowers alike.
    """
    found = np.zeros(len(ct))
    for rows in portions(np.arange(len(ct))):
        images = ct[rows], to_ct_grid(mr[rows]), to_ct_grid(voi[rows]) >= 0.5
        found[rows] = [_match_in_place(*patch) for patch in zip(*images, strict=True)]
    return found


def _match_in_place(hu: ndarray, grey: ndarray, inside: ndarray) -> float:
    """`patch_correlation` of one patch: CT, MR and region on the CT grid."""
    match = -signal.correlate(_detail(grey) * inside, _detail(hu) * inside, "same", "fft")
    centre = tuple(n // 2 for n in match.shape)
    near = tuple(slice(c - r, c + r + 1) for c, r in zip(centre, REACH_VOXELS, strict=True))
    best = match[near].max()
    return np.clip(match[centre] / best, 0, 1) if best > 0 else 0.0


def _detail(image: ndarray) -> ndarray:
    """What is finer than 1 mm in an image on the CT grid."""
    sd_voxels = np.divide(HIGHPASS_SD_MM, CT_SPACING_MM)
    return image - ndimage.gaussian_filter(image.astype(float), sd_voxels)


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
