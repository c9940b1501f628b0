"""What was learnt, on disk, with all that is needed to use it elsewhere.

An adapter is `adapter.safetensors` and `adapter.json` (in a folder for the hub `config.json`); a whole model is a
folder as `save_pretrained` writes it, with `fedclip.json`.
"""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from fedclip_flwr import clip, content, store, tensorfile
from fedclip_flwr.adapters import ADAPTERS, Adapter, blank_adapter
from fedclip_flwr.config import Settings
from fedclip_flwr.errors import UserError, one_line
from fedclip_flwr.features import Features, Pixels
from fedclip_flwr.history import FACTS as FACTS
from fedclip_flwr.vocabulary import Vocabulary, check_classes

TENSORS = "adapter.safetensors"
WHOLE, CONFIG = "fedclip.json", "config.json"
"""Facts like those of an adapter: beside a whole model, and under the name that the hub knows."""
OF_A_MACHINE = ("_name_or_path", "name_or_path", "special_tokens_map_file", "tokenizer_file")
"""What a model's files tell of the machine that they were on."""
LARGEST = 2**16
"""No feature has so many numbers."""


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
    facts = {
        "kind": settings.adapter,
        "rank": settings.adapter_rank,
        "dim": features.classes.text.shape[1],
        "blend": settings.trained_blend if blend is None else blend,
        **_made_for(features),
        "prompts": features.vocabulary.prompts,
        "scale": features.classes.scale,
        "bias": features.classes.bias,
        "round": number,
        **more,
    }
    write_tensors(folder / TENSORS, state, number, setting)
    write_json(folder / FACTS, facts, setting)


def _made_for(features: Features) -> dict[str, Any]:
    """The frozen model, and what it tells images apart by."""
    names, templates = features.vocabulary
    return {
        "model": features.model,
        "model_revision": features.model_revision,
        "model_content": features.model_content,
        "class_names": names,
        "templates": templates,
    }


def save_model(
    folder: Path, state: store.Tensors, features: Pixels, number: int, setting: str = "FEDCLIP_HOME"
) -> None:
    """The whole model of round `number`, in a folder that the setting `model` takes."""
    for file in clip.files(features.model_folder):
        if file.name in ("config.json", "tokenizer_config.json"):
            facts = {key: value for key, value in json.loads(file.read_text()).items() if key not in OF_A_MACHINE}
            more = {"dtype": "float32"} if file.name == "config.json" else {}
            write_json(folder / file.name, {**facts, **more}, setting)
        elif not file.name.startswith("model"):  # the weights
            content.write_whole(folder / file.name, partial(shutil.copyfile, file), setting)
    weights = {name.removeprefix("net."): tensor for name, tensor in state.items()}
    path, facts = folder / "model.safetensors", {"format": "pt"}  # without it, transformers does not read the file
    content.write_whole(path, lambda part: content.save_tensors(weights, part, facts), setting)
    write_json(folder / WHOLE, {"kind": "full-model", **_made_for(features), "round": number}, setting)


def write_json(path: Path, facts: dict[str, Any], setting: str = "FEDCLIP_HOME") -> None:
    text = json.dumps(facts, indent=2) + "\n"
    content.write_whole(path, lambda part: part.write_text(text), setting)


def write_tensors(path: Path, state: store.Tensors, number: int, setting: str = "FEDCLIP_HOME") -> None:
    content.write_whole(path, lambda part: content.save_tensors(state, part, {"round": str(number)}), setting)


def load_adapter(folder: Path) -> tuple[Adapter, dict[str, Any]]:
    """The adapter in a folder, such as that of a run or one for the hub, and what it was made for."""
    path = folder / FACTS
    if folder.is_dir() and not path.exists():
        path = folder / CONFIG
    if folder.is_dir() and not path.exists():
        if (folder / "settings.json").exists():
            raise UserError(f"{folder} holds no adapter: its run came to no round; `fedclip runs {folder}` tells more")
        raise UserError(f"{folder} holds no adapter: name a run, or a folder that `fedclip export` has written")
    try:
        facts = content.read_json(path)
        if not isinstance(facts, dict):
            raise ValueError("expected an object")
        adapter = _blank(facts)
        like = adapter.state_dict()
        path = folder / TENSORS
        state, _ = store.mapped(path)
    except KeyError as error:
        raise UserError(f"{path} lacks {error}") from None
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        raise UserError(f"{path} can't be read ({one_line(error)})") from None
    if {n: (t.shape, t.dtype) for n, t in state.items()} != {n: (t.shape, t.dtype) for n, t in like.items()}:
        raise UserError(f"{path} does not hold the {facts['kind']} adapter that adapter.json tells of")
    if facts.get("tensors") not in (None, content.of_file(path)):
        raise UserError(f"{path} is another one than {CONFIG} tells of: export it once more")
    if not all(tensorfile.all_finite(tensor) for tensor in state.values()):
        raise UserError(f"{path} has numbers that are not finite")
    adapter.load_state_dict({name: tensor.clone() for name, tensor in state.items()}, assign=True)
    return adapter, facts


def load_whole(folder: Path) -> dict[str, Any]:
    """What the whole model in that folder was made for."""
    path = folder / WHOLE
    try:
        facts: dict[str, Any] = content.read_json(path)
        _check_texts(facts)
    except KeyError as error:
        raise UserError(f"{path} lacks {error}") from None
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path} can't be read ({one_line(error)})") from None
    return facts


def _blank(facts: dict[str, Any]) -> Adapter:
    """The adapter that `adapter.json` tells of, to be filled: nothing here takes memory because that says so."""
    kind, dim, rank, blend = (facts[key] for key in ("kind", "dim", "rank", "blend"))
    if kind not in ADAPTERS:
        raise ValueError(f"its kind is {kind!r}, expected one of {', '.join(ADAPTERS)}")
    if any(type(size) is not int or not 0 < size <= LARGEST for size in (dim, rank)):
        raise ValueError(f"dim {dim!r} and rank {rank!r} must be whole numbers from 1 to {LARGEST:,}")
    if type(blend) not in (int, float) or not 0 <= blend <= 1:
        raise ValueError(f"its blend is {blend!r}, expected a number from 0 to 1")
    _check_texts(facts)
    return blank_adapter(kind, dim, rank=rank, blend=float(blend))


def _check_texts(facts: dict[str, Any]) -> None:
    for key in ("class_names", "templates"):
        if not isinstance(facts[key], list) or not all(isinstance(text, str) for text in facts[key]):
            raise ValueError(f"its {key} are no list of texts")
    try:
        check_classes(Vocabulary(tuple(facts["class_names"]), tuple(facts["templates"])))
    except UserError as error:
        raise ValueError(str(error)) from None
