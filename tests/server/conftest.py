"""No test of the loop depends on how busy the machine is."""

from __future__ import annotations

import pytest

from fedclip_flwr.server import nodes, waiting
from tests.server.running import Clock


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    for module in (nodes, waiting):
        monkeypatch.setattr(module, "time", clock)
    return clock
