from __future__ import annotations

import errno
import io
import os
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image, ImageFile

from fedclip_flwr.base.errors import ReadError
from fedclip_flwr.data import images
from fedclip_flwr.data.images import content_of, decoded, mark, read
from tests.failing import failing


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


@pytest.mark.parametrize(("mode", "options"), [("RGBA", {}), ("LA", {}), ("P", {"transparency": 3})])
def test_strips_make_no_difference(mode: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    noise = np.random.default_rng(0).bytes(9 * 7 * len(mode.replace("P", "x")))
    image = Image.frombytes(mode, (9, 7), noise)
    if mode == "P":
        image.putpalette(list(range(256)) * 3)
    data = stored(image, "PNG", **options)
    loaded = Image.open(io.BytesIO(data)).convert("RGBA")
    expected = Image.alpha_composite(Image.new("RGBA", (9, 7), "white"), loaded).convert("RGB")
    for pixels_at_once in (1, 20, 2**22):
        monkeypatch.setattr(images, "STRIP", pixels_at_once)
        assert pixels(data) == np.asarray(expected).tolist()


PEAK = """
import io, re, sys
from pathlib import Path
from PIL import Image
from fedclip_flwr.data.images import decoded
def memory(what):
    return 1024 * int(re.search(what + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
file = io.BytesIO()
Image.new(sys.argv[1], (5000, 6000)).save(file, "PNG", compress_level=1)
Path("/proc/self/clear_refs").write_text("5")
before = memory("VmRSS")
assert decoded(file.getvalue()).size == (5000, 6000)
print((memory("VmHWM") - before) / 3e7)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs /proc")
@pytest.mark.parametrize(("mode", "most"), [("RGB", 5), ("RGBA", 12)])
def test_a_large_image_is_in_memory_once_and_a_transparent_one_twice(mode: str, most: float) -> None:
    """Pillow uses four bytes per pixel, and strips use some more."""
    assert float(subprocess.check_output([sys.executable, "-c", PEAK, mode])) < most


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


LACKS = [MemoryError(), OSError(errno.EMFILE, "Too many open files"), ImageFile._get_oserror(-9, encoder=False)]


@pytest.mark.parametrize("error", LACKS)
def test_what_the_machine_lacks_makes_no_image_a_broken_one(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    data = stored(Image.new("RGB", (4, 4)), "BMP")

    def lacks(*_: object) -> None:
        raise error

    monkeypatch.setattr(ImageFile.ImageFile, "load", lacks)
    with pytest.raises(type(error)):
        decoded(data)


def png(width: int, height: int) -> bytes:
    """All black, in a thousandth of its size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    head = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([1, 0, 0, 0, 0])
    rows = zlib.compress(bytes(height * (1 + -(-width // 8))))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@pytest.mark.parametrize(("size", "read"), [((300, 3), True), ((20_000, 20_000), False), ((9_500, 9_500), False)])
def test_an_image_of_more_pixels_than_memory_holds_is_left_out(size: tuple[int, int], read: bool) -> None:
    data = png(*size)
    assert len(data) < 2**16
    assert (decoded(data) is not None) == read


@pytest.mark.parametrize("size", [(1, 101), (2_020, 20), (1, 60_000)])
def test_an_image_that_would_be_huge_once_its_short_side_fits_is_left_out(size: tuple[int, int]) -> None:
    assert decoded(png(*size)) is None
    assert decoded(png(min(size), 100 * min(size))) is not None


def test_an_image_that_is_drawn_over_without_end_is_left_out() -> None:
    complete = stored(Image.new("RGB", (64, 64), "red"), "JPEG", progressive=True)
    scan = complete[complete.rindex(b"\xff\xda") : -2]
    assert decoded(complete[:-2] + scan * 100 + complete[-2:]) is not None
    assert decoded(complete[:-2] + scan * 3000 + complete[-2:]) is None


def test_no_program_is_started_for_an_image(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a program was started"))
    monkeypatch.setattr("shutil.which", lambda _: "/bin/true")  # as if there were a Ghostscript
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", "/bin/true")
    postscript = io.BytesIO()
    Image.new("RGB", (4, 4)).save(postscript, "EPS")
    assert decoded(postscript.getvalue()) is None


def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "zeros.png").symlink_to("/dev/zero")
    (tmp_path / "loop.png").symlink_to("loop.png")
    with (tmp_path / "sparse.png").open("wb") as file:
        file.truncate(2**40)
    for path in tmp_path.iterdir():
        assert (read(path), mark(path)) == (b"", "unreadable")


def test_a_file_that_cannot_be_read_now_is_not_one_without_an_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.png").write_bytes(b"x")
    failing(monkeypatch, "a.png", OSError(errno.EIO, "Input/output error"), times=6)
    for look in (read, mark):
        with pytest.raises(ReadError, match=r"a.png can't be read now \(Input/output error\)"):
            look(tmp_path / "a.png")
    assert read(tmp_path / "a.png") == b"x"


def test_the_content_does_not_depend_on_the_order() -> None:
    assert content_of([(0, "a"), (1, "b")]) == content_of([(1, "b"), (0, "a")])
    assert content_of([(0, "a"), (1, "b")]) != content_of([(1, "a"), (0, "b")])
