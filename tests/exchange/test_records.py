from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.common.serde import message_to_proto

from fedclip_flwr.base.errors import UserError, one_line
from fedclip_flwr.data.vocabulary import Vocabulary
from fedclip_flwr.exchange import records
from fedclip_flwr.exchange.records import ExchangeError, Hello, Progress, Report
from fedclip_flwr.exchange.session import Session
from fedclip_flwr.flower.sizes import message_size
from fedclip_flwr.learning.adapters import ADAPTERS, make_adapter, tensor_names
from fedclip_flwr.learning.metrics import BINS, ClassCounts, Quality, Score

LIKE = {"a": torch.zeros(2, 3), "b": torch.zeros(3)}
GOOD = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor([0.1, -2.0, 3e-30])}
HELLO = Hello("north", "train", "photo", 6, 2, 2, [0, 2], "0123")
GAPS = [0.25, -0.5, *[0.0] * (BINS - 2)]
REPORT = Report(6, Score(2, 1, 0.5), Quality(Score(3, 0, 4.25), 0.0, 0.125, GAPS))
COUNTS = ClassCounts([2, 1], [1, 0], [2, 1])
SHARED = REPORT._replace(test=Quality(Score(3, 1, 4.25), 0.25, 0.25, GAPS, COUNTS))


def arrays(**changes: Any) -> ArrayRecord:
    """The good adapter with some of its arrays replaced (None: left out)."""
    whole = {**records.write_adapter(GOOD), **changes}
    return ArrayRecord({name: array for name, array in whole.items() if array is not None})


def test_an_adapter_comes_back_to_the_bit() -> None:
    back = records.read_adapter(records.write_adapter(GOOD), LIKE)
    assert all(torch.equal(back[name], GOOD[name]) and back[name].dtype == torch.float32 for name in GOOD)


def saved(values: object, **kind: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, values, **kind)  # type: ignore[arg-type]
    return file.getvalue()


def claiming(shape: str) -> bytes:
    """A header of numpy's, and nothing behind it."""
    text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}}}".encode()
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


B = np.zeros(3, np.float32)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"b": None}, "lacks b"),
        ({"c": Array(B)}, "unexpected tensors: c"),
        ({"b": Array(np.zeros(4, np.float32))}, r"b is float32\[4\], expected float32\[3\]"),
        ({"b": Array(np.zeros((3, 1), np.float32))}, r"float32\[3, 1\]"),
        ({"b": Array(np.zeros(3))}, r"b is float64\[3\], expected float32\[3\]"),
        ({"b": Array(np.array([0, np.nan, 0], np.float32))}, "b has numbers that are not finite"),
        ({"b": Array(np.array([0, -np.inf, 0], np.float32))}, "not finite"),
        ({"b": Array("float32", (3,), "numpy.ndarray", saved(np.zeros(4, np.float32)))}, "does not match the declared"),
        ({"b": Array("float32", (3,), "numpy.ndarray", saved(np.zeros(3)))}, "does not match the declared"),
        ({"b": Array("float32", (3,), "numpy.ndarray", b"\x93NUMPY")}, "can't be unpacked"),
        ({"b": Array("float32", (3,), "numpy.ndarray", b"")}, "can't be unpacked"),
        ({"b": Array("float32", (3,), "pickle", saved(B))}, "can't be unpacked"),
        ({"b": Array("float32", (3,), "numpy.ndarray", claiming("(10**12,)"))}, "can't be unpacked"),
        ({"b": Array("float32", (3,), "numpy.ndarray", claiming("(1000000000000,)"))}, "does not match the declared"),
        ({"b": Array("float32", (3,), "numpy.ndarray", claiming("(" * 500))}, "can't be unpacked"),
        ({"b": Array("float32", (3,), "numpy.ndarray", claiming("(3,), '"))}, "can't be unpacked"),
        ({"b": Array("float32", (3,), "numpy.ndarray", saved(B) + bytes(5000))}, "has 5,1"),
        (
            {"b": Array("float32", (3,), "numpy.ndarray", saved(np.array([{}], object), allow_pickle=True))},
            "does not match the declared",
        ),
    ],
)
def test_an_adapter_that_is_not_as_expected_is_refused(changes: dict[str, Any], expected: str) -> None:
    with pytest.raises(ExchangeError, match=expected):
        records.read_adapter(arrays(**changes), LIKE)


def test_a_name_of_a_million_letters_makes_no_line_of_a_million_letters() -> None:
    with pytest.raises(ExchangeError) as error:
        records.read_adapter(arrays(**{"x" * 1_000_000 + "\n": Array(B)}), LIKE)
    assert len(str(error.value)) < 200
    assert "\n" not in str(error.value)


