"""What travels between a site and the server, as Flower records, and what is checked when it arrives.

What may leave a site is told by `may_leave`, and nothing else: `check_outgoing` looks at every reply before it goes.
What the server sends, and what comes of it::

    QUERY     what the run is about  →  who the site is and how much it holds; or how far it has come with encoding
              (with secure aggregation three more, see `secure/`)
    TRAIN     an adapter             →  that adapter's scores at the site, and the adapter trained on
    EVALUATE  an adapter             →  its scores; or, if so asked, those of the site's own made from it

An adapter is whole, or a parcel (`codecs.py`) for someone who has another one, or, from the server, only the mark of
one that the site has. Any reply may be an error instead, with one line that says why.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from torch import Tensor

from fedclip_flwr.base import UserError
from fedclip_flwr.base.errors import one_line as one_line  # of all that comes from elsewhere
from fedclip_flwr.base.roles import HOLDOUT, ROLES
from fedclip_flwr.base.tensors import State
from fedclip_flwr.data import Vocabulary
from fedclip_flwr.exchange.codecs import CODECS, packed_size
from fedclip_flwr.exchange.session import Session
from fedclip_flwr.flower.sizes import message_size
from fedclip_flwr.learning.metrics import BINS, ClassCounts, Quality, Score

LACKS = 700
"""The code of a site's error that asks for the whole adapter."""
BLAMES = 701
"""That of one that can't go on for what another site has sent it; the reason is that one's number."""


def slice_of(round_timeout: float) -> float:
    """Seconds for which a site encodes until it answers a hello with its progress."""
    return min(60.0, round_timeout / 4)


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
    unit_length: bool = False  # whether its features were brought to unit length


class Progress(NamedTuple):
    """A site's answer to QUERY while it is encoding: so many of its images are done."""

    site: str
    encoded: int
    images: int


class LacksError(ExchangeError):
    """The site does not have the adapter that the message builds on."""


class Report(NamedTuple):
    """How the adapter that a site received does there, and how many examples it trained on."""

    examples: int
    validation: Score
    test: Quality


class Answer(NamedTuple):
    """A site's reply to TRAIN or EVALUATE; after EVALUATE there is no adapter."""

    report: Report
    state: State


MOST_IMAGES = 10**9
"""More are no site's."""
HELLO = frozenset(field.name for field in dataclasses.fields(Hello))
PROGRESS = frozenset(Progress._fields)
FIGURES = frozenset({"num-examples", "validation", "test"})
"""`validation`: examples, right ones, summed loss; `test` too, and balanced accuracy, macro F1 and gaps. In such lists
they take a third of the bytes that they would take by name."""
BY_CLASS = frozenset({"test-classes"})
"""For each class its examples, then the right ones of each, then how often each was predicted."""


def may_leave(adapter: Iterable[str], by_class: bool) -> dict[str, frozenset[str]]:
    """Everything that may leave a site: records, and what each may hold; `adapter` names the adapter's tensors, or the
    codec that has packed them.

    Besides these, an error's one line. `by_class`: the site's owner shares the counts by class.
    """
    figures = FIGURES | BY_CLASS if by_class else FIGURES
    return {"hello": HELLO, "progress": PROGRESS, "metrics": figures, "arrays": frozenset(adapter)}


def check_outgoing(content: RecordDict, adapter: Iterable[str], by_class: bool) -> None:
    """Raises unless all of the content may leave the site."""
    check_leaving(content, may_leave(adapter, by_class))


def check_leaving(content: RecordDict, allowed: Mapping[str, frozenset[str]]) -> None:
    """Raises unless all of the content is among these records, with no more in them."""
    for name, record in content.items():
        if name not in allowed or not set(record) <= allowed[name]:
            raise ExchangeError(f"{name} with {_names(record)} in it must not leave this site")


