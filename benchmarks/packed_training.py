"""Training of networks side by side on patches that stay on the device, with torch and numpy.

Loss, batches and augmentation are those of ctsma.distillation, with these differences. Every batch
has the same shape: a part of a knee with fewer patches than `PER_KNEE` is filled with patches of
the same knee. The learning rate rises linearly and falls as a cosine. There are no validation
subjects. A step has fixed addresses, so that a CUDA graph can repeat it for every network.
"""

import math
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from packed import RHO_OF, BadInput, Packed
from packed_networks import build
from torch import Tensor

# As ctsma.distillation.data and ctsma.models
HU_RANGE, TRABECULAR_SHARE = (-300.0, 1500.0), 0.25
GAIN_SD, SHIFT_HU, NOISE_HU, BLUR = 0.01, 5.0, 10.0, 0.3
PER_KNEE, EMA_EPOCHS, WEIGHT_DECAY = 8, 2.0, 1e-2
FLIPPED = (2, 4)  # axes of (B, channel, slices, rows, columns)
FLIPS = [(False, False), (False, True), (True, False), (True, True)]
PORTION = 32  # patches that are predicted at once
WARM_UP_STEPS = 3  # before a CUDA graph is recorded


@dataclass(frozen=True)
class Arm:
    """One way of training a network.

    `gamma` weighs the published L1 of all stages, or of the last one. A residual network corrects
    the ridge; it has no sigmoid, because its target has both signs.
    """

    name: str
    role: str = "student"
    cortex: bool = False
    residual: bool = False
    gamma: float = 0.0
    last_stage: bool = False


@dataclass(frozen=True)
class Speed:
    """How networks are run."""

    bfloat16: bool = True
    compiled: bool = False
    graphs: bool = True


def check_device(device: str, bfloat16: bool) -> None:
    """BadInput where the device is missing or cannot compute in bfloat16."""
    if not device.startswith("cuda"):
        return
    if not torch.cuda.is_available():
        raise BadInput(f"--device: {device} is not available; use a machine with an NVIDIA GPU.")
    if bfloat16 and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise BadInput("--precision: this GPU has no bfloat16; use --precision float32.")


