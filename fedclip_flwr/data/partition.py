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
    """Site i holds shard i // D of domain i % D (D domains, sorted): each domain shuffled by the seed, then cut.

    With fewer sites than domains, the last domains are at no site.
    """
    shards = []
    domains = sorted(counts)
    for i in range(sites):
        domain, number = domains[i % len(domains)], i // len(domains)
        pieces = (sites - i % len(domains) - 1) // len(domains) + 1
        generator = torch.Generator().manual_seed(seed_of(seed, "partition", domain))
        order = torch.randperm(counts[domain], generator=generator)
        shards.append(Shard(f"{domain}-{number}", domain, order.tensor_split(pieces)[number]))
    return shards
