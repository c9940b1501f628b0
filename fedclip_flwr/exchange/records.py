"""The messages between site and server as Flower records, and the checks on arrival.

`may_leave` lists everything that may leave a site, and `ANSWERS` in `secure/protocol.py` the same for masking;
`guard` in `client_app.py` checks every reply against them. The server's messages, and a site's replies::

    QUERY     the session            →  the site's name, role and sizes; or its progress, while it is encoding
              (with secure aggregation three more, see `secure/`)
    TRAIN     an adapter             →  the adapter's scores at the site, and the adapter after training
              (in one round: a basis →  zero-shot's scores, and sums over the site's images)
    EVALUATE  an adapter             →  its scores; or, on request, those of the personal adapter trained from it

An adapter is sent complete, or as a payload (`codecs.py`) relative to a base, or, from the server, only as the mark of
one that the site has. Any reply may be an error instead, with one line that gives the reason.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from torch import Tensor

from fedclip_flwr.base import UserError
from fedclip_flwr.base.errors import one_line as one_line  # for any text from outside
from fedclip_flwr.base.roles import HOLDOUT, ROLES
from fedclip_flwr.base.tensors import State
from fedclip_flwr.data import Vocabulary
from fedclip_flwr.exchange.codecs import packed_size, packs
from fedclip_flwr.exchange.session import Session
from fedclip_flwr.flower.grids import act_as_server
from fedclip_flwr.flower.metadata import set_metadata
from fedclip_flwr.flower.sizes import message_size
from fedclip_flwr.learning.metrics import BINS, ClassCounts, Quality, Score

LACKS = 700
"""The error code with which a site asks for the complete adapter."""
BLAMES = 701
"""The error code of a site that can't continue because of another site's data; the reason is that site's number."""


def slice_of(round_timeout: float) -> float:
    """Seconds that a site may encode before it answers a hello with its progress."""
    return min(60.0, round_timeout / 4)


class ExchangeError(ValueError):
    """An invalid record; the text gives the reason in one line."""


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
    unit_length: bool = False  # whether its features were normalized
    plugins: list[str] = field(default_factory=list)  # each one's package, version and content hash
    content: str = ""  # with one round: a mark that changes when the site's images do


class Progress(NamedTuple):
    """A site's answer to QUERY while it is encoding: `encoded` of its `images` are done."""

    site: str
    encoded: int
    images: int


class LacksError(ExchangeError):
    """The site does not have the message's base adapter."""


class Report(NamedTuple):
    """The scores at a site of the adapter that it received, and the number of examples it trained on.

    `choices`: losses on validation images with other constants, if the server has asked for them.
    """

    examples: int
    validation: Score
    test: Quality
    choices: Sequence[float] = ()


class Answer(NamedTuple):
    """A site's reply to TRAIN or EVALUATE; after EVALUATE there is no adapter."""

    report: Report
    state: State


MOST_CHOICES = 1000
"""Maximum number of losses that a site may report for choices of constants."""
MOST_IMAGES = 10**9
"""Maximum number of images that a site may report."""
HELLO = frozenset(field.name for field in dataclasses.fields(Hello))
PROGRESS = frozenset(Progress._fields)
FIGURES = frozenset({"num-examples", "validation", "test"})
"""`validation`: examples, correct ones, summed loss; `test` too, with balanced accuracy, macro F1 and gaps. Lists take
a third of the bytes of named values."""
CHOICES = frozenset({"choices"})
"""For each of several choices the summed loss of the validation images (`learning/choosing.py`)."""
BY_CLASS = frozenset({"test-classes"})
"""The examples of each class, then the correct ones of each, then the predictions of each."""


def may_leave(adapter: Iterable[str], by_class: bool, choices: bool = False) -> dict[str, frozenset[str]]:
    """Everything that may leave a site in a hello, TRAIN or EVALUATE, besides an error's one line: records and keys.

    `adapter` has the names of the adapter's tensors, or of the codec that packed them. `by_class`: the site's owner
    shares the counts by class. `choices`: the run lets sites choose constants.
    """
    figures = FIGURES | (BY_CLASS if by_class else frozenset()) | (CHOICES if choices else frozenset())
    return {"hello": HELLO, "progress": PROGRESS, "metrics": figures, "arrays": frozenset(adapter)}


def check_outgoing(content: RecordDict, adapter: Iterable[str], by_class: bool, choices: bool = False) -> None:
    """Raise unless all of the content may leave the site."""
    check_leaving(content, may_leave(adapter, by_class, choices))


def check_leaving(content: RecordDict, allowed: Mapping[str, frozenset[str]]) -> None:
    """Raise if the content has other records than the allowed ones, or other keys in them."""
    for name, record in content.items():
        if name not in allowed or not set(record) <= allowed[name]:
            raise ExchangeError(f"{name} with {_names(record)} in it must not leave this site")


