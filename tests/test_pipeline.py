"""The cache, the folder of a run, and the runner on two small notebooks."""

import importlib.util
import io
import json
import logging
import re
import shutil
import subprocess
import sys
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path, PureWindowsPath
from unittest.mock import Mock

import nbformat
import pandas as pd
import pytest

from ctsma import cache, files
from ctsma.cohort import image_path, read_manifest
from ctsma.cohort.manifest import SCHEMA
from ctsma.common import InputError
from ctsma.files import ROOT, atomic
from ctsma_lab import cli, profiles, runner
from ctsma_lab.report import write_report
from ctsma_lab.run import RESULTS, UNDER_RUNNER, Run
from ctsma_lab.terminal import Progress

COMMON = (
    "run_dir: str = 'none'  # folder of the run\nprofile: str = 'quick'  # name\n"
    "overwrite: bool = False  # write again\n"
)
CELLS = {
    "01_first": [
        COMMON
        + "seed: int = 0  # seed\nscale: float = 1.0  # factor\nfolds: list = [1, 2]  # list",
        "import json\nfrom ctsma_lab.run import Run\nrun = Run(run_dir, profile, seed)",
        "file = run.folder('results') / 'first.json'\nfile.write_text(json.dumps(seed * scale))",
        "run.report('work 1/1 K1: 0.1 s', done=1, total=1)",
        "with open(run.path.parent / 'calls.txt', 'a') as calls: calls.write('1')",
    ],
    "02_second": [
        COMMON + "fail: bool = False  # stop here",
        "import json, pathlib\nroot = pathlib.Path(run_dir)\nassert not fail, 'too small'",
        "with open(root.parent / 'calls.txt', 'a') as calls: calls.write('2')",
        "value = json.loads((root / 'results/first.json').read_text())",
        "(root / 'results/second.json').write_text(json.dumps(value + 1))",
    ],
}


@pytest.fixture
def small_study(kernel_study, in_process):
    """A study of two notebooks, run in this process; returns the run's folder."""
    return kernel_study


@pytest.fixture
def kernel_study(tmp_path, monkeypatch):
    """A study of two notebooks in a folder of its own; returns the run's folder."""
    notebooks = tmp_path / "notebooks"
    notebooks.mkdir()
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    for name, cells in CELLS.items():
        code = [nbformat.v4.new_code_cell(cell) for cell in cells]
        code[0].metadata["tags"] = ["parameters"]
        title = nbformat.v4.new_markdown_cell(f"# Page {name}")
        page = nbformat.v4.new_notebook(cells=[title, *code], metadata=kernel)
        nbformat.write(page, notebooks / f"{name}.ipynb")
        nbformat.write(page, notebooks / f"{name}-Copy1.ipynb")  # copies must not break anything
    profile = {"about": "", "minutes": {"01_first": 1, "02_second": 2}, "disk_gb": 1}
    profile["parameters"] = {"scale": 2}
    monkeypatch.setattr(runner, "NOTEBOOKS", notebooks)
    monkeypatch.setattr(runner, "RESULTS", {"01_first": "first", "02_second": "second"})
    monkeypatch.setattr(runner, "STAGES", ("01_first", "02_second"))
    monkeypatch.setattr(runner, "FOLDERS", {"01_first": (), "02_second": ()})
    monkeypatch.setattr(runner, "profiles", lambda: {"quick": profile})
    monkeypatch.chdir(tmp_path)
    return tmp_path / "runs" / "quick"


def calls(path):
    return (path.parent / "calls.txt").read_text()


def start(path, lines=None, begin=None, identity=None, **parameters):
    lines = [] if lines is None else lines

    def report(line, done=0, total=0):
        lines.append(line)

    runner.run(path, "quick", parameters, identity or {"cohort": "simulated"}, begin, report)


def test_stages_run_in_order_and_unchanged_ones_are_skipped(small_study):
    lines = []
    start(small_study, lines, seed=3)
    assert json.loads((small_study / "results" / "second.json").read_text()) == 3 * 2.0 + 1
    assert "  work 1/1 K1: 0.1 s" in lines
    start(small_study, seed=3)
    assert calls(small_study) == "12"


def test_a_changed_parameter_runs_its_stage_and_all_after_it(small_study):
    start(small_study, seed=1)
    start(small_study, seed=2)
    assert calls(small_study) == "1212"
    start(small_study, seed=2, begin="second")
    assert calls(small_study) == "12122"


