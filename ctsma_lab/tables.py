"""The results files of a run as sentences, Markdown tables and one figure."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import fill

import matplotlib.pyplot as plt
import pandas as pd

from ctsma.arms import ARMS, COMPARISONS
from ctsma.common import InputError
from ctsma.files import write_text
from ctsma_lab.profiles import profiles

STAGES = ("cohort", "registration", "distillation", "agreement", "diagnosis")
LABELS = {"bv_tv": "BV/TV", "tb_th_mm": "Tb.Th", "tb_sp_mm": "Tb.Sp", "tb_n_per_mm": "Tb.N"}
MEASURES = LABELS | {"mean": "mean"}
GPU_LABELS = {
    "teacher": "MR network",
    "ct_only": "CT network",
    "l1_0.01": "CT network, L1, weight 0.01",
    "l1_0.1": "CT network, L1, weight 0.1",
    "l1_1": "CT network, L1, weight 1",
    "last_0.1": "CT network, L1 of the last stage, weight 0.1",
    "ct_only_cortex": "CT network, calibrated HU",
    "l1_0.1_cortex": "CT network, calibrated HU, L1, weight 0.1",
    "last_0.1_cortex": "CT network, calibrated HU, L1 of the last stage, weight 0.1",
    "ridge_cortex": "calibrated HU ridge",
}
# What differs between the two arms of a question on many knees, and what it may change
QUESTIONS = {
    ("ct_sma", "ct_only"): ("The published distillation loss", "the AUC of the CT network"),
    ("ct_sma_plus", "ct_residual"): (
        "CAM distillation",
        "the AUC of the network that corrects the ridge",
    ),
    ("ct_sma_plus", "hu_regression_calibrated"): (
        "The correction by this network",
        "the AUC of the calibrated HU ridge",
    ),
    ("mr_reference", "ct_sma_plus"): ("The MR reference in place of its estimates", "the AUC"),
}
QUANTITIES = {
    "hu_r2": "R² of ridge on CT with ground truth",
    "ct_threshold_bv_tv_ratio": "BV/TV above 250 HU over ground truth",
    "mean": "mean of ground truth",
    "correlation": "correlation with BV/TV, ground truth",
    "mr_rescan_cv_pct": "MR scan and rescan, CV in %",
    "mr_rescan_icc": "MR scan and rescan, ICC",
    "auc_mr_reference": "AUC of the MR reference, SVM",
    "auc_mean_hu": "AUC of mean HU, medial tibia",
    "auc_mean_hu_of_compartments": "AUC of mean HU, four compartments",
}


def read_results(results: str | Path, stage: str) -> dict:
    """The results file of a stage. Raises InputError where it does not exist."""
    file = Path(results) / f"{stage}.json"
    if not file.exists():
        raise InputError(file, "does not exist", "run the study to its end first")
    return json.loads(file.read_text(encoding="utf-8"))


def origin(results: str | Path) -> str:
    """One sentence: command, cohort, protocol, precision and the commit of every stage."""
    cohort = read_results(results, "cohort")
    settings = read_results(results, "distillation")["settings"]
    stages_of: dict[str, list[str]] = {}
    for stage in STAGES:
        commit, changed, _ = read_results(results, stage)["git_commit"].partition("+changes")
        stages_of.setdefault(commit[:12] + changed, []).append(stage)
    if len(stages_of) == 1:
        code = f"commit {next(iter(stages_of))}"
    else:
        code = "; ".join(f"{', '.join(s)}: commit {commit}" for commit, s in stages_of.items())
    if cohort["simulated"]:
        knees = f"simulated knees of protocol {cohort['protocol_sha256'][:12]}"
        manifest = ""
    else:
        knees, manifest = "knees", f" --manifest {Path(cohort['manifest']).name}"
    return (
        f"Made by `ctsma run --profile {cohort['profile']} --seed {cohort['seed']}{manifest}` from "
        f"{cohort['n_knees']} {knees}; networks in "
        f"{settings.get('computed_in', 'unknown precision')}; {code}."
    )


def summary(results: str | Path, evidence: str | Path | None = None) -> str:
    """The result as Markdown lists. A sentence is left out where its arms or evidence are.

    `evidence` is the folder of the benchmarks' results (default: the one that holds `results`).
    """
    evidence = Path(evidence or Path(results).parent)
    cohort, agreement = read_results(results, "cohort"), read_results(results, "agreement")
    diagnosis = read_results(results, "diagnosis")
    knees = f"{cohort['n_knees']} {'simulated ' if cohort['simulated'] else ''}knees"
    many = read_large_cohort(evidence)
    groups = {
        f"Agreement with the MR reference, {knees}": _agreement_sentences(agreement),
        f"What the teacher adds, {knees}": _teacher_sentences(agreement, evidence),
        f"Diagnosis of osteoarthritis, {knees}": _diagnosis_sentences(diagnosis, evidence),
    }
    if many:
        groups[large_cohort_title(many)] = large_cohort_sentences(many)
    lists = {title: "\n".join(f"- {line}" for line in lines) for title, lines in groups.items()}
    return "\n\n".join(f"**{title}**\n\n{text}" for title, text in lists.items() if text)


def _agreement_sentences(agreement: Mapping) -> list[str]:
    icc, r, ridge = agreement["icc"], agreement["r"], "hu_regression_calibrated"
    change = differences_in_r(agreement).get(f"ct_residual_vs_{ridge}")
    if not change:
        return []
    return [
        "Ridge regression on calibrated HU with a knee-level noise model: r "
        f"{r[ridge]['mean']:.3f}, mean ICC {interval(icc[ridge]['mean'], 'icc')}.",
        f"A CT network that corrects this ridge {effect_in_words('r', change)}; its mean ICC is "
        f"{interval(icc['ct_residual']['mean'], 'icc')}.",
    ]


def _teacher_sentences(agreement: Mapping, evidence: Path) -> list[str]:
    changes, sentences = differences_in_r(agreement), []
    if published := changes.get("ct_sma_vs_ct_only"):
        effect = effect_in_words("r of the CT network", published)
        sentences.append(f"The published distillation loss {effect}.")
        sentences += _between_trainings(evidence, "difference_in_r")
    if distilled := changes.get("ct_sma_plus_vs_ct_residual"):
        effect = effect_in_words("r of the network that corrects the ridge", distilled)
        value = interval(agreement["icc"]["ct_sma_plus"]["mean"], "icc")
        sentences.append(
            f"Distillation of class activation maps (CAM) {effect}; its mean ICC is {value}."
        )
    return sentences + (_few_labels(evidence) if sentences else [])


def _diagnosis_sentences(diagnosis: Mapping, evidence: Path) -> list[str]:
    auc, change = diagnosis["auc"], diagnosis["delong"].get("ct_sma_vs_ct_only")
    if not change:
        return []
    without, distilled = ARMS["ct_only"].published["auc"], ARMS["ct_sma"].published["auc"]
    return [
        f"AUC of the CT network: {interval(auc['ct_only'], 'auc')}; the paper reports {without} on "
        "patients.",
        f"AUC with the published distillation: {interval(auc['ct_sma'], 'auc')}; the paper reports "
        f"{distilled} on patients.",
        f"The published distillation loss {effect_in_words('the AUC', change)}, Holm p = "
        f"{change['p_holm']:.2g}.",
        *_between_trainings(evidence, "difference_in_auc"),
    ]


def _between_trainings(folder: Path, statistic: str) -> list[str]:
    """Range of what the published loss changes over trainings of the same networks, if measured."""
    trainings = _read_evidence(folder, "training_variation").get("trainings", [])
    found = [row[statistic]["ct_sma_vs_ct_only"]["difference"] for row in trainings]
    if not found:
        return []
    return [
        "Across single training seeds, their mean and another machine this difference ranges from "
        f"{min(found):+.3f} to {max(found):+.3f}; the interval does not contain this variation."
    ]


def differences_in_r(agreement: Mapping) -> dict[str, Mapping]:
    """Differences in r, mean of the biomarkers, by `<arm>_vs_<arm>`."""
    return {
        f"{row['arm']}_vs_{row['against']}": row
        for row in agreement["differences"]
        if row["statistic"] == "r" and row["biomarker"] == "mean"
    }


def _few_labels(folder: Path) -> list[str]:
    """What a teacher adds where 20 of 80 pairs have a reference, if that was measured."""
    evidence = _read_evidence(folder, "distillation_evidence")
    if "few_labels" not in evidence:
        return []
    rows = evidence["few_labels"]["by_labelled_knees"]["20"]["differences"]
    pair = ("student, teacher's estimates", "student")
    found = {row["statistic"]: row for row in rows if (row["arm"], row["against"]) == pair}
    effect = effect_in_words("the mean ICC", found["icc"])
    return [
        "Where 20 of 80 pairs have a reference, training on the estimates of a teacher for the "
        f"others {effect}. That teacher learned from other knees."
    ]


def _read_evidence(folder: str | Path, name: str) -> dict:
    file = Path(folder) / f"{name}.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def read_large_cohort(folder: str | Path) -> dict:
    """Results of `benchmarks/large_cohort.py` in the folder of the benchmarks; {} before it ran."""
    return _read_evidence(folder, "large_cohort")


def large_cohort_title(found: Mapping) -> str:
    """Heading of `large_cohort_sentences`: how many knees were read by which models."""
    return (
        f"Diagnosis of osteoarthritis, {found['n_knees']} other simulated knees read by CT alone "
        f"with the models of {found['n_pairs']} pairs"
    )


# Models of the control without effect of disease, named in docs/large_cohort_protocol.md.
CONTROLLED = ("ct_only", "hu_regression_calibrated", "ct_sma_plus", "mr_reference")
CONTROLLED += ("mean HU, logistic",)


def large_cohort_sentences(found: Mapping) -> list[str]:
    """What the study of many knees by CT alone says of the diagnosis; none before it ran."""
    if not found:
        return []
    sentences = [
        f"AUC, {ARMS[name].label}: {interval(found['auc'][name], 'auc')}."
        for name in ("ct_only", "ct_sma_plus", "mr_reference")
        if name in found["auc"]
    ]
    for row in found["questions"]:
        if row["model"] == "Transformer":
            cause, quantity = QUESTIONS[row["a"], row["b"]]
            p = f"Holm p = {row['p_holm']:.2g}"
            sentences.append(f"{cause} {effect_in_words(quantity, row)}, {p}.")
    if control := found.get("zero_effect"):
        values = [control["auc"][name] for name in CONTROLLED]
        aucs = [value["auc"] for value in values]
        n_inside = sum(value["ci_low"] <= 0.5 <= value["ci_high"] for value in values)
        sentences.append(
            f"Control, {control['n_knees']} knees whose bone has no effect of disease: the AUC of "
            f"{len(values)} models is {min(aucs):.2f} to {max(aucs):.2f}, and {n_inside} of their "
            f"{len(values)} intervals contain 0.5."
        )
    return sentences


STEPS_OF_COST = {  # of benchmarks/cost_by_size.py
    "manifest": "write and read the manifest, deal folds",
    "check_data": "`check-data` of a manifest whose images are absent",
    "patch_tables": "records and tables of patches",
    "training_set": "training set",
    "training": "a training process",
    "diagnosis": "agreement and diagnosis of two arms",
}


def cost_table(evidence: str | Path) -> str:
    """Markdown table of `benchmarks/cost_by_size.py`: time, memory and growth of each step.

    `evidence` is the folder of the benchmarks' results; "" before it ran.
    """
    found = _read_evidence(evidence, "cost_by_size")
    if not found:
        return ""
    rows, sizes = [], list(found["by_size"])
    for step, label in STEPS_OF_COST.items():
        row = {"step": label}
        for n in sizes:
            row[f"{int(n):,} knees: CPU s"] = f"{found['by_size'][n][step]['cpu_s']:.1f}"
        largest = found["by_size"][sizes[-1]][step]
        row["CPU ms per knee"] = f"{largest['cpu_s'] / int(sizes[-1]) * 1000:.1f}"
        row["memory, GB"] = f"{largest['largest_memory_gb']:.1f}"
        row["growth exponent"] = f"{found['growth_exponent'][step]:.2f}"
        rows.append(row)
    disk = found["by_size"][sizes[-1]]["training_set_gb"] / int(sizes[-1]) * 1000
    about = (
        f"Simulated load. Memory and time per knee are those of {int(sizes[-1]):,} knees. CPU time "
        "grows with the number of knees to the power of the growth exponent; 1 is linear. A knee "
        f"has {found['patches_per_knee_prepared']} patches, in the training process "
        f"{found['patches_per_knee']}, whose mapped files take {disk:.1f} MB a knee "
        "(docs/results/cost_by_size.json)."
    )
    return f"{pd.DataFrame(rows).to_markdown(index=False, disable_numparse=True)}\n\n{about}"


def large_cohort_tables(found: Mapping) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Tables for `figures.intervals` of the many knees: AUC of the arms, and differences."""
    rows = []
    for name, auc in found["auc"].items():
        if name in ARMS:
            ends = {"value": auc["auc"], "low": auc["ci_low"], "high": auc["ci_high"]}
            rows.append({"label": ARMS[name].label, "colour": ARMS[name].colour} | ends)
    differences = []
    for row in found["questions"]:
        ends = {"value": row["difference"], "low": row["ci_low"], "high": row["ci_high"]}
        label = f"{ARMS[row['a']].label}\n- {ARMS[row['b']].label}"
        if row["model"] == "Transformer":
            differences.append({"label": label, "colour": ARMS[row["a"]].colour} | ends)
    return pd.DataFrame(rows), pd.DataFrame(differences)


