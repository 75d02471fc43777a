"""From patches to the patient: does this knee have osteoarthritis, and how far can that answer be trusted."""

# ruff: noqa: F401 (the public names of the room)
from .classifiers import (
    PatchTransformer,
    TransformerSettings,
    compartment_means,
    cross_validate_arms,
    cross_validate_diagnosis,
    cross_validate_tabular,
    explain_diagnosis,
    permute_labels,
    remove_feature,
    shuffle_patches,
)
from .statistics import (
    auc_delong,
    bootstrap_auc,
    calibration,
    calibration_curve,
    compare_delong,
    detectable_auc_difference,
    hanley_mcneil_se,
    holm,
    mean_interval,
    net_benefit,
    roc_band,
    sensitivity_at_specificity,
    subgroup_auc,
)
