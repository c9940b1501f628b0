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

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.optim.adam import adam  # the function: torch.optim.Adam imports the compiler, which takes over a second

from fedclip_flwr.base.seeds import seed_of
from fedclip_flwr.learning.base import Classes, Examples, Learner
from fedclip_flwr.learning.metrics import Quality, Score, quality_of, score_of
from fedclip_flwr.learning.recipes import Recipe


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
