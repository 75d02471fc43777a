"""When does distillation help, and what can a CT know at all? On simulated knees of another seed than the study's.

    python benchmarks/distillation.py runs/quick --folder /tmp/knees
    python benchmarks/distillation.py runs/quick --folder /tmp/knees --only oracle --seeds 2

Knees are scanned at their patches alone (see calibration.py), with true alignment. Knees 0 to 136 of the seed were
used to choose settings and are left out. Writes docs/results/distillation_evidence.json:

- `oracle`: the CT network trained on ten times the knees, on the patches of a run: the limit of this CT; its estimates
  go to docs/results/distillation_oracle.csv, so that a run can be compared with it patch by patch;
- `knowledge`: ridge on HU statistics that is also told what no CT shows: where the error comes from;
- `learning`: gain of the teacher over the student alone, and over the student on the ridge, by number of paired knees,
  on other knees (`curve`), and of ours as a whole over the ridge (`over_ridge`); the same with a teacher that sees
  another patch, was never trained, or sees MR shifted by 2 mm (`controls`); our gain in thirds of the test knees
  (`by_kernel`, `by_noise`);
- `terms`: every term of the loss, the ridge below the network, a committee of teachers and CT-only knees, one at a
  time at 80 knees; remove the part from the file to measure it again;
- `weights`: the same 80 knees, each bone's MR taken up to 2 mm beside its place, judged in place: what a teacher adds
  when all pairs count alike, or a pair's MR is learned from as often as it matches the CT (`over_untaught`), and what
  that mends (`over_alike`);
- `frequency`: the run's own networks on its test patches, their CT blurred more and more: in which details of the CT
  lies what an arm knows?
"""

import argparse
import json
import zlib
from dataclasses import replace
from functools import partial
from pathlib import Path

import joblib
import numpy as np
import pandas as pd
import torch
from calibration import displacements, scanned
from scipy import ndimage
from torch import nn

from ctsma import agreement, cohort, distillation, networks, patches, simulation
from ctsma.cohort import BIOMARKERS
from ctsma.distillation.examples import Examples, Fold, scale_of, weights_of
from ctsma.distillation.training import Memory, train
from ctsma.simulation import knees as scans
from ctsma.simulation.subject import make_subject

SEED, FIRST, LAST = 2000, 137, 880  # of the knees; the first 137 chose settings
SIZES, N_TEST, N_TOLD = (10, 20, 40, 80), 200, 240
ORACLE_EPOCHS = 16  # 9 times the steps of the study's arms
DISPLACED_MM, CLASSES_MM = 2.0, (0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0)  # largest, of a bone's MR; shown in classes
SCANS = {"seed": SEED, "per": 4, "truths": 0, "rescans": 0, "protocol": None}
SHIFT_VOXELS = (3, 9, 9)  # slices, rows, columns of the MR: 2.25, 2 and 2 mm
PUBLISHED = {"feature_l1": {"feature_l1": 0.1}, "feature_l1, gamma 0.01": {"feature_l1": 0.01}}
RIDGE, RIDGED, OURS = "ruler ridge", "on the ridge", "on the ridge, local_evidence"
EVIDENCE = {"local_evidence": 0.3}
WEIGHED = ", weighed"  # after the name of a student, see `weights`
GAINS = [(name, "alone") for name in PUBLISHED] + [(RIDGE, "alone"), (RIDGED, RIDGE), (OURS, RIDGED)]  # of the curve
WEIGHTS = {"feature_correlation": 0.1, "attention": 1.0, "relation": 0.1, "prediction": 1.0, "detail": 0.1}  # untuned
N_UNPAIRED = 160  # CT-only knees beside the 80 paired ones
PARTS = "oracle", "knowledge", "learning", "terms", "weights", "frequency"
NEEDED = {"weights": lambda ids: np.r_[ids[: SIZES[-1]], ids[-N_TEST:]], "frequency": lambda ids: ids[:1]}  # of knees
BLUR_MM = (0.0, 0.25, 0.5, 1.0, 2.0)  # SD in plane
CODE = cohort.source_sha256("ctsma.distillation")  # a part says with which networks and training it was measured
OUT = Path(__file__).parents[1] / "docs" / "results" / "distillation_evidence.json"


