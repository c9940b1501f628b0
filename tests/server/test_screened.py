"""Federations with hostile sites, or with privacy, in which the nodes are played. With real ones: test_hostile.py."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import ConfigRecord, Error, Message, MessageType, MetricRecord, RecordDict

from fedclip_flwr.base.errors import UserError
from fedclip_flwr.base.settings import Settings
from fedclip_flwr.exchange import records
from fedclip_flwr.exchange.records import Progress, Report
from fedclip_flwr.exchange.secure import site as site_end
from fedclip_flwr.exchange.secure.protocol import LetterError
from fedclip_flwr.learning.metrics import Score
from fedclip_flwr.runs import checkpoint
from fedclip_flwr.server import RunState
from fedclip_flwr.server.loop import RoundLoop
from fedclip_flwr.server.secure_sum import BOUND, bound_of
from tests.exchange.test_privacy import exact
from tests.extras import needs
from tests.server.running import START, Answer, Running, Site, quality
from tests.server.test_resume import interrupted


def honest(many: int, **correct: Any) -> dict[int, Answer]:
    return {node: Site(f"site-{node}", 1.0, **correct) for node in range(1, many + 1)}


def test_a_site_that_goes_too_far_is_bounded_and_named_once_and_in_the_summary() -> None:
    """Of steps 1, 1, 1, 1, 20 the limit is 3: it lies in step 7 (3.36), 20 in step 18: 20 · 2^(-11/4) = 2.97."""
    running = Running({**honest(4), 9: Site("far", 20.0)})
    running.run()
    step = (4 + 20 / 2 ** (11 / 4)) / 5
    assert [value for _, value in running.recorder.completed] == pytest.approx([step, 2 * step, 3 * step])
    assert running.nodes.scaled == {"far": 3}
    said = [line for line in running.said if "far" in line]
    assert said == ["round 1: far's update is much longer than the others': it is scaled down"]
    assert not running.nodes.failures


def test_a_site_that_goes_beyond_all_measure_is_left_out_of_everything() -> None:
    running = Running({**honest(4), 9: Site("far", -5000.0)})
    outcome = running.run()
    assert [value for _, value in running.recorder.completed] == [1.0, 2.0, 3.0]
    assert {(f.site, f.round) for f in running.nodes.failures} == {("far", 1), ("far", 2), ("far", 3)}
    assert "5,000 times as long as the sites' median" in running.nodes.failures[0].why
    assert "far" not in running.recorder.results[1].reports
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


def test_nor_do_they_in_small_steps() -> None:
    """The others lose a point in each round, and two of ten claim 5 more of it each time: from 80 down to 60 %."""
    down = {float(n): 80 - n for n in range(21)}
    up = {float(n): min(5 * n, 100) for n in range(21)}

    class Hundred(Site):
        def __call__(self, message: Message) -> Message | None:
            reply = super().__call__(message)
            if reply and (figures := reply.content.metric_records.get("metrics")):
                value = float(records.read_task(message.content).arrays["w"].numpy()[0])  # type: ignore[index]
                figures["validation"] = [100.0, float(self.correct[value]), 50.0]
            return reply

    sites = {n: Hundred(f"site-{n}", 1.0, down) for n in range(1, 9)}
    liars = {n: Hundred(f"liar-{n}", 1.0, up) for n in (9, 10)}
    outcome = Running({**sites, **liars}, num_server_rounds=20).run()
    assert outcome.adapted.round <= 2


def test_counts_of_other_classes_than_the_runs_are_not_taken() -> None:
    """There are two classes; this site tells of three."""
    other = Site("other")

    def answer(message: Message) -> Message | None:
        reply = other(message)
        if reply and message.metadata.message_type != MessageType.QUERY:
            report = Report(6, Score(10, 5, 5.0), quality(2))
            classes = [5, 5, 0, 1, 1, 0, 5, 5, 0]
            figures = MetricRecord({**records.write_answer(report).metric_records["metrics"], "test-classes": classes})
            reply = Message(RecordDict({**reply.content, "metrics": figures}), reply_to=message)
        return reply

    running = Running({5: Site("north"), 9: answer})
    running.run()
    assert {f.why for f in running.nodes.failures} == {"test: counts of 3 classes, expected 2"}


def test_a_site_that_says_it_encodes_is_not_waited_for_without_end() -> None:
    """It always has one more; a hundredth of what it has would take it longer than anyone waits."""
    answers = [0]

    def endless(message: Message) -> Message | None:
        answers[0] += 1
        return Message(records.write_progress(Progress("endless", answers[0], 10**9)), reply_to=message)

    running = Running({5: Site("north"), 9: endless}, round_timeout=0.3)
    outcome = running.run()
    assert set(outcome.adapted.reports) == {"north"}
    assert answers[0] > 2


def test_a_site_that_comes_back_under_a_name_that_another_has_taken_is_refused_by_name() -> None:
    running = Running({5: Site("north"), 9: Site("south")})
    running.nodes.wait_for(2)
    real = running.grid.nodes.pop(5)
    running.grid.nodes[7] = Site("north", 100.0)
    running.nodes.wait_for(2, expected=["north"])
    running.grid.nodes[5] = real
    running.nodes.meet(1)
    assert [f.site for f in running.nodes.failures] == ["north (node 5)"]
    assert "its name is taken by another site" in running.nodes.failures[0].why


def test_a_site_is_not_left_out_for_what_was_refused_in_its_name() -> None:
    running = Running({9: Site("south")})
    running.nodes.wait_for(1)
    running.grid.nodes[7] = Site("north", package="another")
    running.nodes.meet(1)
    running.grid.nodes[5] = Site("north")
    running.nodes.meet(1)
    assert 5 in running.nodes.good()


# Secure aggregation


class Masked(Site):
    """Takes part in secure aggregation; in some rounds it drops out in some step."""

    def __init__(self, name: str, step: float = 1.0, gone: dict[int, str] | None = None) -> None:
        super().__init__(name, step)
        self.memory = RecordDict().config_records
        self.gone = gone or {}

    def __call__(self, message: Message) -> Message | None:
        kind = message.metadata.message_type
        number = records.read_task(message.content).round
        if self.gone.get(number) == kind:
            return Message(Error(2, "gone"), reply_to=message)
        if kind.startswith("query."):
            step = site_end.STEPS[kind.removeprefix("query.")]
            return Message(step(message.content, self.memory), reply_to=message)
        if kind != MessageType.TRAIN:
            return super().__call__(message)
        arrays = message.content.array_records["arrays"]
        state = {"w": torch.from_numpy(arrays["w"].numpy())}
        try:
            masked = site_end.masked(message.content, self.memory, {"w": state["w"] + self.step}, state)
        except LetterError as error:  # as in client_app.guard
            return Message(Error(records.BLAMES, error.sender), reply_to=message)
        report = Report(6, Score(10, 5, 5.0), quality(5))
        return Message(records.write_answer(report, masked), reply_to=message)


def masked(*sites: Masked, **settings: Any) -> Running:
    return Running(dict(enumerate(sites, 3)), secure_aggregation=True, **settings)


def test_a_masked_run_has_the_result_of_an_open_one() -> None:
    steps = (1.0, 2.0, 0.5, -0.25, 1.5)
    running = masked(*(Masked(f"site-{n}", step) for n, step in enumerate(steps)))
    running.run()
    step = sum(steps) / 5
    assert [value for _, value in running.recorder.completed] == pytest.approx([step, 2 * step, 3 * step], abs=1e-6)
    assert set(running.grid.asked) >= {(3, kind) for kind in ("query.keys", "query.shares", "train", "query.unmask")}


def test_numbers_beyond_the_bound_are_cut_off() -> None:
    running = masked(Masked("a", 1.0), Masked("b", 1.0), Masked("c", 1e6))
    running.run()
    assert running.recorder.completed[0][1] == pytest.approx((1 + 1 + BOUND) / 3)


def test_who_drops_out_is_named_and_the_sum_is_that_of_the_others() -> None:
    steps = {1: "query.keys", 2: "query.shares", 3: "train", 4: "query.unmask"}
    sites = [Masked(f"site-{n}", n / 2) for n in range(6)] + [Masked("leaver", 3.5, steps)]
    running = masked(*sites, num_server_rounds=4)
    running.run()
    assert running.recorder.completed[2][1] == pytest.approx(3 * 1.25)
    assert running.recorder.completed[3][1] == pytest.approx(3 * 1.25 + (7.5 + 3.5) / 7, abs=1e-6)
    assert [(f.round, f.site, f.why) for f in running.nodes.failures] == [(n, "leaver", "gone") for n in (1, 2, 3, 4)]


def test_a_round_of_which_too_few_stay_is_repeated_with_new_keys_and_ends_in_words() -> None:
    gone = [Masked(f"gone-{n}", 1.0, {2: "query.unmask"}) for n in range(3)]
    running = masked(Masked("a"), Masked("b"), *gone)
    with pytest.raises(UserError, match="round 2: usable answers: 0, min-sites = 3 are needed"):
        running.run()
    said = [line for line in running.said if "no sum can be made" in line]
    assert said == ["round 2: no sum can be made: 2 members revealed their piece of 000000, expected 3"] * 3
    assert [value for _, value in running.recorder.completed] == [1.0]


def test_fewer_than_three_sites_are_not_enough() -> None:
    with pytest.raises(UserError, match="2, min-sites = 3 are needed"):
        masked(Masked("a"), Masked("b")).run()


@pytest.mark.parametrize("way", ["nothing", "more", "wrong types", "huge", "texts", "short lists", "another's letters"])
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
                elif way == "huge":
                    changed["public" if "public" in changed else "seed" if "seed" in changed else key] = 2**62
                elif way == "texts":
                    value = changed[key]
                    changed[key] = value.hex() if isinstance(value, bytes) else ["x" * len(one) for one in value]
                elif way == "short lists":
                    changed[key] = changed[key][:-1]
                else:
                    changed[next(iter(changed))] = b"" if step == "query.keys" else ["x"] * len(changed[key])
                reply = Message(RecordDict({name: ConfigRecord(changed)}), reply_to=message)
            return reply

    running = masked(*(Masked(f"site-{n}") for n in range(4)), Garbage("garbage"), num_server_rounds=1)
    running.run()
    assert running.recorder.completed == [(1, 1.0)]
    assert {f.site for f in running.nodes.failures} == {"garbage"}
    assert all("\n" not in f.why for f in running.nodes.failures)


class Hostile(Masked):
    """Spoils a step of every round."""

    way = ""

    def __call__(self, message: Message) -> Message | None:
        reply = super().__call__(message)
        if not reply or message.metadata.message_type != self.way.partition(" ")[0]:
            return reply
        record = dict(next(iter(reply.content.config_records.values()), {}))
        changed: dict[str, Any] = {**record}
        if self.way == "query.keys twice":
            changed["public"] = record["public"][:49] * 2  # type: ignore[index]
        elif self.way == "query.shares junk":
            changed["letters"] = [os.urandom(200) for _ in record["letters"]]  # type: ignore[union-attr]
        elif self.way == "query.shares false":
            changed["seed"] = os.urandom(32)
        elif self.way == "query.shares digests":
            changed["digests"] = [os.urandom(64) for _ in record["digests"]]  # type: ignore[union-attr]
        elif self.way == "query.unmask pieces":
            changed["pieces"] = [p[:4] + os.urandom(16) + p[20:] for p in record["pieces"]]  # type: ignore
        name = next(iter(reply.content))
        return Message(RecordDict({name: ConfigRecord(changed)}), reply_to=message)


def spoilt(way: str, rounds: int = 2) -> Running:
    hostile = Hostile("hostile", 9.0)
    hostile.way = way
    running = masked(*(Masked(f"site-{n}") for n in range(4)), hostile, num_server_rounds=rounds)
    running.run()
    assert [number for number, _ in running.recorder.completed] == [1, 2]
    return running


@pytest.mark.parametrize("way", ["query.keys twice", "query.unmask pieces"])
def test_who_spoils_a_step_is_named_and_alone(way: str) -> None:
    running = spoilt(way)
    assert {f.site for f in running.nodes.failures} == {"hostile"}
    assert not [line for line in running.said if "repeated" in line]
    honest, all_five = 1.0, (4 + BOUND) / 5
    step = honest if way == "query.keys twice" else all_five  # its update had come by then
    assert running.recorder.completed[-1][1] == pytest.approx(2 * step)


@pytest.mark.parametrize("way", ["query.shares junk", "query.shares digests"])
def test_who_sends_letters_that_nobody_can_open_is_asked_no_more(way: str) -> None:
    """The others say whose they are: the round is repeated without it."""
    running = spoilt(way)
    assert running.recorder.completed == [(1, 1.0), (2, 2.0)]
    assert sum("repeated" in line for line in running.said) == 1
    whys = [f.why for f in running.nodes.failures if f.site != "hostile"]
    assert whys == ["it can't open the letter from hostile"] * 4
    trained = [node for node, kind in running.grid.asked if kind == "query.keys"]
    assert trained.count(7) == 1  # hostile's node


def test_who_shares_no_secret_of_its_own_is_asked_no_more() -> None:
    running = spoilt("query.shares false")
    assert running.recorder.completed == [(1, 1.0), (2, 2.0)]
    assert sum("no sum can be made: the pieces from" in line for line in running.said) == 1


def blaming(sender: str, *sites: Masked) -> Running:
    """The last of these sites says in each round that it can't open the letter from that number."""
    *others, liar = sites

    def answer(message: Message) -> Message | None:
        if message.metadata.message_type == MessageType.TRAIN:
            return Message(Error(records.BLAMES, sender), reply_to=message)
        return liar(message)

    return Running(dict(enumerate([*others, answer], 3)), secure_aggregation=True)


