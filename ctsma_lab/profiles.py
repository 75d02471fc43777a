"""The profiles of a run, with the minutes that one was measured to take."""

import json
from pathlib import Path

import yaml

from ctsma.files import SHARE

RUN_TIMES = SHARE / "docs" / "results" / "run_times.json"  # of benchmarks/run_times.py


def profiles() -> dict[str, dict]:
    """The profiles of profiles.yaml by name: about, minutes, disk_gb, parameters.

    `minutes` by stage are those of a finished run on two cores; empty where none was measured.
    """
    found = yaml.safe_load(Path(__file__).with_name("profiles.yaml").read_text(encoding="utf-8"))
    times = json.loads(RUN_TIMES.read_text(encoding="utf-8")) if RUN_TIMES.exists() else {}
    for name, profile in found.items():
        profile["minutes"] = times.get(name, {}).get("minutes", {})
    return found
