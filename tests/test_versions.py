"""Releases of other libraries cannot break the commands: every version is pinned, and foreign deprecations pass."""

import re
import tomllib
import types
import warnings
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DECLARED = [
    Requirement(line)
    for line in (
        *PROJECT["dependencies"],
        *PROJECT["optional-dependencies"]["test"],
        *PROJECT["optional-dependencies"]["lint"],
    )
]
PYTHONS = ("3.11", "3.12", "3.13")


def pinned(name: str, python: str) -> dict[str, str]:
    """Package to version, of the lines that hold for this Python on this machine."""
    environment = default_environment() | {"python_version": python, "python_full_version": f"{python}.0"}
    lines = [Requirement(line) for line in (ROOT / name).read_text().splitlines() if not line.startswith("#")]
    here = [line for line in lines if line.marker is None or line.marker.evaluate(environment)]
    versions = {canonicalize_name(line.name): str(line.specifier).removeprefix("==") for line in here}
    assert len(versions) == len(here), "a package is pinned twice"
    return versions


def needed_by(requirement: Requirement, pins: dict[str, str], seen: set[tuple[str, str]]) -> set[str]:
    """The package and all that it needs, as far as what is installed is what is pinned."""
    wanted = set()
    for extra in ("", *requirement.extras):
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        name = canonicalize_name(requirement.name)
        wanted.add(name)
        if (name, extra) in seen:
            continue
        seen.add((name, extra))
        try:
            lines = requires(name) or [] if version(name).partition("+")[0] == pins.get(name) else []
        except PackageNotFoundError:
            continue
        for inner in map(Requirement, lines):
            if inner.marker is None or inner.marker.evaluate({"extra": extra}):
                wanted |= needed_by(Requirement(re.sub(r";.*", "", str(inner))), pins, seen)
    return wanted


@pytest.mark.parametrize("python", PYTHONS)
def test_all_that_make_installs_is_pinned(python: str) -> None:
    pins, seen = pinned("constraints.txt", python), set[tuple[str, str]]()
    names = {name for requirement in DECLARED for name in needed_by(requirement, pins, seen)}
    assert names <= pins.keys(), "run `make constraints`"


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("name", ["constraints.txt", "constraints-oldest.txt"])
def test_what_is_pinned_lies_within_the_ranges(name: str, python: str) -> None:
    versions = pinned(name, python)
    for requirement in DECLARED:
        if (pin := versions.get(canonicalize_name(requirement.name))) is not None:
            assert requirement.specifier.contains(pin), requirement


def test_the_oldest_versions_are_the_lower_bounds() -> None:
    versions = pinned("constraints-oldest.txt", "3.11")
    for requirement in map(Requirement, PROJECT["dependencies"]):
        (lowest,) = (bound.version for bound in requirement.specifier if bound.operator == ">=")
        pin = versions[canonicalize_name(requirement.name)]
        # PyPI's older torch for Linux is a CUDA build of several GB.
        assert requirement.name == "torch" or (pin + ".0").startswith(lowest + "."), f"{requirement}: oldest is {pin}"


def warn_as(module: str, category: type[Warning], message: str = "old") -> None:
    """A warning that is put down to `module`."""
    code = "import warnings; warnings.warn(message, category)"
    exec(code, types.ModuleType(module).__dict__ | {"message": message, "category": category})


@pytest.mark.parametrize("category", [DeprecationWarning, PendingDeprecationWarning, FutureWarning])
def test_deprecations_are_errors_where_our_own_calls_cause_them(category: type[Warning]) -> None:
    for module in ("headlapse.engine.replay.run", "test_replay", "tests.models", "conftest", "__main__"):
        with pytest.raises(category):
            warn_as(module, category)
    with pytest.raises(FutureWarning):  # called by us, through torch or a decorator of transformers
        warn_as("torch.nn.modules.module", FutureWarning)
    with pytest.raises(FutureWarning):
        warn_as("transformers.utils.generic", FutureWarning)


@pytest.mark.parametrize("category", [DeprecationWarning, PendingDeprecationWarning, FutureWarning, UserWarning])
def test_deprecations_among_libraries_pass(category: type[Warning]) -> None:
    with warnings.catch_warnings(record=True) as caught:
        for module in ("transformers.models.gpt2.modeling_gpt2", "testlib", "zarr.core"):
            warn_as(module, category, "x\nis deprecated")
    assert len(caught) == 3


@pytest.mark.parametrize("category", [UserWarning, RuntimeWarning, ResourceWarning])
def test_all_other_warnings_are_errors(category: type[Warning]) -> None:
    with pytest.raises(category):
        warn_as("numpy._core", category)
