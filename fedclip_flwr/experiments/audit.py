"""`fedclip audit`: which training images an attacker can find by a run's result, and the least ε that follows.

**A site's own images.** A site's images are split by lot: some are trained on, the others are not. Each image that was
is put beside one of the same site and class that was not. Which one of the two was trained on is a bit drawn by lot,
whatever the attacker knows of all else. With `--canaries` the bits are tossed for a new simulation (`canaries.py`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedclip_flwr.base import Settings, UserError
from fedclip_flwr.base.seeds import seed_of
from fedclip_flwr.base.settings import LORA
from fedclip_flwr.base.text import counted, percent, some, table
from fedclip_flwr.data import Vocabulary
from fedclip_flwr.exchange import privacy
from fedclip_flwr.experiments.canaries import found_images, found_sites
from fedclip_flwr.experiments.simulate import make_sites
from fedclip_flwr.features import Features, Pixels, models, open_features
from fedclip_flwr.learning import Classes, Examples, Learner, OneRound, membership
from fedclip_flwr.learning.membership import Findings
from fedclip_flwr.report.heldout import trained, unchanged
from fedclip_flwr.runs import Run, history
from fedclip_flwr.runs.directions import start_of
from fedclip_flwr.runs.saved import load_adapter, load_lora, load_whole
from fedclip_flwr.site import Site
from fedclip_flwr.site.context import settings_at
from fedclip_flwr.site.holdings import own_site, owners_config, together

LEAST = 10
"""Pairs or canaries that are needed."""
MOST = 2000
"""Pairs or canaries that are attacked; of more pairs, as many by lot."""
UNITS = {"image": "an image", "site": "a site"}
Say = Callable[[str], None] | None


@dataclass(frozen=True)
class AuditOptions:
    """The command's options; empty or 0 for the default."""

    run: str
    sites: Sequence[str]
    data: str
    results_dir: Path | None
    canaries: int
    confidence: float
    as_json: bool


@dataclass(frozen=True)
class Audit:
    """The findings of an attack on `who`; their ε is that of a `unit`, `claimed` that of what the run hides."""

    run: str
    who: str
    attacker: str
    unit: str
    found: Findings
    confidence: float
    delta: float
    claimed: float | None
    hides: str

    def facts(self) -> dict[str, Any]:
        found = self.found
        return {
            "run": self.run,
            "attacked": self.who,
            "attacker": self.attacker,
            "bits": found.bits,
            "guesses": found.guesses,
            "right": found.right,
            "auc": found.auc,
            "auc_interval": [found.low, found.high],
            "found_at_1_percent_false": found.found,
            "confidence": self.confidence,
            "delta": self.delta,
            "epsilon_of": self.unit,
            "epsilon_at_least": found.epsilon,
            "epsilon_claimed": {unit: self._claim(unit) for unit in ("image", "site")},
        }

    def text(self) -> str:
        found = self.found
        claims = {unit: self._claim(unit) for unit in ("image", "site")}
        rows = [
            ("run", self.run),
            ("attacked", self.who),
            ("the attacker has", self.attacker),
            ("guessed right", f"{found.right:,} of {found.guesses:,}"),
            ("AUC", f"{found.auc:.3f} [{found.low:.3f}, {found.high:.3f}]"),
            ("members found, at 1 % false", f"{percent(found.found)} %"),
            (f"ε of {self._one}, at least", f"{found.epsilon:.2f}"),
            *(
                (f"ε of {UNITS[unit]}, claimed", "none" if claim is None else f"{claim:.2f}")
                for unit, claim in claims.items()
            ),
        ]
        lines = "\n".join(line.rstrip() for line in table(rows, left=2).splitlines())
        return f"{lines}\n\n{self._sentence()} (δ = {self.delta:g}, confidence {100 * self.confidence:g} %.)"

    def _claim(self, unit: str) -> float | None:
        return self.claimed if unit == self.hides else None

    @property
    def _one(self) -> str:
        return UNITS[self.unit]

    def _sentence(self) -> str:
        if not self.found.epsilon:
            return (
                "This attack finds nothing for certain. That is no proof: a stronger one may, as may one on more "
                "images or canaries."
            )
        if (claim := self._claim(self.unit)) is not None:
            if self.found.epsilon > claim:
                return "The attack finds more than the claimed ε allows: the claim is wrong."
            return "The attack finds no more than the claimed ε allows. A stronger attack may find more."
        return (
            f"The attack finds members: any claim of a smaller ε of {self._one} would be wrong. A stronger attack "
            "may find more."
        )


