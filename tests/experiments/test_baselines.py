from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from fedclip_flwr.base.errors import UserError
from fedclip_flwr.base.settings import Settings
from fedclip_flwr.data.presets import PRESETS
from fedclip_flwr.experiments.baselines import (
    METHODS,
    PUBLISHED,
    Case,
    centralised,
    local_only,
    pooled,
    together,
    zero_shot,
)
from fedclip_flwr.experiments.simulate import simulate
from fedclip_flwr.learning.adapters import make_adapter
from fedclip_flwr.learning.base import Examples
from fedclip_flwr.learning.training import evaluate
from fedclip_flwr.site.holdings import Site
from tests.experiments.test_simulate import CLASSES, SITES, some

HOW = Settings(recipe="paper", num_server_rounds=3, learning_rate=0.05, batch_size=4)
CASE = Case(SITES, CLASSES, {"sea": some(50, 99)}, HOW)
NONE = some(0, 0)


def test_zero_shot_is_the_frozen_features_accuracy() -> None:
    line = zero_shot(CASE)
    assert line.seen == sum(evaluate(None, s.test, CLASSES).accuracy or 0.0 for s in SITES) / 2
    assert line.unseen == evaluate(None, some(50, 99), CLASSES).accuracy
    assert zero_shot(replace(CASE, unseen={})).unseen is None


def test_together_is_the_federation() -> None:
    assert together(CASE) == simulate(SITES, CLASSES, CASE.unseen, HOW).selected


def test_each_site_alone_is_a_federation_of_one_tested_on_its_own() -> None:
    alone = [simulate([site], CLASSES, CASE.unseen, HOW).selected for site in SITES]
    line = local_only(CASE)
    assert line.seen == pytest.approx(((alone[0].seen or 0.0) + (alone[1].seen or 0.0)) / 2)
    assert line.unseen == pytest.approx(((alone[0].unseen or 0.0) + (alone[1].unseen or 0.0)) / 2)
    assert line != together(CASE)


def test_each_site_alone_begins_from_the_start_and_not_from_another_sites_result() -> None:
    start = make_adapter("attention", 8, identity=False, seed=4)
    before = copy.deepcopy(start.state_dict())
    case = replace(CASE, start=start)
    alone = [together(replace(case, sites=[site], start=copy.deepcopy(start))) for site in SITES]
    line = local_only(case)
    assert (line.seen, line.unseen) == pytest.approx(
        tuple(sum(getattr(one, of) for one in alone) / 2 for of in ("seen", "unseen"))
    )
    assert all(torch.equal(start.state_dict()[name], before[name]) for name in before)


def test_a_site_alone_without_tests_or_training_rows_sways_nothing() -> None:
    untested, untrained = replace(SITES[0], name="c", test=NONE), Site("d", NONE, some(6, 1), some(5, 2))
    assert local_only(replace(CASE, sites=[*SITES, untrained])) == local_only(CASE)
    assert local_only(replace(CASE, sites=[*SITES, untested])).seen == local_only(CASE).seen
    with pytest.raises(UserError, match="no site has an example"):
        local_only(replace(CASE, sites=[untrained]))


def test_centralised_is_one_site_with_all_training_rows_tested_where_they_were() -> None:
    whole, *rest = pooled(SITES)
    assert len(whole.train.labels) == 29
    assert [(s.name, len(s.train.labels), len(s.test.labels)) for s in rest] == [("b", 0, 5), ("a", 0, 5)]
    one = Examples(*(torch.cat(parts) for parts in zip(*(s.train for s in SITES), strict=True)))
    validation, test = (
        [replace(s, name=f"{s.name}-{part}", train=NONE) for s in SITES] for part in ("validation", "test")
    )
    assert len(validation) == len(test) == 2
    alone = simulate([Site("centralised", one, NONE, NONE), *rest], CLASSES, CASE.unseen, HOW).selected
    assert centralised(CASE) == alone


def test_methods_differ_in_settings_that_exist() -> None:
    for method in METHODS.values():
        assert replace(Settings(), **method.settings)
    assert {name for name, method in METHODS.items() if method.whole_model} == {"fedavg", "fedprox"}
    assert not {"zero-shot", "local", "centralised"} & {name for name, method in METHODS.items() if method.sends}


def test_published_means_are_those_of_their_figures() -> None:
    """In the readme of the released code; its "9 % better" is FedCLIP's mean less FedProx's."""
    every = {source.label.partition(":")[0]: source for source in PUBLISHED["pacs"] if source.every}
    for source in every.values():
        assert source.mean == pytest.approx(sum(source.by_domain.values()) / 4, abs=0.01)
        assert source.by_domain.keys() == PRESETS["pacs"].domains.keys()
    assert (every["FedCLIP"].mean or 0) - (every["FedProx"].mean or 0) == pytest.approx(8.92)
    assert PUBLISHED.keys() == PRESETS.keys()
