"""How fast predictions are: of image files beside the bare model, of stored features, and from the ONNX file.

    python -m benchmarks.predicting [--images 1000] [--large 96] [--rows 100000] [--turns 5] [--no-onnx]

First `FedCLIP.stream_files` beside a loop of transformers alone, which also opens, converts and prepares the same
files, in batches of the same size: with the bundled CLIP, and with one of ViT-B/32's size and random weights. They take
turns; the share is the median over these. To reach: 0.9. Then `predict` on stored features (to reach: less than a
second) and the whole command with its CSV. Then the ONNX file beside torch, on all drawn pictures.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save_file
from torch.nn import functional as F

from benchmarks.common import at_least, workplace
from benchmarks.encoding import seconds, write_model
from fedclip_flwr.data import Vocabulary, drawn
from fedclip_flwr.features import Clip, models
from fedclip_flwr.features.folder import FACTS
from fedclip_flwr.inference.model import FedCLIP
from fedclip_flwr.inference.predict import likeliest
from fedclip_flwr.learning import Classes, Examples, make_adapter
from fedclip_flwr.learning.adapters import ADAPTERS
from fedclip_flwr.runs import saved
from harness.features import CLASSES
from harness.machine import machine, table

SIZE = (500, 375)
TEMPLATES = ("a picture of a {}",)


def write_images(folder: Path, count: int) -> list[str]:
    """So many JPEG files of a camera's small size."""
    folder.mkdir()
    paths = []
    for number in range(count):
        domain, figure = [*drawn.DOMAINS][number % 4], drawn.CLASSES[number % 10]
        image = drawn.picture(1, domain, figure, number)[0].resize(SIZE, Image.Resampling.BICUBIC)
        paths.append(str(folder / f"{number}.jpg"))
        image.save(paths[-1], quality=90)
    return paths


def made(found: models.Model, kind: str = "attention", device: str = "cpu", precision: str = "float32") -> FedCLIP:
    loaded = Clip(found, device, precision)
    adapter = make_adapter(kind, found.dim, identity=False)
    facts = {"kind": kind, "model": found.name}
    return FedCLIP(loaded, Vocabulary(drawn.CLASSES, TEMPLATES), adapter, facts)


