"""The aggregation that the settings ask for: a mean, a robust rule, or a mean with noise."""

from __future__ import annotations

from functools import partial

from fedclip_flwr.base import Settings
from fedclip_flwr.server.averaging import Gather, Held, Sums
from fedclip_flwr.server.noised import Noised
from fedclip_flwr.server.robust import rule_of


def gather_of(settings: Settings) -> Gather:
    """Begins the gathering that the settings ask for, once in each round."""
    if settings.dp == "central":
        return partial(Noised, norm=settings.clipping_norm, noise_multiplier=settings.noise_multiplier)
    limit = settings.update_limit
    if settings.compares_updates:
        return partial(Held, limit=limit, rule=rule_of(settings.strategy, settings.hostile_share))
    return partial(Sums, limit=limit)
