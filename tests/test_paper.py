"""The recipe `paper` against the paper's protocol written down once more, plainly, with nothing of `learning.py`.

FedCLIP (arXiv 2302.13485) and its released code: 60/20/20 splits, each part int(n · share); every round a new Adam with
L2 decay 0.2; symmetric contrastive loss with `arange` targets within the batch, duplicates of a class as negatives; the
last, small batch is kept, a batch of one skipped; sites weigh the same; the round with the best mean validation
accuracy.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import cross_entropy, linear, normalize, softmax

from fedclip_flwr.adapters import make_adapter
from fedclip_flwr.config import Settings
from fedclip_flwr.featurefolder import FeatureFolder
from fedclip_flwr.inprocess import federate, make_sites

DIM, CLASSES, SEED, ROUNDS = 24, 5, 7, 3
SIZES = {"cow": 55, "elk": 88, "fox": 120, "zoo": 40}
"""A last batch of one in the 33 to train of 55, of 20 in the 52 of 88, of 8 in the 72 of 120; zoo is held out."""

State = dict[str, Tensor]


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
        logits = 100 * adapted(w, x[rows]) @ text[y[rows]].T
        target = torch.arange(len(rows))
        adam.zero_grad()
        torch.autograd.backward((cross_entropy(logits, target) + cross_entropy(logits.T, target)) / 2)
        adam.step()
    return {name: value.detach() for name, value in w.items()}


def drawn_by(*parts: object) -> torch.Generator:
    """The project's seeds, which the protocol leaves open."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def fedclip(start: State, sites: dict[str, tuple[Tensor, Tensor]], text: Tensor) -> tuple[list[State], list[float]]:
    """The server's adapter after each round, and its mean validation accuracy."""
    states, accuracies = [start], [0.0]
    for number in range(1, ROUNDS + 1):
        answers, correct = [], []
        for name, (x, y) in sites.items():
            n = int(len(y) * 0.6)
            order = torch.randperm(n, generator=drawn_by(SEED, "train", name, number))
            answers.append(trained(states[-1], x[:n], y[:n], text, order))
        states.append({name: sum(own[name] for own in answers) / len(answers) for name in start})  # type: ignore[misc]
        for x, y in sites.values():
            a, b = int(len(y) * 0.6), int(len(y) * 0.6) + int(len(y) * 0.2)
            found = (adapted(states[-1], x[a:b]) @ text.T).argmax(1)
            correct.append((found == y[a:b]).float().mean().item())
        accuracies.append(sum(correct) / len(correct))
    return states, accuracies


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Features around their class, in four domains of different sizes."""
    generator = torch.Generator().manual_seed(3)
    text = normalize(torch.randn(CLASSES, DIM, generator=generator), dim=1)
    save_file({"text_features": text}, tmp_path / "classes.safetensors")
    for domain, size in SIZES.items():
        labels = torch.randint(0, CLASSES, (size,), generator=generator)
        features = text[labels] + 0.35 * torch.randn(size, DIM, generator=generator)
        save_file({"image_features": features, "labels": labels}, tmp_path / f"{domain}.safetensors")
    names = ", ".join(f'"{name}"' for name in "abcde")
    (tmp_path / "features.json").write_text(
        f'{{"model": "m", "embedding_dim": {DIM}, "logit_scale": 100.0, "prompt": "a picture of a {{}}", '
        f'"class_names": [{names}], "domains": ["cow", "elk", "fox", "zoo"]}}'
    )
    return tmp_path


def test_three_rounds_over_three_sites_equal_the_plain_protocol(folder: Path) -> None:
    features = FeatureFolder(folder)
    settings = Settings(recipe="paper", seed=SEED, num_server_rounds=ROUNDS)
    sites, unseen = make_sites(features, "zoo", sites=3, seed=SEED)
    result = federate(sites, features.classes, unseen, settings)

    plain = {}
    for domain, size in list(SIZES.items())[:3]:
        examples = features.examples(domain)
        x, y = normalize(examples.features, dim=1), examples.labels
        rows = torch.randperm(size, generator=drawn_by(SEED, "partition", domain))
        rows = rows[torch.randperm(size, generator=drawn_by(SEED, "split", f"{domain}-0"))]
        plain[f"{domain}-0"] = x[rows], y[rows]
    start = make_adapter("attention", DIM, identity=False, seed=SEED).state_dict()
    states, accuracies = fedclip(start, plain, features.classes.text)

    best = max(range(1, ROUNDS + 1), key=lambda number: (accuracies[number], -number))
    assert result.selected.round == best
    assert [line.validation for line in result.lines[1:]] == pytest.approx(accuracies[1:], abs=1e-6)
    unchosen = [replace(site, validation=site.validation.rows(torch.arange(0))) for site in sites]
    last = federate(unchosen, features.classes, None, settings)  # nothing to choose by: the last round is taken
    for number, state in ((best, result.state), (ROUNDS, last.state)):
        for name, tensor in states[number].items():
            torch.testing.assert_close(state[name], tensor, rtol=0, atol=1e-6)
            assert not torch.allclose(tensor, start[name], rtol=0, atol=2e-5)  # it went somewhere
