"""The frozen CLIP: found by name, identified by content, loaded only when something has to be encoded.

The only room that imports transformers, and it does so when a model is loaded: a site whose features are stored needs
no more than `find` and `Model.content`.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.nn import functional as F

from fedclip_flwr import content
from fedclip_flwr.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image

BUNDLED = Path(__file__).parent / "bundled" / "model"
FILES = ("*.json", "*.txt", "*.model", "*.safetensors")
"""What a model consists of: settings, vocabulary, weights. Never a pickle."""


@dataclass(frozen=True)
class Model:
    """A CLIP on disk, not loaded."""

    name: str
    folder: Path

    def content(self, memory: Path) -> str:
        """The hash of the model's files, weights and image processor included."""
        names = sorted(f.name for f in self.folder.iterdir() if any(fnmatch.fnmatch(f.name, p) for p in FILES))
        return content.of_files(self.folder, names, memory)

    def load(self, device: str = "auto", precision: str = "auto") -> Clip:
        return Clip(self, device, precision)


def find(name: str) -> Model:
    """The model of that name: `bundled`, a folder saved by `save_pretrained`, or a Hugging Face id."""
    folder = BUNDLED if name == "bundled" else Path(name).expanduser()
    if not folder.is_dir():
        if folder.is_absolute() or name.startswith("."):
            raise UserError(f"model = {name!r}: there is no such folder")
        folder = _from_hub(name)
    for needed in ("config.json", "preprocessor_config.json", "*.safetensors"):
        if not any(folder.glob(needed)):
            raise UserError(f"model = {name!r}: {folder} holds no {needed}; save it with save_pretrained")
    return Model(name, folder)


def _from_hub(name: str) -> Path:
    """The folder in which the hub's cache holds the model, downloaded if need be."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        try:
            return Path(snapshot_download(name, allow_patterns=list(FILES), local_files_only=True))
        except LocalEntryNotFoundError:
            return Path(snapshot_download(name, allow_patterns=list(FILES)))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"model = {name!r}: neither a folder here nor to be had from the Hugging Face hub ({reason}); "
            f"check the name and the network, or run `hf download {name}` where there is one and copy its cache"
        ) from None


def pick_device(name: str) -> torch.device:
    """The device of that name; `auto` is a GPU where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise UserError(
            f"device = {name!r}: this machine has {count or 'no'} CUDA device{'s' * (count != 1)}; use auto"
        )
    return device


def pick_precision(name: str) -> torch.dtype:
    """What encoding computes in; `auto` is float32, in which features equal the model's own to 1e-5."""
    dtype: torch.dtype = getattr(torch, "float32" if name == "auto" else name)
    return dtype


class Clip:
    """A loaded dual encoder. Its features come in float32 and have unit length."""

    def __init__(self, model: Model, device: str = "auto", precision: str = "auto") -> None:
        from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

        self.device, self.dtype = pick_device(device), pick_precision(precision)
        try:
            with _quiet_loading():
                self._net = AutoModel.from_pretrained(model.folder, dtype=self.dtype, use_safetensors=True)
                self._processor = AutoImageProcessor.from_pretrained(model.folder)
                self._tokenizer = AutoTokenizer.from_pretrained(model.folder)
        except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UserError(f"model = {model.name!r}: {model.folder} can't be loaded ({reason})") from error
        if not hasattr(self._net, "get_image_features") or not hasattr(self._net, "get_text_features"):
            raise UserError(f"model = {model.name!r}: a {type(self._net).__name__} has no image and text towers")
        self._net.eval().requires_grad_(False).to(self.device)

    @property
    def scale(self) -> float:
        """What similarities are multiplied by to become logits."""
        return float(self._net.logit_scale.float().exp())

    @property
    def parameters(self) -> int:
        return sum(p.numel() for p in self._net.parameters())

    @torch.no_grad()
    def encode_images(self, images: Iterable[Image], batch_size: int = 64) -> Iterator[Tensor]:
        """The images' features, batch by batch."""
        remaining = iter(images)
        while batch := list(islice(remaining, batch_size)):
            pixels = self._processor(images=batch, return_tensors="pt")["pixel_values"]
            yield _unit(self._net.get_image_features(pixel_values=pixels.to(self.device, self.dtype)))

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Tensor:
        """The prompts' features, a row for each."""
        tokens = self._tokenizer(list(prompts), padding=True, truncation=True, return_tensors="pt").to(self.device)
        return _unit(self._net.get_text_features(**tokens))


def _unit(output: Any) -> Tensor:
    """Features as transformers returns them, on the CPU, in float32, of unit length."""
    features = output if isinstance(output, Tensor) else output.pooler_output
    return F.normalize(features.float(), dim=-1).cpu()


@contextmanager
def _quiet_loading() -> Iterator[None]:
    """Keeps transformers' loading bars off the screen; other people's settings are put back."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
