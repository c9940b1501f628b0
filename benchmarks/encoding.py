"""How fast encoding is, beside a bare loop of `get_image_features`.

    python -m benchmarks.encoding [--turns 7]

A CLIP ViT-B/32 with random weights (the time is the same). First both encode the same prepared pixels in turns, in the
same batches and precision: the share is the median over the turns. Then images are encoded from JPEG files, without
and with a worker process. To reach: a share of at least 0.95; bfloat16, where the CPU has it, 2.5 times float32.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from benchmarks.common import at_least, workplace
from fedclip_flwr.base.growing import Growing
from fedclip_flwr.data.drawn import CLASSES, picture
from fedclip_flwr.data.folder import ImageFolder
from fedclip_flwr.features import Clip, ahead, clip, encoding, models
from harness.machine import machine, table

BATCHES, IMAGES = 1, 128
SIZE = (500, 375)


def write_model(folder: Path, **config: Any) -> models.Model:
    """A CLIP with random weights: of ViT-B/32's size, or as its configuration says."""
    from transformers import AutoTokenizer, CLIPConfig, CLIPImageProcessor, CLIPModel  # not for --help: it has words

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(models.BUNDLED)
    CLIPModel(CLIPConfig(**config)).save_pretrained(folder)
    CLIPImageProcessor().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return models.find(str(folder))


def write_images(folder: Path) -> None:
    for number in range(IMAGES):
        figure = CLASSES[number % len(CLASSES)]
        (folder / figure).mkdir(parents=True, exist_ok=True)
        image = picture(1, "photo", figure, number)[0].resize(SIZE, Image.Resampling.BICUBIC)
        image.save(folder / figure / f"{number}.jpg", quality=90)


def seconds(work: Callable[[], object]) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def beside_the_bare_loop(loaded: clip.Clip, root: Path, turns: int) -> tuple[float, float, float]:
    """Images a second of the bare loop and of ours, and the median share."""
    count = BATCHES * loaded.batch_size
    pixels = torch.randn(count, 3, 224, 224).to(loaded.dtype)
    net: Any = loaded.net

    def bare() -> None:
        with torch.no_grad():
            for part in torch.split(pixels, loaded.batch_size):
                net.get_image_features(pixel_values=part)

    def ours() -> None:
        with Growing(root / f"{time.time_ns()}.safetensors", count) as growing:
            for part in torch.split(pixels, loaded.batch_size):
                growing.append(loaded.encode({"pixel_values": part}), [0] * len(part), [])
            growing.finish()

    bare()
    ours()
    found = [(seconds(bare), seconds(ours)) for _ in range(turns)]
    share = statistics.median(one / other for one, other in found)
    return (*(count / statistics.median(times) for times in zip(*found, strict=True)), share)


def from_files(loaded: clip.Clip, images: Path, root: Path, workers: int) -> float:
    """Images a second from JPEG files to the finished entry, the start of workers included."""
    source = ImageFolder(images)
    work = ahead.Work(source, source.domains[0], loaded.preparer(), loaded.batch_size)
    ahead.workers = lambda *_: workers

    def encode() -> None:
        with Growing(root / f"{time.time_ns()}.safetensors", IMAGES) as growing:
            encoding.encode(growing, work, loaded.encode, lambda: torch.empty(0, 512), progress=False)
            growing.finish()

    return IMAGES / seconds(encode)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.encoding", description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=at_least(1), default=7)
    given = parser.parse_args()
    with workplace() as root:
        model = write_model(root / "model")
        write_images(root / "images")
        rows, speeds = [], []
        for precision in ("float32", "bfloat16"):
            if precision == "bfloat16" and not models.has_bfloat16():
                rows.append([precision, "this CPU has no instructions for it", "", "", ""])
                continue
            loaded = Clip(model, "cpu", precision)
            bare, ours, share = beside_the_bare_loop(loaded, root, given.turns)
            speeds.append(ours)
            of_float32 = f"{ours / speeds[0]:.2f}"
            rows.append([precision, f"{bare:.1f}", f"{ours:.1f}", f"{share:.3f}", of_float32])
        print(table(["ViT-B/32", "bare loop, images/s", "ours", "share", "of float32"], rows))
        loaded = Clip(model, "cpu", "float32")
        files = [
            [f"with {workers or 'no'} worker{'s' * (workers != 1)}", f"{speed:.1f}"]
            for workers in (0, 1)
            for speed in [from_files(loaded, root / "images", root, workers)]
        ]
        print("\n" + table([f"{IMAGES} JPEGs of {SIZE[0]}×{SIZE[1]}, float32", "images/s"], files))
    print(f"\nMedians of {given.turns} turns in batches of {loaded.batch_size}. To reach: a share of 0.95.")
    print(f"\n{machine()}")


if __name__ == "__main__":
    main()
