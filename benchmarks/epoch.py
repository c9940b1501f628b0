"""A local epoch on stored features, beside the released FedCLIP code's way: the frozen CLIP runs in every step.

    python -m benchmarks.epoch [--steps 3] [--sweep-seconds S]

That way is written anew here from what the released code does: batches of 32 images of 224 x 224 pixels with a prompt
for each, padded to 77 tokens as there; both towers of CLIP ViT-B/32 (frozen, without gradients) run in each step; then
the adapter, the symmetric contrastive loss and torch.optim.Adam. The model has CLIP's architecture and random weights,
pixels and tokens are random. Ours is `learning.train` on 1,200 stored features with one thread, by the recipe `paper`,
which is the same work, and by the default. All run in turn, so each turn has a ratio of its own: told are their median
and their range. To reach: a median of at least 1,000 times less time per image with the default recipe.

The second table is of a whole experiment of PACS's size: every one of four domains held out in turn, 200 rounds, three
sites, 60, 20 and 20 % of their images. Theirs is extrapolated from the measured batches; with the evaluation of each
round, which encodes the sites' validation and test images and the held-out domain, and the prompts of the 7 classes
each time, and without it. Ours is the encoding of all images once, extrapolated from measured batches of the best of
some sizes, and the time of `benchmarks.pacs_size`: given, or extrapolated from two runs of few rounds. To reach: at
least 130 times less time in float32, 350 with encoding in bfloat16.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.common import at_least, workplace
from benchmarks.pacs_size import IMAGES, timed
from fedclip_flwr.learning import RECIPES, Examples, make_adapter, train
from fedclip_flwr.learning import Classes as Prompts
from fedclip_flwr.learning.adapters import Attention
from harness.features import CLASSES, DIM
from harness.machine import machine, table

BATCH, ROWS, TOKENS, ROUNDS = 32, 1200, 77, 200
SIZES = (8, 16, 32, 64)
FEW, MORE = 2, 12
"""Rounds of the two short sweeps."""


class TheirWay:
    """Steps and evaluations that run CLIP each time."""

    def __init__(self) -> None:
        from transformers import CLIPConfig, CLIPModel

        torch.manual_seed(0)
        self.clip = CLIPModel(CLIPConfig()).eval().requires_grad_(False)
        self.adapter = nn.Sequential(nn.Linear(DIM, DIM), nn.Tanh(), nn.Linear(DIM, DIM), nn.Softmax(dim=1))
        self.optimizer = torch.optim.Adam(
            self.adapter.parameters(), lr=5e-5, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.2
        )

    @torch.no_grad()
    def images(self, pixels: Tensor) -> Tensor:
        return pooled(self.clip.get_image_features(pixel_values=pixels))

    @torch.no_grad()
    def texts(self, tokens: Tensor) -> Tensor:
        return pooled(self.clip.get_text_features(input_ids=tokens))

    def step(self, pixels: Tensor, tokens: Tensor) -> None:
        images, texts = self.images(pixels), self.texts(tokens)
        images, texts = (F.normalize(features, dim=1) for features in (self.adapter(images) * images, texts))
        logits = self.clip.logit_scale.exp() * images @ texts.T
        targets = torch.arange(len(images))
        loss = (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()


def pooled(answer: object) -> Tensor:
    """The features: newer versions of transformers give them with more around them."""
    features = getattr(answer, "pooler_output", answer)
    assert isinstance(features, Tensor)
    return features


def seconds(work: Callable[[], object]) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def our_epoch(recipe: str) -> Callable[[], object]:
    labels = torch.randint(0, len(CLASSES), (ROWS,))
    examples = Examples(torch.randn(ROWS, DIM), labels).ready()
    classes = Prompts(torch.randn(len(CLASSES), DIM), 100.0).ready()
    adapter = make_adapter("attention", DIM, length=RECIPES[recipe].length, identity=recipe != "paper")
    rate = RECIPES[recipe].adapter_rate or Attention.learning_rate

    def epoch() -> None:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # the matrices are small: more threads only wait for each other
        train(adapter, examples, classes, RECIPES[recipe], learning_rate=rate, batch_size=BATCH)
        torch.set_num_threads(threads)

    return epoch


def knows_bfloat16() -> bool:
    """Whether this CPU computes in it (as Linux tells)."""
    info = Path("/proc/cpuinfo")
    return info.exists() and not {"amx_bf16", "avx512_bf16"}.isdisjoint(info.read_text().split())


def encoding(theirs: TheirWay, dtype: torch.dtype) -> tuple[float, int]:
    """Seconds per image when all are encoded once, and the size of the batches with which it is least."""
    theirs.clip.to(dtype)
    found = []
    for size in SIZES:
        pixels = torch.randn(size, 3, 224, 224, dtype=dtype)
        theirs.images(pixels)
        found.append((median(seconds(partial(theirs.images, pixels)) for _ in range(3)) / size, size))
    theirs.clip.float()
    return min(found)


def sweep_seconds() -> tuple[float, str]:
    """How long a sweep of all rounds takes, from two with few."""
    few, more = (timed("paper", rounds, 0)[0] for rounds in (FEW, MORE))
    whole = few + (ROUNDS - FEW) * (more - few) / (MORE - FEW)
    return whole, f"extrapolated from sweeps of {FEW} and {MORE} rounds, {few:.0f} and {more:.0f} s"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.epoch", description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=at_least(1), default=9, help="of their way, and epochs of ours")
    parser.add_argument("--sweep-seconds", type=at_least(1), help="what benchmarks.pacs_size told on this machine")
    given = parser.parse_args()

    theirs, ours = TheirWay(), {recipe: our_epoch(recipe) for recipe in ("default", "paper")}
    pixels, tokens = torch.randn(BATCH, 3, 224, 224), torch.randint(1, 49_000, (BATCH, TOKENS))
    theirs.step(pixels, tokens)
    measured: dict[str, list[float]] = {"step": [], "images": [], "prompts": [], **{recipe: [] for recipe in ours}}
    for epoch in ours.values():
        epoch()
    for _ in range(given.steps):
        measured["step"].append(seconds(lambda: theirs.step(pixels, tokens)))
        for recipe, epoch in ours.items():
            measured[recipe].append(seconds(epoch))
        measured["images"].append(seconds(lambda: theirs.images(pixels)))
        measured["prompts"].append(seconds(lambda: theirs.texts(tokens[: len(CLASSES)])))
    step, images, prompts = (median(measured[what]) for what in ("step", "images", "prompts"))
    per_image, ratios = step / BATCH, dict[str, list[float]]()
    rows = [["theirs", f"{BATCH} images: {step:.2f} s", f"{1e3 * per_image:.1f} ms", "1", ""]]
    for recipe in ours:
        ratios[recipe] = [a / BATCH / (b / ROWS) for a, b in zip(measured["step"], measured[recipe], strict=True)]
        own, middle = median(measured[recipe]), f"{median(ratios[recipe]):,.0f}"
        spread = f"{min(ratios[recipe]):,.0f} to {max(ratios[recipe]):,.0f}"
        rows.append([f"ours, {recipe}", f"{ROWS:,} images: {own:.3f} s", f"{1e3 * own / ROWS:.4f} ms", middle, spread])
    print(table(["an epoch", "measured", "per image", "times less", "by turn"], rows))
    print(f"\nTo reach: 1,000 times less. Found: {median(ratios['default']):,.0f}.\n", flush=True)

    whole = sum(IMAGES.values())
    trained = sum(ROUNDS * 0.6 * (whole - held_out) for held_out in IMAGES.values())
    evaluated = sum(ROUNDS * (0.4 * (whole - held_out) + held_out) for held_out in IMAGES.values())
    evaluations = ROUNDS * len(IMAGES) * 7  # validation and test at three sites, and the held-out domain
    training = trained * per_image
    evaluating = evaluated * images / BATCH + evaluations * prompts
    if given.sweep_seconds:
        sweep, how = float(given.sweep_seconds), "as given"
    else:
        sweep, how = sweep_seconds()
    rows = []
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        if dtype == torch.bfloat16 and not knows_bfloat16():
            rows.append([name, "this CPU has no bfloat16 instructions", "", "", "", ""])
            continue
        each, size = encoding(theirs, dtype)
        all_of_it = whole * each + sweep
        encoded = f"{whole * each:.0f} s ({1 / each:.1f} images/s, batches of {size})"
        less = [f"{(training + evaluating) / all_of_it:,.0f}", f"{training / all_of_it:,.0f}"]
        rows.append([name, encoded, f"{sweep:.0f} s", f"{all_of_it:.0f} s", *less])
    head = ["ours, encoding in", "encoding", "sweep", "together", "times less", "their evaluation left out"]
    print(table(head, rows))
    print(
        f"\nTheirs: {(training + evaluating) / 3600:.0f} hours, extrapolated, {evaluating / 3600:.0f} of them "
        f"evaluation; the sweep: {how}. To reach: 130 times less, 350 in bfloat16."
    )
    print(f"\n{given.steps} steps and epochs in turn, {torch.get_num_threads()} threads (ours: 1); {machine()}")


if __name__ == "__main__":
    with workplace():
        main()
