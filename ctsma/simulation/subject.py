"""One simulated knee before any scanner sees it: warped anatomy, disease, and microstructure parameters per bone."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ctsma.cohort import BONES

from .anatomy import Template, grid_points, label_template, own_template, sample_grid
from .microstructure import FINE_VOXELS, TILE_SIZE, is_bone, level_half_width, make_tile, smooth_field
from .protocol import load_protocol, z_score

GRID_MM = 3.0  # spacing of the microstructure parameter grids (our choice: parameters vary over 10 mm)
BOX_MM = {"femur": ((-51.0, -51.0, -15.0), (51.0, 51.0, 63.0)), "tibia": ((-51.0, -51.0, -66.0), (51.0, 51.0, 12.0))}
THETA = (0.05, np.pi / 2 - 0.05)  # rad; mixing of the fine and the coarse field
WARP_GRID_MM = 6.0
WARP_BOX_MM = np.full(3, -102.0), np.full(3, 102.0)


@dataclass(frozen=True)
class Microstructure:
    """Trabeculae of one bone in its own frame: tile affine (3, 4) mm -> voxels, and parameters on a grid.

    `parameters` (z, y, x, 4) from `origin_mm` on: rodness c, half width w, mixing angle theta, marrow water.
    """

    to_tile: np.ndarray
    parameters: np.ndarray
    origin_mm: np.ndarray

    def at(self, points: np.ndarray) -> np.ndarray:
        """c, w, theta, water (n, 4) at bone-frame points (n, 3) xyz mm."""
        return sample_grid(self.parameters, self.origin_mm, GRID_MM, points)


@dataclass(frozen=True)
class Subject:
    """Everything about a knee that does not depend on the scan."""

    template: Template
    scale: float
    warp: np.ndarray
    left: bool
    tile: np.ndarray
    bones: dict[str, Microstructure]
    drawn: dict[str, float]
    cysts: dict[str, np.ndarray]  # (n, 4): x, y, z, radius in the bone frame (mm)

    def fields(self, points: np.ndarray) -> dict[str, np.ndarray]:
        """Tissue distances (mm) at bone-frame points, through scale, warp and disease."""
        moved = points + displacement(self.warp, points)
        fields = {k: v * self.scale for k, v in self.template.sample(moved / self.scale).items()}
        return _diseased(fields, points, self.drawn)


def make_subject(knee: dict, protocol: dict, seed: list[int], anatomy: str | Path | None) -> Subject:
    """Draw a knee's anatomy, disease and microstructure (all constants from the protocol); `seed` names its streams."""
    body, ill, rng = protocol["anatomy"], protocol["disease"], np.random.default_rng([*seed, 1])
    template = load_template(protocol, anatomy)
    sex = "female" if knee["sex"] == "F" else "male"
    width = float(knee["height_cm"]) * protocol["subject"][f"width_per_height_{sex}"].value
    scale = width / template.width_mm * body["scale_residual"].draw(rng)
    names = ("plate", "cortex_epiphysis", "cortex_shaft", "cartilage_variation")
    drawn = {n: body[n].draw(rng) for n in names}
    grade = max(int(knee["kl_grade"]) - 1, 0)
    for side in ("medial", "lateral"):
        drawn[f"loss_{side}"] = min(grade * ill[f"cartilage_loss_{side}"].value, 0.9)
    drawn |= {"plate_oa": grade * ill["plate_per_grade"].value, "osteophyte": grade * ill["osteophyte"].value}
    drawn["susceptibility"] = protocol["mr"]["susceptibility"].draw(rng)
    tile = knee_tile(seed, *tile_shape(protocol))
    warp = draw_warp(body["warp"].value, body["warp_wavelength"].value, rng)
    subject = Subject(template, scale, warp, knee["side"] == "L", tile, {}, drawn, {})
    subject.cysts.update(_spots(subject, knee, ill, "cyst", rng))
    subject.bones.update(_bones(subject, knee, protocol, rng))
    return subject


def tile_shape(protocol: dict) -> tuple[float, float]:
    """Ratio of coarse to fine wavelength, and relative bandwidth."""
    micro = protocol["microstructure"]
    return micro["coarse_wavelength"].value / micro["fine_wavelength"].value, micro["bandwidth"].value


