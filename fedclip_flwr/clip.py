"""The frozen CLIP: found by name, identified by content, loaded only when something has to be encoded.

The only room that imports transformers, and it does so when a model is loaded: a site whose features are stored needs
no more than `find` and `Model.content`.
"""

from __future__ import annotations

import copy
import fnmatch
import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.nn import functional as F

from fedclip_flwr import content, hub
from fedclip_flwr.errors import UserError, one_line
from fedclip_flwr.learning import Classes, Learner

if TYPE_CHECKING:
    from PIL.Image import Image

log = logging.getLogger(__name__)
BUNDLED = Path(__file__).parent / "bundled" / "model"
FILES = ("*.json", "*.txt", "*.model", "model*.safetensors")
"""What a model consists of: settings, vocabulary, weights. Never a pickle."""
Inputs = dict[str, Tensor]
"""Images as a model takes them."""
OWN_CODE = {"trust_remote_code": False}
"""A model may ask for code of its own: transformers would ask the user, and run it."""
PART = 64
"""So many images are evaluated at once: more no longer fit into a CPU's caches."""
MOST_BYTES = 2**26
"""Of a model's settings."""
LARGE = 100 * 10**6
"""Bytes of weights from which on a lower precision pays."""
ON_GPU = 256
"""So many images are encoded at once on a GPU, or as many as its memory holds."""


@dataclass(frozen=True)
class Model:
    """A CLIP on disk, not loaded."""

    name: str
    folder: Path
    revision: str = ""  # the hub's commit

    def content(self, memory: Path) -> str:
        """The hash of the model's files, weights and image processor included."""
        return content.of_files(self.folder, [file.name for file in files(self.folder)], memory)

    @property
    def size(self) -> int:
        """The bytes of its weights."""
        return sum(file.stat().st_size for file in files(self.folder) if file.suffix == ".safetensors")

    @property
    def dim(self) -> int:
        """How many numbers a feature has; where the model does not say so, more than any has."""
        return int(self._config.get("projection_dim") or self._vision.get("hidden_size") or 1152)

    @property
    def image_size(self) -> int:
        """How many pixels an image has in a row, as it takes them."""
        return int(self._vision.get("image_size") or 384)

    @property
    def _config(self) -> dict[str, Any]:
        return _json(self.folder / "config.json")

    @property
    def _vision(self) -> dict[str, Any]:
        vision = self._config.get("vision_config")
        return vision if isinstance(vision, dict) else {}

    def load(self, device: str = "auto", precision: str = "auto") -> Clip:
        return Clip(self, device, precision)


def files(folder: Path) -> list[Path]:
    """The files in the folder that the model consists of."""
    return sorted(file for file in folder.iterdir() if any(fnmatch.fnmatch(file.name, p) for p in FILES))


def find(name: str, revision: str = "") -> Model:
    """The model of that name: `bundled`, a folder saved by `save_pretrained`, or a Hugging Face id."""
    folder = BUNDLED if name == "bundled" else Path(os.path.expanduser(name))
    if not os.path.isdir(folder):
        if folder.is_absolute() or name.startswith("."):
            raise UserError(f"model = {name!r}: there is no such folder")
        folder = _from_hub(name, revision)
        revision = folder.name
    elif revision:
        raise UserError(f"model-revision = {revision!r}: only models of the Hugging Face hub have revisions")
    elif missing := _lacks(folder):
        raise UserError(f"model = {name!r}: {folder} lacks {missing}; save all of it with save_pretrained")
    config = _json(folder / "config.json")
    towers = {"an image tower": "vision_config", "a text tower": "text_config"}
    if without := [tower for tower, key in towers.items() if not {key, f"{key}_dict"} & config.keys()]:
        kind = config.get("model_type", "model without a type")
        raise UserError(f"model = {name!r}: a {kind} lacks {' and '.join(without)}; expected a CLIP or SigLIP")
    return Model(name, folder, revision)


def _json(path: Path) -> dict[str, Any]:
    try:
        facts = content.read_json(path, MOST_BYTES)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is damaged ({one_line(error)}): get it once more") from None
    return facts if isinstance(facts, dict) else {}


