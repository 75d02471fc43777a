"""Training of one network at a time on patches that stay on the device, with torch and numpy.

Loss, batches and augmentation are those of ctsma.distillation, with these differences. Every batch
has the same shape: a part of a knee with fewer patches than `PER_KNEE` is filled with patches of
the same knee. The learning rate rises linearly and falls as a cosine. There are no validation
subjects. A step has fixed addresses, so that a CUDA graph can repeat it for every network.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch._dynamo
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

    @property
    def kind(self) -> tuple:
        """Arms of one kind share a network in memory, its compiled code and its CUDA graph."""
        return self.role, self.cortex, self.residual, self.gamma > 0


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
        # Memory that all CUDA graphs share: only one of them runs at a time
        self.pool = torch.cuda.graph_pool_handle() if device.startswith("cuda") else None
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

    def input(self, arm: Arm, rows: Tensor, flips: Tensor, augment: bool) -> Tensor:
        """Network input (B, channels, slices, rows, columns), flipped alike for CT and MR.

        rows (B,), flips (2,) bool are on the device. With `augment` a CT is that of another
        scanner, as `augment_ct` of ctsma.distillation.data.
        """
        if arm.role == "teacher":
            mean, sd = self.centre["mr"]
            channels = [(self._mr(rows) - mean) / sd, self.images["voi"][rows].float()]
        else:
            hu = self.images["ct"][rows].float()
            hu = (augmented(hu) if augment else hu).clamp(*HU_RANGE)
            mean, sd = self.centre["ct"]
            channels = [(hu - mean) / sd, self.images["region"][rows].float() / 4]
            if arm.cortex:
                cortex = self.cortical_hu[rows].view(-1, 1, 1, 1)
                channels.append(hu / (TRABECULAR_SHARE * cortex) - 1)
        x = torch.stack(channels, 1)
        for axis, flip in zip(FLIPPED, flips, strict=True):
            x = torch.where(flip, x.flip(axis), x)
        return x.contiguous(memory_format=torch.channels_last_3d)


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

    def fill(self, teacher: "Trainer", rows: np.ndarray, owner: tuple) -> None:
        """Compute the maps of the rows by the teacher, whose weights are final."""
        at = torch.from_numpy(rows).to(self.slot.device)
        self.slot[at] = torch.arange(len(rows), device=at.device)
        for code, flips in enumerate(FLIPS):
            for start, (_, maps) in teacher.outputs(rows, flips):
                n = min(PORTION, len(rows) - start)
                first = code * self.n_stored + start
                for kept, values in zip(self.maps, maps, strict=True):
                    kept[first : first + n].copy_(values[:n].movedim(1, -1))
        self.owner = owner

    def of(self, rows: Tensor, flips: Tensor) -> list[Tensor]:
        """Maps (B, C, ...) of flipped patches."""
        at = self.slot[rows] + self.n_stored * (2 * flips[0].long() + flips[1].long())
        return [maps[at].movedim(-1, 1) for maps in self.maps]


@dataclass(frozen=True)
class Speed:
    """How networks are run."""

    bfloat16: bool = True
    compiled: bool = True
    graphs: bool = True


class Trainer:
    """A network in memory that is trained again and again from new initial weights.

    Parameters
    ----------
    arm : any arm of the kind.
    n_knees : knees in a batch, 8 patches of each.
    maps : of the teacher, for distilled arms.
    """

    def __init__(
        self,
        arm: Arm,
        size: str,
        patches: Resident,
        n_knees: int,
        speed: Speed,
        maps: TeacherMaps | None = None,
    ):
        self.arm, self.size, self.patches, self.speed, self.maps = arm, size, patches, speed, maps
        device = patches.device
        self.cuda, self.graph, self.n_knees = device.startswith("cuda"), None, n_knees
        self.network = self._built(0).to(device, memory_format=torch.channels_last_3d)
        self.model = self.network
        if speed.compiled:
            torch._dynamo.config.recompile_limit = 64  # networks of all kinds share their code
            self.model = torch.compile(self.network, dynamic=False)
        self.rate = torch.zeros((), device=device)
        options = {"lr": self.rate, "weight_decay": WEIGHT_DECAY, "capturable": self.cuda}
        self.optimizer = torch.optim.AdamW(self.network.parameters(), fused=True, **options)
        self.at = torch.arange(n_knees * PER_KNEE, device=device) % len(patches.data.targets)
        self.flips = torch.zeros(2, dtype=torch.bool, device=device)
        self.theta = torch.zeros(4, device=device)
        self.gammas = torch.zeros(8, device=device)
        self.squared = torch.zeros((), device=device)
        self.ready = self.warm = False  # warm: its time no longer includes compilation

    def _built(self, seed: int) -> torch.nn.Module:
        channels = 3 if self.arm.cortex else 2
        return build(self.size, self.arm.role, channels, not self.arm.residual, seed)

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Prediction and maps in the chosen precision."""
        kind = self.patches.device.split(":")[0]
        with torch.autocast(kind, torch.bfloat16, enabled=self.speed.bfloat16):
            return self.model(x)

    def step(self) -> None:
        """One step on the rows and flips that are set: input, loss, gradient, weights."""
        patches = self.patches
        x = patches.input(self.arm, self.at, self.flips, augment=True)
        prediction, maps = self.forward(x)
        target = patches.target[self.at]
        if self.arm.residual:
            target = target - patches.ridge[self.at]
        error = (prediction - target).view(-1, PER_KNEE, 4)
        loss = knee_level_loss(error, self.theta)
        self.squared.add_(error.detach().square().mean())
        if self.maps:
            for i, teacher in enumerate(self.maps.of(self.at, self.flips)):
                loss = loss + self.gammas[i] * (maps[i].float() - teacher.float()).abs().mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    def prepare(self) -> None:
        """Compile, and record the CUDA graph; what fails is announced and left out.

        Raises BadInput where the batch does not fit into memory, naming one that does.
        """
        self.network.train()
        try:
            self.step()
        except torch.OutOfMemoryError as error:
            self._refuse_batch(error)
        except Exception as error:  # a compiler that is missing raises errors of many types
            if self.model is self.network:
                raise
            reason = str(error).strip().splitlines()[0][:100]
            print(f"torch.compile failed ({reason}); the network runs without it.", flush=True)
            self.model = self.network
            self.step()
        if self.cuda and self.speed.graphs:
            try:
                self._record()
            except RuntimeError as error:
                reason = str(error).strip().splitlines()[0][:100]
                print(f"The CUDA graph failed ({reason}); steps run one by one.", flush=True)
                torch.cuda.synchronize()
                self.graph = None
        self.ready = True

    def _record(self) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP_STEPS):
                self.step()
        torch.cuda.current_stream().wait_stream(stream)
        self.optimizer.zero_grad()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.patches.pool):
            self.step()
        self.graph = graph

    def _refuse_batch(self, error: Exception) -> None:
        whole = self.at

        def fits(n_knees: int) -> bool:
            self.at = whole[: n_knees * PER_KNEE]
            self.optimizer.zero_grad()
            torch.cuda.empty_cache()
            try:
                self.step()
            except torch.OutOfMemoryError:
                return False
            return True

        n_knees = largest_fitting(fits, self.n_knees)
        n = self.n_knees * PER_KNEE
        remedy = "no batch fits, use --network native or compact"
        if n_knees:
            remedy = f"a batch of {n_knees * PER_KNEE} fits, use --knees {n_knees}"
        raise BadInput(f"--knees: a batch of {n} does not fit into memory; {remedy}.") from error

    def start(self, seed: int, k: int) -> None:
        """Initial weights and an empty optimiser, in place."""
        self.load(self._built(seed).state_dict())
        for state in self.optimizer.state.values():
            for values in state.values():
                values.zero_()
        arm, rho = self.arm, np.zeros(4)
        if arm.role == "student":
            name = "residual" if arm.residual else "ct+cortex" if arm.cortex else "ct"
            rho = self.patches.data.rho[k, RHO_OF.index(name)]
        theta = 1 - np.sqrt((1 - rho) / (1 - rho + PER_KNEE * rho))
        self.theta.copy_(torch.from_numpy(theta))

    @torch.no_grad()
    def load(self, state: dict[str, Tensor]) -> None:
        """Copy weights into the network, in place."""
        for name, values in self.network.state_dict().items():
            values.copy_(state[name])

    def train(
        self,
        arm: Arm,
        seed: int,
        k: int,
        epochs: int,
        rate: float,
        warm_up: float,
        finish: Callable[[], bool] = lambda: False,
    ) -> list[float] | None:
        """Train one network; the mean squared error of each epoch's batches.

        `finish` is asked after every epoch; where it is true the training is given up (None). The
        weights are the running mean at the end. Arms of one seed and fold share initial weights,
        batches and flips.
        """
        if not self.ready:
            self.prepare()
        patches, rng = self.patches, np.random.default_rng([seed, k])
        self.arm = arm
        self.start(seed * 1000 + k, k)
        torch.manual_seed(seed * 1000 + k)
        n_maps = len(self.maps.maps) if self.maps else 0
        gammas = [arm.gamma * (not arm.last_stage or i == n_maps - 1) for i in range(n_maps)]
        self.gammas.zero_()[:n_maps].copy_(torch.tensor(gammas))
        fit = patches.rows(k)[0]
        n_batches = len(epoch_batches(patches.data.knee_id, fit, self.n_knees, rng))
        current = [v for v in self.network.state_dict().values() if v.is_floating_point()]
        average, share = [v.clone() for v in current], 1 / (1 + EMA_EPOCHS * n_batches)
        rates = torch.tensor(
            [rate * schedule(i / (epochs * n_batches), warm_up) for i in range(epochs * n_batches)],
            device=patches.device,
        )
        curve = []
        self.network.train()
        for epoch in range(epochs):
            batches = epoch_batches(patches.data.knee_id, fit, self.n_knees, rng)
            rows = torch.from_numpy(batches).to(patches.device)
            flips = torch.from_numpy(rng.random((len(batches), 2)) < 0.5).to(patches.device)
            self.squared.zero_()
            for i in range(len(batches)):
                self.rate.copy_(rates[epoch * n_batches + i])
                self.at.copy_(rows[i])
                self.flips.copy_(flips[i])
                if self.graph:
                    self.graph.replay()
                else:
                    self.step()
                first = epoch == i == 0
                with torch.no_grad():
                    torch._foreach_lerp_(average, current, 1.0 if first else share)
            curve.append(float(self.squared) / n_batches)
            if finish() and epoch + 1 < epochs:
                return None
        with torch.no_grad():
            torch._foreach_copy_(current, average)
        return curve

    def outputs(self, rows: np.ndarray, flips: tuple[bool, bool] = FLIPS[0]):
        """Portions of the rows: first position, prediction and maps; the last one is filled up."""
        self.network.eval()
        flips = torch.tensor(flips, device=self.patches.device)
        for start in range(0, len(rows), PORTION):
            portion = np.resize(rows[start : start + PORTION], PORTION)
            at = torch.from_numpy(portion).to(self.patches.device)
            with torch.no_grad():
                yield start, self.forward(self.patches.input(self.arm, at, flips, augment=False))

    def predict(self, rows: np.ndarray) -> np.ndarray:
        """Biomarkers (n, 4) in their own units, within the range of training."""
        patches = self.patches
        found = torch.cat([prediction for _, (prediction, _) in self.outputs(rows)])[: len(rows)]
        if self.arm.residual:
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
