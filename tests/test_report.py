"""Report pages of a run, and sentences and tables made from results files."""

import base64
import io
import json
import re
import shutil
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
import SimpleITK as sitk
from nbformat import v4
from PIL import Image

from ctsma.arms import ARMS, COMPARISONS
from ctsma.common import InputError
from ctsma.files import ROOT
from ctsma_lab import figures, methods, pages, report, tables

PUBLISHED = Path(__file__).parents[1] / "docs" / "results" / "full"
MAX_REPORT_BYTES = 5_000_000
EXAMPLE = Path(__file__).parents[1] / "data_manifest" / "example.csv"


def change(file, **values):
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.fixture
def results(tmp_path):
    """A copy of the published results, free to change."""
    return Path(shutil.copytree(PUBLISHED, tmp_path / "run" / "results"))


def drawn(width, height):
    """A PNG as matplotlib writes it."""
    stream = io.BytesIO()
    Image.effect_noise((width, height), 80).convert("RGBA").save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture
def run(results):
    """A run of profile tiny with two executed notebooks, as papermill leaves them."""
    change(results / "cohort.json", profile="tiny")
    change(results / "registration.json", flagged=["k0001"])
    path = results.parent
    shutil.copytree(EXAMPLE.parent, path / "cohort")
    (path / "cohort" / EXAMPLE.name).rename(path / "cohort" / "simulated.csv")
    (path / "notebooks").mkdir()
    (path / "figures").mkdir()
    for name in report.KEY_FIGURES:
        (path / "figures" / f"{name}.png").write_bytes(drawn(1000, 250))
        (path / "figures" / f"{name}.csv").write_text("value\n1\n")
    image = base64.b64encode(drawn(300, 200)).decode()
    plot = v4.new_output("display_data", {"image/png": image, "text/plain": "<Figure>"})
    save = f'run.save_figure(figure, "05_roc")\nroot = "{path.resolve()}"\nx = "\\n\\nz"'
    linked = "[notes](../docs/notes.md) [first](01_first.ipynb#Result) [paper](https://a.org/b/c/d)"
    for name, title in (("01_first", "Whose knees?"), ("02_second", "Is <i>it</i> the same bone?")):
        shown = v4.new_output("display_data", {"text/markdown": f"The result of {name} is **3**."})
        wide = v4.new_output("execute_result", {"text/html": "<table><td>wide</td></table>"})
        noise = v4.new_output("stream", name="stderr", text="a warning of a library")
        cells = [
            v4.new_markdown_cell(f"# {title}\n\n## Question\n\nText {linked}."),
            v4.new_code_cell("1"),
            v4.new_markdown_cell("## Plot\n\nBefore.\n\n*Figure.* What is <shown>.\n\nAfter."),
            v4.new_code_cell(save, outputs=[plot]),
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
        assert not re.search(
            r"""src=["']?https?:|<link(?! rel="icon" href="data:,")|@import|url\(""", text
        )
        assert str(run.resolve()) not in text
        assert 'name="viewport"' in text
        assert '<a href="01_first.html">Whose knees?</a>' in text
        assert "its numbers mean nothing" in text and "simulated" in text
    first, second = pages["01_first.html"], pages["02_second.html"]
    assert '<a href="#Result">Result</a>' in first and '<a href="#Question">Question</a>' in first
    assert "02_second.html" in first.partition('class="steps"')[2]
    assert "01_first.html" in second.partition('class="steps"')[2]
    assert "<i>it</i>" not in second.partition("<main>")[0]
    assert first.count('<details class="code">') == 4 and "a warning of a library" not in first
    assert "wide" in first and "/run" not in first.replace("runs/run", "")


def test_every_link_leads_to_a_file_of_the_site(run):
    index = report.write_report(run)
    for page in index.parent.glob("*.html"):
        text = page.read_text()
        for target in re.findall(r"""(?:src|href)=["']([^"'#]+)""", text):
            assert target.startswith(("https://", "data:")) or (page.parent / target).is_file(), (
                target
            )
        for anchor in re.findall(r'href="#([^"]+)"', text):
            assert f'id="{anchor}"' in text
        assert 'rel="icon"' in text  # without one a browser asks for a file that is not there
        assert "<script" not in text and "notes.md" not in text
    assert 'href="https://a.org/b/c/d"' in text and '"01_first.html#Result">first</a>' in text


def test_a_figure_has_its_caption_and_the_table_behind_it(run):
    first = (report.write_report(run).parent / "01_first.html").read_text()
    figure = re.search(r'<figure class="wide">.*?</figure>', first, re.DOTALL)[0]
    assert "<b>Figure 1.1.</b> What is" in figure and 'href="figures/05_roc.csv"' in figure
    prose = first.replace(figure, "")
    assert "What is" not in prose and "Before." in prose and "After." in prose
    written = Image.open(run / "report" / "figures" / "05_roc.png")
    assert written.mode == "P" and written.size == (1000, 250)


@pytest.mark.parametrize(("dpi", "shown"), [(None, 400), (72, 400), (100, 400), (200, 200)])
def test_a_figure_is_shown_at_its_size_in_inches(tmp_path, dpi, shown):
    stream = io.BytesIO()
    Image.new("RGB", (400, 200)).save(stream, "PNG", dpi=dpi and (dpi, dpi))
    size = pages.write_figure(stream, tmp_path / "f.png")
    assert size == Image.open(tmp_path / "f.png").size == (shown, shown // 2)


def test_the_shades_of_a_chart_keep_their_colours(tmp_path):
    """The colours of all arms, from their bands to their lines."""
    colours = np.array([tuple(bytes.fromhex(arm.colour[1:])) for arm in ARMS.values()])
    weights = np.linspace(0, 1, 50)
    shades = 255 - weights[:, None] * (255 - colours[:, None])
    image = np.repeat(np.repeat(shades, 20, axis=0), 20, axis=1).astype(np.uint8)
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, format="png")
    pages.write_figure(stream, tmp_path / "f.png")
    shown = np.asarray(Image.open(tmp_path / "f.png").convert("RGB")).astype(int)
    assert np.abs(shown - image).max() <= 6


def test_a_thin_line_over_a_colourful_image_keeps_its_colour(tmp_path):
    rng, green, blue = np.random.default_rng(0), (0, 158, 115), (0, 114, 178)
    orange = np.linspace(0, 255, 200 * 300).reshape(200, 300, 1) * [1.0, 0.6, 0.2]
    image = (orange + rng.normal(0, 8, orange.shape)).clip(0, 255).astype(np.uint8)
    image[100], image[50, :60] = green, blue
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, format="png")
    assert pages.write_figure(stream, tmp_path / "f.png") == (300, 200)
    shown = np.asarray(Image.open(tmp_path / "f.png").convert("RGB")).astype(int)
    assert np.abs(shown[100] - green).max() <= 20
    assert np.abs(shown[50, :60] - blue).max() <= 20
    assert np.abs(shown - image).mean() < 10


