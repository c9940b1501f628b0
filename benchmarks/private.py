"""How accurate adapters are that do not tell who took part, and how much that costs each of them.

    python -m benchmarks.private [--data features:PATH] [--sites 100] [--rounds 20] [--seeds 3] [--plot FILE]

Runs with dp = central and dp = local, with more and more noise. Prints test accuracy in % of the adapter after the last
round (to select one by validation is not private), mean over the sites and the seeds with the standard deviation over
the seeds; ε is that at δ = 1e-5 after all rounds. Noise comes from the operating system's entropy: another time the
figures are others, by about that deviation.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from benchmarks.common import at_least, finish, opened
from fedclip_flwr.base import Settings
from fedclip_flwr.exchange import privacy
from fedclip_flwr.experiments.simulate import make_sites, simulate
from fedclip_flwr.features import Features
from fedclip_flwr.learning import make_adapter
from fedclip_flwr.learning.adapters import ADAPTERS
from harness.machine import table

MULTIPLIERS = {"central": (1.0, 2.0, 4.0, 8.0, 16.0, 32.0), "local": (0.5, 1.0, 2.0, 4.0, 8.0)}
Found = dict[tuple[str, float, str], tuple[float, float]]
"""Mean and deviation by kind, noise multiplier and adapter."""


def accuracies(features: Features, sites: int, rounds: int, seeds: int, **given: Any) -> list[tuple[float, float]]:
    """Zero-shot's and the last adapter's, in %, for each seed."""
    found = []
    for seed in range(seeds):
        parts, _ = make_sites(features, "", sites, seed)
        settings = Settings(num_server_rounds=rounds, seed=seed, **given)
        lines = simulate(parts, features.classes, None, settings).rounds
        found.append((100 * (lines[0].seen or 0), 100 * (lines[-1].seen or 0)))
    return found


def spread(values: Sequence[float]) -> tuple[float, float]:
    return mean(values), stdev(values) if len(values) > 1 else 0.0


def compare(features: Features, sites: int, rounds: int, seeds: int) -> tuple[str, Found, dict[str, float]]:
    """The table; what is in it; by adapter, the accuracy without noise (and that of zero-shot)."""
    found: Found = {}
    plain: dict[str, float] = {}
    size = {kind: sum(t.numel() for t in make_adapter(kind, features.classes.dim).parameters()) for kind in ADAPTERS}
    rows = []
    for kind in ADAPTERS:
        zero, adapted = zip(*accuracies(features, sites, rounds, seeds, adapter=kind), strict=True)
        plain |= {"zero-shot": mean(zero), kind: mean(adapted)}
    rows.append(["off", "–", "–", *(f"{plain[kind]:.1f}" for kind in ADAPTERS)])
    for dp, multipliers in MULTIPLIERS.items():
        for multiplier in multipliers:
            how: dict[str, Any] = {"dp": dp, "noise_multiplier": multiplier}
            epsilon = privacy.spent(Settings(**how), [rounds])
            cells = []
            for kind in ADAPTERS:
                tries = accuracies(features, sites, rounds, seeds, adapter=kind, **how)
                found[dp, multiplier, kind] = middle, off = spread([adapted for _, adapted in tries])
                cells.append(f"{middle:.1f} ± {off:.1f}")
            rows.append([dp, f"{multiplier:g}", f"{epsilon:.1f}", *cells])
            print(" ".join(f"{cell:>14}" for cell in rows[-1]), flush=True)
    gains = table(["dp", "noise-multiplier", "ε", *(f"{kind}, {size[kind]:,}" for kind in ADAPTERS)], rows)
    return f"{gains}\n\nZero-shot: {plain['zero-shot']:.1f}.", found, plain


def plot(found: Found, plain: Mapping[str, float], rounds: int, path: Path) -> None:
    """Accuracy over ε, a line for each adapter; `central` left, `local` right."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    for axis, (dp, multipliers) in zip(axes, MULTIPLIERS.items(), strict=True):
        x = [privacy.spent(Settings(dp=dp, noise_multiplier=multiplier), [rounds]) for multiplier in multipliers]
        for kind, color in zip(ADAPTERS, ("#c44e52", "#4c72b0", "#55a868"), strict=True):
            y, off = zip(*(found[dp, multiplier, kind] for multiplier in multipliers), strict=True)
            axis.errorbar(x, y, off, color=color, marker="o", capsize=3, label=kind)
            axis.axhline(plain[kind], color=color, linestyle=":", linewidth=1)
        axis.axhline(plain["zero-shot"], color="grey", linestyle="--", linewidth=1, label="zero-shot")
        axis.set(xscale="log", xlabel="ε, less is more private", title=f"dp = {dp}")
    axes[0].set_ylabel("test accuracy, %")
    axes[0].legend()
    figure.supxlabel("dotted: the same adapter without noise", fontsize="small")
    figure.savefig(path, dpi=110)


def main() -> str:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.private", description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="drawn")
    parser.add_argument("--sites", type=at_least(1), default=100)
    parser.add_argument("--rounds", type=at_least(1), default=20)
    parser.add_argument("--seeds", type=at_least(1), default=3)
    parser.add_argument("--plot", type=Path, help="a PNG or SVG file")
    given = parser.parse_args()
    features = opened(given.data)
    tables, found, plain = compare(features, given.sites, given.rounds, given.seeds)
    if given.plot:
        plot(found, plain, given.rounds, given.plot)
    print(f"\n{tables}\n")
    return f"{given.sites} sites, {given.rounds} rounds, {given.seeds} seeds from 0, clipping-norm 0.5"


if __name__ == "__main__":
    finish(main)
