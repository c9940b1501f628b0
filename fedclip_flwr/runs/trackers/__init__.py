"""Experiment trackers of a run, by the setting `track`: TensorBoard, Weights & Biases, MLflow.

All are told the same, as callbacks: that a run begins (its name and settings), each line of metrics.jsonl, its closing
figures, and how it ended. Numbers and settings, and nothing else: no image, no feature, no count of a class, no name of
a site or of a class. A package is imported when its tracker is to be told, and not before.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from fedclip_flwr.base import Settings, UserError
from fedclip_flwr.base.errors import one_line
from fedclip_flwr.runs.trackers.about import About, Numbers, Tracker
from fedclip_flwr.runs.trackers.ml_flow import MLflow
from fedclip_flwr.runs.trackers.tensor_board import TensorBoard
from fedclip_flwr.runs.trackers.weights_biases import Wandb

READY, DONE, CUT_OFF = 20.0, 60.0, 3.0
"""So many seconds a run waits for its trackers at most: when it begins, at its end, and where it failed or was stopped.
Flower leaves a process that is stopped 5 seconds."""
LEFT_OUT = frozenset({"class-names", "resume", "results-dir", "track"})
"""Settings that no tracker is told."""
MEANS = ("balanced_accuracy", "macro_f1", "calibration_error")
FIGURES = {
    ("zero_shot",): ("seen", "unseen"),
    ("zero_shot", "metrics", "seen"): MEANS,
    ("zero_shot", "metrics", "unseen"): MEANS,
    ("adapted",): ("seen", "unseen", "round", "blend"),
    ("adapted", "metrics", "seen"): MEANS,
    ("adapted", "metrics", "unseen"): MEANS,
    ("adapted", "personal_metrics", "seen"): ("accuracy", *MEANS),
    ("traffic",): ("down_bytes", "up_bytes", "per_site_round_bytes", "full_model_bytes", "times_less"),
    ("privacy",): ("epsilon",),
    ("seconds",): ("encode", "rounds", "total"),
    (): ("rounds",),
}
"""What trackers are told of summary.json: below which keys, which numbers."""

TRACKERS: dict[str, tuple[str, Callable[[About], Tracker]]] = {
    "tensorboard": ("tensorboard", TensorBoard),
    "wandb": ("wandb", Wandb),
    "mlflow": ("mlflow", MLflow),
}
"""By the names in the setting `track`: the package that each needs, and what makes it."""


class Trackers:
    """All trackers of a run, each told in a thread of its own: one that fails or takes its time holds nothing up."""

    def __init__(self, track: str) -> None:
        self._names, self._told = _named(track), list[_Told]()
        self._status, self._ended = "", False

    def begin(self, run: str, folder: Path, settings: Settings, metrics: Iterable[Mapping[str, Any]]) -> None:
        """Tells them of the run, and of the lines that it has already; the user sees where each keeps it."""
        given = {key: value for key, value in settings.as_run_config().items() if key not in LEFT_OUT and value != ""}
        about = About(run, folder, given, [_numbers(line) for line in metrics])
        self._told = [_Told(name, about) for name in self._names]
        deadline = time.monotonic() + READY
        for told in self._told:
            told.start()
        for told in self._told:
            told.ready.wait(max(0.0, deadline - time.monotonic()))

    def line(self, facts: Mapping[str, Any]) -> None:
        self._tell(lambda tracker: tracker.line(_numbers(facts)))

    def finish(self, summary: Mapping[str, Any]) -> None:
        self._status = "completed"
        self._tell(lambda tracker: tracker.finish(figures(summary)))

    def end(self, status: str) -> None:
        """The run has come to its end, such a one unless it was completed; of several calls the first one counts."""
        if self._ended:
            return
        self._ended, status = True, self._status or status
        self._tell(lambda tracker: tracker.end(status))
        self._tell(None)
        now = time.monotonic()
        for told in self._told:
            deadline = now + (DONE if self._status and told.ready.is_set() else CUT_OFF)
            told.join(max(0.0, deadline - time.monotonic()))
            if told.is_alive():
                told.given_up = True
                _say(f"{told.name} is not done with it, and may lack the end of this run")

    def _tell(self, event: Callable[[Tracker], None] | None) -> None:
        for told in self._told:
            told.events.put(event)


class _Told(threading.Thread):
    """What tells one tracker, until it is told nothing (`None`) or fails; it never keeps the process from ending."""

    def __init__(self, name: str, about: About) -> None:
        super().__init__(name=name, daemon=True)
        self.ready, self.given_up, self._about = threading.Event(), False, about
        self.events: SimpleQueue[Callable[[Tracker], None] | None] = SimpleQueue()  # a signal's handler may put, too

    def run(self) -> None:
        try:
            tracker = TRACKERS[self.name][1](self._about)
            self._say(f"{self.name}: {tracker.where}")
            self.ready.set()
            while event := self.events.get():
                event(tracker)
        except BaseException as error:  # whatever it is, the run goes on
            what = one_line(f"{type(error).__name__}: {error}").rstrip(":")
            what = re.sub(r"//[^/\s]*@", "//", what)  # an address may hold a key
            self._say(f"{self.name} is no longer told of this run, which goes on: {what}")
        finally:
            self.ready.set()

    def _say(self, text: str) -> None:
        """While the run is there to which it belongs."""
        if not self.given_up:
            _say(text)


def _say(text: str) -> None:
    print(f"{'tracking':<10}  {text}", flush=True)


def _named(track: str) -> list[str]:
    return list(dict.fromkeys(name.strip() for name in track.split(",") if name.strip()))


def check(track: str) -> None:
    """Refuses trackers whose packages are not installed here."""
    lacking = [name for name in _named(track) if not _installed(TRACKERS[name][0])]
    if lacking:
        which = f"{' and '.join(lacking)} {'is' if len(lacking) == 1 else 'are'} not installed here"
        raise UserError(f"track = {track!r}: {which}: pip install 'fedclip-flwr[{','.join(lacking)}]'")


def _installed(package: str) -> bool:
    """A mere folder of that name, such as W&B leaves behind, is no package."""
    found = find_spec(package)
    return found is not None and found.origin is not None


def _numbers(facts: Mapping[str, Any]) -> Numbers:
    """Those of the facts that are numbers."""
    return {key: value for key, value in facts.items() if type(value) in (int, float)}


def figures(summary: Mapping[str, Any]) -> Numbers:
    """The numbers of summary.json that trackers are told."""
    found: Numbers = {}
    for path, names in FIGURES.items():
        facts: Any = summary
        for key in path:
            facts = (facts or {}).get(key)
        within = "/".join(("result", *(key for key in path if key != "metrics")))
        found |= _numbers({f"{within}/{name}": (facts or {}).get(name) for name in names})
    return found
