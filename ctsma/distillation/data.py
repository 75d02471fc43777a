"""What networks learn from: arrays of all patches, rows and scales of a fold, input of a batch."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypedDict

import numpy as np
import pandas as pd
import torch
from numpy import ndarray
from numpy.random import Generator
from torch import Tensor

from ctsma.arms import ARMS, Arm
from ctsma.common import BIOMARKERS, InputError
from ctsma.patches import Patches, mean_cortical_hu, portions, to_ct_grid
from ctsma.ridge import N_CALIBRATED, RidgeFit, apply_ridge, fit_ridge, ridge_features

from .settings import Settings

HU_RANGE = (-300.0, 1500.0)  # nothing in a patch of bone and joint lies outside; design choice
# Differences between scanners (calibration, dose, kernel) that augmentation draws; design choice
GAIN_SD, SHIFT_HU, NOISE_HU, BLUR = 0.01, 5.0, 10.0, 0.3
# Average HU of trabecular bone over that of cortex, which centres the channel; design choice
TRABECULAR_SHARE = 0.25
IMAGES = "ct", "mr", "voi", "region"  # of `TrainingData`
FLIPS = 1, 3  # of (n, slices, rows, columns); never rows: depth below the joint has a direction


@dataclass(frozen=True)
class MappedImages:
    """Images of `shape` (n, ...) in a file. It is mapped while `[rows]` reads and not longer."""

    file: Path
    dtype: np.dtype
    shape: tuple[int, ...]

    def __getitem__(self, rows: ndarray) -> ndarray:
        return np.memmap(self.file, self.dtype, "r", shape=self.shape)[rows]


@dataclass(frozen=True)
class TrainingData:
    """Arrays aligned with the rows of `table`; nothing here depends on the fold.

    Images are arrays, or `MappedImages` that every process reads from the same files.
    """

    table: pd.DataFrame
    subjects: ndarray  # (n,) text
    knees: ndarray  # (n,) text
    targets: ndarray  # (n, 4) MR reference biomarkers; NaN for pairs without reference
    ct: ndarray | MappedImages  # (n, 12, 24, 24) HU
    mr: ndarray | MappedImages  # (n, 12, 48, 48) relative to bright marrow
    voi: ndarray | MappedImages  # (n, 12, 48, 48) bool
    region: ndarray | MappedImages  # (n, 12, 24, 24) share of `voi` in a CT voxel
    cortical_hu: ndarray  # (n,) HU of the knee's own dense cortex, mean of both bones
    features: ndarray  # (n, 45 + N_CALIBRATED) of `ridge_features`

    def ridge_input(self, arm_input: str) -> ndarray:
        """Columns of `features` that a ridge reads; those from cortical HU for ct+cortex alone."""
        return self.features if arm_input == "ct+cortex" else self.features[:, :-N_CALIBRATED]


class Scale(TypedDict):
    """An arm's input, and what the fitting rows of a fold determine, as plain numbers."""

    input: str  # "mr", "ct" or "ct+cortex"
    ct: list[float]  # mean, SD
    mr: list[float]  # mean, SD
    low: list[float]  # least and largest of each target
    high: list[float]
    ridge: list | None  # weights (k + 1, 4) of the ridge that the network corrects
    rho: list[float]  # of each target: correlation of the errors of a knee's patches


@dataclass(frozen=True)
class Fold:
    """Rows of one fold, divided by subject, and the scale of its fitting rows.

    fit and validation hold patches with a reference, unlabelled the patches without one of the
    subjects who fit, test every patch of the test subjects.
    """

    number: int
    fit: ndarray
    validation: ndarray
    test: ndarray
    unlabelled: ndarray
    scale: Scale


def prepare(patches: Patches) -> TrainingData:
    """What every fold shares: MR relative to its bright marrow, region on the CT grid, features."""
    ct, voi = patches.ct[:].astype(np.float32), patches.voi[:].astype(bool)
    cortical_hu = mean_cortical_hu(patches.table)
    return TrainingData(
        table=patches.table,
        subjects=patches.table["subject_id"].to_numpy(str),
        knees=patches.table["knee_id"].to_numpy(str),
        targets=patches.table[list(BIOMARKERS)].to_numpy(float),
        ct=ct,
        mr=relative_mr(patches.mr[:].astype(np.float32), voi),
        voi=voi,
        region=to_ct_grid(voi),
        cortical_hu=cortical_hu,
        features=ridge_features(ct, voi, cortical_hu),
    )


