"""The runner on three small notebooks: checked parameters, resume by content, failures, and the report."""

import json
import re

import nbformat
import pytest

from ctsma import cli, report, study
from ctsma.cohort import InputFault

CELLS = {
    "01_first": [
        "run_dir: str = 'none'  # folder of the run\nprofile: str = 'quick'  # name\nseed: int = 0  # seed\n"
        "scale: float = 1.0  # factor\nfolds: list = [1, 2]  # list",
        "import json, pathlib\nroot = pathlib.Path(run_dir)\n(root / 'results').mkdir(exist_ok=True)",
        "(root / 'results/first.json').write_text(json.dumps({'value': seed * scale}))",
        "with open(root / 'progress.log', 'a') as log: log.write('work 1/1 K1: 0.1 s\\n')",
        "with open(root.parent / 'calls.txt', 'a') as calls: calls.write('1')",
    ],
    "02_second": [
        "run_dir: str = 'none'  # folder of the run\nprofile: str = 'quick'  # name\nfail: bool = False  # stop here",
        "import json, pathlib\nroot = pathlib.Path(run_dir)\nif fail: raise ValueError('knee too small')",
        "with open(root.parent / 'calls.txt', 'a') as calls: calls.write('2')",
        "value = json.loads((root / 'results/first.json').read_text())['value']",
        "(root / 'results/second.json').write_text(json.dumps({'value': value + 1}))",
    ],
}
OUTPUTS = {"01_first": ("results/first.json",), "02_second": ("results/second.json",)}


@pytest.fixture
def small_study(tmp_path, monkeypatch):
    """A study of two notebooks in a folder of its own; returns the run's folder."""
    notebooks = tmp_path / "notebooks"
    notebooks.mkdir()
    for name, cells in CELLS.items():
        made = [nbformat.v4.new_code_cell(cell) for cell in cells]
        made[0].metadata["tags"] = ["parameters"]
        kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
        nbformat.write(nbformat.v4.new_notebook(cells=made, metadata=kernel), notebooks / f"{name}.ipynb")
    monkeypatch.setattr(study, "NOTEBOOKS", notebooks)
    monkeypatch.setattr(study, "OUTPUTS", OUTPUTS)
    profile = {"about": "", "minutes": {"01_first": 1, "02_second": 2}, "disk_gb": 1, "parameters": {"scale": 2}}
    monkeypatch.setattr(study, "profiles", lambda: {"quick": profile})
    monkeypatch.chdir(tmp_path)
    return tmp_path / "runs" / "quick"


def calls(path):
    return (path.parent / "calls.txt").read_text()


def start(path, lines=None, begin=None, **parameters):
    return study.run(path, "quick", parameters, begin, (lines if lines is not None else []).append)


def test_stages_run_in_order_and_unchanged_ones_are_skipped(small_study):
    lines = []
    start(small_study, lines, seed=3)
    assert json.loads((small_study / "results" / "second.json").read_text())["value"] == 3 * 2.0 + 1
    assert "  work 1/1 K1: 0.1 s" in lines
    start(small_study, seed=3)
    assert calls(small_study) == "12"


def test_a_changed_parameter_runs_its_stage_and_all_after_it(small_study):
    start(small_study, seed=1)
    start(small_study, seed=2)
    assert calls(small_study) == "1212"
    start(small_study, seed=2, begin="second")
    assert calls(small_study) == "12122"


def test_changed_code_and_damaged_results_run_again(small_study):
    start(small_study)
    (small_study / "results" / "second.json").write_text("{}")
    start(small_study)
    assert calls(small_study) == "122"
    path = study.NOTEBOOKS / "02_second.ipynb"
    path.write_text(path.read_text().replace("value + 1", "value + 2"))
    assert [row["state"] for row in study.status(small_study)] == ["done", "changed since"]
    start(small_study)
    assert calls(small_study) == "1222"


def test_a_rewritten_file_of_equal_content_is_not_a_change(small_study):
    start(small_study)
    file = small_study / "results" / "first.json"
    file.write_text(file.read_text())
    start(small_study)
    assert calls(small_study) == "12"


def test_a_failed_notebook_names_cell_error_and_partial_notebook(small_study, capsys):
    code = cli.main(["run", "--set", "fail=true"])
    said = capsys.readouterr().err
    assert code == cli.STUDY_FAILED
    assert "02_second: cell [3] failed with ValueError: knee too small" in said
    partial = re.search(r"as far as it came: (\S+)", said)[1]
    outputs = [out for cell in nbformat.read(partial, as_version=4).cells for out in cell.get("outputs", [])]
    assert "knee too small" in [out.evalue for out in outputs if out.output_type == "error"][0]
    assert cli.main(["run", "--set", "fail=false"]) == 0
    assert calls(small_study) == "12"  # the first stage had succeeded and is not repeated


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--profile", "fast"], "profile fast: is unknown; choose one of quick"),
        (["--set", "scael=2"], "parameter scael: is declared by no notebook; did you mean scale"),
        (["--set", "scale=much"], "parameter scale: is 'much', not of type float"),
        (["--set", "fail=3"], "parameter fail: is 3, not of type bool"),
        (["--set", "seed"], "has no value"),
        (["--from", "third"], "stage third: is unknown"),
    ],
)
def test_unusable_arguments_are_refused_before_anything_runs(small_study, capsys, arguments, words):
    assert cli.main(["run", *arguments]) == cli.BAD_INPUT
    assert words in capsys.readouterr().err
    assert not small_study.exists()


def test_a_notebook_without_parameter_cell_is_refused(small_study):
    path = study.NOTEBOOKS / "02_second.ipynb"
    path.write_text(path.read_text().replace('"parameters"', '"other"'))
    with pytest.raises(InputFault, match="no cell tagged parameters"):
        start(small_study)


def test_a_run_of_another_protocol_or_cohort_is_refused(small_study, monkeypatch):
    start(small_study)
    monkeypatch.setattr(study, "protocol_sha256", lambda: "f" * 64)
    with pytest.raises(InputFault, match="another simulation protocol .* choose another --name"):
        start(small_study)


def test_a_second_run_in_the_same_folder_is_refused(small_study):
    with study._alone(small_study), pytest.raises(InputFault, match="in use by another run"):
        start(small_study)
    start(small_study)
    assert calls(small_study) == "12"


def test_dry_run_says_what_would_run_and_runs_nothing(small_study, capsys):
    assert cli.main(["run", "--dry-run"]) == 0
    assert "about 3 minutes on two cores, 1 GB" in capsys.readouterr().out
    assert not small_study.exists()


def test_report_needs_no_network_and_holds_every_page(small_study):
    start(small_study)
    index = report.write_report(small_study)
    pages = sorted(page.name for page in index.parent.iterdir())
    assert pages == ["01_first.html", "02_second.html", "index.html"]
    for page in index.parent.iterdir():
        assert not re.search(r"(src|href)=.?https?:", page.read_text())


def test_status_of_no_run_is_refused(capsys):
    assert cli.main(["status", "--name", "never-run"]) == cli.BAD_INPUT
    assert "is not the folder of a run" in capsys.readouterr().err
