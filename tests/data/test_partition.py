from __future__ import annotations

import sys

import pytest
import torch

from fedclip_flwr.base.errors import UserError
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
    with pytest.raises(UserError, match="partition = 'classes': Label") as error:
        shard(0, {"a": torch.tensor([0, 1, 1, 1, 1, 1])}, 5, 0, "classes")
    assert "\n" not in str(error.value)


def test_a_machine_of_a_real_site_says_what_it_lacks_for_a_division(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flwr_datasets.partitioner", None)
    with pytest.raises(UserError, match="flwr-datasets is not installed here"):
        shards(5, seed=77, partition="iid")


AGAIN = """
import sys, torch
from fedclip_flwr.data.partition import shard
print(shard(1, {"a": torch.arange(60) % 4}, 3, 5, "dirichlet").rows["a"].tolist())
print([name for name in ("datasets", "flwr_datasets", "pandas") if name in sys.modules])
"""


def test_what_was_divided_once_is_not_divided_again() -> None:
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