def prepare_in_files(patches: Patches, folder: str | Path) -> TrainingData:
    """As `prepare`, with the images in files of `folder`: no process holds those of all patches."""
    images, parts, n = {}, [], len(patches.table)
    for rows in portions(np.arange(n)):
        part = vars(prepare(patches.take(rows)))
        for name in IMAGES:
            values, file = part.pop(name), Path(folder) / name
            with file.open("ab") as stream:
                stream.write(np.ascontiguousarray(values))
            images[name] = MappedImages(file, values.dtype, (n, *values.shape[1:]))
        parts.append(part)
    names = [name for name in parts[0] if name != "table"]
    arrays = {name: np.concatenate([part[name] for part in parts]) for name in names}
    return TrainingData(table=patches.table, **images, **arrays)


def relative_mr(mr: ndarray, voi: ndarray) -> ndarray:
    """MR (n, ...) over its 95th percentile in the region, bright marrow, as float16.

    MR has no unit. Design choice.
    """
    marrow = [np.percentile(m[v] if v.any() else m, 95) for m, v in zip(mr, voi, strict=True)]
    return (mr / np.maximum(marrow, 1e-6)[:, None, None, None]).astype(np.float16)


def make_fold(
    data: TrainingData, splits: pd.DataFrame, number: int, seed: int, settings: Settings, arm: Arm
) -> Fold:
    """Divide rows by subject into fit, validation and test, for one arm.

    Raises InputError: too few subjects, or a biomarker all equal.
    """
    labelled, every = np.isfinite(data.targets).all(axis=1), splits.set_index("subject_id")["fold"]
    folds = every.loc[np.unique(data.subjects[labelled])]
    others = folds.index[folds != number].to_numpy(str)
    training = np.random.default_rng([seed, number]).permutation(others)
    n_validation = max(1, round(settings.validation_share * len(training)))
    if not n_validation < len(training) < len(folds):
        problem = "has too few subjects with a reference to train, validate and test"
        raise InputError(f"fold {number}", problem, "use fewer folds, or measure more references")
    validates = np.isin(data.subjects, training[:n_validation])
    tests = every.loc[data.subjects].to_numpy() == number
    rest = ~tests & ~validates
    masks = labelled & rest, labelled & validates, tests, ~labelled & rest
    fit, validation, test, unlabelled = map(np.flatnonzero, masks)
    scale = fit_normalisation(data, fit, arm)
    return Fold(number, fit, validation, test, unlabelled, scale)


def fit_normalisation(data: TrainingData, fit: ndarray, arm: Arm) -> Scale:
    """Scale of the fitting rows, with the ridge that the arm corrects fitted to them.

    Raises InputError where a biomarker is all equal.
    """
    low, high = data.targets[fit].min(0), data.targets[fit].max(0)
    flat = [name for name, width in zip(BIOMARKERS, high - low, strict=True) if not width > 0]
    if flat:
        problem = f"has no variance of {', '.join(flat)}"
        raise InputError("training fold", problem, "use more knees or fewer folds")
    ridge, rho = None, np.zeros(len(BIOMARKERS))  # a teacher's errors are small in every knee
    if arm.kind == "student":
        found = ridge_of(data, fit, ARMS[arm.baseline].input if arm.baseline else arm.input)
        # The errors of a network that corrects the ridge are known from it. One that does not must
        # learn the level of a knee too, and takes the rho with which the ridge predicts best.
        rho = found.error_correlation if arm.baseline else found.rho
        ridge = found.weights.tolist() if arm.baseline else None
    return Scale(
        input=arm.input,
        ct=_mean_sd(data.ct, fit),
        mr=_mean_sd(data.mr, fit),
        low=low.tolist(),
        high=high.tolist(),
        ridge=ridge,
        rho=rho.tolist(),
    )


def _mean_sd(images: ndarray | MappedImages, rows: ndarray) -> list[float]:
    """Mean and SD of the voxels of some rows, in float32, summed in double precision."""
    total = squares = 0.0
    count = len(rows) * images[rows[:1]].size
    for some in portions(rows):
        total = images[some].astype(np.float32).sum(dtype=float, initial=total)
    mean = np.float32(total / count)
    for some in portions(rows):
        deviation = images[some].astype(np.float32) - mean
        squares = np.square(deviation).sum(dtype=float, initial=squares)
    return [float(total / count), float(np.sqrt(squares / count))]


def knee_batches(data: TrainingData, fold: Fold, settings: Settings, rng: Generator) -> list:
    """Fitting rows of one epoch, each once, in batches of several knees.

    Patches of a knee stay together in parts of at most `settings.patches_per_knee`, so that a batch
    shows what the errors of a knee have in common. Where rho is 0 they have nothing in common, and
    the batches are independent patches.
    """
    rows, together = fold.fit, settings.patches_per_knee if any(fold.scale["rho"]) else 1
    parts, rows = [], rows[np.argsort(data.knees[rows], kind="stable")]
    _, starts = np.unique(data.knees[rows], return_index=True)
    for own in np.split(rows, starts[1:]):
        parts += np.array_split(rng.permutation(own), np.ceil(len(own) / together))
    n_batches = min(len(parts), max(1, round(len(rows) / settings.batch_size)))
    groups = np.array_split(rng.permutation(len(parts)), n_batches)
    return [np.concatenate([parts[i] for i in group]) for group in groups]


