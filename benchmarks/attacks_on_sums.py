"""What hostile sites come to with `method=one-round`, for the exact sum and for the strategies that bound each site.

    python -m benchmarks.attacks_on_sums [--data features:PATH] [--sites 10] [--seeds 3] [--hostile 2]

The checks refuse sums that no images can have. So an attacker sends sums of images that it has made up. Prints test
accuracy in %, mean over the other sites and the seeds. Nothing is selected, so lies about validation images do nothing.

    label flip    its own images, all labelled as the next class
    mirrored      the opposite of each of its features
    noise         random features
    a hundred     the labels flipped, and each image a hundred times
    one class     the mean feature of its images as a class of its own choice, a hundred times as many as it has images
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from statistics import mean

import torch
from torch.nn import functional as F

from benchmarks.attacks import flipped
from benchmarks.common import at_least, finish, opened
from fedclip_flwr.base import Settings
from fedclip_flwr.base.settings import FORMS, ONE_ROUND, ROBUST_SUMS
from fedclip_flwr.experiments.simulate import make_sites, simulate
from fedclip_flwr.features import Features
from fedclip_flwr.learning import Examples, evaluate
from fedclip_flwr.learning.metrics import mean_accuracy
from fedclip_flwr.learning.recipes import blank_part
from fedclip_flwr.site import Site
from harness.machine import table

MANY = 100


def repeated(made: Examples) -> Examples:
    return Examples(made.features.repeat(MANY, 1), made.labels.repeat(MANY))


def noise(own: Examples, seed: int) -> Examples:
    chance = torch.Generator().manual_seed(seed)
    return own._replace(features=F.normalize(torch.randn(own.features.shape, generator=chance), dim=1))


def one_class(own: Examples) -> Examples:
    """The same image many times: the mean feature, at full length, as class 0."""
    middle = F.normalize(own.features.mean(0, keepdim=True), dim=1).expand_as(own.features)
    return repeated(Examples(middle, torch.zeros_like(own.labels)))


Attack = Callable[[Site, int, int], Examples]
ATTACKS: Mapping[str, Attack] = {
    "label flip": lambda site, classes, seed: flipped(site, classes).train,
    "mirrored": lambda site, classes, seed: site.train._replace(features=-site.train.features),
    "noise": lambda site, classes, seed: noise(site.train, seed),
    "a hundred": lambda site, classes, seed: repeated(flipped(site, classes).train),
    "one class": lambda site, classes, seed: one_class(site.train),
}


def accuracy(
    features: Features, sites: Sequence[Site], settings: Settings, attack: str, hostile: int
) -> tuple[float, float]:
    """Of the honest sites' test images, in %: zero-shot, and by the closed form."""
    first, classes = len(sites) - hostile, features.classes
    honest = sites[:first]
    if attack:
        made = (replace(site, train=ATTACKS[attack](site, len(classes.text), settings.seed)) for site in sites[first:])
        sites = [*honest, *made]
    state = simulate(sites, classes, None, settings, test_every_round=False).state
    learner = blank_part(settings, *classes.text.shape)
    learner.load_state_dict(state)
    zero, adapted = (mean_accuracy(evaluate(by, site.test, classes) for site in honest) for by in (None, learner))
    return 100 * (zero or 0.0), 100 * (adapted or 0.0)


def compare(features: Features, many: int, seeds: int, hostile: int) -> str:
    rows, zero = [], 0.0
    for statistics in FORMS:
        for strategy in ROBUST_SUMS:
            row = [f"{statistics}, {'the exact sum' if strategy == 'fedavg' else strategy}"]
            for attack in ("", *ATTACKS):
                tries = []
                for seed in range(seeds):
                    sites, _ = make_sites(features, "", many, seed)
                    how = Settings(method=ONE_ROUND, statistics=statistics, strategy=strategy, seed=seed)
                    tries.append(accuracy(features, sites, how, attack, hostile))
                zero, adapted = (mean(values) for values in zip(*tries, strict=True))
                row.append(f"{adapted:.1f}")
            rows.append(row)
            print(" ".join(f"{cell:>14}" for cell in row), file=sys.stderr, flush=True)
    return f"{table(['', 'none', *ATTACKS], rows)}\n\nZero-shot: {zero:.1f}."


def main() -> str:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.attacks_on_sums", description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="drawn")
    parser.add_argument("--sites", type=at_least(3), default=10)
    parser.add_argument("--seeds", type=at_least(1), default=3)
    parser.add_argument("--hostile", type=at_least(1), default=2)
    given = parser.parse_args()
    if given.hostile >= given.sites:
        parser.error("--hostile: expected fewer than --sites")
    logging.getLogger("flwr").setLevel(logging.WARNING)
    features = opened(given.data)
    print(compare(features, given.sites, given.seeds, given.hostile))
    described = f"{given.sites} sites, {given.hostile} of them hostile, {given.seeds} seeds from 0"
    return f"\n{described}"


if __name__ == "__main__":
    finish(main)
