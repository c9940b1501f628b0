"""One round: what is asked, what is added up, and which sums are refused."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch
from flwr.app import Message, MessageType
from torch.nn import functional as F

from fedclip_flwr.base.errors import UserError
from fedclip_flwr.base.settings import Settings
from fedclip_flwr.base.tensors import State
from fedclip_flwr.exchange.records import read_answer, write_answer
from fedclip_flwr.experiments.simulate import Result, Wrap, simulate
from fedclip_flwr.flower.grids import Node
from fedclip_flwr.learning.base import Classes, Examples
from fedclip_flwr.learning.choosing import best, scores
from fedclip_flwr.learning.one_round import SUMS, Constants, OneRound
from fedclip_flwr.learning.sums import BITS, sums_of, unit_of
from fedclip_flwr.learning.training import evaluate
from fedclip_flwr.server.averaging import Gathering
from fedclip_flwr.server.one_round import Bounded, Total, check, trimmed
from fedclip_flwr.site.holdings import Site

CLASSES, DIM = 10, 80
SETTINGS = Settings(method="one-round")


def classes() -> Classes:
    chance = torch.Generator().manual_seed(1)
    return Classes(
        torch.randn(CLASSES, DIM, generator=chance) + 2 * torch.randn(1, DIM, generator=chance), 30.0
    ).ready()


def images(count: int, seed: int) -> Examples:
    chance = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES - 1, (count,), generator=chance)  # of the last class there are none
    noise, gap = (
        torch.randn(count, DIM, generator=chance),
        torch.randn(1, DIM, generator=torch.Generator().manual_seed(9)),
    )
    return Examples(11 * F.normalize(classes().text[labels] + 0.12 * noise + 0.1 * gap, dim=1), labels)


def sites(train: Examples, rows: list[torch.Tensor]) -> list[Site]:
    """Sites with these rows; all validate and test on images of their own."""
    own = images(60, 7)
    return [Site(f"site-{n}", train.rows(part), own, own) for n, part in enumerate(rows)]


def federation(
    train: Examples, rows: list[torch.Tensor], settings: Settings = SETTINGS, wrap: Wrap = lambda name, node: node
) -> Result:
    return simulate(sites(train, rows), classes(), None, settings, wrap=wrap)


@pytest.mark.parametrize("statistics", ["span", "full"])
def test_the_file_is_the_same_however_the_images_lie_at_sites(statistics: str) -> None:
    train, settings = images(1200, 0), replace(SETTINGS, statistics=statistics)
    order = torch.randperm(1200, generator=torch.Generator().manual_seed(2))
    together = federation(train, [order], settings)
    assert together.selected.round == 1
    partitions = {
        "two": list(torch.split(order, [300, 900])),
        "ten": list(torch.chunk(order, 10)),
        "one class a site": [(train.labels == number).nonzero()[:, 0] for number in range(CLASSES - 1)],
        "skewed": [rows for k in range(3) for rows in torch.split(order[k::3], [1, 40, 359])],
        "a thousand": list(torch.tensor_split(order, 1000)),
    }
    if statistics == "full":
        partitions.pop("a thousand")
    for name, rows in partitions.items():
        found = federation(train, rows, settings)
        assert found.state.keys() == together.state.keys()
        assert all(torch.equal(found.state[key], together.state[key]) for key in found.state), name


def test_a_site_is_asked_three_times_and_sends_sums_once() -> None:
    asked: Counter[tuple[str, str]] = Counter()
    sent: set[str] = set()

    def counting(name: str, node: Node) -> Node:
        def answer(message: Message) -> Message:
            asked[name, message.metadata.message_type] += 1
            reply = node(message)
            sent.update(reply.content.array_records.get("arrays", {}).keys())
            return reply

        return answer

    rows = list(torch.arange(300).chunk(3))
    found = federation(images(300, 0), rows, wrap=counting)
    kinds = (MessageType.QUERY, MessageType.TRAIN, MessageType.EVALUATE)
    assert asked == Counter({(f"site-{n}", kind): 1 for n in range(3) for kind in kinds})
    assert sent == {*SUMS}
    assert [result.round for result in found.rounds] == [0, 1]
    assert found.selected.seen is not None
    assert found.zero_shot.seen is not None
    assert found.selected.seen > found.zero_shot.seen


def test_constants_are_chosen_by_the_sites_in_one_more_message() -> None:
    asked: Counter[str] = Counter()

    def counting(name: str, node: Node) -> Node:
        def answer(message: Message) -> Message:
            asked[message.metadata.message_type] += 1
            return node(message)

        return answer

    train, rows = images(300, 0), list(torch.arange(300).chunk(3))
    plain = federation(train, rows)
    found = federation(train, rows, replace(SETTINGS, one_round_choose=True), counting)
    assert asked == Counter({MessageType.QUERY: 3, MessageType.TRAIN: 3, MessageType.EVALUATE: 6})
    learner = OneRound("span", CLASSES, DIM)
    learner.load_state_dict(plain.state)
    own = images(60, 7)
    chosen = best([(len(own.labels), scores(learner, own, classes()))] * 3)
    assert chosen != Constants()
    assert Constants(*found.state["constants"].tolist()) == chosen
    assert all(torch.equal(found.state[name], plain.state[name]) for name in SUMS)


def test_zero_shot_is_not_selected_instead() -> None:
    """Where sites' seen classes gain nothing, an unseen domain may."""
    train, rows = images(300, 0), list(torch.arange(300).chunk(3))
    own = flipped(images(60, 7))  # validation that speaks against it
    lying = [replace(site, validation=own, test=own) for site in sites(train, rows)]
    assert simulate(lying, classes(), None, SETTINGS).selected.round == 1


