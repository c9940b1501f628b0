"""Whose sums several totals show: hand-made histories, and all multiples of small ones tried."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedclip_flwr.base.errors import UserError
from fedclip_flwr.exchange.secure import exposure
from fedclip_flwr.exchange.secure.exposure import Part, exposed


def totals(*sites: str) -> list[set[Part]]:
    """A total for each text; each letter is a site, a capital one the same site with other images."""
    return [{(letter.lower(), letter) for letter in each} for each in sites]


@pytest.mark.parametrize(
    ("history", "shown"),
    [
        (["abc"], ""),
        (["abc", "abcdef"], ""),
        (["abc", "abcdef", "abcdefghi", "defghi"], ""),
        (["abc", "ABC"], ""),
        (["abc", "bcde"], ""),  # a leaves beside two that are new
        (["abc", "Bcde"], ""),  # two leave, or change, beside two that are new
        (["abc", "abcde"], "de"),
        (["abcdef", "ef"], "ef"),  # too few are left
        (["abc", "Abc"], "a"),
        (["abc", "abcdef", "abcdefg"], "g"),
        (["abcd", "abcefg", "abc"], "d"),  # four changed, then three of them
        (["abcdef", "abc", "defg"], "g"),  # no two of them differ by so few
    ],
)
def test_histories(history: list[str], shown: str) -> None:
    assert exposed(totals(*history), 3) == [*shown]


@given(st.lists(st.sets(st.sampled_from("abcdefABCDEF"), min_size=3), min_size=1, max_size=3))
def test_it_is_what_trying_all_small_multiples_finds(history: list[set[str]]) -> None:
    found = set[str]()
    for multiples in itertools.product(range(-2, 3), repeat=len(history)):
        of = Counter[str]()
        for multiple, letters in zip(multiples, history, strict=True):
            of.update(dict.fromkeys(letters, multiple))
        sites = {letter.lower() for letter, times in of.items() if times}
        if 0 < len(sites) < 3:
            found.add("".join(sorted(sites)))
    shown = "".join(exposed(totals(*map("".join, history)), 3))
    assert shown in found if found else not shown


def test_a_history_that_is_too_long_to_try_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exposure, "MOST_TRIED", 3)
    with pytest.raises(UserError, match="too many versions to tell what their totals show together: start a new run"):
        exposed(totals("abcd", "abce", "abcf"), 50)
