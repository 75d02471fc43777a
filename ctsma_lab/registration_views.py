"""What notebooks 2 and 3 show of registered pairs."""

import numpy as np
from numpy import ndarray
from scipy import ndimage, signal

from ctsma.patches import CT_SPACING_MM, portions, to_ct_grid
from ctsma.registration.trabeculae import HIGHPASS_SD_MM

# CT voxels, about 2 mm each way, in which a better match is searched; design choice
REACH_VOXELS = 3, 5, 5


def patch_correlation(ct: ndarray, mr: ndarray, voi: ndarray) -> ndarray:
    """How well the trabeculae of pairs match in place: (n,), 1 aligned, 0 no match. Design choice.

    ct (n, 12, 24, 24); mr, voi (n, 12, 48, 48). The match is minus the correlation of detail finer
    than 1 mm, as bone is bright in CT and dark in MR; it is divided by the best match within 2 mm,
    which a soft kernel or noise lowers alike.
    """
    found = np.zeros(len(ct))
    for rows in portions(np.arange(len(ct))):
        images = ct[rows], to_ct_grid(mr[rows]), to_ct_grid(voi[rows]) >= 0.5
        found[rows] = [_match_in_place(*patch) for patch in zip(*images, strict=True)]
    return found


def _match_in_place(hu: ndarray, grey: ndarray, inside: ndarray) -> float:
    """`patch_correlation` of one patch: CT, MR and region on the CT grid."""
    match = -signal.correlate(_detail(grey) * inside, _detail(hu) * inside, "same", "fft")
    centre = tuple(n // 2 for n in match.shape)
    near = tuple(slice(c - r, c + r + 1) for c, r in zip(centre, REACH_VOXELS, strict=True))
    best = match[near].max()
    return np.clip(match[centre] / best, 0, 1) if best > 0 else 0.0


def _detail(image: ndarray) -> ndarray:
    """What is finer than 1 mm in an image on the CT grid."""
    sd_voxels = np.divide(HIGHPASS_SD_MM, CT_SPACING_MM)
    return image - ndimage.gaussian_filter(image.astype(float), sd_voxels)
