"""Does the registration's own flag notice a misaligned bone? Knees of another seed than the study's, moved on purpose.

    python benchmarks/registration_flag.py --folder runs/flag --knees 16

Every scan of these knees lost one face of its field of view. Each bone's true transform is shifted and turned by known
amounts and checked as it is (`moved`) and after the last stage of the registration had its way (`settled`: what a
registration from a bad start ends in, the hard case). Knees with odd numbers are reported; the module's limit was
chosen on others. Writes docs/results/registration_flag.json: share flagged by size of the error with Wilson intervals,
and ROC of the match, and of mutual information, for "off by more than 1 mm on average".
"""

import argparse
import json
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from registration_stress import after, read_pair, simulated
from scipy.stats import binomtest
from sklearn.metrics import mutual_info_score, roc_curve

from ctsma import cohort, simulation
from ctsma.diagnosis import auc_delong
from ctsma.registration import bone_masks, isotropic, reason_to_flag, target_registration_error_mm
from ctsma.registration.quality import axes_of, carried, sampled
from ctsma.registration.stages import TRABECULAE, align_trabeculae, bone_depths_mm, rigid
from ctsma.registration.trabeculae import checked, interior, trabeculae

SEED, MOVES = 7101, 3
ERROR_MM = (0.25, 8.0)  # size of the moves, log-uniform, half shift and half turn
BINS_MM = (0.0, 0.2, 0.5, 1.0, 1.5, 2.5, 5.0, 50.0)
MARGIN_MM, N_BINS = 3.0, 32  # of the mutual information that is shown beside the match
SCORES = {"match": "match of the trabeculae", "mi": "mutual information"}
OUT = Path(__file__).parents[1] / "docs" / "results" / "registration_flag.json"


def moved(true: sitk.Euler3DTransform, points: np.ndarray, size_mm: float, rng) -> sitk.Euler3DTransform:
    """The transform followed by a shift and a turn about the bone's targets, each worth half of `size_mm`."""
    axis, direction = (v / np.linalg.norm(v) for v in rng.standard_normal((2, 3)))
    centre = np.array(true.TransformPoint(points.mean(axis=0).tolist()))
    turn = sitk.VersorTransform(axis.tolist(), size_mm / 2 / 25.0)  # targets lie about 25 mm from their middle
    return after(rigid(turn.GetMatrix(), centre, size_mm / 2 * direction), true)


def one_knee(root: Path, knee_id: str) -> list[dict]:
    """Rows (bone, kind, error_mm, checks) of one knee: aligned, moved and settled."""
    rng, truth = np.random.default_rng([SEED, int(knee_id[1:])]), simulation.read_truth(root, knee_id)
    ct, mr = read_pair(root, knee_id)
    masks, rows = bone_masks(ct), []
    coarse, depths = (isotropic(ct, 1.0), isotropic(mr, 1.0)), bone_depths_mm(masks)
    fine = tuple(trabeculae(isotropic(image, TRABECULAE.spacing_mm)) for image in (ct, mr))
    for bone in cohort.BONES:
        points, true = truth.target_points_lps(bone), truth.transforms[bone]
        deep = interior(fine[0], depths[bone], 0)
        sizes = np.append(0.0, np.exp(rng.uniform(*np.log(ERROR_MM), MOVES)))
        for n, size in enumerate(sizes):
            start = moved(true, points, size, rng)
            end, _ = align_trabeculae(*fine, depths[bone], start, 0, [], bone)
            for kind, transform in (("moved", start), ("settled", end))[n == 0 :]:
                error = float(target_registration_error_mm(transform, true, points).mean())
                checks = checked(*deep, fine[1], transform) | {"mi": information(*coarse, depths[bone], transform)}
                rows.append({"knee_id": knee_id, "bone": bone, "kind": kind, "move": n, "error_mm": error} | checks)
    return rows


