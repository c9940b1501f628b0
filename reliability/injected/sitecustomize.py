"""Lets the processes of a federation stand still at points that the harness names, so that it can act from outside.

Python imports this by itself in every process that has this folder on its path. Where `RELIABILITY` names a folder,
each process adds a line to `passed` there for each point that it comes to, and stands still at one if the folder `hold`
has a file of that point's name (with @ and a site's name, if that one only is meant), in which is at which time it is
to stop there. The file then lies in `held`, with the process's number, and the process goes on once it is removed. All
other threads go on meanwhile.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

PLACE = Path(os.environ.get("RELIABILITY", ""))
SITE = os.environ.get("RELIABILITY_SITE", "")
HEARTBEAT = int(os.environ.get("RELIABILITY_HEARTBEAT", "30"))
"""Seconds between signs of life: Flower's own, unless the harness wants them sooner. A program that shows none so soon
after it was started is started twice."""
_count: Counter[str] = Counter()


def reached(point: str, **more: object) -> None:
    """This process has come to the point, of which more may be noted."""
    _count[point] += 1
    line = {"point": point, "count": _count[point], "process": os.getpid(), "site": SITE, **more}
    with (PLACE / "passed").open("a") as file:
        file.write(json.dumps(line) + "\n")
    for order in (PLACE / "hold" / point, PLACE / "hold" / f"{point}@{SITE}"):
        held = PLACE / "held" / f"{order.name}.{os.getpid()}"
        with contextlib.suppress(OSError):  # there is no such order, or another process has just followed it
            if _count[point] >= int(order.read_text()):
                order.rename(held)
        while held.exists():
            time.sleep(0.02)


def around(
    owner: object, name: str, before: Callable[..., object] | None = None, after: Callable[..., object] | None = None
) -> None:
    """From now on `before` is called with what a function is called with, and `after` with what it has returned too."""
    function = vars(owner)[name]

    @functools.wraps(function)
    def called(*given: Any, **named: Any) -> Any:
        if before:
            before(*given, **named)
        result = function(*given, **named)
        if after:
            after(result, *given, **named)
        return result

    setattr(owner, name, called)


def grid(module: ModuleType) -> None:
    """The ServerApp's messages."""
    kind = getattr(module, "GrpcGrid", None) or module.HttpGrid
    push = kind.push_messages

    def pushed(self: Any, messages: Iterable[Any]) -> Any:
        messages = list(messages)
        result = push(self, messages)
        for kind in sorted({message.metadata.message_type for message in messages}):
            reached(f"server has sent {kind}")
        return result

    kind.push_messages = pushed


def inbox(module: ModuleType) -> None:
    take = module.Inbox.take

    def taken(*given: Any) -> Iterator[Any]:
        for reply, size in take(*given):
            if reply.metadata.message_type == "train":
                reached("server has an answer")
            yield reply, size

    module.Inbox.take = taken


def averaging(module: ModuleType) -> None:
    around(module.Sums, "close", before=lambda *_: reached("server averages"))


def files(module: ModuleType) -> None:
    """The files of a run."""
    write_atomic = module.write_atomic

    def written(path: Path, write: Any, setting: str = "FEDCLIP_HOME", put: Any = os.replace) -> None:
        if path.name not in ("adapter.safetensors", "adapter.json", "summary.json"):
            return write_atomic(path, write, setting, put)  # type: ignore[no-any-return]
        what = f"{path.parent.name} {path.name}" if path.parent.name == "checkpoint" else path.name

        def placed(part: Path, to: Path) -> None:
            last = what == "summary.json" and json.loads(part.read_text())["status"] == "completed"
            reached(f"server puts {'the last ' * last}{what} in place")
            put(part, to)

        write_atomic(path, write, setting, placed)
        reached(f"server has put {what} in place")
        return None

    module.write_atomic = written  # type: ignore[attr-defined]


def supernode(module: ModuleType) -> None:
    def taken(run: int | None, **_: Any) -> None:
        if run is not None:
            reached("site has taken a message")

    around(module, "_pull_and_store_message", lambda **_: reached("site asks"), taken)
    around(module, "_push_messages", after=lambda *_, **__: reached("site has sent its answer"))


def clientapp(module: ModuleType) -> None:
    around(module, "pull_task_input", before=lambda *_: reached("answer begins"))
    around(module, "push_message", before=lambda *_: reached("answer goes out"))


def site_work(module: ModuleType) -> None:
    around(module, "learn", before=lambda *_: reached("answer is being learnt"))


def constants(module: ModuleType) -> None:
    module.HEARTBEAT_DEFAULT_INTERVAL = HEARTBEAT  # type: ignore[attr-defined]


CHANGES: dict[str, Callable[[ModuleType], None]] = {
    "flwr.common.constant": constants,
    "flwr.superlink.grid.grpc_grid": grid,
    "flwr.superlink.grid.http_grid": grid,
    "flwr.supernode.start_client_internal": supernode,
    "flwr.supernode.runtime.run_clientapp": clientapp,
    "fedclip_flwr.base.files": files,
    "fedclip_flwr.server.averaging": averaging,
    "fedclip_flwr.flower.inbox": inbox,
    "fedclip_flwr.site.work": site_work,
}


if "RELIABILITY" in os.environ:
    from onload import change  # type: ignore[import-not-found]  # beside this file

    change(CHANGES)
