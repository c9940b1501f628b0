"""A federation on a grid in memory: its sites answer at once, as each test wants them to."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any
from uuid import uuid4

import torch
from flwr.app import Error, Message, MessageType
from flwr.serverapp import Grid

from fedclip_flwr.base.settings import Settings
from fedclip_flwr.base.tensors import State
from fedclip_flwr.data.vocabulary import Vocabulary
from fedclip_flwr.exchange import records
from fedclip_flwr.exchange.link import Downlink, SiteCache, StatesOnDisk, forget
from fedclip_flwr.exchange.records import LACKS, Hello, LacksError, Report
from fedclip_flwr.exchange.session import Session
from fedclip_flwr.learning.metrics import BINS, Quality, Score
from fedclip_flwr.server.loop import RoundLoop
from fedclip_flwr.server.nodes import Nodes
from fedclip_flwr.server.results import Outcome, RoundResult, RunState
from fedclip_flwr.server.strategy import AdapterFedAvg

START = {"w": torch.zeros(1)}
SESSION = Session("x", Vocabulary(("yes", "no"), ("a {}",)), "m", "run-7")
Answer = Callable[[Message], Message | None]


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

    def set_run(self, run: Any) -> None:
        raise AssertionError("not used")

    @property
    def run(self) -> Any:
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


class Recorder:
    """A watcher that keeps each call."""

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
        self.grid, self.said, self.recorder = FakeGrid(nodes), list[str](), Recorder()
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

    def add_leaving(self, node: int, site: Answer) -> None:
        """Connects the site as this node, which is gone once it has answered TRAIN."""

        def leaves(message: Message) -> Message | None:
            reply = site(message)
            if message.metadata.message_type == MessageType.TRAIN:
                del self.grid.nodes[node]
            return reply

        self.grid.nodes[node] = leaves

    def run(self, start: State = START) -> Outcome:
        self.nodes.wait_for(self.settings.min_sites)
        return self.resume(start)

    def resume(self, start: State = START, state: RunState | None = None) -> Outcome:
        unseen = lambda state, blend: {"sea": quality(int(state["w"] * blend), 100)}  # noqa: E731
        return RoundLoop(self.nodes, self.strategy, self.settings, start, unseen, self.recorder, state).run()


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
