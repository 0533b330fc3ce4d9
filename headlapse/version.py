"""The version of the package, as it was installed or as the clone's pyproject.toml says."""

import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def _read() -> str:
    pyproject = Path(__file__).resolve().parent.parent / "pyproject.toml"
    try:
        return version("headlapse")
    except PackageNotFoundError:
        return str(tomllib.loads(pyproject.read_text())["project"]["version"])


__version__ = _read()
