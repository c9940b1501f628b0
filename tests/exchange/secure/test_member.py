from __future__ import annotations

import base64
from collections.abc import Callable

import numpy as np
import pytest

from fedclip_flwr.exchange.secure.masking import DIGEST, PRIVATE_PIECE, PUBLIC, SEED_PIECE, Numbers
from fedclip_flwr.exchange.secure.member import Member
from fedclip_flwr.exchange.secure.protocol import MaskingError
from tests.exchange.secure.rounds import CONTEXT, sent_on, travelled, vector


def five(step: str) -> tuple[dict[str, Member], dict[str, dict[str, bytes]]]:
    """Five members that are to take this step, and what has come for each."""
    members = {name: Member.begin(name, CONTEXT) for name in "abcde"}
    publics = {name: member.public for name, member in members.items()}
    if step == "shares":
        return members, {name: dict(publics) for name in members}
    letters = sent_on({name: member.share(publics) for name, member in members.items()})
    if step == "reveals":
        for name, member in members.items():
            member.mask(letters[name], vector(name))
    return members, letters


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda publics: [publics.pop(name) for name in "cde"], "2 members to share with, expected 3"),
        (lambda publics: publics.pop("a"), "own public keys"),
        (lambda publics: publics.update(a=publics["b"]), "own public keys"),
        (lambda publics: publics.update(b=publics["c"]), "two public keys are the same"),
        (lambda publics: publics.update(b=publics["b"][:PUBLIC] * 2), "two public keys are the same"),
        (lambda publics: publics.update(b=b"short"), "the wrong size"),
        (lambda publics: publics.update(b=b"\2" + b"\xff" * (2 * PUBLIC - 1)), "not a point on its curve"),
    ],
)
def test_sharing_is_refused(change: Callable[[dict[str, bytes]], object], why: str) -> None:
    members, publics = five("shares")
    sound = dict(publics["a"])
    change(publics["a"])
    with pytest.raises(MaskingError, match=why):
        members["a"].share(publics["a"])
    assert members["a"].share(sound).letters.keys() == set("bcde")  # what was refused has changed nothing


def tampered(letter: bytes) -> bytes:
    raw = bytearray(base64.urlsafe_b64decode(letter[: -2 * DIGEST]))
    raw[60] ^= 1
    return base64.urlsafe_b64encode(raw) + letter[-2 * DIGEST :]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda letters: letters.update(b=tampered(letters["b"])), "from b are corrupt"),
        (lambda letters: letters.update(b=letters["c"]), "from b are corrupt"),
        (lambda letters: letters.update(b=b""), "from b are corrupt"),
        (
            lambda letters: letters.update(b=letters["b"][:-1] + bytes([letters["b"][-1] ^ 1])),
            "from b do not match their digests",
        ),
        (lambda letters: letters.update(z=letters["b"]), "nothing was shared with: z"),
        (lambda letters: letters.update(a=letters["b"]), "nothing was shared with: a"),
        (lambda letters: [letters.pop(name) for name in "bcd"], "came from 2 members, expected 3"),
    ],
)
def test_masking_is_refused(change: Callable[[dict[str, bytes]], object], why: str) -> None:
    members, letters = five("vectors")
    sound = dict(letters["a"])
    change(letters["a"])
    with pytest.raises(MaskingError, match=why):
        members["a"].mask(letters["a"], vector("a"))
    assert len(members["a"].mask(sound, vector("a"))) == 50


def test_pieces_that_come_back_to_their_sender_or_are_of_another_round_are_refused() -> None:
    """The two have one key, whoever writes: so what is in them tells sender, receiver and round."""
    members = {name: Member.begin(name, CONTEXT) for name in "abc"}
    publics = {name: member.public for name, member in members.items()}
    sent = {name: member.share(publics) for name, member in members.items()}
    own = sent["a"].digests["b"]
    with pytest.raises(MaskingError, match="from b are of another round, sender or receiver"):
        members["a"].mask({"b": sent["a"].letters["b"] + own, "c": sent["c"].to("a")}, vector("a"))
    members["a"].context = "run 7, round 4"
    with pytest.raises(MaskingError, match="of another round, sender or receiver"):
        members["a"].mask({"b": sent["b"].to("a"), "c": sent["c"].to("a")}, vector("a"))


@pytest.mark.parametrize("numbers", [np.zeros(50, np.int32), np.zeros(50), np.zeros((5, 10), np.uint32)])
def test_other_numbers_are_refused(numbers: Numbers) -> None:
    members, letters = five("vectors")
    with pytest.raises(MaskingError, match="expected uint32 or uint64 in one"):
        members["a"].mask(letters["a"], numbers)


@pytest.mark.parametrize(
    ("survivors", "dropped", "why"),
    [
        ("abcd", "de", "both pieces of d are requested"),
        ("abcz", "de", "never arrived: those of z"),
        ("abc", "dz", "never arrived: those of z"),
        ("ab", "cde", "2 members came, expected 3"),
        ("bcde", "a", "this member is not among"),
        ("bcde", "", "this member is not among"),
    ],
)
def test_revealing_is_refused(survivors: str, dropped: str, why: str) -> None:
    members, _ = five("reveals")
    with pytest.raises(MaskingError, match=why):
        members["a"].reveal(survivors, dropped)
    pieces = members["a"].reveal("abc", "de")
    assert {name: len(piece) for name, piece in pieces.items()} == {
        **dict.fromkeys("abc", SEED_PIECE),
        **dict.fromkeys("de", PRIVATE_PIECE),
    }


def test_each_step_is_taken_once_and_in_order() -> None:
    members, publics = five("shares")
    for_a = sent_on({name: member.share(publics[name]) for name, member in members.items()})["a"]
    steps: dict[str, Callable[[Member], object]] = {
        "shares": lambda member: member.share(publics["a"]),
        "vectors": lambda member: member.mask(for_a, vector("a")),
        "reveals": lambda member: member.reveal("abcde", ""),
    }
    members["a"] = travelled(members["a"])
    for now, after in (("vectors", "reveals"), ("reveals", "nothing")):
        for other in steps.keys() - {now}:
            with pytest.raises(MaskingError, match=f"asked for {other}, expected to be asked for {now}"):
                steps[other](travelled(members["a"]))
        steps[now](members["a"])
        members["a"] = travelled(members["a"])
        assert members["a"].step == after
    for step in steps.values():
        with pytest.raises(MaskingError, match="expected to be asked for nothing"):
            step(members["a"])


def test_secrets_are_forgotten_when_they_are_no_longer_needed_and_never_shown() -> None:
    members, _ = five("vectors")
    assert len({secret for member in members.values() for secret in (member.seed, *member.private)}) == 3 * 5
    secrets = [members["a"].seed, *members["a"].private]
    assert all(len(secret) >= 32 and secret.hex() not in repr(members["a"]) for secret in secrets)
    members, _ = five("reveals")
    assert (members["a"].seed, members["a"].private) == (b"", [])
    members["a"].reveal("abcde", "")
    assert not any(value for key, value in members["a"].dump().items() if key not in ("name", "context", "step"))
