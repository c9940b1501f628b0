"""Features: encoded once, ever, and read from then on.

`Encoded` draws on a store below `$FEDCLIP_HOME/features`, keyed by the content of the model and of the data:

    MODEL-PRECISION/images-DATA.safetensors     image_features [N, dim], labels [N]
    MODEL-PRECISION/classes-PROMPTS.safetensors text_features [C, dim]

`FeatureFolder` reads the same tensors from a folder made elsewhere (`features:PATH`), so that a site need never hold
CLIP at all. Tensors are memory-mapped.
"""

from __future__ import annotations

import json
import logging
import math
import os
import zlib
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from fedclip_flwr import clip, content, data
from fedclip_flwr.config import Settings, unusable
from fedclip_flwr.errors import UserError
from fedclip_flwr.learning import RECIPES, Classes, Examples

if TYPE_CHECKING:
    from PIL.Image import Image

log = logging.getLogger(__name__)
Tensors = dict[str, Tensor]
T = TypeVar("T")


def home() -> Path:
    """Where everything that outlives a run is kept."""
    return Path(os.environ.get("FEDCLIP_HOME") or "~/.fedclip").expanduser().absolute()


def results(settings: Settings) -> tuple[Path, str]:
    """Where run folders go, and the setting that says so."""
    if settings.results_dir:
        return Path(settings.results_dir), "results-dir"
    return home() / "runs", "FEDCLIP_HOME"


class Features(Protocol):
    """The images of a data set and its class prompts, as a CLIP sees them."""

    @property
    def class_names(self) -> tuple[str, ...]: ...

    @property
    def domains(self) -> tuple[str, ...]: ...

    @property
    def model(self) -> str:
        """The name of the model."""

    @property
    def model_content(self) -> str | None:
        """The hash of the model's files, where they are at hand."""

    @property
    def parameters(self) -> int | None:
        """How many numbers the whole model has, where that is known."""

    @property
    def prompt(self) -> str:
        """The template in which `{}` stands for the class name."""

    @property
    def classes(self) -> Classes: ...

    def examples(self, domain: str) -> Examples:
        """All images of the domain, in an order that is always the same."""


def open_features(settings: Settings, *, store: Path | None = None, progress: bool = True) -> Features:
    """The features that the settings name, encoded when they are first asked for."""
    kind, _, path = settings.data.partition(":")
    if kind == "features":
        folder = FeatureFolder(Path(path))
        for key, given, own in (("model", settings.model, folder.model), ("prompt", settings.prompt, folder.prompt)):
            if given not in ("", Settings().model, own):
                raise UserError(f"{key} = {given!r}: the features in {path} were made with {own!r}; leave it out")
        return folder
    return Encoded(
        data.open_source(settings.data),
        clip.find(settings.model),
        settings.prompt or RECIPES[settings.recipe].prompt,
        store=store,
        device=settings.device,
        precision=settings.precision,
        progress=progress,
    )


def open_run(given: Mapping[str, Any], known: Mapping[str, str] | None = None) -> tuple[Settings, Features, str | None]:
    """The settings of a run, its features and the held-out domain.

    One `UserError` tells everything that is wrong, beginning with the problems that are `known`.
    """
    settings, found = Settings.read(given)
    problems = {**(known or {}), **found}
    features = holdout = None

    def check(key: str, *needs: str, look: Callable[[], T]) -> T | None:
        if problems.keys() & {key, *needs}:
            return None
        try:
            return look()
        except UserError as error:
            problems[key] = str(error)
            return None

    check("device", look=lambda: clip.pick_device(settings.device))
    if not settings.data.startswith("features:"):
        check("model", look=lambda: clip.find(settings.model))
    features = check("data", "model", "prompt", look=lambda: open_features(settings))
    if features:
        holdout = check("holdout", look=lambda: data.pick_holdout(settings.holdout, features.domains))
    check("results-dir", look=lambda: content.make_folder(*results(settings)))
    if problems or not features:
        raise unusable(problems.values())
    return settings, features, holdout


