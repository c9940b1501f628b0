"""The results of a sweep as a table, in Markdown and as CSV, with published figures."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Sequence
from statistics import mean, stdev
from typing import NamedTuple

from fedclip_flwr.base.text import bytes_of
from fedclip_flwr.experiments.baselines import Published, method_of
from fedclip_flwr.experiments.sweep import Found, Plan, Results
from fedclip_flwr.experiments.unseen import THIRDS

MEAN = "mean"
"""The column for the mean over all held-out domains."""


class Spread(NamedTuple):
    """Mean and standard deviation over the seeds, in per cent; the latter is None for a single seed."""

    mean: float
    deviation: float | None

    def text(self, form: str = ".1f") -> str:
        return f"{self.mean:{form}}" + ("" if self.deviation is None else f" ± {self.deviation:.1f}")


class Row(NamedTuple):
    """One method with one domain held out, or the mean over these. Gains are over zero-shot with the same seeds."""

    method: str
    held_out: str
    seeds: int
    rounds: int
    seen: Spread | None
    unseen: Spread | None
    every: Spread | None  # the mean over all domains
    gain_seen: Spread | None
    gain_unseen: Spread | None
    bytes: int | None


def by_key(results: Results) -> dict[tuple[str, int, str], Found]:
    """The results by method, seed and held-out domain."""
    return {(cell.method, cell.settings.seed, cell.settings.holdout): found for cell, found in results.items()}


def columns_of(plan: Plan) -> dict[str, list[str]]:
    """The held-out domains of each column; the last column is the mean over several."""
    columns = {holdout: [holdout] for holdout in plan.holdouts}
    return columns | ({MEAN: list(plan.holdouts)} if len(columns) > 1 else {})


def rows(plan: Plan, results: Results, domains: int) -> list[Row]:
    """Rows grouped by method: each held-out domain, then their mean. `domains` is the number of domains in the data."""
    found, columns = by_key(results), columns_of(plan)
    single = not any("+" in holdout or holdout in THIRDS for holdout in plan.holdouts)
    by_domain = single and plan.sites == domains - 1 and plan.settings.partition == "domain"  # all have equal weight
    made = []
    for method in plan.methods:
        own = {(seed, holdout): result for (name, seed, holdout), result in found.items() if name == method}
        seeds = sorted({seed for seed, _ in own})
        for name, holdouts in columns.items():
            pairs = [[(own[seed, h], found["zero-shot", seed, h]) for h in holdouts] for seed in seeds]
            made.append(
                Row(
                    method,
                    name,
                    len(seeds),
                    plan.rounds_of(method),
                    _spread(pairs, lambda one, _: one.seen),
                    _spread(pairs, lambda one, _: one.unseen),
                    _spread(pairs, lambda one, _: _every(one, domains)) if by_domain else None,
                    _spread(pairs, lambda one, zero: _less(one.seen, zero.seen)),
                    _spread(pairs, lambda one, zero: _less(one.unseen, zero.unseen)),
                    own[seeds[0], holdouts[0]].bytes,
                )
            )
    return made


def _spread(
    pairs: Sequence[Sequence[tuple[Found, Found]]], figure: Callable[[Found, Found], float | None]
) -> Spread | None:
    """The spread over the seeds of each seed's mean over the held-out domains."""
    by_seed = []
    for of_seed in pairs:
        known = [value for pair in of_seed if (value := figure(*pair)) is not None]
        if known:
            by_seed.append(100 * mean(known))
    if not by_seed:
        return None
    return Spread(mean(by_seed), stdev(by_seed) if len(by_seed) > 1 else None)


def _every(found: Found, domains: int) -> float | None:
    if found.seen is None or found.unseen is None:
        return None
    return (found.seen * (domains - 1) + found.unseen) / domains


def _less(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one - other


def markdown(made: Sequence[Row], published: Sequence[Published], full_model_bytes: int | None) -> str:
    """The table. `full_model_bytes` is the size of the whole model, there and back."""
    columns = list(dict.fromkeys(row.held_out for row in made))
    every = any(source.every for source in published)
    head = ["held out", *(column or "nothing" for column in columns), "gain", "a site and round", "times less"]
    table = [[*head, "rounds", "seeds"]]
    for method in dict.fromkeys(row.method for row in made):
        own = [row for row in made if row.method == method]
        last = own[-1]
        parts = [(row.seen, row.unseen, row.every if every else None) for row in own]
        gains = _cell((last.gain_seen, last.gain_unseen), "+.1f") if last.rounds else "–"
        sent = bytes_of(last.bytes) if last.bytes else "–"
        less = f"{full_model_bytes / last.bytes:,.0f}" if full_model_bytes and last.bytes else "–"
        numbers = (str(last.rounds or "–"), str(last.seeds))
        table.append([method_of(method).label, *map(_cell, parts), gains, sent, less, *numbers])
    for source in published:
        figures, kind = {**source.by_domain, MEAN: source.mean}, "all" if source.every else "unseen"
        cells = ["" if (value := figures.get(column)) is None else f"{kind} {value:.2f}" for column in columns]
        table.append([f"published: {source.label}", *cells, *[""] * 5])
    return markdown_of([table[0], ["---"] * len(table[0]), *table[1:]])


def markdown_of(lines: Iterable[Iterable[str]]) -> str:
    return "".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |\n" for line in lines)


def _cell(spreads: Sequence[Spread | None], form: str = ".1f") -> str:
    """Seen, unseen and all; the latter two only if they exist."""
    seen, *others = spreads
    return " / ".join(["–" if seen is None else seen.text(form), *(other.text(form) for other in others if other)])


def as_csv(made: Sequence[Row], published: Sequence[Published]) -> str:
    """A line for each method and held-out domain, accuracies in per cent."""
    spreads = ("seen", "unseen", "every", "gain_seen", "gain_unseen")
    plain = ("method", "held_out", "seeds", "rounds", "bytes")
    lines = [[*plain, *(f"{name}{part}" for name in spreads for part in ("", "_deviation")), "source"]]
    for row in made:
        figures = (part for name in spreads for part in (getattr(row, name) or (None, None)))
        lines.append([*(getattr(row, name) for name in plain), *map(_number, figures), "measured"])
    for source in published:
        for column, value in {**source.by_domain, MEAN: source.mean}.items():
            if value is not None:
                place = "every" if source.every else "unseen"
                figures = (part for name in spreads for part in (value if name == place else None, None))
                lines.append(["published", column, "", "", "", *map(_number, figures), source.label])
    return csv_of(lines)


def csv_of(lines: Iterable[Iterable[object]]) -> str:
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerows(lines)
    return file.getvalue()


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"