def fold_over(examples: Examples, fit: np.ndarray, test: np.ndarray, ruled: bool = False) -> Fold:
    """Rows to fit and to predict; a few test rows watch the fit and choose nothing."""
    return Fold(0, fit, test[:32], test, scale_of(examples, fit, 0, ruled))


def students(examples: Examples, fold: Fold, recipes: dict, teachers: dict, seeds, epochs: int) -> dict:
    """Mean prediction over seeds (n_test, 4) by name of recipe; `teachers[name]` is (examples, teacher by seed)."""
    settings, found = distillation.Settings(epochs=epochs), {}
    for name, recipe in recipes.items():
        seen, taught = teachers.get(name, (examples, {}))
        said = {s: Memory(teacher, seen, fold, settings) for s, teacher in taught.items()}
        models = [train("student", recipe, said.get(s), seen, fold, s, settings) for s in seeds]
        found[name] = read_by([model for model, _ in models], examples, fold.test, fold.scale)
    return found


def read_by(models: list[nn.Module], examples: Examples, rows: np.ndarray, scale: dict) -> np.ndarray:
    """Mean prediction (n, 4) of students on rows of the examples."""
    settings = distillation.Settings()
    return np.mean([distillation.predict(m, "student", examples, rows, scale, settings) for m in models], axis=0)


def by_ridge(examples: Examples, fold: Fold) -> np.ndarray:
    """Estimates (n_test, 4) of the ridge on HU statistics and ruler."""
    x, people = examples.features, examples.table["subject_id"].to_numpy(str)
    return distillation.hu_regression(x[fold.fit], examples.targets[fold.fit], people[fold.fit], x[fold.test])


def at_size(examples: Examples, knees: np.ndarray, test: np.ndarray, size: int, seeds: list[int]) -> dict:
    """Predictions on the test rows of every arm trained on `size` knees; at the largest size the controls too."""
    torch.set_num_threads(1)
    own = examples.table["knee_id"].to_numpy(str)
    fold = fold_over(examples, np.flatnonzero(np.isin(own, knees[:size])), test)
    settings = distillation.Settings()
    teacher = {s: train("teacher", {}, None, examples, fold, s, settings)[0].requires_grad_(False) for s in seeds}
    recipes, on_ridge = {"alone": {}} | PUBLISHED, {RIDGED: {}, OURS: EVIDENCE}
    teachers = dict.fromkeys([*PUBLISHED, OURS], (examples, teacher))
    if size == SIZES[-1]:
        untrained = {s: networks.build("teacher", "compact", torch.Generator().manual_seed(s)).eval() for s in seeds}
        order = np.arange(len(own))
        order[fold.fit] = np.random.default_rng(SEED).permutation(fold.fit)
        rolled = np.roll(examples.mr, SHIFT_VOXELS, axis=(1, 2, 3))
        wrong = {
            "another patch's MR": (replace(examples, mr=examples.mr[order]), teacher),
            "untrained teacher": (examples, untrained),
            "MR shifted by 2 mm": (replace(examples, mr=rolled), teacher),
        }
        teachers |= wrong | {f"{RIDGED}, {name}": known for name, known in wrong.items()}
        recipes |= dict.fromkeys(wrong, PUBLISHED["feature_l1"])
        on_ridge |= {f"{RIDGED}, {name}": EVIDENCE for name in wrong}
    ridged = fold_over(examples, fold.fit, test, ruled=True)
    found = students(examples, fold, recipes, teachers, seeds, settings.epochs)
    found[RIDGE] = by_ridge(examples, fold)
    return found | students(examples, ridged, on_ridge, teachers, seeds, settings.epochs)


