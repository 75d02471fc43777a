"""Tutorials: both versions agree, every solution is right, every wrong answer gets a hint.

And every other notebook that reads data of the repository, so that all share one kernel.
"""

import ast
import base64
import io
import json
import re
import shutil
from importlib import import_module
from pathlib import Path

import ipywidgets
import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from ctsma.registration import apply_rigid
from ctsma_lab.tutorials import (
    check,
    sliders,
    t2_registration,
    t3_training,
    t4_agreement,
    t5_diagnosis,
)
from ctsma_lab.tutorials.exercises import MODULES, exercises
from ctsma_lab.tutorials.students import student_version, write_student_versions
from ctsma_lab.tutorials.teachers import answers_table

REPOSITORY = Path(__file__).parents[1]
TUTORIALS = REPOSITORY / "notebooks" / "tutorials"
DATA = REPOSITORY / "notebooks" / "data"
SOURCES = sorted((TUTORIALS / "solutions").glob("T*.ipynb"))
SUPPLEMENT = sorted((REPOSITORY / "notebooks" / "supplement").glob("S*.ipynb"))
EVERY_SOURCE = pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
MAX_DATA_BYTES = 8_000_000


def true_pose():
    return t2_registration.pose_of("femur", t2_registration.knee().true["femur"])


def share_common():
    return t3_training.share_common(t3_training.errors())


def improved():
    return t3_training.improved(t3_training.ARM, "hu_regression_calibrated")


# At least one wrong answer to each exercise; the first ones are common mistakes.
WRONG = {
    "T1.1": [0.3, 0.2, "thick"],
    "T1.2": [0.5, 1 / 3, 0.9, float("nan")],
    "T1.3": [2.23, 0.327, 1.0],
    "T1.4": [
        lambda hu, marrow, bone: np.mean(hu > (marrow + bone) / 2),
        lambda hu, marrow, bone: np.mean(hu / bone),
        0.25,
    ],
    "T1.5": ["values", "both", "neither", "yes"],
    "T2.1": [80.0, 0.0, 2.8],
    "T2.2": lambda: [[0] * 6, [10, 0, 0, 10, 0, 0], true_pose() / 2, [0, 0, 0], 1.0],
    "T2.3": lambda: [2 * t2_registration.half_width_mm(), t2_registration.mi_half_width_mm(), 0.0],
    "T2.4": lambda: [t2_registration.femur_on_tibia_mm(), t2_registration.whole_knee_mm(), 0.0],
    "T2.5": [{"A"}, {"B", "D"}, {"A", "B", "C"}, set(), {"E"}],
    "T3.1": lambda: [1 - share_common(), share_common() ** 0.5, share_common() + 0.1],
    "T3.2": [
        lambda error, knees, rho: np.mean(error**2),
        lambda error, knees, rho: np.mean((error - rho * np.mean(error)) ** 2),
        lambda error, knees, rho: t3_training.knee_loss(error, np.zeros(len(error)), rho),
        lambda error, knees, rho: np.nan,
    ],
    "T3.3": [{"A"}, {"A", "B", "D"}, {"C"}, set(), {"E"}],
    "T3.4": lambda: [*map(t3_training.change_of, ("r_between", "icc")), 0.5],
    "T3.5": lambda: [{"r"}, set(t3_training.MEASURES) - improved(), improved() ^ {"icc"}],
    "T4.1": [1.0, 0.5, 0.8],
    "T4.2": [
        lambda x, y: np.corrcoef(x, y)[0, 1],
        lambda x, y: 2 * np.cov(x, y)[0, 1] / (np.var(x, ddof=1) + np.var(y, ddof=1)),
        lambda x, y: 2 * np.cov(x, y)[0, 1] / (np.var(x) + np.var(y) + np.mean(x - y) ** 2),
        lambda x, y: np.nan,
    ],
    "T4.3": lambda: [t4_agreement.limits_width_in_sd() / 2, 0.137, 3.92],
    "T4.4": [
        t4_agreement.patches("ct_sma", "tb_n_per_mm")["estimate"],
        t4_agreement.patches("ct_sma", "tb_n_per_mm")["reference"],
        np.arange(len(t4_agreement.patches("ct_sma", "tb_n_per_mm"))),
        np.zeros(80),
    ],
    "T4.5": [1280, 80, 8.5, 160],
    "T5.1": [
        lambda labels, scores: np.mean(scores[labels == 1][:, None] > scores[labels == 0]),
        lambda labels, scores: np.mean(scores[labels == 1]),
        lambda labels, scores: np.nan,
    ],
    "T5.2": [0.8, 0.973, 0.26],
    "T5.3": [0.375, 0.016, -0.0275, 0.0],
    "T5.4": [{"A"}, {"B", "C"}, {"A", "B", "D"}, set(), {"Z"}],
    "T5.5": [151, 76, 80, 1000],
}


