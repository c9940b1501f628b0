"""What a federation of many sites costs its server: measured as far as it runs here, calculated from there on.

    python -m benchmarks.scale [--sites 10 100 1000] [--others 50] [--rounds 2]

SuperLink and ServerApp are the real ones, in processes of their own; the sites are only what they say
(harness/fleet.py), so that the machine is the server's. Where the SuperLink keeps its state: in memory, or in a file
(`--database`), which a second SuperLink can share. Seconds are those for which the processes computed, not those that
went by; of a warm round, with the questions that came in it. Memory is the most that a process had (VmHWM). What a
question costs where many messages are under way is measured on Flower's own state in this process. Random features; no
TLS. On Linux.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory
from typing import NamedTuple

import torch
from flwr.app import Message, MessageType, RecordDict
from flwr.common.constant import HEARTBEAT_MAX_INTERVAL, SUPERLINK_NODE_ID
from flwr.server.superlink.linkstate import LinkStateFactory, SqlLinkState
from flwr.supercore.constant import FLWR_IN_MEMORY_DB_NAME
from flwr.supercore.inflatable.inflatable_object import get_object_tree, iterate_object_tree
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.superlink.federation import NoOpFederationManager

from benchmarks.common import at_least, run_app, workplace
from deploy.processes import superlink
from deploy.relay import relayed
from fedclip_flwr.base import content
from fedclip_flwr.base.tensors import State
from fedclip_flwr.exchange import Hello, Report, records
from fedclip_flwr.exchange.codecs import CODECS, wrap
from fedclip_flwr.flower.grids import act_as_server
from fedclip_flwr.flower.sizes import message_size
from fedclip_flwr.learning import make_adapter
from fedclip_flwr.learning.metrics import BINS, Quality, Score
from harness.features import DIM, write_features
from harness.fleet import PAUSE, Answer, Site, fleet, living, speaking
from harness.machine import OURS, cpu, machine, memory, processes, table

CALCULATED = (10, 1000, 100_000)
UNDER_WAY = {False: (1000, 100_000), True: (1000, 4000)}
"""Messages under way at which Flower's state is timed, in memory and in a file."""
HEARTBEAT = 20.0
"""Seconds between two heartbeats of a SuperNode."""
GIGABIT = 1e9 / 8
ROUND = 600.0
"""Seconds that a round may take unless the setting `round-timeout` says otherwise."""
COUNTED = 100
"""With so many sites bytes on the wire are counted; with more the relay would be in the way."""
SCORE = Score(100, 60, 80.0)
REPORT = Report(100, SCORE, Quality(SCORE, 0.5, 0.5, [0.1] * BINS))


class Setting(NamedTuple):
    """What is measured."""

    sites: int
    adapter: str = "gate"
    codec: str = "float32"
    database: bool = False
    superlinks: int = 1

    @property
    def kept(self) -> str:
        """Where the SuperLink keeps its state."""
        return ("a file" if self.database else "memory") + (f", {self.superlinks} SuperLinks" * (self.superlinks > 1))

    @property
    def sent(self) -> str:
        return self.adapter if self.codec == "float32" else f"{self.adapter}, {self.codec}"


class Note(NamedTuple):
    """How far things have come: seconds of computing, bytes on the wire, the sites' questions; and peaks of memory."""

    link: float
    app: float
    wire: int
    questions: int
    link_memory: int
    app_memory: int
    file: int


class Measured(NamedTuple):
    """A warm round: seconds in all, and of each site's part seconds of computing, bytes and questions."""

    setting: Setting
    seconds: float
    link: float
    app: float
    messages: float
    wire: float
    questions: float
    link_memory: int
    app_memory: int
    file: int


def adapter_of(setting: Setting) -> State:
    """What a site has trained, as it is sent."""
    start = make_adapter(setting.adapter, DIM).state_dict()
    trained = {name: tensor + 0.01 * torch.randn_like(tensor) for name, tensor in start.items()}
    return {setting.codec: wrap(setting.codec, trained, start, {}, 0).packed} if setting.codec in CODECS else trained