def reason(message: Message) -> str:
    """The reason of an error reply in one line, without what Flower wraps around the text of an exception."""
    text = message.error.reason or "an error without a reason"
    if raised := re.fullmatch(r"<class '(?:\w+\.)*(\w+)'>:<'(.*)'>", text, re.DOTALL):
        text = raised[2] if raised[1] == UserError.__name__ else f"{raised[1]}: {raised[2]}"
    return one_line(text)


def round_size(down: State, up: State, codec: str, key: str, report: Report) -> int:
    """The bytes of a round with one site, in both directions."""
    config = ConfigRecord({**write_task(key), "server-round": 1})
    if packs(codec):
        down = up = {codec: torch.zeros(packed_size(codec, down), dtype=torch.uint8)}
        config["state"] = config["base"] = "0" * MARK
    content = RecordDict({"arrays": write_adapter(down), "config": config})
    act_as_server()  # a sweep measures, too
    question = Message(content, dst_node_id=2**63, message_type=MessageType.TRAIN)
    set_metadata(question, run_id=2**63, src_node_id=1, message_id="0" * 64)  # as a grid does
    return message_size(question) + message_size(Message(write_answer(report, up), reply_to=question))


# What the server sends


class Task(NamedTuple):
    """A server's message to a site: the round, the session, the adapter.

    A hello has the session and no adapter; later messages have only the session's key. `personal`: train a personal
    adapter. `blend` is the share of the adapted feature if it differs from the settings. The adapter is in `arrays`; or
    `state` is its mark, and the site has it or decodes it from `arrays` and the adapter with the mark `base`. `bits`
    says in which unit sums are wanted (`learning/sums.py`); `choose`: score the choices of constants, too. `frozen` has
    tensors that the adapter needs and nobody trains, if a site can't make them from the settings.
    """

    round: int
    session: Session | None
    key: str
    personal: bool
    blend: float | None
    state: str
    base: str
    arrays: ArrayRecord | None
    bits: int = 0
    choose: bool = False
    frozen: ArrayRecord | None = None


def write_greeting(session: Session) -> ConfigRecord:
    """The config record of a hello."""
    classes, prompts = map(list, session.vocabulary)
    facts = {"holdout": session.holdout, "model": session.model, "run": session.run}
    return ConfigRecord({**facts, "classes": classes, "prompts": prompts})


def write_task(key: str, personal: bool = False, blend: float | None = None, choose: bool = False) -> ConfigRecord:
    """The config record common to all sites; Flower's strategies add `server-round`."""
    config = ConfigRecord({"session": key})
    if personal:
        config["personal"] = True
    if blend is not None:
        config["blend"] = blend
    if choose:
        config["choose"] = True
    return config


def read_task(content: RecordDict) -> Task:
    config: Mapping[str, Any] = content.config_records.get("config", ConfigRecord())

    def field(key: str, default: Any) -> Any:
        value = config.get(key, default)
        if type(value) is not type(default):
            raise ExchangeError("malformed message from the server: does it run another version of this package?")
        return value

    blend = field("blend", 1.0)
    if not 0 <= blend <= 1:
        raise ExchangeError(f"the server asks for a blend of {blend}, expected 0 to 1")
    classes, prompts = (tuple(map(str, field(key, []))) for key in ("classes", "prompts"))
    holdout, model, run = (field(key, "") for key in ("holdout", "model", "run"))
    if classes and not prompts:
        raise ExchangeError("the server's message has classes but no prompts")
    return Task(
        field("server-round", 0),
        Session(holdout, Vocabulary(classes, prompts), model, run) if classes else None,
        field("session", ""),
        field("personal", False),
        blend if "blend" in config else None,
        field("state", ""),
        field("base", ""),
        content.array_records.get("arrays"),
        field("bits", 0),
        field("choose", False),
        content.array_records.get(FROZEN),
    )


# Adapters


MARK = 16
FROZEN = "frozen"
"""The record of tensors that are sent, but not trained."""
NUMPY = "numpy.ndarray"
"""What Flower's arrays say of numpy's own format."""


