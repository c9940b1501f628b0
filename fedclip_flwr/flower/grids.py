"""What kind of grid a ServerApp runs on."""

from __future__ import annotations

from flwr.serverapp import Grid
from flwr.superlink.grid import InMemoryGrid


def simulated(grid: Grid) -> bool:
    """Whether the sites are simulated on this machine."""
    return isinstance(grid, InMemoryGrid)
