"""Which simulated site holds which rows of the data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from fedclip_flwr.learning import seed_of


class Shard(NamedTuple):
    """What one simulated site holds: some rows of one domain."""

    site: str
    domain: str
    rows: Tensor


def by_domain(counts: Mapping[str, int], sites: int, seed: int) -> list[Shard]:
    """All sites' shards; with fewer sites than domains, the last domains are at no site."""
    return [shard(i, counts, sites, seed) for i in range(sites)]


def shard(number: int, counts: Mapping[str, int], sites: int, seed: int) -> Shard:
    """Site i holds shard i // D of domain i % D (D domains, sorted): each domain shuffled by the seed, then cut."""
    domains = sorted(counts)
    domain, piece = domains[number % len(domains)], number // len(domains)
    pieces = (sites - number % len(domains) - 1) // len(domains) + 1
    generator = torch.Generator().manual_seed(seed_of(seed, "partition", domain))
    order = torch.randperm(counts[domain], generator=generator)
    return Shard(f"{domain}-{piece}", domain, order.tensor_split(pieces)[piece])
