"""A long run with many sites at which something goes wrong at random, all the time: does the server stay as it was?

SuperLink and ServerApp are the real ones, in processes of their own. The sites answer with the real ClientApp, but in
one process that speaks for all of them (harness/fleet.py): with a new process for each message, as a SuperNode has
it, 300 rounds of 20 sites would take hours. At random a site answers with an error, with numbers that are none, or with
tensors of another shape; sends its answer twice, too late, or not at all; goes without a word and comes back as another
node. The ServerApp is killed and the run resumed, and the SuperLink is started again. Afterwards, whoever spoilt an
answer has to be named with its round, and nobody else; and from the last start of the processes on, memory and file
handles have to stay flat.
"""

from __future__ import annotations

import os
import random
import threading
import time
import tomllib
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, median
from typing import Any, NamedTuple

import torch
from flwr.app import Context, Error, Message, RecordDict
from flwr.common.constant import ErrorCode
from flwr.proto.message_pb2 import ObjectTree
from flwr.supercore.inflatable.inflatable_object import iterate_object_tree
from flwr.supercore.inflatable.inflatable_protobuf_utils import (
    make_confirm_message_received_fn_protobuf,
    make_pull_object_fn_protobuf,
)
from flwr.supercore.inflatable.inflatable_utils import ObjectUnavailableError, inflate_object_from_contents

from deploy.processes import SuperLink, superlink
from fedclip_flwr.exchange import records
from fedclip_flwr.operations.ports import free_ports
from harness import fleet
from harness.features import write_features
from harness.machine import OURS, memory, processes
from reliability.federation import BrokenError, Run, handed_over, kill, until

SITES, ROUNDS, ROWS = 20, 300, 40
PAUSE = 1.0
"""Seconds after which a site asks again: a SuperNode waits for 3."""
TIMEOUT = 30.0
CallFailed = fleet.speaking.CallFailed
"""The SuperLink is not there, or refuses a call."""
PATIENCE = 5
"""So often a part of a message is asked for that is not there yet. (A SuperNode asks until its run is over.)"""
SPOILT = {"error": 6, "not finite": 6, "another shape": 6, "twice": 8, "late": 0.4, "silent": 0.4, "gone": 1}
"""How often in a thousand answers this is done to one."""
HARMLESS = "twice"
"""With this nothing is lost."""
WARM, LAST = 20, 50
"""Rounds after the last start that are not looked at, and rounds that are compared with as many before."""
GROWTH, HANDLES = 0.05, 3
"""So much more may be used at the end: a share of memory, a number of file handles."""


class Spoilt(NamedTuple):
    """What was done to an answer of a site's in a round."""

    round: int
    site: str
    what: str


class Sample(NamedTuple):
    """What a process has after a round."""

    round: int
    process: int
    memory: int
    handles: int


class Site(fleet.Site):
    """One that answers with the real ClientApp, and at times spoils it."""

    def __init__(self, name: str, stub: Any, public: bytes, soak: Soak) -> None:
        super().__init__(name, stub, public, lambda *_: RecordDict())
        self._soak, self._gone = soak, False
        self._context = Context(0, self._node.node_id, soak.node_config(name), RecordDict(), dict(soak.run_config))

    def live(self) -> Iterator[float]:
        while not self._gone:
            try:
                yield from self._turn()
            except CallFailed:  # the SuperLink is not there, or its run is over
                yield 4 * PAUSE

    def _turn(self) -> Iterator[float]:
        came = self.poll()
        if not came.messages_list:
            yield PAUSE
            return
        run, tree = came.messages_list[0].metadata.run_id, came.message_object_trees[0]
        question = yield from self._question(run, tree)
        if question is None:
            return
        question.metadata.__dict__["_message_id"] = tree.object_id
        what = self._soak.chance(self._name, question)
        if what == "gone":
            self.leave()
            self._gone = True
            return
        reply = self._soak.answered(question, self._context)
        spoil(reply, what)
        if what == "error":
            reply = Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, "this answer is spoilt"), reply_to=question)
        if what == "late":
            yield TIMEOUT + 2
        if what != "silent":
            with suppress(CallFailed) if what == "late" else ExitStack():
                self._send(reply)
        if what == "twice":
            with suppress(CallFailed):
                self._send(reply)

    def _question(self, run: int, tree: ObjectTree) -> Generator[float, None, Message | None]:
        """The message; none if the ServerApp was killed while it sent it."""
        pull = make_pull_object_fn_protobuf(self._stub.PullObject, self._node, run)
        contents: dict[str, bytes] = {}
        ids, patience = [part.object_id for part in iterate_object_tree(tree)], PATIENCE
        while ids and patience:
            try:
                contents[ids[0]] = pull(ids[0])
                ids.pop(0)
            except ObjectUnavailableError:
                patience -= 1
                yield PAUSE
        if ids:
            return None
        make_confirm_message_received_fn_protobuf(self._stub.ConfirmMessageReceived, self._node, run)(tree.object_id)
        message = inflate_object_from_contents(tree.object_id, contents)
        assert isinstance(message, Message)
        return message


