"""Does synthesis help registration? MR itself, against CT-like images made of it, each part switched off in turn.

    python benchmarks/registration_ablation.py --folder runs/stress --train 8 --test 4

Knees of the stress set (another seed than the study's): the last `--train` teach, the first `--test` are registered.
Networks learn on training subjects alone; `paired` learns from pairs that the direct registration aligned (no truth).
Writes docs/results/registration_ablation.json: per arm and condition the TRE after mutual information with the arm's
image, the TRE after the last stage (the trabeculae of the MR itself), Dice of bone masks found in the synthetic CT, and
seconds.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import SimpleITK as sitk
import torch
from registration_stress import FLEXION_DEG, SEED, read_pair, simulated, spoiled

from ctsma import cohort, simulation
from ctsma.registration import bone_masks, isotropic, reason_to_flag, register_knee, target_registration_error_mm
from ctsma.registration.stages import TRABECULAE, align_trabeculae, bone_depths_mm
from ctsma.registration.synthesis import SLICE_MM, Recipe, ct_beside_mr, grey_slices, learn_synthesis, synthetic_ct
from ctsma.registration.trabeculae import trabeculae

STEPS = 200  # half a minute on one core
RECIPES = {
    "cyclegan": Recipe(steps=STEPS),
    "cyclegan_no_edges": Recipe(edges=False, steps=STEPS),
    "cyclegan_no_information": Recipe(information=False, steps=STEPS),
    "paired": Recipe(paired=True, steps=STEPS),
}
CONDITIONS = {"dark_marrow": "dark_marrow", "plain": "plain", "metal": "plain", "partial": "plain"}  # learned on
DARK = 0.15  # of the marrow's grey is left, as by fat saturation (our choice)
OUT = Path(__file__).parents[1] / "docs" / "results" / "registration_ablation.json"


def labels_beside_mr(grid: sitk.Image, truth: simulation.Truth) -> dict[str, np.ndarray]:
    """{bone: (z, y, x) bool} of the true bones on an MR's grid."""
    inverse = {bone: t.GetInverse() for bone, t in truth.transforms.items()}
    parts = {b: sitk.Cast(truth.labels == v, sitk.sitkFloat32) for b, v in cohort.BONES.items()}
    return {
        b: sitk.GetArrayFromImage(sitk.Resample(part, grid, inverse[b], sitk.sitkLinear)) > 0.5
        for b, part in parts.items()
    }


def under(condition: str, root: Path, knee_id: str) -> tuple[sitk.Image, sitk.Image, simulation.Truth]:
    """CT, MR and truth of a knee under a condition."""
    ct, mr = read_pair(root, knee_id)
    truth = simulation.read_truth(root, knee_id)
    if condition == "dark_marrow":
        bone = np.logical_or(*labels_beside_mr(mr, truth).values())
        grey = sitk.GetImageFromArray(sitk.GetArrayFromImage(mr) * np.where(bone, DARK, 1.0).astype(np.float32))
        grey.CopyInformation(mr)
        return ct, grey, truth
    rng = np.random.default_rng([SEED, int(knee_id[1:]), 50])
    return *spoiled(condition, ct, mr, bone_masks(ct), truth.transforms, rng), truth


def lessons(root: Path, knees: list[str], condition: str) -> tuple[list, list, list]:
    """Slices of training MRs, of CTs, of CTs beside their MRs (without flagged knees)."""
    mrs, cts, pairs = [], [], []
    for knee_id in knees:
        ct, mr, _ = under(condition, root, knee_id)
        (mr_slices, grid), masks = grey_slices(mr, "MR"), bone_masks(ct)
        mrs.append(mr_slices)
        cts.append(grey_slices(ct, "CT")[0])
        found = register_knee(ct, mr, masks, seed=0)
        if not found.flagged:
            beside = ct_beside_mr(ct, grid, found.transforms, bone_depths_mm(masks))
            pairs.append((mr_slices, beside))
    return mrs, cts, pairs


def learned(root: Path, knees: list[str], condition: str) -> tuple[dict, dict, int]:
    """{arm: generator}, {arm: CPU seconds of learning} and the number of aligned pairs, from training knees alone."""
    mrs, cts, pairs = lessons(root, knees, condition)
    generators, seconds = {}, {}
    for name, recipe in RECIPES.items():
        tic = time.process_time()
        sides = tuple(map(list, zip(*pairs, strict=True))) if recipe.paired and pairs else (mrs, cts)
        if not recipe.paired or pairs:
            generators[name] = learn_synthesis(*sides, recipe, seed=0)
        seconds[name] = time.process_time() - tic
    return generators, seconds, len(pairs)


