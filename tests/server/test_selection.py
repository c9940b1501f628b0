"""Which round and which blend are the result, when a run ends early, and personal adapters. On a grid in memory."""

from __future__ import annotations

from typing import Any

import torch

from tests.server.running import Running, Site


def test_a_blend_is_chosen_by_validation_after_the_last_round() -> None:
    north = Site("north", 2.0, {4.0: 9, 3.0: 8, 2.0: 7, 1.0: 9})
    south = Site("south", 2.0, {4.0: 7, 3.0: 8, 2.0: 6, 1.0: 5})
    running = Running({5: north, 9: south}, blend="auto", personalize=True)
    outcome = running.run()
    assert (outcome.adapted.round, outcome.blend) == (2, 0.75)  # of the adapter 4.0, 3.0 is as good and 1.0 is not
    assert [report.test.accuracy for report in outcome.adapted.reports.values()] == [0.3, 0.3]
    assert outcome.adapted.unseen["sea"].accuracy == 0.03
    assert (running.recorder.best[-1], running.recorder.blend) == (2, 0.75)
    assert north.own == [(2, 3.0)]
    asked = [kind for node, kind in running.grid.asked if node == 5]
    assert asked == ["query", "train", "train", "train", *["evaluate"] * 5]  # the last line, three blends, the own


def test_a_fixed_blend_is_not_chosen_and_not_sent() -> None:
    north = Site("north")
    outcome = Running({5: north}, blend=0.5, personalize=True).run()
    assert outcome.blend == 0.5
    assert north.own[0][1] == float(outcome.state["w"])


def test_the_papers_recipe_selects_of_the_trained_rounds() -> None:
    running = Running({5: Site("north", 1.0, {0.0: 9, 2.0: 8})}, recipe="paper")
    assert running.run().adapted.round == 2
    assert running.recorder.best == [0, 1, 2]  # the start is what there is until then


def test_where_the_start_is_only_next_to_zero_shot_that_is_asked_for() -> None:
    """A start of 2, of which nothing is left with a blend of 0."""
    running = Running({5: Site("north"), 9: Site("south")}, recipe="paper")
    outcome = running.run({"w": torch.full((1,), 2.0)})
    assert running.recorder.results[0].seen == 0.2
    assert outcome.zero_shot.seen == 0.0
    assert outcome.zero_shot.unseen["sea"].accuracy == 0.0
    full = Running({5: Site("north")}, recipe="paper", method="full-model").run({"w": torch.full((1,), 2.0)})
    assert full.zero_shot.seen == 0.2


def test_rounds_are_compared_at_the_sites_that_tried_both() -> None:
    """North, where all was right from the beginning, goes after round 1; at south round 2 is best, round 3 worse."""
    north, south = Site("north", 1.0, {0.0: 10}), Site("south", 1.0, {0.0: 5, 1.0: 6, 2.0: 7, 3.0: 6})
    running = Running({9: south})
    running.add_leaving(5, north)
    outcome = running.run()
    assert [line.validation for line in running.recorder.results] == [0.75, 0.6, 0.7, 0.6]
    assert outcome.adapted.round == 2
    assert running.recorder.best == [0, 1, 2]


def test_the_run_ends_after_rounds_without_a_gain() -> None:
    """The best is that of round 2. The answers of round 5 tell that those of 3 and 4 are no better."""
    north = Site("north", 1.0, {0.0: 5, 1.0: 6, 2.0: 7, 3.0: 6, 4.0: 7, 5.0: 6})
    running = Running({5: north}, num_server_rounds=50, early_stop=2)
    outcome = running.run()
    assert (outcome.rounds, outcome.adapted.round) == (5, 2)
    assert north.trained_in == [1, 2, 3, 4, 5]


def test_a_round_with_the_same_accuracy_and_a_lower_loss_is_a_gain() -> None:
    """Accuracy is the same from round 1 on, loss is lowest after round 3: the answers of round 6 tell so."""
    correct, loss = {0.0: 5, **dict.fromkeys((1.0, 2.0, 3.0, 4.0, 5.0, 6.0), 7)}, {2.0: 4.0, 3.0: 3.0, 4.0: 6.0}
    how: dict[str, Any] = {"num_server_rounds": 50, "early_stop": 2}
    running = Running({5: Site("north", 1.0, correct, loss)}, **how)
    outcome = running.run()
    assert (outcome.rounds, outcome.adapted.round) == (6, 3)
    assert running.recorder.best == [0, 1, 2, 3]
    assert Running({5: Site("north", 1.0, correct, loss)}, **how, recipe="paper").run().adapted.round == 1


def test_sites_make_an_adapter_of_their_own_from_the_selected_one_at_the_end() -> None:
    north, south = Site("north", 1.0, {2.0: 9}), Site("south", 3.0, {2.0: 6})
    outcome = Running({5: south, 9: north}, personalize=True).run()
    assert outcome.adapted.round == 1
    assert north.own == south.own == [(1, 2.0)]
    assert {site: report.test.accuracy for site, report in outcome.personal.items()} == {"north": 0.3, "south": 0.5}


def test_without_personalize_no_site_is_asked_for_one() -> None:
    north = Site("north")
    assert Running({5: north}).run().personal == {}
    assert not north.own


def test_of_blends_that_do_as_well_the_smallest_is_chosen() -> None:
    """The adapter of round 1 is 2.0, and as good as it are three quarters and a half of it."""
    north = Site("north", 2.0, {2.0: 9, 1.5: 9, 1.0: 9, 0.5: 8})
    outcome = Running({5: north}, blend="auto").run()
    assert (outcome.adapted.round, outcome.blend) == (1, 0.5)