class Committee(nn.Module):
    """Teachers that speak with one voice: mean prediction, mean evidence in place of the last map."""

    def __init__(self, teachers: list[nn.Module]) -> None:
        super().__init__()
        self.teachers = nn.ModuleList(teachers)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """(B, 2, ...) MR -> prediction (B, 4), [evidence (B, 4, ...)]."""
        said = [teacher(x) for teacher in self.teachers]
        read = [t.evidence(maps[-1]) for t, (_, maps) in zip(self.teachers, said, strict=True)]
        return torch.stack([prediction for prediction, _ in said]).mean(0), [torch.stack(read).mean(0)]

    def evidence(self, features: torch.Tensor) -> torch.Tensor:
        """The last map is the evidence already."""
        return features


def terms(folder: Path, ids: np.ndarray, seeds: list[int], n_jobs: int) -> dict:
    """Gain over the student alone of every term of the loss and of what else may help, at 80 paired knees."""
    own, more = ids[: SIZES[-1]], ids[SIZES[-1] : SIZES[-1] + N_UNPAIRED]
    examples = distillation.prepare(patches.load_patches(folder), detail=True)
    knees, settings = examples.table["knee_id"].to_numpy(str), distillation.Settings()
    fit, unpaired, test = (np.flatnonzero(np.isin(knees, group)) for group in (own, more, ids[-N_TEST:]))
    fold = fold_over(examples, fit, test)

    def each_seed(role: str, recipe: dict, teachers=(), seen=examples, where=fold, how=settings) -> list:
        options = [(recipe, teachers[s] if teachers else None, seen, where, s, how) for s in seeds]
        return joblib.Parallel(n_jobs)(joblib.delayed(one_thread)(role, *option) for option in options)

    teachers = [teacher.requires_grad_(False) for teacher in each_seed("teacher", {})]
    alone, committee = each_seed("student", {}), [Committee(teachers).eval()] * len(seeds)
    guessed = examples.targets.copy()
    guessed[unpaired] = read_by(alone, examples, unpaired, fold.scale)  # their MR is not looked at
    wider = replace(fold, fit=np.concatenate([fit, unpaired]))
    shorter = distillation.Settings(epochs=max(1, round(settings.epochs * len(fit) / len(wider.fit))))  # equal steps
    tried = {name: {"recipe": {name: weight}, "teachers": teachers} for name, weight in WEIGHTS.items()}
    tried["prediction, committee"] = {"recipe": {"prediction": WEIGHTS["prediction"]}, "teachers": committee}
    tried["local_evidence"] = {"recipe": EVIDENCE, "teachers": teachers}
    tried["local_evidence, committee"] = {"recipe": EVIDENCE, "teachers": committee}
    tried["no augmentation"] = {"recipe": {}, "how": distillation.Settings(augment=False)}
    ridged = fold_over(examples, fit, test, ruled=True)
    on_ridge = {RIDGED: {"recipe": {}}, f"{RIDGED}, detail": {"recipe": {"detail": WEIGHTS["detail"]}}}
    on_ridge[OURS] = {"recipe": EVIDENCE, "teachers": teachers}
    on_ridge[f"{OURS}, committee"] = {"recipe": EVIDENCE, "teachers": committee}
    both = EVIDENCE | {"detail": WEIGHTS["detail"]}
    on_ridge[f"{OURS}, detail"] = {"recipe": both, "teachers": teachers}
    tried |= {name: options | {"where": ridged} for name, options in on_ridge.items()}
    tried["CT-only knees"] = {"recipe": {}, "seen": replace(examples, targets=guessed), "where": wider, "how": shorter}
    about = {"n_knees": len(own), "n_unpaired": len(more), "training_seeds": len(seeds)}
    about |= {"weights": WEIGHTS | EVIDENCE}
    found, baseline = known("terms").get("gain", {}), read_by(alone, examples, test, fold.scale)
    found[RIDGE] = gain(examples, test, by_ridge(examples, fold), baseline)
    for name in [name for name in tried if name not in found]:
        scale = tried[name].get("where", fold).scale  # on the ridge, this holds it
        guess = read_by(each_seed("student", **tried[name]), examples, test, scale)
        found[name] = gain(examples, test, guess, baseline)
        keep("terms", about | {"gain": found})  # an hour's work in pieces: what is written is not done again
    return about | {"gain": found}


