"""Train all arms from one packed file, with torch and numpy alone.

    python benchmarks/train_packed.py patches.npz.xz --out trained --minutes 10
    python benchmarks/train_packed.py patches.npz.xz --out trained --tune others.npz.xz

Networks of the published size on the published grid (64^3 and 16^3) or on the native one (teacher
16 x 48 x 48, student 16 x 24 x 24), and the compact ones. Arms: the teacher; the undistilled
student (`ct_only`); the published L1 between the maps of all stages with weight 0.01, 0.1 and 1;
the same for the last stage; each also with calibrated HU as a third channel (`_cortex`). The order
is seed, fold, arm, so that a stop leaves complete seeds. Predictions of every network are written
whole and never made again. Writes OUT/<network>.json, also with `--minutes 0`.

With --tune, learning rate and warm-up of teacher and student are chosen first, on the patches of
another file.
"""

import argparse
import hashlib
import json
import time
from itertools import product
from pathlib import Path

import numpy as np
import torch
from packed import BadInput, Packed, read_packed, run_main, write_json
from packed_networks import GRIDS
from packed_statistics import agreement, differences
from packed_training import Arm, Group, Resident, Speed, TeacherMaps, check_device

METHOD = 1  # raise it with a change that alters trained networks
GAMMAS = (0.01, 0.1, 1.0)  # the published weights are not reported; design choice
TEACHER = Arm("teacher", role="teacher")
RIDGE = "ridge_cortex"  # the calibrated ridge of the packed file
RATES = {"compact": 6e-3, "native": 1e-3, "published": 1e-3}  # without --tune; design choice
TOGETHER = {"compact": 12, "native": 10, "published": 2}  # arms; they fit into 80 GB
# The grid on which rates are chosen; on the published one that would take most of the time
TUNED_ON = {"compact": "compact", "native": "native", "published": "native"}
TUNED_ARM = {"teacher": "teacher", "student": "ct_only"}  # the arm that stands for its role
WARM_UP = 0.3  # share of the steps, without --tune; design choice
GATE = 0.8  # largest relative error of an undistilled student that has learned; design choice
NOT_DONE = "The undistilled student's relative error is not below 0.8: optimisation is not done."


def students() -> list[Arm]:
    """Every student."""
    found = []
    for suffix, cortex in (("", False), ("_cortex", True)):
        found.append(Arm(f"ct_only{suffix}", cortex=cortex))
        for gamma in GAMMAS:
            found.append(Arm(f"l1_{gamma:g}{suffix}", cortex=cortex, gamma=gamma))
        last = Arm(f"last_0.1{suffix}", cortex=cortex, gamma=0.1, last_stage=True)
        found.append(last)
    residual = {"cortex": True, "residual": True}
    found.append(Arm("residual", **residual))
    found.append(Arm("residual_l1_0.1", gamma=0.1, **residual))
    return found


ARMS = {arm.name: arm for arm in [TEACHER, *students()]}
ALL_BUT_RESIDUAL = [name for name in ARMS if not name.startswith("residual")]
# Without --arms. On the published grid a teacher takes two minutes, a student almost one
DEFAULT_ARMS = {
    "compact": ALL_BUT_RESIDUAL,
    "native": ALL_BUT_RESIDUAL,
    "published": ["teacher", "ct_only", "l1_0.1"],
}


def comparisons(names: list[str]) -> list[tuple[str, str]]:
    """Pairs (arm, other): distilled and undistilled, calibrated and not, network and ridge."""
    pairs = []
    for arm in (ARMS[name] for name in names if name != TEACHER.name):
        base = "residual" if arm.residual else "ct_only_cortex" if arm.cortex else "ct_only"
        pairs.append((arm.name, base if arm.gamma else RIDGE))
        if arm.name == "ct_only_cortex":
            pairs.append((arm.name, "ct_only"))
    return [(arm, other) for arm, other in pairs if other in {*names, RIDGE}]


