"""Features: encoded once, ever, and read from then on.

`Encoded` draws on a store below `$FEDCLIP_HOME/features`, keyed by the content of the model and of the data:

    MODEL-PRECISION/given-DATA.safetensors      image_features [N, dim] as the model gives them, labels [N] by number
    MODEL-PRECISION/classes-PROMPTS.safetensors text_features [C, dim], of unit length
    MODEL-PRECISION/pixels-DATA.safetensors     image_features [N, 3, height, width] in bytes, for the whole model
    MODEL-PRECISION/agreement-….safetensors     whether some of the images find the same classes as in float32

`folder.py` has the same tensors from a folder made elsewhere (`features:PATH`), so that a site need never hold
CLIP at all.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from fedclip_flwr.base import content, files, growing, store
from fedclip_flwr.base.errors import shown
from fedclip_flwr.base.growing import NAMED, Growing
from fedclip_flwr.base.tensors import State
from fedclip_flwr.data import Vocabulary, base
from fedclip_flwr.features import ahead, clip, encoding, models
from fedclip_flwr.features.clip import Clip
from fedclip_flwr.features.whole import WholeModel
from fedclip_flwr.learning import Classes, Examples

if TYPE_CHECKING:
    from PIL.Image import Image


log = logging.getLogger(__name__)
T = TypeVar("T")
COUNTED = 500
"""So many images are read to find some of them."""


class Encoded:
    """Features of a source's images, encoded by a model now or earlier."""

    _entry, _doing = "given", "encoding"
    _older: str | None = "images"  # as an earlier version called features of unit length

    def __init__(
        self,
        source: base.Source,
        model: models.Model,
        vocabulary: Vocabulary,
        numbers: Sequence[int],
        *,
        root: Path | None = None,
        device: str = "auto",
        precision: str = "auto",
        progress: bool = True,
    ) -> None:
        """`numbers` are those that the source's classes have in the vocabulary."""
        self.model, self.model_revision, self.vocabulary = model.name, model.revision, vocabulary
        self._source, self._model = source, model
        self._numbers = torch.tensor(numbers)
        self._device, self._precision, self._progress = device, precision, progress
        self._opened: dict[str, Examples] = {}
        self._root = root or files.home() / "features"
        self.encoded = 0  # so many images by this object, broken ones included

    @property
    def domains(self) -> tuple[str, ...]:
        return self._source.domains

    @cached_property
    def model_content(self) -> str:
        return self._model.content(content.memory())

    @property
    def parameters(self) -> int:
        return int(self._class_entry[1]["parameters"])

    @property
    def classes(self) -> Classes:
        tensors, facts = self._class_entry
        return Classes(tensors["text_features"], float(facts["logit_scale"]), float(facts["logit_bias"]))

    @cached_property
    def content(self) -> str:
        images = (f"{domain} {self._source.content(domain)}" for domain in self.domains)
        numbers = " ".join(map(str, self._numbers.tolist()))
        return content.digest(self._entry, self.folder.name, self.vocabulary.key, numbers, *images)

    @property
    def model_folder(self) -> Path:
        return self._model.folder

    def examples(self, domain: str) -> Examples:
        if domain not in self._opened:  # reading checks every byte, and tells of broken images
            self._opened[domain] = self._open(domain)
        return self._opened[domain]

    def _open(self, domain: str) -> Examples:
        path = self._path(domain, self._loaded_in)
        tensors, facts = store.grown(path, self._source.count(domain), lambda growing: self._encode(domain, growing))
        if broken := int(facts["broken"]):
            count, names = broken + len(tensors["labels"]), shown(facts["names"]) + ", …" * (broken > NAMED)
            told = f"{broken:,} of {count:,} images can't be read and are left out"
            if broken == count:
                told = f"none of the {count:,} images can be read"
            log.warning("%s: %s: %s", domain, told, names)
        return Examples(tensors["image_features"], self._numbers[tensors["labels"]])

    def _path(self, domain: str, precision: str) -> Path:
        """The domain's entry in the store."""
        return self._folder(precision) / f"{self._entry}-{self._source.content(domain)}.safetensors"

    def pictures(self, domain: str, rows: Collection[int]) -> Iterator[tuple[int, Image]]:
        """The images of those rows of `examples`, one by one.

        Where some are broken, it has to be counted to them: then only those of the first few are given.
        """
        if len(self.examples(domain).labels) == self.count(domain):
            found = ((row, next(self._source.pictures(domain, row, row + 1)).image) for row in rows)
        else:
            some = self._source.pictures(domain, 0, COUNTED)
            readable = (picture.image for picture in some if picture.image is not None)
            found = ((row, image) for row, image in enumerate(readable) if row in rows)
        yield from ((row, image) for row, image in found if image is not None)

    def has_unit_length(self, domains: Iterable[str] | None = None) -> bool:
        return False

    def count(self, domain: str) -> int:
        return self._source.count(domain)

    def stored(self, domain: str) -> int:
        path = self._path(domain, self.likely_precision)
        return self.count(domain) if store.read(path) else growing.so_far(path)

    def room(self, images: int) -> int:
        return images * 4 * self._model.dim

    @cached_property
    def folder(self) -> Path:
        """Where the features are stored."""
        return self._folder(self._loaded_in)

    def _folder(self, precision: str) -> Path:
        return self._root / f"{self.model_content}-{precision}"

    @cached_property
    def _clip(self) -> clip.Clip:
        return Clip(self._model, self._device, self._loaded_in)

    @cached_property
    def _loaded_in(self) -> str:
        """The precision: float32 where a lower one would find other classes in the data's images."""
        name = self._wished
        if name == "float32":
            return name

        def compare() -> tuple[State, dict[str, str]]:
            return encoding.agreement(self._model, self._device, name, self.vocabulary, self._some_images()), {}

        found, _ = store.kept(self._agreement(name), compare)
        return name if encoding.good_enough(found) else "float32"

    @property
    def likely_precision(self) -> str:
        """The same as far as it is known: nothing is encoded to find out."""
        found = None if self._wished == "float32" else store.read(self._agreement(self._wished))
        return "float32" if found and not encoding.good_enough(found[0]) else self._wished

    @property
    def _wished(self) -> str:
        """The precision before anything is known of the images."""
        return str(models.pick_precision(self._precision, self._model, self._device)).removeprefix("torch.")

    def _agreement(self, precision: str) -> Path:
        data = content.digest(self.vocabulary.key, *(self._source.content(domain) for domain in self.domains))
        return self._folder(precision) / f"agreement-{data}.safetensors"

    def _some_images(self) -> list[Image]:
        """A few of each domain, from all of its classes; large ones are left out, for all are held at once."""
        each = max(1, encoding.TRIED // max(1, len(self.domains)))
        images = []
        for domain in self.domains:
            count = self._source.count(domain)
            for row in range(0, count, max(1, -(-count // each))):
                for _, _, image in self._source.pictures(domain, row, row + 1):
                    if image is not None and image.width * image.height <= ahead.PIXELS // 4:
                        images.append(image)
        return images

    @cached_property
    def _class_entry(self) -> tuple[State, store.Facts]:
        prompts, templates = self.vocabulary.prompts, self.vocabulary.templates
        path = self.folder / f"classes-{content.digest(str(len(templates)), *prompts)}.safetensors"
        return store.kept(path, self._encode_classes)

    def _encode_classes(self) -> tuple[State, dict[str, str]]:
        facts = {"logit_scale": self._clip.scale, "logit_bias": self._clip.bias, "parameters": self._clip.parameters}
        text = encoding.class_features(self._clip, self.vocabulary)
        return {"text_features": text}, {
            **{name: repr(fact) for name, fact in facts.items()},
            "model": shown(self.model),
        }

    def _encode(self, domain: str, growing: Growing) -> None:
        """Encodes the domain's images; those that can't be read are left out, counted and, the first ones, named."""
        before = growing.rows
        older = self.folder / f"{self._older}-{self._source.content(domain)}.safetensors"
        if not before and self._older and older.exists():
            log.warning("%s: stored by an earlier version, brought to unit length: they are encoded once more", domain)
        encoding.encode(
            growing,
            ahead.Work(self._source, domain, self._preparer, self._clip.batch_size),
            self._see,
            self._nothing,
            pinned=self._clip.device.type == "cuda",
            doing=self._doing,
            progress=self._progress,
        )
        self.encoded += growing.rows - before

    @property
    def _preparer(self) -> clip.Preparer:
        return self._clip.preparer()

    def _see(self, inputs: clip.Inputs) -> Tensor:
        """The features; those that are not computed in float32 are kept in half the space too."""
        features = self._clip.encode(inputs)
        return features if self._loaded_in == "float32" else features.half()

    def _nothing(self) -> Tensor:
        dtype = torch.float32 if self._loaded_in == "float32" else torch.float16
        return torch.empty(0, self.classes.text.shape[1], dtype=dtype)


class Pixels(Encoded):
    """The same images as pixels in bytes, as the whole model takes them."""

    _entry, _doing, _older = "pixels", "reading", None

    _wished = "float32"  # for its weights are trained

    def room(self, images: int) -> int:
        return images * 3 * self._model.image_size**2

    @property
    def _preparer(self) -> clip.Preparer:
        return self._clip.preparer(torch.uint8)

    def _see(self, inputs: clip.Inputs) -> Tensor:
        return inputs["pixel_values"]

    def _nothing(self) -> Tensor:
        from PIL import Image

        return self._preparer([Image.new("RGB", (8, 8))])["pixel_values"][:0]

    def whole_model(self) -> WholeModel:
        """A new copy of the model, to be trained."""
        precision = models.pick_precision(self._precision.replace("auto", "float32"), self._model)
        return WholeModel.copy_of(self._clip, self.vocabulary.prompts, len(self.vocabulary.templates), precision)
