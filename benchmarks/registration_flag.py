"""Does the registration's flag find a misaligned bone? Knees of another seed, moved on purpose.

    python benchmarks/registration_flag.py --folder runs/flag --knees 16

Every scan of these knees lost one side of its field of view. The true transform of each bone is
shifted and turned by known amounts, and measured as it is (`moved`) and after the last stage of
the registration (`settled`: the end of a registration from a bad start, the hard case). The knees
with odd numbers are reported, because the limit was chosen on others. Writes
docs/results/registration_flag.json: share flagged by size of the error with Wilson intervals, and
the ROC of the trabecular correlation, and of mutual information, for a mean error above 1 mm.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from registration_stress import compose, read_pair, simulate
from scipy.stats import binomtest
from sklearn.metrics import mutual_info_score, roc_curve

from ctsma.diagnosis import auc_delong
from ctsma.files import write_json
from ctsma.registration import (
    apply_rigid,
    bone_masks,
    failure_reason,
    isotropic,
    rigid_transform,
    target_registration_error_mm,
)
from ctsma.registration.stages import TRABECULAE_SPACING_MM, align_trabeculae, bone_depths_mm
from ctsma.registration.trabeculae import highpass, interior, registration_metrics
from ctsma.registration.transforms import sample_points, voxel_axes
from kneesim import protocol_sha256, read_truth

SEED, N_MOVES = 7101, 3
MOVE_MM = (0.25, 8.0)  # size of the moves, log-uniform; half shift, half rotation
BINS_MM = (0.0, 0.2, 0.5, 1.0, 1.5, 2.5, 5.0, 50.0)
MARGIN_MM, N_BINS = 3.0, 32  # of the mutual information
SCORES = {"correlation": "trabecular correlation", "mi": "mutual information"}
OUT = Path(__file__).parents[1] / "docs" / "results" / "registration_flag.json"


def move(
    true: sitk.Euler3DTransform, points: np.ndarray, size_mm: float, rng: np.random.Generator
) -> sitk.Euler3DTransform:
    """The transform followed by a shift and a rotation about the targets, each of size_mm / 2."""
    axis, direction = (v / np.linalg.norm(v) for v in rng.standard_normal((2, 3)))
    centre = np.array(true.TransformPoint(points.mean(axis=0).tolist()))
    angle = size_mm / 2 / 25.0  # the targets lie about 25 mm from their centre
    matrix = sitk.VersorTransform(axis.tolist(), angle).GetMatrix()
    return compose(rigid_transform(matrix, centre, size_mm / 2 * direction), true)


def one_knee(root: Path, knee_id: str) -> list[dict]:
    """Rows (bone, kind, error, metrics) of one knee: aligned, moved and settled."""
    rng, truth = np.random.default_rng([SEED, int(knee_id[1:])]), read_truth(root, knee_id)
    ct, mr = read_pair(root, knee_id)
    depths_mm = bone_depths_mm(bone_masks(ct))
    ct_coarse, mr_coarse = isotropic(ct, 1.0), isotropic(mr, 1.0)
    ct_fine, mr_fine = (highpass(isotropic(image, TRABECULAE_SPACING_MM)) for image in (ct, mr))
    rows = []
    for bone, depth_mm in depths_mm.items():
        points, true = truth.target_points_lps(bone), truth.transforms[bone]
        inside = interior(ct_fine, depth_mm, 0)
        sizes_mm = np.append(0.0, np.exp(rng.uniform(*np.log(MOVE_MM), N_MOVES)))
        for number, size_mm in enumerate(sizes_mm):
            start = move(true, points, size_mm, rng)
            end, _ = align_trabeculae(inside, mr_fine, start)
            transforms = {"moved": start, "settled": end.transform}
            if number == 0:  # nothing was moved
                del transforms["moved"]
            for kind, transform in transforms.items():
                error_mm = float(target_registration_error_mm(transform, true, points).mean())
                row = {"knee_id": knee_id, "bone": bone, "kind": kind, "move": number}
                row |= {"error_mm": error_mm}
                row |= registration_metrics(*inside[:2], mr_fine, transform)
                row["mi"] = mutual_information(ct_coarse, mr_coarse, depth_mm, transform)
                rows.append(row)
    return rows


def mutual_information(
    ct: sitk.Image, mr: sitk.Image, depth_mm: sitk.Image, transform: sitk.Euler3DTransform
) -> float:
    """Mutual information (nats) of CT and MR on a bone and 3 mm around it."""
    depth = sitk.Resample(depth_mm, ct, sitk.Transform(), sitk.sitkLinear, -1e3)
    index = np.argwhere(sitk.GetArrayFromImage(depth) > -MARGIN_MM)
    hu = sitk.GetArrayViewFromImage(ct)[tuple(index.T)]
    points = index[:, ::-1] @ voxel_axes(ct).T + ct.GetOrigin()
    grey = sample_points(mr, apply_rigid(transform, points))
    seen = np.isfinite(grey)
    ranges = [np.percentile(values[seen], (1, 99)) for values in (hu, grey)]
    clipped = [v[seen].clip(*r) for v, r in zip((hu, grey), ranges, strict=True)]
    counts = np.histogram2d(*clipped, N_BINS, ranges)[0]
    return float(mutual_info_score(None, None, contingency=counts))


def is_flagged(row: dict) -> bool:
    """Whether the present limits of the module reject this bone."""
    return failure_reason({row["bone"]: row}, 0.0) != ""


def by_error(rows: list[dict]) -> list[dict]:
    """Share flagged by size of the error, with Wilson intervals."""
    error_mm = np.array([row["error_mm"] for row in rows])
    flagged = np.array([is_flagged(row) for row in rows])
    bins = []
    for low, high in zip(BINS_MM[:-1], BINS_MM[1:], strict=True):
        inside = (error_mm >= low) & (error_mm < high)
        if not inside.any():
            continue
        n, n_flagged = int(inside.sum()), int(flagged[inside].sum())
        interval = binomtest(n_flagged, n).proportion_ci(method="wilson")
        share = {"flagged": n_flagged / n, "ci_low": interval.low, "ci_high": interval.high}
        bins.append({"low_mm": low, "high_mm": high, "n": n} | share)
    return bins


def summary(rows: list[dict]) -> dict:
    """Share flagged by error, ROC of each score for an error above 1 mm, and the flag's point."""
    error_mm = np.array([row["error_mm"] for row in rows])
    flagged = np.array([is_flagged(row) for row in rows])
    wrong = (error_mm > 1.0).astype(int)
    curves, areas = {}, {}
    for name, label in SCORES.items():
        score = -np.array([row[name] for row in rows])
        areas[name] = auc_delong(wrong, score)
        false_positive, true_positive, _ = roc_curve(wrong, score)
        curves[label] = {
            "false_positive": false_positive.tolist(),
            "true_positive": true_positive.tolist(),
        }
    return {
        "n": len(rows),
        "by_error": by_error(rows),
        "auc_of_error_above_1_mm": areas,
        "flag": {
            "sensitivity": float(flagged[wrong == 1].mean()),
            "false_alarms": float(flagged[error_mm < 0.5].mean()),
        },
        "roc": curves,
    }


def main() -> None:
    """Simulate, measure what is missing, print and write the knees with odd numbers."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=Path("runs/flag"))
    parser.add_argument("--knees", type=int, default=16)
    given = parser.parse_args()
    simulate(given.folder, given.knees, SEED, {"partial_field": "value: 1.0"})
    kept = given.folder / "flag.jsonl"
    rows = [json.loads(line) for line in kept.read_text().splitlines()] if kept.exists() else []
    done = {row["knee_id"] for row in rows}
    for knee_id in (f"k{number:04d}" for number in range(given.knees)):
        if knee_id in done:
            continue
        new = one_knee(given.folder, knee_id)
        rows += new
        with kept.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in new)
    odd = [row for row in rows if int(row["knee_id"][1:]) % 2]
    result = {"knees": len({row["knee_id"] for row in odd}), "seed": SEED}
    result |= {"protocol_sha256": protocol_sha256()} | summary(odd)
    result["settled_by_error"] = by_error([row for row in odd if row["kind"] == "settled"])
    write_json(OUT, result)
    print(json.dumps({key: value for key, value in result.items() if key != "roc"}, indent=1))


if __name__ == "__main__":
    main()