def known(part: str) -> dict:
    """What was written of a part so far."""
    return json.loads(OUT.read_text()).get(part, {}) if OUT.exists() else {}


def keep(part: str, found: dict) -> None:
    """Write one part beside the others."""
    content = json.loads(OUT.read_text()) if OUT.exists() else {}
    content |= {"protocol_sha256": simulation.protocol_sha256(), "seed": SEED}
    content["code_sha256"] = content.get("code_sha256", {}) | {part: CODE}
    cohort.write_json(OUT, content | {part: found})


def one_thread(role: str, recipe: dict, teacher, examples: Examples, fold: Fold, seed: int, settings) -> nn.Module:
    """`train` in a process of one thread; the network alone."""
    torch.set_num_threads(1)
    said = Memory(teacher, examples, fold, settings) if teacher else None
    return train(role, recipe, said, examples, fold, seed, settings)[0]


def weights(folder: Path, ids: np.ndarray, everyone: pd.DataFrame, seeds: list[int], n_jobs: int) -> dict:
    """What a teacher adds where pairs are displaced, with and without weights; the match by distance, and in place.

    Where all match at 1, weights change nothing, so nothing is trained there.
    """
    own, test, beside = ids[: SIZES[-1]], ids[-N_TEST:], folder / "displaced"
    moved = everyone[everyone["knee_id"].isin(own)]
    cohort.map_knees(scanned, moved, beside, SCANS | {"displaced_mm": DISPLACED_MM}, n_jobs=n_jobs, report=print)
    about = {"n_knees": len(own), "training_seeds": len(seeds), "largest_mm": DISPLACED_MM}
    data, whole = only(patches.load_patches(beside), own), patches.load_patches(folder)
    there, judged = only(whole, own), only(whole, test)
    in_place = distillation.alignment(there.ct, there.mr, there.voi)
    about |= {"match": by_distance(data), "in_place": {"n_patches": len(in_place), "least_match": in_place.min()}}
    examples = distillation.prepare(joined(data, judged), detail=False)
    fit, rows = np.split(np.arange(len(examples.table)), [len(data.table)])
    matches = weights_of(examples, fit, 0)
    with joblib.parallel_config(backend="loky", n_jobs=n_jobs, inner_max_num_threads=1):
        by_seed = joblib.Parallel()(joblib.delayed(weighed)(examples, fit, rows, matches, s) for s in seeds)
    found = {name: np.mean([guess[name] for guess in by_seed], axis=0) for name in by_seed[0]}
    untaught = dict.fromkeys(PUBLISHED, "alone") | {OURS: RIDGED}
    over = {
        name + how: gain(examples, rows, found[name + how], found[base])
        for name, base in untaught.items()
        for how in ("", WEIGHED)
    }
    mended = {name: gain(examples, rows, found[name + WEIGHED], found[name]) for name in untaught}
    return about | {"over_untaught": over, "over_alike": mended}


def weighed(examples: Examples, fit: np.ndarray, test: np.ndarray, matches: np.ndarray, seed: int) -> dict:
    """Estimates of students without a teacher, with one, and with one whose MR counts by the matches of the pairs."""
    torch.set_num_threads(1)
    plain, ridged = (fold_over(examples, fit, test, ruled) for ruled in (False, True))
    settings = distillation.Settings()
    teacher = {seed: train("teacher", {}, None, examples, plain, seed, settings)[0].requires_grad_(False)}
    found, options = {}, (dict.fromkeys([*PUBLISHED, OURS], (examples, teacher)), [seed], settings.epochs)
    for fold, base, recipes in ((plain, "alone", PUBLISHED), (ridged, RIDGED, {OURS: EVIDENCE})):
        found |= students(examples, fold, {base: {}} | recipes, *options)
        by_match = students(examples, replace(fold, weights=matches), recipes, *options)
        found |= {name + WEIGHED: guess for name, guess in by_match.items()}
    return found


