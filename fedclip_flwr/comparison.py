"""A sweep from the user's wishes to its table, in Markdown and as CSV, with published figures beside."""

from __future__ import annotations

import csv
import io
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import NamedTuple

from fedclip_flwr import clip, content
from fedclip_flwr.baselines import METHODS, OWN, PUBLISHED, Published
from fedclip_flwr.config import unusable
from fedclip_flwr.console import bytes_of, counted
from fedclip_flwr.data import pick_holdout
from fedclip_flwr.data.presets import PRESETS, fitting
from fedclip_flwr.errors import UserError
from fedclip_flwr.features import Features, open_run
from fedclip_flwr.simulation import read_settings
from fedclip_flwr.sweep import Found, Plan, Results, sweep

MEAN = "mean"
"""Stands for all held-out domains."""
OPTIONS = {"data": "data", "model": "model", "holdout": "holdouts", "seed": "seeds", "num-server-rounds": "rounds"}
"""Settings that a sweep takes as options."""
MEANINGLESS = frozenset({"min-sites", "round-timeout", "personalize", "codec", "resume", "results-dir"})
"""Settings of messages and run folders, of which a sweep has none."""


@dataclass(frozen=True)
class Wishes:
    """What the user asks for; a comma list where there are several, and empty or 0 for the default."""

    data: str
    model: str
    methods: str
    holdouts: str
    nodes: int
    seeds: int
    first_seed: int
    rounds: int
    full_model_rounds: int
    full_model_seeds: int
    jobs: int
    out: str
    settings: Sequence[str]


def compare(wishes: Wishes) -> str:
    """Runs the sweep; its table and summary. The table is also written to a folder."""
    begun = time.monotonic()
    plan, features = planned(wishes)
    mark = content.digest(str(replace(wishes, jobs=0)), features.content)[:8]  # no sweep takes another's place
    name = content.file_name(f"{plan.settings.data.rpartition('/')[2]}-{features.model.rpartition('/')[2]}-{mark}")
    folder = Path(wishes.out).expanduser().absolute() if wishes.out else content.home() / "sweeps" / name
    content.make_folder(folder, "--out")  # before the work, not after it
    jobs = wishes.jobs or (1 if clip.pick_device(plan.settings.device).type == "cuda" else os.cpu_count() or 1)
    results, kept = sweep(plan, jobs)
    made = rows(plan, results, len(features.domains))
    preset = fitting(features.domains, features.vocabulary.class_names)
    published = next((PUBLISHED[name] for name, known in PRESETS.items() if known is preset), [])
    if set(plan.holdouts) != set(features.domains):  # then the column mean is of others than theirs
        published = [replace(source, mean=None) for source in published if source.by_domain]
    what = "seen / unseen" + (" / all domains" if any(source.every for source in published) else "")
    on = f"{counted(jobs, 'process')} on {counted(os.cpu_count() or 1, 'core')}, {platform.machine()}"
    facts = [plan.settings.data, features.model, *wishes.settings, counted(plan.sites, "site")]
    text = (
        f"{markdown(made, published, 2 * 4 * features.parameters if features.parameters else None)}\n"
        f"Test accuracy in %, {what}, mean ± standard deviation over the seeds; gains over zero-shot.\n"
        f"{', '.join(facts)}, seeds from {plan.seeds[0]}; {time.monotonic() - begun:.0f} s with {on}"
        + (f"; {kept} of {len(results)} results from earlier" if kept else "")
    )
    for file, whole in (("table.md", f"{text}\n"), ("table.csv", as_csv(made, published))):
        content.write_whole(folder / file, partial(_write, whole), "--out")
    return f"{text}\nTable: {folder / 'table.md'} and table.csv"


def _write(text: str, path: Path) -> None:
    path.write_text(text, encoding="utf-8")


