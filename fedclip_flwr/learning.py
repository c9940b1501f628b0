"""Training and evaluating what learns, mostly an adapter on stored features: tensors in, tensors out.

The recipe `paper` follows FedCLIP (arXiv 2302.13485) and its released code: symmetric contrastive loss within the
batch, in which two images of one class count as each other's negatives; Adam with L2 decay 0.2; a new optimizer every
round; a batch of one skipped; splits of 60/20/20, each rounded down; of the trained rounds the one with the best mean
validation accuracy. Deviation: prompts name a class with spaces where its folder has underscores.

The recipe `default` is cross-entropy over all class prompts without decay, from an exact identity; zero-shot takes part
in the selection, so that by that measure no result is worse there. Of rounds with equal accuracy, the one with lower
validation loss at more sites is selected.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.adam import adam  # the function: torch.optim.Adam imports the compiler, which takes over a second

from fedclip_flwr.kinds import KINDS
from fedclip_flwr.metrics import Quality, Score, gain, loss_votes, quality_of, score_of


class Examples(NamedTuple):
    """Images and the numbers of their classes [N].

    Images are features [N, dim] as CLIP gives them, or pixels [N, 3, height, width] in bytes.
    """

    features: Tensor
    labels: Tensor

    def rows(self, rows: Tensor | slice) -> Examples:
        return Examples(self.features[rows], self.labels[rows])

    def ready(self, device: str | torch.device = "cpu") -> Examples:
        """As learning takes them, on the device: features in float32, pixels as they are."""
        features = self.features.to(device)
        if features.dtype != torch.uint8:
            features = features.float()
        return Examples(features, self.labels.to(device, torch.int64))


class Classes(NamedTuple):
    """What images are compared with: a feature for each class [C, dim], the logits' scale and bias."""

    text: Tensor
    scale: float | Tensor
    bias: float | Tensor = 0.0

    @property
    def dim(self) -> int:
        return self.text.shape[1]

    def logits(self, features: Tensor) -> Tensor:
        return self.scale * features @ self.text.T + self.bias

    def ready(self, device: str | torch.device = "cpu") -> Classes:
        return self._replace(text=F.normalize(self.text.to(device, torch.float32), dim=-1))


class Learner(nn.Module):
    """What is trained and sent: its state is exactly the tensors that travel. Called, it gives features of unit length.

    It takes features (an adapter) or pixels (the whole model).
    """

    def against(self, classes: Classes) -> Classes:
        """What its features are compared with; an adapter changes nothing there."""
        return classes

    def on_cpu(self) -> dict[str, Tensor]:
        """A copy of its state as states travel: there, wherever it computes."""
        return {name: tensor.to("cpu", copy=True) for name, tensor in self.state_dict().items()}


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
    learning_rate: Mapping[str, float]  # for each kind of adapter, and for the whole model
    weight_decay: float
    prompt: str
    first_choice: int = 0  # the first round that may be selected
    most_gain: float = 0.05  # of accuracy at a site, that counts when rounds are compared
    loss_breaks_ties: bool = True  # else the first of equally accurate rounds is selected
    smallest_batch: int = 1
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-6
    width: int | None = None  # the dimension that the rates of wide adapters are meant for
    steps: int = 1  # an epoch of fewer takes steps that are as many times larger
    length: float = 1.0  # of features as the adapter's network sees them; 0: as CLIP gives them

    def rate(self, kind: str, dim: int, steps: int) -> float:
        """The learning rate for so many steps an epoch.

        Adam moves each number by about the rate in each step: a layer that is wider takes steps that are as many times
        smaller, and a site with few steps takes larger ones, so that its adapter too gets somewhere in a round.
        """
        rate = self.learning_rate[kind]
        if kind == "full-model":
            return rate
        rate *= max(1.0, self.steps / max(steps, 1))
        return rate * self.width / dim if self.width and KINDS[kind].wide else rate


RECIPES = {
    "default": Recipe(
        loss=class_loss,
        learning_rate={**{name: kind.learning_rate for name, kind in KINDS.items()}, "full-model": 1e-5},
        width=512,
        steps=10,
        weight_decay=0.0,
        prompt="a picture of a {}",
    ),
    "paper": Recipe(
        loss=contrastive_loss,
        learning_rate=dict.fromkeys((*KINDS, "full-model"), 5e-5),
        weight_decay=0.2,
        prompt="a picture of a {}",
        first_choice=1,
        most_gain=1.0,
        loss_breaks_ties=False,
        smallest_batch=2,
        length=0.0,
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
    learner: Learner,
    examples: Examples,
    classes: Classes,
    recipe: Recipe,
    *,
    learning_rate: float,
    epochs: int = 1,
    batch_size: int = 32,
    proximal: float = 0.0,
    seed: int = 0,
) -> float:
    """Trains in place with a new Adam; the mean loss of an example over all epochs (0.0 without any).

    `proximal` is FedProx's μ (arXiv 1812.06127): μ/2 times the squared distance from the start is added to what is
    minimised, though not to the loss that is returned.
    """
    parameters: list[Tensor] = list(learner.parameters())
    start = [p.detach().clone() for p in parameters] if proximal else []
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
            loss = recipe.loss(learner(batch.features), batch.labels, learner.against(classes))
            gradients = list(torch.autograd.grad(loss, parameters))
            with torch.no_grad():
                if proximal:
                    gradients = [g + proximal * (p - s) for g, p, s in zip(gradients, parameters, start, strict=True)]
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
def logits_of(learner: Learner | None, examples: Examples, classes: Classes) -> Tensor:
    """What the learner's features (without one: CLIP's own) say of each class."""
    if learner is None:
        return classes.logits(F.normalize(examples.features, dim=-1))
    return learner.against(classes).logits(learner(examples.features))


def evaluate(learner: Learner | None, examples: Examples, classes: Classes) -> Score:
    """How well the features find their class."""
    return score_of(logits_of(learner, examples, classes), examples.labels)


def examine(learner: Learner | None, examples: Examples, classes: Classes) -> Quality:
    """The same with all figures that are reported of tests."""
    return quality_of(logits_of(learner, examples, classes), examples.labels)


def personalize(
    adapter: Learner,
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


def better(later: Mapping[str, Score], best: Mapping[str, Score], recipe: Recipe) -> bool:
    """Whether what did so at validation later is to be preferred, at the sites that tried both: sites come and go."""
    if (found := _gained(later, best, recipe)) is not None:
        return found > 0
    known = [any(score.examples for score in scores.values()) for scores in (later, best)]
    return known[0] or not known[1]  # there is no telling: what the present sites have tried, if they could


def _gained(later: Mapping[str, Score], before: Mapping[str, Score], recipe: Recipe) -> float | None:
    """By the sites' bounded gains; where these come to nothing, by what they come to unbounded, then by loss."""
    for most in (recipe.most_gain, 1.0):
        found = gain(later, before, most)
        if found is None or abs(found) > 1e-12:  # less comes of rounding
            return found
    return loss_votes(later, before) if recipe.loss_breaks_ties else 0.0


def chosen(later: Mapping[str, Score], best: Mapping[str, Score], zero: Mapping[str, Score], recipe: Recipe) -> bool:
    """Whether a later round is to be selected in place of the best so far.

    Where zero-shot could be selected, that must not do better: each round may be a little better than the one before by
    what some sites claim, and all of them together far worse.
    """
    return better(later, best, recipe) and (recipe.first_choice > 0 or not (_gained(zero, later, recipe) or 0.0) > 0)


BLENDS = (0.25, 0.5, 0.75, 1.0)
"""The shares of the adapted feature that are tried where one is to be chosen."""
