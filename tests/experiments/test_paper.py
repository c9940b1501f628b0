"""The recipe `paper` against FedCLIP's released protocol written down once more, with nothing of `learning/`.

The points are those of the table "Equal to the released code" in `docs/methods.md`, each under its own words here: the
network sees CLIP's feature as it comes, and only the product is brought to unit length; 60/20/20 splits, each part
int(n · share); every round a new Adam with L2 decay 0.2; symmetric contrastive loss with `arange` targets within the
batch, duplicates of a class as negatives, at the model's scale; the last, small batch is kept, a batch of one skipped;
the plain mean, whatever the sites' sizes and however far each has gone; the first of the rounds with the greatest mean
validation accuracy; predictions at scale 100; the held-out domain is tested whole.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import cross_entropy, linear, normalize, softmax

from fedclip_flwr.base.errors import UserError
from fedclip_flwr.base.settings import Settings
from fedclip_flwr.experiments.simulate import make_sites, simulate
from fedclip_flwr.features.folder import FeatureFolder
from fedclip_flwr.learning.adapters import make_adapter

DIM, CLASSES, SEED, ROUNDS, SCALE = 24, 5, 7, 3, 80.0
SIZES = {"cow": 55, "elk": 88, "fox": 120, "zoo": 40}
"""A last batch of one in the 33 to train of 55, of 20 in the 52 of 88, of 8 in the 72 of 120; zoo is held out."""
UNEQUAL = {"cow": 60, "elk": 60, "fox": 1900, "zoo": 40}
"""To train: 36, 36 and 1,140. The third one's update is many times as long as the others'."""

State = dict[str, Tensor]


class Round(NamedTuple):
    """Mean accuracies after a round."""

    validation: float
    seen: float
    unseen: float


def adapted(w: State, x: Tensor) -> Tensor:
    hidden = torch.tanh(linear(x, w["inner.weight"], w["inner.bias"]))
    return normalize(x * softmax(linear(hidden, w["outer.weight"], w["outer.bias"]), 1), dim=1)


def trained(start: State, x: Tensor, y: Tensor, text: Tensor, order: Tensor) -> State:
    """One site's epoch."""
    w = {name: value.clone().requires_grad_() for name, value in start.items()}
    adam = torch.optim.Adam(w.values(), lr=5e-5, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.2, foreach=False)
    for first in range(0, len(order), 32):
        rows = order[first : first + 32]
        if len(rows) == 1:
            continue
        logits = SCALE * adapted(w, x[rows]) @ text[y[rows]].T
        target = torch.arange(len(rows))
        adam.zero_grad()
        torch.autograd.backward((cross_entropy(logits, target) + cross_entropy(logits.T, target)) / 2)
        adam.step()
    return {name: value.detach() for name, value in w.items()}


def accuracy(w: State, x: Tensor, y: Tensor, text: Tensor) -> float:
    return float(((100 * adapted(w, x) @ text.T).argmax(1) == y).float().mean())


def drawn_by(*parts: object) -> torch.Generator:
    """The project's seeds, which the protocol leaves open."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def fedclip(
    start: State, sites: dict[str, tuple[Tensor, Tensor]], held_out: tuple[Tensor, Tensor], text: Tensor
) -> tuple[list[State], list[Round], int]:
    """The server's adapter after each round, how it does, and the round that is taken."""
    states, found = [start], [Round(0.0, 0.0, 0.0)]
    for number in range(1, ROUNDS + 1):
        answers = []
        for name, (x, y) in sites.items():
            n = int(len(y) * 0.6)
            order = torch.randperm(n, generator=drawn_by(SEED, "train", name, number))
            answers.append(trained(states[-1], x[:n], y[:n], text, order))
        states.append({name: torch.stack([own[name] for own in answers]).mean(0) for name in start})
        validation, test = [], []
        for x, y in sites.values():
            a, b = int(len(y) * 0.6), int(len(y) * 0.2)
            validation.append(accuracy(states[-1], x[a : a + b], y[a : a + b], text))
            test.append(accuracy(states[-1], x[a + b : a + 2 * b], y[a + b : a + 2 * b], text))
        means = [sum(part) / len(part) for part in (validation, test)]
        found.append(Round(means[0], means[1], accuracy(states[-1], *held_out, text)))
    best, taken = 0.0, 0
    for number, figures in enumerate(found):
        if figures.validation > best:
            best, taken = figures.validation, number
    return states, found, taken


def lengths(of: str, generator: torch.Generator, size: int) -> Tensor:
    """A constant one, or for each image its own, as the bundled CLIP's features have."""
    if of == "varying":
        return 15.5 + 3.9 * torch.rand(size, 1, generator=generator)
    return torch.full((size, 1), float(of))


