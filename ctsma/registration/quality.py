"""Is this knee aligned? Checks that need no truth, and the error where the truth is known."""

import numpy as np
import SimpleITK as sitk
from scipy import ndimage

MIN_MATCH = 0.1  # simulated: 0.19 and more aligned even with noise and thick slices, another knee's MR up to 0.05
MIN_OVERLAP = 0.1  # of a bone: only names the reason, as a match over so little is rarely had (our choice)
MAX_SLICE_MM = 1.5  # of the MR: such slices align, but a trabecula of 0.2 mm leaves no trace in them (our choice)
MAX_FLEXION_DEG = 25.0  # a knee bends 0-15 degrees differently between scanners (our choice)


def target_registration_error_mm(estimated: sitk.Transform, true: sitk.Transform, points_lps: np.ndarray) -> np.ndarray:
    """Distance |estimated(p) - true(p)| in mm for CT-space points (n, 3) in LPS mm; returns (n,)."""
    return np.linalg.norm(mapped(estimated, points_lps) - mapped(true, points_lps), axis=1)


def mapped(transform: sitk.Transform, points_lps: np.ndarray) -> np.ndarray:
    """CT-space points (n, 3) in LPS mm carried to MR space by any sitk transform; returns (n, 3) in LPS mm."""
    return np.array([transform.TransformPoint(p) for p in np.asarray(points_lps, float).tolist()]).reshape(-1, 3)


def carried(transform: sitk.Euler3DTransform, points_lps: np.ndarray) -> np.ndarray:
    """`mapped` for a rigid transform, a hundred times faster: (n, 3) to (n, 3) in LPS mm."""
    turned = (points_lps - np.array(transform.GetCenter())) @ np.reshape(transform.GetMatrix(), (3, 3)).T
    return turned + transform.GetCenter() + transform.GetTranslation()


def flexion_deg(femur: sitk.Euler3DTransform, tibia: sitk.Euler3DTransform) -> float:
    """Angle in degrees of the rotation between two bones' transforms: how much the knee bent between scans."""
    between = np.reshape(femur.GetMatrix(), (3, 3)).T @ np.reshape(tibia.GetMatrix(), (3, 3))
    return float(np.rad2deg(np.arccos(np.clip((np.trace(between) - 1) / 2, -1, 1))))


def reason_to_flag(checks: dict[str, dict[str, float]], bent_deg: float, slice_mm: float = 0.0) -> str:
    """One sentence why a knee must not be used, or "" (the limits are this module's constants).

    `checks` {bone: {match: of its trabeculae, see `trabeculae.matched`; overlap: part of it inside the MR}};
    `slice_mm` spacing of the MR's slices.
    """
    if slice_mm > MAX_SLICE_MM:
        return f"the MR has slices every {slice_mm:.1f} mm, too thick to measure trabeculae: at most {MAX_SLICE_MM} mm"
    for bone, c in checks.items():
        if c["overlap"] < MIN_OVERLAP:
            return f"the MR covers only {c['overlap']:.0%} of the CT's {bone}"
        if c["match"] < MIN_MATCH:
            return f"the trabeculae of the {bone} do not match in CT and MR: correlation {c['match']:.2f} < {MIN_MATCH}"
    bent = f"femur and tibia bent by {bent_deg:.0f} degrees between CT and MR"
    return bent if bent_deg > MAX_FLEXION_DEG else ""


def axes_of(image: sitk.Image) -> np.ndarray:
    """Columns are the steps in LPS mm to the next voxel along x, y, z of the image: (3, 3)."""
    return np.reshape(image.GetDirection(), (3, 3)) * np.array(image.GetSpacing())


def sampled(image: sitk.Image, points_lps: np.ndarray) -> np.ndarray:
    """Linear interpolation of an image at points (n, 3) in LPS mm; NaN outside it."""
    index = np.linalg.solve(axes_of(image), (points_lps - np.array(image.GetOrigin())).T)[::-1]
    return ndimage.map_coordinates(sitk.GetArrayViewFromImage(image), index, order=1, cval=np.nan)