def audit(options: AuditOptions, say: Say) -> str:
    """The table, or its figures as JSON."""
    if options.canaries and not LEAST <= options.canaries <= MOST:
        raise UserError(f"--canaries {options.canaries}: expected {LEAST} to {MOST:,}")
    if not 0.5 <= options.confidence < 1:
        raise UserError(f"--confidence {options.confidence:g}: expected at least 0.5, and less than 1")
    run = history.find(options.run, options.results_dir)
    if not run.completed:
        raise UserError(f"{run.name} is not completed, so it has no result to audit: it is {run.status}")
    settings, features, sites = opened(run, options)
    audited = with_canaries if options.canaries else own_images
    found = audited(run, settings, features, sites, options, say)
    return json.dumps(found.facts(), indent=2) if options.as_json else found.text()


def opened(run: Run, options: AuditOptions) -> tuple[Settings, Features, list[Site]]:
    """The settings, features and sites that are audited; raises unless they are those of the run."""
    settings = replace(run.known, resume="", update="", leave="", name="")
    if not options.data and settings.data == "none":
        raise UserError(f"{run.name}: its server had no images; a site can audit its own with --data and --site")
    if options.data:
        if len(options.sites) != 1:
            raise UserError("--data: the name that the site has in the run is needed, too: --site NAME")
        settings = settings_at(settings.as_run_config(), {"data": options.data})
    facts = facts_of(run.path, settings.method)
    features = open_features(settings, Vocabulary(tuple(facts["class_names"]), tuple(facts["templates"])))
    examples: dict[str, list[int]] = run.summary["examples"]
    if unknown := [name for name in options.sites if name not in examples]:
        raise UserError(f"--site {unknown[0]}: {run.name} has no such site; its sites are {some(sorted(examples))}")
    device, holdout = models.pick_device(settings.device), run.summary.get("holdout") or ""
    if options.data:
        config = owners_config({"site": options.sites[0]}, features.domains, holdout)
        sites = [own_site(features, config, settings.seed, device)]
    else:
        how: dict[str, Any] = {"partition": settings.partition, "alpha": settings.alpha, "device": device}
        count = run.settings.get("simulated") or run.settings["sites"]  # some may have been forgotten
        everyone, _ = make_sites(features, holdout, count, settings.seed, **how)
        sites = [site for site in everyone if site.name in examples]
    wanted = options.sites or list(examples)
    found = [site for site in sites if site.name in wanted]
    mine = {site.name: [len(part.labels) for part in (site.train, site.validation, site.test)] for site in found}
    if mine != {name: examples[name] for name in wanted}:
        raise UserError(
            f"{settings.data}: these are not the images that {some(sorted(wanted))} had in {run.name}. A real site "
            "audits its own images, with --data and --site; images that were added or removed since change all splits"
        )
    return settings, features, found if options.canaries == 0 else sites


def facts_of(path: Path, method: str) -> dict[str, Any]:
    """The facts of what the run has made."""
    if method == "full-model":
        return load_whole(path / "model")
    return load_lora(path)[1] if method == LORA else load_adapter(path)[1]


def own_images(
    run: Run, settings: Settings, features: Features, sites: list[Site], options: AuditOptions, say: Say
) -> Audit:
    """The attack on the sites' own images."""
    device = models.pick_device(settings.device)
    before, classes = unchanged(settings, features), features.classes.ready(device)
    unseeing, learner = before and before.to(device), trained(run.path, settings, features).to(device)
    if say:
        say(f"attacking the images of {counted(len(sites), 'site')}…")
    found = attacked(learner, unseeing, sites, classes, settings, options.confidence)
    who = f"{found.bits:,} pairs of images, one of each trained on"
    whose = some(options.sites) if options.sites else f"all {len(sites)} sites"
    what = f"the result, and the images of {whose}"
    return Audit(run.name, who, what, "image", found, options.confidence, settings.delta, run.epsilon, run.unit)