def cells_of(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    return notebook.cells


def is_solution(cell):
    return "solution" in cell.metadata.get("tags", [])


def numbers_checked(cells):
    return [n for cell in cells for n in re.findall(r'^check\("(T\d\.\d)"', cell.source, re.M)]


def test_every_module_has_its_notebook():
    assert [path.stem[:2] for path in SOURCES] == list(MODULES)


def test_students_notebooks_are_those_of_the_command(tmp_path):
    (tmp_path / "solutions").mkdir()
    for path in SOURCES:
        (tmp_path / "solutions" / path.name).write_text(path.read_text())
    for path in write_student_versions(tmp_path):
        shipped = (TUTORIALS / path.name).read_text()
        remedy = "run python -m ctsma_lab.tutorials"
        assert path.read_text() == shipped, f"{path.name} differs from its source: {remedy}"
    assert sorted(p.name for p in TUTORIALS.glob("T*.ipynb")) == [p.name for p in SOURCES]


@EVERY_SOURCE
def test_a_tutorial_has_its_parts(path):
    cells = cells_of(path)
    prose = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    assert cells[0].source.startswith(f"# {path.stem[:2]} · ")
    for part in ("**Time:**", "**Goals.**", "**Contents:**", "## Summary", "**Limitations.**"):
        assert part in prose, part
    assert "## Further reading" in prose
    assert "simulated" in prose
    for cell in cells:
        if cell.cell_type == "code":
            assert not cell.outputs
            assert cell.execution_count is None
            assert max(len(line) for line in cell.source.splitlines()) <= 100
    anchors = {heading.replace(" ", "-") for heading in re.findall(r"^#+ (.*)$", prose, re.M)}
    assert set(re.findall(r"\]\(#([^)]+)\)", prose)) <= anchors


@EVERY_SOURCE
def test_links_resolve_in_both_versions(path):
    for place in (path, TUTORIALS / path.name):
        for cell in cells_of(place):
            for target in re.findall(r"\]\(([^)#\s]+)", cell.source):
                if cell.cell_type == "markdown" and "://" not in target:
                    assert (place.parent / target).exists(), f"{place}: {target}"


@pytest.mark.parametrize("folder", [TUTORIALS, DATA], ids=lambda folder: folder.name)
def test_links_of_the_folders_pages_resolve(folder):
    for target in re.findall(r"\]\(([^)#\s]+)", (folder / "README.md").read_text()):
        assert (folder / target).exists(), target


def test_teachers_find_every_exercise():
    text = (REPOSITORY / "docs" / "teaching.md").read_text()
    assert not [number for number in WRONG if f"| {number} |" not in text]
    generated = text.partition("<!-- answers:begin -->\n")[2].partition("<!-- answers:end -->")[0]
    assert generated.rstrip() == answers_table(), "run python -m ctsma_lab.tutorials"


def test_the_true_pose_of_the_knee_is_within_the_sliders():
    assert np.abs(true_pose()).max() < t2_registration.LARGEST
    true = t2_registration.knee().true["femur"]
    back = t2_registration.pose("femur", true_pose()[:3], true_pose()[3:])
    points = t2_registration.knee().targets["femur"]
    assert apply_rigid(back, points) == pytest.approx(apply_rigid(true, points), abs=1e-6)


@EVERY_SOURCE
def test_every_exercise_has_a_place_for_the_answer_and_a_solution(path):
    cells = cells_of(path)
    expected = list(exercises(path.stem[:2]))
    assert 3 <= len(expected) <= 5
    assert numbers_checked(cell for cell in cells if is_solution(cell)) == expected
    assert numbers_checked(cell for cell in cells if not is_solution(cell)) == expected
    student = student_version(nbformat.read(path, as_version=4)).cells
    assert not [cell for cell in student if is_solution(cell)]
    assert sum("<summary>Solution</summary>" in cell.source for cell in student) == len(expected)


@EVERY_SOURCE
def test_a_students_notebook_runs_without_answers(path):
    """Nothing but an exercise itself may read an answer."""
    answers = set()
    code = [cell for cell in cells_of(path) if cell.cell_type == "code"]
    for cell in code:
        if is_solution(cell):
            answers |= _names(cell, ast.Store)
    for cell in code:
        if not is_solution(cell):
            if numbers_checked([cell]):
                continue
            assert not _names(cell, ast.Load) & (answers - _names(cell, ast.Store)), cell.source


def _names(cell, context):
    nodes = ast.walk(ast.parse(cell.source))
    return {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, context)}


