"""The way in for a hospital's own knees: DICOM export to cohort, and every fault of every knee before a run."""

from .checks import check_knees
from .choice import apply_choice, stacks, write_choice
from .headers import scan
from .identity import age_years, new_uid, pseudonym, read_salt, shifted_date
from .importing import Imported, choose, import_dicom, import_stack
from .knees import side_of, split_knees
