"""Flower's strategies that withstand hostile sites, each as a rule that aggregates many updates into one.

They get updates, not whole adapters: the result is the same, but distances between adapters that differ little would be
lost in float32's rounding. The assumed number of hostile sites follows from `hostile-share`, up to what a rule can
tolerate with the updates at hand.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from flwr.app import Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp.strategy import Bulyan, FedAvg, FedMedian, FedTrimmedAvg, Krum, MultiKrum

from fedclip_flwr.base import UserError, plugins
from fedclip_flwr.base.errors import one_line
from fedclip_flwr.base.tensors import State
from fedclip_flwr.exchange.records import write_adapter
from fedclip_flwr.server.averaging import Rule

Make = Callable[[int, int], FedAvg]
"""Makes Flower's strategy, given the number of updates and how many of them are hostile."""
STRATEGIES: dict[str, tuple[int, int, Make]] = {
    "fedmedian": (2, 1, lambda many, hostile: FedMedian()),
    "fedtrimmedavg": (2, 1, lambda many, hostile: FedTrimmedAvg(beta=(hostile + 0.25) / many)),  # it rounds down
    "krum": (2, 3, lambda many, hostile: Krum(num_malicious_nodes=hostile)),
    "multikrum": (
        2,
        3,
        lambda many, hostile: MultiKrum(num_malicious_nodes=hostile, num_nodes_to_select=many - hostile),
    ),
    "bulyan": (4, 3, lambda many, hostile: Bulyan(num_malicious_nodes=hostile)),
}
"""Each as (a, b, make): against f hostile updates it needs a·f + b in all."""


def rule_of(name: str, hostile_share: float, chosen: bool = False) -> Rule:
    """The rule of that name, or of a plug-in. `chosen`: see `plugins.load`."""
    own: dict[str, Rule] = {n: partial(_one_of, strategy, hostile_share) for n, strategy in STRATEGIES.items()}
    rule = plugins.load("strategy", name, own, callable, "a function that makes one update of several", chosen)
    return rule if name in own else partial(_checked, name, rule)


def _checked(name: str, rule: Rule, updates: Sequence[State]) -> State:
    """The plug-in's update; one that can't be used ends the run with one line."""
    problem, like = f"strategy = {name!r}", {n: (t.shape, t.dtype) for n, t in updates[0].items()}
    try:
        made = rule(updates)
        found = {n: (t.shape, t.dtype) for n, t in made.items()}
    except Exception as error:  # another's code can raise anything
        raise UserError(f"{problem} failed ({type(error).__name__}: {one_line(error)})") from error
    if found != like or not all(tensor.isfinite().all() for tensor in made.values()):
        raise UserError(f"{problem}: expected an update with the names, shapes and types of those given, and finite")
    return made


def _one_of(strategy: tuple[int, int, Make], hostile_share: float, updates: Sequence[State]) -> State:
    many = len(updates)
    per_hostile, more, make = strategy if many > 2 else STRATEGIES["fedmedian"]  # no rule can tell two apart
    hostile = max(min(math.ceil(hostile_share * many), (many - more) // per_hostile), 0)
    arrays, _ = make(many, hostile).aggregate_train(1, list(map(_reply, updates)))
    assert arrays is not None  # there is at least one
    return {name: torch.from_numpy(arrays[name].numpy()).to(tensor.dtype) for name, tensor in updates[0].items()}


def _reply(update: State) -> Message:
    content = RecordDict({"arrays": write_adapter(update), "metrics": MetricRecord({"num-examples": 1})})
    return Message(content, 1, MessageType.TRAIN)
