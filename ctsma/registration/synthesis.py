"""MR -> CT-like images, learned on the training subjects' slices: unpaired as in the paper, or from aligned pairs.

Slices are sagittal, 1 mm, (z, y). Networks see grey values in -1..1 and a Sobel edge map as second channel: the paper
takes edges from HED, a trained network whose weights cannot be had offline (our choice). Layers, widths and weights are
not published: ours.
"""

from typing import NamedTuple

import numpy as np
import SimpleITK as sitk
import torch
from torch import Tensor, nn
from torch.nn import functional

from ctsma.cohort import InputFault

from .masks import isotropic

SLICE_MM = 1.0  # half a second a knee; trabeculae are not needed to find a bone (our choice)
HU_RANGE = (-200.0, 1000.0)  # fat to dense cortex at 1 mm (our choice)
MR_PERCENTILE = 99.0  # the MR's white: it has no unit (our choice)
WIDTHS = (12, 24)  # channels of the U-net's two levels (our choice, by time)
PATCH, BATCH = 64, 4  # mm of a crop, crops a step (our choice)
CYCLE, IDENTITY, INFORMATION = 10.0, 2.0, 1.0  # weights of cycle, identity (half of the usual 5) and MI (our choice)
BINS = 16  # of the soft joint histogram (our choice)
NEAR_MM = 15.0  # soft tissue further from a bone than this did not move with it (our choice)


class Recipe(NamedTuple):
    """What to learn with: the paper's parts can be switched off one by one; `paired` takes aligned pairs instead."""

    edges: bool = True
    information: bool = True
    paired: bool = False
    steps: int = 400
    learning_rate: float = 1e-3


class Generator(nn.Module):
    """Two-level U-net, one grey channel (and its edges) in, one out in -1..1; height and width divisible by 2."""

    def __init__(self, edges: bool):
        super().__init__()
        a, b = WIDTHS
        self.edges = edges
        self.fine, self.coarse = _twice(1 + edges, a), _twice(a, b)
        self.joined, self.out = _twice(a + b, a), nn.Conv2d(a, 1, 1)

    def forward(self, grey: Tensor) -> Tensor:
        """(n, 1, h, w) -> (n, 1, h, w)."""
        fine = self.fine(torch.cat([grey, edge_map(grey)], 1) if self.edges else grey)
        coarse = functional.interpolate(self.coarse(functional.avg_pool2d(fine, 2)), scale_factor=2.0)
        return torch.tanh(self.out(self.joined(torch.cat([fine, coarse], 1))))


def edge_map(grey: Tensor) -> Tensor:
    """Sobel gradient magnitude of (n, 1, h, w), about 0..1 for grey values in -1..1."""
    along = grey.new_tensor([[-1.0, 0, 1], [-2, 0, 2], [-1, 0, 1]]) / 8
    kernels = torch.stack([along, along.T])[:, None]
    return functional.conv2d(functional.pad(grey, (1, 1, 1, 1), mode="replicate"), kernels).pow(2).sum(1, True).sqrt()


def mutual_information(a: Tensor, b: Tensor) -> Tensor:
    """Mutual information (nats) of two batches in -1..1 by a differentiable joint histogram (linear weights)."""
    levels = torch.linspace(-1, 1, BINS, device=a.device)
    near = [(1 - (v.reshape(-1, 1) - levels).abs() * (BINS - 1) / 2).clamp(min=0) for v in (a, b)]
    p = near[0].T @ near[1] / len(near[0]) + 1e-9
    return (p * (p.log() - p.sum(0, True).log() - p.sum(1, True).log())).sum()


def grey_slices(image: sitk.Image, modality: str) -> tuple[np.ndarray, sitk.Image]:
    """Sagittal slices (n, z, y) in -1..1 of a "CT" in HU or an "MR", and the 1 mm grid they lie on (LPS axes)."""
    grid = isotropic(sitk.DICOMOrient(image, "LPS"), SLICE_MM)
    grey = sitk.GetArrayFromImage(grid)
    low, high = HU_RANGE if modality == "CT" else (0.0, np.percentile(grey, MR_PERCENTILE))
    scaled = 2 * (np.clip(grey, low, high) - low) / max(high - low, 1e-6) - 1
    return np.ascontiguousarray(scaled.transpose(2, 0, 1), np.float32), grid


