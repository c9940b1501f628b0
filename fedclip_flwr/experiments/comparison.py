"""The command `fedclip sweep`: from its options, which are checked, to its tables."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fedclip_flwr.base import Settings, UserError, content, files, plugins
from fedclip_flwr.base.settings import LORA, STORED, unusable
from fedclip_flwr.base.text import counted
from fedclip_flwr.data import held_out
from fedclip_flwr.data.presets import PRESETS, fitting
from fedclip_flwr.experiments import printed, unseen
from fedclip_flwr.experiments.baselines import LORA_ONLY, METHODS, OWN, PUBLISHED, Published, method_of
from fedclip_flwr.experiments.sweep import Plan, sweep
from fedclip_flwr.experiments.tables import Row, as_csv, markdown, rows
from fedclip_flwr.features import Features, models, open_features
from fedclip_flwr.features.lora import check, check_installed
from fedclip_flwr.learning.adapters import adapter_class
from fedclip_flwr.runs import read_settings
from fedclip_flwr.runs.console import NOT_THE_PAPERS
from fedclip_flwr.runs.opening import open_run

OPTIONS = {"data": "data", "model": "model", "holdout": "holdouts", "seed": "seeds", "num-server-rounds": "rounds"}
"""Settings that a sweep takes as options."""
MEANINGLESS = frozenset(
    {"start", "min-sites", "round-timeout", "personalize", "name", "resume", "results-dir", "track"}
)
"""Settings of messages and run folders, which a sweep does not have."""


@dataclass(frozen=True)
class SweepOptions:
    """The command's options; comma lists for several values, empty or 0 for the default."""

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
    name: str
    against: str
    settings: Sequence[str]


def compare(options: SweepOptions) -> str:
    """Runs the sweep and returns its tables and summary; also writes them to a folder, with the data behind them."""
    begun = time.monotonic()
    plan, features = planned(options)
    folder = _folder(options, plan, features)
    jobs = options.jobs or (1 if models.pick_device(plan.settings.device).type == "cuda" else os.cpu_count() or 1)
    results, kept = sweep(plan, jobs)
    made = rows(plan, results, len(features.domains))
    published, remarks = _published(plan, features)
    facts = [plan.settings.data, features.model, *options.settings, counted(plan.sites, "site")]
    caption = f"{options.name}: " * bool(options.name) + f"{', '.join(facts)}, seeds from {plan.seeds[0]}"
    on = f"{counted(jobs, 'process')} on {counted(os.cpu_count() or 1, 'core')}, {platform.machine()}"
    took = f"{time.monotonic() - begun:.0f} s with {on}"
    took += f"; {kept} of {len(results)} results from earlier" if kept else ""
    compared, cells = printed.differences(plan, results), printed.accuracies(made, published)
    differing = printed.differences_table(compared, _against(options, plan))
    every = " / all domains" if any(source.every for source in published) else ""
    text = "\n".join(
        [
            markdown(made, published, 2 * 4 * features.parameters if features.parameters else None),
            *([differing, DIFFERING, ""] if differing else []),
            f"Test accuracy in %, seen / unseen{every}, {SPREAD}; gains over zero-shot.",
            *remarks,
            *_warnings(plan, features),
            f"{caption}; {took}",
        ]
    )
    texts = {
        "table.md": f"{text}\n",
        "table.csv": as_csv(made, published),
        "accuracy.md": f"{printed.as_markdown(cells)}\nTest accuracy in %, {SPREAD}.\n{caption}\n",
        "accuracy.tex": printed.as_latex(cells, caption),
        "results.csv": printed.by_site(plan, results, options.name),
        "differences.csv": printed.differences_csv(compared, options.name),
    }
    for file, body in texts.items():
        files.write_text(folder / file, body, "--out")
    return f"{text}\nWritten to {folder}: {', '.join([*texts, *_plots(made, folder)])}"


SPREAD = "mean ± standard deviation over the seeds"
DIFFERING = (
    "Differences, means over the held-out domains: mean over the seeds [95 % interval], p of a paired t-test. Seeds "
    "change splits and initial weights, not the images: this says nothing about other images."
)
FACTS = "sweep.json"
"""The file with the options that the results in a folder were made with."""


