"""The frozen CLIP, loaded: it encodes images and class prompts.

The only module that imports transformers, and it does so when a model is loaded: a site whose features are stored needs
no more than `models.py`.
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

if TYPE_CHECKING:
    from PIL.Image import Image
from fedclip_flwr.features.models import LARGE, Model, pick_device, pick_precision

log = logging.getLogger(__name__)
Inputs = dict[str, Tensor]
"""Images as a model takes them."""
OWN_CODE = {"trust_remote_code": False}
"""A model may ask for code of its own: transformers would ask the user, and run it."""
PART = 64
"""So many images are evaluated at once: more no longer fit into a CPU's caches."""
ON_GPU = 256
"""So many images are encoded at once on a GPU, or as many as its memory holds."""


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
                self.processor = AutoImageProcessor.from_pretrained(model.folder, backend="pil", **OWN_CODE)
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
        return Preparer(self.processor, self.net.config.model_type, dtype or self.dtype)

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
        with self._precision(), full_convolutions():
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
            return torch.cat([unit(self.net.get_text_features(**self.tokens(part))).cpu() for part in parts])

    def tokens(self, prompts: Sequence[str]) -> Any:
        """SigLIP learnt with texts that are filled up to their full length."""
        config = self.net.config
        room = getattr(config.text_config, "max_position_embeddings", self._tokenizer.model_max_length)
        padding = "max_length" if config.model_type.startswith("siglip") else True
        how: dict[str, Any] = {"padding": padding, "truncation": True, "max_length": room, "return_tensors": "pt"}
        return self._tokenizer(list(prompts), **how).to(self.device)


def given(output: Any) -> Tensor:
    """Features as transformers returns them, in float32."""
    features: Tensor = output if isinstance(output, Tensor) else output.pooler_output
    return features.float()


def unit(output: Any) -> Tensor:
    """The same of unit length."""
    return F.normalize(given(output), dim=-1)


@contextmanager
def full_convolutions() -> Iterator[None]:
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
