"""LoRA as tensors (arXiv 2106.09685): which layers have it, its start, and what it adds to their weights.

A layer W [out, in] becomes W + scaling · B · A, with A [rank, in] and B [out, rank]. B starts at zero, so that round 0
is zero-shot. By default A stays as the seed makes it, and only B is trained and sent (FFA-LoRA, arXiv 2403.12313). A
layer is linear in B, so that the mean of the sites' B gives the mean of their layers. The mean of both factors does
not: mean(B) · mean(A) is not mean(B · A).

How a tower uses them: `features/lora.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from fedclip_flwr.base import Settings
from fedclip_flwr.base.seeds import seed_of
from fedclip_flwr.base.tensors import REAL, State

A, B = ".lora_A", ".lora_B"
"""The ends of the names of tensors; before them stands the layer's name in the model."""
TOWERS = {"vision": ("vision",), "text": ("text",), "both": ("vision", "text")}
"""The towers that each value of `lora-targets` adapts."""
MOST_RANK, MOST_ALPHA = 2**14, 1e6
"""Upper limits of `lora-rank` and `lora-alpha`."""


@dataclass(frozen=True)
class LoraSpec:
    """Where LoRA is, and of which size: all that is needed beside its tensors."""

    targets: str
    layers: str
    modules: tuple[str, ...]
    rank: int
    alpha: float

    @classmethod
    def of(cls, settings: Settings) -> Self:
        names = tuple(part.strip() for part in settings.lora_modules.split(","))
        rank, alpha = settings.lora_rank, settings.lora_alpha or 2.0 * settings.lora_rank
        return cls(settings.lora_targets, settings.lora_layers, names, rank, alpha)

    @classmethod
    def read(cls, facts: Mapping[str, Any]) -> Self:
        """From `facts` in a file; a `ValueError` says what is wrong."""
        given = {name: facts[name] for name in cls.__dataclass_fields__}
        kinds = {"targets": str, "layers": str, "modules": list, "rank": int, "alpha": float | int}
        if wrong := [name for name, kind in kinds.items() if not isinstance(given[name], kind)]:
            raise ValueError(f"its {wrong[0]} is {given[wrong[0]]!r}")
        if given["targets"] not in TOWERS:
            raise ValueError(f"its targets are {given['targets']!r}, expected one of {', '.join(TOWERS)}")
        if not (0 < given["rank"] <= MOST_RANK and 0 < given["alpha"] <= MOST_ALPHA):
            raise ValueError(f"its rank is {given['rank']!r} and its alpha {given['alpha']!r}")
        return cls(**{**given, "modules": tuple(map(str, given["modules"]))})

    @property
    def facts(self) -> dict[str, Any]:
        """As `read` takes it."""
        return {**asdict(self), "modules": list(self.modules)}

    @property
    def scaling(self) -> float:
        return self.alpha / self.rank

    @property
    def towers(self) -> tuple[str, ...]:
        return TOWERS[self.targets]

    @property
    def last(self) -> int | None:
        """How many layers of each tower are adapted, from its end; None for all."""
        return None if self.layers == "all" else int(self.layers.partition(":")[2])


def first_a(layer: str, rank: int, width: int, seed: int) -> Tensor:
    """The A with which the layer starts, uniform as in peft.

    The same on every machine and with every version of torch: sites make it themselves. (numpy keeps the raw bits of a
    generator; those of torch may change.)
    """
    bits = np.random.PCG64(seed_of(seed, "lora", layer)).random_raw(rank * width) >> np.uint64(40)
    uniform = torch.from_numpy(bits.astype(np.float32)) / 2.0**23 - 1
    return uniform.view(rank, width) / math.sqrt(width)


@dataclass(frozen=True)
class LoraTensors:
    """A complete LoRA: where it is, its tensors, and the share of it that is used."""

    spec: LoraSpec
    state: State
    share: float = 1.0

    def check(self) -> None:
        """Raises a `ValueError` unless each layer has both factors, of the rank."""
        layers = {name[: -len(A)] for name in self.state if name.endswith((A, B))}
        if not layers or {*self.state} != {layer + end for layer in layers for end in (A, B)}:
            raise ValueError("its tensors are not pairs of LoRA")
        for layer in layers:
            a, b = self.state[layer + A], self.state[layer + B]
            if (a.dim(), b.dim()) != (2, 2) or not len(a) == b.shape[1] == self.spec.rank:
                raise ValueError(f"{layer} has LoRA of {[*a.shape]} and {[*b.shape]}, expected rank {self.spec.rank}")
            if not {a.dtype, b.dtype} <= {*REAL}:
                raise ValueError(f"{layer} has LoRA of {a.dtype} and {b.dtype}")

    def merge_into(self, net: torch.nn.Module) -> None:
        """Adds it to the weights of the model in place; a `ValueError` says which layer does not fit."""
        merge(net, self.state, self.spec.scaling * self.share)


@torch.no_grad()
def merge(net: torch.nn.Module, state: Mapping[str, Tensor], scaling: float) -> None:
    """Adds LoRA to the weights of the model in place; a `ValueError` says which layer does not fit."""
    for layer in sorted(name.removesuffix(B) for name in state if name.endswith(B)):
        a, b = state[layer + A], state[layer + B]
        try:
            weight = net.get_parameter(f"{layer}.weight")
        except AttributeError:
            raise ValueError(f"the model has no {layer}") from None
        if weight.shape != (adds := (len(b), a.shape[1])):
            raise ValueError(f"{layer} is {[*weight.shape]} in the model, and {[*adds]} in LoRA")
        weight.add_(scaling * (b.to(weight) @ a.to(weight)))
