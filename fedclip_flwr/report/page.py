"""The page of one run: its parts in the order in which they are read."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from fedclip_flwr.base import Settings
from fedclip_flwr.base.text import counted, percent
from fedclip_flwr.report import heldout_sections
from fedclip_flwr.report.markup import (
    Figures,
    aside,
    details,
    e,
    gain,
    page,
    plots,
    section,
    setting,
    table,
    tile,
)
from fedclip_flwr.report.story import Story
from fedclip_flwr.runs.console import NOT_THE_PAPERS, left_out

MEASURES = {
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced accuracy",
    "macro_f1": "macro F1",
    "calibration_error": "calibration error",
}
OWN_FACTS = ("versions", "package", "run", "sites")
"""Keys of settings.json that are no settings."""


def of_run(story: Story, figures: Figures, found: dict[str, Any] | None, problem: str) -> str:
    """The page; `found` is the analysis of held-out images, `problem` says why it is missing or not new."""
    parts = [
        head(story),
        tiles(story),
        section("learning", "Accuracy", plots(figures, ("rounds", "spread"), "sites"), by_site(story)),
        section("figures", "All figures", figures_table(story)),
        *heldout_sections.of(story, figures, found, problem),
        cost(story, figures),
        failures(story),
        how(story),
    ]
    return page(f"{story.run.name} – fedclip report", parts)


def head(story: Story) -> str:
    """What was run, in a sentence; how it ended if it was not completed; what is missing or needs a warning."""
    status = f'<p class="status"><strong>{e(story.status)}</strong> {e(_as_far(story))}</p>' if story.status else ""
    status += f'<p class="status">{e(story.gap)}</p>' if story.gap else ""
    if story.run.summary.get("unknown_norm"):
        status += f'<p class="status">This is not the paper’s result: {e(NOT_THE_PAPERS)}.</p>'
    return (
        f'<header>\n<p class="eyebrow">fedclip report · {e(story.run.name)}</p>\n<h1>{e(story.title)}</h1>\n'
        f'<p class="sentence">{e(story.sentence)}</p>\n{status}\n</header>'
    )


def _as_far(story: Story) -> str:
    if not (story.lines or story.run.done):
        return "It completed no round."
    return f"This page shows what there is: {counted(story.run.done, 'round')} of {story.settings.num_server_rounds}."


def tiles(story: Story) -> str:
    """The key figures."""
    made = []
    for key, what in (("seen", "seen: the sites’ own images"), ("unseen", f"unseen: {story.holdout or 'held out'}")):
        zero, adapted = story.zero[key], story.adapted[key]
        if adapted is not None:
            below = f"{gain(zero, adapted)} over {story.run.start} {percent(zero)}"
            made.append(tile(what, percent(adapted), unit="%", below=below, role=key))
    if story.run.bytes_per_site_round is not None:
        below = f"{story.times_less:,.0f} times less than FedAVG" if story.times_less else "there and back"
        figure, unit = story.cost.split(" ")
        made.append(tile("bytes a site and round", figure, unit=unit, below=below))
    if story.lines:
        seconds = story.seconds["total"]
        figure, unit = (
            (f"{seconds:.3g}" if seconds < 10 else f"{seconds:.0f}", "s")
            if seconds < 120
            else (f"{seconds / 60:.1f}", "min")
        )
        made.append(
            tile("time", figure, unit=unit, below=f"{counted(story.run.done, 'round')}, {counted(story.sites, 'site')}")
        )
    if story.run.epsilon is not None:
        who = {"local": "against anyone, including the server", "central": "against anyone but the server"}
        below = f"at δ = {story.settings.delta:g}, {who.get(story.settings.dp, '')}"
        made.append(tile("privacy of a site: ε", f"{story.run.epsilon:.2f}", below=below))
    return f'<div class="tiles" style="--tiles: {len(made)}">\n{chr(10).join(made)}\n</div>' if made else ""


def by_site(story: Story) -> str:
    """A table of the figures in the plot of the sites."""
    apart, own = story.adapted["holdout_sites"], story.personal
    zero = {**story.zero["sites"], **story.zero["holdout_sites"]}
    rows = []
    for site, adapted in sorted({**story.adapted["sites"], **apart}.items()):
        name = f"{site}, unseen" if site in apart else site
        rows.append(
            [name, percent(zero.get(site)), percent(adapted), gain(zero.get(site), adapted), percent(own.get(site))]
        )
    head = ["site", "zero-shot, %", "adapted, %", "gain", "own, %"]
    if not own:
        head, rows = head[:-1], [row[:-1] for row in rows]
    return details(f"The figures of {counted(len(rows), 'site')}", table(head, rows)) if rows else ""


def figures_table(story: Story) -> str:
    """A table of all metrics."""
    own = (story.adapted.get("personal_metrics") or {}).get("seen")
    columns: list[tuple[str, Mapping[str, Any] | None]] = []
    for key in ("seen", "unseen"):
        zero, adapted = (results["metrics"].get(key) for results in (story.zero, story.adapted))
        if adapted:
            columns += [(f"{key}, zero‑shot", zero), (f"{key}, adapted", adapted)]
            columns += [("seen, own", own)] if own and key == "seen" else []
    if not columns:
        return ""
    rows = [[name, *(percent((figures or {}).get(key)) for key in MEASURES)] for name, figures in columns]
    note_own = " “Own”: adapters that the sites personalised from the adapted one." if own else ""
    note = f"In %. Seen: means over the sites’ test images.{note_own} For the calibration error, lower is better."
    return table(["", *MEASURES.values()], rows) + f'\n<p class="note">{e(note)}</p>'


def cost(story: Story, figures: Figures) -> str:
    """The bytes and the time that the run took."""
    lead = []
    if story.run.bytes_per_site_round is not None:
        lead.append(f"A site sends and receives {story.cost} in a round.")
        if story.times_less:
            lead.append(f"FedAVG of the whole model takes {story.times_less:,.0f} times as much.")
    return section("cost", "Bytes and time", plots(figures, "bytes", ("time", "pace")), lead=e(" ".join(lead)))


def failures(story: Story) -> str:
    """The sites that were left out, and those whose updates were too long."""
    failed = left_out(story.run.failures)
    scaled = [
        f"{site}: its updates were longer than those of the others, and were scaled down, in {counted(rounds, 'round')}"
        for site, rounds in story.run.summary.get("scaled", {}).items()
    ]
    items = "\n".join(f"<li>{e(line.removeprefix('Left out: '))}</li>" for line in [*failed, *scaled])
    return section("failures", "Left out", f'<ul class="failures">\n{items}\n</ul>' if items else "")


def how(story: Story) -> str:
    """The settings and versions of the run, and commands for the next steps."""
    facts, default = story.run.settings, Settings().as_run_config()
    settings = {key: value for key, value in facts.items() if key not in OWN_FACTS}
    rows = [(key, setting(value) or "–", setting(default[key]) or "–") for key, value in story.run.changed.items()]
    changed = (
        table(["setting", "value", "default"], rows, words=3) if rows else aside("All settings have their defaults.")
    )
    versions = facts.get("versions")
    made_with = [("package hash", facts.get("package", "–")), *(versions.items() if isinstance(versions, dict) else ())]
    return section(
        "how",
        "How it was run",
        changed,
        details(
            "All settings",
            table(["setting", "value"], [(key, setting(value) or "–") for key, value in settings.items()], words=2),
        ),
        details("Versions", table(["", ""], made_with, words=2)),
        next_steps(story),
    )


def next_steps(story: Story) -> str:
    """Commands for the next steps."""
    given = [f"{key}={setting(value)}" for key, value in sorted(story.run.changed.items())]
    nodes = ["--nodes", str(story.sites)] if story.sites and story.settings.data != "none" else []
    lines = [("Repeat this run", ["run", *nodes, *given]), ("Make this report again", ["report", str(story.run.path)])]
    if story.completed:
        predict = ["predict", "IMAGES", "--adapter", str(story.run.path)]
        lines.insert(0, ("Predict your own images", predict))
    if not story.completed and story.run.status != "running" and story.run.done:
        lines.insert(0, ("Resume after the last complete round", ["run", *story.run.to_resume]))
    items = "\n".join(
        f"<dt>{e(name)}</dt><dd><code>{e(shlex.join(['fedclip', *words]))}</code></dd>" for name, words in lines
    )
    return f'<h3>Next steps</h3>\n<dl class="commands">\n{items}\n</dl>'
