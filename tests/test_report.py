"""Report pages of a run, and sentences and tables made from results files."""

import json
import re
import shutil
from pathlib import Path

import nbformat
import pytest
from nbformat import v4

from ctsma.arms import ARMS, COMPARISONS
from ctsma.common import InputError
from ctsma_lab import report, tables

PUBLISHED = Path(__file__).parents[1] / "docs" / "results" / "full"


def change(file, **values):
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.fixture
def results(tmp_path):
    """A copy of the published results, free to change."""
    return Path(shutil.copytree(PUBLISHED, tmp_path / "run" / "results"))


@pytest.fixture
def run(results):
    """A run of profile tiny with two executed notebooks, as papermill leaves them."""
    change(results / "cohort.json", profile="tiny")
    path = results.parent
    (path / "notebooks").mkdir()
    for name, title in (("01_first", "Whose knees?"), ("02_second", "Is <i>it</i> the same bone?")):
        shown = v4.new_output("display_data", {"text/markdown": f"The result of {name} is **3**."})
        wide = v4.new_output("execute_result", {"text/html": "<table><td>wide</td></table>"})
        noise = v4.new_output("stream", name="stderr", text="a warning of a library")
        cells = [
            v4.new_markdown_cell(f"# {title}\n\n## Question\n\nText."),
            v4.new_code_cell(f'run_dir = "{path.resolve()}"', outputs=[noise, wide]),
            v4.new_markdown_cell("## Result"),
            v4.new_code_cell("show()", outputs=[shown]),
            v4.new_markdown_cell("## Limitations\n\nNone."),
        ]
        nbformat.write(v4.new_notebook(cells=cells), path / "notebooks" / f"{name}.ipynb")
    (path / "notebooks" / "02_second.partial.ipynb").write_text("not a notebook")
    return path


def test_pages_stand_alone_and_lead_to_each_other(run):
    index = report.write_report(run)
    pages = {page.name: page.read_text() for page in index.parent.glob("*.html")}
    assert sorted(pages) == ["01_first.html", "02_second.html", "index.html"]
    for text in pages.values():
        assert not re.search(r"""(src|href)=["']?https?:""", text)
        assert str(run.resolve()) not in text
        assert 'name="viewport"' in text
        assert '<a href="01_first.html">Whose knees?</a>' in text
        assert "its numbers mean nothing" in text and "simulated" in text
    first, second = pages["01_first.html"], pages["02_second.html"]
    assert '<a href="#Result">Result</a>' in first and '<a href="#Question">Question</a>' in first
    assert "02_second.html" in first.partition('class="steps"')[2]
    assert "01_first.html" in second.partition('class="steps"')[2]
    assert "<i>it</i>" not in second.partition("<main>")[0]
    assert first.count('<details class="code">') == 2 and "a warning of a library" not in first
    assert "wide" in first and "runs/run" in first


def test_the_overview_shows_every_result(run):
    text = report.write_report(run).read_text()
    assert "The result of 01_first is <strong>3</strong>." in text
    assert "The result of 02_second is <strong>3</strong>." in text
    assert text.count("<table>") == 1 + len(tables.detailed_tables(run / "results"))
    assert '<img src="icc.svg"' in text and (run / "report" / "icc.svg").exists()


def test_an_unfinished_run_has_a_report(run):
    (run / "results" / "agreement.json").unlink()
    text = report.write_report(run).read_text()
    assert "The result of 01_first" in text and "<table>" not in text


def test_a_run_without_notebooks_is_refused(tmp_path):
    with pytest.raises(InputError, match="no executed notebook.*ctsma run"):
        report.write_report(tmp_path)


def test_the_origin_names_the_commit_of_every_stage(results):
    for stage in tables.STAGES:
        change(results / f"{stage}.json", git_commit="a" * 40)
    assert tables.origin(results).endswith(f"commit {'a' * 12}.")
    change(results / "diagnosis.json", git_commit="b" * 40 + "+changes")
    text = tables.origin(results)
    assert "cohort, registration, distillation, agreement: commit aaaaaaaaaaaa" in text
    assert "diagnosis: commit bbbbbbbbbbbb+changes" in text
    assert "--profile full --seed 0" in text


