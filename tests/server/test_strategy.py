from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MessageType, RecordDict
from flwr.serverapp import Grid

from fedclip_flwr.base.settings import Settings
from fedclip_flwr.exchange.records import Report, write_adapter, write_answer
from fedclip_flwr.learning.metrics import BINS, Quality, Score
from fedclip_flwr.server.strategy import AdapterFedAvg, Optimizer, optimizer_of

LIKE = {"w": torch.zeros(2)}
TEST = Quality(Score(4, 0, 2.0), 0.0, 0.0, [0.0] * BINS)
NAMES = {1: "c", 2: "a", 3: "b"}
EXAMPLES = {"c": 30, "a": 10, "b": 17}


def reply(node: int, values: list[float], examples: int = 1, **changes: Any) -> Message:
    """What a node answers to TRAIN; `changes` replace records of it."""
    asked = Message(RecordDict(), node, MessageType.TRAIN)
    report = Report(examples, Score(4, node % 5, 1.0), TEST)
    content = RecordDict({**write_answer(report, {"w": torch.tensor(values)}), **changes})
    return Message(content, reply_to=asked)


def failed(node: int, why: str) -> Message:
    return Message(Error(2, why), reply_to=Message(RecordDict(), node, MessageType.TRAIN))


def asking(one: AdapterFedAvg, nodes: Iterable[int]) -> AdapterFedAvg:
    """The strategy in a round in which it has asked these nodes to train the adapter that it began with."""
    grid = cast(Grid, SimpleNamespace(get_node_ids=lambda: [*nodes]))
    list(one.configure_train(1, write_adapter(one.like), ConfigRecord(), grid))
    return one


def strategy(claims: Callable[[str], float] | None = None, **settings: Any) -> AdapterFedAvg:
    """In a round in which all were asked."""
    if claims:
        settings["site_weights"] = "examples"
    return asking(AdapterFedAvg(LIKE, NAMES, Settings(**settings), claims or EXAMPLES.__getitem__, classes=7), NAMES)


def mean(replies: list[Message], **options: Any) -> list[float]:
    arrays, _ = strategy(**options).aggregate_train(1, replies)
    assert arrays is not None
    return list(map(float, arrays["w"].numpy()))


def test_sites_count_the_same_or_by_their_examples() -> None:
    replies = [reply(1, [3.0, 0.0]), reply(2, [5.0, 4.0])]
    assert mean(replies) == [4.0, 2.0]
    assert mean(replies, claims=EXAMPLES.__getitem__) == [3.5, 1.0]  # (30·3 + 10·5) / 40, (30·0 + 10·4) / 40


def test_what_a_site_claims_later_changes_nothing_of_its_weight() -> None:
    replies = [reply(1, [3.0, 0.0]), reply(2, [5.0, 4.0], examples=10**9)]
    assert mean(replies, claims=EXAMPLES.__getitem__) == [3.5, 1.0]


def test_a_claim_of_a_billion_examples_counts_for_three_times_the_median() -> None:
    """Of 10, 30 and 10⁹ examples the median is 30, so that the third weighs 90."""
    claims = {"a": 10, "c": 30, "b": 10**9}
    replies = [reply(1, [13.0, 0.0]), reply(2, [0.0, 13.0]), reply(3, [1.0, 1.0])]
    found = mean(replies, claims=claims.__getitem__, max_update_norm=0.0)
    assert found == pytest.approx([(30 * 13 + 90) / 130, (10 * 13 + 90) / 130])


def test_a_huge_claim_that_brings_no_answer_takes_nothing_of_the_others_precision() -> None:
    claims = {"a": 1, "b": 1, "c": 10**9}
    found = mean([reply(2, [1e-4, 0.0]), reply(3, [2e-4, 0.0])], claims=claims.__getitem__, max_site_weight=0.0)
    assert found == pytest.approx([1.5e-4, 0.0], rel=1e-6)


def test_the_order_of_arrival_changes_no_bit() -> None:
    generator = np.random.default_rng(0)
    replies = [reply(node, generator.normal(size=2).tolist()) for node in NAMES]
    claims = EXAMPLES.__getitem__
    assert mean(replies, claims=claims) == mean(replies[::-1], claims=claims)


def test_sums_are_made_in_double_precision() -> None:
    # in float32, 1e4 + 1e-4 is 1e4 again, and the mean would come out as 0
    replies = [reply(2, [1e4, 0.0]), reply(3, [1e-4, 0.0]), reply(1, [-1e4, 0.0])]
    assert mean(replies)[0] == pytest.approx(1e-4 / 3, rel=1e-6)


def test_replies_are_let_go_of_as_they_come() -> None:
    """Of a hundred replies never two are there at a time: memory does not grow with the sites."""
    most, there = 0, weakref.WeakSet[Message]()

    def replies() -> Iterator[Message]:
        nonlocal most
        for node in range(100):
            one = reply(node, [1.0, node])
            there.add(one)
            most = max(most, len(there))
            yield one

    names = {n: f"site {n}" for n in range(100)}
    arrays, _ = asking(AdapterFedAvg(LIKE, names, Settings()), names).aggregate_train(1, replies())
    assert arrays is not None
    assert arrays["w"].numpy().tolist() == [1.0, 49.5]
    assert most <= 2  # the one that comes, and the one that was looked at last