def answers(setting: Setting) -> Answer:
    """Ready-made answers; adapters differ by a few numbers, or the SuperLink would keep one for all."""
    sent, package = adapter_of(setting), content.of_package(content.memory())
    hello = Hello("", "train", "all", train=100, validation=100, test=100, classes=[0, 1], package=package)

    def own() -> State:
        state = {name: tensor.clone() for name, tensor in sent.items()}
        for tensor in state.values():
            last = tensor.view(-1)[-4:]
            last.random_(0, 256) if tensor.dtype == torch.uint8 else last.normal_(0, 0.01)
        return state

    def answer(name: str, kind: str) -> RecordDict:
        if kind == MessageType.QUERY:
            return records.write_hello(replace(hello, site=name))
        return records.write_answer(REPORT, own() if kind == MessageType.TRAIN else None)

    return answer


def measure(setting: Setting, rounds: int, place: Path) -> Measured:
    """A run of this project's own app with such sites: what its warm rounds cost."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory(dir=place)))
        file = folder / "superlink.db"
        database = str(file) if setting.database else FLWR_IN_MEMORY_DB_NAME
        links = [stack.enter_context(superlink(folder / str(n), database=database)) for n in range(setting.superlinks)]
        marks = [f"FLWR_HOME={link.folder}" for link in links]
        pids = [link.process.pid for link in links]
        counted = setting.sites <= COUNTED
        relays = [stack.enter_context(relayed(link.fleet)) for link in links] if counted else []
        sites: list[Site] = []
        for number, port in enumerate([to.port for to in relays] or [link.fleet for link in links]):
            share = len(range(number, setting.sites, setting.superlinks))
            sites += stack.enter_context(fleet(port, share, answers(setting)))
        stack.enter_context(living(sites))

        def note() -> Note:
            apps = [pid for mark in marks for pid in processes("flwr-serverapp", mark)]
            return Note(
                sum(map(cpu, pids)),
                sum(map(cpu, apps)),
                sum(relay.bytes for relay in relays),
                sum(site.questions for site in sites),
                max(memory(pid, "VmHWM") for pid in pids),
                max((memory(pid, "VmHWM") for pid in apps), default=0),
                sum(part.stat().st_size for part in folder.glob(f"{file.name}*")),
            )

        features = write_features(folder / "features", {"all": 40})
        settings: dict[str, str | int | float] = {
            "data": f"features:{features}",
            "holdout": "",
            "round-timeout": 3600.0,
        }
        settings |= {"adapter": setting.adapter, "codec": setting.codec, "min-sites": setting.sites}
        run = run_app(OURS, settings | {"num-server-rounds": rounds}, links[0].env, note)
        first, last = run.notes[0], run.notes[-1]
        lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    messages = mean(line["bytes"] for line in lines[2:]) / setting.sites  # of rounds 2 and later
    parts = (rounds - 1) * setting.sites
    spent = [(after - before) / parts for before, after in zip(first[:4], last[:4], strict=True)]
    link, app, wire, questions = spent
    return Measured(setting, mean(run.warm), link, app, messages, wire, questions, *last[4:])


class Parts(NamedTuple):
    """Seconds of a SuperLink: of a SuperNode's question and of its heartbeat when nothing is under way; and, for each
    message under way, how much more a SuperNode's question costs, and one of the ServerApp for all of them."""

    question: float
    heartbeat: float
    under_way: float
    asked: float

    def idle(self, sites: int) -> float:
        """The cores that so many SuperNodes keep busy that have nothing to do."""
        return sites * (self.question / PAUSE + self.heartbeat / HEARTBEAT)


def parts_of(database: bool, place: Path) -> Parts:
    few, many = UNDER_WAY[database]
    looks = zip(looked_up(database, few), looked_up(database, many), strict=True)
    return Parts(*idle(database, place), *((after - before) / (many - few) for before, after in looks))


