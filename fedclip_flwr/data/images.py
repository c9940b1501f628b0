"""One image: from its file to RGB as a model takes it.

Whoever made the file may wish us ill: a few bytes can claim to be more pixels than memory holds.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from fedclip_flwr.base import UserError, content, files
from fedclip_flwr.base.content import UNREADABLE
from fedclip_flwr.base.errors import ReadError
from fedclip_flwr.data.base import Picture

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
"""What Pillow may take it for: others start programs (EPS), or are nothing that images of data sets are kept in."""
MOST_BYTES = 2**29
"""A larger file is no image."""
MOST_PIXELS = 89_478_485
"""From there on Pillow takes an image for a bomb, but goes on up to twice as many."""
LONGEST = 100
"""So many times as long as wide: a model's processor would make the short side fit first."""
STRIP = 2**22
"""So many pixels at once are put on white."""
OUT_OF_MEMORY = "out of memory"
"""How Pillow tells of a decoder's error that is not the data's."""
SCANNED = 2**31
"""Pixels of a JPEG, times its scans: each is drawn over all of it, also if there is nothing in it. Usual are 10."""


def read(path: Path) -> bytes:
    """The image's file; nothing if there is none to read (`content.LASTING`). `ReadError` if it can't be read now."""
    try:
        return files.patiently(path, lambda: files.read_bytes(path, MOST_BYTES))
    except OSError:
        return b""


def mark(path: Path) -> str:
    """The hash of the image's file; the same word for all of which `read` gives nothing."""
    try:
        size = files.patiently(path, path.stat).st_size
    except OSError:
        return UNREADABLE
    return content.of_file(path) if size <= MOST_BYTES else UNREADABLE


def decoded(data: bytes) -> Image.Image | None:
    """The image upright and in RGB, what is transparent on white; None if that is no image.

    What the machine lacks (memory, open files) is raised: the data may be those of an image all the same.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if not _reasonable(image, data):
                return None
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
            return _rgb(image)
    except Exception as error:  # decoders raise whatever they like on damaged files
        if isinstance(error, MemoryError) or getattr(error, "errno", None) is not None or OUT_OF_MEMORY in str(error):
            raise
        return None


def known(name: object, data: bytes, hashed: str) -> Image.Image | None:
    """The same of data that had that hash when they were looked at: what is made of them is stored under it."""
    if content.of_bytes(data) != hashed:
        raise changed(name)
    return files.patiently(name, partial(decoded, data))


def changed(name: object) -> ReadError:
    return ReadError(
        name, "is not what it was a while ago", "see that it is there and that nobody writes to it, then try again"
    )


def upright(image: Image.Image) -> Image.Image:
    """An opened image upright and in RGB, what is transparent on white."""
    if not isinstance(image, Image.Image):
        raise UserError(
            f"something of type {type(image).__name__} is no image: expected a path, a PIL image, a tensor or an array"
        )
    try:
        return _rgb(ImageOps.exif_transpose(image))
    except OSError as error:
        raise UserError(f"an image can't be read ({error})") from None


def of_pixels(pixels: np.ndarray[Any, Any]) -> Image.Image:
    """The image with these pixels [height, width, 3], in bytes or from 0 to 1."""
    if pixels.ndim != 3 or pixels.shape[2] != 3 or not pixels.size:
        raise UserError(
            f"pixels of shape {pixels.shape}: expected colours last, [height, width, 3], or first in a tensor, "
            "[3, height, width]"
        )
    if pixels.dtype.kind == "f":
        if not (pixels >= 0).all() or pixels.max() > 1:
            raise UserError("pixels that are not all from 0 to 1: expected shares from 0 to 1, or bytes")
        pixels = (pixels * 255).round().astype(np.uint8)
    if pixels.dtype != np.uint8:
        raise UserError(f"pixels of type {pixels.dtype}: expected bytes (uint8), or numbers from 0 to 1")
    return Image.fromarray(pixels)


def _reasonable(image: Image.Image, data: bytes) -> bool:
    """Whether memory and time would do for the image, and for what is done with it."""
    short, long = sorted(image.size)
    if long * short > MOST_PIXELS or long > LONGEST * short:
        return False
    return image.format not in ("JPEG", "MPO") or data.count(b"\xff\xda") * max(long * short, 2**20) <= SCANNED


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits a pixel, also where Pillow keeps them in 32: scaled, not cut off
        pixels = np.asarray(image).clip(0, 0xFFFF)
        image = Image.fromarray((pixels >> 8).astype(np.uint8))
    if image.has_transparency_data:
        return _on_white(image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _on_white(image: Image.Image) -> Image.Image:
    """What is transparent as white; strip by strip, for a large image is in memory twice as it is."""
    whole = Image.new("RGB", image.size)
    rows = max(1, STRIP // image.width)
    for top in range(0, image.height, rows):
        strip = image.crop((0, top, image.width, min(top + rows, image.height))).convert("RGBA")
        white = Image.new("RGBA", strip.size, "white")
        whole.paste(Image.alpha_composite(white, strip).convert("RGB"), (0, top))
    return whole


def content_of(rows: Iterable[tuple[int, str]]) -> str:
    """The hash of images, given by class number and hash of the bytes: whatever their names and places are."""
    return content.digest(*(f"{label} {mark}" for label, mark in sorted(rows)))


class ImageFiles:
    """The image files of a domain: their order and their content follow from images and class numbers alone."""

    def __init__(self, root: Path, names: Sequence[tuple[str, int]]) -> None:
        """`names` are those of files below `root`, each with the number of its class."""
        self._root, self._files = root, names
        self._content = self._state = ""
        self._rows: list[tuple[int, str, str]] = []
        self._fit = False

    def __len__(self) -> int:
        return len(self._files)

    @property
    def content(self) -> str:
        """The hash of the images and their class numbers, remembered; it stays the same as long as this object does."""
        if not self._content:
            names, numbers = zip(*((name, str(number)) for name, number in self._files), strict=True)
            self._state = content.state_of(self._root, names, *numbers)
            self._content = content.remembered(self._state, self._content_of_rows, content.memory())
        return self._content

    def pictures(self, start: int = 0, stop: int | None = None) -> Iterator[Picture]:
        """Those rows. Raises if they are no longer those that `content` is of: it is what they are stored under."""
        if not self._fit:
            if self.content != self._content_of_rows():
                content.forget(self._state, content.memory())
                raise changed(f"one of the images in {self._root}")
            self._fit = True
        for number, hashed, name in self._rows[start:stop]:
            path = self._root / name
            yield Picture(name, number, None if hashed == UNREADABLE else known(path, read(path), hashed))

    def _content_of_rows(self) -> str:
        """The files are read for it once."""
        if not self._rows:
            self._rows = sorted((number, mark(self._root / name), name) for name, number in self._files)
        return content_of((number, hashed) for number, hashed, _ in self._rows)
