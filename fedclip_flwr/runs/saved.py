"""A trained adapter or whole model on disk, with everything needed to use it elsewhere.

An adapter is `adapter.safetensors` and `adapter.json` (in a folder for the hub `config.json`); a whole model is a
folder as `save_pretrained` writes it, with `fedclip.json`.

Tensors and facts are two files, and a process may be killed after it has replaced only the first, the tensors. So their
header also has the facts that change from round to round. These take precedence if the hash in the other file is not
that of the tensors.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError

from fedclip_flwr.base import Settings, UserError, content, files, store, tensorfile
from fedclip_flwr.base.errors import one_line
from fedclip_flwr.base.settings import FORMS, GRADIENT, LORA, MOST_NORM, ONE_ROUND
from fedclip_flwr.base.tensors import State
from fedclip_flwr.data import Vocabulary
from fedclip_flwr.data.vocabulary import check_classes
from fedclip_flwr.features import Features, Pixels, models
from fedclip_flwr.learning import Adapter, ClosedForm, OneGradient, OneRound
from fedclip_flwr.learning.adapters import adapter_class, blank_adapter
from fedclip_flwr.learning.lora import LoraSpec, LoraTensors
from fedclip_flwr.learning.recipes import length_of
from fedclip_flwr.runs import peft_folder
from fedclip_flwr.runs.history import FACTS as FACTS
from fedclip_flwr.runs.history import TENSORS as TENSORS

WHOLE, WEIGHTS, CONFIG = "fedclip.json", "model.safetensors", "config.json"
"""The facts of a whole model, its weights, and the name that the hub expects for the facts of an adapter."""
OF_A_MACHINE = ("_name_or_path", "name_or_path", "special_tokens_map_file", "tokenizer_file")
"""Entries of a model's files that describe the machine they were on."""
LARGEST = 2**16
"""No feature is longer than this."""


def save_adapter(
    folder: Path,
    state: State,
    settings: Settings,
    features: Features,
    number: int,
    setting: str = "FEDCLIP_HOME",
    *,
    blend: float | None = None,
    **more: object,
) -> None:
    """Saves the adapter of round `number`; errors name the `setting` that determines the folder."""
    own = {"blend": settings.trained_blend if blend is None else blend, **more}
    write_tensors(folder / TENSORS, state, number, setting, **{key: json.dumps(value) for key, value in own.items()})
    one_round, lora = settings.method == ONE_ROUND, settings.method == LORA
    facts = {
        "kind": settings.method if one_round or lora else settings.adapter,
        "rank": settings.lora_rank if lora else settings.adapter_rank,
        **({"lora": LoraSpec.of(settings).facts} if lora else {}),
        **({"statistics": settings.statistics, "directions": state["prompts"].shape[1]} if one_round else {}),
        "dim": features.classes.text.shape[1],
        **_made_for(features),
        "prompts": features.vocabulary.prompts,
        "feature_norm": length_of(settings) or float(features.has_unit_length()),  # unit length, if they were stored so
        "scale": features.classes.scale,
        "bias": features.classes.bias,
        "round": number,
        **own,
        **({"plugins": plugins} if (plugins := settings.packages("adapter")) else {}),
        "tensors": content.of_file(folder / TENSORS),
    }
    write_json(folder / FACTS, facts, setting)


def _made_for(features: Features) -> dict[str, Any]:
    """The frozen model, the class names and the prompt templates."""
    names, templates = features.vocabulary
    return {
        "model": features.model,
        "model_revision": features.model_revision,
        "model_content": features.model_content,
        "class_names": names,
        "templates": templates,
    }


