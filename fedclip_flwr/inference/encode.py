"""The command `fedclip encode`: features made ahead of time, in the store and as a feature folder."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from fedclip_flwr.base import UserError
from fedclip_flwr.base.settings import STORED, STORING_KEYS
from fedclip_flwr.base.text import counted
from fedclip_flwr.features import Encoded, folder_writer
from fedclip_flwr.runs import read_settings
from fedclip_flwr.runs.opening import open_run


def encode(given: Sequence[str], out: str = "") -> str:
    """Encodes what is not stored yet, writes it to the folder `out` if given, and returns the summary."""
    begun = time.monotonic()
    settings, problems = read_settings(given)
    for key in settings.keys() - {*STORING_KEYS} - problems.keys():
        problems[key] = f"{key}: encoding does not use it; leave it out"
    if str(settings.get("data", "")).startswith(STORED):
        problems["data"] = f"data = {settings['data']!r}: these are features already; name the images"
    _, features, _ = open_run(settings, problems)
    if not isinstance(features, Encoded):
        raise TypeError("expected encoded features for a run on images")
    if out and features.trains_tower:
        raise UserError(f"--out: with method = {settings['method']!r} no features are made; leave it out")
    folder = Path(out).expanduser().absolute() if out else None
    if folder:
        folder_writer.check(folder, features)  # before the work, not after it
    images = {domain: len(features.examples(domain).labels) for domain in features.domains}
    seconds = time.monotonic() - begun
    broken = sum(features.count(domain) for domain in images) - sum(images.values())
    if folder:
        folder_writer.write(folder, features)
    by_domain = ", ".join(f"{domain} {count:,}" for domain, count in images.items())
    classes = counted(len(features.vocabulary.class_names), "class")
    speed = f"{features.encoded / seconds:,.0f} images/s" if features.encoded else "all were stored already"
    return (
        f"{sum(images.values()):,} images in {classes}: {by_domain}; {broken:,} more can't be read\n"
        f"{seconds:.1f} s, {speed}\n" + (f"Feature folder: {folder}" if folder else f"Stored in {features.folder}")
    )
