"""The loop over rounds, on a grid in memory whose sites do as they are told. Real grids: tests/test_running.py."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any
from uuid import uuid4

import pytest
import torch
from flwr.app import ConfigRecord, Error, Message, MessageType, RecordDict
from flwr.common.typing import Run
from flwr.serverapp import Grid

from fedclip_flwr.base.errors import UserError
from fedclip_flwr.base.settings import Settings
from fedclip_flwr.base.tensors import State
from fedclip_flwr.data.vocabulary import Vocabulary
from fedclip_flwr.exchange import records
from fedclip_flwr.exchange.link import Downlink, SiteCache, StatesOnDisk, forget
from fedclip_flwr.exchange.records import LACKS, Hello, LacksError, Progress, Report
from fedclip_flwr.exchange.session import Session
from fedclip_flwr.learning.metrics import BINS, Quality, Score, mean_accuracy
from fedclip_flwr.server import nodes, waiting
from fedclip_flwr.server.loop import RoundLoop
from fedclip_flwr.server.nodes import Nodes
from fedclip_flwr.server.results import Outcome, RoundResult, RunState
from fedclip_flwr.server.strategy import AdapterFedAvg

START = {"w": torch.zeros(1)}
SESSION = Session("x", Vocabulary(("yes", "no"), ("a {}",)), "m", "run-7")
Answer = Callable[[Message], Message | None]


class FakeGrid(Grid):
    """Nodes answer as soon as they are asked; None is no answer."""

    def __init__(self, nodes: dict[int, Answer]) -> None:
        self.nodes = nodes
        self.asked: list[tuple[int, str]] = []
        self._replies: dict[str, Message] = {}

    def get_node_ids(self) -> Iterable[int]:
        return list(self.nodes)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        messages = list(messages)
        for message in messages:
            message.metadata.__dict__["_message_id"] = str(uuid4())
            self.asked.append((message.metadata.dst_node_id, message.metadata.message_type))
            if reply := self.nodes[message.metadata.dst_node_id](message):
                self._replies[message.metadata.message_id] = reply
        return [message.metadata.message_id for message in messages]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return [self._replies.pop(i) for i in list(message_ids) if i in self._replies]

    def late(self, reply: Message) -> None:
        """An answer that comes when nobody waits for it."""
        self._replies[reply.metadata.reply_to_message_id] = reply

    @property
    def unasked(self) -> int:
        """How many answers nobody has asked for."""
        return len(self._replies)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        raise AssertionError("not used")

    def set_run(self, run: Run) -> None:
        raise AssertionError("not used")

    @property
    def run(self) -> Run:
        raise AssertionError("not used")

    def create_message(self, *_: Any, **__: Any) -> Message:
        raise AssertionError("not used")


def quality(correct: int, examples: int = 10) -> Quality:
    return Quality(Score(examples, correct, 5.0), 0.5, 0.5, [0.0] * BINS)


class Site:
    """Adds `step` to the adapter when it trains; its validation figures are tables by the adapter's value."""

    codec = "float32"
    keeps = ""

    def __init__(
        self,
        name: str,
        step: float = 1.0,
        correct: dict[float, int] | None = None,
        loss: dict[float, float] | None = None,
        **hello: Any,
    ) -> None:
        self.hello = Hello(**{**HELLO, "site": name, **hello})
        self.step, self.correct, self.loss = step, correct or {}, loss or {}
        self.trained_in: list[int] = []
        self.own: list[tuple[int, float]] = []

    def __call__(self, message: Message) -> Message | None:
        task = records.read_task(message.content)
        if message.metadata.message_type == MessageType.QUERY:
            return Message(records.write_hello(self.hello), reply_to=message)
        cache = SiteCache(StatesOnDisk(self.keeps or self.hello.site), self.codec)
        state = cache.take(task, START, lambda: START)
        value = float(state["w"]) * (1.0 if task.blend is None else task.blend)
        if task.personal:
            self.own.append((task.round, value))
            value += 0.5 + self.step
        score = Score(10, self.correct.get(value, 5), self.loss.get(value, 5.0))
        report = Report(6, score, quality(min(int(value), 10)))
        if message.metadata.message_type == MessageType.EVALUATE:
            return Message(records.write_answer(report), reply_to=message)
        self.trained_in.append(task.round)
        trained = cache.pack({"w": state["w"] + self.step}, self.hello.site, task.round, 0)
        return Message(records.write_answer(report, trained), reply_to=message)