def effect_in_words(quantity: str, difference: Mapping) -> str:
    """Says whether a quantity is raised or lowered; neither where the 95 % interval includes 0."""
    value, low, high = (difference[name] for name in ("difference", "ci_low", "ci_high"))
    if value is None or low is None:
        return f"has no defined effect on {quantity}"
    if low > 0:
        return f"raises {quantity} by {value:.3f} (95 % CI {low:.3f} to {high:.3f})"
    if high < 0:
        return f"lowers {quantity} by {-value:.3f} (95 % CI {-high:.3f} to {-low:.3f})"
    shown = f"difference {value:.3f}, 95 % CI {low:.3f} to {high:.3f}"
    return f"does not detectably change {quantity} ({shown})"


def results_table(results: str | Path) -> str:
    """Markdown table: r, ICC and AUC of every arm, 95 % intervals, the values of the paper."""
    agreement = read_results(results, "agreement")
    icc, r = agreement["icc"], agreement["r"]
    auc = read_results(results, "diagnosis")["auc"]
    rows = []
    for name, arm in ARMS.items():
        if name in icc or name in auc:
            row = {
                "arm": arm.label,
                "r": f"{r[name]['mean']:.3f}" if name in r else "",
                "mean ICC": interval(icc[name]["mean"], "icc") if name in icc else "",
                "paper": arm.published.get("icc", {}).get("mean", ""),
                "AUC for OA": interval(auc[name], "auc") if name in auc else "",
                "paper ": arm.published.get("auc", ""),
            }
            rows.append(row)
    return markdown_table(rows)


