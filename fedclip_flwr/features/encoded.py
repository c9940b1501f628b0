"""Features: encoded once, then read from the store.

`Encoded` uses a store below `$FEDCLIP_HOME/features`, keyed by the content of the model and of the data:

    MODEL-PRECISION/given-DATA.safetensors      image_features [N, dim] as the model gives them, labels [N] as numbers
    MODEL-PRECISION/classes-PROMPTS.safetensors text_features [C, dim], of unit length
    MODEL-PRECISION/pixels-DATA.safetensors     image_features [N, 3, height, width] in uint8, to train the vision tower
    MODEL-PRECISION/lastN-DATA.safetensors      image_features [N, tokens, width]: what enters its last N layers
    MODEL-PRECISION/agreement-….safetensors     whether a sample of images gets the same classes as in float32

`folder.py` reads the same tensors from a folder made elsewhere (`features:PATH`): such a site needs no CLIP.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Iterator, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

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
SCANNED = 500
"""The number of images that are read to find the readable ones among them."""


class Encoded:
    """Features of a source's images, from the store or encoded now."""

    trains_tower = False
    """Whether what is stored is for training a tower, and not features."""
    _entry, _doing = "given", "encoding"
    _older: str | None = "images"  # the name under which an earlier version stored features of unit length

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
        """`numbers` are the indices of the source's classes in the vocabulary."""
        self.model, self.model_revision, self.vocabulary = model.name, model.revision, vocabulary
        self._source, self._model = source, model
        self._numbers = torch.tensor(numbers)
        self._device, self._precision, self._progress = device, precision, progress
        self._opened: dict[str, Examples] = {}
        self._root = root or files.home() / "features"
        self.encoded = 0  # images encoded by this object, unreadable ones included

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
        if domain not in self._opened:  # reading checks every byte and warns of unreadable images
            self._opened[domain] = self._open(domain)
        return self._opened[domain]

    def _open(self, domain: str) -> Examples:
        path = self._path(domain, self._loaded_in)
        tensors, facts = store.load_or_grow(path, self._source.count(domain), partial(self._encode, domain))
        if broken := int(facts["broken"]):
            count, names = broken + len(tensors["labels"]), shown(facts["names"]) + ", …" * (broken > NAMED)
            summary = f"{broken:,} of {count:,} images can't be read and are left out"
            if broken == count:
                summary = f"none of the {count:,} images can be read"
            log.warning("%s: %s: %s", domain, summary, names)
        return Examples(tensors["image_features"], self._numbers[tensors["labels"]])

    def _path(self, domain: str, precision: str) -> Path:
        """The path of the domain's store entry."""
        return self._folder(precision) / f"{self._entry}-{self._source.content(domain)}.safetensors"

    def pictures(self, domain: str, rows: Collection[int]) -> Iterator[tuple[int, Image]]:
        """The images of these rows of `examples`, one by one.

        If some are unreadable, rows can only be found by reading from the start: then only the first few are given.
        """
        if len(self.examples(domain).labels) == self.count(domain):
            found = ((row, next(self._source.pictures(domain, row, row + 1)).image) for row in rows)
        else:
            scanned = self._source.pictures(domain, 0, SCANNED)
            readable = (picture.image for picture in scanned if picture.image is not None)
            found = ((row, image) for row, image in enumerate(readable) if row in rows)
        yield from ((row, image) for row, image in found if image is not None)

    def has_unit_length(self, domains: Iterable[str] | None = None) -> bool:
        return False

    def count(self, domain: str) -> int:
        return self._source.count(domain)

    def stored(self, domain: str) -> int:
        path = self._path(domain, self.likely_precision)
        return self.count(domain) if store.read(path) else growing.encoded_count(path)

    def room(self, images: int) -> int:
        return images * 4 * self._model.dim

    @cached_property
    def folder(self) -> Path:
        """The folder where the features are stored."""
        return self._folder(self._loaded_in)

    def _folder(self, precision: str) -> Path:
        return self._root / f"{self.model_content}-{precision}"

    @cached_property
    def _clip(self) -> clip.Clip:
        return self.new_clip()

    def new_clip(self) -> clip.Clip:
        """The model, loaded once more: to be changed."""
        return Clip(self._model, self._device, self._loaded_in)

    def skeleton(self) -> Any:
        """The model without its weights."""
        return clip.skeleton(self._model)

    @cached_property
    def _loaded_in(self) -> str:
        """The precision in use: float32 if a lower one changes too many predictions on the data."""
        name = self._preferred
        if name == "float32":
            return name

        def compare() -> tuple[State, dict[str, str]]:
            return encoding.agreement(self._model, self._device, name, self.vocabulary, self._sample()), {}

        found, _ = store.load_or_make(self._agreement(name), compare)
        return name if encoding.good_enough(found) else "float32"

    @property
    def likely_precision(self) -> str:
        """The expected precision, without encoding anything to check it."""
        found = None if self._preferred == "float32" else store.read(self._agreement(self._preferred))
        return "float32" if found and not encoding.good_enough(found[0]) else self._preferred

    @property
    def _preferred(self) -> str:
        """The precision by settings and model, before the check on the images."""
        return str(models.pick_precision(self._precision, self._model, self._device)).removeprefix("torch.")

    def _agreement(self, precision: str) -> Path:
        data = content.digest(self.vocabulary.key, *(self._source.content(domain) for domain in self.domains))
        return self._folder(precision) / f"agreement-{data}.safetensors"

    def _sample(self) -> list[Image]:
        """A few images of each domain, from all of its classes. Skips large ones, because all are held in memory."""
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
        return store.load_or_make(path, self._encode_classes)

    def _encode_classes(self) -> tuple[State, dict[str, str]]:
        facts = {"logit_scale": self._clip.scale, "logit_bias": self._clip.bias, "parameters": self._clip.parameters}
        text = encoding.class_features(self._clip, self.vocabulary)
        return {"text_features": text}, {
            **{name: repr(fact) for name, fact in facts.items()},
            "model": shown(self.model),
        }

    def _encode(self, domain: str, growing: Growing) -> None:
        """Encode the domain's images. Unreadable ones are skipped and counted, and the first few are named."""
        before = growing.rows
        older = self.folder / f"{self._older}-{self._source.content(domain)}.safetensors"
        if not before and self._older and older.exists():
            log.warning("%s: features stored by an earlier version have unit length: encoding them again", domain)
        encoding.encode(
            growing,
            ahead.Work(self._source, domain, self._preparer, self._clip.batch_size),
            self._compute,
            self._empty,
            pinned=self._clip.device.type == "cuda",
            doing=self._doing,
            progress=self._progress,
        )
        self.encoded += growing.rows - before

    @property
    def _preparer(self) -> clip.Preparer:
        return self._clip.preparer()

    def _compute(self, inputs: clip.Inputs) -> Tensor:
        """The features, stored in float16 if they are not computed in float32."""
        features = self._clip.encode(inputs)
        return features if self._loaded_in == "float32" else features.half()

    def _empty(self) -> Tensor:
        return self.blank_image()[:0]

    def blank_image(self) -> Tensor:
        """What is stored of a black image."""
        from PIL import Image

        return self._compute(self._preparer([Image.new("RGB", (8, 8))])).cpu()


