"""One simulated knee before it is scanned: warped anatomy, disease, and trabeculae of each bone."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ctsma.common import BONES

from .anatomy import FIELDS, Template, lattice_points, own_template, sample_grid
from .label_map import label_template
from .microstructure import (
    FINE_VOXELS,
    TILE_SIZE,
    is_bone,
    level_half_width,
    make_tile,
    smooth_field,
)
from .protocol import load_protocol, z_score

GRID_MM = 3.0  # design choice: the parameters of the microstructure vary over 10 mm
BOX_MM = {  # low and high corner (x, y, z) of the parameter grids
    "femur": ((-51.0, -51.0, -15.0), (51.0, 51.0, 63.0)),
    "tibia": ((-51.0, -51.0, -66.0), (51.0, 51.0, 12.0)),
}
THETA = (0.05, np.pi / 2 - 0.05)  # rad; range of the mixing angle of fine and coarse field
WARP_GRID_MM = 6.0
WARP_BOX_MM = np.full(3, -102.0), np.full(3, 102.0)


@dataclass(frozen=True)
class Microstructure:
    """Trabeculae of one bone in its own frame.

    Attributes
    ----------
    to_tile : affine (3, 4) from bone-frame mm to tile voxels.
    parameters : (z, y, x, 4) on a grid of GRID_MM: rodness c, half width w, mixing angle, marrow
        water.
    origin_mm : (3,) xyz of the grid's first point.
    """

    to_tile: np.ndarray
    parameters: np.ndarray
    origin_mm: np.ndarray

    def at(self, points: np.ndarray) -> np.ndarray:
        """c, w, theta, water (n, 4) at bone-frame points (n, 3) xyz mm."""
        return sample_grid(self.parameters, np.arange(4), self.origin_mm, GRID_MM, points).T


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

    def fields(self, points: np.ndarray, names: Sequence[str]) -> dict[str, np.ndarray]:
        """Distances (mm) of tissues at bone-frame points (n, 3), through scale, warp and disease.

        names: bones, which come with their cartilage and depth, and soft tissues.
        """
        warped = points + displacement(self.warp, points)
        wanted = [name for name in FIELDS if name in names or name.split("_")[0] in names]
        sampled = self.template.sample(warped / self.scale, wanted)
        fields = {name: distance * self.scale for name, distance in sampled.items()}
        return _add_disease(fields, points, self.drawn)


def make_subject(
    knee: dict, protocol: dict, seed: list[int], anatomy: str | Path | None
) -> Subject:
    """Draw a knee's anatomy, disease and microstructure (all constants from the protocol).

    Parameters
    ----------
    knee : row of `draw_subjects`.
    seed : numbers that name the knee's random streams; one number is added for each stream.
    anatomy : label map as template; the built-in knee where None.
    """
    body, disease = protocol["anatomy"], protocol["disease"]
    rng = np.random.default_rng([*seed, 1])
    template = load_template(protocol, anatomy)
    sex = "female" if knee["sex"] == "F" else "male"
    width = float(knee["height_cm"]) * protocol["subject"][f"width_per_height_{sex}"].value
    scale = width / template.width_mm * body["scale_residual"].draw(rng)
    names = ("plate", "cortex_epiphysis", "cortex_shaft", "cartilage_variation")
    drawn = {name: body[name].draw(rng) for name in names}
    grade = max(int(knee["kl_grade"]) - 1, 0)
    for side in ("medial", "lateral"):
        drawn[f"loss_{side}"] = min(grade * disease[f"cartilage_loss_{side}"].value, 0.9)
    drawn["plate_oa"] = grade * disease["plate_per_grade"].value
    drawn["osteophyte"] = grade * disease["osteophyte"].value
    drawn["susceptibility"] = protocol["mr"]["susceptibility"].draw(rng)
    tile = knee_tile(seed, *tile_shape(protocol))
    warp = draw_warp(body["warp"].value, body["warp_wavelength"].value, rng)
    is_left = knee["side"] == "L"
    subject = Subject(template, scale, warp, is_left, tile, bones={}, drawn=drawn, cysts={})
    # Cysts, lesions and bones are placed by the anatomy that is complete by now.
    subject.cysts.update(_draw_spots(subject, knee, disease, "cyst", rng))
    subject.bones.update(_draw_bones(subject, knee, protocol, rng))
    return subject


def tile_shape(protocol: dict) -> tuple[float, float]:
    """Ratio of coarse to fine wavelength, and relative bandwidth."""
    micro = protocol["microstructure"]
    ratio = micro["coarse_wavelength"].value / micro["fine_wavelength"].value
    return ratio, micro["bandwidth"].value


def knee_tile(seed: list[int], coarse_ratio: float, bandwidth: float) -> np.ndarray:
    """The tile of a knee; the same seed gives the same tile."""
    return make_tile(np.random.default_rng([*seed, 2]), coarse_ratio, bandwidth)


def load_template(protocol: dict, anatomy: str | Path | None) -> Template:
    """The built-in knee (None), or the label map at a path."""
    if anatomy is not None:
        path = Path(anatomy)
        return label_template(str(path), path.stat().st_mtime if path.exists() else 0.0)
    body = protocol["anatomy"]
    return own_template(
        gap_mm=body["gap"].value,
        femur_mm=body["cartilage_femur"].value,
        tibia_mm=body["cartilage_tibia"].value,
        patella_mm=body["cartilage_patella"].value,
    )


def draw_warp(sd_mm: float, wavelength_mm: float, rng: np.random.Generator) -> np.ndarray:
    """Smooth displacement (z, y, x, 3) in mm on a 6 mm grid."""
    low, high = WARP_BOX_MM
    n = int((high - low)[0] / WARP_GRID_MM) + 1
    length = wavelength_mm / 5 / WARP_GRID_MM  # design choice: kernel SD = wavelength / 5
    fields = [sd_mm * smooth_field(rng, (n, n, n), length) for _ in range(3)]
    return np.stack(fields, axis=-1).astype(np.float32)


def displacement(warp: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Displacement (n, 3) mm of `draw_warp` at points (n, 3)."""
    return sample_grid(warp, np.arange(3), WARP_BOX_MM[0], WARP_GRID_MM, points).T


