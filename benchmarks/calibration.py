"""Difficulty of the simulated cohort on several hundred knees, by which the protocol was calibrated and frozen.

    python benchmarks/calibration.py --knees 400

Only the patches are scanned, each with a margin: anatomy, microstructure, poses, scanners and measurements are those
of the study, and a knee costs a tenth. Writes ctsma/simulation/calibration.json, which holds the protocol's hash; a
test compares it. With --null, every disease effect is set to zero first: no classifier may then find the label.
"""

import argparse
import json
import tempfile
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import SimpleITK as sitk
import yaml

from ctsma import biomarkers, cohort, patches, simulation
from ctsma.difficulty import difficulty
from ctsma.simulation import knees as scans
from ctsma.simulation.painting import COARSE_MM, make_grid, tissue_fields
from ctsma.simulation.protocol import PROTOCOL
from ctsma.simulation.subject import make_subject
from ctsma.simulation.truth import Truth, rigid_transform

MARGIN_MM = {"ct": 6.0, "mr": 6.5, "mr_rescan": 6.5}  # field of view beyond a patch: kernels, rotation, k-space seam
GRIDS = {"ct": (patches.CT_SHAPE, patches.CT_SPACING_MM), "mr": (patches.MR_SHAPE, patches.MR_SPACING_MM)}
SPECIMEN_MM = 0.0456  # voxel of the micro-CT cylinder (its header says 1 mm)
OUT = PROTOCOL.with_name("calibration.json")
KEPT = ("severity_", "kl_")  # the label itself and what it depends on; all else of `disease` is an effect


def scanned(
    knee: dict,
    folder: Path,
    *,
    seed: int,
    per: int,
    truths: int,
    rescans: int,
    protocol: str | None,
    displaced_mm: float = 0.0,
) -> dict:
    """Scan and measure the patches of one knee; files as `patches.true_patches` writes them.

    With `displaced_mm` every bone's MR is taken beside its place, by up to that much, in a direction drawn for it.
    """
    constants, streams = simulation.load_protocol(protocol), [seed, zlib.crc32(knee["knee_id"].encode())]
    subject, names = make_subject(knee, constants, streams, None), ["ct", "mr"]
    names += ["mr_rescan"] if int(knee["knee_id"][1:]) < rescans else []
    poses, grids = scans.settings(subject, constants, streams, names, simulation.QUICK_FIELD_MM)
    drawn = {name: scans.draw_scan(name, constants, streams) for name in names}
    labels = bone_labels(subject, poses["ct"], grids["ct"])
    table = patches.centres(labels, knee["side"], per, np.random.default_rng([*streams, 7]))
    table.insert(0, "patch_id", np.arange(len(table)))
    table = table.assign(knee_id=knee["knee_id"], subject_id=knee["subject_id"])
    arrays, rng = {name: [] for name in (*names, "voi")}, np.random.default_rng([*streams, 8])
    off = displacements(displaced_mm, np.random.default_rng([*streams, 10]))
    for row in table.to_dict("records"):
        bone, centre = row["compartment"].split("_")[0], (row["x"], row["y"], row["z"])
        arrays["voi"].append(patches.trabecular_region(labels, bone, centre, knee["side"]))
        for name in names:
            move = rigid_transform(poses[name][bone] @ np.linalg.inv(poses["ct"][bone]))
            if name == "mr":
                move.SetTranslation(np.add(move.GetTranslation(), off[bone]).tolist())
            field = np.multiply(patches.CT_SHAPE, patches.CT_SPACING_MM) + MARGIN_MM[name]
            grid = make_grid(field, grids[name].spacing, grids[name].direction, np.array(move.TransformPoint(centre)))
            image, _ = scans.scan(subject, poses[name], grid, name, drawn[name], rng)
            arrays[name].append(patches.cut(image, centre, knee["side"], *GRIDS["ct" if name == "ct" else "mr"], move))
    arrays = {name: np.array(stack) for name, stack in arrays.items()}
    for name in names[1:]:
        table = table.assign(**patches.measured(arrays[name], arrays["voi"], "plate", name[3:] and "rescan_"))
    ends = shafts(subject, poses["ct"], grids["ct"], drawn["ct"], labels, np.random.default_rng([*streams, 6]))
    table = table.assign(**patches.naive(arrays["ct"], arrays["voi"]), **ends)
    table.to_csv(folder / f"{knee['knee_id']}_table.csv", index=False)
    np.savez(folder / f"{knee['knee_id']}.npz", **arrays)
    truth = Truth({}, {}, labels, {}, poses["ct"], subject.tile, subject.bones, subject.cysts)
    patches.write_truth(folder, folder, knee, truth, truths, np.random.default_rng([*streams, 9]))
    return {"n_patches": len(table), "n_flagged": int((table["flag"] != "").sum())}


