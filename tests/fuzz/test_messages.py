"""Messages: what a site gets, and what the server gets."""

from __future__ import annotations

import io
import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MessageType, MetricRecord, RecordDict
from hypothesis import given
from hypothesis import strategies as st

from fedclip_flwr.base.errors import one_line
from fedclip_flwr.data.vocabulary import Vocabulary
from fedclip_flwr.exchange import records
from fedclip_flwr.exchange.codecs import CODECS, packed_size
from fedclip_flwr.exchange.link import Downlink, SiteCache, StatesOnDisk
from fedclip_flwr.exchange.records import Hello, Progress, read_answer
from fedclip_flwr.exchange.session import Session
from fedclip_flwr.flower.sizes import message_size
from fedclip_flwr.learning.metrics import BINS
from tests.fuzz.hostile import LETTERS, NAMES, NUMBERS, TEXT, Tried, assert_plain, mangled

START = {"a": torch.linspace(-1, 1, 6).reshape(2, 3), "b": torch.tensor([0.5, -2.0, 3.0])}
WORDS = NAMES.filter(lambda text: not any("\ud800" <= c <= "\udfff" for c in text)) | TEXT
"""Halves of characters do not travel."""
WHOLE = st.sampled_from([0, -1, 1, 2, 2**31, 2**63 - 1, -(2**63)]) | st.integers(-(2**63), 2**63 - 1)
REAL = st.sampled_from([0.0, -1.0, 0.5, 1e308, math.inf, -math.inf, math.nan, 5e-324]) | st.floats()
SCALARS = [st.booleans(), WHOLE, REAL, WORDS, st.binary(max_size=8)]
CONFIG = st.one_of(*SCALARS, *(st.lists(kind, max_size=4) for kind in SCALARS))
METRIC = st.one_of(WHOLE, REAL, st.lists(WHOLE, max_size=24), st.lists(REAL, max_size=24))


def saved(values: Any, version: tuple[int, int] = (1, 0)) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, values, version)
    return file.getvalue()


def npy(header: str, body: bytes = b"") -> bytes:
    text = header.encode("latin-1", "replace")
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + body


HEADERS = st.builds(
    "{{'descr': {}, 'fortran_order': {}, 'shape': {}, }}{}".format,
    st.sampled_from(
        ["'<f4'", "'>f4'", "'|O'", "'<f8'", "'|V0'", "'<U0'", "[('a', '<f4')]", "'M8[s]'", "5", "'|V9999999'"]
    ),
    st.sampled_from(["False", "True", "0", "None"]),
    st.sampled_from(["(2, 3)", "(3,)", "(10**12,)", "(1000000000000,)", "(2, -3)", "(0, 9999999999)", "()", "[2, 3]"])
    | st.lists(NUMBERS.filter(lambda n: isinstance(n, int) and abs(n) < 10**30), max_size=3).map(
        lambda n: str(tuple(n))
    ),
    st.sampled_from(["", "\n", " " * 60 + "\n", "(" * 3000, "L", "\\", "'", "#", "\x00", "__import__('os')"]),
)
BYTES = st.one_of(
    st.binary(max_size=40),
    mangled(saved(np.zeros((2, 3), np.float32))),
    mangled(saved(np.zeros(3, np.float32))),
    st.builds(npy, HEADERS, st.binary(max_size=24)),
    st.sampled_from(
        [
            saved(np.zeros((2, 3), np.float32), (2, 0)),
            saved(np.zeros((2, 3), np.float32), (3, 0)),
            saved(np.full((2, 3), np.nan, np.float32)),
            saved(np.full(3, -np.inf, np.float32)),
            saved(np.asfortranarray(np.zeros((2, 3), np.float32))),
            pickle.dumps([1]),
            b"PK\x03\x04" + bytes(60),
            npy("(" * 9000),
            npy("[" * 200 + "]" * 200),
            npy("{'descr': '<f4', 'fortran_order': False, 'shape': (" + "9" * 5000 + ",)}"),
            npy("{'descr': '<f4', 'fortran_order': False, 'shape': (1, 2, " + "1, " * 2000 + ")}"),
        ]
    ),
)
SHAPES = st.sampled_from([(2, 3), (3,), (), (0,), (2**31 - 1,), (2, 3, 1), (-1,), (2**31 - 1, 2**31 - 1), (9,) * 100])
KINDS = (
    st.sampled_from(["float32", "float64", "uint8", "object", "|O", "V0", "bfloat16", "x\ny", "\x1b[2J", ""]) | WORDS
)
STYPES = st.sampled_from(["numpy.ndarray", "pickle", "torch", "", "\n"])
ARRAYS = st.one_of(
    st.builds(Array, st.just("float32"), st.sampled_from([(2, 3), (3,)]), st.just("numpy.ndarray"), BYTES),
    st.builds(Array, KINDS, SHAPES, STYPES, BYTES),
    st.sampled_from([Array(t.numpy()) for t in START.values()]),
)


