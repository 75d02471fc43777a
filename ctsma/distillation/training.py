"""Training: the loop, and what a trained network says. All randomness comes from generators made of the seed."""

from functools import partial
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from numpy import ndarray
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ctsma.networks import build, build_detail_head

from .checkpoints import Progress
from .examples import Examples, Fold, Settings, dense_of, image_of, start_of, target_of
from .losses import Lesson, distillation_loss

EMA_EPOCHS = 2.0  # memory of the running average of weights (our choice)
FLIPS = 1, 3  # of an image (n, slices, rows, columns); never rows: depth below the joint has a direction
MEMORY_BYTES = 6e8  # of what a teacher said of the fitting patches (our choice)
WATCH_EPOCHS = 3  # from one look at the validation subjects to the next; the last epoch is looked at (our choice)
SAVE_SECONDS = 60.0  # between two savings of an unfinished training (our choice)


def train(
    role: str,
    recipe: dict,
    memory: "Memory | None",
    examples: Examples,
    fold: Fold,
    seed: int,
    settings: Settings,
    progress: Progress | None = None,
) -> tuple[nn.Module, pd.DataFrame]:
    """Train one network: MSE of the scaled biomarkers + the recipe's terms; AdamW, one cycle of the learning rate.

    `memory` of the teacher, where the recipe has a term that needs one.

    Returns the network with the running average of its weights at the end, and its curves: epoch, fit_mse,
    fit_distillation, validation_mse (NaN in epochs after which nobody looked). The epoch is not chosen: a dozen
    validation subjects choose by luck, and the learning rate ends at zero. Students of a fold and seed share initial
    weights, batches and augmentation; one whose fold has a ridge learns what that leaves over. `progress` keeps an
    unfinished training, which goes on to the same bits.
    """
    generator = torch.Generator().manual_seed(seed * 1000 + fold.number)
    rng = np.random.default_rng([seed, fold.number])
    modules = _networks(role, recipe, settings, "ridge" in fold.scale, generator)
    rates = {"lr": settings.learning_rate, "weight_decay": settings.weight_decay}
    optimizer = torch.optim.AdamW(modules.parameters(), **rates, fused=True)
    n_batches = max(1, round(len(fold.fit) / settings.batch_size))
    decay = 1 - 1 / (1 + EMA_EPOCHS * n_batches)
    average = AveragedModel(modules[0], multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)
    n_steps = settings.epochs * n_batches
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, settings.learning_rate, total_steps=n_steps)
    augmented = rng if settings.augment else None
    parts = {"modules": modules, "average": average, "optimizer": optimizer, "schedule": schedule}
    curves = progress.resume(parts, rng) if progress else []
    for epoch in range(len(curves), settings.epochs):
        modules.train()
        losses = np.zeros(2)
        taught = fold.taught(np.random.default_rng([seed, fold.number, epoch + 1]))  # a stream apart from the batches'
        for rows in np.array_split(rng.permutation(fold.fit), n_batches):
            flips = tuple(axis for axis in FLIPS if settings.augment and rng.random() < 0.5)
            x = image_of(role, examples, rows, fold.scale, settings.device, flips, augmented)
            target, start = (f(examples, rows, fold.scale, settings.device) for f in (target_of, start_of))
            said = memory(rows, flips) if memory else Said()
            dense = dense_of(examples, rows, settings.device, flips) if recipe.get("detail") else None
            with autocast(settings):
                error, lesson, spread = _losses(modules, x, target, start, recipe, said, dense, np.isin(rows, taught))
            optimizer.zero_grad()
            (error + lesson + spread).backward()
            optimizer.step()
            schedule.step()
            average.update_parameters(modules[0])
            losses += np.array([error.item(), lesson.item()]) / n_batches
        seen = (settings.epochs - epoch - 1) % WATCH_EPOCHS == 0
        error = _validation_mse(average.module, role, examples, fold, settings) if seen else np.nan
        curves.append([epoch, *losses.tolist(), error])
        if progress:
            progress.keep(parts, rng, curves, finished=epoch + 1 == settings.epochs)
    modules[0].load_state_dict(average.module.state_dict())
    return modules[0].eval(), pd.DataFrame(curves, columns=["epoch", "fit_mse", "fit_distillation", "validation_mse"])


def _networks(role: str, recipe: dict, settings: Settings, ruler: bool, generator: torch.Generator) -> nn.ModuleList:
    layout = {"device": settings.device, "memory_format": torch.channels_last_3d}
    modules = nn.ModuleList([build(role, settings.size, generator, settings.widths, ruler).to(**layout)])
    if recipe.get("detail"):
        modules.append(build_detail_head(settings.size, generator, settings.widths).to(**layout))
    return modules


class Said(NamedTuple):
    """What a teacher says of a batch; None where there is no teacher."""

    prediction: Tensor | None = None  # (B, 4)
    evidence: Tensor | None = None  # (B, 4, ...)
    maps: list[Tensor] | None = None  # (B, C, ...)


