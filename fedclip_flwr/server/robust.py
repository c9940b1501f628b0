"""Flower's strategies that withstand hostile sites, each as a rule that makes one update of many.

They are given updates, not whole adapters: what they do is the same wherever the origin is, but distances between
adapters that differ little would drown in float32. How many of the sites are taken to be hostile follows from
`hostile-share`, and is at most what a rule can bear with the answers that came.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from flwr.app import Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp.strategy import Bulyan, FedAvg, FedMedian, FedTrimmedAvg, Krum, MultiKrum

from fedclip_flwr.base.tensors import State
from fedclip_flwr.exchange.records import write_adapter
from fedclip_flwr.server.averaging import Rule

Make = Callable[[int, int], FedAvg]
"""Flower's strategy for so many updates, of which so many are hostile."""
STRATEGIES: dict[str, tuple[int, int, Make]] = {
    "fedmedian": (2, 1, lambda many, hostile: FedMedian()),
    "fedtrimmedavg": (2, 1, lambda many, hostile: FedTrimmedAvg(beta=(hostile + 0.5) / many)),  # it rounds down
    "krum": (2, 3, lambda many, hostile: Krum(num_malicious_nodes=hostile)),
    "multikrum": (
        2,
        3,
        lambda many, hostile: MultiKrum(num_malicious_nodes=hostile, num_nodes_to_select=many - hostile),
    ),
    "bulyan": (4, 3, lambda many, hostile: Bulyan(num_malicious_nodes=hostile)),
}
"""By name; against f hostile ones they need a·f + b updates, with these a and b."""


def rule_of(name: str, hostile_share: float) -> Rule:
    return partial(_one_of, STRATEGIES[name], hostile_share)


def _one_of(strategy: tuple[int, int, Make], hostile_share: float, updates: Sequence[State]) -> State:
    many = len(updates)
    per_hostile, more, make = strategy if many > 2 else STRATEGIES["fedmedian"]  # two can't be told apart
    hostile = max(min(math.ceil(hostile_share * many), (many - more) // per_hostile), 0)
    arrays, _ = make(many, hostile).aggregate_train(1, list(map(_reply, updates)))
    assert arrays is not None  # there are enough
    return {name: torch.from_numpy(arrays[name].numpy()).to(tensor.dtype) for name, tensor in updates[0].items()}


def _reply(update: State) -> Message:
    content = RecordDict({"arrays": write_adapter(update), "metrics": MetricRecord({"num-examples": 1})})
    return Message(content, 1, MessageType.TRAIN)
