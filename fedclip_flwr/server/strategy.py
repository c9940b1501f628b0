"""Adapter-only federated averaging, as a Flower strategy.

FedAvg (arXiv 1602.05629) over the tensors of the adapter. Deviations from Flower's `FedAvg`: each reply is checked
before it is used, and a bad one is dropped and named while the round continues with the others; sites count equally (as
in FedCLIP) or by their examples; `averaging.py` aggregates the replies.

The aggregate may then go to another of Flower's strategies, which treats the sites' mean update as a gradient and takes
an optimizer step with it (adaptive federated optimization, arXiv 2003.00295).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAdagrad, FedAdam, FedAvg, FedYogi
from torch import Tensor

from fedclip_flwr.base import Settings, UserError
from fedclip_flwr.base.settings import LORA, OPTIMIZED
from fedclip_flwr.base.tensors import State
from fedclip_flwr.exchange import ExchangeError, Report
from fedclip_flwr.exchange.records import read_adapter, read_answer, reason, write_adapter
from fedclip_flwr.learning.adapters import adapter_class
from fedclip_flwr.server.averaging import Gather, Held, Sums, bounded
from fedclip_flwr.server.noised import Noised
from fedclip_flwr.server.robust import rule_of

OPTIMIZERS = dict(zip(OPTIMIZED, (FedAdam, FedYogi, FedAdagrad), strict=True))
WHOLE_MODEL_RATE, LORA_RATE = 3e-4, 1e-2
MOMENTS = ("m_t", "v_t")
"""Flower's attributes for the moving averages of the updates and of their squares."""


class Optimizer:
    """The server's step by one of Flower's `OPTIMIZERS`, which gets the sites' mean as the only reply of a round."""

    def __init__(self, name: str, rate: float) -> None:
        self._strategy = OPTIMIZERS[name](eta=rate, tau=rate / 10)

    def step(self, number: int, sent: State, mean: State) -> State:
        """The next state, from the one that was sent and the mean of the sites' states."""
        self._strategy.current_arrays = {name: tensor.numpy() for name, tensor in sent.items()}
        content = RecordDict({"arrays": write_adapter(mean), "metrics": MetricRecord({"num-examples": 1})})
        stepped, _ = self._strategy.aggregate_train(number, [Message(content, 1, MessageType.TRAIN)])
        assert stepped is not None  # there was a reply
        return {name: torch.from_numpy(stepped[name].numpy()).to(tensor.dtype) for name, tensor in mean.items()}

    @property
    def memory(self) -> State:
        moments = {moment: getattr(self._strategy, moment) or {} for moment in MOMENTS}
        return {  # numpy's arithmetic makes scalars of 0-d arrays
            f"{m}/{name}": torch.from_numpy(np.asarray(array))
            for m, arrays in moments.items()
            for name, array in arrays.items()
        }

    @memory.setter
    def memory(self, memory: State) -> None:
        for moment in MOMENTS:
            parts = {name.partition("/")[2]: t.numpy() for name, t in memory.items() if name.startswith(f"{moment}/")}
            setattr(self._strategy, moment, parts or None)


class LedgerError(UserError):
    """The ledger can't be read or written: no site is to blame."""


