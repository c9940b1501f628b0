"""The files of a report: where they may go, and how they are written."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import partial
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
        svg, png = drawing.as_svg(plot), drawing.as_png(plot)
        write_text(folder / PLOTS / f"{plot.name}.svg", svg)
        files.write_atomic(folder / PLOTS / f"{plot.name}.png", partial(_write_bytes, png), "--out")
        figures[plot.name] = plot, drawing.inline(svg, plot.name, plot.says)
    return figures


def write_text(path: Path, text: str) -> Path:
    files.write_atomic(path, lambda part: part.write_text(text, encoding="utf-8"), "--out")
    return path


def _write_bytes(data: bytes, path: Path) -> None:
    path.write_bytes(data)
