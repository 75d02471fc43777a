"""What only quality assurance may read: true transforms, bone labels, and the fine microstructure itself."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from ctsma.cohort import BONES, InputFault

from .anatomy import label_points
from .microstructure import is_bone
from .painting import Grid, apply
from .subject import Microstructure, Subject, knee_tile


@dataclass(frozen=True)
class Truth:
    """Truth of one knee; transforms map CT points to MR (or rescan) points, LPS mm."""

    transforms: dict[str, sitk.Euler3DTransform]
    rescan_transforms: dict[str, sitk.Euler3DTransform]
    labels: sitk.Image
    targets: dict[str, np.ndarray]
    ct_poses: dict[str, np.ndarray]
    tile: np.ndarray
    bones: dict[str, Microstructure]
    cysts: dict[str, np.ndarray]

    def target_points_lps(self, bone: str) -> np.ndarray:
        """Points (n, 3) 1 to 10 mm below the bearing surface, CT space, inside both fields of view."""
        return self.targets[bone]

    def bone_points(self, bone: str, points_lps: np.ndarray) -> np.ndarray:
        """CT-space points (n, 3) in the bone's own frame (mm): x medial, y back, z up, of a right knee."""
        return apply(np.linalg.inv(self.ct_poses[bone]), np.asarray(points_lps, float))

    def microstructure(self, bone: str, points_lps: np.ndarray) -> np.ndarray:
        """Is there trabecular bone at these CT-space points (n, 3)? The level set itself, without any voxel."""
        points = self.bone_points(bone, points_lps)
        micro = self.bones[bone]
        c, w, theta = (np.ascontiguousarray(v) for v in micro.at(points).T[:3])
        bony = is_bone(self.tile, points @ micro.to_tile[:, :3].T + micro.to_tile[:, 3], c, w, theta)
        for ball in self.cysts[bone]:
            bony &= np.linalg.norm(points - ball[:3], axis=1) > ball[3]
        return bony

    def sizes_mm(self) -> dict[str, float]:
        """Breadth of femur and tibia (whole, left to right), depth of both condyles (front to back), in mm.

        Measured on the bone labels in the bone's own axes; too small where the field of view cuts the bone.
        """
        femur, tibia = (self.bone_points(b, label_points(self.labels, v)) for b, v in BONES.items())
        low = femur[femur[:, 2] < 45]  # below the shaft, where the condyles are
        sizes = {"femur_breadth": np.ptp(low[:, 0]), "tibia_breadth": np.ptp(tibia[:, 0])}
        for name, sign in (("medial", 1), ("lateral", -1)):
            sizes[f"{name}_condyle_depth"] = np.ptp(low[sign * low[:, 0] > 10, 1])
        return {name: float(size) for name, size in sizes.items()}


def rigid_transform(matrix: np.ndarray) -> sitk.Euler3DTransform:
    """Euler transform of a rigid (4, 4) matrix."""
    transform = sitk.Euler3DTransform()
    transform.SetMatrix(matrix[:3, :3].ravel().tolist(), 1e-6)
    transform.SetTranslation(matrix[:3, 3].tolist())
    return transform


def draw_targets(subject: Subject, poses: dict, grids: dict[str, Grid], rng: np.random.Generator, n: int = 400) -> dict:
    """At most n points per bone: 1 to 10 mm below the bearing surface and 1 mm below any, inside all grids."""
    targets = {}
    for bone in BONES:
        points = rng.uniform(-45, 45, (30000, 3)) + [0, 0, 20.0 if bone == "femur" else -20.0]
        fields = subject.fields(points)
        depth = fields[f"{bone}_depth"]
        points = points[(fields[bone] < -1) & (depth > 1) & (depth < 10)]
        for scan, grid in grids.items():
            index = grid.index(apply(poses[scan][bone], points))
            points = points[((index > 3) & (index < np.array(grid.size) - 4)).all(1)]
        targets[bone] = apply(poses["ct"][bone], points[:n])
    return targets


def truth_arrays(subject: Subject, seed: list[int], shape: tuple, poses: dict, targets: dict) -> dict:
    """Everything `read_truth` needs to rebuild the microstructure, as flat arrays."""
    arrays = {"tile_seed": np.array(seed), "tile_shape": np.array(shape)}
    for bone, micro in subject.bones.items():
        for name in ("to_tile", "parameters", "origin_mm"):
            arrays[f"{bone}_{name}"] = getattr(micro, name)
        arrays |= {
            f"{bone}_cysts": subject.cysts[bone],
            f"{bone}_targets": targets[bone],
            f"{bone}_pose": poses["ct"][bone],
        }
    return arrays


def has_truth(root: str | Path) -> bool:
    """Whether a cohort was simulated, so that quality assurance may ask for its truth."""
    return (Path(root) / "truth").is_dir()


def read_truth(root: str | Path, knee_id: str) -> Truth:
    """Truth of a simulated knee; InputFault where the cohort has none (it is not simulated, or not whole)."""
    folder = Path(root) / "truth"
    if not (folder / f"{knee_id}.npz").exists():
        raise InputFault(folder / f"{knee_id}.npz", "does not exist", "simulate the cohort; a real one has no truth")
    with np.load(folder / f"{knee_id}.npz") as stored:
        a = {name: stored[name] for name in stored.files}
    names = ("to_tile", "parameters", "origin_mm")
    bones = {b: Microstructure(*(a[f"{b}_{n}"] for n in names)) for b in BONES}
    tile = knee_tile(a["tile_seed"].tolist(), *a["tile_shape"].tolist())
    parts = ({b: a[f"{b}_{n}"] for b in BONES} for n in ("targets", "pose"))
    cysts = {b: a[f"{b}_cysts"] for b in BONES}
    labels = sitk.ReadImage(str(folder / f"{knee_id}_labels.nii.gz"))
    return Truth(_read_tfm(folder, knee_id), _read_tfm(folder, f"{knee_id}_rescan"), labels, *parts, tile, bones, cysts)


def _read_tfm(folder: Path, stem: str) -> dict[str, sitk.Euler3DTransform]:
    paths = {bone: folder / f"{stem}_{bone}.tfm" for bone in BONES}
    return {b: sitk.Euler3DTransform(sitk.ReadTransform(str(p))) for b, p in paths.items() if p.exists()}
