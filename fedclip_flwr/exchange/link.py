"""The two ends of a link: the server's `Downlink`, which sends each site only what it lacks, and a site's `SiteCache`.

With the codec `float32`, whole adapters are sent. With the others every adapter has a mark, a hash of its numbers. Each
site can make the initial adapter itself, keeps the latest one, and gets the difference to the next one as a payload. A
site without the base of a payload reports that and gets the complete adapter. A site sends its trained adapter as a
difference to the one that it received. Each end adds its rounding errors (residuals) to its next payload.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from safetensors import SafetensorError

from fedclip_flwr.base import content, files, store, tensorfile
from fedclip_flwr.base.seeds import seed_of
from fedclip_flwr.base.tensors import State
from fedclip_flwr.exchange.codecs import packed_size, packs, unwrap, wrap
from fedclip_flwr.exchange.records import ExchangeError, LacksError, Task, mark_of, read_adapter, write_adapter

ASKED = "asked"
"""The name under which a site keeps, beside a noised answer, what was asked for."""
MONTH = 30 * 24 * 3600.0


class Downlink:
    """The server's end.

    `state` is the adapter that the sites have after the last step, and `residual` its rounding error; every site
    begins with `start`.
    """

    def __init__(self, start: State, codec: str, seed: int) -> None:
        self.state, self._codec, self._seed = start, codec, seed
        self._start = self._mark = mark_of(start) if packs(codec) else ""
        self._base, self._payload = "", ArrayRecord()
        self.residual: State = {}
        self._held: dict[int, str] = {}

    def resume(self, state: State, residual: State) -> None:
        """Continue after the step with this state and residual; sites first get the complete adapter."""
        self.state, self.residual = state, residual
        if packs(self._codec):
            self._mark = mark_of(state)

    def advance(self, target: State, number: int) -> State:
        """Move to the adapter of round `number` and return it: `target`, up to the rounding of the codec."""
        if not packs(self._codec):
            self.state = target
            return target
        payload = wrap(self._codec, target, self.state, self.residual, seed_of(self._seed, "down", number))
        self._base, self._payload = self._mark, write_adapter({self._codec: payload.packed})
        self.state, self.residual = payload.decoded, payload.residual
        self._mark = mark_of(self.state)
        return self.state

    def address(self, messages: list[Message], state: State) -> None:
        """Remove from each message, which carries `state`, what its receiver already has."""
        if not packs(self._codec):
            return
        mark = self._mark_of(state)
        made: dict[tuple[int, str], RecordDict] = {}  # nodes with the same state share one content
        for message in messages:
            held = self._held.get(message.metadata.dst_node_id, self._start)
            has = "state" if held == mark else "base" if (held, mark) == (self._base, self._mark) else "nothing"
            complete = message.content
            message.content = made.setdefault((id(complete), has), self._without(complete, has, mark))

    def _without(self, complete: RecordDict, has: str, mark: str) -> RecordDict:
        if has == "nothing":
            return complete
        config = complete.config_records["config"]
        if has == "state":
            return RecordDict({"config": ConfigRecord({**config, "state": mark})})
        return RecordDict(
            {"arrays": self._payload, "config": ConfigRecord({**config, "state": mark, "base": self._base})}
        )

    def _mark_of(self, state: State) -> str:
        return self._mark if state is self.state else mark_of(state)

    def lacks(self, node: int) -> None:
        """Note that the node does not have the base: it gets the complete adapter next."""
        self._held[node] = ""

    def receive(self, reply: Message, state: State) -> None:
        """Decode the adapter in the reply of a site that received `state`, so that any strategy can use it."""
        if not packs(self._codec):
            return
        self._held[reply.metadata.src_node_id] = self._mark_of(state)
        arrays = reply.content.array_records.get("arrays")
        if arrays is not None:
            packed = _read_payload(arrays, self._codec, state)
            reply.content["arrays"] = write_adapter(unwrap(self._codec, packed, state))


def _read_payload(arrays: ArrayRecord, codec: str, like: State) -> torch.Tensor:
    return read_adapter(arrays, {codec: torch.empty(packed_size(codec, like), dtype=torch.uint8)})[codec]


def forget(session: str = "") -> None:
    """Remove what the sites of this machine keep for the session, and for sessions older than a month."""
    root = files.home() / "exchange"
    for folder in root.glob("*/"):
        with contextlib.suppress(OSError):  # other sites of this machine may remove it too
            if folder.name == session or folder.stat().st_mtime < time.time() - MONTH:
                shutil.rmtree(folder, ignore_errors=True)


class StatesOnDisk:
    """The states that a site keeps between messages: in files, because another process may answer the next one."""

    def __init__(self, session: str) -> None:
        self._root = files.home() / "exchange" / session

    def _path(self, name: str, folder: str) -> Path:
        return self._root / folder / f"{name}.safetensors"

    def read(self, name: str, folder: str = "") -> State | None:
        """The state of that name; None if it is missing or unreadable."""
        try:
            return store.mapped(self._path(name, folder))[0]
        except (OSError, SafetensorError):
            return None

    def write(
        self, state: State, name: str, folder: str = "", put: Callable[[Path, Path], object] = os.replace
    ) -> None:
        files.write_atomic(self._path(name, folder), lambda part: tensorfile.save(state, part, {}), put=put)

    def add(self, state: State, name: str, folder: str) -> None:
        """As `write`, but what is there stays, also what another process writes meanwhile."""
        self.write(state, name, folder, files.unless_there)

    def names(self, folder: str = "") -> list[str]:
        return [path.stem for path in (self._root / folder).glob("*.safetensors") if not path.is_dir()]

    def remove(self, name: str, folder: str = "") -> None:
        self._path(name, folder).unlink(missing_ok=True)


class StatesInMemory:
    """As `StatesOnDisk`, for sites in one process."""

    def __init__(self) -> None:
        self._states: dict[str, dict[str, State]] = defaultdict(dict)

    def read(self, name: str, folder: str = "") -> State | None:
        return self._states[folder].get(name)

    def write(self, state: State, name: str, folder: str = "") -> None:
        self._states[folder][name] = state

    def add(self, state: State, name: str, folder: str) -> None:
        self._states[folder].setdefault(name, state)

    def names(self, folder: str = "") -> list[str]:
        return [*self._states[folder]]

    def remove(self, name: str, folder: str = "") -> None:
        self._states[folder].pop(name, None)


class SiteCache:
    """A site's end: adapters by their marks, and its residuals.

    Simulated sites of one machine share the adapters. The previous one is kept, because a message may be repeated.
    """

    def __init__(self, states: StatesOnDisk | StatesInMemory, codec: str) -> None:
        self._states, self._codec = states, codec
        self._received: State = {}

    def take(self, task: Task, like: State, start: Callable[[], State]) -> State:
        """The adapter in the message, with tensors like those of `like`; `start` makes the initial one."""
        if task.state:
            state = self._made(task, like, start)
            if mark_of(state) != task.state:
                raise LacksError("this site's adapter differs from the one that the server expects here")
        elif task.arrays is not None:
            state = read_adapter(task.arrays, like)
        else:
            raise ExchangeError("the server's message lacks the adapter")
        if packs(self._codec):
            self._keep(state, task)
            self._received = state
        return state

    def _made(self, task: Task, like: State, start: Callable[[], State]) -> State:
        base = self._find(task.base or task.state, start)
        if not task.base:
            return base
        if task.arrays is None or not packs(self._codec):
            raise ExchangeError("the server's message lacks the difference to its base adapter")
        made = unwrap(self._codec, _read_payload(task.arrays, self._codec, like), base)
        if not all(tensor.isfinite().all() for tensor in made.values()):
            raise ExchangeError("the server's difference leads to an adapter with numbers that are not finite")
        return made

    def _find(self, mark: str, start: Callable[[], State]) -> State:
        if not re.fullmatch(r"[0-9a-f]+", mark):  # untrusted, and used as a file name
            raise LacksError("invalid adapter mark in the server's message")
        known = self._states.read(mark)
        if known is None and mark == mark_of(first := start()):
            return first
        if known is None:
            raise LacksError("this site no longer has the server's base adapter")
        return known

    def _keep(self, state: State, task: Task) -> None:
        mark = task.state or mark_of(state)
        if mark not in (names := self._states.names()):
            self._states.write(state, mark)
            for old in names:
                if old != task.base:
                    self._states.remove(old)

    def once(self, site: str, asked: str, make: Callable[[], State]) -> State:
        """What `make` makes of noise: in a session it is made once, as two answers would tell more than one.

        `asked` says what the server asks for. Once that has changed, or the answer is damaged, there is none.
        """
        name, folder = content.file_name(site), "noised"
        if self._states.read(name, folder) is None:
            self._states.add({**make(), ASKED: torch.tensor([*asked.encode()], dtype=torch.uint8)}, name, folder)
        found = {name: tensor.clone() for name, tensor in (self._states.read(name, folder) or {}).items()}
        if bytes(found.pop(ASKED, torch.zeros(0)).tolist()) != asked.encode():
            raise ExchangeError(
                "this site gives noised sums only once in a run, and has given others than these (another noise, or "
                "other directions): resume it with the settings that it began with, or start a new run"
            )
        return found

    def pack(self, trained: State, site: str, number: int, seed: int) -> State:
        """The tensors to send for the adapter that the site trained in round `number` from the one it received."""
        if not packs(self._codec):
            return trained
        folder = content.file_name(site)
        earlier = sorted(int(name) for name in self._states.names(folder) if int(name) < number)
        residual = self._states.read(str(earlier[-1]), folder) if earlier else None
        payload = wrap(self._codec, trained, self._received, residual or {}, seed_of(seed, "up", site, number))
        if not all(tensor.isfinite().all() for tensor in payload.residual.values()):
            raise ExchangeError("training produced numbers that are not finite")
        self._states.write(payload.residual, str(number), folder)
        for old in earlier[:-1]:
            self._states.remove(str(old), folder)
        return {self._codec: payload.packed}