BAD: dict[str, dict[str, Any]] = {
    "a tensor more": {"arrays": ArrayRecord({"w": Array(np.zeros(2, np.float32)), "x": Array(np.zeros(1))})},
    "a wrong shape": {"arrays": ArrayRecord({"w": Array(np.zeros((2, 1), np.float32))})},
    "a wrong type": {"arrays": ArrayRecord({"w": Array(np.zeros(2))})},
    "too large": {"arrays": ArrayRecord({"w": Array(np.array([1, 1e20], np.float32))})},
    "not finite": {"arrays": ArrayRecord({"w": Array(np.array([1, np.nan], np.float32))})},
    "a false claim": {"metrics": write_answer(Report(1, Score(4, 20, 1.0), TEST))["metrics"]},
}


@pytest.mark.parametrize("bad", BAD)
def test_a_bad_reply_is_dropped_and_named_and_the_others_count(bad: str) -> None:
    one = strategy()
    arrays, _ = one.aggregate_train(1, [reply(1, [1.0, 1.0]), reply(2, [9.0, 9.0], **BAD[bad]), reply(3, [2.0, 2.0])])
    assert arrays is not None
    assert arrays["w"].numpy().tolist() == [1.5, 1.5]
    assert list(one.dropped) == ["a"]
    assert "\n" not in one.dropped["a"]
    assert list(one.reports) == ["b", "c"]


def test_an_error_is_named_in_one_line_and_an_unknown_node_by_its_number() -> None:
    one = strategy()
    one.aggregate_train(1, [failed(3, "no\nimages"), failed(7, "x"), reply(1, [1.0, 1.0])])
    assert one.dropped == {"b": "no images", "node 7": "x"}


def test_a_site_counts_once_and_a_node_that_nobody_knows_never() -> None:
    one = strategy()
    arrays, _ = one.aggregate_train(1, [reply(1, [1.0, 1.0]), reply(1, [9.0, 9.0]), reply(7, [5.0, 5.0])])
    assert arrays is not None
    assert arrays["w"].numpy().tolist() == [1.0, 1.0]
    assert one.dropped == {"c": "it answered twice", "node 7": "unknown node"}


def test_a_site_that_was_not_asked_does_not_count() -> None:
    one = asking(strategy(), [1, 2])
    arrays, _ = one.aggregate_train(1, [reply(1, [1.0, 1.0]), reply(3, [9.0, 9.0])])
    assert arrays is not None
    assert arrays["w"].numpy().tolist() == [1.0, 1.0]
    assert one.dropped == {"b": "it was not asked"}


def test_who_was_asked_is_forgotten_after_the_round() -> None:
    """Node 2 leaves for good during round 1; nobody is asked in round 2."""
    names = dict(NAMES)
    one = asking(AdapterFedAvg(LIKE, names, Settings()), [1, 2])
    del names[2]
    arrays, _ = one.aggregate_train(1, [reply(1, [1.0, 1.0])])
    assert arrays is not None
    assert one.aggregate_train(2, []) == (None, None)
    assert one.aggregate_train(2, [reply(1, [1.0, 1.0])]) == (None, None)
    assert one.dropped == {"c": "it was not asked"}


def test_a_site_that_trained_on_nothing_reports_but_does_not_count() -> None:
    one = strategy()
    arrays, _ = one.aggregate_train(1, [reply(1, [1.0, 1.0], examples=0), reply(2, [2.0, 2.0])])
    assert arrays is not None
    assert arrays["w"].numpy().tolist() == [2.0, 2.0]
    assert set(one.reports) == {"a", "c"}


def test_without_a_good_reply_there_is_no_mean() -> None:
    assert strategy().aggregate_train(1, [failed(1, "x")]) == (None, None)
    assert strategy().aggregate_train(1, [reply(1, [1.0, 1.0], examples=0)]) == (None, None)
    assert strategy().aggregate_train(1, []) == (None, None)


def test_evaluations_are_sorted_out_the_same_way() -> None:
    one = strategy()
    report = write_answer(Report(3, Score(4, 2, 1.0), TEST))
    good = Message(report, reply_to=Message(RecordDict(), 2, MessageType.EVALUATE))
    one.aggregate_evaluate(1, [good, reply(1, [1.0, 1.0]), failed(3, "x")])
    assert one.reports == {"a": Report(3, Score(4, 2, 1.0), TEST)}
    assert one.dropped == {"c": "the answer has an adapter that was not asked for", "b": "x"}


