"""The images that the server itself holds out, analysed: what zero-shot and the adapted model see in each of them.

Never a site's images, nor a domain that sites train on. What is found is kept as `held_out.json`, so that a report can
be made again where neither the images nor the model are at hand.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from fedclip_flwr.base import Settings, UserError, content, files, store
from fedclip_flwr.base.errors import one_line
from fedclip_flwr.data import held_out, pick_holdout
from fedclip_flwr.features import Encoded, Features, Pixels, models, open_features
from fedclip_flwr.learning import Adapter, Classes, Examples, Learner
from fedclip_flwr.learning.metrics import BINS, bins_of
from fedclip_flwr.learning.training import logits_of
from fedclip_flwr.report.output import FILE
from fedclip_flwr.runs.saved import TENSORS, load_adapter
from fedclip_flwr.site.holdings import gathered, together

if TYPE_CHECKING:
    from PIL.Image import Image

PART = 4096
"""So many images are looked at at once."""
SHOWN = 12
"""So many images that changed are shown, of each kind."""
THUMBNAIL = 96
STRONGEST = 3
"""So many dimensions of a class are named that rise most, and that fall most."""
DIMENSIONS = 24
KEPT = "learnt", "domain", "images", "class_names", "zero_shot", "adapted", "weights", "changed", "mended", "spoilt"
"""What an analysis tells."""


class Seen(NamedTuple):
    """For each image the class that was found, its probability, and that of the true class."""

    found: Tensor
    confidence: Tensor
    truth: Tensor


def open_held_out(settings: Settings) -> tuple[Features, str]:
    """The data of a run and the domain that its server holds out, or several."""
    if settings.data == "none":
        raise UserError("the server of this run has no images of its own")
    features = open_features(settings)
    holdout = pick_holdout(settings.holdout, features.domains)
    if holdout is None:
        raise UserError("this run holds out no domain")
    return features, holdout


def learnt(folder: Path, features: Features) -> Learner:
    """What the run came to: its adapter, or its whole model."""
    if not isinstance(features, Pixels):
        adapter, facts = load_adapter(folder)
        if (facts["class_names"], facts["dim"]) != ([*features.vocabulary.class_names], features.classes.dim):
            raise UserError("its data or its model are no longer those that the run had")
        return adapter
    learner = features.whole_model()
    try:
        state, _ = store.mapped(folder / "model" / "model.safetensors")
    except OSError as error:
        raise UserError(f"{folder} holds no model ({one_line(error)})") from None
    learner.load_state_dict({f"net.{name}": tensor for name, tensor in state.items()})
    return learner


def mark(folder: Path) -> str:
    """The hash of what the run came to."""
    whole = folder / "model" / "model.safetensors"
    return content.of_file(whole if whole.exists() else folder / TENSORS)


def analyse(folder: Path, settings: Settings, features: Features, holdout: str) -> dict[str, Any]:
    """All that is told of the held-out domains: zero-shot, and with what the run in the folder came to."""
    domains = held_out(holdout, features.domains)
    examples = together(gathered(features, domains).values())
    if not len(examples.labels):
        raise UserError(f"none of the images of {holdout} can be read")
    device = models.pick_device(settings.device)
    classes = features.classes.ready(device)
    before = features.whole_model().to(device) if isinstance(features, Pixels) else None
    after = learnt(folder, features).to(device)
    zero, adapted = (seen_by(learner, examples, classes) for learner in (before, after))
    names, labels = features.vocabulary.class_names, examples.labels
    rows = {"mended": changed(zero, adapted, labels), "spoilt": changed(adapted, zero, labels)}
    shown = [row for of_kind in rows.values() for row in of_kind[:SHOWN]]
    images = {}
    if isinstance(features, Encoded):
        images = {row: thumbnail(image) for row, image in _pictures(features, domains, shown)}

    def card(row: int) -> dict[str, Any]:
        said = {"zero_shot": zero, "adapted": adapted}
        return {
            "true": int(labels[row]),
            **{who: [int(seen.found[row]), _rounded(seen.confidence[row])] for who, seen in said.items()},
            "image": images.get(row),
        }

    return {
        "learnt": mark(folder),
        "domain": holdout,
        "images": len(labels),
        "class_names": list(names),
        "zero_shot": told(zero, labels, len(names)),
        "adapted": told(adapted, labels, len(names)),
        "weights": weights(after, examples, len(names)) if isinstance(after, Adapter) else None,
        "changed": {kind: len(of_kind) for kind, of_kind in rows.items()},
        **{kind: [card(row) for row in of_kind[:SHOWN]] for kind, of_kind in rows.items()},
    }


def _pictures(features: Encoded, domains: Sequence[str], rows: Sequence[int]) -> Iterator[tuple[int, Image]]:
    """The images of those rows of all these domains' examples."""
    first = 0
    for domain in domains:
        count = len(features.examples(domain).labels)
        own = [row - first for row in rows if 0 <= row - first < count]
        yield from ((first + row, image) for row, image in features.pictures(domain, own))
        first += count


def as_text(found: dict[str, Any]) -> str:
    """What is kept of an analysis."""
    return json.dumps(found, ensure_ascii=False) + "\n"