def idle(database: bool, place: Path, sites: int = 50, times: int = 10) -> tuple[float, float]:
    """What a question and a heartbeat cost a SuperLink that has no message for anybody."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory(dir=place)))
        link = stack.enter_context(superlink(folder, database="superlink.db" if database else FLWR_IN_MEMORY_DB_NAME))
        process = link.process.pid
        everyone = stack.enter_context(fleet(link.fleet, sites, lambda *_: RecordDict()))

        def seconds(call: Callable[[Site], object]) -> float:
            before = cpu(process)
            for site in everyone * times:
                call(site)
            return (cpu(process) - before) / (sites * times)

        return seconds(Site.poll), seconds(Site.beat)


def looked_up(database: bool, messages: int, times: int = 5) -> tuple[float, float]:
    """Seconds for which Flower looks when so many messages are under way: once for one node, once for all answers."""
    with TemporaryDirectory() as folder:
        name = f"{folder}/superlink.db" if database else FLWR_IN_MEMORY_DB_NAME
        state = LinkStateFactory(name, NoOpFederationManager(), ObjectStoreFactory(name)).state()
        run = speaking.new_run(state)
        nodes, sent = [], []
        with state.session() if isinstance(state, SqlLinkState) else nullcontext():  # one transaction
            for number in range(messages + 1):
                node = state.create_node("", "", str(number).encode(), HEARTBEAT_MAX_INTERVAL)
                state.activate_node(node, HEARTBEAT_MAX_INTERVAL)
                nodes.append(node)
            for node in nodes[1:]:
                message = Message(RecordDict(), node, MessageType.TRAIN)
                sent.append(f"{node:064}")
                known = {"_run_id": run, "_src_node_id": SUPERLINK_NODE_ID, "_message_id": sent[-1]}
                message.metadata.__dict__.update(known)
                state.store_message_ins(message)

        def seconds(look: Callable[[], Sequence[Message]]) -> float:
            before = time.process_time()
            for _ in range(times):
                if look():
                    raise SystemExit("there should have been nothing to find")
            return (time.process_time() - before) / times

        one_node = seconds(lambda: state.get_message_ins(nodes[0], 1))
        return one_node, seconds(lambda: speaking.answers(state, run, sent))


PerSite = Callable[[float], tuple[float, float]]
"""Bytes of memory that a site more takes in the SuperLink and in the ServerApp, by the bytes of its messages."""


class Calculated(NamedTuple):
    """A round: bytes on the wire, seconds of computing, cores that SuperNodes with nothing to do keep busy, memory."""

    wire: float
    link: float
    app: float
    idle: float
    link_memory: float
    app_memory: float

    @property
    def network(self) -> float:
        """Seconds on a line of 1 Gbit/s: about half of the bytes go each way."""
        return self.wire / 2 / GIGABIT

    @property
    def shortest(self) -> float:
        """Seconds of a round, if the SuperLink has one core and is asked nothing else: but sites ask when they do."""
        return max(PAUSE, self.network, self.link)

    @property
    def longest(self) -> float:
        """The same, if all SuperNodes ask for messages all the time; without end where that alone is too much."""
        return max(self.shortest, self.link / (1 - self.idle)) if self.idle < 1 else math.inf


def calculate(one: Measured, parts: Parts, a_site: PerSite, sites: int) -> Calculated:
    """The round of so many sites, from a measured one.

    `a_site` tells the memory that one more site takes in the SuperLink and in the ServerApp. Over a round half of all
    messages are under way on average; the first of a SuperNode's two questions finds its own halfway, the second finds
    nothing: three quarters of all are looked at for each site.
    """
    more = sites - one.setting.sites
    link = one.link + (2 - one.questions) * parts.question + 0.75 * more * parts.under_way
    link_memory, app_memory = a_site(one.messages)
    return Calculated(
        sites * one.wire,
        sites * link,
        sites * one.app,
        parts.idle(sites),
        one.link_memory + max(0, more) * link_memory,
        one.app_memory + max(0, more) * app_memory,
    )


def per_site(found: Sequence[Measured]) -> PerSite:
    """Memory that a site more takes, by the bytes of its messages: a line through the adapters measured twice."""
    points = []
    for adapter in ("gate", "attention"):
        same = [one for one in found if one.setting[1:] == Setting(0, adapter)[1:]]
        few, many = same[0], same[-1]
        more = max(1, many.setting.sites - few.setting.sites)
        memory_more = (many.link_memory - few.link_memory) / more, (many.app_memory - few.app_memory) / more
        points.append((few.messages, memory_more))
    (small, low), (large, high) = points

    def at(messages: float) -> tuple[float, float]:
        share = (messages - small) / (large - small)
        link, app = (a + share * (b - a) for a, b in zip(low, high, strict=True))
        return link, app

    return at


def most(fits: Callable[[int], bool]) -> int:
    """The largest number that fits, where all smaller ones do."""
    low, high = 0, 1
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


class Load(NamedTuple):
    """A site's part of a round: bytes of its messages, and calls that the SuperLink answers for it."""

    bytes: int
    calls: int


