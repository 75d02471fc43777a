"""Training: the loop, the teacher's outputs, and prediction. All randomness comes from the seed."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from numpy import ndarray
from torch import Tensor
from torch.optim.lr_scheduler import OneCycleLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ctsma.arms import Arm
from ctsma.common import InputError
from ctsma.models import Network, build

from .checkpoints import load_checkpoint, save_checkpoint
from .data import (
    FLIPS,
    Fold,
    Scale,
    TrainingData,
    fit_normalisation,
    knee_batches,
    make_batch,
    make_input,
    ridge_prediction,
)
from .losses import DistillationBatch, Outputs, distillation_loss, knee_level_mse
from .settings import Settings

EMA_EPOCHS = 2.0  # time constant of the running average of weights; design choice
CACHE_BYTES = 6e8  # limit of a teacher's stored outputs; design choice
VALIDATION_EPOCHS = 3  # from one look at the validation subjects to the next; design choice
PORTION = 64  # patches that are predicted at once
CURVES = ["epoch", "fit_mse", "fit_distillation", "validation_mse"]


class TeacherCache:
    """Outputs of a frozen teacher for the fitting patches, computed once per flip for all students.

    Where they would take more than `CACHE_BYTES`, they are computed anew for every batch.
    """

    def __init__(self, teacher: Network, data: TrainingData, fold: Fold, settings: Settings):
        self.teacher, self.data, self.settings = teacher, data, settings
        self.scale = fold.scale | {"input": "mr"}
        self.rows, self.by_flips = np.sort(fold.fit), {}
        n_bytes = sum(values.nbytes for values in self._compute(self.rows[:1], ()))
        self.stores = n_bytes * len(self.rows) * 2 ** len(FLIPS) < CACHE_BYTES

    def outputs(self, rows: ndarray, flips: tuple[int, ...]) -> Outputs:
        """For any of the fitting rows of the data, flipped."""
        if self.stores:
            if flips not in self.by_flips:
                self.by_flips[flips] = self._compute(self.rows, flips)
            stored = self.by_flips[flips]
            at = torch.from_numpy(np.searchsorted(self.rows, rows)).to(stored[0].device)
            values = [v.index_select(0, at) for v in stored]
        else:
            values = self._compute(rows, flips)
        prediction, cam, *maps = values
        return Outputs(prediction, cam.movedim(-1, 1), [m.movedim(-1, 1) for m in maps])

    def _compute(self, rows: ndarray, flips: tuple[int, ...]) -> list[Tensor]:
        """Prediction (n, 4), then activation maps and stage maps (n, slices, rows, columns, C)."""
        parts = []
        for portion in _portions(rows):
            with torch.no_grad(), autocast(self.settings):
                x = make_input(self.data, portion, self.scale, self.settings.device, flips)
                prediction, maps = self.teacher(x)
                maps = [self.teacher.class_activation_maps(maps[-1]), *maps]
            parts.append([prediction, *(m.movedim(1, -1).contiguous() for m in maps)])
        return [torch.cat(values) for values in zip(*parts, strict=True)]


def with_teacher_labels(
    data: TrainingData, fold: Fold, arm: Arm, teacher: Network, scale: Scale, settings: Settings
) -> tuple[TrainingData, Fold]:
    """Data and fold in which pairs without reference have the teacher's estimates as targets.

    `scale` is the teacher's. They join the fitting rows, so that the arm's ridge learns from them
    too. Without such pairs both come back as they are.
    """
    if not len(fold.unlabelled):
        return data, fold
    targets = data.targets.copy()
    targets[fold.unlabelled] = predict_rows(teacher, data, fold.unlabelled, scale, settings)
    data = replace(data, targets=targets)
    fit = np.concatenate([fold.fit, fold.unlabelled])
    return data, replace(fold, fit=fit, scale=fit_normalisation(data, fit, arm))


def train(
    data: TrainingData,
    fold: Fold,
    loss_weights: Mapping[str, float],
    teacher: TeacherCache | None,
    seed: int,
    settings: Settings,
    checkpoint: Path | None = None,
    network: Network | None = None,
) -> tuple[Network, pd.DataFrame]:
    """Train one network with AdamW and one cycle of the learning rate.

    The loss is `knee_level_mse` of the scaled biomarkers and the distillation terms.

    Parameters
    ----------
    data, fold : `fold.scale` names the input, and has the ridge that the network corrects, if any.
        A fitting row without target (NaN) serves the distillation terms alone.
    loss_weights : distillation term -> weight, see `losses`.
    teacher : needed where a weight is not zero.
    checkpoint : file that is written after every epoch; an existing one is continued to the same
        bits.
    network : to train in place of a new one.

    Returns
    -------
    The network with the running average of its weights at the end, and its curves: epoch, fit_mse,
    fit_distillation, validation_mse (NaN in epochs without validation). The epoch is not chosen: a
    dozen validation subjects are too few, and the learning rate ends at zero. Students of one fold
    and seed share initial weights, batches and augmentation.
    """
    generator = torch.Generator().manual_seed(seed * 1000 + fold.number)
    rng = np.random.default_rng([seed, fold.number])
    network = network or build(fold.scale["input"], settings.size, generator, settings.widths)
    network.to(device=settings.device, memory_format=torch.channels_last_3d)
    rates = {"lr": settings.learning_rate, "weight_decay": settings.weight_decay}
    optimizer = torch.optim.AdamW(network.parameters(), **rates, fused=True)
    if settings.batch_size > len(fold.fit):
        problem = f"is {settings.batch_size}, more than the {len(fold.fit)} patches to fit"
        raise InputError("batch_size", problem, "choose a smaller one")
    n_batches = len(knee_batches(data, fold, settings, np.random.default_rng()))
    rho = torch.tensor(fold.scale["rho"], dtype=torch.float32, device=settings.device)
    n_steps = settings.epochs * n_batches
    schedule = OneCycleLR(optimizer, settings.learning_rate, total_steps=n_steps)
    decay = 1 - 1 / (1 + EMA_EPOCHS * n_batches)
    average = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)
    parts = {"network": network, "average": average, "optimizer": optimizer, "schedule": schedule}
    curves = []
    if checkpoint and checkpoint.exists():
        curves = load_checkpoint(checkpoint, parts, rng)

    for epoch in range(len(curves), settings.epochs):
        network.train()
        fit_mse = fit_distillation = 0.0
        for rows in knee_batches(data, fold, settings, rng):
            batch = make_batch(data, rows, fold.scale, settings, rng)
            target_outputs = teacher.outputs(rows, batch.flips) if teacher else None
            with autocast(settings):
                prediction, maps = network(batch.x)
                prediction = prediction + batch.ridge
                region = batch.x[:, 1:2]
                labelled = torch.isfinite(batch.target).all(dim=1)
                error = (prediction - batch.target)[labelled]
                _, codes = np.unique(data.knees[rows], return_inverse=True)
                knees = torch.from_numpy(codes).to(labelled.device)[labelled]
                supervised = knee_level_mse(error, knees, rho)
                distillation = error.new_zeros(())
                if teacher:
                    cam = network.class_activation_maps(maps[-1])
                    cam = cam + batch.ridge[..., None, None, None]
                    outputs = Outputs(prediction, cam, maps)
                    compared = DistillationBatch(outputs, target_outputs, region)
                    distillation = distillation_loss(compared, loss_weights)
            optimizer.zero_grad()
            (supervised + distillation).backward()
            optimizer.step()
            schedule.step()
            average.update_parameters(network)
            fit_mse += error.detach().square().sum().item() / max(1, error.numel()) / n_batches
            fit_distillation += distillation.item() / n_batches
        validation_mse = np.nan
        if (settings.epochs - epoch - 1) % VALIDATION_EPOCHS == 0:
            validation_mse = _validation_mse(average.module.eval(), data, fold, settings)
        curves.append([epoch, fit_mse, fit_distillation, validation_mse])
        if checkpoint:
            save_checkpoint(checkpoint, parts, rng, curves)
    network.load_state_dict(average.module.state_dict())
    return network.eval(), pd.DataFrame(curves, columns=CURVES)


def predict(network: Network, record: Mapping, data: TrainingData, rows: ndarray) -> ndarray:
    """Biomarkers (n, 4) in their own units by a network with its record, as of `load_model`."""
    settings = Settings(**record["settings"])
    return predict_rows(network, data, rows, record["scale"], settings)


def predict_rows(
    network: Network, data: TrainingData, rows: ndarray, scale: Scale, settings: Settings
) -> ndarray:
    """Biomarkers (n, 4) in their own units, within the range of training."""
    values = []
    for portion in _portions(rows):
        with torch.no_grad(), autocast(settings):
            prediction, _ = network(make_input(data, portion, scale, settings.device))
            prediction = prediction + ridge_prediction(data, portion, scale, settings.device)
        values.append(prediction.double().cpu().numpy())
    low, width = np.array(scale["low"]), np.subtract(scale["high"], scale["low"])
    return low + np.concatenate(values).clip(0, 1) * width


def _portions(rows: ndarray) -> list[ndarray]:
    return np.array_split(rows, max(1, round(len(rows) / PORTION)))


def _validation_mse(network: Network, data: TrainingData, fold: Fold, settings: Settings) -> float:
    predicted = predict_rows(network, data, fold.validation, fold.scale, settings)
    width = np.subtract(fold.scale["high"], fold.scale["low"])
    return float((((predicted - data.targets[fold.validation]) / width) ** 2).mean())


def computes_in_bfloat16(settings: Settings) -> bool:
    """Whether networks run in bfloat16; "auto": only where the hardware has it (1.4 x faster)."""
    if settings.precision != "auto":
        return settings.precision == "bfloat16"
    if settings.device.startswith("cuda"):
        return torch.cuda.is_bf16_supported()
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def autocast(settings: Settings) -> torch.autocast:
    """Context in which networks run in the precision of the settings."""
    device = settings.device.split(":")[0]
    return torch.autocast(device, torch.bfloat16, enabled=computes_in_bfloat16(settings))
