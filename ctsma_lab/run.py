"""The folder of one run, as a notebook sees it: inputs, progress, tables, figures, results."""

import json
import os
import time
from dataclasses import dataclass, field
from pathlib import Path

import joblib
import matplotlib.pyplot as plt
import pandas as pd
from IPython.display import Image, display
from tqdm.auto import tqdm

from ctsma.cohort import read_manifest, read_splits, splits_path
from ctsma.common import InputError
from ctsma.files import git_commit, sha256_file, versions, write_json, write_text
from ctsma_lab.cluster import ADDRESS, backend_of, connect

SCHEMA_VERSION = 2
MARGIN_INCH = 0.1  # around a figure
DPI = 200  # of a figure's PNG; notebooks show it at half its pixels
RESULTS = {  # the notebooks of the main line in their order, and the results file of each
    "01_cohort": "cohort",
    "02_registration_qa": "registration",
    "03_distillation_training": "distillation",
    "04_icc_agreement": "agreement",
    "05_roc_diagnosis": "diagnosis",
}
UNDER_RUNNER = "CTSMA_RUNNER"  # environment variable that the command line sets for its notebooks


@dataclass
class Run:
    """One run: runs/<name>/{cohort, registration, patches, models, results, figures, ...}.

    Attributes
    ----------
    path : folder of the run (made where it does not exist).
    profile, seed : as given to the notebook; they go into every results file.
    parameters : the notebook's other parameters on which its results depend.
    writes : False where a finished run is only looked at: tables, figures and results stay.
    """

    path: Path
    profile: str = ""
    seed: int = 0
    parameters: dict = field(default_factory=dict)
    writes: bool = True
    started: float = field(default_factory=time.perf_counter)
    bar: tqdm | None = None

    def __post_init__(self):
        self.path = Path(self.path).resolve()

    @classmethod
    def open(
        cls, run_dir: str, profile: str, seed: int, *, stage: str, overwrite: bool, **parameters
    ) -> "Run":
        """Open the folder of a run for one notebook, named by `stage`.

        Raises InputError where an earlier notebook has not run. Where this one has finished and
        `overwrite` is false, nothing is written; InputError if it finished with other parameters.
        """
        run = cls(Path(run_dir), profile, seed, parameters)
        if address := os.environ.get(ADDRESS):
            joblib.parallel_config(backend_of(connect(address, run.folder("."))))
        stages = list(RESULTS)
        earlier = stages[: stages.index(stage)]
        missing = [name for name in earlier if not run.results_path(RESULTS[name]).exists()]
        if missing:
            remedy = f"run {', '.join(missing)} first, or set run_dir to a finished run"
            raise InputError(run.path, f"has no results of {', '.join(missing)}", remedy)
        if run.results_path(RESULTS[stage]).exists() and not overwrite:
            run.writes = False
            run._check_parameters(RESULTS[stage])
            print(f"{run.path.name} is finished: its results are shown and not written again.")
        return run

    def _check_parameters(self, name: str) -> None:
        then = self.results(name).get("parameters", {})
        now = {"seed": self.seed, **self.parameters}
        changed = [key for key, value in now.items() if key in then and then[key] != value]
        if changed:
            was = ", ".join(f"{key} = {then[key]}" for key in changed)
            remedy = "set these values, choose another run_dir, or set overwrite = True"
            raise InputError(self.path, f"holds a finished run with {was}", remedy)

    def folder(self, name: str) -> Path:
        """A folder of the run, made where it does not exist."""
        path = self.path / name
        path.mkdir(parents=True, exist_ok=True)
        return path

    def report(self, line: str, done: int = 0, total: int = 0) -> None:
        """Show progress: a bar in an interactive notebook, a line of the log under the runner."""
        if os.environ.get(UNDER_RUNNER):
            with (self.folder(".") / "progress.log").open("a", encoding="utf-8") as stream:
                stream.write(json.dumps({"line": line, "done": done, "total": total}) + "\n")
            return
        if not total:
            print(line)
            return
        if self.bar is None:
            self.bar = tqdm(total=total)
        self.bar.set_description(line.partition(f" {done}/{total}")[0])
        self.bar.update(done - self.bar.n)
        if done == total:
            self.bar.close()
            self.bar = None

    def results_path(self, name: str) -> Path:
        """Path of results/<name>.json."""
        return self.path / "results" / f"{name}.json"

    def results(self, name: str) -> dict:
        """The numbers of results/<name>.json; InputError where that notebook has not run."""
        path = self.results_path(name)
        if not path.exists():
            raise InputError(path, "does not exist", f"run the notebook that writes {name}.json")
        return json.loads(path.read_text(encoding="utf-8"))

    def manifest(self) -> pd.DataFrame:
        """The manifest that 01_cohort checked; `attrs["root"]` is where its images are."""
        cohort = self.results("cohort")
        return read_manifest(self.path / cohort["manifest"], self.path / cohort["root"])

    def splits(self) -> pd.DataFrame:
        """The folds stored beside the manifest."""
        manifest = self.manifest()
        return read_splits(splits_path(manifest.attrs["path"]), manifest)

    def read_table(self, name: str) -> pd.DataFrame:
        """A CSV table of the run, for example "models/predictions.csv"; identifiers are text."""
        path = self.path / name
        if not path.exists():
            raise InputError(path, "does not exist", "run the notebook that writes it first")
        return pd.read_csv(path, dtype={"knee_id": "str", "subject_id": "str"})

    def write_table(self, name: str, table: pd.DataFrame) -> None:
        """Write a CSV table of the run whole or not at all."""
        if self.writes:
            write_text(self.path / name, table.to_csv(index=False))

    def save_figure(self, figure, name: str, data: pd.DataFrame | None = None) -> None:
        """Save a figure as PNG and SVG without date, with the CSV behind it.

        A notebook that the command line runs shows the PNG, so that it is not drawn once more.
        """
        if not self.writes:
            return
        stem = self.folder("figures") / name
        # It is laid out here once, and not again for each file and for the notebook.
        figure.draw_without_rendering()
        figure.set_layout_engine(None)
        box = figure.get_tightbbox().padded(MARGIN_INCH)
        png = stem.with_suffix(".png")
        figure.savefig(png, dpi=DPI, bbox_inches=box)
        figure.savefig(stem.with_suffix(".svg"), bbox_inches=box, metadata={"Date": None})
        if os.environ.get(UNDER_RUNNER):
            display(Image(filename=png, width=round(box.width * DPI / 2)))
            plt.close(figure)
        if data is not None:
            self.write_table(f"figures/{name}.csv", data)

    def write_results(self, name: str, numbers: dict, **header) -> Path:
        """Write results/<name>.json with its origin: profile, seed, hashes, versions, seconds."""
        path = self.results_path(name)
        if not self.writes:
            return path
        if name == "cohort":
            header["manifest_sha256"] = sha256_file(self.path / numbers["manifest"])
        else:
            cohort = self.results("cohort")
            header["protocol_sha256"] = cohort["protocol_sha256"]
            header["manifest_sha256"] = cohort["manifest_sha256"]
        origin = {
            "schema_version": SCHEMA_VERSION,
            "profile": self.profile,
            "seed": self.seed,
            "parameters": {"seed": self.seed, **self.parameters},
            "seconds": time.perf_counter() - self.started,
            "git_commit": git_commit(),
            "packages": versions(),
        }
        return write_json(path, origin | header | numbers)
