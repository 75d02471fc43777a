"""CT networks that learn under an MR network, and the arms that show what distillation adds."""

from ctsma.arms import ARMS, COMPARISONS, MAIN_ARM, TRAINED, Arm, read_arms

from .checkpoints import load_model
from .cross_validation import cross_validate, mean_over_seeds, with_reference
from .data import Fold, TrainingData, fit_normalisation, make_fold, prepare
from .losses import LOSS_TERMS, DistillationBatch, Outputs, distillation_loss
from .settings import Settings
from .training import TeacherCache, computes_in_bfloat16, predict, predict_rows, train
