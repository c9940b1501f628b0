"""Differential privacy for each image, with one round: how much noise the sums get, from whom, and what follows.

`central`: the server adds it to the exact total, and is trusted with that. `local`: each site adds all of it. `central`
under secure aggregation: each site adds a share, so that the total has at least central's noise as long as `min-sites`
(at least three) stay, and the server sees neither sums nor noise. ε and δ hold for an image that is there or adds
nothing; the numbers of images are public, and so is what sites report of validation and test images.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from fedclip_flwr.base import Settings, UserError
from fedclip_flwr.base.settings import GRADIENT
from fedclip_flwr.base.tensors import State
from fedclip_flwr.exchange.noise import MOST, noised, share_of, sigma_for
from fedclip_flwr.learning.gradient import SENT, WHOLE
from fedclip_flwr.learning.noised_sums import BLUR, Noised, in_units, mended, most_of, sensitivities
from fedclip_flwr.learning.sums import unit_of


class Hiding(NamedTuple):
    """The noise of a run: for each tensor its deviation in units, `sigmas`, and how much of it a site adds.

    `bits` and `most` say what unit the sums are in, and how long features are at most.
    """

    sigmas: Mapping[str, int]
    bits: int
    most: float
    place: str
    staying: int

    @classmethod
    def of(cls, settings: Settings, like: Mapping[str, Tensor], basis: Tensor, bits: int) -> Hiding:
        """`like` has the shapes of what sites answer with. Raises `UserError` if such noise can't be drawn."""
        numbers = sum(tensor.numel() for tensor in like.values())
        sigma, most = sigma_for(settings.epsilon, settings.delta, WHOLE, numbers), most_of(basis)
        sigmas = dict.fromkeys(SENT, sigma)
        if settings.statistics != GRADIENT:
            sigmas = {name: int(sigma / WHOLE * one) + 1 for name, one in sensitivities(bits, most).items()}
        if max(sigmas.values()) > MOST:
            raise UserError(
                f"with epsilon = {settings.epsilon:g} and delta = {settings.delta:g} there is too much noise to be "
                "drawn in whole numbers: set a larger epsilon"
            )
        place = "shares" if settings.shares_noise else settings.dp
        return cls(sigmas, bits, most, place, settings.least_sites)

    @property
    def of_sums(self) -> bool:
        return self.sigmas.keys() != {*SENT}

    @property
    def at_site(self) -> Mapping[str, int]:
        """The deviation of what one site adds."""
        if self.place != "shares":
            return self.sigmas
        return {name: share_of(sigma, self.staying) for name, sigma in self.sigmas.items()}

    def leaving(self, sums: Mapping[str, Tensor]) -> State:
        """What a site sends for its exact sums."""
        return noised(self.in_units(sums), self.at_site)

    def at_server(self, total: Mapping[str, Tensor]) -> State:
        """The total with the server's noise, if it is the server that adds it."""
        return noised(self.in_units(total), self.sigmas) if self.place == "central" else {**total}

    def in_units(self, sums: Mapping[str, Tensor]) -> State:
        """The sums with all tensors in the same units."""
        return in_units(sums, self.bits) if self.of_sums else {**sums}

    def deviations(self, sites: int) -> dict[str, float]:
        """Those of the noise in the total of so many sites."""
        times = 1.0 if self.place == "central" else math.sqrt(sites)
        return {name: times * sigma for name, sigma in self.at_site.items()}

    def made(self, total: Mapping[str, Tensor], images: int, sites: int) -> State:
        """What becomes of the noised total: tensors of the learner's state."""
        deviations = self.deviations(sites)
        if self.of_sums:
            return mended(Noised(total, images, deviations, self.bits, self.most))
        noise = torch.tensor(deviations["gradient"], dtype=torch.float64)
        return {**total, "images": torch.tensor(images), "noise": noise}

    def check_blur(self, like: Mapping[str, Tensor], images: int, sites: int) -> None:
        """Raises `UserError` if the noise would hide all that so many images could tell."""
        if not self.of_sums:
            return
        blur = Noised(like, images, self.deviations(sites), self.bits, self.most).blur
        if blur > BLUR:
            raise UserError(
                f"with {images:,} images this noise would move the mean of a class by {blur:.1f} lengths, more than "
                f"{BLUR:g}: set statistics = 'gradient', a larger epsilon, or have more images"
            )

    def check_length(self, sums: Mapping[str, Tensor], images: int) -> None:
        """Raises `UserError` if noised sums are longer than those of so many images can be."""
        for name, sigma in self.at_site.items():
            one = WHOLE if not self.of_sums else 1 / unit_of(self.bits)
            most = images * one * 1.001 + 2 * sigma * math.sqrt(sums[name].numel()) + 6 * sigma
            if (found := float(torch.linalg.vector_norm(sums[name].double()))) > most:
                raise UserError(f"its {name}, with noise, are {found:.3g} long, expected {most:.3g} at most")
