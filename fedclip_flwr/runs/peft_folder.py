"""LoRA in PEFT's own format: a folder that PEFT reads without this package, and one to go on from (`start`).

A tensor is called `base_model.model.LAYER.lora_A.weight` there. Of `adapter_config.json` PEFT itself writes everything;
what is read of it is refused if it asks for more than plain LoRA in the layers of the towers.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor

from fedclip_flwr.base import Settings, UserError, files, store, tensorfile
from fedclip_flwr.base.errors import one_line
from fedclip_flwr.base.tensors import State
from fedclip_flwr.features import Encoded, Features
from fedclip_flwr.features.lora import Lora, shapes
from fedclip_flwr.features.opening import new_learner
from fedclip_flwr.features.towers import layers_of
from fedclip_flwr.learning import Learner
from fedclip_flwr.learning.lora import MOST_ALPHA, MOST_RANK, TOWERS, A, B, LoraSpec, LoraTensors

log = logging.getLogger(__name__)
CONFIG, TENSORS, PICKLE, OURS = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin", "config.json"
PREFIX, END = "base_model.model.", ".weight"
"""The start and the end of a tensor's name in PEFT's format."""
LAYER = re.compile(r"(vision|text)_model\.encoder\.layers\.(\d{1,4})\.(?:\w+\.)*(\w+)")
"""The name of a linear part of a tower's layer."""
PLAIN = {"rank_pattern": {}, "alpha_pattern": {}, "bias": "none", "use_dora": False, "fan_in_fan_out": False}
"""Entries of the configuration that must have these values, if they are there."""
UNKNOWN = (
    *("modules_to_save", "use_qalora", "lora_bias", "layer_replication", "trainable_token_indices", "use_bdlora"),
    *("target_parameters", "alora_invocation_tokens", "arrow_config", "kasa_config", "monteclora_config"),
    *("velora_config", "megatron_config"),
)
"""Entries that must be empty, if they are there."""
STARTS = (True, False, None, "gaussian", "eva", "orthogonal")
"""Values of `init_lora_weights` that leave the model's own weights as they are."""


class PeftFolder(NamedTuple):
    """What a folder holds: the tensors under the names of `learning/lora.py`, and their sizes."""

    state: State
    rank: int
    alpha: float
    model: str  # the name of the CLIP, as its maker gave it
    content: str  # the CLIP's hash, if the folder is one of our exports


def to_peft(state: Mapping[str, Tensor]) -> State:
    """The tensors under PEFT's names."""
    return {f"{PREFIX}{name}{END}": tensor for name, tensor in state.items()}


def from_peft(state: Mapping[str, Tensor]) -> State:
    """The tensors under our names; those that have them already keep them."""
    return {name.removeprefix(PREFIX).removesuffix(END): tensor for name, tensor in state.items()}


def check_installed() -> None:
    """Raises if PEFT, which writes the configuration, is missing."""
    if find_spec("peft") is None:
        raise UserError("LoRA is exported by peft: pip install 'fedclip-flwr[lora]'")


def write_config(folder: Path, lora: LoraTensors, model: str, revision: str, kind: type) -> None:
    """Writes the configuration; `model` is the CLIP's name, and `kind` its class in transformers."""
    check_installed()
    from peft import LoraConfig

    alpha = lora.spec.alpha * lora.share
    config = LoraConfig(
        r=lora.spec.rank,
        lora_alpha=json.loads(_number(alpha)),
        base_model_name_or_path=model,
        revision=revision or None,
        inference_mode=True,
        auto_mapping={"base_model_class": kind.__name__, "parent_library": kind.__module__},
    )
    config.target_modules = sorted({name.removesuffix(A).removesuffix(B) for name in lora.state})  # no set: in order
    config.save_pretrained(str(folder))


def start_of(settings: Settings, features: Features) -> Learner:
    """The learner of a run that goes on from the folder in `start`."""
    found = checked(settings, features)
    if found.model and not found.content and Path(found.model).name != Path(features.model).name:
        log.warning("start: made for %r, by its own words; this run's model is %r", found.model, features.model)
    learner = new_learner(settings, features)
    assert isinstance(learner, Lora)
    learner.take(found.state)
    return learner


def checked(settings: Settings, features: Features) -> PeftFolder:
    """What the folder in `start` holds; raises unless it fits the settings and the model."""
    assert isinstance(features, Encoded)
    try:
        found = read(Path(settings.start))
        if found.content and features.model_content and found.content != features.model_content:
            raise ValueError("it is for another model: set model to the one that it was made with")
        net = features.skeleton()
        _check_settings(found, settings, net)
        _check_fit(found.state, shapes(net, LoraSpec.of(settings)))
    except ValueError as error:
        raise UserError(f"start = {settings.start!r}: {one_line(error)}") from None
    return found


def read(folder: Path) -> PeftFolder:
    """What the folder holds; a `ValueError` says what is wrong with it, or what LoRA here can't do."""
    rank, alpha = _sizes(facts := _opened(folder / CONFIG, files.read_json))
    if not (folder / TENSORS).exists() and (folder / PICKLE).exists():
        raise ValueError(f"it has only {PICKLE}, a pickle, which is never read: save it again as safetensors")
    tensors, _ = _opened(folder / TENSORS, store.mapped)
    model = str(facts.get("base_model_name_or_path") or "")
    return PeftFolder(_plain(tensors, rank), rank, alpha, model, _content(folder / OURS))


