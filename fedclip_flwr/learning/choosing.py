"""Which constants of the closed form suit a federation's images, by its sites' validation images.

The accuracy on seen classes alone would choose constants that lose what zero-shot knows of others. So the classes that
have images are divided into folds, and each fold is also scored by the model without its sums: as classes that nobody
has. Both losses count the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import product

import torch
from torch import Tensor
from torch.nn import functional as F

from fedclip_flwr.learning.base import Classes, Examples
from fedclip_flwr.learning.one_round import Constants, OneRound
from fedclip_flwr.learning.sums import unit_of

GRID = tuple(
    Constants(shrinkage=shrinkage, share=share, margin=margin)
    for shrinkage, share, margin in product((0.3, 0.5, 0.7), (0.5, 0.65, 0.8), (0.0, 0.05, 0.1))
)
"""Those with the same shrinkage are neighbours: most of the work is the same for them."""
FOLDS = 5
MOST_GAIN = 0.1
"""The most loss, gained or lost at a site, that counts: no single site decides."""


def scores(learner: OneRound, validation: Examples, classes: Classes) -> list[float]:
    """For each of `GRID` the summed loss; then for each the one of images whose classes are in the fold left out."""
    every = torch.zeros(len(GRID), dtype=torch.float64)
    apart = torch.zeros_like(every)
    seen = (learner.counts > 0).nonzero()[:, 0]
    for fold in (seen[:0], *(seen[first::FOLDS] for first in range(min(FOLDS, len(seen) - 1)))):
        model, sums = without(learner, fold), apart if len(fold) else every
        own = validation.rows(torch.isin(validation.labels, fold)) if len(fold) else validation
        for number, constants in enumerate(GRID if len(own.labels) else ()):
            model.choose(constants)
            logits = model.logits(own.features, classes)
            sums[number] += float(F.cross_entropy(logits, own.labels, reduction="sum"))
    return [*every.tolist(), *apart.tolist()]


def without(learner: OneRound, classes: Tensor) -> OneRound:
    """The learner as if these classes had no images; of a class's products only those of its mean are known."""
    state = {name: tensor.cpu().clone() for name, tensor in learner.state_dict().items()}
    unit = unit_of(int(state["bits"]))
    for number in classes.tolist():
        row = state["sums"][number].double()
        upper = torch.triu_indices(len(row), len(row))
        products = torch.outer(row, row * (unit / int(state["counts"][number])))
        state["moments"] -= products[upper[0], upper[1]].round().long()
        state["counts"][number] = 0
        state["sums"][number] = 0
    width = state["basis"].shape[1]
    made = OneRound("", len(state["counts"]), width, state["prompts"].shape[1])
    made.load_state_dict(state, assign=True)
    return made


def best(of_sites: Iterable[tuple[int, Sequence[float]]]) -> Constants:
    """The constants with the lowest loss at the sites, each with its number of images and its `scores`."""
    default = GRID.index(Constants())
    gains = []
    for images, found in of_sites:
        if images and len(found) == 2 * len(GRID):
            losses = torch.tensor(found, dtype=torch.float64).view(2, -1).sum(0) / images
            gains.append((losses[default] - losses).clamp(-MOST_GAIN, MOST_GAIN))
    if not gains:
        return Constants()
    mean = torch.stack(gains).mean(0)
    return GRID[int(mean.argmax())] if float(mean.max()) > 0 else Constants()
