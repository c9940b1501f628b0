"""Files that can't be read for a while."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from fedclip_flwr.base import files

EVER = 10**9


def failing(
    monkeypatch: pytest.MonkeyPatch, name: str, error: Exception, *, after: int = 0, times: int = EVER
) -> list[str]:
    """From now on files of that name can't be opened so often, once they were opened `after` times; all the tries."""
    monkeypatch.setattr(files, "PAUSE", 0.0)
    tries: list[str] = []
    open_file = os.open

    def tried(path: Any, *how: Any, **more: Any) -> int:
        if Path(path).name == name:
            tries.append(str(path))
            if after < len(tries) <= after + times:
                raise error
        return open_file(path, *how, **more)

    monkeypatch.setattr(os, "open", tried)
    return tries