def _folder(options: SweepOptions, plan: Plan, features: Features) -> Path:
    """The folder for the results. No sweep replaces another, unless the user names its folder."""
    mark = content.digest(str(replace(options, jobs=0)), features.content)[:8]
    name = options.name or f"{plan.settings.data.rpartition('/')[2]}-{features.model.rpartition('/')[2]}-{mark}"
    folder = files.home() / "sweeps" / content.file_name(name)
    if options.out:
        folder = Path(options.out).expanduser().absolute()
    elif options.name and folder.exists():
        try:
            known = files.read_json(folder / FACTS)["mark"]
        except (OSError, ValueError, KeyError, TypeError):
            known = None
        if known != mark:
            raise UserError(f"--name {options.name}: another sweep has this name, in {folder}; give another one")
    files.make_folder(folder, "--out")  # before the work, not after it
    asked = {**dataclasses.asdict(options), "settings": list(options.settings), "mark": mark}
    files.write_text(folder / FACTS, json.dumps(asked, indent=2) + "\n", "--out")
    return folder


def _against(options: SweepOptions, plan: Plan) -> list[str]:
    """The methods that all are compared with: zero-shot, and the paper's unless the user names another."""
    other = options.against or ("paper" if "paper" in plan.methods and len(plan.methods) > 2 else "")
    return list(dict.fromkeys(name for name in ("zero-shot", other) if name))


def _published(plan: Plan, features: Features) -> tuple[list[Published], list[str]]:
    """Published results for this data and model, and a remark if there are only results for other models."""
    preset = fitting(features.domains, features.vocabulary.class_names)
    known = next((PUBLISHED[name] for name, of in PRESETS.items() if of is preset), [])
    model = features.model.rstrip("/").rpartition("/")[2]
    found = [source for source in known if source.model == model]
    if known and not found:
        others = ", ".join(sorted({source.model for source in known}))
        return [], [
            f"Published figures for this data are for {others}, and are shown only beside results of the same model."
        ]
    if set(plan.holdouts) != set(features.domains):  # then the column's mean covers other domains than theirs
        found = [replace(source, mean=None) for source in found if source.by_domain]
    return found, []


def _warnings(plan: Plan, features: Features) -> list[str]:
    paper = replace(plan.settings, **METHODS["paper"].settings)
    if "paper" in plan.methods and paper.sees_given_length and features.has_unit_length(features.domains):
        return [f"The row {METHODS['paper'].label} can't be the paper's result: {NOT_THE_PAPERS}."]
    return []


def _plots(made: Sequence[Row], folder: Path) -> list[str]:
    """Draws the gains of the mean over the held-out domains; returns the files' names."""
    from fedclip_flwr.report import drawing, output, sweep_plots  # they import matplotlib

    points = []
    for row in made:
        if row.held_out == made[-1].held_out and row.gain_seen:
            (seen, spread), (unseen, unseen_spread) = row.gain_seen, row.gain_unseen or (None, None)
            label = method_of(row.method).label
            points.append(sweep_plots.Point(label, seen, unseen, spread, unseen_spread, row.bytes))
    with drawing.styled():
        drawn = output.write_plots(sweep_plots.of_sweep(points), folder)
    return [f"{output.PLOTS}/{name}.{kind}" for name in drawn for kind in ("svg", "png")]


