"""The context in which a site answers a message, made of the run's settings and its owner's."""

from __future__ import annotations

import sys
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

from fedclip_flwr.base import Settings, UserError
from fedclip_flwr.base.settings import LORA, place_of
from fedclip_flwr.base.tensors import State
from fedclip_flwr.exchange import Session
from fedclip_flwr.exchange.codecs import codec_of, packs
from fedclip_flwr.features import Features, Pixels, models, open_features
from fedclip_flwr.features.lora import Lora, check_installed
from fedclip_flwr.features.opening import new_learner
from fedclip_flwr.learning import Classes, Learner
from fedclip_flwr.learning.adapters import adapter_class
from fedclip_flwr.learning.recipes import blank_part
from fedclip_flwr.site.holdings import Site, own_site, owners_config, simulated_site

OWNER_KEYS = (
    *("data", "model", "device", "precision", "image-column", "label-column", "domain-column"),
    *("dp", "noise-multiplier", "clipping-norm", "secure-aggregation"),
)
"""The settings that a site's owner may give in its node config."""
LIMITS = ("epsilon", "delta")
"""The most of these that its owner accepts of a run."""
GROUP = "group"
"""The key of a run folder there, in place of `data`: the site answers with that run's sums (`runs/relay.py`)."""


_LORA: dict[Features, Lora] = {}


@dataclass(frozen=True)
class SiteContext:
    """Settings, examples, classes and device: all that a site needs to answer a message."""

    settings: Settings
    site: Site
    classes: Classes
    device: torch.device

    @abstractmethod
    def start(self) -> State:
        """The initial state, identical at every site of the run."""

    @abstractmethod
    def blank(self) -> Learner:
        """A learner to load a received state into."""


@dataclass(frozen=True)
class OpenedContext(SiteContext):
    """The context of a site that has opened its data, for one session."""

    features: Features
    session: Session

    def start(self) -> State:
        if self.settings.method == LORA:
            return dict(self._lora.first)
        return new_learner(self.settings, self.features).on_cpu()

    def blank(self) -> Learner:
        if self.settings.method == LORA:
            return self._lora
        if isinstance(self.features, Pixels):
            return self.features.whole_model()
        return blank_part(self.settings, *self.classes.text.shape)

    @property
    def _lora(self) -> Lora:
        """The model with LoRA, loaded once for all sites that a process simulates: a received state replaces all."""
        if self.features not in _LORA:
            _LORA.clear()
            learner = new_learner(self.settings, self.features)
            assert isinstance(learner, Lora)
            _LORA[self.features] = learner
        return _LORA[self.features]

    def require_same_model(self) -> None:
        """Raises if this site's model is known to differ from the server's: their features would not be comparable."""
        own = self.features.model_content
        if self.session.model and own and self.session.model != own:
            raise UserError(
                f"this site's model {self.features.model!r} differs from the server's: give both the same "
                "model-revision, or copy the server's model and name its folder in the node config (model='/PATH')"
            )


def in_simulation() -> bool:
    """True if this process is a Ray worker, in which Flower simulates sites.

    Only there may the server's settings name data on this machine. So the check looks at the program that was started,
    which no server can choose. Whether Ray is imported proves nothing: any code in a real site's process can import it.
    """
    program = getattr(sys.modules["__main__"], "__file__", None) or ""
    return Path(program).parts[-4:] == ("ray", "_private", "workers", "default_worker.py")


def open_context(
    run_config: Mapping[str, object], node_config: Mapping[str, object], session: Session, simulated: bool
) -> OpenedContext:
    """This site's context, cached for further messages to this process.

    `session` has what the server resolved: the domain that no site trains on, and the vocabulary.
    """
    run, node = (tuple(sorted(config.items())) for config in (run_config, node_config))
    return _context(run, node, session, simulated)


