"""The result of a federation as one module: the frozen CLIP, the adapter, the classes.

    model = FedCLIP.from_pretrained("latest")
    model.predict(["one.jpg", "two.png"])

New classes need only names, no images (`with_classes`): the adapter stays, the prompts change.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import numpy as np
import torch
from huggingface_hub import ModelCard, ModelHubMixin
from torch import Tensor, nn
from torch.nn import functional as F

from fedclip_flwr.base import Settings, UserError, __version__, content, files
from fedclip_flwr.data import Vocabulary
from fedclip_flwr.data.files import Files
from fedclip_flwr.data.images import decoded, of_pixels, read, upright
from fedclip_flwr.data.vocabulary import templates_of, usable
from fedclip_flwr.features import Clip, ahead, clip, encoding, models
from fedclip_flwr.inference import card
from fedclip_flwr.inference.learnt import find_learnt
from fedclip_flwr.learning import Adapter, Classes, ClosedForm
from fedclip_flwr.runs import peft_folder, saved

if TYPE_CHECKING:
    from PIL.Image import Image

    Picture = Image | str | os.PathLike[str] | Tensor | np.ndarray[Any, Any]


class Prediction(NamedTuple):
    """An image's likeliest classes, the likeliest first, and how likely each is."""

    labels: tuple[str, ...]
    probabilities: tuple[float, ...]

    @property
    def label(self) -> str:
        return self.labels[0]

    @property
    def probability(self) -> float:
        return self.probabilities[0]


