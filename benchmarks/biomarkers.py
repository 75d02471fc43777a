"""Local thickness beside independent tools, what resolution does, and the three MR definitions beside truth: one run.

    python benchmarks/biomarkers.py --out docs/results/biomarkers.json --page docs/biomarkers.md

About eight minutes on one core; `--patches 0` leaves out the simulated MR patches. Tools that cannot be imported (extra
`bench`) are listed with the reason. The specimen is found by argument or in the folder CTSMA_REAL_DATA (default
../shared/data beside the repository); its header lies, the voxel is 45.6 um.
"""

import argparse
import json
import multiprocessing
import os
import platform
import queue
import resource
import sys
import time
from importlib import metadata
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import SimpleITK as sitk
from scipy import ndimage
from scipy.spatial.transform import Rotation
from scipy.stats import spearmanr

from ctsma import biomarkers
from ctsma.cohort import BIOMARKERS

SPECIMEN_MM = 0.0456  # voxel of the micro-CT specimen
WAIT_S = 300  # a tool that has not answered by then is a row that says so
SEED = 0  # of simulated patch k: (SEED, k)
PACKAGES = ("numpy", "scipy", "numba", "localthickness", "porespy", "itk-bonemorphometry")
BONEJ = {"tb_th_mm": 0.339, "tb_sp_mm": 0.505}  # BoneJ's own code on block [25:-25]
FINE_MM, SUB = 0.0546875, (14, 4, 4)  # micro-structure voxel; per MR voxel of 0.766 x 0.219 x 0.219 mm


def plates(thickness: float, separation: float) -> np.ndarray:
    turn = Rotation.from_euler("zyx", [23, 17, 31], degrees=True).as_matrix()
    return np.tensordot(turn[0], np.indices((90,) * 3) - 44.9, 1) % (thickness + separation) < thickness


def rods(diameter: float, period: float) -> np.ndarray:
    turn = Rotation.from_euler("zyx", [23, 17, 31], degrees=True).as_matrix()
    across = (np.tensordot(turn[1:], np.indices((90,) * 3) - 44.9, 1) + period / 2) % period - period / 2
    return (across**2).sum(0) < diameter**2 / 4


def ours(mask, spacing):
    found = biomarkers.morphometry(mask, spacing, further=False)
    return {name: found[name] for name in ("tb_th_mm", "tb_sp_mm", "tb_n_per_mm")}


def ours_thickness_only(mask, spacing):
    maps = biomarkers.local_thickness(mask, spacing), biomarkers.local_thickness(~mask, spacing)
    return {"tb_th_mm": float(maps[0][mask].mean()), "tb_sp_mm": float(maps[1][~mask].mean())}


def localthickness(mask, spacing):
    from localthickness import local_thickness

    th, sp = (2 * spacing * local_thickness(p)[p].mean() for p in (mask, ~mask))  # it gives radii
    return {"tb_th_mm": float(th), "tb_sp_mm": float(sp)}


def porespy(mask, spacing):
    from porespy.filters import local_thickness

    th, sp = (2 * spacing * np.asarray(local_thickness(p))[p].mean() for p in (mask, ~mask))  # it gives radii
    return {"tb_th_mm": float(th), "tb_sp_mm": float(sp)}


def itk_bonemorphometry(mask, spacing):
    import itk

    grey, inside = (itk.image_from_array(a) for a in (mask.astype(np.float32), np.ones(mask.shape, np.uint8)))
    for image in (grey, inside):
        image.SetSpacing([spacing] * 3)
    tool = itk.BoneMorphometryFeaturesFilter.New(grey, mask_image=inside, threshold=1)
    tool.Update()
    return {"tb_th_mm": tool.GetTbTh(), "tb_sp_mm": tool.GetTbSp(), "tb_n_per_mm": tool.GetTbN()}


TOOLS = [ours_thickness_only, ours, localthickness, porespy, itk_bonemorphometry]