def lying(names: set[str], change: dict[str, State]) -> Wrap:
    """Sites of these names send other sums; each name has its own."""

    def wrap(name: str, node: Node) -> Node:
        def answer(message: Message) -> Message:
            reply = node(message)
            if name not in names or message.metadata.message_type != MessageType.TRAIN:
                return reply
            like = OneRound("span", CLASSES, DIM).state_dict()
            report, state = read_answer(reply.content, {key: like[key] for key in SUMS})
            return Message(write_answer(report, state | change[name]), reply_to=message)

        return answer

    return wrap


def test_a_site_with_impossible_sums_is_left_out_and_the_others_count() -> None:
    train, rows = images(300, 0), list(torch.arange(300).chunk(3))
    wrong: State = {"sums": torch.full((CLASSES, 64), 2**45)}
    found = federation(train, rows, wrap=lying({"site-1"}, {"site-1": wrong}))
    honest = federation(train, [rows[0], rows[2]])
    assert all(torch.equal(found.state[key], honest.state[key]) for key in SUMS)


def flipped(examples: Examples) -> Examples:
    return examples._replace(labels=(examples.labels + 1) % (CLASSES - 1))


@pytest.mark.parametrize("share", [0.5, 0.2])
def test_two_sites_of_ten_that_claim_many_images_with_wrong_labels_change_little(share: float) -> None:
    sent, asked = OneRound.new("span", classes().text).state_dict(), images(300, 50)
    honest = [sums_of(images(100, n), sent["basis"], CLASSES) for n in range(10)]
    hostile = sums_of(flipped(images(100, 11)), sent["basis"], CLASSES)
    lying = [*honest[:8], *[{name: 100 * tensor for name, tensor in hostile.items()}] * 2]

    def accuracy(gathering: Gathering, of: list[State]) -> float:
        for n, state in enumerate(of):
            gathering.add(f"site-{n}", state, int(state["counts"].sum()))
        found = gathering.close().state
        assert found is not None
        learner = OneRound("span", CLASSES, DIM)
        learner.load_state_dict(found)
        return evaluate(learner, asked, classes()).accuracy or 0.0

    clean = accuracy(Total(sent), honest)
    assert accuracy(Total(sent), lying) < clean - 0.3
    assert accuracy(Bounded(sent, share), honest) > clean - 0.03
    assert accuracy(Bounded(sent, share), lying) > clean - 0.05


def test_a_claim_of_many_images_counts_for_three_sites() -> None:
    sent = OneRound.new("span", classes().text).state_dict()
    bounded = Bounded(sent, 0.5)
    for n in range(5):
        bounded.add(f"site-{n}", sums_of(images(100, n), sent["basis"], CLASSES), 100)
    many = {name: 1000 * tensor for name, tensor in sums_of(images(100, 9), sent["basis"], CLASSES).items()}
    bounded.add("many", many, 100_000)
    state = bounded.close().state
    assert state is not None
    assert int(state["counts"].sum()) == pytest.approx(800, abs=CLASSES)
    check({name: state[name] for name in SUMS}, int(state["counts"].sum()), unit_of(BITS), False)


