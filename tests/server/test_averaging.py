from __future__ import annotations

import fractions
import math
import sys
from collections.abc import Mapping, Sequence
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor

from fedclip_flwr.base.errors import UserError
from fedclip_flwr.base.settings import ROBUST, Settings
from fedclip_flwr.base.tensors import length_of
from fedclip_flwr.server.averaging import Gathered, Held, Mean, Rule, Sums, bounded
from fedclip_flwr.server.robust import rule_of
from fedclip_flwr.server.strategy import gather_of


def mean(states: Sequence[Tensor], weights: Sequence[float] = (), groups: Sequence[int] = ()) -> Tensor:
    made, same = Mean({"a": states[0]}), [1] * len(states)
    for state, weight, group in zip(states, weights or same, groups or same, strict=True):
        made.add({"a": state}, weight, group)
    return made.value["a"]


def test_means_by_hand() -> None:
    states = [torch.tensor([1.0, 2.0]), torch.tensor([4.0, 8.0])]
    assert mean(states).tolist() == [2.5, 5.0]
    assert mean(states, [10, 20]).tolist() == [3.0, 6.0]
    assert mean(states).dtype == torch.float32


def test_in_a_mean_the_order_changes_no_bit_and_no_precision_is_lost() -> None:
    """In float32, or in float64 one after the other, these sums would differ by their order."""
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(2000, 50, generator=generator) * torch.logspace(-4, 3, 2000)[:, None]
    weights = torch.randint(1, 10_000, (2000,), generator=generator).tolist()
    there, back = mean([*states], weights), mean([*states.flip(0)], weights[::-1])
    assert torch.equal(there, back)
    exact = [[fractions.Fraction(x) for x in row] for row in states.tolist()]
    for column in range(50):
        true = sum(row[column] * w for row, w in zip(exact, weights, strict=True)) / sum(weights)
        assert there[column].item() == pytest.approx(float(true), rel=1e-7)


@pytest.mark.parametrize("weights", [[4096] * 3, [4095, 2, 4095], [1, 10**9], [10**9] * 9, [0.3] * 5 + [9000.5] * 3])
def test_no_sum_overflows_however_much_sites_weigh(weights: list[float]) -> None:
    """The largest number with each of these weights, in one group and in one for each."""
    largest = torch.tensor([Mean.LARGEST - 2**-10, -(Mean.LARGEST - 2**-10)])
    assert largest.abs().max() < Mean.LARGEST
    for groups in ([], list(range(len(weights)))):
        assert torch.equal(mean([largest] * len(weights), weights, groups), largest)


def test_what_weighs_little_keeps_its_precision_beside_what_weighs_a_billion_times_as_much() -> None:
    huge, small = torch.tensor([1e-4, 0.0]), torch.tensor([0.0, -1e-4])
    for states, weights in (([huge, small], [10**9, 1]), ([small, huge], [1, 10**9])):
        assert mean(states, weights).tolist() == pytest.approx([1e-4, -1e-13], rel=1e-3)


def test_how_sums_were_split_changes_no_bit() -> None:
    """A heavy one first leaves room for light ones, and the other way round; in groups that room is shared."""
    states = [*torch.randn(6, 5000, generator=torch.Generator().manual_seed(0))]
    weights, groups = [3000, 3000, 1, 10**7, 0.1, 1000], [1, 2, 1, 2, 3, 3]
    found = mean(states, weights)
    assert torch.equal(found, mean(states[::-1], weights[::-1]))
    assert torch.equal(found, mean(states, weights, groups))
    assert torch.equal(found, mean(states[::-1], weights[::-1], groups[::-1]))


SENT = {"a": torch.tensor([1.0, 1.0]), "b": torch.tensor([[2.0]])}


def moved(*by: float) -> dict[str, Tensor]:
    """What a site makes of what it was sent."""
    return {"a": SENT["a"] + torch.tensor(by[:2]), "b": SENT["b"] + by[2]}


def gathered(updates: Mapping[str, Sequence[float]], limit: float = 2.0, weight: float = 1.0) -> Gathered:
    gathering = Sums(SENT, limit)
    for site, update in updates.items():
        gathering.add(site, moved(*update), weight)
    return gathering.close()


