"""Folders as runs leave them, with adapters that change what is found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from fedclip_flwr.base.settings import Settings
from fedclip_flwr.features.base import Features
from fedclip_flwr.features.encoded import Pixels
from fedclip_flwr.features.lora import Lora
from fedclip_flwr.features.opening import new_learner, open_features
from fedclip_flwr.learning.adapters import Adapter
from fedclip_flwr.learning.base import Learner
from fedclip_flwr.learning.recipes import new_adapter
from fedclip_flwr.runs.folder import RunFolder
from fedclip_flwr.runs.saved import save_adapter


def strong_adapter(settings: Settings, dim: int) -> Adapter:
    """One that is far from the identity."""
    adapter = new_adapter(settings, dim)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return adapter


def saved_adapter(folder: Path, features: Features, settings: Settings | None = None) -> Adapter:
    """The adapter that then lies in the folder."""
    settings = settings or Settings()
    adapter = strong_adapter(settings, features.classes.dim)
    folder.mkdir(parents=True, exist_ok=True)
    save_adapter(folder, adapter.state_dict(), settings, features, 2)
    return adapter


def whole_model_run(tree: Path, results: Path, change: float) -> tuple[Path, Learner, Pixels]:
    """The folder of a run that trained the whole model, what it came to, and the tree's images as it takes them."""
    settings = Settings(data=f"folder:{tree}", method="full-model", results_dir=str(results))
    pixels = open_features(settings, progress=False)
    assert isinstance(pixels, Pixels)
    learner = pixels.whole_model()
    with torch.no_grad():
        for weight in learner.parameters():
            weight.add_(change * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)))
    with RunFolder(settings, "0123") as run:
        run.adapter(2, learner.state_dict(), pixels)
    return run.path, learner, pixels


def lora_run(tree: Path, results: Path, **given: Any) -> tuple[Path, Lora, Features]:
    """The folder of a run with LoRA, its learner and features; every tensor of LoRA matters in it."""
    small: dict[str, Any] = {"lora_layers": "last:1", "lora_rank": 2, "precision": "float32"}
    settings = Settings(data=f"folder:{tree}", method="lora", results_dir=str(results), **{**small, **given})
    features = open_features(settings, progress=False)
    learner = new_learner(settings, features)
    assert isinstance(learner, Lora)
    generator = torch.Generator().manual_seed(1)
    learner.take({name: torch.randn(one.shape, generator=generator) / 4 for name, one in learner.every.items()})
    learner.blend = 0.5
    with RunFolder(settings, "0123") as run:
        run.adapter(2, {**learner.on_cpu(), **learner.frozen}, features, 0.5)
    return run.path, learner, features