class Study:
    """All networks of one size from one packed file.

    Parameters
    ----------
    settings : epochs, knees in a batch, arms trained together, and learning rate and warm-up by
        role.
    deadline : by `time.perf_counter`; no network is trained beyond it.
    """

    def __init__(
        self,
        file: Path,
        out: Path,
        size: str,
        device: str,
        speed: Speed,
        settings: dict,
        deadline: float,
    ):
        self.data, self.out, self.size = read_packed(file), out, size
        self.device, self.speed, self.deadline = device, speed, deadline
        self.settings, self.seconds, self.groups = settings, {}, {}
        self.images_sha256 = self.data.images_sha256()
        self.patches = Resident(self.data, device)
        self.maps = None

    def path(self, arm: Arm, k: int, seed: int) -> Path:
        """File of an arm's predictions; its name has the key of data, settings and method."""
        names = {"epochs", "knees", arm.role} | ({"teacher"} if arm.gamma else set())
        choices = {name: self.settings[name] for name in sorted(names)}
        described = [METHOD, self.images_sha256, self.size, arm.__dict__, k, seed, choices]
        described += [self.speed.bfloat16]
        key = hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:10]
        return self.out / self.size / f"{arm.name}_fold{k}_seed{seed}_{key}.npz"

    def weights(self, k: int, seed: int) -> Path:
        """File of a teacher's weights, kept until the students of its fold are trained."""
        return self.path(TEACHER, k, seed).with_suffix(".pt")

    def group(self, arms: list[Arm]) -> Group:
        """The networks of these arms in memory: the teacher's stay, students replace others."""
        role, names = arms[0].role, [arm.name for arm in arms]
        held = self.groups.get(role)
        if not held or [member.arm.name for member in held.members] != names:
            self.groups.pop(role, None)
            held = None  # frees its memory
            options = self.size, self.patches, self.settings["knees"], self.speed, self.maps
            self.groups[role] = Group(arms, *options)
        return self.groups[role]

    def _place_for_maps(self, teacher: Group) -> TeacherMaps:
        _, (_, maps) = next(teacher.outputs(teacher.members[0], np.arange(1)))
        counts = [len(self.patches.rows(k)[0]) for k in range(self.data.n_folds)]
        shapes = [values.shape[1:] for values in maps]
        try:
            return TeacherMaps(len(self.data.targets), max(counts), shapes, self.device)
        except torch.OutOfMemoryError as error:
            need = sum(np.prod(shape) for shape in shapes) * 2 * 4 * max(counts) / 2**30
            problem = f"the maps of the teacher take {need:.0f} GiB, more than this GPU has left"
            raise BadInput(f"--network: {problem}; use --network native.") from error

    def train(self, arms: list[Arm], k: int, seed: int) -> bool:
        """Train arms of one role, write their predictions; False where the time is over."""
        started, kind = time.perf_counter(), (arms[0].role, len(arms))
        if started + self.seconds.get(kind, 0) > self.deadline:
            return False
        self.patches.use_fold(k)
        if any(arm.gamma for arm in arms) and not self._teach(k, seed):
            return False
        group, choice = self.group(arms), self.settings[arms[0].role]

        def over() -> bool:
            return time.perf_counter() > self.deadline

        curves = group.train(seed, k, self.settings["epochs"], [choice] * len(arms), over)
        if curves is None:
            return False
        taken, rows = time.perf_counter() - started, self.patches.rows(k)[1]
        for member, arm, curve in zip(group.members, arms, curves, strict=True):
            path = self.path(arm, k, seed)
            if arm is TEACHER:
                self._keep_weights(member.network, k, seed)
            partial = path.with_name(f".partial-{path.name}")
            predicted, share = group.predict(member, rows), taken / len(arms)
            np.savez(partial, rows=rows, predicted=predicted, curve=curve, seconds=share)
            partial.replace(path)
        if group.warm:
            self.seconds[kind] = max(taken, self.seconds.get(kind, 0))
        group.warm = True
        names, last = ", ".join(arm.name for arm in arms), ", ".join(f"{c[-1]:.4f}" for c in curves)
        print(f"fold {k}, seed {seed}: {names}: {taken:.1f} s; last error {last}", flush=True)
        return True

    def _keep_weights(self, teacher: torch.nn.Module, k: int, seed: int) -> None:
        """Convolutions in bfloat16, as autocast uses them, halve the file."""
        state = {}
        for name, values in teacher.state_dict().items():
            halve = self.speed.bfloat16 and values.dim() > 1
            state[name] = values.to(torch.bfloat16 if halve else values.dtype).cpu().clone()
        path = self.weights(k, seed)
        partial = path.with_name(f".partial-{path.name}")
        torch.save(state, partial)
        partial.replace(path)

    def _teach(self, k: int, seed: int) -> bool:
        """Make the maps of the fold's teacher; False where the time is over."""
        if self.maps and self.maps.owner == (k, seed):
            return True
        path = self.weights(k, seed)
        if not path.exists():
            print(f"{path.name} is missing: the teacher is trained again.", flush=True)
            if not self.train([TEACHER], k, seed):
                return False
        teacher = self.group([TEACHER])
        state = torch.load(path, map_location=self.device, weights_only=True)
        teacher.members[0].load(state)
        self.maps = self.maps or self._place_for_maps(teacher)
        self.maps.fill(teacher, self.patches.rows(k)[0], (k, seed))
        return True

    def run(self, arms: list[Arm], seeds: int) -> list[str]:
        """Train what is not there, in order; names of what is missing at the end."""
        for seed, k in product(range(seeds), range(self.data.n_folds)):
            for together in self._in_groups(arms):
                left = [arm for arm in together if not self.path(arm, k, seed).exists()]
                if left and not self.train(left, k, seed):
                    return self.missing(arms, seeds)
            self.weights(k, seed).unlink(missing_ok=True)
        return self.missing(arms, seeds)

    def _in_groups(self, arms: list[Arm]) -> list[list[Arm]]:
        """The teacher, then students, as many as are trained together."""
        rest, n = [arm for arm in arms if arm is not TEACHER], self.settings["together"]
        groups = [rest[i : i + n] for i in range(0, len(rest), n)]
        return [[TEACHER], *groups] if TEACHER in arms else groups

    def missing(self, arms: list[Arm], seeds: int) -> list[str]:
        """Names of what is not trained."""
        jobs = product(range(seeds), range(self.data.n_folds), arms)
        left = [(arm, k, seed) for seed, k, arm in jobs if not self.path(arm, k, seed).exists()]
        return [f"{arm.name}, fold {k}, seed {seed}" for arm, k, seed in left]

    def tune(self, arm: Arm, candidates: list[dict]) -> dict:
        """Learning rate and warm-up of an arm, on the test subjects of fold 0.

        The choice of `steady` with its error, and all candidates.
        """
        self.patches.use_fold(0)
        rows, n, found = self.patches.rows(0)[1], self.settings["together"], []
        target = self.data.targets[rows]
        for i in range(0, len(candidates), n):
            some = candidates[i : i + n]
            options = self.size, self.patches, self.settings["knees"], self.speed
            group = Group([arm] * len(some), *options)
            curves = group.train(0, 0, self.settings["epochs"], some)
            for member, choice, curve in zip(group.members, some, curves, strict=True):
                error = group.predict(member, rows) - target
                relative = float(((error**2).mean(axis=0) / target.var(axis=0)).mean())
                found.append(choice | {"tuning_error": relative, "fit_error": float(curve[-1])})
                print(f"{arm.name}: candidate: {found[-1]}", flush=True)
        return steady(found) | {"candidates": found}

    def results(self, arms: list[Arm], seeds: int) -> dict:
        """Agreement of the arms over complete seeds; before the first one, over complete folds."""
        folds = range(self.data.n_folds)
        complete = {
            (k, s)
            for k, s in product(folds, range(seeds))
            if all(self.path(arm, k, s).exists() for arm in arms)
        }
        used = [s for s in range(seeds) if all((k, s) in complete for k in folds)]
        own_folds = list(folds) if used else [k for k in folds if (k, 0) in complete]
        used = used or [0]
        found = {"folds": own_folds, "seeds": used if own_folds else []}
        found["complete"] = len(own_folds) == len(folds)
        if not own_folds:
            return found
        predicted = {arm.name: self._mean(arm, own_folds, used) for arm in arms}
        estimates = np.zeros((len(self.data.targets), 4))
        for k in own_folds:
            test = self.patches.rows(k)[1]
            estimates[test] = self.data.ridge[k][test]
        tested = np.isin(self.data.fold, own_folds)
        predicted = {name: values[tested] for name, values in predicted.items()}
        predicted[RIDGE] = estimates[tested]
        return found | endpoints(self.data, tested, predicted)

    def _mean(self, arm: Arm, folds: list[int], seeds: list[int]) -> np.ndarray:
        total = np.zeros((len(self.data.targets), 4))
        for k, seed in product(folds, seeds):
            with np.load(self.path(arm, k, seed)) as stored:
                total[stored["rows"]] += stored["predicted"] / len(seeds)
        return total


