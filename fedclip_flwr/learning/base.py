"""What training works on: examples, the classes to compare them with, and a module that learns."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Examples(NamedTuple):
    """Images and the numbers of their classes [N].

    Images are features [N, dim] as CLIP gives them, or pixels [N, 3, height, width] in bytes.
    """

    features: Tensor
    labels: Tensor

    def rows(self, rows: Tensor | slice) -> Examples:
        return Examples(self.features[rows], self.labels[rows])

    def ready(self, device: str | torch.device = "cpu") -> Examples:
        """As learning takes them, on the device: features in float32, pixels as they are."""
        features = self.features.to(device)
        if features.dtype != torch.uint8:
            features = features.float()
        return Examples(features, self.labels.to(device, torch.int64))


class Classes(NamedTuple):
    """What images are compared with: a feature for each class [C, dim], the logits' scale and bias."""

    text: Tensor
    scale: float | Tensor
    bias: float | Tensor = 0.0

    @property
    def dim(self) -> int:
        return self.text.shape[1]

    def logits(self, features: Tensor) -> Tensor:
        return self.scale * features @ self.text.T + self.bias

    def ready(self, device: str | torch.device = "cpu") -> Classes:
        return self._replace(text=F.normalize(self.text.to(device, torch.float32), dim=-1))


class Learner(nn.Module):
    """What is trained and sent: its state is exactly the tensors that travel. Called, it gives features of unit length.

    It takes features (an adapter) or pixels (the whole model).
    """

    def against(self, classes: Classes) -> Classes:
        """What its features are compared with; an adapter changes nothing there."""
        return classes

    def on_cpu(self) -> dict[str, Tensor]:
        """A copy of its state as states travel: there, wherever it computes."""
        return {name: tensor.to("cpu", copy=True) for name, tensor in self.state_dict().items()}
