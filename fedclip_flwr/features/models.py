"""The frozen CLIP on disk: found by name, identified by a content hash, not loaded."""

from __future__ import annotations

import fnmatch
import logging
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from fedclip_flwr.base import UserError, content, files, hub, tensorfile
from fedclip_flwr.base.errors import one_line
from fedclip_flwr.learning.lora import LoraTensors

log = logging.getLogger(__name__)
BUNDLED = files.PACKAGE / "bundled" / "model"
FILES = ("*.json", "*.txt", "*.model", "model*.safetensors")
"""The files of a model: settings, vocabulary, weights. Never a pickle."""
MOST_BYTES = 2**26
"""Maximum size of a model's settings file."""
LARGE = 100 * 10**6
"""Minimum bytes of weights for which a lower precision is worthwhile."""


@dataclass(frozen=True)
class Model:
    """A CLIP on disk, not loaded; with `lora`, which is merged into it when it is loaded."""

    name: str
    folder: Path
    revision: str = ""  # a commit on the hub
    lora: LoraTensors | None = field(default=None, compare=False)

    def content(self, memory: Path) -> str:
        """The hash of the model's files, weights and image processor included, and of LoRA."""
        found = content.of_files(self.folder, [file.name for file in model_files(self.folder)], memory)
        if self.lora is None:
            return found
        scaling, tensors = self.lora.spec.scaling * self.lora.share, self.lora.state
        parts = [part for name in sorted(tensors) for part in (name, bytes(tensorfile.bytes_of(tensors[name])))]
        return content.digest(found, repr(scaling), *parts)

    @property
    def size(self) -> int:
        """The size of its weights in bytes."""
        return sum(file.stat().st_size for file in model_files(self.folder) if file.suffix == ".safetensors")

    @property
    def dim(self) -> int:
        """The length of a feature; an upper bound if the model does not state it."""
        return int(self._config.get("projection_dim") or self._vision.get("hidden_size") or 1152)

    @property
    def image_size(self) -> int:
        """The width in pixels of an input image."""
        return int(self._vision.get("image_size") or 384)

    @property
    def activations(self) -> int:
        """How many numbers go from one layer of the image tower to the next, for an image."""
        patches = self._vision.get("num_patches") or (self.image_size // int(self._vision.get("patch_size") or 14)) ** 2
        return (int(patches) + 1) * int(self._vision.get("hidden_size") or 1152)

    @property
    def _config(self) -> dict[str, Any]:
        return _json(self.folder / "config.json")

    @property
    def _vision(self) -> dict[str, Any]:
        vision = self._config.get("vision_config")
        return vision if isinstance(vision, dict) else {}


def model_files(folder: Path) -> list[Path]:
    """The model's files in the folder."""
    return sorted(file for file in folder.iterdir() if any(fnmatch.fnmatch(file.name, p) for p in FILES))


def find(name: str, revision: str = "") -> Model:
    """The model of that name: `bundled`, a folder saved by `save_pretrained`, or a Hugging Face id."""
    folder = BUNDLED if name == "bundled" else Path(os.path.expanduser(name))
    if not os.path.isdir(folder):
        if folder.is_absolute() or name.startswith("."):
            raise UserError(f"model = {name!r}: folder not found")
        folder = _from_hub(name, revision)
        revision = folder.name
    elif revision:
        raise UserError(f"model-revision = {revision!r}: only models of the Hugging Face hub have revisions")
    elif missing := _lacks(folder):
        raise UserError(f"model = {name!r}: {folder} lacks {missing}; save it again with save_pretrained")
    config = _json(folder / "config.json")
    towers = {"an image tower": "vision_config", "a text tower": "text_config"}
    if without := [tower for tower, key in towers.items() if not {key, f"{key}_dict"} & config.keys()]:
        kind = config.get("model_type", "model without a type")
        raise UserError(f"model = {name!r}: a {kind} lacks {' and '.join(without)}; expected a CLIP or SigLIP")
    return Model(name, folder, revision)


def _json(path: Path) -> dict[str, Any]:
    try:
        facts = files.read_json(path, MOST_BYTES)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is corrupt ({one_line(error)}): download it again") from None
    return facts if isinstance(facts, dict) else {}


def _lacks(folder: Path) -> str | None:
    """The first thing that is missing in a model's folder; None if it is complete."""
    for name, needed in {
        "config.json": ["config.json"],
        "preprocessor_config.json": ["preprocessor_config.json", "processor_config.json"],
        "a tokenizer": ["tokenizer.json", "vocab.json", "spiece.model", "tokenizer.model"],
    }.items():
        if not any((folder / file).exists() for file in needed):
            return name
    index = folder / "model.safetensors.index.json"
    weights = {"model.safetensors"}
    if index.exists():
        listed = _json(index).get("weight_map")
        weights = set(map(str, listed.values())) if isinstance(listed, dict) else {"a list of weights"}
    if missing := sorted(file for file in weights if not (folder / file).exists()):
        pickled = any(folder.glob("*.bin"))
        return missing[0] + " (the weights exist only as a pickle, which is never loaded)" * pickled
    for file in sorted(weights):
        try:
            with safe_open(folder / file, "pt"):  # checks the header against the file size
                pass
        except (OSError, SafetensorError):
            return f"a complete {file}"
    return None


def _from_hub(name: str, revision: str) -> Path:
    """The model's folder in the hub's cache, downloaded if needed; weights may be the hub's own conversion."""

    def snapshot(revision: str) -> Path:
        prefix = f"model = {name!r}"
        return hub.snapshot(name, kind="model", revision=revision, lacks=_lacks, prefix=prefix, allow_patterns=FILES)

    known = f"conversion-{content.digest(name)}"
    try:
        return snapshot(revision or content.recall(known, content.memory()) or "")
    except hub.IncompleteError:
        converted = None if revision else hub.conversion(name)
        if not converted:
            raise
        log.warning("%s has no safetensors; using the hub's conversion of its weights (%s)", name, converted)
        content.remember(known, converted, content.memory())
        return snapshot(converted)


def pick_device(name: str) -> torch.device:
    """The device of that name; `auto` is a GPU if there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise UserError(
            f"device = {name!r}: this machine has {count or 'no'} CUDA device{'s' * (count != 1)}; use auto"
        )
    return device


def pick_precision(name: str, model: Model, device: str = "auto") -> torch.dtype:
    """The precision of encoding, chosen without loading the model.

    `auto` is bfloat16 (float16 on older GPUs) if the device supports it and the model is large. A small model would
    gain nothing, and float32 gives the same features on every machine.
    """
    if name != "auto":
        dtype: torch.dtype = getattr(torch, name)
        return dtype
    if model.size < LARGE:
        return torch.float32
    if pick_device(device).type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return torch.bfloat16 if has_bfloat16() else torch.float32


def has_bfloat16(facts: Path = Path("/proc/cpuinfo")) -> bool:
    """True if the CPU has bfloat16 instructions; without them bfloat16 is several times slower than float32."""
    try:
        found = re.search(r"^(flags|Features)\s*:(.*)", facts.read_text(), re.MULTILINE)
    except OSError:
        return False
    return bool(found and {"amx_bf16", "avx512_bf16", "bf16"} & set(found[2].split()))
