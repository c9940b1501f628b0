"""Tests of the wing `flower`, on the line of Flower that is installed."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from fedclip_flwr.flower import lines

parts: Any = import_module(f"tests.flower.parts_{lines.line().name}")
"""That line's own parts of Flower."""
