"""Networks that estimate biomarkers: the teacher reads MR, the student CT.

Arrays are (batch, channel, slices, rows, columns) on the patch grid: MR 12 x 48 x 48 and CT
12 x 24 x 24 voxels of the same volume. The first two channels are the normalised image and the
trabecular region (0 to 1). Teacher and student have feature maps on one grid, so that a loss can
compare them.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from ctsma.common import BIOMARKERS

# Channels of the three compact stages: twice as many learn no more from 64 knees; design choice
WIDTHS = (16, 16, 32)
# As in the early stages of slow_r50: slices 0.75 mm apart share little fine texture
IN_PLANE = (1, 3, 3)
# In plane, onto 12 x 12 x 12: no worse than 12 x 24 x 24 in half the time; design choice
STRIDE = {"teacher": 4, "student": 2}
PAPER_EDGE = {"teacher": 64, "student": 16}  # voxels; published code (60 and 15-16, resized)


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