def by_distance(data: patches.Patches) -> list[dict]:
    """Match of displaced patches by how far their bone's MR was moved: quartiles in classes of distance."""
    rows, matches = [], distillation.alignment(data.ct, data.mr, data.voi)
    for knee_id, compartment in zip(data.table["knee_id"], data.table["compartment"], strict=True):
        drawn = displacements(DISPLACED_MM, np.random.default_rng([SEED, zlib.crc32(knee_id.encode()), 10]))
        rows.append(np.linalg.norm(drawn[compartment.split("_")[0]]))
    classes = pd.Series(matches).groupby(pd.cut(rows, CLASSES_MM))
    found = [(c, group.describe()) for c, group in classes]
    return [
        {"from_mm": c.left, "to_mm": c.right, "n_patches": int(d["count"])} | {q: d[q] for q in ("25%", "50%", "75%")}
        for c, d in found
    ]


def only(data: patches.Patches, knee_ids: np.ndarray) -> patches.Patches:
    """Patches of the named knees."""
    rows = np.flatnonzero(data.table["knee_id"].isin(knee_ids))
    return patches.Patches(data.table.iloc[rows].reset_index(drop=True), data.mr[rows], data.ct[rows], data.voi[rows])


def joined(a: patches.Patches, b: patches.Patches) -> patches.Patches:
    """Patches of both, one after the other."""
    images = (np.concatenate([getattr(data, name) for data in (a, b)]) for name in ("mr", "ct", "voi"))
    return patches.Patches(pd.concat([a.table, b.table], ignore_index=True), *images)


def frequency(run: Path) -> dict:
    """Mean ICC of a run's CT arms on its test patches when the CT is blurred, and the gains there."""
    data = patches.load_patches(run / "patches")
    examples, folder = distillation.prepare(data, detail=False), run / "models"
    subjects, found = data.table["subject_id"].to_numpy(str), {}
    arms = ("ct_only", "ct_sma", "ct_residual", "ct_sma_plus")
    for blur_mm in BLUR_MM:
        sigma = (0, 0, *[blur_mm / s for s in patches.CT_SPACING_MM[1:]])
        ct = ndimage.gaussian_filter(examples.ct, sigma, mode="nearest")
        read = distillation.ridge_features(ct, examples.voi, examples.ruler)
        blurred = replace(examples, ct=ct, features=read)
        guesses = {arm: np.zeros_like(examples.targets) for arm in arms}
        for arm in arms:
            records = distillation.read_records(folder, arm)
            for record in records:
                model, _ = distillation.load_model(folder / f"{arm}_fold{record['fold']}_seed{record['seed']}")
                own = np.flatnonzero(np.isin(subjects, record["subjects"]["test"]))
                settings = distillation.Settings(**record["settings"])
                part = distillation.predict(model, "student", blurred, own, record["scale"], settings)
                guesses[arm][own] += part / len({r["seed"] for r in records})
        every = np.arange(len(subjects))
        pairs = {"ct_sma - ct_only": ("ct_sma", "ct_only"), "ct_residual - ct_only": ("ct_residual", "ct_only")}
        pairs |= {"ct_sma_plus - ct_residual": ("ct_sma_plus", "ct_residual")}
        found[str(blur_mm)] = {n: gain(examples, every, guesses[a], guesses[b]) for n, (a, b) in pairs.items()}
    return found


def gain(examples: Examples, rows: np.ndarray, a: np.ndarray, b: np.ndarray) -> dict:
    """Mean ICC of both, and their paired difference with a subject-bootstrap interval.

    Also `order_and_error` of both: an ICC can be raised by order or by spread.
    """
    reference, subjects = examples.targets[rows], examples.table["subject_id"].to_numpy()[rows]
    rng = np.random.default_rng(SEED)
    found = agreement.bootstrap_icc_difference(reference, a, b, subjects, rng)
    for name, e in (("", a), ("_alone", b)):
        found[f"icc{name}"] = np.mean([agreement.icc(reference[:, j], e[:, j])["icc"] for j in range(4)])
        found |= {f"{key}{name}": value for key, value in agreement.order_and_error(reference, e).items()}
    return found | {"n_knees": len(set(subjects))}


