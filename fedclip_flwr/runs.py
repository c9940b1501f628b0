"""The run folder: what a run leaves behind, and how it is read again.

settings.json        the settings, the versions and the package's hash
metrics.jsonl        a line for each round
adapter.safetensors  the selected round's adapter; adapter.json: all that is needed to load it elsewhere
checkpoint/          the adapter of the last complete round
summary.json         how it ended
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType
from typing import Any

from safetensors import SafetensorError, safe_open

from fedclip_flwr import content
from fedclip_flwr.adapters import Adapter, make_adapter
from fedclip_flwr.config import Settings
from fedclip_flwr.errors import UserError
from fedclip_flwr.exchange import State, one_line
from fedclip_flwr.features import Features, results
from fedclip_flwr.federation import Line, Outcome
from fedclip_flwr.nodes import Nodes

PACKAGES = ("fedclip-flwr", "flwr", "torch", "transformers", "numpy")


class RunFolder:
    """A new run's folder. As a context manager it records how the run ends."""

    def __init__(self, settings: Settings, package: str) -> None:
        root, self._setting = results(settings)
        with content.writing_to(root, self._setting):
            self.path = _new_folder(root)
        self._settings, self._finished = settings, False
        facts = {**settings.as_run_config(), "versions": _versions(), "package": package}
        self._json("settings.json", facts)
        self._json("summary.json", {"status": "running"})
        _link(root / "latest", self.path.name)

    def line(self, line: Line) -> None:
        """Adds a line to metrics.jsonl."""
        facts = {
            "round": line.round,
            "seen": line.seen,
            "unseen": line.unseen,
            "val": line.validation,
            "loss": line.loss,
            "sites": len(line.reports),
            "bytes": line.bytes,
            "seconds": line.seconds,
        }
        with content.writing_to(self.path, self._setting), (self.path / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(facts) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def checkpoint(self, number: int, state: State) -> None:
        self._tensors("checkpoint/adapter.safetensors", state, {"round": str(number)})

    def adapter(self, number: int, state: State, features: Features) -> None:
        """The selected adapter, so far: that of round `number`."""
        settings = self._settings
        facts = {
            "kind": settings.adapter,
            "rank": settings.adapter_rank,
            "dim": features.classes.text.shape[1],
            "blend": settings.blend,
            "model": features.model,
            "model_content": features.model_content,
            "class_names": list(features.class_names),
            "prompts": [features.prompt.replace("{}", name) for name in features.class_names],
            "scale": features.classes.scale,
            "bias": features.classes.bias,
            "round": number,
        }
        self._tensors("adapter.safetensors", state, {"round": str(number)})
        self._json("adapter.json", facts)

    def finish(self, summary: dict[str, Any]) -> None:
        self._json("summary.json", summary)
        self._finished = True

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._finished:
            why = str(error) if isinstance(error, UserError) else one_line(repr(error))
            with contextlib.suppress(UserError):  # the disk may be what failed: the error itself is told
                self._json("summary.json", {"status": "failed", "why": why})

    def _json(self, name: str, facts: dict[str, Any]) -> None:
        text = json.dumps(facts, indent=2) + "\n"
        content.write_whole(self.path / name, lambda part: part.write_text(text), self._setting)

    def _tensors(self, name: str, state: State, facts: dict[str, str]) -> None:
        content.write_whole(self.path / name, lambda part: content.save_tensors(state, part, facts), self._setting)


def _new_folder(root: Path) -> Path:
    """A folder named by the time, that nobody else has."""
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    for number in range(1000):
        path = root / (f"{stamp}-{number}" if number else stamp)
        with contextlib.suppress(FileExistsError):
            path.mkdir()
            return path
    raise UserError(f"results-dir: {root} has no room for another run of {stamp}")


def _link(link: Path, name: str) -> None:
    """Lets the link point to the run, where the file system has links."""
    part = link.with_name(f".{link.name}.{name}")
    with contextlib.suppress(OSError):
        part.symlink_to(name)
        part.replace(link)


def _versions() -> dict[str, str]:
    found = {"python": sys.version.split()[0]}
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def summary_of(
    outcome: Outcome, nodes: Nodes, holdout: str | None, parameters: int | None, seconds: dict[str, float]
) -> dict[str, Any]:
    """What `summary.json` tells of a completed run; `parameters` counts the whole model's."""
    traffic = nodes.traffic
    per_round = outcome.site_round_bytes
    whole = None if parameters is None else 2 * 4 * parameters
    return {
        "status": "completed",
        "holdout": holdout,
        "zero_shot": _accuracies(outcome.zero_shot),
        "adapted": {**_accuracies(outcome.adapted), "round": outcome.adapted.round, "personal": None},
        "traffic": {
            "down_bytes": traffic.down,
            "up_bytes": traffic.up,
            "per_site_round_bytes": per_round,
            "full_model_bytes": whole,
            "times_less": None if whole is None else whole / per_round,
        },
        "seconds": seconds,
        "failures": [failure._asdict() for failure in nodes.failures],
    }


def _accuracies(line: Line) -> dict[str, Any]:
    sites = {site: report.test.accuracy for site, report in line.reports.items()}
    return {"seen": line.seen, "unseen": line.unseen, "sites": sites}


def load_adapter(folder: Path) -> tuple[Adapter, dict[str, Any]]:
    """The selected adapter of a run, and what it was made for."""
    path = folder / "adapter.json"
    if folder.is_dir() and not path.exists():
        raise UserError(f"{folder} holds no adapter: its run came to no round; summary.json there tells how it ended")
    try:
        facts = json.loads(path.read_text())
        adapter = make_adapter(facts["kind"], facts["dim"], rank=facts["rank"], blend=facts["blend"])
        like = adapter.state_dict()
        path = folder / "adapter.safetensors"
        with safe_open(path, "pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise UserError(f"{path} can't be read ({one_line(error)})") from None
    if {n: (t.shape, t.dtype) for n, t in state.items()} != {n: (t.shape, t.dtype) for n, t in like.items()}:
        raise UserError(f"{path} does not hold the {facts['kind']} adapter that adapter.json tells of")
    adapter.load_state_dict(state)
    return adapter, facts