def knee_tile(seed: list[int], coarse_ratio: float, bandwidth: float) -> np.ndarray:
    """The tile of a knee, again and again the same."""
    return make_tile(np.random.default_rng([*seed, 2]), coarse_ratio, bandwidth)


def load_template(protocol: dict, anatomy: str | Path | None) -> Template:
    """Our own knee (None), or the label map at a path."""
    if anatomy is not None:
        path = Path(anatomy)
        return label_template(str(path), path.stat().st_mtime if path.exists() else 0.0)
    body = protocol["anatomy"]
    return own_template(*(body[n].value for n in ("gap", "cartilage_femur", "cartilage_tibia", "cartilage_patella")))


def draw_warp(sd_mm: float, wavelength_mm: float, rng: np.random.Generator) -> np.ndarray:
    """Smooth displacement (z, y, x, 3) in mm on a 6 mm grid; kernel SD = wavelength / 5 (our choice)."""
    n, length = int((WARP_BOX_MM[1] - WARP_BOX_MM[0])[0] / WARP_GRID_MM) + 1, wavelength_mm / 5 / WARP_GRID_MM
    fields = [sd_mm * smooth_field(rng, (n, n, n), length) for _ in range(3)]
    return np.stack(fields, axis=-1).astype(np.float32)


def displacement(warp: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Displacement (n, 3) mm of `draw_warp` at points (n, 3)."""
    return sample_grid(warp, WARP_BOX_MM[0], WARP_GRID_MM, points)


def _diseased(fields: dict, points: np.ndarray, drawn: dict) -> dict:
    """Cartilage thinned by compartment, osteophytes at the joint margins."""
    medial = 1 / (1 + np.exp(-points[:, 0] / 3.0))
    left = (1 - medial * drawn["loss_medial"] - (1 - medial) * drawn["loss_lateral"]) * drawn["cartilage_variation"]
    for bone in ("femur", "tibia", "patella"):
        thickness = fields[bone] - fields[f"{bone}_cartilage"]
        fields[f"{bone}_cartilage"] = fields[bone] - thickness * left
        if drawn["osteophyte"] and bone != "patella":
            margin = np.exp(-0.5 * ((fields[f"{bone}_depth"] - 5) / 2.5) ** 2) * (thickness < 0.3)
            fields[bone] = fields[bone] - drawn["osteophyte"] * margin * np.clip(3 - np.abs(fields[bone]), 0, 1)
    return fields


def _bones(subject: Subject, knee: dict, protocol: dict, rng: np.random.Generator) -> dict[str, Microstructure]:
    micro, ill = protocol["microstructure"], protocol["disease"]
    person, severity = protocol["subject"], float(knee["severity"])
    common = micro["subject_variation"].draw(rng) + ill["bv_tv_female"].value * (knee["sex"] == "F")
    common += ill["bv_tv_per_age"].value * z_score(person["age"], knee["age"])
    common += ill["bv_tv_per_bmi"].value * z_score(person["bmi"], knee["bmi"])
    lesions = _spots(subject, knee, ill, "lesion", rng)
    water = protocol["marrow"]["water"].draw(rng), protocol["marrow"]["water_regional"].value
    wet = ill["lesion_water"].draw(rng)
    return {
        bone: _bone(subject, bone, common, severity, micro, ill, (*water, wet, lesions[bone]), rng) for bone in BONES
    }


def _bone(subject, bone, common, severity, micro, ill, marrow, rng) -> Microstructure:
    """Parameter grids: log BV/TV = compartment + depth + region + person; mixing and rodness follow it."""
    points, shape = grid_points(*map(np.array, BOX_MM[bone]), GRID_MM)
    depth = subject.fields(points)[f"{bone}_depth"]
    side = 1 / (1 + np.exp(-points[:, 0] / 4.0))
    levels = [
        np.log(micro[f"bv_tv_{bone}_{c}"].value)
        + micro["compartment_variation"].draw(rng)
        + severity * ill[f"bv_tv_{bone}_{c}"].value
        for c in ("medial", "lateral")
    ]
    length = micro["regional_length"].value / GRID_MM
    regional, mixed, wet = (smooth_field(rng, shape, length).ravel() for _ in range(3))
    fall = micro["depth_fall"].draw(rng) * (1 - np.exp(-depth / micro["depth_length"].value))
    cavity = np.maximum(depth - micro["cavity_depth"].value, 0) / micro["cavity_length"].value
    log_bv_tv = levels[1] + side * (levels[0] - levels[1]) + np.log1p(-fall) - cavity + common
    bv_tv = np.clip(np.exp(log_bv_tv + micro["regional_variation"].value * regional), 0.05, 0.7)
    relative = np.log(bv_tv / 0.3)
    theta = micro["mixing"].draw(rng) + micro["mixing_regional"].value * mixed
    theta = np.clip(theta + micro["mixing_per_log_bv_tv"].value * relative, *THETA)
    rodness = micro["rodness"].draw(rng) + micro["rodness_per_log_bv_tv"].value * relative
    rodness = np.clip(rodness + ill["rodness_per_severity"].value * severity, 0, 1.0)
    water = np.clip(marrow[0] + marrow[1] * wet, 0.02, 0.6)
    for *centre, radius in marrow[3]:
        water += marrow[2] * np.exp(-0.5 * (np.linalg.norm(points - centre, axis=1) / (0.6 * radius)) ** 2)
    grid = np.stack([rodness, level_half_width(bv_tv, rodness), theta, np.minimum(water, 1)], -1).reshape(*shape, 4)
    scale = micro["wavelength_scale"].draw(rng) * np.exp(ill["wavelength_per_severity"].value * severity)
    matrix = np.diag(FINE_VOXELS / (micro["fine_wavelength"].value * scale) * _axes(micro["stretch"].draw(rng)))
    # Far from 0, so that truncation is rounding down in the look-up.
    offset = rng.uniform(0, TILE_SIZE, 3) + 16 * TILE_SIZE
    origin = np.array(BOX_MM[bone][0])
    return Microstructure(np.c_[matrix, offset], np.ascontiguousarray(grid, np.float32), origin)


def bone_cube(bv_tv: float, shape: tuple[int, int, int], voxel_mm: float, seed: int) -> np.ndarray:
    """Trabecular bone (bool, z y x; load along z) of a mean knee at a given BV/TV, on voxels of `voxel_mm`."""
    micro, relative = load_protocol()["microstructure"], np.log(bv_tv / 0.3)
    theta, rodness = (micro[n].mean + micro[f"{n}_per_log_bv_tv"].value * relative for n in ("mixing", "rodness"))
    theta, rodness = np.clip(theta, *THETA), np.clip(rodness, 0, 1)
    tile = make_tile(np.random.default_rng(seed), *tile_shape({"microstructure": micro}))
    points = np.argwhere(np.ones(shape, bool))[:, ::-1] * voxel_mm
    points = points * FINE_VOXELS / micro["fine_wavelength"].value * _axes(micro["stretch"].mean)
    values = (rodness, level_half_width(np.array(bv_tv), np.array(rodness)), theta)
    return is_bone(tile, points, *(np.full(len(points), float(v)) for v in values)).reshape(shape)


def _axes(stretch: float) -> np.ndarray:
    """Tile voxels along x, y, z relative to their geometric mean, which keeps the spacing whatever the anisotropy."""
    axes = np.array([1, 1, 1 / stretch])
    return axes / np.cbrt(axes.prod())


def _spots(subject: Subject, knee: dict, ill: dict, kind: str, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Oedema-like lesions or cysts (n, 4: x, y, z, radius mm) of each bone below its bearing, mostly medial."""
    spots = {bone: [] for bone in BONES}
    for _ in range(rng.poisson(ill[f"{kind}_rate"].value * int(knee["kl_grade"]))):
        bone, radius = list(BONES)[rng.integers(2)], ill[f"{kind}_radius"].draw(rng)
        x, y = rng.uniform(14, 26) * (1 if rng.random() < 0.7 else -1), rng.uniform(-12, 12)
        z = np.arange(-30, 40, 1.0)
        column = np.c_[np.full(z.size, x), np.full(z.size, y), z] * subject.scale
        inside = subject.fields(column)[bone] < -(0.8 * radius + 0.5)
        if inside.any():
            spots[bone].append([*column[inside][0 if bone == "femur" else -1], radius])
    return {bone: np.array(found, float).reshape(-1, 4) for bone, found in spots.items()}
