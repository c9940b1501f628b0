"""One round that does not tell of single images: what noise costs, by method, by who adds it, and by ε.

    python -m benchmarks.private_images [--data features:PATH] [--holdouts domains|classes] [--sites 10] [--seeds 10]
        [--staying 8] [--epsilons 0.5,1,3,8] [--choose]

Every domain is held out in turn, or every third of the classes. Prints gains over zero-shot in points of test accuracy:
seen sites / what is held out, means over both and the seeds from 0, and the lowest mean of any that is held out. δ is
1e-5. Noise comes from the operating system's entropy: another time the figures are a little different.

    off       no noise
    central   the server adds the noise: it is trusted with the sums
    shares    each site adds a share, as large as if only `--staying` sites were to stay; under secure aggregation
    local     each site adds all of the noise

With `--choose` the steps of `gradient` are varied one by one, on the sites' validation images and on validation splits
of what is held out, with seeds from 100: how they were chosen.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import mean
from typing import NamedTuple

import torch

from benchmarks.common import at_least
from fedclip_flwr.base import Settings, UserError
from fedclip_flwr.base.seeds import seed_of
from fedclip_flwr.base.settings import FORMS
from fedclip_flwr.base.tensors import State
from fedclip_flwr.exchange.noise import noised, share_of, sigma_for
from fedclip_flwr.experiments.simulate import make_sites
from fedclip_flwr.experiments.unseen import THIRDS
from fedclip_flwr.features import Features, open_features
from fedclip_flwr.learning import Classes, Examples, Learner, OneRound, evaluate
from fedclip_flwr.learning import gradient as steps_of
from fedclip_flwr.learning.gradient import WHOLE, OneGradient, Steps, gradient_of, noised_by
from fedclip_flwr.learning.metrics import mean_accuracy
from fedclip_flwr.learning.noised_sums import Noised, in_units, mended, most_of, sensitivities
from fedclip_flwr.learning.sums import bits_for, sums_of
from fedclip_flwr.learning.training import split
from fedclip_flwr.site import Site
from fedclip_flwr.site.holdings import together
from harness.machine import machine, table

DELTA = 1e-5
GRADIENT = "gradient"
METHODS = (GRADIENT, *FORMS)
PLACES = ("central", "shares", "local")
FIRST_CHOOSING = 100
TRIED = {
    "across": (64.0, 192.0),
    "along": (20.0, 48.0),
    "all": (0.2, 0.4),
    "noise": (0.15, 0.35),
}
Gain = tuple[float, float]


class How(NamedTuple):
    """Who adds the noise, to how many sites' sums, and how many of them are sure to stay."""

    place: str
    sites: int
    staying: int

    def add(self, sums: State, sigmas: Mapping[str, int]) -> tuple[State, float]:
        """The sum of what all sites send, and by how much its noise is stronger than that of one."""
        if self.place == "central":
            return noised(sums, sigmas), 1.0
        if self.place == "shares":
            sigmas = {name: share_of(sigma, self.staying) for name, sigma in sigmas.items()}
        for _ in range(self.sites):
            sums = noised(sums, sigmas)
        return sums, (self.sites / (self.staying if self.place == "shares" else 1)) ** 0.5


@dataclass(frozen=True)
class Trial:
    """A federation with something held out: all training images together, and the images that measure."""

    sites: Sequence[Site]
    unseen: Examples
    classes: Classes
    holdout: str

    def sums(self, method: str) -> tuple[Learner, State]:
        """A new learner, and the sums of all sites without noise."""
        train = together(site.train for site in self.sites)
        text = self.classes.text
        if method == GRADIENT:
            learner = OneGradient.new(text)
            return learner, gradient_of(train, learner.prompts, float(self.classes.scale))
        start = OneRound.new(method, text)
        bits = bits_for(len(train.labels))
        return start, sums_of(train, start.basis, len(text), bits, most_of(start.basis))

    @property
    def images(self) -> int:
        return sum(len(site.train.labels) for site in self.sites)

    def gain(self, learner: Learner) -> Gain:
        """In points: the mean over the sites, and what is held out."""
        found = []
        for parts in ([site.test for site in self.sites], [self.unseen]):
            ours, zero = (mean_accuracy(evaluate(of, part, self.classes) for part in parts) for of in (learner, None))
            found.append(100 * ((ours or 0.0) - (zero or 0.0)))
        return found[0], found[1]


def trials(features: Features, holdouts: Sequence[str], sites: int, seeds: Sequence[int]) -> Iterator[Trial]:
    for holdout in holdouts:
        for seed in seeds:
            made, unseen = make_sites(features, holdout, sites, seed)
            yield Trial(made, unseen[holdout], features.classes.ready(), holdout)


def validating(trial: Trial, seed: int) -> Trial:
    """The same with validation images in place of those that measure."""
    _, rows, _ = split(len(trial.unseen.labels), seed_of(seed, "tuning", trial.holdout))
    sites = [replace(site, test=site.validation) for site in trial.sites]
    return replace(trial, sites=sites, unseen=trial.unseen.rows(rows))


