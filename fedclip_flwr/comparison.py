"""A sweep from the user's wishes, checked, to its table."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from fedclip_flwr import clip, content
from fedclip_flwr.arguments import read_settings
from fedclip_flwr.baselines import METHODS, OWN, PUBLISHED
from fedclip_flwr.config import STORED, unusable
from fedclip_flwr.console import counted
from fedclip_flwr.data import pick_holdout
from fedclip_flwr.data.presets import PRESETS, fitting
from fedclip_flwr.errors import UserError
from fedclip_flwr.features import Features, open_run
from fedclip_flwr.sweep import Plan, sweep
from fedclip_flwr.tables import as_csv, markdown, rows

OPTIONS = {"data": "data", "model": "model", "holdout": "holdouts", "seed": "seeds", "num-server-rounds": "rounds"}
"""Settings that a sweep takes as options."""
MEANINGLESS = frozenset({"min-sites", "round-timeout", "personalize", "resume", "results-dir", "track"})
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
    if METHODS[name].whole_model and data.startswith(STORED):
        return f"needs images, and {data} has only their features"
    if "blend" in given and (METHODS[name].whole_model or "blend" in METHODS[name].settings):
        return "leaves no room for another blend; leave one of them out"
    return ""


def _listed(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]
