"""Is this knee aligned? Checks that need no truth, and the error where the truth is known."""

import numpy as np
import SimpleITK as sitk
from scipy import ndimage

MARGIN_MM = 3.0  # the metric is checked on the bone and this far around it (our choice)
SHIFT_MM = 2.0  # its value is compared with that of six such displacements (our choice)
BINS = 32  # of the joint histogram (our choice)
CORTEX_SHARE = 0.05  # cortex: the densest part of a bone on a 1 mm grid, marrow: its less dense half (our choice)
MARROW_MM = 2.0  # marrow lies deeper in the bone than this (our choice)
MIN_PEAK = (
    0.11  # simulated: aligned 0.13 to 0.41 but once 0.07; MR of another or a mirrored knee below 0.10 (our choice)
)
MAX_OFF_MM = 0.55  # simulated: aligned up to 0.40, moved by 1 mm mostly 0.6 and more (our choice)
MAX_DRIFT_MM = 0.7  # simulated, cut fields: aligned up to 0.46, off by 1.0 to 2.5 mm 1.04 and more (our choice)
MIN_CONTRAST = 0.0  # in bSSFP cortex is never brighter than marrow; aligned knees show 0.14 and more (our choice)
MIN_OVERLAP = (
    0.4  # of the bone in CT: of four below it, two were 1.05 and 1.08 mm off, unseen by the halves (our choice)
)
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


def bone_checks(
    ct: sitk.Image, mr: sitk.Image, depth_mm: sitk.Image, transform: sitk.Euler3DTransform
) -> dict[str, float]:
    """How well one bone fits, from the images alone (our choice).

    Parameters
    ----------
    ct, mr : isotropic images of about 1 mm; depth_mm : signed distance to the bone's surface, inside positive.
    transform : CT points to MR points.

    Returns
    -------
    mi : mutual information in nats; peak : 1 - (highest MI displaced by +-2 mm in x, y or z) / MI, near 0 or below
    when misaligned; off_mm : distance to the top of the parabolas through those values, a guess of the residual shift;
    contrast : 1 - median MR grey of cortex / of marrow; overlap : part of the bone inside the MR.
    """
    depth = sitk.GetArrayFromImage(sitk.Resample(depth_mm, ct, sitk.Transform(), sitk.sitkLinear, -1e3))
    index = np.argwhere(depth > -MARGIN_MM)
    depth, hu = depth[tuple(index.T)], sitk.GetArrayViewFromImage(ct)[tuple(index.T)]
    points = carried(transform, index[:, ::-1] @ axes_of(ct).T + ct.GetOrigin())
    grey = sampled(mr, points)
    mi = mutual_information(hu, grey)
    shifts = SHIFT_MM * np.concatenate([np.eye(3), -np.eye(3)])
    around = np.array([mutual_information(hu, sampled(mr, points + s)) for s in shifts])
    peak = 1 - around.max() / mi if mi else 0.0
    rise, bend = around[:3] - around[3:], np.maximum(2 * mi - around[:3] - around[3:], 1e-6)
    off_mm = min(float(np.linalg.norm(SHIFT_MM * rise / (2 * bend))), 99.0)
    middling, dense = np.quantile(hu[depth > 0], (0.5, 1 - CORTEX_SHARE))
    cortex, marrow = (depth > 0) & (hu > dense), (depth > MARROW_MM) & (hu < middling)
    contrast = 1 - _median(grey[cortex]) / _median(grey[marrow])
    return {
        "mi": mi,
        "peak": float(peak),
        "off_mm": off_mm,
        "contrast": contrast,
        "overlap": float(np.isfinite(grey[depth > 0]).mean()),
    }


def mutual_information(a: np.ndarray, b: np.ndarray) -> float:
    """Mutual information (nats) of paired values; 32 x 32 bins between the 1st and 99th percentile, NaN left out."""
    seen = np.isfinite(a) & np.isfinite(b)
    if seen.sum() < BINS**2:
        return 0.0
    codes = [np.digitize(v[seen], np.linspace(*np.percentile(v[seen], (1, 99)), BINS - 1)) for v in (a, b)]
    p = np.bincount(codes[0] * BINS + codes[1], minlength=BINS**2).reshape(BINS, BINS) / seen.sum()
    independent = np.outer(p.sum(1), p.sum(0))
    return float((p[p > 0] * np.log(p[p > 0] / independent[p > 0])).sum())


def reason_to_flag(checks: dict[str, dict[str, float]], bent_deg: float) -> str:
    """One sentence why a knee must not be used, or "" (the limits are this module's constants)."""
    for bone, c in checks.items():
        if c["overlap"] < MIN_OVERLAP:
            return f"the MR covers only {c['overlap']:.0%} of the CT's {bone}"
        if c["peak"] < MIN_PEAK:
            return f"the MR does not match the CT's {bone}: peak of mutual information {c['peak']:.2f} < {MIN_PEAK}"
        if c["off_mm"] > MAX_OFF_MM:
            return f"the MR seems {c['off_mm']:.1f} mm off the CT's {bone}"
        if c["drift_mm"] > MAX_DRIFT_MM:
            return f"halves of the {bone} disagree with the whole by {c['drift_mm']:.1f} mm"
        if not c["contrast"] > MIN_CONTRAST:
            return f"the MR is not darker in the {bone}'s cortex than in its marrow"
    bent = f"femur and tibia bent by {bent_deg:.0f} degrees between CT and MR"
    return bent if bent_deg > MAX_FLEXION_DEG else ""


def _median(values: np.ndarray) -> float:
    seen = values[np.isfinite(values)]
    return float(np.median(seen)) if len(seen) else np.nan


def axes_of(image: sitk.Image) -> np.ndarray:
    """Columns are the steps in LPS mm to the next voxel along x, y, z of the image: (3, 3)."""
    return np.reshape(image.GetDirection(), (3, 3)) * np.array(image.GetSpacing())


def sampled(image: sitk.Image, points_lps: np.ndarray) -> np.ndarray:
    """Linear interpolation of an image at points (n, 3) in LPS mm; NaN outside it."""
    index = np.linalg.solve(axes_of(image), (points_lps - np.array(image.GetOrigin())).T)[::-1]
    return ndimage.map_coordinates(sitk.GetArrayViewFromImage(image), index, order=1, cval=np.nan)