def detailed_tables(results: str | Path) -> dict[str, str]:
    """Markdown tables by title: measures, differences, registration error, difficulty."""
    agreement = read_results(results, "agreement")
    difficulty = read_results(results, "cohort").get("calibration", {})
    tables = {
        "Agreement with the MR reference, mean of the biomarkers": _measure_rows(agreement),
        "ICC with the MR reference, by biomarker": _icc_rows(agreement["icc"]),
        "Differences in r, mean of the biomarkers": _difference_rows(differences_in_r(agreement)),
        "Differences in mean ICC": _difference_rows(agreement["difference"]),
        "Differences in AUC (DeLong)": _difference_rows(
            read_results(results, "diagnosis")["delong"]
        ),
        "Registration error (mm)": [
            {
                "bone": bone,
                "median": error["median"],
                "95th percentile": error["p95"],
                "largest": error["max"],
            }
            for bone, error in read_results(results, "registration")["tre_mm"].items()
        ],
        "Difficulty of the simulated cohort": difficulty_rows(
            **{name: difficulty.get(name, {}) for name in ("figures", "frozen")}
        ),
    }
    return {title: markdown_table(rows) for title, rows in tables.items() if rows}


def _measure_rows(agreement: Mapping) -> list[dict]:
    rows, limit = [], agreement["icc"].get("ct_oracle", {}).get("mean", {}).get("icc")
    for name, arm in ARMS.items():
        if name not in agreement["r"]:
            continue
        parts = agreement["within_between"][name]["mean"]
        icc = agreement["icc"][name]["mean"]
        row = {
            "arm": arm.label,
            **_r_and_error(agreement, name),
            "r within knees": parts["r_within"],
            "r between knees": parts["r_between"],
            "ICC": interval(icc, "icc"),
        }
        if limit:
            row["ICC over that of the reference model"] = icc["icc"] / limit
        rows.append(row)
    return rows