HELLO: dict[str, Any] = {
    "role": "train",
    "domain": "d",
    "train": 6,
    "validation": 10,
    "test": 10,
    "classes": [0, 1],
    "package": "same",
    "plugins": ["mine 1 ab"],
}


class Told:
    """A watcher that keeps what it is told."""

    def __init__(self) -> None:
        self.results: list[RoundResult] = []
        self.best: list[int] = []
        self.completed: list[tuple[int, float]] = []

    def on_result(self, result: RoundResult) -> None:
        self.results.append(result)

    def on_selected(self, number: int, state: State, blend: float) -> None:
        self.best.append(number)
        self.adapter = state
        self.blend = blend

    def on_complete(self, state: RunState) -> None:
        self.completed.append((state.round, float(state.state["w"])))


class Running:
    """A federation over these nodes, and all that it said."""

    def __init__(self, nodes: dict[int, Answer], **settings: Any) -> None:
        self.settings = Settings(**{"num_server_rounds": 3, "round_timeout": 0.2, **settings})
        self.grid, self.said, self.told = FakeGrid(nodes), list[str](), Told()
        self.nodes = Nodes(
            self.grid,
            Downlink(START, self.settings.codec, 0),
            session=SESSION,
            package="same",
            plugins=["mine 1 ab"],
            timeout=self.settings.round_timeout,
            say=self.said.append,
        )

        self.strategy = AdapterFedAvg(START, self.nodes.names, self.settings, classes=2)

    def run(self, start: State = START) -> Outcome:
        self.nodes.wait_for(self.settings.min_sites)
        return self.resume(start)

    def resume(self, start: State = START, state: RunState | None = None) -> Outcome:
        unseen = lambda state, blend: {"sea": quality(int(state["w"] * blend), 100)}  # noqa: E731
        return RoundLoop(self.nodes, self.strategy, self.settings, start, unseen, self.told, state).run()


def test_the_more_messages_are_under_way_the_seldomer_flower_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    wait = waiting.Wait(timeout=60.0)
    for under_way in (1, 40, 1000, 100_000):
        wait.answered()
        wait.pause(under_way)
    assert pauses == [0.01, 0.01, 0.25, 25.0]


def test_three_rounds_by_hand() -> None:
    north, south = Site("north", 1.0, {0.0: 1, 2.0: 9, 4.0: 7}), Site("south", 3.0, {0.0: 3, 2.0: 6, 4.0: 8})
    running = Running({5: south, 9: north})
    outcome = running.run()
    # each round adds the mean of 1 and 3
    assert running.told.completed == [(1, 2.0), (2, 4.0), (3, 6.0)]
    assert [line.round for line in running.told.results] == [0, 1, 2, 3]
    assert [line.validation for line in running.told.results] == [0.2, 0.75, 0.75, 0.5]
    assert [line.seen for line in running.told.results] == [0.0, 0.2, 0.4, 0.6]
    assert [line.unseen["sea"].accuracy for line in running.told.results] == [0.0, 0.02, 0.04, 0.06]
    assert [line.loss for line in running.told.results] == [0.5] * 4
    assert running.told.results[0].bytes > 0  # of the hellos
    assert running.told.best == [0, 1]  # the earliest of the two best
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


