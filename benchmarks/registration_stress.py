"""Robustness of the registration: far starts, bent knees, noise, thick slices, cut fields, metal.

    python benchmarks/registration_stress.py --folder runs/stress --knees 12 --draws 3

Simulates knees of another seed than the study's, with up to 20 degrees of flexion between the
scanners (kept in the folder), and degrades images and headers after the simulation. Every MR is
moved by up to 40 mm and 30 degrees. Finished rows are kept in `<folder>/starts.jsonl`, so that an
interrupted run continues. Writes docs/results/registration_stress.json: success (TRE below 1 mm on
both bones) by condition with Wilson intervals, and the agreement of the flag with it.
"""

import argparse
import json
import re
import time
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from scipy.stats import binomtest

from ctsma.cohort import read_knee_volume
from ctsma.common import BONES, InputError
from ctsma.files import write_json
from ctsma.registration import (
    bone_masks,
    failure_reason,
    register_knee,
    rigid_transform,
    target_registration_error_mm,
)
from ctsma.registration.quality import flexion_deg
from ctsma.registration.transforms import image_centre, voxel_axes
from kneesim import protocol_sha256, read_truth, write_cohort
from kneesim.protocol import PROTOCOL

SEED = 7400
MAX_SHIFT_MM, MAX_TURN_DEG, MAX_FLEXION_DEG = 40.0, 30.0, 20.0
SNR, N_AVERAGED, CUT_MM = 6.0, 4, (15.0, 30.0)  # four slices of 0.75 mm are 3 mm thick
SOFT_MM = 1.0  # SD of the blur of a soft CT, in addition to its own kernel of 0.6 to 1.3 mm FWHM
# Screw: HU, radius and half length, HU of its streaks, void in the MR around it (design choice).
METAL_HU, SCREW_MM, STREAK_HU, VOID_MM = 3000.0, (4.5, 12.0), 400.0, 12.0
FACES = {"head": (2, 1), "foot": (2, -1), "front": (1, -1), "back": (1, 1)}  # axis in LPS, side
CONDITIONS = ("pose", "noise", "thick", "partial", "metal", "all", "soft")
OUT = Path(__file__).parents[1] / "docs" / "results" / "registration_stress.json"


def read_pair(root: Path, knee_id: str) -> tuple[sitk.Image, sitk.Image]:
    """CT and MR of a simulated knee."""
    row = {"knee_id": knee_id}
    for name in ("ct", "mr"):
        row[name] = f"images/{knee_id}_{name}.nii"
    return read_knee_volume(row, "ct", root), read_knee_volume(row, "mr", root)


def compose(second: sitk.Euler3DTransform, first: sitk.Euler3DTransform) -> sitk.Euler3DTransform:
    """p -> second(first(p)) as one rigid transform."""
    matrix = np.reshape(second.GetMatrix(), (3, 3)) @ np.reshape(first.GetMatrix(), (3, 3))
    centre = first.GetCenter()
    image = second.TransformPoint(first.TransformPoint(centre))
    return rigid_transform(matrix, centre, np.subtract(image, centre))


def move_header(image: sitk.Image, motion: sitk.Euler3DTransform) -> sitk.Image:
    """The image as if the patient had lain elsewhere: only its header changes."""
    moved = sitk.Image(image)
    direction = np.reshape(motion.GetMatrix(), (3, 3)) @ np.reshape(image.GetDirection(), (3, 3))
    moved.SetOrigin(motion.TransformPoint(image.GetOrigin()))
    moved.SetDirection(direction.ravel().tolist())
    return moved


def draw_motion(centre: np.ndarray, rng: np.random.Generator) -> sitk.Euler3DTransform:
    """Rotation about a random axis by up to 30 degrees, a random shift of up to 40 mm."""
    axis, direction = (v / np.linalg.norm(v) for v in rng.standard_normal((2, 3)))
    angle = float(np.deg2rad(rng.uniform(0, MAX_TURN_DEG)))
    matrix = sitk.VersorTransform(axis.tolist(), angle).GetMatrix()
    return rigid_transform(matrix, centre, direction * rng.uniform(0, MAX_SHIFT_MM))


def with_values(image: sitk.Image, array: np.ndarray) -> sitk.Image:
    """A float image on the same grid."""
    out = sitk.GetImageFromArray(np.asarray(array, np.float32))
    out.CopyInformation(image)
    return out


def add_noise(mr: sitk.Image, rng: np.random.Generator, snr: float = SNR) -> sitk.Image:
    """Rician noise of the given SNR in marrow (the 80th percentile)."""
    grey = sitk.GetArrayFromImage(mr)
    sd = np.percentile(grey, 80) / snr
    real = grey + sd * rng.standard_normal(grey.shape)
    return with_values(mr, np.hypot(real, sd * rng.standard_normal(grey.shape)))


