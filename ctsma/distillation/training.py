"""Training: one fold's data and the loop. All randomness comes from generators made of the seed."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from numpy import ndarray
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ctsma.cohort import BIOMARKERS, InputFault
from ctsma.networks import ROLES, WIDTHS, build, build_detail_head

from .baseline import fit_ridge, read_ridge
from .checkpoints import Progress
from .losses import Lesson, distillation_loss

HU_RANGE = (-300.0, 1500.0)  # nothing in a patch of bone and joint lies outside (our choice)
GAIN_SD, SHIFT_HU, NOISE_HU, BLUR = 0.01, 5.0, 10.0, 0.3  # between scanners: calibration, dose, kernel (our choice)
EMA_EPOCHS = 2.0  # memory of the running average of weights (our choice)
FULL_SCALE = 0.25  # share of the cortex's HU that trabecular bone has on the average: centres the channel (our choice)
FLIPS = 1, 3  # of an image (n, slices, rows, columns); never rows: depth below the joint has a direction
MEMORY_BYTES = 6e8  # of what a teacher said of the fitting patches (our choice)
WATCH_EPOCHS = 3  # from one look at the validation subjects to the next; the last epoch is looked at (our choice)
SAVE_SECONDS = 60.0  # between two savings of an unfinished training (our choice)


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


def relative_mr(mr: ndarray, voi: ndarray) -> ndarray:
    """MR (n, ...) over its 95th percentile in the region, bright marrow, as MR has no unit. Our choice; float16."""
    marrow = [np.percentile(m[v] if v.any() else m, 95) for m, v in zip(mr, voi, strict=True)]
    return (mr / np.maximum(marrow, 1e-6)[:, None, None, None]).astype(np.float16)


def fold_of(
    examples: Examples, splits: pd.DataFrame, number: int, seed: int, settings: Settings, ruled: bool = False
) -> Fold:
    """Divide rows by subject into fit, validation and test. InputFault: too few subjects, a biomarker all equal."""
    subjects = examples.table["subject_id"].to_numpy(str)
    folds = splits.set_index("subject_id")["fold"].loc[np.unique(subjects)]
    training = np.random.default_rng([seed, number]).permutation(folds.index[folds != number].to_numpy(str))
    held_out = max(1, round(settings.validation_share * len(training)))
    if not held_out < len(training) < len(folds):
        raise InputFault(f"fold {number}", "has too few subjects to train, validate and test", "use fewer folds")
    parts = training[held_out:], training[:held_out], folds.index[folds == number].to_numpy(str)
    rows = [np.flatnonzero(np.isin(subjects, part)) for part in parts]
    return Fold(number, *rows, scale_of(examples, rows[0], number, ruled))


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


def batch_of(
    examples: Examples,
    rows: ndarray,
    scale: dict,
    device: str,
    roles: Sequence[str] = ROLES,
    flips: Sequence[int] = (),
    rng: np.random.Generator | None = None,
) -> dict[str, Tensor]:
    """`target`, `start` (B, 4) in 0..1, `bone_fraction`; by role `student` (B, 2 or 3, ...), `teacher` (B, 2, ...).

    `start` is the ridge's estimate, to which a ruled student adds; else zero. The student's channels: HU, bone mask
    and, if ruled, HU over the ruler. CT and MR are flipped alike; with rng the CT is another scanner's. Nobody waits
    for the input of a role that is not asked for.
    """

    def read(name: str) -> Tensor:
        return torch.from_numpy(getattr(examples, name)[rows]).float().flip(flips)

    def scaled(name: str, image: Tensor) -> Tensor:
        return (image - scale[name][0]) / scale[name][1]

    low, high = np.array(scale["low"]), np.array(scale["high"])
    ridge = read_ridge(np.array(scale["ridge"]), examples.features[rows]).clip(low, high) if "ridge" in scale else low
    values = {"target": examples.targets[rows], "start": np.broadcast_to(ridge, (len(rows), len(low)))}
    batch = {n: torch.from_numpy(((v - low) / (high - low)).astype(np.float32)) for n, v in values.items()}
    batch |= {"bone_fraction": read("bone_fraction")} if examples.bone_fraction is not None else {}
    images = {}
    if "student" in roles:
        hu = (read("ct") if rng is None else augment_ct(read("ct"), rng)).clamp(*HU_RANGE)
        full = FULL_SCALE * torch.from_numpy(examples.ruler[rows]).float().view(-1, 1, 1, 1)
        images["student"] = scaled("ct", hu), read("mask"), *([hu / full - 1] if "ridge" in scale else [])
    if "teacher" in roles:
        images["teacher"] = scaled("mr", read("mr")), read("voi")
    layout = {"device": device, "memory_format": torch.channels_last_3d}  # once here, not in every convolution
    batch = {name: tensor.to(device) for name, tensor in batch.items()}
    return batch | {role: torch.stack(channels, 1).to(**layout) for role, channels in images.items()}


def augment_ct(hu: Tensor, rng: np.random.Generator) -> Tensor:
    """Another scanner's CT of the same bone, one draw a patch: gain, shift, in-plane blur by [1 2 1] / 4, noise."""
    n = len(hu)
    draws = rng.normal(1, GAIN_SD, n), rng.normal(0, SHIFT_HU, n), rng.uniform(0, BLUR, n), rng.uniform(0, NOISE_HU, n)
    gain, shift, blur, noise = (torch.from_numpy(d.astype(np.float32)).view(-1, 1, 1, 1) for d in draws)
    for axis in (2, 3):
        hu = hu + blur * ((hu.roll(1, axis) + hu.roll(-1, axis) + 2 * hu) / 4 - hu)
    grains = torch.randn(hu.shape, generator=torch.Generator().manual_seed(int(rng.integers(2**62))))
    return hu * gain + shift + noise * grains


