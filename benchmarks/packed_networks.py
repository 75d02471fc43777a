"""The networks of ctsma.models in plain torch, on three input grids.

A network returns its prediction (B, 4) and the map of every stage; the maps of teacher and student
have equal shapes. Weights are in the order of ctsma.models, so that they can be copied.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

# Input grid of teacher and student in voxels; None: the grid of the patches
GRIDS = {
    "compact": {"teacher": None, "student": None},
    "published": {"teacher": (64, 64, 64), "student": (16, 16, 16)},
    "native": {"teacher": (16, 48, 48), "student": (16, 24, 24)},
}
# Strides of the two transposed convolutions, from the student's grid to the teacher's
TRANSPOSED = {"published": ((2, 2, 2), (2, 2, 2)), "native": ((1, 2, 2), (1, 1, 1))}
LAYERS, WIDTHS = (3, 4, 6, 3), (64, 128, 256, 512)  # of ResNet-50
COMPACT_WIDTHS, COMPACT_STRIDE = (16, 16, 32), {"teacher": 4, "student": 2}
N_STAGES = {"compact": 3, "published": 5, "native": 5}


class Convolution(nn.Conv3d):
    """A 3D convolution of maps in the layout channels last, in the form that is fastest on a GPU.

    1 x 1 x 1: a matrix product. Within slices: a 2D convolution of all slices, whose algorithm is
    found in a tenth of the time. The weights are those of `Conv3d`, and the result differs by
    rounding alone. With `SPLIT` False every one is a 3D convolution, for comparison.
    """

    SPLIT = True

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, n_in, slices, rows, columns) -> (B, n_out, ...)."""
        if self.SPLIT and self.kernel_size == (1, 1, 1):
            a, b, c = self.stride
            voxels = x[:, :, ::a, ::b, ::c].movedim(1, -1)
            return functional.linear(voxels, self.weight.flatten(1), self.bias).movedim(-1, 1)
        if self.SPLIT and self.kernel_size[0] == self.stride[0] == 1:
            slices = x.movedim(1, -1).flatten(0, 1).movedim(-1, 1)
            in_plane = self.stride[1:], self.padding[1:]
            y = functional.conv2d(slices, self.weight[:, :, 0], self.bias, *in_plane)
            return y.movedim(1, -1).unflatten(0, (len(x), -1)).movedim(-1, 1)
        return super().forward(x)


class Upsampling(nn.ConvTranspose3d):
    """A transposed convolution whose stride is its kernel, as a matrix product of every voxel."""

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, n_in, ...) -> (B, n_out, ...), axes larger by the stride."""
        if not Convolution.SPLIT:
            return super().forward(x)
        weight = self.weight.permute(2, 3, 4, 1, 0).flatten(0, 3)
        bias = self.bias.repeat(len(weight) // len(self.bias))
        boxes = functional.linear(x.movedim(1, -1), weight, bias)
        boxes = boxes.unflatten(-1, (*self.kernel_size, -1)).permute(0, 1, 4, 2, 5, 3, 6, 7)
        return boxes.flatten(1, 2).flatten(2, 3).flatten(3, 4).movedim(-1, 1)


class ResidualBlock(nn.Module):
    """Two convolutions and a shortcut: `UnetResBlock` of MONAI."""

    def __init__(self, n_in: int, n_out: int, kernel: Sequence[int], stride: int = 1):
        super().__init__()
        padding = [k // 2 for k in kernel]
        self.conv1 = Convolution(n_in, n_out, kernel, stride, padding, bias=False)
        self.conv2 = Convolution(n_out, n_out, kernel, 1, padding, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm3d(n_out), nn.BatchNorm3d(n_out)
        self.projects = n_in != n_out or stride != 1
        if self.projects:
            self.conv3 = Convolution(n_in, n_out, 1, stride, bias=False)
            self.norm3 = nn.BatchNorm3d(n_out)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, n_in, ...) -> (B, n_out, ...)."""
        y = functional.leaky_relu(self.norm1(self.conv1(x)), 0.01, inplace=True)
        y = self.norm2(self.conv2(y))
        shortcut = self.norm3(self.conv3(x)) if self.projects else x
        return functional.leaky_relu(y + shortcut, 0.01, inplace=True)


