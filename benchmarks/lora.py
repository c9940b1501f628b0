"""What LoRA costs beside FedAVG's whole model: time, memory, bytes.

    python -m benchmarks.lora [--turns 5] [--device cuda] [--quick]

CLIP ViT-B/32 with random weights, random pixels, and the prompts of ten classes. A step is `learning.train` on 32
images, evaluating is `learning.evaluate` of 32. All variants take turns, and told are medians. `run again` is `last:4`
as it would be if what enters the last layers were not stored: those before them run in each step. Memory is that of a
step in a process of its own, beside what it had before: of the process, or on a GPU what torch asked for. `kept` is
what the plan of a run says: what a step keeps for its gradients. On two cores all takes some ten minutes. To reach:
with `last:4` at most 0.45 of the time of a step with all layers. `--quick` has a small model and a single turn: to see
that all of it works.
"""

from __future__ import annotations

import argparse
import gc
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.common import at_least, finish, workplace
from benchmarks.encoding import write_model
from fedclip_flwr.base import Settings
from fedclip_flwr.base.text import bytes_of
from fedclip_flwr.data import Vocabulary
from fedclip_flwr.data.drawn import CLASSES
from fedclip_flwr.features import Clip, models
from fedclip_flwr.features.encoding import class_features
from fedclip_flwr.features.lora import Lora, bytes_of_step
from fedclip_flwr.features.whole import WholeModel
from fedclip_flwr.learning import RECIPES, Classes, Examples, Learner, evaluate, train
from harness.machine import memory, table

BATCH, LAST, TO_REACH = 32, 4, 0.45
WORDS = Vocabulary(CLASSES, ("a picture of a {}",))
WHOLE, ALL, STORED, AGAIN = "whole model", "vision, all layers", "vision, last:4", "vision, last:4, run again"
VARIANTS: dict[str, dict[str, Any]] = {
    WHOLE: {},
    ALL: {},
    "vision, all layers, checkpointing": {"gradient_checkpointing": True},
    STORED: {"lora_layers": f"last:{LAST}"},
    AGAIN: {"lora_layers": f"last:{LAST}"},
    "text": {"lora_targets": "text"},
    "both": {"lora_targets": "both"},
    "both, A trained too": {"lora_targets": "both", "lora_train": "both"},
}
"""The settings of each."""
SMALL: dict[str, Any] = {
    f"{tower}_config": {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_attention_heads": 2,
        "num_hidden_layers": LAST + 1,
    }
    for tower in ("vision", "text")
}


class RunAgain(Learner):
    """LoRA in the last layers, where those before them run in each step."""

    def __init__(self, lora: Lora, loaded: Clip) -> None:
        super().__init__()
        self.lora, self._loaded = lora, loaded

    def named_parameters(self, *_: object, **__: object) -> Iterator[tuple[str, nn.Parameter]]:
        return self.lora.named_parameters()

    def forward(self, pixels: Tensor) -> Tensor:
        found: Tensor = self.lora(self._loaded.encode(self.lora.unpack(pixels), LAST))
        return found


class Case(NamedTuple):
    """A variant, ready for a step with one batch."""

    learner: Learner
    examples: Examples
    classes: Classes

    def step(self) -> None:
        rate = 1e-5 if isinstance(self.learner, WholeModel) else 1e-3
        train(self.learner, self.examples, self.classes, RECIPES["default"], learning_rate=rate, batch_size=BATCH)

    def evaluate(self) -> None:
        evaluate(self.learner, self.examples, self.classes)

    def kept(self) -> int:
        """The bytes that a step keeps, as the plan has them; 0 if it has none."""
        if not isinstance(self.learner, Lora):
            return 0
        return bytes_of_step(self.learner, self.classes, self.examples.features[:1], BATCH)

    @property
    def sent(self) -> int:
        """The bytes of a round for a site, there and back."""
        return 2 * sum(4 * tensor.numel() for tensor in self.learner.parameters())

    @property
    def stored(self) -> int:
        """The bytes of an image."""
        return self.examples.features[0].nbytes


