"""From patches to the patient: does a knee have osteoarthritis (OA), and how certain is that?

`ctsma.diagnosis.transformer` is not imported here, as importing torch takes seconds.
"""

from .inputs import tokens_by_arm
from .statistics import auc_delong, bootstrap_auc, calibration, compare_delong, roc_band
from .tabular import compartment_means, cross_validate_tabular
