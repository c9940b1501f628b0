"""The facts in `base/kinds.py` are true of each adapter's class."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from fedclip_flwr.base.kinds import KINDS, of_rank
from fedclip_flwr.base.settings import Settings
from fedclip_flwr.learning.adapters import ADAPTERS, make_adapter, new_adapter
from fedclip_flwr.learning.recipes import RECIPES

UNIT = F.normalize(torch.randn(50, 12, generator=torch.Generator().manual_seed(1)), dim=-1)


def shapes(kind: str, rank: int) -> list[torch.Size]:
    return [tensor.shape for tensor in make_adapter(kind, 12, rank=rank).state_dict().values()]


def test_every_kind_has_a_class_and_every_class_a_kind() -> None:
    assert [*KINDS] == [*ADAPTERS]


@pytest.mark.parametrize("kind", KINDS)
def test_a_rank_is_told_of_those_that_have_one(kind: str) -> None:
    assert KINDS[kind].ranked == (shapes(kind, 2) != shapes(kind, 5))
    assert of_rank(kind, 5) == (" of rank 5" if KINDS[kind].ranked else "")


@pytest.mark.parametrize("kind", KINDS)
def test_rates_are_for_a_width_where_layers_are_as_wide_as_the_features(kind: str) -> None:
    assert KINDS[kind].wide == (torch.Size([12, 12]) in shapes(kind, 4))


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_settings_know_whether_an_adapter_starts_as_zero_shot(kind: str, recipe: str) -> None:
    settings = Settings(adapter=kind, recipe=recipe)
    adapted = new_adapter(settings, 12)(UNIT)
    assert torch.allclose(adapted, UNIT, rtol=0, atol=1e-6) == settings.starts_as_zero_shot
    assert Settings(method="full-model", adapter=kind, recipe=recipe).starts_as_zero_shot


def test_only_the_papers_layers_start_as_something_else() -> None:
    both = [(kind, recipe) for kind in ("attention", "gate", "scale") for recipe in ("default", "paper")]
    others = {pair for pair in both if not Settings(adapter=pair[0], recipe=pair[1]).starts_as_zero_shot}
    assert others == {("attention", "paper"), ("gate", "paper")}


@pytest.mark.parametrize("kind", KINDS)
def test_weights_can_be_told_in_doublings_however_an_adapter_has_learnt(kind: str) -> None:
    """As the report shows them: none is below zero."""
    adapter = make_adapter(kind, 12, identity=False)
    for seed in range(5):
        torch.manual_seed(seed)
        adapter.load_state_dict({name: 2 * torch.randn(t.shape) for name, t in adapter.state_dict().items()})
        assert (adapter.weigh(UNIT) >= 0).all()
