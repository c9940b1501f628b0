"""`fedclip relay`: the site of the federation above that answers with the sums of this machine's run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from fedclip_flwr.base import UserError
from fedclip_flwr.flower import pinned
from fedclip_flwr.operations.doctor import read_node
from fedclip_flwr.runs import history
from fedclip_flwr.runs.relay import group_of
from fedclip_flwr.site.context import GROUP


def start(
    run: str, results: Path | None, node_config: str, options: Sequence[str], say: Callable[[str], None]
) -> NoReturn:
    """Replaces this process by the site's SuperNode; `options` are those of `fedclip site`."""
    if run.startswith("-"):
        raise UserError(f"{run}: name the run first: fedclip relay RUN --superlink HOST:PORT …")
    path = str(history.where(run, results).absolute())
    quote = '"' if "'" in path else "'"  # Flower knows no other escape
    group = group_of({**read_node(node_config), GROUP: path})
    say(f"{group.site} passes on {group}, and from then on the newest version of that run")
    pinned.start([*options, "--node-config", f"{node_config} {GROUP}={quote}{path}{quote}"])