def _lacks(folder: Path) -> str | None:
    """What a model's folder would have to hold and doesn't."""
    for name, needed in {
        "config.json": ["config.json"],
        "preprocessor_config.json": ["preprocessor_config.json", "processor_config.json"],
        "a tokenizer": ["tokenizer.json", "vocab.json", "spiece.model", "tokenizer.model"],
    }.items():
        if not any((folder / file).exists() for file in needed):
            return name
    index = folder / "model.safetensors.index.json"
    weights = {"model.safetensors"}
    if index.exists():
        told = _json(index).get("weight_map")
        weights = set(map(str, told.values())) if isinstance(told, dict) else {"a list of weights"}
    if missing := sorted(file for file in weights if not (folder / file).exists()):
        pickled = any(folder.glob("*.bin"))
        return missing[0] + " (weights are there as a pickle only, which is never read)" * pickled
    for file in sorted(weights):
        try:
            with safe_open(folder / file, "pt"):  # reads the header, which tells the file's size
                pass
        except (OSError, SafetensorError):
            return f"the whole of {file}"
    return None


def _from_hub(name: str, revision: str) -> Path:
    """The folder in which the hub's cache holds the model; weights may come from the hub's own conversion of them."""

    def snapshot(revision: str) -> Path:
        told = f"model = {name!r}"
        return hub.snapshot(name, kind="model", revision=revision, lacks=_lacks, told=told, allow_patterns=FILES)

    known = f"conversion-{content.digest(name)}"
    try:
        return snapshot(revision or content.recall(known, content.memory()) or "")
    except hub.IncompleteError:
        converted = None if revision else hub.conversion(name)
        if not converted:
            raise
        log.warning("%s has no safetensors; taken are those that the hub has converted (%s)", name, converted)
        content.remember(known, converted, content.memory())
        return snapshot(converted)


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


def pick_precision(name: str, model: Model, device: str = "auto") -> torch.dtype:
    """What encoding computes in, told without loading the model.

    `auto` is bfloat16 (on an older GPU float16) where the device has instructions for it and the model is large: a
    small one would gain nothing, and in float32 its features are the same everywhere.
    """
    if name != "auto":
        dtype: torch.dtype = getattr(torch, name)
        return dtype
    if model.size < LARGE:
        return torch.float32
    if pick_device(device).type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return torch.bfloat16 if has_bfloat16() else torch.float32


