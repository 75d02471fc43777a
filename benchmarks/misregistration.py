"""How a registration error propagates to the biomarkers, and what resampling the MR costs.

    python benchmarks/misregistration.py runs/full

On the simulated knees of a finished run, whose ground truth is known. Writes
docs/results/registration_spread.json:

- `displaced`: each bone's MR displaced by 0 to 2 mm in a direction drawn for it, the same patches
  cut and measured: ICC of the reference with that at 0 mm; agreement of a ridge on the CT that was
  trained and evaluated on the displaced reference; beside it the run's own registration;
- `kernels`: MR resampled onto the patch grid by three kernels, against an MR scanned on the patch
  grid itself: contrast (SD in the trabecular region over that of the direct scan) and the
  biomarkers' ratio;
- `refinement`: every patch shifted, by up to 0.3 mm in each direction, to where its own trabeculae
  correlate best: error at its centre before and after.
"""

import argparse
import zlib
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import SimpleITK as sitk
from registration_stress import compose, read_pair

from ctsma import agreement, patches
from ctsma.cohort import read_manifest, read_splits, splits_path
from ctsma.common import BIOMARKERS, BONES
from ctsma.files import git_commit, write_json
from ctsma.parallel import run_tasks
from ctsma.registration import isotropic, read_transforms
from ctsma.registration.trabeculae import highpass, trabecular_correlation
from ctsma.registration.transforms import apply_rigid, sample_points
from ctsma.ridge import ct_features
from ctsma_lab.run import Run
from kneesim import QUICK_FIELD_MM, Truth, draw_subjects, load_protocol, protocol_sha256, read_truth
from kneesim import knees as simulator
from kneesim.difficulty import ridge_estimates
from kneesim.painting import Grid
from kneesim.subject import make_subject

SIZES_MM = (0.0, 0.25, 0.5, 1.0, 2.0)
KERNELS = {
    "linear": sitk.sitkLinear,
    "B-spline": sitk.sitkBSpline,
    "Lanczos": sitk.sitkLanczosWindowedSinc,
}
N_DETAILED = 8  # knees for the slow parts
REACH_MM, STEP_MM = 0.3, 0.5  # of a refinement: largest shift, voxel of its images
BORDER = 12  # margin of a direct scan, in voxels
KEYS = ["knee_id", "subject_id", "patch_id"]
OUT = Path(__file__).parents[1] / "docs" / "results" / "registration_spread.json"


def one_knee(
    run: Path, knee: dict, person: dict, detailed: bool, seed: int
) -> dict[str, pd.DataFrame]:
    """Rows of every part for the usable patches of one knee."""
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    knee_id = knee["knee_id"]
    table = patches.load_table(run / "patches")
    table = table[table["knee_id"] == knee_id]
    with np.load(run / "patches" / f"{knee_id}.npz") as stored:
        voi = stored["voi"][table["patch_id"]]
        registered = stored["mr"][table["patch_id"]].astype(np.float32)
    ct, mr = read_pair(run / "cohort", knee_id)
    truth = read_truth(run / "cohort", knee_id)
    rng = np.random.default_rng([seed, zlib.crc32(knee_id.encode())])
    vectors = rng.standard_normal((2, 3))
    directions = dict(zip(BONES, vectors / np.linalg.norm(vectors, axis=1)[:, None], strict=True))
    rows = [measured(table, registered, voi, "registration")]
    for size in SIZES_MM:
        moved = {}
        for bone, direction in directions.items():
            moved[bone] = compose(translation(size * direction), truth.transforms[bone])
        stack = [sample_mr(mr, centre, knee["side"], moved[bone]) for bone, centre in places(table)]
        rows.append(measured(table, np.array(stack), voi, str(size)))
    found = {"displaced": pd.concat(rows)}
    if detailed:
        found["kernels"] = resampled(table, voi, mr, truth, knee, person, seed)
        found["refinement"] = refined(table, ct, mr, truth, knee, run / "registration")
    return found


def places(table: pd.DataFrame) -> list[tuple[str, np.ndarray]]:
    """(bone, centre in LPS mm) of every patch."""
    bones = [compartment.split("_")[0] for compartment in table["compartment"]]
    return list(zip(bones, table[["x", "y", "z"]].to_numpy(), strict=True))


def sample_mr(mr: sitk.Image, centre, side: str, transform: sitk.Transform) -> np.ndarray:
    """A patch on the MR patch grid."""
    shape, spacing_mm = patches.MR_SHAPE, patches.MR_SPACING_MM
    return patches.sample_patch(mr, centre, side, shape, spacing_mm, transform)


