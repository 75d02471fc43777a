"""Local thickness beside independent tools, and the three MR definitions beside truth, in one run.

    python benchmarks/biomarkers.py --specimen microct_trabecular.nii.gz --patches 24 --out biomarkers.json

Tools that cannot be imported (extra `bench`) are listed with the reason. The specimen is found by argument or in the
folder CTSMA_REAL_DATA (default ../shared/data beside the repository); its header lies, the voxel is 45.6 um.
"""

import argparse
import json
import multiprocessing
import os
import resource
import time
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


def measured(tool, mask: np.ndarray, spacing: float, queue) -> None:
    """Run a tool twice (the first compiles and imports); CPU seconds of the second, peak memory over that at start."""
    try:
        tool(mask[:32, :32, :32], spacing)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        start = time.process_time()
        values = tool(mask, spacing)
        seconds = time.process_time() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        queue.put(values | {"cpu_s": seconds, "peak_mb": peak / 1024, "rise_mb": (peak - before) / 1024})
    except Exception as fault:  # a tool that is not installed is a row with its reason
        queue.put({"error": f"{type(fault).__name__}: {fault}"})


def alone(tool, mask: np.ndarray, spacing: float) -> dict:
    """`measured` in a process of its own, so that memory is the tool's."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=measured, args=(tool, mask, spacing, queue))
    process.start()
    row = queue.get()
    process.join()
    return row


def compare_tools(specimen: Path | None) -> list[dict]:
    masks = {"plates 6/12 voxels": (plates(6, 12), 1.0, {"tb_th_mm": 6, "tb_sp_mm": 12, "tb_n_per_mm": 1 / 18})}
    masks["plates 3/8 voxels"] = plates(3, 8), 1.0, {"tb_th_mm": 3, "tb_sp_mm": 8, "tb_n_per_mm": 1 / 11}
    masks["rods 6 voxels"] = rods(6, 18), 1.0, {"tb_th_mm": 6}
    if specimen:
        block = sitk.GetArrayFromImage(sitk.ReadImage(str(specimen)))[25:-25, 25:-25, 25:-25] > 0
        masks["specimen (truth: BoneJ)"] = block, SPECIMEN_MM, BONEJ
    rows = []
    for name, (mask, spacing, truth) in masks.items():
        first = None
        for tool in TOOLS:
            row = {"mask": name, "tool": tool.__name__} | alone(tool, mask, spacing)
            first = first or row
            row |= {f"{k}_error_pct": 100 * (row[k] / truth[k] - 1) for k in truth if k in row}
            row |= {f"{k}_over_ours": row[k] / first[k] for k in ("tb_th_mm", "tb_sp_mm", "cpu_s") if k in row}
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


def specimen_patches(block: np.ndarray) -> tuple[list, np.ndarray]:
    """Truth and MR-like patches of real bone: eight octants of the block, mirrored periodically to a patch's size."""
    truths, patches, rng = [], [], np.random.default_rng(1)
    half = [n // 2 for n in block.shape]
    for corner in np.ndindex(2, 2, 2):
        part = block[tuple(slice(c * h, c * h + h) for c, h in zip(corner, half, strict=True))]
        truths.append(biomarkers.morphometry(part, SPECIMEN_MM, further=False))
        # 16 x 5 x 5 voxels of 45.6 um: 0.73 x 0.228 x 0.228 mm.
        size = (12 * 16, 48 * 5, 48 * 5)
        large = np.pad(part, [(0, n - k) for n, k in zip(size, part.shape, strict=True)], mode="symmetric")
        signal = 800 * (1 - large.reshape(12, 16, 48, 5, 48, 5).mean((1, 3, 5)))
        noise = rng.normal(0, 800 / 15, (2, *signal.shape))
        patches.append(np.hypot(signal + noise[0], noise[1]))
    return truths, np.array(patches)


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
        truths, first, second = zip(*(simulated(np.random.default_rng(k)) for k in range(n_patches)), strict=True)
        sets["level sets"] = truths, np.array(first), np.array(second), (0.765625, 0.21875, 0.21875)
    if specimen:
        block = sitk.GetArrayFromImage(sitk.ReadImage(str(specimen)))[25:-25, 25:-25, 25:-25] > 0
        sets["specimen octants"] = *specimen_patches(block), None, (16 * SPECIMEN_MM, 5 * SPECIMEN_MM, 5 * SPECIMEN_MM)
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--specimen", type=Path, help="micro-CT mask, NIfTI")
    parser.add_argument("--patches", type=int, default=24, help="simulated MR patches, 7 s each; 0: none")
    parser.add_argument("--out", type=Path, default=Path("benchmark_biomarkers.json"))
    given = parser.parse_args()
    folder = Path(os.environ.get("CTSMA_REAL_DATA", Path(__file__).parents[2] / "shared" / "data"))
    specimen = given.specimen or folder / "microct_trabecular.nii.gz"
    specimen = specimen if specimen.exists() else None
    result = {"specimen": bool(specimen), "tools": compare_tools(specimen)}
    for row in result["tools"]:
        print("  ".join(f"{k} {v:.3g}" if isinstance(v, float) else str(v) for k, v in row.items()))
    result["definitions"] = compare_definitions(given.patches, specimen)
    for row in result["definitions"]:
        print(row["set"], row["definition"], f"{row['n_good']} of {row['n']}, {row['cpu_ms']:.0f} ms a patch")
        for k in BIOMARKERS:
            print("   ", k, "  ".join(f"{name} {value:.2f}" for name, value in row[k].items()))
    given.out.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
