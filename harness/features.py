"""Feature folders of any size, without a model and without images."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.nn import functional as F

CLASSES = ("dog", "elephant", "giraffe", "guitar", "horse", "house", "person")
DIM = 512


def write_features(folder: Path, images: Mapping[str, int], dtype: torch.dtype = torch.float32, seed: int = 0) -> Path:
    """A feature folder with this many images in each domain, and classes a little easier than chance.

    Times do not depend on what the features are. The classes are the same with any seed.
    """
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    text = F.normalize(torch.randn(len(CLASSES), DIM, generator=generator), dim=1)
    save_file({"text_features": text}, folder / "classes.safetensors")
    generator = torch.Generator().manual_seed(seed) if seed else generator
    for domain, count in images.items():
        labels = torch.randint(0, len(CLASSES), (count,), generator=generator)
        features = 0.1 * text[labels] + torch.randn(count, DIM, generator=generator) / DIM**0.5
        save_file({"image_features": features.to(dtype), "labels": labels}, folder / f"{domain}.safetensors")
    described = {"model": "random", "embedding_dim": DIM, "logit_scale": 100.0, "prompt": "a picture of a {}"}
    facts = {**described, "class_names": CLASSES, "domains": list(images), "parameters": 151_277_313}
    (folder / "features.json").write_text(json.dumps(facts))
    return folder
