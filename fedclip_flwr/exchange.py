"""What travels between a site and the server, as Flower records, and what is checked when it arrives.

What may leave a site is told by `may_leave`, and nothing else: `check_outgoing` looks at every reply before it goes.

    QUERY     hello       →  who the site is and how much it holds
    TRAIN     an adapter  →  that adapter's scores at the site, and the adapter trained on
    EVALUATE  an adapter  →  its scores

Any reply may be an error instead, with one line that says why.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.common.serde import message_to_proto
from torch import Tensor

from fedclip_flwr.learning import Score

State = dict[str, Tensor]


class ExchangeError(ValueError):
    """A record that is not what it should be; the text says why in one line."""


@dataclass(frozen=True)
class Hello:
    """A site's answer to QUERY."""

    site: str
    role: str
    domain: str
    train: int
    validation: int
    test: int
    classes: list[int]
    package: str


class Report(NamedTuple):
    """How the adapter that a site received does there, and how many examples it trained on."""

    examples: int
    validation: Score
    test: Score


class Answer(NamedTuple):
    """A site's reply to TRAIN or EVALUATE; after EVALUATE there is no adapter."""

    report: Report
    state: State


HELLO = frozenset(field.name for field in dataclasses.fields(Hello))
FIGURES = frozenset(["num-examples", *(f"{part}-{what}" for part in ("validation", "test") for what in Score._fields)])


def may_leave(adapter: Iterable[str]) -> dict[str, frozenset[str]]:
    """Everything that may leave a site: records, and what each may hold; `adapter` names the adapter's tensors.

    Besides these, an error's one line.
    """
    return {"hello": HELLO, "metrics": FIGURES, "arrays": frozenset(adapter)}


def check_outgoing(content: RecordDict, adapter: Iterable[str]) -> None:
    """Raises unless all of the content may leave the site."""
    allowed = may_leave(adapter)
    for name, record in content.items():
        if name not in allowed or not set(record) <= allowed[name]:
            raise ExchangeError(f"{name} with {_names(record)} in it must not leave this site")


def one_line(text: object, most: int = 300) -> str:
    """The text without line breaks and control characters, and not endless."""
    line = " ".join(re.sub(r"[^\S ]|[^\x20-\x7e\xa0-\U0010ffff]", " ", str(text)).split())
    return line if len(line) <= most else line[: most - 1] + "…"


def size(message: Message) -> int:
    """How many bytes the message has as Flower serialises it."""
    return int(message_to_proto(message).ByteSize())


# What the server sends


class Task(NamedTuple):
    """What a message asks of a site: the round, the domain no site trains on, the adapter.

    A hello comes without an adapter, and tells the names of the classes instead.
    """

    round: int
    holdout: str
    class_names: tuple[str, ...]
    state: ArrayRecord | None


def write_task(holdout: str, class_names: Sequence[str] = ()) -> ConfigRecord:
    """The part of a message that is the same for all; Flower's strategies add `server-round`."""
    return ConfigRecord({"holdout": holdout, "classes": list(class_names)})


def read_task(content: RecordDict) -> Task:
    config = content.config_records.get("config", ConfigRecord())
    number, holdout, classes = config.get("server-round", 0), config.get("holdout", ""), config.get("classes", [])
    if type(number) is not int or type(holdout) is not str or not isinstance(classes, list):
        raise ExchangeError("the server's message can't be understood: is its version of this package another one?")
    return Task(number, holdout, tuple(map(str, classes)), content.array_records.get("arrays"))


# Adapters


def write_adapter(state: Mapping[str, Tensor]) -> ArrayRecord:
    return ArrayRecord({name: Array(tensor.detach().cpu().numpy()) for name, tensor in state.items()})


def read_adapter(record: ArrayRecord, like: Mapping[str, Tensor]) -> State:
    """The record's tensors, if they have the names, shapes and types of `like` and are finite."""
    if missing := like.keys() - record.keys():
        raise ExchangeError(f"the adapter lacks {_names(missing)}")
    if extra := record.keys() - like.keys():
        raise ExchangeError(f"the adapter has more than its tensors: {_names(extra)}")
    return {name: _tensor(name, record[name], tensor) for name, tensor in like.items()}


