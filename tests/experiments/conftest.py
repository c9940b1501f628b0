"""Shared by the tests of experiments."""

from __future__ import annotations

import pytest

from tests import forked


@pytest.fixture
def forks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sweep's processes need not load torch."""
    monkeypatch.setattr("fedclip_flwr.experiments.sweep.get_context", lambda _: forked.CONTEXT)
