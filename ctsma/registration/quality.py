"""Is a knee aligned? Measures that need no ground truth, and the error where it is known."""

import numpy as np

from .transforms import Rigid, transform_points

# Simulated knees: at least 0.19 when aligned, also with noise and thick slices; another knee's MR
# gives at most 0.05.
MIN_CORRELATION = 0.1
MIN_OVERLAP = 0.1  # of a bone with the MR; it only names the reason (design choice)
# Thicker slices can be aligned, but a trabecula of 0.2 mm leaves no trace in them (design choice).
MAX_SLICE_MM = 1.5
MAX_FLEXION_DEG = 25.0  # the flexion of a knee differs by 0 to 15 degrees between scanners


def target_registration_error_mm(estimated, true, points_lps: np.ndarray) -> np.ndarray:
    """Distance |estimated(p) - true(p)| of two transforms at CT points (n, 3), mm; returns (n,)."""
    difference = transform_points(estimated, points_lps) - transform_points(true, points_lps)
    return np.linalg.norm(difference, axis=1)


def flexion_deg(femur: Rigid, tibia: Rigid) -> float:
    """Angle of the rotation between two bones' transforms: change of flexion from CT to MR."""
    femur_matrix, tibia_matrix = (np.reshape(t.GetMatrix(), (3, 3)) for t in (femur, tibia))
    cosine = (np.trace(femur_matrix.T @ tibia_matrix) - 1) / 2
    return float(np.rad2deg(np.arccos(np.clip(cosine, -1, 1))))


def failure_reason(
    metrics: dict[str, dict[str, float]], flexion: float, slice_mm: float = 0.0
) -> str:
    """One sentence that says why a knee must not be used, or "".

    Parameters
    ----------
    metrics : {bone: metrics} as of `trabeculae.registration_metrics`.
    flexion : change of flexion from CT to MR, degrees. slice_mm : slice spacing of the MR.

    The limits are the constants of this module.
    """
    if slice_mm > MAX_SLICE_MM:
        return f"the MR has slices every {slice_mm:.1f} mm, more than {MAX_SLICE_MM} mm"
    for bone, values in metrics.items():
        if values["overlap"] < MIN_OVERLAP:
            return f"the MR covers only {values['overlap']:.0%} of the {bone} in the CT"
        correlation = values["correlation"]
        if correlation < MIN_CORRELATION:
            found = f"correlation {correlation:.2f} < {MIN_CORRELATION}"
            return f"the trabeculae of the {bone} do not agree in CT and MR: {found}"
    if flexion > MAX_FLEXION_DEG:
        return f"the knee's flexion differs by {flexion:.0f} degrees between CT and MR"
    return ""