class TowerPixels(Encoded):
    """The images as uint8 pixels, to train the vision tower."""

    trains_tower = True
    _entry, _doing, _older = "pixels", "reading", None

    def room(self, images: int) -> int:
        return images * 3 * self._model.image_size**2

    @property
    def _preparer(self) -> clip.Preparer:
        return self._clip.preparer(torch.uint8)

    def _compute(self, inputs: clip.Inputs) -> Tensor:
        return inputs["pixel_values"]

    def _path(self, domain: str, precision: str) -> Path:
        return super()._path(domain, "float32")  # the same for every precision


class Pixels(TowerPixels):
    """Pixels for a whole model, whose weights are trained in float32."""

    _preferred = "float32"

    def whole_model(self) -> WholeModel:
        """A new, trainable copy of the model."""
        precision = models.pick_precision(self._precision.replace("auto", "float32"), self._model)
        return WholeModel.copy_of(self._clip, self.vocabulary.prompts, len(self.vocabulary.templates), precision)


class Activations(Encoded):
    """What enters the last layers of the vision tower, for each image: those before them are run once."""

    trains_tower, _older = True, None

    def __init__(self, *args: Any, last: int, **more: Any) -> None:
        super().__init__(*args, **more)
        self._last, self._entry = last, f"last{last}"

    def room(self, images: int) -> int:
        return images * 4 * self._model.activations

    def _compute(self, inputs: clip.Inputs) -> Tensor:
        return self._clip.encode(inputs, self._last).to(getattr(torch, self._loaded_in))