def test_a_stage_that_another_run_finished_is_taken_from_it(small_study):
    start(small_study, seed=1)
    other, lines = small_study.with_name("other"), []
    with pytest.raises(AssertionError, match="too small"):
        start(other, lines, seed=1, fail=True)  # a parameter of the second stage alone
    assert "01_first: taken from quick, which ran it alike" in lines
    assert calls(small_study) == "12"
    for name in ("01_first.json", "results/first.json", "notebooks/01_first.ipynb"):
        assert (other / name).read_bytes() == (small_study / name).read_bytes()
    assert [row["state"] for row in runner.status(other)] == ["done", "not run"]
    start(other, seed=1)
    assert calls(small_study) == "12"
    (small_study / "results" / "first.json").unlink()  # what is linked stays in the other run
    assert json.loads((other / "results" / "first.json").read_text()) == 2.0
    third = small_study.with_name("third")
    start(third, seed=1, begin="first")
    assert calls(small_study) == "1212"
    damaged = other / "results" / "first.json"
    damaged.unlink()
    damaged.write_text("5")
    start(other.with_name("fourth"), seed=1)
    assert json.loads((third.with_name("fourth") / "results" / "first.json").read_text()) == 2.0


def test_changed_code_and_damaged_results_run_again(small_study):
    start(small_study)
    (small_study / "results" / "second.json").write_text("{}")
    start(small_study)
    assert calls(small_study) == "122"
    path = runner.NOTEBOOKS / "02_second.ipynb"
    path.write_text(path.read_text().replace("value + 1", "value + 2"))
    assert [row["state"] for row in runner.status(small_study)] == ["done", "changed since"]
    start(small_study)
    assert calls(small_study) == "1222"


def test_the_images_of_a_training_that_was_killed_are_removed(small_study):
    left = small_study / "models" / ".data-a1b2" / "ct"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"images")
    start(small_study)
    assert not left.parent.exists() and left.parents[1].exists()


def test_a_rewritten_file_of_equal_content_is_not_a_change(small_study):
    start(small_study)
    file = small_study / "results" / "first.json"
    file.write_text(file.read_text())
    start(small_study)
    assert calls(small_study) == "12"


def test_a_failed_notebook_names_cell_error_and_partial_notebook(kernel_study, capsys):
    code = cli.main(["run", "--set", "fail=true"])
    message = capsys.readouterr().err
    assert code == cli.FAILED
    assert "02_second: cell [3] failed with AssertionError: too small" in message
    partial = re.search(r"the notebook up to there: (\S+)", message)[1]
    cells = nbformat.read(partial, as_version=4).cells
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    errors = [output.evalue for output in outputs if output.output_type == "error"]
    assert "too small" in errors[0]
    assert cli.main(["run", "--set", "fail=false"]) == 0
    assert calls(kernel_study) == "12"  # the first stage had succeeded and is not repeated


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--profile", "fast"], "profile fast: is unknown; choose one of quick"),
        (["--set", "scael=2"], "parameter scael: is declared by no notebook; did you mean scale"),
        (["--set", "scale=much"], "parameter scale: is 'much', not of type float"),
        (["--set", "fail=3"], "parameter fail: is 3, not of type bool"),
        (["--set", "seed"], "has no value"),
        (["--from", "third"], "stage third: is unknown"),
        (["--set", "scale=1", "--set", "n_jobs=0"], "parameter n_jobs: is 0, not between 1 and"),
        (["--set", "seed=-1"], "parameter seed: is -1, not between 0 and 4294967295"),
        (["--set", "run_dir=x"], "--set run_dir: is set by ctsma run itself; give --name"),
        (["--name", "a/b"], "is not the name of one folder below runs/"),
        (["--name", "a\\b"], "is not the name of one folder below runs/"),
        (["--name", "C:b"], "is not the name of one folder below runs/"),
        (["--name", ".."], "is not the name of one folder below runs/"),
        (["--anatomy", "none.nrrd"], "none.nrrd: does not exist"),
    ],
)
def test_unusable_arguments_are_refused_before_anything_runs(small_study, capsys, arguments, words):
    page = runner.NOTEBOOKS / "01_first.ipynb"
    page.write_text(
        page.read_text().replace(
            "folds: list", "anatomy: str = ''  # map\\nn_jobs: int = 2  # processes\\nfolds: list"
        )
    )
    assert cli.main(["run", *arguments]) == cli.BAD_INPUT
    assert words in capsys.readouterr().err
    assert not small_study.exists()