def test_no_path_of_this_machine_stays():
    body = "a /data/me/a.csv, C:\\Users\\me\\b.csv, 1/mm, and/or/not, https://a.org/b/c, </p>"
    kept = "a a.csv, b.csv, 1/mm, and/or/not, https://a.org/b/c, </p>"
    assert pages.tidy(body, {}) == kept


def test_a_link_to_no_place_of_the_page_becomes_its_text():
    body = '<h2 id="Result">Result</h2><a href="#Result">1</a> <a href="#Parameters">2</a>'
    assert pages.tidy(body, {}).endswith('</h2><a href="#Result">1</a> 2')


def test_the_overview_reads_like_a_summary(run):
    text = report.write_report(run).read_text()
    for part in ("What was done", "Result", "Key figures", "Tables", "Result of each notebook"):
        assert f">{part}<" in text
    assert "MR and CT of 80 simulated knees were registered." in text
    assert "The result of 01_first is <strong>3</strong>." in text
    assert "The result of 02_second is <strong>3</strong>." in text
    assert text.count("<table>") == 1 + len(tables.detailed_tables(run / "results"))
    figures = re.findall(r"<figure.*?</figure>", text, re.DOTALL)
    assert len(figures) == 6
    for figure in figures:
        assert "n: " in figure and "{" not in figure and ".csv" in figure and 'alt="' in figure
    assert "Registration error" in figures[1]