def test_memory_is_not_taken_because_a_header_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Array, "numpy", lambda _: pytest.fail("memory was taken"))
    record = ArrayRecord({"b": Array("float32", (3,), "numpy.ndarray", claiming("(2000000000,)"))})
    with pytest.raises(ExchangeError, match="does not match the declared"):
        records.read_adapter(record, {"b": LIKE["b"]})


def test_a_hello_comes_back() -> None:
    assert records.read_hello(records.write_hello(HELLO)) == HELLO


@pytest.mark.parametrize(
    "changes",
    [
        {"site": ""},
        {"site": "two\nlines"},
        {"site": "x" * 65},
        {"site": 3},
        {"train": -1},
        {"test": 1.5},
        {"validation": True},
        {"classes": [0.5]},
        {"classes": 3},
        {"package": 7},
        {"unit_length": 1},
        {"plugins": "one"},
        {"plugins": [1]},
        {"plugins": ["two\nlines"]},
        {"plugins": ["x" * 201]},
        {"role": "watch"},
        {"role": "holdout"},  # and trains
        {"more": 1},
    ],
)
def test_a_hello_that_is_not_as_expected_is_refused(changes: dict[str, Any]) -> None:
    content = records.write_hello(HELLO)
    content.config_records["hello"].update(changes)
    with pytest.raises(ExchangeError, match="hello"):
        records.read_hello(content)


def test_an_answer_comes_back() -> None:
    answer = records.read_answer(records.write_answer(REPORT, GOOD), LIKE)
    assert answer.report == REPORT
    assert torch.equal(answer.state["a"], GOOD["a"])
    assert records.read_answer(records.write_answer(REPORT)) == (REPORT, {})
    assert records.read_answer(records.write_answer(SHARED)) == (SHARED, {})


def figures(part: str, **changes: Any) -> RecordDict:
    """The good answer, with some of the part's figures replaced."""
    content = records.write_answer(REPORT)
    names = ("examples", "correct", "loss", "balanced", "f1", *(f"gap{i}" for i in range(BINS)))
    kept: Any = content.metric_records["metrics"][part]
    content.metric_records["metrics"][part] = [
        changes.get(name, value) for name, value in zip(names, kept, strict=False)
    ]
    return content


NAN = float("nan")


@pytest.mark.parametrize(
    ("part", "changes", "expected"),
    [
        ("validation", {"correct": 10.0}, "10 of 2"),
        ("validation", {"correct": -1.0}, "-1 of 2"),
        ("validation", {"correct": 0.5}, "validation"),
        ("validation", {"examples": float("inf")}, "1 of inf"),
        ("validation", {"examples": NAN}, "1 of nan"),
        ("validation", {"examples": 1e300}, "1e\\+300 examples, expected at most 1,000,000,000"),
        ("validation", {"loss": 1.7e308}, "the loss is 1.7e\\+308"),
        ("validation", {"loss": NAN}, "the loss is nan, .*: with less noise, or a lower learning rate"),
        ("test", {"loss": NAN}, "loss"),
        ("test", {"loss": -1.0}, "loss"),
        ("test", {"balanced": 1.5}, "balanced accuracy is 1.5, expected a number from 0 to 1"),
        ("test", {"f1": NAN}, "macro F1 is nan"),
        ("test", {"gap3": NAN}, "exceed the number of examples"),
        ("test", {f"gap{i}": 0.5 for i in range(BINS)}, "exceed the number of examples"),
    ],
)
def test_figures_that_cannot_be_are_refused(part: str, changes: dict[str, Any], expected: str) -> None:
    with pytest.raises(ExchangeError, match=expected):
        records.read_answer(figures(part, **changes))


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("num-examples", -1, "num-examples"),
        ("num-examples", 2.0, "num-examples"),
        ("validation", [1.0, 1.0], "expected 3 numbers"),
        ("validation", [1, 1, 1], "expected 3 numbers"),
        ("test", 3.0, "expected 20 numbers"),
        ("test", [0.0] * 21, "expected 20 numbers"),
        ("test", [0.0] * 10**6, "test is a list of 1,000,000, expected 20 numbers"),
        ("test-classes", [3, 0], "are malformed"),
        ("more", 1, "not those that were asked for"),
    ],
)
def test_a_report_that_is_not_as_expected_is_refused(key: str, value: Any, expected: str) -> None:
    content = records.write_answer(REPORT)
    content.metric_records["metrics"][key] = value
    with pytest.raises(ExchangeError, match=expected):
        records.read_answer(content)


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ([3, 1, 1, 0, 2, 1], "add up"),
        ([2, 1, 0, 1, 0, 0, 2, 1, 1], "add up"),
        ([2, 1, 0, 1, 3, 0], "more correct examples"),
        ([2, 1, 1, 0, 2], "are malformed"),
        ([2, 1, 2, -1, 2, 1], "are malformed"),
        ([2.0, 1.0, 1.0, 0.0, 2.0, 1.0], "are malformed"),
    ],
)
def test_counts_by_class_that_cannot_be_are_refused(counts: Any, expected: str) -> None:
    content = records.write_answer(SHARED)
    content.metric_records["metrics"]["test-classes"] = counts
    with pytest.raises(ExchangeError, match=expected):
        records.read_answer(content)