@pytest.mark.parametrize("name", ["{0} {seed} [1]", "é 膝 'a' %20#"])
def test_a_run_may_have_any_name_of_a_folder(small_study, monkeypatch, capsys, name):
    installed = runner.NOTEBOOKS.rename(small_study.parents[1] / name)
    monkeypatch.setattr(runner, "NOTEBOOKS", installed)
    assert cli.main(["run", f"--name={name}"]) == 0
    assert cli.main(["status", f"--name={name}"]) == 0
    assert cli.main(["report", f"--name={name}"]) == 0
    assert "02_second                   done" in capsys.readouterr().out
    folder = small_study.parent / name
    assert json.loads((folder / "results" / "second.json").read_text()) == 1
    assert (folder / "report" / "index.html").exists()
    assert cli.main(["run", f"--name={name}"]) == 0
    assert calls(small_study) == "12"


COMMANDS = {  # with what each needs
    "run": [],
    "simulate": ["--out", "out"],
    "import": ["in", "--out", "out"],
    "check-data": ["cohort.csv"],
    "predict": ["ct.nii.gz:R", "--out", "out"],
    "export-model": ["--out", "out"],
}


@pytest.mark.parametrize("jobs", ["0", "-1", "1025"])
@pytest.mark.parametrize("command", COMMANDS)
def test_a_number_of_processes_out_of_range_is_one_sentence(
    tmp_path, monkeypatch, capsys, command, jobs
):
    monkeypatch.chdir(tmp_path)
    assert cli.main([command, *COMMANDS[command], "--jobs", jobs]) == cli.BAD_INPUT
    message = f"--jobs {jobs}: is not between 1 and 1024; give a number in this range.\n"
    assert capsys.readouterr().err == message
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run", "--seed", "-1"], "--seed -1: is not between 0 and 4294967295"),
        (["run", "--seed", "4294967296"], "--seed 4294967296: is not between 0 and 4294967295"),
        (["simulate", "--out", "x", "--knees", "0"], "--knees 0: is not between 1 and 9999"),
        (["simulate", "--out", "x", "--rescans", "-2"], "--rescans -2: is not between 0 and 9999"),
        (["export-model", "--out", "x", "--seed", "-1"], "--seed -1: is not between 0"),
        (["predict", "kn\udce9e.nii:R", "--out", "x"], r"kn\udce9e.nii:R: is not UTF-8; rename"),
        (["status", "--name", "kn\udce9e"], r"kn\udce9e: is not UTF-8; rename the file or folder"),
    ],
)
def test_numbers_out_of_range_and_broken_names_are_refused(
    tmp_path, monkeypatch, capsys, arguments, words
):
    monkeypatch.chdir(tmp_path)
    assert cli.main(arguments) == cli.BAD_INPUT
    assert words in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [MemoryError, BrokenProcessPool])
def test_a_lack_of_memory_is_one_sentence(monkeypatch, capsys, error):
    monkeypatch.setattr("ctsma_lab.commands.status.status", Mock(side_effect=error))
    assert cli.main(["status", "--name", "any"]) == cli.FAILED
    assert capsys.readouterr().err.startswith("ctsma: a process was killed or ran out of memory;")


def test_a_stopped_run_says_how_to_continue(small_study, monkeypatch, capsys):
    monkeypatch.setattr(logging.getLogger("asyncio"), "level", logging.WARNING)  # put back after
    monkeypatch.setattr(runner.papermill, "execute_notebook", Mock(side_effect=KeyboardInterrupt))
    assert cli.main(["run"]) == cli.STOPPED
    assert capsys.readouterr().err == "stopped; the same command continues where it stopped\n"
    assert not logging.getLogger("asyncio").isEnabledFor(logging.ERROR)


def test_a_notebook_without_parameter_cell_is_refused(small_study):
    path = runner.NOTEBOOKS / "02_second.ipynb"
    path.write_text(path.read_text().replace('"parameters"', '"other"'))
    with pytest.raises(InputError, match="no cell tagged parameters"):
        start(small_study)


def test_a_run_of_another_cohort_is_refused(small_study):
    start(small_study)
    with pytest.raises(InputError, match="another cohort .* choose another --name"):
        start(small_study, identity={"cohort": "manifest other.csv"})


def test_a_second_run_in_the_same_folder_is_refused(small_study):
    with runner._locked(small_study), pytest.raises(InputError, match="in use by another run"):
        start(small_study)
    start(small_study)
    assert calls(small_study) == "12"


