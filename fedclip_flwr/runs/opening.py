"""Opens a run: settings, features and held-out domain, with every problem reported at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from fedclip_flwr.base import Settings, UserError, files
from fedclip_flwr.base.settings import LORA, LORA_KEYS, STORED, unusable
from fedclip_flwr.data import pick_holdout
from fedclip_flwr.exchange.codecs import codec_of, packs
from fedclip_flwr.features import Features, lora, models, open_features
from fedclip_flwr.features.encoded import T
from fedclip_flwr.learning.adapters import adapter_class
from fedclip_flwr.runs import peft_folder
from fedclip_flwr.runs.directions import start_of
from fedclip_flwr.runs.history import check_name, results
from fedclip_flwr.server.robust import rule_of

LOADS: dict[str, Callable[[Settings], object]] = {
    "adapter": lambda settings: adapter_class(settings.adapter, chosen=True),
    "codec": lambda settings: packs(settings.codec) and codec_of(settings.codec, chosen=True),
    "strategy": lambda settings: settings.compares_updates and rule_of(settings.strategy, 0.0, chosen=True),
}
"""What settings that this machine's user chose may import. Of data, the source is opened."""


def load_plugins(settings: Settings) -> None:
    """Imports the plug-ins of settings that were checked in another process."""
    for load in LOADS.values():
        load(settings)


def open_run(given: Mapping[str, Any], known: Mapping[str, str] | None = None) -> tuple[Settings, Features, str | None]:
    """The settings of a run, its features and the held-out domain.

    One `UserError` reports every problem, beginning with those that are `known`.
    """
    from fedclip_flwr.runs import trackers  # sites have none, and do not need them

    settings, found = Settings.read(given)
    problems = {**(known or {}), **found}
    features = holdout = None

    def check(key: str, *needs: str, look: Callable[[], T]) -> T | None:
        if problems.keys() & {key, *needs}:
            return None
        try:
            return look()
        except UserError as error:
            problems[key] = str(error)
            return None

    for key, load in LOADS.items():
        check(key, look=partial(load, settings))
    check("device", look=lambda: models.pick_device(settings.device))
    if not settings.data.startswith(STORED):
        check("model", "model-revision", look=lambda: models.find(settings.model, settings.model_revision))
    features = check("data", "model", "prompt", look=lambda: open_features(settings))
    if features:
        holdout = check("holdout", look=lambda: pick_holdout(settings.holdout, features.domains))
        if settings.method == LORA:
            check("method", *LORA_KEYS, look=lambda: lora.check(settings, features))
        if settings.directions:
            check("directions", "method", look=lambda: start_of(settings, features))
        if settings.start:
            check("start", "method", *LORA_KEYS, look=lambda: peft_folder.checked(settings, features))
    check("results-dir", look=lambda: files.make_folder(*results(settings)))
    check("name", "resume", look=lambda: check_name(settings))
    check("track", look=lambda: trackers.check(settings.track))
    if problems or not features:
        raise unusable(problems.values())
    return settings, features, holdout