def measured(tool, mask: np.ndarray, spacing: float, answers) -> None:
    """Run a tool twice (the first compiles and imports); CPU seconds of the second, peak memory over that at start."""
    try:
        tool(mask[:32, :32, :32], spacing)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        start = time.process_time()
        values = tool(mask, spacing)
        seconds = time.process_time() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        answers.put(values | {"cpu_s": seconds, "peak_mb": peak / 1024, "rise_mb": (peak - before) / 1024})
    except Exception as fault:  # a tool that is not installed is a row with its reason
        answers.put({"error": f"{type(fault).__name__}: {fault}"})


def alone(tool, mask: np.ndarray, spacing: float) -> dict:
    """`measured` in a process of its own, so that memory is the tool's."""
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    process = context.Process(target=measured, args=(tool, mask, spacing, answers))
    process.start()
    try:
        row = answers.get(timeout=WAIT_S)
    except queue.Empty:  # also when the process died without a word
        row = {"error": f"no answer within {WAIT_S} s"}
        process.kill()
    process.join()
    return row


def read_specimen(path: Path, margin: int = 25) -> np.ndarray:
    """The specimen's mask without `margin` voxels on every side (its corners are empty)."""
    return sitk.GetArrayFromImage(sitk.ReadImage(str(path)))[(slice(margin, -margin),) * 3] > 0


def compare_tools(specimen: Path | None) -> list[dict]:
    masks = {"plates 6/12 voxels": (plates(6, 12), 1.0, {"tb_th_mm": 6, "tb_sp_mm": 12, "tb_n_per_mm": 1 / 18})}
    masks["plates 3/8 voxels"] = plates(3, 8), 1.0, {"tb_th_mm": 3, "tb_sp_mm": 8, "tb_n_per_mm": 1 / 11}
    masks["rods 6 voxels"] = rods(6, 18), 1.0, {"tb_th_mm": 6}
    if specimen:
        masks["specimen (truth: BoneJ)"] = read_specimen(specimen), SPECIMEN_MM, BONEJ
    rows = []
    for name, (mask, spacing, truth) in masks.items():
        first = None
        for tool in TOOLS:
            row = {"mask": name, "tool": tool.__name__} | alone(tool, mask, spacing)
            first = first or row
            row |= {f"{k}_error_pct": 100 * (row[k] / truth[k] - 1) for k in truth if k in row}
            row |= {
                f"{k}_over_ours": row[k] / first[k] for k in ("tb_th_mm", "tb_sp_mm", "cpu_s", "peak_mb") if k in row
            }
            rows.append(row)
    return rows


def field(rng, shape, wavelength_mm, stretch):
    """Unit-variance Gaussian field of a narrow band of wavelengths, stretched along the rows' axis."""
    k = np.meshgrid(*(np.fft.fftfreq(n, FINE_MM) for n in shape[:2]), np.fft.rfftfreq(shape[2], FINE_MM), indexing="ij")
    radius = np.sqrt(k[0] ** 2 + (k[1] * stretch) ** 2 + k[2] ** 2) * wavelength_mm
    spectrum = np.fft.rfftn(rng.standard_normal(shape)) * np.exp(-0.5 * ((radius - 1) / 0.2) ** 2)
    values = np.fft.irfftn(spectrum, shape, axes=(0, 1, 2))
    return values / values.std()


def scan(rng, bone, snr):
    """MR patch (12, 48, 48) at a random place off the grid, linearly resampled onto it (as a rescan is), Rician."""
    offset = np.array([rng.integers(-7, 8), rng.integers(-2, 3), rng.integers(-2, 3)])
    low = offset + [14, 8, 8]
    part = bone[low[0] :, low[1] :, low[2] :][: 14 * 14, : 52 * 4, : 52 * 4]
    signal = 1 - part.reshape(14, 14, 52, 4, 52, 4).mean((1, 3, 5))
    ramps = np.meshgrid(*(np.linspace(-1, 1, n) for n in signal.shape), indexing="ij")
    signal = signal * np.exp(sum(rng.normal(0, 0.03) * ramp for ramp in ramps)) * rng.uniform(600, 1000)
    noise = rng.normal(0, signal.max() / snr, (2, *signal.shape))
    misplaced = rng.normal(0, 0.15, 3) / FINE_MM / SUB  # registration error of 0.15 mm per axis
    moved = ndimage.shift(np.hypot(signal + noise[0], noise[1]), offset / SUB + misplaced, order=1, mode="nearest")
    return moved[1:13, 2:50, 2:50]


