"""Encoding: from a domain's images to its entry in the store, and whether a lower precision is good enough for it."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextvars import ContextVar
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from fedclip_flwr.base.growing import Growing
from fedclip_flwr.base.tensors import State
from fedclip_flwr.data import Vocabulary
from fedclip_flwr.features import ahead, clip, models
from fedclip_flwr.features.clip import Clip

if TYPE_CHECKING:
    from PIL.Image import Image


log = logging.getLogger(__name__)
TRIED = 64
"""So many images are encoded twice to compare a precision with float32."""
SAME, CLOSE = 0.95, 0.99
"""It is good enough if so many of them find the same class (near ties may fall otherwise), and all features are so
close."""

_until: ContextVar[float] = ContextVar("until", default=math.inf)


class UnfinishedError(Exception):
    """There was no time to encode all images: so many are done, and kept."""

    def __init__(self, done: int, of: int) -> None:
        super().__init__(f"{done:,} of {of:,} images are encoded")
        self.done, self.of = done, of


@contextlib.contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Meanwhile encoding ends with an `UnfinishedError` after so many seconds, and at least one batch."""
    before = _until.set(time.monotonic() + seconds)
    try:
        yield
    finally:
        _until.reset(before)


def encode(
    growing: Growing,
    work: ahead.Work,
    see: Callable[[clip.Inputs], Tensor],
    nothing: Callable[[], Tensor],
    *,
    pinned: bool = False,
    doing: str = "encoding",
    progress: bool = True,
) -> None:
    """Encodes what is still missing; `nothing` gives the features of no image.

    A batch is kept before the next one is begun, and that one is fetched while a GPU is still at work.
    """
    count = work.source.count(work.domain)
    bar = tqdm(total=count, initial=growing.rows, desc=f"{doing} {work.domain}", unit=" images", disable=not progress)

    with bar, contextlib.closing(ahead.batches(work, growing.rows, count, pinned=pinned)) as batches:
        for batch, features in seen(batches, lambda inputs: see(inputs) if inputs else nothing()):
            growing.append(features.cpu(), batch.labels, batch.broken)
            bar.update(batch.rows)
            if growing.rows < count and time.monotonic() > _until.get():
                raise UnfinishedError(growing.rows, count)
        if not growing.rows:
            growing.append(nothing(), [], [])


def seen(batches: Iterable[ahead.Batch], see: Callable[[clip.Inputs], Tensor]) -> Iterator[tuple[ahead.Batch, Tensor]]:
    """Each batch with what the model makes of it; the next one is fetched while a GPU is still at work on it."""
    waiting: tuple[ahead.Batch, Tensor] | None = None
    for batch in batches:
        if waiting:
            yield waiting
        waiting = batch, see(batch.inputs)
    if waiting:
        yield waiting


def class_features(loaded: clip.Clip, vocabulary: Vocabulary) -> Tensor:
    """With several templates, a class is the direction in which its prompts' features lie on average."""
    features = loaded.encode_prompts(vocabulary.prompts)
    by_template = features.reshape(len(vocabulary.templates), -1, features.shape[1])
    return F.normalize(by_template.mean(0), dim=-1)


def agreement(
    model: models.Model, device: str, precision: str, vocabulary: Vocabulary, images: Sequence[Image]
) -> State:
    """Whether each image finds the same class in that precision as in float32, and how close its features are."""
    if not images:
        return {"same": torch.ones(0, dtype=torch.bool), "cosine": torch.ones(0)}
    found, features = [], []
    for used in (precision, "float32"):
        loaded = Clip(model, device, used)
        features.append(torch.cat(list(loaded.encode_images(images, loaded.batch_size))))
        found.append((features[-1] @ class_features(loaded, vocabulary).T).argmax(dim=1))
    same, cosine = found[0] == found[1], F.cosine_similarity(features[0], features[1])
    if not good_enough({"same": same, "cosine": cosine}):
        log.warning(
            "in %s %s finds the same class as in float32 for only %.0f %% of %d images (least cosine %.3f): float32 is "
            "used",
            precision,
            model.name,
            100 * same.float().mean(),
            len(images),
            cosine.min(),
        )
    return {"same": same, "cosine": cosine}


def good_enough(found: State) -> bool:
    same, cosine = found["same"], found["cosine"]
    return not len(same) or bool(same.float().mean() >= SAME and cosine.min() >= CLOSE)