def mark_of(state: Mapping[str, Tensor]) -> str:
    """A short hash of an adapter's numbers."""
    hasher = hashlib.sha256()
    for name in sorted(state):
        hasher.update(name.encode() + b"\0")
        hasher.update(state[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return hasher.hexdigest()[:MARK]


def write_adapter(state: Mapping[str, Tensor]) -> ArrayRecord:
    return ArrayRecord({name: Array(tensor.detach().cpu().numpy()) for name, tensor in state.items()})


def read_adapter(record: ArrayRecord, like: Mapping[str, Tensor]) -> State:
    """The record's tensors; raises unless they have the names, shapes and types of `like` and are finite."""
    if missing := like.keys() - record.keys():
        raise ExchangeError(f"the adapter lacks {_names(missing)}")
    if extra := record.keys() - like.keys():
        raise ExchangeError(f"the adapter has unexpected tensors: {_names(extra)}")
    return {name: _tensor(name, record[name], tensor) for name, tensor in like.items()}


def _tensor(name: str, array: Array, like: Tensor) -> Tensor:
    expected = np.dtype(str(like.dtype).removeprefix("torch.")), tuple(like.shape)
    declared = array.dtype, tuple(array.shape)
    if declared != (str(expected[0]), expected[1]):
        raise ExchangeError(f"{name} is {_kind(*declared)}, expected {_kind(*expected)}")
    if len(array.data) > like.nbytes + 1024:  # check before unpacking: numpy's header is small
        raise ExchangeError(f"{name} has {len(array.data):,} bytes, expected about {like.nbytes:,}")
    header = _usual_header(*expected)
    if array.stype == NUMPY and array.data.startswith(header) and len(array.data) == len(header) + like.nbytes:
        values: Any = np.frombuffer(array.data, expected[0], offset=len(header)).reshape(expected[1]).copy()
    else:
        values = _unpacked(name, array, expected)
    tensor = torch.from_numpy(np.asarray(values, order="C"))  # ascontiguousarray would turn a scalar into a row
    if not tensor.sum().isfinite() and not tensor.isfinite().all():  # the sum alone takes a tenth of the time
        raise ExchangeError(f"{name} has numbers that are not finite")
    return tensor


@lru_cache(maxsize=64)
def _usual_header(dtype: np.dtype[Any], shape: tuple[int, ...]) -> bytes:
    """The header that numpy itself writes: to compare it takes a tenth of the time that it takes to parse it."""
    file = io.BytesIO()
    facts = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, facts)
    return file.getvalue()


def _unpacked(name: str, array: Array, expected: tuple[np.dtype[Any], tuple[int, ...]]) -> Any:
    """The numbers of an array with another header."""
    try:
        if _header_of(array.data) != expected:
            raise ExchangeError(f"{name}: the data does not match the declared {_kind(*expected)}")
        return array.numpy()
    except ExchangeError:
        raise
    except Exception as error:  # a corrupt header can raise anything
        raise ExchangeError(f"{name} can't be unpacked ({one_line(error, 100)})") from None


def _header_of(data: bytes) -> tuple[np.dtype[Any], tuple[int, ...]]:
    """The type and shape in numpy's header, read first because numpy allocates memory for them before it reads on."""
    file = io.BytesIO(data)
    if np.lib.format.read_magic(file) != (1, 0):
        raise ValueError("unsupported version of numpy's format")
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
        raise ExchangeError("malformed hello: does it run another version of this package?")
    facts: dict[str, Any] = dict(record)
    _check_name_and_counts(facts["site"], facts["train"], facts["validation"], facts["test"])
    numbers = facts["classes"]
    if not isinstance(numbers, list) or any(type(number) is not int for number in numbers):
        raise ExchangeError("invalid hello: classes must be whole numbers")
    if len(set(numbers)) != len(numbers):
        raise ExchangeError("invalid hello: a class is listed more than once")
    if type(facts["unit_length"]) is not bool:
        raise ExchangeError("invalid hello: unit_length must be true or false")
    if any(not isinstance(facts[key], str) for key in ("role", "domain", "package", "content")):
        raise ExchangeError("invalid hello: role, domain, package and content must be text")
    plugins = facts["plugins"]
    if not isinstance(plugins, list) or any(type(text) is not str or text != one_line(text, 200) for text in plugins):
        raise ExchangeError("invalid hello: plugins must be short texts")
    if facts["role"] not in ROLES or (facts["role"] == HOLDOUT and facts["train"] + facts["validation"]):
        raise ExchangeError(f"invalid hello: invalid role: {one_line(facts['role'], 40)}")
    return Hello(**{**facts, "domain": one_line(facts["domain"], 64), "content": one_line(facts["content"], 64)})


def _progress(content: RecordDict) -> Progress:
    record = content.config_records.get("progress", ConfigRecord())
    if set(record) != PROGRESS:
        raise ExchangeError("malformed progress: does it run another version of this package?")
    facts: dict[str, Any] = dict(record)
    _check_name_and_counts(facts["site"], facts["encoded"], facts["images"])
    if facts["encoded"] > facts["images"]:
        raise ExchangeError(f"invalid progress: {facts['encoded']:,} of {facts['images']:,} images")
    return Progress(**facts)


def _check_name_and_counts(name: object, *counts: object) -> None:
    if not isinstance(name, str) or not name or name != one_line(name, 64):
        raise ExchangeError("invalid hello: the name must have 1 to 64 characters on one line")
    if any(type(count) is not int or not 0 <= count <= MOST_IMAGES for count in counts):
        raise ExchangeError(f"invalid hello: invalid counts: expected whole numbers from 0 to {MOST_IMAGES:,}")


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
    if report.choices:
        figures["choices"] = [float(loss) for loss in report.choices]
    content = RecordDict({"metrics": figures})
    if state is not None:
        content["arrays"] = write_adapter(state)
    return content


def read_answer(content: RecordDict, like: Mapping[str, Tensor] | None = None, classes: int | None = None) -> Answer:
    """The answer. `like`: the adapter that it must have, None for no adapter; `classes`: the number of classes."""
    if extra := set(content) - {"metrics", "arrays"}:
        raise ExchangeError(f"the answer has unexpected records: {_names(extra)}")
    if like is None and "arrays" in content:
        raise ExchangeError("the answer has an adapter that was not asked for")
    report = _report(content.metric_records.get("metrics", MetricRecord()))
    if classes and report.test.classes and len(report.test.classes.examples) != classes:
        raise ExchangeError(f"test: counts of {len(report.test.classes.examples):,} classes, expected {classes:,}")
    return Answer(report, read_adapter(content.array_records.get("arrays", ArrayRecord()), like) if like else {})


def _report(record: MetricRecord) -> Report:
    if set(record) - CHOICES not in (FIGURES, FIGURES | BY_CLASS):
        raise ExchangeError("the answer's figures are not those that were asked for")
    examples = record["num-examples"]
    if type(examples) is not int or examples < 0:
        raise ExchangeError(f"num-examples is {_shortened(examples)}, expected a count")
    validation, _ = _score("validation", record, 0)
    test, (balanced, f1, *gaps) = _score("test", record, 2 + BINS)
    for name, share in (("balanced accuracy", balanced), ("macro F1", f1)):
        if not 0 <= share <= 1:
            raise ExchangeError(f"test: {name} is {share}, expected a number from 0 to 1")
    if not sum(map(abs, gaps)) <= test.examples + 1e-6:  # also refuses NaN
        raise ExchangeError("test: the calibration gaps exceed the number of examples")
    by_class = _by_class(test, record["test-classes"]) if "test-classes" in record else None
    quality = Quality(test, balanced, f1, gaps, by_class)
    return Report(examples, validation, quality, _choices(record, validation.examples))


def _choices(record: MetricRecord, examples: int) -> Sequence[float]:
    losses: Any = record.get("choices", [])
    if type(losses) is not list or len(losses) > MOST_CHOICES:
        raise ExchangeError(f"choices is {_shortened(losses)}, expected at most {MOST_CHOICES} losses")
    if not all(type(loss) is float and 0 <= loss <= 1e6 * max(examples, 1) for loss in losses):
        raise ExchangeError("choices: expected finite losses")
    return losses or ()


def _shortened(figure: object) -> str:
    """The figure as short text, even if it is a long list."""
    return f"a list of {len(figure):,}" if isinstance(figure, list) else one_line(figure, 40)


def _score(part: str, record: MetricRecord, more: int) -> tuple[Score, list[float]]:
    """The score, and the `more` figures after it."""
    figures: Any = record[part]
    if type(figures) is not list or len(figures) != 3 + more or any(type(figure) is not float for figure in figures):
        raise ExchangeError(f"{part} is {_shortened(figures)}, expected {3 + more} numbers")
    examples, correct, loss, *others = figures
    if not (examples.is_integer() and correct.is_integer() and 0 <= correct <= examples):
        share = one_line(f"{correct:g} of {examples:g}", 60)
        raise ExchangeError(f"{part}: {share} examples are reported as correct, expected no more than there are")
    if examples > MOST_IMAGES:
        raise ExchangeError(f"{part}: {examples:g} examples, expected at most {MOST_IMAGES:,}")
    if not 0 <= loss <= 1e6 * max(examples, 1):
        diverged = ": with less noise, or a lower learning rate, it may not diverge" if math.isnan(loss) else ""
        raise ExchangeError(f"{part}: the loss is {loss}, expected a finite sum over {examples:g} examples{diverged}")
    return Score(int(examples), int(correct), loss), others


def _by_class(score: Score, counts: Any) -> ClassCounts:
    if type(counts) is not list or len(counts) % 3 or not all(type(n) is int and n >= 0 for n in counts):
        raise ExchangeError("test: the counts by class are malformed")
    classes = len(counts) // 3
    known = ClassCounts(counts[:classes], counts[classes : 2 * classes], counts[2 * classes :])
    if [*map(sum, known)] != [score.examples, score.correct, score.examples]:
        raise ExchangeError("test: the counts by class do not add up")
    if any(c > min(n, p) for n, c, p in zip(*known, strict=True)):
        raise ExchangeError("test: a class has more correct examples than examples or predictions")
    return known
