from __future__ import annotations

import hashlib
import json
from itertools import pairwise

import numpy as np
import pytest
import torch

from fedclip_flwr.base.errors import UserError
from fedclip_flwr.base.seeds import seed_of
from fedclip_flwr.data.partition import Shard, shard
from tests import forked

LABELS = {domain: torch.arange(count) % 3 for domain, count in {"photo": 10, "art": 7, "cartoon": 9}.items()}
MANY = {"art": torch.arange(200) % 10, "photo": torch.arange(300) % 10}


def shards(sites: int, seed: int = 0, **how: object) -> list[Shard]:
    labels = MANY if how else LABELS
    return [shard(i, labels, sites, seed, **how) for i in range(sites)]  # type: ignore[arg-type]


@pytest.mark.parametrize("sites", [1, 2, 3, 10, 40])
def test_site_i_holds_shard_i_over_d_of_domain_i_mod_d(sites: int) -> None:
    domains = ["art", "cartoon", "photo"]
    made = shards(sites)
    assert [s.site for s in made] == [f"{domains[i % 3]}-{i // 3}" for i in range(sites)]
    assert [list(s.rows) for s in made] == [[domains[i % 3]] for i in range(sites)]
    for domain in domains[:sites]:
        rows = torch.cat([s.rows[domain] for s in made if domain in s.rows])
        assert sorted(rows.tolist()) == list(range(len(LABELS[domain])))


def test_shards_are_of_even_size() -> None:
    assert [len(shard(i, {"a": torch.zeros(10)}, 3, 0).rows["a"]) for i in range(3)] == [4, 3, 3]


@pytest.mark.parametrize("partition", ["domain", "iid", "dirichlet", "classes"])
def test_rows_are_shuffled_by_the_seed(partition: str) -> None:
    def rows(seed: int) -> list[int]:
        return shard(0, MANY, 3, seed, partition).rows["art"].tolist()

    assert rows(1) == rows(1)
    assert rows(1) != rows(2)
    assert rows(1) != sorted(rows(1))


@pytest.mark.parametrize("partition", ["iid", "dirichlet"])
def test_every_row_is_at_one_site_whatever_its_domain(partition: str) -> None:
    made = shards(7, partition=partition)
    assert [s.site for s in made] == [f"site-{i}" for i in range(7)]
    for domain, labels in MANY.items():
        rows = torch.cat([s.rows[domain] for s in made])
        assert sorted(rows.tolist()) == list(range(len(labels)))


def counts(made: list[Shard]) -> torch.Tensor:
    """Rows by site and class."""
    return torch.stack(
        [sum(torch.bincount(MANY[d][rows], minlength=10) for d, rows in s.rows.items()) for s in made]  # type: ignore[misc]
    )


def test_iid_sites_are_alike() -> None:
    by_site = counts(shards(5, partition="iid"))
    assert by_site.sum(1).tolist() == [100] * 5
    assert by_site.min() >= 2  # of ten expected


def test_a_small_alpha_makes_sites_more_different_than_a_large_one() -> None:
    def spread(alpha: float) -> float:
        return counts(shards(5, partition="dirichlet", alpha=alpha)).double().std(0).mean().item()

    assert spread(0.05) > 1.3 * spread(0.5) > 2.6 * spread(5.0)


@pytest.mark.parametrize(("sites", "each"), [(10, 2), (3, 4), (20, 2)])
def test_a_site_holds_a_few_classes_only(sites: int, each: int) -> None:
    by_site = counts(shards(sites, partition="classes"))
    assert (by_site > 0).sum(1).tolist() == [each] * sites
    if sites >= 10:
        assert by_site.sum().item() == 500


def test_more_sites_than_images_are_refused() -> None:
    with pytest.raises(UserError, match="501 sites for 500 images; use fewer sites"):
        shards(501, partition="iid")


def test_what_cannot_be_divided_by_classes_is_reported_in_one_line() -> None:
    """Five sites that hold both classes, and one image of the first."""
    expected = "partition = 'classes': class number 0 goes to 5 sites, but has only 1 image; use fewer sites"
    with pytest.raises(UserError, match=expected) as error:
        shard(0, {"a": torch.tensor([0, 1, 1, 1, 1, 1])}, 5, 0, "classes")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("alpha", [0.0, -1.0, float("nan"), float("inf")])
def test_an_alpha_that_is_no_concentration_is_refused(alpha: float) -> None:
    with pytest.raises(UserError, match="expected a number more than 0"):
        shards(3, partition="dirichlet", alpha=alpha)


