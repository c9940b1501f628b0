"""One CLIP for the images of several sites, without moving one image."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fedclip_flwr.base import __version__

if TYPE_CHECKING:
    from fedclip_flwr.inference.model import FedCLIP

__all__ = ["FedCLIP", "__version__"]


def __getattr__(name: str) -> Any:
    """`FedCLIP` brings torch, which not everything here needs."""
    if name == "FedCLIP":
        from fedclip_flwr.inference.model import FedCLIP

        return FedCLIP
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
