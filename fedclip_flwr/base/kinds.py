"""The adapters by name, and what is told of each where torch is not brought."""

from __future__ import annotations

from typing import NamedTuple


class AdapterSpec(NamedTuple):
    """One adapter: its learning rate with the recipe `default`, and that of a server that makes steps of its own."""

    learning_rate: float
    server_rate: float
    ranked: bool = False  # whether `adapter-rank` is for it
    wide: bool = False  # whether its layers are as wide as the features: rates are for 512 dimensions then
    exact: bool = False  # whether it starts as the identity with any recipe


KINDS = {
    "attention": AdapterSpec(1e-4, 3e-3, wide=True),
    "gate": AdapterSpec(1e-3, 3e-2, ranked=True),
    "scale": AdapterSpec(3e-3, 3e-2, exact=True),
}
"""What `learning/adapters.py` has a class for. How the rates were chosen: docs/results.md."""


def of_rank(kind: str, rank: int) -> str:
    """The rank in words, for an adapter that has one."""
    return f" of rank {rank}" if kind in KINDS and KINDS[kind].ranked else ""