def test_records_that_nobody_asked_for_are_refused() -> None:
    content = records.write_answer(REPORT, GOOD)
    with pytest.raises(ExchangeError, match="not asked for"):
        records.read_answer(content)
    content["images"] = ArrayRecord()
    with pytest.raises(ExchangeError, match="unexpected records: images"):
        records.read_answer(content, LIKE)


def test_an_answer_without_an_adapter_is_refused_where_one_is_needed() -> None:
    with pytest.raises(ExchangeError, match="lacks a, b"):
        records.read_answer(records.write_answer(REPORT), LIKE)


def test_a_single_number_keeps_its_shape() -> None:
    state = {"scale": torch.tensor(4.6)}
    assert torch.equal(records.read_adapter(records.write_adapter(state), state)["scale"], state["scale"])
    assert records.read_adapter(records.write_adapter(state), state)["scale"].shape == ()


def test_losses_of_choices_come_back() -> None:
    chosen = REPORT._replace(choices=[0.25, 3.5])
    assert records.read_answer(records.write_answer(chosen)).report.choices == [0.25, 3.5]
    assert records.read_answer(records.write_answer(REPORT)).report == REPORT


@pytest.mark.parametrize("losses", [[-1.0], [float("nan")], [1], [1e9], [0.5] * 1001, 0.5])
def test_losses_that_cannot_be_are_refused(losses: Any) -> None:
    figures = dict(records.write_answer(REPORT).metric_records["metrics"])
    with pytest.raises(ExchangeError, match="choices"):
        records.read_answer(RecordDict({"metrics": MetricRecord({**figures, "choices": losses})}))


def test_a_task_comes_back_and_nonsense_is_refused() -> None:
    config = records.write_task("0123", True)
    config["server-round"] = 3
    arrays = records.write_adapter(GOOD)
    task = records.read_task(RecordDict({"config": config, "arrays": arrays}))
    assert task == (3, None, "0123", True, None, "", "", arrays, 0, False, None)
    blended = records.write_task("0123", blend=0.25)
    assert records.read_task(RecordDict({"config": blended})).blend == 0.25
    session = Session("sketch", Vocabulary(("cat", "dog"), ("a {}", "the {}")), "0123", "run-7")
    greeting = records.write_greeting(session)
    assert records.read_task(RecordDict({"config": greeting})) == (
        0,
        session,
        "",
        False,
        None,
        "",
        "",
        None,
        0,
        False,
        None,
    )
    wrong = dict[str, Any](holdout=3, classes="cat", blend="auto", personal=1, state=7)
    wrong["server-round"] = 1.5
    for key, value in wrong.items():
        nonsense = RecordDict({"config": ConfigRecord({**greeting, key: value})})
        with pytest.raises(ExchangeError, match="malformed message from the server"):
            records.read_task(nonsense)
    with pytest.raises(ExchangeError, match="asks for a blend"):
        records.read_task(RecordDict({"config": ConfigRecord({**greeting, "blend": 1.5})}))


def test_equal_numbers_have_one_mark_and_others_another() -> None:
    mark = records.mark_of(GOOD)
    assert records.mark_of(dict(reversed({n: t.clone() for n, t in GOOD.items()}.items()))) == mark
    assert len(mark) == records.MARK
    for name in GOOD:
        other = {**GOOD, name: GOOD[name].nextafter(torch.tensor(9.0))}
        assert records.mark_of(other) != mark


FIGURES = {"num-examples", "validation", "test"}


