"""Experiment trackers of a run, by the setting `track`: TensorBoard, Weights & Biases, MLflow.

All get the same callbacks: a run's start (its name and settings), each line of metrics.jsonl, the final figures, and
how the run ended. They get numbers and settings only: no image, no feature, no count of a class, no name of a site or
of a class. A tracker's package is imported only when it is used.
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
"""Seconds that a run waits for its trackers at most: at its start, at its end, and if it failed or was stopped.
Flower gives a stopped process 5 seconds."""
LEFT_OUT = frozenset({"class-names", "resume", "results-dir", "track"})
"""Settings that no tracker gets."""
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
"""The numbers of summary.json that trackers get, by the keys that lead to them."""

TRACKERS: dict[str, tuple[str, Callable[[About], Tracker]]] = {
    "tensorboard": ("tensorboard", TensorBoard),
    "wandb": ("wandb", Wandb),
    "mlflow": ("mlflow", MLflow),
}
"""By name in the setting `track`: the required package, and the tracker's class."""


class Trackers:
    """All trackers of a run, each in its own thread: a failing or slow one does not delay the run."""

    def __init__(self, track: str) -> None:
        self._names, self._workers = _named(track), list[_Worker]()
        self._status, self._ended = "", False

    def begin(self, run: str, folder: Path, settings: Settings, metrics: Iterable[Mapping[str, Any]]) -> None:
        """Starts them with the run's settings and its rounds so far. Each prints where it stores the run."""
        given = {key: value for key, value in settings.as_run_config().items() if key not in LEFT_OUT and value != ""}
        about = About(run, folder, given, [_numbers(line) for line in metrics])
        self._workers = [_Worker(name, about) for name in self._names]
        deadline = time.monotonic() + READY
        for worker in self._workers:
            worker.start()
        for worker in self._workers:
            worker.ready.wait(max(0.0, deadline - time.monotonic()))

    def line(self, facts: Mapping[str, Any]) -> None:
        self._send(lambda tracker: tracker.line(_numbers(facts)))

    def finish(self, summary: Mapping[str, Any]) -> None:
        self._status = "completed"
        self._send(lambda tracker: tracker.finish(figures(summary)))

    def end(self, status: str) -> None:
        """The run has ended with that status, unless `finish` was called. Later calls have no effect."""
        if self._ended:
            return
        self._ended, status = True, self._status or status
        self._send(lambda tracker: tracker.end(status))
        self._send(None)
        now = time.monotonic()
        for worker in self._workers:
            deadline = now + (DONE if self._status and worker.ready.is_set() else CUT_OFF)
            worker.join(max(0.0, deadline - time.monotonic()))
            if worker.is_alive():
                worker.given_up = True
                _say(f"{worker.name} did not finish in time, and may lack the end of this run")

    def _send(self, event: Callable[[Tracker], None] | None) -> None:
        for worker in self._workers:
            worker.events.put(event)


class _Worker(threading.Thread):
    """Sends events to one tracker, until `None` comes or the tracker fails. It never keeps the process from ending."""

    def __init__(self, name: str, about: About) -> None:
        super().__init__(name=name, daemon=True)
        self.ready, self.given_up, self._about = threading.Event(), False, about
        self.events: SimpleQueue[Callable[[Tracker], None] | None] = SimpleQueue()  # safe in a signal handler

    def run(self) -> None:
        try:
            tracker = TRACKERS[self.name][1](self._about)
            self._say(f"{self.name}: {tracker.where}")
            self.ready.set()
            while event := self.events.get():
                event(tracker)
        except BaseException as error:  # no tracker may end the run
            what = one_line(f"{type(error).__name__}: {error}").rstrip(":")
            what = re.sub(r"//[^/\s]*@", "//", what)  # an address may contain a key
            self._say(f"{self.name} failed, and is no longer used; the run continues: {what}")
        finally:
            self.ready.set()

    def _say(self, text: str) -> None:
        """Prints, unless the run has stopped waiting."""
        if not self.given_up:
            _say(text)


def _say(text: str) -> None:
    print(f"{'tracking':<10}  {text}", flush=True)


def _named(track: str) -> list[str]:
    return list(dict.fromkeys(name.strip() for name in track.split(",") if name.strip()))


def check(track: str) -> None:
    """Refuses trackers whose packages are not installed here."""
    missing = [name for name in _named(track) if not _installed(TRACKERS[name][0])]
    if missing:
        which = f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed here"
        raise UserError(f"track = {track!r}: {which}: pip install 'fedclip-flwr[{','.join(missing)}]'")


def _installed(package: str) -> bool:
    """True for a package, but not for a mere folder of that name, such as W&B leaves behind."""
    found = find_spec(package)
    return found is not None and found.origin is not None


def _numbers(facts: Mapping[str, Any]) -> Numbers:
    """The facts that are numbers."""
    return {key: value for key, value in facts.items() if type(value) in (int, float)}


def figures(summary: Mapping[str, Any]) -> Numbers:
    """The numbers of summary.json that trackers get."""
    found: Numbers = {}
    for path, names in FIGURES.items():
        facts: Any = summary
        for key in path:
            facts = (facts or {}).get(key)
        within = "/".join(("result", *(key for key in path if key != "metrics")))
        found |= _numbers({f"{within}/{name}": (facts or {}).get(name) for name in names})
    return found