class Memory:
    """What a frozen teacher says of the fitting patches: asked once under each flip, then kept, for all its students.

    Where that would take more than `MEMORY_BYTES`, it is asked every time.
    """

    def __init__(self, teacher: nn.Module, examples: Examples, fold: Fold, settings: Settings) -> None:
        self.ask = partial(_said, teacher, examples, fold.scale, settings)
        self.rows, self.kept = np.sort(fold.fit), {}
        one = sum(value.nbytes for value in self.ask(self.rows[:1], ()))
        self.small = one * len(self.rows) * 2 ** len(FLIPS) < MEMORY_BYTES

    def __call__(self, rows: ndarray, flips: tuple) -> Said:
        """Of rows of the examples, all of them among the fitting ones, in any number."""
        prediction, *maps = self._recall(rows, flips) if self.small else self.ask(rows, flips)
        evidence, *maps = (values.movedim(-1, 1) for values in maps)
        return Said(prediction, evidence, maps)

    def _recall(self, rows: ndarray, flips: tuple) -> list[Tensor]:
        if flips not in self.kept:
            self.kept[flips] = self.ask(self.rows, flips)
        at = torch.from_numpy(np.searchsorted(self.rows, rows)).to(self.kept[flips][0].device)
        return [values.index_select(0, at) for values in self.kept[flips]]


def _said(
    teacher: nn.Module, examples: Examples, scale: dict, settings: Settings, rows: ndarray, flips: tuple
) -> list[Tensor]:
    """Prediction (n, 4), evidence and maps (n, slices, rows, columns, C) of rows of the examples, flipped."""
    parts = []
    for part in _portions(rows):
        with torch.no_grad(), autocast(settings):
            prediction, maps = teacher(image_of("teacher", examples, part, scale, settings.device, flips))
            maps = [teacher.evidence(maps[-1]), *maps]
        parts.append([prediction, *(values.movedim(1, -1).contiguous() for values in maps)])
    return [torch.cat(values) for values in zip(*parts, strict=True)]


def _portions(rows: ndarray) -> list[ndarray]:
    return np.array_split(rows, max(1, round(len(rows) / 64)))


def _losses(modules, x, target, start, recipe: dict, said: Said, dense, pairs) -> tuple[Tensor, Tensor, Tensor]:
    model = modules[0]
    prediction, maps = model(x)
    prediction = prediction + start
    logits = modules[1](maps[0]) if len(modules) > 1 else None
    own = model.evidence(maps[-1]) + start[..., None, None, None] if recipe.get("local_evidence") else None
    lesson = Lesson(prediction, maps, x[:, 1:2], said.prediction, said.maps, own, said.evidence, logits, dense)
    error = prediction - target
    return error.square().mean(), distillation_loss(lesson, recipe, pairs), _spread_loss(model, maps, x, error.detach())


def _spread_loss(model: nn.Module, maps: list[Tensor], x: Tensor, error: Tensor) -> Tensor:
    """Gaussian likelihood of the errors; nothing flows back, so that the predictions are those without it."""
    if model.spread is None:
        return error.new_zeros(())
    log_variance = model.spread(model.pooled(maps[-1].detach(), x[:, 1:2])).float().clamp(-12, 2)
    return (0.5 * (error.square() * torch.exp(-log_variance) + log_variance)).mean()


def predict(model: nn.Module, role: str, examples: Examples, rows: ndarray, scale: dict, settings: Settings) -> ndarray:
    """Biomarkers (n, 4) in their own units for rows of `examples`, kept within the range of the fitting subjects."""
    return estimate(model, role, examples, rows, scale, settings)[0]


def estimate(
    model: nn.Module, role: str, examples: Examples, rows: ndarray, scale: dict, settings: Settings
) -> tuple[ndarray, ndarray]:
    """`predict` and the predicted SD (n, 4) in the same units; NaN where the network has learned none."""
    values, spreads, low, width = [], [], np.array(scale["low"]), np.subtract(scale["high"], scale["low"])
    for part in _portions(rows):
        with torch.no_grad(), autocast(settings):
            prediction, maps = model(x := image_of(role, examples, part, scale, settings.device))
            values.append((prediction + start_of(examples, part, scale, settings.device)).double().cpu().numpy())
            if model.spread is not None:
                log_variance = model.spread(model.pooled(maps[-1], x[:, 1:2])).float().clamp(-12, 2)
                spreads.append(torch.exp(0.5 * log_variance).double().cpu().numpy())
    values = np.concatenate(values).clip(0, 1)
    return low + values * width, (np.concatenate(spreads) if spreads else np.full_like(values, np.nan)) * width


def _validation_mse(model: nn.Module, role: str, examples: Examples, fold: Fold, settings: Settings) -> float:
    error = predict(model.eval(), role, examples, fold.validation, fold.scale, settings)
    error -= examples.targets[fold.validation]
    return float(((error / np.subtract(fold.scale["high"], fold.scale["low"])) ** 2).mean())


def autocast(settings: Settings) -> torch.autocast:
    """Precision of the networks: "auto" is bfloat16 only where the hardware computes in it (1.4 times faster)."""
    device = settings.device.split(":")[0]
    able = getattr(torch.cpu, "get_capabilities", dict)()
    fast = torch.cuda.is_bf16_supported() if device == "cuda" else able.get("avx512_bf16") or able.get("amx_bf16")
    enabled = settings.precision == "bfloat16" or (settings.precision == "auto" and bool(fast))
    return torch.autocast(device, torch.bfloat16, enabled=enabled)
