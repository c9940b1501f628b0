"""Encoding: from a domain's images to its store entry; the check of a lower precision against float32."""

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
from fedclip_flwr.features import ahead, models
from fedclip_flwr.features.clip import Clip, Inputs

if TYPE_CHECKING:
    from PIL.Image import Image


log = logging.getLogger(__name__)
TRIED = 64
"""The number of images that are encoded twice to compare a precision with float32."""
SAME, CLOSE = 0.95, 0.99
"""A precision is good enough if this share of the images gets the same class (near ties may differ) and all cosines
reach this value."""

_until: ContextVar[float] = ContextVar("until", default=math.inf)


class UnfinishedError(Exception):
    """The time limit was reached before all images were encoded; `done` of them are stored."""

    def __init__(self, done: int, of: int) -> None:
        super().__init__(f"{done:,} of {of:,} images are encoded")
        self.done, self.of = done, of


@contextlib.contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Limit encoding to `seconds`: after at least one batch it raises `UnfinishedError`."""
    before = _until.set(time.monotonic() + seconds)
    try:
        yield
    finally:
        _until.reset(before)


def encode(
    growing: Growing,
    work: ahead.Work,
    compute: Callable[[Inputs], Tensor],
    empty: Callable[[], Tensor],
    *,
    pinned: bool = False,
    doing: str = "encoding",
    progress: bool = True,
) -> None:
    """Encode the images that are still missing; `empty` makes a features tensor with no rows.

    Each batch is stored before the next one is computed; a GPU computes while the next one is prepared.
    """
    count = work.source.count(work.domain)
    bar = tqdm(total=count, initial=growing.rows, desc=f"{doing} {work.domain}", unit=" images", disable=not progress)

    with bar, contextlib.closing(ahead.batches(work, growing.rows, count, pinned=pinned)) as batches:
        for batch, features in pipelined(batches, lambda inputs: compute(inputs) if inputs else empty()):
            growing.append(features.cpu(), batch.labels, batch.broken)
            bar.update(batch.rows)
            if growing.rows < count and time.monotonic() > _until.get():
                raise UnfinishedError(growing.rows, count)
        if not growing.rows:
            growing.append(empty(), [], [])


def pipelined(batches: Iterable[ahead.Batch], run: Callable[[Inputs], Tensor]) -> Iterator[tuple[ahead.Batch, Tensor]]:
    """Each batch with the model's output; the next one is fetched while a GPU still computes it."""
    waiting: tuple[ahead.Batch, Tensor] | None = None
    for batch in batches:
        if waiting:
            yield waiting
        waiting = batch, run(batch.inputs)
    if waiting:
        yield waiting


def class_features(loaded: Clip, vocabulary: Vocabulary) -> Tensor:
    """One feature per class: the normalized mean of its prompts' features over the templates."""
    features = loaded.encode_prompts(vocabulary.prompts)
    by_template = features.reshape(len(vocabulary.templates), -1, features.shape[1])
    return F.normalize(by_template.mean(0), dim=-1)


def agreement(
    model: models.Model, device: str, precision: str, vocabulary: Vocabulary, images: Sequence[Image]
) -> State:
    """For each image: `same`, if the precision gives the same class as float32, and `cosine` of the two features."""
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
            "%s in %s predicts the same class as in float32 for only %.0f %% of %d images (lowest cosine %.3f): "
            "using float32",
            model.name,
            precision,
            100 * same.float().mean(),
            len(images),
            cosine.min(),
        )
    return {"same": same, "cosine": cosine}


def good_enough(found: State) -> bool:
    same, cosine = found["same"], found["cosine"]
    return not len(same) or bool(same.float().mean() >= SAME and cosine.min() >= CLOSE)
