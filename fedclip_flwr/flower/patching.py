"""Functions of Flower, replaced where it has no hook for it."""

from __future__ import annotations

from typing import Any


def replace(module: Any, **functions: Any) -> None:
    """Replace functions of a module or class; raise if it no longer has one of them."""
    for name, function in functions.items():
        getattr(module, name)
        setattr(module, name, function)
