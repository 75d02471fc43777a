"""Names that every module shares, and the error that says what a user can do about it."""

from pathlib import Path

BIOMARKERS = ("bv_tv", "tb_th_mm", "tb_sp_mm", "tb_n_per_mm")
LABELS = {  # of tables and figures
    "bv_tv": "BV/TV",
    "tb_th_mm": "Tb.Th (mm)",
    "tb_sp_mm": "Tb.Sp (mm)",
    "tb_n_per_mm": "Tb.N (1/mm)",
    "mean": "mean of the four biomarkers",
}
IMAGES = ("ct", "mr", "mr_rescan")  # columns of the manifest that name an image
VOLUMES = (*IMAGES, "ct_labels")  # and its own bone labels
BONES = {"femur": 1, "tibia": 2}
COMPARTMENTS = ("femur_medial", "femur_lateral", "tibia_medial", "tibia_lateral")
FAILED, BAD_INPUT, STOPPED = 1, 2, 130  # exit codes of the command line


class InputError(ValueError):
    """A problem of the user's input, said in one sentence.

    Parameters
    ----------
    source : file, folder, column or parameter that has the problem.
    problem : what is wrong with it, with the value seen.
    remedy : what to do about it.
    """

    def __init__(self, source: str | Path, problem: str, remedy: str):
        super().__init__(source, problem, remedy)
        self.source, self.problem, self.remedy = str(source), problem, remedy

    def __str__(self) -> str:
        return f"{self.source}: {self.problem}; {self.remedy}."
