"""CT-like images from MR, trained on slices of training subjects: unpaired (paper) or paired.

Only benchmarks/registration_ablation.py uses it. Slices are sagittal, 1 mm, (z, y). Networks see
grey values in -1..1 and a Sobel edge map as second channel; the paper takes the edges from HED, a
trained network whose weights are not available offline (design choice). Layers, widths and weights
of the terms are not published (design choice).
"""

from typing import NamedTuple

import numpy as np
import SimpleITK as sitk
import torch
from torch import Tensor, nn
from torch.nn import functional

from ctsma.common import InputError
from ctsma.registration import isotropic

SLICE_MM = 1.0  # half a second per knee; finding a bone needs no trabeculae (design choice)
HU_RANGE = (-200.0, 1000.0)  # fat to dense cortex at 1 mm (design choice)
MR_PERCENTILE = 99.0  # white of the MR, which has no unit (design choice)
WIDTHS = (12, 24)  # channels of the two levels of the U-net (design choice, by time)
PATCH, BATCH = 64, 4  # edge of a crop in mm, crops per step (design choice)
# Weights of cycle, identity (half of the usual 5) and mutual information (design choice).
CYCLE, IDENTITY, INFORMATION = 10.0, 2.0, 1.0
N_BINS = 16  # of the soft joint histogram (design choice)
NEAR_MM = 15.0  # soft tissue farther from a bone did not move with it (design choice)


class Configuration(NamedTuple):
    """Parts of the paper's method that can be switched off; `paired` trains on aligned pairs."""

    edges: bool = True
    information: bool = True
    paired: bool = False
    steps: int = 400
    learning_rate: float = 1e-3


class Generator(nn.Module):
    """Two-level U-net: one grey channel (and its edges) in, one out in -1..1; even edge lengths."""

    def __init__(self, edges: bool):
        super().__init__()
        fine, coarse = WIDTHS
        self.edges = edges
        self.fine, self.coarse = _two_layers(1 + edges, fine), _two_layers(fine, coarse)
        self.joined, self.out = _two_layers(fine + coarse, fine), nn.Conv2d(fine, 1, 1)

    def forward(self, grey: Tensor) -> Tensor:
        """(n, 1, h, w) -> (n, 1, h, w)."""
        fine = self.fine(torch.cat([grey, edge_map(grey)], 1) if self.edges else grey)
        coarse = self.coarse(functional.avg_pool2d(fine, 2))
        coarse = functional.interpolate(coarse, scale_factor=2.0)
        return torch.tanh(self.out(self.joined(torch.cat([fine, coarse], 1))))


def edge_map(grey: Tensor) -> Tensor:
    """Sobel gradient magnitude of (n, 1, h, w), about 0..1 for grey values in -1..1."""
    along = grey.new_tensor([[-1.0, 0, 1], [-2, 0, 2], [-1, 0, 1]]) / 8
    kernels = torch.stack([along, along.T])[:, None]
    padded = functional.pad(grey, (1, 1, 1, 1), mode="replicate")
    return functional.conv2d(padded, kernels).pow(2).sum(1, True).sqrt()


def mutual_information(a: Tensor, b: Tensor) -> Tensor:
    """Mutual information (nats) of values in -1..1 by a soft joint histogram (linear weights)."""
    levels = torch.linspace(-1, 1, N_BINS, device=a.device)
    memberships = []
    for values in (a, b):
        distance = (values.reshape(-1, 1) - levels).abs() * (N_BINS - 1) / 2
        memberships.append((1 - distance).clamp(min=0))
    p = memberships[0].T @ memberships[1] / len(memberships[0]) + 1e-9
    return (p * (p.log() - p.sum(0, True).log() - p.sum(1, True).log())).sum()


def grey_slices(image: sitk.Image, modality: str) -> tuple[np.ndarray, sitk.Image]:
    """Sagittal slices (n, z, y) in -1..1 of a "CT" in HU or an "MR", and their 1 mm grid (LPS)."""
    grid = isotropic(sitk.DICOMOrient(image, "LPS"), SLICE_MM)
    grey = sitk.GetArrayFromImage(grid)
    low, high = HU_RANGE if modality == "CT" else (0.0, np.percentile(grey, MR_PERCENTILE))
    scaled = 2 * (np.clip(grey, low, high) - low) / max(high - low, 1e-6) - 1
    return np.ascontiguousarray(scaled.transpose(2, 0, 1), np.float32), grid


