"""Biomarkers against other tools, on coarser voxels, and by three MR definitions: one run.

    python benchmarks/biomarkers.py --out docs/results/biomarkers.json --page docs/biomarkers.md

About eight minutes on one core; `--patches 0` leaves out the simulated MR patches. A tool that
cannot be imported (extra `bench`) is listed with the reason. The micro-CT specimen is given as an
argument or found in the folder CTSMA_REAL_DATA (default ../shared/data beside the repository). Its
header gives a wrong voxel size; the right one is 45.6 um.
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

from ctsma.biomarkers import DEFINITIONS, local_thickness, morphometry, mr_biomarkers
from ctsma.common import BIOMARKERS

SPECIMEN_MM = 0.0456  # voxel of the micro-CT specimen
WAIT_S = 300  # a tool that has not answered by then is a row that says so
SEED = 0  # of simulated patch k: (SEED, k)
PACKAGES = ("numpy", "scipy", "numba", "localthickness", "porespy", "itk-bonemorphometry")
BONEJ = {"tb_th_mm": 0.339, "tb_sp_mm": 0.505}  # BoneJ's own code on block [25:-25]
FINE_MM, SUB = 0.0546875, (14, 4, 4)  # micro-structure voxel; per MR voxel of 0.766 x 0.219 mm
FWHM_PER_SD = 2.3548  # of a Gaussian, 2 sqrt(2 ln 2)
BLURRED_FACTORS = (2, 3, 4, 5, 6, 8, 10)
LABELS = {"bv_tv": "BV/TV", "tb_th_mm": "Tb.Th", "tb_sp_mm": "Tb.Sp", "tb_n_per_mm": "Tb.N"}


def plates(thickness: float, separation: float) -> np.ndarray:
    """Oblique plates in a cube of 90 voxels."""
    rotation = Rotation.from_euler("zyx", [23, 17, 31], degrees=True).as_matrix()
    along = np.tensordot(rotation[0], np.indices((90,) * 3) - 44.9, 1)
    return along % (thickness + separation) < thickness


def rods(diameter: float, period: float) -> np.ndarray:
    """Oblique rods in a cube of 90 voxels."""
    rotation = Rotation.from_euler("zyx", [23, 17, 31], degrees=True).as_matrix()
    across = np.tensordot(rotation[1:], np.indices((90,) * 3) - 44.9, 1)
    across = (across + period / 2) % period - period / 2
    return (across**2).sum(0) < diameter**2 / 4


def ours(mask: np.ndarray, spacing: float) -> dict:
    found = morphometry(mask, spacing, further=False)
    return {name: found[name] for name in ("tb_th_mm", "tb_sp_mm", "tb_n_per_mm")}


def ours_thickness_only(mask: np.ndarray, spacing: float) -> dict:
    bone, marrow = local_thickness(mask, spacing), local_thickness(~mask, spacing)
    return {"tb_th_mm": float(bone[mask].mean()), "tb_sp_mm": float(marrow[~mask].mean())}


def localthickness(mask: np.ndarray, spacing: float) -> dict:
    from localthickness import local_thickness as tool  # it gives radii

    return {
        "tb_th_mm": float(2 * spacing * tool(mask)[mask].mean()),
        "tb_sp_mm": float(2 * spacing * tool(~mask)[~mask].mean()),
    }


def porespy(mask: np.ndarray, spacing: float) -> dict:
    from porespy.filters import local_thickness as tool  # it gives radii

    return {
        "tb_th_mm": float(2 * spacing * np.asarray(tool(mask))[mask].mean()),
        "tb_sp_mm": float(2 * spacing * np.asarray(tool(~mask))[~mask].mean()),
    }


def itk_bonemorphometry(mask: np.ndarray, spacing: float) -> dict:
    import itk

    grey = itk.image_from_array(mask.astype(np.float32))
    inside = itk.image_from_array(np.ones(mask.shape, np.uint8))
    for image in (grey, inside):
        image.SetSpacing([spacing] * 3)
    tool = itk.BoneMorphometryFeaturesFilter.New(grey, mask_image=inside, threshold=1)
    tool.Update()
    return {"tb_th_mm": tool.GetTbTh(), "tb_sp_mm": tool.GetTbSp(), "tb_n_per_mm": tool.GetTbN()}


TOOLS = [ours_thickness_only, ours, localthickness, porespy, itk_bonemorphometry]


def run_tool(tool, mask: np.ndarray, spacing: float, answers) -> None:
    """Run a tool twice (the first compiles); CPU seconds of the second run and peak memory."""
    try:
        tool(mask[:32, :32, :32], spacing)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        start = time.process_time()
        values = tool(mask, spacing)
        seconds = time.process_time() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        memory = {"peak_mb": peak / 1024, "rise_mb": (peak - before) / 1024}
        answers.put(values | {"cpu_s": seconds} | memory)
    except Exception as error:  # a tool that is not installed is a row with its reason
        answers.put({"error": f"{type(error).__name__}: {error}"})


def run_in_own_process(tool, mask: np.ndarray, spacing: float) -> dict:
    """`run_tool` in a process of its own, so that the peak memory is the tool's."""
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    process = context.Process(target=run_tool, args=(tool, mask, spacing, answers))
    process.start()
    try:
        row = answers.get(timeout=WAIT_S)
    except queue.Empty:  # also where the process died without an answer
        row = {"error": f"no answer within {WAIT_S} s"}
        process.kill()
    process.join()
    return row


