from __future__ import annotations

import copy
from dataclasses import replace
from statistics import mean
from typing import Any

import pytest
import torch
from flwr.app import Error, Message, MessageType

from fedclip_flwr.base.errors import UserError
from fedclip_flwr.base.seeds import seed_of
from fedclip_flwr.base.settings import Settings
from fedclip_flwr.experiments.simulate import make_sites, simulate
from fedclip_flwr.features.base import Features
from fedclip_flwr.flower.grids import Node
from fedclip_flwr.learning.adapters import make_adapter
from fedclip_flwr.learning.base import Classes, Examples
from fedclip_flwr.learning.recipes import RECIPES
from fedclip_flwr.learning.selection import BLENDS
from fedclip_flwr.learning.training import evaluate, train
from fedclip_flwr.site.holdings import Site

CLASSES = Classes(torch.eye(3, 8), 20.0)


def some(count: int, seed: int) -> Examples:
    generator = torch.Generator().manual_seed(seed)
    return Examples(
        torch.randn(count, 8, generator=generator), torch.randint(0, 3, (count,), generator=generator)
    ).ready()


def site(name: str, count: int, seed: int) -> Site:
    return Site(name, some(count, seed), some(6, seed + 1), some(5, seed + 2))


SITES = [site("b", 20, 10), site("a", 9, 20)]


def test_two_rounds_by_hand() -> None:
    result = simulate(SITES, CLASSES, {"sea": some(7, 99)}, Settings(num_server_rounds=2, batch_size=4, seed=3))
    shared = make_adapter("attention", 8, seed=3)
    for number in (1, 2):
        own = []
        for one in (SITES[1], SITES[0]):  # in the order of their names
            adapter = copy.deepcopy(shared)
            seed = seed_of(3, "train", one.name, number)
            rate = RECIPES["default"].rate("attention", 8, steps={"a": 3, "b": 5}[one.name])
            train(adapter, one.train, CLASSES, RECIPES["default"], learning_rate=rate, batch_size=4, seed=seed)
            own.append(adapter.state_dict())
        shared.load_state_dict({k: (own[0][k] + own[1][k]) / 2 for k in own[0]})  # equal, not by examples
        line = result.rounds[number]
        validation = [evaluate(shared, s.validation, CLASSES).accuracy or 0.0 for s in SITES]
        test = [evaluate(shared, s.test, CLASSES).accuracy or 0.0 for s in SITES]
        assert line.round == number
        assert line.validation == pytest.approx(sum(validation) / 2)
        assert line.seen == pytest.approx(sum(test) / 2)
        assert line.unseen == evaluate(shared, some(7, 99), CLASSES).accuracy
    assert result.selected.validation == max(line.validation or 0.0 for line in result.rounds)
    if result.selected.round == 2:
        torch.testing.assert_close(result.state, dict(shared.state_dict()))


def test_the_selected_adapter_is_the_one_of_the_selected_round() -> None:
    result = simulate(SITES, CLASSES, None, Settings(num_server_rounds=5, learning_rate=0.05, batch_size=4))
    adapter = make_adapter("attention", 8)
    adapter.load_state_dict(result.state)
    validation = [evaluate(adapter, s.validation, CLASSES).accuracy or 0.0 for s in SITES]
    assert result.selected.validation == pytest.approx(sum(validation) / 2)
    assert result.selected.unseen is None


def test_the_same_seed_gives_the_same_adapter_to_the_bit_in_any_order_of_sites() -> None:
    how = Settings(num_server_rounds=3, seed=1)
    one, two = simulate(SITES, CLASSES, None, how), simulate(SITES[::-1], CLASSES, None, how)
    assert all(torch.equal(one.state[k], two.state[k]) for k in one.state)
    assert one.rounds == two.rounds


def test_a_site_without_training_rows_does_not_pull_the_average() -> None:
    none = some(0, 0)
    how = Settings(num_server_rounds=2)
    with_it = simulate([*SITES, Site("c", none, none, none)], CLASSES, None, how)
    assert with_it.rounds == simulate(SITES, CLASSES, None, how).rounds