def save_model(folder: Path, state: State, features: Pixels, number: int, setting: str = "FEDCLIP_HOME") -> None:
    """Saves the whole model of round `number`, in a folder that the setting `model` accepts."""
    for file in models.model_files(features.model_folder):
        if file.name in ("config.json", "tokenizer_config.json"):
            facts = {key: value for key, value in json.loads(file.read_text()).items() if key not in OF_A_MACHINE}
            more = {"dtype": "float32"} if file.name == "config.json" else {}
            write_json(folder / file.name, {**facts, **more}, setting)
        elif not file.name.startswith("model"):  # the weights
            files.write_atomic(folder / file.name, partial(shutil.copyfile, file), setting)
    weights = {name.removeprefix("net."): tensor for name, tensor in state.items()}
    write_tensors(folder / WEIGHTS, weights, number, setting, format="pt")  # transformers requires it
    write_json(folder / WHOLE, {"kind": "full-model", **_made_for(features), "round": number}, setting)


def write_json(path: Path, facts: dict[str, Any], setting: str = "FEDCLIP_HOME") -> None:
    files.write_text(path, json.dumps(facts, indent=2) + "\n", setting)


def write_tensors(path: Path, state: State, number: int, setting: str = "FEDCLIP_HOME", **facts: str) -> None:
    """Saves the tensors, with `number` (the round) and the `facts` in the header."""
    header = {**facts, "round": str(number)}
    files.write_atomic(path, lambda part: tensorfile.save(state, part, header), setting)


class _Read(NamedTuple):
    """The facts of an adapter and its tensors, with their files."""

    facts: dict[str, Any]
    state: State
    described: Path
    tensors: Path


def load_adapter(folder: Path, exact: bool = False) -> tuple[Adapter | ClosedForm, dict[str, Any]]:
    """The adapter in a folder, such as that of a run or one for the hub, and its facts.

    With `exact` its file must be the one that the facts were written for, to the bit.
    """
    facts, state, described, tensors = _read(folder, exact)
    with _reading(described):
        adapter = _blank(facts)
        like = adapter.state_dict()
    if {n: (t.shape, t.dtype) for n, t in state.items()} != {n: (t.shape, t.dtype) for n, t in like.items()}:
        raise UserError(f"{tensors} does not hold the {facts['kind']} adapter that adapter.json describes")
    _check_finite(tensors, state)
    adapter.load_state_dict({name: tensor.clone() for name, tensor in state.items()}, assign=True)
    return adapter, facts


