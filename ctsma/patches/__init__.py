"""The same piece of subchondral bone in CT and MR: where patches lie, how they are cut, what is measured on them."""

from .cutting import (
    LACKING,
    MIN_VOI,
    NO_MARROW,
    cortex_hu,
    ct_patches,
    densest,
    knee_patches,
    measured,
    naive,
    shaft_slices,
    true_patches,
)
from .geometry import (
    APART_MM,
    CT_SHAPE,
    CT_SPACING_MM,
    HEIGHT_MM,
    MIDLINE_MM,
    MR_SHAPE,
    MR_SPACING_MM,
    PLATE_MM,
    RIM_MM,
    centres,
    cut,
    grid_points,
    patch_grid,
    trabecular_region,
)
from .tables import (
    Patches,
    keep_only,
    load_ct_patches,
    load_patches,
    load_rescans,
    load_table,
    load_truth,
    ruler_hu,
    tokens_by_arm,
    with_truth,
)
from .truth import knee_truth, true_slice, write_truth
