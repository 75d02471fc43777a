"""python -m ctsma_lab.tutorials.make_data runs/full: cut the tutorials' data from a finished run.

The run must be one of simulated knees. Files go to notebooks/data, whose README.md describes them.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import SimpleITK as sitk

import kneesim
from ctsma.cohort import read_knee_volume
from ctsma.common import BIOMARKERS, BONES, InputError
from ctsma.files import atomic, write_json, write_text
from ctsma.registration import apply_rigid, read_stages
from ctsma.registration.transforms import Rigid
from ctsma_lab.run import Run

from .data import DATA

ARMS = ("hu_regression_calibrated", "ct_only", "ct_sma", "ct_sma_plus")
PATCH = ["knee_id", "patch_id"]
PLACE = ["knee_id", "subject_id", "patch_id", "fold", "compartment", "u", "v", "w", "mean_hu"]

VOXEL_MM = 0.6  # of the knee; its trabeculae still align the bones to 0.02 mm
HALF_MM, MARGIN_MM = (40.0, 30.0, 32.0), 4.0  # half box of the CT; the MR has a margin around it
CT_RANGE, MR_RANGE, STEP = (-200, 1400), (0, 1100), 16  # grey values are rounded: smaller files
N_TARGETS = 150  # of each bone


def main(arguments: list[str] | None = None) -> None:
    """Read the command line and write all files."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("run", type=Path, help="folder of a finished run of simulated knees")
    parser.add_argument("--out", type=Path, default=DATA, help="folder of the files")
    parser.add_argument("--knee", help="identifier of the knee (default: most change of flexion)")
    given = parser.parse_args(arguments)
    run = Run(given.run)
    write_tables(run, given.out)
    write_knee(run, given.out, given.knee or most_flexed(run))


def write_tables(run: Run, out: Path) -> None:
    """Write patches.csv and knees.csv.

    Raises InputError where an arm or the ground truth is missing.
    """
    predictions = run.read_table("models/predictions.csv")
    missing = [arm for arm in ARMS if arm not in set(predictions["arm"])]
    if missing or "bv_tv_true" not in predictions:
        lacking = ", ".join(missing) or "the ground truth"
        problem, remedy = f"lacks {lacking}", "give a finished run of simulated knees"
        raise InputError(run.path / "models" / "predictions.csv", problem, remedy)
    arms = {name: rows.set_index(PATCH).sort_index() for name, rows in predictions.groupby("arm")}
    first = arms[ARMS[0]]
    table = first.reset_index()[PLACE].set_index(PATCH, drop=False)
    for source in ("reference", "true"):
        names = {f"{biomarker}_{source}" for biomarker in BIOMARKERS}
        table = table.join(first[[name for name in first if name in names]])
    for arm in ARMS:
        table = table.join(arms[arm][list(BIOMARKERS)].add_suffix(f"_{arm}"))
    rounding = dict.fromkeys(table.columns, 4) | {"mean_hu": 1, "u": 1, "v": 1, "w": 1}
    text = table.round(rounding).to_csv(index=False, lineterminator="\n")
    write_text(out / "patches.csv", text)

    knees = run.manifest().dropna(subset=["oa"])
    knees = knees.merge(run.splits(), on="subject_id").sort_values("knee_id")
    knees = knees[knees["knee_id"].isin(table["knee_id"])].astype({"oa": int})
    columns = ["knee_id", "subject_id", "fold", "oa", "age", "sex", "bmi"]
    write_text(out / "knees.csv", knees[columns].to_csv(index=False, lineterminator="\n"))


def most_flexed(run: Run) -> str:
    """The registered knee whose flexion differs most between CT and MR."""
    angles = {}
    for path in (run.path / "registration").glob("*.json"):
        row = json.loads(path.read_text(encoding="utf-8"))
        if row.get("flagged") == "" and "flexion_deg" in row:  # not the file of stages
            angles[row["knee_id"]] = row["flexion_deg"]
    if not angles:
        problem, remedy = "holds no registered knee", "give a finished run of simulated knees"
        raise InputError(run.path / "registration", problem, remedy)
    return max(sorted(angles), key=angles.get)


def write_knee(run: Run, out: Path, knee_id: str) -> None:
    """Write knee_ct, knee_mr and knee_labels (.nii.gz) and knee.json of one knee."""
    manifest = run.manifest()
    root = manifest.attrs["root"]
    row = manifest.set_index("knee_id", drop=False).loc[knee_id]
    truth = kneesim.read_truth(root, knee_id)
    every = np.vstack([truth.target_points_lps(bone) for bone in BONES])
    middle = (every.min(axis=0) + every.max(axis=0)) / 2
    in_mr = [apply_rigid(truth.transforms[bone], middle[None])[0] for bone in BONES]
    labels = sitk.ReadImage(str(run.path / "registration" / f"{knee_id}_mask.nii.gz"))
    ct, mr = (read_knee_volume(row, column, root) for column in ("ct", "mr"))
    wider = np.add(HALF_MM, MARGIN_MM)
    images = {
        "ct": _rounded(_cropped(ct, middle, HALF_MM, sitk.sitkLinear), CT_RANGE),
        "mr": _rounded(_cropped(mr, np.mean(in_mr, axis=0), wider, sitk.sitkLinear), MR_RANGE),
        "labels": _cropped(labels, middle, HALF_MM, sitk.sitkNearestNeighbor),
    }
    images["labels"] = sitk.Cast(images["labels"], sitk.sitkUInt8)
    for name, image in images.items():
        with atomic(out / f"knee_{name}.nii.gz") as temporary:
            sitk.WriteImage(image, str(temporary), True, 9)

    targets = {}
    for bone in BONES:
        points = truth.target_points_lps(bone)
        inside = (np.abs(points - middle) < np.subtract(HALF_MM, MARGIN_MM)).all(axis=1)
        targets[bone] = points[inside][:N_TARGETS].round(2).tolist()
    stages = {}
    for stage, transforms in read_stages(run.path / "registration", knee_id).items():
        stages[stage] = {bone: _numbers(transform) for bone, transform in transforms.items()}
    true = {bone: _numbers(truth.transforms[bone]) for bone in BONES}
    facts = {"knee_id": knee_id, "side": row["side"], "stages": stages, "true": true}
    write_json(out / "knee.json", facts | {"targets": targets})


def _cropped(image: sitk.Image, middle: np.ndarray, half_mm, interpolator: int) -> sitk.Image:
    """A box around a point on voxels of VOXEL_MM along the patient's axes."""
    grid = sitk.Image([int(2 * mm / VOXEL_MM) for mm in half_mm], sitk.sitkUInt8)
    grid.SetSpacing([VOXEL_MM] * 3)
    origin = middle - (np.array(grid.GetSize()) - 1) * VOXEL_MM / 2
    grid.SetOrigin([float(value) for value in origin])
    return sitk.Resample(image, grid, sitk.Transform(), interpolator, 0.0, sitk.sitkFloat32)


def _rounded(image: sitk.Image, limits: tuple[int, int]) -> sitk.Image:
    values = np.clip(sitk.GetArrayViewFromImage(image), *limits)
    rounded = sitk.GetImageFromArray((np.round(values / STEP) * STEP).astype(np.int16))
    rounded.CopyInformation(image)
    return rounded


def _numbers(transform: Rigid) -> dict[str, list[float]]:
    """What `rigid_transform` makes the transform from."""
    return {
        "matrix": list(transform.GetMatrix()),
        "centre": list(transform.GetCenter()),
        "translation": list(transform.GetTranslation()),
    }


if __name__ == "__main__":
    main()
