"""Adapter-only federated averaging, as a Flower strategy.

FedAvg (arXiv 1602.05629) over the tensors of the adapter. Deviations from Flower's `FedAvg`: each reply is looked at
before anything is made of it, and a bad one is dropped and named while the round goes on with the others; sites count
the same (as in FedCLIP) or by their examples; sums are made in double precision, in the order of the sites' names, so
that the order of arrival changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from flwr.app import ArrayRecord, Message, MetricRecord
from flwr.serverapp.strategy import FedAvg
from torch import Tensor

from fedclip_flwr.exchange import Answer, ExchangeError, Report, one_line, read_answer, write_adapter
from fedclip_flwr.learning import average


class AdapterFedAvg(FedAvg):
    """Averages adapters that have the names, shapes and types of `like`.

    `names` tells the sites' names by node id, and may grow during the run. After each round `reports` holds what the
    good replies reported and `dropped` why the others were left out, both by site.
    """

    def __init__(
        self, like: Mapping[str, Tensor], *, weights: str = "equal", names: Mapping[int, str] | None = None
    ) -> None:
        super().__init__(min_train_nodes=1, min_evaluate_nodes=1, min_available_nodes=1)
        self.like, self.weights = like, weights
        self.names = {} if names is None else names
        self.reports: dict[str, Report] = {}
        self.dropped: dict[str, str] = {}

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """The mean of the good replies' adapters; none if there is none, or none was trained."""
        answers = self._screen(replies, self.like)
        trained = [answers[site] for site in sorted(answers) if answers[site].report.examples]
        if not trained:
            return None, None
        shares = [float(answer.report.examples) for answer in trained] if self.weights == "examples" else None
        return write_adapter(average([answer.state for answer in trained], shares)), None

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Only sorts the replies: see `reports`."""
        self._screen(replies, None)
        return None

    def _screen(self, replies: Iterable[Message], like: Mapping[str, Tensor] | None) -> dict[str, Answer]:
        answers: dict[str, Answer] = {}
        self.dropped = {}
        for reply in replies:
            node = reply.metadata.src_node_id
            site = self.names.get(node, f"node {node}")
            if reply.has_error():
                self.dropped[site] = one_line(reply.error.reason or "an error without a reason")
                continue
            try:
                answers[site] = read_answer(reply.content, like)
            except ExchangeError as error:
                self.dropped[site] = str(error)
        self.reports = {site: answers[site].report for site in sorted(answers)}
        return answers