def spoil(reply: Message, what: str) -> None:
    """Makes the tensors of an answer useless, if that is asked."""
    if what not in ("not finite", "another shape"):
        return
    state = {name: array.numpy().copy() for name, array in reply.content.array_records["arrays"].items()}
    name = min(state)
    tensors = {key: torch.from_numpy(value) for key, value in state.items()}
    tensors[name] = tensors[name] * float("nan") if what == "not finite" else tensors[name].flatten()[:1]
    reply.content["arrays"] = records.write_adapter(tensors)


@dataclass
class Soak:
    """The sites, and all that was done to them."""

    place: Path
    rounds: int = ROUNDS
    count: int = SITES
    seed: int = 0
    spoilt: list[Spoilt] = field(default_factory=list)
    samples: dict[str, list[Sample]] = field(default_factory=dict)
    begun: list[int] = field(default_factory=list)
    """The rounds in which processes were started."""

    def __post_init__(self) -> None:
        import client_app

        self._app, self._lock = client_app.app, threading.Lock()
        self._chance = random.Random(self.seed)
        names = [f"site-{number}" for number in range(self.count)]
        self.names = names
        self._features = write_features(self.place / "features", dict.fromkeys((*names, "unseen"), ROWS))
        described = tomllib.loads((OURS / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"]
        self.settings: dict[str, str | int | float] = {
            "adapter": "gate",
            "data": f"features:{self._features}",
            "holdout": "unseen",
            "min-sites": self.count // 2,
            "num-server-rounds": self.rounds,
            "round-timeout": TIMEOUT,
        }
        self.run_config: Mapping[str, Any] = {**described, **self.settings}

    def node_config(self, name: str) -> dict[str, str | int | float | bool]:
        return {"site": name, "data": f"features:{self._features}", "domains": name}

    def answered(self, question: Message, context: Context) -> Message:
        """The ClientApp's answer."""
        with self._lock:
            reply: Message = self._app(question, context)
        return reply

    def chance(self, site: str, question: Message) -> str:
        """What is to be done to the answer: nothing but to those that have learnt."""
        if question.metadata.message_type != "train":
            return ""
        with self._lock:
            point = self._chance.random() * 1000
            for what, often in SPOILT.items():
                if point < often:
                    number = records.read_task(question.content).round
                    self.spoilt.append(Spoilt(number, site, what))
                    return what
                point -= often
        return ""

    def live(self, port: int, over: threading.Event) -> None:
        """All sites ask and answer, in this thread."""
        sites: dict[str, Iterator[float]] = {}
        due = dict.fromkeys(self.names, 0.0)
        with ExitStack() as stack:
            connections = {name: stack.enter_context(ExitStack()) for name in self.names}
            while not over.is_set():
                name = min(due, key=due.__getitem__)
                over.wait(max(0.0, due[name] - time.monotonic()))
                try:
                    pause = next(sites[name])
                except (KeyError, StopIteration):  # it is new, or comes back as another node
                    pause = PAUSE
                    connections[name].close()
                    stub, public = connections[name].enter_context(fleet.connected(port))
                    with suppress(CallFailed):
                        sites[name] = Site(name, stub, public, self).live()
                due[name] = time.monotonic() + pause

    def sample(self, name: str, process: int, number: int) -> None:
        with suppress(OSError):
            handles = len(os.listdir(f"/proc/{process}/fd"))
            self.samples.setdefault(name, []).append(Sample(number, process, memory(process, "VmRSS"), handles))


def grown(samples: Sequence[Sample]) -> tuple[float, int]:
    """By what share of memory and by how many handles the last rounds are above the first ones of the same process."""
    last = [sample for sample in samples if sample.process == samples[-1].process][WARM:]
    if len(last) < 2 * LAST:
        raise BrokenError(f"{len(last)} rounds of the last process, expected at least {2 * LAST}")
    first, end = last[:LAST], last[-LAST:]
    share = mean(s.memory for s in end) / mean(s.memory for s in first) - 1
    return share, round(median(s.handles for s in end) - median(s.handles for s in first))


def flat(samples: Sequence[Sample]) -> bool:
    share, handles = grown(samples)
    return share <= GROWTH and handles <= HANDLES


def beginnings(rounds: int) -> dict[int, str]:
    """After how many rounds which process is killed, or started again as for an update; all in the first third."""
    return {
        rounds * 2 // 30: "ServerApp killed",
        rounds * 4 // 30: "ServerApp killed",
        rounds * 6 // 30: "SuperLink killed",
        rounds * 7 // 30: "ServerApp killed",
        rounds * 8 // 30: "SuperLink started again",
    }


def soak(of: Soak, say: Callable[[str], None]) -> dict[str, Any]:
    """Runs all rounds; the run's summary in the end."""
    flower, results, ports = of.place / "flower", of.place / "results", free_ports(3)
    todo, over = beginnings(of.rounds), threading.Event()
    sites = threading.Thread(target=of.live, args=(ports[1], over))
    stack, link = _started(flower, ports)
    sites.start()
    settings = dict(of.settings)
    try:
        until(lambda: len(of.begun) or link.online() >= of.count, "all sites", 60)
        of.begun.append(0)
        while True:
            with handed_over(link.env, settings, results) as run:
                what = _watched(of, link, run, todo, say)
            say(f"round {of.samples['SuperLink'][-1].round - 1} of {of.rounds}: {what or 'completed'}")
            if not what:
                if run.process.returncode:
                    raise BrokenError(f"the run failed: {run.said[-1000:]}")
                return run.summary()
            settings["resume"] = run.folder.name
            if "SuperLink" in what:
                if "killed" in what:
                    link.process.kill()
                    link.process.wait()
                stack.close()
                stack, link = _started(flower, ports)
            of.begun.append(of.samples["SuperLink"][-1].round)
    finally:
        over.set()
        sites.join()
        stack.close()


def _started(flower: Path, ports: Sequence[int]) -> tuple[ExitStack, SuperLink]:
    stack = ExitStack()
    link = stack.enter_context(superlink(flower, ports=ports, FEDCLIP_HOME=str(flower / "home")))
    return stack, link


def _watched(of: Soak, link: SuperLink, run: Run, todo: dict[int, str], say: Callable[[str], None]) -> str:
    """Notes what the processes have, round by round; what was done to one of them, or nothing at the run's end."""
    seen = of.samples["SuperLink"][-1].round if of.samples else 0
    while run.process.poll() is None:
        if (number := run.lines()) > seen:
            seen = number
            apps = processes("flwr-serverapp", f"FLWR_HOME={link.folder}")
            for name, process in (("SuperLink", link.process.pid), ("ServerApp", max(apps, default=0))):
                of.sample(name, process, number)
            of.sample("sites", os.getpid(), number)
            if number % 10 == 1:  # line 1 is that of round 0
                say(f"round {number - 1} of {of.rounds}")
            if due := [after for after in todo if after <= number]:
                what = todo.pop(due[0])
                if what == "ServerApp killed":
                    for process in apps:
                        kill(process)
                return what
        time.sleep(0.05)
    return ""


class Named(NamedTuple):
    """Spoilt answers that were not named, and sites that were named without cause; each with its round."""

    forgotten: list[Spoilt]
    wrongly: list[tuple[int, str]]


def named(of: Soak, failures: Sequence[Mapping[str, Any]]) -> Named:
    """Whether just those were named that had to be, in the rounds that no start of a process has disturbed."""
    disturbed = {number for begun in of.begun for number in (begun, begun + 1, begun + 2)}
    reported = {(f["round"], f["site"]) for f in failures}
    spoilt = [one for one in of.spoilt if one.round not in disturbed]
    forgotten = [one for one in spoilt if one.what != HARMLESS and (one.round, one.site) not in reported]
    known = {(one.round, one.site) for one in of.spoilt}
    wrongly = sorted(
        (number, site)
        for number, site in reported
        if number not in disturbed and (number, site) not in known and (number - 1, site) not in known
    )
    return Named(forgotten, wrongly)
