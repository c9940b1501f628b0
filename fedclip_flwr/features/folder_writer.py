"""Writes a feature folder: `fedclip encode --out`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedclip_flwr.base import UserError, files, tensorfile
from fedclip_flwr.data.vocabulary import SEPARATOR
from fedclip_flwr.features.folder import CLASSES, FACTS

if TYPE_CHECKING:
    from fedclip_flwr.features.encoded import Encoded


def facts_of(features: Encoded) -> dict[str, Any]:
    """The contents of `features.json`; `content` is the hash of everything that the features depend on."""
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
    """Raise if the features can't be written or would overwrite something else."""
    for domain in features.domains:
        if Path(domain).name != domain or "\0" in domain or domain == CLASSES:
            raise UserError(f"--out: the domain {domain!r} can't be the name of a file: rename it in the data")
    files.make_folder(folder, "--out")
    own = _files(features)
    found = sorted(path.name for path in folder.iterdir())
    if others := [name for name in found if name not in own and _target(name) not in own]:
        raise UserError(f"--out: {folder} holds other files, such as {others[0]}: name another folder")
    if FACTS in found:
        try:
            existing = json.loads((folder / FACTS).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            existing = None
        if existing != facts_of(features):
            raise UserError(f"--out: {folder} holds other features: name another folder")


def _files(features: Encoded) -> set[str]:
    return {FACTS, *(f"{name}.safetensors" for name in (CLASSES, *features.domains))}


def _target(name: str) -> str | None:
    """The file that a temporary file was meant for, if a killed writer left one behind."""
    return name[1:].rpartition(".")[0] if name.startswith(".") else None


def write(folder: Path, features: Encoded) -> None:
    """Write the feature folder; `features.json` comes last, so that it marks a complete folder."""
    for path in list(folder.iterdir()):
        if _target(path.name) in _files(features):
            path.unlink()

    def save(name: str, **tensors: Any) -> None:
        path = folder / f"{name}.safetensors"
        files.write_atomic(path, lambda part: tensorfile.save(tensors, part, {}), "--out")

    save(CLASSES, text_features=features.classes.text)
    for domain in features.domains:
        examples = features.examples(domain)
        save(domain, image_features=examples.features, labels=examples.labels)
    text = json.dumps(facts_of(features), indent=2, ensure_ascii=False) + "\n"
    files.write_text(folder / FACTS, text, "--out")
