"""Work on a Dask cluster in place of the processes of this machine, chosen by its address."""

import importlib.util
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import joblib

from ctsma import cache
from ctsma.common import InputError
from ctsma.files import versions, write_text

ADDRESS = "CTSMA_DASK"  # environment variable by which notebooks learn the scheduler's address
WAIT_SECONDS = 30  # for the scheduler and a first worker; design choice
CODE = ("ctsma_lab.run", "ctsma.distillation", "ctsma.diagnosis", "ctsma_predict", "kneesim")
START_AGAIN = "start the workers again from the driver's environment, and give the command again"


@contextmanager
def on_cluster(address: str | None, folder: str | Path) -> Iterator[object]:
    """Run joblib's tasks inside the block on the cluster of a scheduler, "tcp://host:port".

    Without an address they stay on this machine. Notebooks that are started in the block follow it
    (`Run.open`). `folder` must be on a file system that driver and workers share. Gives the
    `distributed.Client`, or None. Raises InputError as `connect`.
    """
    if not address:
        yield None
        return
    with connect(address, folder) as client, joblib.parallel_config(backend_of(client)):
        os.environ[ADDRESS] = address
        try:
            yield client
        finally:
            del os.environ[ADDRESS]


def backend_of(client: object) -> object:
    """joblib's Dask backend, for `joblib.parallel_config`, also on a cluster that has one worker.

    joblib would run all tasks in the driver then, and workers that join later would do nothing.
    """
    from joblib._dask import DaskDistributedBackend

    class Backend(DaskDistributedBackend):
        def effective_n_jobs(self, n_jobs: int) -> int:
            return max(2, super().effective_n_jobs(n_jobs))

    return Backend(client=client)


def connect(address: str, folder: str | Path) -> object:
    """A `distributed.Client` of a cluster that can do this work.

    Raises InputError: dask is not installed, no scheduler or no worker answers, a worker has
    another version of ctsma, Python or a package, more than one thread, or does not see `folder`.
    """
    source = f"--dask {address}"
    if importlib.util.find_spec("distributed") is None:
        raise InputError(
            source, "needs dask, which is not installed", 'pip install "ctsma[cluster]"'
        )
    import distributed

    try:
        client = distributed.Client(address, timeout=WAIT_SECONDS, set_as_default=False)
        client.wait_for_workers(1, timeout=WAIT_SECONDS)
    except (OSError, ValueError) as error:
        problem = f"has no scheduler or no worker that answers within {WAIT_SECONDS} s"
        remedy = "start them (docs/cluster.md) or correct the address"
        raise InputError(source, problem, remedy) from error
    try:
        _check_workers(client, source, Path(folder))
    except BaseException:
        client.close()
        raise
    return client


def _check_workers(client: object, source: str, folder: Path) -> None:
    token, marker = uuid.uuid4().hex, folder.resolve() / ".cluster-check"
    write_text(marker, token)
    try:
        found = client.run(describe_worker, str(marker))
    except ImportError as error:
        raise InputError(source, f"has workers without ctsma ({error})", START_AGAIN) from error
    finally:
        marker.unlink()
    here, threads = describe(), client.nthreads()
    for worker, there in found.items():
        if odd := [
            name for name, version in here.items() if there["versions"].get(name) != version
        ]:
            name = odd[0]
            problem = f"has a worker {worker} with {name} {there['versions'].get(name)}"
            raise InputError(source, f"{problem}, not {here[name]}", START_AGAIN)
        if there["marker"] != token:
            problem = f"has a worker {worker} that does not see this folder"
            raise InputError(folder, f"{source} {problem}", "put it on a shared file system")
        if threads[worker] != 1:
            problem = f"has a worker {worker} with {threads[worker]} threads"
            raise InputError(source, problem, "start workers with --nthreads 1")


def describe() -> dict[str, str]:
    """Versions of Python and packages, and a hash of the project's own code."""
    code = cache.content_hash([cache.source_sha256(module) for module in CODE])
    return versions() | {"ctsma": code[:12]}


def describe_worker(marker: str) -> dict:
    """What a worker says of itself: its versions, and what it reads in the marker file."""
    file = Path(marker)
    return {"versions": describe(), "marker": file.read_text("utf-8") if file.exists() else None}
