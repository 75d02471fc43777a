"""Difficulty of the simulated cohort on several hundred knees, on which the protocol was frozen.

    python benchmarks/calibration.py --knees 300 --rescan 60

Only the patches are scanned, each with a margin, so that a knee costs a tenth of a whole one;
anatomy, microstructure, poses, scanners and measurements are those of the study. Writes
kneesim/calibration.json, which holds the protocol's hash; a test compares it. With --null, every
effect of disease is set to zero first: no classifier may then find the label. With --specimen, the
microstructure is compared with a micro-CT mask.
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

from ctsma import patches
from ctsma.biomarkers import morphometry
from ctsma.cache import map_knees
from ctsma.cohort import make_splits
from ctsma.common import BONES
from ctsma.files import write_json, write_text
from kneesim import (
    QUICK_FIELD_MM,
    Truth,
    bone_cube,
    draw_subjects,
    load_ground_truth,
    load_protocol,
    protocol_sha256,
)
from kneesim import knees as simulator
from kneesim.difficulty import difficulty
from kneesim.painting import COARSE_MM, Grid, make_grid, tissue_fields
from kneesim.patch_truth import write_ground_truth
from kneesim.protocol import CALIBRATION, PROTOCOL
from kneesim.subject import Subject, make_subject, tile_shape
from kneesim.truth import motion

# Field of view beyond a patch: kernels, rotation, seam of the k-space cut.
MARGIN_MM = {"ct": 6.0, "mr": 6.5, "mr_rescan": 6.5}
PATCH_MM = np.multiply(patches.CT_SHAPE, patches.CT_SPACING_MM)
SPECIMEN_MM = 0.0456  # voxel of the micro-CT cylinder (its header says 1 mm)
REACH_VOXELS = 32  # of the two-point correlation
# The label itself and what it depends on; everything else of `disease` is an effect.
NO_EFFECT = ("severity_", "kl_")


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
    """Scan and measure the patches of one knee; files as of `kneesim.extract_true_patches`.

    With `displaced_mm`, the MR of each bone is displaced by up to that much in a random direction.
    """
    constants, knee_id, side = load_protocol(protocol), knee["knee_id"], knee["side"]
    streams = [seed, zlib.crc32(knee_id.encode())]
    subject = make_subject(knee, constants, streams, None)
    scans = ["ct", "mr"]
    if int(knee_id[1:]) < rescans:
        scans.append("mr_rescan")
    poses, grids = simulator.settings(subject, constants, streams, scans, QUICK_FIELD_MM)
    drawn = {scan: simulator.draw_scan(scan, constants, streams) for scan in scans}
    labels = bone_labels(subject, poses["ct"], grids["ct"])
    table = patches.patch_centres(labels, side, per, np.random.default_rng([*streams, 7]))
    table.insert(0, "patch_id", np.arange(len(table)))
    table = table.assign(knee_id=knee_id, subject_id=knee["subject_id"])
    rng = np.random.default_rng([*streams, 8])
    shifts = displacements(displaced_mm, np.random.default_rng([*streams, 10]))

    stacks = {name: [] for name in (*scans, "voi")}
    for row in table.to_dict("records"):
        bone, centre = row["compartment"].split("_")[0], (row["x"], row["y"], row["z"])
        stacks["voi"].append(patches.trabecular_mask(labels, bone, centre, side))
        for scan in scans:
            to_scan = motion(poses[scan][bone] @ np.linalg.inv(poses["ct"][bone]))
            if scan == "mr":
                to_scan.SetTranslation(np.add(to_scan.GetTranslation(), shifts[bone]).tolist())
            grid = make_grid(
                PATCH_MM + MARGIN_MM[scan],
                grids[scan].spacing,
                grids[scan].direction,
                np.array(to_scan.TransformPoint(centre)),
            )
            image, _ = simulator.scan(subject, poses[scan], grid, scan, drawn[scan], rng)
            shape, spacing = patches.MR_SHAPE, patches.MR_SPACING_MM
            if scan == "ct":
                shape, spacing = patches.CT_SHAPE, patches.CT_SPACING_MM
            patch = patches.sample_patch(image, centre, side, shape, spacing, to_scan)
            stacks[scan].append(patch)

    arrays = {name: np.array(stack) for name, stack in stacks.items()}
    for scan in scans[1:]:
        prefix = "rescan_" if scan == "mr_rescan" else ""
        reference = patches.measure_reference(arrays[scan], arrays["voi"], "plate", prefix)
        table = table.assign(**reference)
    table = table.assign(**patches.threshold_baseline(arrays["ct"], arrays["voi"]))
    rng = np.random.default_rng([*streams, 6])
    cortex = cortical_hu(subject, poses["ct"], grids["ct"], drawn["ct"], labels, rng)
    table = table.assign(**cortex)
    write_text(folder / f"{knee_id}_table.csv", table.to_csv(index=False))
    np.savez(folder / f"{knee_id}.npz", **arrays)
    truth = Truth(
        transforms={},
        rescan_transforms={},
        labels=labels,
        targets={},
        ct_poses=poses["ct"],
        tile_seed=streams,
        tile_shape=tile_shape(constants),
        bones=subject.bones,
        cysts=subject.cysts,
    )
    rng = np.random.default_rng([*streams, 9])
    write_ground_truth(folder, folder, knee, truth, truths, rng)
    return {"n_patches": len(table), "n_flagged": int((table["flag"] != "").sum())}


def displacements(largest_mm: float, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """A shift (3,) in mm for every bone: any direction, length from 0 to the largest."""
    directions = rng.standard_normal((len(BONES), 3))
    lengths = rng.uniform(0, largest_mm, len(directions))
    factors = lengths / np.linalg.norm(directions, axis=1)
    return dict(zip(BONES, factors[:, None] * directions, strict=True))


def cortical_hu(
    subject: Subject,
    poses: dict,
    grid: Grid,
    drawn: dict,
    labels: sitk.Image,
    rng: np.random.Generator,
) -> dict[str, float]:
    """`ctsma.patches.cortical_hu` from a scan of the far ends of the bones alone."""
    columns, array = {}, sitk.GetArrayViewFromImage(labels)
    for bone, value in BONES.items():
        rows = patches.shaft_slices(labels, bone)
        first = np.array([0, 0, rows.start]) * grid.spacing
        size = (*grid.size[:2], rows.stop - rows.start)
        part = replace(grid, size=size, origin=grid.origin + grid.direction @ first)
        image, _ = simulator.scan(subject, poses, part, "ct", drawn, rng)
        hu = sitk.GetArrayViewFromImage(image)
        columns[f"cortical_hu_{bone}"] = patches.percentile_hu(hu, array[rows] == value)
    return columns


def bone_labels(subject: Subject, poses: dict, grid: Grid) -> sitk.Image:
    """Femur 1 and tibia 2 on the CT's own grid, from the distances that the scanners see."""
    upper, lower, small = np.moveaxis(tissue_fields(subject, poses, grid)[..., :3], -1, 0)
    bone = np.minimum(upper, lower)
    channels = np.stack([bone, upper - lower, small - bone - 1e-3], axis=-1)
    image = sitk.GetImageFromArray(channels, isVector=True)
    image.SetSpacing((COARSE_MM,) * 3)
    image.SetOrigin(grid.origin.tolist())
    fine = grid.image(np.zeros(grid.size[::-1], np.uint8))
    resampled = sitk.GetArrayFromImage(sitk.Resample(image, fine))
    distance, difference, other = np.moveaxis(resampled, -1, 0)
    labels = np.where(difference < 0, 1, 2)
    labels[(distance >= 0) | (other <= 0)] = 0
    return grid.image(labels.astype(np.uint8))


