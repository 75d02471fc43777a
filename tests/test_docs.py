"""README and docs: generated parts are current, links resolve, commands parse, recipes work."""

import argparse
import importlib.util
import json
import pydoc
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import nbformat
import pytest
import torch
import yaml

from ctsma.distillation import ARMS, DistillationBatch, Outputs, distillation_loss, read_arms
from ctsma_lab.cli import build_parser
from ctsma_lab.report import update_readme
from ctsma_lab.runner import STAGES, notebook_parameters

REPOSITORY = Path(__file__).parents[1]
PAGES = sorted(REPOSITORY.glob("*.md")) + sorted((REPOSITORY / "docs").glob("*.md"))
CHECKLISTS = sorted((REPOSITORY / "docs" / "checklists").glob("*.yaml"))
EVERY_PAGE = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)


def text_of(page):
    """The Markdown of a page or of a notebook."""
    if page.suffix == ".ipynb":
        cells = nbformat.read(page, as_version=4).cells
        return "\n\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    return page.read_text()


def headings(page):
    without_code = re.sub(r"^```.*?^```", "", text_of(page), flags=re.MULTILINE | re.DOTALL)
    return re.findall(r"^#+ (.*)", without_code, re.MULTILINE)


def anchor(heading):
    """The anchor that GitHub gives to a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def commands(page, program):
    """Commands of a page that start with a program: lines of code blocks, and inline code."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    lines = [line.partition(" #")[0].strip() for block in blocks for line in block.splitlines()]
    lines += re.findall(r"`([^`\n]+)`", page.read_text())
    return [line for line in lines if line.startswith(f"{program} ")]


def test_generated_parts_are_those_of_the_published_results(tmp_path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "results").symlink_to(REPOSITORY / "docs" / "results")
    names = ("README.md", "docs/results.md", "docs/cluster.md")
    for name in names:
        (tmp_path / name).write_text((REPOSITORY / name).read_text())
    update_readme(tmp_path / "README.md", REPOSITORY / "docs" / "results" / "full")
    for name in names:
        assert (tmp_path / name).read_text() == (REPOSITORY / name).read_text(), name
    assert (tmp_path / "docs" / "figures" / "icc.svg").stat().st_size > 10_000


@EVERY_PAGE
def test_links_resolve(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" in target:
            continue
        assert not target.startswith("/"), target
        name, _, part = target.partition("#")
        linked = page.parent / name if name else page
        assert linked.exists(), target
        if part:
            assert part in [anchor(heading) for heading in headings(linked)], target


@EVERY_PAGE
def test_commands_parse(page):
    for command in commands(page, "ctsma"):
        if page.stem == "bad_inputs" or len(command.split()) < 3:
            continue  # wrong on purpose, or only the name of a command
        words = shlex.split(command)[1:]
        arguments = build_parser(words).parse_args(words)
        assert isinstance(arguments, argparse.Namespace)
    for command in commands(page, "make"):
        target = command.split()[1]
        makefile = (REPOSITORY / "Makefile").read_text()
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), command
    for command in commands(page, "python"):
        words = command.split()
        if words[1] == "-m":
            assert importlib.util.find_spec(words[2]), command
        else:
            assert (REPOSITORY / words[1]).exists(), command


@EVERY_PAGE
def test_parameters_exist(page):
    known = {name for stage in STAGES for name in notebook_parameters(stage)}
    named = re.findall(r"--set '?(\w+)=", page.read_text())
    assert page.stem == "bad_inputs" or set(named) <= known


@pytest.mark.parametrize("page", [p for p in PAGES if p.stem != "CHANGELOG"], ids=lambda p: p.stem)
def test_functions_and_files_that_a_page_names_exist(page):
    for name in re.findall(r"`((?:ctsma|kneesim)\.[\w.]+)`", page.read_text()):
        assert pydoc.locate(name) is not None, name
    for name in re.findall(r"`((?:ctsma|kneesim|benchmarks|tests)/[\w./]+)`", page.read_text()):
        assert page.stem == "bad_inputs" or (REPOSITORY / name).exists(), name