def attacked(
    learner: Learner,
    unseeing: Learner | None,
    sites: Sequence[Site],
    classes: Classes,
    settings: Settings,
    confidence: float,
) -> Findings:
    """The findings on pairs of the sites' images; `unseeing` is the model before training, None for zero-shot."""
    first, second, known = pairs(sites, torch.Generator().manual_seed(seed_of(settings.seed, "audit", "pairs")))
    if (count := len(first.labels)) < LEAST:
        raise UserError(
            f"{counted(count, 'pair')} of images can be made, one of each trained on and one not, of the same site and "
            f"class; at least {LEAST} are needed"
        )
    if isinstance(learner, OneRound) and settings.keeps_sums and settings.strategy == "fedavg":
        inside = membership.unmixed_pairs(learner, known, first, second)
        outside = -inside
    else:
        inside, outside = (membership.drops(learner, unseeing, part, classes) for part in (first, second))
    return membership.findings(inside, outside, inside - outside, settings.delta, confidence, steps=2)


def pairs(sites: Sequence[Site], chance: torch.Generator) -> tuple[Examples, Examples, Examples]:
    """Images that were trained on; for each one of the same site and class that was not; and all others that were."""
    parts: list[tuple[Examples, Examples]] = []
    rest: list[Examples] = []
    for site in sites:
        others = together([site.validation, site.test])
        for number in site.class_numbers:
            own, other = (shuffled(part, number, chance) for part in (site.train, others))
            least = min(len(own.labels), len(other.labels))
            parts.append((own.rows(slice(least)), other.rows(slice(least))))
            rest.append(own.rows(slice(least, None)))
    first, second = (together(side) for side in zip(*parts, strict=True))
    order = torch.randperm(len(first.labels), generator=chance)
    chosen, left = (rows.to(first.labels.device) for rows in (order[:MOST], order[MOST:]))
    return first.rows(chosen), second.rows(chosen), together([*rest, first.rows(left)])


def shuffled(examples: Examples, number: int, chance: torch.Generator) -> Examples:
    """The examples of a class, in random order."""
    rows: Tensor = (examples.labels == number).nonzero()[:, 0]
    return examples.rows(rows[torch.randperm(len(rows), generator=chance).to(rows.device)])


def with_canaries(
    run: Run, settings: Settings, features: Features, sites: list[Site], options: AuditOptions, say: Say
) -> Audit:
    """The attack on canaries in a new simulation."""
    if isinstance(features, Pixels):
        raise UserError(f"--canaries: {run.name} trained the whole model; canaries are for other methods")
    if options.data or options.sites:
        raise UserError("--canaries: they are put into a simulation of all sites; leave out --site and --data")
    classes: Classes = features.classes.ready(models.pick_device(settings.device))
    unit, attacker = attacked_by(settings)
    which = found_images if unit == "image" else found_sites
    claimed = privacy.spent(settings, [settings.rounds])  # first: it may lack a package
    start = start_of(settings, features) if settings.method == LORA else None
    found = which(sites, classes, settings, options.canaries, options.confidence, start)
    who = f"{options.canaries:,} canary {unit}s, each in by the toss of a coin"
    return Audit(run.name, who, attacker, unit, found, options.confidence, settings.delta, claimed, run.unit)


def attacked_by(settings: Settings) -> tuple[str, str]:
    """What canaries are, and what the attacker has."""
    local = settings.dp == "local"
    if settings.hides_images:
        seen = "each site's noised sums" if local else "the noised total"
        return "image", f"{seen} of a new simulation, and all other images"
    if settings.dp == "off":
        return "image", "what a new simulation ends with, and all other images"
    return "site", "each update in a new simulation" if local else "the last adapter of a new simulation"
