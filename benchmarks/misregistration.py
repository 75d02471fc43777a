"""How a registration error spreads into biomarkers; what carrying the MR over costs; can a patch be refined?

    python benchmarks/misregistration.py runs/quick

On the simulated knees of a finished run, whose truth is known. Writes docs/results/registration_spread.json:

- `displaced`: each bone's MR displaced by 0 to 2 mm in a direction drawn for it, the same patches cut and measured: ICC
  of the reference with that at 0 mm; agreement of a ridge on the CT that was trained and judged by the displaced
  reference; beside it the run's own registration;
- `kernels`: MR carried onto the patch grid by three kernels, against an MR scanned on the patch grid itself: contrast
  (SD in the trabecular region over that of the direct scan) and the biomarkers' ratio;
- `refinement`: every patch shifted, by up to 0.3 mm in each direction, to where its own trabeculae match best: error at
  its centre before and after.
"""

import argparse
import zlib
from itertools import product
from pathlib import Path

import joblib
import numpy as np
import pandas as pd
import SimpleITK as sitk
from registration_stress import after, read_pair

from ctsma import agreement, cohort, distillation, patches, registration, simulation
from ctsma.cohort import BIOMARKERS, BONES
from ctsma.registration.quality import carried, sampled
from ctsma.registration.trabeculae import matched, trabeculae
from ctsma.simulation import knees as scans
from ctsma.simulation.painting import Grid
from ctsma.simulation.subject import make_subject

SIZES_MM = (0.0, 0.25, 0.5, 1.0, 2.0)
KERNELS = {"linear": sitk.sitkLinear, "B-spline": sitk.sitkBSpline, "Lanczos": sitk.sitkLanczosWindowedSinc}
N_REFINED, REACH_MM, STEP_MM, BORDER = 8, 0.3, 0.5, 12  # knees for the dear parts; of a refinement; a scan's margin
MR_GRID = patches.MR_SHAPE, patches.MR_SPACING_MM
OUT = Path(__file__).parents[1] / "docs" / "results" / "registration_spread.json"


def one_knee(run: Path, knee: dict, person: dict, dear: bool, seed: int) -> dict[str, pd.DataFrame]:
    """Rows of every part for the usable patches of one knee."""
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    table = pd.read_csv(run / "patches" / f"{knee['knee_id']}_table.csv", dtype={"knee_id": "str", "subject_id": "str"})
    with np.load(run / "patches" / f"{knee['knee_id']}.npz") as stored:
        voi, ours = stored["voi"], stored["mr"].astype(np.float32)
    kept = table["flag"].isna().to_numpy()
    table, voi, ours = table[kept], voi[kept], ours[kept]
    ct, mr = read_pair(run / "cohort", knee["knee_id"])
    truth = simulation.read_truth(run / "cohort", knee["knee_id"])
    rng = np.random.default_rng([seed, zlib.crc32(knee["knee_id"].encode())])
    directions = {bone: v / np.linalg.norm(v) for bone, v in zip(BONES, rng.standard_normal((2, 3)), strict=True)}
    stacks = {}
    for size in SIZES_MM:
        moved = {b: after(shift(size * d), truth.transforms[b]) for b, d in directions.items()}
        stacks[size] = np.array([patches.cut(mr, c, knee["side"], *MR_GRID, moved[b]) for b, c in places(table)])
    found = {"displaced": pd.concat([rows_of(table, s, voi, str(size)) for size, s in stacks.items()])}
    found["displaced"] = pd.concat([found["displaced"], rows_of(table, ours, voi, "registration")])
    if dear:
        found["kernels"] = carried_over(table, voi, mr, truth, knee, person, seed)
        found["refinement"] = refined(table, ct, mr, truth, knee, run / "registration")
    return found


def places(table: pd.DataFrame) -> list[tuple[str, tuple]]:
    """(bone, centre in LPS mm) of every patch."""
    return [(r["compartment"].split("_")[0], (r["x"], r["y"], r["z"])) for r in table.to_dict("records")]


def shift(millimetres: np.ndarray) -> sitk.Euler3DTransform:
    """A pure translation as a rigid transform."""
    moved = sitk.Euler3DTransform()
    moved.SetTranslation([float(v) for v in millimetres])
    return moved


