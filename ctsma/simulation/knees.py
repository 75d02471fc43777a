"""One knee, or a whole cohort, on disk: images and manifest like a hospital's, truth apart."""

import io
import os
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import SimpleITK as sitk

from ctsma.cohort import BONES, InputFault, map_knees, sha256_file, write_text, write_volume

from .ct import CT_AXES, draw_ct, scan_ct
from .mr import MR_AXES, draw_mr, scan_mr
from .painting import Grid, apply, draw_poses, make_grid
from .protocol import draw_subjects, load_protocol, protocol_sha256
from .subject import Subject, make_subject, tile_shape
from .truth import draw_targets, rigid_transform, truth_arrays

QUICK_FIELD_MM = (96.0, 96.0, 92.0)  # left-right, front-back, head-foot
COLUMNS = ["knee_id", "subject_id", "side", "ct", "mr", "oa", "kl_grade", "age", "sex", "bmi", "site"]
COLUMNS += ["ct_sha256", "mr_sha256"]


def simulate_knee(
    knee: dict,
    folder: Path,
    *,
    root: str | Path,
    seed: int,
    field_of_view_mm: tuple[float, float, float] = QUICK_FIELD_MM,
    rescan: bool = False,
    anatomy: str | Path | None = None,
    protocol: str | Path | None = None,
    stamp: str = "",
) -> dict:
    """Simulate one knee and write its images and truth below `root`.

    Parameters
    ----------
    knee : row of `draw_subjects`. Each knee draws from generators of (seed, knee_id) alone.
    folder : of the records (only to name the written files relative to it).
    field_of_view_mm : left-right, front-back, head-foot, of both scanners.
    rescan : a second MR, new pose and noise.
    anatomy : label map as template; our own knee where None. protocol : file; ours where None.
    stamp : hash of protocol and anatomy, so that a record of others is not reused.

    Returns
    -------
    Paths relative to root, their SHA-256, and `files` relative to `folder`.
    """
    constants, root = load_protocol(protocol), Path(root)
    streams = [int(seed), zlib.crc32(str(knee["knee_id"]).encode())]
    subject = make_subject(knee, constants, streams, anatomy)
    scans = ["ct", "mr", "mr_rescan"] if rescan else ["ct", "mr"]
    poses, grids = settings(subject, constants, streams, scans, field_of_view_mm)
    outcome = {}
    for n, name in enumerate(scans):
        rng = np.random.default_rng([*streams, 30 + n])
        drawn = draw_scan(name, constants, streams)
        image, labels = scan(subject, poses[name], grids[name], name, drawn, rng)
        outcome |= _stored(image, root, f"images/{knee['knee_id']}_{name}.nii.gz", name)
        if labels is not None:
            write_volume(labels, root / f"truth/{knee['knee_id']}_labels.nii.gz")
    targets = draw_targets(subject, poses, grids, np.random.default_rng([*streams, 3]))
    _write_truth(
        root / "truth", knee["knee_id"], truth_arrays(subject, streams, tile_shape(constants), poses, targets), poses
    )
    written = sorted(p for f in ("images", "truth") for p in (root / f).glob(f"{knee['knee_id']}[_.]*"))
    return outcome | {"files": [os.path.relpath(p, folder) for p in written]}


def settings(subject: Subject, constants: dict, streams: list, scans: list, field_mm: tuple) -> tuple[dict, dict]:
    """Pose per scan and bone, and grid per scan, around the joint line."""
    pose, ct, mr, poses, grids = constants["pose"], constants["ct"], constants["mr"], {}, {}
    rng = np.random.default_rng([*streams, 10])
    first = pose["flexion_ct"].draw(rng)
    second = first + pose["flexion_difference"].draw(rng)
    flexion = {"ct": first, "mr": second, "mr_rescan": max(second + pose["flexion_rescan"].draw(rng), 0.0)}
    for n, scan in enumerate(scans):
        rng = np.random.default_rng([*streams, 11 + n])
        poses[scan] = draw_poses(subject, pose, flexion[scan], rng)
        centre = apply(poses[scan]["femur"], np.array([[0.0, 0.0, 2.0]]))[0]
        centre = centre + [pose["centring"].draw(rng) for _ in range(3)]
        field, centre = _cut_short(np.array(field_mm), centre, pose, rng)
        plane, along = ((ct if scan == "ct" else mr)[f"spacing_{s}"].value for s in ("in_plane", "slice"))
        grids[scan] = make_grid(field, (plane, plane, along), CT_AXES if scan == "ct" else MR_AXES, centre)
    return poses, grids