def medial_share(points: np.ndarray, width_mm: float) -> np.ndarray:
    """0 lateral to 1 medial (n,), a logistic of x with the given width."""
    return 1 / (1 + np.exp(-points[:, 0] / width_mm))


def _add_disease(fields: dict, points: np.ndarray, drawn: dict) -> dict:
    """Cartilage thinned by compartment, osteophytes at the joint margins."""
    bones = [bone for bone in ("femur", "tibia", "patella") if bone in fields]
    if bones:
        medial = medial_share(points, 3.0)
        lost = medial * drawn["loss_medial"], (1 - medial) * drawn["loss_lateral"]
        left = (1 - lost[0] - lost[1]) * drawn["cartilage_variation"]
    for bone in bones:
        thickness = fields[bone] - fields[f"{bone}_cartilage"]
        fields[f"{bone}_cartilage"] = fields[bone] - thickness * left
        if drawn["osteophyte"] and bone != "patella":
            depth = fields[f"{bone}_depth"]
            margin = np.exp(-0.5 * ((depth - 5) / 2.5) ** 2) * (thickness < 0.3)
            near_surface = np.clip(3 - np.abs(fields[bone]), 0, 1)
            fields[bone] = fields[bone] - drawn["osteophyte"] * margin * near_surface
    return fields


def _draw_bones(
    subject: Subject, knee: dict, protocol: dict, rng: np.random.Generator
) -> dict[str, Microstructure]:
    """Microstructure of femur and tibia, which share the person's BV/TV level and marrow."""
    person, disease = protocol["subject"], protocol["disease"]
    level = protocol["microstructure"]["subject_variation"].draw(rng)
    level += disease["bv_tv_female"].value * (knee["sex"] == "F")
    level += disease["bv_tv_per_age"].value * z_score(person["age"], knee["age"])
    level += disease["bv_tv_per_bmi"].value * z_score(person["bmi"], knee["bmi"])
    lesions = _draw_spots(subject, knee, disease, "lesion", rng)
    shared = {"severity": float(knee["severity"]), "level": level}
    shared["marrow_water"] = protocol["marrow"]["water"].draw(rng)
    shared["lesion_water"] = disease["lesion_water"].draw(rng)
    bones = {}
    for bone in BONES:
        bones[bone] = _draw_bone(subject, bone, shared, lesions[bone], protocol, rng)
    return bones