@st.composite
def array_records(draw: st.DrawFn, good: dict[str, torch.Tensor]) -> ArrayRecord:
    whole = dict(records.write_adapter(good))
    for _ in range(draw(st.integers(0, 2))):
        name = draw(st.sampled_from(sorted(good)) | WORDS)
        if draw(st.integers(0, 4)):
            whole[name] = draw(ARRAYS)
        else:
            whole.pop(name, None)
    return ArrayRecord(whole)


@st.composite
def edited(draw: st.DrawFn, good: dict[str, Any], values: st.SearchStrategy[Any]) -> dict[str, Any]:
    facts = dict(good)
    for _ in range(draw(st.integers(0, 2))):
        key = draw(st.sampled_from([*sorted(good), "other"]) | WORDS)
        if draw(st.integers(0, 4)):
            facts[key] = draw(values)
        else:
            facts.pop(key, None)
    return facts


@st.composite
def contents(draw: st.DrawFn, good: RecordDict) -> RecordDict:
    """The records, some of them under another name, of another kind, missing, or more."""
    records = dict(good)
    for _ in range(draw(st.integers(0, 1))):
        name = draw(st.sampled_from([*sorted(good), "config", "hello", "progress", "metrics", "arrays"]) | WORDS)
        other: Any = draw(
            st.one_of(
                st.none(),
                st.builds(ConfigRecord, st.dictionaries(WORDS, CONFIG, max_size=2)),
                st.builds(MetricRecord, st.dictionaries(WORDS, METRIC, max_size=2)),
                array_records(START),
            )
        )
        if other is None:
            records.pop(name, None)
        else:
            records[name] = other
    return RecordDict(records)


SESSION = Session("photo", Vocabulary(("cat", "dog"), ("a {}",)), "0123", "run")
TASK = {
    **records.write_greeting(SESSION),
    "session": "0123abcd",
    "server-round": 3,
    "blend": 0.5,
    "personal": True,
    "state": "01",
    "base": "02",
}


@given(data=st.data())
def test_tasks(tried: Tried, data: st.DataObject) -> None:
    config = ConfigRecord(data.draw(edited(TASK, CONFIG)))
    content = data.draw(contents(RecordDict({"config": config, "arrays": data.draw(array_records(START))})))
    with tried.one():
        task = records.read_task(content)
        assert type(task.round) is int
        assert isinstance(task.key + task.state + task.base, str)
        assert task.blend is None or 0 <= task.blend <= 1
        if task.session:
            assert task.session.vocabulary.prompts
            assert len(task.session.key) == 16


@given(data=st.data())
def test_hellos(tried: Tried, data: st.DataObject) -> None:
    hello = records.write_hello(Hello("north", "train", "photo", 6, 2, 2, [0, 2], "0123"))["hello"]
    progress = records.write_progress(Progress("north", 3, 5))["progress"]
    name, record = data.draw(st.sampled_from([("hello", hello), ("progress", progress)]))
    content = data.draw(contents(RecordDict({name: ConfigRecord(data.draw(edited(dict(record), CONFIG)))})))
    with tried.one():
        found = records.read_hello(content)
        assert_plain(found.site)
        assert len(found.site) <= 64
        if isinstance(found, Hello):
            assert found.role in ("train", "holdout")
            assert min(found.train, found.validation, found.test) >= 0
            assert one_line(found.domain) == found.domain
        else:
            assert min(found.encoded, found.images) >= 0


FIGURES: dict[str, Any] = {
    "num-examples": 6,
    "validation": [2.0, 1.0, 0.5],
    "test": [3.0, 1.0, 4.25, 0.25, 0.25, 0.25, -0.5, *[0.0] * (BINS - 2)],
    "test-classes": [2, 1, 1, 0, 2, 1],
}


@st.composite
def figures(draw: st.DrawFn) -> dict[str, Any]:
    facts = draw(edited(FIGURES, METRIC))
    for key, kind in (("validation", REAL), ("test", REAL), ("test-classes", WHOLE)):
        if isinstance(facts.get(key), list) and facts[key] and draw(st.integers(0, 3)) == 0:
            own = list(facts[key])
            if type(own[0]) is type(FIGURES[key][0]):
                own[draw(st.integers(0, len(own) - 1))] = draw(kind)
                facts[key] = own
    return facts


