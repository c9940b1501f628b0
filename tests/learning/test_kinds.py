"""What an adapter's class says of itself is true."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from fedclip_flwr.base.settings import Settings
from fedclip_flwr.learning.adapters import ADAPTERS, make_adapter, of_rank
from fedclip_flwr.learning.recipes import RECIPES, new_adapter, starts_as_zero_shot

UNIT = F.normalize(torch.randn(50, 12, generator=torch.Generator().manual_seed(1)), dim=-1)


def shapes(kind: str, rank: int) -> list[torch.Size]:
    return [tensor.shape for tensor in make_adapter(kind, 12, rank=rank).state_dict().values()]


@pytest.mark.parametrize("kind", ADAPTERS)
def test_a_rank_is_given_for_those_that_have_one(kind: str) -> None:
    assert ADAPTERS[kind].ranked == (shapes(kind, 2) != shapes(kind, 5))
    assert of_rank(kind, 5) == (" of rank 5" if ADAPTERS[kind].ranked else "")


@pytest.mark.parametrize("kind", ADAPTERS)
def test_rates_are_for_a_width_where_layers_are_as_wide_as_the_features(kind: str) -> None:
    assert ADAPTERS[kind].wide == (torch.Size([12, 12]) in shapes(kind, 4))


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("kind", ADAPTERS)
def test_the_settings_know_whether_an_adapter_starts_as_zero_shot(kind: str, recipe: str) -> None:
    settings = Settings(adapter=kind, recipe=recipe)
    adapted = new_adapter(settings, 12)(UNIT)
    assert torch.allclose(adapted, UNIT, rtol=0, atol=1e-6) == starts_as_zero_shot(settings)
    assert starts_as_zero_shot(Settings(method="full-model", adapter=kind, recipe=recipe))


def test_only_the_papers_layers_start_as_something_else() -> None:
    both = [(kind, recipe) for kind in ("attention", "gate", "scale") for recipe in ("default", "paper")]
    others = {pair for pair in both if not starts_as_zero_shot(Settings(adapter=pair[0], recipe=pair[1]))}
    assert others == {("attention", "paper"), ("gate", "paper")}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_weights_can_be_given_in_doublings_however_an_adapter_has_learnt(kind: str) -> None:
    """As the report shows them: none is below zero."""
    adapter = make_adapter(kind, 12, identity=False)
    for seed in range(5):
        torch.manual_seed(seed)
        adapter.load_state_dict({name: 2 * torch.randn(t.shape) for name, t in adapter.state_dict().items()})
        assert (adapter.weigh(UNIT) >= 0).all()