class Packing(Site):
    """A site of a run with the codec int8; it loses what it keeps in the rounds `forgets_in`."""

    codec = "int8"
    forgets_in: tuple[int, ...] = ()

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.bases: list[str] = []

    def __call__(self, message: Message) -> Message | None:
        task = records.read_task(message.content)
        if message.metadata.message_type != MessageType.QUERY:
            self.bases.append(task.base)
        if task.round in self.forgets_in and task.base:
            forget(self.hello.site)
        try:
            return super().__call__(message)
        except LacksError as error:
            return Message(Error(LACKS, str(error)), reply_to=message)


def test_a_blend_is_chosen_by_validation_after_the_last_round() -> None:
    north = Site("north", 2.0, {4.0: 9, 3.0: 8, 2.0: 7, 1.0: 9})
    south = Site("south", 2.0, {4.0: 7, 3.0: 8, 2.0: 6, 1.0: 5})
    running = Running({5: north, 9: south}, blend="auto", personalize=True)
    outcome = running.run()
    assert (outcome.adapted.round, outcome.blend) == (2, 0.75)  # of the adapter 4.0, 3.0 is as good and 1.0 is not
    assert [report.test.accuracy for report in outcome.adapted.reports.values()] == [0.3, 0.3]
    assert outcome.adapted.unseen["sea"].accuracy == 0.03
    assert (running.told.best[-1], running.told.blend) == (2, 0.75)
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
    assert running.told.best == [0, 1, 2]  # the start is what there is until then


def test_where_the_start_is_only_next_to_zero_shot_that_is_asked_for() -> None:
    """A start of 2, of which nothing is left with a blend of 0."""
    running = Running({5: Site("north"), 9: Site("south")}, recipe="paper")
    outcome = running.run({"w": torch.full((1,), 2.0)})
    assert running.told.results[0].seen == 0.2
    assert outcome.zero_shot.seen == 0.0
    assert outcome.zero_shot.unseen["sea"].accuracy == 0.0
    whole = Running({5: Site("north")}, recipe="paper", method="full-model").run({"w": torch.full((1,), 2.0)})
    assert whole.zero_shot.seen == 0.2


def test_bytes_are_counted_there_and_back_and_a_line_tells_those_of_its_round() -> None:
    running = Running({5: Site("north"), 9: Site("south")})
    running.run()
    traffic = running.nodes.traffic
    assert traffic.down > 0 < traffic.up
    counted = sum(line.bytes for line in running.told.results)
    assert running.told.results[0].bytes < running.told.results[1].bytes == running.told.results[2].bytes
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
    assert [len(line.reports) for line in running.told.results] == [1, 2, 2, 2]
    assert set(outcome.zero_shot.reports) == {"early", "late"}
    assert outcome.zero_shot.reports["late"].test.accuracy == 0.0


def test_rounds_are_compared_at_the_sites_that_tried_both() -> None:
    """North, where all was right from the beginning, goes after round 1; at south round 2 is best, round 3 worse."""
    north, south = Site("north", 1.0, {0.0: 10}), Site("south", 1.0, {0.0: 5, 1.0: 6, 2.0: 7, 3.0: 6})
    running = Running({9: south})

    def leaves(message: Message) -> Message | None:
        reply = north(message)
        if message.metadata.message_type == MessageType.TRAIN:
            del running.grid.nodes[5]
        return reply

    running.grid.nodes[5] = leaves
    outcome = running.run()
    assert [line.validation for line in running.told.results] == [0.75, 0.6, 0.7, 0.6]
    assert outcome.adapted.round == 2
    assert running.told.best == [0, 1, 2]


def test_a_site_with_other_code_is_refused_by_name_and_never_asked_again() -> None:
    stale = Site("stale", package="older")
    running = Running({5: Site("north"), 9: stale})
    running.run()
    assert [kind for node, kind in running.grid.asked if node == 9] == ["query"]
    (failure,) = running.nodes.failures
    assert failure.round == 0
    assert failure.site.startswith("stale")
    assert "install the same version" in failure.why
    assert len([line for line in running.said if "stale" in line]) == 1