def _cut_short(field_mm: np.ndarray, centre: np.ndarray, pose: dict, rng: np.random.Generator) -> tuple:
    """Field of view and centre; in some scans one face (front, back, head or foot) comes too early."""
    partial, axis, sign = rng.random() < pose["partial_field"].value, rng.integers(1, 3), rng.choice([-1, 1])
    lost = np.zeros(3)
    lost[axis] = partial * pose["partial_cut"].draw(rng) * field_mm[axis]
    return field_mm - lost, centre + sign * lost / 2


def draw_scan(scan: str, constants: dict, streams: list) -> dict:
    """What a scan of a knee draws but its noise."""
    draw, group = (draw_ct, "ct") if scan == "ct" else (draw_mr, "mr")
    return draw(constants[group], np.random.default_rng([*streams, 20, zlib.crc32(scan.encode())]))


def scan(subject: Subject, poses: dict, grid: Grid, name: str, drawn: dict, rng: np.random.Generator) -> tuple:
    """Image of a scan (ct, mr, mr_rescan), and the bone labels where it is the CT (else None)."""
    if name == "ct":
        return scan_ct(subject, poses, grid, drawn, rng)
    return scan_mr(subject, poses, grid, drawn, rng), None


def _stored(image: sitk.Image, root: Path, name: str, scan: str) -> dict:
    write_volume(image, root / name)
    return {scan: name, f"{scan}_sha256": sha256_file(root / name)}


def _write_truth(folder: Path, knee_id: str, arrays: dict, poses: dict) -> None:
    for scan in poses.keys() - {"ct"}:
        stem = f"{knee_id}_rescan" if scan == "mr_rescan" else knee_id
        for bone in BONES:
            matrix = poses[scan][bone] @ np.linalg.inv(poses["ct"][bone])
            partial = folder / f".partial-{stem}_{bone}.tfm"
            sitk.WriteTransform(rigid_transform(matrix), str(partial))
            partial.replace(folder / f"{stem}_{bone}.tfm")
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    partial = folder / f".partial-{knee_id}.npz"
    partial.write_bytes(buffer.getvalue())
    partial.replace(folder / f"{knee_id}.npz")


def write_cohort(
    root: str | Path,
    name: str,
    n_knees: int,
    seed: int,
    field_of_view_mm: tuple[float, float, float] = QUICK_FIELD_MM,
    n_rescan: int = 0,
    anatomy: str | Path | None = None,
    n_jobs: int = 1,
    protocol: str | Path | None = None,
    report: Callable[[str], None] | None = None,
) -> Path:
    """Simulate a cohort and write its manifest `<root>/<name>.csv`; the first `n_rescan` knees get a second MR.

    Returns the manifest's path. Raises InputFault with the reason when any knee fails: half a cohort is none.
    """
    root, subjects = Path(root), draw_subjects(load_protocol(protocol), n_knees, seed)
    stamp = protocol_sha256(protocol) + (sha256_file(anatomy) if anatomy and Path(anatomy).is_file() else "")
    given = {"root": str(root), "seed": seed, "field_of_view_mm": list(field_of_view_mm), "stamp": stamp}
    given |= {"anatomy": anatomy and str(anatomy), "protocol": protocol and str(protocol)}
    rows = []
    for part, rescan in ((subjects[:n_rescan], True), (subjects[n_rescan:], False)):
        if len(part):
            rows.append(
                map_knees(
                    simulate_knee, part, root / "records", given | {"rescan": rescan}, n_jobs=n_jobs, report=report
                )
            )
    rows = pd.concat(rows, ignore_index=True)
    if (bad := rows[rows["error"] != ""]).size:
        raise InputFault(bad["knee_id"].iloc[0], bad["error"].iloc[0], "mend this and simulate again")
    columns = COLUMNS + (["mr_rescan"] if n_rescan else [])
    table = subjects.drop(columns=["severity", "height_cm"]).merge(rows, on="knee_id", validate="one_to_one")
    return write_text(root / f"{name}.csv", table[columns].to_csv(index=False))
