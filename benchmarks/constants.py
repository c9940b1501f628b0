"""The constants of `one-round`, around those in use: gains on validation images, with classes treated as unseen.

    python -m benchmarks.constants [--data drawn:1 drawn:2 features:PATH] [--statistics span] [--seeds 3]

Of ten sites, the training images of a fifth, half and four fifths of the classes are left out in turn. Each row changes
one constant, and prints for each data set the gain over zero-shot on the sites' validation images, in points of
accuracy and less loss: of classes with images / of those left out. Test images are not looked at. Seeds begin at 101,
and the drawn pictures are not those of reported results.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from statistics import mean
from typing import NamedTuple

import torch

from benchmarks.common import at_least, finish, opened
from fedclip_flwr.base.settings import FORMS
from fedclip_flwr.experiments.simulate import make_sites
from fedclip_flwr.features import Features
from fedclip_flwr.learning import Classes, Examples, OneRound, evaluate
from fedclip_flwr.learning.metrics import Score
from fedclip_flwr.learning.one_round import Constants
from fedclip_flwr.learning.sums import sums_of
from harness.machine import table

FIRST_SEED = 101
LEFT_OUT = (0.2, 0.5, 0.8)
TRIED = {
    "shrinkage": (0.3, 0.7),
    "ridge": (1.0, 16.0),
    "images": (0.25, 4.0),
    "share": (0.5, 0.8),
    "share_among": (0.65, 0.9),
    "sharpness": (1.0, 2.0),
    "margin": (0.0, 0.1),
}


class Case(NamedTuple):
    """A closed form whose sums lack some classes, and validation images of the others and of these."""

    learner: OneRound
    classes: Classes
    seen: Examples
    left_out: Examples

    def gains(self) -> list[float]:
        """Accuracy in points and loss gained, seen; then left out."""
        found = []
        for examples in (self.seen, self.left_out):
            zero, ours = (evaluate(learner, examples, self.classes) for learner in (None, self.learner))
            found += [100 * (part(ours, "correct") - part(zero, "correct")), part(zero, "loss") - part(ours, "loss")]
        return found


def part(score: Score, of: str) -> float:
    return float(getattr(score, of)) / score.examples


def cases(features: Features, statistics: str, seeds: int) -> Iterator[Case]:
    classes = features.classes.ready()
    for seed in range(FIRST_SEED, FIRST_SEED + seeds):
        sites, _ = make_sites(features, "", 10, seed)
        train, validation = (
            Examples(*(torch.cat(parts) for parts in zip(*of, strict=True)))
            for of in ([site.train for site in sites], [site.validation for site in sites])
        )
        order = torch.randperm(len(classes.text), generator=torch.Generator().manual_seed(seed))
        for share in LEFT_OUT:
            out = order[: max(1, round(share * len(order)))]
            learner = OneRound.new(statistics, classes.text)
            kept, apart = (~torch.isin(of.labels, out) for of in (train, validation))
            sums = sums_of(train.rows(kept), learner.basis, len(classes.text))
            learner.load_state_dict({**learner.state_dict(), **sums})
            yield Case(learner, classes, validation.rows(apart), validation.rows(~apart))


def main() -> str:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.constants", description=__doc__.splitlines()[0])
    parser.add_argument("--data", nargs="+", default=["drawn:1", "drawn:2"])
    parser.add_argument("--statistics", default="span", choices=FORMS)
    parser.add_argument("--seeds", type=at_least(1), default=3)
    given = parser.parse_args()
    found = [list(cases(opened(data), given.statistics, given.seeds)) for data in given.data]
    rows = []
    for name, values in {"in use": (0.0,), **TRIED}.items():
        for value in values:
            constants = Constants() if name == "in use" else Constants()._replace(**{name: value})
            row = [name if name == "in use" else f"{name} {value:g}"]
            for of in found:
                gains = []
                for case in of:
                    case.learner.choose(constants)
                    gains.append(case.gains())
                seen, seen_loss, apart, apart_loss = (mean(each) for each in zip(*gains, strict=True))
                row.append(f"{seen:+.1f} / {apart:+.1f}, loss {seen_loss + apart_loss:.3f}")
            rows.append(row)
    print(table(["", *(data.partition(":")[0] + f" {n + 1}" for n, data in enumerate(given.data))], rows))
    print(f"\nin use: {', '.join(f'{name} {value:g}' for name, value in Constants()._asdict().items())}")
    return f"{given.statistics}, {given.seeds} seeds from {FIRST_SEED}"


if __name__ == "__main__":
    finish(main)