def test_a_site_may_come_back_as_another_node() -> None:
    """As one without a node key does when it is started again."""
    before, after = Site("south"), Site("south")
    running = Running({5: Site("north"), 9: before})

    def restarts(message: Message) -> Message | None:
        reply = before(message)
        if message.metadata.message_type == MessageType.TRAIN:
            del running.grid.nodes[9]
            running.grid.nodes[7] = after
        return reply

    running.grid.nodes[9] = restarts
    outcome = running.run()
    assert (before.trained_in, after.trained_in) == ([1], [2, 3])
    assert set(outcome.adapted.reports) == {"north", "south"}
    assert not running.nodes.failures


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
    assert running.told.completed == [(1, 1.0), (2, 2.0), (3, 3.0)]
    assert [line for line in running.said if "the round is repeated" in line] == [
        "round 2: usable answers: 0, min-sites = 1 are needed; the round is repeated"
    ]


def test_a_run_in_which_nobody_can_be_asked_to_train_any_more_ends_in_words() -> None:
    running = only_trainer_leaves(returns=False)
    with pytest.raises(UserError, match=r"round 2: .*: 0, min-sites = 1 are needed; it was tried 3 times"):
        running.run()


def test_a_site_that_was_mended_is_taken_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nodes, "RETRY_AFTER", 0.0)
    mended = Site("mended")

    def mending(message: Message) -> Message | None:
        if running.told.completed:
            return mended(message)
        return Message(Error(2, "there is no such folder"), reply_to=message)

    running = Running({5: Site("north"), 9: mending})
    running.run()
    assert mended.trained_in == [2, 3]
    assert {(f.site, f.why) for f in running.nodes.failures} == {("node 9", "there is no such folder")}
    assert len([line for line in running.said if "node 9" in line]) == 1


@pytest.mark.parametrize(
    ("other", "told"),
    [
        (Site("north"), "its name is taken by another site"),
        (Site("b", package="other"), "its code differs from the server's (package other, here same)"),
        (
            Site("b", plugins=["mine 2 ff"]),
            "its plug-ins differ (mine 2 ff, here mine 1 ab): install the same versions",
        ),
        (Site("b", plugins=[]), "its plug-ins differ (none, here mine 1 ab)"),
        (Site("south", classes=[0, 2]), "classes outside the 2"),
        (Site("south", train=0, validation=0, test=0), "it has no readable image"),
        (lambda m: Message(Error(2, "no such\nfolder"), reply_to=m), "no such folder"),
        (lambda m: Message(RecordDict(), reply_to=m), "malformed hello"),
        (Site("south", role="chief"), "invalid role: chief"),
        (Site("south", role="holdout"), "invalid role: holdout"),  # with images to train on
        (lambda m: Message(records.write_progress(Progress("south", -1, 5)), reply_to=m), "invalid counts"),
        (lambda m: Message(records.write_progress(Progress("south", 6, 5)), reply_to=m), "6 of 5 images"),
        (lambda m: Message(RecordDict({"progress": ConfigRecord()}), reply_to=m), "malformed progress"),
    ],
)
def test_a_hello_that_will_not_do_is_named_and_the_others_go_on(other: Answer, told: str) -> None:
    running = Running({5: Site("north"), 9: other})
    running.run()
    assert [told in failure.why for failure in running.nodes.failures] == [True]
    assert running.told.results[-1].round == 3


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
    assert running.told.completed == [(1, 1.0), (2, 3.0), (3, 5.0)]
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
    assert running.told.completed == [(1, 1.0), (2, 2.0), (3, 3.0)]
    assert {f.why for f in running.nodes.failures} == {"it answered in another node's name"}


def test_too_few_sites_end_the_run_in_words() -> None:
    with pytest.raises(UserError, match=r": 1, min-sites = 2"):
        Running({5: Site("north")}, min_sites=2).run()


def test_simulated_sites_are_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nodes, "simulated", lambda grid: True)
    with pytest.raises(UserError, match=r"after 0 s: 1, min-sites = 2 are needed: simulate more"):
        Running({5: Site("north")}, min_sites=2, round_timeout=600.0).run()


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
    assert not running.told.completed
    assert [line for line in running.said if "the round is repeated" in line] == [
        "round 1: usable answers: 1, min-sites = 2 are needed; the round is repeated"
    ] * 2


