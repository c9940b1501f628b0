"""What was learnt, found by name: in a folder, such as that of a run, or on the hub; and the CLIP that it goes with."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from fedclip_flwr.base import UserError, content, files, hub
from fedclip_flwr.base.text import some
from fedclip_flwr.data import Vocabulary
from fedclip_flwr.features import FeatureFolder, models
from fedclip_flwr.learning import Adapter
from fedclip_flwr.learning.adapters import ADAPTERS
from fedclip_flwr.runs import history, saved

log = logging.getLogger(__name__)
HUB_FILES = (saved.CONFIG, saved.TENSORS, "README.md", *(f"model/{pattern}" for pattern in models.FILES))


class Learnt(NamedTuple):
    """What a folder holds: an adapter, or the `whole` model's folder; and what it was made for."""

    folder: Path
    facts: Mapping[str, Any]
    adapter: Adapter | None
    whole: Path | None

    @property
    def vocabulary(self) -> Vocabulary:
        return Vocabulary(tuple(self.facts["class_names"]), tuple(self.facts["templates"]))

    def check_features(self, place: str, folder: FeatureFolder) -> None:
        """Raises unless the folder's features are such as this can take, and of its classes."""
        if self.whole:
            raise UserError(f"{self.folder} is a whole model, which needs images; {place} has only features")
        own = str(self.facts.get("model", ""))
        if folder.dim != self.facts["dim"] or Path(folder.model).name != Path(own).name:
            raise UserError(
                f"{place}: its features were made by {folder.model} and have {folder.dim} numbers; the adapter is for "
                f"{own}, with {self.facts['dim']}"
            )
        if self.adapter and not self.adapter.length and folder.has_unit_length(folder.domains):
            log.warning(
                "%s: its features have unit length, and the adapter takes them as CLIP gives them: predictions may be "
                "others; tell in features.json how long they were, as feature_norm",
                place,
            )
        if {*folder.vocabulary.class_names} != {*self.vocabulary.class_names}:
            raise UserError(
                f"{place} has the prompts of {some(folder.vocabulary.class_names)}, the adapter is for "
                f"{some(self.vocabulary.class_names)}: make it again with these, fedclip encode class-names=…, or name "
                "the images"
            )

    def check_dim(self, dim: int, name: str) -> None:
        """Raises unless features of so many numbers, as that CLIP makes them, are what the adapter takes."""
        if dim != self.facts["dim"]:
            raise UserError(
                f"{self.folder}: its adapter takes features of {self.facts['dim']} numbers, those of {name} have {dim}"
            )

    def model(self, instead: str = "") -> models.Model:
        """The CLIP that it goes with: the trained one, or the frozen one that the adapter was made for."""
        return models.find(str(self.whole)) if self.whole else self.frozen(instead)

    def frozen(self, instead: str = "") -> models.Model:
        """The CLIP that it began with, or the one that is named `instead`."""
        name = str(self.facts.get("model", ""))
        try:
            found = models.find(instead or name, "" if instead else str(self.facts.get("model_revision") or ""))
        except UserError as error:
            raise error if instead else UserError(f"{error}; say where it is now with model") from None
        known = self.facts.get("model_content")
        if known and found.content(content.memory()) != known:
            told = f"{self.folder} was made for another version of {name} than {found.folder} holds"
            if not instead:
                raise UserError(f"{told}: get that version, or say where it is with model")
            log.warning("%s: predictions may be others", told)
        return found


def find_learnt(name: str, revision: str = "") -> Learnt:
    """What lies in a folder, in that of a run by its name, or in a repository of the hub."""
    here = os.path.isdir(path := os.path.expanduser(name))
    if here or "/" not in name or name.startswith((".", "/", "~")):
        folder = Path(path) if here else history.find(name).path
        if revision:
            raise UserError(f"revision {revision!r}: {folder} is here, and only what is on the hub has revisions")
    else:
        folder = hub.snapshot(name, kind="model", revision=revision, lacks=_lacks, told=name, allow_patterns=HUB_FILES)
    if whole := _whole_in(folder):
        return Learnt(folder, saved.load_whole(whole), None, whole)
    adapter, facts = saved.load_adapter(folder)
    return Learnt(folder, facts, adapter, None)


def _whole_in(folder: Path) -> Path | None:
    """Where in the folder a whole model is, unless what it tells first is that it holds an adapter."""
    for path in (folder / saved.FACTS, folder / saved.CONFIG):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            if files.read_json(path).get("kind") in ADAPTERS:
                return None
    return next((path for path in (folder / "model", folder) if (path / saved.WHOLE).exists()), None)


def _lacks(folder: Path) -> str | None:
    """What a folder of the hub would have to hold and doesn't."""
    weights = "model/model.safetensors" if _whole_in(folder) else saved.TENSORS
    return next((name for name in (saved.CONFIG, weights) if not (folder / name).exists()), None)
