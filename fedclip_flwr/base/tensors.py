"""Named tensors: what an adapter consists of, and how far apart two of them are."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

State = dict[str, Tensor]


def length_of(state: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> float:
    """How long the update is that leads from the base to the state."""
    norms = (torch.linalg.vector_norm(state[name] - base[name], dtype=torch.float64) for name in base)
    return math.hypot(*map(float, norms))