@given(data=st.data())
def test_answers(tried: Tried, data: st.DataObject) -> None:
    records = RecordDict({"metrics": MetricRecord(data.draw(figures())), "arrays": data.draw(array_records(START))})
    content = data.draw(contents(records))
    like = START if data.draw(st.integers(0, 4)) else None
    with tried.one():
        report, state = read_answer(content, like)
        assert report.examples >= 0
        for score in (report.validation, report.test.score):
            assert 0 <= score.correct <= score.examples
            assert 0 <= score.loss < math.inf
        assert 0 <= report.test.calibration_error <= 1 + 1e-6
        assert all(math.isfinite(figure) for figure in report.test.figures().values())
        assert_state(state if like else START)


def assert_state(state: dict[str, torch.Tensor]) -> None:
    assert {n: (t.shape, t.dtype) for n, t in state.items()} == {n: (t.shape, t.dtype) for n, t in START.items()}
    assert all(bool(tensor.isfinite().all()) for tensor in state.values())


@given(record=array_records(START))
def test_adapters(tried: Tried, record: ArrayRecord) -> None:
    with tried.one():
        assert_state(records.read_adapter(record, START))


MARKS = st.sampled_from(["", "0" * 16, records.mark_of(START), "../../x", "a\nb", "f" * 5000, "F", "\0"]) | WORDS
PARCEL = {codec: torch.zeros(packed_size(codec, START), dtype=torch.uint8) for codec in CODECS}


@st.composite
def parcels(draw: st.DrawFn, codec: str) -> ArrayRecord:
    size = len(PARCEL[codec])
    if draw(st.integers(0, 3)):
        body = draw(st.binary(min_size=size, max_size=size))
        return records.write_adapter({codec: torch.frombuffer(bytearray(body), dtype=torch.uint8)})
    return draw(array_records({codec: PARCEL[codec]}))


@given(data=st.data(), codec=st.sampled_from(["float32", *CODECS]))
def test_what_a_site_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tried: Tried, data: st.DataObject, codec: str
) -> None:
    monkeypatch.setenv("FEDCLIP_HOME", str(tmp_path))
    record = data.draw(parcels(codec) if codec in CODECS else array_records(START))
    config = data.draw(edited({"state": data.draw(MARKS), "base": data.draw(MARKS)}, CONFIG))
    content = data.draw(contents(RecordDict({"config": ConfigRecord(config), "arrays": record})))
    before = set(tmp_path.parent.iterdir())
    with tried.one():
        assert_state(SiteCache(StatesOnDisk("s"), codec).take(records.read_task(content), START, lambda: START))
    assert set(tmp_path.parent.iterdir()) == before


def test_a_parcel_of_numbers_that_are_not_finite_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though its mark is right."""
    monkeypatch.setenv("FEDCLIP_HOME", str(tmp_path))
    bad = torch.full((9,), math.nan, dtype=torch.bfloat16).view(torch.uint8)
    made = {name: torch.full_like(tensor, math.nan) for name, tensor in START.items()}
    config = ConfigRecord({"state": records.mark_of(made), "base": records.mark_of(START)})
    content = RecordDict({"config": config, "arrays": records.write_adapter({"bfloat16": bad})})
    with pytest.raises(records.ExchangeError):
        SiteCache(StatesOnDisk("s"), "bfloat16").take(records.read_task(content), START, lambda: START)


@given(data=st.data(), codec=st.sampled_from(sorted(CODECS)))
def test_what_the_server_takes(tried: Tried, data: st.DataObject, codec: str) -> None:
    link = Downlink(START, codec, 0)
    metrics = MetricRecord(FIGURES)
    content = data.draw(contents(RecordDict({"metrics": metrics, "arrays": data.draw(parcels(codec))})))
    reply = Message(content, reply_to=Message(RecordDict(), 5, MessageType.TRAIN))
    with tried.one():
        assert message_size(reply) > 0
        link.receive(reply, START)
        assert_state(records.read_answer(reply.content, START).state)


@given(said=WORDS | st.builds("<class 'a.{}'>:<'{}'>".format, WORDS, st.text(LETTERS, max_size=40)))
def test_reasons(tried: Tried, said: str) -> None:
    reply = Message(Error(0, said), reply_to=Message(RecordDict(), 5, MessageType.TRAIN))
    with tried.one():
        reason = records.reason(reply)
        if reason:
            assert_plain(reason)