def without_effects(path: Path) -> Path:
    """Write the protocol with every effect of disease, age, sex and BMI on the knee at zero."""
    content = yaml.safe_load(PROTOCOL.read_text())
    for name, entry in content["disease"].items():
        if not name.startswith(NO_EFFECT) and "value" in entry:
            entry["value"] = 0.0
    return write_text(path, yaml.safe_dump(content))


def microstructure(path: Path, n_cubes: int = 5) -> dict:
    """Morphometry and two-point correlation of the specimen's centre, and means over cubes."""
    bone = sitk.GetArrayFromImage(sitk.ReadImage(str(path)))[25:-25, 25:-25, 25:-25] > 0
    cubes = [bone_cube(bone.mean(), bone.shape, SPECIMEN_MM, seed) for seed in range(n_cubes)]
    found = {}
    for name, volumes in (("specimen", [bone]), ("simulated", cubes)):
        described = [describe(volume) for volume in volumes]
        values = {}
        for key in described[0][0]:
            values[key] = float(np.mean([values_of[key] for values_of, _ in described]))
        two_point = np.mean([curve for _, curve in described], axis=0).tolist()
        found[name] = {"morphometry": values, "two_point": two_point}
    return found


def describe(bone: np.ndarray) -> tuple[dict, np.ndarray]:
    """Morphometry, and two-point correlation (mean of the three axes, 1 at distance 0)."""
    values = morphometry(bone, SPECIMEN_MM)
    del values["flag"]
    power = autocorrelation(bone - bone.mean())
    weight = np.maximum(autocorrelation(np.ones(bone.shape)), 1)
    ratio = power / weight
    curves = [np.moveaxis(ratio, axis, 0)[:REACH_VOXELS, 0, 0] for axis in range(3)]
    return values, np.mean(curves, axis=0) / curves[0][0]