@pytest.mark.parametrize("sender", ["000000", "000001", "000003", "999999", "a\nb"])
def test_a_single_one_that_blames_others_is_left_out_alone(sender: str) -> None:
    running = blaming(sender, *(Masked(f"site-{n}") for n in range(4)))
    running.run()
    assert running.recorder.completed == [(1, 1.0), (2, 2.0), (3, 3.0)]
    assert {f.site for f in running.nodes.failures} == {"site-3"}
    assert not running.nodes.distrusted


def test_a_site_that_blames_what_it_never_got_is_not_believed() -> None:
    """One that only evaluates."""
    west = Site("west", role="holdout", train=0, validation=0)

    def answer(message: Message) -> Message | None:
        if message.metadata.message_type == MessageType.EVALUATE:
            reply = Message(Error(records.BLAMES, "000000"), reply_to=message)
            reply.metadata.__dict__["_message_type"] = MessageType.TRAIN
            return reply
        return west(message)

    sites: dict[int, Answer] = {n: Masked(f"site-{n}") for n in range(3)}
    running = Running({**sites, 9: answer}, secure_aggregation=True)
    running.run()
    assert running.recorder.completed == [(1, 1.0), (2, 2.0), (3, 3.0)]
    assert not running.nodes.blames


def test_a_site_that_evaluates_does_not_train_because_it_says_so() -> None:
    west = Site("west", role="holdout", train=0, validation=0)

    def answer(message: Message) -> Message | None:
        reply = west(message)
        if reply and message.metadata.message_type == MessageType.EVALUATE:
            reply.metadata.__dict__["_message_type"] = MessageType.TRAIN
        return reply

    sites: dict[int, Answer] = {n: Masked(f"site-{n}") for n in range(3)}
    running = Running({**sites, 9: answer}, secure_aggregation=True)
    outcome = running.run()
    assert running.recorder.completed == [(1, 1.0), (2, 2.0), (3, 3.0)]
    assert set(outcome.adapted.holdouts) == {"west"}