def test_an_own_cohort_has_figures_that_need_no_ground_truth(run):
    (run / "cohort" / "simulated.csv").rename(run / "cohort" / "my.csv")
    own = {"simulated": False, "calibration": {}, "manifest": "cohort/my.csv"}
    change(run / "results" / "cohort.json", **own)
    text = report.write_report(run).read_text()
    assert text.count("<figure") == 6 and "Calibration of the probabilities" in text
    assert "true transforms" not in text and "simulated" not in text.partition("<main>")[2]


def read_methods(run):
    """The methods text in one line, and its references."""
    methods.write_methods(run)
    text = (run / "report" / "methods.md").read_text()
    return " ".join(text.split()), (run / "report" / "methods.bib").read_text()


def test_the_methods_text_states_what_the_results_files_hold(run):
    text, references = read_methods(run)
    assert "The cohort was simulated; no patient data were used." in text
    patches = json.loads((run / "results" / "registration.json").read_text())["patches"]
    assert "1 of 80 knees were excluded" in text
    assert f"{patches['usable']} of {patches['total']} patches" in text
    assert "Estimates are the mean of 3 networks" in text and "2000 bootstrap resamples" in text
    assert "plate model [@parfitt1983]" in text and "torch 2" in text
    for name in ("HU ridge", "CT network, published distillation (CT-SMA)"):
        assert f"*{name}*" in text
    assert "among 0, 0.01, 0.1." in text and "{" not in text and "Describe this arm" not in text
    cited = set(methods.CITATION.findall(text))
    assert cited == set(re.findall(r"^@\w+{(\w+),", references, re.MULTILINE))
    assert {"hu2023", "delong1988", "paszke2019"} <= cited


def test_the_methods_text_claims_nothing_that_was_not_done(run):
    results = run / "results"
    agreement = json.loads((results / "agreement.json").read_text())
    change(results / "cohort.json", simulated=False)
    change(results / "registration.json", tre_mm={}, parameters={"n_per_compartment": 2})
    change(results / "distillation.json", parameters={"n_training_seeds": 1})
    change(results / "agreement.json", icc={"ct_only": agreement["icc"]["ct_only"]})
    text, references = read_methods(run)
    assert "simulated" not in text.partition("## Software")[0] and "ethics approval" in text
    assert "true transforms" not in text and "plate model" not in text
    assert "One network was trained per arm and fold." in text
    assert "distillation" not in text.partition("## Estimation")[2].partition("## Software")[0]
    assert "hu2023" not in references and "zhou2016" not in references


def test_voxels_are_read_from_the_images(tmp_path):
    manifest = pd.DataFrame({"ct": ["a.nii.gz", "b.nii.gz", "absent.nii.gz", None]})
    manifest.attrs["root"] = str(tmp_path)
    assert methods.voxel_text(manifest, "ct") == ""
    for name, slice_mm in (("a.nii.gz", 1.0), ("b.nii.gz", 0.5)):
        image = sitk.Image(4, 4, 4, sitk.sitkInt16)
        image.SetSpacing((0.4, 0.4, slice_mm))
        sitk.WriteImage(image, str(tmp_path / name))
    found = methods.voxel_text(manifest, "ct")
    assert found == "0.4 x 0.4 x 0.75 mm (median; 0.4 to 0.4, 0.4 to 0.4, 0.5 to 1 mm)"


def test_an_unfinished_run_has_a_report(run):
    (run / "results" / "agreement.json").unlink()
    text = report.write_report(run).read_text()
    assert not (run / "report" / "methods.md").exists()
    assert "The result of 01_first" in text and "<table>" not in text