def displacements(largest_mm: float, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """A shift (3,) in mm for every bone: any direction, length from 0 to the largest."""
    directions = rng.standard_normal((len(cohort.BONES), 3))
    sizes = rng.uniform(0, largest_mm, len(directions)) / np.linalg.norm(directions, axis=1)
    return dict(zip(cohort.BONES, sizes[:, None] * directions, strict=True))


def shafts(subject, poses: dict, grid, drawn: dict, labels: sitk.Image, rng: np.random.Generator) -> dict:
    """What `patches.cortex_hu` reads from a whole CT, from a scan of the far ends of the bones alone."""
    found, array = {}, sitk.GetArrayViewFromImage(labels)
    for bone, value in cohort.BONES.items():
        rows = patches.shaft_slices(labels, bone)
        origin = grid.origin + grid.direction @ (np.array([0, 0, rows.start]) * grid.spacing)
        part = replace(grid, size=(*grid.size[:2], rows.stop - rows.start), origin=origin)
        image, _ = scans.scan(subject, poses, part, "ct", drawn, rng)
        found[f"cortex_{bone}_hu"] = patches.densest(sitk.GetArrayViewFromImage(image), array[rows] == value)
    return found


def bone_labels(subject, poses: dict, grid) -> sitk.Image:
    """Femur 1 and tibia 2 on the CT's own grid, from the distances that the scanners see."""
    coarse = tissue_fields(subject, poses, grid)
    bone = coarse[:2].min(axis=0)
    named = np.stack([bone, coarse[0] - coarse[1], coarse[2] - bone - 1e-3], axis=-1)
    image = sitk.GetImageFromArray(named, isVector=True)
    image.SetSpacing((COARSE_MM,) * 3)
    image.SetOrigin(grid.origin.tolist())
    fine = grid.image(np.zeros(grid.size[::-1], np.uint8))
    distance, difference, other = np.moveaxis(sitk.GetArrayFromImage(sitk.Resample(image, fine)), -1, 0)
    return grid.image(np.where((distance < 0) & (other > 0), np.where(difference < 0, 1, 2), 0).astype(np.uint8))


def without_effects(path: Path) -> Path:
    """Write the protocol with every effect of disease, age, sex and BMI on the knee at zero."""
    content = yaml.safe_load(PROTOCOL.read_text())
    for name, entry in content["disease"].items():
        if not name.startswith(KEPT) and "value" in entry:
            entry["value"] = 0.0
    path.write_text(yaml.safe_dump(content))
    return path


def microstructure(path: Path, n_cubes: int = 5) -> dict:
    """Morphometry and two-point correlation of the micro-CT cylinder's centre, and the mean of simulated cubes."""
    whole = sitk.GetArrayFromImage(sitk.ReadImage(str(path))) > 0
    bone = whole[25:-25, 25:-25, 25:-25]  # the cylinder's edge is left out
    cubes = [simulation.bone_cube(bone.mean(), bone.shape, SPECIMEN_MM, seed) for seed in range(n_cubes)]
    found = {"specimen": [described(bone)], "simulated": [described(cube) for cube in cubes]}
    return {
        name: {
            "morphometry": {k: float(np.mean([m[k] for m, _ in parts])) for k in parts[0][0]},
            "two_point": np.mean([curve for _, curve in parts], axis=0).tolist(),
        }
        for name, parts in found.items()
    }


def described(bone: np.ndarray, reach: int = 32) -> tuple[dict, np.ndarray]:
    """Morphometry and two-point correlation (mean of the three axes, 1 at 0) to `reach` voxels."""
    values = biomarkers.morphometry(bone, SPECIMEN_MM)
    padded = [2 * n for n in bone.shape]
    power, weight = (
        np.fft.irfftn(np.abs(np.fft.rfftn(a, padded, axes=(0, 1, 2))) ** 2, padded, axes=(0, 1, 2))
        for a in (bone - bone.mean(), np.ones(bone.shape))
    )
    curves = [np.moveaxis(power / np.maximum(weight, 1), axis, 0)[:reach, 0, 0] for axis in range(3)]
    return {k: v for k, v in values.items() if k != "flag"}, np.mean(curves, axis=0) / curves[0][0]


def measure(folder: Path, given: argparse.Namespace, protocol: Path | None) -> dict:
    """Figures of one draw, by quantity."""
    subjects = simulation.draw_subjects(simulation.load_protocol(protocol), given.knees, given.seed)
    splits = cohort.make_splits(subjects, 5, given.seed)
    options = {"seed": given.seed, "per": given.per, "truths": given.truths, "rescans": given.rescan}
    options |= {"protocol": protocol and str(protocol)}
    found = cohort.map_knees(scanned, subjects, folder, options, n_jobs=given.jobs, report=print)
    print("left out:", found.loc[found["error"] != "", ["knee_id", "error"]].to_dict("records"))
    measured = patches.load_table(folder)
    known = patches.with_truth(patches.load_patches(folder), patches.load_truth(folder))
    labels = subjects.set_index("knee_id")["oa"].loc[measured["knee_id"].unique()]
    return difficulty(known, measured, labels, splits, folder / "models", given.seed, given.jobs).to_dict("index")


def main() -> None:
    """Measure, show, and (unless --out is empty) write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("--knees", 400), ("--rescan", 100), ("--seed", 1000), ("--per", 4), ("--truths", 2)):
        parser.add_argument(name, type=int, default=default)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="kept between calls: finished knees are reused")
    parser.add_argument("--null", action="store_true")
    parser.add_argument("--protocol", type=Path, help="another protocol file, to try")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--specimen", type=Path, help="micro-CT mask to compare the microstructure with")
    given = parser.parse_args()
    content = json.loads(given.out.read_text()) if given.out.exists() else {}
    if given.specimen:
        content["microstructure"] = microstructure(given.specimen)
    else:
        content |= drawn_figures(given)
    cohort.write_json(given.out, content)


def drawn_figures(given: argparse.Namespace) -> dict:
    """Measure and show one draw, with its setting and the protocol's hash."""
    folder = given.folder or Path(tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    protocol = without_effects(folder / "null.yaml") if given.null else given.protocol
    found = measure(folder, given, protocol)
    for name, row in found.items():
        print(f"{name:28s}{row['value']:8.3f} ({row['ci_low']:.3f} to {row['ci_high']:.3f})  {row['source']}")
    setting = {name: getattr(given, name) for name in ("knees", "rescan", "seed", "per", "truths")}
    if given.null:
        return {"null": {**setting, "without_effects": found}}
    return {"protocol_sha256": simulation.protocol_sha256(given.protocol), **setting, "figures": found}


if __name__ == "__main__":
    main()
