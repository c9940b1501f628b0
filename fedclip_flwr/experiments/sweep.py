"""Every method on every held-out domain, with several seeds.

Each result is stored at once, under a key of all that it depends on: settings, data, model, and the code of this
package. So a stopped sweep resumes where it was, and a larger one reuses existing results.
"""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from functools import lru_cache
from multiprocessing import active_children, get_context
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from fedclip_flwr.base import Settings, UserError, content, files
from fedclip_flwr.base.settings import LORA, ONE_ROUND
from fedclip_flwr.base.tensors import State
from fedclip_flwr.exchange import Report, records
from fedclip_flwr.experiments.baselines import LORA_ONLY, Case, method_of
from fedclip_flwr.experiments.simulate import make_sites
from fedclip_flwr.features import Features, models, open_features
from fedclip_flwr.learning import Learner
from fedclip_flwr.learning.metrics import BINS, Quality, Score
from fedclip_flwr.learning.one_round import SUMS
from fedclip_flwr.runs.directions import start_of
from fedclip_flwr.runs.opening import load_plugins


class Trained(NamedTuple):
    """What is trained of the CLIP, as settings: it decides what is stored of images. By default nothing."""

    method: str = Settings.method
    lora_targets: str = Settings.lora_targets
    lora_layers: str = Settings.lora_layers


class Cell(NamedTuple):
    """One method, one held-out domain, one seed."""

    method: str
    settings: Settings
    sites: int

    @property
    def trains(self) -> Trained:
        method, targets, layers = self.settings.method, self.settings.lora_targets, self.settings.lora_layers
        return Trained(method, targets, layers) if method in ("full-model", LORA) else Trained()

    @property
    def rounds(self) -> int:
        """The number of rounds that it runs, for the progress bar."""
        rounds = {"zero-shot": 0, "local": self.sites * self.settings.rounds}
        return rounds.get(self.method, self.settings.rounds)

    def key(self, features: Features) -> str:
        """A digest of all that the result depends on. Data and model count by their content, wherever they are."""
        how = {k: v for k, v in self.settings.as_run_config().items() if k not in ("data", "model", "results-dir")}
        code = content.of_package(content.memory())
        parts = self.method, str(self.sites), json.dumps(how), features.content, code, torch.__version__
        return content.digest(*parts, *self.settings.packages("adapter", "codec"))


NOT_OTHERS = tuple(key.replace("-", "_") for key in LORA_ONLY)


class Found(NamedTuple):
    """The result of a cell: accuracies as fractions, the selected round, and the bytes of a site's round.

    `tests` has name, number of test examples, and number of correct ones for each site and unseen domain.
    """

    seen: float | None
    unseen: float | None
    round: int
    bytes: int | None
    tests: Sequence[Sequence[Any]] = ()


Results = dict[Cell, Found]


@dataclass(frozen=True)
class Plan:
    """The scope of a sweep. Training the whole model is far slower, so it has its own numbers of rounds and seeds."""

    settings: Settings
    methods: Sequence[str]
    holdouts: Sequence[str]
    seeds: range
    sites: int
    whole_rounds: int
    whole_seeds: int

    def cells(self) -> list[Cell]:
        """All cells, the slowest first."""
        order = sorted(self.methods, key=lambda method: not method_of(method).whole_model)
        return [
            Cell(method, self._settings(method, holdout, seed), self.sites)
            for method in order
            for seed in (self.seeds[: self.whole_seeds] if method_of(method).whole_model else self.seeds)
            for holdout in self.holdouts
        ]

    def _settings(self, method: str, holdout: str, seed: int) -> Settings:
        rounds = self.rounds_of(method) or self.settings.num_server_rounds
        own = {"holdout": holdout, "seed": seed, "num_server_rounds": rounds, **method_of(method).settings}
        plain = {} if method_of(method).lora else {key: getattr(Settings, key) for key in NOT_OTHERS}
        return replace(self.settings, **plain, **own)

    def rounds_of(self, method: str) -> int:
        if method == "zero-shot":
            return 0
        if method_of(method).whole_model:
            return self.whole_rounds
        return replace(self.settings, **method_of(method).settings).rounds


