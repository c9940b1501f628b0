"""Experiment trackers of a run, by the setting `track`: TensorBoard, Weights & Biases, MLflow.

All are told the same, as callbacks: that a run begins (its name and settings), each line of metrics.jsonl, its closing
figures, and how it ended. Numbers and settings, and nothing else: no image, no feature, no count of a class, no name of
a site or of a class. A package is imported when its tracker is to be told, and not before.
"""

from __future__ import annotations

import logging
import os
import re
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Protocol

from fedclip_flwr.config import Settings
from fedclip_flwr.errors import UserError, one_line

Numbers = dict[str, float]
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


@dataclass(frozen=True)
class About:
    """The run that begins, or goes on after the lines `before`. Its `name` is nobody else's."""

    name: str
    folder: Path
    settings: Mapping[str, Any]
    before: list[Numbers]


class Tracker(Protocol):
    """Who is told how the run goes; made of `About` when it begins. `where` tells the user where to look."""

    where: str

    def line(self, line: Numbers) -> None:
        """A round is known."""

    def finish(self, figures: Numbers) -> None:
        """The run was completed, and came to this."""

    def end(self, status: str) -> None:
        """Nothing more comes: the run was completed, failed, or was stopped."""


class TensorBoard:
    """An event file in the run's folder, written at once: TensorBoard's own writer fails in a thread, with a trace.

    Where a run goes on, a new file tells of it from the first round, and that TensorBoard is to forget the old one.
    """

    def __init__(self, about: About) -> None:
        from tensorboard.compat.proto.event_pb2 import SessionLog
        from tensorboard.summary.writer.record_writer import RecordWriter

        folder = about.folder / "tensorboard"
        folder.mkdir(exist_ok=True)
        again = any(folder.iterdir())
        self.where = str(folder)
        self._file = (folder / f"events.out.tfevents.{time.time():.6f}").open("wb")
        self._records = RecordWriter(self._file)
        self._add(0, file_version="brain.Event:2")
        if again:
            self._add(0, session_log=SessionLog(status=SessionLog.START))
        rows = [f"| {key} | {value} |" for key, value in about.settings.items()]
        self._text("settings", "\n".join(["| setting | value |", "| --- | --- |", *rows]))
        for line in about.before:
            self.line(line)

    def line(self, line: Numbers) -> None:
        self._scalars(line, line["round"])

    def finish(self, figures: Numbers) -> None:
        self._scalars(figures, figures["result/rounds"])

    def end(self, status: str) -> None:
        self._text("status", status)
        self._file.close()

    def _text(self, name: str, text: str) -> None:
        from torch.utils.tensorboard import summary

        self._add(0, summary=summary.text(name, text))  # type: ignore[no-untyped-call]

    def _scalars(self, numbers: Numbers, step: float) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=name, simple_value=number) for name, number in numbers.items() if name != "round"]
        self._add(int(step), summary=Summary(value=values))

    def _add(self, step: int, **what: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        self._records.write(Event(wall_time=time.time(), step=step, **what).SerializeToString())
        self._records.flush()


class MLflow:
    """A run of the experiment `fedclip`, in a database beside the run folders; MLflow's variables may say otherwise."""

    def __init__(self, about: About) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        from mlflow.tracking import MlflowClient

        logging.getLogger("mlflow").setLevel(logging.WARNING)
        warnings.filterwarnings("ignore", category=DeprecationWarning, module="mlflow")
        own, root = os.environ.get("MLFLOW_TRACKING_URI"), about.folder.parent
        store = own or f"sqlite:///{root / 'mlflow.db'}"
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or "fedclip"
        self.where = f"experiment {name} in {'the store of MLFLOW_TRACKING_URI' if own else store}"
        self._client = MlflowClient(tracking_uri=store)
        if experiment := self._client.get_experiment_by_name(name):
            number = experiment.experiment_id
        else:  # else its place for files would be below the current folder
            number = self._client.create_experiment(name, None if own else (root / "mlartifacts").as_uri())
        if found := self._client.search_runs([number], f"tags.`fedclip.run` = '{about.name}'"):
            run = found[0]
            self._client.update_run(run.info.run_id, "RUNNING")
        else:
            run = self._client.create_run(number, tags={"fedclip.run": about.name}, run_name=about.folder.name)
        self._run = run.info.run_id
        steps = [int(metric.step) for metric in self._client.get_metric_history(self._run, "sites")]
        self._known = max(steps, default=-1)  # a store takes no round back
        for key, value in about.settings.items():
            if key not in run.data.params:  # which can't be changed
                self._client.log_param(self._run, key, str(value)[:500])
        for line in about.before:
            self.line(line)

    def line(self, line: Numbers) -> None:
        if line["round"] > self._known:
            self._log({name: number for name, number in line.items() if name != "round"}, line["round"])

    def finish(self, figures: Numbers) -> None:
        self._log(figures, figures["result/rounds"])

    def end(self, status: str) -> None:
        self._client.set_terminated(
            self._run, {"completed": "FINISHED", "failed": "FAILED", "stopped": "KILLED"}[status]
        )

    def _log(self, numbers: Numbers, step: float) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._client.log_batch(self._run, [Metric(name, number, now, int(step)) for name, number in numbers.items()])


class Wandb:
    """A run of the project `fedclip` unless W&B's own variables say otherwise; its files are in the run's folder."""

    def __init__(self, about: About) -> None:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        root = Path(os.environ.get("WANDB_DIR") or about.folder)
        offline = [*root.glob(f"wandb/offline-run-*-{about.name}")]
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or "fedclip",
            id=about.name,
            name=about.folder.name,
            resume="allow",
            dir=root,
            config=dict(about.settings),
            settings=wandb.Settings(
                silent=True,
                console="off",  # what a run prints names the sites
                host="fedclip",
                disable_git=True,
                save_code=False,
                x_disable_machine_info=True,
                x_disable_meta=True,
                x_disable_stats=True,
                x_save_requirements=False,
            ),
        )
        where: str | None = self._run.settings.sync_dir if self._run.offline else self._run.url
        self.where = str(where or root / "wandb")
        known = len(about.before) if offline else 0  # W&B tells how far it is only where it is online
        self._next = max(self._run.step, known)
        for line in about.before:
            self.line(line)

    def line(self, line: Numbers) -> None:
        if line["round"] >= self._next:
            self._run.log(line, step=int(line["round"]), commit=True)

    def finish(self, figures: Numbers) -> None:
        self._run.summary.update(figures)

    def end(self, status: str) -> None:
        self._run.summary.update({"status": status})
        self._run.finish(exit_code=int(status != "completed"))


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