def _r_and_error(found: Mapping, arm: str) -> dict[str, str]:
    """Columns r and relative error of an arm, means of the biomarkers with 95 % intervals."""
    columns = {}
    for statistic, title in (("r", "r"), ("relative_error", "relative error")):
        ends = found[f"{statistic}_interval"][arm]["mean"]
        low, high = ends[f"{statistic}_ci_low"], ends[f"{statistic}_ci_high"]
        values = {"value": found[statistic][arm]["mean"], "ci_low": low, "ci_high": high}
        columns[title] = interval(values, "value")
    return columns


def _icc_rows(icc: Mapping) -> list[dict]:
    rows = []
    for name, arm in ARMS.items():
        if name in icc:
            found = {MEASURES[m]: interval(icc[name][m], "icc") for m in MEASURES}
            rows.append({"arm": arm.label} | found)
        if "icc" in arm.published:
            paper = {MEASURES[m]: f"*{arm.published['icc'][m]}*" for m in MEASURES}
            rows.append({"arm": f"*paper: {arm.label}*"} | paper)
    return rows


def _difference_rows(differences: Mapping) -> list[dict]:
    rows = []
    for arm, other in COMPARISONS:
        found = differences.get(f"{arm}_vs_{other}")
        if found:
            shown = interval(found, "difference")
            row = {"arm": ARMS[arm].label, "compared with": ARMS[other].label, "difference": shown}
            rows.append(row)
    return rows


