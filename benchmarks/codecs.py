"""Whether a federation under a codec comes to the predictions that it comes to in float32.

    python -m benchmarks.codecs [--data features:PATH] [--sites 4] [--seeds 3]

For each adapter and held-out domain: the share of all images of the data, held-out ones included, for which the
selected round's adapter predicts the same class as that of the same federation in float32. To reach: 99.5 % of them.
"""

from __future__ import annotations

import argparse
from dataclasses import replace

import torch

from benchmarks.common import at_least
from fedclip_flwr.base import Settings
from fedclip_flwr.exchange.codecs import CODECS
from fedclip_flwr.experiments.simulate import make_sites, simulate
from fedclip_flwr.features import Features, open_features
from fedclip_flwr.learning import make_adapter
from fedclip_flwr.learning.adapters import ADAPTERS
from harness.machine import machine, table

GOAL = 0.995


def predictions(features: Features, settings: Settings, sites: int) -> torch.Tensor:
    """Of the federation's adapter, for all images."""
    classes = features.classes.ready()
    found, unseen = make_sites(features, settings.holdout, sites, settings.seed)
    adapter = make_adapter(settings.adapter, classes.dim)
    adapter.load_state_dict(simulate(found, classes, unseen, settings, test_every_round=False).state)
    images = torch.cat([features.examples(domain).ready().features for domain in features.domains])
    with torch.no_grad():
        return classes.logits(adapter(images)).argmax(dim=1)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.codecs", description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="drawn", help="drawn or features:PATH")
    parser.add_argument("--sites", type=at_least(1), default=4)
    parser.add_argument("--seeds", type=at_least(1), default=3)
    given = parser.parse_args()
    torch.set_num_threads(1)
    features = open_features(Settings(data=given.data))
    rows, least, images = [], 1.0, 0
    for kind in ADAPTERS:
        agreement: dict[str, list[float]] = {codec: [] for codec in CODECS}
        for holdout in features.domains:
            for seed in range(given.seeds):
                settings = Settings(adapter=kind, holdout=holdout, seed=seed)
                plain = predictions(features, settings, given.sites)
                images = len(plain)
                for codec, shares in agreement.items():
                    found = predictions(features, replace(settings, codec=codec), given.sites)
                    shares.append((found == plain).float().mean().item())
        for codec, shares in agreement.items():
            least = min(least, *shares)
            mean = sum(shares) / len(shares)
            rows.append([kind, codec, f"{100 * mean:.2f} %", f"{100 * min(shares):.2f} %"])
    print(table(["adapter", "codec", "same class as in float32", "least of all runs"], rows))
    described = f"{given.data.partition(':')[0]}, {images:,} images, each of {len(features.domains)} domains held out"
    print(f"\nTo reach: {100 * GOAL} %. Found: at least {100 * least:.2f} %.")
    print(f"\n{described}, {given.sites} sites, {given.seeds} seeds, 20 rounds; {machine()}")


if __name__ == "__main__":
    main()
