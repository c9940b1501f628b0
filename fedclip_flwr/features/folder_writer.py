"""A feature folder, written: `fedclip encode --out`."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedclip_flwr.base import UserError, files, tensorfile
from fedclip_flwr.data.vocabulary import SEPARATOR

if TYPE_CHECKING:
    from fedclip_flwr.features.encoded import Encoded
from fedclip_flwr.features.folder import CLASSES, FACTS


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
    files.make_folder(folder, "--out")
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
        files.write_whole(path, lambda part: tensorfile.save(tensors, part, {}), "--out")

    save(CLASSES, text_features=features.classes.text)
    for domain in features.domains:
        examples = features.examples(domain)
        save(domain, image_features=examples.features, labels=examples.labels)
    text = json.dumps(facts_of(features), indent=2, ensure_ascii=False) + "\n"
    files.write_whole(folder / FACTS, partial(_write, text), "--out")


def _write(text: str, path: Path) -> None:
    path.write_text(text, encoding="utf-8")