def read_specimen(path: Path, margin: int = 25) -> np.ndarray:
    """The mask of the specimen without `margin` voxels on every side (its corners are empty)."""
    mask = sitk.GetArrayFromImage(sitk.ReadImage(str(path))) > 0
    return mask[margin:-margin, margin:-margin, margin:-margin]


def compare_tools(specimen: Path | None) -> list[dict]:
    """One row per mask and tool: thickness, error, CPU seconds, memory, ratios to ours."""
    thick = {"tb_th_mm": 6, "tb_sp_mm": 12, "tb_n_per_mm": 1 / 18}
    thin = {"tb_th_mm": 3, "tb_sp_mm": 8, "tb_n_per_mm": 1 / 11}
    masks = {
        "plates 6/12 voxels": (plates(6, 12), 1.0, thick),
        "plates 3/8 voxels": (plates(3, 8), 1.0, thin),
        "rods 6 voxels": (rods(6, 18), 1.0, {"tb_th_mm": 6}),
    }
    if specimen:
        masks["specimen (truth: BoneJ)"] = (read_specimen(specimen), SPECIMEN_MM, BONEJ)
    rows = []
    for name, (mask, spacing, truth) in masks.items():
        first = None
        for tool in TOOLS:
            row = {"mask": name, "tool": tool.__name__}
            row |= run_in_own_process(tool, mask, spacing)
            first = first or row
            for key, value in truth.items():
                if key in row:
                    row[f"{key}_error_pct"] = 100 * (row[key] / value - 1)
            for key in ("tb_th_mm", "tb_sp_mm", "cpu_s", "peak_mb"):
                if key in row:
                    row[f"{key}_over_ours"] = row[key] / first[key]
            rows.append(row)
    return rows