def simulated(rng) -> tuple[dict, np.ndarray, np.ndarray]:
    """Truth (0.055 mm), scan and rescan of a random level set |f - c| < w, plates to rods."""
    scale, stretch, mix = rng.normal(1, 0.1), rng.normal(1.45, 0.12), rng.normal(0.785, 0.25)
    shape = tuple(n * s + m for n, s, m in zip((14, 52, 52), SUB, (28, 16, 16), strict=True))
    f = np.cos(mix) * field(rng, shape, 0.9 * scale, stretch) + np.sin(mix) * field(rng, shape, 1.35 * scale, stretch)
    distance, share = np.abs(f - rng.normal(0.35, 0.1)), np.clip(0.31 * np.exp(rng.normal(0, 0.25)), 0.1, 0.55)
    # Susceptibility widens trabeculae in bSSFP: more bone in the image than there is (size our choice).
    bone, seen = distance < np.quantile(distance, share), distance < np.quantile(distance, min(1.2 * share, 0.9))
    truth = biomarkers.morphometry(bone[28:196, 16:208, 16:208], FINE_MM, further=False)
    snr = rng.uniform(11, 24)
    return truth, scan(rng, seen, snr), scan(rng, seen, snr)


def specimen_patches(path: Path, seed: int = SEED) -> tuple[list, np.ndarray]:
    """Truth and MR-like patches of real bone: eight overlapping blocks of 5.1 mm, sliced along each of the three axes.

    Voxels are 16 x 5 x 5 of the specimen's (0.73 x 0.228 x 0.228 mm), signal 800 x marrow share, Rician noise 800 / 15.
    """
    whole, truths, patches, rng = read_specimen(path, 20), [], [], np.random.default_rng(seed)
    for corner in np.ndindex(2, 2, 2):
        cube = whole[tuple(slice(-112, None) if far else slice(112) for far in corner)]
        truths += [biomarkers.morphometry(cube, SPECIMEN_MM, further=False)] * 3
        for axis in range(3):
            part = np.moveaxis(cube, axis, 0)[:, :110, :110]
            signal = 800 * (1 - part.reshape(7, 16, 22, 5, 22, 5).mean((1, 3, 5)))
            noise = rng.normal(0, 800 / 15, (2, *signal.shape))
            patches.append(np.hypot(signal + noise[0], noise[1]))
    return truths, np.array(patches)


def resolution(specimen: Path) -> list[dict]:
    """The specimen on coarser voxels, binned and blurred: each biomarker over that on its own voxel."""
    block = read_specimen(specimen)
    rows = biomarkers.resolution_series(block, SPECIMEN_MM)
    blurred = biomarkers.resolution_series(block, SPECIMEN_MM, (2, 3, 4, 5, 6, 8, 10), psf_voxels=1.5)
    return [row | {f"{k}_ratio": row[k] / rows[0][k] for k in BIOMARKERS} for row in rows + blurred]


def truth_seconds(specimen: Path) -> dict:
    """CPU seconds of high-resolution truth for 128^3 voxels of real bone: best of three."""
    block, seconds = read_specimen(specimen)[:128, :128, :128], {}
    for name, further in (("four", False), ("all", True)):
        times = []
        for _ in range(3):
            start = time.process_time()
            biomarkers.morphometry(block, SPECIMEN_MM, further=further)
            times.append(time.process_time() - start)
        seconds[name] = min(times)
    return seconds


def single_icc(a: np.ndarray, b: np.ndarray) -> float:
    """ICC(A,1) of two measurements (McGraw and Wong 1996)."""
    both, n = np.stack([a, b], 1), len(a)
    rows = 2 * both.mean(1).var(ddof=1)
    columns = n * both.mean(0).var(ddof=1)
    rest = both - both.mean(1, keepdims=True) - both.mean(0) + both.mean()
    error = (rest**2).sum() / (n - 1)
    return float((rows - error) / (rows + error + 2 * (columns - error) / n))


