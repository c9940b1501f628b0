"""Whether model and data can be read, and how much of the data is encoded. Nothing is encoded or downloaded."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from fedclip_flwr.base import Settings, content, files
from fedclip_flwr.base.roles import HOLDOUT
from fedclip_flwr.base.settings import STORED, TAKEN
from fedclip_flwr.base.text import bytes_of, some
from fedclip_flwr.data import Source, Vocabulary, pick_holdout
from fedclip_flwr.features import Encoded, Features, Pixels, models, open_features
from fedclip_flwr.features.opening import source_of, told_by_server
from fedclip_flwr.operations.doctor.findings import Examination
from fedclip_flwr.runs.history import results
from fedclip_flwr.site.context import OWN, settings_at
from fedclip_flwr.site.holdings import owners_config

NODE_CONFIG = {*OWN, "site", "role", "domains", "share-class-counts", "partition-id", "num-partitions"}
TRIED = 8
"""So many images of each domain are opened."""


def examine_site(ex: Examination, run: Settings, node: Mapping[str, Any]) -> int:
    """The bytes that encoding will take; `run` are the run's settings, as far as they are known here."""
    if unknown := sorted(node.keys() - NODE_CONFIG):
        ex.note("node config", f"nothing reads {', '.join(unknown)}", f"it may have {', '.join(sorted(NODE_CONFIG))}")
    settings = ex.look("node config", settings_at, run.as_run_config(), node)
    told = ex.look("class names", lambda: [told_by_server(run)])
    if not settings or not told:
        return 0
    features = _features(ex, settings, told[0])
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
    """The same for the server's own data, which tells whether an adapter does well where nobody trains."""
    if settings.results_dir:
        ex.look("results-dir", files.make_folder, *results(settings))
    features = _features(ex, settings, None)
    if not features:
        return 0
    holdout = ex.look("holdout", lambda: [pick_holdout(settings.holdout, features.domains)])
    if holdout:
        ex.ok("holdout", holdout[0] or "nothing: all domains are trained on")
    return _stored(ex, settings, settings, features, features.domains)


def _features(ex: Examination, settings: Settings, told: Vocabulary | None) -> Features | None:
    """The data as the model sees it, if both can be read."""
    device = ex.look("device", models.pick_device, settings.device)
    if device:
        ex.ok("device", f"{device}, as device = {settings.device!r} has it")
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
    features = ex.look("classes" if images else "data", open_features, settings, told, progress=False)
    if features:
        _classes(ex, features, source)
        if isinstance(features, Encoded):
            ex.ok("encoding", f"in {features.likely_precision} on {device}")
    return features


def _source(ex: Examination, name: str, source: Source) -> None:
    """What is there, and whether some of it can be opened."""
    counts = ", ".join(f"{domain} {source.count(domain):,}" for domain in source.domains)
    if not counts:
        ex.ok("data", f"{name}: no images here, only at the sites")
        return
    ex.ok("data", f"{name}: {counts} images")
    for domain in source.domains:
        rows = range(0, source.count(domain), max(1, -(-source.count(domain) // TRIED)))
        tried = [picture for row in rows for picture in source.pictures(domain, row, row + 1)]
        broken = [picture.name for picture in tried if picture.image is None]
        told = f"{domain}: {len(broken)} of {len(tried)} that were opened can't be read: {some(broken, 3)}"
        if broken and len(broken) == len(tried):
            ex.fail("images", told, "let the user that runs this read them; if they are damaged, bring them once more")
        elif broken:
            ex.note("images", told, "such images are left out, and named")


def _classes(ex: Examination, features: Features, source: Source | None) -> None:
    names = features.vocabulary.class_names
    lacking = sorted({*names} - {*source.class_names}) if source and {*source.class_names} <= {*names} else []
    absent = f"; none here of {some(lacking)}" if lacking and features.domains else ""
    ex.ok("classes", f"{len(names)}: {some(names)}{absent}")


def _stored(ex: Examination, settings: Settings, run: Settings, features: Features, domains: Sequence[str]) -> int:
    """The bytes that encoding the rest will take."""
    counts = ex.look("features", lambda: {d: (features.stored(d), features.count(d)) for d in domains})
    lacking = sum(count - stored for stored, count in (counts or {}).values())
    if counts and lacking:
        found = ", ".join(f"{domain} {stored:,} of {count:,}" for domain, (stored, count) in counts.items())
        ahead = "" if isinstance(features, Pixels) else f"; to do it ahead: {_command(settings, run)}"
        ex.note("features", f"stored are {found}", f"a run has the rest encoded, and waits for it{ahead}")
    elif counts:
        ex.ok("features", f"all {sum(count for _, count in counts.values()):,} are stored")
    return features.room(lacking)


def _command(settings: Settings, run: Settings) -> str:
    """What encodes the data as the run will want it."""
    here, plain = settings.as_run_config(), Settings().as_run_config()
    given = {**here, "class-names": run.class_names}
    words = [f"{key}={given[key]}" for key in TAKEN if key == "data" or given[key] != plain[key]]
    return " ".join(["fedclip encode", *map(shlex.quote, words)])