def steps(name: str, rate: float, means: list[list[float]]) -> list[list[float]]:
    """Where the server goes, round by round; the sites' mean is so far from where it was."""
    made, sent, path = Optimizer(name, rate), {"w": torch.tensor([0.5, -0.5])}, []
    for number, mean in enumerate(means, 1):
        sent = made.step(number, sent, {"w": sent["w"] + torch.tensor(mean)})
        assert sent["w"].dtype == torch.float32
        path.append(sent["w"].tolist())
    return path


STEPS = [[0.01, -0.02], [0.0, -0.02], [0.03, 0.01]]


def test_the_servers_steps_are_those_of_the_papers() -> None:
    """Adaptive federated optimization, arXiv 2003.00295, algorithm 2, with Flower's bias correction for Adam."""
    rate = 0.1
    for name in ("fedadam", "fedyogi", "fedadagrad"):
        at, m, v, path = np.array([0.5, -0.5]), np.zeros(2), np.zeros(2), []
        for number, step in enumerate(np.array(STEPS), 1):
            beta = 0.0 if name == "fedadagrad" else 0.9
            m = beta * m + (1 - beta) * step
            if name == "fedadam":
                v = 0.99 * v + 0.01 * step**2
            elif name == "fedyogi":
                v = v - 0.01 * step**2 * np.sign(v - step**2)
            else:
                v = v + step**2
            size = rate
            if name == "fedadam":
                size = rate * np.sqrt(1 - 0.99 ** (number + 1)) / (1 - 0.9 ** (number + 1))
            at = at + size * m / (np.sqrt(v) + rate / 10)
            path.append(at)
        np.testing.assert_allclose(steps(name, rate, STEPS), path, rtol=1e-5, atol=1e-6)


def test_a_server_with_a_memory_resumes_with_an_identical_result() -> None:
    whole = steps("fedadam", 0.1, STEPS)
    first, second = Optimizer("fedadam", 0.1), Optimizer("fedadam", 0.1)
    sent = {"w": torch.tensor([0.5, -0.5])}
    for number, mean in enumerate(STEPS, 1):
        sent = first.step(number, sent, {"w": sent["w"] + torch.tensor(mean)})
        second.memory = first.memory
        first, second = second, first
        assert sent["w"].tolist() == whole[number - 1]
    assert Optimizer("fedadam", 0.1).memory == {}


@pytest.mark.parametrize("name", ["fedadam", "fedyogi", "fedadagrad"])
def test_a_server_remembers_single_numbers_as_those_of_a_full_model(name: str) -> None:
    made, sent = Optimizer(name, 0.1), {"w": torch.tensor([0.5, -0.5]), "scale": torch.tensor(2.0)}
    stepped = made.step(1, sent, {"w": torch.tensor([0.6, -0.5]), "scale": torch.tensor(2.1)})
    again = Optimizer(name, 0.1)
    again.memory = {part: torch.from_numpy(tensor.numpy().copy()) for part, tensor in made.memory.items()}
    mean = {part: tensor + 0.1 for part, tensor in stepped.items()}
    one, other = made.step(2, stepped, mean), again.step(2, stepped, mean)
    assert one["scale"].shape == ()
    assert all(torch.equal(one[part], other[part]) for part in sent)
    assert one["scale"] > stepped["scale"] > 2.0


CLAIMS = {"a": 1001.0, "b": 1999.0, "gone": 2.0**50}


def test_the_mean_does_not_depend_on_sites_that_are_not_asked() -> None:
    """A run that goes on does not know those that had left before: their examples may not change how sums are made."""
    chance = torch.Generator().manual_seed(0)
    first, second = (torch.rand(1000, generator=chance) for _ in range(2))
    found = []
    for names in ({1: "a", 2: "b"}, {1: "a", 2: "b", 3: "gone"}):
        like = {"w": torch.zeros(1000)}
        made = asking(AdapterFedAvg(like, names, Settings(site_weights="examples"), CLAIMS.__getitem__), [1, 2])
        replies = [reply(node, state) for node, state in ((1, first.tolist()), (2, second.tolist()))]
        arrays, _ = made.aggregate_train(1, replies)
        assert arrays is not None
        found.append(arrays["w"].numpy())
    assert np.array_equal(found[0], found[1])
    np.testing.assert_allclose(found[0], (1001 * first.double() + 1999 * second.double()) / 3000, rtol=1e-6)


def test_the_servers_step_takes_the_place_of_the_mean() -> None:
    made = strategy(strategy="fedadam", server_learning_rate=0.1)
    grid = cast(Grid, SimpleNamespace(get_node_ids=lambda: [1, 2]))
    list(made.configure_train(1, write_adapter({"w": torch.tensor([0.5, -0.5])}), ConfigRecord(), grid))
    arrays, _ = made.aggregate_train(1, [reply(1, [0.5, -0.54]), reply(2, [0.52, -0.5])])
    assert arrays is not None
    np.testing.assert_allclose(arrays["w"].numpy(), steps("fedadam", 0.1, STEPS[:1])[0], rtol=1e-5)
    assert optimizer_of(Settings()) is None
