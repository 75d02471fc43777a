"""A CT network learns the biomarkers under an MR network; beside it the arms that show what distillation adds."""

from .alignment import alignment
from .arms import cross_validate, over_seeds, predict_unpaired, prepare, recipes_of
from .baseline import N_RULER, ct_features, hu_regression, ridge_features
from .checkpoints import load_model
from .examples import Settings, augment_ct
from .losses import TERMS, Lesson, distillation_loss
from .training import estimate, predict
from .views import feature_maps, read_curves, read_records
