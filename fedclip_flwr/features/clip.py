"""The frozen CLIP, loaded: it encodes images and class prompts.

The only module that imports transformers, and only when it loads a model: a site with stored features needs just
`models.py`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fedclip_flwr.base import UserError
from fedclip_flwr.features.models import LARGE, Model, pick_device, pick_precision
from fedclip_flwr.features.pixels import UNSCALED, packed
from fedclip_flwr.features.pixels import Inputs as Inputs
from fedclip_flwr.features.towers import activations

if TYPE_CHECKING:
    from PIL.Image import Image

log = logging.getLogger(__name__)
OWN_CODE = {"trust_remote_code": False}
"""Never run code that a model brings: transformers would otherwise ask the user and run it."""
PART = 64
"""Images per batch on a CPU: more do not fit into its caches."""
ON_GPU = 256
"""Images per batch on a GPU; fewer if its memory is too small."""


@dataclass(frozen=True)
class Preparer:
    """Preprocesses images for the model; can be pickled for another process.

    Returns pixels in `dtype`. With uint8, scaling and normalization are skipped: `Unpacking` does them later.
    """

    processor: Any
    model_type: str
    dtype: torch.dtype

    def __call__(self, images: Sequence[Image]) -> Inputs:
        if self.dtype == torch.uint8:
            return {
                "pixel_values": packed(self.processor(images=images, return_tensors="pt", **UNSCALED), self.model_type)
            }
        inputs = dict(self.processor(images=images, return_tensors="pt"))
        return {**inputs, "pixel_values": inputs["pixel_values"].to(self.dtype)}


def skeleton(model: Model) -> Any:
    """The model's modules with the shapes of their weights, without the weights."""
    from transformers import AutoConfig, AutoModel

    try:
        with _quiet_loading(), torch.device("meta"):
            return AutoModel.from_config(AutoConfig.from_pretrained(model.folder, **OWN_CODE), **OWN_CODE)
    except Exception as error:  # as in `Clip`
        raise _not_loaded(model, error) from error


def _not_loaded(model: Model, error: Exception) -> UserError:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return UserError(
        f"model = {model.name!r}: {model.folder} can't be loaded ({reason}); get it again or choose another"
    )