def test_hostile_sites_may_all_have_the_same_class() -> None:
    sent = OneRound.new("span", classes().text).state_dict()
    train = [images(100, n) for n in range(10)]
    kept = [own if n < 5 else own.rows((own.labels > 0).nonzero()[:, 0]) for n, own in enumerate(train)]
    kept[3:5] = [own._replace(features=-own.features) for own in kept[3:5]]
    sums = [sums_of(own, sent["basis"], CLASSES) for own in kept]
    bounded = Bounded(sent, 0.2)
    for n, one in enumerate(sums):
        bounded.add(f"site-{n}", one, int(one["counts"].sum()))
    state = bounded.close().state
    assert state is not None
    means = torch.stack([one["sums"][0].double() / one["counts"][0] for one in sums[:3]])
    found = state["sums"][0].double() / state["counts"][0]
    assert bool((found >= means.amin(0) - 1).all() and (found <= means.amax(0) + 1).all())


def test_the_trimmed_mean_leaves_out_both_ends() -> None:
    values = torch.tensor([[9.0, -9.0], [1.0, 1.0], [2.0, 3.0], [3.0, 2.0]])
    assert trimmed(values, 1).tolist() == [2.5, 1.5]
    assert trimmed(values, 2).tolist() == [2.5, 1.5]
    assert trimmed(values[:3], 2).tolist() == [2.0, 1.0]
    assert trimmed(values[:1], 1).tolist() == [9.0, -9.0]
    assert torch.equal(trimmed(values, 0), values.mean(0))


def good(full: bool = False) -> tuple[State, int]:
    train = images(200, 3)
    basis = OneRound.new("full" if full else "span", classes().text).basis
    return sums_of(train, basis, CLASSES), len(train.labels)


@pytest.mark.parametrize("full", [False, True])
def test_honest_sums_pass(full: bool) -> None:
    sums, count = good(full)
    check(sums, count, unit_of(BITS), full)
    one = sums_of(images(1, 4), torch.empty(0, DIM, dtype=torch.int32), CLASSES)
    check(one, 1, unit_of(BITS), True)


UNIT = int(1 / unit_of(BITS))
LIES: dict[str, tuple[str, bool]] = {
    "more images than it said": ("its counts are of 201 images, expected 200", False),
    "a negative count": ("its counts", False),
    "counts whose sum wraps around": ("its counts", False),
    "a sum too long": ("longer than so many", False),
    "a sum of a class without images": ("longer than so many", False),
    "moments too large": ("have a trace of", False),
    "moments too small for the full space": ("have a trace of", True),
    "moments that are not positive": ("can't be those of features with these sums", False),
    "no moments": ("can't be those of features with these sums", False),
}


@pytest.mark.parametrize("lie", LIES)
def test_sums_that_no_features_of_unit_length_have_are_refused(lie: str) -> None:
    why, full = LIES[lie]
    sums, count = good(full)
    if lie == "more images than it said":
        sums["counts"][0] += 1
    elif lie == "a negative count":
        sums["counts"][0], sums["counts"][1] = -1, sums["counts"][0] + sums["counts"][1] + 1
    elif lie == "counts whose sum wraps around":
        sums["counts"][:3] += torch.tensor([2**62, 2**63 - 1 - 2**62, 1])
        sums["counts"][3:5] += torch.tensor([2**62, 2**62])
        assert int(sums["counts"].sum()) == count
    elif lie == "a sum too long":
        sums["sums"][2, 5] += count * UNIT
    elif lie == "a sum of a class without images":
        sums["sums"][CLASSES - 1, 0] = UNIT // 1000
    elif lie == "moments too large":
        sums["moments"] *= 2
    elif lie == "moments too small for the full space":
        sums["moments"] //= 2
    elif lie == "moments that are not positive":
        sums["moments"][1] += 300 * UNIT  # the product of the first two directions
    else:
        sums["moments"] *= 0
    with pytest.raises(UserError, match=why):
        check(sums, count, unit_of(BITS), full)