class Bare:
    """Zero-shot predictions with transformers alone."""

    def __init__(self, folder: Path, batch_size: int, device: str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        from transformers import AutoModel, AutoTokenizer
        from transformers.models.auto.image_processing_auto import AutoImageProcessor

        self.net: Any = AutoModel.from_pretrained(folder, dtype=dtype).eval().to(device)
        self.device, self.dtype = device, dtype
        self.processor, self.batch_size = AutoImageProcessor.from_pretrained(folder, backend="pil"), batch_size
        tokens = AutoTokenizer.from_pretrained(folder)(
            [TEMPLATES[0].format(name) for name in drawn.CLASSES], padding=True, return_tensors="pt"
        ).to(device)
        with torch.no_grad():
            self.text = F.normalize(self.net.get_text_features(**tokens).pooler_output, dim=1)

    @torch.no_grad()
    def predict(self, paths: Sequence[str]) -> list[int]:
        found: list[int] = []
        for first in range(0, len(paths), self.batch_size):
            images = []
            for path in paths[first : first + self.batch_size]:
                with Image.open(path) as image:
                    images.append(image.convert("RGB"))
            pixels = self.processor(images=images, return_tensors="pt")["pixel_values"].to(self.device, self.dtype)
            features = F.normalize(self.net.get_image_features(pixel_values=pixels).pooler_output, dim=1)
            shares = (self.net.logit_scale.exp() * features @ self.text.T).softmax(dim=1)
            found += shares.argmax(dim=1).tolist()
        return found


def beside_the_bare_model(found: models.Model, paths: Sequence[str], turns: int) -> list[str]:
    """A row: images a second of both, and the median share."""
    model = made(found)
    bare = Bare(found.folder, model.loaded.batch_size)
    few = paths[: bare.batch_size]
    bare.predict(few)
    list(model.stream_files(few))
    times = [
        (seconds(lambda: bare.predict(paths)), seconds(lambda: list(model.stream_files(paths)))) for _ in range(turns)
    ]
    speeds = [f"{len(paths) / median(each):,.1f}" for each in zip(*times, strict=True)]
    name = found.name if found.name == "bundled" else "ViT-B/32"
    return [name, f"{len(paths):,}", *speeds, f"{median(one / other for one, other in times):.3f}"]


def of_features(rows: int, dim: int, root: Path, turns: int) -> list[list[str]]:
    """A row for each adapter: seconds of `likeliest`, and of the whole command."""
    folder = root / f"features-{dim}"
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    features = F.normalize(torch.randn(rows, dim, generator=generator), dim=1)
    text = F.normalize(torch.randn(len(CLASSES), dim, generator=generator), dim=1)
    labels = torch.zeros(rows, dtype=torch.int64)
    save_file({"image_features": features, "labels": labels}, folder / "photo.safetensors")
    save_file({"text_features": text}, folder / "classes.safetensors")
    facts: dict[str, Any] = {"model": "random", "embedding_dim": dim, "logit_scale": 100.0, "prompt": TEMPLATES[0]}
    saved.write_json(folder / FACTS, {**facts, "class_names": CLASSES, "domains": ["photo"]})
    examples, classes = Examples(features, labels), Classes(text, 100.0).ready()
    found = []
    for kind in ADAPTERS:
        adapter = make_adapter(kind, dim, identity=False)
        place = root / f"{kind}-{dim}"
        saved.write_tensors(place / saved.TENSORS, adapter.state_dict(), 0)
        made_for = {"model": "random", "class_names": CLASSES, "templates": TEMPLATES}
        saved.write_json(place / saved.FACTS, {"kind": kind, "rank": 4, "dim": dim, "blend": 1.0, **made_for})
        alone = median(seconds(partial(likeliest, adapter, examples, classes, 1)) for _ in range(turns))
        command = [str(Path(sys.executable).with_name("fedclip")), "predict", f"features:{folder}"]
        command += ["--adapter", str(place), "--out", str(root / "found.csv")]
        whole = partial(subprocess.run, command, check=True, capture_output=True)
        found.append(
            [kind, f"{rows:,} × {dim}", f"{alone:.2f} s", f"{median(seconds(whole) for _ in range(turns)):.1f} s"]
        )
    return found


def all_drawn() -> torch.Tensor:
    """The drawn pictures of all four domains, prepared for the bundled CLIP."""
    source, prepare = drawn.Drawn(0), Clip(models.find("bundled"), "cpu", "float32").preparer()
    return torch.cat(
        [
            prepare([picture.image for picture in source.pictures(domain) if picture.image])["pixel_values"]
            for domain in source.domains
        ]
    )


def as_onnx(kind: str, pixels: torch.Tensor, turns: int) -> list[str]:
    """A row: the file of this adapter on the bundled CLIP, beside torch."""
    import onnxruntime

    from fedclip_flwr.inference import onnx_file

    model = made(models.find("bundled"), kind)
    with tempfile.TemporaryDirectory() as name:
        onnx_file.write(model, Path(name))
        tower, file = onnx_file.Tower(model), Path(name) / onnx_file.FILE
        found = onnx_file.compare(tower, file, pixels)
        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
        batch = pixels[: model.loaded.batch_size]
        given = {onnx_file.INPUT: batch.numpy()}
        with torch.no_grad():
            times = [(seconds(partial(tower, batch)), seconds(partial(session.run, None, given))) for _ in range(turns)]
        speeds = [f"{len(batch) / median(each):,.0f}" for each in zip(*times, strict=True)]
        share = f"{100 * found.same / found.pictures:.2f} % of {found.pictures:,}"
        return [kind, share, f"{found.difference:.1e}", *speeds, f"{file.stat().st_size / 1e6:.1f} MB"]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.predicting", description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=at_least(1), default=1000)
    parser.add_argument("--large", type=at_least(1), default=96, help="images for the large model")
    parser.add_argument("--rows", type=at_least(1), default=100_000, help="of stored features")
    parser.add_argument("--turns", type=at_least(1), default=5)
    parser.add_argument("--no-onnx", action="store_true")
    given = parser.parse_args()
    with workplace() as root:
        paths = write_images(root / "images", given.images)
        rows = [
            beside_the_bare_model(models.find("bundled"), paths, given.turns),
            beside_the_bare_model(write_model(root / "model"), paths[: given.large], given.turns),
        ]
        print(table(["CLIP", "JPEGs", "bare model, images/s", "ours", "share"], rows))
        stored = [row for dim in (128, 512) for row in of_features(given.rows, dim, root, given.turns)]
        print("\n" + table(["adapter", "stored features", "likeliest", "the command, with CSV"], stored))
        if not given.no_onnx:
            pixels = all_drawn()
            files = [as_onnx(kind, pixels, given.turns) for kind in ADAPTERS]
            heads = ["adapter", "same class as torch", "greatest difference", "torch, images/s", "onnxruntime", "file"]
            print("\n" + table(heads, files))
    print(
        f"\nMedians of {given.turns} turns; files of {SIZE[0]}×{SIZE[1]}. To reach: a share of 0.9, 1 s, 100 %, 1e-4."
    )
    print(f"\n{machine()}")


if __name__ == "__main__":
    main()
