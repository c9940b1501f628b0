from __future__ import annotations

import pytest
import torch

from fedclip_flwr.data.partition import by_domain

COUNTS = {"photo": 10, "art": 7, "cartoon": 9}


@pytest.mark.parametrize("sites", [1, 2, 3, 10, 40])
def test_site_i_holds_shard_i_over_d_of_domain_i_mod_d(sites: int) -> None:
    shards = by_domain(COUNTS, sites, seed=0)
    domains = ["art", "cartoon", "photo"]
    assert [s.site for s in shards] == [f"{domains[i % 3]}-{i // 3}" for i in range(sites)]
    assert [s.domain for s in shards] == [domains[i % 3] for i in range(sites)]
    for domain in domains[:sites]:
        rows = torch.cat([s.rows for s in shards if s.domain == domain])
        assert sorted(rows.tolist()) == list(range(COUNTS[domain]))


def test_shards_are_of_even_size() -> None:
    sizes = [len(s.rows) for s in by_domain({"a": 10}, 3, seed=0)]
    assert sizes == [4, 3, 3]


def test_rows_are_shuffled_by_the_seed() -> None:
    def rows(seed: int) -> list[int]:
        return by_domain(COUNTS, 1, seed)[0].rows.tolist()

    assert rows(1) == rows(1)
    assert rows(1) != rows(2)
    assert rows(1) != sorted(rows(1))
