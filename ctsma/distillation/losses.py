"""What a student can learn from its teacher, beside the measured biomarkers.

Loss weights map a term to its weight. A term is a name in `LOSS_TERMS`, or "module:function" for a
function outside the package that takes a `DistillationBatch` and returns a scalar.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module

import torch
from torch import Tensor
from torch.nn import functional

from ctsma.common import InputError
from ctsma.ridge import quasi_demeaning


@dataclass(frozen=True)
class Outputs:
    """What a network gives for a batch of B patches."""

    prediction: Tensor  # (B, 4) on the min-max scale of the training fold
    cam: Tensor  # (B, 4, slices, rows, columns) class activation maps of the last stage
    maps: list[Tensor]  # (B, C, slices, rows, columns) of every stage


@dataclass(frozen=True)
class DistillationBatch:
    """Outputs of the student and of the frozen teacher, which sees the paired MR."""

    student: Outputs
    teacher: Outputs
    region: Tensor  # (B, 1, 12, 24, 24) share of trabecular region


def knee_level_mse(error: Tensor, knees: Tensor, rho: Tensor) -> Tensor:
    """MSE of errors (B, 4) less what the patches of a knee have in common: a scalar.

    knees (B,) numbers the knee of each patch, from 0; rho (4,) is the share of the error's variance
    common to a knee. Mean of (e_ij - theta mean_j e_ij)^2, the likelihood of a random intercept
    per knee (Simchoni & Rosset 2023, JMLR 24:156); rho = 0 gives the MSE.
    """
    counts = torch.bincount(knees).to(error.dtype)[:, None]
    means = error.new_zeros(len(counts), error.shape[1]).index_add(0, knees, error) / counts
    return (error - (quasi_demeaning(rho, counts) * means)[knees]).square().sum() / max(
        1, error.numel()
    )


def feature_l1(batch: DistillationBatch) -> Tensor:
    """Published: sum over stages of mean |teacher - student|; one weight for all stages.

    The published weights of the stages are not reported.
    """
    losses = []
    for student, teacher in zip(batch.student.maps, batch.teacher.maps, strict=True):
        # l1_loss has the same value, but a gradient in a slower memory layout
        absolute = torch.linalg.vector_norm((student - teacher).float(), 1)
        losses.append(absolute / student.numel())
    return sum(losses)


def cam_mse(batch: DistillationBatch) -> Tensor:
    """MSE between the class activation maps of student and teacher in the region. Design choice.

    The heads are linear and the mean of the maps is the prediction, so this is a dense target in
    the four biomarkers (class activation maps: Zhou 2016, arXiv 1512.04150).
    """
    squared = (batch.student.cam - batch.teacher.cam).square()
    weight = functional.adaptive_avg_pool3d(batch.region, squared.shape[2:])
    return (squared * weight).sum() / (squared.shape[1] * weight.sum() + 1e-6)


LOSS_TERMS = {"feature_l1": feature_l1, "cam_mse": cam_mse}


def loss_term(name: str) -> Callable[[DistillationBatch], Tensor]:
    """The function behind the name of a term. Raises InputError where there is none."""
    if name in LOSS_TERMS:
        return LOSS_TERMS[name]
    module, _, function = name.partition(":")
    try:
        return getattr(import_module(module), function)
    except (ImportError, AttributeError) as error:
        remedy = f"use {', '.join(LOSS_TERMS)} or module:function, with its folder in PYTHONPATH"
        raise InputError("loss weights", f"name the unknown term {name}", remedy) from error


def distillation_loss(batch: DistillationBatch, loss_weights: Mapping[str, float]) -> Tensor:
    """Sum of weight x term; zero where no weight is given."""
    terms = [weight * loss_term(name)(batch) for name, weight in loss_weights.items() if weight]
    return torch.stack(terms).sum() if terms else batch.region.new_zeros(())
