"""The model card (Mitchell 2019): what a model is and is for, what it reached and refuses; numbers are model.json's."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from ctsma.cohort import BIOMARKERS
from ctsma.figures import LABELS

from .limits import MEASURES

TEMPLATE = Path(__file__).with_name("model_card.md")
HASHES = ("protocol_sha256", "manifest_sha256", "splits_sha256", "git_commit", "seed")
PATIENTS = {
    True: "Trained on **simulated** knees: nothing is known of how it does on patients.",
    False: "Trained on knees of one cohort: try it on knees of another before use.",
}
LOGISTIC = """Logistic regression (ridge) on the compartments' means of out-of-fold estimates, fitted on {n_knees}
knees, {n_oa} of them with OA, a share that is part of the probability; coefficients in model.json. The same regression,
cross-validated by subject: AUC {auc}, Brier score {brier}, calibration slope {slope} (ideal 1). The study's
Transformer over patches, which does not come along: AUC {transformer}."""


def model_card(about: Mapping) -> str:
    """Markdown of a model directory from its model.json."""
    training, settings, metrics = about["training"], about["settings"], about["metrics"]
    parts = {name: about[name] for name in ("arm", "profile", "member_seed")} | dict(training)
    parts |= {"n_members": len(about["members"]), "size": settings["size"], "level": 100 * about["intervals"]["level"]}
    parts["parameters"] = ", ".join(f"{k} = {v}" for k, v in training["parameters"].items()) or "the profile's own"
    parts["terms"] = ", ".join(f"{weight} {term}" for term, weight in about["recipe"].items()) or "none"
    parts["versions"] = ", ".join(f"{name} {version}" for name, version in about["packages"].items())
    parts["origin"] = _table(["made from", ""], [[name, f"`{about[name]}`"] for name in HASHES])
    parts |= {"patients": PATIENTS[about["simulated"]], "limits": _limits(about["limits"])}
    parts |= {"agreement": _agreement(metrics), "intervals": _intervals(about["intervals"])}
    return TEMPLATE.read_text(encoding="utf-8").format(**parts, oa=_oa(about["oa"], metrics))


def _limits(limits: Mapping) -> str:
    rows = []
    for name, limit in limits.items():
        ends = {"below": limit["refuse_below"], "above": limit["refuse_above"]}
        refused = ", ".join(f"{word} {_short(value)}" for word, value in ends.items() if value is not None)
        rows.append([MEASURES[name].label, f"{_short(limit['low'])} to {_short(limit['high'])}", refused])
    return _table(["measure", "training", "refused"], rows)


def _agreement(metrics: Mapping) -> str:
    ceiling = metrics["ceiling"] or {}
    rows = [[LABELS[b], _interval(metrics["icc"][b], "icc"), _short(ceiling.get(b))] for b in BIOMARKERS]
    rows.append(["mean", _interval(metrics["icc"]["mean"], "icc"), ""])
    rows += [[f"mean, `{arm}`", _interval(value, "icc"), ""] for arm, value in metrics["icc_beside"].items()]
    return _table(["", "ICC", "MR rescan"], rows)


def _intervals(found: Mapping) -> str:
    keys = [(unit, key) for unit in ("patch", "compartment") for key in ("radius", "coverage")]
    rows = [[LABELS[b], *(_short(found[unit][b][key]) for unit, key in keys)] for b in BIOMARKERS]
    return _table(["", "patch, half width", "coverage", "compartment, half width", "coverage"], rows)


def _oa(oa: Mapping | None, metrics: Mapping) -> str:
    if not oa:
        return "No probability: too few labelled knees."
    calibrated, given = metrics["oa_calibration"] or {}, {name: oa[name] for name in ("n_knees", "n_oa")}
    given |= {name: _short(calibrated.get(name)) for name in ("brier", "slope")}
    return LOGISTIC.format(auc=_interval(metrics["oa_auc"]), transformer=_interval(metrics["auc"]), **given)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])


def _interval(value: Mapping | None, name: str = "auc") -> str:
    return f"{_short(value[name])} ({_short(value['ci_low'])} to {_short(value['ci_high'])})" if value else "unknown"


def _short(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.3g}"
