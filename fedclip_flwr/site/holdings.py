"""The examples of one site: its rows of the data, split into training, validation and test."""

from __future__ import annotations

import hmac
import json
import os
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from fedclip_flwr.base import UserError, files
from fedclip_flwr.base.roles import HOLDOUT, ROLES, TRAIN
from fedclip_flwr.base.seeds import seed_of
from fedclip_flwr.data import held_out
from fedclip_flwr.data.partition import shard
from fedclip_flwr.exchange.secure.exposure import TRAINING
from fedclip_flwr.features import Features
from fedclip_flwr.features.encoding import UnfinishedError
from fedclip_flwr.learning import Examples
from fedclip_flwr.learning.training import split

LENGTH = 32
"""The characters of a mark."""


@dataclass(frozen=True)
class Site:
    """A site's name, role and examples."""

    name: str
    train: Examples
    validation: Examples
    test: Examples
    domain: str = ""
    role: str = TRAIN

    @property
    def class_numbers(self) -> list[int]:
        """The classes that the site has examples of, sorted."""
        labels = torch.cat([self.train.labels, self.validation.labels, self.test.labels])
        return sorted(set(labels.tolist()))


def mark_of_images(site: Site, class_names: Sequence[str]) -> str:
    """A mark of the site's examples: it changes when they do, and tells nothing to who lacks this site's secret.

    Its beginning changes only with those to train with.
    """
    made, marks = hmac.new(_secret(), digestmod="sha256"), []
    for part in (site.train, site.validation, site.test):
        made.update(json.dumps([class_names[number] for number in part.labels.tolist()]).encode())
        made.update(part.features.cpu().contiguous().numpy().data)
        marks.append(made.hexdigest())  # of all parts so far
    return marks[0][:TRAINING] + marks[-1][TRAINING:LENGTH]


def keyed_mark(parts: Iterable[bytes | memoryview]) -> str:
    """A mark of these bytes, made with this machine's secret."""
    made = hmac.new(_secret(), digestmod="sha256")
    for part in parts:
        made.update(part)
    return made.hexdigest()[:LENGTH]


def _secret() -> bytes:
    """This machine's secret, made on first use."""
    path = files.home() / "secret"
    if not path.exists():
        files.write_atomic(path, lambda part: _write_private(part, secrets.token_bytes(32)), put=files.unless_there)
    return files.read_bytes(path, 64)


def _write_private(path: Path, data: bytes) -> None:
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(data)


def divide(name: str, domain: str, examples: Examples, seed: int, device: str | torch.device = "cpu") -> Site:
    """The site `name` with its examples split; each part is read from the store separately."""
    parts = split(len(examples.labels), seed_of(seed, "split", name))
    train, validation, test = (examples.rows(rows).ready(device) for rows in parts)
    return Site(name, train, validation, test, domain)


def simulated_site(
    features: Features,
    holdout: str | None,
    number: int,
    sites: int,
    seed: int,
    device: str | torch.device = "cpu",
    *,
    partition: str = "domain",
    alpha: float = 0.5,
) -> Site:
    """Site `number` of `sites` simulated ones."""
    excluded = held_out(holdout, features.domains)
    domains = gathered(features, [domain for domain in features.domains if domain not in excluded])
    own = shard(number, {d: e.labels for d, e in domains.items()}, sites, seed, partition, alpha)
    examples = together(domains[domain].rows(rows) for domain, rows in own.rows.items())
    domain = "+".join(domain for domain, rows in own.rows.items() if len(rows) or len(own.rows) == 1)
    return divide(own.site, domain, examples, seed, device)


def gathered(features: Features, domains: Sequence[str]) -> dict[str, Examples]:
    """The examples of these domains; an `UnfinishedError` counts the encoded images of all of them."""
    found: dict[str, Examples] = {}
    for domain in domains:
        try:
            found[domain] = features.examples(domain)
        except UnfinishedError as error:
            done = error.done + sum(map(features.count, found))
            raise UnfinishedError(done, sum(map(features.count, domains))) from None
    return found


def together(parts: Iterable[Examples]) -> Examples:
    """The examples of several domains, concatenated; those of a single one unchanged, possibly still in a file."""
    first, *more = parts
    if not more:
        return first
    features, labels = zip(first, *more, strict=True)
    return Examples(torch.cat(features), torch.cat(labels))


class SiteConfig(NamedTuple):
    """A site's name, role and domains, as set by its owner."""

    site: str
    role: str
    domains: list[str]


def name_of(node: Mapping[str, object]) -> str:
    """The site's name in its node config."""
    if not (name := str(node.get("site", ""))):
        raise UserError("this site has no name: start its SuperNode with --node-config \"site='NAME'\"")
    return name


def owners_config(node: Mapping[str, object], domains: Sequence[str], holdout: str) -> SiteConfig:
    """The owner's settings from the node config, checked; a site that trains does not get the held-out domain."""
    name = name_of(node)
    role, wanted = (str(node.get(key, unset)) for key, unset in (("role", TRAIN), ("domains", "")))
    if role not in ROLES:
        raise UserError(f"role = {role!r}: expected one of {', '.join(ROLES)}")
    own = _selected(domains, wanted)
    if role == HOLDOUT:
        return SiteConfig(name, role, own)
    own = [domain for domain in own if domain not in held_out(holdout, domains)]
    if not own:
        raise UserError(
            f"all images of this site belong to {holdout}, which is held out: set role='holdout' in its node config "
            "to evaluate only"
        )
    return SiteConfig(name, role, own)


def own_site(features: Features, config: SiteConfig, seed: int, device: torch.device) -> Site:
    """A real site, as its owner configured it."""
    domain, examples = "+".join(config.domains), together(gathered(features, config.domains).values())
    if config.role == HOLDOUT:
        held = examples.ready(device)
        empty = held.rows(torch.arange(0))
        return Site(config.site, empty, empty, held, domain, config.role)
    return divide(config.site, domain, examples, seed, device)


def _selected(domains: Sequence[str], wanted: str) -> list[str]:
    """The domains named in the comma-separated list; all if it is empty."""
    names = [name.strip() for name in wanted.split(",") if name.strip()]
    if unknown := [name for name in names if name not in domains]:
        raise UserError(f"domains = {wanted!r}: this site's data has no {unknown[0]}; it has {', '.join(domains)}")
    return [domain for domain in domains if not names or domain in names]