def planned(options: SweepOptions) -> tuple[Plan, Features]:
    """The plan and the features; raises one error with all problems."""
    rounds = f"num-server-rounds={max(options.rounds, 1)}"
    given, problems = read_settings([f"data={options.data}", f"model={options.model}", rounds])
    more, wrong = read_settings(options.settings)
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
        if getattr(options, name) < number:
            option = f"--{name.replace('_', '-')} {getattr(options, name)}"
            problems[option] = f"{option}: expected at least {number}"
    for key in more:
        if key in OPTIONS:
            problems[key] = f"{key}: a sweep takes it as --{OPTIONS[key]}"
        elif key in OWN:
            problems[key] = f"{key}: the methods differ in it; choose methods with --methods"
        elif key in MEANINGLESS:
            problems[key] = f"{key}: it has no effect in a sweep; leave it out"
    methods, unfit = _methods(options, more)
    problems |= unfit
    if methods and options.against and options.against not in methods:
        problems["against"] = f"--against {options.against}: expected one of the compared methods"
    if not re.fullmatch(Settings.keys()["name"].metadata["pattern"], options.name) or options.name == "results":
        problems["name"] = f"--name {options.name}: expected letters, digits, dots and dashes, and not results"
    seed, lora = options.first_seed + options.seeds - 1, _lora(methods, more, problems)
    shared = {key: value for key, value in more.items() if key not in (*LORA_ONLY, "lora-train", "start")}
    settings, features, _ = open_run({**given, **shared, "seed": max(seed, 0)}, problems)
    settings = replace(settings, **{key.replace("-", "_"): lora.as_run_config()[key] for key in LORA_ONLY})
    if any(method_of(name).lora for name in methods):
        checked = replace(settings, method=LORA)
        check(checked, open_features(checked))
    try:
        holdouts = unseen.named(_listed(options.holdouts), features.domains)
    except UserError as error:
        raise unusable([str(error).replace("holdout =", "--holdouts")]) from None
    if not holdouts:
        holdouts = list(features.domains) if len(features.domains) > 1 else [""]
    plan = Plan(
        settings,
        ["zero-shot", *(name for name in methods if name != "zero-shot")],
        holdouts,
        range(options.first_seed, options.first_seed + options.seeds),
        options.nodes or max(1, len(features.domains) - min(len(held_out(h, features.domains)) for h in holdouts)),
        options.full_model_rounds,
        options.full_model_seeds,
    )
    return plan, features


def _methods(options: SweepOptions, given: Mapping[str, object]) -> tuple[list[str], dict[str, str]]:
    """The methods to compare, in the order of the table, plug-in adapters last; and the problems."""
    unfit = {name: why for name in METHODS if (why := _unfit(name, options.data, given))}
    wanted = _listed(options.methods) or [name for name in METHODS if not (name in unfit or METHODS[name].lora)]
    problems = {name: f"--methods {name}: {unfit[name]}" for name in sorted({*wanted} & {*unfit})}
    plugin_names = [name for name in dict.fromkeys(wanted) if name not in METHODS]
    if unknown := sorted(name for name in plugin_names if plugins.reference_of("adapter", name) is None):
        expected = f"some of {', '.join(METHODS)}, or a plug-in adapter"
        problems["methods"] = f"--methods {', '.join(unknown)}: expected {expected}"
        return [], problems
    for name in plugin_names:
        try:
            adapter_class(name, chosen=True)
        except UserError as error:
            problems[name] = f"--methods {name}: {error}"
    return [*(name for name in METHODS if name in wanted), *plugin_names], problems


def _lora(methods: Sequence[str], given: Mapping[str, object], problems: dict[str, str]) -> Settings:
    """The given settings of LoRA; adds what is wrong with them to the `problems`."""
    own = {key: value for key, value in given.items() if key in LORA_ONLY}
    settings, found = Settings.read({**own, "method": LORA})
    if not any(method_of(name).lora for name in methods):
        found = {key: f"{key}: it is for LoRA; add lora or lora-both to --methods, or leave it out" for key in own}
    problems |= found
    return settings


def _unfit(name: str, data: str, given: Mapping[str, object]) -> str:
    """Why the method can't run on the data or with these settings; empty if it can."""
    if METHODS[name].lora:
        try:
            check_installed()
        except UserError as error:
            return str(error)
    if (METHODS[name].whole_model or METHODS[name].lora) and data.startswith(STORED):
        return f"needs images, and {data} has only their features"
    if "blend" in given and (METHODS[name].whole_model or "blend" in METHODS[name].settings):
        return "excludes the setting blend; leave one of them out"
    return ""


def _listed(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]