def learn_synthesis(mr: list[np.ndarray], ct: list[np.ndarray], recipe: Recipe, *, seed: int) -> Generator:
    """Learn MR -> CT from training subjects.

    Parameters
    ----------
    mr, ct : one array (n, z, y) in -1..1 a knee, see `grey_slices`. For `paired` the CT's slices lie on the MR's grid
        (carried there by an earlier stage's transform), NaN where no CT is; else the two need not correspond.
    recipe : what to learn with; seed : of weights and crops.

    Returns
    -------
    Generator in evaluation mode. Raises InputFault where there are no slices, or pairs of unequal shape.
    """
    if not mr or not ct:
        raise InputFault("synthesis", "has no training knee", "give slices of at least one MR and one CT")
    if recipe.paired and [m.shape for m in mr] != [c.shape for c in ct]:
        raise InputFault("synthesis", "pairs differ in shape", "carry each CT onto its MR's slices")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # weights are drawn from torch's own state; the fork gives it back
        networks = [Generator(recipe.edges), Generator(recipe.edges), _critic(), _critic()]
    draw, rng = (_paired if recipe.paired else _unpaired), np.random.default_rng(seed)
    step = _pair_step(networks, recipe) if recipe.paired else _cycle_step(networks, recipe)
    for _ in range(recipe.steps):
        step(*draw(mr, ct, rng))
    return networks[0].eval()


def synthetic_ct(generator: Generator, mr: sitk.Image) -> sitk.Image:
    """CT-like image in HU on the MR's 1 mm grid (its patient's axes), slice by slice."""
    slices, grid = grey_slices(mr, "MR")
    odd = [n % 2 for n in slices.shape[1:]]
    with torch.no_grad():
        padded = functional.pad(torch.from_numpy(slices)[:, None], (0, odd[1], 0, odd[0]), mode="replicate")
        made = torch.cat([generator(part) for part in padded.split(16)])[:, 0].numpy()
    made = made[:, : slices.shape[1], : slices.shape[2]].transpose(1, 2, 0)
    out = sitk.GetImageFromArray((made + 1) / 2 * (HU_RANGE[1] - HU_RANGE[0]) + HU_RANGE[0])
    out.CopyInformation(grid)
    return out


def _twice(before: int, after: int) -> nn.Sequential:
    layers = []
    for channels in (before, after):
        layers += [nn.Conv2d(channels, after, 3, padding=1, padding_mode="replicate"), nn.InstanceNorm2d(after)]
        layers += [nn.LeakyReLU(0.1)]
    return nn.Sequential(*layers)


def _critic() -> nn.Sequential:
    """PatchGAN of three layers: is each 16 mm neighbourhood of a real image?"""
    a, b = WIDTHS
    first, second = nn.Conv2d(1, a, 4, 2, 1), nn.Conv2d(a, b, 4, 2, 1)
    return nn.Sequential(first, nn.LeakyReLU(0.2), second, nn.InstanceNorm2d(b), nn.LeakyReLU(0.2), nn.Conv2d(b, 1, 3))


def _corner(shape: tuple, rng: np.random.Generator) -> tuple:
    return tuple(slice(k := int(rng.integers(max(n - PATCH, 0) + 1)), k + PATCH) for n in shape)


