"""The part of a page on one round: what each site gave, and what is predicted of classes without images."""

from __future__ import annotations

from statistics import median
from typing import NamedTuple

from fedclip_flwr.base import UserError
from fedclip_flwr.base.settings import ONE_ROUND
from fedclip_flwr.base.text import percent
from fedclip_flwr.learning import OneRound
from fedclip_flwr.report.story import Story
from fedclip_flwr.runs.saved import learnt_classes, load_adapter


class Sums(NamedTuple):
    """Rows of a table of the sites, and of one of the classes without images.

    Of the classes with images their number, and the median of their distances to the nearest other one. `hidden`:
    secure aggregation has hidden what each site gave.
    """

    sites: list[list[str]]
    without: list[list[str]]
    seen: int
    usual: str
    hidden: bool


def of_run(story: Story) -> Sums | None:
    """None for other methods, and without a result."""
    if story.settings.method != ONE_ROUND or not story.run.completed:
        return None
    try:
        learner, facts = load_adapter(story.run.path)
    except UserError:
        return None
    if not isinstance(learner, OneRound):
        return None
    sites = story.run.summary.get("contributions", {})
    total = sum(images for images, _ in sites.values())
    names, seen = learnt_classes(facts), (learner.counts > 0).tolist()
    nearest = sorted(zip(learner.neighbours(), seen, names, strict=False), key=lambda each: each[0].distance)
    return Sums(
        [[site, f"{images:,}", percent(images / total), str(classes)] for site, (images, classes) in sites.items()],
        [[name, names[other.number], f"{other.distance:.1f}"] for other, has, name in nearest if not has],
        sum(seen),
        f"{median(other.distance for other, has, _ in nearest if has):.1f}" if nearest else "",
        story.settings.secure_aggregation,
    )
