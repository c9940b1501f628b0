from __future__ import annotations

import os

import numpy as np
import pytest

from fedclip_flwr.exchange.secure.masking import PRIVATE_PIECE, PUBLIC, SEED_PIECE
from fedclip_flwr.exchange.secure.member import Member
from fedclip_flwr.exchange.secure.protocol import LetterError, MaskingError
from fedclip_flwr.server.collector import Collector
from tests.exchange.secure.rounds import CONTEXT, TEN, summed, total, until_vectors, vector


def test_what_comes_from_a_member_late_twice_or_wrong_is_refused() -> None:
    collector, members = Collector(CONTEXT, 50, 20), {name: Member.begin(name, CONTEXT) for name in "abcd"}
    for name, member in members.items():
        collector.join(name, member.public)
    own = members["a"].public
    for public, why in (
        (b"short", "have 5 bytes, expected 98"),
        (b"\5" * 2 * PUBLIC, "not a point"),
        (Member.begin("e", CONTEXT).public[:PUBLIC] * 2, "duplicate public key"),
        (Member.begin("e", CONTEXT).public[:PUBLIC] + own[:PUBLIC], "duplicate public key"),
    ):
        with pytest.raises(MaskingError, match=why):
            collector.join("e", public)
    with pytest.raises(MaskingError, match="too late or twice"):
        collector.join("a", members["a"].public)

    sent = {name: members[name].share(publics) for name, publics in collector.neighbourhoods().items()}
    with pytest.raises(MaskingError, match="too late or twice"):
        collector.join("e", Member.begin("e", CONTEXT).public)
    with pytest.raises(MaskingError, match="addressed to the wrong members"):
        collector.share("a", sent["a"]._replace(letters={"b": sent["a"].letters["b"]}))
    with pytest.raises(MaskingError, match="addressed to the wrong members"):
        collector.share("a", sent["a"]._replace(digests={"a": b""}))
    with pytest.raises(MaskingError, match="longer than 1000"):
        collector.share("a", sent["a"]._replace(letters=dict.fromkeys("bcd", bytes(1001))))
    for wrong in ({"seed": b"x"}, {"digests": dict.fromkeys("abcd", b"x")}):
        with pytest.raises(MaskingError, match="digests have the wrong size"):
            collector.share("a", sent["a"]._replace(**wrong))
    with pytest.raises(MaskingError, match=r"vectors arrived .* from a member that was not asked"):
        collector.add("a", np.zeros(50, np.uint32))
    for name in "abcd":
        collector.share(name, sent[name])
    with pytest.raises(MaskingError, match="shares arrived too late, twice"):
        collector.share("a", sent["a"])

    masked = {name: members[name].mask(letters, vector(name)) for name, letters in collector.letters().items()}
    for other in (masked["a"][:-1], masked["a"].view(np.float32), masked["a"].astype(np.uint64)):
        with pytest.raises(MaskingError, match=r"expected uint32\[50\]"):
            collector.add("a", other)  # type: ignore[arg-type]
    for name in "abc":
        collector.add(name, masked[name])
    for name in "az":
        with pytest.raises(MaskingError, match="vectors arrived too late, twice"):
            collector.add(name, masked["a"])

    reveals = {name: members[name].reveal(*lists) for name, lists in collector.lists().items()}
    with pytest.raises(MaskingError, match="vectors arrived too late"):
        collector.add("d", masked["d"])
    with pytest.raises(MaskingError, match=r"reveals arrived .* from a member that was not asked"):
        collector.reveal("d", reveals["a"])
    with pytest.raises(MaskingError, match="not those requested"):
        collector.reveal("a", {**reveals["a"], "d": reveals["a"]["a"]})
    for name in "ab":
        collector.reveal(name, reveals[name])
    with pytest.raises(MaskingError, match="2 members revealed their piece of a, expected 3"):
        collector.sum()
    collector.reveal("c", reveals["c"])
    assert collector.sum().tolist() == collector.sum().tolist() == total("abc")


@pytest.mark.parametrize(("of", "damaged"), [("a", SEED_PIECE), ("a", 20), ("e", PRIVATE_PIECE), ("e", 20)])
def test_pieces_that_are_not_what_was_shared_are_found_out_and_whose_they_are(of: str, damaged: int) -> None:
    """The others' are enough."""
    collector, members = until_vectors("abcde", {"e": "vectors"}, 20)
    for name, lists in collector.lists().items():
        pieces = members[name].reveal(*lists)
        if name == "b":
            pieces[of] = pieces[of][:4] + os.urandom(damaged - 4) + pieces[of][damaged:]
            with pytest.raises(MaskingError, match="not the one that was shared"):
                collector.reveal(name, pieces)
        else:
            collector.reveal(name, pieces)
    assert collector.sum().tolist() == total("abcd")


@pytest.mark.parametrize("secret", ["seed", "private"])
def test_who_shares_what_is_no_secret_of_its_own_is_found_out(secret: str) -> None:
    collector, members = Collector(CONTEXT, 50, 20), {name: Member.begin(name, CONTEXT) for name in "abcde"}
    for name, member in members.items():
        collector.join(name, member.public)
    for name, publics in collector.neighbourhoods().items():
        shares = members[name].share(publics)
        if name == "b" and secret == "seed":
            shares = shares._replace(seed=bytes(32))
        if name == "b" and secret == "private":  # its pieces are those of another key than it sent
            honest, members["b"] = members["b"], Member.begin("b", CONTEXT)
            members["b"].private[1] = honest.private[1]
            shares = members["b"].share({**publics, "b": members["b"].public})
        collector.share(name, shares)
    for name, letters in collector.letters().items():
        if name != "b" or secret == "seed":
            collector.add(name, members[name].mask(letters, vector(name)))
    for name, lists in collector.lists().items():
        collector.reveal(name, members[name].reveal(*lists))
    with pytest.raises(LetterError, match="the pieces from b are inconsistent") as found:
        collector.sum()
    assert found.value.sender == "b"


def test_a_sum_of_two_is_not_made() -> None:
    """From it and the next one, in which the third takes part, that one's vector could be computed."""
    collector, members = until_vectors("abc", {"c": "vectors"}, 20)
    with pytest.raises(MaskingError, match=r"2 vectors arrived near [ab], expected 3: nothing is unmasked"):
        collector.lists()
    with pytest.raises(MaskingError, match="vectors of 2 members came, expected 3"):
        members["a"].reveal("ab", "c")


def test_a_round_with_too_few_members_ends() -> None:
    with pytest.raises(MaskingError, match="expected 3 or more"):
        Collector(CONTEXT, 50, most=2)
    with pytest.raises(MaskingError, match="from 2 members, expected 3 or more"):
        summed("ab", {})
    with pytest.raises(MaskingError, match="pieces came from 5 of 10 members: too few"):
        summed(TEN, dict.fromkeys(TEN[:5], "shares"))
    with pytest.raises(MaskingError, match=r"5 vectors arrived near site-.*, expected 6: nothing is unmasked"):
        summed(TEN, dict.fromkeys(TEN[:5], "vectors"))
    with pytest.raises(MaskingError, match="5 members revealed their piece of site-0, expected 6"):
        summed(TEN, dict.fromkeys(TEN[:5], "reveals"))
    with pytest.raises(MaskingError, match="no vector arrived"):
        summed(TEN, dict.fromkeys(TEN, "vectors"))