def scanner_of(knee_ids: np.ndarray) -> pd.DataFrame:
    """What the CT scanner drew for each knee."""
    constants, rows = simulation.load_protocol(), []
    for knee_id in knee_ids:
        drawn = scans.draw_scan("ct", constants, [SEED, zlib.crc32(knee_id.encode())])
        rows.append({"bone_hu": drawn["hu"]["bone"] * drawn["scale"], "kernel": drawn["fwhm_in_plane"]})
        rows[-1] |= {"noise": drawn["noise"]}
    return pd.DataFrame(rows, index=knee_ids)


def thirds(examples: Examples, test: np.ndarray, found: dict, by: pd.Series) -> list[dict]:
    """Our gain over the ridge's student in thirds of the test knees by a scanner's property."""
    value = by.loc[examples.table["knee_id"].to_numpy()[test]].to_numpy()
    edges = np.quantile(by.loc[np.unique(examples.table["knee_id"].to_numpy()[test])], (0, 1 / 3, 2 / 3, 1))
    rows = []
    for low, high in zip(edges[:-1], edges[1:], strict=True):
        own = (value >= low) & (value <= high)
        pair = found[OURS][own], found[RIDGED][own]
        rows.append({"low": low, "high": high} | gain(examples, test[own], *pair))
    return rows