def endpoints(data: Packed, tested: np.ndarray, predicted: dict[str, np.ndarray]) -> dict:
    """Agreement and differences of arms, with the names of agreement.json, and the gate."""
    about = data.targets[tested], data.subject_id[tested], data.knee_id[tested]
    reference, subjects, knees = about
    rng, found = np.random.default_rng(0), {"n_patches": int(tested.sum())}
    found["n_subjects"] = len(np.unique(subjects))
    names = "icc", "r", "r_interval", "relative_error", "relative_error_interval", "within_between"
    found |= {name: {} for name in names}
    for arm, values in predicted.items():
        of_arm = agreement(reference, values, subjects, knees, rng)
        found["icc"][arm] = {m: _named(v, "icc") for m, v in of_arm["icc"].items()}
        for name in ("r", "relative_error"):
            found[name][arm] = {m: v["value"] for m, v in of_arm[name].items()}
            rows = {m: _named(v, name, prefix=f"{name}_") for m, v in of_arm[name].items()}
            found[f"{name}_interval"][arm] = rows
        both = {m: {} for m in of_arm["r"]}
        for name in ("r_within", "r_between"):
            for measure, v in of_arm[name].items():
                both[measure] |= _named(v, name, prefix=f"{name}_")
        found["within_between"][arm] = both
    found["differences"] = []
    for arm, other in comparisons([name for name in predicted if name != RIDGE]):
        pair = predicted[arm], predicted[other]
        of_pair = differences(reference, *pair, subjects, knees, rng)
        for statistic, rows in of_pair.items():
            for measure, values in rows.items():
                row = {"arm": arm, "against": other, "statistic": statistic, "biomarker": measure}
                found["differences"].append(row | values)
    undistilled = [arm for arm in ("ct_only", "ct_only_cortex") if arm in predicted]
    errors = {arm: found["relative_error"][arm]["mean"] for arm in undistilled}
    found["optimisation_done"] = bool(errors) and max(errors.values()) < GATE
    if not found["optimisation_done"]:
        found["warning"] = NOT_DONE
    return found


