"""Differential privacy of sites: that a site took part can hardly be told from the adapters, or from its updates.

`central` (DP-FedAvg, arXiv 1710.06963): the server cuts every update to the clipping norm and adds noise to their mean.
It is trusted with the updates. `local`: each site cuts its own and adds the noise before it sends it.

Deviations from Flower 1.31's wrappers and mod, which do the same: noise follows from the weights that came, not from
equal ones of all sites; a site that sends back what it got has nothing to cut; noise comes from the operating system's
entropy, not from a generator with a seed; nothing is noised that is no update; and what has been spent is told. Nothing
is gained by drawing sites by lot, for the lots follow from the seed: a site spends in every round in which it trains.
Scores and sizes that sites report are not covered, nor what follows from them: which round is selected.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedclip_flwr.base import Settings, UserError
from fedclip_flwr.base.tensors import State, length_of


def noise(like: Mapping[str, Tensor], deviation: float) -> State:
    """Normally distributed numbers from the operating system's entropy.

    Each is made of four, so that from its last bits cannot be told what it was added to (arXiv 2107.10138).
    """
    sizes = [tensor.numel() for tensor in like.values()]
    numbers = torch.from_numpy(sum(_normal(sum(sizes)) for _ in range(4)) * (deviation / 2))
    parts = torch.split(numbers, sizes)
    return {name: part.view(like[name].shape) for name, part in zip(like, parts, strict=True)}


def _normal(count: int) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """By Box and Muller."""
    half = -(-count // 2)
    uniform = ((np.frombuffer(os.urandom(16 * half), np.uint64) >> 11) + 0.5) * 2.0**-53
    length, angle = np.sqrt(-2 * np.log(uniform[:half])), 2 * np.pi * uniform[half:]
    return np.concatenate([length * np.cos(angle), length * np.sin(angle)])[:count]


def clipped(state: Mapping[str, Tensor], base: Mapping[str, Tensor], norm: float) -> State:
    """The state with its update cut to that length."""
    length = length_of(state, base)
    share = min(1.0, norm / length) if length else 1.0
    return {name: torch.lerp(base[name], state[name], share) for name in base}


def noised(state: Mapping[str, Tensor], deviation: float) -> State:
    added = noise(state, deviation)
    return {name: (tensor.double() + added[name]).to(tensor.dtype) for name, tensor in state.items()}


def at_site(state: State, base: Mapping[str, Tensor], settings: Settings) -> State:
    """What a site sends of the state that it has made of the base."""
    norm = settings.clipping_norm
    if settings.dp == "local":
        return noised(clipped(state, base, norm), settings.noise_multiplier * norm)
    if settings.dp == "central" and settings.secure_aggregation:  # the server can't cut what it does not see
        return clipped(state, base, norm)
    return state


def spent(settings: Settings, rounds: Iterable[int]) -> float | None:
    """ε at the settings' δ for that site which trained in the most rounds; None where there is no noise.

    `central`: for whether its updates are there or all zero. `local`: for whether they are these or any others, which
    are up to twice the norm away.
    """
    if settings.dp == "off":
        return None
    _accountant()  # before it is needed, so that it is not missed after the first round
    multiplier = settings.noise_multiplier / (1 if settings.dp == "central" else 2)
    return _epsilon(multiplier, max(rounds, default=0), settings.delta)


@lru_cache
def _epsilon(multiplier: float, rounds: int, delta: float) -> float:
    """So many Gaussian mechanisms are one with as much less noise (arXiv 1905.02383, corollary 3.3)."""
    return float(_accountant().get_epsilon_gaussian(multiplier / math.sqrt(rounds), delta)) if rounds else 0.0


def _accountant() -> Any:
    try:
        import dp_accounting
    except ImportError:
        raise UserError("dp needs the package dp-accounting: pip install 'fedclip-flwr[privacy]'") from None
    return dp_accounting
