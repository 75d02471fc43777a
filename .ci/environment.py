"""Print environment.yml for conda users, generated from pyproject.toml (the one source of dependencies)."""

import re
import tomllib
from pathlib import Path

CONDA_NAMES = {"torch": "pytorch"}  # where conda-forge's name differs from the Python package's


def environment() -> str:
    """The text of environment.yml: the project's dependencies under conda-forge's names, and the package itself."""
    project = tomllib.loads(Path(__file__).parents[1].joinpath("pyproject.toml").read_text())["project"]
    requirements = [conda(r) for r in project["dependencies"] + project["optional-dependencies"]["test"]]
    lines = [f"python{project['requires-python']}", "pip", *sorted(requirements, key=str.lower)]
    listed = "\n".join(f"  - {line}" for line in lines)
    head = f"# Generated from pyproject.toml by: make environment.yml\nname: {project['name']}\n"
    return f"{head}channels:\n  - conda-forge\ndependencies:\n{listed}\n  - pip:\n      - --no-deps -e ./\n"


def conda(requirement: str) -> str:
    name, bounds = re.fullmatch(r"([A-Za-z0-9_-]+)(.*)", requirement).groups()
    return CONDA_NAMES.get(name, name.lower()) + bounds


if __name__ == "__main__":
    print(environment(), end="")
