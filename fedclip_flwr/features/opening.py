"""Features opened from the settings, and what is trained on them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from fedclip_flwr.base import Settings, UserError
from fedclip_flwr.data import Vocabulary, base, opening
from fedclip_flwr.data.presets import Preset
from fedclip_flwr.data.vocabulary import check_apart, numbering, read_names, renamed, templates_of, usable
from fedclip_flwr.features import models
from fedclip_flwr.features.base import Features
from fedclip_flwr.features.encoded import Encoded, Pixels
from fedclip_flwr.features.folder import FeatureFolder
from fedclip_flwr.learning import RECIPES, Learner
from fedclip_flwr.learning.adapters import new_adapter


def open_features(
    settings: Settings, told: Vocabulary | None = None, *, root: Path | None = None, progress: bool = True
) -> Features:
    """The features that the settings name, encoded when they are first asked for.

    A site is `told` its vocabulary by the server. `root` is where features are stored.
    """
    kind, _, path = settings.data.partition(":")
    whole = settings.method == "full-model"
    if kind == "features":
        if whole:
            raise UserError(f"method = 'full-model': it learns from images, and {path} has none, only their features")
        made = FeatureFolder(Path(path), told)
        fixed = {"model": made.model}
        if not told:
            fixed |= {"model-revision": "", "class-names": "", "prompt": made.prompt}
        for key, own in fixed.items():
            given = settings.as_run_config()[key]
            if given not in ("", "bundled", own):
                how = f"made with {own!r}" if own else "made already"
                raise UserError(f"{key} = {given!r}: the features in {path} were {how}; leave it out")
        return made
    source, preset = source_of(settings)
    names = own_names = source.class_names
    wanted = read_names(settings.class_names)
    if not told or len(wanted) == len(names) or {*names} <= {*wanted}:  # else a site is told by `numbering`
        names, own_names = renamed(names, wanted)
    if not (names or told):
        raise UserError("data = 'none': so class-names must tell the classes, as a comma list or a file")
    check_apart(names)
    prompt = settings.prompt or (preset.prompt if preset else RECIPES[settings.recipe].prompt)
    vocabulary = usable(told or Vocabulary(names, templates_of(prompt)))
    return (Pixels if whole else Encoded)(
        source,
        models.find(settings.model, settings.model_revision),
        vocabulary,
        numbering(own_names, vocabulary.class_names),
        root=root,
        device=settings.device,
        precision=settings.precision,
        progress=progress,
    )


def source_of(settings: Settings) -> tuple[base.Source, Preset | None]:
    """The images that the settings name, and the preset that they fit."""
    columns = base.Columns(settings.image_column, settings.label_column, settings.domain_column)
    return opening.open_source(settings.data, columns)


def told_by_server(settings: Settings) -> Vocabulary | None:
    """What a server with these settings tells its sites, as far as they say so themselves and its data does not."""
    if not settings.class_names:
        return None
    return open_features(replace(settings, data="none", model="bundled", model_revision="")).vocabulary


def new_learner(settings: Settings, features: Features) -> Learner:
    """What the settings have trained and sent, as a run begins with it: an adapter, or the whole model."""
    return features.whole_model() if isinstance(features, Pixels) else new_adapter(settings, features.classes.dim)