class Clip:
    """A loaded dual encoder. Features are float32; those of prompts have unit length.

    On a GPU, weights are float32 and autocast uses a lower precision. Not compiled: measurements showed no gain.
    """

    def __init__(self, model: Model, device: str = "auto", precision: str = "auto") -> None:
        from transformers import AutoModel, AutoTokenizer

        # Before 5.18, transformers exports this name only if torchvision is installed.
        from transformers.models.auto.image_processing_auto import AutoImageProcessor

        place, self.dtype = pick_device(device), pick_precision(precision, model, device)
        self.folder, self.lora = model.folder, model.lora
        self._max_batch = ON_GPU
        held = torch.float32 if place.type == "cuda" else self.dtype
        try:
            with _quiet_loading():
                how: dict[str, Any] = {"use_safetensors": True, "output_loading_info": True, **OWN_CODE}
                how["dtype"] = torch.float32 if model.lora else held
                self.net, loading = AutoModel.from_pretrained(model.folder, **how)
                # Always Pillow, whatever is installed: torchvision computes other pixels for the same file.
                self.processor = AutoImageProcessor.from_pretrained(model.folder, backend="pil", **OWN_CODE)
                self._tokenizer = AutoTokenizer.from_pretrained(model.folder, **OWN_CODE)
        except Exception as error:  # a corrupt or foreign file can raise anything
            raise _not_loaded(model, error) from error
        if any(not hasattr(self.net, part) for part in ("get_image_features", "get_text_features", "logit_scale")):
            kind = type(self.net).__name__
            raise UserError(
                f"model = {model.name!r}: a {kind} does not compare images with texts; expected a CLIP or SigLIP"
            )
        if missing := sorted(loading["missing_keys"]):  # transformers would use random values for them
            raise UserError(
                f"model = {model.name!r}: {model.folder} lacks {len(missing)} weights, such as {missing[0]}; "
                "get it again or choose another"
            )
        if model.lora:
            _merge(model, self.net)
            self.net.to(held)
        self.net.eval().requires_grad_(False).to(place)
        if self._on_gpu:
            self.net.to(memory_format=torch.channels_last)

    @property
    def device(self) -> torch.device:
        """The current device: the net can be moved."""
        place: torch.device = self.net.logit_scale.device
        return place

    @property
    def _on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def scale(self) -> float:
        """The factor from similarities to logits."""
        return float(self.net.logit_scale.float().exp())

    @property
    def bias(self) -> float:
        """Added to the scaled similarities: SigLIP has a bias, CLIP has none (0)."""
        bias = getattr(self.net, "logit_bias", None)
        return 0.0 if bias is None else float(bias)

    @property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.net.parameters())

    @property
    def batch_size(self) -> int:
        """Images per batch: on a CPU, larger batches are slower."""
        if self._on_gpu:
            return ON_GPU
        return PART if self.parameters * 4 < LARGE else PART // 2

    def preparer(self, dtype: torch.dtype | None = None) -> Preparer:
        """A `Preparer` for `encode`, or with uint8 for training a tower."""
        return Preparer(self.processor, self.net.config.model_type, dtype or self.dtype)

    @torch.no_grad()
    def encode(self, inputs: Inputs, before_last: int = 0) -> Tensor:
        """The features of preprocessed images, on the device, which may still be computing them.

        Or what enters the last `before_last` layers. Splits the batch if the GPU runs out of memory.
        """
        while True:
            parts = zip(*(torch.split(tensor, self._max_batch) for tensor in inputs.values()), strict=True)
            try:
                split = (dict(zip(inputs, part, strict=True)) for part in parts)
                return torch.cat([self._run(part, before_last) for part in split])
            except torch.OutOfMemoryError:
                if self._max_batch == 1:
                    raise UserError(
                        f"{self.device} is out of memory for a single image: free some memory, or set device=cpu"
                    ) from None
            self._max_batch //= 2
            torch.cuda.empty_cache()

    def _run(self, inputs: Inputs, before_last: int) -> Tensor:
        moved = {name: tensor.to(self.device, non_blocking=True) for name, tensor in inputs.items()}
        if self._on_gpu and moved["pixel_values"].dim() == 4:
            moved["pixel_values"] = moved["pixel_values"].contiguous(memory_format=torch.channels_last)
        if not self._lower:
            moved["pixel_values"] = moved["pixel_values"].to(self.net.logit_scale.dtype)
        with self.precision(), full_convolutions():
            if before_last:
                return activations(self.net, moved, before_last)
            return given(self.net.get_image_features(**moved))

    @property
    def _lower(self) -> bool:
        """True if autocast uses a lower precision than that of the weights."""
        return self._on_gpu and self.dtype != torch.float32

    def precision(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype if self._lower else None, enabled=self._lower)

    def encode_images(self, images: Iterable[Image], batch_size: int = 64) -> Iterator[Tensor]:
        """The features of the images, batch by batch."""
        prepare, remaining = self.preparer(), iter(images)
        while batch := list(islice(remaining, batch_size)):
            yield self.encode(prepare(batch)).cpu()

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str], batch_size: int = 256) -> Tensor:
        """The features of the prompts, one row each."""
        parts = (prompts[i : i + batch_size] for i in range(0, len(prompts), batch_size))
        with self.precision():
            return torch.cat([unit(self.net.get_text_features(**self.tokens(part))).cpu() for part in parts])

    def tokens(self, prompts: Sequence[str]) -> Any:
        """The tokenized prompts, padded to full length for SigLIP, as it was trained."""
        config = self.net.config
        max_length = getattr(config.text_config, "max_position_embeddings", self._tokenizer.model_max_length)
        padding = "max_length" if config.model_type.startswith("siglip") else True
        how: dict[str, Any] = {"padding": padding, "truncation": True, "max_length": max_length, "return_tensors": "pt"}
        return self._tokenizer(list(prompts), **how).to(self.device)


def _merge(model: Model, net: torch.nn.Module) -> None:
    """Adds the model's LoRA to its weights."""
    assert model.lora
    try:
        model.lora.merge_into(net)
    except ValueError as error:
        raise UserError(
            f"model = {model.name!r}: LoRA does not fit ({error}); name the model that it was made for"
        ) from None


def given(output: Any) -> Tensor:
    """The features in an output of transformers, in float32."""
    features: Tensor = output if isinstance(output, Tensor) else output.pooler_output
    return features.float()


def unit(output: Any) -> Tensor:
    """The features in an output of transformers, normalized to unit length."""
    return F.normalize(given(output), dim=-1)


@contextmanager
def full_convolutions() -> Iterator[None]:
    """Disable TF32, which torch allows in convolutions by default and which keeps only 10 bits of mantissa."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


@contextmanager
def _quiet_loading() -> Iterator[None]:
    """Hide transformers' progress bars and reports while loading, then restore the caller's settings."""
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
