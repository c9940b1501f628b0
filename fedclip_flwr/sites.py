"""What one site holds: its rows of the data, split into training, validation and test."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch

from fedclip_flwr import clip
from fedclip_flwr.adapters import Adapter, blank_adapter, make_adapter
from fedclip_flwr.codecs import State
from fedclip_flwr.config import Settings, place_of
from fedclip_flwr.data import held_out
from fedclip_flwr.data.partition import shard
from fedclip_flwr.encoding import UnfinishedError
from fedclip_flwr.errors import UserError
from fedclip_flwr.features import Features, Pixels, open_features
from fedclip_flwr.learning import RECIPES, Classes, Examples, Learner, personalize, seed_of, split, train
from fedclip_flwr.session import HOLDOUT, ROLES, TRAIN, Session

OWN = (
    *("data", "model", "device", "precision", "image-column", "label-column", "domain-column"),
    *("dp", "noise-multiplier", "clipping-norm", "secure-aggregation"),
)
"""The settings that a site's owner may give in its node config."""


@dataclass(frozen=True)
class Site:
    """A site by name, and its examples."""

    name: str
    train: Examples
    validation: Examples
    test: Examples
    domain: str = ""
    role: str = TRAIN

    @property
    def class_numbers(self) -> list[int]:
        """The classes that the site has examples of."""
        labels = torch.cat([self.train.labels, self.validation.labels, self.test.labels])
        return sorted(set(labels.tolist()))


def divide(name: str, domain: str, examples: Examples, seed: int, device: str | torch.device = "cpu") -> Site:
    """The site of that name with its examples split, each part taken from the store by itself."""
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
    """Site `number` of so many simulated ones."""
    apart = held_out(holdout, features.domains)
    domains = gathered(features, [domain for domain in features.domains if domain not in apart])
    own = shard(number, {d: e.labels for d, e in domains.items()}, sites, seed, partition, alpha)
    examples = together(domains[domain].rows(rows) for domain, rows in own.rows.items())
    domain = "+".join(domain for domain, rows in own.rows.items() if len(rows) or len(own.rows) == 1)
    return divide(own.site, domain, examples, seed, device)


def gathered(features: Features, domains: Sequence[str]) -> dict[str, Examples]:
    """The examples of these domains; an `UnfinishedError` tells how many images of all of them are encoded."""
    found: dict[str, Examples] = {}
    for domain in domains:
        try:
            found[domain] = features.examples(domain)
        except UnfinishedError as error:
            done = error.done + sum(map(features.count, found))
            raise UnfinishedError(done, sum(map(features.count, domains))) from None
    return found


def together(parts: Iterable[Examples]) -> Examples:
    """The examples of several domains; of a single one as they are, perhaps in a file."""
    first, *more = parts
    if not more:
        return first
    features, labels = zip(first, *more, strict=True)
    return Examples(torch.cat(features), torch.cat(labels))


def new_learner(settings: Settings, features: Features) -> Learner:
    """What the settings have trained and sent, as a run begins with it: an adapter, or the whole model."""
    return features.whole_model() if isinstance(features, Pixels) else new_adapter(settings, features.classes.dim)


def new_adapter(settings: Settings, dim: int) -> Adapter:
    return make_adapter(
        settings.adapter,
        dim,
        rank=settings.adapter_rank,
        blend=settings.trained_blend,
        length=length_of(settings),
        identity=settings.starts_as_zero_shot,
        seed=settings.seed,
    )


def length_of(settings: Settings) -> float:
    """To what length the adapter brings features before its network sees them; 0 to none."""
    return settings.feature_norm or RECIPES[settings.recipe].length


def drawn_by_lot(names: Iterable[str], share: float, seed: int, number: int, least: int = 1) -> list[str]:
    """Which of the sites train in round `number`; at least so many, if there are."""
    able = sorted(names)
    count = min(max(least, round(share * len(able))), len(able))
    return sorted(random.Random(seed_of(seed, "sites", number)).sample(able, count))


