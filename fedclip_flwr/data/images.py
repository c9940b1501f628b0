"""One image: from its file to RGB, the input of a model.

A file may be hostile: a few bytes can claim more pixels than memory holds.
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
"""The formats that Pillow may try: others start programs (EPS), or are not used in data sets."""
MOST_BYTES = 2**29
"""A larger file is not read as an image."""
MOST_PIXELS = 89_478_485
"""Above this Pillow only warns of a decompression bomb; it raises above twice as many."""
LONGEST = 100
"""The largest ratio of long to short side: a model's processor resizes by the short side first."""
STRIP = 2**22
"""The number of pixels that are put on white at once."""
OUT_OF_MEMORY = "out of memory"
"""Pillow's text for a decoder's error that is not caused by the data."""
SCANNED = 2**31
"""The most pixels of a JPEG times its scans: each scan, even an empty one, covers all pixels. 10 scans are usual."""


def read(path: Path) -> bytes:
    """The file's bytes; empty if it can never be read (`files.PERMANENT`). `ReadError` if it can't be read now."""
    try:
        return files.with_retries(path, lambda: files.read_bytes(path, MOST_BYTES))
    except OSError:
        return b""


def mark(path: Path) -> str:
    """The hash of the image's file; `UNREADABLE` if `read` returns nothing for it."""
    try:
        size = files.with_retries(path, path.stat).st_size
    except OSError:
        return UNREADABLE
    return content.of_file(path) if size <= MOST_BYTES else UNREADABLE


def decoded(data: bytes) -> Image.Image | None:
    """The image upright and in RGB, with white under transparent parts; None if the data are not an image.

    A lack of memory or of open files is raised: the data may still be an image.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if not _reasonable(image, data):
                return None
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
            return _rgb(image)
    except Exception as error:  # decoders raise many types on damaged files
        if isinstance(error, MemoryError) or getattr(error, "errno", None) is not None or OUT_OF_MEMORY in str(error):
            raise
        return None


def known(name: object, data: bytes, hashed: str) -> Image.Image | None:
    """Like `decoded`, but raises if the data lack this hash, under which features are stored."""
    if content.of_bytes(data) != hashed:
        raise changed(name)
    return files.with_retries(name, partial(decoded, data))


def changed(name: object) -> ReadError:
    return ReadError(
        name, "has changed since it was first read", "check that nothing writes to it or removes it, then retry"
    )


def upright(image: Image.Image) -> Image.Image:
    """An open image upright and in RGB, with white under transparent parts."""
    if not isinstance(image, Image.Image):
        raise UserError(
            f"type {type(image).__name__} is not an image: expected a path, a PIL image, a tensor or an array"
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
            raise UserError("pixels outside 0 to 1: expected floats from 0 to 1, or bytes (uint8)")
        pixels = (pixels * 255).round().astype(np.uint8)
    if pixels.dtype != np.uint8:
        raise UserError(f"pixels of type {pixels.dtype}: expected bytes (uint8), or floats from 0 to 1")
    return Image.fromarray(pixels)


def _reasonable(image: Image.Image, data: bytes) -> bool:
    """True if decoding and preparing the image takes a reasonable amount of memory and time."""
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
    """Puts the image on white, strip by strip: a large image is in memory twice already."""
    canvas = Image.new("RGB", image.size)
    rows = max(1, STRIP // image.width)
    for top in range(0, image.height, rows):
        strip = image.crop((0, top, image.width, min(top + rows, image.height))).convert("RGBA")
        white = Image.new("RGBA", strip.size, "white")
        canvas.paste(Image.alpha_composite(white, strip).convert("RGB"), (0, top))
    return canvas


def content_of(rows: Iterable[tuple[int, str]]) -> str:
    """A hash of images, each given as class number and hash of its bytes; names and places do not count."""
    return content.digest(*(f"{label} {mark}" for label, mark in sorted(rows)))


class ImageFiles:
    """The image files of a domain; their order and content hash depend only on images and class numbers."""

    def __init__(self, root: Path, names: Sequence[tuple[str, int]]) -> None:
        """`names` are paths of files below `root`, each with the number of its class."""
        self._root, self._files = root, names
        self._content = self._state = ""
        self._rows: list[tuple[int, str, str]] = []
        self._verified = False

    def __len__(self) -> int:
        return len(self._files)

    @property
    def content(self) -> str:
        """A hash of the images and their class numbers, remembered; it never changes for this object."""
        if not self._content:
            names, numbers = zip(*((name, str(number)) for name, number in self._files), strict=True)
            self._state = content.state_of(self._root, names, *numbers)
            self._content = content.remembered(self._state, self._content_of_rows, content.memory())
        return self._content

    def pictures(self, start: int = 0, stop: int | None = None) -> Iterator[Picture]:
        """Rows `start` to `stop`. Raises if the images do not match `content`, the key of their features."""
        if not self._verified:
            if self.content != self._content_of_rows():
                content.forget(self._state, content.memory())
                raise changed(f"one of the images in {self._root}")
            self._verified = True
        for number, hashed, name in self._rows[start:stop]:
            path = self._root / name
            yield Picture(name, number, None if hashed == UNREADABLE else known(path, read(path), hashed))

    def _content_of_rows(self) -> str:
        """The hash of the files as they are; reads them once."""
        if not self._rows:
            self._rows = sorted((number, mark(self._root / name), name) for name, number in self._files)
        return content_of((number, hashed) for number, hashed, _ in self._rows)


class FileSource:
    """A source of image files below `root`, each as its path, the name of its class, and its domain.

    Class names are those of all domains, in sorted order.
    """

    def __init__(self, root: Path, images: Sequence[tuple[str, str, str]]) -> None:
        self.domains = tuple(sorted({domain for _, _, domain in images}))
        self.class_names = tuple(sorted({label for _, label, _ in images}))
        numbers = {label: number for number, label in enumerate(self.class_names)}
        listed: dict[str, list[tuple[str, int]]] = {}
        for name, label, domain in images:
            listed.setdefault(domain, []).append((name, numbers[label]))
        self._files = {domain: ImageFiles(root, own) for domain, own in listed.items()}

    def content(self, domain: str) -> str:
        """A hash of the images and of their class numbers here."""
        return self._files[domain].content

    def count(self, domain: str) -> int:
        return len(self._files[domain])

    def pictures(self, domain: str, start: int = 0, stop: int | None = None) -> Iterator[Picture]:
        return self._files[domain].pictures(start, stop)
