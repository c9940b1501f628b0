from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedclip_flwr.base.settings import Settings
from fedclip_flwr.learning.lora import LoraSpec, LoraTensors, first_a, merge

SPEC = LoraSpec("vision", "all", ("layer",), 2, 4.0)


def net() -> nn.ModuleDict:
    torch.manual_seed(0)
    return nn.ModuleDict({"layer": nn.Linear(5, 3)})


def merged(b: Tensor, a: Tensor, scaling: float = 2.0) -> Tensor:
    changed = net()
    merge(changed, {"layer.lora_A": a, "layer.lora_B": b}, scaling)
    return changed.get_parameter("layer.weight").detach()


def test_what_is_added_to_a_layer_by_hand() -> None:
    state = {"layer.lora_A": torch.tensor([[1.0, 2.0]]), "layer.lora_B": torch.tensor([[3.0], [-1.0]])}
    one = nn.ModuleDict({"layer": nn.Linear(2, 2)})
    nn.init.zeros_(one.get_parameter("layer.weight"))
    merge(one, state, 0.5)
    assert torch.equal(one.get_parameter("layer.weight"), torch.tensor([[1.5, 3.0], [-0.5, -1.0]]))


def test_with_frozen_a_the_mean_of_b_is_the_mean_of_the_layers() -> None:
    a, sites = first_a("layer", 2, 5, 0), torch.randn(4, 3, 2, generator=torch.Generator().manual_seed(1))
    mean = torch.stack([merged(b, a) for b in sites]).mean(0)
    torch.testing.assert_close(merged(sites.mean(0), a), mean, rtol=0, atol=1e-6)
    assert (mean - net().get_parameter("layer.weight")).abs().max() > 0.1


def test_with_both_factors_the_mean_is_another_layer() -> None:
    a, b = torch.zeros(2, 1, 5), torch.zeros(2, 3, 1)
    a[0, 0, 0] = b[0, 0, 0] = a[1, 0, 1] = b[1, 1, 0] = 1  # each site changes one weight by 1
    of_means = merged(b.mean(0), a.mean(0), 1.0)
    apart = of_means - torch.stack([merged(*site, 1.0) for site in zip(b, a, strict=True)]).mean(0)
    expected = torch.zeros(3, 5)
    expected[:2, :2] = torch.tensor([[-0.25, 0.25], [0.25, -0.25]])  # a half of each was to come, and none elsewhere
    torch.testing.assert_close(apart, expected, rtol=0, atol=1e-6)


def test_a_starts_with_the_same_numbers_on_every_machine() -> None:
    """As written out from the raw bits of numpy's PCG64: 24 of them each, from -1 to 1, divided by the root of 4."""
    expected = torch.tensor(
        [
            [0.02746814489364624, 0.3585161566734314, 0.4330896735191345, -0.03444916009902954],
            [-0.457507848739624, 0.01646101474761963, -0.3440127968788147, 0.3076677918434143],
        ]
    )
    assert torch.equal(first_a("vision_model.encoder.layers.0.self_attn.q_proj", 2, 4, 7), expected)


def test_each_layer_and_each_seed_has_an_a_of_its_own_within_bounds() -> None:
    first, *others = first_a("one", 8, 64, 0), first_a("two", 8, 64, 0), first_a("one", 8, 64, 1)
    assert all((first - other).abs().max() > 0.1 for other in others)
    assert first.shape == (8, 64)
    assert 0.97 / 8 < first.abs().max() <= 1 / 8
    assert abs(first.mean()) < 0.01
    assert first.std().item() == pytest.approx(1 / 8 / 3**0.5, rel=0.1)


def test_the_specification_is_read_from_the_settings_and_from_a_file() -> None:
    spec = LoraSpec.of(Settings(method="lora", lora_modules="q_proj, fc1", lora_layers="last:3", lora_targets="both"))
    assert spec == LoraSpec("both", "last:3", ("q_proj", "fc1"), 8, 16.0)
    assert (spec.scaling, spec.towers, spec.last) == (2.0, ("vision", "text"), 3)
    assert LoraSpec.read(spec.facts) == spec
    assert LoraSpec.of(Settings(method="lora", lora_alpha=4.0)).scaling == 0.5


@pytest.mark.parametrize(
    ("wrong", "expected"),
    [
        ({"rank": "8"}, "its rank is '8'"),
        ({"modules": "q_proj"}, "its modules is 'q_proj'"),
        ({"rank": 0}, "its rank is 0"),
        ({"alpha": 10**400}, "and its alpha 1000"),
        ({"alpha": float("inf")}, "its alpha inf"),
        ({"alpha": 10**400}, "its alpha 1000"),
    ],
)
def test_a_wrong_specification_is_reported(wrong: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        LoraSpec.read({**SPEC.facts, **wrong})


def tensors(*shapes: tuple[int, ...]) -> LoraTensors:
    names = ("layer.lora_A", "layer.lora_B", "other.lora_A")
    return LoraTensors(SPEC, {name: torch.ones(shape) for name, shape in zip(names, shapes, strict=False)})


def test_a_complete_lora_is_two_factors_of_the_rank() -> None:
    tensors((2, 5), (3, 2)).check()
    for shapes in ([(2, 5)], [(2, 5), (3, 2), (2, 5)], []):
        with pytest.raises(ValueError, match="its tensors are not pairs of LoRA"):
            tensors(*shapes).check()
    for wrong in ([(1, 5), (3, 1)], [(2, 5), (3, 1)], [(2, 5), (2,)]):
        with pytest.raises(ValueError, match=r"layer has LoRA of \[.*, expected rank 2"):
            tensors(*wrong).check()


def test_lora_that_does_not_fit_a_model_is_reported_and_half_of_it_is_half_the_change() -> None:
    fitting, whole, half = tensors((2, 5), (3, 2)), net(), net()
    fitting.merge_into(whole)
    LoraTensors(SPEC, fitting.state, 0.5).merge_into(half)
    before, full, middle = (n.get_parameter("layer.weight").detach() for n in (net(), whole, half))
    torch.testing.assert_close(full - before, torch.full((3, 5), 4.0))  # 4 / 2 · (1 + 1)
    torch.testing.assert_close(middle - before, torch.full((3, 5), 2.0))
    with pytest.raises(ValueError, match="the model has no layer"):
        fitting.merge_into(nn.Identity())
    with pytest.raises(ValueError, match=r"layer is \[3, 5\] in the model, and \[3, 4\] in LoRA"):
        tensors((2, 4), (3, 2)).merge_into(net())
