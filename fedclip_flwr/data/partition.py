"""Which simulated site holds which rows of the data."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from fedclip_flwr.base import UserError, content, files, store
from fedclip_flwr.base.seeds import seed_of
from fedclip_flwr.base.tensors import State


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
    """The rows of each site. They are stored: later runs import neither `datasets` nor `flwr-datasets`."""
    how = (partition, str(sites), str(seed), str(alpha) * (partition == "dirichlet"))
    key = content.digest(*how, labels.numpy().tobytes())

    def make() -> tuple[State, dict[str, str]]:
        parts = _by_flower(labels, partition, sites, seed_of(seed, "partition"), alpha)
        return {"rows": torch.cat(parts), "sizes": torch.tensor([len(part) for part in parts])}, {}

    stored, _ = store.load_or_make(files.home() / "partitions" / f"{key}.safetensors", make)
    return torch.split(stored["rows"], stored["sizes"].tolist())


def _by_flower(labels: Tensor, partition: str, sites: int, seed: int, alpha: float) -> list[Tensor]:
    """The rows of each site. With `classes`, a site holds two, or more if needed for each to have a site on average."""
    from datasets import Dataset

    try:
        from flwr_datasets.partitioner import DirichletPartitioner, IidPartitioner, PathologicalPartitioner
    except ModuleNotFoundError:
        raise UserError(
            f"partition = {partition!r}: flwr-datasets is not installed here; install this package with its extra "
            "`simulation`, or use partition=domain"
        ) from None
    data = Dataset.from_dict({"label": labels.tolist(), "row": list(range(len(labels)))}).shuffle(seed=seed)
    classes = len(torch.unique(labels))
    partitioners = {
        "iid": lambda: IidPartitioner(sites),
        "dirichlet": lambda: DirichletPartitioner(sites, "label", alpha, min_partition_size=0, seed=seed),
        "classes": lambda: PathologicalPartitioner(
            sites, "label", min(classes, max(2, -(-classes // sites))), "first-deterministic", seed=seed
        ),
    }
    if sites > len(labels):
        raise UserError(f"partition = {partition!r}: {sites} sites for {len(labels):,} images; use fewer sites")
    partitioner = partitioners[partition]()
    partitioner.dataset = data
    try:
        with warnings.catch_warnings(action="ignore"):  # about classes that no site has: the plan shows them
            return [torch.tensor(partitioner.load_partition(i)["row"], dtype=torch.int64) for i in range(sites)]
    except ValueError as error:
        raise UserError(f"partition = {partition!r}: {' '.join(str(error).split())[:200]}") from None