@pytest.mark.parametrize("settings", [{}, {"strategy": "fedadam"}, {"codec": "int8"}], ids=str)
def test_a_repeated_round_comes_to_what_it_would_have_come_to(settings: dict[str, Any]) -> None:
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
    assert plain.told.completed == repeated.told.completed
    assert [(f.round, f.site, f.why) for f in repeated.nodes.failures] == [(2, "south-True", "out of memory")]


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
    assert running.told.best == [0, 1, 2, 3]
    assert Running({5: Site("north", 1.0, correct, loss)}, **how, recipe="paper").run().adapted.round == 1


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
    assert running.told.completed == [(1, 1.0), (2, 2.0), (3, 3.0)]
    assert {(f.site, f.why) for f in running.nodes.failures} == {("south", "no answer within 0.2 s")}
    assert running.grid.unasked == 0


def test_when_all_sites_are_gone_the_run_ends_in_words_and_does_not_hang() -> None:
    north = Site("north")
    running = Running({5: north})

    def leaves(message: Message) -> Message | None:
        reply = north(message)
        if message.metadata.message_type == MessageType.TRAIN:
            del running.grid.nodes[5]
        return reply

    running.grid.nodes[5] = leaves
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
    assert [len(line.reports) for line in running.told.results] == [4] * 4
    assert [line.validation for line in running.told.results] == pytest.approx([0.15, 0.25, 0.5, 0.5])
    assert sum(len(site.trained_in) for site in sites.values()) == 2 * 3
    assert len(outcome.zero_shot.reports) == len(outcome.adapted.reports) == 4
    kinds = [kind for _, kind in running.grid.asked]
    assert (kinds.count("train"), kinds.count("evaluate")) == (2 * 3, 2 * 3 + 4)


def test_a_site_without_training_images_only_evaluates() -> None:
    poor = Site("poor", 100.0, train=0)
    running = Running({5: Site("north"), 9: poor}, fraction_train=0.5)
    running.run()
    assert running.told.completed == [(1, 1.0), (2, 2.0), (3, 3.0)]
    assert not poor.trained_in
    assert [len(line.reports) for line in running.told.results] == [2] * 4


def test_a_holdout_site_evaluates_and_is_unseen() -> None:
    """At it 20, 40 and 60 % are right after rounds 1, 2 and 3, at the server 2, 4 and 6 %."""
    west = Site("west", 100.0, {0.0: 10}, role="holdout", train=0, validation=0)
    running = Running({5: Site("north", 2.0), 9: west}, personalize=True, site_weights="examples")
    outcome = running.run()
    assert running.told.completed == [(1, 2.0), (2, 4.0), (3, 6.0)]
    assert not west.trained_in
    assert not west.own
    assert [set(line.reports) for line in running.told.results] == [{"north"}] * 4
    assert [mean_accuracy(line.held_out) for line in running.told.results] == pytest.approx([0.0, 0.11, 0.22, 0.33])
    assert [line.validation for line in running.told.results] == [0.5] * 4
    assert set(outcome.adapted.holdouts) == set(outcome.zero_shot.holdouts) == {"west"}
    assert set(outcome.personal) == {"north"}


def test_holdout_sites_do_not_count_among_those_that_are_needed() -> None:
    west = Site("west", role="holdout", train=0, validation=0)
    with pytest.raises(UserError, match=r": 1, min-sites = 2"):
        Running({5: Site("north"), 9: west}, min_sites=2).run()


