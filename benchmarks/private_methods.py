"""What privacy costs: every method at the same ε, with the unit that its ε hides.

    python -m benchmarks.private_methods [--data features:PATH] [--holdouts domains|classes] [--sites 10] [--seeds 3]
        [--staying 8] [--epsilons 0.5,1,3,8] [--methods gradient span full gate attention] [--adapter-seeds 1]
        [--rounds 20]

Every domain is held out in turn, or every third of the classes. Prints gains over zero-shot in points of test accuracy:
seen sites / what is held out, means over both and the seeds from 0, and in brackets the lowest mean of any that is
held out. δ is 1e-5. Noise comes from the operating system's entropy: another time the figures are a little different.

    central   the server adds the noise: it is trusted with the sums, or updates
    shares    each site adds a share, as large as if only `--staying` sites were to stay; under secure aggregation
    local     each site adds all of the noise

The first methods are those of one round, whose ε hides an image (private_images.py). The ε of adapters hides a site:
their noise multiplier is the least that comes to this ε after all rounds, and the last round's adapter counts, because
to select one by validation is not private.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache

from benchmarks.common import at_least, finish, opened
from benchmarks.private_images import (
    DELTA,
    GRADIENT,
    Gain,
    How,
    Trial,
    cell,
    epsilons_of,
    holdouts_of,
    kept_steps,
    learnt,
    trials,
)
from fedclip_flwr.base import Settings
from fedclip_flwr.base.settings import FORMS
from fedclip_flwr.base.tensors import State
from fedclip_flwr.base.text import counted
from fedclip_flwr.exchange import privacy
from fedclip_flwr.experiments.simulate import simulate
from fedclip_flwr.learning import Learner
from harness.machine import table

UNITS = (
    "Don't compare rows that hide an image with rows that hide a site: ε is of another promise there. A site is all of "
    "its images at once, so hiding it takes far more noise."
)
ADAPTERS = ("gate", "attention")
"""Those whose weights noise can't make infinite, as it does those of `scale` (its exp): then no site has an answer."""
METHODS = (GRADIENT, *FORMS, *ADAPTERS)
Gains = Callable[[str, float], list[Gain]]
"""The gain in each trial, by who adds the noise, and ε; 0: no noise."""


@cache
def multiplier_for(epsilon: float, dp: str, rounds: int) -> float:
    """The least noise multiplier, to a ten-thousandth, with which this many rounds come to at most this ε of a site."""

    def spent(multiplier: float) -> float:
        settings = Settings(dp=dp, noise_multiplier=multiplier, delta=DELTA)
        return privacy.spent(settings, [rounds]) or 0.0

    low, high = 0.0, 1.0
    while spent(high) > epsilon:
        low, high = high, 2 * high
    while high - low > 1e-4 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if spent(middle) > epsilon else (low, middle)
    return high


def of_images(method: str, every: Sequence[Trial], staying: int) -> Gains:
    """Those of a method of one round."""
    made = [(trial, *trial.sums(method)) for trial in every]

    def gain(trial: Trial, start: Learner, sums: State, place: str, epsilon: float) -> Gain:
        how = How(place, len(trial.sites), min(staying, len(trial.sites)))
        return trial.gain(learnt(trial, start, sums, how, epsilon))

    return lambda place, epsilon: [gain(*one, place, epsilon) for one in made]


def of_sites(adapter: str, every: Sequence[Trial], rounds: int) -> Gains:
    """Those of an adapter."""

    def gain(trial: Trial, place: str, epsilon: float) -> Gain:
        settings = Settings(adapter=adapter, num_server_rounds=rounds, seed=trial.seed)
        if epsilon:
            settings = replace(settings, dp=place, noise_multiplier=multiplier_for(epsilon, place, rounds), delta=DELTA)
        # without validation images, the last round's adapter is taken
        sites = [replace(site, validation=site.validation.rows(slice(0))) for site in trial.sites]
        apart = {trial.holdout: trial.unseen}
        found = simulate(sites, trial.classes, apart, settings, test_every_round=False)
        zero, last = found.zero_shot, found.selected
        assert last.round == rounds
        return 100 * ((last.seen or 0.0) - (zero.seen or 0.0)), 100 * ((last.unseen or 0.0) - (zero.unseen or 0.0))

    return lambda place, epsilon: [gain(trial, place, epsilon) for trial in every]


def rows(
    first: list[str], places: Sequence[str], epsilons: Sequence[float], every: Sequence[Trial], gains: Gains
) -> Iterator[list[str]]:
    """A method's rows, which begin with these cells: one for each that may add the noise."""
    without = cell(every, gains("", 0.0))
    for place in places:
        cells = [cell(every, gains(place, epsilon)) for epsilon in epsilons]
        row = [*first, place, without, *cells]
        print(" ".join(f"{one:>20}" for one in row), file=sys.stderr, flush=True)
        yield row
        without = ""


def main() -> str:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.private_methods", description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="drawn")
    parser.add_argument("--holdouts", default="domains", choices=["domains", "classes"])
    parser.add_argument("--sites", type=at_least(1), default=10)
    parser.add_argument("--seeds", type=at_least(1), default=3)
    parser.add_argument("--staying", type=at_least(1), default=8)
    parser.add_argument("--epsilons", type=epsilons_of, default=[0.5, 1, 3, 8])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--adapter-seeds", type=at_least(1), default=1, help="fewer, because adapters take longer")
    parser.add_argument("--rounds", type=at_least(1), default=20, help="of adapters")
    given = parser.parse_args()
    features = opened(given.data)
    holdouts = holdouts_of(features, given.holdouts)
    every, fewer = (
        list(trials(features, holdouts, given.sites, range(seeds))) for seeds in (given.seeds, given.adapter_seeds)
    )
    found: list[list[str]] = []
    for method in given.methods:
        if method in ADAPTERS:
            gains = of_sites(method, fewer, given.rounds)
            found += rows([method, "a site"], ("central", "local"), given.epsilons, fewer, gains)
        else:
            gains = of_images(method, every, given.staying)
            found += rows([method, "an image"], ("central", "shares", "local"), given.epsilons, every, gains)
    print(table(["method", "hides", "noise", "none", *(f"ε = {one:g}" for one in given.epsilons)], found))
    noise = "; ".join(
        f"{place} {', '.join(f'{multiplier_for(one, place, given.rounds):.1f}' for one in given.epsilons)}"
        for place in ("central", "local")
    )
    adapters = f"{given.rounds} rounds, {counted(given.adapter_seeds, 'seed')} from 0, noise multipliers {noise}"
    images = f"{given.sites} sites, {given.holdouts} held out, {counted(given.seeds, 'seed')} from 0, δ {DELTA:g}"
    return f"\n{UNITS}\n\n{kept_steps()}\nadapters: {adapters}\n{given.data}: {images}"


if __name__ == "__main__":
    finish(main)
