"""The ClientApp of a test: five sites that go wrong, each in another way, and a record of all that is sent.

A copy of the project's client_app.py lies beside it as honest.py. SPOIL tells what the five do: `spoil` their replies,
or stay `away`. SENT is a folder for the record.
"""

import json
import os
from pathlib import Path
from uuid import uuid4

import honest  # type: ignore[import-not-found]
import numpy as np
from flwr.app import Array, Context, Error, Message, MessageType
from flwr.clientapp import ClientApp
from flwr.clientapp.typing import ClientAppCallable


def record(message: Message, context: Context, answer: ClientAppCallable) -> Message:
    """Writes down the names and shapes of what is really sent."""
    reply = answer(message, context)
    if reply.has_content():
        content = {
            name: {key: list(value.shape) if isinstance(value, Array) else value for key, value in part.items()}
            for name, part in reply.content.items()
        }
        line = {"type": message.metadata.message_type, "node": context.node_config, "content": content}
        Path(os.environ["SENT"], uuid4().hex).write_text(json.dumps(line))
    return reply


def spoil(message: Message, context: Context, answer: ClientAppCallable) -> Message:
    """Sites 1 to 5 send not-a-number, a wrong shape, an error, a tensor more, and a false claim."""
    number, kind = context.node_config["partition-id"], message.metadata.message_type
    if number in range(1, 6) and os.environ["SPOIL"] == "away":
        return Message(Error(2, "away"), reply_to=message)
    reply = answer(message, context)
    if kind == MessageType.TRAIN and number in (1, 2, 4):
        arrays = reply.content.array_records["arrays"]
        if number == 1:
            arrays["outer.bias"] = Array(np.full(128, np.nan, np.float32))
        if number == 2:
            arrays["inner.weight"] = Array(np.zeros((128, 127), np.float32))
        if number == 4:
            arrays["images"] = Array(np.zeros(3, np.float32))
    if number == 5 and kind != MessageType.QUERY:
        metrics = reply.content.metric_records["metrics"]
        score = metrics["validation"]
        assert isinstance(score, list)
        examples, _, loss = map(float, score)
        metrics["validation"] = [examples, 5 * examples, loss]
    return reply


def fail(message: Message, context: Context, answer: ClientAppCallable) -> Message:
    if context.node_config["partition-id"] == 3 and message.metadata.message_type == MessageType.TRAIN:
        raise RuntimeError("the disk is on fire\nand nobody is looking")
    return answer(message, context)


app = ClientApp(mods=[record, spoil, honest.guard, fail])
app.query()(honest.hello)
app.train()(honest.learn)
app.evaluate()(honest.score)
