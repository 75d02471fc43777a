"""What a student can learn from beside the measured biomarkers; a recipe is a mapping term -> weight.

Maps are (B, C, slices, rows, columns); predictions (B, 4) lie on the min-max scale of the training fold.
"""

from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from ctsma.cohort import InputFault
from ctsma.networks import masked_mean, unshuffle


@dataclass(frozen=True)
class Lesson:
    """One batch: the student's output and that of the frozen teacher, who sees the paired MR."""

    prediction: Tensor
    maps: list[Tensor]
    mask: Tensor  # (B, 1, 12, 24, 24) share of trabecular region
    teacher_prediction: Tensor | None = None
    teacher_maps: list[Tensor] | None = None
    evidence: Tensor | None = None  # biomarkers place by place, (B, 4, ...)
    teacher_evidence: Tensor | None = None
    detail_logits: Tensor | None = None  # (B, 4, 12, 24, 24)
    bone_fraction: Tensor | None = None  # (B, 12, 48, 48)

    def of(self, pairs: np.ndarray) -> "Lesson":
        """The same of some pairs of the batch, (B,) bool."""
        kept = torch.from_numpy(np.flatnonzero(pairs)).to(self.prediction.device)
        known = {f.name: value for f in fields(self) if (value := getattr(self, f.name)) is not None}
        return Lesson(**{n: [m[kept] for m in v] if isinstance(v, list) else v[kept] for n, v in known.items()})


def feature_l1(lesson: Lesson) -> Tensor:
    """Published: sum_i mean |T_i - S_i| over the stages' maps; one gamma for all (theirs are not published)."""
    pairs = zip(lesson.maps, lesson.teacher_maps, strict=True)  # l1_loss: same value, gradient in a slower layout
    return sum(torch.linalg.vector_norm((s - t).float(), 1) / s.numel() for s, t in pairs)


def feature_correlation(lesson: Lesson) -> Tensor:
    """mean_i mean_c (1 - corr(T_ic, S_ic)) over batch and place: up to gain and offset (Cao 2022, arXiv 2207.02039)."""
    correlations = [_correlation(s, t).mean() for s, t in zip(lesson.maps, lesson.teacher_maps, strict=True)]
    return 1 - torch.stack(correlations).mean()


def _correlation(a: Tensor, b: Tensor) -> Tensor:
    a, b = (m.float().transpose(0, 1).flatten(1) for m in (a, b))
    return functional.cosine_similarity(a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True))


def local_evidence(lesson: Lesson) -> Tensor:
    """MSE between what the heads of student and teacher read at every place of their last maps, 4 x 216 values.

    The heads are linear and their masked mean is the prediction: a dense target in the task's own four channels
    (class activation maps, Zhou 2016, arXiv 1512.04150; our use).
    """
    weight = functional.adaptive_avg_pool3d(lesson.mask, lesson.evidence.shape[2:])
    apart = (lesson.evidence - lesson.teacher_evidence).square()
    return (apart * weight).sum() / (apart.shape[1] * weight.sum() + 1e-6)


def attention(lesson: Lesson) -> Tensor:
    """Squared distance of unit-length maps of energy, mean over stages (attention transfer, Zagoruyko 2017)."""
    pairs = zip(lesson.maps, lesson.teacher_maps, strict=True)
    energies = [[m.float().square().mean(1).flatten(1) for m in pair] for pair in pairs]
    apart = [functional.normalize(s) - functional.normalize(t) for s, t in energies]
    return torch.stack([d.square().sum(1).mean() for d in apart]).mean()


def relation(lesson: Lesson) -> Tensor:
    """Huber loss on distances between a batch's pooled features, over their mean (Park 2019, arXiv 1904.05068)."""
    pooled = (masked_mean(maps[-1].float(), lesson.mask) for maps in (lesson.maps, lesson.teacher_maps))
    student, teacher = (functional.pdist(points) for points in pooled)
    return functional.smooth_l1_loss(student / student.mean(), teacher / teacher.mean())


def prediction(lesson: Lesson) -> Tensor:
    """MSE to the teacher's prediction, which lacks the measurement's own noise (Hinton 2015, arXiv 1503.02531)."""
    return functional.mse_loss(lesson.prediction, lesson.teacher_prediction)


def detail(lesson: Lesson) -> Tensor:
    """Cross-entropy of the super-resolution head with the MR's bone volume fraction; needs no teacher. Our choice."""
    target, weight = unshuffle(lesson.bone_fraction), lesson.mask.expand_as(lesson.detail_logits)
    loss = functional.binary_cross_entropy_with_logits(lesson.detail_logits.float(), target, weight, reduction="sum")
    return loss / (weight.sum() + 1e-6)


TERMS = feature_l1, feature_correlation, attention, local_evidence, relation, prediction, detail
TERMS = {term.__name__: term for term in TERMS}


def distillation_loss(lesson: Lesson, recipe: dict[str, float], pairs: np.ndarray | None = None) -> Tensor:
    """Sum over the recipe of weight x term; zero for an empty recipe. Raises InputFault for an unknown term.

    With `pairs` (B,) bool, of those alone, times their share of the batch; of fewer than two there is nothing to say.
    """
    if unknown := set(recipe) - set(TERMS):
        raise InputFault("recipe", f"has unknown terms {', '.join(sorted(unknown))}", f"use {', '.join(TERMS)}")
    share = 1.0 if pairs is None else float(pairs.mean())
    if share < 1:
        lesson = lesson.of(pairs)
    terms = [weight * TERMS[name](lesson) for name, weight in recipe.items() if weight and len(lesson.prediction) > 1]
    return share * torch.stack(terms).sum() if terms else lesson.prediction.new_zeros(())