def _named(values: dict, name: str, prefix: str = "") -> dict:
    ends = {f"{prefix}{end}": values[end] for end in ("ci_low", "ci_high")}
    return {name: values["value"]} | ends


def steady(candidates: list[dict]) -> dict:
    """The candidate of least error among those whose next larger rate learns too.

    Near the rate at which training diverges, one network of many would.
    """
    kept = []
    for row in candidates:
        larger = [
            c for c in candidates if c["warm_up"] == row["warm_up"] and c["rate"] > row["rate"]
        ]
        if larger and min(larger, key=lambda c: c["rate"])["tuning_error"] < 1:
            kept.append(row)
    if not kept:
        raise BadInput("--rates: no candidate learns with the next larger one; give smaller rates.")
    return min(kept, key=lambda row: row["tuning_error"])


def check_same_source(out: Path, data: Packed) -> None:
    """BadInput where the folder holds networks of another protocol or split."""
    names = ("schema", "protocol_sha256", "split_sha256")
    own, path = {name: data.about.get(name) for name in names}, out / "source.json"
    if path.exists():
        there = json.loads(path.read_text())
        other = [name for name in names if there.get(name) != own[name]]
        if other:
            problem = f"holds networks of another {other[0].removesuffix('_sha256')}"
            raise BadInput(f"{out}: {problem}; choose another --out or pack the same run.")
    path.write_text(json.dumps(own, indent=1) + "\n")


