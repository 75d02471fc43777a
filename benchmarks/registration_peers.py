"""How accurate are the tools that a user would choose instead? Same knees, images and run.

    python benchmarks/registration_peers.py runs/quick --knees 6

Needs the `bench` extra (antspyx, itk-elastix, picsl_greedy); a tool that is not installed is left
out and named. Whole-knee rigid with SimpleITK, ANTs, elastix and greedy; per bone with *true*
masks, 3 mm wider, from the whole-knee result of the same tool, with ANTs, elastix and greedy; ours
with the masks that it finds. `hard`: SNR 6, 3 mm slices and a cut field of view. Writes
docs/results/registration_peers.json: TRE per bone (median, p95, max over knees), CPU seconds, peak
memory, and the ratio of our median to that of each tool.
"""

import argparse
import json
import multiprocessing
import resource
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from registration_stress import degrade, read_pair

from ctsma.cohort import read_manifest
from ctsma.common import BONES
from ctsma.files import write_json
from ctsma.registration import bone_masks, isotropic, register_knee, target_registration_error_mm
from ctsma.registration.stages import starting_transforms
from kneesim import protocol_sha256, read_truth

WHOLE_KNEE_MM, MARGIN_MM = 1.0, 3.0  # voxel; of the masks of single bones
BONE_MM = {"ants": 0.8, "elastix": 0.8, "greedy": 0.6}  # voxel for single bones, as each tool asks
MODULES = {
    "ants": "ants",
    "elastix": "itk",
    "greedy": "picsl_greedy",
    "simpleitk": "SimpleITK",
    "ours": "ctsma",
}
VARIANTS = ("plain", "hard")
OUT = Path(__file__).parents[1] / "docs" / "results" / "registration_peers.json"


def simpleitk(fixed, moving, start, mask, folder) -> sitk.Transform:
    """Settings of the tutorial: Mattes metric, gradient descent, 20 % of voxels, three levels."""
    method = sitk.ImageRegistrationMethod()
    method.SetMetricAsMattesMutualInformation(50)
    method.SetMetricSamplingStrategy(method.RANDOM)
    method.SetMetricSamplingPercentage(0.2, 0)
    method.SetInterpolator(sitk.sitkLinear)
    method.SetOptimizerAsRegularStepGradientDescent(1.0, 1e-4, 200)
    method.SetOptimizerScalesFromPhysicalShift()
    method.SetShrinkFactorsPerLevel([4, 2, 1])
    method.SetSmoothingSigmasPerLevel([2, 1, 0])
    method.SmoothingSigmasAreSpecifiedInPhysicalUnitsOn()
    method.SetInitialTransform(start, inPlace=False)
    return method.Execute(fixed, moving)


def ants(fixed, moving, start, mask, folder) -> sitk.Transform:
    """antspyx `Rigid`: Mattes metric, four levels, seeded."""
    import ants as tool

    paths = write_images(folder, {"fixed": fixed, "moving": moving, "mask": mask})
    images = {name: tool.image_read(path) for name, path in paths.items()}
    initial = str(Path(folder) / "start.tfm")
    matrix = homogeneous(start)
    affine = sitk.AffineTransform(matrix[:3, :3].ravel().tolist(), matrix[:3, 3].tolist())
    sitk.WriteTransform(affine, initial)
    result = tool.registration(
        images["fixed"],
        images["moving"],
        "Rigid",
        initial_transform=[initial],
        mask=images.get("mask"),
        random_seed=1,
    )
    transforms = [sitk.ReadTransform(path) for path in reversed(result["fwdtransforms"])]
    return sitk.CompositeTransform(transforms)


def elastix(fixed, moving, start, mask, folder) -> sitk.Transform:
    """itk-elastix default rigid map, 1000 iterations; the start is applied to the MR beforehand."""
    import itk

    parameters = itk.ParameterObject.New()
    rigid_map = parameters.GetDefaultParameterMap("rigid", 4)
    rigid_map["MaximumNumberOfIterations"], rigid_map["RandomSeed"] = ["1000"], ["1"]
    for name in ("AutomaticTransformInitialization", "ErodeMask", "WriteResultImage"):
        rigid_map[name] = ["false"]
    parameters.AddParameterMap(rigid_map)
    margin = [int(20.0 / spacing) for spacing in fixed.GetSpacing()]  # 20 mm
    wide = sitk.ConstantPad(fixed, margin, margin)
    at_start = sitk.Resample(moving, wide, start, sitk.sitkBSpline, 0.0)
    paths = write_images(folder, {"fixed": fixed, "moving": at_start, "mask": mask})
    images = {}
    for name, path in paths.items():
        images[name] = itk.imread(path, itk.UC if name == "mask" else itk.F)
    method = itk.ElastixRegistrationMethod.New(images["fixed"], images["moving"])
    method.SetParameterObject(parameters)
    method.SetNumberOfThreads(1)
    if "mask" in images:
        method.SetFixedMask(images["mask"])
    method.SetLogToConsole(False)
    method.UpdateLargestPossibleRegion()
    result = method.GetTransformParameterObject().GetParameterMap(0)
    euler = sitk.Euler3DTransform()
    euler.SetComputeZYX(result.get("ComputeZYX", ["false"])[0] == "true")
    euler.SetCenter([float(v) for v in result["CenterOfRotationPoint"]])
    euler.SetParameters([float(v) for v in result["TransformParameters"]])
    return sitk.CompositeTransform([start, euler])