def load(adapter: str, codec: str, trains: bool) -> Load:
    """What a site costs that trains in a round, or only evaluates.

    Calls: a question, each object of the message, a confirmation; the answer, each of its objects; a question in vain.
    And the ServerApp's: the message (what is in it is the same for all), each object of the answer, a confirmation.
    """
    state = dict(make_adapter(adapter, DIM).state_dict())
    arrays = adapter_of(Setting(0, adapter, codec))
    answer = records.write_answer(REPORT, arrays if trains else None)
    asked = RecordDict({"arrays": records.write_adapter(arrays), "config": records.write_task("0" * records.MARK)})
    down, up = (objects(record) for record in (asked, answer))
    size = records.round_size(state, state, codec, "0" * records.MARK, REPORT)
    if not trains:
        size -= answered(records.write_answer(REPORT, arrays)) - answered(answer)
    return Load(size, (1 + down + 1) + (1 + up) + 1 + (1 + up + 1))


def answered(record: RecordDict) -> int:
    """The size of an answer."""
    return message_size(Message(record, reply_to=Message(RecordDict(), 2**63, MessageType.TRAIN)))


def objects(record: RecordDict) -> int:
    """How many objects Flower makes of a message with this content; each is fetched by a call of its own."""
    return sum(1 for _ in iterate_object_tree(get_object_tree(Message(record, 2**63, MessageType.TRAIN))))


def settings_table() -> str:
    rows = []
    for adapter, codec in [(a, c) for a in ("attention", "gate", "scale") for c in ("float32", "int8")]:
        loads = [load(adapter, codec, trains) for trains in (True, False)]
        rows.append([adapter, codec, *(f"{number:,}" for one in loads for number in one)])
    head = ["a site's part of a round", "codec", "if it trains: bytes", "calls", "if it only evaluates: bytes", "calls"]
    return table(head, rows)


def parts_table(known: Mapping[bool, Parts]) -> str:
    rows = [
        [
            kept,
            f"{1000 * parts.question:.2f} ms",
            f"{1000 * parts.heartbeat:.2f} ms",
            f"{1 / parts.idle(1):,.0f}",
            f"{1e6 * parts.under_way:.2f} µs",
            f"{1e6 * parts.asked:.1f} µs",
        ]
        for kept, parts in (("memory", known[False]), ("a file", known[True]))
    ]
    head = ["state in", "a SuperNode's question", "its heartbeat", "so many idle ones keep a core busy"]
    return table([*head, "and for each message under way", "the ServerApp's question, for each"], rows)


