"""Which training images an attacker finds, by method: the lower bound of `fedclip audit` beside the claimed ε.

    python -m benchmarks.audit_attack [--data features:PATH] [--sites 10] [--rounds 20] [--canaries 200]
        [--images 1000] [--seed 0]

Without noise: all images of the sites that have a partner of their class that was not trained on, and canary images.
With dp: canary sites, for five noise multipliers each, and where it hides images, `--images` canary images. Noise comes
from the operating system's entropy: another time these figures are others.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.common import at_least, finish, opened
from fedclip_flwr.base import Settings, UserError
from fedclip_flwr.base.settings import GRADIENT, ONE_ROUND
from fedclip_flwr.exchange import privacy
from fedclip_flwr.experiments.audit import attacked
from fedclip_flwr.experiments.canaries import found_images, found_sites, learnt
from fedclip_flwr.experiments.simulate import make_sites
from fedclip_flwr.features import Features
from fedclip_flwr.learning import Classes
from fedclip_flwr.learning.membership import Findings
from fedclip_flwr.site import Site
from harness.machine import table

METHODS: Mapping[str, dict[str, Any]] = {
    "one-round, span": {"method": ONE_ROUND},
    "one-round, full": {"method": ONE_ROUND, "statistics": "full"},
    "one-round, gradient": {"method": ONE_ROUND, "statistics": GRADIENT},
    "attention": {"adapter": "attention"},
    "gate": {"adapter": "gate"},
    "scale": {"adapter": "scale"},
}
MULTIPLIERS = {"central": (1.0, 2.0, 4.0, 8.0, 16.0), "local": (1.0, 2.0, 4.0, 8.0, 16.0)}
HIDING = {
    (GRADIENT, "central"): (0.5, 1.0, 2.0, 4.0, 8.0),
    (GRADIENT, "local"): (0.5, 1.0, 2.0, 4.0, 8.0),
    ("span", "central"): (0.5, 1.0, 2.0, 4.0, 8.0),
}
"""The ε that are claimed for an image, by statistics and by who adds the noise."""
CONFIDENCE = 0.95
HEAD = ["", "attacked", "bits", "AUC", "found at 1 % false", "ε at least", "ε claimed"]


def row(name: str, who: str, found: Findings, claimed: float | None) -> list[str]:
    cells = [name, who, f"{found.bits:,}", f"{found.auc:.2f} [{found.low:.2f}, {found.high:.2f}]"]
    last = "–" if claimed is None else f"{claimed:.2f}"
    return [*cells, f"{100 * found.found:.0f} %", f"{found.epsilon:.2f}", last]


def compare(features: Features, sites: Sequence[Site], settings: dict[str, Any], canaries: int, images: int) -> str:
    classes, rows = features.classes.ready(), []
    for name, given in METHODS.items():
        how = Settings(**settings, **given)
        pairs = attacked(learnt(sites, classes, how, None), None, sites, classes, how, CONFIDENCE)
        rows.append(row(name, "images", pairs, None))
        rows.append(row(name, "canary images", found_images(sites, classes, how, canaries, CONFIDENCE), None))
    for dp, multipliers in MULTIPLIERS.items():
        for multiplier in multipliers:
            how = Settings(**settings, adapter="gate", dp=dp, noise_multiplier=multiplier)
            claimed = privacy.spent(how, [how.rounds])
            found = found_sites(sites, classes, how, canaries, CONFIDENCE)
            rows.append(row(f"gate, dp={dp}, noise {multiplier:g}", "canary sites", found, claimed))
    for (statistics, dp), epsilons in HIDING.items():
        for epsilon in epsilons:
            given = {"method": ONE_ROUND, "statistics": statistics, "dp": dp, "dp_unit": "image", "epsilon": epsilon}
            rows.append(hidden(sites, classes, Settings(**settings, **given), images))
    return table(HEAD, rows)


def hidden(sites: Sequence[Site], classes: Classes, settings: Settings, images: int) -> list[str]:
    """The row of a run that hides images."""
    name = f"{settings.statistics}, dp={settings.dp}, ε = {settings.epsilon:g}"
    try:
        found = found_images(sites, classes, settings, images, CONFIDENCE)
    except UserError:  # too much noise for so few images
        return [name, "refused", *["–"] * 4, f"{settings.epsilon:.2f}"]
    return row(name, "canary images", found, settings.epsilon)


def main() -> str:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.audit_attack", description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="drawn")
    parser.add_argument("--sites", type=at_least(1), default=10)
    parser.add_argument("--rounds", type=at_least(1), default=20)
    parser.add_argument("--canaries", type=at_least(10), default=200)
    parser.add_argument("--images", type=at_least(10), default=1000)
    parser.add_argument("--seed", type=at_least(0), default=0)
    given = parser.parse_args()
    features = opened(given.data)
    sites, _ = make_sites(features, "", given.sites, given.seed)
    settings = {"num_server_rounds": given.rounds, "seed": given.seed}
    print(compare(features, sites, settings, given.canaries, given.images))
    described = f"{given.sites} sites, {given.rounds} rounds, seed {given.seed}, {given.canaries} canaries"
    return f"\n{described}, {given.images:,} where images are hidden"


if __name__ == "__main__":
    finish(main)