def ridge_of(data: TrainingData, rows: ndarray, arm_input: str) -> RidgeFit:
    """The ridge of some rows on the features of an input."""
    features = data.ridge_input(arm_input)[rows]
    return fit_ridge(features, data.targets[rows], data.subjects[rows], data.knees[rows])


class Batch(NamedTuple):
    """Input, target and ridge estimate of some rows, with the flips of their images."""

    x: Tensor  # (B, channels, slices, rows, columns)
    target: Tensor  # (B, 4), 0 to 1 over the range of the fitting rows
    ridge: Tensor  # (B, 4) or (1, 4), on the scale of the target
    flips: tuple[int, ...]


def make_batch(
    data: TrainingData, rows: ndarray, scale: Scale, settings: Settings, rng: Generator
) -> Batch:
    """One training batch; flips and, for a CT, another scanner are drawn from `rng`."""
    flips = tuple(axis for axis in FLIPS if settings.augment and rng.random() < 0.5)
    x = make_input(data, rows, scale, settings.device, flips, rng if settings.augment else None)
    target = _to_unit_range(data.targets[rows], scale).to(settings.device)
    return Batch(x, target, ridge_prediction(data, rows, scale, settings.device), flips)


def make_input(
    data: TrainingData,
    rows: ndarray,
    scale: Scale,
    device: str,
    flips: Sequence[int] = (),
    rng: Generator | None = None,
) -> Tensor:
    """Network input: mr (B, 2, 12, 48, 48), ct (B, 2, 12, 24, 24) or ct+cortex (B, 3, 12, 24, 24).

    The channels are image, trabecular region and, for ct+cortex, HU normalised to cortical HU. CT
    and MR are flipped alike; with `rng` the CT is that of another scanner.
    """
    if scale["input"] == "mr":
        mr = (_images(data.mr, rows, flips) - scale["mr"][0]) / scale["mr"][1]
        channels = [mr, _images(data.voi, rows, flips)]
    else:
        hu = _images(data.ct, rows, flips)
        if rng is not None:
            hu = augment_ct(hu, rng)
        hu = hu.clamp(*HU_RANGE)
        channels = [(hu - scale["ct"][0]) / scale["ct"][1], _images(data.region, rows, flips)]
        if scale["input"] == "ct+cortex":
            cortical_hu = torch.from_numpy(data.cortical_hu[rows]).float().view(-1, 1, 1, 1)
            channels.append(hu / (TRABECULAR_SHARE * cortical_hu) - 1)
    # The memory layout is set once here and not in every convolution.
    return torch.stack(channels, 1).to(device=device, memory_format=torch.channels_last_3d)


def _images(images: ndarray, rows: ndarray, flips: Sequence[int]) -> Tensor:
    return torch.from_numpy(images[rows]).float().flip(flips)


def ridge_prediction(data: TrainingData, rows: ndarray, scale: Scale, device: str) -> Tensor:
    """Estimate (B, 4) of the ridge that the network corrects, 0 to 1; zero (1, 4) without one."""
    if scale["ridge"] is None:
        return torch.zeros(1, len(BIOMARKERS), device=device)
    weights, low, high = (np.array(scale[name]) for name in ("ridge", "low", "high"))
    features = data.features[rows, : len(weights) - 1]  # columns from cortical HU stand last
    return _to_unit_range(apply_ridge(weights, features, low, high), scale).to(device)


def _to_unit_range(values: ndarray, scale: Scale) -> Tensor:
    low, high = np.array(scale["low"]), np.array(scale["high"])
    return torch.from_numpy(((values - low) / (high - low)).astype(np.float32))


def augment_ct(hu: Tensor, rng: Generator) -> Tensor:
    """Another scanner's CT of the same bone, one draw per patch (n, 12, 24, 24).

    Gain, shift, in-plane blur by [1 2 1] / 4, and noise.
    """
    n = len(hu)
    draws = [rng.normal(1, GAIN_SD, n), rng.normal(0, SHIFT_HU, n)]
    draws += [rng.uniform(0, BLUR, n), rng.uniform(0, NOISE_HU, n)]
    columns = torch.from_numpy(np.array(draws, dtype=np.float32))
    gain, shift, blur, noise = columns.view(4, n, 1, 1, 1)
    for axis in (2, 3):
        hu = hu + blur * ((hu.roll(1, axis) + hu.roll(-1, axis) + 2 * hu) / 4 - hu)
    generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
    return hu * gain + shift + noise * torch.randn(hu.shape, generator=generator)