def planned(wishes: Wishes) -> tuple[Plan, Features]:
    """The plan; everything that is wrong is told at once."""
    rounds = f"num-server-rounds={max(wishes.rounds, 1)}"
    given, problems = read_settings([f"data={wishes.data}", f"model={wishes.model}", rounds])
    more, wrong = read_settings(wishes.settings)
    problems |= wrong
    least = {
        "nodes": 0,
        "seeds": 1,
        "first_seed": 0,
        "rounds": 1,
        "full_model_rounds": 1,
        "full_model_seeds": 1,
        "jobs": 0,
    }
    for name, number in least.items():
        if getattr(wishes, name) < number:
            told = f"--{name.replace('_', '-')} {getattr(wishes, name)}"
            problems[told] = f"{told}: expected at least {number}"
    for key in more:
        if key in OPTIONS:
            problems[key] = f"{key}: a sweep takes it as --{OPTIONS[key]}"
        elif key in OWN:
            problems[key] = f"{key}: methods differ in it; choose some with --methods"
        elif key in MEANINGLESS:
            problems[key] = f"{key}: it means nothing in a sweep; leave it out"
    unfit = {name: why for name in METHODS if (why := _unfit(name, wishes.data, more))}
    methods = _listed(wishes.methods) or [name for name in METHODS if name not in unfit]
    if unknown := sorted({*methods} - {*METHODS}):
        problems["methods"] = f"--methods {', '.join(unknown)}: expected some of {', '.join(METHODS)}"
    for name in sorted({*methods} & {*unfit}):
        problems[name] = f"--methods {name}: {unfit[name]}"
    seed = wishes.first_seed + wishes.seeds - 1
    settings, features, _ = open_run({**given, **more, "seed": max(seed, 0)}, problems)
    try:
        holdouts = [pick_holdout(name, features.domains) or "" for name in _listed(wishes.holdouts)]
    except UserError as error:
        raise unusable([str(error).replace("holdout =", "--holdouts")]) from None
    if not holdouts:
        holdouts = list(features.domains) if len(features.domains) > 1 else [""]
    plan = Plan(
        settings,
        ["zero-shot", *(name for name in METHODS if name in methods and name != "zero-shot")],
        list(dict.fromkeys(holdouts)),
        range(wishes.first_seed, wishes.first_seed + wishes.seeds),
        wishes.nodes or max(1, len(features.domains) - (holdouts != [""])),
        wishes.full_model_rounds,
        wishes.full_model_seeds,
    )
    return plan, features


def _unfit(name: str, data: str, given: Mapping[str, object]) -> str:
    """Why the method can't be tried on the data or with these settings; empty if it can."""
    if METHODS[name].whole_model and data.startswith("features:"):
        return f"needs images, and {data} has only their features"
    if "blend" in given and (METHODS[name].whole_model or "blend" in METHODS[name].settings):
        return "leaves no room for another blend; leave one of them out"
    return ""


def _listed(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


class Spread(NamedTuple):
    """Mean and standard deviation over the seeds, in per cent; the latter is None of a single seed."""

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


def rows(plan: Plan, results: Results, domains: int) -> list[Row]:
    """A method's rows together: each held-out domain, then their mean. The data has so many domains."""
    found = {(cell.method, cell.settings.seed, cell.settings.holdout): result for cell, result in results.items()}
    columns = {holdout: [holdout] for holdout in plan.holdouts}
    by_domain = plan.sites == domains - 1 and plan.settings.partition == "domain"  # each seen domain counts the same
    if len(columns) > 1:
        columns[MEAN] = list(plan.holdouts)
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
    """Over the seeds, of each seed's mean over the held-out domains."""
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


def markdown(made: Sequence[Row], published: Sequence[Published], whole: int | None) -> str:
    """The table. `whole` is how many bytes the whole model has, there and back."""
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
        less = f"{whole / last.bytes:,.0f}" if whole and last.bytes else "–"
        numbers = (str(last.rounds or "–"), str(last.seeds))
        table.append([METHODS[method].label, *map(_cell, parts), gains, sent, less, *numbers])
    for source in published:
        figures, kind = {**source.by_domain, MEAN: source.mean}, "all" if source.every else "unseen"
        cells = ["" if (value := figures.get(column)) is None else f"{kind} {value:.2f}" for column in columns]
        table.append([f"published: {source.label}", *cells, *[""] * 5])
    table.insert(1, ["---"] * len(table[0]))
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |" for cells in table) + "\n"


def _cell(spreads: Sequence[Spread | None], form: str = ".1f") -> str:
    """Seen, unseen and all; the latter two only where there are such."""
    seen, *others = spreads
    return " / ".join(["–" if seen is None else seen.text(form), *(other.text(form) for other in others if other)])


def as_csv(made: Sequence[Row], published: Sequence[Published]) -> str:
    """A line for each method and held-out domain, accuracies in per cent."""
    spreads = ("seen", "unseen", "every", "gain_seen", "gain_unseen")
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    plain = ("method", "held_out", "seeds", "rounds", "bytes")
    writer.writerow([*plain, *(f"{name}{part}" for name in spreads for part in ("", "_deviation")), "source"])
    for row in made:
        figures = (part for name in spreads for part in (getattr(row, name) or (None, None)))
        writer.writerow([*(getattr(row, name) for name in plain), *map(_number, figures), "measured"])
    for source in published:
        for column, value in {**source.by_domain, MEAN: source.mean}.items():
            if value is not None:
                place = "every" if source.every else "unseen"
                figures = (part for name in spreads for part in (value if name == place else None, None))
                writer.writerow(["published", column, "", "", "", *map(_number, figures), source.label])
    return file.getvalue()


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"
