"""An analysis of the images that the server itself holds out: the predictions of zero-shot and the adapted model.

It never covers a site's images, nor a domain that sites train on. The result is stored as `held_out.json`, so that a
report can be made again without the images and the model.
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
from fedclip_flwr.base.settings import LORA
from fedclip_flwr.data import held_out, pick_holdout
from fedclip_flwr.features import Encoded, Features, Pixels, models, open_features
from fedclip_flwr.features.lora import Lora
from fedclip_flwr.features.opening import new_learner
from fedclip_flwr.learning import Adapter, Classes, Examples, Learner
from fedclip_flwr.learning.metrics import sums_by_bin
from fedclip_flwr.learning.training import logits_of
from fedclip_flwr.report.output import FILE
from fedclip_flwr.runs.saved import TENSORS, load_adapter, load_lora
from fedclip_flwr.site.holdings import gathered, together

if TYPE_CHECKING:
    from PIL.Image import Image

PART = 4096
"""Images in a batch."""
SHOWN = 12
"""Changed images shown of each kind, at most."""
THUMBNAIL = 96
STRONGEST = 3
"""Dimensions named for each class: those that rise most, and those that fall most."""
DIMENSIONS = 24
KEPT = "learnt", "domain", "images", "class_names", "zero_shot", "adapted", "weights", "changed", "mended", "spoilt"
"""Required keys of an analysis."""
CHANGED = "its data or its model has changed since the run"


class Predictions(NamedTuple):
    """For each image the predicted class, its probability, and that of the true class."""

    found: Tensor
    confidence: Tensor
    truth: Tensor


def open_held_out(settings: Settings) -> tuple[Features, str]:
    """The data of a run, and the domain or domains that its server holds out."""
    if settings.data == "none":
        raise UserError("the server of this run has no images of its own")
    features = open_features(settings)
    holdout = pick_holdout(settings.holdout, features.domains)
    if holdout is None:
        raise UserError("this run holds out no domain")
    return features, holdout


def unchanged(settings: Settings, features: Features) -> Learner | None:
    """What gives the features of the frozen CLIP; None if the features themselves are those."""
    if isinstance(features, Pixels) or settings.method == LORA:
        return new_learner(settings, features)
    return None


def trained(folder: Path, settings: Settings, features: Features) -> Learner:
    """The result of the run: its adapter, LoRA, or its whole model."""
    if settings.method == LORA:
        return _with_lora(folder, settings, features)
    if not isinstance(features, Pixels):
        adapter, facts = load_adapter(folder)
        if (facts["class_names"], facts["dim"]) != ([*features.vocabulary.class_names], features.classes.dim):
            raise UserError(CHANGED)
        return adapter
    learner = features.whole_model()
    try:
        state, _ = store.mapped(folder / "model" / "model.safetensors")
    except OSError as error:
        raise UserError(f"{folder} holds no model ({one_line(error)})") from None
    learner.load_state_dict({f"net.{name}": tensor for name, tensor in state.items()})
    return learner


def _with_lora(folder: Path, settings: Settings, features: Features) -> Learner:
    found, facts = load_lora(folder)
    learner = new_learner(settings, features)
    assert isinstance(learner, Lora)
    own = {name: tensor.shape for name, tensor in learner.every.items()}
    if (
        facts["class_names"] != [*features.vocabulary.class_names]
        or found.spec != learner.spec
        or own != {name: tensor.shape for name, tensor in found.state.items()}
    ):
        raise UserError(CHANGED)
    learner.take(found.state)
    learner.blend = found.share
    return learner


def result_hash(folder: Path) -> str:
    """The content hash of the run's adapter, LoRA or whole model."""
    model = folder / "model" / "model.safetensors"
    return content.of_file(model if model.exists() else folder / TENSORS)