def reason(message: Message) -> str:
    """Why there is an error instead of an answer, in one line; Flower wraps the text of a site's exception."""
    said = message.error.reason or "an error without a reason"
    if raised := re.fullmatch(r"<class '(?:\w+\.)*(\w+)'>:<'(.*)'>", said, re.DOTALL):
        said = raised[2] if raised[1] == UserError.__name__ else f"{raised[1]}: {raised[2]}"
    return one_line(said)


def round_size(state: State, codec: str, key: str, report: Report) -> int:
    """How many bytes a round with one site has, there and back."""
    config, arrays = ConfigRecord({**write_task(key), "server-round": 1}), state
    if codec in CODECS:
        arrays = {codec: torch.zeros(packed_size(codec, state), dtype=torch.uint8)}
        config["state"] = config["base"] = "0" * MARK
    content = RecordDict({"arrays": write_adapter(arrays), "config": config})
    question = Message(content, dst_node_id=2**63, message_type=MessageType.TRAIN)
    question.metadata.__dict__.update(_run_id=2**63, _src_node_id=1, _message_id="0" * 64)  # as a grid does
    return message_size(question) + message_size(Message(write_answer(report, arrays), reply_to=question))


# What the server sends


class Task(NamedTuple):
    """What a message asks of a site: the round, what the run is about, the adapter.

    A hello brings the session and no adapter; later messages have the session's key only. `personal`: the site is to
    make an adapter of its own. `blend` is the share of the adapted feature where it is not the settings'. The adapter
    is in `arrays`; or it is the one marked `state`, which the site has or makes of these and the one marked `base`.
    """

    round: int
    session: Session | None
    key: str
    personal: bool
    blend: float | None
    state: str
    base: str
    arrays: ArrayRecord | None


def write_greeting(session: Session) -> ConfigRecord:
    """What a hello tells."""
    classes, prompts = map(list, session.vocabulary)
    facts = {"holdout": session.holdout, "model": session.model, "run": session.run}
    return ConfigRecord({**facts, "classes": classes, "prompts": prompts})


def write_task(key: str, personal: bool = False, blend: float | None = None) -> ConfigRecord:
    """The part of a message that is the same for all; Flower's strategies add `server-round`."""
    config = ConfigRecord({"session": key})
    if personal:
        config["personal"] = True
    if blend is not None:
        config["blend"] = blend
    return config


def read_task(content: RecordDict) -> Task:
    config: Mapping[str, Any] = content.config_records.get("config", ConfigRecord())

    def told(key: str, default: Any) -> Any:
        value = config.get(key, default)
        if type(value) is not type(default):
            raise ExchangeError("the server's message can't be understood: is its version of this package another one?")
        return value

    blend = told("blend", 1.0)
    if not 0 <= blend <= 1:
        raise ExchangeError(f"the server asks for a blend of {blend}, expected 0 to 1")
    classes, prompts = (tuple(map(str, told(key, []))) for key in ("classes", "prompts"))
    holdout, model, run = (told(key, "") for key in ("holdout", "model", "run"))
    if classes and not prompts:
        raise ExchangeError("the server's message names classes without a prompt for them")
    return Task(
        told("server-round", 0),
        Session(holdout, Vocabulary(classes, prompts), model, run) if classes else None,
        told("session", ""),
        told("personal", False),
        blend if "blend" in config else None,
        told("state", ""),
        told("base", ""),
        content.array_records.get("arrays"),
    )


# Adapters


MARK = 16


