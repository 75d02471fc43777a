"""Independent tasks by joblib, one thread each; `joblib.parallel_config` outside says where."""

import errno
import platform
import sys
from collections.abc import Callable, Iterable, Iterator

import joblib
import SimpleITK as sitk
from threadpoolctl import threadpool_limits

from ctsma.common import InputError


def run_tasks(
    function: Callable, arguments: Iterable[tuple], n_jobs: int = 1, ordered: bool = True
) -> Iterator:
    """Yield `function(*own)` for each tuple of `arguments`.

    Parameters
    ----------
    n_jobs : processes on this machine. A cluster of `joblib.parallel_config` uses all its workers.
    ordered : in the order of `arguments`; otherwise each result as soon as it is there.

    Raises InputError where a disk is full, with the name of the machine. Large arrays are sent once
    where they are arguments themselves and not parts of one.
    """
    tasks = [joblib.delayed(_with_one_thread)(function, *own) for own in arguments]
    return_as = "generator" if ordered else "generator_unordered"
    # All at once: a worker that joins a cluster later finds tasks that wait.
    return joblib.Parallel(n_jobs, pre_dispatch="all", return_as=return_as)(tasks)


def _with_one_thread(function: Callable, *arguments: object) -> object:
    """More threads would change the last bits and compete with other tasks."""
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(1)
    with threadpool_limits(1), joblib.parallel_config(backend="sequential"):
        try:
            return function(*arguments)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            problem = f"cannot be written, as the disk of {platform.node()} is full"
            raise InputError(
                error.filename or "file", problem, "free space, run it again"
            ) from error
