"""Adapter-only federated averaging, as a Flower strategy.

FedAvg (arXiv 1602.05629) over the tensors of the adapter. Deviations from Flower's `FedAvg`: each reply is looked at
before anything is made of it, and a bad one is dropped and named while the round goes on with the others; sites count
the same (as in FedCLIP) or by their examples; and each is added to the sum as it comes and let go of, so that memory
does not grow with the number of sites. The sum is made of whole numbers, so that the order of arrival changes no bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from flwr.app import ArrayRecord, Message, MetricRecord
from flwr.serverapp.strategy import FedAvg
from torch import Tensor

from fedclip_flwr.codecs import State
from fedclip_flwr.errors import UserError
from fedclip_flwr.exchange import ExchangeError, Report, read_answer, reason, write_adapter
from fedclip_flwr.learning import Mean


class AdapterFedAvg(FedAvg):
    """Averages adapters that have the names, shapes and types of `like`.

    `names` tells the sites' names by node id, and may grow during the run; `weight` how much a site counts, the same
    unless given. After each round `reports` holds what the good replies reported and `dropped` why the others were left
    out, both by site.
    """

    def __init__(
        self, like: Mapping[str, Tensor], names: Mapping[int, str], weight: Callable[[str], float] = lambda site: 1.0
    ) -> None:
        super().__init__(min_train_nodes=1, min_evaluate_nodes=1, min_available_nodes=1)
        self.like, self.names, self.weight = like, names, weight
        self.reports: dict[str, Report] = {}
        self.dropped: dict[str, str] = {}

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """The mean of the good replies' adapters; none if there is none, or none was trained."""
        mean = Mean(self.like, sum(map(self.weight, self.names.values())))

        def take(site: str, report: Report, state: State) -> None:
            if report.examples:
                mean.add(state, self.weight(site))

        self._screen(replies, self.like, take)
        return (write_adapter(mean.value), None) if mean.weight else (None, None)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Only sorts the replies: see `reports`."""
        self._screen(replies, None, lambda *_: None)
        return None

    def _screen(
        self,
        replies: Iterable[Message],
        like: Mapping[str, Tensor] | None,
        take: Callable[[str, Report, State], None],
    ) -> None:
        self.reports, self.dropped = {}, {}
        for reply in replies:
            node = reply.metadata.src_node_id
            site = self.names.get(node)
            if reply.has_error():
                self.dropped[site or f"node {node}"] = reason(reply)
                continue
            try:
                if site is None:
                    raise ExchangeError("nobody knows this node")
                if site in self.reports:
                    raise ExchangeError("it answered twice")
                report, state = read_answer(reply.content, like)
                take(site, report, state)
                self.reports[site] = report
            except (ExchangeError, UserError) as error:
                self.dropped[site or f"node {node}"] = str(error)
        self.reports = dict(sorted(self.reports.items()))
