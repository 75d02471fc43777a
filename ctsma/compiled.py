"""Functions compiled by numba, with a cache that can always be written."""

import atexit
import os
import shutil
import tempfile
from collections.abc import Callable

from numba import config, njit


def compiled(**options: object) -> Callable:
    """`numba.njit` as a decorator, with `options`; the machine code is kept on disk.

    numba keeps it beside the source or in the user's cache folder. Where neither can be written, as
    in a container run by another user, it goes to a temporary folder that ends with the process.
    """

    def decorate(function: Callable) -> Callable:
        try:
            return njit(cache=True, **options)(function)
        except RuntimeError:  # numba found no folder; worker processes inherit this one
            folder = tempfile.mkdtemp(prefix="ctsma-numba-")
            atexit.register(shutil.rmtree, folder, ignore_errors=True)
            os.environ["NUMBA_CACHE_DIR"] = config.CACHE_DIR = folder
            return njit(cache=True, **options)(function)

    return decorate
