"""The command `fedclip predict`: classifies images and writes a line for each."""

from __future__ import annotations

import csv
import io
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import torch
from torch import Tensor
from tqdm import tqdm

from fedclip_flwr.base import UserError, files
from fedclip_flwr.base.errors import shown
from fedclip_flwr.base.settings import STORED
from fedclip_flwr.base.text import counted
from fedclip_flwr.data.files import find_images
from fedclip_flwr.data.vocabulary import read_names
from fedclip_flwr.features import FeatureFolder
from fedclip_flwr.inference.learnt import Learnt, find_learnt
from fedclip_flwr.inference.model import FedCLIP, Prediction, check_top
from fedclip_flwr.learning import Classes, Examples, Learner
from fedclip_flwr.learning.training import logits_of

Rows = Iterator[tuple[str, Prediction | None]]
"""The name of an image and its prediction; None if it can't be read."""
PART = 1024
"""Stored features classified at once: more do not fit into a CPU's caches."""
OFTEN = 64
"""Lines between two flushes of the output."""
AS_IT_IS = "surrogateescape"
"""Error handler for file names that are not valid text."""


@dataclass(frozen=True)
class PredictOptions:
    """The command's options; empty for the default."""

    images: Sequence[str]
    adapter: str
    top: int
    classes: str
    prompt: str
    out: str
    as_json: bool
    model: str
    revision: str
    device: str
    precision: str


def predict(options: PredictOptions) -> int:
    """Writes the lines; returns the exit status: 1 if some images can't be read."""
    check_top(options.top)
    if options.out and not options.out.endswith((".csv", ".jsonl")):
        raise UserError(f"--out {options.out}: expected a name that ends with .csv or .jsonl")
    if options.as_json and options.out.endswith(".csv"):
        raise UserError(f"--json --out {options.out}: expected a name that ends with .jsonl, or no --json")
    stored = [place for place in options.images if place.startswith(STORED)]
    if stored and len(options.images) > 1:
        raise UserError(f"{stored[0]}: expected images, or one folder of features alone")
    rows, count, top = _of_features(options, stored[0]) if stored else _of_images(options)
    as_json = options.as_json or options.out.endswith(".jsonl")
    begun, broken = time.monotonic(), list[str]()
    on_screen = not options.out and sys.stdout.isatty()
    bar = tqdm(rows, total=count, desc="predicting", unit=" images", delay=2, disable=on_screen)

    def write(file: TextIO) -> None:
        line = _lines(file, top, as_json)
        for number, (name, found) in enumerate(bar, 1):
            line(name, found)
            if found is None:
                broken.append(name)
            if number % OFTEN == 0:
                file.flush()

    if options.out:
        out = Path(options.out).expanduser().absolute()
        files.make_folder(out.parent, "--out")
        files.write_atomic(out, lambda part: _written(part, write), "--out")
    else:
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors=AS_IT_IS)
        write(sys.stdout)
        sys.stdout.flush()
    seconds = time.monotonic() - begun
    summary = f"{counted(count, 'image')} in {seconds:.1f} s, {count / max(seconds, 1e-9):,.0f} a second"
    if broken:
        more = ", …" * (len(broken) > 5)
        summary += f"; {len(broken):,} can't be read: {', '.join(map(shown, broken[:5]))}{more}"
    print(summary + (f"\nPredictions: {out}" if options.out else ""), file=sys.stderr)
    return 1 if broken else 0


def _written(path: Path, write: Callable[[TextIO], None]) -> None:
    with path.open("w", encoding="utf-8", errors=AS_IT_IS, newline="") as file:
        write(file)


def _of_images(options: PredictOptions) -> tuple[Rows, int, int]:
    """The predictions of the images, the number of images, and the number of classes in each line."""
    paths = [path for place in options.images for path in (_listed() if place == "-" else find_images([place]))]
    if not paths:
        raise UserError("no images: name files or folders")
    model = FedCLIP.from_pretrained(
        options.adapter,
        revision=options.revision,
        model=options.model,
        device=options.device,
        precision=options.precision,
    )
    if options.classes or options.prompt:
        model = model.with_classes(names_of(options.classes) or None, options.prompt)
    return model.stream_files(paths, options.top), len(paths), min(options.top, len(model.class_names))


