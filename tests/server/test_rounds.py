"""The loop over rounds, on a grid in memory. Real grids: tests/test_running.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from flwr.app import Error, Message, MessageType

from fedclip_flwr.base.errors import UserError
from fedclip_flwr.exchange import records
from fedclip_flwr.learning.metrics import mean_accuracy
from tests.server.running import Packing, Running, Site


def test_three_rounds_by_hand() -> None:
    north, south = Site("north", 1.0, {0.0: 1, 2.0: 9, 4.0: 7}), Site("south", 3.0, {0.0: 3, 2.0: 6, 4.0: 8})
    running = Running({5: south, 9: north})
    outcome = running.run()
    # each round adds the mean of 1 and 3
    assert running.recorder.completed == [(1, 2.0), (2, 4.0), (3, 6.0)]
    assert [line.round for line in running.recorder.results] == [0, 1, 2, 3]
    assert [line.validation for line in running.recorder.results] == [0.2, 0.75, 0.75, 0.5]
    assert [line.seen for line in running.recorder.results] == [0.0, 0.2, 0.4, 0.6]
    assert [line.unseen["sea"].accuracy for line in running.recorder.results] == [0.0, 0.02, 0.04, 0.06]
    assert [line.loss for line in running.recorder.results] == [0.5] * 4
    assert running.recorder.results[0].bytes > 0  # of the hellos
    assert running.recorder.best == [0, 1]  # the earliest of the two best
    assert outcome.adapted.round == 1
    assert float(outcome.state["w"]) == 2.0
    assert {site: report.test.accuracy for site, report in outcome.adapted.reports.items()} == {
        "north": 0.2,
        "south": 0.2,
    }
    assert outcome.zero_shot.round == 0
    # one hello each, one exchange a round, one closing evaluation
    for node in (5, 9):
        assert [kind for n, kind in running.grid.asked if n == node] == ["query", "train", "train", "train", "evaluate"]
    assert north.trained_in == [1, 2, 3]
    assert not running.nodes.failures


def test_bytes_are_counted_both_ways_and_a_result_has_those_of_its_round() -> None:
    running = Running({5: Site("north"), 9: Site("south")})
    running.run()
    traffic = running.nodes.traffic
    assert traffic.down > 0 < traffic.up
    counted = sum(line.bytes for line in running.recorder.results)
    assert running.recorder.results[0].bytes < running.recorder.results[1].bytes == running.recorder.results[2].bytes
    assert counted < traffic.both < counted * 2  # the closing evaluation belongs to no round


def test_a_late_site_is_taken_in_and_its_zero_shot_asked_for_at_the_end() -> None:
    late, early = Site("late"), Site("early")
    running = Running({5: early})

    def first(message: Message) -> Message | None:
        if message.metadata.message_type == MessageType.TRAIN:
            running.grid.nodes[7] = late
        return early(message)

    running.grid.nodes[5] = first
    outcome = running.run()
    assert late.trained_in == [2, 3]
    assert [len(line.reports) for line in running.recorder.results] == [1, 2, 2, 2]
    assert set(outcome.zero_shot.reports) == {"early", "late"}
    assert outcome.zero_shot.reports["late"].test.accuracy == 0.0


def only_trainer_leaves(returns: bool) -> Running:
    """Of south and poor only south can train. After round 1 it comes back as node 7 and leaves as soon as it is met;
    in the second attempt at round 2 it is there again, if it `returns`."""
    site, poor = Site("south"), Site("poor", train=0)

    def south(message: Message) -> Message | None:
        if (message.metadata.dst_node_id, message.metadata.message_type) == (9, MessageType.TRAIN):
            running.grid.nodes = {5: poor_site, 7: south}
        elif message.metadata.dst_node_id == 7:
            del running.grid.nodes[7]
        return site(message)

    def poor_site(message: Message) -> Message | None:
        if returns and [*running.grid.nodes] == [5]:
            running.grid.nodes[8] = site
        return poor(message)

    running = Running({5: poor_site, 9: south})
    return running


def test_a_round_in_which_nobody_can_be_asked_to_train_is_repeated() -> None:
    running = only_trainer_leaves(returns=True)
    running.run()
    assert running.recorder.completed == [(1, 1.0), (2, 2.0), (3, 3.0)]
    assert [line for line in running.said if "the round is repeated" in line] == [
        "round 2: usable answers: 0, min-sites = 1 are needed; the round is repeated"
    ]


def test_a_run_in_which_nobody_can_be_asked_to_train_any_more_ends_in_words() -> None:
    running = only_trainer_leaves(returns=False)
    with pytest.raises(UserError, match=r"round 2: .*: 0, min-sites = 1 are needed; it was tried 3 times"):
        running.run()


def test_a_site_that_does_not_answer_in_time_is_left_behind_and_named() -> None:
    slow = Site("slow")
    running = Running(
        {5: Site("north"), 9: lambda m: slow(m) if m.metadata.message_type == MessageType.QUERY else None}
    )
    running.run()
    assert [(f.round, f.site, f.why) for f in running.nodes.failures] == [
        (number, "slow", "no answer within 0.2 s") for number in (1, 2, 3)
    ]
    assert [line for line in running.said if "left out" in line] == [
        "round 1: slow is left out: no answer within 0.2 s"
    ]
    assert ("evaluate" in {kind for node, kind in running.grid.asked if node == 9}) is False


def test_a_site_that_fails_once_takes_part_again() -> None:
    north, south = Site("north"), Site("south", 3.0)

    def once(message: Message) -> Message | None:
        if message.metadata.message_type == MessageType.TRAIN and not south.trained_in:
            south.trained_in.append(1)
            return Message(Error(2, "out of memory"), reply_to=message)
        return south(message)

    running = Running({5: north, 9: once})
    outcome = running.run()
    assert running.recorder.completed == [(1, 1.0), (2, 3.0), (3, 5.0)]
    assert [(f.round, f.site, f.why) for f in running.nodes.failures] == [(1, "south", "out of memory")]
    assert set(outcome.zero_shot.reports) == {"north", "south"}


def test_a_site_that_answers_in_anothers_name_is_left_out() -> None:
    north, south = Site("north"), Site("south", 100.0)

    def liar(message: Message) -> Message | None:
        reply = south(message)
        if reply and message.metadata.message_type == MessageType.TRAIN:
            reply.metadata.__dict__["_src_node_id"] = 5
        return reply

    running = Running({5: north, 9: liar})
    running.run()
    assert running.recorder.completed == [(1, 1.0), (2, 2.0), (3, 3.0)]
    assert {f.why for f in running.nodes.failures} == {"it answered in another node's name"}


def test_a_round_with_too_few_answers_is_repeated_then_the_run_ends_in_words() -> None:
    north = Site("north")

    def broken(message: Message) -> Message | None:
        if message.metadata.message_type == MessageType.QUERY:
            return Site("south")(message)
        return Message(Error(2, "x"), reply_to=message)

    running = Running({5: north, 9: broken}, min_sites=2)
    with pytest.raises(UserError, match=r"round 1: .*: 1, min-sites = 2 are needed; it was tried 3 times"):
        running.run()
    assert north.trained_in == [1, 1, 1]
    assert not running.recorder.completed
    assert [line for line in running.said if "the round is repeated" in line] == [
        "round 1: usable answers: 1, min-sites = 2 are needed; the round is repeated"
    ] * 2


@pytest.mark.parametrize("settings", [{}, {"strategy": "fedadam"}, {"codec": "int8"}], ids=str)
def test_a_repeated_round_has_the_result_of_an_undisturbed_one(settings: dict[str, Any]) -> None:
    """South does not answer round 2 the first time: nothing of that attempt is left."""
    kind = Packing if settings.get("codec") else Site

    def federation(fails: bool) -> Running:
        south, failed = kind(f"south-{fails}", 3.0), list[int]()

        def once(message: Message) -> Message | None:
            if fails and not failed and records.read_task(message.content).round == 2:
                failed.append(2)
                return Message(Error(2, "out of memory"), reply_to=message)
            return south(message)

        return Running({5: kind(f"north-{fails}"), 9: once}, min_sites=2, **settings)

    plain, repeated = federation(False), federation(True)
    assert torch.equal(plain.run().state["w"], repeated.run().state["w"])
    assert plain.recorder.completed == repeated.recorder.completed
    assert [(f.round, f.site, f.why) for f in repeated.nodes.failures] == [(2, "south-True", "out of memory")]


def test_more_sites_train_than_the_fraction_where_a_round_needs_them() -> None:
    sites = {n: Site(f"site-{n}") for n in range(4)}
    Running({**sites}, fraction_train=0.25, min_sites=3).run()
    assert sum(len(site.trained_in) for site in sites.values()) == 3 * 3


def test_an_answer_that_comes_late_changes_nothing() -> None:
    """South's answer to round 1 is there when that to round 2 is asked for."""
    north, south, late = Site("north"), Site("south", 100.0), list[Message]()

    def slow(message: Message) -> Message | None:
        reply = south(message)
        if message.metadata.message_type == MessageType.QUERY:
            return reply
        assert reply
        if late:
            running.grid.late(late.pop())
        late.append(reply)
        return None

    running = Running({5: north, 9: slow})
    running.run()
    assert running.recorder.completed == [(1, 1.0), (2, 2.0), (3, 3.0)]
    assert {(f.site, f.why) for f in running.nodes.failures} == {("south", "no answer within 0.2 s")}
    assert running.grid.unasked == 0