@pytest.fixture
def made(tmp_path: Path) -> Callable[..., FeatureFolder]:
    """Makes features around their class, in four domains."""

    def make(length: str, sizes: Mapping[str, int] = SIZES, **facts: object) -> FeatureFolder:
        generator = torch.Generator().manual_seed(3)
        text = normalize(torch.randn(CLASSES, DIM, generator=generator), dim=1)
        save_file({"text_features": text}, tmp_path / "classes.safetensors")
        for domain, size in sizes.items():
            labels = torch.randint(0, CLASSES, (size,), generator=generator)
            features = text[labels] + 0.35 * torch.randn(size, DIM, generator=generator)
            features = normalize(features, dim=1) * lengths(length, generator, size)
            save_file({"image_features": features, "labels": labels}, tmp_path / f"{domain}.safetensors")
        described = {"model": "m", "embedding_dim": DIM, "logit_scale": SCALE, "prompt": "a picture of a {}"}
        described |= {"class_names": [*"abcde"], "domains": [*sizes], **facts}
        (tmp_path / "features.json").write_text(json.dumps(described))
        return FeatureFolder(tmp_path)

    return make


def start() -> State:
    return make_adapter("attention", DIM, identity=False, seed=SEED).state_dict()


@pytest.mark.parametrize(
    ("length", "sizes"),
    [*((length, SIZES) for length in ("1", "5", "10", "20", "varying")), ("10", UNEQUAL)],
    ids=["1", "5", "10", "20", "varying", "unequal sites"],
)
def test_three_rounds_over_three_sites_equal_the_plain_protocol(
    made: Callable[..., FeatureFolder], length: str, sizes: Mapping[str, int]
) -> None:
    features = made(length, sizes)
    settings = Settings(recipe="paper", seed=SEED, num_server_rounds=ROUNDS)
    sites, unseen = make_sites(features, "zoo", sites=3, seed=SEED)
    result = simulate(sites, features.classes, unseen, settings)

    plain = {}
    for domain, size in list(sizes.items())[:3]:
        x, y = features.examples(domain)
        rows = torch.randperm(size, generator=drawn_by(SEED, "partition", domain))
        rows = rows[torch.randperm(size, generator=drawn_by(SEED, "split", f"{domain}-0"))]
        plain[f"{domain}-0"] = x[rows], y[rows]
    states, found, taken = fedclip(start(), plain, features.examples("zoo"), features.classes.text)

    assert result.selected.round == taken
    for line, figures in zip(result.rounds[1:], found[1:], strict=True):
        assert (line.validation, line.seen, line.unseen) == pytest.approx(figures, abs=1e-6)
    unchosen = [replace(site, validation=site.validation.rows(torch.arange(0))) for site in sites]
    last = simulate(unchosen, features.classes, None, settings)  # nothing to choose by: the last round is taken
    for number, state in ((taken, result.state), (ROUNDS, last.state)):
        for name, tensor in states[number].items():
            torch.testing.assert_close(state[name], tensor, rtol=0, atol=1e-6)
            assert not torch.allclose(tensor, start()[name], rtol=0, atol=2e-5)  # it went somewhere


def adapter_of(features: FeatureFolder, **how: object) -> State:
    settings = Settings(recipe="paper", seed=SEED, num_server_rounds=1, **how)  # type: ignore[arg-type]
    sites, _ = make_sites(features, "zoo", sites=3, seed=SEED)
    return simulate(sites, features.classes, None, settings).state


def close(one: State, other: State, atol: float = 1e-6) -> bool:
    return all(torch.allclose(one[name], other[name], rtol=0, atol=atol) for name in one)


def test_of_features_with_unit_length_a_folder_or_a_setting_has_their_length(
    made: Callable[..., FeatureFolder],
) -> None:
    truth = adapter_of(made("10"))
    assert close(adapter_of(made("1"), feature_norm=10.0), truth)
    with_setting = made("1", feature_norm=10.0)
    assert close(adapter_of(with_setting), truth)
    assert not with_setting.has_unit_length(SIZES)
    assert not close(adapter_of(made("1")), truth, 2e-5)
    assert not made("1").has_unit_length()  # none was looked at
    assert made("1").has_unit_length(SIZES)
    assert not made("varying").has_unit_length(SIZES)


@pytest.mark.parametrize("norm", ["x", 0, -1, 1e5, float("nan")])
def test_a_length_that_can_not_be_is_refused(made: Callable[..., FeatureFolder], norm: object) -> None:
    with pytest.raises(UserError, match=r"feature_norm|is invalid"):
        made("1", feature_norm=norm)


def test_a_length_is_refused_for_features_that_have_their_own(
    made: Callable[..., FeatureFolder],
) -> None:
    with pytest.raises(UserError, match=r"has a feature_norm, which is for .* those of cow have others: leave it out"):
        made("varying", feature_norm=10.0).examples("cow")
