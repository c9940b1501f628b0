"""What was learnt, on disk, with all that is needed to use it elsewhere.

An adapter is `adapter.safetensors` and `adapter.json`; a whole model is a folder as `save_pretrained` writes it.
"""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from fedclip_flwr import clip, content, store
from fedclip_flwr.adapters import Adapter, make_adapter
from fedclip_flwr.config import Settings
from fedclip_flwr.errors import UserError
from fedclip_flwr.features import Features, Pixels

TENSORS, FACTS = "adapter.safetensors", "adapter.json"


def save_adapter(
    folder: Path,
    state: store.Tensors,
    settings: Settings,
    features: Features,
    number: int,
    setting: str = "FEDCLIP_HOME",
    *,
    blend: float | None = None,
    **more: object,
) -> None:
    """The adapter of round `number`; `setting` says where the folder is."""
    names, templates = features.vocabulary
    facts = {
        "kind": settings.adapter,
        "rank": settings.adapter_rank,
        "dim": features.classes.text.shape[1],
        "blend": settings.trained_blend if blend is None else blend,
        "model": features.model,
        "model_revision": features.model_revision,
        "model_content": features.model_content,
        "class_names": names,
        "templates": templates,
        "prompts": features.vocabulary.prompts,
        "scale": features.classes.scale,
        "bias": features.classes.bias,
        "round": number,
        **more,
    }
    write_tensors(folder / TENSORS, state, number, setting)
    write_json(folder / FACTS, facts, setting)


def save_model(folder: Path, state: store.Tensors, features: Pixels, setting: str = "FEDCLIP_HOME") -> None:
    """The whole model, in a folder that the setting `model` takes."""
    for file in clip.files(features.model_folder):
        if file.name == "config.json":
            write_json(folder / file.name, {**json.loads(file.read_text()), "dtype": "float32"}, setting)
        elif not file.name.startswith("model"):  # the weights
            content.write_whole(folder / file.name, partial(shutil.copyfile, file), setting)
    weights = {name.removeprefix("net."): tensor for name, tensor in state.items()}
    path, facts = folder / "model.safetensors", {"format": "pt"}  # without it, transformers does not read the file
    content.write_whole(path, lambda part: content.save_tensors(weights, part, facts), setting)


def write_json(path: Path, facts: dict[str, Any], setting: str = "FEDCLIP_HOME") -> None:
    text = json.dumps(facts, indent=2) + "\n"
    content.write_whole(path, lambda part: part.write_text(text), setting)


def write_tensors(path: Path, state: store.Tensors, number: int, setting: str = "FEDCLIP_HOME") -> None:
    content.write_whole(path, lambda part: content.save_tensors(state, part, {"round": str(number)}), setting)


def load_adapter(folder: Path) -> tuple[Adapter, dict[str, Any]]:
    """The adapter in a folder, such as that of a run, and what it was made for."""
    path = folder / FACTS
    if folder.is_dir() and not path.exists():
        raise UserError(f"{folder} holds no adapter: its run came to no round; summary.json there tells how it ended")
    try:
        facts = json.loads(path.read_text())
        adapter = make_adapter(facts["kind"], facts["dim"], rank=facts["rank"], blend=facts["blend"])
        like = adapter.state_dict()
        path = folder / TENSORS
        state, _ = store.mapped(path)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise UserError(f"{path} can't be read ({' '.join(str(error).split())[:300]})") from None
    if {n: (t.shape, t.dtype) for n, t in state.items()} != {n: (t.shape, t.dtype) for n, t in like.items()}:
        raise UserError(f"{path} does not hold the {facts['kind']} adapter that adapter.json tells of")
    adapter.load_state_dict(state)
    return adapter, facts
