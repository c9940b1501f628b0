"""Checks that model and data can be read, and how much is encoded. Nothing is encoded or downloaded."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from fedclip_flwr.base import Settings, content, files
from fedclip_flwr.base.roles import HOLDOUT
from fedclip_flwr.base.settings import LORA, STORED, STORING_KEYS
from fedclip_flwr.base.text import bytes_of, some
from fedclip_flwr.data import Source, Vocabulary, pick_holdout
from fedclip_flwr.features import Encoded, Features, lora, models, open_features
from fedclip_flwr.features.opening import server_vocabulary, source_of
from fedclip_flwr.operations.doctor.findings import Examination
from fedclip_flwr.runs import peft_folder
from fedclip_flwr.runs.history import results
from fedclip_flwr.runs.relay import group_of
from fedclip_flwr.site.context import GROUP, LIMITS, OWNER_KEYS, settings_at
from fedclip_flwr.site.holdings import owners_config

NODE_CONFIG = {
    *(*OWNER_KEYS, *LIMITS, GROUP),
    *("site", "role", "domains", "share-class-counts", "partition-id", "num-partitions"),
}
TRIED = 8
"""Images of each domain that are opened, at most."""


def examine_site(ex: Examination, run: Settings, node: Mapping[str, Any]) -> int:
    """The bytes that encoding will need; `run` has the run's settings, as far as they are known at this site."""
    if GROUP in node:
        if group := ex.look("group", group_of, node):
            ex.ok("group", f"{group.site} passes on {group}")
        return 0
    if unknown := sorted(node.keys() - NODE_CONFIG):
        ex.note("node config", f"unknown keys: {', '.join(unknown)}", f"it may have {', '.join(sorted(NODE_CONFIG))}")
    settings = ex.look("node config", settings_at, run.as_run_config(), node)
    given = ex.look("class names", lambda: [server_vocabulary(run)])
    if not settings or not given:
        return 0
    features = _features(ex, settings, given[0])
    if not features:
        return 0
    domains: Sequence[str] | None = features.domains
    if "partition-id" not in node:
        holdout = "" if run.holdout == "auto" else run.holdout
        words = ex.look("site", owners_config, node, features.domains, holdout)
        domains = words and words.domains
        if words:
            does = "only evaluates, on" if words.role == HOLDOUT else "trains on"
            ex.ok("site", f"{words.site} {does} {', '.join(words.domains)}")
    return _stored(ex, settings, run, features, domains or ())


def examine_server(ex: Examination, settings: Settings) -> int:
    """As `examine_site`, for the server's own data, which tests an adapter on domains that no site trains on."""
    if settings.results_dir:
        ex.look("results-dir", files.make_folder, *results(settings))
    features = _features(ex, settings, None)
    if not features:
        return 0
    if settings.start:
        ex.look("start", peft_folder.checked, settings, features)
    holdout = ex.look("holdout", lambda: [pick_holdout(settings.holdout, features.domains)])
    if holdout:
        ex.ok("holdout", holdout[0] or "none: all domains are trained on")
    return _stored(ex, settings, settings, features, features.domains)


def _features(ex: Examination, settings: Settings, given: Vocabulary | None) -> Features | None:
    """The data's features; None if data or model can't be read."""
    device = ex.look("device", models.pick_device, settings.device)
    if device:
        ex.ok("device", f"{device}, from device = {settings.device!r}")
    model = source = None
    if images := not settings.data.startswith(STORED):
        model = ex.look("model", models.find, settings.model, settings.model_revision)
        if model:
            mark = model.content(content.memory())[:12]
            revision = f" at {model.revision[:12]}" if model.revision else ""
            ex.ok("model", f"{model.name}{revision}, {bytes_of(model.size)}, content {mark}")
        source = ex.look("data", lambda: source_of(settings)[0])
        if source:
            ex.look("data", _source, ex, settings.data, source)
    if images and not (model and source and device):
        return None
    features = ex.look("classes" if images else "data", open_features, settings, given, progress=False)
    if features:
        _classes(ex, features, source)
        if isinstance(features, Encoded):
            ex.ok("encoding", f"in {features.likely_precision} on {device}")
    if features and settings.method == LORA and not ex.look("lora", lora.check, settings, features):
        return None
    return features


def _source(ex: Examination, name: str, source: Source) -> None:
    """Reports the images of each domain, and if some of them can be opened."""
    counts = ", ".join(f"{domain} {source.count(domain):,}" for domain in source.domains)
    if not counts:
        ex.ok("data", f"{name}: no images here, only at the sites")
        return
    ex.ok("data", f"{name}: {counts} images")
    for domain in source.domains:
        rows = range(0, source.count(domain), max(1, -(-source.count(domain) // TRIED)))
        tried = [picture for row in rows for picture in source.pictures(domain, row, row + 1)]
        broken = [picture.name for picture in tried if picture.image is None]
        found = f"{domain}: {len(broken)} of {len(tried)} tested images can't be read: {some(broken, 3)}"
        if broken and len(broken) == len(tried):
            ex.fail("images", found, "let the user that runs this read them; replace damaged ones")
        elif broken:
            ex.note("images", found, "such images are left out, and named")


def _classes(ex: Examination, features: Features, source: Source | None) -> None:
    names = features.vocabulary.class_names
    lacking = sorted({*names} - {*source.class_names}) if source and {*source.class_names} <= {*names} else []
    absent = f"; no images here of {some(lacking)}" if lacking and features.domains else ""
    ex.ok("classes", f"{len(names)}: {some(names)}{absent}")


def _stored(ex: Examination, settings: Settings, run: Settings, features: Features, domains: Sequence[str]) -> int:
    """The bytes that encoding the rest will need."""
    counts = ex.look("features", lambda: {d: (features.stored(d), features.count(d)) for d in domains})
    lacking = sum(count - stored for stored, count in (counts or {}).values())
    if counts and lacking:
        found = ", ".join(f"{domain} {stored:,} of {count:,}" for domain, (stored, count) in counts.items())
        ahead = f"to encode now: {_command(settings, run)}"
        ex.note("features", f"stored: {found}", f"a run encodes the rest first, and waits for it; {ahead}")
    elif counts:
        ex.ok("features", f"all {sum(count for _, count in counts.values()):,} are stored")
    return features.room(lacking)


def _command(settings: Settings, run: Settings) -> str:
    """The command that encodes the data as the run needs it."""
    here, plain = settings.as_run_config(), Settings().as_run_config()
    given = {**here, "class-names": run.class_names}
    words = [f"{key}={given[key]}" for key in STORING_KEYS if key == "data" or given[key] != plain[key]]
    return " ".join(["fedclip encode", *map(shlex.quote, words)])
