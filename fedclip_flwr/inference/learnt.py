"""A trained adapter found by name: in a folder, such as a run's, or on the hub; and the CLIP that it needs."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from fedclip_flwr.base import UserError, content, files, hub
from fedclip_flwr.base.settings import LORA
from fedclip_flwr.base.text import some
from fedclip_flwr.data import Vocabulary
from fedclip_flwr.features import FeatureFolder, models
from fedclip_flwr.learning import Adapter, Classes, ClosedForm
from fedclip_flwr.learning.lora import LoraTensors
from fedclip_flwr.runs import history, peft_folder, saved

log = logging.getLogger(__name__)
FILES = (
    *(saved.CONFIG, saved.TENSORS, peft_folder.CONFIG, peft_folder.TENSORS, "README.md"),
    *(f"model/{pattern}" for pattern in models.FILES),
)


class Learnt(NamedTuple):
    """The contents of a folder: an adapter, LoRA, or the folder of a `whole` model; and facts about it."""

    folder: Path
    facts: Mapping[str, Any]
    adapter: Adapter | ClosedForm | None
    whole: Path | None
    lora: LoraTensors | None = None

    @property
    def vocabulary(self) -> Vocabulary:
        return Vocabulary(tuple(self.facts["class_names"]), tuple(self.facts["templates"]))

    def numbered(self, classes: Classes, names: Sequence[str]) -> Classes:
        """The classes of these names, with the numbers that the adapter knows them by."""
        known = {name: number for number, name in enumerate(saved.learnt_classes(self.facts))}
        return classes._replace(numbers=tuple(known.get(name, -1) for name in names))

    def check_features(self, place: str, folder: FeatureFolder) -> None:
        """Raises unless the features in the folder fit the adapter and have its classes."""
        if self.whole or self.lora:
            what = "LoRA" if self.lora else "a whole model"
            raise UserError(f"{self.folder} is {what}, which needs images; {place} has only features")
        own = str(self.facts.get("model", ""))
        if folder.dim != self.facts["dim"] or Path(folder.model).name != Path(own).name:
            raise UserError(
                f"{place}: its features were made by {folder.model} and have {folder.dim} numbers; the adapter is for "
                f"{own}, with {self.facts['dim']}"
            )
        if isinstance(self.adapter, Adapter) and not self.adapter.length and folder.has_unit_length(folder.domains):
            log.warning(
                "%s: its features have unit length, but the adapter needs them as CLIP gives them: predictions may "
                "differ; set feature_norm in features.json to their original length",
                place,
            )
        if {*folder.vocabulary.class_names} != {*self.vocabulary.class_names}:
            raise UserError(
                f"{place} has the prompts of {some(folder.vocabulary.class_names)}, the adapter is for "
                f"{some(self.vocabulary.class_names)}: make it again with these, fedclip encode class-names=…, or name "
                "the images"
            )

    def check_dim(self, dim: int, name: str) -> None:
        """Raises unless the adapter takes features of `dim` numbers, as the CLIP of that name makes them."""
        if dim != self.facts["dim"]:
            raise UserError(
                f"{self.folder}: its adapter takes features of {self.facts['dim']} numbers, those of {name} have {dim}"
            )

    def model(self, instead: str = "") -> models.Model:
        """The CLIP to use: the trained one, or the frozen one that the adapter was made for, with LoRA."""
        return models.find(str(self.whole)) if self.whole else replace(self.frozen(instead), lora=self.lora)

    def frozen(self, instead: str = "") -> models.Model:
        """The CLIP before training, or the one named `instead`."""
        name = str(self.facts.get("model", ""))
        try:
            found = models.find(instead or name, "" if instead else str(self.facts.get("model_revision") or ""))
        except UserError as error:
            raise error if instead else UserError(f"{error}; give its location with model") from None
        known = self.facts.get("model_content")
        if known and found.content(content.memory()) != known:
            mismatch = f"{self.folder} was made for another version of {name} than {found.folder} holds"
            if not instead:
                raise UserError(f"{mismatch}: get that version, or give its location with model")
            log.warning("%s: predictions may differ", mismatch)
        return found


def find_learnt(name: str, revision: str = "") -> Learnt:
    """The adapter or model in a folder, in a run of that name, or in a repository on the hub."""
    here = os.path.isdir(path := os.path.expanduser(name))
    if here or "/" not in name or name.startswith((".", "/", "~")):
        folder = Path(path) if here else history.find(name).path
        if revision:
            raise UserError(f"revision {revision!r}: {folder} is a local folder, and only the hub has revisions")
    else:
        folder = hub.snapshot(name, kind="model", revision=revision, lacks=_lacks, prefix=name, allow_patterns=FILES)
    if whole := _whole_in(folder):
        return Learnt(folder, saved.load_whole(whole), None, whole)
    if _kind_in(folder) == LORA:
        lora, facts = saved.load_lora(folder)
        return Learnt(folder, facts, None, None, lora)
    adapter, facts = saved.load_adapter(folder)
    return Learnt(folder, facts, adapter, None)


def _kind_in(folder: Path) -> str:
    """What the first readable facts in the folder are of; empty if that is a whole model, or nothing."""
    for path in (folder / saved.FACTS, folder / saved.CONFIG):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            kind = files.read_json(path).get("kind")
            if isinstance(kind, str) and kind != "full-model":
                return kind
    return ""


def _whole_in(folder: Path) -> Path | None:
    """The folder of the whole model in it; None if its first readable facts are those of an adapter, or it has none."""
    if _kind_in(folder):
        return None
    return next((path for path in (folder / "model", folder) if (path / saved.WHOLE).exists()), None)


def _lacks(folder: Path) -> str | None:
    """The first required file that a folder from the hub lacks."""
    weights = peft_folder.TENSORS if _kind_in(folder) == LORA else saved.TENSORS
    if _whole_in(folder):
        weights = "model/model.safetensors"
    return next((name for name in (saved.CONFIG, weights) if not (folder / name).exists()), None)