def load_lora(folder: Path) -> tuple[LoraTensors, dict[str, Any]]:
    """LoRA in a folder, such as that of a run or an export, in float32, and its facts."""
    facts, state, described, tensors = _read(folder)
    with _reading(described):
        _check_share(facts["blend"])
        _check_size(facts["dim"])
        _check_texts(facts)
        found = LoraTensors(LoraSpec.read(facts["lora"]), peft_folder.from_peft(state), float(facts["blend"]))
    with _reading(tensors):
        found.check()
    _check_finite(tensors, state)
    own = {name: tensor.to(torch.float32, copy=True) for name, tensor in found.state.items()}
    return replace(found, state=own), facts


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Errors in what the file holds, as one line that names it."""
    try:
        yield
    except KeyError as error:
        raise UserError(f"{path} lacks {error}") from None
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        raise UserError(f"{path} can't be read ({one_line(error)})") from None


def _read(folder: Path, exact: bool = False) -> _Read:
    described, tensors = folder / FACTS, folder / TENSORS
    if folder.is_dir() and not described.exists():
        described = folder / CONFIG
    if folder.is_dir() and not described.exists():
        if (folder / "settings.json").exists():
            raise UserError(f"{folder} holds no adapter: its run completed no round; see `fedclip runs {folder}`")
        raise UserError(f"{folder} holds no adapter: name a run, or a folder that `fedclip export` has written")
    with _reading(described):
        facts = files.read_json(described)
        if not isinstance(facts, dict):
            raise ValueError("expected an object")
        if facts.get("kind") == LORA and not tensors.exists():
            tensors = folder / peft_folder.TENSORS
    with _reading(tensors):
        state, header = store.mapped(tensors)
        found = content.of_file(tensors)
        if facts.get("tensors") not in (None, found):
            if exact:
                raise UserError(f"{tensors} does not match {described.name}: restore a copy, or start a new run")
            if "blend" not in header:
                raise UserError(f"{tensors} does not match {described.name}: export it again")
            facts |= {key: files.parsed(fact) for key, fact in header.items()} | {"tensors": found}
    return _Read(facts, state, described, tensors)


def _check_finite(path: Path, state: State) -> None:
    if not all(tensorfile.all_finite(tensor) for tensor in state.values()):
        raise UserError(f"{path} has numbers that are not finite")


def load_whole(folder: Path) -> dict[str, Any]:
    """The facts of the whole model in that folder."""
    path = folder / WHOLE
    try:
        facts: dict[str, Any] = files.read_json(path)
        _check_texts(facts)
        path = folder / WEIGHTS
        if path.exists() and (number := files.read_header(path).get("round")):
            facts["round"] = int(number)  # the other file may be older
    except KeyError as error:
        raise UserError(f"{path} lacks {error}") from None
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path} can't be read ({one_line(error)})") from None
    return facts


def _blank(facts: dict[str, Any]) -> Adapter | ClosedForm:
    """An empty adapter as `adapter.json` describes it. It takes no memory yet: the file may claim any size."""
    kind, dim, rank, blend = (facts[key] for key in ("kind", "dim", "rank", "blend"))
    if kind != ONE_ROUND:
        try:
            adapter_class(kind)
        except UserError as error:
            raise ValueError(str(error)) from None
    if any(type(size) is not int or not 0 < size <= LARGEST for size in (dim, rank)):
        raise ValueError(f"dim {dim!r} and rank {rank!r} must be whole numbers from 1 to {LARGEST:,}")
    _check_share(blend)
    length = facts.get("feature_norm", 1.0)  # earlier versions always used unit length
    if type(length) not in (int, float) or not 0 <= length <= MOST_NORM:
        raise ValueError(f"its feature_norm is {length!r}, expected a number from 0 to {MOST_NORM:,.0f}")
    _check_texts(facts)
    if kind == ONE_ROUND:
        if (statistics := facts["statistics"]) == GRADIENT:
            return OneGradient(len(learnt_classes(facts)), dim)
        if statistics not in FORMS:
            raise ValueError(f"its statistics is {statistics!r}, expected one of {', '.join((*FORMS, GRADIENT))}")
        width = dim if statistics == "full" else facts.get("directions", 0)  # earlier versions never added classes
        if type(width) is not int or not 0 <= width <= dim:
            raise ValueError(f"its directions are {width!r}, expected a number from 0 to {dim}")
        return OneRound(statistics, len(learnt_classes(facts)), dim, width)
    return blank_adapter(kind, dim, rank=rank, blend=float(blend), length=float(length))


def _check_size(dim: object) -> None:
    if not isinstance(dim, int) or not 0 < dim <= LARGEST:
        raise ValueError(f"its dim is {dim!r}, expected a whole number from 1 to {LARGEST:,}")


def _check_share(blend: object) -> None:
    if not isinstance(blend, int | float) or not 0 <= blend <= 1:
        raise ValueError(f"its blend is {blend!r}, expected a number from 0 to 1")


def learnt_classes(facts: Mapping[str, Any]) -> Sequence[str]:
    """The classes that the adapter was learnt with: others may have been given since."""
    return [str(name) for name in facts.get("learnt_classes", facts["class_names"])]


def _check_texts(facts: dict[str, Any]) -> None:
    for key in ("class_names", "templates"):
        if not isinstance(facts[key], list) or not all(isinstance(text, str) for text in facts[key]):
            raise ValueError(f"its {key} must be a list of texts")
    try:
        check_classes(Vocabulary(tuple(facts["class_names"]), tuple(facts["templates"])))
    except UserError as error:
        raise ValueError(str(error)) from None