def thicken_slices(mr: sitk.Image) -> sitk.Image:
    """Average groups of four slices along the axis of the largest spacing."""
    factors = [1, 1, 1]
    factors[int(np.argmax(mr.GetSpacing()))] = N_AVERAGED
    return sitk.BinShrink(mr, factors)


def cut_field(mr: sitk.Image, face: str, mm: float) -> sitk.Image:
    """Cut the field of view on the patient's head, foot, front or back side."""
    axis, side = FACES[face]
    along = np.reshape(mr.GetDirection(), (3, 3))[axis]
    index = int(np.argmax(np.abs(along)))
    size, first, n = list(mr.GetSize()), [0, 0, 0], int(mm / mr.GetSpacing()[index])
    size[index] -= n
    if np.sign(along[index]) != side:
        first[index] = n
    return sitk.RegionOfInterest(mr, size, first)


def add_screw(
    ct: sitk.Image, mr: sitk.Image, masks: sitk.Image, true: dict, rng: np.random.Generator
) -> tuple[sitk.Image, sitk.Image]:
    """A screw in one bone: 3000 HU and streaks in its axial slices of the CT, a void in the MR.

    An approximation, not a simulation of the physics.
    """
    bone = list(BONES)[rng.integers(2)]
    depth_mm = sitk.SignedMaurerDistanceMap(masks == BONES[bone], True, False, True)
    places = np.argwhere(sitk.GetArrayFromImage(depth_mm) > 6)
    z, y, x = (float(v) for v in places[rng.integers(len(places))])
    centre = np.array(ct.TransformContinuousIndexToPhysicalPoint([x, y, z]))
    offset = voxel_points(ct) - centre
    r, angle = np.hypot(offset[..., 0], offset[..., 1]), np.arctan2(offset[..., 1], offset[..., 0])
    height, (radius, half_length) = np.abs(offset[..., 2]), SCREW_MM
    phases = zip((2, 5, 9, 14), rng.uniform(0, 2 * np.pi, 4), strict=True)
    rays = sum(np.cos(k * (angle - phase)) for k, phase in phases) / 2
    streaks = STREAK_HU * rays * radius / np.maximum(r, radius)
    hu = sitk.GetArrayFromImage(ct) + np.where(height < half_length, streaks, 0.0)
    hu = np.where((r < radius) & (height < half_length), METAL_HU, np.maximum(hu, -1024.0))
    mr_centre = true[bone].TransformPoint(centre.tolist())
    distance = np.linalg.norm(voxel_points(mr) - mr_centre, axis=-1)
    grey = sitk.GetArrayFromImage(mr) * np.clip((distance - VOID_MM) / 2, 0.02, 1)
    return with_values(ct, hu), with_values(mr, grey)


def voxel_points(image: sitk.Image) -> np.ndarray:
    """Points (z, y, x, 3) of an image's voxels, LPS mm."""
    index = np.moveaxis(np.indices(image.GetSize()[::-1]), 0, -1)[..., ::-1]
    return index @ voxel_axes(image).T + image.GetOrigin()


def degrade(
    condition: str, ct: sitk.Image, mr: sitk.Image, masks: sitk.Image, true: dict, rng
) -> tuple[sitk.Image, sitk.Image]:
    """CT and MR under a condition; `all` is noise, thick slices and a cut field together."""
    if condition == "soft":
        ct = sitk.SmoothingRecursiveGaussian(sitk.Cast(ct, sitk.sitkFloat32), SOFT_MM)
    if condition == "metal":
        ct, mr = add_screw(ct, mr, masks, true, rng)
    if condition in ("noise", "all"):
        mr = add_noise(mr, rng)
    if condition in ("partial", "all"):
        mr = cut_field(mr, list(FACES)[rng.integers(4)], rng.uniform(*CUT_MM))
    if condition in ("thick", "all"):
        mr = thicken_slices(mr)
    return ct, mr


def simulate(folder: Path, knees: int, seed: int, changes: dict[str, str]) -> Path:
    """A cohort with some pose entries of the protocol replaced; kept in the folder."""
    text = PROTOCOL.read_text()
    for name, value in changes.items():
        text, n = re.subn(rf"(  {name}: {{)[^}}]*?, unit", rf"\g<1>{value}, unit", text)
        if n != 1:
            raise InputError(PROTOCOL, f"has {n} entries {name}", "name an entry of the pose")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "protocol.yaml").write_text(text)
    if not (folder / "simulated.csv").exists():
        write_cohort(folder, "simulated", knees, seed, protocol=folder / "protocol.yaml")
    return folder