def learn(learner: Learner, site: Site, classes: Classes, settings: Settings, number: int) -> None:
    """What a site does in round `number`."""
    train(
        learner,
        site.train,
        classes,
        RECIPES[settings.recipe],
        learning_rate=learning_rate(settings, classes.dim, len(site.train.labels)),
        epochs=settings.local_epochs,
        batch_size=settings.batch_size,
        proximal=settings.proximal,
        seed=seed_of(settings.seed, "train", site.name, number),
    )


def learn_alone(learner: Learner, site: Site, classes: Classes, settings: Settings) -> int:
    """Makes the learner the site's own, by as much training as it had in the run; the epoch that was kept."""
    return personalize(
        learner,
        site.train,
        site.validation,
        classes,
        RECIPES[settings.recipe],
        learning_rate=learning_rate(settings, classes.dim, len(site.train.labels)),
        epochs=settings.num_server_rounds * settings.local_epochs,
        batch_size=settings.batch_size,
        seed=seed_of(settings.seed, "personal", site.name),
    )


def learning_rate(settings: Settings, dim: int, examples: int) -> float:
    """The rate that the settings ask for, or else the recipe's own for a site with so many examples."""
    kind = settings.adapter if settings.method == "adapter" else settings.method
    steps = -(-examples // settings.batch_size)
    return settings.learning_rate or RECIPES[settings.recipe].rate(kind, dim, steps)


@dataclass(frozen=True)
class Desk:
    """What a site needs to answer a message."""

    settings: Settings
    site: Site
    features: Features
    classes: Classes
    device: torch.device
    session: Session

    def start(self) -> State:
        """What every site can begin with."""
        return new_learner(self.settings, self.features).on_cpu()

    def blank(self) -> Learner:
        """What is learnt, to be filled with a state that came."""
        if isinstance(self.features, Pixels):
            return self.features.whole_model()
        own = self.settings
        how = {"blend": own.trained_blend, "length": length_of(own)}
        return blank_adapter(own.adapter, self.classes.dim, rank=own.adapter_rank, **how)

    def require(self) -> None:
        """Raises unless the model here is the server's, where both know its content: features would not compare."""
        own = self.features.model_content
        if self.session.model and own and self.session.model != own:
            raise UserError(
                f"this site's model {self.features.model!r} has other content than the server's: give both the same "
                "model-revision, or copy the server's model and name its folder in the node config (model='/PATH')"
            )


def in_simulation() -> bool:
    """Whether this process is one of those in which Flower simulates sites: a worker that Ray has started.

    Only in those may the server's settings name data of this machine. So it depends on the program that was started, in
    which no server has a say, and not on Ray: anything in a real site's process may import that, or even start it.
    """
    program = getattr(sys.modules["__main__"], "__file__", None) or ""
    return Path(program).parts[-4:] == ("ray", "_private", "workers", "default_worker.py")


def open_desk(
    run_config: Mapping[str, object], node_config: Mapping[str, object], session: Session, simulated: bool
) -> Desk:
    """This site's desk; kept in a process that answers several messages.

    The `session` tells what the server resolved: the domain that no site trains on, and the vocabulary.
    """
    run, node = (tuple(sorted(config.items())) for config in (run_config, node_config))
    return _desk(run, node, session, simulated)


def settings_at(run_config: Mapping[str, object], node: Mapping[str, object], simulated: bool = False) -> Settings:
    """The run's settings as they are at this site: its owner's words come first."""
    given = dict(run_config)
    if not simulated and str(given.get("class-names", "")).startswith("/"):
        del given["class-names"]  # a file of the server's
    if "model" in node:
        given.pop("model-revision", None)
    if node.get("dp", "local") != "local":
        raise UserError(f"dp = {node['dp']!r} in the node config: a site can only add noise of its own, dp='local'")
    if {"noise-multiplier", "clipping-norm"} & node.keys() and "dp" not in node:
        raise UserError("noise-multiplier and clipping-norm in the node config are for dp='local' there")
    if "dp" in node and "noise-multiplier" not in node:
        raise UserError("dp='local' in the node config needs noise-multiplier beside it: else the server says how much")
    if "data" in node:
        given = {key: value for key, value in given.items() if not key.endswith("-column")}  # of the server's data
    own = {key: node[key] for key in OWN if key in node}
    if given.get("secure-aggregation"):
        own.pop("secure-aggregation", None)  # an owner can ask for it, and not undo the run's
    settings = Settings.from_run_config({**given, **own})
    if given.get("dp") == "local" and settings.noise_multiplier < float(str(given["noise-multiplier"])):
        raise UserError(
            f"noise-multiplier = {settings.noise_multiplier:g} in the node config: the run has more, and tells what is "
            "spent by that; give at least as much"
        )
    here_only = settings.data == "none" or place_of(settings.data)[0]
    if not simulated and "data" not in node and here_only:
        raise UserError(
            "this site was not told where its data is: start its SuperNode with --node-config \"data='folder:/PATH'\""
        )
    return settings


@lru_cache(maxsize=64)
def _desk(
    run_config: Sequence[tuple[str, object]],
    node_config: Sequence[tuple[str, object]],
    session: Session,
    simulated: bool,
) -> Desk:
    node = dict(node_config)
    settings = settings_at(dict(run_config), node, simulated)
    number, sites = node.get("partition-id"), node.get("num-partitions")
    features = _features(settings, session, simulated)
    device = clip.pick_device(settings.device)
    if isinstance(number, int) and isinstance(sites, int):
        if not 0 <= number < sites:
            raise UserError(f"partition-id = {number}: expected a number from 0 to num-partitions - 1 = {sites - 1}")
        site = simulated_site(
            features,
            session.holdout or None,
            number,
            sites,
            settings.seed,
            device,
            partition=settings.partition,
            alpha=settings.alpha,
        )
    else:
        words = owners_words(node, features.domains, session.holdout)
        site = _own(features, words, settings.seed, device)
    return Desk(settings, site, features, features.classes.ready(device), device, session)


@lru_cache(maxsize=4)
def _features(settings: Settings, session: Session, simulated: bool) -> Features:
    """Opened once for all sites that a process simulates."""
    return open_features(settings, session.vocabulary, progress=not simulated)


class Words(NamedTuple):
    """What a site's owner says: its name, what it does, and what it holds of the data."""

    site: str
    role: str
    domains: list[str]


def owners_words(node: Mapping[str, object], domains: Sequence[str], holdout: str) -> Words:
    """What the node config says of data with these domains; a site that trains leaves the held-out one alone."""
    name, role, wanted = (str(node.get(key, other)) for key, other in (("site", ""), ("role", TRAIN), ("domains", "")))
    if not name:
        raise UserError("this site has no name: start its SuperNode with --node-config \"site='NAME'\"")
    if role not in ROLES:
        raise UserError(f"role = {role!r}: expected one of {', '.join(ROLES)}")
    own = _some(domains, wanted)
    if role == HOLDOUT:
        return Words(name, role, own)
    own = [domain for domain in own if domain not in held_out(holdout, domains)]
    if not own:
        raise UserError(
            f"all images of this site belong to {holdout}, which is held out: with role='holdout' in its node config "
            "it would evaluate only"
        )
    return Words(name, role, own)


def _own(features: Features, words: Words, seed: int, device: torch.device) -> Site:
    """A site by its owner's words."""
    domain, examples = "+".join(words.domains), together(gathered(features, words.domains).values())
    if words.role == HOLDOUT:
        held = examples.ready(device)
        nothing = held.rows(torch.arange(0))
        return Site(words.site, nothing, nothing, held, domain, words.role)
    return divide(words.site, domain, examples, seed, device)


def _some(domains: Sequence[str], wanted: str) -> list[str]:
    """Those domains that are named in a list with commas; all, where none is."""
    names = [name.strip() for name in wanted.split(",") if name.strip()]
    if unknown := [name for name in names if name not in domains]:
        raise UserError(f"domains = {wanted!r}: this site's data has no {unknown[0]}; it has {', '.join(domains)}")
    return [domain for domain in domains if not names or domain in names]
