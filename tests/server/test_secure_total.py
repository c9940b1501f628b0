"""One round under masks: the total is that of the sites' sums to the bit, or it is not used."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch
from flwr.app import Error, Message, MessageType

from fedclip_flwr.base.errors import UserError
from fedclip_flwr.base.tensors import State
from fedclip_flwr.exchange.records import read_answer, write_answer
from fedclip_flwr.exchange.secure.masking import flat
from fedclip_flwr.exchange.secure.protocol import MASKED
from fedclip_flwr.experiments.simulate import Wrap
from fedclip_flwr.flower.grids import Node
from fedclip_flwr.learning.base import Examples
from fedclip_flwr.learning.one_round import SUMS, OneRound
from tests.server.test_one_round import CLASSES, DIM, SETTINGS, UNIT, federation, images

MASKS = replace(SETTINGS, secure_aggregation=True)
STEPS = ("query.keys", "query.shares", MessageType.TRAIN, "query.unmask")


def same(one: State, other: State) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def partitions(train: Examples) -> dict[str, list[torch.Tensor]]:
    order = torch.randperm(len(train.labels), generator=torch.Generator().manual_seed(2))
    return {
        "three": list(torch.split(order, [1, 100, len(order) - 101])),
        "thirty, more than share with each other": list(order.tensor_split(30)),
        "one class a site": [(train.labels == number).nonzero()[:, 0] for number in range(CLASSES - 1)],
    }


@pytest.mark.parametrize("statistics", ["span", "full"])
def test_the_state_is_that_of_an_open_run_to_the_bit(statistics: str) -> None:
    train, settings = images(400, 0), replace(MASKS, statistics=statistics, personalize=True)
    open_run = federation(train, [torch.arange(400)], replace(settings, secure_aggregation=False))
    for name, rows in partitions(train).items():
        assert same(federation(train, rows, settings).state, open_run.state), name


@pytest.mark.parametrize("seed", range(8))
def test_the_state_is_that_of_an_open_run_in_any_partition(seed: int) -> None:
    chance = torch.Generator().manual_seed(seed)
    count, sites = (int(torch.randint(low, high, (1,), generator=chance)) for low, high in ((30, 300), (3, 12)))
    train = images(count, seed)
    cuts = torch.randperm(count - 1, generator=chance)[: sites - 1].sort().values + 1
    rows = list(torch.randperm(count, generator=chance).tensor_split(cuts))
    assert same(federation(train, rows, MASKS).state, federation(train, rows).state)


def gone(names: set[str], step: str) -> Wrap:
    """Sites of these names that drop out in this step."""

    def wrap(name: str, node: Node) -> Node:
        def answer(message: Message) -> Message:
            reply = node(message)  # it may have done its work
            silent = name in names and message.metadata.message_type == step
            return Message(Error(2, "gone"), reply_to=message) if silent else reply

        return answer

    return wrap


@pytest.mark.parametrize("step", STEPS)
def test_sites_that_drop_out_before_their_vector_came_do_not_count_and_later_they_do(step: str) -> None:
    train, rows = images(300, 0), list(torch.arange(300).chunk(10))
    found = federation(train, rows, MASKS, gone({"site-3", "site-7"}, step))
    counting = rows if step == "query.unmask" else [part for n, part in enumerate(rows) if n not in (3, 7)]
    assert same(found.state, federation(train, counting).state)


def adding(name: str, change: State, seen: list[tuple[str, str]], silent: str = "", after: int = 0) -> Wrap:
    """The site `name` adds this to its masked sums; `silent` gives none after so many messages to TRAIN.

    `seen` gets the messages, by site and kind.
    """
    nothing = {key: torch.zeros_like(tensor) for key, tensor in OneRound("span", CLASSES, DIM).state_dict().items()}
    added = flat({key: nothing[key] for key in SUMS} | change)

    def wrap(site: str, node: Node) -> Node:
        def answer(message: Message) -> Message:
            reply, kind = node(message), message.metadata.message_type
            seen.append((site, kind))
            if kind != MessageType.TRAIN:
                return reply
            if site == silent and seen.count((site, kind)) > after:
                return Message(Error(2, "gone"), reply_to=message)
            if site != name:
                return reply
            report, state = read_answer(reply.content, {MASKED: added})
            return Message(write_answer(report, {MASKED: state[MASKED] + added}), reply_to=message)

        return answer

    return wrap


def counts(**numbers: int) -> State:
    found = torch.zeros(CLASSES, dtype=torch.int64)
    for name, number in numbers.items():
        found[int(name[1:])] = number
    return {"counts": found}


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (counts(c0=1), "its counts are of 301 images, expected 300"),
        (counts(c0=-100, c1=100), "its counts are of 300 images"),
        ({"sums": torch.full((CLASSES, 64), 300 * UNIT)}, "the sum of its features is longer"),
        ({"moments": torch.full((64 * 65 // 2,), 2**62)}, "its second moments have a trace"),
    ],
)
def test_a_site_that_spoils_the_total_ends_the_run_in_words(change: State, why: str) -> None:
    seen: list[tuple[str, str]] = []
    train, rows = images(300, 0), list(torch.arange(300).chunk(3))
    with pytest.raises(UserError) as ended:
        federation(train, rows, MASKS, adding("site-1", change, seen))
    assert "round 1: usable answers: 0, min-sites = 3 are needed; it was tried 3 times" in str(ended.value)
    assert f"the total of 3 sites' masked sums is impossible ({why}" in str(ended.value)
    assert "and nobody can tell which site is to blame" in str(ended.value)
    assert Counter(kind for _, kind in seen)["query.unmask"] == 9


def test_after_a_useless_total_that_of_other_sites_is_not_unmasked() -> None:
    """The difference between the two would be the sums of the site that is missing."""
    seen: list[tuple[str, str]] = []
    train, rows = images(300, 0), list(torch.arange(300).chunk(6))
    with pytest.raises(UserError, match="the sum of other sites was discarded before this one: nothing is unmasked"):
        federation(train, rows, MASKS, adding("site-1", counts(c0=1), seen, silent="site-4", after=1))
    kinds = Counter(kind for _, kind in seen)
    assert kinds["query.keys"] > 2 * 5
    assert kinds["query.unmask"] == 6


def test_what_a_site_can_do_unseen() -> None:
    """It takes five images from a class that only others have, and calls them another: docs/security.md says so."""
    train, rows = images(300, 0), list(torch.arange(300).chunk(3))
    rows[1] = rows[1][train.labels[rows[1]] != 0]
    honest = federation(train, rows, MASKS).state
    change = counts(c0=-5, c1=5) | {"sums": torch.zeros_like(honest["sums"])}
    change["sums"][0] = -5 * honest["sums"][0] // honest["counts"][0]
    change["sums"][1] = -change["sums"][0]
    moved = federation(train, rows, MASKS, adding("site-1", change, [])).state
    assert all(torch.equal(moved[name], honest[name] + more) for name, more in change.items())
