"""Selection: which sites train in a round, and which round (or blend) is better by validation."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping

from fedclip_flwr.base.seeds import seed_of
from fedclip_flwr.learning.metrics import Score, gain, loss_votes
from fedclip_flwr.learning.recipes import Recipe


def better(later: Mapping[str, Score], best: Mapping[str, Score], recipe: Recipe) -> bool:
    """True if the later scores are better in validation, at the sites that evaluated both; sites may come and go."""
    if (found := _margin(later, best, recipe)) is not None:
        return found > 0
    known = [any(score.examples for score in scores.values()) for scores in (later, best)]
    return known[0] or not known[1]  # no site evaluated both: take the later one if it was evaluated


def _margin(later: Mapping[str, Score], before: Mapping[str, Score], recipe: Recipe) -> float | None:
    """The mean of the sites' bounded gains; if that is zero, of the unbounded gains; then votes on the loss."""
    for most in (recipe.most_gain, 1.0):
        found = gain(later, before, most)
        if found is None or abs(found) > 1e-12:  # smaller ones are rounding errors
            return found
    return loss_votes(later, before) if recipe.loss_breaks_ties else 0.0


def chosen(later: Mapping[str, Score], best: Mapping[str, Score], zero: Mapping[str, Score], recipe: Recipe) -> bool:
    """True if the later round replaces the best so far.

    Where zero-shot could be selected, it must not be better than the later round: a few sites' claims could make each
    round a little better than the one before, and the last one far worse than zero-shot.
    """
    return better(later, best, recipe) and (recipe.first_choice > 0 or not (_margin(zero, later, recipe) or 0.0) > 0)


BLENDS = (0.25, 0.5, 0.75, 1.0)
"""The shares of the adapted feature to choose from with `blend=auto`."""


def sample_sites(names: Iterable[str], share: float, seed: int, number: int, least: int = 1) -> list[str]:
    """The sites that train in round `number`: a share of them, at least `least` if there are as many."""
    able = sorted(names)
    count = min(max(least, round(share * len(able))), len(able))
    return sorted(random.Random(seed_of(seed, "sites", number)).sample(able, count))
