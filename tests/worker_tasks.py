"""Tasks for worker processes. A worker imports the module of its task: this one imports little."""

import os
import time
from pathlib import Path


def square(knee, folder):
    """Counts its calls; the first time, knee K1 ends its process if the folder says so."""
    with (Path(folder) / "calls.txt").open("a") as stream:
        stream.write(knee["knee_id"] + "\n")
    deadly = Path(folder) / "deadly.txt"
    if knee["knee_id"] == "K1" and deadly.exists():
        deadly.unlink()
        os._exit(9)
    return {"value": int(knee["knee_id"][1:]) ** 2}


def die_once(knee, folder):
    """The first time, the second knee ends its whole process."""
    mark = Path(folder) / "died.txt"
    if knee["knee_id"] == "K1" and not mark.exists():
        mark.write_text("")
        os._exit(9)
    return {"value": 1}


def fill_disk(knee, folder):
    """Writes to a device that is always full, as a disk is for every knee after the first."""
    if knee["knee_id"] != "K0":
        Path("/dev/full").write_text("bone")
    return {"value": 1}


def worker_of(seconds):
    time.sleep(seconds)
    return os.getpid()