def case(name: str, folder: str, device: str, precision: str) -> Case:
    """A variant of the model in this folder, with images as it takes them."""
    model, settings = models.find(folder), Settings(method="lora", **VARIANTS[name])
    side, generator = model.image_size, torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (BATCH, 3, side, side), dtype=torch.uint8, generator=generator)
    loaded = Clip(model, device, "float32" if name == WHOLE else precision)
    classes = Classes(class_features(loaded, WORDS), loaded.scale).ready(device)
    if name == WHOLE:
        learner: Learner = WholeModel.copy_of(loaded, WORDS.prompts, dtype=getattr(torch, precision)).to(device)
    elif name == AGAIN:
        learner = RunAgain(Lora(Clip(model, device, precision), settings, WORDS), loaded)
    else:
        learner = lora = Lora(loaded, settings, WORDS)
        if name == STORED:
            images = Clip(model, device, precision).encode(lora.unpack(images.to(device)), LAST).cpu()
        elif settings.lora_targets == "text":
            images = torch.randn(BATCH, model.dim, generator=generator)
        if precision != "float32" and images.is_floating_point():
            images = images.to(getattr(torch, precision))  # as they are stored then
    return Case(learner, Examples(images, torch.arange(BATCH) % len(CLASSES)).ready(device), classes)


def seconds(work: Callable[[], object]) -> float:
    """To the end of what a GPU does."""
    wait()
    begun = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - begun


def wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak(name: str, folder: str, device: str, precision: str) -> int:
    """The bytes that a step takes at most, beside what there was before it; for a process of its own."""
    it = case(name, folder, device, precision)
    few = it._replace(examples=it.examples.rows(slice(2)))
    few.step()  # what comes with the first one only
    gc.collect()
    if device != "cpu":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        it.step()
        return torch.cuda.max_memory_allocated() - before
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the highest so far is forgotten
    before = memory(os.getpid(), "VmRSS")
    it.step()
    return memory(os.getpid(), "VmHWM") - before


def peak_of(*what: str) -> int:
    """`peak` in a new process, which gives back at once what it frees."""
    command = [sys.executable, "-c", "import sys, benchmarks.lora as b; print(b.peak(*sys.argv[1:]))", *what]
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    return int(subprocess.check_output(command, env=env, text=True))


def timed(cases: dict[str, Case], turns: int) -> dict[str, tuple[list[float], list[float]]]:
    """The seconds of steps and of evaluations, in turns."""
    found: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in cases}
    for turn in range(turns + 1):
        for name, it in cases.items():
            both = seconds(it.step), seconds(it.evaluate)
            if turn:  # the first is for what is loaded late
                for times, took in zip(found[name], both, strict=True):
                    times.append(took)
        print(f"turn {turn} of {turns}", file=sys.stderr, flush=True)
    return found


def in_precision(folder: str, device: str, precision: str, turns: int) -> str:
    """Prints the table of a precision; returns its line of the summary."""
    cases = {name: case(name, folder, device, precision) for name in VARIANTS}
    times = timed(cases, turns)
    facts = {name: (it.kept(), it.sent, it.stored) for name, it in cases.items()}
    del cases
    rows, full = [], median(times[ALL][0])
    for name, (kept, sent, stored) in facts.items():
        step, evaluating = (median(found) for found in times[name])
        most = peak_of(name, folder, device, precision)
        print(f"memory: {name}", file=sys.stderr, flush=True)
        said = f"{bytes_of(kept)} ({kept / max(most, 1):.2f})" if kept else ""
        cells = [f"{step:.3f} s", f"{step / full:.2f}", f"{evaluating:.3f} s"]
        rows.append([name, *cells, bytes_of(most), said, bytes_of(sent), bytes_of(stored)])
    head = [precision, f"a step of {BATCH}", "of all layers", "evaluating", "memory", "kept (of that)", "a round"]
    print(table([*head, "stored an image"], rows) + "\n", flush=True)
    shares = [a / b for a, b in zip(times[STORED][0], times[ALL][0], strict=True)]
    again = median(times[AGAIN][0]) / median(times[STORED][0])
    return (
        f"{precision}: a step with last:{LAST} takes {median(shares):.2f} of one with all layers "
        f"({min(shares):.2f} to {max(shares):.2f}); to reach: {TO_REACH}. Not stored, it would take {again:.1f} times "
        f"as long. A whole model's step takes {median(times[WHOLE][0]) / full:.2f}."
    )


def main() -> str:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.lora", description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=at_least(1), default=5)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--quick", action="store_true", help="a small model and one turn")
    given = parser.parse_args()
    turns = 1 if given.quick else given.turns
    able = given.device != "cpu" or models.has_bfloat16()
    with workplace() as place:
        folder = str(write_model(place / "clip", **(SMALL if given.quick else {})).folder)
        told = [
            in_precision(folder, given.device, precision, turns)
            for precision in ("float32", *(["bfloat16"] if able else []))
        ]
    print("\n".join(told) + "\n")
    return f"{turns} turns, {torch.get_num_threads()} threads, on {given.device}"


if __name__ == "__main__":
    finish(main)
