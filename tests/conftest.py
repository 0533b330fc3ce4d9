"""What every test runs under."""

import os
import socket
from collections.abc import Iterator
from typing import Any

import pytest
import torch

# Models here are so small that a second thread only gets in the way.
torch.set_num_threads(1)

# tokenizers warns when a process that has used it is forked.
os.environ["TOKENIZERS_PARALLELISM"] = "false"


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
