"""LoRA in real federations: over gRPC with TLS and over Ray with the same result, and killed in the middle."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file

from deploy import demo
from fedclip_flwr.base import Settings
from fedclip_flwr.data.drawn import DOMAINS
from fedclip_flwr.experiments.simulate import make_sites, simulate
from fedclip_flwr.features.lora import Lora
from fedclip_flwr.features.opening import new_learner, open_features
from fedclip_flwr.operations import simulation
from tests.extras import needs
from tests.test_running import assert_same_checkpoint, cut_off, fedclip, run_folder
from tests.trees import draw

pytestmark = [pytest.mark.federation, needs("lora", "simulation")]

SMALL: dict[str, Any] = {"method": "lora", "lora_layers": "last:1", "lora_rank": 2, "lora_modules": "v_proj,fc2"}


def given(**settings: Any) -> list[str]:
    return [f"{key.replace('_', '-')}={value}" for key, value in settings.items()]


@pytest.fixture
def both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Settings, demo.Outcome, demo.Outcome]:
    """The settings of a federation, and its result over TLS and simulated."""
    data = f"folder:{draw(tmp_path / 'pictures', DOMAINS, ('car', 'cat', 'fish'), 5)}"  # three sites have a domain each
    how = {"num_server_rounds": 2, "batch_size": 4, "data": data, **SMALL}
    monkeypatch.setattr(simulation, "stop_in_order", lambda word: None)
    return Settings(**how), *demo.demo(tmp_path, given(**how), f"data='{data}'")


def test_three_sites_over_tls_a_simulation_and_one_process_end_with_the_same_tensors(
    both: tuple[Settings, demo.Outcome, demo.Outcome],
) -> None:
    settings, deployed, simulated = both
    assert demo.difference(deployed, simulated) == pytest.approx(0, abs=1e-6)
    features = open_features(settings, progress=False)
    learner = new_learner(settings, features)
    assert isinstance(learner, Lora)
    sites, unseen = make_sites(features, settings.holdout, 3, settings.seed)
    truth = simulate(sites, features.classes, unseen, settings, start=learner)
    state = load_file(simulated.folder / "adapter.safetensors")
    assert state.keys() == truth.state.keys() | learner.frozen.keys()
    for name, tensor in {**truth.state, **learner.frozen}.items():
        torch.testing.assert_close(state[name], tensor, rtol=1e-5, atol=1e-6)
    assert deployed.summary["adapted"]["seen"] == pytest.approx(truth.selected.seen, abs=0.004)


class Resumed(NamedTuple):
    """The folders of a run that was never interrupted and of one that was killed and resumed; what that one said."""

    whole: Path
    cut: Path
    said: str


@pytest.fixture
def resumed(tree: Path, tmp_path: Path) -> Resumed:
    settings = given(**SMALL, lora_dropout=0.1, codec="int8", num_server_rounds=4, data=f"folder:{tree}", batch_size=4)
    done = fedclip("run", "--nodes", "2", f"results-dir={tmp_path / 'whole'}", *settings)
    assert done.returncode == 0, done.stdout + done.stderr
    folder = cut_off(1, tmp_path / "cut", *settings)
    done = fedclip("run", f"results-dir={tmp_path / 'cut'}", "resume=latest")
    assert done.returncode == 0, done.stdout + done.stderr
    return Resumed(run_folder(tmp_path / "whole"), folder, done.stdout)


def test_a_killed_run_resumes_to_the_same_bits(resumed: Resumed) -> None:
    assert "resuming after round" in resumed.said
    adapters = [(folder / "adapter.safetensors").read_bytes() for folder in (resumed.whole, resumed.cut)]
    assert adapters[0] == adapters[1]
    assert_same_checkpoint(resumed.whole, resumed.cut)
