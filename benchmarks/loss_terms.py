"""Distillation terms that were tried and are not part of the package: only the benchmark uses them.

Each takes a `DistillationBatch` and returns a scalar. A loss weight names it by module and
function, for example "benchmarks.loss_terms:attention".
"""

import torch
from torch import Tensor
from torch.nn import functional

from ctsma.distillation import DistillationBatch
from ctsma.models import masked_mean


def feature_correlation(batch: DistillationBatch) -> Tensor:
    """One minus each channel's correlation over batch and place, mean over channels and stages.

    It does not depend on gain and offset of the maps (Cao 2022, arXiv 2207.02039).
    """
    stages = []
    for student, teacher in zip(batch.student.maps, batch.teacher.maps, strict=True):
        a = student.float().transpose(0, 1).flatten(1)
        b = teacher.float().transpose(0, 1).flatten(1)
        a = a - a.mean(1, keepdim=True)
        b = b - b.mean(1, keepdim=True)
        stages.append(functional.cosine_similarity(a, b).mean())
    return 1 - torch.stack(stages).mean()


def attention(batch: DistillationBatch) -> Tensor:
    """Squared distance of unit-length energy maps, mean over stages (Zagoruyko 2017)."""
    stages = []
    for student, teacher in zip(batch.student.maps, batch.teacher.maps, strict=True):
        a = functional.normalize(student.float().square().mean(1).flatten(1))
        b = functional.normalize(teacher.float().square().mean(1).flatten(1))
        stages.append((a - b).square().sum(1).mean())
    return torch.stack(stages).mean()


def relation(batch: DistillationBatch) -> Tensor:
    """Huber loss on distances between pooled features, over their mean (Park 2019, 1904.05068)."""
    student = functional.pdist(masked_mean(batch.student.maps[-1].float(), batch.region))
    teacher = functional.pdist(masked_mean(batch.teacher.maps[-1].float(), batch.region))
    return functional.smooth_l1_loss(student / student.mean(), teacher / teacher.mean())


def prediction(batch: DistillationBatch) -> Tensor:
    """MSE to the teacher's prediction, which lacks the measurement's own noise (Hinton 2015)."""
    return functional.mse_loss(batch.student.prediction, batch.teacher.prediction)