def _draw_bone(
    subject: Subject,
    bone: str,
    shared: dict[str, float],
    lesions: np.ndarray,
    protocol: dict,
    rng: np.random.Generator,
) -> Microstructure:
    """Parameter grids: log BV/TV = compartment + depth + region + person; the rest follows it."""
    micro, disease = protocol["microstructure"], protocol["disease"]
    points, shape = lattice_points(*map(np.array, BOX_MM[bone]), GRID_MM)
    depth = subject.fields(points, (bone,))[f"{bone}_depth"]
    severity, level = shared["severity"], {}
    for side in ("medial", "lateral"):
        level[side] = np.log(micro[f"bv_tv_{bone}_{side}"].value)
        level[side] += micro["compartment_variation"].draw(rng)
        level[side] += severity * disease[f"bv_tv_{bone}_{side}"].value
    length = micro["regional_length"].value / GRID_MM
    regional, regional_mixing, regional_water = (
        smooth_field(rng, shape, length).ravel() for _ in range(3)
    )

    loss = micro["depth_fall"].draw(rng) * (1 - np.exp(-depth / micro["depth_length"].value))
    cavity = np.maximum(depth - micro["cavity_depth"].value, 0) / micro["cavity_length"].value
    log_bv_tv = level["lateral"] + medial_share(points, 4.0) * (level["medial"] - level["lateral"])
    log_bv_tv = log_bv_tv + np.log1p(-loss) - cavity + shared["level"]
    log_bv_tv = log_bv_tv + micro["regional_variation"].value * regional
    bv_tv = np.clip(np.exp(log_bv_tv), 0.05, 0.7)

    relative = np.log(bv_tv / 0.3)
    theta = micro["mixing"].draw(rng) + micro["mixing_regional"].value * regional_mixing
    theta = np.clip(theta + micro["mixing_per_log_bv_tv"].value * relative, *THETA)
    rodness = micro["rodness"].draw(rng) + micro["rodness_per_log_bv_tv"].value * relative
    rodness = np.clip(rodness + disease["rodness_per_severity"].value * severity, 0, 1.0)

    water = shared["marrow_water"] + protocol["marrow"]["water_regional"].value * regional_water
    water = np.clip(water, 0.02, 0.6)
    for x, y, z, radius in lesions:
        distance = np.linalg.norm(points - (x, y, z), axis=1)
        water += shared["lesion_water"] * np.exp(-0.5 * (distance / (0.6 * radius)) ** 2)

    half_width = level_half_width(bv_tv, rodness)
    parameters = np.stack([rodness, half_width, theta, np.minimum(water, 1)], axis=-1)
    parameters = np.ascontiguousarray(parameters.reshape(*shape, 4), np.float32)
    wavelength = micro["wavelength_scale"].draw(rng)
    wavelength *= np.exp(disease["wavelength_per_severity"].value * severity)
    voxels_per_mm = FINE_VOXELS / (micro["fine_wavelength"].value * wavelength)
    matrix = np.diag(voxels_per_mm * _relative_axes(micro["stretch"].draw(rng)))
    # Far from 0, so that truncation is rounding down in the look-up.
    offset = rng.uniform(0, TILE_SIZE, 3) + 16 * TILE_SIZE
    return Microstructure(np.c_[matrix, offset], parameters, np.array(BOX_MM[bone][0]))


def bone_cube(bv_tv: float, shape: tuple[int, int, int], voxel_mm: float, seed: int) -> np.ndarray:
    """Trabecular bone (bool, z y x; load along z) of an average knee at a given BV/TV.

    voxel_mm is the edge of a voxel.
    """
    protocol = load_protocol()
    micro = protocol["microstructure"]
    relative = np.log(bv_tv / 0.3)
    theta = micro["mixing"].mean + micro["mixing_per_log_bv_tv"].value * relative
    rodness = micro["rodness"].mean + micro["rodness_per_log_bv_tv"].value * relative
    theta, rodness = np.clip(theta, *THETA), np.clip(rodness, 0, 1)
    half_width = level_half_width(np.array(bv_tv), np.array(rodness))
    tile = make_tile(np.random.default_rng(seed), *tile_shape(protocol))
    points = np.argwhere(np.ones(shape, bool))[:, ::-1] * voxel_mm
    axes = _relative_axes(micro["stretch"].mean)
    points = points * FINE_VOXELS / micro["fine_wavelength"].value * axes
    c, w, t = (np.full(len(points), float(value)) for value in (rodness, half_width, theta))
    return is_bone(tile, points, c, w, t).reshape(shape)


def _relative_axes(stretch: float) -> np.ndarray:
    """Tile voxels along x, y, z relative to their geometric mean.

    The geometric mean keeps the trabecular spacing whatever the anisotropy.
    """
    axes = np.array([1, 1, 1 / stretch])
    return axes / np.cbrt(axes.prod())


def _draw_spots(
    subject: Subject, knee: dict, disease: dict, kind: str, rng: np.random.Generator
) -> dict[str, np.ndarray]:
    """Oedema-like lesions or cysts (n, 4: x, y, z, radius mm) by bone, mostly medial."""
    spots = {bone: [] for bone in BONES}
    for _ in range(rng.poisson(disease[f"{kind}_rate"].value * int(knee["kl_grade"]))):
        bone = list(BONES)[rng.integers(2)]
        radius = disease[f"{kind}_radius"].draw(rng)
        x = rng.uniform(14, 26) * (1 if rng.random() < 0.7 else -1)
        y = rng.uniform(-12, 12)
        z = np.arange(-30, 40, 1.0)
        column = np.c_[np.full(z.size, x), np.full(z.size, y), z] * subject.scale
        inside = subject.fields(column, (bone,))[bone] < -(0.8 * radius + 0.5)
        if inside.any():
            nearest = 0 if bone == "femur" else -1
            spots[bone].append([*column[inside][nearest], radius])
    return {bone: np.array(found, float).reshape(-1, 4) for bone, found in spots.items()}
