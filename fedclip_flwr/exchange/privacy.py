"""Differential privacy at the level of sites: adapters, or updates, hardly reveal that a site took part.

`central` (DP-FedAvg, arXiv 1710.06963): the server clips every update to the clipping norm and adds noise to the mean.
It is trusted with the updates. `local`: each site clips its update and adds the noise before it sends it.

Deviations from Flower 1.31's wrappers and mod: noise follows from the weights of the received updates, not from equal
ones of all sites; an update of zero length is not clipped; noise comes from the operating system's entropy, not from a
seeded generator; only updates get noise; the privacy budget spent is reported. Sampling sites does not amplify privacy,
because the sample follows from the seed: a site spends budget in every round in which it trains. Not covered: the
scores and sizes that sites report, and the selection of the round, which follows from them.
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
    """Gaussian noise from the operating system's entropy.

    Each number combines four samples, so that its low bits do not reveal the value it is added to (arXiv 2107.10138).
    """
    sizes = [tensor.numel() for tensor in like.values()]
    numbers = torch.from_numpy(sum(_normal(sum(sizes)) for _ in range(4)) * (deviation / 2))
    parts = torch.split(numbers, sizes)
    return {name: part.view(like[name].shape) for name, part in zip(like, parts, strict=True)}


def _normal(count: int) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Standard normal numbers, by the Box-Muller transform."""
    half = -(-count // 2)
    uniform = ((np.frombuffer(os.urandom(16 * half), np.uint64) >> 11) + 0.5) * 2.0**-53
    length, angle = np.sqrt(-2 * np.log(uniform[:half])), 2 * np.pi * uniform[half:]
    return np.concatenate([length * np.cos(angle), length * np.sin(angle)])[:count]


def clipped(state: Mapping[str, Tensor], base: Mapping[str, Tensor], norm: float) -> State:
    """The state with its update clipped to `norm`."""
    length = length_of(state, base)
    share = min(1.0, norm / length) if length else 1.0
    return {name: torch.lerp(base[name], state[name], share) for name in base}


def noised(state: Mapping[str, Tensor], deviation: float) -> State:
    added = noise(state, deviation)
    return {name: (tensor.double() + added[name]).to(tensor.dtype) for name, tensor in state.items()}


def at_site(state: State, base: Mapping[str, Tensor], settings: Settings) -> State:
    """The state to send, clipped and noised by the settings, for the state that a site trained from the base."""
    norm = settings.clipping_norm
    if settings.dp == "local":
        return noised(clipped(state, base, norm), settings.noise_multiplier * norm)
    if settings.dp == "central" and settings.secure_aggregation:  # the server can't clip what it does not see
        return clipped(state, base, norm)
    return state


def spent(settings: Settings, rounds: Iterable[int]) -> float | None:
    """ε at the settings' δ for the site that trained in the most rounds; None without differential privacy.

    `central`: neighbouring runs differ in whether the site's updates are present or zero. `local`: in the updates
    themselves, which can be up to twice the norm apart.
    """
    if settings.dp == "off":
        return None
    accountant()  # check before the first round that the package is installed
    if settings.hides_images:  # a site answers once, and the same if it is asked again
        return settings.epsilon if any(rounds) else 0.0
    multiplier = settings.noise_multiplier / (1 if settings.dp == "central" else 2)
    return _epsilon(multiplier, max(rounds, default=0), settings.delta)


@lru_cache
def _epsilon(multiplier: float, rounds: int, delta: float) -> float:
    """`rounds` Gaussian mechanisms compose to one with √rounds times less noise (arXiv 1905.02383, corollary 3.3)."""
    return float(accountant().get_epsilon_gaussian(multiplier / math.sqrt(rounds), delta)) if rounds else 0.0


def accountant() -> Any:
    """The package that computes ε."""
    try:
        import dp_accounting
    except ImportError:
        raise UserError("dp needs the package dp-accounting: pip install 'fedclip-flwr[privacy]'") from None
    return dp_accounting
