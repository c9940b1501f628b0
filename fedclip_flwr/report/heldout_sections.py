"""The parts of the page on the server's held-out images."""

from __future__ import annotations

import re
from typing import Any

from fedclip_flwr.base.text import percent
from fedclip_flwr.report.heldout_plots import greatest, recalls
from fedclip_flwr.report.markup import Figures, aside, details, e, plots, section, table
from fedclip_flwr.report.story import Story

IMAGE = re.compile(r"data:image/jpeg;base64,[A-Za-z0-9+/=]+")
FEW, MANY = ("recall", "calibration"), (("pairs", "calibration"), "recall")
BESIDE = 12
"""Classes that fit beside a plot, at most."""
KINDS = {"mended": "Wrong zero-shot, right adapted", "spoilt": "Right zero-shot, wrong adapted"}


def of(story: Story, figures: Figures, found: dict[str, Any] | None, problem: str) -> list[str]:
    """All these parts, or a line on why there are none."""
    if not found or not found["images"]:
        return [section("held-out", "Held-out images", aside(f"There are no results by class: {problem}."))]
    names = found["class_names"]
    confusion = [name for name in figures if name.startswith("confusion-")]
    lead = f"{found['images']:,} images of {found['domain']}, which no site has, in {len(names)} classes."
    lead = f"{lead} {problem}." if problem else lead
    return [
        section(
            "held-out",
            f"Held-out images: {found['domain']}",
            plots(figures, *confusion, *(MANY if "pairs" in figures else FEW)),
            details("Recall of each class", _recalls(found)),
            lead=e(lead),
        ),
        _weights(story, figures, found),
        _gallery(found),
    ]


def _recalls(found: dict[str, Any]) -> str:
    before, after = (recalls(found, who) for who in ("zero_shot", "adapted"))
    rows = [
        (found["class_names"][c], percent(before[c]), percent(after[c]), f"{100 * (after[c] - before[c]):+.1f}")
        for c in sorted(after)
    ]
    return table(["class", "zero-shot, %", "adapted, %", "gain"], rows)


def _weights(story: Story, figures: Figures, found: dict[str, Any]) -> str:
    """How the adapter weights the dimensions of features."""
    weights = found["weights"]
    if not weights:
        return ""
    if not greatest(found):
        return section(
            "weights",
            "What the adapter looks at",
            aside("The adapter weights all dimensions equally: it changes nothing."),
        )
    lead = (
        f"The adapter multiplies each of a feature’s {weights['of']} dimensions by its own weight. A cell shows by "
        "how many doublings a dimension is weighted more (blue) or less (orange) than the average dimension, as a "
        "mean over the images of a class, for the dimensions that change most. "
        f"{100 * weights['common']:.0f} % of the change is common to all classes."
    )
    if (blend := story.adapted.get("blend", 1.0)) != 1.0:
        lead += f" The blend takes {100 * blend:.0f} % of the adapted feature; the rest is the zero-shot feature."
    names, rows = found["class_names"], []
    for number, *strongest in zip(weights["classes"], weights["rising"], weights["falling"], strict=True):
        row = [names[number]]
        for of in strongest:
            row += [
                ", ".join(str(dimension) for dimension, _ in of),
                f"{of[0][1]:+.2f}".replace("-", "−"),
            ]
        rows.append(row)
    strongest_table = table(["class", "weighted more", "strongest", "weighted less", "strongest"], rows, words=5)
    heading = "The strongest dimensions of each class"
    if len(rows) > BESIDE:
        beside, below = "", details(heading, strongest_table)
    else:
        beside, below = f'<div class="beside"><h3>{heading}</h3>{strongest_table}</div>', ""
    return section("weights", "What the adapter looks at", plots(figures, "weights", more=beside), below, lead=e(lead))


def _gallery(found: dict[str, Any]) -> str:
    """Images whose prediction became right or wrong, with both predictions."""
    parts = []
    for kind, heading in KINDS.items():
        count, cards = found["changed"][kind], found[kind]
        if cards and any(card["image"] for card in cards):
            some = f", {len(cards)} of {count:,}" if count > len(cards) else f", {count:,}"
            body = "\n".join(_card(card, found["class_names"]) for card in cards)
            parts.append(f'<h3>{e(heading + some)}</h3>\n<div class="gallery">\n{body}\n</div>')
        elif cards:
            parts.append(
                aside(f"{heading}: {count:,}. There are no images to show, because the data has only their features.")
            )
        else:
            parts.append(aside(f"{heading}: none."))
    return section(
        "changed",
        "Images that changed",
        *parts,
        lead="Sorted by the change of the true class’s probability; each with its predictions and their probability.",
    )


def _card(card: dict[str, Any], names: list[str]) -> str:
    true, image = names[card["true"]], str(card["image"])
    picture = f'<img src="{image}" alt="{e(true)}" width="96" height="96">' if IMAGE.fullmatch(image) else ""
    said = ""
    for mark, (found, chance) in (("○", card["zero_shot"]), ("●", card["adapted"])):
        kind = "right" if found == card["true"] else "wrong"
        said += f'<span class="{kind}"><i>{mark}</i> {e(names[found])} {100 * chance:.0f} %</span>'
    return f'<div class="card">{picture}<div class="said"><b>{e(true)}</b>{said}</div></div>'
