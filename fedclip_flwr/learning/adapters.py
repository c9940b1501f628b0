"""The trainable part: a small network that reweights the features of a frozen CLIP.

`attention` is FedCLIP's (arXiv 2302.13485): Linear → Tanh → Linear → Softmax, multiplied into the feature, which is
then scaled to unit length. Deviations: with `identity=True` the last layer starts at zero, so that the first
prediction is exactly zero-shot (the paper starts from random weights, which is only close to it); with a `length`,
features are scaled to that length before the network sees them (the paper takes them as CLIP gives them).

`gate` has a low-rank network in its place, `scale` has one number for each dimension.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedclip_flwr.base import plugins
from fedclip_flwr.learning.base import Learner


class Adapter(Learner, ABC):
    """Maps features [N, dim] as CLIP gives them to adapted features of unit length.

    `blend` is the share of the adapted feature in the result. `length` is the length to which features are scaled for
    the network; 0 leaves them as they are. A class says of itself:
    """

    name: ClassVar[str]
    learning_rate: ClassVar[float] = 1e-3
    """At a site, with the recipe `default`. How the rates were chosen: docs/results.md."""
    server_rate: ClassVar[float] = 3e-2
    """At the server, with fedadam, fedyogi or fedadagrad."""
    ranked: ClassVar[bool] = False
    """Whether the setting `adapter-rank` is for it."""
    wide: ClassVar[bool] = False
    """Whether its layers are as wide as the features: its rates are for 512 dimensions then."""
    exact: ClassVar[bool] = False
    """Whether it starts as the identity with any recipe."""

    length = 1.0

    def __init__(self, dim: int, rank: int, blend: float, identity: bool) -> None:
        """`identity`: all weights start as 1, so that round 0 is zero-shot."""
        super().__init__()
        self.blend = blend

    @abstractmethod
    def weigh(self, features: Tensor) -> Tensor:
        """The factor for each dimension, given features from `scaled`."""

    def scaled(self, features: Tensor) -> Tensor:
        """The features with the length that the network sees."""
        if not self.length:
            return features
        unit = F.normalize(features, dim=-1)
        return unit if self.length == 1.0 else unit * self.length

    def forward(self, features: Tensor) -> Tensor:
        scaled = self.scaled(features)
        adapted = F.normalize(scaled * self.weigh(scaled), dim=-1)
        if self.blend == 1.0:
            return adapted
        own = scaled if self.length == 1.0 else F.normalize(features, dim=-1)
        return F.normalize((1 - self.blend) * own + self.blend * adapted, dim=-1)


def two_layers(dim: int, hidden: int, identity: bool) -> tuple[nn.Linear, nn.Linear]:
    """A layer to `hidden` dimensions and one back; with `identity` the second one starts at zero."""
    inner, outer = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
    if identity:
        nn.init.zeros_(outer.weight)
        nn.init.zeros_(outer.bias)
    return inner, outer


class Attention(Adapter):
    """The paper's adapter: 2·(dim² + dim) parameters in four tensors."""

    name, learning_rate, server_rate, wide = "attention", 1e-4, 3e-3, True

    def __init__(self, dim: int, rank: int, blend: float, identity: bool) -> None:
        super().__init__(dim, rank, blend, identity)
        self.inner, self.outer = two_layers(dim, dim, identity)

    def weigh(self, features: Tensor) -> Tensor:
        return torch.softmax(self.outer(torch.tanh(self.inner(features))), dim=-1)


class Gate(Adapter):
    """Low rank: 2·dim·rank + rank + dim parameters; each factor is 1 + tanh of the network's output."""

    name, learning_rate, server_rate, ranked = "gate", 1e-3, 3e-2, True

    def __init__(self, dim: int, rank: int, blend: float, identity: bool) -> None:
        super().__init__(dim, rank, blend, identity)
        self.inner, self.outer = two_layers(dim, rank, identity)

    def weigh(self, features: Tensor) -> Tensor:
        return 1 + torch.tanh(self.outer(torch.tanh(self.inner(features))))


class Scale(Adapter):
    """Diagonal: dim parameters in one tensor, with the same factors for every feature."""

    name, learning_rate, server_rate, exact = "scale", 3e-3, 3e-2, True

    def __init__(self, dim: int, rank: int, blend: float, identity: bool) -> None:
        super().__init__(dim, rank, blend, identity)
        self.log_scale = nn.Parameter(torch.zeros(dim))

    def weigh(self, features: Tensor) -> Tensor:
        return self.log_scale.exp()


ADAPTERS = {adapter.name: adapter for adapter in (Attention, Gate, Scale)}


def adapter_class(kind: str, chosen: bool = False) -> type[Adapter]:
    """The class of that name, or of a plug-in. `chosen`: see `plugins.load`."""
    return plugins.load("adapter", kind, ADAPTERS, _is_adapter, "a class derived from learning.Adapter", chosen)


def _is_adapter(found: object) -> bool:
    return isinstance(found, type) and issubclass(found, Adapter) and hasattr(found, "name")


def of_rank(kind: str, rank: int) -> str:
    """The rank in words; empty for an adapter that has none."""
    return f" of rank {rank}" if adapter_class(kind).ranked else ""


def make_adapter(
    kind: str,
    dim: int,
    *,
    rank: int = 4,
    blend: float = 1.0,
    length: float = 1.0,
    identity: bool = True,
    seed: int = 0,
) -> Adapter:
    """A new adapter whose random weights depend only on the seed."""
    make = adapter_class(kind)
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        adapter = make(dim, rank, blend, identity)
    adapter.length = length
    return adapter


def blank_adapter(kind: str, dim: int, *, rank: int, blend: float, length: float) -> Adapter:
    """An adapter on the meta device, to be loaded with `assign=True`; it skips the slow random initialisation."""
    with torch.device("meta"):
        adapter = adapter_class(kind)(dim, rank, blend, False)
    adapter.length = length
    return adapter


@lru_cache
def tensor_names(kind: str) -> frozenset[str]:
    """The names of the tensors of an adapter of that kind."""
    return frozenset(make_adapter(kind, 1, rank=1).state_dict())
