"""The learning rates of the default recipe, or the server's own, chosen without a look at test images.

    python benchmarks/tuning.py [--data drawn] [--sites 1,10] [--seeds 5] [--rounds 20]
        [--rates attention=1e-4,2e-4 gate=1e-3 ...] [--lengths 1,10] [--strategy fedadam]

Every domain is held out in turn. The sites' test splits are thrown away; of the held-out domain only a validation
split is looked at, as large as one of a site. Prints for each rate the gain over zero-shot in points of accuracy,
`seen / unseen`, on these validation splits, mean over the seeds, of the round that the federation would select. Seeds
begin at 500: reported results use others. With a strategy in which the server makes steps of its own, the rates are
those of these steps. With `--lengths` the adapter's network sees features brought to each of these, 0: as they are.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from itertools import product
from statistics import mean
from typing import Any

from benchmarks.common import finish, opened
from fedclip_flwr.base import Settings
from fedclip_flwr.base.seeds import seed_of
from fedclip_flwr.experiments.simulate import make_sites, simulate
from fedclip_flwr.features import Features
from fedclip_flwr.learning import RECIPES
from fedclip_flwr.learning.training import split

FIRST_SEED = 500
RATES = {
    "attention": (5e-5, 7e-5, 1e-4, 1.4e-4, 2e-4),
    "gate": (7e-4, 1e-3, 1.4e-3, 2e-3, 2.8e-3),
    "scale": (2e-3, 3e-3, 4e-3, 6e-3, 8e-3),
}


def gains(features: Features, holdout: str, sites: int, settings: Settings) -> tuple[float, ...]:
    """On validation images, in points: of the seen sites and of the held-out domain."""
    parts, unseen = make_sites(features, holdout, sites, settings.seed)
    parts = [replace(site, test=site.validation) for site in parts]
    _, validation, _ = split(len(unseen[holdout].labels), seed_of(settings.seed, "tuning", holdout))
    apart = {holdout: unseen[holdout].rows(validation)}
    result = simulate(parts, features.classes, apart, settings, test_every_round=False)
    zero, found = result.zero_shot, result.selected
    return tuple(100 * ((getattr(found, of) or 0.0) - (getattr(zero, of) or 0.0)) for of in ("seen", "unseen"))


def main() -> str:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="drawn")
    parser.add_argument("--sites", default="1,10")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--rates", nargs="+", default=[f"{k}={','.join(map(str, v))}" for k, v in RATES.items()])
    parser.add_argument("--lengths", default=f"{RECIPES['default'].length:g}")
    parser.add_argument("--strategy", default="fedavg")
    given = parser.parse_args()
    features = opened(given.data)
    print(f"| sites | adapter | length | rate | {' | '.join(f'{d} held out' for d in features.domains)} | mean |")
    print("| --- " * (len(features.domains) + 5) + "|")
    for sites in map(int, given.sites.split(",")):
        for kind, rates in (text.split("=") for text in given.rates):
            for length, rate in product(given.lengths.split(","), rates.split(",")):
                RECIPES["trial"] = replace(RECIPES["default"], length=float(length))
                tried: dict[str, Any] = {"recipe": "trial", "strategy": given.strategy}
                if given.strategy == "fedavg":
                    RECIPES["trial"] = replace(RECIPES["trial"], adapter_rate=float(rate))
                else:
                    tried["server_learning_rate"] = float(rate)
                found = []
                for holdout in features.domains:
                    trials = []
                    for seed in range(FIRST_SEED, FIRST_SEED + given.seeds):
                        settings = Settings(adapter=kind, seed=seed, num_server_rounds=given.rounds, **tried)
                        trials.append(gains(features, holdout, sites, settings))
                    found.append(tuple(mean(values) for values in zip(*trials, strict=True)))
                found.append(tuple(mean(values) for values in zip(*found, strict=True)))
                cells = " | ".join(f"{seen:+.1f} / {unseen:+.1f}" for seen, unseen in found)
                print(f"| {sites} | {kind} | {length} | {rate} | {cells} |", flush=True)
    return f"\n{given.strategy}, {given.data}, {given.rounds} rounds, {given.seeds} seeds from {FIRST_SEED}"


if __name__ == "__main__":
    finish(main)