def test_status_lists_every_run_and_says_which_stage_runs(small_study, capsys, monkeypatch):
    assert cli.main(["status"]) == cli.BAD_INPUT
    assert "runs/: holds no run" in capsys.readouterr().err
    shown = []
    execute = runner._execute

    def followed(path, step, report):
        cli.main(["status"])
        shown.append(capsys.readouterr().out)
        execute(path, step, report)

    monkeypatch.setattr(runner, "_execute", followed)
    start(small_study)
    assert "01_first                    running" in shown[0]
    assert "02_second                   running" in shown[1]
    assert "01_first                    done" in shown[1]
    copy = shutil.copytree(small_study, small_study.parent / "other")
    assert cli.main(["status"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if "_" not in line] == [copy.name, small_study.name]
    assert not any("running" in line for line in lines)


def test_times_that_are_shown_are_those_of_a_finished_run(tmp_path, monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location("run_times", ROOT / "benchmarks" / "run_times.py")
    run_times = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(run_times)
    done = {"state": "done", "seconds": 90.0, "finished": "2026-01-01T00:00:00+00:00"}
    rows = [{"stage": stage} | done for stage in runner.STAGES]
    (tmp_path / "results").mkdir()
    (tmp_path / "run.json").write_text('{"profile": "quick"}')
    (tmp_path / "results" / "cohort.json").write_text('{"n_knees": 48, "git_commit": "a"}')
    monkeypatch.setattr(run_times, "status", lambda run: rows)
    for module in (run_times, profiles):
        monkeypatch.setattr(module, "RUN_TIMES", tmp_path / "run_times.json")
    assert profiles.profiles()["quick"]["minutes"] == {}
    monkeypatch.setattr(sys, "argv", ["run_times.py", str(tmp_path)])
    run_times.main()
    assert profiles.profiles()["quick"]["minutes"] == dict.fromkeys(runner.STAGES, 1.5)
    assert profiles.profiles()["full"]["minutes"] == {}
    rows[4]["seconds"] = None
    with pytest.raises(InputError, match="has not finished 05_roc_diagnosis"):
        run_times.main()


def test_dry_run_shows_the_plan_and_runs_nothing(small_study, capsys):
    assert cli.main(["run", "--dry-run"]) == 0
    assert "about 3 minutes on two cores, 1 GB" in capsys.readouterr().out
    assert not small_study.exists()


def test_report_needs_no_network_and_holds_every_page(small_study):
    start(small_study)
    index = write_report(small_study)
    pages = sorted(page.name for page in index.parent.iterdir())
    assert pages == ["01_first.html", "02_second.html", "index.html"]
    for page in index.parent.iterdir():
        assert not re.search(r"(src|href)=.?https?:", page.read_text())
    assert "Page 01_first" in index.read_text()  # titles, not file names


def test_status_of_no_run_is_refused(capsys):
    assert cli.main(["status", "--name", "never-run"]) == cli.BAD_INPUT
    assert "is not the folder of a run" in capsys.readouterr().err


def test_a_record_is_read_back_until_key_or_file_changes(tmp_path):
    (tmp_path / "data.txt").write_text("one")
    written = cache.write_record(tmp_path / "record.json", "key", {"value": 1}, ["data.txt"])
    assert cache.read_record(tmp_path / "record.json", "key") == written
    assert cache.read_record(tmp_path / "record.json", "other") is None
    (tmp_path / "data.txt").write_text("two")
    assert cache.read_record(tmp_path / "record.json", "key") is None
    (tmp_path / "record.json").write_text("{")
    assert cache.read_record(tmp_path / "record.json", "key") is None


def test_files_of_a_record_are_named_alike_on_every_system(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "ct.nii").write_text("")
    name = Path("images", "ct.nii")
    assert list(cache.write_record(tmp_path / "r.json", "", {}, [name])["files"]) == [
        "images/ct.nii"
    ]


def test_paths_of_a_manifest_may_be_those_of_windows(tmp_path):
    path = PureWindowsPath("images", "{0} [1] é", "ct.nii.gz")
    columns = list(SCHEMA.columns)
    row = {"knee_id": "K1", "subject_id": "S1", "side": "L", "ct": str(path)}
    pd.DataFrame([row], columns=columns).to_csv(tmp_path / "cohort.csv", index=False)
    knee = read_manifest(tmp_path / "cohort.csv").iloc[0]
    assert knee["ct"] == path.as_posix()
    assert image_path(knee, "ct", tmp_path).parent.parent == tmp_path / "images"
    row["ct"] = str(PureWindowsPath("..", "ct.nii.gz"))
    pd.DataFrame([row], columns=columns).to_csv(tmp_path / "cohort.csv", index=False)
    with pytest.raises(InputError, match="leads out of the cohort's root"):
        read_manifest(tmp_path / "cohort.csv")


def test_the_commit_of_a_repository_around_the_tree_is_not_taken(tmp_path, monkeypatch):
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b.c"]
    subprocess.run([*git, "init", "--quiet"], check=True)
    subprocess.run([*git, "commit", "--quiet", "--allow-empty", "--message", "a"], check=True)
    monkeypatch.setattr(files, "ROOT", tmp_path)
    assert len(files.git_commit()) == 40
    (tmp_path / "site-packages").mkdir()
    monkeypatch.setattr(files, "ROOT", tmp_path / "site-packages")
    assert files.git_commit() == "unknown"


def test_an_interrupted_write_leaves_the_old_file(tmp_path):
    (tmp_path / "file.txt").write_text("old")
    with pytest.raises(RuntimeError), atomic(tmp_path / "file.txt") as temporary:
        temporary.write_text("new")
        raise RuntimeError
    assert [file.name for file in tmp_path.iterdir()] == ["file.txt"]
    assert (tmp_path / "file.txt").read_text() == "old"


def test_prose_does_not_change_the_hash_of_code_but_code_does(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "ROOT", tmp_path)
    module = tmp_path / "ctsma" / "one.py"
    module.parent.mkdir()

    def hashed(text):
        module.write_text(text)
        forget()
        return cache.source_sha256("ctsma.one")

    def forget():
        cache.source_sha256.cache_clear()
        cache._read.cache_clear()

    first = hashed('"""Title."""\n\ndef f(x):\n    """Text."""\n    return x + 1\n')
    assert hashed("# comment\ndef f(x):\n    return (x + 1)\n") == first
    assert hashed("def f(x):\n    return x + 2\n") != first
    forget()


def finished_run(tmp_path, n_stages, **parameters):
    run = Run(tmp_path / "run", "quick", 0, parameters)
    (run.folder("cohort") / "k.csv").write_text("knee_id\n")
    for name in list(RESULTS.values())[:n_stages]:
        numbers = {"manifest": "cohort/k.csv"} if name == "cohort" else {}
        run.write_results(name, numbers | {"value": 1}, protocol_sha256="0")
    return run.path


def test_a_notebook_names_the_notebooks_that_must_run_first(tmp_path):
    path = finished_run(tmp_path, 1)
    options = {"profile": "quick", "seed": 0, "overwrite": False}
    with pytest.raises(InputError, match="run 02_registration_qa, 03_distillation_training first"):
        Run.open(path, stage="04_icc_agreement", **options)
    assert Run.open(path, stage="02_registration_qa", **options).writes


def test_a_finished_run_is_written_again_only_when_asked(tmp_path, capsys):
    path = finished_run(tmp_path, 2, n_folds=5)
    options = {"profile": "quick", "seed": 0, "stage": "02_registration_qa"}
    before = (path / "results" / "registration.json").read_text()
    run = Run.open(path, overwrite=False, **options, n_folds=5)
    run.write_results("registration", {"value": 2})
    run.write_table("models/table.csv", pd.DataFrame({"a": [1]}))
    assert (path / "results" / "registration.json").read_text() == before
    assert not (path / "models").exists()
    assert "not written again" in capsys.readouterr().out
    with pytest.raises(InputError, match="finished run with n_folds = 5; set these values"):
        Run.open(path, overwrite=False, **options, n_folds=4)
    Run.open(path, overwrite=True, **options, n_folds=4).write_results("registration", {"value": 2})
    assert json.loads((path / "results" / "registration.json").read_text())["value"] == 2


class Screen(io.StringIO):
    """A terminal that keeps what is written to it."""

    def isatty(self):
        return True


def test_progress_is_a_bar_on_a_terminal_and_one_line_per_step_elsewhere(monkeypatch, capsys):
    def work(progress):
        progress("01_cohort: running")
        progress("  simulate_knee 1/2 k0000: 3.0 s, about 3 s left", done=1, total=2)

    with Progress() as progress:
        work(progress)
    printed = capsys.readouterr()
    assert printed.out.splitlines() == [
        "01_cohort: running",
        "  simulate_knee 1/2 k0000: 3.0 s, about 3 s left",
    ]
    assert not printed.err
    screen = Screen()
    monkeypatch.setattr("sys.stderr", screen)
    with Progress() as progress:
        work(progress)
        assert (progress.bar.n, progress.bar.total) == (1, 2)
    assert "about 3 s left" in screen.getvalue()


def test_a_notebook_opened_by_a_user_shows_a_bar_that_ends(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv(UNDER_RUNNER, raising=False)
    run = Run(tmp_path / "run")
    run.report("register_pair 1/2 k0000: 3.0 s, about 3 s left", done=1, total=2)
    assert (run.bar.n, run.bar.total) == (1, 2)
    run.report("register_pair 2/2 k0001: 3.0 s", done=2, total=2)
    assert run.bar is None
    assert "2/2" in capsys.readouterr().err
    assert not (tmp_path / "run" / "progress.log").exists()