def test_when_all_sites_are_gone_the_run_ends_in_words_and_does_not_hang() -> None:
    north = Site("north")
    running = Running({5: north})
    running.add_leaving(5, north)
    with pytest.raises(UserError, match=r"round 2: .*: 0, min-sites = 1"):
        running.run()


def test_the_sites_of_a_round_follow_from_seed_and_names_not_from_node_ids() -> None:
    def trained(nodes: list[int], seed: int = 0) -> dict[str, list[int]]:
        sites = {name: Site(name) for name in "abcdef"}
        Running(dict(zip(nodes, sites.values(), strict=True)), fraction_train=0.5, num_server_rounds=8, seed=seed).run()
        return {name: site.trained_in for name, site in sites.items()}

    first = trained([1, 2, 3, 4, 5, 6])
    assert first == trained([62, 5, 44, 3, 21, 10])
    assert first != trained([1, 2, 3, 4, 5, 6], seed=1)
    assert sum(map(len, first.values())) == 8 * 3
    assert len(set(map(tuple, first.values()))) > 1


def test_with_a_fraction_training_all_sites_evaluate_so_that_rounds_can_be_compared() -> None:
    sites = {n: Site(f"site-{n}", correct={0.0: n, 1.0: n + 1}) for n in range(4)}
    running = Running({**sites}, fraction_train=0.5)
    outcome = running.run()
    assert [len(line.reports) for line in running.recorder.results] == [4] * 4
    assert [line.validation for line in running.recorder.results] == pytest.approx([0.15, 0.25, 0.5, 0.5])
    assert sum(len(site.trained_in) for site in sites.values()) == 2 * 3
    assert len(outcome.zero_shot.reports) == len(outcome.adapted.reports) == 4
    kinds = [kind for _, kind in running.grid.asked]
    assert (kinds.count("train"), kinds.count("evaluate")) == (2 * 3, 2 * 3 + 4)


