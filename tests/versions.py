"""A federation of one round in this process, whose sites' images can change from one version of the result to the next.

The server's own app runs over a grid in memory, and the sites' own app answers, from feature folders.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from flwr.app import Context, Message, RecordDict
from safetensors.torch import save_file
from torch.nn import functional as F

import client_app
import server_app
from fedclip_flwr.base.settings import Settings
from fedclip_flwr.flower.grids import RUN, Node, local_grid
from fedclip_flwr.learning.base import Examples

CLASSES = ["ant", "bee", "cat", "dog", "eel"]
DIM = 80


def text_of(names: Sequence[str]) -> torch.Tensor:
    """A text feature for each name, the same in every list."""
    rows = [torch.randn(DIM, generator=torch.Generator().manual_seed(sum(map(ord, name)))) for name in names]
    return torch.stack(rows) + 2 * torch.randn(DIM, generator=torch.Generator().manual_seed(0))


def images(count: int, seed: int, names: Sequence[str] = CLASSES, of: Sequence[int] = (0, 1, 2, 3)) -> Examples:
    """Features near those of the classes `of`."""
    chance = torch.Generator().manual_seed(seed)
    labels = torch.tensor(of)[torch.randint(len(of), (count,), generator=chance)]
    noise = torch.randn(count, DIM, generator=chance)
    return Examples(9 * F.normalize(F.normalize(text_of(names), dim=1)[labels] + 0.12 * noise, dim=1), labels)


def write(folder: Path, names: Sequence[str] = CLASSES, **domains: Examples) -> None:
    """A feature folder with the images of these domains."""
    folder.mkdir(parents=True, exist_ok=True)
    facts = {"model": "other/clip", "embedding_dim": DIM, "logit_scale": 30.0, "prompt": "a {}"}
    facts |= {"class_names": list(names), "domains": [*domains]}
    (folder / "features.json").write_text(json.dumps(facts))
    save_file({"text_features": text_of(names)}, folder / "classes.safetensors")
    for domain, found in domains.items():
        save_file({"image_features": found.features, "labels": found.labels}, folder / f"{domain}.safetensors")


@dataclass
class Federation:
    """The sites by name, each with its images; `run` runs with those that are connected."""

    place: Path
    names: Sequence[str] = field(default_factory=lambda: CLASSES)
    sites: dict[str, Examples] = field(default_factory=dict)
    node_config: dict[str, Any] = field(default_factory=dict)
    relays: dict[str, Path] = field(default_factory=dict)
    """The sites that answer with the sums of a run of their own group."""
    asked: list[tuple[str, str]] = field(default_factory=list)
    """The site and the kind of each message of the last run."""

    @property
    def results(self) -> Path:
        return self.place / "runs"

    def run(self, name: str, connected: Sequence[str] | None = None, **settings: Any) -> Path:
        """Runs a federation of these sites, of all by default; returns the run's folder."""
        self.asked.clear()
        given = {"method": "one-round", "holdout": "apart", "results-dir": str(self.results), "name": name}
        of = [*range(len(self.names))][:4]
        write(
            self.place / "server", self.names, apart=images(60, 99, self.names, of), own=images(3, 98, self.names, of)
        )
        config = Settings().as_run_config() | given | {"data": f"features:{self.place / 'server'}"}
        config |= {key.replace("_", "-"): value for key, value in settings.items()}
        nodes = {number: self._node(site, config) for number, site in enumerate(connected or [*self.sites], 2)}
        server_app.serve(local_grid(nodes), config)
        return self.results / name

    def update(self, earlier: str, name: str = "", connected: Sequence[str] | None = None, **settings: Any) -> Path:
        """The next version of a run."""
        before = {path.name for path in self.results.iterdir()}
        self.run(name, connected, update=earlier, **settings)
        (made,) = {path.name for path in self.results.iterdir()} - before
        return self.results / made

    def _node(self, site: str, config: Mapping[str, Any]) -> Node:
        folder = self.place / "sites" / site
        node: dict[str, Any] = {"site": site, "data": f"features:{folder}", **self.node_config}
        if site in self.relays:
            node = {"site": site, "group": str(self.relays[site]), **self.node_config}
        else:
            write(folder, self.names, own=self.sites[site])
        context = Context(RUN, 1, node, RecordDict(), dict(config))

        def answer(message: Message) -> Message:
            self.asked.append((site, message.metadata.message_type))
            return client_app.app(message, context)

        return answer


def tensors(run: Path) -> bytes:
    """The file of the run's result."""
    return (run / "adapter.safetensors").read_bytes()


def files_with(folder: Path, *parts: bytes) -> list[str]:
    """The files below the folder whose name or content has any of these."""
    found = [path for path in folder.rglob("*") if path.is_file()]
    return sorted(
        path.relative_to(folder).as_posix()
        for path in found
        if any(part in path.read_bytes() or part in str(path.relative_to(folder)).encode() for part in parts)
    )
