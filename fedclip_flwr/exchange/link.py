"""The two ends of a link: the server's, which sends each site no more than it lacks, and a site's.

With the codec `float32` whole adapters travel. With the others every adapter has a mark: all sites can make the first
one themselves; a site keeps the last one that it had, and gets the difference to the next as a parcel. A site that does
not have what a parcel builds on says so, and is sent the whole. What a site has trained goes back as a parcel for
someone who has what the site was sent. What rounding leaves over is kept at each end, to go with the next parcel.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from safetensors import SafetensorError

from fedclip_flwr.base import content, files, store
from fedclip_flwr.base.seeds import seed_of
from fedclip_flwr.base.tensors import State
from fedclip_flwr.exchange.codecs import CODECS, packed_size, unwrap, wrap
from fedclip_flwr.exchange.records import ExchangeError, LacksError, Task, mark_of, read_adapter, write_adapter

MONTH = 30 * 24 * 3600.0


class Downlink:
    """The server's end.

    `state` is the adapter as the sites have it after the last step, and `residual` what rounding has left over of it;
    every site begins with `start`.
    """

    def __init__(self, start: State, codec: str, seed: int) -> None:
        self.state, self._codec, self._seed = start, codec, seed
        self._start = self._mark = mark_of(start) if codec in CODECS else ""
        self._base, self._parcel = "", ArrayRecord()
        self.residual: State = {}
        self._held: dict[int, str] = {}

    def resume(self, state: State, residual: State) -> None:
        """As after the step that came to this state and left this over; sites are sent the whole first."""
        self.state, self.residual = state, residual
        if self._codec in CODECS:
            self._mark = mark_of(state)

    def step(self, wished: State, number: int) -> State:
        """Goes on to the adapter of round `number`: as `wished`, but for what packing it for the sites rounds away."""
        if self._codec not in CODECS:
            self.state = wished
            return wished
        parcel = wrap(self._codec, wished, self.state, self.residual, seed_of(self._seed, "down", number))
        self._base, self._parcel = self._mark, write_adapter({self._codec: parcel.packed})
        self.state, self.residual = parcel.arrives, parcel.residual
        self._mark = mark_of(self.state)
        return self.state

    def address(self, messages: list[Message], state: State) -> None:
        """Takes out of the messages, which all bring `state`, what the site that each goes to has already."""
        if self._codec not in CODECS:
            return
        mark = self._mark_of(state)
        made: dict[tuple[int, str], RecordDict] = {}  # nodes that have the same share one content
        for message in messages:
            held = self._held.get(message.metadata.dst_node_id, self._start)
            kind = "all of it" if held == mark else "parcel" if (held, mark) == (self._base, self._mark) else "nothing"
            whole = message.content
            message.content = made.setdefault((id(whole), kind), self._without(whole, kind, mark))

    def _without(self, whole: RecordDict, has: str, mark: str) -> RecordDict:
        if has == "nothing":
            return whole
        config = whole.config_records["config"]
        if has == "all of it":
            return RecordDict({"config": ConfigRecord({**config, "state": mark})})
        return RecordDict(
            {"arrays": self._parcel, "config": ConfigRecord({**config, "state": mark, "base": self._base})}
        )

    def _mark_of(self, state: State) -> str:
        return self._mark if state is self.state else mark_of(state)

    def lacks(self, node: int) -> None:
        """The node has nothing to build on."""
        self._held[node] = ""

    def receive(self, reply: Message, state: State) -> None:
        """Puts the whole adapter into the reply of a site that was sent `state`, so that any strategy can take it."""
        if self._codec not in CODECS:
            return
        self._held[reply.metadata.src_node_id] = self._mark_of(state)
        arrays = reply.content.array_records.get("arrays")
        if arrays is not None:
            packed = _read_parcel(arrays, self._codec, state)
            reply.content["arrays"] = write_adapter(unwrap(self._codec, packed, state))


def _read_parcel(arrays: ArrayRecord, codec: str, like: State) -> torch.Tensor:
    return read_adapter(arrays, {codec: torch.empty(packed_size(codec, like), dtype=torch.uint8)})[codec]


def forget(session: str = "") -> None:
    """Removes what the sites of this machine keep for the session, and for those of more than a month ago."""
    root = files.home() / "exchange"
    for folder in root.glob("*/"):
        with contextlib.suppress(OSError):  # other sites of this machine do the same
            if folder.name == session or folder.stat().st_mtime < time.time() - MONTH:
                shutil.rmtree(folder, ignore_errors=True)


class States(Protocol):
    """Where a site keeps states between messages: each below a folder (or none), under a name."""

    def read(self, name: str, folder: str = "") -> State | None:
        """The state of that name, if it is there and can be read."""

    def write(self, state: State, name: str, folder: str = "") -> None: ...

    def names(self, folder: str = "") -> list[str]: ...

    def remove(self, name: str, folder: str = "") -> None: ...


class StatesOnDisk:
    """In files, for the next message may come to another process."""

    def __init__(self, session: str) -> None:
        self._root = files.home() / "exchange" / session

    def _path(self, name: str, folder: str) -> Path:
        return self._root / folder / f"{name}.safetensors"

    def read(self, name: str, folder: str = "") -> State | None:
        try:
            return store.mapped(self._path(name, folder))[0]
        except (OSError, SafetensorError):
            return None

    def write(self, state: State, name: str, folder: str = "") -> None:
        files.write_whole(self._path(name, folder), lambda part: files.save_tensors(state, part, {}))

    def names(self, folder: str = "") -> list[str]:
        return [path.stem for path in (self._root / folder).glob("*.safetensors") if not path.is_dir()]

    def remove(self, name: str, folder: str = "") -> None:
        self._path(name, folder).unlink(missing_ok=True)


class StatesInMemory:
    """In memory, for sites of one process."""

    def __init__(self) -> None:
        self._states: dict[str, dict[str, State]] = defaultdict(dict)

    def read(self, name: str, folder: str = "") -> State | None:
        return self._states[folder].get(name)

    def write(self, state: State, name: str, folder: str = "") -> None:
        self._states[folder][name] = state

    def names(self, folder: str = "") -> list[str]:
        return [*self._states[folder]]

    def remove(self, name: str, folder: str = "") -> None:
        self._states[folder].pop(name, None)


class SiteCache:
    """A site's end: adapters by their marks, and its residuals.

    Simulated sites of one machine share the adapters. Those of the round before are kept: the message may come again.
    """

    def __init__(self, states: States, codec: str) -> None:
        self._states, self._codec = states, codec
        self._taken: State = {}

    def take(self, task: Task, like: State, start: Callable[[], State]) -> State:
        """The adapter that the message brings, with tensors as those of `like`; `start` makes the first one here."""
        if task.state:
            state = self._made(task, like, start)
            if mark_of(state) != task.state:
                raise LacksError("the adapter that the server builds on is another one here")
        elif task.arrays is not None:
            state = read_adapter(task.arrays, like)
        else:
            raise ExchangeError("the server's message lacks the adapter")
        if self._codec in CODECS:
            self._keep(state, task)
            self._taken = state
        return state

    def _made(self, task: Task, like: State, start: Callable[[], State]) -> State:
        base = self._find(task.base or task.state, start)
        if not task.base:
            return base
        if task.arrays is None or self._codec not in CODECS:
            raise ExchangeError("the server's message lacks the difference to the adapter that it builds on")
        made = unwrap(self._codec, _read_parcel(task.arrays, self._codec, like), base)
        if not all(tensor.isfinite().all() for tensor in made.values()):
            raise ExchangeError("the difference to the adapter comes to numbers that are not finite")
        return made

    def _find(self, mark: str, start: Callable[[], State]) -> State:
        if not re.fullmatch(r"[0-9a-f]+", mark):  # it comes from outside, and names a file
            raise LacksError("the server names an adapter in a way that can't be")
        known = self._states.read(mark)
        if known is None and mark == mark_of(first := start()):
            return first
        if known is None:
            raise LacksError("this site no longer has the adapter that the server builds on")
        return known

    def _keep(self, state: State, task: Task) -> None:
        mark = task.state or mark_of(state)
        if mark not in (names := self._states.names()):
            self._states.write(state, mark)
            for old in names:
                if old != task.base:
                    self._states.remove(old)

    def pack(self, trained: State, site: str, number: int, seed: int) -> State:
        """What is sent of the adapter that the site has made in round `number` of the one that it took."""
        if self._codec not in CODECS:
            return trained
        folder = content.file_name(site)
        earlier = sorted(int(name) for name in self._states.names(folder) if int(name) < number)
        residual = self._states.read(str(earlier[-1]), folder) if earlier else None
        parcel = wrap(self._codec, trained, self._taken, residual or {}, seed_of(seed, "up", site, number))
        if not all(tensor.isfinite().all() for tensor in parcel.residual.values()):
            raise ExchangeError("training came to numbers that are not finite")
        self._states.write(parcel.residual, str(number), folder)
        for old in earlier[:-1]:
            self._states.remove(str(old), folder)
        return {self._codec: parcel.packed}