def test_sites_that_encode_are_asked_again_and_waited_for_as_long_as_they_get_on() -> None:
    """The slow site needs 40 questions, more than fit into the time that a site without progress is given."""
    north, slow = Site("north"), Site("slow")
    quick, clock = Site("quick"), time.monotonic()

    def encoding(site: Site, slices: int, images: int) -> Answer:
        asked = 0

        def answer(message: Message) -> Message | None:
            nonlocal asked
            if message.metadata.message_type == MessageType.QUERY and asked < slices:
                asked += 1
                return Message(
                    records.write_progress(Progress(site.hello.site, images * asked, 1000)), reply_to=message
                )
            return site(message)

        return answer

    running = Running({5: north, 7: encoding(quick, 1, 900), 9: encoding(slow, 40, 10)}, round_timeout=0.05)
    running.run()
    assert time.monotonic() - clock > 0.05
    assert slow.trained_in == quick.trained_in == [1, 2, 3]
    assert not running.nodes.failures


def test_a_site_that_does_not_get_on_with_encoding_is_not_waited_for() -> None:
    def stuck(message: Message) -> Message | None:
        return Message(records.write_progress(Progress("stuck", 7, 400)), reply_to=message)

    running = Running({5: Site("north"), 9: stuck})
    running.run()
    assert set(running.nodes.hellos) == {"north"}
    assert "stuck: 7 of 400 images encoded" in running.nodes.readiness


class Clock:
    """Stands for the module `time`: it goes on only while somebody sleeps, and what is due then happens."""

    def __init__(self) -> None:
        self.now = 0.0
        self._due: list[tuple[float, Callable[[], None]]] = []

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        while self._due and min(self._due)[0] <= self.now:
            self._due.pop(self._due.index(min(self._due)))[1]()

    def later(self, seconds: float, do: Callable[[], None]) -> None:
        self._due.append((self.now + seconds, do))


def answering_after(running: Running, clock: Clock, seconds: float, answer: Answer) -> Answer:
    """A node that takes so many seconds to answer."""

    def slow(message: Message) -> Message | None:
        if reply := answer(message):
            clock.later(seconds, lambda: running.grid.late(reply))
        return None

    return slow


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    for module in (nodes, waiting):
        monkeypatch.setattr(module, "time", clock)
    return clock


def test_a_node_that_does_not_answer_its_hello_holds_up_the_start_no_longer_than_a_working_site_would(
    clock: Clock,
) -> None:
    """A site that encodes answers after a minute; another minute is given to it for its start."""
    running = Running({5: Site("north"), 7: lambda _: None, 9: lambda _: None}, round_timeout=600.0)
    running.nodes.wait_for(1)
    assert 120 <= clock.now < 125
    assert running.said[-1] == (
        "continuing without node 7, node 9: no answer to the hello so far; a site that answers joins from the next "
        "round on"
    )
    assert not running.nodes.failures


def test_a_node_that_answers_its_hello_after_the_start_takes_part(clock: Clock) -> None:
    late = Site("late")
    running = Running({5: Site("north")}, round_timeout=600.0)
    running.grid.nodes[9] = answering_after(running, clock, 130.0, late)
    running.nodes.wait_for(1)
    assert set(running.nodes.hellos) == {"north"}
    running.grid.nodes[9] = late
    clock.sleep(10.0)
    running.resume()
    assert late.trained_in == [1, 2, 3]


def test_a_node_that_does_not_answer_is_waited_for_where_sites_are_missing(clock: Clock) -> None:
    running = Running({5: Site("north"), 9: lambda _: None}, round_timeout=600.0, min_sites=2)
    with pytest.raises(UserError, match=r"after 60\d s: 1, min-sites = 2"):
        running.nodes.wait_for(2)


def test_a_node_that_does_not_answer_is_waited_for_where_it_may_be_a_site_of_before(clock: Clock) -> None:
    running = Running({5: Site("north")}, round_timeout=600.0)
    running.grid.nodes[9] = answering_after(running, clock, 500.0, Site("south"))
    running.nodes.wait_for(1, expected=["north", "south"])
    assert set(running.nodes.hellos) == {"north", "south"}
    assert not [line for line in running.said if "continuing without" in line]


