"""What travels between a site and the server, as Flower records, and what is checked when it arrives.

What may leave a site is told by `may_leave`, and nothing else: `check_outgoing` looks at every reply before it goes.

    QUERY     hello       →  who the site is and how much it holds
    TRAIN     an adapter  →  that adapter's scores at the site, and the adapter trained on
    EVALUATE  an adapter  →  its scores; or, if the message names a run to personalise for, those of the site's own

Any reply may be an error instead, with one line that says why.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.common.serde import message_to_proto
from torch import Tensor

from fedclip_flwr.metrics import BINS, ClassCounts, Quality, Score
from fedclip_flwr.vocabulary import Vocabulary

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
    test: Quality


class Answer(NamedTuple):
    """A site's reply to TRAIN or EVALUATE; after EVALUATE there is no adapter."""

    report: Report
    state: State


HELLO = frozenset(field.name for field in dataclasses.fields(Hello))
SCORES = frozenset(f"{part}-{what}" for part in ("validation", "test") for what in Score._fields)
FIGURES = frozenset({"num-examples", "test-balanced-accuracy", "test-macro-f1", "test-gaps"}) | SCORES
BY_CLASS = frozenset(f"test-class-{what}" for what in ClassCounts._fields)


def may_leave(adapter: Iterable[str], by_class: bool) -> dict[str, frozenset[str]]:
    """Everything that may leave a site: records, and what each may hold; `adapter` names the adapter's tensors.

    Besides these, an error's one line. `by_class`: the site's owner shares the counts by class.
    """
    return {"hello": HELLO, "metrics": FIGURES | BY_CLASS if by_class else FIGURES, "arrays": frozenset(adapter)}


def check_outgoing(content: RecordDict, adapter: Iterable[str], by_class: bool) -> None:
    """Raises unless all of the content may leave the site."""
    allowed = may_leave(adapter, by_class)
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


def round_size(state: Mapping[str, Tensor], task: ConfigRecord, report: Report) -> int:
    """How many bytes a round with one site has, there and back."""
    content = RecordDict({"arrays": write_adapter(state), "config": ConfigRecord({**task, "server-round": 1})})
    question = Message(content, dst_node_id=2**63, message_type=MessageType.TRAIN)
    question.metadata.__dict__.update(_run_id=2**63, _src_node_id=1, _message_id="0" * 64)  # as a grid does
    return size(question) + size(Message(write_answer(report, state), reply_to=question))


# What the server sends


class Task(NamedTuple):
    """What a message asks of a site: the round, the domain no site trains on, the adapter.

    A hello comes without an adapter. It tells the vocabulary, and the model's content (empty if the server does not
    know it); later messages have the vocabulary's key only. `personal` is the run for which the site is to keep an
    adapter of its own, `blend` the share of the adapted feature where it is not the settings'.
    """

    round: int
    holdout: str
    vocabulary: Vocabulary | None
    key: str
    model: str
    personal: str
    blend: float | None
    state: ArrayRecord | None


def write_greeting(holdout: str, vocabulary: Vocabulary, model: str) -> ConfigRecord:
    """What a hello tells."""
    names, templates = map(list, vocabulary)
    return ConfigRecord({"holdout": holdout, "classes": names, "prompts": templates, "model": model})


def write_task(holdout: str, key: str, personal: str = "", blend: float | None = None) -> ConfigRecord:
    """The part of a message that is the same for all; Flower's strategies add `server-round`."""
    config = ConfigRecord({"holdout": holdout, "vocabulary": key})
    if personal:
        config["personal"] = personal
    if blend is not None:
        config["blend"] = blend
    return config