def translation(millimetres: np.ndarray) -> sitk.Euler3DTransform:
    """A pure translation as a rigid transform."""
    transform = sitk.Euler3DTransform()
    transform.SetTranslation([float(v) for v in millimetres])
    return transform


def measured(table: pd.DataFrame, mr: np.ndarray, voi: np.ndarray, name: str) -> pd.DataFrame:
    """Measured biomarkers of a stack of MR patches."""
    reference = patches.measure_reference(mr, voi, "plate")
    return table[KEYS].assign(variant=name, **reference)


def resampled(
    table: pd.DataFrame, voi, mr: sitk.Image, truth: Truth, knee: dict, person: dict, seed: int
) -> pd.DataFrame:
    """Contrast and biomarkers of every kernel, and of the MR scanned on the grid ("direct")."""
    constants, streams = load_protocol(), [seed, zlib.crc32(knee["knee_id"].encode())]
    subject = make_subject(person, constants, streams, None)
    poses, _ = simulator.settings(subject, constants, streams, ["ct", "mr"], QUICK_FIELD_MM)
    drawn = simulator.draw_scan("mr", constants, streams)
    rng = np.random.default_rng([*streams, 99])
    shape, spacing_mm = patches.MR_SHAPE, patches.MR_SPACING_MM
    wide_shape = np.add(shape, (0, 2 * BORDER, 2 * BORDER))
    stacks = {name: [] for name in (*KERNELS, "direct")}
    for bone, centre in places(table):
        transform = truth.transforms[bone]
        grid = patches.patch_grid(centre, knee["side"], shape, spacing_mm)
        for name, kernel in KERNELS.items():
            image = sitk.Resample(mr, grid, transform, kernel, 0.0, sitk.sitkFloat32)
            stacks[name].append(sitk.GetArrayFromImage(image))
        wide = patches.patch_grid(centre, knee["side"], wide_shape, spacing_mm)
        rotation = np.reshape(transform.GetMatrix(), (3, 3))
        direction = rotation @ np.reshape(wide.GetDirection(), (3, 3))
        origin = np.array(transform.TransformPoint(wide.GetOrigin()))
        scan_grid = Grid(wide.GetSize(), wide.GetSpacing(), direction, origin)
        image, _ = simulator.scan(subject, poses["mr"], scan_grid, "mr", drawn, rng)
        inner = sitk.GetArrayFromImage(image)[:, BORDER:-BORDER, BORDER:-BORDER]
        stacks["direct"].append(inner.astype(np.float32))
    parts = []
    for name, stack in stacks.items():
        contrast = []
        for patch, region in zip(stack, voi, strict=True):
            contrast.append(float(patch[region].std() / patch[region].mean()))
        parts.append(measured(table, np.array(stack), voi, name).assign(contrast=contrast))
    return pd.concat(parts)


def refined(
    table: pd.DataFrame, ct: sitk.Image, mr: sitk.Image, truth: Truth, knee: dict, folder: Path
) -> pd.DataFrame:
    """TRE at every patch's centre before and after it moved to where its trabeculae match best."""
    own, rows = read_transforms(folder, knee["knee_id"]), []
    fine_ct, fine_mr = (highpass(isotropic(image, STEP_MM)) for image in (ct, mr))
    extent_mm = np.multiply(patches.MR_SHAPE, patches.MR_SPACING_MM)
    shape = [round(mm / STEP_MM) for mm in extent_mm]
    steps = np.linspace(-REACH_MM, REACH_MM, 7)
    shifts = sorted(product(steps, repeat=3), key=np.linalg.norm)  # of equal ones the nearest
    for bone, centre in places(table):
        grid = patches.patch_grid(centre, knee["side"], shape, [STEP_MM] * 3)
        points = patches.grid_points(grid).reshape(-1, 3)
        hu, in_mr = sample_points(fine_ct, points), apply_rigid(own[bone], points)
        correlations = []
        for shift in shifts:
            grey = sample_points(fine_mr, in_mr + shift)
            correlations.append(trabecular_correlation(hu, grey))
        best = shifts[int(np.argmax(correlations))]
        true_centre = truth.transforms[bone].TransformPoint(centre.tolist())
        offset = np.subtract(own[bone].TransformPoint(centre.tolist()), true_centre)
        error = {"before_mm": np.linalg.norm(offset), "after_mm": np.linalg.norm(offset + best)}
        rows.append({"knee_id": knee["knee_id"], "bone": bone} | error)
    return pd.DataFrame(rows)