class Encoded:
    """Features of a source's images, encoded by a model now or earlier."""

    def __init__(
        self,
        source: data.Source,
        model: clip.Model,
        prompt: str,
        *,
        store: Path | None = None,
        device: str = "auto",
        precision: str = "auto",
        progress: bool = True,
    ) -> None:
        self.model, self.prompt = model.name, prompt
        self._source, self._model = source, model
        self._device, self._precision, self._progress = device, precision, progress
        self._opened: dict[str, Examples] = {}
        self._store = store or home() / "features"
        self._memory = self._store / "contents"

    @property
    def class_names(self) -> tuple[str, ...]:
        return self._source.class_names

    @property
    def domains(self) -> tuple[str, ...]:
        return self._source.domains

    @cached_property
    def model_content(self) -> str:
        return self._model.content(self._memory)

    @property
    def parameters(self) -> int:
        return int(self._class_entry[1]["parameters"])

    @property
    def classes(self) -> Classes:
        tensors, facts = self._class_entry
        return Classes(tensors["text_features"], float(facts["logit_scale"]))

    def examples(self, domain: str) -> Examples:
        if domain not in self._opened:  # reading checks every byte, and tells of broken images
            self._opened[domain] = self._open(domain)
        return self._opened[domain]

    def _open(self, domain: str) -> Examples:
        path = self._folder / f"images-{self._source.content(domain, self._memory)}.safetensors"
        tensors, facts = _kept(path, lambda: self._encode(domain))
        if broken := int(facts["broken"]):
            count = broken + len(tensors["labels"])
            log.warning("%s: %s of %s images can't be read and are left out", domain, f"{broken:,}", f"{count:,}")
        return Examples(tensors["image_features"], tensors["labels"])

    @cached_property
    def _folder(self) -> Path:
        precision = str(clip.pick_precision(self._precision)).removeprefix("torch.")
        return self._store / f"{self.model_content}-{precision}"

    @cached_property
    def _clip(self) -> clip.Clip:
        return self._model.load(self._device, self._precision)

    @cached_property
    def _class_entry(self) -> tuple[Tensors, Mapping[str, str]]:
        prompts = [self.prompt.replace("{}", name) for name in self.class_names]
        path = self._folder / f"classes-{content.digest(*prompts)}.safetensors"
        return _kept(path, lambda: self._encode_classes(prompts))

    def _encode_classes(self, prompts: list[str]) -> tuple[Tensors, dict[str, str]]:
        facts = {"logit_scale": repr(self._clip.scale), "parameters": str(self._clip.parameters)}
        return {"text_features": self._clip.encode_prompts(prompts)}, facts

    def _encode(self, domain: str) -> tuple[Tensors, dict[str, str]]:
        """Encodes the domain's images; those that can't be read are left out and counted."""
        count = self._source.count(domain)
        bar = tqdm(total=count, desc=f"encoding {domain}", unit=" images", disable=not self._progress)
        labels: list[int] = []

        def readable() -> Iterator[Image]:
            for image, label in self._source.images(domain):
                bar.update()
                if image is not None:
                    labels.append(label)
                    yield image

        with bar:
            batches = list(self._clip.encode_images(readable()))
        if not batches:
            raise UserError(f"{domain}: none of its {count:,} images can be read")
        tensors = {"image_features": torch.cat(batches), "labels": torch.tensor(labels)}
        return tensors, {"broken": str(count - len(labels))}


def _kept(path: Path, make: Callable[[], tuple[Tensors, dict[str, str]]]) -> tuple[Tensors, Mapping[str, str]]:
    """The store's entry at `path`; made if it is missing or damaged, by one process while the others wait."""
    entry = _read(path)
    if entry:
        return entry
    lock = FileLock(f"{path}.lock")
    with content.writing_to(path.parent):
        try:
            lock.acquire(timeout=2)
        except Timeout:
            log.warning("waiting for another process that is encoding the same features")
            lock.acquire()
    try:
        entry = _read(path)
        if not entry:
            _write(path, *make())
            entry = _read(path)
    finally:
        lock.release()
    if not entry:
        raise UserError(
            f"features stored in {path} come back damaged: check the disk, or let FEDCLIP_HOME name another"
        )
    return entry


def _write(path: Path, tensors: Tensors, facts: dict[str, str]) -> None:
    """Called by one process at a time: what a killed one left half-written is removed."""
    for left in path.parent.glob(f".{path.name}.*"):
        left.unlink()
    facts = {**facts, "checksum": _checksum(tensors, facts)}
    content.write_whole(path, lambda part: content.save_tensors(tensors, part, facts))


