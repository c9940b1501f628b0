from __future__ import annotations

from itertools import combinations
from pathlib import Path

import pytest
import torch

from fedclip_flwr.base.errors import UserError
from fedclip_flwr.experiments.comparison import planned
from fedclip_flwr.experiments.simulate import make_sites
from fedclip_flwr.experiments.sweep import solve
from fedclip_flwr.experiments.unseen import THIRDS, named, third
from fedclip_flwr.features.base import Features
from tests.experiments.test_sweep import folder, options

DOMAINS = ("art", "cartoon", "photo")


def test_names_become_what_is_held_out() -> None:
    assert named(["photo", "photo+art", "PHOTO"], DOMAINS) == ["photo", "art+photo"]
    assert named(["pairs"], DOMAINS) == ["art+cartoon", "art+photo", "cartoon+photo"]
    assert named(["art", "classes", "art+photo", "pairs"], DOMAINS)[:4] == ["art", *THIRDS]
    assert named([], DOMAINS) == []
    with pytest.raises(UserError, match="there is no such domain"):
        named(["sketch"], DOMAINS)


@pytest.mark.parametrize("classes", [3, 10, 49])
def test_each_class_is_in_one_third(classes: int) -> None:
    parts = [third(one, classes, 4) for one in THIRDS]
    assert sorted(number for part in parts for number in part) == [*range(classes)]
    assert not any({*a} & {*b} for a, b in combinations(parts, 2))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert [third(one, classes, 5) for one in THIRDS] != parts


def test_the_classes_are_at_no_site_and_all_their_images_are_unseen(drawn: Features) -> None:
    plain, _ = make_sites(drawn, "", 4, 3)
    for holdout in THIRDS:
        sites, unseen = make_sites(drawn, holdout, 4, 3)
        apart = torch.tensor(third(holdout, 10, 3))
        assert [site.name for site in sites] == [site.name for site in plain]
        assert {*unseen} == {holdout}
        assert {*unseen[holdout].labels.tolist()} == {*apart.tolist()}
        count = 0
        for site, before in zip(sites, plain, strict=True):
            for part in ("train", "validation", "test"):
                own, all_of_it = getattr(site, part), getattr(before, part)
                kept = ~torch.isin(all_of_it.labels, apart)
                assert torch.equal(own.features, all_of_it.features[kept])
                count += int((~kept).sum())
        assert len(unseen[holdout].labels) == count


def test_a_sweep_can_hold_out_classes(tmp_path: Path) -> None:
    place = f"features:{folder(tmp_path)}"
    swept, features = planned(options(place, methods="one-round", holdouts="classes", seeds=1))
    assert swept.holdouts == [*THIRDS]
    assert swept.sites == len(features.domains)
    (cell,) = [one for one in swept.cells() if one.method == "one-round" and one.settings.holdout == THIRDS[0]]
    found = solve(cell, features)
    assert found.unseen is not None
    assert found.bytes is not None
    assert {name for name, *_ in found.tests if name.startswith("classes")} == {THIRDS[0]}
    pairs, _ = planned(options(place, methods="one-round", holdouts="pairs", seeds=1))
    assert pairs.holdouts == ["cow+elk", "cow+fox", "elk+fox"]
    assert pairs.sites == 1
