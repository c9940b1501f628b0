"""LoRA in a federation in one process: with everything that adapters can."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fedclip_flwr.base import Settings
from fedclip_flwr.base.tensors import State
from fedclip_flwr.experiments.simulate import Result, make_sites, simulate
from fedclip_flwr.features.lora import Lora
from fedclip_flwr.features.opening import new_learner, open_features
from fedclip_flwr.learning.lora import A, B
from tests.extras import needs

pytestmark = needs("lora")

SMALL: dict[str, Any] = {
    "method": "lora",
    "lora_layers": "last:1",
    "lora_rank": 2,
    "holdout": "cartoon",
    "batch_size": 4,
    "learning_rate": 3e-3,
    "local_epochs": 3,
    "num_server_rounds": 2,
}


def ran(tree: Path, sites: int = 3, **more: Any) -> tuple[Result, Lora]:
    """A federation of the tree's photos, and its learner, untrained."""
    settings = Settings(data=f"folder:{tree}", **{**SMALL, **more})
    features = open_features(settings, progress=False)
    learner = new_learner(settings, features)
    assert isinstance(learner, Lora)
    made, unseen = make_sites(features, settings.holdout, sites, settings.seed)
    return simulate(made, features.classes, unseen, settings, start=learner), learner


def distance(one: State, other: State) -> float:
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def products(state: State) -> State:
    """What each layer's weight changes by, up to a factor."""
    layers = [name.removesuffix(B) for name in state if name.endswith(B)]
    return {layer: state[layer + B] @ state[layer + A] for layer in layers}


@pytest.fixture
def plain(tree: Path) -> Result:
    return ran(tree)[0]


def test_only_b_is_trained_and_sent_and_round_0_is_zero_shot(tree: Path, plain: Result) -> None:
    result, learner = ran(tree)
    assert result.last.keys() == plain.last.keys() == {name for name in learner.every if name.endswith(B)}
    assert distance(result.last, plain.last) == 0
    assert distance(result.last, learner.first) > 0
    frozen = open_features(Settings(data=f"folder:{tree}"), progress=False)
    made, unseen = make_sites(frozen, "cartoon", 3)
    zero = simulate(made, frozen.classes, unseen, Settings(num_server_rounds=1)).zero_shot
    assert (result.zero_shot.seen, result.zero_shot.unseen) == (zero.seen, zero.unseen)


@pytest.mark.parametrize(
    ("given", "close"),
    [
        ({"secure_aggregation": True}, 1e-5),
        ({"codec": "bfloat16"}, 2e-3),
        ({"codec": "int8"}, 2e-3),
        ({"max_update_norm": 0.0}, 0.0),
        ({"gradient_checkpointing": True}, 0.0),
    ],
    ids=lambda given: " ".join(given) if isinstance(given, dict) else "",
)
def test_how_tensors_travel_changes_little(tree: Path, plain: Result, given: dict[str, Any], close: float) -> None:
    assert distance(ran(tree, **given)[0].last, plain.last) <= close


@pytest.mark.parametrize(
    "given",
    [
        {"strategy": "fedadam"},
        {"strategy": "fedmedian"},
        {"strategy": "krum"},
        {"strategy": "fedprox", "proximal_mu": 50.0},
        {"site_weights": "examples", "fraction_train": 0.5},
        {"dp": "central"},
        {"dp": "local"},
        {"dp": "central", "secure_aggregation": True},
        {"lora_train": "both"},
        {"lora_targets": "text"},
        {"lora_targets": "both"},
        {"lora_dropout": 0.5},
        {"recipe": "paper"},
        {"blend": 0.5},
    ],
    ids=lambda given: " ".join(map(str, given.values())),
)
def test_what_an_adapter_can_lora_can(tree: Path, plain: Result, given: dict[str, Any]) -> None:
    found, learner = ran(tree, **given)
    assert found.last.keys() == learner.state_dict().keys()
    assert all(tensor.isfinite().all() for tensor in found.last.values())
    assert found.last.keys() != plain.last.keys() or distance(found.last, plain.last) > 1e-6
    assert distance(found.last, ran(tree, **given)[0].last) == 0 or "dp" in given


def test_a_blend_is_chosen_and_sites_personalise(tree: Path) -> None:
    found, _ = ran(tree, sites=1, blend="auto", personalize=True)
    assert found.blend in (0.25, 0.5, 0.75, 1.0)


def test_the_mean_of_frozen_a_is_exact_and_that_of_both_is_not(tree: Path) -> None:
    """One round of three sites, against the mean of what each site alone comes to."""
    apart = {}
    for train in ("B", "both"):
        settings = Settings(data=f"folder:{tree}", **{**SMALL, "num_server_rounds": 1, "lora_train": train})
        features = open_features(settings, progress=False)
        learner = new_learner(settings, features)
        sites, _ = make_sites(features, "cartoon", 3)
        together = simulate(sites, features.classes, {}, settings, start=learner).last
        alone = [simulate([site], features.classes, {}, settings, start=learner).last for site in sites]
        merged = [products({**learner.frozen, **state}) for state in (together, *alone)]
        means = {name: torch.stack([each[name] for each in merged[1:]]).mean(0) for name in merged[0]}
        apart[train] = distance(merged[0], means)
    assert apart["B"] < 1e-6
    assert apart["both"] > 10 * apart["B"]