def test_those_that_failed_are_left_out_of_the_next_attempt() -> None:
    """Four of seven are silent where it hurts most: nothing can be unmasked until they are not asked."""
    silent = [Masked(f"gone-{n}", 1.0, dict.fromkeys((1, 2, 3), "train")) for n in range(4)]
    running = masked(*(Masked(f"site-{n}", 2.0) for n in range(3)), *silent)
    running.run()
    assert running.recorder.completed == [(1, 2.0), (2, 4.0), (3, 6.0)]


def test_of_too_few_updates_nothing_is_unmasked() -> None:
    """A sum that is thrown away, less the next one, would be a single update."""
    gone = Masked("gone", 1.0, {2: "train"})
    running = masked(*(Masked(f"site-{n}") for n in range(3)), gone, min_sites=4, num_server_rounds=2)
    with pytest.raises(UserError, match="round 2: usable answers: 0, min-sites = 4 are needed"):
        running.run()
    assert [kind for _, kind in running.grid.asked].count("query.unmask") == 4  # of round 1
    assert "round 2: no sum can be made: 3 updates arrived, expected 4: nothing is unmasked" in running.said


def test_noise_of_a_sites_own_has_room_below_the_bound() -> None:
    assert bound_of(Settings()) == BOUND == 4.0
    assert bound_of(Settings(dp="local", noise_multiplier=30.0)) == 0.5 * 241


