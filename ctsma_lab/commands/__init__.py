"""Commands of the command line that run, list and show runs of the study."""

from pathlib import Path

from ctsma.common import InputError


def run_folder(name: str) -> Path:
    """The folder runs/<name>; InputError for a name that leads elsewhere."""
    if Path(name).name != name or name in ("", "."):
        problem = "is not the name of one folder below runs/"
        raise InputError(f"--name {name}", problem, "give a name without / and ..")
    return Path("runs") / name
