"""MR and CT show the same piece of bone: bone masks from the CT, rigid stages, quality without truth.

Transforms map CT points to MR points (LPS mm). A flagged registration passes no transform on.
"""

import json
import time
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from ctsma.cohort import BONES, InputFault, read_knee_volume, write_json, write_volume

from .masks import bone_masks, isotropic
from .quality import flexion_deg, mapped, reason_to_flag, target_registration_error_mm
from .stages import Registration, register_knee, rigid, starting_transforms


def register_pair(knee: dict, folder: Path, *, root: str | Path, seed: int) -> dict:
    """Register the MR of a manifest row, and its rescan where it has one, with its CT (for `map_knees`).

    Writes `<knee>_mask.nii.gz` and what `write_registration` writes, the rescan under `<knee>_rescan`.
    Returns a flat row: flagged, flexion_deg, cpu_seconds, `rescan_...` alike, and for each bone match and overlap (see
    `reason_to_flag`).
    """
    tic = time.process_time()
    ct = read_knee_volume(knee, "ct", root)
    masks = bone_masks(ct)
    write_volume(masks, Path(folder) / f"{knee['knee_id']}_mask.nii.gz")
    row = {}
    for column, part in {"mr": "", "mr_rescan": "rescan_"}.items():
        if isinstance(knee.get(column), str) and knee[column]:
            found = register_knee(ct, read_knee_volume(knee, column, root), masks, seed=seed)
            write_registration(found, folder, f"{knee['knee_id']}_{part}".rstrip("_"))
            row |= {part + name: value for name, value in _flat(found).items()}
    return row | {"cpu_seconds": time.process_time() - tic}


def _flat(found: Registration) -> dict:
    row = {"flagged": found.flagged, "flexion_deg": found.flexion_deg}
    return row | {f"{name}_{bone}": value for bone, c in found.checks.items() for name, value in c.items()}


def write_registration(found: Registration, folder: str | Path, knee_id: str) -> None:
    """Write `<knee>_stages.json` (every stage) and `<knee>_<bone>.tfm`; no .tfm when the knee is flagged."""
    folder = Path(folder)
    stages = {s: {b: _parameters(t) for b, t in bones.items()} for s, bones in found.stage_transforms.items()}
    write_json(folder / f"{knee_id}_stages.json", {"log": found.stages, "flagged": found.flagged, "stages": stages})
    for bone, transform in found.transforms.items():
        path = folder / f"{knee_id}_{bone}.tfm"
        path.unlink(missing_ok=True)
        if not found.flagged:
            partial = path.with_name(f".partial-{path.name}")
            sitk.WriteTransform(transform, str(partial))
            partial.replace(path)


def read_transforms(folder: str | Path, knee_id: str) -> dict[str, sitk.Euler3DTransform]:
    """{bone: transform} of a registered knee (`<knee>_rescan` for its rescan); InputFault where there is none."""
    paths = {bone: Path(folder) / f"{knee_id}_{bone}.tfm" for bone in BONES}
    for path in (p for p in paths.values() if not p.exists()):
        raise InputFault(path, "does not exist: the knee is flagged or not registered", "leave it out or register it")
    return {bone: sitk.Euler3DTransform(sitk.ReadTransform(str(path))) for bone, path in paths.items()}


def read_stages(folder: str | Path, knee_id: str) -> dict[str, dict[str, sitk.Euler3DTransform]]:
    """{stage: {bone: transform}} of a registered knee, flagged or not."""
    stages = json.loads((Path(folder) / f"{knee_id}_stages.json").read_text(encoding="utf-8"))["stages"]
    return {stage: {bone: rigid(**p) for bone, p in bones.items()} for stage, bones in stages.items()}


def stage_errors_mm(
    stages: dict[str, dict[str, sitk.Transform]], true: dict[str, sitk.Transform], points_lps: dict[str, np.ndarray]
) -> dict[str, dict[str, np.ndarray]]:
    """{stage: {bone: (n,) target registration errors in mm}} for each bone's CT-space points (n, 3) in LPS mm."""
    return {
        stage: {b: target_registration_error_mm(t, true[b], points_lps[b]) for b, t in bones.items()}
        for stage, bones in stages.items()
    }


def _parameters(transform: sitk.Euler3DTransform) -> dict:
    matrix, centre, translation = transform.GetMatrix(), transform.GetCenter(), transform.GetTranslation()
    return {"matrix": list(matrix), "centre": list(centre), "translation": list(translation)}
