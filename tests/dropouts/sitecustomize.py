"""Members drop out in steps of secure aggregation, as planned; and what there is to see is written down.

Python imports this by itself in every process that has this folder on its path. Where `DROPOUTS` names a folder, its
`plan.json` has for each round the members that drop out, each with its step. Sites write their updates, or sums, and
secrets to `true` there, and the server what it receives to `seen`, and what it makes of it to `made`; see
tests/test_secure.py.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

PLACE = Path(os.environ.get("DROPOUTS", ""))
STEPS = ("keys", "shares", "masked", "unmask")


def lost(name: str, number: int) -> str:
    """The step in which the member drops out in this round."""
    step: str = json.loads((PLACE / "plan.json").read_text())[number - 1].get(name, "")
    return step


def write(folder: str, name: str, data: bytes) -> None:
    (PLACE / folder).mkdir(exist_ok=True)
    (PLACE / folder / f"{name}.{os.getpid()}.{os.urandom(4).hex()}").write_bytes(data)


def at_sites(site: Any) -> None:
    now = {"in": ""}

    def writing(make: Callable[..., Any]) -> Callable[..., Any]:
        def made(*given: Any) -> Any:
            numbers = make(*given)
            write("true", now["in"], numbers.tobytes())
            return numbers

        return made

    def dropping(step: str, answer: Callable[..., Any]) -> Callable[..., Any]:
        def answered(content: Any, memory: Any, *more: Any) -> Any:
            number = content.config_records["config"]["server-round"]
            name = content.config_records["masking"].get("name") or memory[site.MEMORY]["name"]
            now["in"] = f"update-{number}-{name}"
            made = answer(content, memory, *more)
            kept = memory[site.MEMORY]
            for secret in [*kept["private"], kept["seed"]]:
                if secret:
                    write("true", f"secret-{number}-{name}", secret)
            if lost(name, number) == step:
                raise site.ExchangeError(f"gone in {step}")
            return made

        return answered

    site.quantise, site.unsigned = writing(site.quantise), writing(site.unsigned)
    for step, answer in site.STEPS.items():
        site.STEPS[step] = dropping(step, answer)
    site.masked, site.masked_sums = dropping("masked", site.masked), dropping("masked", site.masked_sums)


def the_sum(server: Any) -> None:
    def writing(take: Callable[..., Any]) -> Callable[..., Any]:
        def taken(total: Any, *more: Any) -> Any:
            done = len([*(PLACE / "made").glob("*")]) if (PLACE / "made").exists() else 0
            write("made", f"{done + 1}", total.tobytes())
            return take(total, *more)

        return taken

    server.dequantise, server.signed = writing(server.dequantise), writing(server.signed)


def at_the_server(inbox: Any) -> None:
    from flwr.common.serde import recorddict_to_proto

    take = inbox.Inbox.take

    def taken(*given: Any) -> Iterator[Any]:
        for reply, size in take(*given):
            if reply.has_content():
                kind = reply.metadata.message_type
                write("seen", f"{kind}-whole", recorddict_to_proto(reply.content).SerializeToString())
                for record in reply.content.array_records.values():
                    for name, array in record.items():
                        write("seen", f"{kind}-{name}", array.numpy().tobytes())
            yield reply, size

    inbox.Inbox.take = taken


def patient(nodes: Any) -> None:
    """No site is so slow that the only round begins without it."""
    nodes.STARTUP = 900.0


if "DROPOUTS" in os.environ:
    from onload import change  # type: ignore[import-not-found]  # of reliability/injected, which is on the path, too

    changes = {
        "exchange.secure.site": at_sites,
        "server.secure_sum": the_sum,
        "server.nodes": patient,
        "flower.inbox": at_the_server,
    }
    change({f"fedclip_flwr.{name}": made for name, made in changes.items()})
