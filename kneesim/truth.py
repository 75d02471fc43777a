"""Ground truth of a simulated knee: transforms, bone labels, and the microstructure itself.

Only quality assurance and teaching read it.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from ctsma.cohort import write_volume
from ctsma.common import BONES, InputError
from ctsma.compiled import compiled
from ctsma.files import atomic
from ctsma.registration import target_registration_error_mm
from ctsma.registration.transforms import rigid_transform

from .anatomy import place_in_grid, trilinear
from .label_map import label_points
from .microstructure import in_level_set
from .painting import Grid, apply
from .subject import GRID_MM, Microstructure, Subject, knee_tile

STORED = ("to_tile", "parameters", "origin_mm")  # fields of Microstructure


@dataclass(frozen=True)
class Truth:
    """Ground truth of one knee, in LPS mm.

    Attributes
    ----------
    transforms, rescan_transforms : by bone, from CT points to MR and second-MR points.
    labels : bone labels (BONES) on the CT grid.
    targets : by bone, points (n, 3) in CT space 1 to 10 mm below the bearing surface.
    ct_poses : by bone, (4, 4) from the bone's own frame to CT space.
    tile_seed, tile_shape, bones, cysts : the microstructure; its tile is made when it is read.
    """

    transforms: dict[str, sitk.Euler3DTransform]
    rescan_transforms: dict[str, sitk.Euler3DTransform]
    labels: sitk.Image
    targets: dict[str, np.ndarray]
    ct_poses: dict[str, np.ndarray]
    tile_seed: list[int]
    tile_shape: tuple[float, float]
    bones: dict[str, Microstructure]
    cysts: dict[str, np.ndarray]

    @cached_property
    def tile(self) -> np.ndarray:
        """As in `Subject`."""
        return knee_tile(self.tile_seed, *self.tile_shape)

    def target_points_lps(self, bone: str) -> np.ndarray:
        """Points (n, 3) 1 to 10 mm below the bearing surface, CT space, inside all images."""
        return self.targets[bone]

    def bone_points(self, bone: str, points_lps: np.ndarray) -> np.ndarray:
        """CT-space points (n, 3) in the bone's own frame: x medial, y back, z up."""
        return apply(np.linalg.inv(self.ct_poses[bone]), np.asarray(points_lps, float))

    def microstructure(self, bone: str, points_lps: np.ndarray) -> np.ndarray:
        """Whether there is trabecular bone at CT-space points (n, 3): the level set itself."""
        micro, to_bone = self.bones[bone], np.linalg.inv(self.ct_poses[bone])[:3]
        points, cysts = np.asarray(points_lps, float), self.cysts[bone]
        grid, origin = micro.parameters, micro.origin_mm
        return _is_bone_at(points, to_bone, self.tile, micro.to_tile, grid, origin, cysts)

    def sizes_mm(self) -> dict[str, float]:
        """Breadth (left to right) of femur and tibia, depth (front to back) of both condyles, mm.

        Measured on the bone labels in the bone's own axes; too small where the field of view cuts
        the bone.
        """
        femur, tibia = (
            self.bone_points(bone, label_points(self.labels, value))
            for bone, value in BONES.items()
        )
        condyles = femur[femur[:, 2] < 45]  # below the shaft
        medial, lateral = condyles[condyles[:, 0] > 10], condyles[condyles[:, 0] < -10]
        return {
            "femur_breadth": float(np.ptp(condyles[:, 0])),
            "tibia_breadth": float(np.ptp(tibia[:, 0])),
            "medial_condyle_depth": float(np.ptp(medial[:, 1])),
            "lateral_condyle_depth": float(np.ptp(lateral[:, 1])),
        }


@compiled(inline="always")
def _moved(matrix, x, y, z) -> tuple:
    """Affine (3, 4) on a point."""
    a, b, c = matrix[0], matrix[1], matrix[2]
    return (
        a[0] * x + a[1] * y + a[2] * z + a[3],
        b[0] * x + b[1] * y + b[2] * z + b[3],
        c[0] * x + c[1] * y + c[2] * z + c[3],
    )


@compiled()
def _is_bone_at(points, to_bone, tile, to_tile, parameters, origin, cysts) -> np.ndarray:
    """Whether there is trabecular bone (n,) at points (n, 3).

    to_bone, to_tile : affine (3, 4) from points to the bone's frame, and on to tile voxels.
    parameters, origin : of `Microstructure`. cysts : (m, 4) x, y, z, radius in the bone's frame.
    """
    result = np.empty(len(points), np.bool_)
    for n in range(len(points)):
        p = points[n]
        x, y, z = _moved(to_bone, p[0], p[1], p[2])
        i, j, k, u, v, w = place_in_grid(parameters, origin, GRID_MM, x, y, z)
        rodness = np.float32(trilinear(parameters, 0, i, j, k, u, v, w))
        half_width = np.float32(trilinear(parameters, 1, i, j, k, u, v, w))
        theta = np.float32(trilinear(parameters, 2, i, j, k, u, v, w))
        tx, ty, tz = _moved(to_tile, x, y, z)
        result[n] = in_level_set(tile, tx, ty, tz, rodness, half_width, theta)
        for m in range(len(cysts)):
            square = (x - cysts[m, 0]) ** 2 + (y - cysts[m, 1]) ** 2 + (z - cysts[m, 2]) ** 2
            result[n] &= np.sqrt(square) > cysts[m, 3]
    return result