class Resident:
    """Patches on the device in compact types, and the values of the fold that is trained."""

    def __init__(self, data: Packed, device: str):
        self.data, self.device = data, device
        self.graphs = weakref.WeakSet()  # they share their memory: one of them runs at a time
        region = data.voi.reshape(-1, 12, 24, 2, 24, 2).sum((3, 5), dtype=np.uint8)
        gain = data.relative_mr()
        arrays = {"mr": data.mr, "ct": data.ct, "voi": data.voi, "region": region}
        self.images = {name: torch.from_numpy(v).to(device) for name, v in arrays.items()}
        self.mr_level, self.mr_step = (torch.from_numpy(v).to(device) for v in gain)
        self.cortical_hu = torch.from_numpy(data.cortical_hu).float().to(device)
        n = len(data.targets)
        self.centre = {name: torch.zeros(2, device=device) for name in ("ct", "mr")}
        self.target, self.ridge = (torch.zeros(n, 4, device=device) for _ in range(2))

    def use_fold(self, k: int) -> None:
        """Set scale, targets and ridge from the training subjects of a fold."""
        data, fit = self.data, self.rows(k)[0]
        at = torch.from_numpy(fit).to(self.device)
        mr = self._mr(at)
        for name, values in (("ct", self.images["ct"][at].float()), ("mr", mr)):
            self.centre[name].copy_(torch.stack([values.mean(), values.std(correction=0)]))
        self.low = data.targets[fit].min(axis=0)
        self.width = data.targets[fit].max(axis=0) - self.low
        for kept, values in ((self.target, data.targets), (self.ridge, data.ridge[k])):
            kept.copy_(torch.from_numpy(((values - self.low) / self.width).astype(np.float32)))

    def rows(self, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows to fit and to test of a fold."""
        return np.flatnonzero(self.data.fold != k), np.flatnonzero(self.data.fold == k)

    def _mr(self, rows: Tensor) -> Tensor:
        level, step = (v[rows].view(-1, 1, 1, 1) for v in (self.mr_level, self.mr_step))
        return level + step * self.images["mr"][rows].float()

    def input(self, role: str, rows: Tensor, flips: Tensor, augment: bool) -> Tensor:
        """Network input (B, channels, slices, rows, columns), flipped alike for CT and MR.

        Image and region; for the student calibrated HU third. rows (B,), flips (2,) bool are on
        the device. With `augment` a CT is that of another scanner, as `augment_ct` of
        ctsma.distillation.data.
        """
        if role == "teacher":
            mean, sd = self.centre["mr"]
            channels = [(self._mr(rows) - mean) / sd, self.images["voi"][rows].float()]
        else:
            hu = self.images["ct"][rows].float()
            hu = (augmented(hu) if augment else hu).clamp(*HU_RANGE)
            mean, sd = self.centre["ct"]
            cortex = self.cortical_hu[rows].view(-1, 1, 1, 1)
            channels = [(hu - mean) / sd, self.images["region"][rows].float() / 4]
            channels.append(hu / (TRABECULAR_SHARE * cortex) - 1)
        x = torch.stack(channels, 1)
        for axis, flip in zip(FLIPPED, flips, strict=True):
            x = torch.where(flip, x.flip(axis), x)
        return x


def augmented(hu: Tensor) -> Tensor:
    """Another scanner's CT of the same bone, one draw per patch."""
    shape = (len(hu), 1, 1, 1)
    normal = torch.randn(2, *shape, device=hu.device)
    uniform = torch.rand(2, *shape, device=hu.device)
    for axis in (2, 3):
        neighbours = (hu.roll(1, axis) + hu.roll(-1, axis) + 2 * hu) / 4
        hu = hu + BLUR * uniform[0] * (neighbours - hu)
    hu = hu * (1 + GAIN_SD * normal[0]) + SHIFT_HU * normal[1]
    return hu + NOISE_HU * uniform[1] * torch.randn_like(hu)


def knee_level_loss(error: Tensor, theta: Tensor) -> Tensor:
    """`knee_level_mse` of ctsma.distillation.losses for errors (knees, patches of a knee, 4)."""
    return (error - theta * error.mean(1, keepdim=True)).square().mean()


def epoch_batches(
    knees: np.ndarray, rows: np.ndarray, n_knees: int, rng: np.random.Generator
) -> np.ndarray:
    """Rows of one epoch (n_batches, 8 x n_knees): 8 patches of each of several knees.

    Every row occurs. A part of a knee with fewer than 8 patches is filled with others of that knee,
    and the last batch with other parts.
    """
    parts = []
    for knee in np.unique(knees[rows]):
        own = rng.permutation(rows[knees[rows] == knee])
        n_parts = math.ceil(len(own) / PER_KNEE)
        parts += list(np.resize(own, (n_parts, PER_KNEE)))
    order = rng.permutation(len(parts))
    order = np.resize(order, (math.ceil(len(parts) / n_knees), n_knees))
    return np.stack(parts)[order].reshape(len(order), -1)


class TeacherMaps:
    """Maps of a teacher for all fitting patches under each of the four flips, in bfloat16.

    The network is not equivariant to flips, so flipped maps are computed and not derived. Addresses
    stay the same for all folds.
    """

    def __init__(self, n_rows: int, n_stored: int, shapes: list, device: str):
        self.n_stored, self.owner = n_stored, None
        sizes = [(len(FLIPS) * n_stored, *shape[1:], shape[0]) for shape in shapes]
        self.maps = [torch.zeros(size, dtype=torch.bfloat16, device=device) for size in sizes]
        self.slot = torch.zeros(n_rows, dtype=torch.long, device=device)

    def fill(self, teacher: "Group", rows: np.ndarray, owner: tuple) -> None:
        """Compute the maps of the rows by the only member of a group, whose weights are final."""
        at = torch.from_numpy(rows).to(self.slot.device)
        self.slot[at] = torch.arange(len(rows), device=at.device)
        for code, flips in enumerate(FLIPS):
            for start, (_, maps) in teacher.outputs(teacher.members[0], rows, flips):
                n = min(PORTION, len(rows) - start)
                first = code * self.n_stored + start
                for kept, values in zip(self.maps, maps, strict=True):
                    kept[first : first + n].copy_(values[:n].movedim(1, -1))
        self.owner = owner

    def of(self, rows: Tensor, flips: Tensor) -> list[Tensor]:
        """Maps (B, C, ...) of flipped patches."""
        at = self.slot[rows] + self.n_stored * (2 * flips[0].long() + flips[1].long())
        return [maps[at].movedim(-1, 1) for maps in self.maps]


class Member:
    """One network of a group, its optimiser and what its step reads and adds to, all in place."""

    def __init__(self, arm: Arm, size: str, device: str, speed: Speed):
        self.arm, self.size = arm, size
        self.network = self.built(0).to(device, memory_format=torch.channels_last_3d)
        self.model = torch.compile(self.network, dynamic=False) if speed.compiled else self.network
        cuda = device.startswith("cuda")
        self.stream = torch.cuda.Stream() if cuda else None
        self.rate, self.squared = (torch.zeros((), device=device) for _ in range(2))
        options = {"lr": self.rate, "weight_decay": WEIGHT_DECAY, "capturable": cuda}
        self.optimizer = torch.optim.AdamW(self.network.parameters(), fused=True, **options)
        self.theta, self.gammas = torch.zeros(4, device=device), torch.zeros(8, device=device)

    def built(self, seed: int) -> torch.nn.Module:
        """A network with weights drawn from the seed."""
        channels = 3 if self.arm.cortex else 2
        return build(self.size, self.arm.role, channels, not self.arm.residual, seed)

    def weights(self) -> list[Tensor]:
        """What is averaged: weights and running statistics."""
        return [v for v in self.network.state_dict().values() if v.is_floating_point()]

    @torch.no_grad()
    def load(self, state: dict[str, Tensor]) -> None:
        """Copy weights into the network, in place."""
        for name, values in self.network.state_dict().items():
            values.copy_(state[name])

    def own_input(self, x: Tensor) -> Tensor:
        """The channels that the network reads."""
        x = x if self.arm.cortex else x[:, :2]
        return x.contiguous(memory_format=torch.channels_last_3d)

    def step(self, x: Tensor, target: Tensor, teacher: list[Tensor], precision: dict) -> None:
        """One step: loss, gradient, weights."""
        with torch.autocast(**precision):
            prediction, maps = self.model(self.own_input(x))
        error = (prediction - target).view(-1, PER_KNEE, 4)
        loss = knee_level_loss(error, self.theta)
        self.squared.add_(error.detach().square().mean())
        if self.arm.gamma:
            for gamma, own, taught in zip(self.gammas[: len(maps)], maps, teacher, strict=True):
                loss = loss + gamma * (own.float() - taught.float()).abs().mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()


class Group:
    """Networks of one role that are trained side by side, again and again from new weights.

    They see the same batches. On a GPU each has a stream of its own, because one network of small
    maps does not fill the card, and a CUDA graph repeats the step of all of them.

    Parameters
    ----------
    arms : of the members; the same arm may occur again, with another learning rate.
    n_knees : knees in a batch, 8 patches of each.
    maps : of the teacher, for distilled arms.
    """

    def __init__(
        self,
        arms: Sequence[Arm],
        size: str,
        patches: Resident,
        n_knees: int,
        speed: Speed,
        maps: TeacherMaps | None = None,
    ):
        self.patches, self.speed, self.maps, device = patches, speed, maps, patches.device
        self.cuda, self.graph, self.n_knees = device.startswith("cuda"), None, n_knees
        self.role, self.ready, self.warm = arms[0].role, False, False
        self.members = [Member(arm, size, device, speed) for arm in arms]
        self.distils = any(arm.gamma for arm in arms)
        kind = device.split(":")[0]
        self.precision = {"device_type": kind, "dtype": torch.bfloat16, "enabled": speed.bfloat16}
        self.at = torch.arange(n_knees * PER_KNEE, device=device) % len(patches.data.targets)
        self.flips = torch.zeros(2, dtype=torch.bool, device=device)

    def step(self) -> None:
        """One step of every member on the rows and flips that are set."""
        patches = self.patches
        x = patches.input(self.role, self.at, self.flips, augment=True)
        target, ridge = patches.target[self.at], patches.ridge[self.at]
        teacher = self.maps.of(self.at, self.flips) if self.distils else []
        for member in self.members:
            own_target = target - ridge if member.arm.residual else target
            if not self.cuda:
                member.step(x, own_target, teacher, self.precision)
                continue
            member.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(member.stream):
                member.step(x, own_target, teacher, self.precision)
        if self.cuda:
            for member in self.members:
                torch.cuda.current_stream().wait_stream(member.stream)

    def prepare(self) -> None:
        """Record the CUDA graph; where that fails it is announced and left out.

        Raises BadInput where the batch does not fit into memory, naming one that does.
        """
        for member in self.members:
            member.network.train()
        try:
            self.step()
            if self.cuda and self.speed.graphs:
                self._record()
        except torch.OutOfMemoryError as error:
            self._refuse_batch(error)
        self.ready = True

    def _record(self) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP_STEPS):
                self.step()
        torch.cuda.current_stream().wait_stream(stream)
        for member in self.members:
            member.optimizer.zero_grad()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # what the steps took is needed for the graph
        pool = next((graph.pool() for graph in self.patches.graphs), None)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=pool):
                self.step()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0][:100]
            print(f"The CUDA graph failed ({reason}); steps run one by one.", flush=True)
            torch.cuda.synchronize()
            return
        self.graph = graph
        self.patches.graphs.add(graph)

    def _refuse_batch(self, error: Exception) -> None:
        whole, n = self.at, self.n_knees * PER_KNEE
        if len(self.members) > 1:
            problem = f"--together: {len(self.members)} networks do not fit into memory"
            raise BadInput(f"{problem}; use --together {len(self.members) // 2}.") from error

        def fits(n_knees: int) -> bool:
            self.at = whole[: n_knees * PER_KNEE]
            self.members[0].optimizer.zero_grad()
            if self.cuda:
                torch.cuda.empty_cache()
            try:
                self.step()
            except torch.OutOfMemoryError:
                return False
            return True

        n_knees = largest_fitting(fits, self.n_knees)
        remedy = "no batch fits, use --network native or compact"
        if n_knees:
            remedy = f"a batch of {n_knees * PER_KNEE} fits, use --knees {n_knees}"
        raise BadInput(f"--knees: a batch of {n} does not fit into memory; {remedy}.") from error

    def start(self, seed: int, k: int) -> None:
        """Initial weights and empty optimisers, in place."""
        for member in self.members:
            arm, rho = member.arm, np.zeros(4)
            member.load(member.built(seed).state_dict())
            for state in member.optimizer.state.values():
                for values in state.values():
                    values.zero_()
            if arm.role == "student":
                name = "residual" if arm.residual else "ct+cortex" if arm.cortex else "ct"
                rho = self.patches.data.rho[k, RHO_OF.index(name)]
            theta = 1 - np.sqrt((1 - rho) / (1 - rho + PER_KNEE * rho))
            member.theta.copy_(torch.from_numpy(theta))
            n = len(self.maps.maps) if self.maps else 0
            gammas = [arm.gamma * (not arm.last_stage or i == n - 1) for i in range(n)]
            member.gammas.zero_()[:n].copy_(torch.tensor(gammas))

    def train(
        self,
        seed: int,
        k: int,
        epochs: int,
        choices: Sequence[dict],
        finish: Callable[[], bool] = lambda: False,
    ) -> np.ndarray | None:
        """Train every member; the mean squared error of each epoch's batches (members, epochs).

        `choices` holds rate and warm_up of each member. `finish` is asked after every epoch; where
        it is true the training is given up (None). The weights are the running mean at the end.
        Arms of one seed and fold share initial weights, batches and flips.
        """
        if not self.ready:
            self.prepare()
        patches, rng = self.patches, np.random.default_rng([seed, k])
        self.start(seed * 1000 + k, k)
        torch.manual_seed(seed * 1000 + k)
        fit = patches.rows(k)[0]
        n_batches = len(epoch_batches(patches.data.knee_id, fit, self.n_knees, rng))
        current = [values for member in self.members for values in member.weights()]
        average, share = [v.clone() for v in current], 1 / (1 + EMA_EPOCHS * n_batches)
        n_steps = epochs * n_batches
        rates = [
            [choice["rate"] * schedule(i / n_steps, choice["warm_up"]) for choice in choices]
            for i in range(n_steps)
        ]
        rates = torch.tensor(rates, dtype=torch.float32, device=patches.device)
        curve = []
        for member in self.members:
            member.network.train()
        for epoch in range(epochs):
            batches = epoch_batches(patches.data.knee_id, fit, self.n_knees, rng)
            rows = torch.from_numpy(batches).to(patches.device)
            flips = torch.from_numpy(rng.random((len(batches), 2)) < 0.5).to(patches.device)
            for member in self.members:
                member.squared.zero_()
            for i in range(n_batches):
                for member, rate in zip(self.members, rates[epoch * n_batches + i], strict=True):
                    member.rate.copy_(rate)
                self.at.copy_(rows[i])
                self.flips.copy_(flips[i])
                if self.graph:
                    self.graph.replay()
                else:
                    self.step()
                first = epoch == i == 0
                with torch.no_grad():
                    torch._foreach_lerp_(average, current, 1.0 if first else share)
            curve.append([float(member.squared) / n_batches for member in self.members])
            if finish() and epoch + 1 < epochs:
                return None
        with torch.no_grad():
            torch._foreach_copy_(current, average)
        return np.transpose(curve)

    def outputs(self, member: Member, rows: np.ndarray, flips: tuple[bool, bool] = FLIPS[0]):
        """Portions of the rows: first position, prediction and maps; the last one is filled up."""
        member.network.eval()
        flips = torch.tensor(flips, device=self.patches.device)
        for start in range(0, len(rows), PORTION):
            portion = np.resize(rows[start : start + PORTION], PORTION)
            at = torch.from_numpy(portion).to(self.patches.device)
            x = member.own_input(self.patches.input(self.role, at, flips, augment=False))
            with torch.no_grad(), torch.autocast(**self.precision):
                yield start, member.network(x)

    def predict(self, member: Member, rows: np.ndarray) -> np.ndarray:
        """Biomarkers (n, 4) in their own units, within the range of training."""
        patches, found = self.patches, []
        for _, (prediction, _) in self.outputs(member, rows):
            found.append(prediction)
        found = torch.cat(found)[: len(rows)]
        if member.arm.residual:
            found = found + patches.ridge[torch.from_numpy(rows).to(found.device)]
        return patches.low + found.double().cpu().numpy().clip(0, 1) * patches.width


def schedule(done: float, warm_up: float) -> float:
    """Share of the largest learning rate: linear to it, then a cosine to 0."""
    if done < warm_up:
        return (done + 1e-3) / (warm_up + 1e-3)
    return 0.5 * (1 + math.cos(math.pi * (done - warm_up) / (1 - warm_up)))


def largest_fitting(fits: Callable[[int], bool], n_knees: int) -> int:
    """The largest of n / 2, n / 4, ... knees whose batch fits; 0 where none does."""
    while n_knees > 1:
        n_knees //= 2
        if fits(n_knees):
            return n_knees
    return 0
