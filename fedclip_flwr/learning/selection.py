"""Selection: which sites train in a round, and which round (or blend) is better by validation."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping

from fedclip_flwr.base.seeds import seed_of
from fedclip_flwr.learning.metrics import Score, gain, loss_votes
from fedclip_flwr.learning.recipes import Recipe


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


def sample_sites(names: Iterable[str], share: float, seed: int, number: int, least: int = 1) -> list[str]:
    """Which of the sites train in round `number`; at least so many, if there are."""
    able = sorted(names)
    count = min(max(least, round(share * len(able))), len(able))
    return sorted(random.Random(seed_of(seed, "sites", number)).sample(able, count))
