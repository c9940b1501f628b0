"""What a data set looks like to a CLIP."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from fedclip_flwr.data import Vocabulary
from fedclip_flwr.learning import Classes, Examples


class Features(Protocol):
    """The images of a data set and its class prompts, as a CLIP sees them."""

    @property
    def vocabulary(self) -> Vocabulary: ...

    @property
    def domains(self) -> tuple[str, ...]: ...

    @property
    def model(self) -> str:
        """The name of the model."""

    @property
    def model_content(self) -> str | None:
        """The hash of the model's files, where they are at hand."""

    @property
    def model_revision(self) -> str:
        """The commit, of a model of the hub."""

    @property
    def parameters(self) -> int | None:
        """How many numbers the whole model has, where that is known."""

    @property
    def content(self) -> str:
        """A hash of all of it."""

    @property
    def classes(self) -> Classes: ...

    def has_unit_length(self, domains: Iterable[str] | None = None) -> bool:
        """Whether features were brought to unit length, and nobody tells which length CLIP gave them.

        Looked at are those of these domains, or of all that were opened so far.
        """

    def examples(self, domain: str) -> Examples:
        """All images of the domain that can be read, in an order that is always the same."""

    def count(self, domain: str) -> int:
        """How many images the domain has, broken ones included."""

    def stored(self, domain: str) -> int:
        """How many of them have their features on this machine; nothing is encoded to find out."""

    def room(self, images: int) -> int:
        """The bytes that encoding so many images will take, about."""