def dice(made: sitk.Image, truth: simulation.Truth) -> dict[str, float]:
    """Dice of the bones found in a synthetic CT; 0 where the route that works on a CT finds none."""
    try:
        found = sitk.GetArrayFromImage(bone_masks(made))
    except cohort.InputFault:
        return dict.fromkeys(cohort.BONES, 0.0)
    true = labels_beside_mr(made, truth)
    masks = {b: found == v for b, v in cohort.BONES.items()}
    return {b: float(2 * (m & true[b]).sum() / max(m.sum() + true[b].sum(), 1)) for b, m in masks.items()}


def registered(ct, moving, mr, truth) -> dict:
    """TRE of mutual information with a moving image, and after the last stage on the MR itself; flag and seconds."""
    tic, masks = time.process_time(), bone_masks(ct)
    found, depths, checks = register_knee(ct, moving, masks, seed=0), bone_depths_mm(masks), {}
    row = {"cpu_seconds": time.process_time() - tic}
    fine = tuple(trabeculae(isotropic(image, TRABECULAE.spacing_mm)) for image in (ct, mr))
    for bone, transform in found.stage_transforms["per_bone"].items():
        points, true = truth.target_points_lps(bone), truth.transforms[bone]
        polished, checks[bone] = align_trabeculae(*fine, depths[bone], transform, 0, [], bone)
        row[f"tre_{bone}"] = float(target_registration_error_mm(transform, true, points).mean())
        row[f"polished_{bone}"] = float(target_registration_error_mm(polished, true, points).mean())
    return row | {"flagged": reason_to_flag(checks, 0.0)}


def one_knee(root: Path, knee_id: str, condition: str, generators: dict) -> list[dict]:
    """One row an arm: the MR itself, the MR as coarse as the synthetic images, each generator."""
    ct, mr, truth = under(condition, root, knee_id)
    moving = {"mr": mr, "mr_1_mm": isotropic(mr, SLICE_MM)} | {n: synthetic_ct(g, mr) for n, g in generators.items()}
    rows = []
    for arm, image in moving.items():
        found = {f"dice_{b}": v for b, v in dice(image, truth).items()} if arm in generators else {}
        rows.append({"knee_id": knee_id, "condition": condition, "arm": arm} | found | registered(ct, image, mr, truth))
    return rows


def summary(rows: list[dict]) -> dict:
    """Per condition and arm: median and worst TRE, success, flags, Dice."""
    out = {}
    for condition, arm in dict.fromkeys((r["condition"], r["arm"]) for r in rows):
        part = [r for r in rows if (r["condition"], r["arm"]) == (condition, arm)]
        entry = {"n": len(part), "flagged": sum(r["flagged"] != "" for r in part)}
        for kind in ("tre", "polished"):
            worst = [max(r[f"{kind}_{b}"] for b in cohort.BONES) for r in part]
            entry[f"{kind}_success"] = float(np.mean(np.array(worst) < 1.0))
            for b in cohort.BONES:
                values = [r[f"{kind}_{b}"] for r in part]
                entry[f"{kind}_{b}_mm"] = {"median": float(np.median(values)), "max": float(np.max(values))}
        if f"dice_{next(iter(cohort.BONES))}" in part[0]:
            entry["dice"] = {b: float(np.median([r[f"dice_{b}"] for r in part])) for b in cohort.BONES}
        out.setdefault(condition, {})[arm] = entry
    return out


def main() -> None:
    """Teach, register, show and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/stress"))
    parser.add_argument("--train", type=int, default=8)
    parser.add_argument("--test", type=int, default=4)
    given = parser.parse_args()
    torch.set_num_threads(1)
    n = given.train + given.test
    root = simulated(given.folder, n, SEED, {"flexion_difference": f"low: 0, high: {FLEXION_DEG:.0f}"})
    knees, kept = [f"k{k:04d}" for k in range(n)], given.folder / "ablation.jsonl"
    rows = [json.loads(line) for line in kept.read_text().splitlines()] if kept.exists() else []
    for learned_on in dict.fromkeys(CONDITIONS.values()):
        wanted = [(c, k) for c, source in CONDITIONS.items() if source == learned_on for k in knees[: given.test]]
        wanted = [w for w in wanted if w not in {(r["condition"], r["knee_id"]) for r in rows}]
        generators, seconds, taught = learned(root, knees[given.test :], learned_on) if wanted else ({}, {}, 0)
        for condition, knee_id in wanted:
            fresh = one_knee(root, knee_id, condition, generators)
            fresh = [row | {"pairs_taught": taught, "learning_cpu_seconds": seconds.get(row["arm"])} for row in fresh]
            rows += fresh
            with kept.open("a") as file:
                file.writelines(json.dumps(row) + "\n" for row in fresh)
    found = {"seed": SEED, "train_knees": given.train, "test_knees": given.test, "steps": STEPS}
    found |= {"protocol_sha256": simulation.protocol_sha256(), "arms": summary(rows), "rows": rows}
    cohort.write_json(OUT, found)
    print(json.dumps(found["arms"], indent=1))


if __name__ == "__main__":
    main()
