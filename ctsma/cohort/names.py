"""The words every room shares: biomarkers, bones, compartments, and the fault a user can mend."""

from pathlib import Path

BIOMARKERS = ("bv_tv", "tb_th_mm", "tb_sp_mm", "tb_n_per_mm")
IMAGES = ("ct", "mr", "mr_rescan")  # columns of the manifest
BONES = {"femur": 1, "tibia": 2}
COMPARTMENTS = ("femur_medial", "femur_lateral", "tibia_medial", "tibia_lateral")


class InputFault(ValueError):
    """A fault in what the user gave, said in one sentence.

    Parameters
    ----------
    where : file, folder, column or parameter that is at fault.
    fault : what is wrong with it, with the value seen.
    mend : what to do about it.
    """

    def __init__(self, where: str | Path, fault: str, mend: str):
        super().__init__(where, fault, mend)
        self.where, self.fault, self.mend = str(where), fault, mend

    def __str__(self) -> str:
        return f"{self.where}: {self.fault}; {self.mend}."
