"""One knee, or a whole cohort, on disk: images and manifest as in a clinic, ground truth apart."""

import os
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from ctsma.cache import map_knees
from ctsma.cohort import write_volume
from ctsma.common import InputError
from ctsma.files import sha256_file, write_text

from .ct import CT_AXES, draw_ct, scan_ct
from .mr import MR_AXES, draw_mr, scan_mr
from .painting import Grid, apply, draw_poses, make_grid
from .protocol import draw_subjects, load_protocol, protocol_sha256
from .subject import Subject, make_subject, tile_shape
from .truth import draw_targets, write_truth

QUICK_FIELD_MM = (96.0, 96.0, 92.0)  # left-right, front-back, head-foot
LATENT = ["severity", "height_cm"]  # columns of `draw_subjects` that a clinic does not know


def simulate_knee(
    knee: dict,
    folder: Path,
    *,
    root: str | Path,
    seed: int,
    field_of_view_mm: tuple[float, float, float] = QUICK_FIELD_MM,
    anatomy: str | Path | None = None,
    protocol: str | Path | None = None,
    cache_key: str = "",
) -> dict:
    """Simulate one knee and write its images and ground truth below `root` (for `map_knees`).

    Parameters
    ----------
    knee : row of `draw_subjects`; with a true `rescan` it gets a second MR, with new pose and
        noise. Each knee draws from generators of (seed, knee_id) alone.
    folder : of the records; the written files are named relative to it.
    field_of_view_mm : left-right, front-back, head-foot, of both scanners.
    anatomy : label map as template; the built-in knee where None.
    protocol : another protocol file; the frozen one where None.
    cache_key : hash of protocol and anatomy, so that a record made with others is not reused.

    Returns
    -------
    Paths relative to root, their SHA-256, and `files` relative to `folder`.
    """
    constants, root, knee_id = load_protocol(protocol), Path(root), str(knee["knee_id"])
    streams = [int(seed), zlib.crc32(knee_id.encode())]
    subject = make_subject(knee, constants, streams, anatomy)
    scans = ["ct", "mr", "mr_rescan"] if knee.get("rescan") else ["ct", "mr"]
    poses, grids = settings(subject, constants, streams, scans, field_of_view_mm)
    outcome = {}
    for n, name in enumerate(scans):
        rng = np.random.default_rng([*streams, 30 + n])
        drawn = draw_scan(name, constants, streams)
        image, bone_labels = scan(subject, poses[name], grids[name], name, drawn, rng)
        # A study reads each image five times, and gzip saves little, as half of the bits are noise.
        path = f"images/{knee_id}_{name}.nii"
        write_volume(image, root / path)
        outcome[name] = path
        outcome[f"{name}_sha256"] = sha256_file(root / path)
        if name == "ct":
            labels = bone_labels
    targets = draw_targets(subject, poses, grids, np.random.default_rng([*streams, 3]))
    write_truth(
        folder=root / "truth",
        knee_id=knee_id,
        subject=subject,
        seed=streams,
        shape=tile_shape(constants),
        poses=poses,
        targets=targets,
        labels=labels,
    )
    written = [*root.glob(f"images/{knee_id}[_.]*"), *root.glob(f"truth/{knee_id}[_.]*")]
    return outcome | {"files": [os.path.relpath(path, folder) for path in sorted(written)]}


def settings(
    subject: Subject, constants: dict, streams: list, scans: list, field_mm: tuple
) -> tuple[dict, dict]:
    """Poses by scan and bone, and grid by scan, around the joint line."""
    pose = constants["pose"]
    rng = np.random.default_rng([*streams, 10])
    flexion = {"ct": pose["flexion_ct"].draw(rng)}
    flexion["mr"] = flexion["ct"] + pose["flexion_difference"].draw(rng)
    flexion["mr_rescan"] = max(flexion["mr"] + pose["flexion_rescan"].draw(rng), 0.0)
    poses, grids = {}, {}
    for n, name in enumerate(scans):
        rng = np.random.default_rng([*streams, 11 + n])
        poses[name] = draw_poses(subject, pose, flexion[name], rng)
        centre = apply(poses[name]["femur"], np.array([[0.0, 0.0, 2.0]]))[0]
        centre = centre + [pose["centring"].draw(rng) for _ in range(3)]
        field, centre = cut_short(np.array(field_mm), centre, pose, rng)
        scanner = constants["ct" if name == "ct" else "mr"]
        in_plane, slices = scanner["spacing_in_plane"].value, scanner["spacing_slice"].value
        axes = CT_AXES if name == "ct" else MR_AXES
        grids[name] = make_grid(field, (in_plane, in_plane, slices), axes, centre)
    return poses, grids


def cut_short(
    field_mm: np.ndarray, centre: np.ndarray, pose: dict, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Field of view and centre; in some scans the front, back, head or foot end is cut short."""
    partial = rng.random() < pose["partial_field"].value
    axis, sign = rng.integers(1, 3), rng.choice([-1, 1])
    lost = np.zeros(3)
    lost[axis] = partial * pose["partial_cut"].draw(rng) * field_mm[axis]
    return field_mm - lost, centre + sign * lost / 2


def draw_scan(scan: str, constants: dict, streams: list) -> dict:
    """All that a scan (ct, mr, mr_rescan) of a knee draws but its noise."""
    rng = np.random.default_rng([*streams, 20, zlib.crc32(scan.encode())])
    return draw_ct(constants["ct"], rng) if scan == "ct" else draw_mr(constants["mr"], rng)


def scan(
    subject: Subject, poses: dict, grid: Grid, name: str, drawn: dict, rng: np.random.Generator
) -> tuple[sitk.Image, sitk.Image | None]:
    """Image of a scan (ct, mr, mr_rescan), and the bone labels where it is the CT (else None)."""
    if name == "ct":
        return scan_ct(subject, poses, grid, drawn, rng)
    return scan_mr(subject, poses, grid, drawn, rng), None


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
    report: Callable[..., None] | None = None,
) -> Path:
    """Simulate a cohort and write its manifest `<root>/<name>.csv`.

    The first `n_rescan` knees get a second MR; the other parameters are those of `simulate_knee`
    and `map_knees`. Knees that are already there and whole are kept.

    Returns
    -------
    Path of the manifest.

    Raises
    ------
    InputError : a knee failed, with its reason; no manifest is written then.
    """
    root = Path(root)
    subjects = draw_subjects(load_protocol(protocol), n_knees, seed)
    cache_key = protocol_sha256(protocol)
    if anatomy and Path(anatomy).is_file():
        cache_key += sha256_file(anatomy)
    parameters = {
        "root": str(root),
        "seed": seed,
        "field_of_view_mm": list(field_of_view_mm),
        "anatomy": str(anatomy) if anatomy else None,
        "protocol": str(protocol) if protocol else None,
        "cache_key": cache_key,
    }
    knees = subjects.assign(rescan=subjects.index < n_rescan)
    records = root / "records"
    rows = map_knees(simulate_knee, knees, records, parameters, n_jobs=n_jobs, report=report)
    failed = rows[rows["error"] != ""]
    if len(failed):
        first = failed.iloc[0]
        raise InputError(first["knee_id"], first["error"], "correct this and simulate again")
    table = subjects.drop(columns=LATENT).merge(rows, on="knee_id", validate="one_to_one")
    columns = ["knee_id", "subject_id", "side", "ct", "mr", "oa", "kl_grade", "age", "sex", "bmi"]
    columns += ["site", "ct_sha256", "mr_sha256"]
    if n_rescan:
        columns.append("mr_rescan")
    return write_text(root / f"{name}.csv", table[columns].to_csv(index=False))