def test_the_list_of_what_may_leave_a_site() -> None:
    """Written out by hand, so that an addition has to be made twice."""
    assert records.may_leave(tensor_names("attention"), by_class=False) == {
        "arrays": {"inner.weight", "inner.bias", "outer.weight", "outer.bias"},
        "hello": {
            "site",
            "role",
            "domain",
            "train",
            "validation",
            "test",
            "classes",
            "package",
            "unit_length",
            "plugins",
            "content",
        },
        "progress": {"site", "encoded", "images"},
        "metrics": FIGURES,
    }
    assert records.may_leave(["int8"], by_class=True) == {
        "arrays": {"int8"},
        "hello": records.HELLO,
        "progress": records.PROGRESS,
        "metrics": FIGURES | {"test-classes"},
    }
    assert records.may_leave([], by_class=False, choices=True)["metrics"] == FIGURES | {"choices"}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_what_a_site_writes_may_leave_it(kind: str) -> None:
    adapter = make_adapter(kind, 4)
    records.check_outgoing(records.write_answer(REPORT, adapter.state_dict()), tensor_names(kind), False)
    records.check_outgoing(records.write_answer(SHARED, adapter.state_dict()), tensor_names(kind), True)
    records.check_outgoing(records.write_hello(HELLO), tensor_names(kind), False)
    chosen = records.write_answer(REPORT._replace(choices=[0.5]))
    records.check_outgoing(chosen, tensor_names(kind), False, True)
    with pytest.raises(ExchangeError, match="choices"):
        records.check_outgoing(chosen, tensor_names(kind), False)


@pytest.mark.parametrize(
    "more",
    [
        {"images": ArrayRecord({"a": Array(B)})},
        {"arrays": ArrayRecord({"features": Array(B)})},
        {"metrics": MetricRecord({"labels": [1, 2]})},
        {"metrics": records.write_answer(SHARED)["metrics"]},
        {"hello": ConfigRecord({"path": "/data"})},
    ],
)
def test_nothing_else_may_leave_it(more: dict[str, Any]) -> None:
    with pytest.raises(ExchangeError, match="must not leave"):
        records.check_outgoing(RecordDict({**records.write_answer(REPORT, GOOD), **more}), LIKE, False)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a\n  b\tc\x1b[31m", "a b c [31m"),
        ("ü – 数", "ü – 数"),
        ("x" * 400, "x" * 299 + "…"),
        ("a\x85b\u2028c\u2029d\u202ee", "a b c d e"),
        ("half \ud800 of one \udcff", "half of one"),
    ],
)
def test_one_line(text: str, line: str) -> None:
    assert one_line(text) == line


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("no\nimages", "no images"),
        (None, "an error without a reason"),
        (f"{UserError}:<'it's another version:\nupdate'>", "it's another version: update"),
        (f"{ZeroDivisionError}:<'division by zero'>", "ZeroDivisionError: division by zero"),
    ],
)
def test_an_error_says_its_reason(said: str | None, expected: str) -> None:
    asked = Message(RecordDict(), dst_node_id=1, message_type="train")
    assert records.reason(Message(Error(7, said), reply_to=asked)) == expected


@pytest.mark.parametrize("kind", ADAPTERS)
def test_the_size_of_a_message_is_that_of_its_bytes(kind: str) -> None:
    question = Message(RecordDict({"config": records.write_task("0123", blend=0.5)}), 2**63, "train")
    for length in (1, 70, 3000):
        state = make_adapter(kind, length).state_dict() if length < 1000 else {"int8": torch.zeros(length)}
        asked = Message(RecordDict({"arrays": records.write_adapter(state), **question.content}), 2**63, "train")
        replies = [
            Message(records.write_answer(report, arrays), reply_to=asked)
            for report in (REPORT, SHARED)
            for arrays in (None, state)
        ]
        failed = Message(Error(2, "no\u00fc"), reply_to=asked)
        greeting = Message(records.write_hello(HELLO), reply_to=question)
        for message in (question, asked, failed, greeting, *replies):
            assert message_size(message) == len(message_to_proto(message).SerializeToString())


def test_a_message_whose_size_is_taken_stays_delivered() -> None:
    """In a simulation it would be delivered again: a site would do the work twice, and share two secrets."""
    for content in (RecordDict(), RecordDict({"config": records.write_task("0123")})):
        message = Message(content, 1, "train")
        message.metadata.delivered_at = "2026-01-02T03:04:05"
        before = dict(vars(message.metadata))
        message_size(message)
        assert vars(message.metadata) == before


def test_the_size_of_a_message_is_that_of_its_tensors_and_little_more() -> None:
    state = make_adapter("attention", 64).state_dict()
    message = Message(RecordDict({"arrays": records.write_adapter(state)}), 1, "train")
    assert 4 * 8320 < message_size(message) < 4 * 8320 + 1500


def test_progress_comes_back_unless_there_is_more_done_than_there_is() -> None:
    done = Progress("north", 7, 7)
    assert records.read_hello(records.write_progress(done)) == done
    with pytest.raises(ExchangeError, match="invalid progress: 8 of 7 images"):
        records.read_hello(records.write_progress(done._replace(encoded=8)))
