"""How fast encoding is, beside a bare loop of `get_image_features`.

    python benchmarks/encoding.py

A CLIP ViT-B/32 with random weights (the time is the same). First both encode the same prepared pixels in turns, in the
same batches and precision: the share is the median over the turns. Then images are encoded from JPEG files, without
and with worker processes.
"""

from __future__ import annotations

import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoTokenizer, CLIPConfig, CLIPImageProcessor, CLIPModel

from fedclip_flwr import ahead, clip, encoding
from fedclip_flwr.data.drawn import CLASSES, picture
from fedclip_flwr.data.folder import ImageFolder
from fedclip_flwr.growing import Growing

TURNS, BATCHES, IMAGES = 7, 1, 128
SIZE = (500, 375)


def write_model(folder: Path) -> clip.Model:
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(clip.BUNDLED)
    CLIPModel(CLIPConfig()).save_pretrained(folder)
    CLIPImageProcessor().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return clip.find(str(folder))


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


def beside_the_bare_loop(loaded: clip.Clip, root: Path) -> tuple[float, float, float]:
    """Images a second of the bare loop and of ours, and the median share."""
    count = BATCHES * loaded.batch_size
    pixels = torch.randn(count, 3, 224, 224).to(loaded.dtype)
    net: Any = loaded._net

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
    turns = [(seconds(bare), seconds(ours)) for _ in range(TURNS)]
    share = statistics.median(one / other for one, other in turns)
    return (*(count / statistics.median(times) for times in zip(*turns, strict=True)), share)


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
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        model = write_model(root / "model")
        write_images(root / "images")
        print("| ViT-B/32 | bare loop, images/s | ours | share |")
        print("| --- | --- | --- | --- |")
        for precision in ("float32", "bfloat16"):
            if precision == "bfloat16" and not clip.has_bfloat16():
                print("| bfloat16 | this CPU has no instructions for it | | |")
                continue
            loaded = model.load("cpu", precision)
            bare, ours, share = beside_the_bare_loop(loaded, root)
            print(
                f"| {precision}, batches of {loaded.batch_size} | {bare:.1f} | {ours:.1f} | {share:.3f} |", flush=True
            )
        loaded = model.load("cpu", "float32")
        print(f"\n| {IMAGES} JPEGs of {SIZE[0]}×{SIZE[1]}, float32 | images/s |")
        print("| --- | --- |")
        for workers in (0, 1):
            speed = from_files(loaded, root / "images", root, workers)
            print(f"| with {workers or 'no'} worker{'s' * (workers != 1)} | {speed:.1f} |", flush=True)
    print(f"\nMedians of {TURNS} turns, {os.cpu_count()} cores, {platform.machine()}, torch {torch.__version__}")


if __name__ == "__main__":
    main()
