"""The sites that take part: their hellos, the messages to them, their replies, and their failures.

On Flower's public `Grid`. Node ids are random in every simulation, so reproducible choices depend on the sites' names.
"""

from __future__ import annotations

import math
import sys
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, cast

from flwr.app import ConfigRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid

from fedclip_flwr.base import UserError
from fedclip_flwr.base.errors import one_line
from fedclip_flwr.base.roles import HOLDOUT
from fedclip_flwr.base.tensors import State
from fedclip_flwr.base.text import some
from fedclip_flwr.exchange import ExchangeError, Hello, Progress, Report, Session, records
from fedclip_flwr.exchange.link import Downlink
from fedclip_flwr.exchange.secure.exposure import Part, exposed, part_of
from fedclip_flwr.flower.grids import simulated
from fedclip_flwr.flower.inbox import Inbox
from fedclip_flwr.flower.metadata import set_metadata
from fedclip_flwr.flower.sizes import message_size
from fedclip_flwr.learning.selection import sample_sites
from fedclip_flwr.server.strategy import AdapterFedAvg
from fedclip_flwr.server.waiting import Wait

SIMULATED_AT_ONCE = 40
"""The most messages under way in a simulation: for each of its nodes, Flower's engine looks at all of them."""
RETRY_AFTER = 10.0
"""Seconds after which a real site that was refused is greeted again: its owner may have fixed it."""
STARTUP = 60.0
"""Seconds that a real site may take to start a process and to open its data, besides the time for encoding."""
LETTER_FROM = "it can't open the letter from "
"""What a site's failure says before the name of another one."""


class Failure(NamedTuple):
    """Why a site failed, and in which round (0: at its hello)."""

    round: int
    site: str
    why: str


class Roles(NamedTuple):
    """Names of sites by role: those that train, and those that only evaluate."""

    training: set[str]
    holdouts: set[str]


class Traffic:
    """Bytes of all messages sent and received, as Flower serialises them."""

    def __init__(self) -> None:
        self.down = self.up = 0

    @property
    def both(self) -> int:
        return self.down + self.up


class _View:
    """A grid that shows only the given nodes."""

    def __init__(self, grid: Grid, nodes: Sequence[int]) -> None:
        self._grid, self._nodes = grid, nodes

    def get_node_ids(self) -> Iterable[int]:
        return self._nodes

    def __getattr__(self, name: str) -> object:
        return getattr(self._grid, name)