@EVERY_SOURCE
def test_the_notebook_runs_and_every_solution_is_right(path, run_notebook):
    notebook = run_notebook(path)
    verdicts = {}
    for cell in notebook.cells:
        for number in numbers_checked([cell]):
            text = cell.outputs[-1].data["text/plain"]
            if is_solution(cell):
                verdicts[number] = text
            else:
                assert text.startswith(f"{number}: not yet. "), text
    assert list(verdicts) == list(exercises(path.stem[:2]))
    assert not {n: text for n, text in verdicts.items() if not text.startswith(f"{n}: right.")}
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            assert output.get("name") != "stderr", output.text


def ends(control):
    """First and last value of a control."""
    if isinstance(control, ipywidgets.Dropdown):
        values = [o[1] if isinstance(o, tuple) else o for o in control.options]  # label, value
        return values[0], values[-1]
    return control.min, control.max


SLOW = [pytest.param("T3", marks=pytest.mark.slow)]  # trains; its notebook runs above


@pytest.mark.parametrize("tutorial", [name for name in MODULES if name != "T3"] + SLOW)
def test_figures_follow_their_sliders_from_end_to_end(tutorial, monkeypatch):
    module = import_module(f"ctsma_lab.tutorials.{MODULES[tutorial]}")
    one_epoch = t3_training.SETTINGS.model_copy(update={"epochs": 1})
    monkeypatch.setattr(t3_training, "SETTINGS", one_epoch)
    panels = []
    monkeypatch.setattr(
        module, "explore", lambda draw, button="", **controls: panels.append((draw, controls))
    )
    for name in dir(module):
        if name.startswith("explore_"):
            getattr(module, name)()
    assert panels
    for draw, controls in panels:
        for number in (0, 1):
            figure = draw(**{name: ends(control)[number] for name, control in controls.items()})
            figure.savefig(io.BytesIO())
            plt.close(figure)


def shown_picture(value):
    """Image and alternative text of a panel's picture."""
    pattern = r'<img src="data:image/png;base64,(.*?)" alt="(.*?)".*>'
    source, text = re.fullmatch(pattern, value).groups()
    image = Image.open(io.BytesIO(base64.b64decode(source)))
    image.load()
    return image, text