def greedy(fixed, moving, start, mask, folder) -> sitk.Transform:
    """picsl_greedy rigid, NMI, three levels, one thread."""
    from picsl_greedy import Greedy3D

    paths = write_images(folder, {"fixed": fixed, "moving": moving, "mask": mask})
    initial, out = str(Path(folder) / "start.mat"), str(Path(folder) / "out.mat")
    np.savetxt(initial, to_ras(homogeneous(start)))
    masked = f"-gm {paths['mask']}" if "mask" in paths else ""
    images = f"-i {paths['fixed']} {paths['moving']} {masked} -ia {initial}"
    Greedy3D().execute(f"{images} -a -dof 6 -m NMI -n 100x50x20 -threads 1 -o {out}")
    matrix = to_ras(np.loadtxt(out))
    return sitk.AffineTransform(matrix[:3, :3].ravel().tolist(), matrix[:3, 3].tolist())


TOOLS = {"simpleitk": simpleitk, "ants": ants, "elastix": elastix, "greedy": greedy}


def write_images(folder: str, images: dict[str, sitk.Image | None]) -> dict[str, str]:
    """Write the images that are there; returns their paths."""
    paths = {}
    for name, image in images.items():
        if image is not None:
            paths[name] = str(Path(folder) / f"{name}.nii.gz")
            sitk.WriteImage(image, paths[name])
    return paths


def homogeneous(transform: sitk.Transform) -> np.ndarray:
    """(4, 4) matrix of a linear transform."""
    matrix, origin = np.eye(4), np.array(transform.TransformPoint((0.0, 0.0, 0.0)))
    for axis in range(3):
        unit = np.eye(3)[axis].tolist()
        matrix[:3, axis] = np.subtract(transform.TransformPoint(unit), origin)
    matrix[:3, 3] = origin
    return matrix


def to_ras(matrix: np.ndarray) -> np.ndarray:
    """A (4, 4) matrix in LPS, in RAS (and back)."""
    flip = np.diag([-1.0, -1, 1, 1])
    return flip @ matrix @ flip


def register_with(tool: str, ct: sitk.Image, mr: sitk.Image, masks: sitk.Image, folder: str):
    """Transforms and CPU seconds of a tool by stage, from the same start as ours.

    Returns {stage: {bone: transform}} and {stage: seconds}; `masks` are used for single bones.
    """
    tic = time.process_time()
    start = sitk.Euler3DTransform(starting_transforms(ct, mr)[0][1])
    fixed, moving = isotropic(ct, WHOLE_KNEE_MM), isotropic(mr, WHOLE_KNEE_MM)
    whole = TOOLS[tool](fixed, moving, start, None, folder)
    stages = {"whole_knee": dict.fromkeys(BONES, whole)}
    seconds = {"whole_knee": time.process_time() - tic}
    if tool not in BONE_MM:
        return stages, seconds
    stages["per_bone"] = {}
    spacing_mm = BONE_MM[tool]
    for bone, value in BONES.items():
        depth_mm = sitk.SignedMaurerDistanceMap(masks == value, True, False, True)
        near = isotropic(sitk.Cast(depth_mm, sitk.sitkFloat32), spacing_mm) > -MARGIN_MM
        shape = sitk.LabelShapeStatisticsImageFilter()
        shape.Execute(near)
        box = shape.GetBoundingBox(1)
        fixed = sitk.RegionOfInterest(isotropic(ct, spacing_mm), box[3:], box[:3])
        near = sitk.RegionOfInterest(near, box[3:], box[:3])
        moving = isotropic(mr, spacing_mm)
        stages["per_bone"][bone] = TOOLS[tool](fixed, moving, whole, near, folder)
    seconds["per_bone"] = time.process_time() - tic
    return stages, seconds