def solve(cell: Cell, features: Features, after_round: Callable[[], object] = lambda: None) -> Found:
    """Runs the cell's method; returns its result."""
    settings, method = cell.settings, method_of(cell.method)
    load_plugins(settings)
    device = models.pick_device(settings.device)
    how: dict[str, Any] = {"partition": settings.partition, "alpha": settings.alpha, "device": device}
    sites, unseen = make_sites(features, settings.holdout, cell.sites, settings.seed, **how)
    start = start_of(settings, features).to(device)
    case = Case(sites, features.classes.ready(device), unseen, settings, start, after_round)
    size = None
    if method.sends:
        score = Score(1000, 1000, 1.0)
        report = Report(1000, score, Quality(score, 1.0, 1.0, [0.5] * BINS))
        size = records.round_size(*sent_by(start, settings), settings.codec, "0" * 16, report)
    line = method.run(case)
    tests = [(name, score.examples, score.correct) for name, score in line.tests.items()]
    return Found(line.seen, line.unseen, line.round, size, tests)


def sent_by(start: Learner, settings: Settings) -> tuple[State, State]:
    """The tensors that a site gets in a round, and those that it sends."""
    state = start.state_dict()
    if settings.method == ONE_ROUND:
        return {"basis": state["basis"]}, {name: state[name] for name in SUMS}
    return state, state


def sweep(plan: Plan, jobs: int) -> tuple[Results, int]:
    """The results of all cells, and how many of them were stored already."""
    cells, store = plan.cells(), files.home() / "sweeps" / "results"
    opened = {trains: _open(plan.settings, trains) for trains in sorted({cell.trains for cell in cells})}
    keys = {cell: cell.key(opened[cell.trains]) for cell in cells}
    kept = {cell: content.recall(key, store) for cell, key in keys.items()}
    results = {cell: Found(**json.loads(text)) for cell, text in kept.items() if text}
    todo, known = [cell for cell in cells if cell not in results], len(results)
    for trains in {cell.trains for cell in todo}:
        for domain in opened[trains].domains:  # encoded once, by this process, with a progress bar
            opened[trains].examples(domain)
    for cell, found in _solved(todo, plan.settings, jobs, len(cells)):
        results[cell] = found
        content.remember(keys[cell], json.dumps(found._asdict()), store)
    return {cell: results[cell] for cell in cells}, known


def _solved(todo: Sequence[Cell], settings: Settings, jobs: int, cells: int) -> Iterator[tuple[Cell, Found]]:
    """The cells' results as they come in, computed by `jobs` processes."""
    if not todo:
        return
    context = get_context("spawn")  # CUDA can't be forked
    rounds = context.Value("q", 0)
    pool = ProcessPoolExecutor(min(jobs, len(todo)), context, _begin, (settings, rounds))
    how = {
        "bar_format": "{desc} |{bar}| {n_fmt} of {total_fmt} rounds, {elapsed}",
        "mininterval": 0.5 if sys.stderr.isatty() else 10,
    }
    with tqdm(total=sum(cell.rounds for cell in todo), **how) as bar:
        try:
            waiting = {pool.submit(_solve, cell): cell for cell in todo}
            while waiting:
                bar.set_description_str(f"{cells - len(waiting)} of {cells} results", refresh=False)
                bar.update(rounds.value - bar.n)
                done, _ = wait(waiting, timeout=0.5, return_when=FIRST_COMPLETED)
                for future in done:
                    yield waiting.pop(future), future.result()
        except BrokenProcessPool:
            raise UserError(
                "a process of the sweep was killed, possibly out of memory: give fewer --jobs; the same command "
                "resumes from here"
            ) from None
        finally:
            if waiting:  # an error, or the user has stopped the sweep
                for child in active_children():
                    child.terminate()
            pool.shutdown(cancel_futures=True)


# In the worker processes

_settings: Settings
_rounds: Any


def _begin(settings: Settings, rounds: Any) -> None:
    global _settings, _rounds
    _settings, _rounds = settings, rounds
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent process ends this one
    torch.set_num_threads(1)  # one process per core; and one thread gives the same results everywhere


def _solve(cell: Cell) -> Found:
    return solve(cell, _open_once(cell.trains), _count)


def _count() -> None:
    with _rounds.get_lock():
        _rounds.value += 1


@lru_cache
def _open_once(trains: Trained) -> Features:
    return _open(_settings, trains)


def _open(settings: Settings, trains: Trained) -> Features:
    return open_features(replace(settings, **trains._asdict()))
