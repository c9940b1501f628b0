"""One round that does not tell of single images: the sums, their noise, and what is learnt from them.

    python -m benchmarks.private_images [--data features:PATH] [--holdouts domains|classes] [--sites 10] [--seeds 10]
        [--epsilons 0.5,1,3,8]

Shows how the steps of `gradient` were chosen: they are varied one by one, on the sites' validation images and on
validation splits of what is held out, with seeds from 100. Every domain is held out in turn, or every third of the
classes. Prints gains over zero-shot in points: seen sites / what is held out, means over both and the seeds, and the
lowest mean of any that is held out. What the methods come to on test images: private_methods.py.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import mean
from typing import NamedTuple

import torch

from benchmarks.common import at_least, finish, opened
from fedclip_flwr.base.seeds import seed_of
from fedclip_flwr.base.tensors import State
from fedclip_flwr.exchange.noise import noised, share_of, sigma_for
from fedclip_flwr.experiments.simulate import make_sites
from fedclip_flwr.experiments.unseen import THIRDS
from fedclip_flwr.features import Features
from fedclip_flwr.learning import Classes, Examples, Learner, OneRound, evaluate
from fedclip_flwr.learning import gradient as steps_of
from fedclip_flwr.learning.gradient import WHOLE, OneGradient, Steps, gradient_of, noised_by
from fedclip_flwr.learning.metrics import mean_accuracy
from fedclip_flwr.learning.noised_sums import Noised, in_units, mended, most_of, sensitivities
from fedclip_flwr.learning.sums import bits_for, sums_of
from fedclip_flwr.learning.training import split
from fedclip_flwr.site import Site
from fedclip_flwr.site.holdings import together
from harness.machine import table

DELTA = 1e-5
GRADIENT = "gradient"
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
    seed: int

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


def holdouts_of(features: Features, kind: str) -> Sequence[str]:
    return THIRDS if kind == "classes" else features.domains


def trials(features: Features, holdouts: Sequence[str], sites: int, seeds: Sequence[int]) -> Iterator[Trial]:
    for holdout in holdouts:
        for seed in seeds:
            made, unseen = make_sites(features, holdout, sites, seed)
            yield Trial(made, unseen[holdout], features.classes.ready(), holdout, seed)


def validating(trial: Trial) -> Trial:
    """The same with validation images in place of those that measure."""
    _, rows, _ = split(len(trial.unseen.labels), seed_of(trial.seed, "tuning", trial.holdout))
    sites = [replace(site, test=site.validation) for site in trial.sites]
    return replace(trial, sites=sites, unseen=trial.unseen.rows(rows))


def learnt(trial: Trial, start: Learner, sums: State, how: How, epsilon: float) -> Learner:
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


def cell(trials: Iterable[Trial], gains: Iterable[Gain]) -> str:
    """Seen / unseen, and the lowest of the means of what is held out."""
    by_holdout: dict[str, list[Gain]] = {}
    for trial, gain in zip(trials, gains, strict=True):
        by_holdout.setdefault(trial.holdout, []).append(gain)
    means = [[mean(values) for values in zip(*found, strict=True)] for found in by_holdout.values()]
    seen, unseen = (mean(values) for values in zip(*means, strict=True))
    return f"{seen:+z.1f} / {unseen:+z.1f} ({min(lowest for _, lowest in means):+z.1f})"


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
                gains = []
                for trial, start, sums in made:
                    learner = learnt(trial, start, sums, How(place, len(trial.sites), 1), epsilon)
                    learner.steps = torch.tensor(steps, dtype=torch.float64)
                    gains.append(trial.gain(learner))
                line.append(cell(every, gains))
        rows.append(line)
    return table(["", *(f"{place}, ε {epsilon:g}" for place in ("central", "local") for epsilon in epsilons)], rows)


def kept_steps() -> str:
    """The steps of `gradient` in use."""
    kept = ", ".join(f"{name} {value:g}" for name, value in Steps()._asdict().items())
    return f"steps: {kept}; clip {steps_of.CLIP:g}"


def epsilons_of(text: str) -> list[float]:
    """The type of an option that is a list of ε."""
    return [float(one) for one in text.split(",")]


def main() -> str:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.private_images", description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="drawn")
    parser.add_argument("--holdouts", default="domains", choices=["domains", "classes"])
    parser.add_argument("--sites", type=at_least(1), default=10)
    parser.add_argument("--seeds", type=at_least(1), default=10)
    parser.add_argument("--epsilons", type=epsilons_of, default=[0.5, 1, 3, 8])
    given = parser.parse_args()
    features = opened(given.data)
    seeds = range(FIRST_CHOOSING, FIRST_CHOOSING + given.seeds)
    every = trials(features, holdouts_of(features, given.holdouts), given.sites, seeds)
    print(choose([validating(trial) for trial in every], given.epsilons))
    described = f"{given.data}, {given.sites} sites, {given.holdouts} held out, {given.seeds} seeds from {seeds[0]}"
    return f"\n{kept_steps()}\n{described}, δ {DELTA:g}"


if __name__ == "__main__":
    finish(main)
