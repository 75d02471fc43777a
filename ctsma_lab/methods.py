"""The methods section of a paper on a run, from its results files: what was done, no more."""

import re
from collections.abc import Mapping
from pathlib import Path

import jinja2
import numpy as np
import pandas as pd
import SimpleITK as sitk

from ctsma.arms import ARMS, Arm
from ctsma.cohort import image_path, read_manifest
from ctsma.files import write_text
from ctsma.registration import quality
from kneesim.protocol import load_protocol, protocol_sha256

from .pages import TEMPLATES
from .tables import STAGES, origin, read_results

CITATION = re.compile(r"@(\w+)")
PACKAGES = {  # name in the results files: key of its citation
    "SimpleITK": "lowekamp2013",
    "torch": "paszke2019",
    "monai": "cardoso2022",
    "numpy": "harris2020",
    "scipy": "virtanen2020",
    "pandas": "mckinney2010",
    "scikit-learn": "pedregosa2011",
    "pingouin": "vallat2018",
}


def write_methods(run_path: Path) -> None:
    """Write report/methods.md and report/methods.bib, its citations, of a complete run.

    The text states only what the results files, the settings in them and the manifest hold.
    """
    results, report = run_path / "results", run_path / "report"
    stages = {stage: read_results(results, stage) for stage in STAGES}
    cohort = stages["cohort"]
    manifest = read_manifest(run_path / cohort["manifest"], run_path / cohort["root"])
    known = cohort["simulated"] and cohort["protocol_sha256"] == protocol_sha256()
    arms = [arm for name, arm in ARMS.items() if name in stages["agreement"]["icc"]]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), trim_blocks=True, lstrip_blocks=True
    )
    text = environment.get_template("methods.md.jinja").render(
        **stages,
        name=run_path.name,
        people=_people(manifest),
        voxels={column: voxel_text(manifest, column) for column in ("ct", "mr")},
        protocol=load_protocol() if known else None,
        arms=arms,
        weights={arm.id: _weights(arm) for arm in arms},
        packages=PACKAGES,
        limits=quality,
        origin=origin(results),
    )
    text = re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"
    write_text(report / "methods.md", text)
    write_text(report / "methods.bib", bibliography(text))


def bibliography(text: str) -> str:
    """The BibTeX entries of references.bib that a text cites as @key, in the order of the file."""
    entries = re.split(r"\n(?=@)", (TEMPLATES / "references.bib").read_text("utf-8").strip())
    cited = set(CITATION.findall(text))
    kept = [entry.strip() for entry in entries if re.match(r"@\w+{(\w+),", entry)[1] in cited]
    return "\n\n".join(kept) + "\n"


def voxel_text(manifest: pd.DataFrame, column: str) -> str:
    """Median voxel of the images of a column in mm, with the range of each edge where they differ.

    Only NIfTI files are read; "" where there are none.
    """
    spacings = []
    for knee in manifest.to_dict("records"):
        path = image_path(knee, column, manifest.attrs["root"])
        if path is not None and path.is_file():
            reader = sitk.ImageFileReader()
            reader.SetFileName(str(path))
            reader.ReadImageInformation()
            spacings.append(sorted(reader.GetSpacing()))
    if not spacings:
        return ""
    low, middle, high = (q(spacings, axis=0) for q in (np.min, np.median, np.max))
    text = " x ".join(f"{edge:.3g}" for edge in middle) + " mm"
    if (high - low > 0.005).any():
        edges = (f"{a:.3g} to {b:.3g}" for a, b in zip(low, high, strict=True))
        return f"{text} (median; {', '.join(edges)} mm)"
    return text


def _weights(arm: Arm) -> str:
    """The candidate weights of an arm's distillation loss, as in "0, 0.01, 0.1"."""
    return ", ".join(f"{sum(weights.values()):g}" for weights in arm.loss_weights)


def _people(manifest: pd.DataFrame) -> Mapping[str, float]:
    """Counts of the manifest, and mean and SD of age and body mass index where they are known."""
    subjects = manifest.drop_duplicates("subject_id")
    found = {
        "knees": len(manifest),
        "subjects": len(subjects),
        "women": int((subjects["sex"] == "F").sum()),
        "sex_known": int(subjects["sex"].notna().sum()),
        "labelled": int(manifest["oa"].notna().sum()),
        "oa": int((manifest["oa"] == 1).sum()),
        "pairs": len(manifest.dropna(subset=["ct", "mr"])),
        "rescans": int(manifest["mr_rescan"].notna().sum()) if "mr_rescan" in manifest else 0,
        "labels": int(manifest["ct_labels"].notna().sum()) if "ct_labels" in manifest else 0,
    }
    for name in ("age", "bmi"):
        values = subjects[name].dropna()
        if len(values) > 1:
            found[name] = f"{values.mean():.1f} (SD {values.std():.1f})"
    return found
