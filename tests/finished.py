"""A run's folder as a run leaves it, written by hand: no federation has to be run to look at what is done with one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fedclip_flwr.base.settings import Settings
from fedclip_flwr.learning.adapters import make_adapter
from fedclip_flwr.runs import history, saved

CLASSES = ["cat", "dog", "fish"]


def finished(root: Path, *, status: str = "completed", summary: dict[str, Any] | None = None, **settings: Any) -> Path:
    """The folder of a run with the bundled CLIP, two sites `ward-0` and `lab-0`, and `sketch` held out."""
    folder = root / "20260102-030405"
    folder.mkdir(parents=True)
    given = {key.replace("_", "-"): value for key, value in settings.items()}
    facts = Settings().as_run_config() | {"sites": 2, "versions": {"torch": "2.9"}} | given
    saved.write_json(folder / history.SETTINGS, facts)

    def accuracies(seen: float, unseen: float) -> dict[str, Any]:
        return {"seen": seen, "unseen": unseen, "sites": {"ward-0": seen, "lab-0": seen}, "holdout_sites": {}}

    done: dict[str, Any] = {
        "examples": {"ward-0": [6, 2, 2], "lab-0": [600, 200, 200]},
        "rounds": 5,
        "holdout": "sketch",
        "zero_shot": accuracies(0.5, 0.25),
        "adapted": accuracies(0.712345, 0.375) | {"round": 4, "personal": None, "personal_metrics": None},
        "traffic": {
            "down_bytes": 6000,
            "up_bytes": 4000,
            "per_site_round_bytes": 2000.0,
            "full_model_bytes": 4_000_000,
            "times_less": 2000.0,
        },
        "privacy": None,
        "seconds": {"encode": 1.0, "rounds": 2.0, "total": 4.0},
        "failures": [],
    }
    saved.write_json(folder / history.SUMMARY, {"status": status, **done, **(summary or {})})
    made_for = {"model": "bundled", "model_revision": "", "class_names": CLASSES, "templates": ["a picture of a {}"]}
    adapter = make_adapter("attention", 128, identity=False)
    saved.write_tensors(folder / saved.TENSORS, adapter.state_dict(), 4)
    adapter_facts = {"kind": "attention", "rank": 4, "dim": 128, "blend": 0.5, **made_for, "round": 4}
    saved.write_json(folder / saved.FACTS, adapter_facts)
    return folder