def knowledge(examples: Examples, subjects: pd.DataFrame, ids: np.ndarray) -> dict:
    """Mean ICC of the ridge when it is also told the knee's HU of full bone, its MR's susceptibility, or both."""
    own = examples.table["knee_id"].to_numpy(str)
    rows = np.flatnonzero(np.isin(own, ids))
    features, with_ruler = np.split(examples.features[rows], [-distillation.N_RULER], axis=1)
    constants, people = simulation.load_protocol(), subjects.set_index("knee_id", drop=False)
    drawn = {
        k: make_subject(people.loc[k].to_dict(), constants, [SEED, zlib.crc32(k.encode())], None).drawn for k in ids
    }
    bone = scanner_of(ids).loc[own[rows], "bone_hu"].to_numpy()
    told = {"HU statistics": [], "+ HU of full bone": [bone, 1000 / bone, features[:, 0] / bone]}
    told["+ the ruler (measured)"] = [with_ruler]
    told["+ susceptibility of the MR"] = [np.array([drawn[k]["susceptibility"] for k in own[rows]])]
    told["+ both"] = told["+ HU of full bone"] + told["+ susceptibility of the MR"]
    first, targets = np.isin(own[rows], ids[: len(ids) // 2]), examples.targets[rows]
    people_of = examples.table["subject_id"].to_numpy(str)[rows]
    found = {}
    for name, columns in told.items():
        x = np.column_stack([features, *columns])
        guess = distillation.hu_regression(x[first], targets[first], people_of[first], x[~first])
        rng = np.random.default_rng(SEED)
        found[name] = agreement.bootstrap_icc(targets[~first], guess, people_of[~first], rng)
    return found


def oracle(examples: Examples, run: Path, seeds: list[int]) -> dict:
    """ICC on a run's patches of the CT network that was trained on all knees here."""
    torch.set_num_threads(1)
    other = distillation.prepare(patches.load_patches(run / "patches"), detail=False)
    table = pd.concat([examples.table, other.table], ignore_index=True)
    names = "targets", "ct", "mr", "voi", "mask", "ruler", "features"
    joined = {n: np.concatenate([getattr(examples, n), getattr(other, n)]) for n in names}
    whole, n = Examples(table, bone_fraction=None, **joined), len(examples.table)
    fold = fold_over(whole, np.arange(n), np.arange(n, len(table)), ruled=True)
    guess = students(whole, fold, {"ct_oracle": {}}, {}, seeds, ORACLE_EPOCHS)["ct_oracle"]
    rows = other.table[["knee_id", "subject_id", "patch_id"]].assign(
        arm="ct_oracle", **dict(zip(BIOMARKERS, guess.T, strict=True))
    )
    rows[[f"{b}_reference" for b in BIOMARKERS]] = other.targets  # by which notebook 4 knows the patches again
    cohort.write_text(OUT.with_name("distillation_oracle.csv"), rows.to_csv(index=False, float_format="%.5g"))
    n_knees = int(examples.table["knee_id"].nunique())
    return {"n_knees": n_knees, "epochs": ORACLE_EPOCHS, "training_seeds": len(seeds)}


def main() -> None:
    """Scan (finished knees are reused), measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--folder", type=Path, required=True, help="of the scanned knees, kept")
    parser.add_argument("--seeds", type=int, default=1, help="networks whose estimates are averaged")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument(
        "--only",
        choices=PARTS,
        help="one part; the others are kept",
    )
    given = parser.parse_args()
    everyone = simulation.draw_subjects(simulation.load_protocol(), LAST, SEED)
    others, seeds = everyone.iloc[FIRST:], list(range(given.seeds))
    ids = np.random.default_rng(SEED).permutation(np.unique(others["knee_id"].to_numpy(str)))
    needed = NEEDED.get(given.only, lambda ids: ids)(ids)
    others = others[others["knee_id"].isin(needed)]
    cohort.map_knees(scanned, others, given.folder, SCANS, n_jobs=given.jobs, report=print)
    examples = distillation.prepare(only(patches.load_patches(given.folder), needed), detail=False)
    parts = {
        "oracle": partial(oracle, examples, given.run, seeds),
        "knowledge": partial(knowledge, examples, everyone, ids[:N_TOLD]),
        "learning": partial(learning, examples, ids, seeds, given.jobs),
        "terms": partial(terms, given.folder, ids, seeds, given.jobs),
        "weights": partial(weights, given.folder, ids, everyone, seeds, given.jobs),
        "frequency": partial(frequency, given.run),
    }
    for name in [given.only] if given.only else parts:
        keep(name, parts[name]())


def learning(examples: Examples, ids: np.ndarray, seeds: list[int], n_jobs: int) -> dict:
    """Learning curve, controls, and at which scanners the gain lies."""
    test = np.flatnonzero(np.isin(examples.table["knee_id"].to_numpy(str), ids[-N_TEST:]))
    run = partial(at_size, examples, ids, test, seeds=seeds)
    with joblib.parallel_config(backend="loky", n_jobs=n_jobs, inner_max_num_threads=1):
        sizes = SIZES[::-1]  # the longest first
        found = dict(zip(sizes, joblib.Parallel()(joblib.delayed(run)(size=size) for size in sizes), strict=True))
    found = {size: found[size] for size in SIZES}
    curve = {
        f"{a} - {b}": {str(n): gain(examples, test, known[a], known[b]) for n, known in found.items()} for a, b in GAINS
    }
    largest, scanner = found[SIZES[-1]], scanner_of(ids[-N_TEST:])
    wrong = [name for name in largest if name not in {"alone", *PUBLISHED, RIDGE, RIDGED, OURS}]
    base = {name: RIDGED if name.startswith(RIDGED) else "alone" for name in wrong}
    controls = {name: gain(examples, test, largest[name], largest[base[name]]) for name in wrong}
    parts = {f"by_{name}": thirds(examples, test, largest, scanner[name]) for name in ("kernel", "noise")}
    parts["over_ridge"] = {str(n): gain(examples, test, known[OURS], known[RIDGE]) for n, known in found.items()}
    losses = PUBLISHED | {OURS: EVIDENCE}
    return {"curve": curve, "controls": controls, "losses": losses, "training_seeds": len(seeds)} | parts


if __name__ == "__main__":
    main()
