from __future__ import annotations

import pytest

from fedclip_flwr.exchange.secure.masking import UINT32, UINT64, NumberType, neighbours, threshold
from fedclip_flwr.exchange.secure.member import Member
from fedclip_flwr.server.collector import Collector
from tests.exchange.secure.rounds import CONTEXT, STEPS, TEN, summed, total, vector


@pytest.mark.parametrize("dtype", [UINT32, UINT64], ids=str)
@pytest.mark.parametrize(
    "gone",
    [
        {},
        *({"site-0": step, "site-6": step} for step in STEPS),
        {"site-0": "vectors", "site-6": "vectors", "site-1": "reveals", "site-9": "reveals"},
        {"site-4": "keys", "site-8": "shares", "site-3": "vectors", "site-5": "reveals"},
    ],
    ids=lambda gone: "-".join(gone.values()) or "nobody",
)
def test_the_sum_is_that_of_the_sites_whose_vector_came(gone: dict[str, str], dtype: NumberType) -> None:
    came = [name for name in TEN if gone.get(name, "reveals") == "reveals"]
    assert summed(TEN, gone, dtype=dtype) == total(came, dtype)


def test_three_members_are_enough_and_one_of_them_may_not_reveal() -> None:
    assert summed("abc", {"b": "reveals"}) == total("abc")


def test_twenty_in_a_ring() -> None:
    names = [f"site-{number}" for number in range(20)]
    assert summed(names, {}, most=9) == total(names)
    gone = {"site-3": "keys", "site-13": "shares", "site-17": "vectors", "site-12": "vectors", "site-9": "reveals"}
    there = [name for name in names if gone.get(name, "reveals") == "reveals"]
    assert summed(names, gone, most=11) == total(there)


def test_a_site_with_too_few_neighbours_left_does_not_continue() -> None:
    """Five of the eight next to `lonely` do not share: it could not be unmasked, and the rest goes on without it."""
    names = [f"site-{number}" for number in range(40)]
    collector, members = Collector(CONTEXT, 50, most=9), {name: Member.begin(name, CONTEXT) for name in names}
    for name, member in members.items():
        collector.join(name, member.public)
    publics = collector.neighbourhoods()
    silent = sorted(publics["site-0"].keys() - {"site-0"})[:5]
    for name in publics.keys() - silent:
        collector.share(name, members[name].share(publics[name]))
    letters = collector.letters()
    assert "site-0" not in letters
    assert len(letters) >= 20
    for name, pieces in letters.items():
        collector.add(name, members[name].mask(pieces, vector(name)))
    for name, lists in collector.lists().items():
        collector.reveal(name, members[name].reveal(*lists))
    assert collector.sum().tolist() == total(letters)


def test_neighbours_are_each_others() -> None:
    names = [f"site-{number}" for number in range(40)]
    near = neighbours(names, 10, b"seed")
    assert near.keys() == set(names)
    assert all(len(near[name]) == 9 and name in near[name] for name in names)
    assert all(name in near[other] for name in names for other in near[name])
    assert near == neighbours(reversed(names), 10, b"seed")
    assert near != neighbours(names, 10, b"another")
    assert neighbours(names[:10], 10, b"seed") == dict.fromkeys(names[:10], frozenset(names[:10]))


def test_two_groups_of_a_threshold_have_a_member_in_common() -> None:
    assert [threshold(sharing) for sharing in (3, 4, 5, 10, 11)] == [2, 3, 3, 6, 6]
