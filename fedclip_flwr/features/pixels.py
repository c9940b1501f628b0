"""Images as bytes, as the store keeps them for methods that train a tower, and back to the model's inputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fedclip_flwr.base import UserError

Inputs = dict[str, Tensor]
"""Preprocessed images: the model's inputs by name."""
VALUES, MASK, SHAPES = "pixel_values", "pixel_attention_mask", "spatial_shapes"
UNSCALED = {"do_rescale": False, "do_normalize": False}
"""Options of an image processor that keep bytes."""


def packed(inputs: Inputs, model_type: str) -> Tensor:
    """One tensor of bytes from what a processor makes with `UNSCALED`.

    Images are [N, 3, height, width]. Of a model that takes patches (SigLIP 2 with any shape of image) they are [N,
    patches, values + 3]: each patch has a mask, and the image's height and width in patches, too.
    """
    values = inputs[VALUES]
    if values.dim() == 3 and {MASK, SHAPES} <= inputs.keys() and int(inputs[SHAPES].max()) < 256:
        shapes = inputs[SHAPES][:, None].expand(-1, values.shape[1], -1)
        values = torch.cat([values, inputs[MASK][..., None].to(values), shapes.to(values)], dim=-1)
    elif values.dim() != 4:
        raise UserError(f"the images of {model_type} can't be stored as pixels: use method = 'adapter' with this model")
    if values.dtype != torch.uint8:
        values = values.round().clamp(0, 255).byte()
    return values


class Unpacking(nn.Module):
    """From packed bytes to the model's inputs: scaled and normalized on the model's device."""

    factor: Tensor
    shift: Tensor

    def __init__(self, processor: Any) -> None:
        super().__init__()
        scale = processor.rescale_factor if processor.do_rescale else 1.0
        mean, std = (processor.image_mean, processor.image_std) if processor.do_normalize else ((0.0,) * 3, (1.0,) * 3)
        # moves to the device too, but is not sent
        self.register_buffer("factor", scale / torch.tensor(std), persistent=False)
        self.register_buffer("shift", torch.tensor(mean) / torch.tensor(std), persistent=False)

    def forward(self, pixels: Tensor) -> Inputs:
        if pixels.dim() == 4:
            return {VALUES: pixels * self.factor.view(3, 1, 1) - self.shift.view(3, 1, 1)}
        values, mask, shapes = pixels[..., :-3], pixels[..., -3], pixels[:, 0, -2:]
        colours = values.shape[-1] // 3  # a patch's pixels, with the three values of each side by side
        scaled = values * self.factor.repeat(colours) - self.shift.repeat(colours)
        return {VALUES: scaled * mask[..., None], MASK: mask.to(torch.int32), SHAPES: shapes.long()}