def test_sites_that_are_all_too_small_are_reported() -> None:
    none = some(0, 0)
    with pytest.raises(UserError, match="no site has an example"):
        simulate([Site("c", none, none, none)], CLASSES)


def test_without_every_round_only_zero_shot_and_the_selected_round_are_tested() -> None:
    how = Settings(num_server_rounds=4, learning_rate=0.05, batch_size=4)
    whole = simulate(SITES, CLASSES, {"sea": some(7, 99)}, how)
    short = simulate(SITES, CLASSES, {"sea": some(7, 99)}, how, test_every_round=False)
    assert short.rounds == whole.rounds[:1]
    assert short.selected == whole.selected
    assert all(torch.equal(short.state[k], whole.state[k]) for k in whole.state)


def test_the_loop_is_the_servers_own_it_stops_early_and_sums_in_secret() -> None:
    still = Settings(num_server_rounds=9, learning_rate=1e-12, early_stop=2)
    assert [found.round for found in simulate(SITES, CLASSES, None, still).rounds] == [0, 1, 2, 3]
    three, how = [*SITES, site("c", 12, 30)], Settings(num_server_rounds=2, batch_size=4)
    plain = simulate(three, CLASSES, None, how)
    secret = simulate(three, CLASSES, None, replace(how, secure_aggregation=True))
    for name, tensor in plain.state.items():
        torch.testing.assert_close(secret.state[name], tensor, rtol=0, atol=1e-6)
    with pytest.raises(UserError, match="min-sites = 3 are needed"):
        simulate(SITES, CLASSES, None, replace(how, secure_aggregation=True))


def test_a_wrapped_node_answers_in_its_sites_place() -> None:
    """One that sends nothing but an error has no part in the average."""
    names: list[str] = []

    def wrap(name: str, node: Node) -> Node:
        names.append(name)

        def answer(message: Message) -> Message:
            broken = name == "b" and message.metadata.message_type == MessageType.TRAIN
            return Message(Error(0, "no"), reply_to=message) if broken else node(message)

        return answer

    how = Settings(num_server_rounds=1, batch_size=4, recipe="paper")  # so that the trained round is taken
    found = simulate(SITES, CLASSES, None, how, wrap=wrap)
    assert names == ["a", "b"]
    alone = simulate([SITES[1]], CLASSES, None, how)
    assert all(torch.equal(found.state[name], tensor) for name, tensor in alone.state.items())


def test_the_papers_recipe_never_selects_the_start_and_the_default_may() -> None:
    still = Settings(num_server_rounds=3, learning_rate=1e-12)
    assert simulate(SITES, CLASSES, None, still).selected.round == 0
    assert simulate(SITES, CLASSES, None, replace(still, recipe="paper")).selected.round == 1


def test_of_equal_rounds_the_default_selects_by_loss_and_the_paper_the_first() -> None:
    """All validation images are right before any training, which still lowers their loss in each round."""
    images = Examples(torch.eye(3, 8) + 0.9 * torch.eye(8)[3], torch.arange(3)).ready()
    sites, classes = [Site("a", images, images, images)], Classes(torch.eye(3, 8), 2.0)
    how = Settings(adapter="scale", num_server_rounds=3, learning_rate=1e-3)
    for recipe, expected in (("default", 3), ("paper", 1)):
        result = simulate(sites, classes, None, replace(how, recipe=recipe))
        assert [line.validation for line in result.rounds] == [1.0] * 4
        assert result.selected.round == expected


