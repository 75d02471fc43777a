"""What every command shares at the terminal: checks of its arguments, and lines of progress."""

import argparse
import sys

from tqdm import tqdm

from ctsma.common import InputError

LIMITS = {  # of whole numbers, by attribute: option, lowest, highest
    "jobs": ("--jobs", 1, 1024),
    "n_jobs": ("--jobs", 1, 1024),
    "knees": ("--knees", 1, 9999),
    "rescans": ("--rescans", 0, 9999),
    "seed": ("--seed", 0, 2**32 - 1),
}


def check_arguments(arguments: argparse.Namespace) -> None:
    """InputError for a number out of its range, and for a name that SimpleITK cannot open."""
    for name, value in vars(arguments).items():
        if name in LIMITS and value is not None:
            option, low, high = LIMITS[name]
            if not low <= value <= high:
                problem = f"is not between {low} and {high}"
                raise InputError(f"{option} {value}", problem, "give a number in this range")
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and not _is_unicode(text):
                shown = text.encode("utf-8", "backslashreplace").decode()
                raise InputError(shown, "is not UTF-8", "rename the file or folder")


def _is_unicode(text: str) -> bool:
    """False for a file name whose bytes are not UTF-8: SimpleITK ends the process at one."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


class Progress:
    """Shows lines of progress: a bar for counted ones on a terminal, else plain lines."""

    def __enter__(self):
        self.bar = None
        return self

    def __exit__(self, *error):
        if self.bar is not None:
            self.bar.close()

    def __call__(self, line: str, done: int = 0, total: int = 0) -> None:
        if not sys.stderr.isatty():
            print(line, flush=True)
            return
        if self.bar is None:
            self.bar = tqdm(total=1, bar_format="{bar:30} {desc}", leave=False)
        if total:
            self.bar.total, self.bar.n = total, done
            self.bar.set_description_str(line.strip())
        else:
            self.bar.write(line)
