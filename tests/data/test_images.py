from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fedclip_flwr.data.images import content_of, decoded


def stored(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def pixels(data: bytes) -> list[list[list[int]]]:
    image = decoded(data)
    assert image is not None
    assert image.mode == "RGB"
    values: list[list[list[int]]] = np.asarray(image).tolist()
    return values


GREY = [[[0] * 3, [255] * 3], [[128] * 3, [1] * 3]]


@pytest.mark.parametrize(("kind", "dtype"), [("PNG", np.uint16), ("TIFF", np.uint16), ("TIFF", np.int32)])
def test_16_bits_are_scaled_to_8(kind: str, dtype: type) -> None:
    image = Image.fromarray(np.array([[0, 65535], [32768, 256]], dtype))
    assert pixels(stored(image, kind)) == GREY


def test_grey_becomes_rgb() -> None:
    assert pixels(stored(Image.fromarray(np.array([[0, 255], [128, 1]], np.uint8)), "PNG")) == GREY


@pytest.mark.parametrize(
    ("mode", "colour", "kind", "options", "expected"),
    [
        ("RGBA", (255, 0, 0, 255), "PNG", {}, (255, 0, 0)),
        ("RGBA", (0, 0, 0, 0), "PNG", {}, (255, 255, 255)),
        ("RGBA", (255, 0, 0, 128), "WEBP", {"lossless": True}, (255, 127, 127)),
        ("LA", (0, 0), "PNG", {}, (255, 255, 255)),
        ("P", 0, "PNG", {"transparency": 0}, (255, 255, 255)),
        ("1", 1, "PNG", {}, (255, 255, 255)),
        ("CMYK", (0, 0, 0, 0), "JPEG", {}, (255, 255, 255)),
        ("RGB", (10, 20, 30), "WEBP", {"lossless": True}, (10, 20, 30)),
    ],
)
def test_what_is_transparent_lies_on_white(
    mode: str, colour: Any, kind: str, options: dict[str, Any], expected: tuple[int, int, int]
) -> None:
    assert pixels(stored(Image.new(mode, (2, 2), colour), kind, **options)) == [[list(expected)] * 2] * 2


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "PNG", "TIFF"])
def test_images_come_upright(kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    image = decoded(stored(Image.new("L", (8, 4)), kind, exif=exif))
    assert image is not None
    assert (image.mode, image.size) == ("RGB", (4, 8))


@pytest.mark.parametrize("data", [b"", b"no picture", stored(Image.new("RGB", (64, 64), "red"), "PNG")[:60]])
def test_what_cannot_be_read_is_none(data: bytes) -> None:
    assert decoded(data) is None


def test_the_content_does_not_depend_on_the_order() -> None:
    assert content_of([(0, "a"), (1, "b")]) == content_of([(1, "b"), (0, "a")])
    assert content_of([(0, "a"), (1, "b")]) != content_of([(1, "a"), (0, "b")])