def settings_at(run_config: Mapping[str, object], node: Mapping[str, object], simulated: bool = False) -> Settings:
    """The run's settings at this site; those in its owner's node config take precedence."""
    given = dict(run_config)
    if not simulated and str(given.get("class-names", "")).startswith("/"):
        del given["class-names"]  # a file on the server's machine
    if GROUP in node:
        node = {**node, "data": "none"}
    if "model" in node:
        given.pop("model-revision", None)
    if node.get("dp", "local") != "local":
        raise UserError(f"dp = {node['dp']!r} in the node config: expected 'local': a site can only add noise")
    if {"noise-multiplier", "clipping-norm"} & node.keys() and "dp" not in node:
        raise UserError("noise-multiplier and clipping-norm in the node config need dp='local' there")
    if "dp" in node and "noise-multiplier" not in node:
        raise UserError("dp='local' in the node config needs noise-multiplier there: else the server would set it")
    if "data" in node:
        given = {key: value for key, value in given.items() if not key.endswith("-column")}  # the server's columns
    if {*LIMITS} & node.keys():
        _check_limits(Settings.from_run_config(given), node)
    own = {key: node[key] for key in OWNER_KEYS if key in node}
    if given.get("secure-aggregation"):
        own.pop("secure-aggregation", None)  # an owner can turn it on, but not off
    settings = Settings.from_run_config({**given, **own})
    if "dp" in node and settings.hides_images:
        raise UserError(
            "dp='local' in the node config hides this site as a whole, but the run's noise hides single images: to "
            "allow that, have epsilon there in place of dp and noise-multiplier"
        )
    if given.get("dp") == "local" and settings.noise_multiplier < float(str(given["noise-multiplier"])):
        raise UserError(
            f"noise-multiplier = {settings.noise_multiplier:g} in the node config: expected at least "
            f"{given['noise-multiplier']}, the value of the run, which its epsilon is computed from"
        )
    if settings.method == LORA:
        check_installed()
    adapter_class(settings.adapter, chosen=simulated)  # a plug-in that its owner has not installed is refused
    if packs(settings.codec):
        codec_of(settings.codec, chosen=simulated)
    local_data = settings.data == "none" or place_of(settings.data)[0]
    if not simulated and "data" not in node and local_data:
        raise UserError("this site's data is not set: start its SuperNode with --node-config \"data='folder:/PATH'\"")
    return settings


def _check_limits(run: Settings, node: Mapping[str, object]) -> None:
    """Raises unless what leaves in this run has noise for each image, with the ε and the δ that the owner allows."""
    most, delta = node.get("epsilon"), node.get("delta", Settings.delta)
    if most is None:
        raise UserError("delta in the node config needs epsilon there: an ε holds for a δ")
    if not isinstance(most, int | float) or not most > 0:
        raise UserError(f"epsilon = {most!r} in the node config: expected a number above 0, the most for an image")
    if not isinstance(delta, int | float) or not 0 < delta < 1:
        raise UserError(f"delta = {delta!r} in the node config: expected a number above 0 and below 1")
    if not run.noise_leaves or run.epsilon > most:
        raise UserError(
            f"this site takes part only in runs that hide each image before anything leaves, with epsilon of at most "
            f"{most:g}: dp-unit='image' dp='local' (or dp='central' secure-aggregation=true) epsilon={most:g}"
        )
    if run.delta > delta:
        raise UserError(
            f"this site takes part only in runs with delta of at most {delta:g}, this one has {run.delta:g}: set "
            f"delta={delta:g} for the run, or a larger delta beside epsilon in the node config"
        )


@lru_cache(maxsize=64)
def _context(
    run_config: Sequence[tuple[str, object]],
    node_config: Sequence[tuple[str, object]],
    session: Session,
    simulated: bool,
) -> OpenedContext:
    node = dict(node_config)
    settings = settings_at(dict(run_config), node, simulated)
    number, sites = node.get("partition-id"), node.get("num-partitions")
    features = _features(settings, session, simulated)
    device = models.pick_device(settings.device)
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
        config = owners_config(node, features.domains, session.holdout)
        site = own_site(features, config, settings.seed, device)
    return OpenedContext(settings, site, features.classes.ready(device), device, features, session)


@lru_cache(maxsize=4)
def _features(settings: Settings, session: Session, simulated: bool) -> Features:
    """Features, opened once for all sites that a process simulates."""
    return open_features(settings, session.vocabulary, progress=not simulated)
