"""Every domain held out in turn: zero-shot, the paper's recipe, the default recipe, and all features in one place.

    python benchmarks/holdouts.py [--data drawn] [--model bundled] [--seeds 3] [--first-seed 0] [--rounds 20]
        [--sites 10]

Prints a Markdown table of test accuracies in per cent, `seen site mean / unseen domain`, mean over the seeds. Each seed
is another split; for the drawn pictures it is another set of pictures too. The round is selected by validation.
"""

from __future__ import annotations

import argparse
import os
import platform
import time
from statistics import mean, stdev

import torch

from fedclip_flwr.config import Settings
from fedclip_flwr.errors import UserError
from fedclip_flwr.features import open_features
from fedclip_flwr.inprocess import Line, federate, make_sites, pooled

METHODS = ("zero-shot", "paper", "default", "centralised")
Lines = dict[str, list[Line]]


def lines_of(settings: Settings, holdout: str, sites: int) -> dict[str, Line]:
    """What each method comes to for one holdout and one seed."""
    features = open_features(settings)
    parts, unseen = make_sites(features, holdout, sites, settings.seed)

    def run(recipe: str, whole: bool = False) -> tuple[Line, Line]:
        result = federate(
            pooled(parts) if whole else parts,
            features.classes,
            unseen,
            recipe=recipe,
            rounds=settings.num_server_rounds,
            seed=settings.seed,
        )
        return result.zero_shot, result.selected

    zero_shot, default = run("default")
    return {
        "zero-shot": zero_shot,
        "paper": run("paper")[1],
        "default": default,
        "centralised": run("default", whole=True)[1],
    }


def cell(lines: list[Line]) -> str:
    """Mean over the seeds, `seen / unseen`, with the standard deviation where there is one."""
    return " / ".join(
        f"{100 * mean(values):.1f}" + (f" ± {100 * stdev(values):.1f}" if len(values) > 1 else "")
        for values in ([line.seen for line in lines], [line.unseen or 0.0 for line in lines])
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="drawn")
    parser.add_argument("--model", default="bundled")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--sites", type=int, default=10)
    given = parser.parse_args()
    torch.set_num_threads(1)  # the matrices are small: more threads only wait for each other
    start = time.perf_counter()
    table: dict[str, Lines] = {}
    for seed in range(given.first_seed, given.first_seed + given.seeds):
        data = f"drawn:{seed}" if given.data == "drawn" else given.data
        settings = Settings.from_run_config(
            {"data": data, "model": given.model, "seed": seed, "num-server-rounds": given.rounds}
        )
        for holdout in open_features(settings).domains:
            for method, line in lines_of(settings, holdout, given.sites).items():
                table.setdefault(holdout, {}).setdefault(method, []).append(line)

    whole = {method: [line for row in table.values() for line in row[method]] for method in METHODS}
    print(f"| held out | {' | '.join(METHODS)} |")
    print("| --- " * (len(METHODS) + 1) + "|")
    for holdout, row in table.items():
        print(f"| {holdout} | {' | '.join(cell(row[method]) for method in METHODS)} |")
    print(f"| **mean** | {' | '.join(cell(whole[method]) for method in METHODS)} |")

    def gain(method: str, of: str) -> float:
        pairs = zip(whole[method], whole["zero-shot"], strict=True)
        return 100 * mean((getattr(line, of) or 0.0) - (getattr(zero, of) or 0.0) for line, zero in pairs)

    print()
    for method in METHODS[1:]:
        print(f"{method}: {gain(method, 'seen'):+.1f} points seen, {gain(method, 'unseen'):+.1f} unseen over zero-shot")
    print(
        f"{given.data}, {given.sites} sites, {given.rounds} rounds, {given.seeds} seeds "
        f"from {given.first_seed}, attention adapter; "
        f"{time.perf_counter() - start:.0f} s on {os.cpu_count()} cores, {platform.machine()}"
    )


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        raise SystemExit(str(error)) from None
