"""Teacher (MR) and student (CT) networks whose feature maps meet on one grid, so that they can be compared.

Arrays are (batch, channel, x slices, z, y) on the patch grid: MR 12 x 48 x 48, CT 12 x 24 x 24, the same volume.
Channels are the normalised image and the bone mask (the trabecular region, 0 to 1).
"""

import torch
from monai.networks.blocks import UnetResBlock
from monai.networks.nets.resnet import ResNet
from torch import Tensor, nn
from torch.nn import functional

from ctsma.cohort import BIOMARKERS, InputFault

ROLES = ("teacher", "student")
WIDTHS = (16, 16, 32)  # channels of the three compact stages; twice as many learn no more from 64 knees (our choice)
IN_PLANE = (1, 3, 3)  # as the early stages of slow_r50: slices 0.75 mm apart share little fine texture
STRIDE = {
    "teacher": 4,
    "student": 2,
}  # in plane, onto 12 x 12 x 12: no worse than 12 x 24 x 24 in half the time (our choice)
PAPER_EDGE = {"teacher": 64, "student": 16}  # voxels; published code (BFFE 60 and CT 15-16 resized)


class Estimator(nn.Module):
    """Stem, stages, head: an image and its mask in, four biomarkers and every stage's feature map out.

    Parameters
    ----------
    stem : from the input to the grid on which teacher and student meet.
    stages : shared design of teacher and student; stage i of both give maps of equal shape.
    head : features (..., C) -> (..., 4).
    edge : cubic grid in voxels to which the input is resized first; None keeps the patch grid.
    published : mean over the whole grid and a sigmoid at the end; else (ours) mean over the bone mask and none, which
        makes the head's output at a place that place's share of the prediction.
    spread : last features (B, C) -> (B, 4) log variances of the predictions; None where they are not learned.
    channels : of the input that are read; further ones are left out.
    """

    def __init__(
        self,
        stem: nn.Module,
        stages: list[nn.Module],
        head: nn.Module,
        edge: int | None = None,
        published: bool = False,
        spread: nn.Module | None = None,
        channels: int = 2,
    ):
        super().__init__()
        self.stem, self.stages, self.head, self.spread = stem, nn.ModuleList(stages), head, spread
        self.edge, self.published, self.channels = edge, published, channels

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """(B, channels, x, z, y) -> prediction (B, 4), 0..1 on the min-max scale of the targets, [stage maps]."""
        x = x[:, : self.channels]
        if self.edge:
            x = functional.interpolate(x, size=(self.edge,) * 3, mode="trilinear")
        features, maps = self.stem(x), []
        for stage in self.stages:
            features = stage(features)
            maps.append(features)
        prediction = self.head(self.pooled(maps[-1], x[:, 1:2])).float()
        return (torch.sigmoid(prediction) if self.published else prediction), maps

    def pooled(self, features: Tensor, mask: Tensor) -> Tensor:
        """Last map (B, C, ...) -> (B, C)."""
        return features.mean((2, 3, 4)) if self.published else masked_mean(features, mask)

    def evidence(self, features: Tensor) -> Tensor:
        """What the last map (B, C, ...) says of the four biomarkers at every place: (B, 4, ...)."""
        return self.head(features.movedim(1, -1)).movedim(-1, 1).float()


def masked_mean(features: Tensor, mask: Tensor) -> Tensor:
    """Mean of features (B, C, ...) weighted by mask (B, 1, ...) averaged onto their grid: (B, C).

    An empty mask gives the plain mean, so that no patch yields NaN.
    """
    weight = functional.adaptive_avg_pool3d(mask, features.shape[2:]) + 1e-3
    return (features * weight).sum((2, 3, 4)) / weight.sum((2, 3, 4))


def build(
    role: str, size: str, generator: torch.Generator, widths: tuple[int, ...] = WIDTHS, ruler: bool = False
) -> Estimator:
    """Make a network with weights drawn from `generator`: the same generator state gives the same bits.

    Parameters
    ----------
    role : "teacher" takes (B, 2, 12, 48, 48) MR, "student" (B, 2, 12, 24, 24) CT.
    size : "compact" (ours: 3 residual stages, about 0.07 M weights, minutes on a CPU) or "paper" (published: two
        residual blocks or two transposed convolutions, then a 3D ResNet-50, 61 -> 4 -> sigmoid).
    widths : channels of the compact stages.
    ruler : the student takes a third channel, HU over that of the knee's own cortex.

    Returns
    -------
    Module with forward(x) -> (prediction (B, 4), [feature maps]); teacher and student maps agree in shape.
    """
    if role not in ROLES:
        raise InputFault("role", f"is {role!r}", f"choose one of {', '.join(ROLES)}")
    makers = {"compact": lambda: _compact(role, widths, 3 if ruler else 2), "paper": lambda: _paper(role)}
    if size not in makers:
        raise InputFault("size", f"is {size!r}", f"choose one of {', '.join(makers)}")
    return _seeded(makers[size], generator)