def _crop(slices: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    # the middle half of the slices holds the bones
    number = int(rng.integers(len(slices) // 4, len(slices) - len(slices) // 4))
    part = slices[(number, *_corner(slices.shape[1:], rng))]
    return np.pad(part, [(0, PATCH - n) for n in part.shape], mode="edge")


def _unpaired(mr: list, ct: list, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    batches = [np.stack([_crop(side[rng.integers(len(side))], rng) for _ in range(BATCH)]) for side in (mr, ct)]
    return tuple(torch.from_numpy(batch)[:, None] for batch in batches)


def _paired(mr: list, ct: list, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    crops = []
    for knee in rng.integers(len(mr), size=BATCH):
        both = np.stack([mr[knee], ct[knee]], -1)
        number = int(rng.integers(len(both) // 4, len(both) - len(both) // 4))
        part = both[(number, *_corner(both.shape[1:3], rng))]
        crops.append(np.pad(part, [*((0, PATCH - n) for n in part.shape[:2]), (0, 0)], mode="edge"))
    return tuple(torch.from_numpy(np.stack(crops)[:, None, ..., i]) for i in (0, 1))


def _adam(modules: list[nn.Module], recipe: Recipe, betas: tuple) -> torch.optim.Adam:
    return torch.optim.Adam([p for m in modules for p in m.parameters()], recipe.learning_rate, betas)


def _pair_step(networks: list, recipe: Recipe):
    optimiser = _adam(networks[:1], recipe, (0.9, 0.999))

    def step(mr: Tensor, ct: Tensor) -> None:
        seen = torch.isfinite(ct)
        loss = (networks[0](mr) - ct.nan_to_num())[seen].abs().mean() if seen.any() else mr.sum() * 0
        optimiser.zero_grad()
        if loss.requires_grad:
            loss.backward()
            optimiser.step()

    return step


def _cycle_step(networks: list, recipe: Recipe):
    """CycleGAN (least squares) after Zhu et al. 2017, with mutual information of input and output as the paper says."""
    to_ct, to_mr, is_ct, is_mr = networks
    makers, critics = _adam([to_ct, to_mr], recipe, (0.5, 0.999)), _adam([is_ct, is_mr], recipe, (0.5, 0.999))

    def step(mr: Tensor, ct: Tensor) -> None:
        like_ct, like_mr = to_ct(mr), to_mr(ct)
        loss = (is_ct(like_ct) - 1).pow(2).mean() + (is_mr(like_mr) - 1).pow(2).mean()
        loss = loss + CYCLE * ((to_mr(like_ct) - mr).abs().mean() + (to_ct(like_mr) - ct).abs().mean())
        loss = loss + IDENTITY * ((to_ct(ct) - ct).abs().mean() + (to_mr(mr) - mr).abs().mean())
        if recipe.information:
            loss = loss - INFORMATION * (mutual_information(mr, like_ct) + mutual_information(ct, like_mr))
        makers.zero_grad()
        loss.backward()
        makers.step()
        judged = [(is_ct(ct) - 1, is_ct(like_ct.detach())), (is_mr(mr) - 1, is_mr(like_mr.detach()))]
        critics.zero_grad()
        sum(error.pow(2).mean() for pair in judged for error in pair).backward()
        critics.step()

    return step


def ct_beside_mr(
    ct: sitk.Image, grid: sitk.Image, transforms: dict[str, sitk.Euler3DTransform], depths_mm: dict[str, sitk.Image]
) -> np.ndarray:
    """The CT's slices (n, z, y) in -1..1 on an MR's grid (`grey_slices`), NaN where no aligned bone is near.

    `transforms` {bone: CT points to MR points} of an earlier stage; `depths_mm` {bone: signed distance, CT space}. Each
    voxel takes the CT through the transform of the bone it is nearest to.
    """
    outside = HU_RANGE[0] - 1e4
    carried = {b: sitk.Resample(ct, grid, t.GetInverse(), sitk.sitkLinear, outside) for b, t in transforms.items()}
    near = {b: sitk.Resample(depths_mm[b], grid, t.GetInverse(), sitk.sitkLinear, -1e3) for b, t in transforms.items()}
    hu, depth = (np.stack([sitk.GetArrayFromImage(v) for v in images.values()]) for images in (carried, near))
    chosen = np.take_along_axis(hu, depth.argmax(0)[None], 0)[0]
    scaled = 2 * (np.clip(chosen, *HU_RANGE) - HU_RANGE[0]) / (HU_RANGE[1] - HU_RANGE[0]) - 1
    scaled[(depth.max(0) < -NEAR_MM) | (chosen < outside / 2)] = np.nan
    return np.ascontiguousarray(scaled.transpose(2, 0, 1), np.float32)
