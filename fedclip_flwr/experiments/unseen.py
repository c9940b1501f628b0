"""What no site trains on: domains, or classes.

sketch          a domain
art+sketch      several
classes:1/3     a third of the classes, drawn by the seed; their images are those of the sites
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import combinations

import torch

from fedclip_flwr.base.seeds import seed_of
from fedclip_flwr.data import pick_holdout
from fedclip_flwr.learning import Examples
from fedclip_flwr.site import Site
from fedclip_flwr.site.holdings import together

THIRDS = ("classes:1/3", "classes:2/3", "classes:3/3")


def named(names: Iterable[str], domains: tuple[str, ...]) -> list[str]:
    """What these names hold out; `pairs` is each two domains, `classes` each third of the classes."""
    groups = {"pairs": ["+".join(pair) for pair in combinations(domains, 2)], "classes": [*THIRDS]}
    each = [one for name in names for one in groups.get(name, [name])]
    return list(dict.fromkeys(one if one in THIRDS else pick_holdout(one, domains) or "" for one in each))


def third(holdout: str, classes: int, seed: int) -> list[int]:
    """The classes that are held out."""
    order = torch.randperm(classes, generator=torch.Generator().manual_seed(seed_of(seed, "classes")))
    return sorted(order[THIRDS.index(holdout) :: len(THIRDS)].tolist())


def without(sites: Sequence[Site], classes: Sequence[int]) -> tuple[list[Site], Examples]:
    """The sites without the images of these classes, and those images."""

    def part(examples: Examples, apart: bool) -> Examples:
        return examples.rows(torch.isin(examples.labels, torch.tensor(classes).to(examples.labels)) == apart)

    kept = [
        replace(
            site,
            train=part(site.train, apart=False),
            validation=part(site.validation, apart=False),
            test=part(site.test, apart=False),
        )
        for site in sites
    ]
    return kept, together(part(of, apart=True) for site in sites for of in (site.train, site.validation, site.test))