def train_synthesis(
    mr: list[np.ndarray], ct: list[np.ndarray], configuration: Configuration, *, seed: int
) -> Generator:
    """Train MR -> CT on training subjects.

    Parameters
    ----------
    mr, ct : one array (n, z, y) in -1..1 per knee, see `grey_slices`. For `paired` the slices of
        the CT lie on the grid of the MR (`ct_beside_mr`), NaN where there is no CT; otherwise the
        two need not correspond.
    seed : of weights and crops.

    Returns
    -------
    Generator in evaluation mode. Raises InputError where there are no slices, or pairs of unequal
    shape.
    """
    if not mr or not ct:
        raise InputError("synthesis", "has no training knee", "give slices of one MR and one CT")
    if configuration.paired and [m.shape for m in mr] != [c.shape for c in ct]:
        remedy = "resample each CT onto the slices of its MR"
        raise InputError("synthesis", "has pairs of different shape", remedy)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # weights come from torch's global generator, which the fork keeps
        to_ct, to_mr = Generator(configuration.edges), Generator(configuration.edges)
        critics = _critic(), _critic()
    rng = np.random.default_rng(seed)
    if configuration.paired:
        step = _paired_step(to_ct, configuration)
    else:
        step = _cycle_step(to_ct, to_mr, *critics, configuration)
    draw = _draw_paired if configuration.paired else _draw_unpaired
    for _ in range(configuration.steps):
        step(*draw(mr, ct, rng))
    return to_ct.eval()


def synthetic_ct(generator: Generator, mr: sitk.Image) -> sitk.Image:
    """CT-like image in HU on the 1 mm grid of an MR, slice by slice."""
    slices, grid = grey_slices(mr, "MR")
    odd_z, odd_y = (n % 2 for n in slices.shape[1:])
    with torch.no_grad():
        grey = torch.from_numpy(slices)[:, None]
        padded = functional.pad(grey, (0, odd_y, 0, odd_z), mode="replicate")
        made = torch.cat([generator(part) for part in padded.split(16)])[:, 0].numpy()
    made = made[:, : slices.shape[1], : slices.shape[2]].transpose(1, 2, 0)
    out = sitk.GetImageFromArray((made + 1) / 2 * (HU_RANGE[1] - HU_RANGE[0]) + HU_RANGE[0])
    out.CopyInformation(grid)
    return out


def _two_layers(before: int, after: int) -> nn.Sequential:
    layers = []
    for channels in (before, after):
        layers.append(nn.Conv2d(channels, after, 3, padding=1, padding_mode="replicate"))
        layers += [nn.InstanceNorm2d(after), nn.LeakyReLU(0.1)]
    return nn.Sequential(*layers)


def _critic() -> nn.Sequential:
    """PatchGAN of three layers: is each neighbourhood of 16 mm from a real image?"""
    a, b = WIDTHS
    return nn.Sequential(
        nn.Conv2d(1, a, 4, 2, 1),
        nn.LeakyReLU(0.2),
        nn.Conv2d(a, b, 4, 2, 1),
        nn.InstanceNorm2d(b),
        nn.LeakyReLU(0.2),
        nn.Conv2d(b, 1, 3),
    )


