"""Facts of each adapter, by name, that need no import of torch."""

from __future__ import annotations

from typing import NamedTuple


class AdapterSpec(NamedTuple):
    """One adapter's facts: its learning rate with the recipe `default`, and the server's with an adaptive strategy."""

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
"""The adapters that have a class in `learning/adapters.py`. How the rates were chosen: docs/results.md."""


def of_rank(kind: str, rank: int) -> str:
    """The rank in words; empty for an adapter that has none."""
    return f" of rank {rank}" if kind in KINDS and KINDS[kind].ranked else ""
