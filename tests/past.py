"""Run folders as runs leave them, made by hand."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fedclip_flwr.base.settings import Settings

FAILURE = {"round": 2, "site": "photo-0", "why": "no answer"}


def line(number: int, seen: float | None = 0.5, unseen: float | None = 0.25, **more: Any) -> dict[str, Any]:
    """What metrics.jsonl has of a round: two sites, 1000 bytes each, two seconds."""
    figures = {"round": number, "seen": seen, "unseen": unseen, "val": 0.5, "loss": 0.75, "sites": 2}
    return {**figures, "bytes": 2000, "seconds": 2.0, **more}


def summary(seen: float = 0.75, unseen: float | None = 0.5, **more: Any) -> dict[str, Any]:
    """What summary.json has of a completed run of two sites, from a half and a quarter."""

    def results(seen: float, unseen: float | None) -> dict[str, Any]:
        return {"seen": seen, "unseen": unseen, "sites": {"art-0": seen, "photo-0": seen}, "holdout_sites": {}}

    own = {"personal": None, "personal_metrics": None}
    return {
        "status": "completed",
        "holdout": "sketch",
        "zero_shot": results(0.5, 0.25),
        "adapted": {**results(seen, unseen), "round": 2, **own},
        "traffic": {"down_bytes": 3000, "up_bytes": 4000, "per_site_round_bytes": 1000.0, "times_less": 41.0},
        "privacy": None,
        "seconds": {"encode": 1.0, "rounds": 2.0, "total": 12.4},
        "rounds": 3,
        "failures": [],
        **more,
    }


def make(
    path: Path, metrics: Iterable[dict[str, Any]] = (), result: dict[str, Any] | None = None, **settings: Any
) -> Path:
    """A run's folder: nothing holds it, so it is no longer running."""
    path.mkdir(parents=True, exist_ok=True)
    facts = {**Settings(num_server_rounds=3).as_run_config(), "sites": 2, "package": "0123", **settings}
    (path / "settings.json").write_text(json.dumps(facts))
    (path / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in metrics))
    if result is not None:
        (path / "summary.json").write_text(json.dumps(result))
    return path


def completed(path: Path, **settings: Any) -> Path:
    return make(path, [line(0), line(1, 0.6, 0.4), line(2, 0.75, 0.5), line(3, 0.7, 0.5)], summary(), **settings)