def rows_of(table: pd.DataFrame, mr: np.ndarray, voi: np.ndarray, name: str) -> pd.DataFrame:
    """Measured biomarkers of a stack of MR patches."""
    measured = patches.measured(mr, voi, "plate", "")
    return table[["knee_id", "subject_id", "patch_id"]].assign(variant=name, **measured)


def carried_over(table, voi, mr: sitk.Image, truth, knee: dict, person: dict, seed: int) -> pd.DataFrame:
    """Contrast and biomarkers of every kernel, and of the MR scanned on the patch grid itself (variant "direct")."""
    constants, streams = simulation.load_protocol(), [seed, zlib.crc32(knee["knee_id"].encode())]
    subject = make_subject(person, constants, streams, None)
    poses, _ = scans.settings(subject, constants, streams, ["ct", "mr"], simulation.QUICK_FIELD_MM)
    drawn, rng = scans.draw_scan("mr", constants, streams), np.random.default_rng([*streams, 99])
    stacks = {name: [] for name in (*KERNELS, "direct")}
    for bone, centre in places(table):
        move = truth.transforms[bone]
        grid = patches.patch_grid(centre, knee["side"], *MR_GRID)
        for name, kernel in KERNELS.items():
            stacks[name].append(sitk.GetArrayFromImage(sitk.Resample(mr, grid, move, kernel, 0.0, sitk.sitkFloat32)))
        wide = patches.patch_grid(
            centre, knee["side"], np.add(patches.MR_SHAPE, (0, 2 * BORDER, 2 * BORDER)), MR_GRID[1]
        )
        turn = np.reshape(move.GetMatrix(), (3, 3)) @ np.reshape(wide.GetDirection(), (3, 3))
        place = np.array(move.TransformPoint(wide.GetOrigin()))
        image, _ = scans.scan(
            subject, poses["mr"], Grid(wide.GetSize(), wide.GetSpacing(), turn, place), "mr", drawn, rng
        )
        stacks["direct"].append(sitk.GetArrayFromImage(image)[:, BORDER:-BORDER, BORDER:-BORDER].astype(np.float32))
    parts = []
    for name, stack in stacks.items():
        contrast = [float(p[v].std() / p[v].mean()) for p, v in zip(stack, voi, strict=True)]
        parts.append(rows_of(table, np.array(stack), voi, name).assign(contrast=contrast))
    return pd.concat(parts)


def refined(table, ct: sitk.Image, mr: sitk.Image, truth, knee: dict, folder: Path) -> pd.DataFrame:
    """TRE at every patch's centre before and after the patch alone went where its trabeculae match best."""
    own, rows = registration.read_transforms(folder, knee["knee_id"]), []
    fine = [trabeculae(registration.isotropic(image, STEP_MM)) for image in (ct, mr)]
    shape = [round(n * s / STEP_MM) for n, s in zip(*MR_GRID, strict=True)]
    steps = np.linspace(-REACH_MM, REACH_MM, 7)
    for bone, centre in places(table):
        points = patches.grid_points(patches.patch_grid(centre, knee["side"], shape, [STEP_MM] * 3)).reshape(-1, 3)
        hu, there = sampled(fine[0], points), carried(own[bone], points)
        shifts = sorted(product(steps, repeat=3), key=np.linalg.norm)  # of equal ones the nearest
        best = shifts[int(np.argmax([matched(hu, sampled(fine[1], there + shift)) for shift in shifts]))]
        off = np.subtract(own[bone].TransformPoint(centre), truth.transforms[bone].TransformPoint(centre))
        error = {"before_mm": np.linalg.norm(off), "after_mm": np.linalg.norm(off + best)}
        rows.append({"knee_id": knee["knee_id"], "bone": bone} | error)
    return pd.DataFrame(rows)


