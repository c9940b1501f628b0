"""Shared by the tests of reports: runs that were learnt once, and their pages."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

from fedclip_flwr.features.base import Features
from fedclip_flwr.report import writing
from fedclip_flwr.runs import history
from tests.extras import MODULES
from tests.report.made import a_run, feature_folder

HOSTILE = '<script>alert("1")</script> & \u202e\x07'
"""What a site may say why it failed."""


@pytest.fixture(scope="session")
def plain(tmp_path_factory: pytest.TempPathFactory, drawn: Features) -> Path:
    """The folder of a completed run of three sites, without a report."""
    return a_run(tmp_path_factory.mktemp("plain"), drawn)


@pytest.fixture(scope="session")
def pages(tmp_path_factory: pytest.TempPathFactory, drawn: Features, plain: Path) -> dict[str, Path]:
    """Reports by what is special about their runs."""
    root = tmp_path_factory.mktemp("pages")
    failures = [{"round": r, "site": f"site-{n}", "why": HOSTILE} for r in (1, 2) for n in range(30)]
    named = root / "a-folder-with-a-rather-long-name-without-any-blank-in-it-so-that-it-can-not-be-broken"
    runs = {
        "plain": plain,
        "many": a_run(
            root / "many",
            drawn,
            sites=200,
            personal=True,
            holdouts=["west"],
            failures=failures,
            epsilon=3.2,
            dp="central" if find_spec(MODULES["privacy"]) else "off",
        ),
        "failed": a_run(named, drawn, adapter="scale", ends="failed", failures=failures[:2]),
        "features": a_run(root / "features", data=f"features:{feature_folder(root / 'data', drawn)}", adapter="gate"),
    }
    made = {"plain": writing.write(history.read(plain), root / "out" / "plain")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fedclip_flwr.report.drawing.as_png", lambda plot: b"")  # pages show the SVG
        for name in ("many", "failed", "features"):
            made[name] = writing.write(history.read(runs[name]), root / "out" / name)
        writing.make([str(runs[name]) for name in ("plain", "many", "failed")], root / "out" / "compared")
    return {**made, "compared": root / "out" / "compared" / history.PAGE}


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plots are made, with their headings in pages, but not drawn: that is what takes long of a report."""
    monkeypatch.setattr("fedclip_flwr.report.drawing.as_svg", lambda plot: '<svg viewBox="0 0 1 1"></svg>')
    monkeypatch.setattr("fedclip_flwr.report.drawing.as_png", lambda plot: b"")