def _read(path: Path) -> tuple[Tensors, Mapping[str, str]] | None:
    """The entry, if it is there and whole."""
    try:
        tensors, facts = _mapped(path)
    except FileNotFoundError:
        return None
    except (OSError, SafetensorError):
        tensors, facts = {}, {}
    claimed = facts.pop("checksum", None)
    if claimed and claimed == _checksum(tensors, facts):
        return tensors, facts
    log.warning("stored features are damaged and will be made again: %s", path)
    return None


def _mapped(path: Path) -> tuple[Tensors, dict[str, str]]:
    """The file's tensors, memory-mapped, and its metadata."""
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118


def _checksum(tensors: Tensors, facts: Mapping[str, str]) -> str:
    """Over names, types, shapes and bytes: what a damaged header could change as well as what a damaged body could."""
    value = zlib.crc32(json.dumps(sorted(facts.items())).encode())
    for name, tensor in sorted(tensors.items()):
        value = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), value)
        value = zlib.crc32(tensor.contiguous().view(torch.uint8).numpy().data, value)
    return f"{value:08x}"


class FeatureFolder:
    """Features made elsewhere: `features.json`, `classes.safetensors`, and `DOMAIN.safetensors` for each domain."""

    model_content: str | None = None

    def __init__(self, root: Path) -> None:
        self._root = root
        path = root / "features.json"
        try:
            facts = json.loads(path.read_text(encoding="utf-8"))
            self.model = str(facts["model"])
            self.prompt = str(facts["prompt"])
            self.class_names = tuple(map(str, facts["class_names"]))
            self.domains = tuple(sorted(map(str, facts["domains"])))
            self.parameters = None if facts.get("parameters") is None else int(facts["parameters"])
            self._dim = int(facts["embedding_dim"])
            self._scale, self._bias = float(facts["logit_scale"]), float(facts.get("logit_bias") or 0.0)
        except OSError as error:
            raise UserError(f"data = 'features:{root}': {path} can't be read ({error.strerror})") from None
        except KeyError as error:
            raise UserError(f"data = 'features:{root}': {path} lacks {error}") from None
        except (TypeError, ValueError, AttributeError) as error:
            raise UserError(f"data = 'features:{root}': {path} is damaged ({error})") from None
        if any(Path(name).name != name for name in self.domains):
            raise UserError(f"data = 'features:{root}': {path} names a domain that is no plain file name")
        if len(self.class_names) < 2 or not self.domains or not math.isfinite(self._scale + self._bias):
            raise UserError(f"data = 'features:{root}': {path} must name two classes, a domain and a finite scale")

    @cached_property
    def classes(self) -> Classes:
        text = self._tensor("classes", "text_features", (len(self.class_names), self._dim))
        return Classes(text, self._scale, self._bias)

    def examples(self, domain: str) -> Examples:
        features = self._tensor(domain, "image_features", (None, self._dim))
        labels = self._tensor(domain, "labels", (len(features),))
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < len(self.class_names):
            raise UserError(f"{self._root / domain}.safetensors: labels must lie in 0…{len(self.class_names) - 1}")
        return Examples(features, labels)

    def _tensor(self, file: str, name: str, shape: tuple[int | None, ...]) -> Tensor:
        """The named tensor, of the type and shape that the format asks for, with finite numbers only."""
        path = self._root / f"{file}.safetensors"
        try:
            tensor = _mapped(path)[0].get(name)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path} can't be read ({error})") from None
        if tensor is None:
            raise UserError(f"{path} holds no {name}")
        if len(tensor.shape) != len(shape) or any(s not in (None, t) for s, t in zip(shape, tensor.shape, strict=True)):
            wanted = tuple("N" if size is None else size for size in shape)
            raise UserError(f"{path}: {name} has shape {tuple(tensor.shape)}, expected {wanted}")
        if tensor.is_floating_point() != (name != "labels") or not tensor.isfinite().all():
            raise UserError(f"{path}: {name} must be {'whole' if name == 'labels' else 'finite'} numbers")
        return tensor