def information(ct: sitk.Image, mr: sitk.Image, depth_mm: sitk.Image, transform: sitk.Euler3DTransform) -> float:
    """Mutual information (nats) of CT and MR on a bone and 3 mm around it."""
    depth = sitk.GetArrayFromImage(sitk.Resample(depth_mm, ct, sitk.Transform(), sitk.sitkLinear, -1e3))
    index = np.argwhere(depth > -MARGIN_MM)
    hu = sitk.GetArrayViewFromImage(ct)[tuple(index.T)]
    grey = sampled(mr, carried(transform, index[:, ::-1] @ axes_of(ct).T + ct.GetOrigin()))
    seen = np.isfinite(grey)
    ranges = [np.percentile(v[seen], (1, 99)) for v in (hu, grey)]
    clipped = (v[seen].clip(*r) for v, r in zip((hu, grey), ranges, strict=True))
    return float(mutual_info_score(None, None, contingency=np.histogram2d(*clipped, N_BINS, ranges)[0]))


def flagged(row: dict) -> bool:
    """Whether the module's limits as they are now reject this bone."""
    return reason_to_flag({row["bone"]: row}, 0.0) != ""


def by_error(rows: list[dict]) -> list[dict]:
    """Share flagged by size of the error, with Wilson intervals."""
    error, flag, bins = np.array([r["error_mm"] for r in rows]), np.array([flagged(r) for r in rows]), []
    for low, high in zip(BINS_MM[:-1], BINS_MM[1:], strict=True):
        inside = (error >= low) & (error < high)
        if inside.any():
            interval = binomtest(int(flag[inside].sum()), int(inside.sum())).proportion_ci(method="wilson")
            share = {"flagged": float(flag[inside].mean()), "ci_low": interval.low, "ci_high": interval.high}
            bins.append({"low_mm": low, "high_mm": high, "n": int(inside.sum())} | share)
    return bins


def summary(rows: list[dict]) -> dict:
    """Share flagged by error, ROC of each check for an error above 1 mm, and the flag's own point on it."""
    error, flag = np.array([r["error_mm"] for r in rows]), np.array([flagged(r) for r in rows])
    wrong = (error > 1.0).astype(int)
    curves, areas = {}, {}
    for name, label in SCORES.items():
        score = -np.array([r[name] for r in rows])
        areas[name] = auc_delong(wrong, score)
        false_positive, true_positive, _ = roc_curve(wrong, score)
        curves[label] = {"false_positive": false_positive.tolist(), "true_positive": true_positive.tolist()}
    point = {"sensitivity": float(flag[wrong == 1].mean()), "false_alarms": float(flag[error < 0.5].mean())}
    return {"n": len(rows), "by_error": by_error(rows), "auc_of_error_above_1_mm": areas, "flag": point, "roc": curves}


def main() -> None:
    """Simulate, measure what is missing, show and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/flag"))
    parser.add_argument("--knees", type=int, default=16)
    given = parser.parse_args()
    simulated(given.folder, given.knees, SEED, {"partial_field": "value: 1.0"})
    kept = given.folder / "flag.jsonl"
    rows = [json.loads(line) for line in kept.read_text().splitlines()] if kept.exists() else []
    for knee_id in [k for k in (f"k{n:04d}" for n in range(given.knees)) if k not in {r["knee_id"] for r in rows}]:
        fresh = one_knee(given.folder, knee_id)
        rows += fresh
        with kept.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in fresh)
    write(rows)


def write(rows: list[dict]) -> None:
    """Report the odd knees."""
    odd = [r for r in rows if int(r["knee_id"][1:]) % 2]
    found = {"knees": len({r["knee_id"] for r in odd}), "seed": SEED, "protocol_sha256": simulation.protocol_sha256()}
    found |= summary(odd)
    found["settled_by_error"] = by_error([r for r in odd if r["kind"] == "settled"])
    cohort.write_json(OUT, found)
    print(json.dumps({k: v for k, v in found.items() if k != "roc"}, indent=1))


if __name__ == "__main__":
    main()