def check_other_patches(data: Packed, others: Packed) -> None:
    """BadInput where the patches of --tune are not of the same protocol, or are those reported."""
    if others.about["protocol_sha256"] != data.about["protocol_sha256"]:
        raise BadInput("--tune: is of another protocol; pack knees of the same protocol.")
    if set(map(tuple, data.targets)) & set(map(tuple, others.targets)):
        raise BadInput("--tune: holds patches that are reported; pack knees of another seed.")


def settings_of(given: argparse.Namespace, speed: Speed, deadline: float) -> dict:
    """Settings of all networks: stored ones of an earlier tuning, tuned now, or the defaults."""
    together = given.together or TOGETHER[given.network]
    shared = {"epochs": given.epochs, "knees": given.knees, "together": together}
    network = TUNED_ON[given.network]
    path = given.out / f"tuning_{network}_{given.epochs}.json"
    default = {"rate": RATES[given.network], "warm_up": WARM_UP}
    if path.exists():
        chosen = json.loads(path.read_text())
        print(f"Learning rate and warm-up are those of {path}.", flush=True)
    elif given.tune:
        check_other_patches(read_packed(given.file), read_packed(given.tune))
        options = shared | {"together": given.together or TOGETHER[network]}
        study = Study(given.tune, given.out, network, given.device, speed, options, deadline)
        pairs = product(given.rates, given.warm_ups)
        candidates = [{"rate": rate, "warm_up": warm_up} for rate, warm_up in pairs]
        chosen = {role: study.tune(ARMS[name], candidates) for role, name in TUNED_ARM.items()}
        path.write_text(json.dumps(chosen, indent=1) + "\n")
    else:
        print("Learning rate and warm-up are defaults; --tune chooses them.", flush=True)
        chosen = dict.fromkeys(TUNED_ARM, default)
    return shared | chosen


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path, help="of pack_patches.py")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--network", choices=GRIDS, default="native")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--precision", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--minutes", type=float, default=10, help="stop in time")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=24)
    parser.add_argument("--knees", type=int, default=4, help="in a batch, 8 patches of each")
    parser.add_argument("--arms", nargs="+", choices=ARMS, help="all, see DEFAULT_ARMS")
    parser.add_argument("--tune", type=Path, help="packed file of knees that are never reported")
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-4, 3e-4, 1e-3, 2e-3, 4e-3])
    parser.add_argument("--warm-ups", type=float, nargs="+", default=[0.3])
    parser.add_argument("--together", type=int, help="arms that are trained at the same time")
    parser.add_argument("--compile", action="store_true", help="torch.compile, minutes at first")
    parser.add_argument("--no-graphs", action="store_true", help="without CUDA graphs")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Train, compare, write."""
    given = parsed(arguments)
    deadline = time.perf_counter() + 60 * given.minutes
    bfloat16 = given.precision == "bfloat16"
    check_device(given.device, bfloat16)
    data = read_packed(given.file)
    (given.out / given.network).mkdir(parents=True, exist_ok=True)
    check_same_source(given.out, data)
    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("high")
    speed = Speed(bfloat16, given.compile, not given.no_graphs)
    settings = settings_of(given, speed, deadline)
    chosen = set(given.arms or DEFAULT_ARMS[given.network])
    if any(ARMS[name].gamma for name in chosen):
        chosen.add(TEACHER.name)
    arms = [arm for name, arm in ARMS.items() if name in chosen]  # the teacher first
    options = given.network, given.device, speed, settings, deadline
    study = Study(given.file, given.out, *options)
    missing = study.run(arms, given.seeds)
    cuda = given.device.startswith("cuda")
    found = {
        "network": given.network,
        "device": torch.cuda.get_device_name() if cuda else given.device,
        "torch": torch.__version__,
        "precision": given.precision,
        "settings": settings,
        "tuned": "tuning_error" in settings["student"],
        "source": data.about,
        "missing": missing,
    }
    found |= study.results(arms, given.seeds)
    path = given.out / f"{given.network}.json"
    write_json(path, found)
    print(f"{len(missing)} networks are missing: {'; '.join(missing[:3])}" if missing else "done")
    if not found.get("optimisation_done", True):
        print(NOT_DONE)


if __name__ == "__main__":
    run_main(main)
