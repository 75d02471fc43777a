"""How close do the tools come that a user would pick instead? Same knees, same images, same run.

    python benchmarks/registration_peers.py runs/quick --knees 6

Needs the `bench` extra (antspyx, itk-elastix, picsl_greedy); a tool that is not installed is left out and named.
Whole-knee rigid with SimpleITK, ANTs, elastix and greedy; per bone with *true* masks, 3 mm wider, from the same tool's
whole-knee result, for ANTs, elastix and greedy; ours with the masks it finds itself. `hard`: SNR 6, 3 mm slices and a
cut field of view. Writes docs/results/registration_peers.json: TRE per bone (median, p95, max over knees), CPU seconds,
peak memory, and our median over each peer's.
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
from registration_stress import read_pair, spoiled

from ctsma import cohort, simulation
from ctsma.registration import bone_masks, isotropic, mapped, register_knee
from ctsma.registration.stages import starting_transforms

SPACING_MM, MARGIN_MM = 1.0, 3.0  # whole knee at 1 mm; masks of single bones 3 mm wider (settings as measured before)
BONE_MM = {"ants": 0.8, "elastix": 0.8, "greedy": 0.6}
MODULES = {"ants": "ants", "elastix": "itk", "greedy": "picsl_greedy", "simpleitk": "SimpleITK", "ours": "ctsma"}
VARIANTS = ("plain", "hard")
OUT = Path(__file__).parents[1] / "docs" / "results" / "registration_peers.json"


def simpleitk(fixed, moving, start, mask, folder) -> sitk.Transform:
    """Mattes mutual information, regular-step gradient descent, 20 % of voxels, four levels: the tutorial's recipe."""
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
    """antspyx `Rigid`: Mattes, four levels, seeded."""
    import ants as tool

    write = {"fixed": fixed, "moving": moving} | ({"mask": mask} if mask is not None else {})
    paths = _written(folder, write)
    read = {name: tool.image_read(path) for name, path in paths.items()}
    initial = str(Path(folder) / "start.tfm")
    sitk.WriteTransform(sitk.AffineTransform(*_affine(start)), initial)
    found = tool.registration(
        read["fixed"], read["moving"], "Rigid", initial_transform=[initial], mask=read.get("mask"), random_seed=1
    )
    return sitk.CompositeTransform([sitk.ReadTransform(p) for p in reversed(found["fwdtransforms"])])


def elastix(fixed, moving, start, mask, folder) -> sitk.Transform:
    """itk-elastix default rigid map, 1000 iterations; the start is applied to the moving image beforehand."""
    import itk

    parameters = itk.ParameterObject.New()
    rigid_map = parameters.GetDefaultParameterMap("rigid", 4)
    rigid_map["MaximumNumberOfIterations"], rigid_map["RandomSeed"] = ["1000"], ["1"]
    for name in ("AutomaticTransformInitialization", "ErodeMask", "WriteResultImage"):
        rigid_map[name] = ["false"]
    parameters.AddParameterMap(rigid_map)
    carried = sitk.Resample(moving, _wide(fixed), start, sitk.sitkBSpline, 0.0)
    paths = _written(folder, {"fixed": fixed, "moving": carried} | ({"mask": mask} if mask is not None else {}))
    images = {name: itk.imread(path, itk.UC if name == "mask" else itk.F) for name, path in paths.items()}
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

    write = {"fixed": fixed, "moving": moving} | ({"mask": mask} if mask is not None else {})
    paths, out = _written(folder, write), str(Path(folder) / "out.mat")
    initial = str(Path(folder) / "start.mat")
    np.savetxt(initial, _ras(_homogeneous(start)))
    masked = f"-gm {paths['mask']}" if mask is not None else ""
    images = f"-i {paths['fixed']} {paths['moving']} {masked} -ia {initial}"
    Greedy3D().execute(f"{images} -a -dof 6 -m NMI -n 100x50x20 -threads 1 -o {out}")
    matrix = _ras(np.loadtxt(out))
    return sitk.AffineTransform(matrix[:3, :3].ravel().tolist(), matrix[:3, 3].tolist())


TOOLS = {"simpleitk": simpleitk, "ants": ants, "elastix": elastix, "greedy": greedy}


def _written(folder, images: dict) -> dict[str, str]:
    paths = {name: str(Path(folder) / f"{name}.nii.gz") for name in images}
    for name, image in images.items():
        sitk.WriteImage(image, paths[name])
    return paths


def _homogeneous(transform: sitk.Transform) -> np.ndarray:
    matrix, origin = np.eye(4), np.array(transform.TransformPoint((0.0, 0.0, 0.0)))
    matrix[:3, :3] = np.transpose([np.subtract(transform.TransformPoint(e), origin) for e in np.eye(3).tolist()])
    matrix[:3, 3] = origin
    return matrix


def _affine(transform: sitk.Transform) -> tuple[list, list]:
    matrix = _homogeneous(transform)
    return matrix[:3, :3].ravel().tolist(), matrix[:3, 3].tolist()


def _ras(matrix: np.ndarray) -> np.ndarray:
    flip = np.diag([-1.0, -1, 1, 1])
    return flip @ matrix @ flip


def _wide(fixed: sitk.Image, mm: float = 20.0) -> sitk.Image:
    n = [int(mm / s) for s in fixed.GetSpacing()]
    return sitk.ConstantPad(fixed, n, n)


