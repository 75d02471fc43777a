"""What a notebook holds while it works: its run's folder, and one way to report, draw and write numbers."""

import json
import time
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

from .manifest import read_manifest
from .names import InputFault
from .provenance import sha256_file, write_results
from .splits import read_splits, splits_path


@dataclass(frozen=True)
class Run:
    """One run of the study: runs/<name>/{cohort, registration, patches, models, results, figures, ...}.

    Attributes
    ----------
    path : folder of the run (made where it does not exist).
    profile, seed : as given to the notebook; they go into every results file.
    """

    path: Path
    profile: str
    seed: int
    started: float = field(default_factory=time.perf_counter)

    def __post_init__(self):
        object.__setattr__(self, "path", Path(self.path).resolve())

    def folder(self, name: str) -> Path:
        """A folder of the run, made where it does not exist."""
        path = self.path / name
        path.mkdir(parents=True, exist_ok=True)
        return path

    def report(self, line: str) -> None:
        """Add one line of progress to progress.log, which the command line shows while a notebook runs."""
        with (self.folder(".") / "progress.log").open("a") as stream:
            stream.write(line + "\n")

    def results(self, stage: str) -> dict:
        """The numbers that an earlier notebook wrote; InputFault where it has not run."""
        path = self.path / "results" / f"{stage}.json"
        if not path.exists():
            raise InputFault(path, "does not exist", f"run the notebook that ends by writing {stage}.json first")
        return json.loads(path.read_text())

    def manifest(self) -> pd.DataFrame:
        """The manifest that 01_cohort checked; `attrs["root"]` is where its images are."""
        cohort = self.results("cohort")
        return read_manifest(self.path / cohort["manifest"], self.path / cohort["root"])

    def splits(self) -> pd.DataFrame:
        """The folds stored beside the manifest."""
        manifest = self.manifest()
        return read_splits(splits_path(manifest.attrs["path"]), manifest)

    def save_figure(self, figure, name: str, data: pd.DataFrame | None = None) -> None:
        """Save a figure as PNG (200 dpi) and SVG without date, with the CSV behind it."""
        stem = self.folder("figures") / name
        figure.savefig(stem.with_suffix(".png"), dpi=200, bbox_inches="tight")
        figure.savefig(stem.with_suffix(".svg"), bbox_inches="tight", metadata={"Date": None})
        if data is not None:
            data.to_csv(stem.with_suffix(".csv"), index=False)

    def write_results(self, stage: str, numbers: dict, **header) -> Path:
        """Write results/<stage>.json; protocol and manifest hashes come from cohort.json once it is there."""
        if stage != "cohort":
            first = self.results("cohort")
            header = {key: first[key] for key in ("protocol_sha256", "manifest_sha256")} | header
        else:
            header["manifest_sha256"] = sha256_file(self.path / numbers["manifest"])
        seconds = time.perf_counter() - self.started
        header |= {"profile": self.profile, "seed": self.seed, "seconds": seconds}
        return write_results(self.path / "results" / f"{stage}.json", numbers, header)
