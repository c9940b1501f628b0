"""A CLIP with LoRA in its towers, by peft, for the method `lora`; its tensors and their algebra: `learning/lora.py`."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fedclip_flwr.base import Settings, UserError
from fedclip_flwr.base.errors import one_line
from fedclip_flwr.base.tensors import State
from fedclip_flwr.data import Vocabulary
from fedclip_flwr.features.base import Features
from fedclip_flwr.features.clip import ON_GPU, PART, Clip, full_convolutions, unit
from fedclip_flwr.features.encoded import Encoded
from fedclip_flwr.features.pixels import Unpacking
from fedclip_flwr.features.towers import Entry, adapted, as_inputs, entering, keep_last
from fedclip_flwr.learning import Classes, Learner
from fedclip_flwr.learning.lora import A, B, LoraSpec, first_a

NAME = "default"
"""The name that peft gives to the only adapter of a model."""


def check_installed() -> None:
    """Raises if peft is missing."""
    if find_spec("peft") is None:
        raise UserError("method = 'lora' needs peft: pip install 'fedclip-flwr[lora]'")


def check(settings: Settings, features: Features) -> list[str]:
    """The names of the layers that LoRA is to adapt; raises unless peft is installed, and the model has them."""
    check_installed()
    assert isinstance(features, Encoded)
    return layer_names(features.skeleton(), LoraSpec.of(settings))


def layer_names(net: Any, spec: LoraSpec) -> list[str]:
    """The names of the linear layers that get LoRA."""
    found = []
    for tower in spec.towers:
        for number, layer in adapted(net, tower, spec.last).items():
            linear = {name: module for name, module in layer.named_modules() if isinstance(module, nn.Linear)}
            known = {name.rpartition(".")[2]: name for name in linear}
            if unknown := [module for module in spec.modules if module not in known]:
                raise UserError(
                    f"lora-modules: a layer of the {tower} tower has no {unknown[0]!r}; it has {', '.join(known)}"
                )
            for module in spec.modules:
                if spec.rank > (most := min(linear[known[module]].weight.shape)):
                    raise UserError(f"lora-rank = {spec.rank}: {module} of the {tower} tower allows at most {most}")
                found.append(f"{tower}_model.encoder.layers.{number}.{known[module]}")
    return found


def shapes(net: Any, spec: LoraSpec) -> dict[str, tuple[int, int]]:
    """The shapes of all tensors of LoRA."""
    found: dict[str, tuple[int, int]] = {}
    for name in layer_names(net, spec):
        width, made = net.get_submodule(name).in_features, net.get_submodule(name).out_features
        found |= {name + A: (spec.rank, width), name + B: (made, spec.rank)}
    return found


def step_memory(learner: Learner, features: Features, settings: Settings) -> int | None:
    """About how much memory a step takes beside the model; None if that is not LoRA, or features are not encoded."""
    if not isinstance(learner, Lora) or not isinstance(features, Encoded):
        return None
    device = learner.unpack.factor.device
    return bytes_of_step(
        learner, features.classes.ready(device), features.blank_image().to(device), settings.batch_size
    )


def bytes_of_step(learner: Lora, classes: Classes, image: Tensor, batch_size: int) -> int:
    """About how much memory a step takes beside the model: what is kept for the gradients of a batch.

    Measured with one and two images like `image` [1, …]. With checkpointing a layer keeps what enters it, and one layer
    at a time all else.
    """
    asked, kept = learner.checkpointing, []
    for count in (1, 2):
        images, learner.checkpointing = torch.cat([image] * count), False
        every = _kept(learner, classes, images)
        learner.checkpointing = asked
        kept.append(_kept(learner, classes, images) + every // learner.depth if asked else every)
    return kept[0] + (batch_size - 1) * (kept[1] - kept[0])


def _kept(learner: Lora, classes: Classes, images: Tensor) -> int:
    """The bytes that autograd keeps for a step with these images."""
    kept: dict[int, int] = {}
    own = {tensor.untyped_storage().data_ptr() for tensor in [*learner.net.parameters(), *learner.buffers()]}

    def keep(tensor: Tensor) -> Tensor:
        if (place := tensor.untyped_storage().data_ptr()) not in own:
            kept[place] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        made = learner(images), learner.against(classes)
    del made
    return sum(kept.values())


class Lora(Learner):
    """A frozen CLIP with LoRA. Its state is the LoRA tensors that are trained, and nothing else.

    It takes what its first trained layer needs, computed once: pixels in bytes, what enters the last layers of the
    vision tower, or, if only the text tower is adapted, features. `blend` scales LoRA.
    """

    def __init__(self, loaded: Clip, settings: Settings, vocabulary: Vocabulary) -> None:
        """Changes the model that is `loaded`, and keeps it."""
        super().__init__()
        self.spec = spec = LoraSpec.of(settings)
        self._dtype, self._templates = loaded.dtype, len(vocabulary.templates)
        self.unpack = Unpacking(loaded.processor).to(loaded.device)
        self.net, names = loaded.net, layer_names(loaded.net, spec)
        self._give_lora(names, settings)
        self._vision, self._last = "vision" in spec.towers, spec.last
        changing = [layer for tower in spec.towers for layer in adapted(self.net, tower, spec.last).values()]
        self.depth, self.checkpointing = len(changing), settings.gradient_checkpointing
        for layer in changing:
            layer.forward = partial(self._checkpointed, layer.forward)
        self._tokens: Sequence[str] = ()
        if "text" in spec.towers:
            self._take_prompts(loaded, vocabulary)
        if self._vision and spec.last:
            keep_last(self.net, "vision", spec.last, Entry())
        self.blend = settings.trained_blend
        self.first = self.on_cpu()

    def _give_lora(self, names: Collection[str], settings: Settings) -> None:
        """Puts peft's layers in place of the linear ones of these names."""
        check_installed()
        from peft import LoraConfig, get_peft_model

        spec = self.spec
        how: dict[str, Any] = {"lora_alpha": spec.alpha, "lora_dropout": settings.lora_dropout, "bias": "none"}
        try:
            with warnings.catch_warnings(action="ignore", category=FutureWarning):  # advice for peft itself
                get_peft_model(self.net, LoraConfig(r=spec.rank, target_modules=[*names], **how))
        except ValueError as error:
            raise UserError(f"method = 'lora': peft can't adapt this model ({one_line(error)})") from None
        self._layers: dict[str, Any] = {name: self.net.get_submodule(name) for name in names}
        both = settings.lora_train == "both"
        with torch.no_grad():
            for name, layer in self._layers.items():
                first, second = layer.lora_A[NAME].weight, layer.lora_B[NAME].weight
                first.copy_(first_a(name, len(first), first.shape[1], settings.seed)).requires_grad_(both)
                second.zero_()

    def _take_prompts(self, loaded: Clip, vocabulary: Vocabulary) -> None:
        """Keeps the prompts; if only the last layers of the text tower are adapted, what enters those."""
        tokens = dict(loaded.tokens(vocabulary.prompts))
        for name, tensor in tokens.items():
            self.register_buffer(name, tensor, persistent=False)
        self._tokens = tuple(tokens)
        if last := self.spec.last:
            with torch.no_grad(), self._precision():
                before = entering(self.net, "text", last, lambda: self.net.get_text_features(**tokens))
            keep_last(self.net, "text", last, Entry(before))

    @property
    def blend(self) -> float:
        return self._blend

    @blend.setter
    def blend(self, share: float) -> None:
        self._blend = share
        for layer in self._layers.values():
            layer.scaling[NAME] = self.spec.scaling * share

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        return {name: tensor for name, tensor in self.every.items() if tensor.requires_grad}

    @property
    def frozen(self) -> State:
        return {name: tensor.detach().cpu() for name, tensor in self.every.items() if not tensor.requires_grad}

    @property
    def every(self) -> dict[str, nn.Parameter]:
        """All tensors of LoRA."""
        ends = {A: "lora_A", B: "lora_B"}
        found = self._layers.items()
        return {name + end: getattr(layer, of)[NAME].weight for name, layer in found for end, of in ends.items()}

    def named_parameters(self, *_: object, **__: object) -> Iterator[tuple[str, nn.Parameter]]:
        yield from self.trained.items()

    def state_dict(self, *_: object, **__: object) -> State:  # type: ignore[override]
        return {name: tensor.detach() for name, tensor in self.trained.items()}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor], *_: object, **__: object) -> None:  # type: ignore[override]
        """Takes these tensors, which must be all that are trained."""
        if (trained := self.trained).keys() != state.keys():
            raise KeyError(f"expected {sorted(trained)}, not {sorted(state)}")
        self.take(state)

    @torch.no_grad()
    def take(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes these tensors, trained or frozen."""
        every = self.every
        for name, tensor in tensors.items():
            every[name].copy_(tensor)

    def forward(self, images: Tensor) -> Tensor:
        """The features of the images, computed in parts, so that any number fits into memory."""
        if not self._vision:
            return F.normalize(images.float(), dim=-1)
        size = ON_GPU if images.device.type == "cuda" else PART
        return torch.cat([self._features(part) for part in torch.split(images, size)])

    def _features(self, images: Tensor) -> Tensor:
        self._set_training()
        with self._precision(), full_convolutions():
            held = self.net.logit_scale.dtype
            inputs = as_inputs(self.net, images.to(held)) if self._last else self.unpack(images)
            return unit(self.net.get_image_features(**inputs))

    def against(self, classes: Classes) -> Classes:
        """The classes, with their features from the text tower if that is adapted."""
        if not self._tokens:
            return classes
        self._set_training()
        with self._precision():
            features = unit(self.net.get_text_features(**{name: getattr(self, name) for name in self._tokens}))
        return classes._replace(text=F.normalize(features.view(self._templates, -1, features.shape[1]).mean(0), dim=-1))

    def _checkpointed(self, forward: Callable[..., Tensor], *given: Tensor, **more: Any) -> Tensor:
        """What a layer's `forward` makes; with checkpointing it is computed again for the gradients."""
        if self.checkpointing and torch.is_grad_enabled():
            found: Tensor = checkpoint(forward, *given, use_reentrant=False, **more)
            return found
        return forward(*given, **more)

    def _set_training(self) -> None:
        """Dropout of LoRA while gradients are wanted; never dropout of the CLIP."""
        for layer in self._layers.values():
            layer.lora_dropout[NAME].training = torch.is_grad_enabled()

    def _precision(self) -> torch.autocast:
        kind = self.unpack.factor.device.type
        lower = self._dtype != torch.float32
        return torch.autocast(kind, self._dtype if lower else None, enabled=lower)