def resolution_series(
    mask: np.ndarray,
    voxel_mm: float,
    factors: tuple = (1, 2, 3, 4, 5, 6, 8, 10),
    psf_voxels: float = 0.0,
) -> list[dict]:
    """The same bone on coarser voxels: blurred, binned, thresholded at one half, measured.

    Parameters
    ----------
    mask : (z, y, x) bool, fine. voxel_mm : its isotropic voxel size, mm.
    factors : fine voxels per coarse voxel (1..10 of 45.6 um cover 46..456 um).
    psf_voxels : FWHM of a Gaussian point spread before the binning, in coarse voxels.

    Returns
    -------
    list of dict: ``voxel_mm``, ``psf_mm``, the four biomarkers and flag of `morphometry`.
    """
    rows = []
    for factor in factors:
        grey = mask
        if psf_voxels:
            sd = psf_voxels * factor / FWHM_PER_SD
            grey = ndimage.gaussian_filter(mask.astype(np.float32), sd)
        nz, ny, nx = (size // factor for size in mask.shape)
        grey = grey[: nz * factor, : ny * factor, : nx * factor]
        blocks = grey.reshape(nz, factor, ny, factor, nx, factor)
        coarse = blocks.mean((1, 3, 5), dtype=np.float32) > 0.5
        row = {"voxel_mm": voxel_mm * factor, "psf_mm": psf_voxels * voxel_mm * factor}
        rows.append(row | morphometry(coarse, voxel_mm * factor, further=False))
    return rows


def compare_resolutions(specimen: Path) -> list[dict]:
    """The specimen on coarser voxels, binned and blurred, over its values on its own voxel."""
    block = read_specimen(specimen)
    rows = resolution_series(block, SPECIMEN_MM)
    finest = rows[0]
    rows += resolution_series(block, SPECIMEN_MM, BLURRED_FACTORS, psf_voxels=1.5)
    return [
        row | {f"{name}_ratio": row[name] / finest[name] for name in BIOMARKERS} for row in rows
    ]


def time_morphometry(specimen: Path) -> dict:
    """CPU seconds of `morphometry` for 128^3 voxels of real bone: best of three."""
    block, seconds = read_specimen(specimen)[:128, :128, :128], {}
    for name, further in (("four", False), ("all", True)):
        times = []
        for _ in range(3):
            start = time.process_time()
            morphometry(block, SPECIMEN_MM, further=further)
            times.append(time.process_time() - start)
        seconds[name] = min(times)
    return seconds


def gaussian_field(rng, shape: tuple, wavelength_mm: float, stretch: float) -> np.ndarray:
    """Unit-variance Gaussian field of a narrow band of wavelengths, stretched along the rows."""
    frequencies = [np.fft.fftfreq(n, FINE_MM) for n in shape[:2]]
    frequencies.append(np.fft.rfftfreq(shape[2], FINE_MM))
    kz, ky, kx = np.meshgrid(*frequencies, indexing="ij")
    radius = np.sqrt(kz**2 + (ky * stretch) ** 2 + kx**2) * wavelength_mm
    spectrum = np.fft.rfftn(rng.standard_normal(shape)) * np.exp(-0.5 * ((radius - 1) / 0.2) ** 2)
    values = np.fft.irfftn(spectrum, shape, axes=(0, 1, 2))
    return values / values.std()


def scan(rng, bone: np.ndarray, snr: float) -> np.ndarray:
    """MR patch (12, 48, 48) at a random place off the grid, resampled linearly onto it; Rician."""
    offset = np.array([rng.integers(-7, 8), rng.integers(-2, 3), rng.integers(-2, 3)])
    low_z, low_y, low_x = offset + [14, 8, 8]
    part = bone[low_z : low_z + 14 * 14, low_y : low_y + 52 * 4, low_x : low_x + 52 * 4]
    signal = 1 - part.reshape(14, 14, 52, 4, 52, 4).mean((1, 3, 5))
    ramps = np.meshgrid(*(np.linspace(-1, 1, n) for n in signal.shape), indexing="ij")
    coil = np.exp(sum(rng.normal(0, 0.03) * ramp for ramp in ramps))
    signal = signal * coil * rng.uniform(600, 1000)
    noise = rng.normal(0, signal.max() / snr, (2, *signal.shape))
    displaced = rng.normal(0, 0.15, 3) / FINE_MM / SUB  # registration error of 0.15 mm per axis
    magnitude = np.hypot(signal + noise[0], noise[1])
    moved = ndimage.shift(magnitude, offset / SUB + displaced, order=1, mode="nearest")
    return moved[1:13, 2:50, 2:50]


def simulate_patch(rng) -> tuple[dict, np.ndarray, np.ndarray]:
    """Ground truth, scan and rescan of a random level set |f - c| < w, from plates to rods."""
    scale, stretch, mix = rng.normal(1, 0.1), rng.normal(1.45, 0.12), rng.normal(0.785, 0.25)
    shape = tuple(n * s + m for n, s, m in zip((14, 52, 52), SUB, (28, 16, 16), strict=True))
    fine = gaussian_field(rng, shape, 0.9 * scale, stretch)
    coarse = gaussian_field(rng, shape, 1.35 * scale, stretch)
    field = np.cos(mix) * fine + np.sin(mix) * coarse
    distance = np.abs(field - rng.normal(0.35, 0.1))
    share = np.clip(0.31 * np.exp(rng.normal(0, 0.25)), 0.1, 0.55)
    bone = distance < np.quantile(distance, share)
    # Susceptibility widens trabeculae in bSSFP: the image shows more bone (design choice).
    seen = distance < np.quantile(distance, min(1.2 * share, 0.9))
    truth = morphometry(bone[28:196, 16:208, 16:208], FINE_MM, further=False)
    snr = rng.uniform(11, 24)
    return truth, scan(rng, seen, snr), scan(rng, seen, snr)


def specimen_patches(path: Path, seed: int = SEED) -> tuple[list[dict], np.ndarray]:
    """Ground truth and MR-like patches of real bone.

    Eight overlapping blocks of 5.1 mm, sliced along each of the three axes. A voxel is 16 x 5 x 5
    of the specimen (0.73 x 0.228 x 0.228 mm). Signal is 800 x share of marrow, SNR 15 (Rician).
    """
    whole, truths, patches = read_specimen(path, 20), [], []
    rng = np.random.default_rng(seed)
    for corner in np.ndindex(2, 2, 2):
        block = whole[tuple(slice(-112, None) if far else slice(112) for far in corner)]
        truths += [morphometry(block, SPECIMEN_MM, further=False)] * 3
        for axis in range(3):
            part = np.moveaxis(block, axis, 0)[:, :110, :110]
            signal = 800 * (1 - part.reshape(7, 16, 22, 5, 22, 5).mean((1, 3, 5)))
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
    """One row per set of patches and definition: ratio, correlation and rescan ICC by biomarker."""
    rows = []
    if n_patches:
        patches = [simulate_patch(np.random.default_rng([SEED, k])) for k in range(n_patches)]
        truths, first, second = zip(*patches, strict=True)
        spacing = (0.765625, 0.21875, 0.21875)
        rows += definition_rows("level sets", truths, np.array(first), np.array(second), spacing)
    if specimen:
        truths, first = specimen_patches(specimen)
        spacing = (16 * SPECIMEN_MM, 5 * SPECIMEN_MM, 5 * SPECIMEN_MM)
        rows += definition_rows("specimen blocks", truths, first, None, spacing)
    return rows


def definition_rows(name: str, truths, first, second, spacing: tuple) -> list[dict]:
    """Rows of `compare_definitions` for one set; `second` is its rescan, or None."""
    rows, voi = [], np.ones(first.shape, bool)
    for definition in DEFINITIONS:
        mr_biomarkers(first[:1], voi[:1], spacing, definition)  # compiles
        start = time.process_time()
        found = mr_biomarkers(first, voi, spacing, definition)
        cpu_ms = 1e3 * (time.process_time() - start) / len(first)
        again = found if second is None else mr_biomarkers(second, voi, spacing, definition)
        good = (found["flag"] == "") & (again["flag"] == "")
        row = {"set": name, "definition": definition, "cpu_ms": cpu_ms}
        row |= {"n": len(first), "n_good": int(good.sum())}
        for biomarker in BIOMARKERS:
            true = np.array([truth[biomarker] for truth in truths])[good]
            value = found[biomarker][good]
            row[biomarker] = {
                "spearman": float(spearmanr(value, true)[0]),
                "pearson": float(np.corrcoef(value, true)[0, 1]),
                "ratio_to_truth": float((value / true).mean()),
            }
            if second is not None:
                row[biomarker]["rescan_icc"] = single_icc(value, again[biomarker][good])
        rows.append(row)
    return rows


def table(rows: list[dict], columns: dict[str, tuple[str, str]]) -> str:
    """Markdown table; `columns` {key of the rows: (title, format)}."""
    lines = ["| " + " | ".join(title for title, _ in columns.values()) + " |"]
    lines.append("|" + " --- |" * len(columns))
    for row in rows:
        cells = []
        for key, (_, form) in columns.items():
            value = row.get(key, "")
            cells.append(format(value, form) if isinstance(value, float) else str(value))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


TOOL_COLUMNS = {
    "mask": ("mask", ""),
    "tool": ("tool", ""),
    "tb_th_mm": ("Tb.Th", ".3f"),
    "tb_sp_mm": ("Tb.Sp", ".3f"),
    "tb_th_mm_error_pct": ("Tb.Th error %", "+.1f"),
    "tb_sp_mm_error_pct": ("Tb.Sp error %", "+.1f"),
    "cpu_s": ("CPU s", ".2f"),
    "peak_mb": ("peak MB", ".0f"),
    "cpu_s_over_ours": ("CPU / ours", ".2f"),
    "peak_mb_over_ours": ("peak / ours", ".2f"),
    "error": ("not run because", ""),
}
RESOLUTION_COLUMNS = {
    "voxel_mm": ("voxel mm", ".3f"),
    "psf_mm": ("blur FWHM mm", ".3f"),
    "bv_tv_ratio": ("BV/TV", ".2f"),
    "tb_th_mm_ratio": ("Tb.Th", ".2f"),
    "tb_sp_mm_ratio": ("Tb.Sp", ".2f"),
    "tb_n_per_mm_ratio": ("Tb.N", ".2f"),
    "flag": ("flag", ""),
}
DEFINITION_COLUMNS = {
    "set": ("patches", ""),
    "good": ("measured", ""),
    "biomarker": ("biomarker", ""),
    "definition": ("definition", ""),
    "ratio_to_truth": ("ratio to ground truth", ".2f"),
    "spearman": ("Spearman", ".2f"),
    "rescan_icc": ("rescan ICC", ".2f"),
    "cpu_ms": ("ms per patch", ".0f"),
}
PAGE = Path(__file__).with_name("biomarkers_page.md")


def page(result: dict) -> str:
    """docs/biomarkers.md from the numbers alone."""
    definitions = []
    for name in dict.fromkeys(row["set"] for row in result["definitions"]):
        for biomarker in BIOMARKERS:
            for row in result["definitions"]:
                if row["set"] == name:
                    shown = {"good": f"{row['n_good']} of {row['n']}"}
                    shown |= {"biomarker": LABELS[biomarker]}
                    definitions.append(row | shown | row[biomarker])
    return PAGE.read_text().format(
        command=result["command"],
        versions=", ".join(f"{name} {value}" for name, value in result["versions"].items()),
        seed=result["seed"],
        tools=table(result["tools"], TOOL_COLUMNS),
        resolution=table(result["resolution"], RESOLUTION_COLUMNS),
        definitions=table(definitions, DEFINITION_COLUMNS),
        truth_four=result["truth_128_s"]["four"],
        truth_all=result["truth_128_s"]["all"],
    )


def main() -> None:
    """Measure everything and write the JSON and the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--specimen", type=Path, help="micro-CT mask, NIfTI")
    parser.add_argument("--patches", type=int, default=36, help="simulated MR patches, 7 s each")
    parser.add_argument("--out", type=Path, default=Path("benchmark_biomarkers.json"))
    parser.add_argument("--page", type=Path, help="write the page of tables there, too")
    given = parser.parse_args()
    default = Path(__file__).parents[2] / "shared" / "data"
    folder = Path(os.environ.get("CTSMA_REAL_DATA", default))
    specimen = given.specimen or folder / "microct_trabecular.nii.gz"
    specimen = specimen if specimen.exists() else None
    installed = {distribution.metadata["Name"].lower() for distribution in metadata.distributions()}
    versions = {"python": platform.python_version()}
    versions |= {name: metadata.version(name) for name in PACKAGES if name in installed}
    nan = float("nan")
    result = {
        "command": "python " + " ".join(sys.argv),
        "seed": SEED,
        "versions": versions,
        "specimen": bool(specimen),
        "tools": compare_tools(specimen),
        "truth_128_s": time_morphometry(specimen) if specimen else {"four": nan, "all": nan},
        "resolution": compare_resolutions(specimen) if specimen else [],
        "definitions": compare_definitions(given.patches, specimen),
    }
    given.out.write_text(json.dumps(result, indent=1) + "\n")
    if given.page:
        given.page.write_text(page(result))


if __name__ == "__main__":
    main()
