"""A source of labelled images, and one of its images."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from PIL.Image import Image


class Columns(NamedTuple):
    """The columns of a data set by name; those that are empty are found by type and name."""

    image: str = ""
    label: str = ""
    domain: str = ""


FIND = Columns()


class Picture(NamedTuple):
    """An image with the number of its class; None if it can't be read. `name` is for whoever has to mend it."""

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
        """How many images the domain has, broken ones included."""

    def pictures(self, domain: str, start: int = 0, stop: int | None = None) -> Iterator[Picture]:
        """The domain's images as RGB, in an order that follows from images and labels alone; only those rows."""
