"""Federations with hostile sites, or with privacy, in which the nodes are played. With real ones: test_hostile.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import ConfigRecord, Error, Message, MessageType, MetricRecord, RecordDict

from fedclip_flwr import checkpoint, exchange, secure
from fedclip_flwr.errors import UserError
from fedclip_flwr.exchange import Progress, Report
from fedclip_flwr.metrics import Score
from tests.test_federation import Answer, Running, Site, quality
from tests.test_privacy import exact
from tests.test_resume import interrupted


def honest(many: int, **correct: Any) -> dict[int, Answer]:
    return {node: Site(f"site-{node}", 1.0, **correct) for node in range(1, many + 1)}


def test_a_site_that_goes_too_far_is_bounded_and_told_once_and_in_the_summary() -> None:
    """Of steps 1, 1, 1, 1, 20 the limit is 3: it lies in step 7 (3.36), 20 in step 18: 20 · 2^(-11/4) = 2.97."""
    running = Running({**honest(4), 9: Site("far", 20.0)})
    running.run()
    step = (4 + 20 / 2 ** (11 / 4)) / 5
    assert [value for _, value in running.told.completed] == pytest.approx([step, 2 * step, 3 * step])
    assert running.nodes.scaled == {"far": 3}
    said = [line for line in running.said if "far" in line]
    assert said == ["round 1: far's update is much longer than the others': it counts as one that is not"]
    assert not running.nodes.failures


def test_a_site_that_goes_beyond_all_measure_is_left_out_of_everything() -> None:
    running = Running({**honest(4), 9: Site("far", -5000.0)})
    outcome = running.run()
    assert [value for _, value in running.told.completed] == [1.0, 2.0, 3.0]
    assert {(f.site, f.round) for f in running.nodes.failures} == {("far", 1), ("far", 2), ("far", 3)}
    assert "5,000 times as long as the sites' median" in running.nodes.failures[0].why
    assert "far" not in running.told.lines[1].reports
    assert "far" not in outcome.adapted.reports


def test_what_single_sites_claim_of_their_validation_images_selects_no_round() -> None:
    """Three of four gain a little in each round; one claims to have lost all, and two of ten more do."""
    better = {0.0: 4, 1.0: 5, 2.0: 6, 3.0: 7}
    worse = {0.0: 10, 1.0: 0, 2.0: 0, 3.0: 0}
    sites: dict[int, Answer] = honest(4, correct=better)
    running = Running({**sites, 9: Site("liar", 1.0, worse)})
    assert running.run().adapted.round == 3
    two = {8: Site("liar-1", 1.0, worse), 9: Site("liar-2", 1.0, worse)}
    assert Running({**honest(5, correct=better), **two}).run().adapted.round == 3
    assert Running({**honest(5, correct=better), **two}, recipe="paper").run().adapted.round != 0  # never the start


def test_counts_of_other_classes_than_the_runs_are_not_taken() -> None:
    """There are two classes; this site tells of three."""
    other = Site("other")

    def answer(message: Message) -> Message | None:
        reply = other(message)
        if reply and message.metadata.message_type != MessageType.QUERY:
            report = Report(6, Score(10, 5, 5.0), quality(2))
            classes = [5, 5, 0, 1, 1, 0, 5, 5, 0]
            figures = MetricRecord({**exchange.write_answer(report).metric_records["metrics"], "test-classes": classes})
            reply = Message(RecordDict({**reply.content, "metrics": figures}), reply_to=message)
        return reply

    running = Running({5: Site("north"), 9: answer})
    running.run()
    assert {f.why for f in running.nodes.failures} == {"test: counts of 3 classes, expected 2"}


def test_a_site_that_says_it_encodes_is_not_waited_for_without_end() -> None:
    """It always has one more; a hundredth of what it has would take it longer than anyone waits."""
    told = [0]

    def endless(message: Message) -> Message | None:
        told[0] += 1
        return Message(exchange.write_progress(Progress("endless", told[0], 10**9)), reply_to=message)

    running = Running({5: Site("north"), 9: endless}, round_timeout=0.3)
    outcome = running.run()
    assert set(outcome.adapted.reports) == {"north"}
    assert told[0] > 2


# Secure aggregation


class Masked(Site):
    """Takes part in secure aggregation; in some rounds it drops out in some step."""

    def __init__(self, name: str, step: float = 1.0, gone: dict[int, str] | None = None) -> None:
        super().__init__(name, step)
        self.memory = RecordDict().config_records
        self.gone = gone or {}

    def __call__(self, message: Message) -> Message | None:
        kind = message.metadata.message_type
        number = exchange.read_task(message.content).round
        if self.gone.get(number) == kind:
            return Message(Error(2, "gone"), reply_to=message)
        if kind.startswith("query."):
            step = secure.STEPS[kind.removeprefix("query.")]
            return Message(step(message.content, self.memory), reply_to=message)
        if kind != MessageType.TRAIN:
            return super().__call__(message)
        arrays = message.content.array_records["arrays"]
        state = {"w": torch.from_numpy(arrays["w"].numpy())}
        masked = secure.masked(message.content, self.memory, {"w": state["w"] + self.step}, state)
        report = Report(6, Score(10, 5, 5.0), quality(5))
        return Message(exchange.write_answer(report, masked), reply_to=message)


def masked(*sites: Masked, **settings: Any) -> Running:
    return Running(dict(enumerate(sites, 3)), secure_aggregation=True, **settings)


def test_a_masked_run_comes_to_what_an_open_one_comes_to() -> None:
    steps = (1.0, 2.0, 0.5, -0.25, 1.5)
    running = masked(*(Masked(f"site-{n}", step) for n, step in enumerate(steps)))
    running.run()
    step = sum(steps) / 5
    assert [value for _, value in running.told.completed] == pytest.approx([step, 2 * step, 3 * step], abs=1e-6)
    assert set(running.grid.asked) >= {(3, kind) for kind in ("query.keys", "query.shares", "train", "query.unmask")}


def test_numbers_beyond_the_bound_are_cut_off() -> None:
    running = masked(Masked("a", 1.0), Masked("b", 1.0), Masked("c", 1e6))
    running.run()
    assert running.told.completed[0][1] == pytest.approx((1 + 1 + secure.BOUND) / 3)


def test_who_drops_out_is_named_and_the_sum_is_that_of_the_others() -> None:
    steps = {1: "query.keys", 2: "query.shares", 3: "train", 4: "query.unmask"}
    sites = [Masked(f"site-{n}", n / 2) for n in range(6)] + [Masked("leaver", 3.5, steps)]
    running = masked(*sites, num_server_rounds=4)
    running.run()
    assert running.told.completed[2][1] == pytest.approx(3 * 1.25)
    assert running.told.completed[3][1] == pytest.approx(3 * 1.25 + (7.5 + 3.5) / 7, abs=1e-6)
    assert [(f.round, f.site, f.why) for f in running.nodes.failures] == [(n, "leaver", "gone") for n in (1, 2, 3, 4)]


def test_a_round_of_which_too_few_stay_is_repeated_with_new_keys_and_ends_in_words() -> None:
    gone = [Masked(f"gone-{n}", 1.0, {2: "query.unmask"}) for n in range(3)]
    running = masked(Masked("a"), Masked("b"), *gone)
    with pytest.raises(UserError, match="round 2: answers that can be used: 0, min-sites = 3 are needed"):
        running.run()
    said = [line for line in running.said if "no sum can be made" in line]
    assert said == ["round 2: no sum can be made: 2 members revealed their piece of 000000, 3 must"] * 3
    assert [value for _, value in running.told.completed] == [1.0]


def test_fewer_than_three_sites_are_not_enough() -> None:
    with pytest.raises(UserError, match="2, min-sites = 3 are needed"):
        masked(Masked("a"), Masked("b")).run()


@pytest.mark.parametrize("way", ["nothing", "more", "wrong types", "short lists", "another's letters"])
@pytest.mark.parametrize("step", ["query.keys", "query.shares", "query.unmask"])
def test_garbage_in_a_step_is_that_sites_failure(step: str, way: str) -> None:
    class Garbage(Masked):
        def __call__(self, message: Message) -> Message | None:
            reply = super().__call__(message)
            if reply and message.metadata.message_type == step:
                ((name, record),) = reply.content.config_records.items()
                changed: dict[str, Any] = dict(record)
                key = [*changed][-1]
                if way == "nothing":
                    changed = {}
                elif way == "more":
                    changed["update"] = [1.0]
                elif way == "wrong types":
                    changed[key] = 7
                elif way == "short lists":
                    changed[key] = changed[key][:-1]
                else:
                    changed[next(iter(changed))] = b"" if step == "query.keys" else ["x"] * len(changed[key])
                reply = Message(RecordDict({name: ConfigRecord(changed)}), reply_to=message)
            return reply

    running = masked(*(Masked(f"site-{n}") for n in range(4)), Garbage("garbage"), num_server_rounds=1)
    running.run()
    assert running.told.completed == [(1, 1.0)]
    assert {f.site for f in running.nodes.failures} == {"garbage"}
    assert all("\n" not in f.why for f in running.nodes.failures)


# Privacy


def test_what_is_spent_is_told_with_each_round_and_grows_with_it() -> None:
    running = Running(honest(3), dp="central", noise_multiplier=2.0)
    outcome = running.run()
    told = [line.epsilon for line in running.told.lines]
    assert told[0] == 0.0
    assert told[1:] == pytest.approx([exact(2.0, rounds, 1e-5) for rounds in (1, 2, 3)])
    assert outcome.epsilon == told[-1]
    assert Running(honest(3)).run().epsilon is None


def test_noise_is_central_in_a_masked_sum_too() -> None:
    values = []
    for _ in range(2):
        running = masked(*(Masked(f"site-{n}", 0.1) for n in range(3)), dp="central", noise_multiplier=30.0)
        running.run()
        values.append(running.told.completed[-1][1])
    assert values[0] != values[1]
    assert max(abs(value - 0.3) for value in values) > 0.1  # of deviation 5 · √3


def test_a_round_in_which_a_site_does_not_train_costs_it_nothing() -> None:
    running = Running(honest(4), dp="central", noise_multiplier=2.0, fraction_train=0.5, num_server_rounds=6, seed=1)
    running.run()
    most = max(running.nodes.trained.values())
    assert sum(running.nodes.trained.values()) == 2 * 6
    assert most < 6
    told = {line.epsilon for line in running.told.lines}
    assert len(told) == most + 1


def test_a_run_that_goes_on_goes_on_counting(tmp_path: Path) -> None:
    def federation() -> Running:
        return Running(honest(3), dp="central", noise_multiplier=2.0)

    again, outcome = interrupted(federation, tmp_path / "checkpoint", 2)
    assert outcome.epsilon == pytest.approx(exact(2.0, 3, 1e-5))
    read = checkpoint.read(tmp_path / "checkpoint")
    assert read
    assert read.standing.epsilon == pytest.approx(exact(2.0, 2, 1e-5))
    assert again.nodes.trained == {"site-1": 3, "site-2": 3, "site-3": 3}


def test_repeated_rounds_count_for_privacy() -> None:
    failed = list[int]()

    class Once(Site):
        def __call__(self, message: Message) -> Message | None:
            if message.metadata.message_type == MessageType.TRAIN and not failed:
                failed.append(1)
                return Message(Error(2, "x"), reply_to=message)
            return super().__call__(message)

    running = Running({**honest(2), 9: Once("once")}, dp="local", min_sites=3, num_server_rounds=1)
    running.run()
    assert running.nodes.trained == {"site-1": 2, "site-2": 2, "once": 2}