def train(
    role: str,
    recipe: dict,
    teacher: nn.Module | None,
    examples: Examples,
    fold: Fold,
    seed: int,
    settings: Settings,
    progress: Progress | None = None,
) -> tuple[nn.Module, pd.DataFrame]:
    """Train one network: MSE of the scaled biomarkers + the recipe's terms; AdamW, one cycle of the learning rate.

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
    ask = Memory(teacher, examples, fold, settings) if teacher else lambda *_: (None, None)
    augmented = rng if settings.augment else None
    parts = {"modules": modules, "average": average, "optimizer": optimizer, "schedule": schedule}
    curves = progress.resume(parts, rng) if progress else []
    for epoch in range(len(curves), settings.epochs):
        modules.train()
        losses = np.zeros(2)
        for rows in np.array_split(rng.permutation(fold.fit), n_batches):
            flips = tuple(axis for axis in FLIPS if settings.augment and rng.random() < 0.5)
            batch = batch_of(examples, rows, fold.scale, settings.device, (role,), flips, augmented)
            said, shown = ask(rows, flips)
            with autocast(settings):
                error, taught, spread = _losses(modules, batch[role], batch, recipe, teacher, said, shown)
            optimizer.zero_grad()
            (error + taught + spread).backward()
            optimizer.step()
            schedule.step()
            average.update_parameters(modules[0])
            losses += np.array([error.item(), taught.item()]) / n_batches
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


class Memory:
    """What a frozen teacher says of the fitting patches: asked once under each flip, then kept.

    Where that would take more than `MEMORY_BYTES`, it is asked every time.
    """

    def __init__(self, teacher: nn.Module, examples: Examples, fold: Fold, settings: Settings) -> None:
        self.options, self.rows, self.said = (teacher, examples, fold.scale, settings), np.sort(fold.fit), {}
        one = sum(value.nbytes for value in said_by(*self.options, self.rows[:1], ()))
        self.small = one * len(fold.fit) * 2 ** len(FLIPS) < MEMORY_BYTES

    def __call__(self, rows: ndarray, flips: tuple) -> tuple[Tensor, list[Tensor]]:
        """Prediction (B, 4) and maps of rows of the examples, all of them among the fitting ones."""
        if self.small and flips not in self.said:
            self.said[flips] = said_by(*self.options, self.rows, flips)
        if self.small:
            at = torch.from_numpy(np.searchsorted(self.rows, rows)).to(self.said[flips][0].device)
            values = [value.index_select(0, at) for value in self.said[flips]]
        else:
            values = said_by(*self.options, rows, flips)
        return values[0], [value.movedim(-1, 1) for value in values[1:]]


def said_by(
    teacher: nn.Module, examples: Examples, scale: dict, settings: Settings, rows: ndarray, flips: tuple
) -> list:
    """A teacher's prediction (n, 4) and maps (n, slices, rows, columns, C) of rows of the examples, flipped."""
    parts = []
    for part in np.array_split(rows, max(1, round(len(rows) / 64))):
        x = batch_of(examples, part, scale, settings.device, ("teacher",), flips)["teacher"]
        with torch.no_grad(), autocast(settings):
            prediction, maps = teacher(x)
        parts.append([prediction, *(m.movedim(1, -1).contiguous() for m in maps)])
    return [torch.cat(values) for values in zip(*parts, strict=True)]


