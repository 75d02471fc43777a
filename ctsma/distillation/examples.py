"""What networks learn from: settings, one fold's data and its scales, the input of a batch."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from numpy import ndarray
from numpy.random import Generator
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from ctsma.cohort import BIOMARKERS, InputFault
from ctsma.networks import WIDTHS

from .alignment import alignment
from .baseline import fit_ridge, read_ridge

HU_RANGE = (-300.0, 1500.0)  # nothing in a patch of bone and joint lies outside (our choice)
GAIN_SD, SHIFT_HU, NOISE_HU, BLUR = 0.01, 5.0, 10.0, 0.3  # between scanners: calibration, dose, kernel (our choice)
FULL_SCALE = 0.25  # share of the cortex's HU that trabecular bone has on the average: centres the channel (our choice)


class Settings(BaseModel):
    """Choices of a training run, ours where the published study is silent; unknown names are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    size: str = "compact"
    widths: tuple[int, int, int] = WIDTHS
    epochs: int = Field(24, ge=1)
    batch_size: int = Field(32, ge=2)
    learning_rate: float = Field(6e-3, gt=0)
    weight_decay: float = Field(1e-2, ge=0)
    validation_share: float = Field(0.15, gt=0, lt=0.5)  # of the training fold's subjects
    gammas: tuple[float, ...] = (0.01, 0.1)  # of ct_sma; the best on validation subjects is kept, fold by fold
    plus: dict[str, float] = {"local_evidence": 0.3}  # recipe of ct_sma_plus
    ablations: dict[str, dict[str, float]] = {}  # further arms: name -> recipe
    ruled: tuple[str, ...] = ("ct_residual", "ct_sma_plus")  # arms that correct the ridge; their CT has its ruler
    weighed: tuple[str, ...] = ()  # arms that learn from a pair's MR as often as it matches its CT, see `alignment`
    augment: bool = True  # flips for every network, CT physics for every CT network
    device: str = "cpu"
    precision: str = Field("auto", pattern="^(auto|float32|bfloat16)$")
    protocol_sha256: str = ""


@dataclass(frozen=True)
class Examples:
    """Arrays aligned with the rows of `table`; nothing here depends on the fold."""

    table: pd.DataFrame
    targets: ndarray  # (n, 4) MR reference biomarkers
    ct: ndarray  # (n, 12, 24, 24) HU
    mr: ndarray  # (n, 12, 48, 48) over its bright marrow
    voi: ndarray  # (n, 12, 48, 48) bool
    mask: ndarray  # (n, 12, 24, 24) share of `voi` in a CT voxel
    ruler: ndarray  # (n,) HU of the knee's own dense cortex, mean of both bones
    features: ndarray  # (n, 45 + N_RULER) of `ridge_features`
    bone_fraction: ndarray | None  # (n, 12, 48, 48), where a recipe asks for detail


@dataclass(frozen=True)
class Fold:
    """Rows of one fold by subject, and the scales of its fitting rows alone."""

    number: int
    fit: ndarray
    validation: ndarray
    test: ndarray
    scale: dict[str, list]  # ct and mr: mean, SD; low and high: range of each target; ridge: weights, if ruled
    weights: ndarray | None = None  # (len(fit),) 0..1, the chance of a pair's MR to be learned from; None: all alike

    def taught(self, rng: Generator) -> ndarray:
        """Fitting rows whose MR is learned from in one epoch; of the others the biomarkers alone."""
        return self.fit if self.weights is None else self.fit[rng.random(len(self.fit)) < self.weights]


def relative_mr(mr: ndarray, voi: ndarray) -> ndarray:
    """MR (n, ...) over its 95th percentile in the region, bright marrow, as MR has no unit. Our choice; float16."""
    marrow = [np.percentile(m[v] if v.any() else m, 95) for m, v in zip(mr, voi, strict=True)]
    return (mr / np.maximum(marrow, 1e-6)[:, None, None, None]).astype(np.float16)


def fold_of(examples: Examples, splits: pd.DataFrame, number: int, seed: int, settings: Settings, arm: str) -> Fold:
    """Divide rows by subject into fit, validation and test, as an arm of the settings sees them.

    InputFault: too few subjects, a biomarker all equal, pairs that are weighed and match nowhere.
    """
    subjects = examples.table["subject_id"].to_numpy(str)
    folds = splits.set_index("subject_id")["fold"].loc[np.unique(subjects)]
    training = np.random.default_rng([seed, number]).permutation(folds.index[folds != number].to_numpy(str))
    held_out = max(1, round(settings.validation_share * len(training)))
    if not held_out < len(training) < len(folds):
        raise InputFault(f"fold {number}", "has too few subjects to train, validate and test", "use fewer folds")
    parts = training[held_out:], training[:held_out], folds.index[folds == number].to_numpy(str)
    rows = [np.flatnonzero(np.isin(subjects, part)) for part in parts]
    weights = weights_of(examples, rows[0], number) if arm in settings.weighed else None
    return Fold(number, *rows, scale_of(examples, rows[0], number, arm in settings.ruled), weights)


