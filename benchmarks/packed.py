"""The packed file of patches: its layout, how it is written and read. Needs numpy alone.

The file is an `npz` archive compressed by xz, of n patches and k folds:

- `mr` (n, 12, 48, 48) 8 bit, with `mr_low` and `mr_high` (n,): value = low + q / 255 (high - low);
- `ct` (n, 12, 24, 24) HU, 16 bit; `voi`: the trabecular region (n, 12, 48, 48) as packed bits;
- `targets` (n, 4): the MR reference; `cortical_hu`, `knee_id`, `subject_id`, `patch_id`, `fold`,
  each (n,);
- `ridge` (k, n, 4): the calibrated ridge by generalised least squares of the training subjects of
  each fold, for every patch;
- `rho` (k, 3, 4): correlation of the errors of a knee's patches, for each of `RHO_OF`;
- `about`: schema version, SHA-256 of simulation protocol and split, and where the file is from.
"""

import hashlib
import io
import json
import lzma
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy import ndarray

SCHEMA = 1  # raise it with any change of the layout
BIOMARKERS = ("bv_tv", "tb_th_mm", "tb_sp_mm", "tb_n_per_mm")
# The network whose errors `rho` describes: without ridge, on CT or calibrated CT; with the ridge
RHO_OF = ("ct", "ct+cortex", "residual")
MARROW_PERCENTILE = 95  # as `relative_mr` of ctsma.distillation.data
MR_SHAPE = (12, 48, 48)
BAD_INPUT = 2  # exit code


class BadInput(Exception):
    """A problem of the input or the machine, said in one sentence."""


def run_main(main: Callable[[], None]) -> None:
    """Run a script; a `BadInput` becomes its sentence and exit code 2."""
    try:
        main()
    except BadInput as problem:
        print(problem, flush=True)
        raise SystemExit(BAD_INPUT) from None


def write_json(path: Path, content: dict) -> None:
    """Write JSON; NaN and infinity become null."""
    path.write_text(json.dumps(_finite(content), indent=1) + "\n", encoding="utf-8")


def _finite(value: object) -> object:
    if isinstance(value, dict):
        return {name: _finite(entry) for name, entry in value.items()}
    if isinstance(value, list):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value


@dataclass(frozen=True)
class Packed:
    """What a packed file holds, see the module."""

    mr: ndarray
    mr_low: ndarray
    mr_high: ndarray
    ct: ndarray
    voi: ndarray  # (n, 12, 48, 48) bool
    targets: ndarray
    cortical_hu: ndarray
    knee_id: ndarray
    subject_id: ndarray
    patch_id: ndarray
    fold: ndarray
    ridge: ndarray
    rho: ndarray
    about: dict

    @property
    def n_folds(self) -> int:
        """Number of folds."""
        return len(self.ridge)

    def images_sha256(self) -> str:
        """SHA-256 of images, regions, knees and folds; patches packed again have the same."""
        digest = hashlib.sha256()
        for values in (self.mr, self.ct, np.packbits(self.voi), self.fold):
            digest.update(np.ascontiguousarray(values).tobytes())
        digest.update("\n".join(map(str, self.knee_id)).encode())
        return digest.hexdigest()

    def relative_mr(self) -> tuple[ndarray, ndarray]:
        """a, b (n,) of MR relative to its bright marrow: a + b q."""
        step = (self.mr_high - self.mr_low) / 255
        pairs = zip(self.mr, self.voi, strict=True)
        marrow = [np.percentile(q[v] if v.any() else q, MARROW_PERCENTILE) for q, v in pairs]
        bright = np.maximum(self.mr_low + step * marrow, 1e-6)
        return (self.mr_low / bright).astype(np.float32), (step / bright).astype(np.float32)


def quantised(mr: ndarray) -> dict[str, ndarray]:
    """MR (n, ...) as 8 bit, with the least and largest value of each patch."""
    axes = tuple(range(1, mr.ndim))
    low, high = (f(mr, axes).astype(np.float32) for f in (np.min, np.max))
    shape = (-1, *[1] * (mr.ndim - 1))
    width = np.maximum(high - low, 1e-6).reshape(shape)
    grey = np.rint(255 * (mr - low.reshape(shape)) / width).astype(np.uint8)
    return {"mr": grey, "mr_low": low, "mr_high": high}


def dequantised(grey: ndarray, low: ndarray, high: ndarray) -> ndarray:
    """The values behind `quantised`, float32."""
    low, high = (v.reshape(-1, *[1] * (grey.ndim - 1)) for v in (low, high))
    return low + grey / np.float32(255) * (high - low)


def split_hash(subject_id: ndarray, fold: ndarray) -> str:
    """SHA-256 of the fold of every subject."""
    pairs = sorted({f"{subject},{k}" for subject, k in zip(subject_id, fold, strict=True)})
    return hashlib.sha256("\n".join(pairs).encode()).hexdigest()


def packed_bytes(arrays: dict[str, ndarray], about: dict) -> bytes:
    """A packed file; `arrays` are the fields of `Packed`, `about` what is known of the source."""
    split = split_hash(arrays["subject_id"], arrays["fold"])
    about = about | {"schema": SCHEMA, "split_sha256": split}
    stored = arrays | {"voi": np.packbits(arrays["voi"]), "about": np.array(json.dumps(about))}
    stream = io.BytesIO()
    np.savez(stream, **stored)
    return lzma.compress(stream.getvalue())


def read_packed(path: str | Path) -> Packed:
    """Read a packed file and check it.

    Raises BadInput where it is missing, damaged, of another schema, or its split is not the one
    that it names.
    """
    path = Path(path)
    if not path.is_file():
        raise BadInput(f"{path}: does not exist; give a file of pack_patches.py.")
    damaged = BadInput(f"{path}: is damaged or no packed file; pack or copy it again.")
    try:
        with np.load(io.BytesIO(lzma.decompress(path.read_bytes()))) as stored:
            found = {name: stored[name] for name in stored.files}
        about = json.loads(str(found.pop("about")))
    except (lzma.LZMAError, zipfile.BadZipFile, EOFError, OSError, KeyError, ValueError) as error:
        raise damaged from error
    if about.get("schema") != SCHEMA:
        seen = about.get("schema")
        raise BadInput(f"{path}: has schema {seen}, expected {SCHEMA}; pack the patches again.")
    if set(found) | {"about"} != set(Packed.__dataclass_fields__):
        raise damaged
    shape = (len(found["targets"]), *MR_SHAPE)
    bits = np.unpackbits(found["voi"], count=int(np.prod(shape)))
    packed = Packed(**found | {"voi": bits.reshape(shape).astype(bool), "about": about})
    if split_hash(packed.subject_id, packed.fold) != about["split_sha256"]:
        raise BadInput(f"{path}: holds another split than it names; pack the patches again.")
    return packed
