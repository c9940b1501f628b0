"""What `one-round` teaches adapters that are trained: each lesson beside the adapter as it is, on validation images.

    python -m benchmarks.lessons [--data drawn] [--adapters gate,attention] [--sites 10] [--seeds 3]

Every domain is held out in turn, then every third of the classes. The sites' test images are thrown away. One half of
their validation images selects, the other half measures; of what is held out a validation split is looked at. Seeds
begin at 500: reported results use others. Prints gains over zero-shot in points of accuracy: seen sites / held-out
domains, and seen sites / held-out classes.

    by accuracy       as it is: the round is selected by the sites' gains in validation accuracy
    by loss           the round with the lowest validation loss, zero-shot among them
    the last          the last round
    one long round    one round of twenty epochs in place of twenty of one
    margin 0.1        as it is, and the classes with images get 0.1 spreads of zero-shot's logits less
    from one round    the adapter starts at the closed form, in place of zero-shot
    one round         the closed form itself
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from statistics import mean
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import at_least, finish, opened
from benchmarks.tuning import FIRST_SEED
from fedclip_flwr.base import Settings
from fedclip_flwr.base.seeds import seed_of
from fedclip_flwr.base.settings import ONE_ROUND
from fedclip_flwr.experiments.simulate import Accuracies, Result, make_sites, simulate
from fedclip_flwr.experiments.unseen import THIRDS
from fedclip_flwr.features import Features
from fedclip_flwr.learning import Classes, Examples, OneRound
from fedclip_flwr.learning.metrics import mean_accuracy, score_of
from fedclip_flwr.learning.recipes import blank_part
from fedclip_flwr.learning.training import logits_of, split
from fedclip_flwr.site import Site
from harness.machine import table

Gain = tuple[float, float]
EPOCHS = 20
MARGINS = (0.1, 0.3)


class Linear(Classes):
    """Classes with weights of any length, which stay as they are."""

    def ready(self, device: str | torch.device = "cpu") -> Classes:
        return self


def halves(site: Site) -> Site:
    """The site with one half of its validation images to select by, and the other in place of its test images."""
    return replace(
        site,
        validation=site.validation.rows(slice(0, None, 2)),
        test=site.validation.rows(slice(1, None, 2)),
    )


def trials(features: Features, holdout: str, many: int, seed: int, adapter: str) -> Iterator[tuple[str, Gain]]:
    """Each lesson's gain, seen and held out, in points."""
    found, unseen = make_sites(features, holdout, many, seed)
    sites = [halves(site) for site in found]
    _, rows, _ = split(len(unseen[holdout].labels), seed_of(seed, "tuning", holdout))
    apart = {holdout: unseen[holdout].rows(rows)}
    classes = features.classes.ready()
    zero = simulate(sites, classes, apart, Settings(method=ONE_ROUND)).zero_shot

    def gain(made: Accuracies) -> Gain:
        return tuple(100 * ((getattr(made, of) or 0.0) - (getattr(zero, of) or 0.0)) for of in ("seen", "unseen"))  # type: ignore[return-value]

    def run(of: Classes = classes, at: Sequence[Site] = sites, **given: Any) -> Result:
        return simulate(at, of, apart, Settings(adapter=adapter, seed=seed, **{"num_server_rounds": EPOCHS, **given}))

    plain = run()
    yield "by accuracy", gain(plain.selected)
    turned = run(at=[replace(site, validation=site.test, test=site.validation) for site in sites])
    losses = [mean(turned_loss(line, sites)) for line in turned.rounds]
    yield "by loss", gain(plain.rounds[losses.index(min(losses))])
    yield "the last", gain(plain.rounds[-1])
    yield "one long round", gain(run(num_server_rounds=1, local_epochs=EPOCHS).selected)
    settings = Settings(adapter=adapter, seed=seed)
    learner = blank_part(settings, *classes.text.shape)
    learner.load_state_dict(plain.state, assign=True)
    seen = torch.cat([site.train.labels for site in sites]).bincount(minlength=len(classes.text)) > 0
    for margin in MARGINS:

        def less(examples: Examples, margin: float = margin) -> Tensor:
            before = logits_of(None, examples, classes)
            spread = (before - before.mean(1, keepdim=True)).square().mean().sqrt()
            return logits_of(learner, examples, classes) - margin * spread * seen

        accuracies = [
            mean_accuracy(score_of(less(examples), examples.labels) for examples in of)
            for of in ([site.test for site in sites], apart.values())
        ]
        yield f"margin {margin:g}", gain(replace(plain.selected, seen=accuracies[0], unseen=accuracies[1]))
    closed = simulate(sites, classes, apart, Settings(method=ONE_ROUND))
    one = OneRound("span", *classes.text.shape)
    one.load_state_dict(closed.state)
    head = one.head(classes)
    start = Linear(head.weights.detach().float(), 1.0, head.bias.float())
    yield "from one round", gain(run(start).selected)
    yield "one round", gain(closed.selected)


def turned_loss(line: Accuracies, sites: Sequence[Site]) -> list[float]:
    """Each site's mean loss on the images that select."""
    scores = [line.tests[site.name] for site in sites]
    return [score.loss / score.examples for score in scores if score.examples]


def main() -> str:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.lessons", description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="drawn")
    parser.add_argument("--adapters", default="gate,attention")
    parser.add_argument("--sites", type=at_least(1), default=10)
    parser.add_argument("--seeds", type=at_least(1), default=3)
    given = parser.parse_args()
    features = opened(given.data)
    kinds = {"held-out domains": features.domains, "held-out classes": THIRDS}
    adapters = given.adapters.split(",")
    rows: dict[str, list[str]] = {}
    for adapter in adapters:
        for holdouts in kinds.values():
            gains: dict[str, list[Gain]] = {}
            for holdout in holdouts:
                for seed in range(FIRST_SEED, FIRST_SEED + given.seeds):
                    for lesson, made in trials(features, holdout, given.sites, seed, adapter):
                        gains.setdefault(lesson, []).append(made)
                print(f"{adapter}, {holdout} held out: done", file=sys.stderr, flush=True)
            for lesson, found in gains.items():
                seen, unseen = (mean(values) for values in zip(*found, strict=True))
                rows.setdefault(lesson, [lesson]).append(f"{seen:+.1f} / {unseen:+.1f}")
    print(table(["", *(f"{adapter}, {kind}" for adapter in adapters for kind in kinds)], list(rows.values())))
    described = f"{given.data}, {given.sites} sites, {EPOCHS} epochs, {given.seeds} seeds from {FIRST_SEED}"
    return f"\n{described}"


if __name__ == "__main__":
    finish(main)