@pytest.mark.parametrize("path", CHECKLISTS, ids=lambda path: path.stem)
def test_checklists_are_complete_and_point_to_text(path):
    items = yaml.safe_load(path.read_text())["items"]
    numbers = [int(re.match(r"\d+", str(item["item"]))[0]) for item in items]
    assert sorted(set(numbers)) == list(
        range(1, {"claim_2024": 44, "tripod_ai": 27}[path.stem] + 1)
    )
    for item in items:
        assert item["status"] in ("reported", "partly", "missing", "not applicable"), item
        assert item["status"] == "reported" or item["note"], item
        for place in item["where"]:
            name, _, part = place.partition("#")
            assert (REPOSITORY / name).exists(), place
            if part:
                found = [h for h in headings(REPOSITORY / name) if part in h]
                assert len(found) == 1, f"{item['item']}: {place} names {found}"


def test_one_version_everywhere():
    version = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["version"]
    citation = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text())
    newest = re.search(r"^## (\S+)", (REPOSITORY / "CHANGELOG.md").read_text(), re.MULTILINE)[1]
    assert version == citation["version"] == newest


def test_the_glossary_has_every_arm():
    text = (REPOSITORY / "docs" / "glossary.md").read_text()
    assert not [arm for arm in ARMS if f"`{arm}`" not in text]


def test_the_oracle_is_reported_only_for_the_cohort_that_it_estimated():
    results = REPOSITORY / "docs" / "results"
    evidence = json.loads((results / "distillation_evidence.json").read_text())
    assert evidence["oracle"]["n_knees"] == 743
    agreement = json.loads((results / "full" / "agreement.json").read_text())
    joined = agreement["oracle"] is not None
    assert joined == ("ct_oracle" in agreement["icc"])
    assert joined == ("ct_oracle_vs_ct_sma_plus" in agreement["difference"])


def test_the_examples_of_a_loss_and_an_arm_run(tmp_path, monkeypatch):
    text = (REPOSITORY / "docs" / "extending.md").read_text()
    module = re.search(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)[1]
    arm = re.search(r"^```yaml\n(.*?)^```", text, re.MULTILINE | re.DOTALL)[1]
    (tmp_path / "my_losses.py").write_text(module)
    monkeypatch.syspath_prepend(tmp_path)
    added = read_arms(yaml.safe_load(arm))["ct_logits"]
    outputs = [
        Outputs(torch.full((2, 4), value), torch.zeros(2, 4, 1, 1, 1), []) for value in (0.0, 2.0)
    ]
    batch = DistillationBatch(*outputs, region=torch.ones(2, 1, 1, 1, 1))
    assert added.distilled
    assert float(distillation_loss(batch, added.loss_weights[0])) == 0.5 * 4


FIFTH_BIOMARKER = """
import numpy as np
import torch
from scipy import ndimage

import ctsma.common
ctsma.common.BIOMARKERS = (*ctsma.common.BIOMARKERS, "bs_tv_per_mm")  # step 1 of the recipe
from ctsma.biomarkers import grey

plate = grey.DEFINITIONS["plate"]

def plate_with_surface(*patch):  # step 2: the plate model has BS/TV = 2 Tb.N
    values = plate(*patch)
    return (*values, 2 * values[3])

grey.DEFINITIONS["plate"] = plate_with_surface
from ctsma import models, patches

rng = np.random.default_rng(0)
field = ndimage.gaussian_filter(rng.normal(size=(6, 12, 48, 48)), (0, 0.5, 1.5, 1.5))
bone = field > np.quantile(field, 0.75)
mr, voi = np.where(bone, 0.1, 1.0), np.ones(bone.shape, bool)
reference = patches.measure_reference(mr, voi, "plate")
assert (reference["flag"] == "").all()
assert np.allclose(reference["bs_tv_per_mm"], 2 * reference["tb_n_per_mm"])

targets = np.stack([reference[name] for name in ctsma.common.BIOMARKERS], axis=1)
features = np.column_stack([np.ones(6), targets[:, 0]])
network = models.build("ct", "compact", torch.Generator().manual_seed(0))
output, _ = network(torch.zeros(2, 2, 12, 24, 24))
assert targets.shape == (6, 5) and output.shape == (2, 5)
"""


def test_a_fifth_biomarker_follows_the_recipe():
    run = [sys.executable, "-c", FIFTH_BIOMARKER]
    done = subprocess.run(run, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