def whole_then_bones(tool: str, ct: sitk.Image, mr: sitk.Image, masks: sitk.Image, folder: str) -> dict:
    """{"whole_knee" and "per_bone": {bone: transform}} and CPU seconds of one tool, from the same start as ours."""
    tic, out = time.process_time(), {"seconds": {}}
    start = sitk.Euler3DTransform(starting_transforms(ct, mr)[0][1])
    whole = TOOLS[tool](isotropic(ct, SPACING_MM), isotropic(mr, SPACING_MM), start, None, folder)
    out["whole_knee"], out["seconds"]["whole_knee"] = dict.fromkeys(cohort.BONES, whole), time.process_time() - tic
    for bone in cohort.BONES if tool in BONE_MM else ():
        mm = BONE_MM[tool]
        depth = sitk.SignedMaurerDistanceMap(masks == cohort.BONES[bone], True, False, True)
        fixed, near = isotropic(ct, mm), sitk.Cast(isotropic(sitk.Cast(depth, sitk.sitkFloat32), mm) > -MARGIN_MM, 1)
        shape = sitk.LabelShapeStatisticsImageFilter()
        shape.Execute(near)
        box = shape.GetBoundingBox(1)
        fixed, near = (sitk.RegionOfInterest(image, box[3:], box[:3]) for image in (fixed, near))
        found = TOOLS[tool](fixed, isotropic(mr, mm), whole, near, folder)
        out.setdefault("per_bone", {})[bone] = found
    out["seconds"]["per_bone"] = time.process_time() - tic
    return out


def ours(ct: sitk.Image, mr: sitk.Image) -> dict:
    """Our whole-knee stage and our result, masks included in the time."""
    tic = time.process_time()
    found = register_knee(ct, mr, bone_masks(ct), seed=0)
    whole = {"whole_knee": found.stage_transforms["whole_knee"], "per_bone": found.transforms}
    return whole | {"seconds": {"per_bone": time.process_time() - tic}}


def one_run(tool: str, variant: str, root: Path, knee_id: str) -> list[dict]:
    """Rows (stage, bone, TRE, seconds, memory) of one tool on one knee; run in its own process."""
    truth, (ct, mr) = simulation.read_truth(root, knee_id), read_pair(root, knee_id)
    rng = np.random.default_rng([9, int(knee_id[1:])])
    if variant == "hard":
        ct, mr = spoiled("all", ct, mr, truth.labels, truth.transforms, rng)
    with tempfile.TemporaryDirectory() as folder:
        found = ours(ct, mr) if tool == "ours" else whole_then_bones(tool, ct, mr, truth.labels, folder)
        rows, memory = [], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        for stage in ("whole_knee", "per_bone"):
            for bone, transform in found.get(stage, {}).items():
                points, true = truth.target_points_lps(bone), truth.transforms[bone]
                error = np.linalg.norm(mapped(transform, points) - mapped(true, points), axis=1).mean()
                row = {"tool": tool, "variant": variant, "knee_id": knee_id, "stage": stage, "bone": bone}
                rows.append(row | {"tre_mm": float(error), "memory_mb": memory})
                rows[-1]["cpu_seconds"] = found["seconds"].get(stage)
    return rows


def summary(rows: list[dict]) -> dict:
    """{variant: {tool_stage: {tre_mm: {bone: median, p95, max}, success_rate, cpu_seconds, memory_mb, ...}}}"""
    out = {}
    for variant, tool, stage in dict.fromkeys((r["variant"], r["tool"], r["stage"]) for r in rows):
        part = [r for r in rows if (r["variant"], r["tool"], r["stage"]) == (variant, tool, stage)]
        errors = {b: [r["tre_mm"] for r in part if r["bone"] == b] for b in cohort.BONES}
        values = {b: np.percentile(e, (50, 95, 100)).tolist() for b, e in errors.items()}
        entry = {"tre_mm": {b: dict(zip(("median", "p95", "max"), v, strict=True)) for b, v in values.items()}}
        entry["success_rate"] = float(np.mean(np.max(list(errors.values()), axis=0) < 1.0))
        entry |= {"n_knees": len(errors["femur"]), "memory_mb": max(r["memory_mb"] for r in part)}
        seconds = [r["cpu_seconds"] for r in part if r["cpu_seconds"]]
        out.setdefault(variant, {})[f"{tool}_{stage}"] = entry | {"cpu_seconds": np.mean(seconds) if seconds else None}
    for tools in out.values():
        reference = tools.get("ours_per_bone")
        for entry in tools.values() if reference else ():
            pairs = {b: (reference["tre_mm"][b]["median"], entry["tre_mm"][b]["median"]) for b in cohort.BONES}
            entry["ratio_ours_to_it"] = {b: mine / other for b, (mine, other) in pairs.items()}
    return out


def main() -> None:
    """Run what is missing, show and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--knees", type=int, default=6)
    parser.add_argument("--kept", type=Path, default=Path("runs/peers.jsonl"))
    given = parser.parse_args()
    knees = cohort.read_manifest(given.run / "cohort" / "simulated.csv").head(given.knees)
    root, tools = Path(knees.attrs["root"]), [t for t in ("ours", *TOOLS) if find_spec(MODULES[t])]
    rows = [json.loads(line) for line in given.kept.read_text().splitlines()] if given.kept.exists() else []
    done = {(r["tool"], r["variant"], r["knee_id"]) for r in rows}
    wanted = [(t, v, k) for v in VARIANTS for k in knees["knee_id"] for t in tools if (t, v, k) not in done]
    for tool, variant, knee_id in wanted:
        with multiprocessing.get_context("spawn").Pool(1) as pool:  # a process each: peak memory is its own
            fresh = pool.apply(one_run, (tool, variant, root, knee_id))
        rows += fresh
        given.kept.parent.mkdir(parents=True, exist_ok=True)
        with given.kept.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in fresh)
    found = {"knees": list(dict.fromkeys(r["knee_id"] for r in rows)), "missing": sorted({*TOOLS} - {*tools})}
    found |= {"protocol_sha256": simulation.protocol_sha256(), "variants": summary(rows)}
    cohort.write_json(OUT, found)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