def has_bfloat16(facts: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether the CPU has instructions for bfloat16; without them it is several times slower than float32."""
    try:
        found = re.search(r"^(flags|Features)\s*:(.*)", facts.read_text(), re.MULTILINE)
    except OSError:
        return False
    return bool(found and {"amx_bf16", "avx512_bf16", "bf16"} & set(found[2].split()))


@dataclass(frozen=True)
class Preparer:
    """What is done with images before the model sees them; it can be sent to another process.

    The pixels are in `dtype`. Bytes are all of the processor's work but the scaling, which a whole model does itself.
    """

    processor: Any
    model_type: str
    dtype: torch.dtype

    def __call__(self, images: Sequence[Image]) -> Inputs:
        if self.dtype == torch.uint8:
            pixels = self.processor(images=images, return_tensors="pt", do_rescale=False, do_normalize=False)
            pixels = pixels["pixel_values"]
            if pixels.dtype != torch.uint8 or pixels.dim() != 4:
                raise UserError(f"method = 'full-model': a {self.model_type} takes images in another form")
            return {"pixel_values": pixels}
        inputs = dict(self.processor(images=images, return_tensors="pt"))
        return {**inputs, "pixel_values": inputs["pixel_values"].to(self.dtype)}


class Clip:
    """A loaded dual encoder. Its features come in float32, those of prompts with unit length.

    On a GPU the weights are float32, and autocast computes in less. Nothing is compiled: that was not measured to pay.
    """

    def __init__(self, model: Model, device: str = "auto", precision: str = "auto") -> None:
        from transformers import AutoModel, AutoTokenizer

        # Before 5.18, transformers itself gives that only where torchvision is installed.
        from transformers.models.auto.image_processing_auto import AutoImageProcessor

        place, self.dtype = pick_device(device), pick_precision(precision, model, device)
        self.folder = model.folder
        self._most = ON_GPU
        held = torch.float32 if place.type == "cuda" else self.dtype
        try:
            with _quiet_loading():
                how: dict[str, Any] = {"dtype": held, "use_safetensors": True, "output_loading_info": True, **OWN_CODE}
                self.net, loading = AutoModel.from_pretrained(model.folder, **how)
                # Not what happens to be installed: torchvision would come to other pixels for the same file.
                self._processor = AutoImageProcessor.from_pretrained(model.folder, backend="pil", **OWN_CODE)
                self._tokenizer = AutoTokenizer.from_pretrained(model.folder, **OWN_CODE)
        except Exception as error:  # of a damaged or foreign file, anything can come
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UserError(
                f"model = {model.name!r}: {model.folder} can't be loaded ({reason}); get it once more, or take another"
            ) from error
        if any(not hasattr(self.net, part) for part in ("get_image_features", "get_text_features", "logit_scale")):
            kind = type(self.net).__name__
            raise UserError(
                f"model = {model.name!r}: a {kind} does not compare images with texts; expected a CLIP or SigLIP"
            )
        if missing := sorted(loading["missing_keys"]):  # transformers would go on with random numbers
            raise UserError(
                f"model = {model.name!r}: {model.folder} lacks {len(missing)} weights, such as {missing[0]}; get it "
                "once more, or take another"
            )
        self.net.eval().requires_grad_(False).to(place)
        if self._on_gpu:
            self.net.to(memory_format=torch.channels_last)

    @property
    def device(self) -> torch.device:
        """Where it is now: its net can be moved."""
        place: torch.device = self.net.logit_scale.device
        return place

    @property
    def _on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def scale(self) -> float:
        """What similarities are multiplied by to become logits."""
        return float(self.net.logit_scale.float().exp())

    @property
    def bias(self) -> float:
        """What is added to them then: SigLIP has a bias, CLIP none."""
        bias = getattr(self.net, "logit_bias", None)
        return 0.0 if bias is None else float(bias)

    @property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.net.parameters())

    @property
    def batch_size(self) -> int:
        """How many images are encoded at once: on a CPU, more are slower."""
        if self._on_gpu:
            return ON_GPU
        return PART if self.parameters * 4 < LARGE else PART // 2

    def preparer(self, dtype: torch.dtype | None = None) -> Preparer:
        """What prepares images for `encode`, or as bytes for a whole model."""
        return Preparer(self._processor, self.net.config.model_type, dtype or self.dtype)

    @torch.no_grad()
    def encode(self, inputs: Inputs) -> Tensor:
        """The features of prepared images, on the device; it may still be at work on them.

        A GPU that has not the memory for all at once gets them in parts.
        """
        while True:
            parts = zip(*(torch.split(tensor, self._most) for tensor in inputs.values()), strict=True)
            try:
                return torch.cat([self._features(dict(zip(inputs, part, strict=True))) for part in parts])
            except torch.OutOfMemoryError:
                if self._most == 1:
                    raise UserError(
                        f"{self.device} has no memory left for a single image: free some, or give device=cpu"
                    ) from None
            self._most //= 2
            torch.cuda.empty_cache()

    def _features(self, inputs: Inputs) -> Tensor:
        there = {name: tensor.to(self.device, non_blocking=True) for name, tensor in inputs.items()}
        if self._on_gpu and there["pixel_values"].dim() == 4:
            there["pixel_values"] = there["pixel_values"].contiguous(memory_format=torch.channels_last)
        if not self._lower:
            there["pixel_values"] = there["pixel_values"].to(self.net.logit_scale.dtype)
        with self._precision(), _whole_convolutions():
            return given(self.net.get_image_features(**there))

    @property
    def _lower(self) -> bool:
        """Whether autocast computes in less than the weights are held in."""
        return self._on_gpu and self.dtype != torch.float32

    def _precision(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype if self._lower else None, enabled=self._lower)

    def encode_images(self, images: Iterable[Image], batch_size: int = 64) -> Iterator[Tensor]:
        """The images' features, batch by batch."""
        prepare, remaining = self.preparer(), iter(images)
        while batch := list(islice(remaining, batch_size)):
            yield self.encode(prepare(batch)).cpu()

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str], batch_size: int = 256) -> Tensor:
        """The prompts' features, a row for each."""
        parts = (prompts[i : i + batch_size] for i in range(0, len(prompts), batch_size))
        with self._precision():
            return torch.cat([unit(self.net.get_text_features(**self._tokens(part))).cpu() for part in parts])

    def _tokens(self, prompts: Sequence[str]) -> Any:
        """SigLIP learnt with texts that are filled up to their full length."""
        config = self.net.config
        room = getattr(config.text_config, "max_position_embeddings", self._tokenizer.model_max_length)
        padding = "max_length" if config.model_type.startswith("siglip") else True
        how: dict[str, Any] = {"padding": padding, "truncation": True, "max_length": room, "return_tensors": "pt"}
        return self._tokenizer(list(prompts), **how).to(self.device)

    def whole(self, prompts: Sequence[str], templates: int = 1, dtype: torch.dtype = torch.float32) -> WholeModel:
        """A copy of all of it, to be trained. Prompts are those of all classes in one template, then in the next."""
        net = copy.deepcopy(self.net).to(memory_format=torch.contiguous_format)  # as tensors travel
        return WholeModel(net, self._processor, self._tokens(prompts), templates, dtype)