def _opened(path: Path, read: Callable[[Path], Any]) -> Any:
    """What `read` makes of the file."""
    try:
        return read(path)
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"{path} is missing: expected a folder that PEFT has saved") from None
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(f"{path} can't be read ({one_line(error)}): copy it again") from None


def _sizes(facts: Any) -> tuple[int, float]:
    """The rank and the alpha in a configuration of plain LoRA."""
    if not isinstance(facts, dict) or facts.get("peft_type") != "LORA":
        raise ValueError(f"{CONFIG} does not describe LoRA: name a folder with LoRA")
    asked = [key for key, plain in PLAIN.items() if facts.get(key, plain) not in (plain, None)]
    asked += [key for key in UNKNOWN if facts.get(key)]
    asked += ["init_lora_weights"] * (facts.get("init_lora_weights") not in STARTS)
    if asked:
        raise ValueError(f"it has {asked[0]} = {json.dumps(facts[asked[0]])}: only plain LoRA can be trained here")
    rank, alpha = facts.get("r"), facts.get("lora_alpha")
    if not (
        isinstance(rank, int) and isinstance(alpha, int | float) and 0 < rank <= MOST_RANK and 0 < alpha <= MOST_ALPHA
    ):
        most = f"up to {MOST_RANK:,} and {MOST_ALPHA:,.0f}"
        raise ValueError(f"its r is {rank!r} and its lora_alpha {alpha!r}: expected numbers above 0, {most}")
    return rank, float(alpha) * (rank**0.5 if facts.get("use_rslora") else 1.0)


def _plain(tensors: State, rank: int) -> State:
    """The tensors under our names, in float32."""
    found = from_peft(tensors)
    for name in found:
        if not name.endswith((A, B)) or not LAYER.fullmatch(name.removesuffix(A).removesuffix(B)):
            raise ValueError(f"it has {name}: only LoRA in the linear parts of the towers' layers can be trained here")
    LoraTensors(LoraSpec("both", "all", (), rank, 1.0), found).check()
    if bad := [name for name, tensor in found.items() if not tensorfile.all_finite(tensor)]:
        raise ValueError(f"{bad[0]} has numbers that are not finite")
    return {name: tensor.to(torch.float32, copy=True) for name, tensor in found.items()}


def _content(path: Path) -> str:
    """The hash of the CLIP in the facts of one of our exports."""
    try:
        facts = files.read_json(path)
    except (OSError, ValueError):
        return ""
    return str(facts.get("model_content") or "") if isinstance(facts, dict) and "fedclip_flwr" in facts else ""


def _check_settings(found: PeftFolder, settings: Settings, net: Any) -> None:
    """Raises unless the settings ask for LoRA of the folder's size, in the same towers, layers and parts of them."""
    spec = LoraSpec.of(settings)
    parts: dict[str, dict[int, set[str]]] = {}
    for name in found.state:
        tower, number, part = _place(name)
        parts.setdefault(tower, {}).setdefault(int(number), set()).add(part)
    numbers = [sorted(layers) for layers in parts.values()]
    modules = next(iter(next(iter(parts.values())).values()))
    last = {len(of) for of in numbers}
    begins = all(of[0] == 0 for of in numbers)
    even = all(own == modules for layers in parts.values() for own in layers.values())
    even &= all(max(layers) >= len(layers_of(net, tower)) - 1 for tower, layers in parts.items())
    if not even or any(of != [*range(of[0], of[-1] + 1)] for of in numbers) or (len(last) > 1 and not begins):
        raise ValueError("its LoRA is not in the same parts of all last layers: LoRA like that can't be trained here")
    own = spec.layers if (spec.layers == "all" and begins) or last == {spec.last} else ""
    layers = own or ("all" if begins else f"last:{last.pop()}")
    names = spec.modules if {*spec.modules} == modules else sorted(modules)
    alpha = spec.alpha if math.isclose(spec.alpha, found.alpha, rel_tol=1e-6) else found.alpha
    targets = next(name for name, towers in TOWERS.items() if {*towers} == parts.keys())
    if (fits := LoraSpec(targets, layers, tuple(names), found.rank, alpha)) != spec:
        raise ValueError(
            f"its LoRA is another one: set lora-targets={targets} lora-layers={layers} lora-modules={','.join(names)} "
            f"lora-rank={fits.rank} lora-alpha={_number(alpha)}"
        )


def _place(name: str) -> tuple[str, str, str]:
    """The tower, the number of the layer and the part of it that a tensor is for."""
    found = LAYER.fullmatch(name.removesuffix(A).removesuffix(B))
    assert found
    return found[1], found[2], found[3]


def _check_fit(state: State, own: Mapping[str, Sequence[int]]) -> None:
    """Raises unless the model has the same layers, of the same shapes."""
    given = {name: tensor.shape for name, tensor in state.items()}
    for name in sorted({*own, *given}):
        there, here = (f"{[*of[name]]}" if name in of else "nothing" for of in (given, own))
        if there != here:
            raise ValueError(
                f"it is for another model, or for some of its layers: it has {there} for {name}, expected {here}; "
                "set model to the one that it was made with"
            )


def _number(value: float) -> str:
    return repr(int(value) if value.is_integer() else value)