def test_a_panel_draws_again_when_a_slider_moves(monkeypatch):
    shown = []
    monkeypatch.setattr(sliders, "display", shown.append)
    sliders.explore(
        t4_agreement.draw_pairs,
        bias=sliders.slider("bias", -1, 1, 0.1, 0),
        scale=sliders.slider("scale", 0.1, 2, 0.1, 1),
        noise=sliders.slider("noise", 0, 2, 0.1, 0.3),
    )
    *controls, picture = shown[0].children
    before = shown_picture(picture.value)
    controls[0].value = 1.0
    after = shown_picture(picture.value)
    assert after[0] != before[0]
    assert "ICC 0.96" in before[1] and "ICC 0.65" in after[1]
    assert not plt.get_fignums()


def test_a_panel_with_a_button_draws_when_it_is_pressed(monkeypatch):
    shown = []
    monkeypatch.setattr(sliders, "display", shown.append)
    draw = t3_training.draw_likelihood
    rho, number = sliders.slider("rho", 0, 1, 0.1, 0.5), sliders.slider("patches", 2, 16, 1, 4)
    sliders.explore(draw, button="Draw", rho=rho, n_patches=number)
    *_, button, picture = shown[0].children
    assert not picture.value
    button.click()
    assert "theta = " in shown_picture(picture.value)[1]
    assert (button.description, button.disabled) == ("Draw", False)


def test_the_trainings_of_a_session_are_collected(monkeypatch):
    estimates = t3_training.run_estimates(list(t3_training.LABELS_HERE))
    monkeypatch.setattr(t3_training, "estimates", lambda *settings: estimates)
    monkeypatch.setattr(t3_training, "TRIED", {})
    assert t3_training.tried().empty
    for seed in (2.0, 3.0, 3.0):
        plt.close(t3_training.draw_training("feature_l1", 0.1, 16, 0.3, seed))
    table = t3_training.tried()
    assert table["seed"].tolist() == [2, 3]
    icc = t3_training.measures(estimates)["icc"]
    assert table["ICC(A,1), with"][0] == round(icc[t3_training.TAUGHT], 2)
    assert table["ICC(A,1), without"][0] == round(icc[t3_training.ALONE], 2)


@pytest.mark.parametrize(
    ("interval", "words"),
    [((-0.04, 0.014), "do not show a"), ((0.01, 0.02), "show a"), ((-0.03, -0.01), "show a")],
)
def test_a_difference_is_shown_where_its_interval_leaves_0_out(monkeypatch, interval, words):
    found = {"difference": np.mean(interval), "ci_low": interval[0], "ci_high": interval[1]}
    monkeypatch.setattr(t5_diagnosis, "difference", lambda arm, other: found)
    text = t5_diagnosis.difference_in_words("ct_sma", "ct_only")
    assert f"these knees {words} difference" in text
    assert ("a loss of 0.040 nor a gain of 0.014" in text) == (words == "do not show a")


@pytest.mark.parametrize("arm", t3_training.LABELS_HERE)
def test_small_networks_never_see_the_knees_they_are_tested_on(arm):
    for fold in range(t3_training.N_FOLDS):
        known, rows = t3_training.divided(arm, fold, 8, 0.3, 0)
        seen = np.concatenate([rows.fit, rows.validation, rows.unlabelled])
        assert len(np.unique(known.subjects[np.concatenate([rows.fit, rows.validation])])) == 8
        assert len(np.unique(known.subjects[rows.unlabelled])) == 8
        assert not set(known.subjects[seen]) & set(known.subjects[rows.test])
        assert np.isfinite(known.targets[rows.test]).all()


@pytest.mark.parametrize("tutorial", MODULES)
def test_wrong_answers_get_a_hint(tutorial):
    for number, exercise in exercises(tutorial).items():
        wrong = WRONG[number]() if callable(WRONG[number]) else WRONG[number]
        for answer in (..., *wrong):
            verdict = check(number, answer)
            assert not verdict.right, (number, answer)
            assert verdict.text not in ("", exercise.comment)


def test_the_data_stay_small_and_are_described():
    files = [path for path in DATA.rglob("*") if path.is_file() and path.name != "README.md"]
    assert sum(path.stat().st_size for path in files) < MAX_DATA_BYTES
    text = (DATA / "README.md").read_text()
    shipped = {path.relative_to(DATA).parts[0] for path in files}
    assert not [name for name in shipped if f"`{name}`" not in text]


