"""python -m ctsma_lab.tutorials.make_data runs/full: cut the tutorials' data from a finished run.

The run must be one of simulated knees. Files go to notebooks/data, whose README.md describes them.
"""

import argparse
import json
import zlib
from pathlib import Path

import numpy as np
import pandas as pd
import SimpleITK as sitk

import kneesim
from ctsma.arms import TRAINED
from ctsma.cohort import read_knee_volume, splits_path
from ctsma.common import BIOMARKERS, BONES, COMPARTMENTS, InputError
from ctsma.files import atomic, write_json, write_text
from ctsma.patches import TABLE, load_patches, read_table
from ctsma.registration import apply_rigid, read_stages
from ctsma.registration.transforms import parameters_of
from ctsma_lab.run import RESULTS, Run
from kneesim.knees import draw_scan

from .data import DATA, PATCH

COLUMNS = ["knee_id", "subject_id", "patch_id", "compartment", "flag", *BIOMARKERS]  # of patches
PLACE = ["knee_id", "subject_id", "patch_id", "fold", "compartment", "u", "v", "w", "mean_hu"]

VOXEL_MM = 0.6  # of the knee; its trabeculae still align the bones to 0.02 mm
HALF_MM, MARGIN_MM = (40.0, 30.0, 32.0), 4.0  # half box of the CT; the MR has a margin around it
CT_RANGE, MR_RANGE, STEP = (-200, 1400), (0, 1100), 16  # grey values are rounded: smaller files
N_TARGETS = 150  # of each bone
N_KNEES = 24  # whose patches are kept as images, one of each compartment


