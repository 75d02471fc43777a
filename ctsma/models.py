"""Estimators of biomarkers: teacher (MR) and student (CT) networks, and ridge on CT features.

Arrays are (batch, channel, slices, rows, columns) on the patch grid: MR 12 x 48 x 48 and CT
12 x 24 x 24 voxels of the same volume. The first two channels are the normalised image and the
trabecular region (0 to 1). Teacher and student have feature maps on one grid, so that a loss can
compare them.
"""

from typing import NamedTuple

import numpy as np
import torch
from scipy.ndimage import uniform_filter
from sklearn.linear_model import Ridge
from sklearn.model_selection import GroupKFold
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from torch.nn import functional

from ctsma.common import BIOMARKERS
from ctsma.patches import to_ct_grid

# Channels of the three compact stages: twice as many learn no more from 64 knees; design choice
WIDTHS = (16, 16, 32)
# As in the early stages of slow_r50: slices 0.75 mm apart share little fine texture
IN_PLANE = (1, 3, 3)
# In plane, onto 12 x 12 x 12: no worse than 12 x 24 x 24 in half the time; design choice
STRIDE = {"teacher": 4, "student": 2}
PAPER_EDGE = {"teacher": 64, "student": 16}  # voxels; published code (60 and 15-16, resized)

LAGS = {1: (1, 2), 2: (1, 2, 3, 4), 3: (1, 2, 3, 4)}  # voxels by axis, to 1.75 mm; design choice
BOXES = (2, 3, 5)  # in-plane voxels of the band-pass filters; design choice
LAYERS = 4  # of depth below the joint surface; design choice
ALPHAS = np.logspace(-1, 4, 11)  # ridge strengths tried; design choice
# Correlations of the errors of a knee's patches that a ridge tries; design choice
RHOS = (0.0, 0.15, 0.3, 0.45, 0.6, 0.75)
N_CALIBRATED = 3  # last columns of `ridge_features`, which need cortical HU


