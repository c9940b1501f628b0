"""The two towers of a loaded CLIP, and their layers: run up to a layer, or from a layer on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fedclip_flwr.base import UserError
from fedclip_flwr.features.pixels import MASK, VALUES, Inputs


class _ReachedError(Exception):
    """The layer that is looked for has been reached."""


class Entry(nn.Module):
    """In place of a tower's embeddings: what enters its first layer, as given or always `fixed`."""

    fixed: Tensor | None

    def __init__(self, fixed: Tensor | None = None) -> None:
        super().__init__()
        self.register_buffer("fixed", fixed, persistent=False)

    def forward(self, given: Tensor | None = None, *_: object, **__: object) -> Tensor | None:
        return given if self.fixed is None else self.fixed


def layers_of(net: Any, tower: str) -> nn.ModuleList:
    """The layers of the tower, `vision` or `text`."""
    layers = getattr(getattr(getattr(net, f"{tower}_model", None), "encoder", None), "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise UserError(
            f"method = 'lora': the layers of this {net.config.model_type} are not where those of CLIP and SigLIP are; "
            "use method = 'adapter' with this model"
        )
    return layers


def adapted(net: Any, tower: str, last: int | None) -> dict[int, nn.Module]:
    """The layers of the tower that LoRA adapts, by their numbers."""
    layers = dict(enumerate(layers_of(net, tower)))
    if last and last > len(layers):
        raise UserError(f"lora-layers = 'last:{last}': the {tower} tower has only {len(layers)} layers")
    return {number: layer for number, layer in layers.items() if last is None or number >= len(layers) - last}


def entering(net: Any, tower: str, last: int, run: Callable[[], object]) -> Tensor:
    """What enters the last layers of the tower when `run` runs it; they are not run themselves."""
    found = []

    def stop(layer: nn.Module, given: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
        found.append(given[0] if given else named["hidden_states"])
        raise _ReachedError

    hook = adapted(net, tower, last)[len(layers_of(net, tower)) - last].register_forward_pre_hook(
        stop, with_kwargs=True
    )
    try:
        run()
    except _ReachedError:
        pass
    finally:
        hook.remove()
    return found[0]


def activations(net: Any, inputs: Inputs, last: int) -> Tensor:
    """What enters the last layers of the vision tower; if patches have a mask, it is one more value of each."""
    found = entering(net, "vision", last, lambda: net.get_image_features(**inputs))
    return torch.cat([found, inputs[MASK][..., None].to(found)], dim=-1) if MASK in inputs else found


def as_inputs(net: Any, given: Tensor) -> Inputs:
    """Activations, as a tower that begins with them takes them."""
    if given.shape[-1] == net.config.vision_config.hidden_size:
        return {VALUES: given}
    mask = given[..., -1].to(torch.int32)
    return {VALUES: given[..., :-1], MASK: mask, "spatial_shapes": torch.zeros(len(mask), 2, dtype=torch.long)}


def keep_last(net: Any, tower: str, last: int, entry: Entry) -> None:
    """Takes all before the last layers out of the tower, in place: it begins with what enters them."""
    model = getattr(net, f"{tower}_model")
    model.embeddings = entry
    if hasattr(model, "pre_layrnorm"):
        model.pre_layrnorm = nn.Identity()
    model.encoder.layers = layers_of(net, tower)[-last:]