def difficulty_rows(figures: Mapping, frozen: Mapping) -> list[dict]:
    """Published range, this cohort, and the 300 knees on which the protocol was frozen.

    Both are {quantity of `kneesim.difficulty`: {"value": ..., "ci_low": ..., "ci_high": ...}};
    `figures` have the published range (low, high) and its source too.
    """
    rows = []
    for name, found in figures.items():
        quantity, _, biomarker = name.partition(".")
        in_range = "" if pd.isna(found["low"]) else f"{found['low']:g} to {found['high']:g}"
        row = {
            "quantity": QUANTITIES[quantity],
            "biomarker": LABELS.get(biomarker, ""),
            "published": in_range,
            "this cohort": interval(found, "value"),
            "frozen protocol": interval(frozen[name], "value"),
            "source": found["source"],
        }
        rows.append(row)
    return rows


def published_networks(evidence: str | Path) -> str:
    """Networks of the published size, trained on a GPU: one sentence, a Markdown table, its origin.

    `evidence` is the folder of the benchmarks' results; "" before they are measured.
    """
    found = _read_evidence(Path(evidence) / "paper", "native")
    if not found:
        return ""
    rows = [
        {
            "network": GPU_LABELS[name],
            **_r_and_error(found, name),
            "r within knees": found["within_between"][name]["mean"]["r_within"],
            "mean ICC": interval(found["icc"][name]["mean"], "icc"),
        }
        for name in found["r"]
    ]
    changes = {
        row["arm"]: row
        for row in found["differences"]
        if row["statistic"] == "r" and row["biomarker"] == "mean" and row["against"] == "ct_only"
    }
    effect = effect_in_words("r of the published CT network", changes["l1_0.1"])
    seeds, folds = len(found["seeds"]), len(found["folds"])
    origin = (
        f"{found['n_patches']} patches of {found['n_subjects']} simulated knees in {folds} of 5 "
        f"folds, {seeds} training seed; trained on one {found['device']} in {found['precision']} "
        f"with patches of the {found['source']['source']} run; {len(found['missing'])} networks "
        "of the plan are not trained (docs/results/paper/native.json)."
    )
    sentence = f"The published loss with weight 0.1 {effect}."
    return f"{sentence}\n\n{markdown_table(rows)}\n\n{origin}"