class Network(nn.Module):
    """Stem, stages, head: an image and its region in, four biomarkers and every stage's map out.

    Parameters
    ----------
    stem : from the input to the grid on which teacher and student are compared.
    stages : stage i of teacher and student gives maps of equal shape.
    head : features (..., C) -> (..., 4).
    edge : cubic grid in voxels to which image and region are resized first, as published; None
        keeps the patch grid and all channels.
    published : mean over the whole grid and a sigmoid at the end. Otherwise mean over the
        trabecular region and no sigmoid, so that the prediction is the mean of the class
        activation maps.
    """

    def __init__(
        self,
        stem: nn.Module,
        stages: list[nn.Module],
        head: nn.Module,
        edge: int | None = None,
        published: bool = False,
    ):
        super().__init__()
        self.stem, self.stages, self.head = stem, nn.ModuleList(stages), head
        self.edge, self.published = edge, published

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Input (B, channels, slices, rows, columns) -> prediction (B, 4), maps of the stages.

        Predictions lie on the min-max scale of the training targets, 0 to 1.
        """
        features = x
        if self.edge:
            features = functional.interpolate(x[:, :2], size=(self.edge,) * 3, mode="trilinear")
        features, maps = self.stem(features), []
        for stage in self.stages:
            features = stage(features)
            maps.append(features)
        prediction = self.head(self.pool(features, x[:, 1:2])).float()
        return (torch.sigmoid(prediction) if self.published else prediction), maps

    def pool(self, last_map: Tensor, region: Tensor) -> Tensor:
        """Last map (B, C, ...) and region (B, 1, ...) -> features (B, C)."""
        return last_map.mean((2, 3, 4)) if self.published else masked_mean(last_map, region)

    def class_activation_maps(self, last_map: Tensor) -> Tensor:
        """What the head predicts at every place of the last map (B, C, ...): (B, 4, ...).

        Class activation maps, Zhou 2016, arXiv 1512.04150.
        """
        return self.head(last_map.movedim(1, -1)).movedim(-1, 1).float()


def masked_mean(features: Tensor, mask: Tensor) -> Tensor:
    """Mean of features (B, C, ...) weighted by mask (B, 1, ...) averaged onto their grid: (B, C).

    An empty mask gives the plain mean, so that no patch yields NaN.
    """
    weight = functional.adaptive_avg_pool3d(mask, features.shape[2:]) + 1e-3
    return (features * weight).sum((2, 3, 4)) / weight.sum((2, 3, 4))


def build(
    arm_input: str, size: str, generator: torch.Generator, widths: tuple[int, ...] = WIDTHS
) -> Network:
    """Make a network with weights drawn from `generator`: the same state gives the same bits.

    Parameters
    ----------
    arm_input : "mr" makes a teacher for MR (B, 2, 12, 48, 48), "ct" a student for CT
        (B, 2, 12, 24, 24); a compact student for "ct+cortex" takes a third channel, HU over that
        of the knee's cortex.
    size : "compact" (3 residual stages, about 0.07 M weights; design choice) or "paper" (published:
        two residual blocks or two transposed convolutions, a 3D ResNet-50, 61 -> 4 -> sigmoid).
    widths : channels of the compact stages.

    Teacher and student of one size give maps of equal shape.
    """
    role = "teacher" if arm_input == "mr" else "student"
    seed = int(torch.randint(2**62, (1,), generator=generator, device=generator.device))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        channels = 3 if arm_input == "ct+cortex" else 2
        return _paper(role) if size == "paper" else _compact(role, widths, channels)


def _compact(role: str, widths: tuple[int, ...], channels: int) -> Network:
    from monai.networks.blocks import UnetResBlock  # MONAI takes seconds to import

    first, middle, last = widths
    stride = STRIDE[role]
    kernel, steps, padding = (1, 3 * stride, 3 * stride), (1, stride, stride), (0, stride, stride)
    # Unlike group or instance normalisation, batch normalisation keeps a patch's absolute level,
    # which carries BV/TV.
    stem = nn.Sequential(
        nn.Conv3d(channels, first, kernel, steps, padding, bias=False),
        nn.BatchNorm3d(first),
        nn.ReLU(),
    )
    stages = [
        UnetResBlock(3, first, first, IN_PLANE, 1, "batch"),
        UnetResBlock(3, first, middle, 3, 2, "batch"),
        UnetResBlock(3, middle, last, 3, 1, "batch"),
    ]
    return Network(stem, stages, nn.Linear(last, len(BIOMARKERS)))


def _paper(role: str) -> Network:
    """Published layout; unlike slow_r50 with 3 x 3 x 3 kernels and stride along the slices too."""
    from monai.networks.blocks import UnetResBlock
    from monai.networks.nets.resnet import ResNet

    blocks, channels = [3, 4, 6, 3], [64, 128, 256, 512]
    resnet = ResNet("bottleneck", blocks, channels, 3, 64, (1, 7, 7), (1, 2, 2), feed_forward=False)
    first = nn.Sequential(resnet.conv1, resnet.bn1, resnet.act, resnet.maxpool)
    stages = [first, resnet.layer1, resnet.layer2, resnet.layer3, resnet.layer4]
    head = nn.Sequential(nn.Linear(2048, 61), nn.Linear(61, len(BIOMARKERS)))
    teacher_stem = nn.Sequential(
        UnetResBlock(3, 2, 64, 3, 1, "batch"), UnetResBlock(3, 64, 64, 3, 1, "batch")
    )
    student_stem = nn.Sequential(
        nn.ConvTranspose3d(2, 64, 2, 2), nn.ReLU(), nn.ConvTranspose3d(64, 64, 2, 2), nn.ReLU()
    )
    stem = teacher_stem if role == "teacher" else student_stem
    return Network(stem, stages, head, edge=PAPER_EDGE[role], published=True)


def ct_features(ct: np.ndarray, voi: np.ndarray) -> np.ndarray:
    """Statistics (n, 45) of the trabecular region of CT patches.

    ct (n, 12, 24, 24) HU, voi (n, 12, 48, 48) bool. Mean, SD, shape, percentiles, share covered;
    autocorrelation and mean absolute difference along each axis and lag; energy in bands of
    in-plane frequency; level and SD by depth.
    """
    hu, region = ct.astype(np.float64), to_ct_grid(voi) >= 0.5
    region[~region.any((1, 2, 3))] = True  # an empty region: the whole patch rather than NaN
    mean = _region_mean(hu, region)
    centred = hu - mean[:, None, None, None]
    sd = np.sqrt(_region_mean(centred**2, region)) + 1e-6
    skewness, kurtosis = (_region_mean(centred**p, region) / sd**p for p in (3, 4))
    columns = [mean, sd, np.log(sd), sd / (np.abs(mean) + 100), skewness, kurtosis]
    levels = (2, 10, 25, 50, 75, 90, 98)
    percentiles = [np.percentile(h[r], levels) for h, r in zip(hu, region, strict=True)]
    columns += list(np.transpose(percentiles))
    columns.append(region.mean((1, 2, 3)))
    for axis, lags in LAGS.items():
        n = hu.shape[axis]
        for lag in lags:
            head, tail = np.arange(n - lag), np.arange(lag, n)
            a, b = np.take(centred, head, axis), np.take(centred, tail, axis)
            both = np.take(region, head, axis) & np.take(region, tail, axis)
            columns += [_region_mean(a * b, both) / sd**2, _region_mean(np.abs(a - b), both)]
    sharper = hu
    for size in BOXES:
        smoother = uniform_filter(hu, (0, 1, size, size), mode="nearest")
        columns.append(np.log(_region_mean((sharper - smoother) ** 2, region) + 1e-6) / 2)
        sharper = smoother
    depths = zip(np.array_split(centred, LAYERS, 2), np.array_split(region, LAYERS, 2), strict=True)
    for layer, inside in depths:
        level, square = _region_mean(layer, inside), _region_mean(layer**2, inside)
        columns += [level, np.sqrt(np.maximum(square - level**2, 0))]
    return np.column_stack(columns)


def _region_mean(values: np.ndarray, region: np.ndarray) -> np.ndarray:
    return (values * region).sum((1, 2, 3)) / np.maximum(region.sum((1, 2, 3)), 1)


def ridge_features(ct: np.ndarray, voi: np.ndarray, cortical_hu: np.ndarray) -> np.ndarray:
    """`ct_features` and, last, `N_CALIBRATED` columns from the knee's cortical HU (n,): (n, 48).

    These are cortical HU, its reciprocal, and the patch's mean HU over it.
    """
    features = ct_features(ct, voi)
    calibrated = [cortical_hu, 1000 / cortical_hu, features[:, 0] / cortical_hu]
    return np.column_stack([features, *calibrated])


class RidgeFit(NamedTuple):
    """A ridge of m targets, and what its cross-validation found of errors within a knee."""

    weights: np.ndarray  # (k + 1, m), the intercepts first
    rho: np.ndarray  # (m,) correlation of the errors of a knee's patches that predicted best
    error_correlation: np.ndarray  # (m,) of the cross-validated errors, see `correlation_within`


def fit_ridge(
    features: np.ndarray, targets: np.ndarray, subjects: np.ndarray, knees: np.ndarray | None = None
) -> RidgeFit:
    """Ridge by generalised least squares per target, its strength and rho by cross-validation.

    Parameters
    ----------
    features, targets, subjects : (n, k), (n, m), (n,) of the training fold; the cross-validation
        divides subjects.
    knees : (n,) knee of each patch. Without it, or where no knee has two patches, rho is 0
        (ordinary least squares).
    """
    repeated = knees is not None and len(np.unique(knees)) < len(knees)
    knees, rhos = (knees, RHOS) if repeated else (np.arange(len(features)), RHOS[:1])
    n_targets, folds = targets.shape[1], GroupKFold(min(5, len(np.unique(subjects))))
    tiled, alphas = np.tile(targets, len(ALPHAS)), np.repeat(ALPHAS, n_targets)  # all at once
    errors, squared = np.zeros((len(rhos), *tiled.shape)), np.zeros((len(rhos), tiled.shape[1]))
    for fit, held_out in folds.split(features, groups=subjects):
        for i, rho in enumerate(rhos):
            weights = _gls_ridge(features[fit], tiled[fit], knees[fit], rho, alphas)
            errors[i, held_out] = _linear(weights, features[held_out]) - tiled[held_out]
            squared[i] += (errors[i, held_out] ** 2).mean(axis=0)
    best = squared.reshape(-1, n_targets).argmin(axis=0)
    weights, chosen, remaining = [], [], []
    for target, candidate in enumerate(best):
        i, j = divmod(candidate, len(ALPHAS))
        column = targets[:, [target]]
        weights.append(_gls_ridge(features, column, knees, rhos[i], ALPHAS[[j]])[:, 0])
        chosen.append(rhos[i])
        remaining.append(errors[i, :, j * n_targets + target])
    correlation = correlation_within(np.transpose(remaining), knees)
    return RidgeFit(np.transpose(weights), np.array(chosen), correlation)


def correlation_within(errors: np.ndarray, knees: np.ndarray) -> np.ndarray:
    """Intraclass correlation of errors (n, m) of one knee: (m,), 0 where no knee has two patches.

    The share of the variance that patches of a knee have in common, by analysis of variance of a
    random intercept per knee (Searle 1992, 3.6), not below 0.
    """
    counts, means = _knee_means(errors, knees)
    n, n_knees = len(errors), (1 / counts).sum()
    if n - n_knees < 0.5:
        return np.zeros(errors.shape[1])
    within = ((errors - means) ** 2).sum(axis=0) / (n - n_knees)
    between = ((means - errors.mean(axis=0)) ** 2).sum(axis=0) / (n_knees - 1)
    per_knee = (n - counts.mean()) / (n_knees - 1)  # patches, corrected for unequal numbers
    share = (between - within) / (between + (per_knee - 1) * within)
    return share.clip(0)


def _knee_means(values: np.ndarray, knees: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Number of patches of each row's knee (n,) and their mean (n, k)."""
    _, codes = np.unique(knees, return_inverse=True)
    counts, sums = np.bincount(codes), np.zeros((codes.max() + 1, values.shape[1]))
    np.add.at(sums, codes, values)
    return counts[codes], (sums / counts[:, None])[codes]