def _crop(stack: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A crop (PATCH, PATCH, ...) of one slice from the middle half, which holds the bones."""
    n = len(stack)
    number = int(rng.integers(n // 4, n - n // 4))
    z, y = (int(rng.integers(max(size - PATCH, 0) + 1)) for size in stack.shape[1:3])
    part = stack[number, z : z + PATCH, y : y + PATCH]
    margin = [(0, PATCH - size) for size in part.shape[:2]] + [(0, 0)] * (part.ndim - 2)
    return np.pad(part, margin, mode="edge")


def _draw_unpaired(mr: list, ct: list, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    batches = []
    for knees in (mr, ct):
        crops = [_crop(knees[rng.integers(len(knees))], rng) for _ in range(BATCH)]
        batches.append(torch.from_numpy(np.stack(crops))[:, None])
    return batches[0], batches[1]


def _draw_paired(mr: list, ct: list, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    knees = rng.integers(len(mr), size=BATCH)
    crops = np.stack([_crop(np.stack([mr[knee], ct[knee]], -1), rng) for knee in knees])
    return torch.from_numpy(crops[:, None, ..., 0]), torch.from_numpy(crops[:, None, ..., 1])


def _adam(modules: list[nn.Module], rate: float, betas: tuple) -> torch.optim.Adam:
    parameters = [parameter for module in modules for parameter in module.parameters()]
    return torch.optim.Adam(parameters, rate, betas)


def _paired_step(to_ct: Generator, configuration: Configuration):
    optimiser = _adam([to_ct], configuration.learning_rate, (0.9, 0.999))

    def step(mr: Tensor, ct: Tensor) -> None:
        seen = torch.isfinite(ct)
        if not seen.any():
            return
        loss = (to_ct(mr) - ct.nan_to_num())[seen].abs().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()

    return step


def _cycle_step(
    to_ct: Generator,
    to_mr: Generator,
    is_ct: nn.Module,
    is_mr: nn.Module,
    configuration: Configuration,
):
    """CycleGAN (least squares; Zhu et al. 2017) with mutual information of input and output."""
    rate = configuration.learning_rate
    generators = _adam([to_ct, to_mr], rate, (0.5, 0.999))
    critics = _adam([is_ct, is_mr], rate, (0.5, 0.999))

    def step(mr: Tensor, ct: Tensor) -> None:
        like_ct, like_mr = to_ct(mr), to_mr(ct)
        loss = (is_ct(like_ct) - 1).pow(2).mean() + (is_mr(like_mr) - 1).pow(2).mean()
        cycle = (to_mr(like_ct) - mr).abs().mean() + (to_ct(like_mr) - ct).abs().mean()
        loss = loss + CYCLE * cycle
        identity = (to_ct(ct) - ct).abs().mean() + (to_mr(mr) - mr).abs().mean()
        loss = loss + IDENTITY * identity
        if configuration.information:
            information = mutual_information(mr, like_ct) + mutual_information(ct, like_mr)
            loss = loss - INFORMATION * information
        generators.zero_grad()
        loss.backward()
        generators.step()
        loss = (is_ct(ct) - 1).pow(2).mean() + is_ct(like_ct.detach()).pow(2).mean()
        loss = loss + (is_mr(mr) - 1).pow(2).mean() + is_mr(like_mr.detach()).pow(2).mean()
        critics.zero_grad()
        loss.backward()
        critics.step()

    return step


def ct_beside_mr(
    ct: sitk.Image,
    grid: sitk.Image,
    transforms: dict[str, sitk.Euler3DTransform],
    depths_mm: dict[str, sitk.Image],
) -> np.ndarray:
    """Slices of the CT on the grid of an MR; (n, z, y) in -1..1, NaN where no bone is near.

    Each voxel takes the CT through the transform of its nearest bone.

    Parameters
    ----------
    grid : of `grey_slices`. transforms : {bone: CT points to MR points} of an earlier stage.
    depths_mm : {bone: signed distance in CT space}, see `bone_depths_mm`.
    """
    outside = HU_RANGE[0] - 1e4
    hu, depth = [], []
    for bone, transform in transforms.items():
        inverse = transform.GetInverse()
        moved = sitk.Resample(ct, grid, inverse, sitk.sitkLinear, outside)
        moved_depth = sitk.Resample(depths_mm[bone], grid, inverse, sitk.sitkLinear, -1e3)
        hu.append(sitk.GetArrayFromImage(moved))
        depth.append(sitk.GetArrayFromImage(moved_depth))
    nearest = np.argmax(depth, axis=0)
    chosen = np.take_along_axis(np.stack(hu), nearest[None], 0)[0]
    scaled = 2 * (np.clip(chosen, *HU_RANGE) - HU_RANGE[0]) / (HU_RANGE[1] - HU_RANGE[0]) - 1
    scaled[(np.max(depth, axis=0) < -NEAR_MM) | (chosen < outside / 2)] = np.nan
    return np.ascontiguousarray(scaled.transpose(2, 0, 1), np.float32)
