"""Does registration stand what the clinic does? Starts far off, bent knees, noise, thick slices, cut fields, metal.

    python benchmarks/registration_stress.py --folder runs/stress --knees 12 --draws 3

Simulates knees of another seed than the study's, bent up to 20 degrees between the scanners (kept in the folder), and
spoils images and headers after simulation. Every MR is moved by up to 40 mm and 30 degrees. Rows are kept in
`<folder>/starts.jsonl`, so an interrupted run goes on. Writes docs/results/registration_stress.json: success (TRE below
1 mm on both bones) with Wilson intervals by condition, and what the flag, which knows no truth, says of them.
"""

import argparse
import json
import re
import time
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from scipy.stats import binomtest

from ctsma import cohort, simulation
from ctsma.registration import bone_masks, flexion_deg, reason_to_flag, register_knee, target_registration_error_mm
from ctsma.registration.stages import centre_of, rigid

SHIFT_MM, TURN_DEG, FLEXION_DEG, SEED = 40.0, 30.0, 20.0, 7400
SNR, SLICES_AVERAGED, CUT_MM = 6.0, 4, (15.0, 30.0)  # 4 slices of 0.75 mm are 3 mm thick
SOFT_MM = 1.0  # SD of the blur that makes a CT soft, beside its own kernel of 0.6 to 1.3 mm FWHM
METAL_HU, SCREW_MM, STREAK_HU, VOID_MM = 3000.0, (4.5, 12.0), 400.0, 12.0  # radius, half length; around it (our choice)
FACES = {"head": (2, 1), "foot": (2, -1), "front": (1, -1), "back": (1, 1)}  # axis in LPS, side
CONDITIONS = ("pose", "noise", "thick", "partial", "metal", "all", "soft")
OUT = Path(__file__).parents[1] / "docs" / "results" / "registration_stress.json"


def posed(image: sitk.Image, motion: sitk.Euler3DTransform) -> sitk.Image:
    """The image as if the patient had lain elsewhere: only its header moves."""
    out = sitk.Image(image)
    turned = np.reshape(motion.GetMatrix(), (3, 3)) @ np.reshape(image.GetDirection(), (3, 3))
    out.SetOrigin(motion.TransformPoint(image.GetOrigin()))
    out.SetDirection(turned.ravel().tolist())
    return out


def drawn_motion(centre, rng: np.random.Generator) -> sitk.Euler3DTransform:
    """Turn about a random axis by up to 30 degrees, shift in a random direction by up to 40 mm."""
    axis, direction = (v / np.linalg.norm(v) for v in rng.standard_normal((2, 3)))
    matrix = sitk.VersorTransform(axis.tolist(), float(np.deg2rad(rng.uniform(0, TURN_DEG)))).GetMatrix()
    return rigid(matrix, centre, direction * rng.uniform(0, SHIFT_MM))


def after(motion: sitk.Euler3DTransform, first: sitk.Euler3DTransform) -> sitk.Euler3DTransform:
    """p -> motion(first(p)) as one rigid transform."""
    matrix = np.reshape(motion.GetMatrix(), (3, 3)) @ np.reshape(first.GetMatrix(), (3, 3))
    centre = first.GetCenter()
    return rigid(matrix, centre, np.subtract(motion.TransformPoint(first.TransformPoint(centre)), centre))


def changed(image: sitk.Image, array: np.ndarray) -> sitk.Image:
    """A float image on the same grid."""
    out = sitk.GetImageFromArray(np.asarray(array, np.float32))
    out.CopyInformation(image)
    return out


def noisy(mr: sitk.Image, rng: np.random.Generator, snr: float = SNR) -> sitk.Image:
    """Rician noise until marrow (the 80th percentile) stands `snr` times above it."""
    grey = sitk.GetArrayFromImage(mr)
    sd = np.percentile(grey, 80) / snr
    return changed(mr, np.hypot(grey + sd * rng.standard_normal(grey.shape), sd * rng.standard_normal(grey.shape)))


def thick(mr: sitk.Image, n: int = SLICES_AVERAGED) -> sitk.Image:
    """Neighbouring slices averaged: the slice axis is the one of the largest spacing."""
    factors = [1, 1, 1]
    factors[int(np.argmax(mr.GetSpacing()))] = n
    return sitk.BinShrink(mr, factors)