class AdapterFedAvg(FedAvg):
    """Averages adapters that have the names, shapes and types of `like`, the run's initial adapter.

    `names` has the sites' names by node id, and may grow during the run. `claims` gives the number of examples that a
    site claims, its weight if `site-weights` is `examples`. The settings choose the aggregation. After each round
    `reports` has the reports of the good replies, `dropped` the reasons why others were left out, both by site, and
    `scaled` the sites whose updates were scaled down, and `contributions` what `Gathered` says of sums; `given` is the
    same, but with secure aggregation what the sites claim.
    """

    def __init__(
        self,
        like: State,
        names: Mapping[int, str],
        settings: Settings,
        claims: Callable[[str], float] = lambda site: 1.0,
        classes: int | None = None,
    ) -> None:
        super().__init__(min_train_nodes=1, min_evaluate_nodes=1, min_available_nodes=1)
        self.like, self.names = like, names
        self._gather: Gather = gather_of(settings)
        self._claims = claims if settings.site_weights == "examples" else lambda site: 1.0
        self._most, self._classes = settings.max_site_weight, classes
        self._optimizer, self._sent = optimizer_of(settings), like
        self._asked: list[str] = []
        self.reports: dict[str, Report] = {}
        self.dropped: dict[str, str] = {}
        self.scaled: Sequence[str] = ()
        self.contributions: Mapping[str, tuple[int, int]] = {}
        self.given: Mapping[str, tuple[int, int]] = {}

    @property
    def memory(self) -> State:
        """The state of the server's optimizer; empty without one."""
        return self._optimizer.memory if self._optimizer else {}

    @memory.setter
    def memory(self, memory: State) -> None:
        if self._optimizer:
            self._optimizer.memory = memory

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        return self._addressed(server_round, arrays, read_adapter(arrays, self.like), config, grid)

    def _addressed(
        self, server_round: int, arrays: ArrayRecord, sent: State, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        """The messages with these arrays, and what they stand for, `sent`, kept for the aggregation."""
        messages = list(super().configure_train(server_round, arrays, config, grid))
        self._sent = sent
        self._asked = [self.names[message.metadata.dst_node_id] for message in messages]
        return messages

    def counts(self, site: str, report: Report) -> bool:
        """True if the site's answer is to be aggregated."""
        return report.examples > 0

    @property
    def answered(self) -> State:
        """What the tensors in the answers to TRAIN must be like."""
        return self.like

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """The aggregate of the good replies, after the server's step; None if no site has trained."""
        asked, self._asked = self._asked, []  # a round that asks no site does not call `configure_train`
        weights = bounded({site: self._claims(site) for site in asked}, self._most)
        gathering = self._gather(self._sent)

        def take(site: str, report: Report, state: State) -> None:
            if site not in weights:
                raise ExchangeError("it was not asked")
            if self.counts(site, report):
                gathering.add(site, state, weights[site])

        self.screen(replies, self.answered, take)
        made, left_out, self.scaled, self.contributions = gathering.close()
        self.given = self.contributions
        self.dropped |= left_out
        self.reports = {site: report for site, report in self.reports.items() if site not in left_out}
        return (None if made is None else self.step(server_round, made)), None

    def step(self, server_round: int, made: State) -> ArrayRecord:
        """The next adapter, from the aggregate `made`."""
        return write_adapter(self._optimizer.step(server_round, self._sent, made) if self._optimizer else made)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Only collects the reports: see `reports`."""
        self.scaled = ()
        self.screen(replies, None, lambda *_: None)
        return None

    def screen(
        self,
        replies: Iterable[Message],
        like: Mapping[str, Tensor] | None,
        take: Callable[[str, Report, State], None],
    ) -> None:
        """Checks the replies and passes good ones to `take`, which may reject them. Sets `reports` and `dropped`."""
        self.reports, self.dropped = {}, {}
        for reply in replies:
            node = reply.metadata.src_node_id
            site = self.names.get(node)
            if reply.has_error():
                self.dropped[site or f"node {node}"] = reason(reply)
                continue
            try:
                if site is None:
                    raise ExchangeError("unknown node")
                if site in self.reports:
                    raise ExchangeError("it answered twice")
                report, state = read_answer(reply.content, like, self._classes)
                take(site, report, state)
                self.reports[site] = report
            except LedgerError:
                raise
            except (ExchangeError, UserError) as error:
                self.dropped[site or f"node {node}"] = str(error)
        self.reports = dict(sorted(self.reports.items()))


def gather_of(settings: Settings) -> Gather:
    """Begins the gathering that the settings ask for, once in each round."""
    if settings.dp == "central":
        return partial(Noised, norm=settings.clipping_norm, noise_multiplier=settings.noise_multiplier)
    limit = settings.update_limit
    if settings.compares_updates:
        return partial(Held, limit=limit, rule=rule_of(settings.strategy, settings.hostile_share))
    return partial(Sums, limit=limit)


def optimizer_of(settings: Settings) -> Optimizer | None:
    """The server's optimizer, if the settings ask for one."""
    if settings.strategy not in OPTIMIZERS:
        return None
    default = LORA_RATE if settings.method == LORA else WHOLE_MODEL_RATE
    if settings.method == "adapter":
        default = adapter_class(settings.adapter).server_rate
    return Optimizer(settings.strategy, settings.server_learning_rate or default)
