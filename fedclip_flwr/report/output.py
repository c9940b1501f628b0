"""The files of a report: where they may go, and how they are written."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from fedclip_flwr.base import UserError, files
from fedclip_flwr.runs import Run, history
from fedclip_flwr.runs.history import PAGE

if TYPE_CHECKING:
    from fedclip_flwr.report.drawing import Plot

Figures = Mapping[str, tuple["Plot", str]]
"""Plots by name, each with its SVG for the page."""
PLOTS, FILE = "plots", "held_out.json"
MARK = b"fedclip report</title>"
"""Identifies a page as a report."""


def check_out(folder: Path, *own: Run) -> None:
    """Raises if the folder holds another run, whose report would be lost, or files that are not a report."""
    if not folder.is_dir() or folder.resolve() in [run.path.resolve() for run in own]:
        return
    if (folder / history.SETTINGS).exists():
        raise UserError(f"--out {folder}: a run is there, whose own report would be lost; name another folder")
    others = [name for name in sorted(os.listdir(folder)) if name not in (PAGE, PLOTS, FILE) and name[0] != "."]
    if (folder / PAGE).exists() and not ((folder / PAGE).is_file() and MARK in (folder / PAGE).read_bytes()):
        others.insert(0, PAGE)
    if others:
        raise UserError(f"--out {folder}: something else is there, such as {others[0]}; name another folder")


def write_plots(made: list[Plot], folder: Path) -> Figures:
    """Writes each plot as SVG and PNG. Returns by name each plot with its SVG for the page."""
    from fedclip_flwr.report import drawing  # brings matplotlib

    figures = {}
    for plot in made:
        svg = drawing.as_svg(plot)
        write_file(folder / PLOTS / f"{plot.name}.svg", svg)
        write_file(folder / PLOTS / f"{plot.name}.png", drawing.as_png(plot))
        figures[plot.name] = plot, drawing.inline(svg, plot.name, plot.says)
    return figures


def write_file(path: Path, content: str | bytes) -> Path:
    data = content.encode() if isinstance(content, str) else content
    files.write_atomic(path, lambda part: part.write_bytes(data), "--out")
    return path