def _gls_ridge(
    features: np.ndarray, targets: np.ndarray, knees: np.ndarray, rho: float, alphas: np.ndarray
) -> np.ndarray:
    """Weights (k + 1, m) of a ridge on quasi-demeaned values; alphas (m,) are its strengths.

    Ordinary least squares on y - theta mean(y of the knee), the intercept treated alike, is
    generalised least squares with a random intercept per knee (Wooldridge 2010, 10.4). Divided by
    1 - theta and with its square as the weight of the row, the intercept is an ordinary one.
    """
    scaler, demeaned = StandardScaler().fit(features), []
    for values in (scaler.transform(features), targets):
        counts, means = _knee_means(values, knees)
        kept = 1 - quasi_demeaning(rho, counts)
        demeaned.append(means + (values - means) / kept[:, None])
    ridge = Ridge(alphas).fit(*demeaned, sample_weight=kept**2)
    weights = np.atleast_2d(ridge.coef_).T / scaler.scale_[:, None]
    return np.vstack([ridge.intercept_ - scaler.mean_ @ weights, weights])


def quasi_demeaning(rho: float | Tensor, counts: np.ndarray | Tensor) -> np.ndarray | Tensor:
    """theta, the share of a knee's mean error that is taken off, by number of its patches.

    rho is the correlation of the errors of a knee's patches.
    """
    return 1 - ((1 - rho) / (1 - rho + counts * rho)) ** 0.5


def apply_ridge(
    weights: np.ndarray, features: np.ndarray, low: np.ndarray, high: np.ndarray
) -> np.ndarray:
    """Estimates (n, m) by weights (k + 1, m) from features (n, k), kept within low, high (m,)."""
    return _linear(weights, features).clip(low, high)


def _linear(weights: np.ndarray, features: np.ndarray) -> np.ndarray:
    return weights[0] + features @ weights[1:]
