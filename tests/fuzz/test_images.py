"""Image files and folders of strangers."""

from __future__ import annotations

import contextlib
import io
import os
import random
import shutil
import socket
import struct
import warnings
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageSequence

from fedclip_flwr.data import images
from fedclip_flwr.data.base import Source
from fedclip_flwr.data.opening import open_source
from fedclip_flwr.features.ahead import Work
from fedclip_flwr.features.clip import Inputs
from tests.fuzz.hostile import Tried, assert_plain, mangled

GROWTH = 3 * 2**29
"""The largest image that is read takes 1.4 GiB while it is decoded, if it is a WEBP."""
MODES = {
    "PNG": ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"],
    "JPEG": ["L", "RGB", "CMYK"],
    "GIF": ["L", "P"],
    "BMP": ["1", "L", "P", "RGB", "RGBA"],
    "WEBP": ["RGB", "RGBA"],
    "TIFF": ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "F"],
}


def stored(kind: str, mode: str, size: tuple[int, int] = (9, 7), **options: Any) -> bytes:
    chance = random.Random(f"{kind} {mode}")
    many = len(Image.new(mode, size).tobytes())
    image = Image.frombytes(mode, size, chance.randbytes(many))
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def exif(orientation: int) -> Image.Exif:
    found = Image.Exif()
    found[0x0112] = orientation
    return found


def frames(kind: str) -> bytes:
    first, *others = (Image.new("RGB", (8, 8), colour) for colour in ("red", "green", "blue"))
    file = io.BytesIO()
    first.save(file, kind, save_all=True, append_images=others)
    return file.getvalue()


WHOLE = [stored(kind, mode) for kind, modes in MODES.items() for mode in modes]
WHOLE += [stored(kind, "RGB", exif=exif(turn)) for kind in ("JPEG", "PNG", "WEBP", "TIFF") for turn in (6, 9, 65535)]
WHOLE += [stored("JPEG", "RGB", progressive=True), stored("WEBP", "RGBA", lossless=True)]
WHOLE += [stored("TIFF", "RGB", compression=how) for how in ("tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg")]
WHOLE += [stored("TIFF", "1", compression="group4"), stored("PNG", "P", transparency=3)]
WHOLE += [frames(kind) for kind in ("GIF", "WEBP", "TIFF", "PNG")]
JUNK = [
    b"",
    b"\0",
    b"\x89PNG\r\n\x1a\n",
    b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
    b"GIF89a",
    b"BM",
    b"II*\0",
]
JUNK += [
    b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    b"RIFF\xff\xff\xff\xffWEBPVP8 ",
    b"\xff\xd8\xff",
    b"P6 9 9 255\n",
]


def chunk(kind: bytes, data: bytes) -> bytes:
    return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")


def png(width: int, height: int, body: bytes = b"", depth: int = 8, colour: int = 0, more: bytes = b"") -> bytes:
    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + more + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def squeezed(count: int) -> bytes:
    """So many zeros in a thousandth of the bytes."""
    packer = zlib.compressobj(9)
    piece = bytes(2**20)
    return b"".join(packer.compress(piece[: min(2**20, count - at)]) for at in range(0, count, 2**20)) + packer.flush()


@st.composite
def pngs(draw: st.DrawFn) -> bytes:
    """With checksums that are right."""
    sizes = st.sampled_from([0, 1, 2, 9, 20_000, 65_535, 2**31 - 1, 2**31, 2**32 - 1])
    more = b""
    for kind in draw(
        st.lists(st.sampled_from([b"tEXt", b"zTXt", b"iTXt", b"iCCP", b"eXIf", b"tRNS", b"PLTE", b"acTL"]), max_size=3)
    ):
        head = {b"zTXt": b"a\0\0", b"iCCP": b"a\0\0", b"iTXt": b"a\0\1\0\0\0"}.get(kind, b"")
        more += chunk(
            kind, head + draw(st.sampled_from([BOMB, b"", b"II*\0\x08\0\0\0\xff\xff"]) | st.binary(max_size=20))
        )
    depth, colour = draw(st.sampled_from([1, 2, 4, 8, 16, 3])), draw(st.sampled_from([0, 2, 3, 4, 6, 5]))
    body = draw(st.sampled_from([BOMB, zlib.compress(bytes(600)), b""]) | st.binary(max_size=20))
    return png(draw(sizes), draw(sizes), body, depth, colour, more)


BOMB = squeezed(2**25)


@st.composite
def tiffs(draw: st.DrawFn) -> bytes:
    """Directories whose entries tell whatever they like."""
    known = [
        256,
        257,
        258,
        259,
        262,
        273,
        274,
        277,
        278,
        279,
        282,
        284,
        317,
        320,
        322,
        323,
        324,
        325,
        338,
        339,
        347,
        34665,
    ]
    usual = {256: 9, 257: 9, 258: 8, 259: 1, 262: 1, 273: 8, 277: 1, 278: 9, 279: 81}
    entries = {tag: (4, 1, value) for tag, value in usual.items()}
    numbers = st.sampled_from([0, 1, 2, 5, 7, 8, 9, 16, 32, 81, 20_000, 60_000, 65_535, 2**31 - 1, 2**32 - 1])
    for tag in draw(st.lists(st.sampled_from(known), max_size=6)):
        entries[tag] = draw(st.sampled_from([1, 2, 3, 4, 5, 7, 12])), draw(numbers), draw(numbers)
        if draw(st.booleans()):
            entries[tag] = (4, 1, entries[tag][2])
    table = b"".join(struct.pack("<HHII", tag, *entry) for tag, entry in sorted(entries.items()))
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + table + bytes(4) + bytes(81)


