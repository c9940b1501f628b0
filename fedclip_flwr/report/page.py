"""The page of one run: the values that its template shows."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any, NamedTuple

from fedclip_flwr.base import Settings
from fedclip_flwr.base.text import counted, percent
from fedclip_flwr.report import heldout_plots, sums
from fedclip_flwr.report.output import Figures
from fedclip_flwr.report.rendering import gain, render, setting
from fedclip_flwr.report.story import Story
from fedclip_flwr.runs.console import NOT_THE_PAPERS, against, left_out

MEASURES = "accuracy", "balanced_accuracy", "macro_f1", "calibration_error"


class Tile(NamedTuple):
    """A key figure."""

    name: str
    figure: str
    unit: str = ""
    below: str = ""
    role: str = "ink"


def of_run(story: Story, figures: Figures, found: dict[str, Any] | None, problem: str) -> str:
    """The page; `found` is the analysis of held-out images, `problem` says why it is missing or not new."""
    facts, default, changed = story.run.settings, Settings().as_run_config(), story.run.changed
    versions, plugins = facts.get("versions"), facts.get("plugins")
    found = found if found and found["images"] else None
    return render(
        "run.html",
        story=story,
        figures=figures,
        not_the_papers=NOT_THE_PAPERS,
        tiles=tiles(story),
        sites=by_site(story),
        sums=sums.of_run(story),
        metrics=metrics(story),
        found=found,
        problem=problem,
        recalls=recalls(found) if found else [],
        strongest=strongest(found) if found else [],
        failures=failures(story),
        changed=[(key, setting(value) or "–", setting(default[key]) or "–") for key, value in changed.items()],
        settings=[(key, setting(facts[key]) or "–") for key in default],
        versions=[
            ("package hash", facts.get("package", "–")),
            *(("plug-in", one) for one in (plugins if isinstance(plugins, list) else ())),
            *(versions.items() if isinstance(versions, dict) else ()),
        ],
        next_steps=next_steps(story),
    )


def tiles(story: Story) -> list[Tile]:
    """The key figures."""
    made = []
    for key, what in (("seen", "seen: the sites’ own images"), ("unseen", f"unseen: {story.holdout or 'held out'}")):
        zero, adapted = story.zero[key], story.adapted[key]
        if adapted is not None:
            below = f"{gain(zero, adapted)} over {story.run.start} {percent(zero)}"
            made.append(Tile(what, percent(adapted), "%", below, key))
    if story.run.bytes_per_site_round is not None:
        below = f"{story.times_less:,.0f} times less than FedAVG" if story.times_less else "there and back"
        figure, unit = story.cost.split(" ")
        made.append(Tile("bytes a site and round", figure, unit, below))
    if story.lines:
        seconds = story.seconds["total"]
        long = seconds >= 120
        figure = f"{seconds / 60:.1f}" if long else f"{seconds:.3g}" if seconds < 10 else f"{seconds:.0f}"
        below = f"{counted(story.run.done, 'round')}, {counted(story.sites, 'site')}"
        made.append(Tile("time", figure, "min" if long else "s", below))
    if story.run.epsilon is not None:
        hidden = story.settings.dp == "local" or story.settings.shares_noise
        below = f"at δ = {story.settings.delta:g}, {against(hidden)}"
        made.append(
            Tile(
                f"privacy of {'an image' if story.run.unit == 'image' else 'a site'}: ε",
                f"{story.run.epsilon:.2f}",
                below=below,
            )
        )
    return made


def by_site(story: Story) -> list[list[str]]:
    """The figures in the plot of the sites: zero-shot, adapted, gain, and own if any site has one."""
    apart, own = story.adapted["holdout_sites"], story.personal
    zero = {**story.zero["sites"], **story.zero["holdout_sites"]}
    rows = []
    for site, adapted in sorted({**story.adapted["sites"], **apart}.items()):
        name, before = f"{site}, unseen" if site in apart else site, zero.get(site)
        row = [name, percent(before), percent(adapted), gain(before, adapted), percent(own.get(site))]
        rows.append(row if own else row[:-1])
    return rows


def metrics(story: Story) -> list[list[str]]:
    """All metrics: those of zero-shot, adapted and own."""
    rows: list[tuple[str, Mapping[str, Any] | None]] = []
    for key in ("seen", "unseen"):
        zero, adapted = (results["metrics"].get(key) for results in (story.zero, story.adapted))
        if adapted:
            rows += [(f"{key}, zero‑shot", zero), (f"{key}, adapted", adapted)]
            rows += [("seen, own", story.own)] if story.own and key == "seen" else []
    return [[name, *(percent((figures or {}).get(key)) for key in MEASURES)] for name, figures in rows]


def failures(story: Story) -> list[str]:
    """The sites that were left out, and those whose updates were too long."""
    longer = "its updates were longer than those of the others, and were scaled down"
    scaled = story.run.summary.get("scaled", {})
    return [
        *(line.removeprefix("Left out: ") for line in left_out(story.run.failures)),
        *(f"{site}: {longer}, in {counted(rounds, 'round')}" for site, rounds in scaled.items()),
    ]


def next_steps(story: Story) -> list[tuple[str, str]]:
    """Commands for the next steps."""
    run, path = story.run, str(story.run.path)
    given = [f"{key}={setting(value)}" for key, value in sorted(run.changed.items())]
    nodes = ["--nodes", str(story.sites)] if story.sites and story.settings.data != "none" else []
    again = ("Repeat this run", ["run", *nodes, *given])
    if story.settings.update:
        again = ("Make the next version", ["update", run.name, *run.to_resume[1:]])
    steps = [again, ("Make this report again", ["report", path])]
    if run.completed:
        steps.insert(0, ("Predict your own images", ["predict", "IMAGES", "--adapter", path]))
    elif run.status != "running" and run.done:
        steps.insert(0, ("Resume after the last complete round", ["run", *run.to_resume]))
    return [(name, shlex.join(["fedclip", *words])) for name, words in steps]


def recalls(found: dict[str, Any]) -> list[tuple[str, ...]]:
    """The recall of each class: zero-shot, adapted, and the gain."""
    before, after = (heldout_plots.recalls(found, who) for who in heldout_plots.WHO)
    return [
        (found["class_names"][c], percent(before[c]), percent(after[c]), f"{100 * (after[c] - before[c]):+.1f}")
        for c in sorted(after)
    ]


def strongest(found: dict[str, Any]) -> list[list[str]]:
    """For each class the dimensions that are weighted most and least, if there are any."""
    if not heldout_plots.greatest(found):
        return []
    rows, weights = [], found["weights"]
    for number, *both in zip(weights["classes"], weights["rising"], weights["falling"], strict=True):
        row = [found["class_names"][number]]
        for dimensions in both:
            names = ", ".join(str(dimension) for dimension, _ in dimensions)
            row += [names, f"{dimensions[0][1]:+.2f}".replace("-", "−")]
        rows.append(row)
    return rows
