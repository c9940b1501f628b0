"""The methods that are compared: our adapters, and the baselines that they have to beat.

Every method trains and averages by the same code, on the same sites, splits and images. Zero-shot is the frozen CLIP.
`local` is each site alone, with as much training, tested on its own images and, as a mean over the sites, on the unseen
domain. FedAVG (arXiv 1602.05629) and FedProx (arXiv 1812.06127) train and send the whole CLIP, from pixels. In
`centralised`, all training features are in one place: an upper bound for a federation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from fedclip_flwr.base import Settings, UserError
from fedclip_flwr.base.settings import LORA, LORA_KEYS, ONE_ROUND
from fedclip_flwr.experiments.simulate import Accuracies, accuracies_of, simulate
from fedclip_flwr.learning import Classes, Examples, Learner
from fedclip_flwr.learning.metrics import Score, mean_of
from fedclip_flwr.site import Site


@dataclass(frozen=True)
class Case:
    """The input of a method; `start` is the learner, if that is not a new adapter."""

    sites: Sequence[Site]
    classes: Classes
    unseen: Mapping[str, Examples]
    settings: Settings
    start: Learner | None = None
    after_round: Callable[[], object] = lambda: None


def zero_shot(case: Case) -> Accuracies:
    return accuracies_of(None, case.sites, case.classes.ready(case.classes.text.device), case.unseen)


def together(case: Case) -> Accuracies:
    """The accuracies of a federation of all sites."""
    more: dict[str, Any] = {"start": case.start, "test_every_round": False, "after_round": case.after_round}
    return simulate(case.sites, case.classes, case.unseen, case.settings, **more).selected


def centralised(case: Case) -> Accuracies:
    return together(replace(case, sites=pooled(case.sites)))


def pooled(sites: Sequence[Site]) -> list[Site]:
    """All sites' training rows in one place, their validation and test rows where they were."""
    train = Examples(*(torch.cat(parts) for parts in zip(*(s.train for s in sites), strict=True)))
    none = Examples(train.features[:0], train.labels[:0])
    return [Site("centralised", train, none, none), *(Site(s.name, none, s.validation, s.test) for s in sites)]


def local_only(case: Case) -> Accuracies:
    able = [site for site in case.sites if len(site.train.labels)]
    if not able:
        raise UserError("no site has an example to learn from: use more data or fewer sites")
    found = [together(replace(case, sites=[site])) for site in able]
    own = {site.name: line.tests[site.name] for site, line in zip(able, found, strict=True)}
    apart = {domain: [line.tests[domain] for line in found] for domain in case.unseen}
    sums = {domain: Score(*map(sum, zip(*scores, strict=True))) for domain, scores in apart.items()}
    return Accuracies(
        max(line.round for line in found),
        seen=mean_of(line.seen for line in found if line.seen is not None),
        validation=mean_of(line.validation for line in found if line.validation is not None),
        unseen=mean_of(line.unseen for line in found if line.unseen is not None),
        tests=own | sums,
    )


@dataclass(frozen=True)
class Method:
    """One row of the comparison: how it runs, and its settings in addition to those of all rows."""

    label: str
    run: Callable[[Case], Accuracies]
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def whole_model(self) -> bool:
        return self.settings.get("method") == "full-model"

    @property
    def lora(self) -> bool:
        return self.settings.get("method") == LORA

    @property
    def sends(self) -> bool:
        """True if the method sends something in each round."""
        return self.run is together


_WHOLE = {"method": "full-model", "recipe": "paper"}
METHODS = {
    "zero-shot": Method("zero-shot", zero_shot),
    "local": Method("each site alone", local_only),
    "fedavg": Method("FedAVG, whole model, as we read the paper", together, _WHOLE),
    "fedprox": Method("FedProx, whole model, as we read the paper", together, {**_WHOLE, "strategy": "fedprox"}),
    "paper": Method("FedCLIP, the paper's recipe", together, {"recipe": "paper"}),
    "one-round": Method("ours, one round", together, {"method": ONE_ROUND}),
    "one-round-chosen": Method(
        "ours, one round, constants chosen", together, {"method": ONE_ROUND, "one_round_choose": True}
    ),
    "one-round-full": Method("ours, one round, full", together, {"method": ONE_ROUND, "statistics": "full"}),
    "attention": Method("ours, attention", together),
    "gate": Method("ours, gate", together, {"adapter": "gate"}),
    "scale": Method("ours, scale", together, {"adapter": "scale"}),
    "blend": Method("ours, attention, blend chosen", together, {"blend": "auto"}),
    "lora": Method("ours, LoRA", together, {"method": LORA}),
    "lora-both": Method("ours, LoRA, A and B trained", together, {"method": LORA, "lora_train": "both"}),
    "centralised": Method("attention, all in one place", centralised),
}


def method_of(name: str) -> Method:
    """The method of that name; any other name is that of a plug-in adapter."""
    return METHODS.get(name) or Method(f"plug-in, {name}", together, {"adapter": name})


OWN = frozenset({"method", "statistics", "lora-train", "one-round-choose", "adapter", "recipe", "strategy"})
"""Settings that differ between methods."""
LORA_ONLY = tuple(key for key in (*LORA_KEYS, "gradient-checkpointing") if key not in OWN)
"""Settings that only the methods with LoRA get."""


@dataclass(frozen=True)
class Published:
    """Accuracies published by others, in per cent: by held-out domain, and their mean.

    If `every`, they are means over all domains, including the held-out one; else over the held-out domain only. They
    are shown only beside results of the same `model`.
    """

    label: str
    by_domain: Mapping[str, float]
    mean: float | None
    every: bool = False
    model: str = "clip-vit-base-patch16"


_B32 = "clip-vit-base-patch32"
_ISSUE = "ViT-B/32, a log in issue 38 of the released code, held-out accuracy"
_FEDMVP = "ViT-B/16, as FedMVP (ICCV 2025) reports it, held-out accuracy"


def _readme(method: str, *accuracies: float, mean: float) -> Published:
    """Accuracies from the readme of the released code, by held-out domain."""
    label = f"{method}: ViT-B/32, readme of the released code, almost certainly the mean over all four domains"
    domains = ("art_painting", "cartoon", "photo", "sketch")
    return Published(label, dict(zip(domains, accuracies, strict=True)), mean, every=True, model=_B32)


PUBLISHED = {
    "pacs": [
        _readme("FedAVG", 64.65, 84.50, 87.87, 89.16, mean=81.55),
        _readme("FedProx", 77.81, 87.95, 89.42, 90.08, mean=86.32),
        _readme("FedCLIP", 95.15, 95.36, 95.46, 94.99, mean=95.24),
        Published(f"FedCLIP: {_ISSUE}", {"sketch": 89.36}, None, model=_B32),
        Published(f"zero-shot: {_FEDMVP}", {}, 96.16),
        Published(f"FedCLIP: {_FEDMVP}", {}, 96.29),
    ],
    "vlcs": [Published(f"zero-shot: {_FEDMVP}", {}, 83.29), Published(f"FedCLIP: {_FEDMVP}", {}, 82.70)],
    "office-home": [Published(f"zero-shot: {_FEDMVP}", {}, 81.49), Published(f"FedCLIP: {_FEDMVP}", {}, 81.74)],
}
"""By preset. The labels name their sources; none was measured here."""