def _listed() -> Iterator[str]:
    """The files named in standard input, one per line; a missing file counts as one that can't be read."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors=AS_IT_IS)
    for line in filter(None, (text.rstrip("\r\n") for text in sys.stdin)):
        yield from find_images([line]) if os.path.isdir(line) else [line]


def names_of(classes: str) -> tuple[str, ...]:
    """Class names, from a comma list or a file."""
    path = Path(classes).expanduser()
    return read_names(str(path.absolute()) if classes and "," not in classes and path.is_file() else classes)


def _of_features(options: PredictOptions, place: str) -> tuple[Rows, int, int]:
    """As `_of_images`, for stored features: no CLIP is needed."""
    for name in ("classes", "prompt", "model", "precision"):
        if getattr(options, name) not in ("", "auto"):
            raise UserError(f"--{name}: stored features have their own; leave it out, or name the images")
    learnt = find_learnt(options.adapter, options.revision)
    root = Path(place.removeprefix(STORED)).expanduser().absolute()
    learnt.check_features(place, FeatureFolder(root))
    folder = FeatureFolder(root, learnt.vocabulary)
    examples = {domain: folder.examples(domain) for domain in folder.domains}
    rows = _of_rows(examples, folder, learnt, options.top)
    return rows, sum(map(folder.count, folder.domains)), min(options.top, len(learnt.vocabulary.class_names))


def _of_rows(examples: dict[str, Examples], folder: FeatureFolder, learnt: Learnt, top: int) -> Rows:
    """The predictions of all rows; a row is named by its domain and number."""
    names = folder.vocabulary.class_names
    for domain, own in examples.items():
        probabilities, numbers = likeliest(learnt.adapter, own, learnt.numbered(folder.classes.ready(), names), top)
        for row, (found, shares) in enumerate(zip(numbers.tolist(), probabilities.tolist(), strict=True)):
            yield f"{domain}/{row}", Prediction(tuple(names[number] for number in found), tuple(shares))


@torch.no_grad()
def likeliest(adapter: Learner | None, examples: Examples, classes: Classes, top: int) -> tuple[Tensor, Tensor]:
    """The greatest probabilities of each example, and the numbers of their classes."""
    count, top = len(examples.labels), min(top, len(classes.text))
    parts = [
        logits_of(adapter, examples.rows(slice(row, row + PART)).ready(), classes).softmax(dim=1).topk(top, dim=1)
        for row in range(0, count, PART)
    ]
    if not parts:
        return torch.empty(0, top), torch.empty(0, top, dtype=torch.int64)
    return torch.cat([values for values, _ in parts]), torch.cat([numbers for _, numbers in parts])


def _lines(file: TextIO, top: int, as_json: bool) -> Callable[[str, Prediction | None], None]:
    """A function that writes an image's line: as JSON, or as CSV below a header."""
    error = "can't be read"

    def json_line(name: str, found: Prediction | None) -> None:
        facts: dict[str, object] = {"image": name}
        if found is None:
            facts["error"] = error
        else:
            likely = [{"label": label, "probability": round(share, 6)} for label, share in zip(*found, strict=True)]
            facts |= {**likely[0], "top": likely}
        file.write(json.dumps(facts) + "\n")

    if as_json:
        return json_line
    writer = csv.writer(file, lineterminator="\n")
    ranks = ["", *(f"_{rank}" for rank in range(2, top + 1))]
    writer.writerow(["image", *(f"{what}{rank}" for rank in ranks for what in ("label", "probability")), "error"])

    def csv_line(name: str, found: Prediction | None) -> None:
        if found is None:
            writer.writerow([name, *[""] * (2 * top), error])
        else:
            pairs = (cell for label, share in zip(*found, strict=True) for cell in (label, f"{share:.6f}"))
            writer.writerow([name, *pairs, ""])

    return csv_line
