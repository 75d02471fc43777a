"""Does synthesis help the registration? The MR itself against CT-like images made from it.

    python benchmarks/registration_ablation.py --folder runs/stress --train 8 --test 4

Each part of the paper's CycleGAN is switched off in turn. The knees are those of the stress set
(another seed than the study's): the last `--train` train the networks, the first `--test` are
registered. `paired` trains on pairs that the direct registration aligned, without ground truth.
Writes docs/results/registration_ablation.json: by condition and arm the TRE after mutual
information with the arm's image, the TRE after the last stage (the trabeculae of the MR itself;
`polished`), the Dice of bone masks found in the synthetic CT, and seconds.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import SimpleITK as sitk
import torch
from registration_stress import MAX_FLEXION_DEG, SEED, degrade, read_pair, simulate
from synthesis import (
    SLICE_MM,
    Configuration,
    ct_beside_mr,
    grey_slices,
    synthetic_ct,
    train_synthesis,
)

from ctsma.common import BONES, InputError
from ctsma.files import write_json
from ctsma.registration import (
    bone_masks,
    failure_reason,
    isotropic,
    register_knee,
    target_registration_error_mm,
)
from ctsma.registration.stages import TRABECULAE_SPACING_MM, align_trabeculae, bone_depths_mm
from ctsma.registration.trabeculae import highpass, interior
from kneesim import Truth, protocol_sha256, read_truth

STEPS = 200  # half a minute on one core
CONFIGURATIONS = {
    "cyclegan": Configuration(steps=STEPS),
    "cyclegan_no_edges": Configuration(edges=False, steps=STEPS),
    "cyclegan_no_information": Configuration(information=False, steps=STEPS),
    "paired": Configuration(paired=True, steps=STEPS),
}
# Condition of the test images: condition of the training images.
CONDITIONS = {"dark_marrow": "dark_marrow", "plain": "plain", "metal": "plain", "partial": "plain"}
DARK_SHARE = 0.15  # of the marrow's grey value remains, as with fat saturation (design choice)
OUT = Path(__file__).parents[1] / "docs" / "results" / "registration_ablation.json"


def labels_beside_mr(grid: sitk.Image, truth: Truth) -> dict[str, np.ndarray]:
    """{bone: (z, y, x) bool} of the true bones on an MR's grid."""
    labels = {}
    for bone, value in BONES.items():
        share = sitk.Cast(truth.labels == value, sitk.sitkFloat32)
        inverse = truth.transforms[bone].GetInverse()
        on_grid = sitk.Resample(share, grid, inverse, sitk.sitkLinear)
        labels[bone] = sitk.GetArrayFromImage(on_grid) > 0.5
    return labels


def read_knee(root: Path, knee_id: str, condition: str) -> tuple[sitk.Image, sitk.Image, Truth]:
    """CT, MR and ground truth of a knee under a condition."""
    ct, mr = read_pair(root, knee_id)
    truth = read_truth(root, knee_id)
    if condition == "dark_marrow":
        labels = labels_beside_mr(mr, truth)
        factor = np.where(labels["femur"] | labels["tibia"], DARK_SHARE, 1.0).astype(np.float32)
        dark = sitk.GetImageFromArray(sitk.GetArrayFromImage(mr) * factor)
        dark.CopyInformation(mr)
        return ct, dark, truth
    rng = np.random.default_rng([SEED, int(knee_id[1:]), 50])
    ct, mr = degrade(condition, ct, mr, bone_masks(ct), truth.transforms, rng)
    return ct, mr, truth


def train_generators(root: Path, knees: list[str], condition: str) -> tuple[dict, dict, int]:
    """{arm: generator}, {arm: CPU seconds} and the number of aligned pairs, from training knees."""
    mr_slices, ct_slices, paired_mr, paired_ct = [], [], [], []
    for knee_id in knees:
        ct, mr, _ = read_knee(root, knee_id, condition)
        masks = bone_masks(ct)
        slices, grid = grey_slices(mr, "MR")
        mr_slices.append(slices)
        ct_slices.append(grey_slices(ct, "CT")[0])
        found = register_knee(ct, mr, masks, seed=0)
        if not found.flagged:
            paired_mr.append(slices)
            paired_ct.append(ct_beside_mr(ct, grid, found.transforms, bone_depths_mm(masks)))
    generators, seconds = {}, {}
    for name, configuration in CONFIGURATIONS.items():
        tic = time.process_time()
        if not configuration.paired:
            generators[name] = train_synthesis(mr_slices, ct_slices, configuration, seed=0)
        elif paired_mr:
            generators[name] = train_synthesis(paired_mr, paired_ct, configuration, seed=0)
        seconds[name] = time.process_time() - tic
    return generators, seconds, len(paired_mr)