def register_with_ours(ct: sitk.Image, mr: sitk.Image):
    """Our whole-knee stage and our result, as `register_with`; the masks count in the time."""
    tic = time.process_time()
    found = register_knee(ct, mr, bone_masks(ct), seed=0)
    stages = {"whole_knee": found.stages["whole_knee"], "per_bone": found.transforms}
    return stages, {"per_bone": time.process_time() - tic}


def one_run(tool: str, variant: str, root: Path, knee_id: str) -> list[dict]:
    """Rows (stage, bone, TRE, seconds, memory) of one tool on one knee, in its own process."""
    truth, (ct, mr) = read_truth(root, knee_id), read_pair(root, knee_id)
    if variant == "hard":
        rng = np.random.default_rng([9, int(knee_id[1:])])
        ct, mr = degrade("all", ct, mr, truth.labels, truth.transforms, rng)
    if tool == "ours":
        stages, seconds = register_with_ours(ct, mr)
    else:
        with tempfile.TemporaryDirectory() as folder:
            stages, seconds = register_with(tool, ct, mr, truth.labels, folder)
    memory_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    rows = []
    for stage, transforms in stages.items():
        for bone, transform in transforms.items():
            points, true = truth.target_points_lps(bone), truth.transforms[bone]
            error_mm = target_registration_error_mm(transform, true, points).mean()
            row = {"tool": tool, "variant": variant, "knee_id": knee_id, "stage": stage}
            row |= {"bone": bone, "tre_mm": float(error_mm), "memory_mb": memory_mb}
            rows.append(row | {"cpu_seconds": seconds.get(stage)})
    return rows


def summary(rows: list[dict]) -> dict:
    """{variant: {tool_stage: TRE by bone, success rate, knees, CPU seconds, memory, ratio}}."""
    out = {}
    groups = dict.fromkeys((row["variant"], row["tool"], row["stage"]) for row in rows)
    for group in groups:
        part = [row for row in rows if (row["variant"], row["tool"], row["stage"]) == group]
        errors = {bone: [row["tre_mm"] for row in part if row["bone"] == bone] for bone in BONES}
        tre_mm = {}
        for bone, values in errors.items():
            median, p95, largest = np.percentile(values, (50, 95, 100)).tolist()
            tre_mm[bone] = {"median": median, "p95": p95, "max": largest}
        seconds = [row["cpu_seconds"] for row in part if row["cpu_seconds"]]
        variant, tool, stage = group
        out.setdefault(variant, {})[f"{tool}_{stage}"] = {
            "tre_mm": tre_mm,
            "success_rate": float(np.mean(np.max(list(errors.values()), axis=0) < 1.0)),
            "n_knees": len(errors["femur"]),
            "memory_mb": max(row["memory_mb"] for row in part),
            "cpu_seconds": np.mean(seconds) if seconds else None,
        }
    for tools in out.values():
        if "ours_per_bone" not in tools:
            continue
        ours = tools["ours_per_bone"]["tre_mm"]
        for entry in tools.values():
            medians = {bone: entry["tre_mm"][bone]["median"] for bone in BONES}
            entry["ratio_ours_to_it"] = {b: ours[b]["median"] / medians[b] for b in BONES}
    return out


def main() -> None:
    """Run what is missing, print and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("--knees", type=int, default=6)
    parser.add_argument("--kept", type=Path, default=Path("runs/peers.jsonl"))
    given = parser.parse_args()
    knees = read_manifest(given.run / "cohort" / "simulated.csv").head(given.knees)
    root = Path(knees.attrs["root"])
    tools = [tool for tool in ("ours", *TOOLS) if find_spec(MODULES[tool])]
    rows = []
    if given.kept.exists():
        rows = [json.loads(line) for line in given.kept.read_text().splitlines()]
    done = {(row["tool"], row["variant"], row["knee_id"]) for row in rows}
    wanted = [(tool, v, k) for v in VARIANTS for k in knees["knee_id"] for tool in tools]
    for tool, variant, knee_id in wanted:
        if (tool, variant, knee_id) in done:
            continue
        with multiprocessing.get_context("spawn").Pool(1) as pool:  # own process: own peak memory
            new = pool.apply(one_run, (tool, variant, root, knee_id))
        rows += new
        given.kept.parent.mkdir(parents=True, exist_ok=True)
        with given.kept.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in new)
    result = {
        "knees": list(dict.fromkeys(row["knee_id"] for row in rows)),
        "missing": sorted({*TOOLS} - {*tools}),
        "protocol_sha256": protocol_sha256(),
        "variants": summary(rows),
    }
    write_json(OUT, result)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
