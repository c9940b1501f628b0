from __future__ import annotations

import pytest
import torch

from fedclip_flwr.base.settings import Settings
from fedclip_flwr.base.tensors import State
from fedclip_flwr.exchange.codecs import CODECS, packed_size, unwrap, wrap
from fedclip_flwr.experiments.simulate import make_sites, simulate
from fedclip_flwr.features.base import Features
from fedclip_flwr.learning.adapters import ADAPTERS, make_adapter

BASE = {"b": torch.tensor([1.0, -2.0, 0.5]), "a": torch.tensor([[10.0, 20.0], [30.0, 40.0]]), "s": torch.tensor(4.6)}


def changed(by: State) -> State:
    return {name: BASE[name] + by[name] for name in BASE}


def test_int8_by_hand() -> None:
    """A factor for each row: the largest number over 127. All numbers here are multiples of it, so none is rounded."""
    by = {
        "a": torch.tensor([[127.0, -64.0], [0.0, 0.0]]),
        "b": torch.tensor([-254.0, 2.0, 0.0]),
        "s": torch.tensor(12.7),
    }
    parcel = wrap("int8", changed(by), BASE, {}, 0)
    factors = [
        torch.tensor(x).view(torch.uint8).tolist() for x in ([1.0, 0.0], [2.0], [(changed(by)["s"] - 4.6).item() / 127])
    ]
    numbers = [[127, 256 - 64, 0, 0], [256 - 127, 1, 0], [127]]
    assert parcel.packed.tolist() == [x for f, n in zip(factors, numbers, strict=True) for x in [*f, *n]]
    for name, tensor in parcel.decoded.items():
        torch.testing.assert_close(tensor, BASE[name] + by[name])
    assert all(tensor.abs().max() < 1e-5 for tensor in parcel.residual.values())


def test_int8_never_turns_the_largest_number_into_its_negative() -> None:
    """127 and a fraction just below 1 is 128 in float32, which int8 would take for -128."""
    for value in (127.0, -127.0):
        arrives = wrap("int8", {"a": torch.full((10**6,), value)}, {"a": torch.zeros(10**6)}, {}, 0).decoded["a"]
        assert (arrives - value).abs().max() <= 1


def test_bfloat16_by_hand() -> None:
    """1 + 2⁻⁷ can be written with seven bits of mantissa, 1 + 2⁻⁹ can't: it becomes 1."""
    zero = {"a": torch.zeros(2)}
    parcel = wrap("bfloat16", {"a": torch.tensor([1 + 2**-7, 1 + 2**-9])}, zero, {}, 0)
    assert parcel.packed.tolist() == [0x81, 0x3F, 0x80, 0x3F]
    assert parcel.decoded["a"].tolist() == [1 + 2**-7, 1.0]
    assert parcel.residual["a"].tolist() == [0.0, 2**-9]


@pytest.mark.parametrize("codec", CODECS)
def test_the_other_side_makes_of_a_parcel_what_this_side_says(codec: str) -> None:
    for kind in ADAPTERS:
        torch.manual_seed(1)
        base = make_adapter(kind, 24).state_dict()
        new = {name: tensor + 0.01 * torch.randn(tensor.shape) for name, tensor in base.items()}
        parcel = wrap(codec, new, base, {}, 5)
        assert len(parcel.packed) == packed_size(codec, base)
        back = unwrap(codec, parcel.packed, base)
        for name, tensor in base.items():
            assert torch.equal(back[name], parcel.decoded[name])
            assert back[name].shape == tensor.shape
            torch.testing.assert_close(new[name] - back[name], parcel.residual[name], rtol=0, atol=1e-7)
            assert (new[name] - back[name]).abs().max() <= (new[name] - tensor).abs().max() / 127 + 1e-7


def test_a_row_has_a_factor_of_its_own_and_lies_along_the_longer_side() -> None:
    """A small row is as precise as a large one; and 512 numbers of four rows need four factors, not 512."""
    for tensor in (torch.ones(4, 512), torch.ones(512, 4)):
        assert packed_size("int8", {"a": tensor}) == 4 * 4 + 2048
        tall = len(tensor) == 512
        small = torch.rand(512) * 1e-6
        (tensor[:, 0] if tall else tensor[0]).copy_(small)
        arrives = wrap("int8", {"a": tensor}, {"a": torch.zeros_like(tensor)}, {}, 0).decoded["a"]
        found = arrives[:, 0] if tall else arrives[0]
        assert (found - small).abs().max() <= 1e-6 / 127


def test_rounding_is_right_on_average_and_follows_from_the_seed() -> None:
    base, new = {"a": torch.zeros(20_000)}, {"a": torch.full((20_000,), 0.3)}
    new["a"][0] = 127.0  # so that the factor is 1
    first, again, other = (wrap("int8", new, base, {}, seed) for seed in (1, 1, 2))
    assert torch.equal(first.packed, again.packed)
    assert not torch.equal(first.packed, other.packed)
    assert set(first.decoded["a"][1:].tolist()) == {0.0, 1.0}
    assert first.decoded["a"][1:].mean() == pytest.approx(0.3, abs=0.013)  # four standard deviations


@pytest.mark.parametrize("codec", CODECS)
def test_what_rounding_leaves_over_goes_with_the_next_parcel(codec: str) -> None:
    """A hundred small steps: with what is left over they come to their sum; without, errors would add up."""
    torch.manual_seed(3)
    there, here, left = {"a": torch.zeros(400)}, torch.zeros(400), dict[str, torch.Tensor]()
    careless = {"a": torch.zeros(400)}
    for seed in range(100):
        step = 0.01 * torch.randn(400).exp()
        here = here + step
        parcel = wrap(codec, {"a": there["a"] + step}, there, left, seed)
        there, left = parcel.decoded, parcel.residual
        careless = wrap(codec, {"a": careless["a"] + step}, careless, {}, seed).decoded
    assert (there["a"] + left["a"] - here).abs().max() < 1e-4
    assert 3 * (there["a"] - here).norm() < (careless["a"] - here).norm()


@pytest.mark.parametrize(
    ("codec", "kind"),
    [
        pytest.param(codec, kind, marks=() if codec == "int8" or kind == "attention" else pytest.mark.soak)
        for codec in CODECS
        for kind in ADAPTERS
    ],
)
def test_a_federation_under_a_codec_predicts_as_in_float32(codec: str, kind: str, drawn: Features) -> None:
    """On at least 99.5 % of all images."""
    sites, unseen = make_sites(drawn, sites=6)
    images = torch.cat([drawn.examples(domain).ready().features for domain in drawn.domains])
    classes = drawn.classes.ready()
    states, found = [], []
    for how in ("float32", codec):
        state = simulate(sites, classes, unseen, Settings(adapter=kind, codec=how), test_every_round=False).state
        adapter = make_adapter(kind, classes.dim)
        adapter.load_state_dict(state)
        found.append(classes.logits(adapter(images)).argmax(dim=1))
        states.append(state)
    assert (found[0] == found[1]).float().mean() >= 0.995
    assert all(not torch.equal(states[0][name], states[1][name]) for name in states[0])