def build_detail_head(size: str, generator: torch.Generator, widths: tuple[int, ...] = WIDTHS) -> nn.Module:
    """Super-resolution head: the student's first map (B, C, 12, 12, 12) -> logits (B, 4, 12, 24, 24).

    The four channels are the 2 x 2 MR pixels under one CT pixel (sub-pixel convolution, Shi 2016), to be
    compared with `unshuffle` of an MR map. It is dropped after training: use needs the student alone.
    """
    if size != "compact":
        raise InputFault("detail head", f"does not fit the {size} network", "set its weight to 0")
    return _seeded(lambda: _detail_head(widths[0]), generator)


def unshuffle(fine: Tensor) -> Tensor:
    """(B, 12, 48, 48) -> (B, 4, 12, 24, 24): the 2 x 2 pixels under each coarse pixel become channels."""
    return functional.pixel_unshuffle(fine, 2).unflatten(1, (fine.shape[1], 4)).transpose(1, 2)


class Unfolded(nn.Module):
    """The inverse of `unshuffle` as a layer."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, 4 C, x, z, y) -> (B, C, x, 2 z, 2 y)."""
        return functional.pixel_shuffle(x.transpose(1, 2), 2).transpose(1, 2)


def _seeded(make, generator: torch.Generator) -> nn.Module:
    seed = int(torch.randint(2**62, (1,), generator=generator, device=generator.device))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()


def _detail_head(width: int) -> nn.Module:
    fine = nn.Conv3d(width, width, IN_PLANE, padding=(0, 1, 1)), nn.ReLU(), nn.Conv3d(width, 16, 1)
    return nn.Sequential(*fine, Unfolded())


def _compact(role: str, widths: tuple[int, ...], channels: int) -> Estimator:
    first, middle, last = widths
    stride = STRIDE[role]
    # Batch normalisation, unlike group or instance normalisation, keeps a patch's absolute level: HU carries BV/TV.
    stem = [
        nn.Conv3d(channels, first, (1, 3 * stride, 3 * stride), (1, stride, stride), (0, stride, stride), bias=False),
        nn.BatchNorm3d(first),
        nn.ReLU(),
    ]
    stages = [
        UnetResBlock(3, first, first, IN_PLANE, 1, "batch"),
        UnetResBlock(3, first, middle, 3, 2, "batch"),
        UnetResBlock(3, middle, last, 3, 1, "batch"),
    ]
    heads = [nn.Linear(last, len(BIOMARKERS)) for _ in range(2)]
    return Estimator(nn.Sequential(*stem), stages, heads[0], spread=heads[1], channels=channels)


def _paper(role: str) -> Estimator:
    """Published layout. Differs from pytorchvideo's slow_r50: 3 x 3 x 3 kernels and stride along the slices too."""
    backbone = ResNet("bottleneck", [3, 4, 6, 3], [64, 128, 256, 512], 3, 64, (1, 7, 7), (1, 2, 2), feed_forward=False)
    enter = nn.Sequential(backbone.conv1, backbone.bn1, backbone.act, backbone.maxpool)
    stages = [enter, backbone.layer1, backbone.layer2, backbone.layer3, backbone.layer4]
    head = nn.Sequential(nn.Linear(2048, 61), nn.Linear(61, len(BIOMARKERS)))
    blocks = [UnetResBlock(3, 2, 64, 3, 1, "batch"), UnetResBlock(3, 64, 64, 3, 1, "batch")]
    rise = [nn.ConvTranspose3d(2, 64, 2, 2), nn.ReLU(), nn.ConvTranspose3d(64, 64, 2, 2), nn.ReLU()]
    stem = blocks if role == "teacher" else rise
    return Estimator(nn.Sequential(*stem), stages, head, PAPER_EDGE[role], published=True)