class Bottleneck(nn.Module):
    """The bottleneck block of a 3D ResNet-50."""

    def __init__(self, n_in: int, width: int, stride: int):
        super().__init__()
        n_out = 4 * width
        self.conv1, self.bn1 = Convolution(n_in, width, 1, bias=False), nn.BatchNorm3d(width)
        self.conv2 = Convolution(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm3d(width)
        self.conv3, self.bn3 = Convolution(width, n_out, 1, bias=False), nn.BatchNorm3d(n_out)
        self.projects = stride != 1 or n_in != n_out
        if self.projects:
            shortcut = Convolution(n_in, n_out, 1, stride)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm3d(n_out))

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, n_in, ...) -> (B, 4 width, ...)."""
        y = functional.relu(self.bn1(self.conv1(x)), inplace=True)
        y = functional.relu(self.bn2(self.conv2(y)), inplace=True)
        y = self.bn3(self.conv3(y))
        return functional.relu(y + (self.downsample(x) if self.projects else x), inplace=True)


class Network(nn.Module):
    """Stem, stages, head, as ctsma.models.Network.

    Parameters
    ----------
    grid : the image and its region are resized to it first; None keeps the grid of the patches.
    published : mean over the whole grid. Otherwise mean over the trabecular region.
    sigmoid : at the end.
    """

    def __init__(
        self,
        stem: nn.Module,
        stages: list[nn.Module],
        head: nn.Module,
        grid: tuple[int, int, int] | None,
        published: bool,
        sigmoid: bool,
    ):
        super().__init__()
        self.stem, self.stages, self.head = stem, nn.ModuleList(stages), head
        self.grid, self.published, self.sigmoid = grid, published, sigmoid

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Input (B, channels, slices, rows, columns) -> prediction (B, 4), maps of the stages."""
        features = x
        if self.grid:
            features = functional.interpolate(x, size=self.grid, mode="trilinear")
            features = features.contiguous(memory_format=torch.channels_last_3d)
        features, maps = self.stem(features), []
        for stage in self.stages:
            features = stage(features)
            maps.append(features)
        if self.published:
            pooled = features.mean((2, 3, 4))
        else:
            weight = functional.adaptive_avg_pool3d(x[:, 1:2], features.shape[2:]) + 1e-3
            pooled = (features * weight).sum((2, 3, 4)) / weight.sum((2, 3, 4))
        prediction = self.head(pooled).float()
        return (torch.sigmoid(prediction) if self.sigmoid else prediction), maps


def build(size: str, role: str, channels: int, sigmoid: bool, seed: int) -> Network:
    """A network with weights drawn from the seed.

    Parameters
    ----------
    size : a key of `GRIDS`; "published" and "native" are the published network on two grids.
    role : "teacher" or "student".
    channels : of the input: image, region and, for calibrated CT, normalised HU.
    sigmoid : at the end of a published network that predicts biomarkers.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if size == "compact":
            return _compact(role, channels)
        return _published(size, role, channels, sigmoid)


def _compact(role: str, channels: int) -> Network:
    first, middle, last = COMPACT_WIDTHS
    s = COMPACT_STRIDE[role]
    stem = nn.Sequential(
        Convolution(channels, first, (1, 3 * s, 3 * s), (1, s, s), (0, s, s), bias=False),
        nn.BatchNorm3d(first),
        nn.ReLU(),
    )
    stages = [
        ResidualBlock(first, first, (1, 3, 3)),
        ResidualBlock(first, middle, (3, 3, 3), 2),
        ResidualBlock(middle, last, (3, 3, 3)),
    ]
    return Network(stem, stages, nn.Linear(last, 4), None, published=False, sigmoid=False)


def _published(size: str, role: str, channels: int, sigmoid: bool) -> Network:
    first = nn.Sequential(
        Convolution(64, 64, (1, 7, 7), (1, 2, 2), (0, 3, 3), bias=False),
        nn.BatchNorm3d(64),
        nn.ReLU(),
        nn.MaxPool3d(3, 2, 1),
    )
    stages, n_in = [first], 64
    for i, (n_blocks, width) in enumerate(zip(LAYERS, WIDTHS, strict=True)):
        blocks = []
        for j in range(n_blocks):
            blocks.append(Bottleneck(n_in, width, 2 if i and not j else 1))
            n_in = 4 * width
        stages.append(nn.Sequential(*blocks))
    for module in nn.ModuleList(stages).modules():
        if isinstance(module, nn.Conv3d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    if role == "teacher":
        stem = nn.Sequential(
            ResidualBlock(channels, 64, (3, 3, 3)), ResidualBlock(64, 64, (3, 3, 3))
        )
    else:
        one, two = TRANSPOSED[size]
        up = [Upsampling(channels, 64, one, one), nn.ReLU(inplace=True)]
        stem = nn.Sequential(*up, Upsampling(64, 64, two, two), nn.ReLU(inplace=True))
    head = nn.Sequential(nn.Linear(n_in, 61), nn.Linear(61, 4))
    return Network(stem, stages, head, GRIDS[size][role], published=True, sigmoid=sigmoid)
