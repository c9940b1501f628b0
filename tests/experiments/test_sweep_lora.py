"""The sweep with LoRA among its methods."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedclip_flwr.base.errors import UserError
from fedclip_flwr.base.settings import Settings
from fedclip_flwr.experiments.comparison import compare, planned
from fedclip_flwr.experiments.simulate import make_sites, simulate
from fedclip_flwr.experiments.sweep import Trained
from fedclip_flwr.features import lora
from fedclip_flwr.features.opening import new_learner, open_features
from tests.experiments.test_sweep import folder, options
from tests.extras import needs

WITH_LORA = ("lora-layers=last:1", "lora-rank=2", "learning-rate=0.01")


@needs("lora")
def test_lora_gets_its_settings_and_no_other_method_does(tree: Path) -> None:
    plan, _ = planned(options(f"folder:{tree}", *WITH_LORA, methods="lora,lora-both,gate,fedavg"))
    found = {cell.method: cell for cell in plan.cells()}
    how = {name: cell.settings for name, cell in found.items()}
    assert [how[name].lora_train for name in ("lora", "lora-both")] == ["B", "both"]
    assert {name for name, each in how.items() if (each.lora_layers, each.lora_rank) == ("last:1", 2)} == {
        *("lora", "lora-both")
    }
    assert {(how[name].lora_layers, how[name].lora_rank) for name in ("zero-shot", "gate", "fedavg")} == {("all", 8)}
    assert {name: cell.trains for name, cell in found.items()} == {
        "fedavg": Trained("full-model"),
        "lora": Trained("lora", "vision", "last:1"),
        "lora-both": Trained("lora", "vision", "last:1"),
        "zero-shot": Trained(),
        "gate": Trained(),
    }


@needs("lora")
def test_lora_is_swept_beside_an_adapter(hard_tree: Path, tmp_path: Path, forks: None) -> None:
    how: dict[str, Any] = {"holdouts": "sketch", "seeds": 1, "rounds": 1, "out": str(tmp_path / "out")}
    table = compare(options(f"folder:{hard_tree}", *WITH_LORA, methods="lora,scale", **how))
    lora, zero = (
        next(line for line in table.splitlines() if f"| {row} |" in line) for row in ("ours, LoRA", "zero-shot")
    )
    settings = Settings(
        data=f"folder:{hard_tree}", method="lora", lora_layers="last:1", lora_rank=2, learning_rate=0.01
    )
    settings = replace(settings, num_server_rounds=1, holdout="sketch")
    features = open_features(settings, progress=False)
    sites, unseen = make_sites(features, "sketch", 1)
    start = new_learner(settings, features)
    result = simulate(sites, features.classes, unseen, settings, start=start)
    percents = [f"{100 * (value or 0):.1f}" for value in (result.selected.seen, result.selected.unseen)]
    assert " / ".join(percents) in lora
    assert result.selected != result.zero_shot
    assert f"{100 * (result.zero_shot.seen or 0):.1f} / {100 * (result.zero_shot.unseen or 0):.1f}" in zero
    assert "21.6 kB" in lora  # 2,304 numbers there and back


def test_a_sweep_has_lora_only_if_it_is_named(tree: Path, tmp_path: Path) -> None:
    plan, _ = planned(options(f"folder:{tree}"))
    assert not {"lora", "lora-both"} & {*plan.methods}


@needs("lora")
@pytest.mark.parametrize(
    ("given", "methods", "expected"),
    [
        ("lora-rank=2", "gate", "lora-rank: it is for LoRA; add lora or lora-both to --methods, or leave it out"),
        ("lora-train=both", "lora", "lora-train: the methods differ in it"),
        ("start=/somewhere", "lora", "start: it has no effect in a sweep; leave it out"),
        ("lora-layers=3", "lora", "lora-layers = '3': expected all or last:N"),
        ("lora-layers=last:99", "lora", "lora-layers = 'last:99': the vision tower has only 4 layers"),
        ("lora-rank=500", "lora", "lora-rank = 500: q_proj of the vision tower allows at most 128"),
        ("lora-modules=query", "lora", "lora-modules: a layer of the vision tower has no 'query'; it has k_proj"),
    ],
)
def test_settings_of_lora_that_can_not_be_are_refused(tree: Path, given: str, methods: str, expected: str) -> None:
    with pytest.raises(UserError) as caught:
        planned(options(f"folder:{tree}", given, methods=methods))
    assert expected in str(caught.value)


def test_lora_needs_images_and_peft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = f"features:{folder(tmp_path / 'f')}"
    monkeypatch.setattr(lora, "find_spec", lambda name: object())
    with pytest.raises(UserError, match=r"--methods lora: needs images, and features:.* has only their features"):
        planned(options(data, methods="lora"))
    monkeypatch.setattr(lora, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"--methods lora: method = 'lora' needs peft: pip install"):
        planned(options(data, methods="lora"))
