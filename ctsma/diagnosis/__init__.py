"""From patches to the patient: does a knee have osteoarthritis (OA), and how certain is that?"""

from .inputs import tokens_by_arm
from .statistics import auc_delong, bootstrap_auc, calibration, compare_delong, roc_band
from .tabular import compartment_means, cross_validate_tabular
from .transformer import PatchTransformer, TransformerSettings, cross_validate_arms