def test_the_published_report_is_small_whole_and_shown_in_the_readme():
    site = PUBLISHED.parents[1] / "report"
    files = [path for path in site.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= MAX_REPORT_BYTES
    assert {"index.html", "explore.html", "methods.md"} <= {path.name for path in files}
    for page in site.rglob("*.html"):
        text = page.read_text()
        for target in re.findall(r"""(?:src|href)=["']([^"'#]+)""", text):
            assert target.startswith(("https://", "data:")) or (page.parent / target).is_file(), (
                target
            )
        assert not re.search(r"(?<![\w/.<])/(?:home|tmp|root|work|Users)/", text), page
    readme = (site.parents[1] / "README.md").read_text()
    shown = re.findall(r"!\[.{40,}\]\((docs/report/figures/.*)\)", readme)
    assert len(shown) == 3 and "](docs/report/index.html)" in readme
    assert all((site.parents[1] / file).is_file() for file in shown)


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


def test_the_summary_says_one_thing_a_line_with_the_numbers_of_the_files(results):
    found = json.loads((results / "agreement.json").read_text())
    lines = tables.summary(results).splitlines()
    titles = [line for line in lines if line.startswith("**")]
    assert [title.partition(",")[0] for title in titles] == [
        "**Agreement with the MR reference",
        "**What the teacher adds",
        "**Diagnosis of osteoarthritis",
    ]
    sentences = [line for line in lines if line.startswith("- ")]
    assert len(sentences) == 2 + 2 + 3
    assert f"{found['icc']['ct_residual']['mean']['icc']:.3f}" in sentences[1]
    assert "class activation maps" in sentences[3]
    assert "reports 0.778" in sentences[4] and "reports 0.883" in sentences[5]
    pair = {"arm": "student, teacher's estimates", "against": "student", "statistic": "icc"}
    row = pair | {"difference": 0.1, "ci_low": 0.05, "ci_high": 0.15}
    few = {"by_labelled_knees": {"20": {"differences": [row]}}}
    (results.parent / "distillation_evidence.json").write_text(json.dumps({"few_labels": few}))
    assert "Where 20 of 80 pairs have a reference" in tables.summary(results)
    assert "raises the mean ICC by 0.100" in tables.summary(results)
    changes = [{"ct_sma_vs_ct_only": {"difference": value}} for value in (-0.0041, 0.02)]
    rows = [{"difference_in_r": row, "difference_in_auc": row} for row in changes]
    variation = results.parent / "training_variation.json"
    variation.write_text(json.dumps({"trainings": rows}))
    assert tables.summary(results).count("Across single training seeds") == 2
    assert "from -0.004 to +0.020" in tables.summary(results)
    change(results / "agreement.json", differences=[])
    change(results / "diagnosis.json", delong={})
    assert not tables.summary(results)


def test_many_knees_have_one_sentence_for_each_arm_and_question():
    shipped = tables.read_large_cohort(ROOT / "docs" / "results")
    lines = tables.large_cohort_sentences(shipped)
    assert len(lines) == 3 + len(tables.QUESTIONS) + 1
    assert f"{shipped['zero_effect']['n_knees']} knees" in lines[-1]
    for row in shipped["questions"]:
        if row["model"] == "Transformer":
            value = f"{abs(row['difference']):.3f}"
            assert any(
                value in line and tables.QUESTIONS[row["a"], row["b"]][0] in line for line in lines
            )
    assert tables.large_cohort_sentences({}) == []


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


def test_values_of_a_table_are_shown_with_their_intervals():
    rows = {"icc": [0.5, np.nan, 0.25], "ci_low": [0.4, 0.1, np.nan], "ci_high": [0.61, 0.2, 0.3]}
    table = pd.DataFrame(rows, index=["a", "b", "c"])
    shown = tables.intervals(table, "icc")
    expected = ["0.500 (0.400 to 0.610)", "not defined", "0.250 (no interval)"]
    assert shown.to_dict() == dict(zip("abc", expected, strict=True))
    renamed = table.rename(columns={"ci_low": "icc_ci_low", "ci_high": "icc_ci_high"})
    assert tables.intervals(renamed, "icc", "icc_").equals(shown)


def test_a_long_label_is_broken_at_its_first_comma():
    name = "calibrated HU ridge + CT network, CAM distillation"
    assert figures.wrapped(name) == "calibrated HU ridge + CT network,\nCAM distillation"
    assert figures.wrapped(f"age, sex, BMI\n{name}").splitlines()[0] == "age, sex, BMI"
    for arm in ARMS.values():
        assert max(map(len, figures.wrapped(arm.label).splitlines())) <= figures.LABEL_WIDTH


def test_published_networks_are_shown_with_what_is_missing(tmp_path):
    assert tables.published_networks(tmp_path) == ""
    measured = ROOT / "docs" / "results"
    found = json.loads((measured / "paper" / "native.json").read_text())
    text = tables.published_networks(measured)
    lines = {line.split("|")[1].strip(): line for line in text.splitlines() if line[:2] == "| "}
    assert set(lines) == {"network", *(tables.GPU_LABELS[name] for name in found["r"])}
    assert f"{found['r']['ct_only']['mean']:.3f} (" in lines["CT network"]
    assert f"{len(found['missing'])} networks of the plan are not trained" in text


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