def dice(image: sitk.Image, truth: Truth) -> dict[str, float]:
    """Dice of the bones found in a synthetic CT; 0 where the method for CT finds none."""
    try:
        found = sitk.GetArrayFromImage(bone_masks(image))
    except InputError:
        return dict.fromkeys(BONES, 0.0)
    values = {}
    for bone, true in labels_beside_mr(image, truth).items():
        mask = found == BONES[bone]
        values[bone] = float(2 * (mask & true).sum() / max(mask.sum() + true.sum(), 1))
    return values


def register(ct: sitk.Image, moving: sitk.Image, mr: sitk.Image, truth: Truth) -> dict:
    """TRE of mutual information with a moving image, and after the last stage on the MR."""
    tic = time.process_time()
    masks = bone_masks(ct)
    found = register_knee(ct, moving, masks, seed=0)
    row, metrics = {"cpu_seconds": time.process_time() - tic}, {}
    ct_fine, mr_fine = (highpass(isotropic(image, TRABECULAE_SPACING_MM)) for image in (ct, mr))
    for bone, depth_mm in bone_depths_mm(masks).items():
        points, true = truth.target_points_lps(bone), truth.transforms[bone]
        start = found.stages["per_bone"][bone]
        end, metrics[bone] = align_trabeculae(interior(ct_fine, depth_mm, 0), mr_fine, start)
        for kind, transform in (("tre", start), ("polished", end.transform)):
            errors_mm = target_registration_error_mm(transform, true, points)
            row[f"{kind}_{bone}"] = float(errors_mm.mean())
    return row | {"flagged": failure_reason(metrics, 0.0)}


def one_knee(root: Path, knee_id: str, condition: str, generators: dict) -> list[dict]:
    """One row per arm: the MR, the MR as coarse as the synthetic images, each generator."""
    ct, mr, truth = read_knee(root, knee_id, condition)
    images = {"mr": mr, "mr_1_mm": isotropic(mr, SLICE_MM)}
    images |= {name: synthetic_ct(generator, mr) for name, generator in generators.items()}
    rows = []
    for arm, image in images.items():
        row = {"knee_id": knee_id, "condition": condition, "arm": arm}
        if arm in generators:
            row |= {f"dice_{bone}": value for bone, value in dice(image, truth).items()}
        rows.append(row | register(ct, image, mr, truth))
    return rows


def summary(rows: list[dict]) -> dict:
    """By condition and arm: median and largest TRE, success, flags, Dice."""
    out = {}
    for condition, arm in dict.fromkeys((row["condition"], row["arm"]) for row in rows):
        part = [row for row in rows if (row["condition"], row["arm"]) == (condition, arm)]
        entry = {"n": len(part), "flagged": sum(row["flagged"] != "" for row in part)}
        for kind in ("tre", "polished"):
            largest = [max(row[f"{kind}_{bone}"] for bone in BONES) for row in part]
            entry[f"{kind}_success"] = float(np.mean(np.array(largest) < 1.0))
            for bone in BONES:
                values = [row[f"{kind}_{bone}"] for row in part]
                quantiles = {"median": float(np.median(values)), "max": float(np.max(values))}
                entry[f"{kind}_{bone}_mm"] = quantiles
        if "dice_femur" in part[0]:
            entry["dice"] = {
                bone: float(np.median([row[f"dice_{bone}"] for row in part])) for bone in BONES
            }
        out.setdefault(condition, {})[arm] = entry
    return out


def main() -> None:
    """Train, register, print and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=Path("runs/stress"))
    parser.add_argument("--train", type=int, default=8)
    parser.add_argument("--test", type=int, default=4)
    given = parser.parse_args()
    torch.set_num_threads(1)
    n_knees = given.train + given.test
    changes = {"flexion_difference": f"low: 0, high: {MAX_FLEXION_DEG:.0f}"}
    root = simulate(given.folder, n_knees, SEED, changes)
    knees = [f"k{k:04d}" for k in range(n_knees)]
    kept = given.folder / "ablation.jsonl"
    rows = [json.loads(line) for line in kept.read_text().splitlines()] if kept.exists() else []
    done = {(row["condition"], row["knee_id"]) for row in rows}
    for training_condition in dict.fromkeys(CONDITIONS.values()):
        conditions = [c for c, source in CONDITIONS.items() if source == training_condition]
        wanted = [(c, k) for c in conditions for k in knees[: given.test] if (c, k) not in done]
        if not wanted:
            continue
        generators, seconds, n_pairs = train_generators(
            root, knees[given.test :], training_condition
        )
        for condition, knee_id in wanted:
            new = one_knee(root, knee_id, condition, generators)
            for row in new:
                row["training_pairs"] = n_pairs
                row["training_cpu_seconds"] = seconds.get(row["arm"])
            rows += new
            with kept.open("a") as file:
                file.writelines(json.dumps(row) + "\n" for row in new)
    result = {
        "seed": SEED,
        "train_knees": given.train,
        "test_knees": given.test,
        "steps": STEPS,
        "protocol_sha256": protocol_sha256(),
        "arms": summary(rows),
        "rows": rows,
    }
    write_json(OUT, result)
    print(json.dumps(result["arms"], indent=1))


if __name__ == "__main__":
    main()