def weights_of(examples: Examples, fit: ndarray, number: int) -> ndarray:
    """`alignment` (n,) of the fitting pairs. InputFault, which names the fold's number: none matches."""
    weights = alignment(examples.ct[fit], examples.mr[fit], examples.voi[fit])
    if not weights.any():
        raise InputFault(f"fold {number}", "has no pair whose CT and MR match", "register again, or weigh no arm")
    return weights


def scale_of(examples: Examples, fit: ndarray, number: int, ruled: bool = False) -> dict[str, list]:
    """`Fold.scale` of the fitting rows. InputFault, which names the fold's number: a biomarker all equal."""
    low, high = examples.targets[fit].min(0), examples.targets[fit].max(0)
    if flat := [name for name, width in zip(BIOMARKERS, high - low, strict=True) if not width > 0]:
        raise InputFault(f"fold {number}", f"has no variance of {', '.join(flat)}", "use more knees or fewer folds")
    images = {name: getattr(examples, name)[fit].astype(np.float32) for name in ("ct", "mr")}
    scale = {name: [float(v.mean(dtype=float)), float(v.std(dtype=float))] for name, v in images.items()}
    scale |= {"low": low.tolist(), "high": high.tolist()}
    if ruled:
        subjects = examples.table["subject_id"].to_numpy(str)[fit]
        scale["ridge"] = fit_ridge(examples.features[fit], examples.targets[fit], subjects).tolist()
    return scale


def image_of(
    role: str, examples: Examples, rows: ndarray, scale: dict, device: str, flips=(), rng: Generator | None = None
) -> Tensor:
    """Input of a role: `student` (B, 2 or 3, 12, 24, 24), `teacher` (B, 2, 12, 48, 48).

    The student's channels: HU, bone mask and, if ruled, HU over the ruler. CT and MR are flipped alike; with rng the
    CT is another scanner's.
    """
    if role == "teacher":
        channels = _scaled(scale["mr"], _read(examples.mr, rows, flips)), _read(examples.voi, rows, flips)
    else:
        hu = _read(examples.ct, rows, flips)
        hu = (hu if rng is None else augment_ct(hu, rng)).clamp(*HU_RANGE)
        full = FULL_SCALE * torch.from_numpy(examples.ruler[rows]).float().view(-1, 1, 1, 1)
        channels = _scaled(scale["ct"], hu), _read(examples.mask, rows, flips)
        channels += (hu / full - 1,) if "ridge" in scale else ()
    # laid out once here, not in every convolution
    return torch.stack(channels, 1).to(device=device, memory_format=torch.channels_last_3d)


def _read(images: ndarray, rows: ndarray, flips: Sequence[int]) -> Tensor:
    return torch.from_numpy(images[rows]).float().flip(flips)


def _scaled(mean_sd: Sequence[float], image: Tensor) -> Tensor:
    return (image - mean_sd[0]) / mean_sd[1]


def target_of(examples: Examples, rows: ndarray, scale: dict, device: str) -> Tensor:
    """Biomarkers (B, 4) of the MR reference, 0..1 over the range of the fitting subjects."""
    return _over_range(examples.targets[rows], scale).to(device)


def start_of(examples: Examples, rows: ndarray, scale: dict, device: str) -> Tensor:
    """The ridge's estimate (B, 4) in the scale of `target_of`, to which a ruled network adds; else zero."""
    limits = np.array(scale["low"]), np.array(scale["high"])
    ridge, seen = scale.get("ridge"), examples.features[rows]
    return _over_range(read_ridge(np.array(ridge), seen, *limits) if ridge else limits[0][None], scale).to(device)


def dense_of(examples: Examples, rows: ndarray, device: str, flips: Sequence[int]) -> Tensor:
    """Bone volume fraction (B, 12, 48, 48) that the MR shows, flipped as the images are."""
    return _read(examples.bone_fraction, rows, flips).to(device)


def _over_range(values: ndarray, scale: dict) -> Tensor:
    low, high = np.array(scale["low"]), np.array(scale["high"])
    return torch.from_numpy(((values - low) / (high - low)).astype(np.float32))


def augment_ct(hu: Tensor, rng: Generator) -> Tensor:
    """Another scanner's CT of the same bone, one draw a patch: gain, shift, in-plane blur by [1 2 1] / 4, noise."""
    n = len(hu)
    draws = rng.normal(1, GAIN_SD, n), rng.normal(0, SHIFT_HU, n), rng.uniform(0, BLUR, n), rng.uniform(0, NOISE_HU, n)
    gain, shift, blur, noise = (torch.from_numpy(d.astype(np.float32)).view(-1, 1, 1, 1) for d in draws)
    for axis in (2, 3):
        hu = hu + blur * ((hu.roll(1, axis) + hu.roll(-1, axis) + 2 * hu) / 4 - hu)
    grains = torch.randn(hu.shape, generator=torch.Generator().manual_seed(int(rng.integers(2**62))))
    return hu * gain + shift + noise * grains
