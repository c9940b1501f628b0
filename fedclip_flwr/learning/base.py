"""The inputs of training: examples, the classes to compare them with, and a module that learns."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Examples(NamedTuple):
    """Images and their class numbers [N].

    Images are features [N, dim] as CLIP gives them; to train a tower pixels in bytes, or what enters its last layers.
    """

    features: Tensor
    labels: Tensor

    def rows(self, rows: Tensor | slice) -> Examples:
        return Examples(self.features[rows], self.labels[rows])

    def ready(self, device: str | torch.device = "cpu") -> Examples:
        """The examples ready for training on the device: features in float32, what towers take unchanged."""
        features = self.features.to(device)
        if features.dim() == 2:
            features = features.float()
        return Examples(features, self.labels.to(device, torch.int64))


class Classes(NamedTuple):
    """The text features of the classes [C, dim], with the logits' scale and bias.

    `numbers` are those that the classes had in the run that a learner comes from, -1 for a new one; None: the same.
    """

    text: Tensor
    scale: float | Tensor
    bias: float | Tensor = 0.0
    numbers: tuple[int, ...] | None = None

    @property
    def dim(self) -> int:
        return self.text.shape[1]

    def logits(self, features: Tensor) -> Tensor:
        return self.scale * features @ self.text.T + self.bias

    def ready(self, device: str | torch.device = "cpu") -> Classes:
        return self._replace(text=F.normalize(self.text.to(device, torch.float32), dim=-1))


class Learner(nn.Module):
    """The module that is trained and sent: its state is exactly the tensors that travel.

    It maps features (an adapter), or what a tower takes, to features of unit length. `blend` is the share of what is
    learnt, for learners that have one.
    """

    blend: float = 1.0

    @property
    def frozen(self) -> dict[str, Tensor]:
        """Tensors that are a part of what is learnt, but not trained; on the CPU."""
        return {}

    def against(self, classes: Classes) -> Classes:
        """The classes to compare its features with; an adapter returns them unchanged."""
        return classes

    def logits(self, features: Tensor, classes: Classes) -> Tensor:
        return self.against(classes).logits(self(features))

    def on_cpu(self) -> dict[str, Tensor]:
        """A copy of its state on the CPU, whatever its own device is: states travel from there."""
        return {name: tensor.to("cpu", copy=True) for name, tensor in self.state_dict().items()}
