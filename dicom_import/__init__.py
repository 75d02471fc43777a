"""From a hospital's DICOM export to a de-identified cohort: NIfTI files, a manifest and a log."""

from .choice import apply_choice, list_stacks, write_choice
from .headers import scan
from .identity import age_years, new_uid, pseudonym, read_salt, shifted_date
from .importing import Imported, choose, import_dicom
