"""Does the registration's own flag notice a misaligned knee? True transforms of a simulated run, moved on purpose.

    python benchmarks/registration_flag.py runs/quick --knees 20

Each bone's true transform is shifted and turned by known amounts; the error over the bone's target points and the
checks that need no truth are kept. Writes docs/results/registration_flag.json: share flagged by size of the error, with
Wilson intervals, and the area under the ROC curve of each check for "off by more than 1 mm on average".
"""

import argparse
import json
from pathlib import Path

import joblib
import numpy as np
import SimpleITK as sitk
from scipy.stats import binomtest

from ctsma import cohort, simulation
from ctsma.diagnosis import auc_delong
from ctsma.registration import target_registration_error_mm
from ctsma.registration.masks import isotropic
from ctsma.registration.quality import bone_checks, reason_to_flag
from ctsma.simulation.truth import rigid_transform

SHIFTS_MM, TURNS_DEG = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0), (0.0, 0.5, 1.0, 2.0, 4.0, 8.0)
BINS_MM = (0.0, 0.1, 0.3, 0.6, 1.0, 1.5, 2.5, 5.0, 20.0)
OUT = Path(__file__).parents[1] / "docs" / "results" / "registration_flag.json"


def moved(true: sitk.Euler3DTransform, points: np.ndarray, shift_mm: float, turn_deg: float, rng) -> sitk.Transform:
    """The transform followed by a shift in a random direction and a turn about a random axis through the bone."""
    axis, direction = (v / np.linalg.norm(v) for v in rng.standard_normal((2, 3)))
    turn = sitk.VersorRigid3DTransform()
    turn.SetCenter(true.TransformPoint(points.mean(axis=0).tolist()))
    turn.SetRotation(axis.tolist(), float(np.deg2rad(turn_deg)))
    turn.SetTranslation((shift_mm * direction).tolist())
    matrix = np.eye(4)
    matrix[:3, :3] = np.reshape(turn.GetMatrix(), (3, 3)) @ np.reshape(true.GetMatrix(), (3, 3))
    matrix[:3, 3] = turn.TransformPoint(true.TransformPoint((0.0, 0.0, 0.0)))  # the image of the origin
    return rigid_transform(matrix)


def one_knee(knee: dict, run: Path, root: str, seed: int) -> list[dict]:
    """Rows (bone, shift_mm, turn_deg, error_mm, flagged, checks) of one knee."""
    rng, truth = np.random.default_rng([seed, int(knee["knee_id"][1:])]), simulation.read_truth(root, knee["knee_id"])
    ct, mr = (isotropic(cohort.read_knee_volume(knee, name, root), 1.0) for name in ("ct", "mr"))
    masks, rows = sitk.ReadImage(str(run / "registration" / f"{knee['knee_id']}_mask.nii.gz")), []
    for bone, value in cohort.BONES.items():
        depth = sitk.SignedMaurerDistanceMap(masks == value, True, False, True)
        points, true = truth.target_points_lps(bone), truth.transforms[bone]
        for shift in SHIFTS_MM:
            for turn in TURNS_DEG:
                transform = moved(true, points, shift, turn, rng)
                error = target_registration_error_mm(transform, true, points).mean()
                checks = bone_checks(ct, mr, depth, transform)
                flag = bool(reason_to_flag({bone: checks}, 0.0))
                rows.append({"bone": bone, "shift_mm": shift, "turn_deg": turn, "error_mm": float(error)} | checks)
                rows[-1]["flagged"] = flag
    return rows


def summary(rows: list[dict]) -> dict:
    """Share flagged by error, and AUC of each check for an error above 1 mm."""
    error, flagged = (np.array([row[name] for row in rows]) for name in ("error_mm", "flagged"))
    bins = []
    for low, high in zip(BINS_MM[:-1], BINS_MM[1:], strict=True):
        inside = (error >= low) & (error < high)
        if inside.any():
            interval = binomtest(int(flagged[inside].sum()), int(inside.sum())).proportion_ci(method="wilson")
            share = {"flagged": float(flagged[inside].mean()), "ci_low": interval.low, "ci_high": interval.high}
            bins.append({"low_mm": low, "high_mm": high, "n": int(inside.sum())} | share)
    scores = {"peak": -1.0, "off_mm": 1.0, "mi": -1.0, "contrast": -1.0}
    wrong = (error > 1.0).astype(int)
    areas = {n: auc_delong(wrong, sign * np.array([row[n] for row in rows])) for n, sign in scores.items()}
    return {"n": len(rows), "by_error": bins, "auc_of_error_above_1_mm": areas}


def main() -> None:
    """Measure the first knees of a run, show and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--knees", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2)
    given = parser.parse_args()
    knees = cohort.read_manifest(given.run / "cohort" / "simulated.csv")
    tasks = [
        joblib.delayed(one_knee)(knee, given.run, knees.attrs["root"], given.seed)
        for knee in knees.head(given.knees).to_dict("records")
    ]
    with joblib.parallel_config(backend="loky", n_jobs=given.jobs, inner_max_num_threads=1):
        rows = [row for part in joblib.Parallel()(tasks) for row in part]
    setting = {"knees": given.knees, "seed": given.seed, "protocol_sha256": simulation.protocol_sha256()}
    found = setting | summary(rows)
    print(json.dumps(found, indent=1))
    cohort.write_json(OUT, found)


if __name__ == "__main__":
    main()