def main(arguments: list[str] | None = None) -> None:
    """Read the command line and write all files."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("run", type=Path, help="folder of a finished run of simulated knees")
    parser.add_argument("--out", type=Path, default=DATA, help="folder of the files")
    parser.add_argument("--knee", help="identifier of the knee (default: most change of flexion)")
    given = parser.parse_args(arguments)
    run = Run(given.run)
    knee_id = given.knee or most_flexed(run)
    write_tables(run, given.out)
    write_run(run, given.out / "run")
    write_patch_images(run, given.out, knee_id)
    write_knee(run, given.out, knee_id)


def write_tables(run: Run, out: Path) -> None:
    """Write patches.csv and knees.csv.

    Raises InputError where an arm or the ground truth is missing.
    """
    table, arms = patch_table(run)
    missing = [arm for arm in TRAINED if arm not in arms]
    if missing or "bv_tv_true" not in table:
        lacking = ", ".join(missing) or "the ground truth"
        problem, remedy = f"lacks {lacking}", "give a finished run of simulated knees"
        raise InputError(run.path / "models" / "predictions.csv", problem, remedy)
    _write_rounded(table, out / "patches.csv")
    knees = knee_table(run, table["knee_id"])
    write_text(out / "knees.csv", knees.to_csv(index=False, lineterminator="\n"))


def write_run(run: Run, out: Path) -> None:
    """Write what notebooks 04 and 05 read of a run: manifest, folds, tables and results files."""
    cohort = run.results("cohort")
    manifest = run.path / cohort["manifest"]
    for file in (manifest, splits_path(manifest)):
        write_text(out / "cohort" / file.name, file.read_text(encoding="utf-8"))
    for name in RESULTS.values():
        numbers = run.results(name)
        if name == "cohort":
            numbers |= {"manifest": f"cohort/{manifest.name}", "root": "cohort"}
        write_json(out / "results" / f"{name}.json", numbers)
    for name in ("predictions", "ct_only_predictions"):
        _write_rounded(run.read_table(f"models/{name}.csv"), out / "models" / f"{name}.csv")
    patches = read_table(run.path / "patches" / TABLE)
    kept = [name for name in patches if name in COLUMNS or name.startswith("rescan_")]
    _write_rounded(patches[kept], out / "patches" / TABLE)


def _write_rounded(table: pd.DataFrame, file: Path) -> None:
    """Write a table with four decimals; places and HU have one."""
    rounding = dict.fromkeys(table.columns, 4) | {"mean_hu": 1, "u": 1, "v": 1, "w": 1}
    write_text(file, table.round(rounding).to_csv(index=False, lineterminator="\n"))


def patch_table(run: Run) -> tuple[pd.DataFrame, list[str]]:
    """Estimates of a run as `read_patches` gives them, and the names of its arms.

    `<biomarker>_true` is there for simulated knees alone.
    """
    predictions = run.read_table("models/predictions.csv")
    arms = {}
    for name, rows in predictions.groupby("arm", sort=False):
        arms[name] = rows.set_index(PATCH).sort_index()
    first = next(iter(arms.values()))
    table = first.reset_index()[PLACE].set_index(PATCH, drop=False)
    for source in ("reference", "true"):
        names = {f"{biomarker}_{source}" for biomarker in BIOMARKERS}
        table = table.join(first[[name for name in first if name in names]])
    for arm, rows in arms.items():
        table = table.join(rows[list(BIOMARKERS)].add_suffix(f"_{arm}"))
    return table.reset_index(drop=True), list(arms)


def knee_table(run: Run, knee_ids: pd.Series) -> pd.DataFrame:
    """Knees with an OA label as `read_knees` gives them.

    `ct_fwhm_mm` and `ct_noise_hu` are there where the run simulated its knees with this protocol.
    """
    manifest = run.manifest()
    knees = manifest.dropna(subset=["oa"]).merge(run.splits(), on="subject_id")
    knees = knees[knees["knee_id"].isin(knee_ids)].sort_values("knee_id").astype({"oa": int})
    columns = ["knee_id", "subject_id", "fold", "oa", "age", "sex", "bmi"]
    cohort = run.results("cohort")
    if kneesim.has_truth(manifest.attrs["root"]) and _same_protocol(cohort):
        constants, seed = kneesim.load_protocol(), int(cohort["seed"])
        streams = [[seed, zlib.crc32(name.encode())] for name in knees["knee_id"]]
        drawn = [draw_scan("ct", constants, stream) for stream in streams]
        knees["ct_fwhm_mm"] = [round(ct["fwhm_in_plane"], 3) for ct in drawn]
        knees["ct_noise_hu"] = [round(ct["noise"], 1) for ct in drawn]
        columns += ["ct_fwhm_mm", "ct_noise_hu"]
    return knees[columns]


def _same_protocol(cohort: dict) -> bool:
    return cohort.get("protocol_sha256") == kneesim.protocol_sha256()


def write_patch_images(run: Run, out: Path, knee_id: str) -> None:
    """Write patches_small.npz: one patch of each compartment of a few knees, `knee_id` among them.

    Half of the knees have OA. The MR of each patch is rounded to 256 grey values.
    """
    patches = load_patches(run.path / "patches")
    first = patches.table.groupby(["knee_id", "compartment"], sort=False).head(1)
    complete = first.groupby("knee_id").size() == len(COMPARTMENTS)
    oa = knee_table(run, first["knee_id"]).set_index("knee_id")["oa"]
    chosen = []
    for label in (0, 1):
        names = [name for name in oa.index[oa == label] if complete[name]]
        names.sort(key=lambda name: name != knee_id)  # it comes first
        chosen += names[: N_KNEES // 2]
    rows = first.index[first["knee_id"].isin(chosen)].to_numpy()
    table, mr = patches.table.loc[rows], patches.mr[rows].astype(np.float32)
    low, high = mr.min(axis=(1, 2, 3)), mr.max(axis=(1, 2, 3))
    shares = (mr - low[:, None, None, None]) / (high - low)[:, None, None, None]
    arrays = {
        "knee_id": table["knee_id"].to_numpy(str),
        "patch_id": table["patch_id"].to_numpy(),
        "cortical_hu": table[[f"cortical_hu_{bone}" for bone in BONES]].to_numpy(),
        "ct": np.round(patches.ct[rows].astype(np.float32)).astype(np.int16),
        "mr": np.round(shares * 255).astype(np.uint8),
        "mr_limits": np.column_stack([low, high]),
        "voi": np.packbits(patches.voi[rows].astype(bool).reshape(len(rows), -1), axis=1),
    }
    with atomic(out / "patches_small.npz") as temporary:
        np.savez_compressed(temporary, **arrays)


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
        stages[stage] = {bone: parameters_of(transform) for bone, transform in transforms.items()}
    true = {bone: parameters_of(truth.transforms[bone]) for bone in BONES}
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


if __name__ == "__main__":
    main()