def cropped(mr: sitk.Image, face: str, mm: float) -> sitk.Image:
    """Field of view cut by some mm on the patient's head, foot, front or back side."""
    axis, side = FACES[face]
    along = np.reshape(mr.GetDirection(), (3, 3))[axis]
    index = int(np.argmax(np.abs(along)))
    size, first, n = list(mr.GetSize()), [0, 0, 0], int(mm / mr.GetSpacing()[index])
    size[index] -= n
    first[index] = n if np.sign(along[index]) != side else 0
    return sitk.RegionOfInterest(mr, size, first)


def metal(ct: sitk.Image, mr: sitk.Image, masks: sitk.Image, true: dict, rng: np.random.Generator) -> tuple:
    """A screw in one bone: 3000 HU with streaks in its axial slices, and a void in the MR. A likeness, not physics."""
    bone = list(cohort.BONES)[rng.integers(2)]
    inside = sitk.GetArrayFromImage(sitk.SignedMaurerDistanceMap(masks == cohort.BONES[bone], True, False, True))
    places = np.argwhere(inside > 6)
    z, y, x = (float(v) for v in places[rng.integers(len(places))])
    centre = np.array(ct.TransformContinuousIndexToPhysicalPoint([x, y, z]))
    grey, points = sitk.GetArrayFromImage(ct), _points(ct) - centre
    r, angle = np.hypot(points[..., 0], points[..., 1]), np.arctan2(points[..., 1], points[..., 0])
    level, (radius, half) = np.abs(points[..., 2]), SCREW_MM
    rays = sum(np.cos(k * (angle - p)) for k, p in zip((2, 5, 9, 14), rng.uniform(0, 2 * np.pi, 4), strict=True)) / 2
    grey = grey + np.where(level < half, STREAK_HU * rays * radius / np.maximum(r, radius), 0.0)
    grey = np.where((r < radius) & (level < half), METAL_HU, np.maximum(grey, -1024.0))
    away = np.linalg.norm(_points(mr) - true[bone].TransformPoint(centre.tolist()), axis=-1)
    return changed(ct, grey), changed(mr, sitk.GetArrayFromImage(mr) * np.clip((away - VOID_MM) / 2, 0.02, 1))


def _points(image: sitk.Image) -> np.ndarray:
    index = np.moveaxis(np.indices(image.GetSize()[::-1]), 0, -1)[..., ::-1]
    return index @ (np.reshape(image.GetDirection(), (3, 3)) * np.array(image.GetSpacing())).T + image.GetOrigin()


def spoiled(condition: str, ct: sitk.Image, mr: sitk.Image, masks: sitk.Image, true: dict, rng) -> tuple:
    """(CT, MR) under a condition; `all` is noise, thick slices and a cut field together, `soft` a blurred CT."""
    if condition == "soft":
        ct = sitk.SmoothingRecursiveGaussian(sitk.Cast(ct, sitk.sitkFloat32), SOFT_MM)
    if condition == "metal":
        ct, mr = metal(ct, mr, masks, true, rng)
    if condition in ("noise", "all"):
        mr = noisy(mr, rng)
    if condition in ("partial", "all"):
        mr = cropped(mr, list(FACES)[rng.integers(4)], rng.uniform(*CUT_MM))
    return ct, thick(mr) if condition in ("thick", "all") else mr


def read_pair(root: Path, knee_id: str) -> tuple[sitk.Image, sitk.Image]:
    """CT and MR of a simulated knee."""
    row = {"knee_id": knee_id} | {name: f"images/{knee_id}_{name}.nii.gz" for name in ("ct", "mr")}
    return tuple(cohort.read_knee_volume(row, name, root) for name in ("ct", "mr"))