def one_start(root: Path, knee_id: str, condition: str, draw: int) -> dict:
    """Degrade, move, register and compare with the ground truth: one row."""
    rng = np.random.default_rng([SEED, int(knee_id[1:]), CONDITIONS.index(condition), draw])
    ct, mr = read_pair(root, knee_id)
    truth = read_truth(root, knee_id)
    ct, mr = degrade(condition, ct, mr, bone_masks(ct), truth.transforms, rng)
    motion = draw_motion(image_centre(mr), rng)
    row = {"knee_id": knee_id, "condition": condition, "draw": draw}
    row["flexion_deg"] = flexion_deg(truth.transforms["femur"], truth.transforms["tibia"])
    tic = time.process_time()
    try:
        masks = bone_masks(ct)
    except InputError as error:
        return row | {"flagged": str(error), "tre_mm": None}
    found = register_knee(ct, move_header(mr, motion), masks, seed=0)
    errors = {}
    for bone, transform in found.transforms.items():
        true, points = compose(motion, truth.transforms[bone]), truth.target_points_lps(bone)
        errors[bone] = float(target_registration_error_mm(transform, true, points).mean())
    seconds = time.process_time() - tic
    row |= {"tre_mm": errors, "metrics": found.metrics, "found_flexion_deg": found.flexion_deg}
    return row | {"cpu_seconds": seconds, "flagged": found.flagged}


def is_failure(row: dict) -> bool:
    """Whether a bone is off by 1 mm or more, or was not registered."""
    return row["tre_mm"] is None or max(row["tre_mm"].values()) >= 1.0


def summary(rows: list[dict]) -> dict:
    """Success and flags of some starts."""
    failed = np.array([is_failure(row) for row in rows])
    flagged = np.array([row["flagged"] != "" for row in rows])
    interval = binomtest(int((~failed).sum()), len(rows)).proportion_ci(method="wilson")
    out = {
        "n": len(rows),
        "success": float((~failed).mean()),
        "ci_low": interval.low,
        "ci_high": interval.high,
        "failed": int(failed.sum()),
        "failed_and_flagged": int((failed & flagged).sum()),
        "aligned_and_flagged": int((~failed & flagged).sum()),
    }
    for bone in BONES:
        errors = [row["tre_mm"][bone] for row in rows if row["tre_mm"]]
        median, p95, largest = np.percentile(errors, (50, 95, 100)).tolist()
        out[bone] = {"median": median, "p95": p95, "max": largest}
    return out


def write(rows: list[dict], knees: int) -> None:
    """Print and write the summary, with the limits of the flag as they are now."""
    for row in rows:
        if row["tre_mm"]:
            row["flagged"] = failure_reason(row["metrics"], row["found_flexion_deg"])
    parts = {c: [row for row in rows if row["condition"] == c] for c in CONDITIONS}
    parts["flexion_above_12_deg"] = [row for row in rows if row["flexion_deg"] > 12]
    columns = ("knee_id", "condition", "draw", "tre_mm", "flagged")
    result = {
        "seed": SEED,
        "knees": knees,
        "protocol_sha256": protocol_sha256(),
        "all_starts": summary(rows),
        "by_condition": {name: summary(part) for name, part in parts.items() if part},
        "cpu_seconds": float(np.mean([row["cpu_seconds"] for row in rows if row["tre_mm"]])),
        "not_aligned": [{c: row[c] for c in columns} for row in rows if is_failure(row)],
    }
    write_json(OUT, result)
    print(json.dumps(result, indent=1))


def main() -> None:
    """Simulate, register what is missing, print and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=Path("runs/stress"))
    parser.add_argument("--knees", type=int, default=12)
    parser.add_argument("--draws", type=int, default=3)
    given = parser.parse_args()
    changes = {"flexion_difference": f"low: 0, high: {MAX_FLEXION_DEG:.0f}"}
    root = simulate(given.folder, given.knees, SEED, changes)
    kept = given.folder / "starts.jsonl"
    rows = [json.loads(line) for line in kept.read_text().splitlines()] if kept.exists() else []
    done = {(row["knee_id"], row["condition"], row["draw"]) for row in rows}
    for draw in range(given.draws):
        for k in range(given.knees):
            for condition in CONDITIONS:
                start = f"k{k:04d}", condition, draw
                if start in done:
                    continue
                rows.append(one_start(root, *start))
                with kept.open("a") as file:
                    file.write(json.dumps(rows[-1]) + "\n")
    write(rows, given.knees)


if __name__ == "__main__":
    main()