def autocorrelation(array: np.ndarray) -> np.ndarray:
    """Sum over all pairs of voxels at each distance, without wrapping around."""
    padded = [2 * n for n in array.shape]
    spectrum = np.fft.rfftn(array, padded, axes=(0, 1, 2))
    return np.fft.irfftn(np.abs(spectrum) ** 2, padded, axes=(0, 1, 2))


def measure(folder: Path, given: argparse.Namespace, protocol: Path | None) -> dict:
    """Figures of one draw, by quantity."""
    subjects = draw_subjects(load_protocol(protocol), given.knees, given.seed)
    splits = make_splits(subjects, 5, given.seed)
    options = {"seed": given.seed, "per": given.per, "truths": given.truths}
    options |= {"rescans": given.rescan, "protocol": str(protocol) if protocol else None}
    rows = map_knees(scanned, subjects, folder, options, n_jobs=given.jobs, report=print_line)
    failed = rows[rows["error"] != ""]
    print("left out:", failed[["knee_id", "error"]].to_dict("records"))
    done = rows.loc[rows["error"] == "", "knee_id"]
    table = patches.collect_tables(folder, done).merge(load_ground_truth(folder), how="left")
    write_text(folder / patches.TABLE, table.to_csv(index=False))
    usable = patches.load_patches(folder)
    labels = subjects.set_index("knee_id")["oa"].loc[usable.table["knee_id"].unique()]
    return difficulty(usable, labels, splits, given.seed).to_dict("index")


def print_line(line: str, **_) -> None:
    """Progress of `map_knees`."""
    print(line, flush=True)


def measure_draw(given: argparse.Namespace) -> dict:
    """Measure and show one draw, with its setting and the protocol's hash."""
    folder = given.folder or Path(tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    protocol = without_effects(folder / "null.yaml") if given.null else given.protocol
    figures = measure(folder, given, protocol)
    for name, row in figures.items():
        interval = f"({row['ci_low']:.3f} to {row['ci_high']:.3f})"
        print(f"{name:28s}{row['value']:8.3f} {interval}  {row['source']}")
    setting = {n: getattr(given, n) for n in ("knees", "rescan", "seed", "per", "truths")}
    if given.null:
        return {"null": {**setting, "without_effects": figures}}
    return {"protocol_sha256": protocol_sha256(given.protocol), **setting, "figures": figures}


def main() -> None:
    """Measure, show and write; what the file holds besides is kept."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--knees", type=int, default=300)
    parser.add_argument("--rescan", type=int, default=60, help="knees with a second MR")
    parser.add_argument("--seed", type=int, default=1000)
    parser.add_argument("--per", type=int, default=4, help="patches per compartment")
    parser.add_argument("--truths", type=int, default=2, help="patches with ground truth per knee")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="kept: finished knees are reused")
    parser.add_argument("--null", action="store_true")
    parser.add_argument("--protocol", type=Path, help="another protocol file, to try")
    parser.add_argument("--out", type=Path, default=CALIBRATION)
    parser.add_argument("--specimen", type=Path, help="micro-CT mask")
    given = parser.parse_args()
    content = json.loads(given.out.read_text()) if given.out.exists() else {}
    if given.specimen:
        content["microstructure"] = microstructure(given.specimen)
    else:
        content |= measure_draw(given)
    write_json(given.out, content)


if __name__ == "__main__":
    main()