def _tensor(name: str, array: Array, like: Tensor) -> Tensor:
    wanted = np.dtype(str(like.dtype).removeprefix("torch.")), tuple(like.shape)
    claimed = array.dtype, tuple(array.shape)
    if claimed != (str(wanted[0]), wanted[1]):
        raise ExchangeError(f"{name} is {_kind(*claimed)}, expected {_kind(*wanted)}")
    if len(array.data) > like.nbytes + 1024:  # before it is unpacked: numpy's header is small
        raise ExchangeError(f"{name} comes with {len(array.data):,} bytes, expected about {like.nbytes:,}")
    try:
        values = array.numpy()
    except (TypeError, ValueError, EOFError, OSError, MemoryError) as error:
        raise ExchangeError(f"{name} can't be unpacked ({one_line(error, 100)})") from None
    if not isinstance(values, np.ndarray) or (values.dtype, values.shape) != wanted:
        raise ExchangeError(f"{name} is not what it claims to be, {_kind(*wanted)}")
    tensor = torch.from_numpy(np.ascontiguousarray(values))
    if not tensor.isfinite().all():
        raise ExchangeError(f"{name} has numbers that are not finite")
    return tensor


def _kind(dtype: object, shape: tuple[int, ...]) -> str:
    return one_line(f"{dtype}[{', '.join(map(str, shape))}]", 60)


def _names(names: Iterable[str]) -> str:
    return one_line(", ".join(sorted(names)), 100)


# What a site sends


def write_hello(hello: Hello) -> RecordDict:
    return RecordDict({"hello": ConfigRecord(dataclasses.asdict(hello))})


def read_hello(content: RecordDict) -> Hello:
    record = content.config_records.get("hello", ConfigRecord())
    if set(record) != HELLO:
        raise ExchangeError("its hello can't be understood: is its version of this package another one?")
    facts: dict[str, Any] = dict(record)
    name, counts = facts["site"], [facts["train"], facts["validation"], facts["test"]]
    if not isinstance(name, str) or not name or name != one_line(name, 64):
        raise ExchangeError("its hello has a name that can't be used: expected up to 64 characters on one line")
    if any(type(count) is not int or count < 0 for count in counts):
        raise ExchangeError("its hello has counts that are no counts")
    if not isinstance(facts["classes"], list) or any(type(number) is not int for number in facts["classes"]):
        raise ExchangeError("its hello has classes that are no numbers")
    if any(not isinstance(facts[key], str) for key in ("role", "domain", "package")):
        raise ExchangeError("its hello has a role, domain or package that is no text")
    return Hello(**{**facts, "domain": one_line(facts["domain"], 64)})


def write_answer(report: Report, state: Mapping[str, Tensor] | None = None) -> RecordDict:
    numbers: dict[str, int | float | list[int] | list[float]] = {"num-examples": report.examples}
    for part, score in (("validation", report.validation), ("test", report.test)):
        numbers |= {f"{part}-{what}": value for what, value in score._asdict().items()}
    content = RecordDict({"metrics": MetricRecord(numbers)})
    if state is not None:
        content["arrays"] = write_adapter(state)
    return content


def read_answer(content: RecordDict, like: Mapping[str, Tensor] | None = None) -> Answer:
    """The answer; `like` is the adapter that must come with it, where one must."""
    if extra := set(content) - {"metrics", "arrays"}:
        raise ExchangeError(f"the answer has more than it should: {_names(extra)}")
    if like is None and "arrays" in content:
        raise ExchangeError("the answer has an adapter that was not asked for")
    report = _report(content.metric_records.get("metrics", MetricRecord()))
    return Answer(report, read_adapter(content.array_records.get("arrays", ArrayRecord()), like) if like else {})


def _report(record: MetricRecord) -> Report:
    if set(record) != FIGURES:
        raise ExchangeError("the answer's figures are not those that were asked for")
    examples = record["num-examples"]
    if type(examples) is not int or examples < 0:
        raise ExchangeError(f"num-examples is {one_line(examples, 40)}, expected a count")
    return Report(examples, _score("validation", record), _score("test", record))


def _score(part: str, record: MetricRecord) -> Score:
    examples, correct, loss = (record[f"{part}-{what}"] for what in Score._fields)
    if type(examples) is not int or type(correct) is not int or not 0 <= correct <= examples:
        told = one_line(f"{correct} of {examples}", 60)
        raise ExchangeError(f"{part}: {told} examples are said to be right, expected a share of them")
    if type(loss) is not float or not 0 <= loss < math.inf:
        raise ExchangeError(f"{part}: the loss is {one_line(loss, 40)}, expected a finite sum")
    return Score(examples, correct, loss)
