"""The part of a page on one round: what each site gave, and what is predicted of classes without images."""

from __future__ import annotations

from typing import NamedTuple

from fedclip_flwr.base import UserError
from fedclip_flwr.base.settings import ONE_ROUND
from fedclip_flwr.base.text import percent
from fedclip_flwr.learning import OneRound
from fedclip_flwr.report.story import Story
from fedclip_flwr.runs.saved import learnt_classes, load_adapter


class Sums(NamedTuple):
    """Rows of a table of the sites, and of one of the classes without images; the number of those with images."""

    sites: list[list[str]]
    predicted: list[list[str]]
    seen: int


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
    classes, examples = story.run.summary["classes"], story.run.summary["examples"]
    images = {site: int(examples[site][0]) for site in classes}
    total = sum(images.values())
    names = learnt_classes(facts)
    return Sums(
        [[site, f"{count:,}", percent(count / total), str(classes[site])] for site, count in images.items()],
        [
            [names[guess.number], names[guess.nearest], f"{guess.distance:.1f}"]
            for guess in sorted(learner.guesses(), key=lambda guess: guess.distance)
        ],
        int((learner.counts > 0).sum()),
    )