@pytest.mark.parametrize(
    ("sites", "rate", "expected"),
    [
        ([site("b", 20, 110), site("a", 9, 120)], 0.1, 0.75),  # by accuracy
        (SITES, 0.2, 1.0),  # as accurate as the others, and of lower loss
        (SITES, 1e-12, 0.25),  # nothing is learnt: all are the same
    ],
    ids=["accuracy", "loss", "smallest"],
)
def test_a_chosen_blend_is_the_best_by_validation_then_the_smallest(
    sites: list[Site], rate: float, expected: float
) -> None:
    """By hand: the selected adapter of the same run without blend, tried with every share."""
    how = Settings(adapter="scale", num_server_rounds=4, learning_rate=rate, batch_size=4, seed=1)
    plain = simulate(sites, CLASSES, None, how)
    adapter = make_adapter("scale", 8)
    adapter.load_state_dict(plain.state)
    found = {}
    for adapter.blend in BLENDS:
        scores = [evaluate(adapter, s.validation, CLASSES) for s in sites]
        found[adapter.blend] = mean(s.accuracy or 0.0 for s in scores), -round(sum(s.loss for s in scores), 3)
    assert max(BLENDS, key=lambda blend: (found[blend], -blend)) == expected
    chosen = simulate(sites, CLASSES, None, replace(how, blend="auto"))
    adapter.blend = expected
    assert chosen.blend == expected
    assert chosen.selected.validation == pytest.approx(found[expected][0])
    assert chosen.selected.seen == pytest.approx(mean(evaluate(adapter, s.test, CLASSES).accuracy or 0 for s in sites))
    assert torch.equal(chosen.state["log_scale"], plain.state["log_scale"])


def test_sites_hold_every_seen_row_once_and_none_of_the_holdout(drawn: Features) -> None:
    sites, unseen = make_sites(drawn, "photo", sites=7, seed=2)
    assert [s.name for s in sites] == ["art-0", "art-1", "art-2", "cartoon-0", "cartoon-1", "sketch-0", "sketch-1"]
    assert torch.equal(unseen["photo"].labels, drawn.examples("photo").labels)
    sizes = [[len(p.labels) for p in (s.train, s.validation, s.test)] for s in sites]
    assert sizes == [[300, 100, 100]] * 3 + [[450, 150, 150]] * 4
    rows = torch.cat([torch.cat([s.train.features, s.validation.features, s.test.features]) for s in sites])
    assert len(rows) == 4500
    assert (
        len(torch.unique(rows, dim=0))
        == len(torch.cat([drawn.examples(d).features for d in drawn.domains[:3]]))
        == 4500
    )


@pytest.mark.parametrize(
    ("kind", "nodes", "holdouts", "least"),
    [
        ("attention", 10, ("art", "cartoon", "photo", "sketch"), 0.045),
        ("gate", 3, ("art",), 0.045),
        ("scale", 10, ("art",), 0.03),
    ],
)
def test_adapting_gains_on_the_sites_and_on_the_unseen_domain(
    kind: str, nodes: int, holdouts: tuple[str, ...], least: float, drawn: Features
) -> None:
    seen, unseen = [], []
    for holdout in holdouts:
        sites, rest = make_sites(drawn, holdout, nodes)
        result = simulate(sites, drawn.classes, rest, Settings(adapter=kind))
        seen.append((result.selected.seen or 0.0) - (result.zero_shot.seen or 0.0))
        unseen.append((result.selected.unseen or 0.0) - (result.zero_shot.unseen or 0.0))
    assert mean(seen) >= least
    assert mean(unseen) >= 0.02


GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that is not hidden: CUDA_VISIBLE_DEVICES=0")


@GPU
@pytest.mark.parametrize(
    "given",
    [
        {"codec": "int8"},
        {"codec": "bfloat16"},
        {"strategy": "fedadam"},
        {"strategy": "fedmedian"},
        {"dp": "local"},
        {"dp": "central"},
    ],
    ids=str,
)
def test_a_federation_on_a_gpu_ends_whatever_packs_noises_or_averages_its_updates(given: dict[str, Any]) -> None:
    settings = replace(Settings(num_server_rounds=2, batch_size=4), **given)
    there = [
        replace(
            site, train=site.train.ready("cuda"), validation=site.validation.ready("cuda"), test=site.test.ready("cuda")
        )
        for site in SITES
    ]
    found = simulate(there, CLASSES.ready("cuda"), {"sea": some(7, 99).ready("cuda")}, settings)
    assert found.selected.unseen is not None
