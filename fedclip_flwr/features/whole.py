"""A trainable whole CLIP, for the method `full-model`."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fedclip_flwr.features.clip import PART, Clip, full_convolutions, unit
from fedclip_flwr.features.pixels import Unpacking
from fedclip_flwr.learning import Classes, Learner


class WholeModel(Learner):
    """A trainable CLIP. Takes uint8 pixels as a `Preparer` makes them, and computes its own class features.

    Weights are float32; computation uses `dtype`.
    """

    def __init__(self, net: Any, processor: Any, tokens: Mapping[str, Tensor], templates: int, dtype: torch.dtype):
        super().__init__()
        self.net = net.float().requires_grad_(True)
        self._templates, self._dtype = templates, dtype
        self.unpack = Unpacking(processor)
        for name, tensor in tokens.items():
            self.register_buffer(name, tensor, persistent=False)  # moves to the device too, but is not sent
        self._tokens = tuple(tokens)

    @classmethod
    def copy_of(
        cls, loaded: Clip, prompts: Sequence[str], templates: int = 1, dtype: torch.dtype = torch.float32
    ) -> WholeModel:
        """A trainable copy. Prompts are those of all classes in the first template, then in the next."""
        net = copy.deepcopy(loaded.net).to(memory_format=torch.contiguous_format)  # as tensors are sent
        return cls(net, loaded.processor, loaded.tokens(prompts), templates, dtype)

    def forward(self, pixels: Tensor) -> Tensor:
        """The features of the images, computed in parts, so that any number fits into memory."""
        return torch.cat([self._features(part) for part in torch.split(pixels, PART)])

    def _features(self, pixels: Tensor) -> Tensor:
        with self._precision(), full_convolutions():
            return unit(self.net.get_image_features(**self.unpack(pixels)))

    def against(self, classes: Classes) -> Classes:
        """The model's own class features, scale and bias; the frozen model's `classes` are ignored."""
        with self._precision():
            features = unit(self.net.get_text_features(**{name: getattr(self, name) for name in self._tokens}))
        text = F.normalize(features.view(self._templates, -1, features.shape[1]).mean(0), dim=-1)
        bias = getattr(self.net, "logit_bias", None)
        return Classes(text, self.net.logit_scale.exp(), 0.0 if bias is None else bias)

    def _precision(self) -> torch.autocast:
        return torch.autocast(self.unpack.factor.device.type, self._dtype, enabled=self._dtype != torch.float32)
