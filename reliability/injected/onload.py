"""Changes modules as soon as they are loaded, whoever loads them."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType


class Finder(importlib.abc.MetaPathFinder):
    def __init__(self, changes: Mapping[str, Callable[[ModuleType], None]]) -> None:
        self._changes = changes

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        change = self._changes.get(name)
        spec = importlib.machinery.PathFinder.find_spec(name, path) if change else None
        if change and spec and spec.loader:
            load = spec.loader.exec_module

            def loaded(module: ModuleType) -> None:
                load(module)
                change(module)

            spec.loader.exec_module = loaded  # type: ignore[method-assign]
        return spec


def change(changes: Mapping[str, Callable[[ModuleType], None]]) -> None:
    """From now on each of these modules is changed so."""
    sys.meta_path.insert(0, Finder(changes))
