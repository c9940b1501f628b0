"""The run folder: what a run leaves behind, and how it is read again.

settings.json        the settings, the versions and the package's hash
metrics.jsonl        a line for each round
adapter.safetensors  the selected round's adapter; adapter.json: all that is needed to load it elsewhere
model/               instead of these: the selected round's whole model, where that is what was trained
checkpoint/          the adapter of the last complete round
summary.json         how it ended
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Sequence
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType
from typing import Any

from fedclip_flwr import content
from fedclip_flwr.codecs import State
from fedclip_flwr.config import Settings
from fedclip_flwr.errors import UserError
from fedclip_flwr.exchange import one_line
from fedclip_flwr.features import Features, Pixels, results
from fedclip_flwr.federation import Line, Outcome
from fedclip_flwr.metrics import Quality, mean_accuracy, mean_figures
from fedclip_flwr.nodes import Nodes
from fedclip_flwr.saved import TENSORS, save_adapter, save_model, write_json, write_tensors

PACKAGES = ("fedclip-flwr", "flwr", "torch", "transformers", "numpy")


class RunFolder:
    """A new run's folder. As a context manager it records how the run ends."""

    def __init__(self, settings: Settings, package: str) -> None:
        root, self._setting = results(settings)
        with content.writing_to(root, self._setting):
            self.path = _new_folder(root)
        self._settings, self._finished = settings, False
        facts = {**settings.as_run_config(), "versions": _versions(), "package": package}
        self._json("settings.json", facts)
        self._json("summary.json", {"status": "running"})
        _link(root / "latest", self.path.name)

    def line(self, line: Line) -> None:
        """Adds a line to metrics.jsonl."""
        facts = {
            "round": line.round,
            "seen": line.seen,
            "unseen": mean_accuracy(line.held_out),
            "val": line.validation,
            "loss": line.loss,
            "sites": len(line.reports),
            "bytes": line.bytes,
            "seconds": line.seconds,
        }
        with content.writing_to(self.path, self._setting), (self.path / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(facts) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def checkpoint(self, number: int, state: State) -> None:
        write_tensors(self.path / "checkpoint" / TENSORS, state, number, self._setting)

    def adapter(self, number: int, state: State, features: Features, blend: float | None = None) -> None:
        """The selected adapter, so far: that of round `number`; or the whole model, where that is trained."""
        if isinstance(features, Pixels):
            save_model(self.path / "model", state, features, self._setting)
        else:
            save_adapter(self.path, state, self._settings, features, number, self._setting, blend=blend)

    def finish(self, summary: dict[str, Any]) -> None:
        self._json("summary.json", summary)
        self._finished = True

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._finished:
            why = str(error) if isinstance(error, UserError) else one_line(repr(error))
            with contextlib.suppress(UserError):  # the disk may be what failed: the error itself is told
                self._json("summary.json", {"status": "failed", "why": why})

    def _json(self, name: str, facts: dict[str, Any]) -> None:
        write_json(self.path / name, facts, self._setting)


def _new_folder(root: Path) -> Path:
    """A folder named by the time, that nobody else has."""
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    for number in range(1000):
        path = root / (f"{stamp}-{number}" if number else stamp)
        with contextlib.suppress(FileExistsError):
            path.mkdir()
            return path
    raise UserError(f"results-dir: {root} has no room for another run of {stamp}")


def _link(link: Path, name: str) -> None:
    """Lets the link point to the run, where the file system has links."""
    part = link.with_name(f".{link.name}.{name}")
    with contextlib.suppress(OSError):
        part.symlink_to(name)
        part.replace(link)


def _versions() -> dict[str, str]:
    found = {"python": sys.version.split()[0]}
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def summary_of(
    outcome: Outcome, nodes: Nodes, holdout: str | None, features: Features, seconds: dict[str, float]
) -> dict[str, Any]:
    """What `summary.json` tells of a completed run."""
    traffic, names, parameters = nodes.traffic, features.vocabulary.class_names, features.parameters
    per_round = outcome.site_round_bytes
    whole = None if parameters is None else 2 * 4 * parameters
    return {
        "status": "completed",
        "holdout": holdout,
        "zero_shot": _results(outcome.zero_shot, names),
        "adapted": {
            **_results(outcome.adapted, names),
            "round": outcome.adapted.round,
            "blend": outcome.blend,
            **_personal(outcome, names),
        },
        "traffic": {
            "down_bytes": traffic.down,
            "up_bytes": traffic.up,
            "per_site_round_bytes": per_round,
            "full_model_bytes": whole,
            "times_less": None if whole is None else whole / per_round,
        },
        "seconds": seconds,
        "failures": [failure._asdict() for failure in nodes.failures],
    }


def _results(line: Line, class_names: Sequence[str]) -> dict[str, Any]:
    """Accuracies, and all figures below `metrics`."""
    tests = {site: report.test for site, report in line.reports.items()}
    return {
        "seen": line.seen,
        "unseen": mean_accuracy(line.held_out),
        "sites": {site: quality.accuracy for site, quality in tests.items()},
        "holdout_sites": {site: report.test.accuracy for site, report in line.holdouts.items()},
        "metrics": {
            "seen": mean_figures(tests.values()),
            "unseen": _unseen(line, class_names),
            "sites": {site: _figures(quality, class_names) for site, quality in tests.items()},
        },
    }


def _unseen(line: Line, class_names: Sequence[str]) -> dict[str, Any] | None:
    """Figures of what nobody trains on: by class where it is one set of images, means where there are several."""
    if len(line.held_out) == 1:
        return _figures(line.held_out[0], class_names)
    return mean_figures(line.held_out) or None


def _figures(quality: Quality, class_names: Sequence[str]) -> dict[str, Any]:
    by_class = {"recall": dict(zip(class_names, quality.classes.recalls, strict=False))} if quality.classes else {}
    return {**quality.figures(), **by_class}


def _personal(outcome: Outcome, class_names: Sequence[str]) -> dict[str, Any]:
    """What the sites' own adapters come to; None where none was asked for."""
    tests = {site: report.test for site, report in outcome.personal.items()}
    return {
        "personal": {site: quality.accuracy for site, quality in tests.items()} or None,
        "personal_metrics": {
            "seen": mean_figures(tests.values()),
            "sites": {site: _figures(quality, class_names) for site, quality in tests.items()},
        }
        if tests
        else None,
    }