def measured_table(found: Sequence[Measured]) -> str:
    rows = [
        [
            one.setting.kept,
            one.setting.sent,
            f"{one.setting.sites:,}",
            f"{one.seconds:.1f} s",
            f"{1000 * one.link:.0f} ms",
            f"{1000 * one.app:.0f} ms",
            f"{one.questions:.1f}",
            f"{one.messages:,.0f}",
            f"{one.wire:,.0f}" if one.wire else "",
            f"{one.link_memory / 1e6:.0f} MB",
            f"{one.app_memory / 1e6:.0f} MB",
            f"{one.file / 1e6:.0f} MB" if one.file else "",
        ]
        for one in found
    ]
    head = ["state in", "adapter", "sites", "a round", "for each site: SuperLink", "ServerApp", "questions", "messages"]
    return table([*head, "on the wire", "SuperLink's memory", "ServerApp's", "file"], rows)


def calculated_table(bases: Sequence[Measured], known: Mapping[bool, Parts], a_site: PerSite) -> str:
    rows = []
    for one in bases:
        for sites in CALCULATED:
            got = calculate(one, known[one.setting.database], a_site, sites)
            figures = [f"{sites:,}", size(got.wire), f"{got.network:,.1f} s", f"{got.link:,.1f} s", f"{got.app:,.1f} s"]
            round_ = (
                f"{got.shortest:,.0f} to {got.longest:,.0f} s" if got.idle < 1 else f"{got.shortest:,.0f} s to ever"
            )
            figures += [f"{got.idle:.2f}", round_]
            rows.append([one.setting.kept, one.setting.sent, *figures, size(got.link_memory), size(got.app_memory)])
    head = ["state in", "adapter", "sites", "on the wire", "at 1 Gbit/s", "SuperLink", "ServerApp"]
    head += ["cores for idle SuperNodes", "a round, one core", "SuperLink's memory", "ServerApp's"]
    return table(head, rows)


def size(number: float) -> str:
    return f"{number / 1e9:,.1f} GB" if number >= 1e9 else f"{number / 1e6:,.1f} MB"


def limits(bases: Sequence[Measured], known: Mapping[bool, Parts], a_site: PerSite) -> str:
    """Up to how many sites a round is over in time, by setting."""

    def in_time(one: Measured) -> Callable[[int], bool]:
        return lambda sites: calculate(one, known[one.setting.database], a_site, sites).longest <= ROUND

    bounds = [f"{most(in_time(one)):,} ({one.setting.sent}, state in {one.setting.kept})" for one in bases]
    return f"A round takes at most {ROUND:.0f} s with so many sites: {', '.join(bounds)}."


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale", description=__doc__.splitlines()[0])
    parser.add_argument("--sites", type=at_least(1), nargs="+", default=[10, 100, 1000], help="of the first setting")
    parser.add_argument("--others", type=at_least(2), default=50, help="sites of the other settings")
    parser.add_argument("--rounds", type=at_least(2), default=2)
    given = parser.parse_args()
    act_as_server()
    if max(min(given.sites), given.others) > COUNTED:
        parser.error(
            f"bytes are counted with up to {COUNTED} sites: expected no more for --others, and once for --sites"
        )
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # each site has a connection of its own
    gates = [Setting(sites) for sites in sorted({*given.sites})]
    others = [Setting(sites, "attention") for sites in sorted({given.others, max(given.sites)})]
    others += [Setting(given.others, "attention", "int8")]
    others += [Setting(given.others, database=True, superlinks=count) for count in (1, 2)]
    with workplace() as place:
        known = {database: parts_of(database, place) for database in (False, True)}
        print(parts_table(known) + "\n", flush=True)
        found = [measure(setting, given.rounds, place) for setting in [*gates, *others]]
    a_site = per_site(found)
    *_, base = (one for one in found[: len(gates)] if one.wire)
    alone = [one for one in found[len(gates) :] if one.setting.superlinks == 1]
    bases = [base, *(one for one in alone if one.setting.sites == given.others)]
    print(measured_table(found) + "\n")
    print("Calculated:\n")
    print(settings_table() + "\n")
    print(calculated_table(bases, known, a_site) + "\n")
    print(limits(bases, known, a_site))
    print(f"\n{given.rounds} rounds, the first left out; {machine()}")


if __name__ == "__main__":
    main()