EARLIER = [
    ("iid", 1, 0, 0.5, 3, "8a5478602f1e8307"),
    ("iid", 7, 5, 0.5, 10, "c00085ba5181fd2f"),
    ("dirichlet", 1, 0, 0.5, 3, "ae25f57b613f08e4"),
    ("dirichlet", 5, 1, 0.05, 10, "761fde840d49de84"),
    ("dirichlet", 7, 5, 0.5, 10, "c2cd4fc91566349f"),
    ("dirichlet", 40, 2, 0.1, 65, "aabeb91e175bd713"),
    ("dirichlet", 16, 3, 100.0, 65, "a304864e8f05bf29"),
    ("classes", 1, 0, 0.5, 3, "d7fec2e82c4109c5"),
    ("classes", 3, 4, 0.5, 10, "f3e9ec4208abca25"),
    ("classes", 20, 1, 0.5, 10, "e382ba714f3cf9a1"),
    ("classes", 10, 9, 0.5, 65, "fd09052602b98df3"),
    ("classes", 30, 2, 0.5, 10, "5e713cd39cd7bbcf"),
]
"""Partition, sites, seed, alpha, classes, and a digest of all rows as flwr-datasets 0.6.0 divided them."""


@pytest.mark.parametrize(("partition", "sites", "seed", "alpha", "classes", "expected"), EARLIER)
def test_sites_hold_the_rows_of_earlier_versions(
    partition: str, sites: int, seed: int, alpha: float, classes: int, expected: str
) -> None:
    numbers = torch.arange(1000) * torch.arange(1000) // 7 % classes**2
    labels = {"a": numbers.double().sqrt().long()}  # higher classes have more images
    rows = [shard(site, labels, sites, seed, partition, alpha).rows["a"].tolist() for site in range(sites)]
    assert hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16] == expected


def test_iid_sites_hold_one_permutation_cut_evenly() -> None:
    rows = [shard(site, {"a": torch.zeros(10)}, 4, 3, "iid").rows["a"].tolist() for site in range(4)]
    assert [len(own) for own in rows] == [3, 3, 2, 2]
    assert [row for own in rows for row in own] == np.random.default_rng(seed_of(3, "partition")).permutation(
        10
    ).tolist()


def test_shares_of_a_class_are_drawn_and_cut_rounded_down() -> None:
    """The first class's shares are the first draw, the second's the second one."""
    draws = np.random.default_rng(seed_of(0, "partition"))
    labels = torch.tensor([0] * 100 + [1] * 37)
    rows = [shard(site, {"a": labels}, 3, 0, "dirichlet", 0.7).rows["a"] for site in range(3)]
    for number, images in enumerate((100, 37)):
        one, two, _ = (float(share) for share in draws.dirichlet([0.7] * 3))
        cuts = [0, int(one * images), int((one + two) * images), images]
        held = [int((labels[own] == number).sum()) for own in rows]
        assert held == [end - start for start, end in pairwise(cuts)]


def test_a_class_is_cut_evenly_for_the_sites_that_hold_it() -> None:
    """Two classes, so every site holds both: of 11 images 4, 4 and 3, of 7 images 3, 2 and 2."""
    labels = torch.tensor([0] * 11 + [1] * 7)
    rows = [shard(site, {"a": labels}, 3, 0, "classes").rows["a"] for site in range(3)]
    assert [torch.bincount(labels[own]).tolist() for own in rows] == [[4, 3], [4, 2], [3, 2]]
    assert sorted(torch.cat(rows).tolist()) == list(range(18))


def test_the_first_class_of_a_site_goes_by_its_number() -> None:
    labels = torch.arange(120) % 6
    for site in range(9):
        held = set(labels[shard(site, {"a": labels}, 9, 1, "classes").rows["a"]].tolist())
        assert site % 6 in held
        assert len(held) == 2


AGAIN = """
import sys, torch
from fedclip_flwr.data import partition
labels = {"a": torch.arange(60) % 4}
anew = partition.shard(1, labels, 3, 6, "classes")
partition._divide = None
print(partition.shard(1, labels, 3, 5, "dirichlet").rows["a"].tolist())
print([name for name in ("datasets", "pandas") if name in sys.modules])
"""


def test_what_was_divided_once_is_not_divided_again_and_nothing_heavy_is_imported() -> None:
    rows = shard(1, {"a": torch.arange(60) % 4}, 3, 5, "dirichlet").rows["a"].tolist()
    done = forked.run(AGAIN)
    assert done.stdout.splitlines() == [str(rows), "[]"], done.stderr


def test_domains_are_shuffled_each_in_its_own_way() -> None:
    (one,), (other,) = (shard(i, {"a": torch.zeros(50), "b": torch.zeros(50)}, 2, 0).rows.values() for i in range(2))
    assert sorted(one.tolist()) == sorted(other.tolist())
    assert one.tolist() != other.tolist()


def test_other_labels_are_divided_anew() -> None:
    for labels in (torch.arange(60) % 4, torch.arange(60) // 15):
        rows = shard(0, {"a": labels}, 3, 5, "classes").rows["a"]
        assert len({*labels[rows].tolist()}) == 2