def test_a_site_that_tells_its_progress_after_each_slice_is_waited_for(clock: Clock) -> None:
    """Six slices of a minute, each told some seconds late."""
    site, told = Site("slow"), list[int]()

    def encoding(message: Message) -> Message | None:
        if message.metadata.message_type == MessageType.QUERY and len(told) < 6:
            told.append(len(told))
            return Message(records.write_progress(Progress("slow", 10 * len(told), 100)), reply_to=message)
        return site(message)

    running = Running({5: Site("north")}, round_timeout=600.0)
    running.grid.nodes[9] = answering_after(running, clock, 70.0, encoding)
    running.nodes.wait_for(1)
    assert set(running.nodes.hellos) == {"north", "slow"}


def test_a_simulated_site_is_waited_for_till_the_timeout(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nodes, "simulated", lambda grid: True)
    running = Running({5: Site("north")}, round_timeout=600.0)
    running.grid.nodes[9] = answering_after(running, clock, 500.0, Site("south"))
    running.nodes.wait_for(1)
    assert set(running.nodes.hellos) == {"north", "south"}


def test_a_hello_tells_what_the_run_is_about_and_later_messages_only_the_key() -> None:
    told: list[records.Task] = []

    def listening(message: Message) -> Message | None:
        told.append(records.read_task(message.content))
        return Site("north")(message)

    Running({5: listening}).run()
    assert told[0].session == SESSION
    assert {(task.session, task.key) for task in told[1:]} == {(None, SESSION.key)}


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


def test_bytes_a_site_and_round_are_those_of_the_rounds() -> None:
    running = Running({5: Site("north"), 9: Site("south")})
    outcome = running.run()
    assert outcome.site_round_bytes == sum(line.bytes for line in running.told.results[1:]) / (2 * 3)


def test_if_no_site_has_anything_to_train_on_the_run_does_not_begin() -> None:
    running = Running({5: Site("north", train=0)})
    with pytest.raises(UserError, match="no site has an example to learn from"):
        running.run()
    assert {kind for _, kind in running.grid.asked} == {"query"}


def test_a_run_with_a_codec_sends_parcels_there_and_back_and_comes_to_the_same() -> None:
    one = Packing("one")
    plain = Running({5: Site("one"), 9: Site("two", 3.0)})
    packed = Running({5: one, 9: Packing("two", 3.0)}, codec="int8")
    for running in (plain, packed):
        running.run()
    for (number, value), (_, expected) in zip(packed.told.completed, plain.told.completed, strict=True):
        assert value == pytest.approx(expected, abs=1e-5), number
    assert [bool(base) for base in one.bases] == [False, True, True, True]
    assert not packed.nodes.failures


def test_a_site_that_lost_what_it_had_is_sent_the_whole_in_the_same_round() -> None:
    forgetful = Packing("three")
    forgetful.forgets_in = (3,)
    running = Running({5: forgetful, 9: Packing("four")}, codec="int8")
    running.run()
    assert forgetful.trained_in == [1, 2, 3]
    assert running.grid.asked.count((5, "train")) == 4
    assert [value for _, value in running.told.completed] == pytest.approx([1.0, 2.0, 3.0], abs=1e-5)
    assert not running.nodes.failures


def test_a_site_that_can_never_build_on_anything_is_left_out() -> None:
    def lost(message: Message) -> Message | None:
        if message.metadata.message_type == MessageType.QUERY:
            return Site("lost")(message)
        return Message(Error(LACKS, "nothing stays here"), reply_to=message)

    running = Running({5: Packing("five"), 9: lost}, codec="int8")
    running.run()
    assert [(f.round, f.site, f.why) for f in running.nodes.failures] == [
        (number, "lost", "nothing stays here") for number in (1, 2, 3)
    ]


def test_of_blends_that_do_as_well_the_smallest_is_chosen() -> None:
    """The adapter of round 1 is 2.0, and as good as it are three quarters and a half of it."""
    north = Site("north", 2.0, {2.0: 9, 1.5: 9, 1.0: 9, 0.5: 8})
    outcome = Running({5: north}, blend="auto").run()
    assert (outcome.adapted.round, outcome.blend) == (1, 0.5)