def flat(found: Gathered) -> list[float]:
    """What the updates have come to."""
    assert found.state
    return torch.cat([(found.state[name] - SENT[name]).flatten() for name in SENT]).tolist()


def test_an_updates_length_is_that_of_all_its_numbers() -> None:
    assert length_of(moved(3.0, 0.0, 4.0), SENT) == 5.0
    assert length_of(SENT, SENT) == 0.0


def test_updates_within_the_limit_count_in_full() -> None:
    found = gathered({"one": (1, 0, 0), "two": (0, 2, 0), "three": (0, 0, -1)})
    assert flat(found) == pytest.approx([1 / 3, 2 / 3, -1 / 3])
    assert (dict(found.left_out), list(found.scaled)) == ({}, [])


@pytest.mark.parametrize("weight", [1.0, 10.0**9])
def test_longer_updates_come_out_at_the_limit_or_at_most_a_step_below(weight: float) -> None:
    """The limit is 2, the fourth step. 5 lies within the tenth, and is scaled down by six steps."""
    found = gathered({"one": (1, 0, 0), "two": (1, 0, 0), "three": (1, 0, 0), "far": (0, -5, 0)}, weight=weight)
    assert flat(found) == pytest.approx([3 / 4, -5 / 2**1.5 / 4, 0.0])
    assert 2 / 2**0.25 < 5 / 2**1.5 <= 2
    assert list(found.scaled) == ["far"]
    assert not found.left_out


def test_updates_beyond_all_measure_are_left_out_and_named() -> None:
    found = gathered({"one": (1, 0, 0), "two": (3, 0, 0), "three": (2, 0, 0), "far": (0, -5000, 0)}, limit=3.0)
    assert flat(found) == pytest.approx([2.0, 0.0, 0.0])
    assert list(found.left_out) == ["far"]
    assert found.left_out["far"].startswith("its update is 2,500 times as long as the sites' median, max-update-norm")


@pytest.mark.parametrize("many", [1, 2])
def test_half_of_the_sites_can_not_move_the_limit_by_long_updates(many: int) -> None:
    """The limit is 2, the fourth step. 5000 lies within the 50th, and is scaled down by 46 steps."""
    honest = {f"one {n}": (1, 0, 0) for n in range(many)}
    found = gathered({**honest, **{f"far {n}": (0, -5000, 0) for n in range(many)}})
    assert flat(found) == pytest.approx([1 / 2, -5000 / 2**11.5 / 2, 0.0])
    assert 2 / 2**0.25 < 5000 / 2**11.5 <= 2
    assert list(found.scaled) == [f"far {n}" for n in range(many)]
    assert not found.left_out


@pytest.mark.parametrize("many", [1, 2])
def test_half_of_the_sites_can_not_have_the_others_left_out_by_short_updates(many: int) -> None:
    """But they can have them scaled down: nobody can tell which half is honest."""
    tiny = {f"tiny {n}": (0, 1e-6, 0) for n in range(many)}
    found = gathered({**tiny, **{f"one {n}": (1, 0, 0) for n in range(many)}})
    assert max(map(abs, flat(found))) <= 2e-6
    assert list(found.scaled) == [f"one {n}" for n in range(many)]
    assert not found.left_out
    assert not gathered({**tiny, **{f"one {n}": (1, 0, 0) for n in range(many + 1)}}).scaled


def test_without_a_limit_all_count_in_full() -> None:
    assert flat(gathered({"one": (1, 0, 0), "far": (0, -5000, 0), "two": (2, 0, 0)}, limit=0.0)) == pytest.approx(
        [1.0, -5000 / 3, 0]
    )


def test_sites_that_send_back_what_they_got_crash_nothing_and_shift_no_limit() -> None:
    assert flat(gathered({"echo": (0, 0, 0)})) == [0, 0, 0]
    found = gathered({"echo": (0, 0, 0), "other": (0, 0, 0), "more": (0, 0, 0), "one": (4, 0, 0)})
    assert flat(found) == [1, 0, 0]
    assert Sums(SENT, 2.0).close() == Gathered(None, {}, [])


