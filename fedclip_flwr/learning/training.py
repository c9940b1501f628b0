"""Training and evaluation of a learner, mostly an adapter on stored features: tensors in, tensors out.

The recipe `paper` follows FedCLIP (arXiv 2302.13485) and its released code: symmetric contrastive loss within the
batch, in which two images of one class count as each other's negatives; Adam with L2 decay 0.2; a new optimizer every
round; a batch of one is skipped; splits of 60/20/20, each rounded down; the trained round with the best mean
validation accuracy is selected. Deviation: prompts name a class with spaces where its folder has underscores.

The recipe `default` is cross-entropy over all class prompts without decay, from an exact identity; zero-shot takes part
in the selection, so that no result is worse in validation. Of rounds with equal accuracy, the one with lower
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
from fedclip_flwr.learning.metrics import Quality, Score, no_quality, quality_of, score_of
from fedclip_flwr.learning.recipes import Recipe


def split(count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Shuffled rows for training, validation and test: 60, 20 and 20 %, rounded down; a single row is for training."""
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
    """Trains in place with a new Adam; returns the mean loss per example over all epochs (0.0 without any).

    `proximal` is FedProx's μ (arXiv 1812.06127): μ/2 times the squared distance from the start is added to the
    objective, but not to the returned loss.
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
    """The logits of each class, from the learner's features, or from CLIP's own without a learner."""
    if learner is None:
        return classes.logits(F.normalize(examples.features, dim=-1))
    return learner.logits(examples.features, classes)


def evaluate(learner: Learner | None, examples: Examples, classes: Classes) -> Score:
    """The score of the learner's features, or of CLIP's own (zero-shot) without a learner."""
    if not len(examples.labels):  # a tower does not run on no images
        return Score(0, 0, 0.0)
    return score_of(logits_of(learner, examples, classes), examples.labels)


def examine(learner: Learner | None, examples: Examples, classes: Classes) -> Quality:
    """Like `evaluate`, with all metrics that are reported of tests."""
    if not len(examples.labels):
        return no_quality(len(classes.text))
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
    """Trains the adapter further at one site, and keeps the epoch with the lowest validation loss.

    Returns that epoch; 0 is the unchanged adapter, which is kept if no epoch is better or nothing can be compared. (By
    loss, not by accuracy: with a site's few validation images, many epochs have the same accuracy.)
    """
    if not len(validation.labels):
        return 0
    best, state = 0, copy.deepcopy(adapter.state_dict())
    lowest = evaluate(adapter, validation, classes).loss
    for epoch in range(1, epochs + 1):
        own = seed_of(seed, "epoch", epoch)
        train(adapter, examples, classes, recipe, learning_rate=learning_rate, batch_size=batch_size, seed=own)
        loss = evaluate(adapter, validation, classes).loss
        if loss < lowest:
            best, lowest, state = epoch, loss, copy.deepcopy(adapter.state_dict())
    adapter.load_state_dict(state)
    return best