def test_members_are_numbered_anew_in_each_attempt() -> None:
    sites = [Masked(f"site-{n}") for n in range(8)]
    numbers = []

    def listening(site: Masked) -> Answer:
        def answer(message: Message) -> Message | None:
            reply = site(message)
            if message.metadata.message_type == "query.keys":
                numbers.append((site.hello.site, str(site.memory[site_end.MEMORY]["name"])))
            return reply

        return answer

    Running({n: listening(site) for n, site in enumerate(sites)}, secure_aggregation=True, num_server_rounds=4).run()
    rounds = {tuple(sorted(numbers[8 * n : 8 * n + 8])) for n in range(4)}
    assert len(rounds) > 1  # in one of 40,320³ runs they are the same


# Privacy


@needs("privacy")
def test_the_privacy_spent_is_reported_with_each_round_and_grows() -> None:
    running = Running(honest(3), dp="central", noise_multiplier=2.0)
    outcome = running.run()
    spent = [line.epsilon for line in running.recorder.results]
    assert spent[0] == 0.0
    assert spent[1:] == pytest.approx([exact(2.0, rounds, 1e-5) for rounds in (1, 2, 3)])
    assert outcome.epsilon == spent[-1]
    assert Running(honest(3)).run().epsilon is None


@needs("privacy")
def test_noise_is_central_in_a_masked_sum_too() -> None:
    values = []
    for _ in range(2):
        running = masked(*(Masked(f"site-{n}", 0.1) for n in range(3)), dp="central", noise_multiplier=30.0)
        running.run()
        values.append(running.recorder.completed[-1][1])
    assert values[0] != values[1]
    assert max(abs(value - 0.3) for value in values) > 0.1  # of deviation 5 · √3