FILES = st.one_of(
    st.sampled_from(WHOLE),
    st.sampled_from(WHOLE).flatmap(mangled),
    pngs(),
    tiffs(),
    st.sampled_from(JUNK),
    st.binary(max_size=60),
)


def assert_reasonable(image: Image.Image | None) -> None:
    if image is not None:
        assert image.mode == "RGB"
        assert 0 < image.width * image.height <= images.MOST_PIXELS
        assert len(np.asarray(image).shape) == 3


@given(data=FILES)
def test_files(tried: Tried, data: bytes) -> None:
    with tried.one(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image = images.decoded(data)
        tried.refused += image is None
        assert_reasonable(image)


@pytest.mark.parametrize("data", WHOLE)
def test_complete_ones_are_read(data: bytes) -> None:
    assert images.decoded(data) is not None


def prepare(found: Sequence[Image.Image]) -> Inputs:
    return {"pixel_values": torch.tensor([image.size for image in found])}


NAMES = [
    b"a.png",
    b"b.PNG",
    b"c.jpg",
    b"d.tiff",
    b"e.txt",
    b"f",
    b".g.png",
    b"h\n\x1b[2J.png",
    b"i\xff\xfe.png",
    b"\xc3\xbc.png",
]
NAMES += [b"j" * 250 + b".png", b"k .gif", b"-l.png", b"m\xe2\x80\xae.bmp", b"\xf0\x9f\x98\x80.webp"]
FOLDERS = [b"cat", b"dog", b"fire truck", b"\xc3\xbc", b"x" * 255, b"a|b", b"{}", b"%s"]
ODD_FOLDERS = [b"\xff\xfe", b"a\nb", b"\x1b[2J", b" ", b".hidden", b"__MACOSX", b"u\xe2\x80\xae"]
KINDS = [
    "whole",
    "whole",
    "mangled",
    "empty",
    "loop",
    "nowhere",
    "above",
    "pipe",
    "socket",
    "zeros",
    "random",
    "folder",
    "sparse",
]


def put(path: bytes, kind: str, data: bytes) -> None:
    """Whatever the kind says, in the place of an image."""
    if kind == "loop":
        os.symlink(os.path.basename(path), path)
    elif kind in ("nowhere", "above", "zeros", "random"):
        os.symlink(
            {"nowhere": b"nothing", "above": b"..", "zeros": b"/dev/zero", "random": b"/dev/urandom"}[kind], path
        )
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as one, contextlib.suppress(OSError):  # its name may be too long for one
            one.bind(path)
    elif kind == "folder":
        os.mkdir(path)
    else:
        with open(path, "wb") as file:
            file.write(b"" if kind == "empty" else data)
            if kind == "sparse":
                file.truncate(2**34)


@st.composite
def trees(draw: st.DrawFn, root: bytes) -> bytes:
    """A tree of a few files, of which most are something else."""
    deep = draw(st.booleans())
    for _ in range(draw(st.integers(1, 8))):
        names = st.sampled_from(FOLDERS * 3 + ODD_FOLDERS) if draw(st.integers(0, 3)) == 0 else st.sampled_from(FOLDERS)
        parts = [draw(names) for _ in range(2 if deep else 1)]
        place = os.path.join(root, *parts)
        path = os.path.join(place, draw(st.sampled_from(NAMES)))
        kind, data = draw(st.sampled_from(KINDS)), draw(st.sampled_from(WHOLE) | FILES)
        to = draw(st.sampled_from([root, place, os.path.dirname(place), b".", b"..", b"nowhere"]))
        link = os.path.join(root, *parts[: draw(st.integers(0, 2))], draw(st.sampled_from(FOLDERS)))
        with contextlib.suppress(OSError):  # there may be something else by now
            os.makedirs(place, exist_ok=True)
            if not os.path.lexists(path):
                put(path, kind, data)
            if draw(st.integers(0, 5)) == 0:
                os.symlink(to, link)
    return root


@given(data=st.data())
def test_folders(tmp_path: Path, tried: Tried, monkeypatch: pytest.MonkeyPatch, data: st.DataObject) -> None:
    monkeypatch.setenv("FEDCLIP_HOME", str(tmp_path / "home"))
    root = tmp_path / "images"
    root.mkdir()
    try:
        data.draw(trees(os.fsencode(root)))
        with tried.one(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            source, _ = open_source(f"folder:{root}")
            assert_all_counted(source)
    finally:
        shutil.rmtree(root)


def assert_all_counted(source: Source) -> None:
    """Each image of each domain is there or named as broken."""
    assert len(source.class_names) >= 2
    for name in (*source.domains, *source.class_names):
        assert_plain(name)
    own: Any = prepare  # in the place of a model's
    for domain in source.domains:
        assert len(source.content(domain)) == 32
        work = Work(source, domain, own, 3)
        batches = [work.batch(start) for start in range(0, source.count(domain), 3)]
        assert sum(batch.rows for batch in batches) == source.count(domain)
        assert all(len(batch.inputs.get("pixel_values", [])) == len(batch.labels) for batch in batches)


def test_every_frame_that_is_made_here_is_one() -> None:
    """The animations above have several frames, of which the first is the image."""
    for kind in ("GIF", "WEBP", "TIFF", "PNG"):
        with Image.open(io.BytesIO(frames(kind))) as image:
            assert len(list(ImageSequence.Iterator(image))) == 3