def learnt(trial: Trial, method: str, start: Learner, sums: State, how: How, epsilon: float) -> Learner:
    """The learner from the sums with noise of this ε; 0: without noise."""
    if isinstance(start, OneGradient):
        if not epsilon:
            noised_by(start, sums, trial.images, 0.0)
            return start
        sigma = sigma_for(epsilon, DELTA, WHOLE, sum(tensor.numel() for tensor in sums.values()))
        found, times = how.add(sums, dict.fromkeys(sums, sigma))
        noised_by(start, found, trial.images, sigma * times)
        return start
    assert isinstance(start, OneRound)
    if epsilon:
        bits, most = bits_for(trial.images), most_of(start.basis)
        numbers = sum(tensor.numel() for tensor in sums.values())
        strength = sigma_for(epsilon, DELTA, WHOLE, numbers) / WHOLE
        sigmas = {name: int(strength * one) + 1 for name, one in sensitivities(bits, most).items()}
        found, times = how.add(in_units(sums, bits), sigmas)
        deviations = {name: times * sigma for name, sigma in sigmas.items()}
        sums = mended(Noised(found, trial.images, deviations, bits, most))
    start.load_state_dict({**start.state_dict(), **sums})
    return start


def row(gains: Mapping[str, Sequence[Gain]]) -> list[str]:
    """Seen, unseen, and the lowest of the means of what is held out, which is named."""
    means = {name: [mean(values) for values in zip(*found, strict=True)] for name, found in gains.items()}
    seen, unseen = (mean(found[at] for found in means.values()) for at in (0, 1))
    lowest = min(means, key=lambda name: means[name][1])
    return [f"{seen:+.1f} / {unseen:+.1f}", f"{means[lowest][1]:+.1f} ({lowest})"]


def compare(every: Sequence[Trial], epsilons: Sequence[float], staying: int) -> str:
    """The table of all methods."""
    rows = []
    for method in METHODS:
        made = [(trial, *trial.sums(method)) for trial in every]
        for place, epsilon in [("off", 0.0), *((place, one) for place in PLACES for one in epsilons)]:
            gains: dict[str, list[Gain]] = {}
            for trial, start, sums in made:
                how = How(place, len(trial.sites), min(staying, len(trial.sites)))
                learner = learnt(trial, method, start, sums, how, epsilon)
                gains.setdefault(trial.holdout, []).append(trial.gain(learner))
            rows.append(
                [method, place, "an image" if epsilon else "–", f"{epsilon:g}" if epsilon else "–", *row(gains)]
            )
    return table(["method", "noise", "hides", "ε", "seen / unseen", "lowest unseen"], rows)


def choose(every: Sequence[Trial], epsilons: Sequence[float]) -> str:
    """The table of steps around those in use: noise by the server, and by each site."""
    kept = Steps()
    tried = [("in use", kept)]
    tried += [
        (f"{name} {value:g}", kept._replace(**{name: value})) for name, values in TRIED.items() for value in values
    ]
    made = [(trial, *trial.sums(GRADIENT)) for trial in every]
    rows = []
    for name, steps in tried:
        line = [name]
        for place in ("central", "local"):
            for epsilon in epsilons:
                gains: dict[str, list[Gain]] = {}
                for trial, start, sums in made:
                    learner = learnt(trial, GRADIENT, start, sums, How(place, len(trial.sites), 1), epsilon)
                    learner.steps = torch.tensor(steps, dtype=torch.float64)
                    gains.setdefault(trial.holdout, []).append(trial.gain(learner))
                line.append(", ".join(row(gains)))
        rows.append(line)
    return table(["", *(f"{place}, ε {epsilon:g}" for place in ("central", "local") for epsilon in epsilons)], rows)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.private_images", description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="drawn")
    parser.add_argument("--holdouts", default="domains", choices=["domains", "classes"])
    parser.add_argument("--sites", type=at_least(1), default=10)
    parser.add_argument("--seeds", type=at_least(1), default=10)
    parser.add_argument("--staying", type=at_least(1), default=8)
    parser.add_argument("--epsilons", default="0.5,1,3,8")
    parser.add_argument("--choose", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)  # the matrices are small: more threads only wait for each other
    begun = time.perf_counter()
    features = open_features(Settings.from_run_config({"data": given.data}))
    epsilons = [float(one) for one in given.epsilons.split(",")]
    holdouts = THIRDS if given.holdouts == "classes" else features.domains
    first = FIRST_CHOOSING if given.choose else 0
    seeds = range(first, first + given.seeds)
    every = list(trials(features, holdouts, given.sites, seeds))
    if given.choose:
        print(
            choose([validating(one, seed) for one, seed in zip(every, [*seeds] * len(holdouts), strict=True)], epsilons)
        )
    else:
        print(compare(every, epsilons, given.staying))
    described = (
        f"{given.data}, {given.sites} sites, {given.holdouts} held out, {given.seeds} seeds from {first}, δ {DELTA:g}"
    )
    kept = ", ".join(f"{name} {value:g}" for name, value in Steps()._asdict().items())
    print(f"\nsteps: {kept}; clip {steps_of.CLIP:g}\n{described}; {time.perf_counter() - begun:.0f} s; {machine()}")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        raise SystemExit(str(error)) from None
