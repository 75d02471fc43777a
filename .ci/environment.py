"""Print environment.yml for conda users, generated from pyproject.toml."""

import re
import tomllib
from pathlib import Path

PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"
CONDA_NAMES = {"torch": "pytorch"}  # where conda-forge's name differs from the Python package's
HEAD = """# Generated from pyproject.toml by: make environment.yml
name: {name}
channels:
  - conda-forge
dependencies:
"""
TAIL = """  - pip:
      - --no-deps -e ./
"""


def environment() -> str:
    """The text of environment.yml: dependencies under conda-forge's names, and the package."""
    project = tomllib.loads(PYPROJECT.read_text())["project"]
    wanted = project["dependencies"] + project["optional-dependencies"]["test"]
    requirements = sorted((conda(requirement) for requirement in wanted), key=str.lower)
    lines = [f"python{project['requires-python']}", "pip", *requirements]
    return HEAD.format(name=project["name"]) + "".join(f"  - {x}\n" for x in lines) + TAIL


def conda(requirement: str) -> str:
    """A requirement under conda-forge's name."""
    name, bounds = re.fullmatch(r"([A-Za-z0-9_-]+)(.*)", requirement).groups()
    return CONDA_NAMES.get(name, name.lower()) + bounds


if __name__ == "__main__":
    print(environment(), end="")
