"""How well CT and MR of a pair lie over each other, told by their own trabeculae."""

import numpy as np
from scipy import ndimage, signal

from ctsma.patches import CT_SPACING_MM

from .baseline import on_ct_grid

COARSER_MM = 1.0  # SD of the Gaussian that is taken away, as in `registration.trabeculae`
REACH_VOXELS = 3, 5, 5  # of the CT, some 2 mm each way: there a better place is looked for (our choice)


def alignment(ct: np.ndarray, mr: np.ndarray, voi: np.ndarray) -> np.ndarray:
    """Match of pairs where they lie over their best match within 2 mm of there, (n,) from 0 to 1 (our idea).

    ct (n, 12, 24, 24); mr, voi (n, 12, 48, 48). The match is minus the correlation of what is finer than 1 mm, as bone
    is bright in CT and dark in MR. A soft kernel or noise lowers both matches, and so leaves their ratio; 0 where
    nothing matches.
    """
    return np.array([_aligned(*pair) for pair in zip(ct, on_ct_grid(mr), on_ct_grid(voi) >= 0.5, strict=True)])


def _aligned(ct: np.ndarray, mr: np.ndarray, inside: np.ndarray) -> float:
    sd = np.divide(COARSER_MM, CT_SPACING_MM)
    hu, grey = ((image - ndimage.gaussian_filter(image.astype(float), sd)) * inside for image in (ct, mr))
    match = -signal.correlate(grey, hu, "same", "fft")
    centre = np.array(match.shape) // 2
    near = tuple(slice(c - r, c + r + 1) for c, r in zip(centre, REACH_VOXELS, strict=True))
    best = match[near].max()
    return float(np.clip(match[tuple(centre)] / best, 0, 1)) if best > 0 else 0.0