def test_the_origin_of_an_own_cohort_names_its_manifest(results):
    change(results / "cohort.json", simulated=False, manifest="somewhere/my.csv")
    assert "--manifest my.csv" in tables.origin(results)
    assert "simulation protocol" not in tables.origin(results)


@pytest.mark.parametrize(
    ("value", "low", "high", "words"),
    [
        (0.2, 0.1, 0.3, "raises it by 0.200 (95 % CI 0.100 to 0.300)"),
        (-0.2, -0.3, -0.1, "lowers it by 0.200 (95 % CI 0.100 to 0.300)"),
        (0.1, -0.1, 0.3, "does not detectably change it (difference 0.100, 95 % CI -0.100 to"),
        (0.0, 0.0, 0.0, "does not detectably change it"),
        (None, None, None, "has no defined effect on it"),
    ],
)
def test_an_effect_follows_from_its_interval(value, low, high, words):
    difference = {"difference": value, "ci_low": low, "ci_high": high}
    assert words in tables.effect_in_words("it", difference)


def test_the_summary_has_three_sentences_with_the_numbers_of_the_files(results):
    found = json.loads((results / "agreement.json").read_text())
    lines = tables.summary(results).splitlines()
    assert len(lines) == 3
    assert f"{found['icc']['ct_residual']['mean']['icc']:.3f}" in lines[0]
    assert "0.778 and 0.883" in lines[1] and "class activation maps" in lines[2]
    pair = {"arm": "student, teacher's estimates, CAM", "against": "student", "statistic": "icc"}
    row = pair | {"difference": 0.1, "ci_low": 0.05, "ci_high": 0.15}
    few = {"by_labelled_knees": {"20": {"differences": [row]}}}
    (results.parent / "distillation_evidence.json").write_text(json.dumps({"few_labels": few}))
    assert "Where 20 of 80 pairs have a reference" in tables.summary(results)
    assert "raises the mean ICC by 0.100" in tables.summary(results)
    change(results / "agreement.json", differences=[])
    assert not tables.summary(results)


def test_tables_hold_every_arm_and_the_published_values(results):
    table = tables.results_table(results)
    for name in ("ct_only", "ct_sma", "mr_reference"):
        row = next(line for line in table.splitlines() if line.startswith(f"| {ARMS[name].label} "))
        assert f"{ARMS[name].published['auc']:.3f}" in row
    details = tables.detailed_tables(results)
    arms = set(json.loads((results / "agreement.json").read_text())["icc"])
    reported = [pair for pair in COMPARISONS if set(pair) <= arms]
    for title in ("Differences in mean ICC", "Differences in r, mean of the biomarkers"):
        assert len(details[title].splitlines()) == 2 + len(reported)
    assert "0.804" in details["ICC with the MR reference, by biomarker"]
    assert tables.interval({"icc": None, "ci_low": None, "ci_high": None}, "icc") == "not defined"
    assert tables.interval({"icc": 1.0, "ci_low": None}, "icc") == "1.000 (no interval)"


def test_results_without_ground_truth_have_fewer_tables(results):
    change(results / "registration.json", tre_mm={})
    change(results / "cohort.json", calibration={})
    titles = tables.detailed_tables(results)
    assert not [title for title in titles if "Registration" in title or "Difficulty" in title]


def test_the_figure_of_equal_results_has_equal_bytes(results, tmp_path):
    for name in ("one.svg", "two.svg"):
        tables.draw_icc(results, tmp_path / name)
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()


def test_a_readme_keeps_its_own_words(results, tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- results:begin -->\nold\n<!-- results:end -->\nafter\n")
    report.update_readme(readme, results)
    text = readme.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert tables.results_table(results) in text and tables.origin(results) in text
    readme.write_text("no marks")
    with pytest.raises(InputError, match="results:begin"):
        report.update_readme(readme, results)