def read_task(content: RecordDict) -> Task:
    config = content.config_records.get("config", ConfigRecord())
    number: Any = config.get("server-round", 0)
    lists: list[Any] = [config.get(key, []) for key in ("classes", "prompts")]
    texts: list[Any] = [config.get(key, "") for key in ("holdout", "vocabulary", "model", "personal")]
    blend: Any = config.get("blend")
    told_well = blend is None or (type(blend) is float and 0 <= blend <= 1)
    if type(number) is not int or any(type(t) is not str for t in texts) or any(type(x) is not list for x in lists):
        told_well = False
    if not told_well:
        raise ExchangeError("the server's message can't be understood: is its version of this package another one?")
    holdout, key, model, personal = texts
    classes, prompts = (tuple(map(str, x)) for x in lists)
    told = Vocabulary(classes, prompts) if classes else None
    return Task(number, holdout, told, key, model, personal, blend, content.array_records.get("arrays"))


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
    tensor = torch.from_numpy(np.asarray(values, order="C"))  # ascontiguousarray would make a row of a single number
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
    for part, score in (("validation", report.validation), ("test", report.test.score)):
        numbers |= {f"{part}-{what}": value for what, value in score._asdict().items()}
    numbers["test-balanced-accuracy"] = report.test.balanced_accuracy
    numbers["test-macro-f1"] = report.test.macro_f1
    numbers["test-gaps"] = report.test.gaps
    if report.test.classes:
        numbers |= {f"test-class-{what}": values for what, values in report.test.classes._asdict().items()}
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
    if set(record) not in (FIGURES, FIGURES | BY_CLASS):
        raise ExchangeError("the answer's figures are not those that were asked for")
    examples = record["num-examples"]
    if type(examples) is not int or examples < 0:
        raise ExchangeError(f"num-examples is {one_line(examples, 40)}, expected a count")
    return Report(examples, _score("validation", record), _quality(record))


def _score(part: str, record: MetricRecord) -> Score:
    examples, correct, loss = (record[f"{part}-{what}"] for what in Score._fields)
    if type(examples) is not int or type(correct) is not int or not 0 <= correct <= examples:
        told = one_line(f"{correct} of {examples}", 60)
        raise ExchangeError(f"{part}: {told} examples are said to be right, expected a share of them")
    if type(loss) is not float or not 0 <= loss < math.inf:
        raise ExchangeError(f"{part}: the loss is {one_line(loss, 40)}, expected a finite sum")
    return Score(examples, correct, loss)


def _quality(record: MetricRecord) -> Quality:
    score = _score("test", record)
    balanced, f1 = (_share(name, record[name]) for name in ("test-balanced-accuracy", "test-macro-f1"))
    gaps: Any = record["test-gaps"]
    if not isinstance(gaps, list) or len(gaps) != BINS or not all(type(gap) is float for gap in gaps):
        raise ExchangeError(f"test: gaps of calibration are {one_line(gaps, 40)}, expected {BINS} numbers")
    if not sum(map(abs, gaps)) <= score.examples + 1e-6:  # also where one is not a number
        raise ExchangeError("test: the gaps of calibration are more than there are examples")
    return Quality(score, balanced, f1, gaps, _by_class(score, record) if set(record) >= BY_CLASS else None)


def _share(name: str, value: object) -> float:
    if type(value) is not float or not 0 <= value <= 1:
        raise ExchangeError(f"{name} is {one_line(value, 40)}, expected a number from 0 to 1")
    return value


def _by_class(score: Score, record: MetricRecord) -> ClassCounts:
    counts: list[Any] = [record[f"test-class-{what}"] for what in ClassCounts._fields]
    if not all(isinstance(c, list) and all(type(n) is int and n >= 0 for n in c) for c in counts):
        raise ExchangeError("test: the counts by class are no counts")
    known = ClassCounts(*counts)
    sums = [sum(count) for count in counts]
    if len({len(count) for count in counts}) > 1 or sums != [score.examples, score.correct, score.examples]:
        raise ExchangeError("test: the counts by class do not add up")
    if any(c > min(n, p) for n, c, p in zip(*known, strict=True)):
        raise ExchangeError("test: more of a class are said to be right than there are")
    return known
