"""What one site holds: its rows of the data, split into training, validation and test."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from fedclip_flwr import clip
from fedclip_flwr.adapters import Adapter, make_adapter
from fedclip_flwr.config import Settings
from fedclip_flwr.data.partition import shard
from fedclip_flwr.errors import UserError
from fedclip_flwr.features import Features, open_features
from fedclip_flwr.learning import RECIPES, Classes, Examples, seed_of, split


@dataclass(frozen=True)
class Site:
    """A site by name, and its examples."""

    name: str
    train: Examples
    validation: Examples
    test: Examples
    domain: str = ""

    @property
    def class_numbers(self) -> list[int]:
        """The classes that the site has examples of."""
        labels = torch.cat([self.train.labels, self.validation.labels, self.test.labels])
        return sorted(set(labels.tolist()))


def divide(name: str, domain: str, examples: Examples, seed: int) -> Site:
    """The site of that name with its examples split."""
    train, validation, test = map(examples.rows, split(len(examples.labels), seed_of(seed, "split", name)))
    return Site(name, train, validation, test, domain)


def simulated_site(
    features: Features, holdout: str | None, number: int, sites: int, seed: int, device: str | torch.device = "cpu"
) -> Site:
    """Site `number` of so many simulated ones."""
    domains = {d: features.examples(d) for d in features.domains if d != holdout}
    own = shard(number, {d: len(e.labels) for d, e in domains.items()}, sites, seed)
    return divide(own.site, own.domain, domains[own.domain].rows(own.rows).ready(device), seed)


def new_adapter(settings: Settings, dim: int) -> Adapter:
    """The adapter that the settings ask for, as a run begins with it."""
    return make_adapter(
        settings.adapter,
        dim,
        rank=settings.adapter_rank,
        blend=settings.blend,
        identity=RECIPES[settings.recipe].identity,
        seed=settings.seed,
    )


@dataclass(frozen=True)
class Desk:
    """What a site needs to answer a message."""

    settings: Settings
    site: Site
    class_names: tuple[str, ...]
    classes: Classes
    device: torch.device

    def require(self, class_names: tuple[str, ...]) -> None:
        """Raises unless these are the classes here: else their numbers would mean other things."""
        if class_names != self.class_names:
            extra = ", ".join(sorted({*self.class_names} - {*class_names}))
            missing = ", ".join(sorted({*class_names} - {*self.class_names}))
            parts = [f"has also {extra}"] * bool(extra) + [f"lacks {missing}"] * bool(missing)
            how = " and ".join(parts) or "has them in another order"
            raise UserError(f"this site's classes are not the server's: it {how}")


def open_desk(
    run_config: Mapping[str, object], node_config: Mapping[str, object], holdout: str, simulated: bool
) -> Desk:
    """This site's desk; read once in a process that answers several messages.

    `holdout` is the domain that no site trains on, as the server resolved it.
    """
    return _desk(tuple(sorted(run_config.items())), tuple(sorted(node_config.items())), holdout, simulated)


@lru_cache(maxsize=64)
def _desk(
    run_config: Sequence[tuple[str, object]], node_config: Sequence[tuple[str, object]], holdout: str, simulated: bool
) -> Desk:
    node = dict(node_config)
    given = dict(run_config)
    if "data" in node:
        given["data"] = node["data"]
    if "device" in node:
        given["device"] = node["device"]
    settings = Settings.from_run_config(given)
    number, sites = node.get("partition-id"), node.get("num-partitions")
    if not simulated and "data" not in node and settings.data.startswith(("folder:", "features:")):
        raise UserError(
            "this site was not told where its data is: start its SuperNode with --node-config \"data='folder:/PATH'\""
        )
    features = open_features(settings, progress=not simulated)
    device = clip.pick_device(settings.device)
    if isinstance(number, int) and isinstance(sites, int):
        if not 0 <= number < sites:
            raise UserError(f"partition-id = {number}: expected a number from 0 to num-partitions - 1 = {sites - 1}")
        site = simulated_site(features, holdout or None, number, sites, settings.seed, device)
    else:
        site = _whole(features, holdout, str(node.get("site", "")), settings.seed, device)
    return Desk(settings, site, features.class_names, features.classes.ready(device), device)


def _whole(features: Features, holdout: str, name: str, seed: int, device: torch.device) -> Site:
    """All that a site holds, but for the domain that no site trains on."""
    domains = [d for d in features.domains if d != holdout]
    if not name:
        raise UserError("this site has no name: start its SuperNode with --node-config \"site='NAME'\"")
    if not domains:
        raise UserError(f"all images of this site belong to {holdout}, which is held out")
    parts = [features.examples(d) for d in domains]
    whole = Examples(torch.cat([p.features for p in parts]), torch.cat([p.labels for p in parts]))
    return divide(name, "+".join(domains), whole.ready(device), seed)
