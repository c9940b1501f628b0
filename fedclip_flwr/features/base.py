"""The protocol `Features`: a data set as features of a CLIP."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from fedclip_flwr.data import Vocabulary
from fedclip_flwr.learning import Classes, Examples


class Features(Protocol):
    """The features of a data set's images and class prompts."""

    @property
    def vocabulary(self) -> Vocabulary: ...

    @property
    def domains(self) -> tuple[str, ...]: ...

    @property
    def model(self) -> str:
        """The name of the model."""

    @property
    def model_content(self) -> str | None:
        """The hash of the model's files; None if they are not available."""

    @property
    def model_revision(self) -> str:
        """The commit of a model from the hub, else empty."""

    @property
    def parameters(self) -> int | None:
        """The number of parameters of the whole model; None if unknown."""

    @property
    def content(self) -> str:
        """A hash of everything that the features depend on."""

    @property
    def classes(self) -> Classes: ...

    def has_unit_length(self, domains: Iterable[str] | None = None) -> bool:
        """True if the features were normalized and their original length is unknown.

        Checks these domains; by default, all that have been opened.
        """

    def examples(self, domain: str) -> Examples:
        """All readable images of the domain, always in the same order."""

    def count(self, domain: str) -> int:
        """The number of images in the domain, unreadable ones included."""

    def stored(self, domain: str) -> int:
        """The number of images whose features are stored on this machine. Never encodes."""

    def room(self, images: int) -> int:
        """The approximate disk space, in bytes, for the features of `images` images."""