class Nodes:
    """The sites that take part: greeted once, then asked in each round."""

    def __init__(
        self,
        grid: Grid,
        link: Downlink,
        *,
        session: Session,
        package: str,
        plugins: Sequence[str] = (),
        timeout: float,
        say: Callable[[str], None],
    ) -> None:
        self._greeting = RecordDict({"config": records.write_greeting(session)})
        self.key, self._classes = session.key, len(session.vocabulary.class_names)
        self.hellos: dict[str, Hello] = {}
        self.names: dict[int, str] = {}
        self.failures: list[Failure] = []
        self.scaled: Counter[str] = Counter()
        self.contributions: dict[str, tuple[int, int]] = {}
        """For each site whose sums count, the numbers of images and of classes in them."""
        self.earlier: Mapping[str, tuple[int, int, str]] = {}
        """The same of the version that this run updates, and the mark of the site's images then."""
        self.totals: Sequence[Collection[Part]] = ()
        """With secure aggregation, what the totals of all versions are of."""
        self.leaving: Collection[str] = ()
        """Sites that take back what they gave to that version."""
        self.trained: Counter[str] = Counter()
        """How often each site was asked to train, whether it succeeded or not."""
        self.distrusted: set[str] = set()
        """Sites that have broken a secure sum: they are no longer asked to train."""
        self.discarded: frozenset[str] | None = None
        """The sites of an unmasked sum that could not be used."""
        self.blames: dict[str, set[str]] = {}
        """For each site, the sites that report an unreadable letter from it."""
        self.frozen: State = {}
        """Tensors that go with every adapter, and are not trained, if sites can't make them from the settings."""
        self.traffic = Traffic()
        self._grid, self._inbox = grid, Inbox(grid)
        self._package, self._plugins = package, plugins
        self._largest_reply = 2**20 + 2 * sum(tensor.nbytes for tensor in link.state.values())
        self.link = link
        self._at_once = SIMULATED_AT_ONCE if simulated(grid) else sys.maxsize
        self._timeout, self.say = timeout, say
        self._patience = math.inf if simulated(grid) else records.slice_of(timeout) + STARTUP
        self._greeted: dict[int, float] = {}  # the time of the greeting
        self._all_greeted = False
        self._hellos_under_way: dict[str, int] = {}
        self._encoding: dict[int, Progress] = {}
        self._furthest: dict[int, int] = {}  # percent of its images that each node has encoded
        self._steps = 0  # how often one of them rose
        self._refused: dict[int, float] = {}
        self._last_failed: set[str] = set()
        self._ended = False

    def end(self) -> None:
        """Ends a thread that asks or waits."""
        self._ended = True

    @property
    def record(self) -> dict[str, Any]:
        """What a checkpoint keeps of the sites; see `resume`."""
        return {
            "sites": self._holdings,
            "failures": list(map(list, self.failures)),
            "last_failed": sorted(self._last_failed),
            "scaled": dict(self.scaled),
            "contributions": self.contributions,
            "trained": {site: times for site, times in self.trained.items() if site not in self.leaving},
            "distrusted": sorted(self.distrusted),
            "down": self.traffic.down,
            "up": self.traffic.up,
        }

    def resume(self, record: Mapping[str, Any], count: int) -> None:
        """Waits for the sites of the record, and at least `count` of them, then restores the record.

        Simulated sites must be the same; real sites that are missing or have other images are reported.
        """
        self.wait_for(count, expected=record["sites"])
        known = self._holdings
        changed = [name for name, holds in record["sites"].items() if known.get(name) != holds]
        if simulated(self._grid) and (changed or known.keys() != record["sites"].keys()):
            raise UserError(f"the run had other sites: simulate {len(record['sites'])} sites with the same images")
        for name in changed:
            what = "its images have changed" if name in known else "it is not connected"
            self.say(f"resuming with other sites than before: {name}: {what}")
        self.failures[:0] = [Failure(*facts) for facts in record["failures"]]
        self._last_failed |= {*record["last_failed"]}
        self.scaled.update(record["scaled"])
        self.contributions.update(record.get("contributions", {}))
        self.trained.update(record["trained"])
        self.distrusted.update(record["distrusted"])
        self.traffic.down += record["down"]
        self.traffic.up += record["up"]

    def wait_for(self, count: int, number: int = 0, expected: Collection[str] = ()) -> None:
        """Greets nodes until `count` sites take part, the `expected` ones are connected, and every hello is answered.

        The timeout restarts whenever a site reports another percent of its images as encoded, so at most a hundred
        times for each. When it is over, expected sites may be missing. A node that takes longer to answer than a
        working site needs is waited for only while there are too few sites without it.
        """
        wait, steps = Wait(self._timeout), 0
        while (
            (news := self.meet(number))
            or self._may_answer_soon
            or len(self._present) < count
            or not self._connected().keys() >= {*expected}
        ):
            if news:
                wait.answered()
            if steps < self._steps:
                steps = self._steps
                wait.begin()
            all_answered = self._greeted and self._all_greeted and not self._hellos_under_way
            if wait.over or (simulated(self._grid) and all_answered):
                break  # in a simulation, all nodes exist before the first one answers
            if wait.report_due():
                self.say(f"waiting: {self.readiness} (min-sites = {count})")
            wait.pause(len(self._hellos_under_way))
        if (ready := len(self._present)) < count:
            hint = ": simulate more (--nodes)" if simulated(self._grid) else ": is a SuperNode running for each?"
            why = "; ".join(sorted({f"{f.site}: {f.why}" for f in self.failures})[:3])
            raise UserError(
                (f"round {number}: " if number else "")
                + f"sites that take part after {wait.seconds:.0f} s: {ready}, min-sites = {count} are needed"
                + (f" ({why})" if why else hint)
            )
        if not any(hello.train for hello in self.hellos.values()):
            raise UserError("no site has an example to learn from: use more data or fewer sites")
        if silent := [f"node {node}" for node in sorted(self._hellos_under_way.values())]:
            self.say(
                (f"round {number}: " if number else "")
                + f"continuing without {some(silent)}: no answer to the hello so far; "
                "a site that answers joins from the next round on"
            )

    def meet(self, number: int = 0) -> bool:
        """Greets new nodes and admits those that have answered; returns True if there were any of either."""
        self._allow_retries()
        unmet = [node for node in self._grid.get_node_ids() if node not in self._greeted]
        next_ones = unmet[: self._at_once - len(self._hellos_under_way)]
        new = self._push(Message(self._greeting, node, MessageType.QUERY) for node in next_ones)
        self._greeted |= dict.fromkeys(new.values(), time.monotonic())
        self._all_greeted = len(new) == len(unmet)
        self._hellos_under_way |= new
        news = bool(new)
        for node, reply in self._pull(self._hellos_under_way):
            news = True
            try:
                if reply.has_error():
                    raise ExchangeError(records.reason(reply))
                hello = records.read_hello(reply.content)
            except ExchangeError as error:
                self._refuse(number, node, f"node {node}", str(error))
                continue
            if isinstance(hello, Progress):
                done = 100 * hello.encoded // max(hello.images, 1)
                self._steps += done > self._furthest.get(node, -1)
                self._furthest[node] = max(done, self._furthest.get(node, -1))
                self._encoding[node] = hello
                self._greeted.pop(node, None)  # to be asked again
                continue
            self._encoding.pop(node, None)
            if why := self._refusal(hello):
                name = f"{hello.site} (node {node})" if hello.site in self.hellos else hello.site
                self._refuse(number, node, name, why)
                continue
            for gone in [other for other, name in self.names.items() if name == hello.site]:
                del self.names[gone]
                self._greeted.pop(gone, None)  # if it comes back, it is refused: its name is taken
            self.names[node] = hello.site
            self._last_failed.discard(hello.site)  # another node of this name may have been refused
            self.hellos[hello.site] = hello
        return news

    def _refuse(self, number: int, node: int, site: str, why: str) -> None:
        self._refused[node] = time.monotonic()
        self.fails(number, site, why)

    def _allow_retries(self) -> None:
        """Lets real sites that were refused be greeted again after a while; nobody can fix a simulated one."""
        if not simulated(self._grid):
            now = time.monotonic()
            for node in [node for node, when in self._refused.items() if now - when >= RETRY_AFTER]:
                del self._refused[node]
                self._greeted.pop(node, None)

    @property
    def _may_answer_soon(self) -> bool:
        """True if a hello is under way to a node that is not overdue."""
        now = time.monotonic()
        return any(now - self._greeted[node] < self._patience for node in self._hellos_under_way.values())

    @property
    def _holdings(self) -> dict[str, list[int]]:
        """The numbers of images in each split of the connected sites."""
        hellos = (self.hellos[name] for name in sorted(self._connected()) if name not in self.leaving)
        return {hello.site: [hello.train, hello.validation, hello.test] for hello in hellos}

    @property
    def _present(self) -> set[str]:
        """The connected sites that train."""
        return self.by_role.training & self._connected().keys()

    @property
    def readiness(self) -> str:
        """The number of sites that are ready, and the progress that others have reported."""
        progress = [f"{p.site}: {p.encoded:,} of {p.images:,} images encoded" for p in self._encoding.values()]
        known = {*self._greeted, *self._encoding}
        return "; ".join([f"{len(self._connected())} of {len(known)} sites are ready", *sorted(progress)])

    @property
    def by_role(self) -> Roles:
        """The names of all sites that were met, by role."""
        holdouts = {name for name, hello in self.hellos.items() if hello.role == HOLDOUT}
        return Roles(self.hellos.keys() - holdouts, holdouts)

    def _refusal(self, hello: Hello) -> str | None:
        """The reason why the site can't take part; None if it can."""
        if hello.package != self._package:
            theirs = one_line(hello.package[:12])
            return (
                f"its code differs from the server's (package {theirs}, here {self._package[:12]}): "
                "install the same version of fedclip-flwr there"
            )
        if {*hello.plugins} != {*self._plugins}:
            theirs, ours = (", ".join(sorted(names)) or "none" for names in (hello.plugins, self._plugins))
            return f"its plug-ins differ ({one_line(theirs)}, here {ours}): install the same versions there"
        if hello.site in self._connected():  # a site that left may come back as another node
            return "its name is taken by another site: give each SuperNode a unique one"
        if any(not 0 <= number < self._classes for number in hello.classes):
            return f"it has classes outside the {self._classes} of this run"
        if not hello.train + hello.validation + hello.test:
            return "it has no readable image"
        return None

    def choose(
        self, share: float, seed: int, number: int, least: int, without: Collection[str] = ()
    ) -> tuple[list[int], list[int]]:
        """Node ids of the connected sites that train in a round, sampled by seed and name; and those of the others.

        Sites in `without` do not train if enough others can.
        """
        sites = self._connected()
        able = [name for name in sites if self._has_news(name) and name not in self.distrusted]
        if len(others := [name for name in able if name not in without]) >= least:
            able = others
        names = sample_sites(able, share, seed, number, least)
        return [sites[name] for name in names], [sites[name] for name in sorted({*sites} - {*names})]

    def _has_news(self, site: str) -> bool:
        """True if the site has something to learn from, or to take back, that does not count yet."""
        hello = self.hellos[site]
        if site in self.leaving:
            return site in self.earlier
        if site in self.earlier:
            return hello.role != HOLDOUT and hello.content != self.earlier[site][2]
        return hello.train > 0

    @property
    def news(self) -> list[str]:
        """The connected sites of which something does not count yet."""
        return sorted(filter(self._has_news, self._connected()))

    @property
    def unchanged(self) -> set[str]:
        """The connected sites whose images are those that the earlier version has."""
        marks = {site: mark for site, (_, _, mark) in self.earlier.items()}
        return {site for site in self._connected() if self.hellos[site].content == marks.get(site)}

    def exposed(self, changing: Collection[str], least: int) -> list[str]:
        """Fewer than `least` sites whose sums are to be told from a new total, beside those of all versions.

        In the new one the parts of the sites `changing` are those of their images now.
        """
        marks = {site: mark for site, (_, _, mark) in self.earlier.items()}
        marks |= {site: self.hellos[site].content for site in changing}
        gone = {site for site in changing if site in self.leaving or not self.hellos[site].train}
        new = {part_of(site, mark) for site, mark in marks.items() if site not in gone}
        return exposed([*self.totals, new], least)

    def trains(self, nodes: Iterable[int]) -> None:
        """Counts that these nodes are asked to train."""
        self.trained.update(self.names[node] for node in nodes)

    @property
    def failed(self) -> frozenset[str]:
        """The sites whose last answer could not be used."""
        return frozenset(self._last_failed)

    def good(self, without: Iterable[str] = ()) -> list[int]:
        """Node ids of the connected sites whose last answer could be used."""
        left_out = {*self._last_failed, *without, *self.leaving}
        return [node for name, node in sorted(self._connected().items()) if name not in left_out]

    def view(self, nodes: Sequence[int]) -> Grid:
        """The grid as a strategy should see it: only these nodes."""
        return cast(Grid, _View(self._grid, nodes))

    def _connected(self) -> dict[str, int]:
        present = set(self._grid.get_node_ids())
        return {name: node for node, name in self.names.items() if node in present}

    def config(self, personal: bool = False, blend: float | None = None, choose: bool = False) -> ConfigRecord:
        """The config record for an adapter; a new one each time, as messages under way must not change."""
        return records.write_task(self.key, personal, blend, choose)

    def examples(self, site: str) -> int:
        """The number of training examples in the site's hello."""
        return self.hellos[site].train

    def ask(self, number: int, messages: Iterable[Message], state: State) -> Iterator[Message]:
        """Sends the messages with `state`; yields usable replies as they arrive, until the timeout.

        A site fails if it does not answer, or in another node's name. A site is sent only the difference to what it
        has; a site that has lost it gets the complete state.
        """
        waiting = list(messages)
        asked = len(waiting)
        kinds = {message.metadata.dst_node_id: message.metadata.message_type for message in waiting}
        complete = {message.metadata.dst_node_id: message.content for message in waiting}
        self.link.address(waiting, state)
        under_way: dict[str, int] = {}
        wait = Wait(self._timeout)
        while (waiting or under_way) and not wait.over:
            room = self._at_once - len(under_way)
            next_ones, waiting = waiting[:room], waiting[room:]
            sent = self._push(self._with_frozen(next_ones))
            under_way |= sent
            for node in {message.metadata.dst_node_id for message in next_ones} - set(sent.values()):
                self.fails(number, self.names[node], "it could not be reached")
            for node, reply in self._pull(under_way):
                wait.answered()
                set_metadata(reply, message_type=kinds[node])  # not what the site claims
                if reply.has_error() and reply.error.code == records.LACKS and node in complete:
                    self.link.lacks(node)
                    waiting.append(Message(complete.pop(node), node, kinds[node]))
                elif reply.has_error() and reply.error.code == records.BLAMES:
                    set_metadata(reply, src_node_id=node)
                    yield reply
                elif why := self._unusable(node, reply, state):
                    self.fails(number, self.names[node], why)
                else:
                    yield reply
            if wait.report_due():
                self.say(f"round {number}: {asked - len(waiting) - len(under_way)} of {asked} sites have answered")
            if under_way:
                wait.pause(len(under_way))
        self._inbox.give_up(under_way)
        for node in [*under_way.values(), *(message.metadata.dst_node_id for message in waiting)]:
            self.fails(number, self.names[node], f"no answer within {self._timeout:g} s")

    def _unusable(self, node: int, reply: Message, state: State) -> str | None:
        """The reason why the reply is unusable; if there is none, unpacks the adapter in it."""
        if reply.has_error():  # its sender is the SuperLink
            return records.reason(reply)
        if reply.metadata.src_node_id != node:
            return "it answered in another node's name"
        try:
            self.link.receive(reply, state)
        except ExchangeError as error:
            return str(error)
        return None

    def collect_reports(self, number: int, strategy: AdapterFedAvg) -> Mapping[str, Report]:
        """The reports that the strategy accepted; the sites whose replies it dropped fail."""
        for site, why in sorted(strategy.dropped.items()):
            self.fails(number, site, why)
        for site in strategy.scaled:
            if site not in self.scaled:
                self.say(f"round {number}: {site}'s update is much longer than the others': it is scaled down")
        self.scaled.update(strategy.scaled)
        if strategy.contributions:
            self.count(strategy.contributions)
        self._last_failed -= strategy.reports.keys()
        return strategy.reports

    def count(self, contributions: Mapping[str, tuple[int, int]]) -> None:
        """Counts these contributions, and of all other sites those to the earlier version."""
        before = {site: (images, classes) for site, (images, classes, _) in self.earlier.items()}
        self.contributions = {**before, **contributions}

    def fails(self, number: int, site: str, why: str) -> None:
        if not any((f.site, f.why) == (site, why) for f in self.failures):
            self.say(f"round {number}: {site} is left out: {why}")
        self.failures.append(Failure(number, site, why))
        self._last_failed.add(site)

    def _with_frozen(self, messages: Sequence[Message]) -> Sequence[Message]:
        """The messages, with the tensors that go with every adapter; contents that were shared still are."""
        if self.frozen:
            record = records.write_adapter(self.frozen)
            contents = {id(message.content): message.content for message in messages}
            made = {key: RecordDict({**content, records.FROZEN: record}) for key, content in contents.items()}
            for message in messages:
                message.content = made[id(message.content)]
        return messages

    def _push(self, messages: Iterable[Message]) -> dict[str, int]:
        """Sends the messages; returns their nodes by message id."""
        messages = list(messages)
        if not messages:
            return {}
        accepted = set(self._grid.push_messages(messages))
        sent = [message for message in messages if message.metadata.message_id in accepted]
        sizes = {id(message.content): message_size(message) for message in {id(m.content): m for m in sent}.values()}
        self.traffic.down += sum(sizes[id(message.content)] for message in sent)  # shared contents are measured once
        return {message.metadata.message_id: message.metadata.dst_node_id for message in sent}

    def _pull(self, under_way: dict[str, int]) -> Iterator[tuple[int, Message]]:
        """Yields each reply with the node that was asked, and removes it from `under_way`."""
        if self._ended:
            raise SystemExit
        if not under_way:
            return
        for reply, size in self._inbox.take(list(under_way), self._largest_reply):
            node = under_way.pop(reply.metadata.reply_to_message_id, None)
            if node is not None:
                self.traffic.up += size
                yield node, reply
