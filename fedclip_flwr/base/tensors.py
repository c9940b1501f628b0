"""Named tensors, such as the weights of an adapter, and the distance between two sets of them."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

State = dict[str, Tensor]
REAL = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""The types of real numbers that are read from files."""


def length_of(state: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> float:
    """The length (L2 norm) of the update from `base` to `state`."""
    norms = (torch.linalg.vector_norm(state[name] - base[name], dtype=torch.float64) for name in base)
    return math.hypot(*map(float, norms))