def analyse(folder: Path, settings: Settings, features: Features, holdout: str) -> dict[str, Any]:
    """The analysis of the held-out domains, with zero-shot and with the result of the run in the folder."""
    domains = held_out(holdout, features.domains)
    examples = together(gathered(features, domains).values())
    if not len(examples.labels):
        raise UserError(f"none of the images of {holdout} can be read")
    device = models.pick_device(settings.device)
    classes = features.classes.ready(device)
    before, after = unchanged(settings, features), trained(folder, settings, features).to(device)
    zero, adapted = (predictions_of(learner, examples, classes) for learner in (before and before.to(device), after))
    names, labels = features.vocabulary.class_names, examples.labels
    rows = {"mended": changed(zero, adapted, labels), "spoilt": changed(adapted, zero, labels)}
    shown = [row for of_kind in rows.values() for row in of_kind[:SHOWN]]
    images = {}
    if isinstance(features, Encoded):
        images = {row: thumbnail(image) for row, image in _pictures(features, domains, shown)}

    def card(row: int) -> dict[str, Any]:
        made = {"zero_shot": zero, "adapted": adapted}
        return {
            "true": int(labels[row]),
            **{who: [int(by.found[row]), _rounded(by.confidence[row])] for who, by in made.items()},
            "image": images.get(row),
        }

    return {
        "learnt": result_hash(folder),
        "domain": holdout,
        "images": len(labels),
        "class_names": list(names),
        "zero_shot": counts_of(zero, labels, len(names)),
        "adapted": counts_of(adapted, labels, len(names)),
        "weights": weights(after, examples, len(names)) if isinstance(after, Adapter) else None,
        "changed": {kind: len(of_kind) for kind, of_kind in rows.items()},
        **{kind: [card(row) for row in of_kind[:SHOWN]] for kind, of_kind in rows.items()},
    }


def _pictures(features: Encoded, domains: Sequence[str], rows: Sequence[int]) -> Iterator[tuple[int, Image]]:
    """The images of these rows, counted over the examples of all these domains."""
    first = 0
    for domain in domains:
        count = len(features.examples(domain).labels)
        own = [row - first for row in rows if 0 <= row - first < count]
        yield from ((first + row, image) for row, image in features.pictures(domain, own))
        first += count


def as_text(found: dict[str, Any]) -> str:
    """The analysis as stored in `held_out.json`."""
    return json.dumps(found, ensure_ascii=False) + "\n"


def kept(folder: Path, why: str) -> tuple[dict[str, Any] | None, str]:
    """The analysis stored in the run's folder, and a sentence on why it is not a new one, or can't be used."""
    try:
        found = files.read_json(folder / FILE)
        if missing := [key for key in KEPT if key not in found]:
            raise ValueError(f"it lacks {missing[0]}")
        fits = found["learnt"] == result_hash(folder)
    except (OSError, ValueError, TypeError) as error:
        return None, f"{why}; and {FILE} can't be read ({one_line(error)})"
    if not fits:
        return None, f"{why}; and {FILE} is of an earlier round"
    return found, f"This is an earlier analysis; it can't be repeated here: {why}"


@torch.no_grad()
def predictions_of(learner: Learner | None, examples: Examples, classes: Classes) -> Predictions:
    """The predictions of the learner, or of CLIP itself if there is none, for each image."""
    parts = []
    for part in _parts(examples, classes.text.device):
        chances = logits_of(learner, part, classes).softmax(dim=1)
        confidence, found = chances.max(dim=1)
        truth = chances.gather(1, part.labels[:, None])[:, 0]
        parts.append((found.cpu(), confidence.cpu().double(), truth.cpu().double()))
    return Predictions(*map(torch.cat, zip(*parts, strict=True)))


def _parts(examples: Examples, device: str | torch.device) -> Iterator[Examples]:
    for start in range(0, len(examples.labels), PART):
        yield Examples(*(tensor[start : start + PART] for tensor in examples)).ready(device)


def counts_of(made: Predictions, labels: Tensor, classes: int) -> dict[str, Any]:
    """The counts of true and predicted classes (without zeros), and for each bin its images and sums."""
    right = made.found == labels
    counts = torch.bincount(labels * classes + made.found)
    pairs = counts.nonzero()[:, 0]
    images, confidence, correct = (
        sums_by_bin(made.confidence, values) for values in (torch.ones_like(labels), made.confidence, right)
    )
    return {
        "correct": int(right.sum()),
        "confusion": [
            [pair // classes, pair % classes, n] for pair, n in zip(pairs.tolist(), counts[pairs].tolist(), strict=True)
        ],
        "bins": {
            "images": [int(value) for value in images],
            "confidence": [_rounded(value) for value in confidence],
            "correct": [int(value) for value in correct],
        },
    }


def changed(wrong: Predictions, right: Predictions, labels: Tensor) -> list[int]:
    """The images that are wrong in one and right in the other, those with the largest gain of the true class first."""
    rows = ((wrong.found != labels) & (right.found == labels)).nonzero()[:, 0]
    gain = (right.truth - wrong.truth)[rows]
    return [int(row) for row in rows[gain.argsort(descending=True, stable=True)]]


@torch.no_grad()
def weights(adapter: Adapter, examples: Examples, classes: int) -> dict[str, Any]:
    """By how many doublings the adapter weights a dimension more than the average one, by class.

    The base-2 logarithm of a weight minus its mean over all dimensions, averaged over the images of each class.
    Features are normalised to unit length afterwards, so that only this difference matters.
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