def profiles_table() -> str:
    """Markdown table of the profiles, with the measured times on two cores without GPU."""
    rows = []
    for name, profile in profiles().items():
        minutes = sum(profile["minutes"].values())
        time = f"{math.ceil(minutes)} min" if minutes else "not measured"  # start and report too
        own = {"profile": f"`{name}`", "what": profile["about"], "time, two cores": time}
        rows.append(own | {"disk, GB": profile["disk_gb"]})
    return pd.DataFrame(rows).to_markdown(index=False)


def markdown_table(rows: Sequence[Mapping]) -> str:
    """Rows as a Markdown table; floats with three decimals."""
    return pd.DataFrame(rows).to_markdown(index=False, floatfmt=".3f")


def interval(found: Mapping, name: str, ends: str = "") -> str:
    """A value with its 95 % interval, as in "0.589 (0.507 to 0.658)".

    The interval is in `ci_low` and `ci_high`, after the prefix `ends`.
    """
    if pd.isna(found[name]):
        return "not defined"
    low = found[f"{ends}ci_low"]
    if pd.isna(low):
        return f"{found[name]:.3f} (no interval)"
    return f"{found[name]:.3f} ({low:.3f} to {found[f'{ends}ci_high']:.3f})"


def intervals(table: pd.DataFrame, name: str, ends: str = "") -> pd.Series:
    """`interval` of every row of a table."""
    texts = [interval(row, name, ends) for row in table.to_dict("records")]
    return pd.Series(texts, index=table.index, dtype=str)


def draw_icc(results: str | Path, file: str | Path) -> None:
    """Draw the ICC of every arm and biomarker with 95 % intervals to an image file.

    Diamonds are values of the paper. The SVG of equal results has equal bytes.
    """
    icc = read_results(results, "agreement")["icc"]
    arms = [arm for arm_id, arm in ARMS.items() if arm_id in icc]
    with plt.rc_context({"svg.hashsalt": "ctsma", "font.size": 10}):
        size = {"figsize": (10, 3.4), "layout": "constrained"}
        figure, axes = plt.subplots(1, 5, sharex=True, sharey=True, **size)
        for ax, (measure, label) in zip(axes, MEASURES.items(), strict=True):
            for row, arm in enumerate(arms):
                found = icc[arm.id][measure]
                ax.plot([found["ci_low"], found["ci_high"]], [row, row], color=arm.colour)
                ax.plot(found["icc"], row, "o", color=arm.colour, markersize=5)
                if "icc" in arm.published:
                    ax.plot(arm.published["icc"][measure], row, "D", mfc="none", color="black")
            ax.set_title(label)
            ax.set_yticks(range(len(arms)), [fill(arm.label, 28) for arm in arms])
            ax.grid(axis="x", alpha=0.3)
        axes[0].invert_yaxis()
        figure.supxlabel(
            "ICC(A,1) with the MR reference, 95 % CI (diamonds: paper, on patients)", fontsize=10
        )
        figure.savefig(file, metadata={"Date": None})
        plt.close(figure)


def renew(file: Path, parts: Mapping[str, str]) -> int:
    """Replace the generated parts of a file, which stand between marks; returns how many it has.

    A part stands between `<!-- NAME:begin -->` and `<!-- NAME:end -->`; `parts` is {NAME: text}.
    """
    text, count = file.read_text(encoding="utf-8"), 0
    for name, content in parts.items():
        begin, end = f"<!-- {name}:begin -->\n", f"<!-- {name}:end -->"
        if begin in text and end in text:
            head, _, rest = text.partition(begin)
            text = head + begin + content + "\n" + end + rest.partition(end)[2]
            count += 1
    write_text(file, text)
    return count
