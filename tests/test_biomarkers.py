"""Biomarkers against closed forms, their definition, a specimen and simulated MR patches."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from scipy.ndimage import gaussian_filter
from scipy.spatial.transform import Rotation
from scipy.stats import spearmanr

from ctsma import biomarkers
from ctsma.biomarkers.binary import _euler_number
from ctsma.biomarkers.thickness import mean_thickness
from ctsma.common import BIOMARKERS, InputError

REPOSITORY = Path(__file__).parents[1]
MR_SPACING_MM = (0.75, 0.21875, 0.21875)
OBLIQUE = Rotation.from_euler("zyx", [23, 17, 31], degrees=True).as_matrix()


def coordinates(n, rotation=OBLIQUE):
    """(3, n, n, n) voxel coordinates in a rotated frame about the centre, off the lattice."""
    return np.tensordot(rotation, np.indices((n,) * 3) - n / 2 + 0.123, 1)


def plates(n, thickness, separation, rotation=OBLIQUE):
    return coordinates(n, rotation)[0] % (thickness + separation) < thickness


def rods(n, diameter, period):
    across = (coordinates(n)[1:] + period / 2) % period - period / 2
    return (across**2).sum(0) < diameter**2 / 4


def ball(n, diameter):
    return (coordinates(n) ** 2).sum(0) < diameter**2 / 4


def torus(n, radius, tube):
    z, y, x = coordinates(n)
    return (np.hypot(y, x) - radius) ** 2 + z**2 < tube**2


def gaussian_field(shape, wavelength, rng, stretch=1.0):
    """Unit-variance Gaussian field of a narrow band of wavelengths (voxels), stretched in z."""
    k = np.meshgrid(*(np.fft.fftfreq(n) for n in shape), indexing="ij", sparse=True)
    radius = np.sqrt((k[0] * stretch) ** 2 + k[1] ** 2 + k[2] ** 2) * wavelength
    field = np.fft.ifftn(
        np.fft.fftn(rng.standard_normal(shape)) * np.exp(-0.5 * ((radius - 1) / 0.2) ** 2)
    ).real
    return field / field.std()


def mr_patch(rng, half_width, wavelength_mm=1.1, snr=15.0):
    """MR-like patch (12, 48, 48) of a level set |f - 0.35| < w, and its fine mask of 0.109 mm."""
    fine = np.abs(gaussian_field((84, 96, 96), wavelength_mm / 0.109375, rng) - 0.35) < half_width
    signal = 800 * (1 - fine.reshape(12, 7, 48, 2, 48, 2).mean((1, 3, 5)))
    noise = rng.normal(0, 800 / snr, (2, *signal.shape))
    return np.hypot(signal + noise[0], noise[1]), fine


def measure_mr(patches, voi=None, **options):
    """`mr_biomarkers` on the MR voxel of the study, over whole patches when `voi` is None."""
    voi = np.ones(np.shape(patches), bool) if voi is None else voi
    return biomarkers.mr_biomarkers(patches, voi, MR_SPACING_MM, **options)


@pytest.fixture(scope="module")
def batch():
    """Eight patches of rising BV/TV and their true morphometry."""
    rng = np.random.default_rng(0)
    widths = np.linspace(0.2, 0.6, 8)
    patches, masks = zip(*(mr_patch(rng, w) for w in widths), strict=True)
    truth = [biomarkers.morphometry(mask, 0.109375, further=False) for mask in masks]
    return np.array(patches), {name: np.array([t[name] for t in truth]) for name in BIOMARKERS}


def by_definition(phase, opposite):
    """Local thickness as it is defined, all centres against all voxels."""
    points, surface = np.argwhere(phase), np.argwhere(opposite)
    radius2 = ((points[:, None] - surface) ** 2).sum(-1).min(1)
    covered = ((points[:, None] - points) ** 2).sum(-1) <= radius2
    thickness = np.zeros(phase.shape, np.float32)
    thickness[phase] = 2 * np.sqrt(np.where(covered, radius2, 0).max(1), dtype=np.float32)
    return thickness


@pytest.mark.parametrize("seed", range(4))
def test_local_thickness_equals_the_definition_on_every_voxel(seed):
    rng = np.random.default_rng(seed)
    mask = gaussian_filter(rng.standard_normal((13, 15, 14)), 1.2) > 0
    voi = (
        gaussian_filter(rng.standard_normal(mask.shape), 4) > -0.02
        if seed % 2
        else np.ones_like(mask)
    )
    found = biomarkers.local_thickness(mask, 1.0, voi, clean_up=False)
    assert np.array_equal(found, by_definition(mask & voi, ~mask & voi))


@pytest.mark.parametrize("thickness, separation", [(2, 6), (4, 10), (6, 12), (8, 10)])
def test_plates_along_the_grid_of_even_thickness_are_exact(thickness, separation):
    mask = np.zeros((5 * (thickness + separation), 40, 40), bool)
    for start in range(0, len(mask), thickness + separation):
        mask[start + separation // 2 :][:thickness] = True
    found = biomarkers.morphometry(mask, 0.1)
    assert found["tb_th_mm"] == pytest.approx(0.1 * thickness, rel=1e-6)
    assert found["bv_tv"] == pytest.approx(thickness / (thickness + separation), rel=1e-12)
    # Mid-planes are two voxels wide along the grid: up to two voxels of the period are lost.
    assert -2 <= 10 / found["tb_n_per_mm"] - (thickness + separation) <= 0


@pytest.mark.parametrize("thickness, separation", [(3, 8), (4, 10), (4.5, 9.5), (6, 12)])
def test_oblique_plates_within_one_voxel(thickness, separation):
    # Voxelisation bias of the definition: +0.5 voxel (0.4 to 0.85), also on the gaps.
    found = biomarkers.morphometry(plates(72, thickness, separation), 1.0)
    assert 0.3 < found["tb_th_mm"] - thickness < 0.9
    assert 0.3 < found["tb_sp_mm"] - separation < 1.1
    # Mid-axis distances: voxel rounding of both mid-planes, 7 % of periods of 11 to 18 voxels.
    assert found["tb_n_per_mm"] * (thickness + separation) == pytest.approx(1, abs=0.07)
    # 13 lattice directions see a plane within 7 % whatever its angle (Crofton weights).
    assert found["tb_n_mil_per_mm"] * (thickness + separation) == pytest.approx(1, abs=0.07)


@pytest.mark.parametrize("diameter", [4, 6, 8])
def test_oblique_rods_within_a_quarter_voxel(diameter):
    found = biomarkers.local_thickness(rods(72, diameter, 2 * diameter + 6), 1.0)
    assert found[found > 0].mean() == pytest.approx(diameter, abs=0.25)


@pytest.mark.parametrize("diameter", [6, 10, 16])
def test_spheres_lose_less_than_a_voxel(diameter):
    # Voxelisation bias: 0 to -1 voxel, by the position of the centre on the lattice.
    found = biomarkers.local_thickness(ball(30, diameter), 1.0)
    assert -1.0 < found[found > 0].mean() - diameter < 0.0


def test_thickness_follows_a_step_of_two_voxels():
    mask = np.zeros((20, 20, 60), bool)
    mask[8:12, :, :30] = mask[7:13, :, 30:] = True
    row = biomarkers.local_thickness(mask, 0.05, clean_up=False)[10, 10]
    assert row[:26] == pytest.approx(0.2) and row[32:] == pytest.approx(0.3)


def test_plate_thickness_converges_with_voxel_size():
    # 0.3 mm plates every 0.8 mm; the error is a fixed share of a voxel and halves with it.
    errors = [
        biomarkers.morphometry(plates(n, 0.3 * n / 4, 0.5 * n / 4), 4 / n)["tb_th_mm"] - 0.3
        for n in (40, 80)
    ]
    assert 0 < errors[1] < 0.75 * errors[0] < 0.075


@pytest.mark.parametrize(
    "shape, euler",
    [
        (ball(30, 16), 1),
        (torus(40, 11, 4), 0),
        (ball(30, 20) & ~ball(30, 10), 2),  # a cavity adds one
        (ball(24, 9)[None].repeat(3, 0).reshape(72, 24, 24), 3),  # three balls
        (
            np.ones((9, 8, 7), bool),
            0,
        ),  # bone everywhere: cells on the border belong half to the neighbours
    ],
)
def test_euler_number_of_known_shapes(shape, euler):
    assert _euler_number(shape, np.ones_like(shape)) == pytest.approx(euler, abs=1e-9)


def test_connectivity_density_counts_handles_per_volume():
    ring = torus(40, 11, 4)
    found = biomarkers.morphometry(np.concatenate([ring, ring]), 0.5)
    # Euler number 0 for two rings: (1 - 0) / volume.
    assert found["conn_d_per_mm3"] == pytest.approx(1 / (2 * 20**3), rel=1e-9)


@pytest.mark.parametrize("stretch", [1.0, 1.5])
def test_anisotropy_and_intercepts_of_a_gaussian_field(stretch):
    field = gaussian_field((96, 96, 96), 12, np.random.default_rng(3), stretch)
    found = biomarkers.morphometry(np.abs(field) < 0.4, 1.0)
    # A stretched isotropic field has mean intercepts in the ratio of the stretch; the sample of
    # 8 wavelengths is itself anisotropic by 2 to 3 %.
    assert found["anisotropy"] == pytest.approx(stretch, rel=0.06)
    # Rice: crossings of level u per length = sqrt(second spectral moment) / pi exp(-u^2 / 2),
    # here for two levels.
    slopes = [
        np.sqrt(((np.roll(field, -1, a) - np.roll(field, 1, a)) ** 2).mean()) / 2 for a in range(3)
    ]
    mean_slope = np.mean(
        [np.linalg.norm(slopes * n) for n in Rotation.random(400, rng=0).as_matrix()[:, 0]]
    )
    assert found["tb_n_mil_per_mm"] == pytest.approx(
        2 * mean_slope / np.pi * np.exp(-0.08), rel=0.04
    )


@pytest.mark.parametrize(
    "shape, smi, tolerance",
    # The rod's and the ball's surfaces are counted on voxels: 10 %.
    [(plates(48, 6, 12), 0, 0.05), (rods(64, 8, 20), 3, 0.4), (ball(40, 26), 4, 0.4)],
)
def test_structure_model_index(shape, smi, tolerance):
    assert biomarkers.morphometry(shape, 1.0)["smi"] == pytest.approx(smi, abs=tolerance)


def test_morphometry_does_not_depend_on_flips_axes_or_units():
    mask = np.abs(gaussian_field((40, 40, 40), 10, np.random.default_rng(1))) < 0.45
    found = biomarkers.morphometry(mask, 0.1)
    numbers = sorted(set(found) - {"flag"})
    for other in (mask[::-1], mask[:, ::-1, ::-1], mask.transpose(2, 0, 1)):
        turned = biomarkers.morphometry(other, 0.1)
        assert [turned[name] for name in numbers] == pytest.approx(
            [found[name] for name in numbers], rel=1e-5
        )
    double = biomarkers.morphometry(mask.astype(np.uint8) * 255, (0.2, 0.2, 0.2))
    powers = dict.fromkeys(("tb_th_mm", "tb_sp_mm"), 2) | dict.fromkeys(
        ("tb_n_per_mm", "tb_n_mil_per_mm"), 0.5
    )
    for name in numbers:
        assert double[name] == pytest.approx(
            found[name] * (powers | {"conn_d_per_mm3": 1 / 8}).get(name, 1), rel=1e-6
        )
    assert biomarkers.morphometry(mask, 0.1, further=False) == {
        n: found[n] for n in (*BIOMARKERS, "flag")
    }


def test_a_box_of_interest_equals_cropping_and_hides_what_is_outside():
    mask = np.abs(gaussian_field((40, 40, 40), 8, np.random.default_rng(2))) < 0.4
    voi = np.zeros_like(mask)
    voi[5:35, 4:34, 6:36] = True
    inside = biomarkers.morphometry(mask, 0.1, voi)
    emptied = biomarkers.morphometry(mask & voi, 0.1, voi)
    cropped = biomarkers.morphometry(mask[5:35, 4:34, 6:36], 0.1)
    assert emptied == inside
    for name in set(inside) - {"smi", "flag"}:
        assert inside[name] == pytest.approx(cropped[name], rel=1e-6)
    # The smoothed surface reflects at an array's border and is renormalised at a voi's: 0.1 in SMI.
    assert inside["smi"] == pytest.approx(cropped["smi"], abs=0.1)


@pytest.fixture(scope="module")
def specimen(real_data):
    """Path of the micro-CT mask of real human bone, voxel 45.6 um (its header says 1 mm)."""
    path = real_data / "microct_trabecular.nii.gz"
    if not path.exists():
        pytest.skip("the optional micro-CT specimen is absent")
    return path


@pytest.fixture(scope="module")
def benchmark():
    """The module benchmarks/biomarkers.py."""
    spec = importlib.util.spec_from_file_location(
        "benchmark_biomarkers", REPOSITORY / "benchmarks" / "biomarkers.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_real_specimen_within_three_percent_of_bonej(specimen):
    whole = sitk.GetArrayFromImage(sitk.ReadImage(str(specimen))) > 0
    voi = np.zeros_like(whole)
    voi[25:-25, 25:-25, 25:-25] = True
    found = biomarkers.morphometry(whole[25:-25, 25:-25, 25:-25], 0.0456)
    # BoneJ's own code on the same block; 3 % asked, 0.5 % measured.
    assert found["bv_tv"] == pytest.approx(0.491, abs=5e-4)
    assert found["tb_th_mm"] == pytest.approx(0.339, rel=0.01)
    assert found["tb_sp_mm"] == pytest.approx(0.505, rel=0.01)
    assert found["flag"] == ""
    assert biomarkers.local_thickness(whole, 0.0456, voi)[voi & whole].mean() == pytest.approx(
        found["tb_th_mm"], rel=1e-5
    )


@pytest.mark.slow  # simulated patches are ranked below
def test_mr_of_the_real_specimen_ranks_its_blocks_as_the_truth_does(specimen, benchmark):
    truths, patches = benchmark.specimen_patches(specimen)
    spacing = (16 * 0.0456, 5 * 0.0456, 5 * 0.0456)
    voi = np.ones(patches.shape, bool)
    found = {d: biomarkers.mr_biomarkers(patches, voi, spacing, d) for d in ("plate", "direct")}
    good = found["plate"]["flag"] == ""
    # Some blocks of this dense bone (BV/TV 0.47 to 0.53) look like inverted contrast.
    assert good.mean() > 0.6 and set(found["plate"]["flag"]) <= {"", "inverted contrast"}
    true = {name: np.array([truth[name] for truth in truths])[good] for name in BIOMARKERS}
    # Blocks overlap and their ground truth varies by 3 to 4 %, so rank correlations are low:
    # measured 0.8, 0.4 to 0.6, 0.4 to 0.5 and 0.4 to 0.6 over seeds.
    for name, least in zip(BIOMARKERS, (0.6, 0.2, 0.2, 0.2), strict=True):
        assert spearmanr(found["plate"][name][good], true[name])[0] > least, name
    # How far off the truth they are, as the docstring states.
    ranges = {
        "bv_tv": (1.1, 1.9),
        "tb_th_mm": (1.5, 1.8),
        "tb_sp_mm": (0.7, 1.1),
        "tb_n_per_mm": (0.55, 0.75),
    }
    for name, (low, high) in ranges.items():
        assert low <= (found["plate"][name][good] / true[name]).mean() <= high, name
    for name, (low, high) in {"tb_th_mm": (2.9, 3.5), "tb_sp_mm": (1.3, 2.1)}.items():
        assert low <= (found["direct"][name][good] / true[name]).mean() <= high, name


def test_coarse_voxels_thicken_the_real_specimen_as_published(specimen, benchmark):
    rows = benchmark.resolution_series(benchmark.read_specimen(specimen), 0.0456, (1, 2, 10))
    thickness = np.array([row["tb_th_mm"] for row in rows]) / rows[0]["tb_th_mm"]
    # Three published specimens at 91 and 456 um, binned: 1.10 to 1.17 and 3.6 to 4.7 times too
    # thick; this one 1.11 and 3.6.
    assert 1.05 < thickness[1] < 1.2
    assert 3.3 < thickness[2] < 4.7


def test_the_page_of_tables_comes_from_the_published_numbers(benchmark):
    result = json.loads((REPOSITORY / "docs" / "results" / "biomarkers.json").read_text())
    assert (REPOSITORY / "docs" / "biomarkers.md").read_text() == benchmark.page(result)


def test_coarser_voxels_thicken_trabeculae(benchmark):
    fine = np.abs(gaussian_field((96, 96, 96), 20, np.random.default_rng(5))) < 0.35
    rows = benchmark.resolution_series(fine, 0.05, (1, 2, 4, 6))
    assert rows[0]["tb_th_mm"] == biomarkers.morphometry(fine, 0.05)["tb_th_mm"]
    assert [r["voxel_mm"] for r in rows] == pytest.approx([0.05, 0.1, 0.2, 0.3])
    assert np.all(np.diff([r["tb_th_mm"] for r in rows]) > 0)
    blurred = benchmark.resolution_series(fine, 0.05, (4,), psf_voxels=1.5)[0]
    assert blurred["tb_th_mm"] > rows[2]["tb_th_mm"] and blurred["psf_mm"] == pytest.approx(0.3)


@pytest.mark.parametrize(
    "mask, voi, flag, bv_tv",
    [
        (np.zeros((9, 9, 9)), None, "no bone", 0),
        (np.ones((9, 9, 9)), None, "no marrow", 1),
        (np.ones((9, 9, 9)), np.zeros((9, 9, 9)), "empty voi", np.nan),
        (ball(24, 12), None, "volume of interest too small", None),
    ],
)
def test_morphometry_flags(mask, voi, flag, bv_tv):
    found = biomarkers.morphometry(mask, 0.1, voi)
    assert found["flag"] == flag
    if bv_tv is not None:
        assert found["bv_tv"] == pytest.approx(bv_tv, nan_ok=True)
        assert all(np.isnan(v) for name, v in found.items() if name not in ("bv_tv", "flag"))


@pytest.mark.parametrize(
    "mask, spacing, voi, match",
    [
        (np.ones((9, 9)), 0.1, None, "3D"),
        (np.ones((1, 9, 9)), 0.1, None, "two slices"),
        (np.full((9, 9, 9), np.nan), 0.1, None, "NaN"),
        (np.random.default_rng(0).random((9, 9, 9)), 0.1, None, "threshold it first"),
        (np.eye(9)[None].repeat(9, 0), (0.75, 0.2, 0.2), None, "isotropic"),
        (np.eye(9)[None].repeat(9, 0), -0.1, None, "isotropic"),
        (np.eye(9)[None].repeat(9, 0), (0.1, 0.1), None, "isotropic"),
        (np.eye(9)[None].repeat(9, 0), 0.1, np.ones((9, 9, 8)), "one shape"),
    ],
)
def test_morphometry_refuses(mask, spacing, voi, match):
    with pytest.raises(InputError, match=match):
        biomarkers.morphometry(mask, spacing, voi)


def test_a_single_phase_has_no_thickness():
    full = np.ones((9, 9, 9), bool)
    assert np.isnan(mean_thickness(full, ~full)) and np.isnan(mean_thickness(~full, full))
    with pytest.raises(InputError, match="one phase"):
        biomarkers.local_thickness(np.ones((9, 9, 9), bool), 0.1)


@pytest.mark.parametrize("definition", ["plate", "direct"])
def test_mr_biomarkers_rank_patches_as_the_ground_truth_does(batch, definition):
    patches, truth = batch
    found = measure_mr(patches, definition=definition)
    assert set(found["flag"]) == {""}
    # Eight patches of one wavelength whose BV/TV rises threefold: Tb.Th and Tb.Sp must follow.
    for name in ("bv_tv", "tb_th_mm", "tb_sp_mm"):
        assert spearmanr(found[name], truth[name])[0] > 0.85
    # Noise raises the marrow reference of a patch by up to 3 SD (1 / 15 each), bone lowers it.
    assert np.all(np.abs(found["bv_tv"] - truth["bv_tv"]) < 0.15)
    assert np.all(found["tb_th_mm"] > truth["tb_th_mm"])  # blur thickens


def test_finer_trabeculae_have_a_larger_number():
    rng = np.random.default_rng(4)
    patches = np.array([mr_patch(rng, 0.4, wavelength)[0] for wavelength in (1.8, 1.5, 1.2)])
    for definition in ("plate", "direct"):
        assert np.all(np.diff(measure_mr(patches, definition=definition)["tb_n_per_mm"]) > 0)


def test_identities_of_the_plate_and_the_paper_definition(batch):
    plate = measure_mr(batch[0], definition="plate")
    assert plate["tb_th_mm"] * plate["tb_n_per_mm"] == pytest.approx(plate["bv_tv"])
    assert plate["tb_sp_mm"] * plate["tb_n_per_mm"] == pytest.approx(1 - plate["bv_tv"])
    paper = measure_mr(batch[0], definition="paper")
    assert paper["tb_n_per_mm"] == pytest.approx(1 / (paper["tb_th_mm"] + paper["tb_sp_mm"]))
    assert paper["bv_tv"] == pytest.approx(paper["tb_th_mm"] * paper["tb_n_per_mm"])


@pytest.mark.parametrize("definition", ["paper", "plate", "direct"])
def test_a_batch_equals_its_patches_and_nothing_outside_the_voi_matters(batch, definition):
    patches, voi = batch[0][:3], np.ones((3, 12, 48, 48), bool)
    voi[2, :, :8] = False
    together = measure_mr(patches, voi, definition=definition)
    for k in range(3):
        alone = measure_mr(patches[k], voi[k], definition=definition)
        assert {name: values[k] for name, values in together.items()} == alone
    without_outside = np.where(voi[2], patches[2], np.nan)
    assert measure_mr(without_outside, voi[2], definition=definition) == alone


def test_bone_fraction_ignores_gain_and_a_linear_coil_field(batch):
    patch, voi = batch[0][5], np.ones((12, 48, 48), bool)
    plain = biomarkers.bone_volume_fraction(patch, voi, MR_SPACING_MM)
    assert plain.dtype == np.float32 and plain.min() >= 0 and plain.max() <= 1
    amplified = biomarkers.bone_volume_fraction(3.7 * patch, voi, MR_SPACING_MM)
    assert amplified == pytest.approx(plain, abs=1e-5)
    # A field of +-15 % that is taken for bone changes BV/TV by up to 0.1.
    field = np.linspace(0.85, 1.15, 48)
    with_field = biomarkers.bone_volume_fraction(field * patch, voi, MR_SPACING_MM)
    assert with_field.mean() == pytest.approx(plain.mean(), abs=0.01)


def test_a_known_marrow_intensity_gives_an_unbiased_fraction():
    patch, fine = mr_patch(np.random.default_rng(8), 0.5, snr=1e6)
    assert measure_mr(patch, marrow=800.0)["bv_tv"] == pytest.approx(fine.mean(), abs=1e-4)


def test_mr_flags(batch):
    patch, full = batch[0][3], np.ones((12, 48, 48), bool)
    corner = np.zeros_like(full)
    corner[:4, :12, :12] = True
    hole = patch.copy()
    hole[5, 5, 5] = np.nan
    speck = np.full(patch.shape, 800.0)
    speck[:, :2] = 400.0
    cases = [
        (patch, full, ""),
        (patch, corner, "voi too small"),
        (hole, full, "not finite"),
        (np.full_like(patch, 5), full, "no contrast"),
        (patch.max() - patch, full, "inverted contrast"),
        (speck, full, "too little bone"),
        (patch, np.zeros_like(full), "voi too small"),
    ]
    patches, voi, expected = zip(*cases, strict=True)
    found = measure_mr(np.array(patches), np.array(voi))
    assert tuple(found["flag"]) == expected
    for name in BIOMARKERS:
        assert np.array_equal(np.isnan(found[name]), found["flag"] != "")
    assert measure_mr(patch, marrow=1e5)["flag"] == "too much bone"
    fractions = biomarkers.bone_volume_fraction(np.array(patches), np.array(voi), MR_SPACING_MM)
    assert np.isfinite(fractions[0]).all() and np.isnan(fractions[1]).all()


@pytest.mark.parametrize("signal, flag", [(800.0, "too little bone"), (0.0, "too much bone")])
def test_a_patch_of_one_tissue_is_flagged(signal, flag):
    noise = np.random.default_rng(0).normal(0, 50, (2, 12, 48, 48))
    patch = np.hypot(noise[0] + signal, noise[1])
    assert measure_mr(patch, marrow=800.0)["flag"] == flag
    if signal:  # bone alone has no marrow to refer to and needs the known intensity (docstring)
        assert measure_mr(patch)["flag"] == "inverted contrast"


@pytest.mark.parametrize(
    "change, match",
    [
        ({"definition": "better"}, "paper, plate, direct"),
        ({"spacing_mm": MR_SPACING_MM[::-1]}, "square pixels"),
        ({"spacing_mm": 0.2}, "square pixels"),
        ({"spacing_mm": (0.75, 0.2, np.nan)}, "square pixels"),
        ({"marrow": 0.0}, "not positive"),
        ({"marrow": np.nan}, "not positive"),
        ({"voi": np.ones((12, 48, 47))}, "rows, columns"),
        ({"patches": np.ones((1, 48, 48)), "voi": np.ones((1, 48, 48))}, "rows, columns"),
    ],
)
def test_mr_measures_refuse(batch, change, match):
    arguments = {"patches": batch[0][0], "voi": np.ones((12, 48, 48)), "spacing_mm": MR_SPACING_MM}
    arguments |= change
    with pytest.raises(InputError, match=match):
        biomarkers.mr_biomarkers(**arguments)
    if "definition" not in change:
        with pytest.raises(InputError, match=match):
            biomarkers.bone_volume_fraction(**arguments)


def test_thresholded_ct_overestimates_thickness_and_flags_what_does_not_exist():
    field = gaussian_field((84, 96, 96), 10, np.random.default_rng(6))
    fine = np.abs(field - 0.35) < 0.4
    blurred = gaussian_filter(fine.astype(float), 4)
    coarse = blurred.reshape(12, 7, 24, 4, 24, 4).mean((1, 3, 5))
    hu = 1300.0 * coarse - 80
    hole = hu.copy()
    hole[5, 5, 5] = np.nan
    cases = {
        "volume of interest too small": hu,
        "no bone": np.full_like(hu, -80),
        "no marrow": hu + 2000,
        "not finite": hole,
    }
    spacing, voi = (0.75, 0.4375, 0.4375), np.ones((4, 12, 24, 24), bool)
    found = biomarkers.ct_threshold_biomarkers(np.array(list(cases.values())), voi, spacing)
    assert list(found["flag"]) == list(cases)
    true = biomarkers.morphometry(fine, 0.109375)
    assert found["tb_th_mm"][0] > 2 * true["tb_th_mm"]
    assert found["bv_tv"][1] == 0 and np.isnan(found["tb_th_mm"][1:]).all()
    small = biomarkers.ct_threshold_biomarkers(hu, ~voi[0], spacing)
    assert small["flag"] == "voi too small" and np.isnan(small["bv_tv"])
    with pytest.raises(InputError, match="square pixels"):
        biomarkers.ct_threshold_biomarkers(hu, voi[0], spacing[::-1])


def test_nan_in_a_volume_of_interest_is_outside():
    rng = np.random.default_rng(0)
    mask = gaussian_filter(rng.normal(size=(30, 30, 30)), 2) > 0
    inside = np.zeros(mask.shape, bool)
    inside[4:26, 4:26, 4:26] = True
    voi = np.where(inside, 1.0, np.nan)
    assert biomarkers.morphometry(mask, 0.05, voi) == biomarkers.morphometry(mask, 0.05, inside)
    bone = gaussian_filter(rng.normal(size=(16, 48, 48)), 1.5) > 0.06
    patch = gaussian_filter(900.0 - 700 * bone, 0.5)
    region = np.zeros(patch.shape, bool)
    region[2:14, 4:44, 4:44] = True
    number = np.where(region, 1.0, np.nan)
    found = biomarkers.mr_biomarkers(patch, number, MR_SPACING_MM)
    assert found == biomarkers.mr_biomarkers(patch, region, MR_SPACING_MM)
    assert found["flag"] == ""
