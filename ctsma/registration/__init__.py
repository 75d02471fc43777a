"""Registration of MR and CT: bone masks from the CT, rigid stages, quality without ground truth.

Transforms map CT points to MR points (LPS mm). A flagged registration passes no transform on.
"""

import json
import time
from pathlib import Path

import SimpleITK as sitk

from ctsma.cohort import image_path, read_knee_volume, read_volume, write_volume
from ctsma.common import BONES, InputError
from ctsma.files import atomic, write_json

from .masks import bone_masks, isotropic, label_masks
from .quality import failure_reason, target_registration_error_mm
from .stages import Registration, register_knee, register_scans
from .transforms import Rigid, apply_rigid, parameters_of, rigid_transform, transform_points


def register_pair(knee: dict, folder: Path, *, root: str | Path, seed: int) -> dict:
    """Register MR and rescan of a manifest row with its CT (for `map_knees`).

    Writes `<knee>_mask.nii.gz` and the files of `write_registration`, those of a rescan under
    `<knee>_rescan`.

    Returns
    -------
    flagged, flexion_deg, correlation_<bone> and overlap_<bone> (see `registration_metrics`), the
    same with the prefix rescan_, and cpu_seconds.
    """
    tic = time.process_time()
    ct = read_knee_volume(knee, "ct", root)
    masks = knee_masks(knee, ct, root)
    row, files = {}, [f"{knee['knee_id']}_mask.nii.gz"]
    write_volume(masks, Path(folder) / files[0])
    columns = {"": "mr", "rescan_": "mr_rescan"}
    prefixes = [prefix for prefix, column in columns.items() if isinstance(knee.get(column), str)]
    scans = (read_knee_volume(knee, columns[prefix], root) for prefix in prefixes)
    for prefix, result in zip(prefixes, register_scans(ct, scans, masks, seed=seed), strict=True):
        files += write_registration(result, folder, f"{knee['knee_id']}_{prefix}".rstrip("_"))
        row[f"{prefix}flagged"] = result.flagged
        row[f"{prefix}flexion_deg"] = result.flexion_deg
        for bone, metrics in result.metrics.items():
            for name, value in metrics.items():
                row[f"{prefix}{name}_{bone}"] = value
    return row | {"cpu_seconds": time.process_time() - tic, "files": files}


def knee_masks(knee: dict, ct: sitk.Image, root: str | Path) -> sitk.Image:
    """Bone labels of a manifest row on the grid of its CT: its own (ct_labels), or `bone_masks`.

    Raises InputError as `label_masks` and `bone_masks`.
    """
    path = image_path(knee, "ct_labels", root)
    return bone_masks(ct) if path is None else label_masks(read_volume(path, "labels"), ct)


def write_registration(result: Registration, folder: str | Path, knee_id: str) -> list[str]:
    """Write `<knee>_stages.json` (all stages), and `<knee>_<bone>.tfm` unless it is flagged.

    Returns the names of the files.
    """
    stages = {}
    for stage, transforms in result.stages.items():
        stages[stage] = {bone: parameters_of(rigid) for bone, rigid in transforms.items()}
    content = {"log": result.log, "flagged": result.flagged, "stages": stages}
    files = [write_json(Path(folder) / f"{knee_id}_stages.json", content).name]
    for bone, transform in result.transforms.items():
        path = Path(folder) / f"{knee_id}_{bone}.tfm"
        path.unlink(missing_ok=True)
        if not result.flagged:
            with atomic(path) as temporary:
                sitk.WriteTransform(transform, str(temporary))
            files.append(path.name)
    return files


def read_transforms(folder: str | Path, knee_id: str) -> dict[str, Rigid]:
    """{bone: transform} of a knee (`<knee>_rescan` for its rescan).

    Raises
    ------
    InputError : the knee is flagged or not registered.
    """
    transforms = {}
    for bone in BONES:
        path = Path(folder) / f"{knee_id}_{bone}.tfm"
        if not path.exists():
            problem = "does not exist: the knee is flagged or not registered"
            raise InputError(path, problem, "exclude the knee or register it")
        transforms[bone] = sitk.Euler3DTransform(sitk.ReadTransform(str(path)))
    return transforms


def read_stages(folder: str | Path, knee_id: str) -> dict[str, dict[str, Rigid]]:
    """{stage: {bone: transform}} of a registered knee, flagged or not."""
    path = Path(folder) / f"{knee_id}_stages.json"
    stages = json.loads(path.read_text(encoding="utf-8"))["stages"]
    return {
        stage: {bone: rigid_transform(**parameters) for bone, parameters in transforms.items()}
        for stage, transforms in stages.items()
    }
