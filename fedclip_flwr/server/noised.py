"""Central differential privacy, at the server."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from fedclip_flwr.base import Settings
from fedclip_flwr.base.tensors import State
from fedclip_flwr.exchange.privacy import clipped, noised
from fedclip_flwr.server.averaging import Gathered, Mean


def of_sum(mean: State, base: Mapping[str, Tensor], sites: int, settings: Settings) -> State:
    """The mean of the updates of `sites` sites, which have clipped them themselves, with the server's noise."""
    if settings.dp != "central" or settings.hides_images:
        return mean
    cut = clipped(mean, base, settings.clipping_norm)  # changes nothing if the sites have clipped as they should
    return noised(cut, settings.noise_multiplier * settings.clipping_norm / sites)


class Noised:
    """The mean of clipped updates with noise, scaled to the site with the largest weight."""

    def __init__(self, sent: State, norm: float, noise_multiplier: float) -> None:
        self._sent, self._mean = sent, Mean(sent)
        self._norm, self._multiplier, self._heaviest = norm, noise_multiplier, 0.0

    def add(self, site: str, state: State, weight: float) -> None:
        Mean.check(state)
        self._mean.add(clipped(state, self._sent, self._norm), weight)
        self._heaviest = max(self._heaviest, weight)

    @property
    def deviation(self) -> float:
        """The standard deviation of the noise in each number of the mean."""
        return self._multiplier * self._norm * self._heaviest / self._mean.weight

    def close(self) -> Gathered:
        return Gathered(noised(self._mean.value, self.deviation) if self._mean.weight else None, {})
