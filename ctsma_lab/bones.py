"""The bones of a knee in 3D: a picture for every browser, and a viewer where it is installed.

The viewer needs the package ipyniivue (pip install -e .[view3d]) and a browser with WebGL 2. Points
are in LPS mm.
"""

import gzip
import tempfile
from importlib.util import find_spec
from pathlib import Path

import ipywidgets
import matplotlib.pyplot as plt
import numpy as np
import SimpleITK as sitk
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from numpy import ndarray

from ctsma.common import BONES

from . import figures

N_PIXELS = 180  # edge of the picture; design choice
SMOOTH_MM = 0.8  # SD of the Gaussian that rounds the voxels of the labels; design choice
LIGHT = (-0.4, -0.8, 0.45)  # towards the light, as seen: from the left, the viewer and above
AMBIENT = 0.25  # share of the light that comes from everywhere
VIEWER_MM, VIEWER_PX = 0.8, 420  # voxel and height of the viewer
CT_HU = (-200.0, 1200.0)  # black and white of the viewer
DIRECTIONS = ("RL", "AP", "IS")  # names of low and high x, y, z


def view(labels: sitk.Image, turn_deg: float, tilt_deg: float) -> tuple[sitk.Image, sitk.Transform]:
    """Grid of voxels along the viewer's axes, and the transform from its points to the knee's.

    The viewer looks along y: from the front at turn 0, from the patient's left at turn 90, and
    from above at a positive tilt.
    """
    size_mm = np.multiply(labels.GetSize(), labels.GetSpacing())
    middle = labels.TransformContinuousIndexToPhysicalPoint((np.array(labels.GetSize()) - 1) / 2)
    voxel_mm = float(np.linalg.norm(size_mm) / N_PIXELS)
    grid = sitk.Image([N_PIXELS] * 3, sitk.sitkUInt8)
    grid.SetSpacing([voxel_mm] * 3)
    grid.SetOrigin([value - (N_PIXELS - 1) * voxel_mm / 2 for value in middle])
    return grid, sitk.Euler3DTransform(middle, -np.deg2rad(tilt_deg), 0.0, np.deg2rad(turn_deg))


def surface(mask: sitk.Image, grid: sitk.Image, turn: sitk.Transform) -> tuple[ndarray, ndarray]:
    """Depth of the surface of a bone behind the first plane of the grid, and its light.

    Returns depth (rows, columns) in mm and light, 0 to 1, first row on top; NaN beside the bone.
    """
    share = sitk.DiscreteGaussian(sitk.Cast(mask, sitk.sitkFloat32), SMOOTH_MM**2)
    share = sitk.GetArrayFromImage(sitk.Resample(share, grid, turn, sitk.sitkLinear))[::-1]
    inside = share > 0.5  # axes: row, depth, column
    first = inside.argmax(axis=1)
    here = np.take_along_axis(share, first[:, None], axis=1)[:, 0]
    before = np.take_along_axis(share, np.maximum(first - 1, 0)[:, None], axis=1)[:, 0]
    voxel_mm = grid.GetSpacing()[0]
    depth = (first - (here - 0.5) / np.maximum(here - before, 1e-6)) * voxel_mm
    depth = np.where(inside.any(axis=1), depth, np.nan)
    down, along = np.gradient(depth, voxel_mm)
    normal = np.stack([along, -np.ones_like(depth), -down])
    normal /= np.linalg.norm(normal, axis=0)
    light = np.einsum("i,i...->...", np.array(LIGHT) / np.linalg.norm(LIGHT), normal)
    light = AMBIENT + (1 - AMBIENT) * np.clip(np.nan_to_num(light), 0, 1)  # the rim is dark
    return depth, np.where(np.isnan(depth), np.nan, light)


def edges(turn: sitk.Transform) -> list[str]:
    """Names of the left, right, top and bottom edge of a view; "" between two directions."""
    names = []
    for seen in ((-1.0, 0.0, 0.0), (1.0, 0.0, 0.0), (0.0, 0.0, 1.0), (0.0, 0.0, -1.0)):
        along = turn.TransformVector(seen, turn.GetFixedParameters()[:3])
        axis = int(np.argmax(np.abs(along)))
        names.append(DIRECTIONS[axis][int(along[axis] > 0)] if abs(along[axis]) > 0.8 else "")
    return names


def draw_bones(labels: sitk.Image, turn_deg: float, tilt_deg: float, title: str) -> Figure:
    """Femur and tibia, as their labels (as of `BONES`) show them, seen as of `view`."""
    figure, ax = plt.subplots(figsize=(6.6, 5.6), layout="constrained")
    grid, turn = view(labels, turn_deg, tilt_deg)
    picture = np.ones((N_PIXELS, N_PIXELS, 3))
    nearest = np.full((N_PIXELS, N_PIXELS), np.inf)
    for bone, label in BONES.items():
        depth, light = surface(labels == label, grid, turn)
        colour = 0.35 + 0.65 * np.array(to_rgb(figures.COLOURS[bone]))  # pale, so that light shows
        in_front = depth < nearest
        picture[in_front] = (light[..., None] * colour)[in_front]
        nearest = np.fmin(nearest, depth)
        ax.plot([], [], "s", color=colour, label=bone)
    seen = np.isfinite(nearest)
    rows, columns = (np.flatnonzero(seen.any(axis=axis)) for axis in (1, 0))
    picture = picture[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    figures.image(ax, picture, grid.GetSpacing()[:2], title, limits=(0, 1), orientation=edges(turn))
    ax.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def viewer(ct: sitk.Image, labels: sitk.Image) -> ipywidgets.Widget:
    """CT and bones in the 3D viewer, or one sentence that says what it needs."""
    if find_spec("ipyniivue") is None:
        return ipywidgets.HTML(
            "The 3D viewer is not installed: <code>pip install -e .[view3d]</code>. "
            "The picture above needs nothing."
        )
    from ipyniivue import NiiVue, ShowRender, SliceType  # optional

    spacing = [max(VIEWER_MM, value) for value in ct.GetSpacing()]
    size = [int(n * a / b) for n, a, b in zip(ct.GetSize(), ct.GetSpacing(), spacing, strict=True)]
    grid = (size, sitk.Transform(), sitk.sitkLinear, ct.GetOrigin(), spacing, ct.GetDirection())
    hu = sitk.Cast(sitk.Clamp(sitk.Resample(ct, *grid), sitk.sitkFloat32, *CT_HU), sitk.sitkInt16)
    bones = sitk.Resample(labels, hu, sitk.Transform(), sitk.sitkNearestNeighbor, 0, sitk.sitkUInt8)
    shown = NiiVue(
        height=VIEWER_PX,
        multiplanar_show_render=ShowRender.ALWAYS,
        is_radiological_convention=True,  # the patient's right is left, as in the figures
    )
    volumes = [
        {"colormap": "gray", "cal_min": CT_HU[0], "cal_max": CT_HU[1]},
        {"colormap": "blue2red", "opacity": 0.4, "cal_min": 0.5, "cal_max": 2.0},
    ]
    for name, image, look in zip(("ct", "bones"), (hu, bones), volumes, strict=True):
        look |= {"name": f"{name}.nii.gz", "data": _nifti_bytes(image)}
    shown.load_volumes(volumes)
    shown.set_slice_type(SliceType.MULTIPLANAR)
    return shown


def _nifti_bytes(image: sitk.Image) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "image.nii"
        sitk.WriteImage(image, str(file))
        return gzip.compress(file.read_bytes(), 1)
