"""The command `fedclip encode`: features made ahead of time, in the store and as a feature folder."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from fedclip_flwr import content, tensorfile
from fedclip_flwr.console import counted
from fedclip_flwr.errors import UserError
from fedclip_flwr.features import Encoded, open_run
from fedclip_flwr.simulation import read_settings
from fedclip_flwr.vocabulary import SEPARATOR

TAKEN = (
    "data",
    "image-column",
    "label-column",
    "domain-column",
    "model",
    "model-revision",
    "prompt",
    "class-names",
    "device",
    "precision",
)
"""The settings that encoding has."""
FACTS, CLASSES = "features.json", "classes"


def encode(given: Sequence[str], out: str = "") -> str:
    """Encodes what is not stored yet, and writes it to the folder `out` if there is one; the summary."""
    begun = time.monotonic()
    settings, problems = read_settings(given)
    for key in settings.keys() - {*TAKEN} - problems.keys():
        problems[key] = f"{key}: encoding has no use for it; leave it out"
    if str(settings.get("data", "")).startswith("features:"):
        problems["data"] = f"data = {settings['data']!r}: these are features already; name the images"
    _, features, _ = open_run(settings, problems)
    if not isinstance(features, Encoded):
        raise TypeError("a run on images has encoded features")
    folder = Path(out).expanduser().absolute() if out else None
    if folder:
        check(folder, features)  # before the work, not after it
    images = {domain: len(features.examples(domain).labels) for domain in features.domains}
    seconds = time.monotonic() - begun
    broken = sum(features.count(domain) for domain in images) - sum(images.values())
    if folder:
        write(folder, features)
    by_domain = ", ".join(f"{domain} {count:,}" for domain, count in images.items())
    classes = counted(len(features.vocabulary.class_names), "class")
    speed = f"{features.encoded / seconds:,.0f} images/s" if features.encoded else "all of them were stored already"
    return (
        f"{sum(images.values()):,} images in {classes}: {by_domain}; {broken:,} more can't be read\n"
        f"{seconds:.1f} s, {speed}\n" + (f"Feature folder: {folder}" if folder else f"Stored in {features.folder}")
    )


def facts_of(features: Encoded) -> dict[str, Any]:
    """What `features.json` holds. The `content` is that of all that the features were made of."""
    return {
        "model": features.model,
        "embedding_dim": features.classes.dim,
        "logit_scale": features.classes.scale,
        "logit_bias": features.classes.bias,
        "parameters": features.parameters,
        "prompt": SEPARATOR.join(features.vocabulary.templates),
        "class_names": list(features.vocabulary.class_names),
        "domains": list(features.domains),
        "content": features.content,
    }


def check(folder: Path, features: Encoded) -> None:
    """Raises where the features can't be written, or would take the place of something else."""
    for domain in features.domains:
        if Path(domain).name != domain or "\0" in domain or domain == CLASSES:
            raise UserError(f"--out: the domain {domain!r} can't be the name of a file: rename it in the data")
    content.make_folder(folder, "--out")
    own = _files(features)
    found = sorted(path.name for path in folder.iterdir())
    if others := [name for name in found if name not in own and _begun(name) not in own]:
        raise UserError(f"--out: {folder} holds something else, such as {others[0]}: name another folder")
    if FACTS in found:
        try:
            told = json.loads((folder / FACTS).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            told = None
        if told != facts_of(features):
            raise UserError(f"--out: {folder} holds other features: name another folder")


def _files(features: Encoded) -> set[str]:
    return {FACTS, *(f"{name}.safetensors" for name in (CLASSES, *features.domains))}


def _begun(name: str) -> str | None:
    """The file of which this one is a part, left behind by a writer that was killed."""
    return name[1:].rpartition(".")[0] if name.startswith(".") else None


def write(folder: Path, features: Encoded) -> None:
    """The feature folder. What says that it is whole comes last."""
    for path in list(folder.iterdir()):
        if _begun(path.name) in _files(features):
            path.unlink()

    def save(name: str, **tensors: Any) -> None:
        path = folder / f"{name}.safetensors"
        content.write_whole(path, lambda part: tensorfile.save(tensors, part, {}), "--out")

    save(CLASSES, text_features=features.classes.text)
    for domain in features.domains:
        examples = features.examples(domain)
        save(domain, image_features=examples.features, labels=examples.labels)
    text = json.dumps(facts_of(features), indent=2, ensure_ascii=False) + "\n"
    content.write_whole(folder / FACTS, partial(_write, text), "--out")


def _write(text: str, path: Path) -> None:
    path.write_text(text, encoding="utf-8")
