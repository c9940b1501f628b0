"""One image: from its bytes to RGB as a model takes it."""

from __future__ import annotations

import io
from collections.abc import Iterable

import numpy as np
from PIL import Image, ImageOps

from fedclip_flwr import content


def decoded(data: bytes) -> Image.Image | None:
    """The image upright and in RGB, what is transparent on white; None if it can't be read."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            return _rgb(ImageOps.exif_transpose(image))
    except Exception:  # decoders raise whatever they like on damaged files
        return None


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits a pixel, also where Pillow keeps them in 32: scaled, not cut off
        pixels = np.asarray(image).astype(np.int64).clip(0, 0xFFFF) >> 8
        image = Image.fromarray(pixels.astype(np.uint8))
    if image.has_transparency_data:
        whole = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), whole)
    return image.convert("RGB")


def content_of(rows: Iterable[tuple[int, str]]) -> str:
    """The hash of images, given by class number and hash of the bytes: whatever their names and places are."""
    return content.digest(*(f"{label} {mark}" for label, mark in sorted(rows)))
