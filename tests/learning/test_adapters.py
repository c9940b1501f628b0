from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fedclip_flwr.base.errors import UserError
from fedclip_flwr.learning.adapters import ADAPTERS, make_adapter

UNIT = F.normalize(torch.randn(50, 12, generator=torch.Generator().manual_seed(1)), dim=-1)


def shapes(kind: str, dim: int, rank: int = 4) -> dict[str, tuple[int, ...]]:
    return {name: tuple(t.shape) for name, t in make_adapter(kind, dim, rank=rank).state_dict().items()}


def test_each_adapter_has_exactly_its_tensors() -> None:
    assert shapes("attention", 12) == {
        "inner.weight": (12, 12),
        "inner.bias": (12,),
        "outer.weight": (12, 12),
        "outer.bias": (12,),
    }
    assert shapes("gate", 12, 3) == {
        "inner.weight": (3, 12),
        "inner.bias": (3,),
        "outer.weight": (12, 3),
        "outer.bias": (12,),
    }
    assert shapes("scale", 12) == {"log_scale": (12,)}


@pytest.mark.parametrize(("kind", "count"), [("attention", 525_312), ("gate", 4_612), ("scale", 512)])
def test_parameters_of_a_512_dimensional_adapter_are_as_published(kind: str, count: int) -> None:
    assert sum(p.numel() for p in make_adapter(kind, 512).parameters()) == count


@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.parametrize("blend", [1.0, 0.6])
def test_an_identity_start_changes_no_feature(kind: str, blend: float) -> None:
    adapted = make_adapter(kind, 12, blend=blend)(UNIT)
    torch.testing.assert_close(adapted, UNIT, rtol=0, atol=1e-6)


def test_attention_is_the_formula_of_the_paper() -> None:
    adapter = make_adapter("attention", 12, identity=False, seed=5)
    w = adapter.state_dict()
    hidden = torch.tanh(UNIT @ w["inner.weight"].T + w["inner.bias"])
    scores = hidden @ w["outer.weight"].T + w["outer.bias"]
    attention = torch.exp(scores) / torch.exp(scores).sum(1, keepdim=True)
    product = UNIT * attention
    torch.testing.assert_close(adapter(UNIT), product / product.pow(2).sum(1, keepdim=True).sqrt())
    assert not torch.allclose(adapter(UNIT), UNIT, atol=1e-4)


@pytest.mark.parametrize(("length", "seen"), [(0.0, 3 * UNIT), (1.0, UNIT), (7.0, 7 * UNIT)])
def test_the_network_sees_features_of_the_length_that_it_asks_for(length: float, seen: Tensor) -> None:
    adapter = make_adapter("attention", 12, identity=False, seed=5, length=length)
    w = adapter.state_dict()
    hidden = torch.tanh(seen @ w["inner.weight"].T + w["inner.bias"])
    attention = torch.softmax(hidden @ w["outer.weight"].T + w["outer.bias"], 1)
    adapted = F.normalize(UNIT * attention, dim=1)
    torch.testing.assert_close(adapter(3 * UNIT), adapted)
    torch.testing.assert_close(adapter.weigh(adapter.scaled(3 * UNIT)), attention)
    adapter.blend = 0.25
    torch.testing.assert_close(adapter(3 * UNIT), F.normalize(0.75 * UNIT + 0.25 * adapted, dim=1))


def test_blend_by_hand() -> None:
    adapter = make_adapter("scale", 2, blend=0.5)
    adapter.load_state_dict({"log_scale": torch.tensor([2.0, 1.0]).log()})
    # (0.6, 0.8) → (1.2, 0.8)/√2.08; half of each: (0.71602…, 0.67735…), then unit length
    blended = torch.tensor([[0.6, 0.8]]) * 0.5 + torch.tensor([[1.2, 0.8]]) / 2.08**0.5 * 0.5
    torch.testing.assert_close(adapter(torch.tensor([[0.6, 0.8]])), blended / blended.norm())
    adapter.blend = 0.25
    blended = torch.tensor([[0.6, 0.8]]) * 0.75 + torch.tensor([[1.2, 0.8]]) / 2.08**0.5 * 0.25
    torch.testing.assert_close(adapter(torch.tensor([[0.6, 0.8]])), blended / blended.norm())


def test_random_weights_follow_from_the_seed_and_leave_other_randomness_alone() -> None:
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    one, two, other = (make_adapter("attention", 8, seed=s).state_dict()["inner.weight"] for s in (1, 1, 2))
    assert torch.equal(before, torch.random.get_rng_state())
    assert torch.equal(one, two)
    assert not torch.equal(one, other)


def test_an_unknown_adapter_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UserError, match="attention, gate, scale"):
        make_adapter("lora", 8)