def _losses(
    modules: nn.ModuleList, x: Tensor, batch: dict, recipe: dict, teacher, said: Tensor | None, shown: list | None
) -> tuple[Tensor, Tensor, Tensor]:
    model = modules[0]
    prediction, maps = model(x)
    prediction = prediction + batch["start"]
    logits = modules[1](maps[0]) if len(modules) > 1 else None
    local = None
    if recipe.get("local_evidence"):
        local = model.evidence(maps[-1]) + batch["start"][..., None, None, None], teacher.evidence(shown[-1])
    lesson = Lesson(prediction, maps, said, shown, x[:, 1:2], logits, batch.get("bone_fraction"), local)
    error = prediction - batch["target"]
    return error.square().mean(), distillation_loss(lesson, recipe), _spread_loss(model, maps, x, error.detach())


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
    for part in np.array_split(rows, max(1, round(len(rows) / 64))):
        with torch.no_grad(), autocast(settings):
            batch = batch_of(examples, part, scale, settings.device, roles=(role,))
            prediction, maps = model(x := batch[role])
            values.append((prediction + batch["start"]).double().cpu().numpy())
            if model.spread is not None:
                log_variance = model.spread(model.pooled(maps[-1], x[:, 1:2])).float().clamp(-12, 2)
                spreads.append(torch.exp(0.5 * log_variance).double().cpu().numpy())
    values = np.concatenate(values).clip(0, 1)
    return low + values * width, (np.concatenate(spreads) if spreads else np.full_like(values, np.nan)) * width


def _validation_mse(model: nn.Module, role: str, examples: Examples, fold: Fold, settings: Settings) -> float:
    error = predict(model.eval(), role, examples, fold.validation, fold.scale, settings)
    error = (error - examples.targets[fold.validation]) / np.subtract(fold.scale["high"], fold.scale["low"])
    return float((error**2).mean())


def autocast(settings: Settings) -> torch.autocast:
    """Precision of the networks: "auto" is bfloat16 only where the hardware computes in it (1.4 times faster)."""
    device = settings.device.split(":")[0]
    able = getattr(torch.cpu, "get_capabilities", dict)()
    fast = torch.cuda.is_bf16_supported() if device == "cuda" else able.get("avx512_bf16") or able.get("amx_bf16")
    enabled = settings.precision == "bfloat16" or (settings.precision == "auto" and bool(fast))
    return torch.autocast(device, torch.bfloat16, enabled=enabled)