class FedCLIP(
    nn.Module,
    ModelHubMixin,
    library_name="fedclip-flwr",
    pipeline_tag="zero-shot-image-classification",
    tags=["federated-learning", "clip", "adapter", "flower"],
):
    """Classifies images by the run's classes, or by any others.

    It is an ordinary module: `to` moves it, `parameters` are those of the adapter and of the frozen CLIP. Called with
    `pixel_values` as `prepare` makes them, it returns logits [N, classes], through which the adapter can be trained.
    """

    text: Tensor

    def __init__(
        self,
        loaded: clip.Clip,
        vocabulary: Vocabulary,
        adapter: Adapter | ClosedForm | None = None,
        facts: Mapping[str, Any] | None = None,
        origin: Path | None = None,
    ) -> None:
        """Without an `adapter` it uses the CLIP's own features, with LoRA if that was merged into it.

        `origin` is the folder that it was loaded from.
        """
        super().__init__()
        self.net, self.adapter = loaded.net, adapter
        self.vocabulary, self.facts = vocabulary, dict(facts or {})
        self.loaded, self.origin = loaded, origin
        self._scale, self._bias = loaded.scale, loaded.bias
        self.register_buffer("text", encoding.class_features(loaded, vocabulary), persistent=False)
        self.head = adapter.head(self._numbered()) if isinstance(adapter, ClosedForm) else None
        self.eval().to(loaded.device)

    @classmethod
    def from_pretrained(  # type: ignore[override]  # the hub's other options come from the environment
        cls,
        name: str | Path,
        *,
        revision: str = "",
        model: str = "",
        device: str = "auto",
        precision: str = "auto",
    ) -> Self:
        """The model in a folder (of a run, or written by `save_pretrained`), in a run of that name, or on the hub.

        `model` is the location of its CLIP, if that has moved.
        """
        if problems := Settings.read({"device": device, "precision": precision})[1]:
            raise UserError("; ".join(problems.values()))
        place = models.pick_device(device)
        learnt = find_learnt(str(name), revision)
        found = learnt.model(model)
        known = usable(learnt.vocabulary)  # features made elsewhere may describe their prompts in a word
        made = cls(Clip(found, str(place), precision), known, learnt.adapter, learnt.facts, learnt.folder)
        if not learnt.whole:
            learnt.check_dim(made.text.shape[1], found.name)
        return made

    def _numbered(self) -> Classes:
        """The classes, with the numbers that the closed form knows them by."""
        known = {name: number for number, name in enumerate(saved.learnt_classes(self.facts))}
        return Classes(self.text, self._scale, self._bias, tuple(known.get(name, -1) for name in self.class_names))

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.vocabulary.class_names

    @property
    def device(self) -> torch.device:
        return self.loaded.device

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        self.net.eval()  # it is frozen
        return self

    def with_classes(self, names: Sequence[str] | None = None, prompt: str = "") -> FedCLIP:
        """This model for other classes, or its classes with another `prompt`: a template with {} for the name.

        Several templates have | between them. Both models share the CLIP and the adapter: moving one moves the other.
        """
        if isinstance(names, str):
            raise UserError(f"classes: expected a list of names, found the text {names!r}")
        templates = templates_of(prompt) if prompt else self.vocabulary.templates
        vocabulary = usable(Vocabulary(self.class_names if names is None else tuple(names), templates))
        names = vocabulary.class_names
        facts = {**self.facts, "class_names": list(names), "templates": list(templates), "prompts": vocabulary.prompts}
        if isinstance(self.adapter, ClosedForm):
            facts["learnt_classes"] = saved.learnt_classes(self.facts)
        return type(self)(self.loaded, vocabulary, self.adapter, facts, self.origin)

    # Images

    def prepare(self, images: Picture | Iterable[Picture]) -> dict[str, Tensor]:
        """The model's input: `model(**model.prepare(images))`."""
        return self.loaded.preparer()([_opened(image) for image in _several(images)])

    def predict(self, images: Picture | Iterable[Picture], top: int = 1) -> list[Prediction]:
        """Each image's `top` likeliest classes. Images are paths, PIL images, or tensors and arrays of pixels.

        Tensors are [3, height, width], or a batch of them, in bytes or from 0 to 1; arrays [height, width, 3].
        """
        return list(self.stream(images, top))

    def stream(self, images: Picture | Iterable[Picture], top: int = 1) -> Iterator[Prediction]:
        """Predictions for any number of images, made batch by batch as the images come."""
        several = _several(images)
        check_top(top)
        if isinstance(several, list | tuple) and all(isinstance(image, str | os.PathLike) for image in several):
            for path, found in self.stream_files([os.fspath(path) for path in several], top):
                if found is None:
                    raise _unreadable(path)
                yield found
            return
        remaining = iter(several)
        while batch := list(islice(remaining, self.loaded.batch_size)):
            yield from self._best(self._see(self.prepare(batch)), top)

    def stream_files(self, paths: Sequence[str], top: int = 1) -> Iterator[tuple[str, Prediction | None]]:
        """Predictions for files, which are decoded ahead; None for a file that can't be read."""
        check_top(top)
        work = ahead.Work(Files(paths), "files", self.loaded.preparer(), self.loaded.batch_size)
        batches = ahead.batches(work, 0, len(paths), pinned=self.device.type == "cuda")
        first = 0
        with contextlib.closing(batches):
            for batch, probabilities in encoding.pipelined(batches, self._see):
                found = dict(zip(batch.labels, self._best(probabilities, top), strict=True))
                for number in range(first, first := first + batch.rows):
                    yield paths[number], found.get(number)

    def forward(self, pixel_values: Tensor, **more: Tensor) -> Tensor:
        features = self.loaded.encode({"pixel_values": pixel_values, **more})
        if self.head is not None:
            return self.head.forward(features)
        if self.adapter is None:
            features = F.normalize(features, dim=-1)
        else:
            features = self.adapter(features.to(next(self.adapter.parameters()).dtype))
        return Classes(self.text.to(features), self._scale, self._bias).logits(features)

    @torch.no_grad()
    def _see(self, inputs: clip.Inputs) -> Tensor:
        """Probabilities, on the device."""
        return self(**inputs).softmax(dim=1) if inputs else torch.empty(0, len(self.text), device=self.device)

    def _best(self, probabilities: Tensor, top: int) -> Iterator[Prediction]:
        values, numbers = probabilities.float().topk(min(top, len(self.class_names)), dim=1)
        for row, likely in zip(numbers.tolist(), values.tolist(), strict=True):
            yield Prediction(tuple(self.class_names[number] for number in row), tuple(likely))

    # The hub

    def _save_pretrained(self, save_directory: Path) -> None:
        facts = {**self.facts, "fedclip_flwr": __version__}
        facts["model"] = card.model_name(facts)  # a path on this machine is useless elsewhere
        if lora := self.loaded.lora:
            peft_folder.check_installed()
            tensors = save_directory / peft_folder.TENSORS
            saved.write_tensors(tensors, peft_folder.to_peft(lora.state), int(facts.get("round", 0)), "save_directory")
            facts["tensors"] = content.of_file(tensors)
            revision = str(facts.get("model_revision") or "")
            peft_folder.write_config(save_directory, lora, facts["model"], revision, type(self.net))
        elif self.adapter is None:
            files.make_folder(save_directory / "model", "save_directory")
            for file in models.model_files(self.loaded.folder):
                copy = partial(shutil.copyfile, file)
                files.write_atomic(save_directory / "model" / file.name, copy, "save_directory")
            saved.write_json(save_directory / "model" / saved.WHOLE, facts, "save_directory")
        else:
            state = {name: tensor.cpu().contiguous() for name, tensor in self.adapter.state_dict().items()}
            saved.write_tensors(save_directory / saved.TENSORS, state, int(facts.get("round", 0)), "save_directory")
            facts["tensors"] = content.of_file(save_directory / saved.TENSORS)
        saved.write_json(save_directory / saved.CONFIG, facts, "save_directory")

    def generate_model_card(self, *args: Any, sites: bool = False, **more: Any) -> ModelCard:
        """The model card; it has the names and sizes of the sites only if `sites` is true."""
        return card.card_of(self.facts, self.origin, sites)


def check_top(top: int) -> None:
    if type(top) is not int or top < 1:
        raise UserError(f"top = {top!r}: expected a whole number, at least 1")


def _several(images: Picture | Iterable[Picture]) -> Iterable[Picture]:
    """The images as an iterable: a single image in a list, a batch of tensors as its images."""
    if isinstance(images, str | os.PathLike) or hasattr(images, "getbands") or getattr(images, "ndim", 4) == 3:
        return [images]  # type: ignore[list-item]
    return images


def _unreadable(path: str) -> UserError:
    return UserError(f"{path} can't be read as an image" if os.path.exists(path) else f"{path}: there is no such file")


def _opened(image: Picture) -> Image:
    """The image as if read from a file: upright, in RGB."""
    if isinstance(image, str | os.PathLike):
        found = files.with_retries(image, partial(decoded, read(Path(image))))
        if found is None:
            raise _unreadable(os.fspath(image))
        return found
    if isinstance(image, Tensor):
        image = image.detach().cpu().movedim(0, -1)
        image = (image.float() if image.is_floating_point() else image).numpy()
    return of_pixels(image) if isinstance(image, np.ndarray) else upright(image)
