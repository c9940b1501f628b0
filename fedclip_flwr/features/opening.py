"""Features and learner from the settings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from fedclip_flwr.base import Settings, UserError
from fedclip_flwr.base.settings import LORA
from fedclip_flwr.data import Vocabulary, base, opening
from fedclip_flwr.data.presets import Preset
from fedclip_flwr.data.vocabulary import check_distinct, numbering, read_names, renamed, templates_of, usable
from fedclip_flwr.features import models
from fedclip_flwr.features.base import Features
from fedclip_flwr.features.encoded import Activations, Encoded, Pixels, TowerPixels
from fedclip_flwr.features.folder import FeatureFolder
from fedclip_flwr.learning import RECIPES, Learner
from fedclip_flwr.learning.lora import LoraSpec
from fedclip_flwr.learning.recipes import new_part


def open_features(
    settings: Settings,
    given: Vocabulary | None = None,
    *,
    model: models.Model | None = None,
    root: Path | None = None,
    progress: bool = True,
) -> Features:
    """The features that the settings name, encoded on first use.

    `given` is the vocabulary that a site gets from the server; `model` is in place of the one that the settings name;
    `root` is the folder where features are stored.
    """
    kind, _, path = settings.data.partition(":")
    if kind == "features":
        if settings.method in ("full-model", LORA):
            raise UserError(f"method = {settings.method!r}: needs images, but {path} has only features")
        features = FeatureFolder(Path(path), given)
        fixed = {"model": features.model}
        if not given:
            fixed |= {"model-revision": "", "class-names": "", "prompt": features.prompt}
        for key, own in fixed.items():
            value = settings.as_run_config()[key]
            if value not in ("", "bundled", own):
                how = f"made with {own!r}" if own else "already computed"
                raise UserError(f"{key} = {value!r}: the features in {path} were {how}; leave it out")
        return features
    source, preset = source_of(settings)
    names = own_names = source.class_names
    wanted = read_names(settings.class_names)
    if not given or len(wanted) == len(names) or {*names} <= {*wanted}:  # else `numbering` reports the mismatch
        names, own_names = renamed(names, wanted)
    if not (names or given):
        raise UserError("data = 'none': class-names must list the classes, as a comma list or a file")
    check_distinct(names)
    prompt = settings.prompt or (preset.prompt if preset else RECIPES[settings.recipe].prompt)
    vocabulary = usable(given or Vocabulary(names, templates_of(prompt)))
    return _kind_of(settings)(
        source,
        model or models.find(settings.model, settings.model_revision),
        vocabulary,
        numbering(own_names, vocabulary.class_names),
        root=root,
        device=settings.device,
        precision=settings.precision,
        progress=progress,
    )


def _kind_of(settings: Settings) -> Callable[..., Encoded]:
    """What is made of the images, once: all that comes before what is trained."""
    if settings.method == "full-model":
        return Pixels
    if settings.method != LORA or settings.lora_targets == "text":
        return Encoded
    last = LoraSpec.of(settings).last
    return partial(Activations, last=last) if last else TowerPixels


def source_of(settings: Settings) -> tuple[base.Source, Preset | None]:
    """The source that the settings name, and its preset if it has one."""
    columns = base.Columns(settings.image_column, settings.label_column, settings.domain_column)
    return opening.open_source(settings.data, columns)


def server_vocabulary(settings: Settings) -> Vocabulary | None:
    """The vocabulary that a server sends to its sites; None if it depends on the data and not on the settings."""
    if not settings.class_names:
        return None
    return open_features(replace(settings, data="none", model="bundled", model_revision="")).vocabulary


def new_learner(settings: Settings, features: Features) -> Learner:
    """The initial state of what the run makes: an adapter, LoRA, the whole model, or the closed form."""
    if isinstance(features, Pixels):
        return features.whole_model()
    if settings.method == LORA:
        assert isinstance(features, Encoded)
        from fedclip_flwr.features.lora import Lora

        return Lora(features.new_clip(), settings, features.vocabulary)
    return new_part(settings, features.classes.ready())