def motion(matrix: np.ndarray) -> sitk.Euler3DTransform:
    """The rigid transform of a (4, 4) matrix."""
    return rigid_transform(matrix[:3, :3], (0.0, 0.0, 0.0), matrix[:3, 3])


def draw_targets(
    subject: Subject, poses: dict, grids: dict[str, Grid], rng: np.random.Generator, n: int = 400
) -> dict[str, np.ndarray]:
    """At most n points per bone, CT space, inside all grids.

    They lie 1 to 10 mm below the bearing surface and 1 mm below any surface.
    """
    targets = {}
    for bone in BONES:
        points = rng.uniform(-45, 45, (30000, 3)) + [0, 0, 20.0 if bone == "femur" else -20.0]
        fields = subject.fields(points, (bone,))
        depth = fields[f"{bone}_depth"]
        points = points[(fields[bone] < -1) & (depth > 1) & (depth < 10)]
        for scan, grid in grids.items():
            index = grid.index(apply(poses[scan][bone], points))
            points = points[((index > 3) & (index < np.array(grid.size) - 4)).all(1)]
        targets[bone] = apply(poses["ct"][bone], points[:n])
    return targets


def write_truth(
    folder: Path,
    knee_id: str,
    subject: Subject,
    seed: list[int],
    shape: tuple[float, float],
    poses: dict,
    targets: dict,
    labels: sitk.Image,
) -> None:
    """Write what `read_truth` needs; the tile is stored as its seed and `tile_shape`."""
    write_volume(labels, folder / f"{knee_id}_labels.nii.gz")
    for scan in poses.keys() - {"ct"}:
        stem = f"{knee_id}_rescan" if scan == "mr_rescan" else knee_id
        for bone in BONES:
            matrix = poses[scan][bone] @ np.linalg.inv(poses["ct"][bone])
            with atomic(folder / f"{stem}_{bone}.tfm") as temporary:
                sitk.WriteTransform(motion(matrix), str(temporary))
    arrays = {"tile_seed": np.array(seed), "tile_shape": np.array(shape)}
    for bone, micro in subject.bones.items():
        for name in STORED:
            arrays[f"{bone}_{name}"] = getattr(micro, name)
        arrays[f"{bone}_cysts"] = subject.cysts[bone]
        arrays[f"{bone}_targets"] = targets[bone]
        arrays[f"{bone}_pose"] = poses["ct"][bone]
    with atomic(folder / f"{knee_id}.npz") as temporary:
        np.savez_compressed(temporary, **arrays)


def has_truth(root: str | Path) -> bool:
    """Whether a cohort was simulated, so that its ground truth is known."""
    return (Path(root) / "truth").is_dir()


def read_truth(root: str | Path, knee_id: str) -> Truth:
    """Ground truth of a simulated knee; InputError where the cohort holds none."""
    folder = Path(root) / "truth"
    path = folder / f"{knee_id}.npz"
    if not path.exists():
        remedy = "simulate the cohort (a clinical one has no ground truth)"
        raise InputError(path, "does not exist", remedy)
    with np.load(path) as stored:
        arrays = {name: stored[name] for name in stored.files}
    bones = {}
    for bone in BONES:
        bones[bone] = Microstructure(*(arrays[f"{bone}_{name}"] for name in STORED))
    return Truth(
        transforms=_read_transforms(folder, knee_id),
        rescan_transforms=_read_transforms(folder, f"{knee_id}_rescan"),
        labels=sitk.ReadImage(str(folder / f"{knee_id}_labels.nii.gz")),
        targets={bone: arrays[f"{bone}_targets"] for bone in BONES},
        ct_poses={bone: arrays[f"{bone}_pose"] for bone in BONES},
        tile_seed=arrays["tile_seed"].tolist(),
        tile_shape=tuple(arrays["tile_shape"].tolist()),
        bones=bones,
        cysts={bone: arrays[f"{bone}_cysts"] for bone in BONES},
    )


def _read_transforms(folder: Path, stem: str) -> dict[str, sitk.Euler3DTransform]:
    """Transforms by bone; empty where the knee has no such scan."""
    transforms = {}
    for bone in BONES:
        path = folder / f"{stem}_{bone}.tfm"
        if path.exists():
            transforms[bone] = sitk.Euler3DTransform(sitk.ReadTransform(str(path)))
    return transforms


def stage_errors_mm(stages: dict, true: dict, points_lps: dict) -> dict:
    """Target registration errors of all stages.

    Parameters
    ----------
    stages : {stage: {bone: transform}} as of `read_stages`. true : {bone: transform}.
    points_lps : {bone: (n, 3) CT points in LPS mm}.

    Returns
    -------
    {stage: {bone: (n,) errors in mm}}.
    """
    errors = {}
    for stage, transforms in stages.items():
        errors[stage] = {
            bone: target_registration_error_mm(transform, true[bone], points_lps[bone])
            for bone, transform in transforms.items()
        }
    return errors
