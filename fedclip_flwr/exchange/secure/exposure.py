"""Whose sums several totals show together, which hide them one by one."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np

from fedclip_flwr.base import UserError

Part = tuple[str, str]
"""Of a total: a site, and the mark of the images to train with that its sums are of."""
TRAINING = 16
"""So many first characters of a site's mark are a mark of the images that it trains with."""
MOST_TRIED = 10_000
"""Sets of sites that are tried before a history counts as too long."""


def part_of(site: str, mark: str) -> Part:
    return site, mark[:TRAINING]


def exposed(totals: Sequence[Collection[Part]], least: int) -> list[str]:
    """Fewer than `least` sites that some sum of multiples of these totals is of alone; empty if there are none.

    Parts that are in the same totals have the same multiple, whatever the multiples of the totals are. All parts but
    those of some sites can vanish only if the columns of the others, which say in which totals they are, have a lower
    rank without these.
    """
    groups: dict[tuple[bool, ...], set[str]] = {}
    for part in sorted({part for total in totals for part in total}):
        groups.setdefault(tuple(part in total for total in totals), set()).add(part[0])
    rank, tried = _rank(groups), 0
    small = [sites for sites in groups.values() if len(sites) < least]
    sets: list[tuple[set[str], int]] = [(set(), 0)]
    while sets:
        before, first = sets.pop()
        for number in range(first, len(small)):
            sites = before | small[number]
            if len(sites) >= least:
                continue
            if (tried := tried + 1) > MOST_TRIED:
                raise UserError("there are too many versions to tell what their totals show together: start a new run")
            if _rank({column: of for column, of in groups.items() if not of <= sites}) < rank:
                return sorted(sites)
            sets.append((sites, number + 1))
    return []


def _rank(columns: Mapping[tuple[bool, ...], object]) -> int:
    return int(np.linalg.matrix_rank(np.array([*columns], dtype=float))) if columns else 0
