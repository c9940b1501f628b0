"""Where images come from, and which site holds which."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from fedclip_flwr.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image


class Source(Protocol):
    """Labelled images in domains."""

    @property
    def class_names(self) -> tuple[str, ...]: ...

    @property
    def domains(self) -> tuple[str, ...]:
        """In sorted order."""

    def content(self, domain: str, memory: Path) -> str:
        """A hash of the domain's images and labels; `memory` is where hashes of files are remembered."""

    def count(self, domain: str) -> int:
        """How many images the domain has, broken ones included."""

    def images(self, domain: str) -> Iterator[tuple[Image | None, int]]:
        """The domain's images as RGB with the numbers of their classes; None for one that can't be read."""


def open_source(data: str) -> Source:
    """The source that the setting `data` names: `drawn`, `drawn:SEED` or `folder:PATH`."""
    kind, _, rest = data.partition(":")
    if kind == "drawn":
        from fedclip_flwr.data.drawn import Drawn

        if rest and not (rest.isascii() and rest.isdecimal()):
            raise UserError(f"data = {data!r}: expected a whole number after drawn:")
        return Drawn(int(rest or 0))
    if kind == "folder":
        from fedclip_flwr.data.folder import ImageFolder

        return ImageFolder(Path(rest))
    raise UserError(f"data = {data!r}: expected drawn, drawn:SEED, folder:PATH or features:PATH")


def pick_holdout(holdout: str, domains: tuple[str, ...]) -> str | None:
    """The domain that no site trains on: `auto` is the last one, empty is none."""
    if not holdout:
        return None
    chosen = domains[-1] if holdout == "auto" and len(domains) > 1 else holdout
    if chosen == "auto":
        return None
    if chosen not in domains:
        raise UserError(f"holdout = {holdout!r}: there is no such domain; the data has {', '.join(domains)}")
    if len(domains) == 1:
        raise UserError(f"holdout = {holdout!r}: it is the only domain, so nothing is left to train on")
    return chosen
