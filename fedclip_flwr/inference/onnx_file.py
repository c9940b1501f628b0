"""The trained model as one ONNX file: image encoder, adapter and class prompts, for use with onnxruntime alone.

The input `pixel_values` is [batch, 3, height, width] in float32, prepared as in `preprocessor_config.json` beside it;
`logits` and `probabilities` are [batch, classes], `features` the adapted ones. Everything is float32.
"""

from __future__ import annotations

import copy
import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedclip_flwr.base import UserError, __version__
from fedclip_flwr.data import drawn
from fedclip_flwr.features import clip
from fedclip_flwr.inference import card
from fedclip_flwr.inference.model import FedCLIP
from fedclip_flwr.learning import Classes

FILE, WEIGHTS, PREPARING = "model.onnx", "model.onnx.data", "preprocessor_config.json"
INPUT, OUTPUTS = "pixel_values", ("logits", "probabilities", "features")
OPSET = 18
"""Supported by every onnxruntime since 1.14."""
MOST_BYTES = 19 * 10**8
"""Limit for weights inside the file: no ONNX file can be larger than 2 GiB."""
TRIED = 4
"""Pictures of each drawn domain that test a written file."""
CLOSE = 1e-3
"""A larger difference in a probability means that the file is another model."""


class Agreement(NamedTuple):
    """How well a file's outputs agree with torch's."""

    pictures: int
    same: int  # have the same likeliest class
    difference: float  # the greatest of any probability


class Tower(nn.Module):
    """From pixels to the file's outputs; a copy, so that the FedCLIP is not changed."""

    net: Any
    text: Tensor

    def __init__(self, model: FedCLIP) -> None:
        super().__init__()
        self.net, self.adapter, self.head = map(copy.deepcopy, (model.net, model.adapter, model.head))
        self.register_buffer("text", model.text.detach().clone())
        loaded = model.loaded
        self._scale, self._bias = loaded.scale, loaded.bias
        self.to("cpu", torch.float32).eval().requires_grad_(False)

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        features = clip.given(self.net.get_image_features(pixel_values=pixel_values))
        features = F.normalize(features, dim=-1) if self.adapter is None else self.adapter(features)
        logits = self.head(features) if self.head else Classes(self.text, self._scale, self._bias).logits(features)
        return logits, logits.softmax(dim=1), features


def check_installed() -> None:
    """Raises if packages needed for ONNX are missing."""
    if missing := [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]:
        raise UserError(f"--onnx needs {', '.join(missing)}: pip install 'fedclip-flwr[onnx]'")


def write(model: FedCLIP, folder: Path) -> Agreement:
    """Writes the model and how its images are prepared, and compares the file with torch.

    Weights of more than 2 GB go to a second file, model.onnx.data, as the format requires.
    """
    check_installed()
    pixels = _prepared(model)
    tower = Tower(model)
    with _quiet(), torch.no_grad():
        program = torch.onnx.export(
            tower,
            (pixels[:2],),
            dynamo=True,
            opset_version=OPSET,
            input_names=[INPUT],
            output_names=OUTPUTS,
            dynamic_shapes={INPUT: {0: torch.export.Dim("batch")}},
            verbose=False,
        )
        assert program is not None
        graph = program.model.graph
        for node in graph.all_nodes():
            node.metadata_props.clear()  # the code's paths on this machine
            node.doc_string = None
        program.model.metadata_props.update(facts_of(model, pixels))
        size = sum(value.const_value.nbytes for value in graph.initializers.values() if value.const_value is not None)
        program.save(folder / FILE, external_data=size > MOST_BYTES)
    text = json.dumps(_preparing(model), indent=2, sort_keys=True) + "\n"
    (folder / PREPARING).write_text(text, encoding="utf-8")
    found = compare(tower, folder / FILE, pixels)
    if found.difference > CLOSE:
        raise UserError(
            f"{FILE} differs from torch by {found.difference:.2g} in a probability: this model can't be "
            "exported to ONNX"
        )
    return found


def facts_of(model: FedCLIP, pixels: Tensor) -> dict[str, str]:
    """The file's metadata: strings, with lists as JSON."""
    preparing = _preparing(model)
    return {
        "class_names": json.dumps(model.class_names, ensure_ascii=False),
        "prompts": json.dumps(model.vocabulary.prompts, ensure_ascii=False),
        "model": card.model_name(model.facts),
        "model_revision": str(model.facts.get("model_revision") or ""),
        "adapter": str(model.facts.get("kind", "none")),
        "image_size": json.dumps(list(pixels.shape[2:])),
        "image_mean": json.dumps(preparing.get("image_mean")),
        "image_std": json.dumps(preparing.get("image_std")),
        "fedclip_flwr": __version__,
    }


def compare(tower: nn.Module, path: Path, pixels: Tensor, batch_size: int = 32) -> Agreement:
    """Compares the file with torch on prepared images."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    same, difference = 0, 0.0
    for part in torch.split(pixels, batch_size):
        with torch.no_grad():
            known = tower(part)[1]
        found = torch.from_numpy(session.run([OUTPUTS[1]], {INPUT: part.numpy()})[0])
        same += int((found.argmax(1) == known.argmax(1)).sum())
        difference = max(difference, float((found - known).abs().max()))
    return Agreement(len(pixels), same, difference)


def _prepared(model: FedCLIP) -> Tensor:
    """Drawn pictures, prepared for the model."""
    images = [
        drawn.picture(0, domain, figure, number)[0]
        for domain in drawn.DOMAINS
        for number, figure in enumerate(drawn.CLASSES[:TRIED])
    ]
    inputs = model.loaded.preparer(torch.float32)(images)
    if set(inputs) != {INPUT} or inputs[INPUT].dim() != 4:
        raise UserError(
            f"--onnx: a {model.net.config.model_type} takes images of any shape as patches, which can't be exported: "
            "export without --onnx, or train with a CLIP or SigLIP of a fixed image size"
        )
    return inputs[INPUT]


def _preparing(model: FedCLIP) -> dict[str, Any]:
    """The image processor's settings, without those that are unset."""
    facts: dict[str, Any] = model.loaded.preparer().processor.to_dict()
    return {name: value for name, value in facts.items() if value is not None and not name.startswith("_")}


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences the messages of torch's exporter."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.disable(before)
