"""Training and evaluating an adapter on stored features: tensors in, tensors out.

The recipe `paper` follows FedCLIP (arXiv 2302.13485) and its released code: symmetric contrastive loss within the
batch, in which two images of one class count as each other's negatives; Adam with L2 decay 0.2; a new optimizer every
round; a batch of one skipped; splits of 60/20/20, each rounded down; the round with the best mean validation accuracy.
Deviation: the state before round 1 takes part in the selection, so that no result is worse there than zero-shot.

The recipe `default` is cross-entropy over all class prompts without decay, from an exact identity.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.optim.adam import adam  # the function: torch.optim.Adam imports the compiler, which takes over a second

from fedclip_flwr.adapters import Adapter
from fedclip_flwr.metrics import Quality, Score, quality_of, score_of


class Examples(NamedTuple):
    """Image features [N, dim] and the numbers of their classes [N]."""

    features: Tensor
    labels: Tensor

    def rows(self, rows: Tensor) -> Examples:
        return Examples(self.features[rows], self.labels[rows])

    def ready(self, device: str | torch.device = "cpu") -> Examples:
        """As learning takes them: float32, of unit length, on the device."""
        features = F.normalize(self.features.to(device, torch.float32), dim=-1)
        return Examples(features, self.labels.to(device, torch.int64))


class Classes(NamedTuple):
    """What images are compared with: a feature for each class [C, dim], the logits' scale and bias."""

    text: Tensor
    scale: float
    bias: float = 0.0

    def logits(self, features: Tensor) -> Tensor:
        return self.scale * features @ self.text.T + self.bias

    def ready(self, device: str | torch.device = "cpu") -> Classes:
        return self._replace(text=F.normalize(self.text.to(device, torch.float32), dim=-1))


def class_loss(features: Tensor, labels: Tensor, classes: Classes) -> Tensor:
    """Cross-entropy over the class prompts."""
    return F.cross_entropy(classes.logits(features), labels)