def test_answers_of_wrong_exercises_are_an_error():
    assert set(WRONG) == {number for tutorial in MODULES for number in exercises(tutorial)}
    with pytest.raises(KeyError):
        check("T1.9", 0)
    assert "✘" in check("T1.1", 0)._repr_markdown_()
    assert "✔" in check("T1.1", 1 / 3)._repr_markdown_()


@pytest.mark.slow  # test_pipeline.py looks at a finished run without its notebooks
@pytest.mark.parametrize("stage", ["04_icc_agreement", "05_roc_diagnosis"])
def test_a_notebook_of_the_study_shows_the_shipped_run_and_changes_no_file(stage, run_notebook):
    files = {path: path.read_bytes() for path in DATA.rglob("*") if path.is_file()}
    notebook = run_notebook(REPOSITORY / "notebooks" / f"{stage}.ipynb", run_dir="data/run")
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    shown = [output for cell in code for output in cell.outputs]
    assert any("is finished" in output.get("text", "") for output in shown)
    assert sum("image/png" in output.get("data", {}) for output in shown) >= 3
    assert files == {path: path.read_bytes() for path in DATA.rglob("*") if path.is_file()}


def test_a_knee_with_ct_alone_is_diagnosed(tmp_path, run_notebook):
    """Notebook 5 on 24 knees of the shipped run; the last knee is read by CT alone."""
    run = Path(shutil.copytree(DATA / "run", tmp_path / "run"))
    predictions = pd.read_csv(run / "models" / "predictions.csv")
    arms, knees = ("ct_only", "ct_sma_plus", "mr_teacher"), predictions["knee_id"].unique()[:24]
    some = predictions[predictions["arm"].isin(arms) & predictions["knee_id"].isin(knees)]
    bare = some["knee_id"] == knees[-1]
    some[~bare].to_csv(run / "models" / "predictions.csv", index=False)
    some[bare].to_csv(run / "models" / "ct_only_predictions.csv", index=False)
    few = {"n_seeds": 1, "diagnosis_epochs": 2, "n_resamples": 50, "n_permutations": 2}
    given = {"run_dir": str(run), "n_jobs": 1, "overwrite": True} | few
    run_notebook(REPOSITORY / "notebooks" / "05_roc_diagnosis.ipynb", **given)
    judged = json.loads((run / "results" / "diagnosis.json").read_text())
    assert judged["n_knees"] == len(knees) - 1
    assert list(judged["ct_only_knees"]["probability"]) == [knees[-1]]
    assert 0 <= judged["ct_only_knees"]["probability"][knees[-1]] <= 1
    for name in ("auc_all", "auc_paired"):
        assert 0 <= judged["ct_only_knees"][name]["auc"] <= 1


@pytest.mark.slow  # test_explore.py draws all of it without the notebook
def test_the_explorer_runs_on_the_shipped_data(run_notebook):
    path = TUTORIALS / "explore.ipynb"
    code = [cell for cell in cells_of(path) if cell.cell_type == "code"]
    assert not [cell for cell in code if cell.outputs or cell.execution_count]
    for cell in run_notebook(path).cells:
        for output in cell.get("outputs", []):
            assert output.get("name") != "stderr", output.text


@pytest.mark.parametrize("path", SUPPLEMENT, ids=lambda path: path.stem)
def test_a_supplement_reads_the_published_results(path, run_notebook):
    run_notebook(path)


def test_the_start_page_leads_everywhere():
    folder = REPOSITORY / "notebooks"
    text = "\n".join(cell.source for cell in cells_of(folder / "index.ipynb"))
    linked = re.findall(r"\]\(([^)#\s]+)\)", text)
    assert not [target for target in linked if not (folder / target).exists()]
    pages = [*folder.glob("[0-9]*.ipynb"), *TUTORIALS.glob("*.ipynb")]
    assert not [path for path in pages if path.relative_to(folder).as_posix() not in linked]