def test_in_whatever_order_updates_come_no_bit_changes() -> None:
    generator = np.random.default_rng(0)
    updates = {f"site {n}": (generator.normal(size=3) * 10 ** generator.uniform(-1, 1)).tolist() for n in range(30)}
    found = gathered(updates)
    assert found.scaled
    again = gathered(dict(reversed(updates.items())))
    assert flat(found) == flat(again)
    assert found.scaled == again.scaled


def test_numbers_that_would_overflow_are_refused_and_change_nothing() -> None:
    made = Sums(SENT, 3.0), Held(SENT, 3.0, lambda updates: updates[0])
    for gathering in made:
        gathering.add("one", moved(1.0, 0.0, 0.0), 1.0)
        for bad in (Mean.LARGEST, -1e30, float("nan")):
            with pytest.raises(UserError, match="a: expected numbers below 16,384"):
                gathering.add("bad", moved(0.0, bad, 0.0), 1.0)
        assert flat(gathering.close()) == [1.0, 0.0, 0.0]


def robust(strategy: str, updates: Sequence[Sequence[float]], limit: float = 0.0, **settings: float) -> list[float]:
    how = Settings(strategy=strategy, max_update_norm=limit, **settings)  # type: ignore[arg-type]
    gathering = gather_of(how)(SENT)
    for number, update in enumerate(updates):
        gathering.add(f"site {number}", moved(*update), 1.0)
    return flat(gathering.close())


FIVE = [(1, 0, 0), (2, 0, 0), (3, 0, 0), (4, 0, 0), (1000, 7, 0)]


def test_the_robust_strategies_by_hand() -> None:
    assert robust("fedmedian", FIVE) == pytest.approx([3, 0, 0])
    assert robust("fedtrimmedavg", FIVE) == pytest.approx([3, 0, 0])  # one of five on either side
    assert robust("fedtrimmedavg", FIVE, hostile_share=0.4) == pytest.approx([3, 0, 0])
    # of two neighbours each, 2 and 3 have the nearest (1 + 1); the first of them is taken
    assert robust("krum", FIVE) == pytest.approx([2, 0, 0])
    assert robust("multikrum", FIVE) == pytest.approx([2.5, 0, 0])  # all but one, which is the far one
    # of eleven with two hostile ones: seven are chosen by Krum, of which the three around the median make the mean
    eleven = [(n, 0, 0) for n in (1, 2, 3, 4, 5, 6, 7, 8, 9)] + [(900, 0, 0), (1000, 0, 0)]
    assert robust("bulyan", eleven) == pytest.approx([5, 0, 0], abs=1.0)


@pytest.mark.parametrize("strategy", ROBUST)
def test_the_robust_strategies_bear_few_sites_and_those_that_do_the_same(strategy: str) -> None:
    assert robust(strategy, [(1, 2, 3)]) == pytest.approx([1, 2, 3])
    assert robust(strategy, [(1, 2, 3), (3, 2, 1)]) == pytest.approx([2, 2, 2])
    for many in (3, 4, 7, 11, 19):
        assert robust(strategy, [(1, 2, 3)] * many) == pytest.approx([1, 2, 3])
        assert robust(strategy, [(0, 0, 0)] * many) == [0, 0, 0]


@pytest.mark.parametrize("strategy", ROBUST)
def test_behind_the_robust_strategies_there_is_the_same_limit(strategy: str) -> None:
    """And small updates on top of large adapters are not lost in rounding, as distances between adapters would be."""
    how = Settings(strategy=strategy)
    sent = {"a": torch.full((100,), 1000.0)}
    chance = torch.Generator().manual_seed(0)
    gathering, same = gather_of(how)(sent), torch.full((100,), 0.25)
    for number in range(8):
        gathering.add(f"site {number}", {"a": sent["a"] + same + 0.01 * torch.randn(100, generator=chance)}, 1.0)
    gathering.add("far", {"a": sent["a"] - 900.0}, 1.0)
    found = gathering.close()
    assert list(found.left_out) == ["far"]
    assert found.state
    assert (found.state["a"] - sent["a"]).tolist() == pytest.approx(same.tolist(), abs=0.05)