def contrastive_loss(features: Tensor, labels: Tensor, classes: Classes) -> Tensor:
    """CLIP's own loss: each image against the prompts of its batch, and each prompt against the images."""
    logits = classes._replace(text=classes.text[labels]).logits(features)
    targets = torch.arange(len(labels), device=labels.device)
    return (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2


@dataclass(frozen=True)
class Recipe:
    """How a site learns."""

    loss: Callable[[Tensor, Tensor, Classes], Tensor]
    learning_rate: Mapping[str, float]  # for each kind of adapter
    weight_decay: float
    identity: bool  # whether adapters start as the exact identity
    prompt: str
    smallest_batch: int = 1
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-6
    width: int | None = None  # the dimension that attention's learning rate is meant for

    def rate(self, kind: str, dim: int) -> float:
        """The learning rate for an adapter: a layer that is wider takes steps that are as many times smaller."""
        rate = self.learning_rate[kind]
        return rate * self.width / dim if self.width and kind == "attention" else rate


RECIPES = {
    "default": Recipe(
        loss=class_loss,
        learning_rate={"attention": 1e-4, "gate": 1e-3, "scale": 3e-3},
        width=512,
        weight_decay=0.0,
        identity=True,
        prompt="a picture of a {}",
    ),
    "paper": Recipe(
        loss=contrastive_loss,
        learning_rate={"attention": 5e-5, "gate": 5e-5, "scale": 5e-5},
        weight_decay=0.2,
        identity=False,
        prompt="a picture of a {}",
        smallest_batch=2,
    ),
}


def seed_of(*parts: str | int) -> int:
    """A seed that follows from the parts alone, the same on every machine."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:7], "big")


def split(count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows for training, validation and test: shuffled, then 60, 20 and 20 %, rounded down; a single row trains."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    train, part = max(count * 3 // 5, min(count, 1)), count // 5
    return order[:train], order[train : train + part], order[train + part : train + 2 * part]


def train(
    adapter: Adapter,
    examples: Examples,
    classes: Classes,
    recipe: Recipe,
    *,
    learning_rate: float,
    epochs: int = 1,
    batch_size: int = 32,
    seed: int = 0,
) -> float:
    """Trains the adapter in place with a new Adam; the mean loss of an example over all epochs (0.0 without any)."""
    parameters: list[Tensor] = list(adapter.parameters())
    moments = [torch.zeros_like(p) for p in parameters]
    squares = [torch.zeros_like(p) for p in parameters]
    steps = [torch.zeros((), device=p.device) for p in parameters]
    generator = torch.Generator().manual_seed(seed)
    total, seen = torch.zeros((), device=examples.features.device), 0
    for _ in range(epochs):
        order = torch.randperm(len(examples.labels), generator=generator).to(examples.labels.device)
        for rows in torch.split(order, batch_size):
            if len(rows) < recipe.smallest_batch:
                continue
            batch = examples.rows(rows)
            loss = recipe.loss(adapter(batch.features), batch.labels, classes)
            gradients = list(torch.autograd.grad(loss, parameters))
            with torch.no_grad():
                adam(
                    parameters,
                    gradients,
                    moments,
                    squares,
                    [],
                    steps,
                    fused=True,
                    amsgrad=False,
                    beta1=recipe.betas[0],
                    beta2=recipe.betas[1],
                    lr=learning_rate,
                    weight_decay=recipe.weight_decay,
                    eps=recipe.eps,
                    maximize=False,
                )
            total += loss.detach() * len(rows)
            seen += len(rows)
    return total.item() / seen if seen else 0.0


@torch.no_grad()
def logits_of(adapter: Adapter | None, examples: Examples, classes: Classes) -> Tensor:
    """What the adapter's features (without one: CLIP's own) say of each class."""
    return classes.logits(adapter(examples.features) if adapter else examples.features)


def evaluate(adapter: Adapter | None, examples: Examples, classes: Classes) -> Score:
    """How well the features find their class."""
    return score_of(logits_of(adapter, examples, classes), examples.labels)


def examine(adapter: Adapter | None, examples: Examples, classes: Classes) -> Quality:
    """The same with all figures that are reported of tests."""
    return quality_of(logits_of(adapter, examples, classes), examples.labels)


def personalize(
    adapter: Adapter,
    examples: Examples,
    validation: Examples,
    classes: Classes,
    recipe: Recipe,
    *,
    learning_rate: float,
    epochs: int,
    batch_size: int = 32,
    seed: int = 0,
) -> int:
    """Goes on training alone and leaves the adapter as it was after the epoch with the least validation loss.

    That epoch is returned: 0 is the adapter as it came, which is kept where nothing is better or can be compared. (By
    loss, not by accuracy: a site's few validation images leave many epochs with the same accuracy.)
    """
    if not len(validation.labels):
        return 0
    best, state = 0, copy.deepcopy(adapter.state_dict())
    least = evaluate(adapter, validation, classes).loss
    for epoch in range(1, epochs + 1):
        one = seed_of(seed, "epoch", epoch)
        train(adapter, examples, classes, recipe, learning_rate=learning_rate, batch_size=batch_size, seed=one)
        found = evaluate(adapter, validation, classes).loss
        if found < least:
            best, least, state = epoch, found, copy.deepcopy(adapter.state_dict())
    adapter.load_state_dict(state)
    return best


def average(states: Sequence[Mapping[str, Tensor]], weights: Sequence[float] | None = None) -> dict[str, Tensor]:
    """The weighted mean of adapters' tensors, summed in the order given; without weights all count the same."""
    shares = [1.0] * len(states) if weights is None else list(weights)
    whole = sum(shares)
    return {
        name: torch.stack([state[name].double() * (w / whole) for state, w in zip(states, shares, strict=True)])
        .sum(0)
        .to(states[0][name].dtype)
        for name in states[0]
    }


def best_round(validation: Sequence[float | None]) -> int:
    """The round with the best validation accuracy, the earliest of several; without validation data the last."""
    known = [(accuracy, -number) for number, accuracy in enumerate(validation) if accuracy is not None]
    return -max(known)[1] if known else len(validation) - 1
