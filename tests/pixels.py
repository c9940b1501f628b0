"""A processor of images that any process has at once, where a test is about processes and not about pixels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL.Image import Image
from torch import Tensor

from fedclip_flwr.features.clip import Preparer


class Pixels:
    """A few pixels of each image, as they are."""

    def __init__(self, side: int) -> None:
        self._side = side

    def __call__(self, images: Sequence[Image], return_tensors: str) -> dict[str, Tensor]:
        few = [image.convert("RGB").resize((self._side, self._side)) for image in images]
        return {"pixel_values": torch.tensor([list(image.tobytes()) for image in few])}


PREPARER = Preparer(Pixels(4), "clip", torch.float32)
LARGE = Preparer(Pixels(128), "clip", torch.float32)
"""Of which no socket holds four images: a process that prepares them waits until they are asked for."""
