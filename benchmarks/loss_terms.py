"""Distillation terms of the benchmark that are not part of the package.

Each takes a `DistillationBatch` and returns a scalar. A loss weight names it by module and
function, for example "loss_terms:last_stage_l1".
"""

from torch import Tensor
from torch.nn import functional

from ctsma.distillation import DistillationBatch


def last_stage_l1(batch: DistillationBatch) -> Tensor:
    """The published mean |teacher - student|, of the last stage alone."""
    return functional.l1_loss(batch.student.maps[-1].float(), batch.teacher.maps[-1].float())


def last_stage_mse(batch: DistillationBatch) -> Tensor:
    """Mean squared difference of the last maps (SimKD: Chen 2022, arXiv 2203.14001)."""
    return functional.mse_loss(batch.student.maps[-1].float(), batch.teacher.maps[-1].float())