def compare_definitions(n_patches: int, specimen: Path | None) -> list[dict]:
    sets = {}
    if n_patches:
        truths, first, second = zip(
            *(simulated(np.random.default_rng([SEED, k])) for k in range(n_patches)), strict=True
        )
        sets["level sets"] = truths, np.array(first), np.array(second), (0.765625, 0.21875, 0.21875)
    if specimen:
        sets["specimen blocks"] = (
            *specimen_patches(specimen),
            None,
            (16 * SPECIMEN_MM, 5 * SPECIMEN_MM, 5 * SPECIMEN_MM),
        )
    rows = []
    for name, (truths, first, second, spacing) in sets.items():
        for definition in ("paper", "plate", "direct"):
            voi = np.ones(first.shape, bool)
            biomarkers.mr_biomarkers(first[:1], voi[:1], spacing, definition)
            start = time.process_time()
            found = biomarkers.mr_biomarkers(first, voi, spacing, definition)
            row = {"set": name, "definition": definition, "cpu_ms": 1e3 * (time.process_time() - start) / len(first)}
            again = biomarkers.mr_biomarkers(second, voi, spacing, definition) if second is not None else found
            good = (found["flag"] == "") & (again["flag"] == "")
            row |= {"n": len(first), "n_good": int(good.sum())}
            for k in BIOMARKERS:
                true, value = np.array([t[k] for t in truths])[good], found[k][good]
                row[k] = {
                    "spearman": float(spearmanr(value, true)[0]),
                    "pearson": float(np.corrcoef(value, true)[0, 1]),
                    "ratio_to_truth": float((value / true).mean()),
                }
                if second is not None:
                    row[k]["rescan_icc"] = single_icc(value, again[k][good])
            rows.append(row)
    return rows


