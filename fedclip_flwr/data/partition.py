"""Which simulated site holds which rows of the data."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedclip_flwr.base import UserError, content, files, store
from fedclip_flwr.base.seeds import seed_of
from fedclip_flwr.base.tensors import State
from fedclip_flwr.base.text import counted

Rows = NDArray[np.int64]


class Shard(NamedTuple):
    """The rows of each domain that one simulated site holds."""

    site: str
    rows: dict[str, Tensor]


def shard(
    number: int, labels: Mapping[str, Tensor], sites: int, seed: int, partition: str = "domain", alpha: float = 0.5
) -> Shard:
    """The rows of site `number` out of `sites`, given the labels in each domain."""
    if partition == "domain":
        return _of_domain(number, {domain: len(own) for domain, own in labels.items()}, sites, seed)
    domains = sorted(labels)
    joined = torch.cat([labels[domain] for domain in domains])
    rows = _divided(joined, partition, sites, seed, alpha)[number]
    starts = torch.tensor([0, *(len(labels[domain]) for domain in domains)]).cumsum(0)
    parts = {d: rows[(rows >= a) & (rows < b)] - a for d, a, b in zip(domains, starts, starts[1:], strict=False)}
    return Shard(f"site-{number}", parts)


def _of_domain(number: int, counts: Mapping[str, int], sites: int, seed: int) -> Shard:
    """Site i holds shard i // D of domain i % D (D domains, sorted): each domain shuffled by the seed, then cut."""
    domains = sorted(counts)
    domain, piece = domains[number % len(domains)], number // len(domains)
    pieces = (sites - number % len(domains) - 1) // len(domains) + 1
    order = _shuffled(counts[domain], seed_of(seed, "partition", domain))
    return Shard(f"{domain}-{piece}", {domain: order.tensor_split(pieces)[piece]})


@lru_cache(maxsize=16)
def _shuffled(count: int, seed: int) -> Tensor:
    """Shuffled rows, cached for all sites that a process simulates."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


def _divided(labels: Tensor, partition: str, sites: int, seed: int, alpha: float) -> tuple[Tensor, ...]:
    """The rows of each site. They are stored, for all processes and later runs."""
    how = (partition, str(sites), str(seed), str(alpha) * (partition == "dirichlet"))
    key = content.digest(*how, labels.numpy().tobytes())

    def make() -> tuple[State, dict[str, str]]:
        parts = _divide(labels, partition, sites, seed_of(seed, "partition"), alpha)
        return {"rows": torch.cat(parts), "sizes": torch.tensor([len(part) for part in parts])}, {}

    stored, _ = store.load_or_make(files.home() / "partitions" / f"{key}.safetensors", make)
    return torch.split(stored["rows"], stored["sizes"].tolist())


def _divide(labels: Tensor, partition: str, sites: int, seed: int, alpha: float) -> list[Tensor]:
    """The rows of each site, shuffled.

    They are, row by row, those of flwr-datasets 0.6, which divided the data of earlier runs. So the order of draws is
    fixed: one generator shuffles all rows; a second one, with the same seed, first decides what each site gets of each
    class, then shuffles one site after another.
    """
    if sites > len(labels):
        raise UserError(f"partition = {partition!r}: {sites} sites for {len(labels):,} images; use fewer sites")
    order = np.random.default_rng(seed).permutation(len(labels))
    if partition == "iid":
        return [torch.from_numpy(part) for part in np.array_split(order, sites)]
    shuffled = labels.numpy()[order]
    by_class = {int(label): order[shuffled == label] for label in np.unique(shuffled)}
    draws = np.random.default_rng(seed)
    cut = (
        _by_dirichlet(by_class, sites, alpha, draws)
        if partition == "dirichlet"
        else _by_classes(by_class, sites, draws)
    )
    parts = [np.concatenate(pieces) for pieces in zip(*cut, strict=True)]
    for part in parts:
        draws.shuffle(part)
    return [torch.from_numpy(part) for part in parts]


def _by_dirichlet(
    by_class: Mapping[int, Rows], sites: int, alpha: float, draws: np.random.Generator
) -> list[Sequence[Rows]]:
    """For each class its rows at each site: shares drawn from a Dirichlet distribution, cuts rounded down."""
    if not 0 < alpha < math.inf:
        raise UserError(f"partition = 'dirichlet': alpha = {alpha}; expected a number more than 0")
    found: list[Sequence[Rows]] = []
    for rows in by_class.values():
        shares = draws.dirichlet(np.full(sites, alpha))
        found.append(np.split(rows, (shares.cumsum() * len(rows)).astype(int)[:-1]))
    return found


def _by_classes(by_class: Mapping[int, Rows], sites: int, draws: np.random.Generator) -> list[Sequence[Rows]]:
    """For each class its rows at each site: cut evenly for the sites that hold it, none at the others.

    A site holds two classes, or more if needed for each class to have a site on average. The first one goes by the
    site's number, the others are drawn.
    """
    classes = len(by_class)
    each = min(classes, max(2, -(-classes // sites)))
    held: list[list[int]] = []
    for site in range(sites):
        own = [site % classes]
        while len(own) < each:
            if (drawn := int(draws.integers(classes))) not in own:
                own.append(drawn)
        held.append(own)
    found: list[Sequence[Rows]] = []
    for number, (label, rows) in enumerate(by_class.items()):
        holders = [site for site in range(sites) if number in held[site]]
        if len(holders) > len(rows):
            raise UserError(
                f"partition = 'classes': class number {label} goes to {len(holders)} sites, but has only "
                f"{counted(len(rows), 'image')}; use fewer sites, or another partition"
            )
        cut = dict(zip(holders, np.array_split(rows, max(1, len(holders))), strict=False))
        found.append([cut.get(site, rows[:0]) for site in range(sites)])
    return found