def propagation(rows: pd.DataFrame, run: Path, folds: pd.DataFrame, seed: int) -> dict:
    """By displacement: ICC with the reference at 0 mm, and of a ridge trained on the displaced."""
    names = list(BIOMARKERS)
    usable = rows[rows["flag"] == ""]
    whole = usable.pivot(index=KEYS, columns="variant", values=names).dropna()
    data = patches.load_patches(run / "patches")
    keys = whole.reset_index()[KEYS].droplevel(1, axis=1)
    order = data.table.reset_index().merge(keys, on=KEYS)
    whole, picked = whole.loc[pd.MultiIndex.from_frame(order[KEYS])], order["index"].to_numpy()
    features = ct_features(data.ct[picked].astype(np.float32), data.voi[picked])
    subjects = order["subject_id"].to_numpy(str)
    fold = folds.set_index("subject_id")["fold"].loc[subjects].to_numpy()
    aligned, variants = whole.xs("0.0", axis=1, level=1)[names].to_numpy(), {}
    for name in whole.columns.levels[1]:
        moved = whole.xs(name, axis=1, level=1)[names].to_numpy()
        predicted = np.empty_like(moved)
        for k in np.unique(fold):
            t = fold != k
            predicted[~t] = ridge_estimates(features[t], moved[t], subjects[t], features[~t])
        rng, by_biomarker = np.random.default_rng(seed), {}
        reference = agreement.bootstrap_icc(aligned, moved, subjects, rng)
        for j, biomarker in enumerate(names):
            columns = aligned[:, [j]], moved[:, [j]]
            by_biomarker[biomarker] = agreement.bootstrap_icc(*columns, subjects, rng)
        variants[name] = {
            "reference": reference,
            "by_biomarker": by_biomarker,
            "bias": dict(zip(names, (moved - aligned).mean(0), strict=True)),
            "ridge": agreement.bootstrap_icc(moved, predicted, subjects, rng),
        }
    return {
        "n_patches": len(whole),
        "n_knees": order["knee_id"].nunique(),
        "lost": int(len(rows) / rows["variant"].nunique() - len(whole)),
        "variants": variants,
    }


def kernel_summary(rows: pd.DataFrame) -> dict:
    """Median over patches of contrast and biomarkers over those of the direct scan."""
    values = ["contrast", *BIOMARKERS]
    usable = rows[rows["flag"] == ""]
    wide = usable.pivot(index=["knee_id", "patch_id"], columns="variant", values=values).dropna()
    ratios = {}
    for kernel in KERNELS:
        ratios[kernel] = {v: float((wide[v][kernel] / wide[v]["direct"]).median()) for v in values}
    return {"n_patches": len(wide), "ratio_to_direct": ratios}


def refinement_summary(rows: pd.DataFrame) -> dict:
    """Error at patch centres by bone, before and after."""
    found = {}
    for bone, group in rows.groupby("bone"):
        found[bone] = {}
        for column in ("before_mm", "after_mm"):
            values = group[column]
            found[bone][column] = {"median": values.median(), "p95": values.quantile(0.95)}
        found[bone]["n_patches"] = len(group)
        found[bone]["share_better"] = float((group["after_mm"] < group["before_mm"]).mean())
    return found


def main() -> None:
    """Measure every knee, summarise, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("--jobs", type=int, default=2)
    given = parser.parse_args()
    run, seed = given.run, Run(given.run).results("cohort")["seed"]
    knees = read_manifest(run / "cohort" / "simulated.csv")
    people = draw_subjects(load_protocol(), len(knees), seed)
    people = people.set_index("knee_id", drop=False)
    cut = patches.load_table(run / "patches")["knee_id"].unique()
    usable = knees[knees["knee_id"].isin(cut)].to_dict("records")
    tasks = []
    for number, knee in enumerate(usable):
        person = people.loc[knee["knee_id"]].to_dict()
        detailed = number < N_DETAILED
        tasks.append((run, knee, person, detailed, seed))
    parts = list(run_tasks(one_knee, tasks, given.jobs))
    rows = {}
    for name in ("displaced", "kernels", "refinement"):
        rows[name] = pd.concat([part[name] for part in parts if name in part])
    folds = read_splits(splits_path(run / "cohort" / "simulated.csv"), knees)
    found = {
        "seed": seed,
        "displaced": propagation(rows["displaced"], run, folds, seed),
        "kernels": kernel_summary(rows["kernels"]),
        "refinement": refinement_summary(rows["refinement"]),
        "protocol_sha256": protocol_sha256(),
        "git_commit": git_commit(),
    }
    write_json(OUT, found)


if __name__ == "__main__":
    main()
