"""Inputs as strangers might make them, from whole ones, and what may become of them."""

from __future__ import annotations

import contextlib
import faulthandler
import json
import signal
from collections.abc import Iterator
from typing import Any

from hypothesis import strategies as st

from fedclip_flwr.base.errors import LONGEST, UNPRINTABLE, UserError
from fedclip_flwr.exchange.records import ExchangeError

PATIENCE = 60
"""Seconds for one input, on a machine however busy: what takes longer hangs."""


class HangError(BaseException):
    """One that no `except Exception` takes for a damaged file."""


class Tried:
    """How many inputs were tried, and how many of them were refused in words."""

    def __init__(self) -> None:
        self.inputs = self.refused = 0

    @contextlib.contextmanager
    def one(self, lines: int = 1) -> Iterator[None]:
        """One input: it is taken, or refused in plain words, in so many lines."""
        self.inputs += 1
        with in_time():
            try:
                yield
            except (UserError, ExchangeError) as error:
                self.refused += 1
                assert_plain(str(error), lines)


@contextlib.contextmanager
def in_time() -> Iterator[None]:
    def late(*_: object) -> None:
        raise HangError(f"not done in {PATIENCE} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(PATIENCE)
    faulthandler.dump_traceback_later(2 * PATIENCE, exit=True)  # where no signal is heard
    try:
        yield
    finally:
        signal.alarm(0)
        faulthandler.cancel_dump_traceback_later()
        signal.signal(signal.SIGALRM, before)


def assert_plain(text: str, lines: int = 1) -> None:
    """So many lines that say something, and do no more than that."""
    parts = text.split("\n  ")
    assert len(parts) <= lines, text
    for part in parts:
        assert part.strip()
        assert not UNPRINTABLE.search(part), repr(part)
        assert len(part) <= LONGEST
    text.encode()


NAMES = st.sampled_from(
    [
        *("cat", "dog", "a", "b", "classes", "features", "CON", "nul", "a.b", ".hidden", "-rf", "__proto__"),
        *("", ".", "..", " ", "../a", "../../x", "/etc/passwd", "a/b", "a\\b", "~", "x" * 300, "y" * 5000),
        *("a\nb", "a\rb", "a\tb", "a\0b", "\x1b[2J\x1b[1;1H", "\x85", "\u2028", "\u202egnp", "\ud800", "\udcff"),
        *("ü", "u\u0308", "数", "{}", "{0}", "%s", "$(id)", "'", '"', "|", ","),
    ]
)
NUMBERS = st.one_of(
    st.sampled_from([0, -1, 1, 2, 3, 2**31, 2**32, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 10**30, 10**400, -(10**400)]),
    st.sampled_from([0.0, -0.0, 0.5, 1.5, 1e38, 1e300, -1e308, 5e-324, float("inf"), float("-inf"), float("nan")]),
    st.integers(),
    st.floats(),
)
LETTERS = st.sampled_from(
    "ab cZ09_-./\\:|,={}[]()<>'\"%$#~*?!\0\n\r\t\x1b\x7f\x85\xa0\xffü\u0308\u2028\u202e数٣²\U0001f600\uffff"
)
TEXT = st.text(LETTERS, max_size=8)
"""Of few letters: hypothesis needs many seconds to get to know all of them."""
SIMPLE = st.one_of(st.none(), st.booleans(), NUMBERS, NAMES, TEXT)
VALUES = st.recursive(
    SIMPLE, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3), max_leaves=5
)
DEEP = [b"[" * 10**5, b'{"a":' * 10**5, b"[" * 10**5 + b"]" * 10**5, b"[" * 900 + b"]" * 900, b"9" * 5000, b"-", b""]


@st.composite
def changed(draw: st.DrawFn, facts: dict[str, Any]) -> dict[str, Any]:
    """The facts with some of them missing, or of another kind."""
    facts = dict(facts)
    for _ in range(draw(st.integers(0, 3))):
        key = draw(st.sampled_from([*sorted(facts), "other"]))
        how = draw(st.integers(0, 3))
        if how == 0:
            facts.pop(key, None)
        elif how == 1 and isinstance(facts.get(key), list) and facts[key]:
            own = list(facts[key])
            own[draw(st.integers(0, len(own) - 1))] = draw(SIMPLE)
            facts[key] = own
        elif how == 2 and isinstance(facts.get(key), list):
            facts[key] = draw(st.lists(NAMES, max_size=4))
        else:
            facts[key] = draw(VALUES)
    return facts


