"""What every test runs under."""

import gc
import os
import socket
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from packaging.version import Version

from tests import shapes

# Models here are so small that a second thread only gets in the way.  Torch is not imported yet, and never where tests
# are only handed out to workers; processes that tests start inherit this too.
os.environ["OMP_NUM_THREADS"] = "1"

# tokenizers warns when a process that has used it is forked.
os.environ["TOKENIZERS_PARALLELISM"] = "false"

# The garbage collector starts at every 700 objects, of which imports, figures and tables make millions.
gc.set_threshold(20_000, 20, 20)

ENGINE = Path(__file__).parent.parent / "engine"

SHAPED = [
    ".".join(("headlapse", *path.relative_to(ENGINE.parent).with_suffix("").parts))
    for path in sorted(ENGINE.rglob("*.py"))
    if "from jaxtyping import" in path.read_text(encoding="utf-8")
]
"""Modules whose functions have the shapes of their arrays checked at each call.  The others have none, and checking
what mypy has checked already would take a tenth of the time of all tests."""

shapes.install(SHAPED, "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))")


CHECKED = {"neox-parallel": "denoise", "llama-gqa": "noise"}
"""Architecture → direction in which `make check` runs the laws of every architecture; between them parallel and
sequential blocks, with and without grouped queries, layer and RMS norms."""


def pytest_configure(config: pytest.Config) -> None:
    """Older clients of the hub leave sockets of other threads to the garbage collector, in whatever test that comes."""
    if Version(version("huggingface_hub")) < Version("1.33"):
        unclosed = "Exception ignored in. <conftest.offline:pytest.PytestUnraisableExceptionWarning"
        config.addinivalue_line("filterwarnings", f"default:{unclosed}")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Laws on further architectures, or in the other direction, are slow."""
    architectures = getattr(sys.modules.get("tests.models"), "CONFIGS", {})
    for item in items:
        parameters = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
        name = parameters.get("name")
        if isinstance(name, str) and name in architectures:
            checked = CHECKED.get(name)
            if checked is None or parameters.get("direction", checked) != checked:
                item.add_marker("slow")


def pytest_collection_finish() -> None:
    """What is imported stays to the end: the garbage collector need not look through a million objects each time."""
    gc.freeze()


SEED = 7
"""Of the runs that are verified, in tests: so that whole stores can be compared."""


@pytest.fixture(autouse=True, scope="session")
def same_seed() -> Iterator[None]:
    """Every patched run that a test makes verifies the same runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("headlapse.engine.store.patched_run.new_seed", lambda: SEED)
        yield


@pytest.fixture(autouse=True, scope="session")
def no_waiting_for_the_disk() -> Iterator[None]:
    """No machine loses its power under tests; those of a power cut record what would be lost, whoever waits."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _handle: None)
        yield


@pytest.fixture(autouse=True, scope="session")
def offline() -> Iterator[None]:
    """Tests talk to this machine only: whatever else a test tries to reach fails at once, whoever swallows errors."""
    tried: list[str] = []

    class Loopback(socket.socket):
        def connect(self, address: Any) -> None:
            self._check(address)
            super().connect(address)

        def connect_ex(self, address: Any) -> int:
            self._check(address)
            return super().connect_ex(address)

        def _check(self, address: Any) -> None:
            if self.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "::1", "localhost"):
                tried.append(str(address))
                raise OSError(f"a test tried to reach {address}")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket, "socket", Loopback)
        yield
    assert not tried, f"tests tried to reach {tried}"
