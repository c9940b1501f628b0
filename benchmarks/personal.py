"""The seen sites' accuracy: zero-shot, with the run's adapter, and with the adapters that sites make for themselves.

    python benchmarks/personal.py [--method one-round] [--data drawn] [--model bundled] [--seeds 3] [--rounds 20]
        [--sites 10] [--alpha 0.5]

With `one-round` what a site makes for itself is its own class frequencies. Once for each way of dividing the data.
Prints a Markdown table of test accuracies in per cent, means over sites and seeds; the last domain is held out.
"""

from __future__ import annotations

import argparse
import copy
from statistics import mean

import torch

from benchmarks.common import finish
from fedclip_flwr.base import Settings
from fedclip_flwr.base.settings import ONE_ROUND
from fedclip_flwr.experiments.simulate import make_sites, simulate
from fedclip_flwr.features import open_features
from fedclip_flwr.learning import evaluate
from fedclip_flwr.learning.metrics import mean_accuracy
from fedclip_flwr.learning.recipes import new_part
from fedclip_flwr.site.work import learn_alone


def accuracies(settings: Settings, partition: str, sites: int) -> tuple[float, float, float]:
    """Zero-shot, adapted and own, means over the sites."""
    features = open_features(settings)
    parts, _ = make_sites(features, "auto", sites, settings.seed, partition=partition, alpha=settings.alpha)
    classes = features.classes.ready()
    result = simulate(parts, classes, None, settings)
    shared = new_part(settings, classes)
    shared.load_state_dict(result.state)
    scores = []
    for site in parts:
        own = copy.deepcopy(shared)
        learn_alone(own, site, classes, settings)
        scores.append(evaluate(own, site.test, classes))
    return result.zero_shot.seen or 0.0, result.selected.seen or 0.0, mean_accuracy(scores) or 0.0


def main() -> str:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--method", choices=("adapter", ONE_ROUND), default="adapter")
    parser.add_argument("--data", default="drawn")
    parser.add_argument("--model", default="bundled")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--sites", type=int, default=10)
    parser.add_argument("--alpha", type=float, default=0.5)
    given = parser.parse_args()
    torch.set_num_threads(1)  # the matrices are small: more threads only wait for each other
    print("| divided by | zero-shot | adapted | own |\n| --- | --- | --- | --- |")
    for partition in ("domain", "iid", "dirichlet", "classes"):
        runs = []
        for seed in range(given.seeds):
            settings = Settings.from_run_config(
                {
                    "data": f"drawn:{seed}" if given.data == "drawn" else given.data,
                    "model": given.model,
                    "seed": seed,
                    "method": given.method,
                    **({} if given.method == ONE_ROUND else {"num-server-rounds": given.rounds}),
                    "alpha": given.alpha,
                }
            )
            runs.append(accuracies(settings, partition, given.sites))
        cells = " | ".join(f"{100 * mean(values):.1f}" for values in zip(*runs, strict=True))
        print(f"| {partition} | {cells} |", flush=True)
    how = given.method if given.method == ONE_ROUND else f"{given.rounds} rounds"
    return f"\n{given.data}, {given.sites} sites, {how}, {given.seeds} seeds, alpha {given.alpha:g}"


if __name__ == "__main__":
    finish(main)