@st.composite
def json_bytes(draw: st.DrawFn, facts: dict[str, Any]) -> bytes:
    """A file that tells the facts, more or less."""
    facts = draw(changed(facts))
    data = json.dumps(facts, ensure_ascii=draw(st.booleans())).encode("utf-8", "surrogatepass")
    how = draw(st.integers(0, 9))
    if how == 0 and facts:  # a key twice, or something endless in the place of a value
        key = draw(st.sampled_from(sorted(facts)))
        value = draw(st.sampled_from(DEEP) | st.builds(lambda v: json.dumps(v).encode(), VALUES))
        return data[:-1] + b", " + json.dumps(key).encode() + b": " + value + b"}"
    if how == 1:
        return draw(st.sampled_from([*DEEP, b"null", b"[]", b'""', b"\xef\xbb\xbf{}", "{}".encode("utf-16")]))
    if how == 2:
        return draw(st.binary(max_size=64))
    return draw(mangled(data)) if how < 5 else data


@st.composite
def mangled(draw: st.DrawFn, data: bytes) -> bytes:
    """The data cut, flipped, doubled, or with a number in it that means much."""
    out = bytearray(data)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(out) - 1)))
        how = draw(st.integers(0, 5))
        if how == 0:
            del out[at:]
        elif how == 1:
            del out[at : at + draw(st.integers(1, 16))]
        elif how == 2 and out:
            out[at] ^= 1 << draw(st.integers(0, 7))
        elif how == 3:
            out[at:at] = draw(st.binary(min_size=1, max_size=8))
        elif how == 4:
            out[at:at] = out[at : at + 32]
        else:
            size, order = draw(st.sampled_from([1, 2, 4, 8])), draw(st.sampled_from(["little", "big"]))
            number = draw(
                st.sampled_from([0, 1, 2**7, 2**8 - 1, 20_000, 2**15, 2**16 - 1, 2**31 - 1, 2**32 - 1, 2**64 - 1])
            )
            out[at : at + size] = (number % 256**size).to_bytes(size, order)
    return bytes(out)


KINDS = ["F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "U16", "U32", "U64", "BOOL", "C64", "C128"]
KINDS += ["F8_E5M2", "F8_E4M3", "F8_E8M0", "F4", "F6_E2M3", "F6_E3M2", "f32", "", "O"]
BITS = {"F64": 64, "I64": 64, "U64": 64, "C64": 64, "F32": 32, "I32": 32, "U32": 32, "F4": 4}


@st.composite
def tensor_bytes(draw: st.DrawFn, tensors: dict[str, tuple[str, list[int], bytes]]) -> bytes:
    """A file safetensors with these tensors (their types, shapes and bytes), more or less."""
    header: dict[str, Any] = {}
    body = b""
    for name, (kind, shape, data) in tensors.items():
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [len(body), len(body) + len(data)]}
        body += data
    how = draw(st.integers(0, 9))
    if how < 6:
        for _ in range(draw(st.integers(1, 3))):
            name = draw(st.sampled_from(sorted(header)))
            part = draw(st.sampled_from(["dtype", "shape", "data_offsets", "all", "name", "body", "fitting"]))
            if part == "dtype":
                header[name]["dtype"] = draw(st.sampled_from(KINDS) | VALUES)
            elif part == "all":
                header[name] = draw(st.just(dict(header[name])) | VALUES)
            elif part == "name":
                header[draw(NAMES)] = header.pop(name)
            elif part == "body":
                body = draw(mangled(body))
            elif part == "fitting":  # another type, and all else as it has to be for that
                kind, many = draw(st.sampled_from(KINDS)), draw(st.integers(0, 6))
                size = many * BITS.get(kind, 16 if "16" in kind else 128 if kind == "C128" else 8) // 8
                header = {name: {"dtype": kind, "shape": [many], "data_offsets": [0, size]}}
                body = draw(st.binary(min_size=size, max_size=size))
            else:
                numbers = st.lists(st.integers(0, 9) | NUMBERS, max_size=4)
                header[name][part] = draw(numbers | VALUES)
            if not isinstance(header.get(name), dict) or not {"dtype", "shape"} <= header[name].keys():
                break
    text = json.dumps(header).encode()
    if how == 6:
        text = draw(json_bytes(header))
    text = text.ljust(-(-len(text) // 8) * 8)
    data = len(text).to_bytes(8, "little") + text + body
    if how == 7:
        length = draw(st.sampled_from([0, 1, len(text) - 1, len(text) + 1, 10**8, 2**31, 2**63, 2**64 - 1]))
        return length.to_bytes(8, "little") + text + body
    return draw(mangled(data)) if how in (8, 9) else data