def one_start(root: Path, knee_id: str, condition: str, draw: int) -> dict:
    """Spoil, move, register, compare: one row."""
    rng = np.random.default_rng([SEED, int(knee_id[1:]), CONDITIONS.index(condition), draw])
    ct, mr = read_pair(root, knee_id)
    truth = simulation.read_truth(root, knee_id)
    masks = bone_masks(ct)
    ct, mr = spoiled(condition, ct, mr, masks, truth.transforms, rng)
    motion = drawn_motion(centre_of(mr), rng)
    row = {
        "knee_id": knee_id,
        "condition": condition,
        "draw": draw,
        "flexion_deg": flexion_deg(*truth.transforms.values()),
    }
    tic = time.process_time()
    try:
        masks = bone_masks(ct)
    except cohort.InputFault as fault:
        return row | {"flagged": str(fault), "tre_mm": None}
    found = register_knee(ct, posed(mr, motion), masks, seed=0)
    errors = {
        bone: float(target_registration_error_mm(t, after(motion, truth.transforms[bone]), p).mean())
        for bone, t in found.transforms.items()
        for p in [truth.target_points_lps(bone)]
    }
    seconds = time.process_time() - tic
    row |= {"tre_mm": errors, "checks": found.checks, "bent_deg": found.flexion_deg, "cpu_seconds": seconds}
    return row | {"flagged": found.flagged}


def summary(rows: list[dict]) -> dict:
    """Success and flags of some starts."""
    failed = np.array([r["tre_mm"] is None or max(r["tre_mm"].values()) >= 1.0 for r in rows])
    flagged = np.array([r["flagged"] != "" for r in rows])
    interval = binomtest(int((~failed).sum()), len(rows)).proportion_ci(method="wilson")
    out = {"n": len(rows), "success": float((~failed).mean()), "ci_low": interval.low, "ci_high": interval.high}
    out |= {"failed": int(failed.sum()), "failed_and_flagged": int((failed & flagged).sum())}
    out |= {"aligned_and_flagged": int((~failed & flagged).sum())}
    for bone in cohort.BONES:
        errors = [r["tre_mm"][bone] for r in rows if r["tre_mm"]]
        out[bone] = dict(zip(("median", "p95", "max"), np.percentile(errors, (50, 95, 100)).tolist(), strict=True))
    return out


def main() -> None:
    """Simulate, run what is missing, show and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/stress"))
    parser.add_argument("--knees", type=int, default=12)
    parser.add_argument("--draws", type=int, default=3)
    given = parser.parse_args()
    root = simulated(given.folder, given.knees, SEED, {"flexion_difference": f"low: 0, high: {FLEXION_DEG:.0f}"})
    kept = given.folder / "starts.jsonl"
    rows = [json.loads(line) for line in kept.read_text().splitlines()] if kept.exists() else []
    done = {(r["knee_id"], r["condition"], r["draw"]) for r in rows}
    wanted = [(f"k{k:04d}", c, d) for d in range(given.draws) for k in range(given.knees) for c in CONDITIONS]
    for start in [w for w in wanted if w not in done]:
        rows.append(one_start(root, *start))
        with kept.open("a") as file:
            file.write(json.dumps(rows[-1]) + "\n")
    write(rows, given.knees)


def simulated(folder: Path, knees: int, seed: int, changes: dict[str, str]) -> Path:
    """A cohort with some pose entries of the protocol replaced; kept in the folder."""
    text = (Path(simulation.__file__).with_name("protocol.yaml")).read_text()
    for name, value in changes.items():
        text, n = re.subn(rf"(  {name}: {{)[^}}]*?, unit", rf"\g<1>{value}, unit", text)
        assert n == 1, name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "protocol.yaml").write_text(text)
    if not (folder / "simulated.csv").exists():
        simulation.write_cohort(folder, "simulated", knees, seed, protocol=folder / "protocol.yaml")
    return folder


def write(rows: list[dict], knees: int) -> None:
    """Show and write the summary, with the flag's limits as they are now."""
    rows = [r | ({"flagged": reason_to_flag(r["checks"], r["bent_deg"])} if r["tre_mm"] else {}) for r in rows]
    parts = {c: [r for r in rows if r["condition"] == c] for c in CONDITIONS}
    parts |= {"flexion_above_12_deg": [r for r in rows if r["flexion_deg"] > 12]}
    found = {"seed": SEED, "knees": knees, "protocol_sha256": simulation.protocol_sha256(), "all_starts": summary(rows)}
    found["by_condition"] = {name: summary(part) for name, part in parts.items() if part}
    found["cpu_seconds"] = float(np.mean([r["cpu_seconds"] for r in rows if r["tre_mm"]]))
    found["not_aligned"] = [
        {k: r[k] for k in ("knee_id", "condition", "draw", "tre_mm", "flagged")}
        for r in rows
        if r["tre_mm"] is None or max(r["tre_mm"].values()) >= 1.0
    ]
    cohort.write_json(OUT, found)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
