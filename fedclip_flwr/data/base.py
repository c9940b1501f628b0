"""The protocol of a source of labelled images, and one image of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from PIL.Image import Image


class Columns(NamedTuple):
    """The names of a data set's columns; an empty one is found by type and name."""

    image: str = ""
    label: str = ""
    domain: str = ""


FIND = Columns()


class Picture(NamedTuple):
    """An image (None if it can't be read) and the number of its class. `name` says which file or row it is."""

    name: str
    label: int
    image: Image | None


class Source(Protocol):
    """Labelled images in domains."""

    @property
    def class_names(self) -> tuple[str, ...]: ...

    @property
    def domains(self) -> tuple[str, ...]:
        """In sorted order."""

    def content(self, domain: str) -> str:
        """A hash of the domain's images and labels."""

    def count(self, domain: str) -> int:
        """The number of the domain's images, broken ones included."""

    def pictures(self, domain: str, start: int = 0, stop: int | None = None) -> Iterator[Picture]:
        """The domain's images in RGB, rows `start` to `stop`, in an order that depends only on images and labels."""