def spread(rows: pd.DataFrame, run: Path, folds: pd.DataFrame, seed: int) -> dict:
    """By displacement: ICC with the reference at 0 mm, and of a ridge that knows the displaced reference alone."""
    keys = ["knee_id", "subject_id", "patch_id"]
    whole = rows[rows["flag"] == ""].pivot(index=keys, columns="variant", values=list(BIOMARKERS)).dropna()
    data = patches.load_patches(run / "patches")
    order = data.table.reset_index().merge(whole.reset_index()[keys].droplevel(1, axis=1), on=keys)
    whole, picked = whole.loc[pd.MultiIndex.from_frame(order[keys])], order["index"].to_numpy()
    features = distillation.ct_features(data.ct[picked].astype(np.float32), data.voi[picked])
    people = order["subject_id"].to_numpy(str)
    fold = folds.set_index("subject_id")["fold"].loc[people].to_numpy()
    aligned, found = whole.xs("0.0", axis=1, level=1)[list(BIOMARKERS)].to_numpy(), {}
    for name in whole.columns.levels[1]:
        moved, guess = whole.xs(name, axis=1, level=1)[list(BIOMARKERS)].to_numpy(), np.empty_like(aligned)
        for k in np.unique(fold):
            t = fold != k
            guess[~t] = distillation.hu_regression(features[t], moved[t], people[t], features[~t])
        rng = np.random.default_rng(seed)
        found[name] = {
            "reference": agreement.bootstrap_icc(aligned, moved, people, rng),
            "by_biomarker": {
                b: agreement.bootstrap_icc(aligned[:, [j]], moved[:, [j]], people, rng)
                for j, b in enumerate(BIOMARKERS)
            },
            "bias": dict(zip(BIOMARKERS, (moved - aligned).mean(0), strict=True)),
            "ridge": agreement.bootstrap_icc(moved, guess, people, rng),
        }
    counts = {"n_patches": len(whole), "n_knees": order["knee_id"].nunique()}
    return counts | {"lost": int(len(rows) / rows["variant"].nunique() - len(whole)), "variants": found}


def kernel_summary(rows: pd.DataFrame) -> dict:
    """Median over patches of contrast and biomarkers over those of the direct scan."""
    keys, values = ["knee_id", "patch_id"], ["contrast", *BIOMARKERS]
    wide = rows[rows["flag"] == ""].pivot(index=keys, columns="variant", values=values).dropna()
    ratio = {k: {v: float((wide[v][k] / wide[v]["direct"]).median()) for v in values} for k in KERNELS}
    return {"n_patches": len(wide), "ratio_to_direct": ratio}


def summary(parts: list[dict], run: Path, knees: pd.DataFrame, seed: int) -> dict:
    """What is written."""
    rows = {n: pd.concat([p[n] for p in parts if n in p]) for n in ("displaced", "kernels", "refinement")}
    folds = cohort.read_splits(cohort.splits_path(run / "cohort" / "simulated.csv"), knees)
    refinement = {
        bone: {c: {"median": g[c].median(), "p95": g[c].quantile(0.95)} for c in ("before_mm", "after_mm")}
        | {"n_patches": len(g), "share_better": float((g["after_mm"] < g["before_mm"]).mean())}
        for bone, g in rows["refinement"].groupby("bone")
    }
    found = {"displaced": spread(rows["displaced"], run, folds, seed), "kernels": kernel_summary(rows["kernels"])}
    about = {"protocol_sha256": simulation.protocol_sha256(), "git_commit": cohort.provenance.git_commit()}
    return {"seed": seed} | found | {"refinement": refinement} | about


def main() -> None:
    """Measure every knee, summarise, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--jobs", type=int, default=2)
    given = parser.parse_args()
    knees = cohort.read_manifest(given.run / "cohort" / "simulated.csv")
    seed = cohort.Run(given.run, "quick", 0).results("cohort")["seed"]
    people = simulation.draw_subjects(simulation.load_protocol(), len(knees), seed).set_index("knee_id", drop=False)
    usable = [k for k in knees.to_dict("records") if (given.run / "patches" / f"{k['knee_id']}_table.csv").exists()]
    run = joblib.delayed(one_knee)
    tasks = [run(given.run, k, people.loc[k["knee_id"]].to_dict(), n < N_REFINED, seed) for n, k in enumerate(usable)]
    with joblib.parallel_config(backend="loky", n_jobs=given.jobs, inner_max_num_threads=1):
        parts = joblib.Parallel(verbose=5)(tasks)
    cohort.write_json(OUT, summary(parts, given.run, knees, seed))


if __name__ == "__main__":
    main()