def kept(folder: Path, why: str) -> tuple[dict[str, Any] | None, str]:
    """The analysis that is kept in the run's folder, and a sentence on why it was not made again, or can't be used."""
    try:
        found = files.read_json(folder / FILE)
        if lacking := [key for key in KEPT if key not in found]:
            raise ValueError(f"it lacks {lacking[0]}")
        fits = found["learnt"] == mark(folder)
    except (OSError, ValueError, TypeError) as error:
        return None, f"{why}; and {FILE} can't be read ({one_line(error)})"
    if not fits:
        return None, f"{why}; and {FILE} is of an earlier round"
    return found, f"As it was analysed before; it can't be made again here: {why}"


@torch.no_grad()
def seen_by(learner: Learner | None, examples: Examples, classes: Classes) -> Seen:
    """What the learner (without one: CLIP itself) says of each image."""
    parts = []
    for part in _parts(examples, classes.text.device):
        chances = logits_of(learner, part, classes).softmax(dim=1)
        confidence, found = chances.max(dim=1)
        truth = chances.gather(1, part.labels[:, None])[:, 0]
        parts.append((found.cpu(), confidence.cpu().double(), truth.cpu().double()))
    return Seen(*map(torch.cat, zip(*parts, strict=True)))


def _parts(examples: Examples, device: str | torch.device) -> Iterator[Examples]:
    for start in range(0, len(examples.labels), PART):
        yield Examples(*(tensor[start : start + PART] for tensor in examples)).ready(device)


def told(seen: Seen, labels: Tensor, classes: int) -> dict[str, Any]:
    """Counts of true and found classes, as far as there are any, and for each bin its images and sums."""
    right, numbers = seen.found == labels, bins_of(seen.confidence)
    counts = torch.bincount(labels * classes + seen.found)
    pairs = counts.nonzero()[:, 0]
    sums = [
        torch.zeros(BINS, dtype=torch.double).index_add_(0, numbers, of.double()) for of in (seen.confidence, right)
    ]
    return {
        "correct": int(right.sum()),
        "confusion": [
            [pair // classes, pair % classes, n] for pair, n in zip(pairs.tolist(), counts[pairs].tolist(), strict=True)
        ],
        "bins": {
            "images": torch.bincount(numbers, minlength=BINS).tolist(),
            "confidence": [_rounded(value) for value in sums[0]],
            "correct": [int(value) for value in sums[1]],
        },
    }


def changed(wrong: Seen, right: Seen, labels: Tensor) -> list[int]:
    """The images that the one gets wrong and the other right; first where the true class has gained most."""
    rows = ((wrong.found != labels) & (right.found == labels)).nonzero()[:, 0]
    gain = (right.truth - wrong.truth)[rows]
    return [int(row) for row in rows[gain.argsort(descending=True, stable=True)]]


@torch.no_grad()
def weights(adapter: Adapter, examples: Examples, classes: int) -> dict[str, Any]:
    """By how many doublings the adapter weighs a dimension more than the average one, by class.

    A weight's logarithm to the base 2, less the mean of those of all dimensions: the mean of it over the images of each
    class. Features are brought to unit length afterwards, so that only this matters.
    """
    device = next(adapter.parameters()).device
    sums, counts = torch.zeros(0), torch.bincount(examples.labels.long(), minlength=classes)
    for part in _parts(examples, device):
        logs = adapter.weigh(adapter.scaled(part.features)).clamp_min(1e-9).log2().expand_as(part.features).double()
        logs = logs - logs.mean(dim=1, keepdim=True)
        sums = sums if len(sums) else logs.new_zeros(classes, logs.shape[1])
        sums.index_add_(0, part.labels, logs)
    there = counts.nonzero()[:, 0]
    means = sums.cpu()[there] / counts[there, None]
    strength = means.square().mean(dim=0)
    kept = strength.argsort(descending=True, stable=True)[:DIMENSIONS]
    kept = kept[means[:, kept].mean(dim=0).argsort(descending=True, stable=True)]
    order = means.argsort(dim=1, descending=True, stable=True)
    return {
        "of": means.shape[1],
        "common": _rounded(means.mean(dim=0).square().mean() / means.square().mean().clamp_min(1e-12)),
        "classes": there.tolist(),
        "dimensions": kept.tolist(),
        "values": [[_rounded(value) for value in row] for row in means[:, kept]],
        "rising": [_named(row, of[:STRONGEST]) for row, of in zip(means, order, strict=True)],
        "falling": [_named(row, of.flip(0)[:STRONGEST]) for row, of in zip(means, order, strict=True)],
    }


def _named(row: Tensor, dimensions: Tensor) -> list[list[float]]:
    return [[int(dimension), _rounded(row[dimension])] for dimension in dimensions]


def thumbnail(image: Image) -> str:
    """A small copy as a data URI."""
    small = image.copy()
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    data = io.BytesIO()
    small.save(data, "JPEG", quality=88)
    return "data:image/jpeg;base64," + base64.b64encode(data.getvalue()).decode()


def _rounded(value: Tensor) -> float:
    return round(float(value), 4)