@needs("privacy")
def test_a_round_in_which_a_site_does_not_train_costs_it_nothing() -> None:
    running = Running(honest(4), dp="central", noise_multiplier=2.0, fraction_train=0.5, num_server_rounds=6, seed=1)
    running.run()
    most = max(running.nodes.trained.values())
    assert sum(running.nodes.trained.values()) == 2 * 6
    assert most < 6
    spent = {line.epsilon for line in running.recorder.results}
    assert len(spent) == most + 1


@needs("privacy")
def test_a_resumed_run_keeps_counting(tmp_path: Path) -> None:
    def federation() -> Running:
        return Running(honest(3), dp="central", noise_multiplier=2.0)

    again, outcome = interrupted(federation, tmp_path / "checkpoint", 2)
    assert outcome.epsilon == pytest.approx(exact(2.0, 3, 1e-5))
    read = checkpoint.read(tmp_path / "checkpoint")
    assert read
    assert read.state.epsilon == pytest.approx(exact(2.0, 2, 1e-5))
    assert again.nodes.trained == {"site-1": 3, "site-2": 3, "site-3": 3}


@needs("privacy")
def test_what_was_under_way_when_a_run_was_stopped_counts_where_it_has_been_seen(tmp_path: Path) -> None:
    again, _ = interrupted(lambda: Running(honest(3), dp="local", noise_multiplier=8.0), tmp_path / "checkpoint", 2)
    assert again.nodes.trained == {"site-1": 6, "site-2": 6, "site-3": 6}  # two, up to three attempts more, and one
    done = [number for number, _ in again.recorder.completed]
    assert done == [2, 3]  # the three are on disk before the next is asked


@needs("privacy")
def test_under_secure_aggregation_each_site_may_have_spoiled_one_more_attempt(tmp_path: Path) -> None:
    kept: dict[str, Any] = {"dp": "local", "noise_multiplier": 8.0}
    first = Running(honest(3), **kept)
    first.run()
    state = RunState(1, START, START)
    again = Running(honest(3), **kept, secure_aggregation=True)
    again.nodes.trained.update(first.nodes.trained)
    loop = RoundLoop(again.nodes, again.strategy, again.settings, START, lambda *_: {}, again.recorder, state)
    loop._begin()
    assert again.nodes.trained == dict.fromkeys(first.nodes.trained, 3 + 3 + 3)


@needs("privacy")
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