def test_a_claim_counts_for_at_most_n_times_the_median() -> None:
    assert bounded({"a": 10, "b": 30, "c": 10**9}, 10.0) == {"a": 10, "b": 30, "c": 300}
    assert bounded({"a": 10, "b": 10**9}, 0.0) == {"a": 10, "b": 10**9}
    assert bounded({}, 10.0) == {}


def test_half_of_the_sites_can_not_raise_the_bound_by_large_claims() -> None:
    assert bounded({"a": 100, "b": 10**9}, 3.0) == {"a": 100, "b": 300}
    assert bounded({"a": 10**9, "b": 100, "c": 10**9, "d": 10}, 3.0) == {"a": 300, "b": 100, "c": 300, "d": 10}


def test_an_update_that_is_held_and_too_long_is_scaled_down_before_a_rule_sees_it() -> None:
    """As in a mean: the limit is 2, the fourth step. 5 lies within the tenth, and is scaled down by six steps."""
    gathering = Held(SENT, 2.0, lambda updates: updates[0])
    for site, update in (("a far one", (0, -5, 0)), ("one", (1, 0, 0)), ("two", (1, 0, 0)), ("three", (1, 0, 0))):
        gathering.add(site, moved(*update), 1.0)
    found = gathering.close()
    assert flat(found) == pytest.approx([0, -5 / 2**1.5, 0])
    assert list(found.scaled) == ["a far one"]


def test_of_updates_that_are_equally_good_the_order_of_the_sites_decides_and_not_that_of_arrival() -> None:
    """Krum takes 2 or 3, whose neighbours are equally near."""
    gathering = gather_of(Settings(strategy="krum", max_update_norm=0.0))(SENT)
    for number in (2, 1, 0, 3, 4):
        gathering.add(f"site {number}", moved(*FIVE[number]), 1.0)
    assert flat(gathering.close()) == pytest.approx([2, 0, 0])


def test_a_share_of_the_sites_is_rounded_up() -> None:
    """A fifth of four is one on either side, and a twentieth of 47 is three."""
    assert robust("fedtrimmedavg", [*FIVE[1:]]) == pytest.approx([3.5, 0, 0])
    assert robust("fedtrimmedavg", [(1, 0, 0)] * 44 + [(1000, 0, 0)] * 3, hostile_share=0.05) == pytest.approx(
        [1, 0, 0]
    )


def plug_in(monkeypatch: pytest.MonkeyPatch, rule: object) -> Rule:
    """The rule of a strategy in a module that is imported already."""
    module = ModuleType("ours")
    module.__dict__["rule"] = rule
    monkeypatch.setitem(sys.modules, "ours", module)
    return rule_of("ours:rule", 0.2)


UPDATES = [{"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([3.0, 4.0])}]


def test_a_plug_in_makes_one_update_of_several(monkeypatch: pytest.MonkeyPatch) -> None:
    assert plug_in(monkeypatch, lambda updates: updates[1])(UPDATES) == UPDATES[1]
    gathering = gather_of(Settings(strategy="ours:rule"))({"w": torch.ones(2)})
    for site, update in zip("ab", UPDATES, strict=True):
        gathering.add(site, {"w": 1 + update["w"]}, 1.0)
    made = gathering.close().state
    assert made
    assert made["w"].tolist() == [4.0, 5.0]


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (lambda updates: updates[9], r"^strategy = 'ours:rule' failed \(IndexError: list index out of range\)$"),
        (lambda updates: None, "failed .AttributeError"),
        (lambda updates: {"v": updates[0]["w"]}, "expected an update with the names, shapes and types of those given"),
        (lambda updates: {"w": updates[0]["w"].double()}, "shapes and types of those given"),
        (lambda updates: {"w": updates[0]["w"][:1]}, "shapes and types of those given"),
        (lambda updates: {"w": updates[0]["w"] * math.nan}, "and finite"),
    ],
)
def test_what_a_plug_in_makes_is_checked(rule: object, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=expected):
        plug_in(monkeypatch, rule)(UPDATES)
