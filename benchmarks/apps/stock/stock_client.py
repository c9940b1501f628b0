"""A site as Flower's examples have it, one message to train and one to evaluate, with the work of fedclip-flwr.

It holds the domain of its number, in a feature folder that its node config or the run's settings name.
"""

from __future__ import annotations

import sys
from functools import lru_cache

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from fedclip_flwr.base import Settings
from fedclip_flwr.features import open_features
from fedclip_flwr.learning import RECIPES, Adapter, Classes, Examples, evaluate, make_adapter, train
from fedclip_flwr.learning.training import split

app = ClientApp()


@lru_cache
def opened(data: str, number: int) -> tuple[Classes, list[Examples]]:
    """What images are compared with; and those for training, validation and test."""
    features = open_features(Settings(data=data))
    examples = features.examples(features.domains[number]).ready()
    return features.classes.ready(), [examples.rows(rows) for rows in split(len(examples.labels), 0)]


def received(message: Message, context: Context) -> tuple[Adapter, Classes, list[Examples]]:
    if "ray" in sys.modules:
        torch.set_num_threads(1)  # as our own sites do where they share the cores
    data = context.node_config.get("data", context.run_config["data"])
    classes, parts = opened(str(data), int(context.node_config.get("partition-id", 0)))
    adapter = make_adapter(str(context.run_config["adapter"]), classes.dim)
    adapter.load_state_dict(message.content.array_records["arrays"].to_torch_state_dict())
    return adapter, classes, parts


@app.train()
def learn(message: Message, context: Context) -> Message:
    adapter, classes, (own, _, _) = received(message, context)
    loss = train(adapter, own, classes, RECIPES["default"], learning_rate=1e-4)
    figures = MetricRecord({"num-examples": len(own.labels), "loss": loss})
    return Message(RecordDict({"arrays": ArrayRecord(adapter.state_dict()), "metrics": figures}), reply_to=message)


@app.evaluate()
def score(message: Message, context: Context) -> Message:
    adapter, classes, (_, validation, test) = received(message, context)
    figures = MetricRecord({"num-examples": len(test.labels)})
    for name, part in (("validation", validation), ("test", test)):
        figures[name] = evaluate(adapter, part, classes).accuracy or 0.0
    return Message(RecordDict({"metrics": figures}), reply_to=message)
