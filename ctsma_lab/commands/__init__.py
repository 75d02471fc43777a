"""Commands of the command line that run, list and show runs of the study."""

from pathlib import Path, PureWindowsPath

from ctsma.common import InputError


def run_folder(name: str) -> Path:
    """The folder runs/<name>; InputError for a name that leads elsewhere."""
    # A backslash or a drive leads elsewhere on Windows, and a run may be moved there.
    if PureWindowsPath(name).name != name or name in ("", ".", ".."):
        problem = "is not the name of one folder below runs/"
        raise InputError(f"--name {name}", problem, "give a name without / and ..")
    return Path("runs") / name