def table(rows: list[dict], columns: dict) -> str:
    """Markdown table; `columns` names each key of the rows and its format."""
    lines = ["| " + " | ".join(title for title, _ in columns.values()) + " |", "|" + " --- |" * len(columns)]
    for row in rows:
        cells = [
            format(row[k], form) if isinstance(row.get(k), float) else str(row.get(k, ""))
            for k, (_, form) in columns.items()
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def page(result: dict) -> str:
    """docs/biomarkers.md from the numbers alone."""
    error = {
        f"{k}_error_pct": (f"{label} error %", "+.1f") for k, label in (("tb_th_mm", "Tb.Th"), ("tb_sp_mm", "Tb.Sp"))
    }
    over = {f"{k}_over_ours": (f"{k.partition('_')[0]} / ours", ".2f") for k in ("cpu_s", "peak_mb")}
    tools = {"mask": ("mask", ""), "tool": ("tool", ""), "tb_th_mm": ("Tb.Th", ".3f"), "tb_sp_mm": ("Tb.Sp", ".3f")}
    tools |= error | {"cpu_s": ("CPU s", ".2f"), "peak_mb": ("peak MB", ".0f")} | over | {"error": ("fault", "")}
    coarse = {"voxel_mm": ("voxel mm", ".3f"), "psf_mm": ("blur FWHM mm", ".3f")}
    coarse |= {f"{k}_ratio": (label, ".2f") for k, label in LABELS.items()} | {"flag": ("flag", "")}
    flat = [
        {"set": r["set"], "definition": r["definition"], "good": f"{r['n_good']} of {r['n']}", "cpu_ms": r["cpu_ms"]}
        | {"biomarker": LABELS[k]}
        | r[k]
        for r in result["definitions"]
        for k in BIOMARKERS
    ]
    named = {
        "set": ("patches", ""),
        "good": ("measured", ""),
        "biomarker": ("biomarker", ""),
        "definition": ("definition", ""),
    }
    named |= {
        "ratio_to_truth": ("over truth", ".2f"),
        "spearman": ("Spearman", ".2f"),
        "rescan_icc": ("rescan ICC", ".2f"),
    }
    named |= {"cpu_ms": ("ms a patch", ".0f")}
    flat.sort(key=lambda r: (r["set"], list(LABELS.values()).index(r["biomarker"])))
    return PAGE.format(
        command=result["command"],
        versions=", ".join(f"{k} {v}" for k, v in result["versions"].items()),
        seed=result["seed"],
        tools=table(result["tools"], tools),
        resolution=table(result["resolution"], coarse),
        definitions=table(flat, named),
        **{f"truth_{k}": v for k, v in result["truth_128_s"].items()},
    )


LABELS = {"bv_tv": "BV/TV", "tb_th_mm": "Tb.Th", "tb_sp_mm": "Tb.Sp", "tb_n_per_mm": "Tb.N"}
PAGE = """# Biomarkers: definitions, errors, other tools

This page is written by `{command}`
(seed {seed}; {versions}),
and a test holds it to `docs/results/biomarkers.json`. Notebook 4 pictures what is defined here.

| biomarker | formula, at high resolution | unit | function |
| --- | --- | --- | --- |
| BV/TV | bone voxels / voxels of the volume of interest | 1 | `morphometry` |
| Tb.Th | mean over bone: diameter of the largest ball in bone that covers the voxel | mm | `local_thickness` |
| Tb.Sp | the same over marrow | mm | `local_thickness` of the inverted mask |
| Tb.N | 1 / mean distance of mid-axes; by intercepts, surface crossings / length of test line | 1/mm | `morphometry` |

On MR (`mr_biomarkers`), with f the bone volume fraction 1 - signal / marrow signal: `plate` (the default) takes
BV/TV = mean f, Tb.N = crossings per length, Tb.Th = (BV/TV) / Tb.N, Tb.Sp = (1 - BV/TV) / Tb.N; `direct` takes Tb.Th
and Tb.Sp as local thickness of f thresholded where it keeps BV/TV; `paper` follows the published code.

## Beside other tools

One process a tool, one thread; thickness in voxels on the closed forms, in mm on the specimen, a real human
micro-CT mask at 45.6 um, where BoneJ's own code is the truth. `ours` is all four biomarkers, `ours_thickness_only`
both thickness maps and the divisor of the ratios; peak memory includes interpreter and imports. `itk_bonemorphometry`
has another definition (a plate model by boundary crossings), and porespy's radii are whole voxels.

{tools}

**The bias that stays** is the voxel's: at any thickness about +0.5 voxel on plates, 0 on rods, -0.8 on spheres
(`local_thickness` states it, tests keep it). Truth for 128^3 voxels of the specimen: {truth_four:.2f} CPU s for the
four biomarkers, {truth_all:.2f} s with the further ones.

## What resolution does

The specimen on coarser voxels, each biomarker over that on 45.6 um: binned with partial volume and thresholded at one
half; below, blurred first by 1.5 voxels (FWHM).

{resolution}

## Three definitions on MR

`level sets`: simulated bone of known truth, scanned twice. `specimen blocks`: overlapping blocks of the specimen, about
5 mm, as an MR of 0.73 x 0.228 x 0.228 mm voxels and SNR 15 would show them. They overlap and differ little from each
other (one dense bone), and are flagged where so much bone looks like inverted contrast: their ranks say no more than
that the direction is right.

{definitions}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--specimen", type=Path, help="micro-CT mask, NIfTI")
    parser.add_argument("--patches", type=int, default=36, help="simulated MR patches, 7 s each; 0: none")
    parser.add_argument("--out", type=Path, default=Path("benchmark_biomarkers.json"))
    parser.add_argument("--page", type=Path, help="write the page of tables there, too")
    given = parser.parse_args()
    folder = Path(os.environ.get("CTSMA_REAL_DATA", Path(__file__).parents[2] / "shared" / "data"))
    specimen = given.specimen or folder / "microct_trabecular.nii.gz"
    specimen = specimen if specimen.exists() else None
    installed = {d.metadata["Name"].lower() for d in metadata.distributions()}
    versions = {"python": platform.python_version()} | {k: metadata.version(k) for k in PACKAGES if k in installed}
    result = {"command": "python " + " ".join(sys.argv), "seed": SEED, "versions": versions, "specimen": bool(specimen)}
    result["tools"] = compare_tools(specimen)
    result["truth_128_s"] = truth_seconds(specimen) if specimen else {"four": float("nan"), "all": float("nan")}
    result["resolution"] = resolution(specimen) if specimen else []
    result["definitions"] = compare_definitions(given.patches, specimen)
    given.out.write_text(json.dumps(result, indent=1) + "\n")
    if given.page:
        given.page.write_text(page(result))


if __name__ == "__main__":
    main()