def mark_of(state: Mapping[str, Tensor]) -> str:
    """A short name for the numbers of an adapter."""
    whole = hashlib.sha256()
    for name in sorted(state):
        whole.update(name.encode() + b"\0")
        whole.update(state[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return whole.hexdigest()[:MARK]


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
        if _within(array.data) != wanted:
            raise ExchangeError(f"{name} is not what it claims to be, {_kind(*wanted)}")
        values = array.numpy()
    except ExchangeError:
        raise
    except Exception as error:  # of a damaged header, anything can come
        raise ExchangeError(f"{name} can't be unpacked ({one_line(error, 100)})") from None
    tensor = torch.from_numpy(np.asarray(values, order="C"))  # ascontiguousarray would make a row of a single number
    if not tensor.sum().isfinite() and not tensor.isfinite().all():  # the sum takes a tenth of the time
        raise ExchangeError(f"{name} has numbers that are not finite")
    return tensor


def _within(data: bytes) -> tuple[np.dtype[Any], tuple[int, ...]]:
    """The type and shape that numpy's header tells: numpy would take the memory for them before it reads on."""
    file = io.BytesIO(data)
    if np.lib.format.read_magic(file) != (1, 0):
        raise ValueError("it is of another version of numpy's format")
    shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    return dtype, shape


def _kind(dtype: object, shape: tuple[int, ...]) -> str:
    return one_line(f"{dtype}[{', '.join(map(str, shape))}]", 60)


def _names(names: Iterable[str]) -> str:
    return one_line(", ".join(sorted(names)), 100)


# What a site sends


def write_hello(hello: Hello) -> RecordDict:
    return RecordDict({"hello": ConfigRecord(dataclasses.asdict(hello))})


def write_progress(progress: Progress) -> RecordDict:
    return RecordDict({"progress": ConfigRecord(progress._asdict())})


def read_hello(content: RecordDict) -> Hello | Progress:
    if "progress" in content:
        return _progress(content)
    record = content.config_records.get("hello", ConfigRecord())
    if set(record) != HELLO:
        raise ExchangeError("its hello can't be understood: is its version of this package another one?")
    facts: dict[str, Any] = dict(record)
    _check_name_and_counts(facts["site"], facts["train"], facts["validation"], facts["test"])
    numbers = facts["classes"]
    if not isinstance(numbers, list) or any(type(number) is not int for number in numbers):
        raise ExchangeError("its hello has classes that are no numbers")
    if len(set(numbers)) != len(numbers):
        raise ExchangeError("its hello has a class more than once")
    if type(facts["unit_length"]) is not bool:
        raise ExchangeError("its hello has a unit_length that is neither true nor false")
    if any(not isinstance(facts[key], str) for key in ("role", "domain", "package")):
        raise ExchangeError("its hello has a role, domain or package that is no text")
    if facts["role"] not in ROLES or (facts["role"] == HOLDOUT and facts["train"] + facts["validation"]):
        raise ExchangeError(f"its hello has a role that can't be: {one_line(facts['role'], 40)}")
    return Hello(**{**facts, "domain": one_line(facts["domain"], 64)})


def _progress(content: RecordDict) -> Progress:
    record = content.config_records.get("progress", ConfigRecord())
    if set(record) != PROGRESS:
        raise ExchangeError("its progress can't be understood: is its version of this package another one?")
    facts: dict[str, Any] = dict(record)
    _check_name_and_counts(facts["site"], facts["encoded"], facts["images"])
    if facts["encoded"] > facts["images"]:
        raise ExchangeError(f"its progress can't be: {facts['encoded']:,} of {facts['images']:,} images")
    return Progress(**facts)


def _check_name_and_counts(name: object, *counts: object) -> None:
    if not isinstance(name, str) or not name or name != one_line(name, 64):
        raise ExchangeError("its hello has a name that can't be used: expected up to 64 characters on one line")
    if any(type(count) is not int or not 0 <= count <= MOST_IMAGES for count in counts):
        raise ExchangeError(f"its hello has counts that can't be: expected whole numbers from 0 to {MOST_IMAGES:,}")


def write_answer(report: Report, state: Mapping[str, Tensor] | None = None) -> RecordDict:
    test = report.test
    figures = MetricRecord(
        {
            "num-examples": report.examples,
            "validation": [float(value) for value in report.validation],
            "test": [*map(float, test.score), test.balanced_accuracy, test.macro_f1, *test.gaps],
        }
    )
    if test.classes:
        figures["test-classes"] = [count for counts in test.classes for count in counts]
    content = RecordDict({"metrics": figures})
    if state is not None:
        content["arrays"] = write_adapter(state)
    return content


def read_answer(content: RecordDict, like: Mapping[str, Tensor] | None = None, classes: int | None = None) -> Answer:
    """The answer; `like` is the adapter that must come with it, where one must; `classes` how many there are."""
    if extra := set(content) - {"metrics", "arrays"}:
        raise ExchangeError(f"the answer has more than it should: {_names(extra)}")
    if like is None and "arrays" in content:
        raise ExchangeError("the answer has an adapter that was not asked for")
    report = _report(content.metric_records.get("metrics", MetricRecord()))
    if classes and report.test.classes and len(report.test.classes.examples) != classes:
        raise ExchangeError(f"test: counts of {len(report.test.classes.examples):,} classes, expected {classes:,}")
    return Answer(report, read_adapter(content.array_records.get("arrays", ArrayRecord()), like) if like else {})


def _report(record: MetricRecord) -> Report:
    if set(record) not in (FIGURES, FIGURES | BY_CLASS):
        raise ExchangeError("the answer's figures are not those that were asked for")
    examples = record["num-examples"]
    if type(examples) is not int or examples < 0:
        raise ExchangeError(f"num-examples is {_told(examples)}, expected a count")
    validation, _ = _score("validation", record, 0)
    test, (balanced, f1, *gaps) = _score("test", record, 2 + BINS)
    for name, share in (("balanced accuracy", balanced), ("macro F1", f1)):
        if not 0 <= share <= 1:
            raise ExchangeError(f"test: {name} is {share}, expected a number from 0 to 1")
    if not sum(map(abs, gaps)) <= test.examples + 1e-6:  # also where one is not a number
        raise ExchangeError("test: the gaps of calibration are more than there are examples")
    by_class = _by_class(test, record["test-classes"]) if "test-classes" in record else None
    return Report(examples, validation, Quality(test, balanced, f1, gaps, by_class))


def _told(figure: object) -> str:
    """Lists may be long."""
    return f"a list of {len(figure):,}" if isinstance(figure, list) else one_line(figure, 40)


def _score(part: str, record: MetricRecord, more: int) -> tuple[Score, list[float]]:
    """The score, and so many figures more."""
    figures: Any = record[part]
    if type(figures) is not list or len(figures) != 3 + more or any(type(figure) is not float for figure in figures):
        raise ExchangeError(f"{part} is {_told(figures)}, expected {3 + more} numbers")
    examples, correct, loss, *others = figures
    if not (examples.is_integer() and correct.is_integer() and 0 <= correct <= examples):
        told = one_line(f"{correct:g} of {examples:g}", 60)
        raise ExchangeError(f"{part}: {told} examples are said to be right, expected a share of them")
    if examples > MOST_IMAGES:
        raise ExchangeError(f"{part}: {examples:g} examples, expected at most {MOST_IMAGES:,}")
    if not 0 <= loss <= 1e6 * max(examples, 1):
        raise ExchangeError(f"{part}: the loss is {loss}, expected a sum of such of {examples:g} examples")
    return Score(int(examples), int(correct), loss), others


def _by_class(score: Score, counts: Any) -> ClassCounts:
    if type(counts) is not list or len(counts) % 3 or not all(type(n) is int and n >= 0 for n in counts):
        raise ExchangeError("test: the counts by class are no counts")
    classes = len(counts) // 3
    known = ClassCounts(counts[:classes], counts[classes : 2 * classes], counts[2 * classes :])
    if [*map(sum, known)] != [score.examples, score.correct, score.examples]:
        raise ExchangeError("test: the counts by class do not add up")
    if any(c > min(n, p) for n, c, p in zip(*known, strict=True)):
        raise ExchangeError("test: more of a class are said to be right than there are")
    return known