def test_a_site_without_training_images_only_evaluates() -> None:
    poor = Site("poor", 100.0, train=0)
    running = Running({5: Site("north"), 9: poor}, fraction_train=0.5)
    running.run()
    assert running.recorder.completed == [(1, 1.0), (2, 2.0), (3, 3.0)]
    assert not poor.trained_in
    assert [len(line.reports) for line in running.recorder.results] == [2] * 4


def test_a_holdout_site_evaluates_and_is_unseen() -> None:
    """At it 20, 40 and 60 % are right after rounds 1, 2 and 3, at the server 2, 4 and 6 %."""
    west = Site("west", 100.0, {0.0: 10}, role="holdout", train=0, validation=0)
    running = Running({5: Site("north", 2.0), 9: west}, personalize=True, site_weights="examples")
    outcome = running.run()
    assert running.recorder.completed == [(1, 2.0), (2, 4.0), (3, 6.0)]
    assert not west.trained_in
    assert not west.own
    assert [set(line.reports) for line in running.recorder.results] == [{"north"}] * 4
    assert [mean_accuracy(line.held_out) for line in running.recorder.results] == pytest.approx([0.0, 0.11, 0.22, 0.33])
    assert [line.validation for line in running.recorder.results] == [0.5] * 4
    assert set(outcome.adapted.holdouts) == set(outcome.zero_shot.holdouts) == {"west"}
    assert set(outcome.personal) == {"north"}


def test_bytes_a_site_and_round_are_those_of_the_rounds() -> None:
    running = Running({5: Site("north"), 9: Site("south")})
    outcome = running.run()
    assert outcome.site_round_bytes == sum(line.bytes for line in running.recorder.results[1:]) / (2 * 3)