class WholeModel(Learner):
    """A whole CLIP that learns: from pixels in bytes as a `Preparer` makes them, with class features of its own.

    Its weights are float32; it computes in the precision that is asked for.
    """

    factor: Tensor
    shift: Tensor

    def __init__(self, net: Any, processor: Any, tokens: Mapping[str, Tensor], templates: int, dtype: torch.dtype):
        super().__init__()
        self.net = net.float().requires_grad_(True)
        self._templates, self._dtype = templates, dtype
        scale = processor.rescale_factor if processor.do_rescale else 1.0
        mean, std = (processor.image_mean, processor.image_std) if processor.do_normalize else ((0.0,) * 3, (1.0,) * 3)
        constants = {
            "factor": (scale / torch.tensor(std)).view(3, 1, 1),
            "shift": (torch.tensor(mean) / torch.tensor(std)).view(3, 1, 1),
            **tokens,
        }
        for name, tensor in constants.items():
            self.register_buffer(name, tensor, persistent=False)  # goes to the device with it, but does not travel
        self._tokens = tuple(tokens)

    def forward(self, pixels: Tensor) -> Tensor:
        """In parts, so that any number of images can be evaluated."""
        return torch.cat([self._features(part) for part in torch.split(pixels, PART)])

    def _features(self, pixels: Tensor) -> Tensor:
        with self._precision(), _whole_convolutions():
            images = pixels * self.factor - self.shift
            return unit(self.net.get_image_features(pixel_values=images))

    def against(self, classes: Classes) -> Classes:
        """Its own class features, scale and bias; those that are given are the frozen model's."""
        with self._precision():
            features = unit(self.net.get_text_features(**{name: getattr(self, name) for name in self._tokens}))
        text = F.normalize(features.view(self._templates, -1, features.shape[1]).mean(0), dim=-1)
        bias = getattr(self.net, "logit_bias", None)
        return Classes(text, self.net.logit_scale.exp(), 0.0 if bias is None else bias)

    def _precision(self) -> torch.autocast:
        return torch.autocast(self.factor.device.type, self._dtype, enabled=self._dtype != torch.float32)


def given(output: Any) -> Tensor:
    """Features as transformers returns them, in float32."""
    features: Tensor = output if isinstance(output, Tensor) else output.pooler_output
    return features.float()


def unit(output: Any) -> Tensor:
    """The same of unit length."""
    return F.normalize(given(output), dim=-1)


@contextmanager
def _whole_convolutions() -> Iterator[None]:
    """In float32 a GPU computes convolutions in float32, too: by itself torch lets it cut numbers to 10 bits there."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


@contextmanager
def _quiet_loading() -> Iterator[None]:
    """Keeps transformers' loading bars and reports off the screen; other people's settings are put back."""
    from transformers.utils import logging

    shown, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()
