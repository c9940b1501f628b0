from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel

from fedclip_flwr.base.errors import UserError
from fedclip_flwr.base.settings import Settings
from fedclip_flwr.data.folder import ImageFolder
from fedclip_flwr.features import models
from fedclip_flwr.features.base import Features
from fedclip_flwr.features.clip import Clip
from fedclip_flwr.features.encoded import Pixels
from fedclip_flwr.features.opening import open_features
from fedclip_flwr.learning.recipes import new_adapter
from fedclip_flwr.runs.checkpoint import Checkpoint
from fedclip_flwr.runs.folder import RunFolder, saved_settings
from fedclip_flwr.runs.opening import open_run
from fedclip_flwr.runs.saved import load_adapter
from fedclip_flwr.server.nodes import Failure
from fedclip_flwr.server.results import RoundResult, RunState


def complete(number: int, metrics: list[dict[str, Any]] | None = None) -> Checkpoint:
    """As after that round."""
    state = new_adapter(Settings(), 128).state_dict()
    line = RoundResult(0, {}, {}, 0, 0.0)
    return Checkpoint(RunState(number, state, state, line, line), {}, {}, {}, "key", {}, [], metrics or [])


def started(results: Path, **settings: object) -> RunFolder:
    return RunFolder(Settings(results_dir=str(results), **settings), "0123")  # type: ignore[arg-type]


def test_an_adapter_comes_back_with_all_that_it_was_made_for(tmp_path: Path, drawn: Features) -> None:
    run = started(tmp_path, adapter="gate", adapter_rank=2, blend=0.5)
    own = new_adapter(Settings(adapter="gate", adapter_rank=2, blend=0.5, seed=8), 128)
    with torch.no_grad():
        own.outer.weight.normal_()  # type: ignore[union-attr, operator]
    run.adapter(7, own.state_dict(), drawn)
    back, facts = load_adapter(run.path)
    features = drawn.examples("photo").ready().features[:5]
    assert torch.equal(back(features), own(features))
    assert not torch.allclose(back(features), features)
    assert facts["round"] == 7
    modes = {(run.path / name).stat().st_mode for name in ("adapter.safetensors", "adapter.json")}
    assert len(modes) == 1  # who may read the one may read the other
    assert facts["class_names"] == list(drawn.vocabulary.class_names)
    assert facts["model_content"] == drawn.model_content
    assert facts["scale"] == drawn.classes.scale


def test_a_blend_that_was_chosen_is_the_adapters(tmp_path: Path, drawn: Features) -> None:
    run = started(tmp_path, blend="auto", adapter="scale")
    state = new_adapter(Settings(adapter="scale"), 128).state_dict()
    run.adapter(3, state, drawn)
    assert load_adapter(run.path)[0].blend == 1.0
    run.adapter(3, state, drawn, 0.25)
    assert load_adapter(run.path)[0].blend == 0.25


def test_a_full_model_comes_back_as_a_model(tmp_path: Path, tree: Path) -> None:
    settings = Settings(data=f"folder:{tree}", method="full-model")
    features = open_features(settings, progress=False)
    assert isinstance(features, Pixels)
    learnt = features.whole_model()
    with torch.no_grad():
        for weight in learnt.parameters():
            weight.add_(0.01 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)))
    run = started(tmp_path, method="full-model")
    run.adapter(2, learnt.state_dict(), features)
    pixels = features.examples("photo").features
    images = [picture.image for picture in ImageFolder(tree).pictures("photo") if picture.image]
    back = Clip(models.find(str(run.path / "model")))
    seen = torch.nn.functional.normalize(torch.cat(list(back.encode_images(images))))
    torch.testing.assert_close(seen, learnt(pixels).detach(), rtol=0, atol=1e-5)
    plain = AutoModel.from_pretrained(run.path / "model")
    assert next(plain.parameters()).dtype == torch.float32
    with pytest.raises(UserError, match="holds no adapter"):
        load_adapter(run.path)


def test_a_damaged_adapter_is_reported(tmp_path: Path, drawn: Features) -> None:
    run = started(tmp_path)
    run.adapter(0, new_adapter(Settings(), 128).state_dict(), drawn)
    content = (run.path / "adapter.safetensors").read_bytes()
    (run.path / "adapter.safetensors").write_bytes(content[:-8])
    with pytest.raises(UserError, match="can't be read"):
        load_adapter(run.path)
    facts = json.loads((run.path / "adapter.json").read_text())
    (run.path / "adapter.safetensors").write_bytes(content)
    (run.path / "adapter.json").write_text(json.dumps({**facts, "kind": "scale"}))
    with pytest.raises(UserError, match="does not hold the scale adapter"):
        load_adapter(run.path)
    (run.path / "adapter.json").unlink()
    with pytest.raises(UserError, match="holds no adapter"):
        load_adapter(run.path)


def test_runs_of_the_same_second_in_other_folders_have_names_of_their_own_that_stay(tmp_path: Path) -> None:
    with started(tmp_path / "a") as one, started(tmp_path / "b") as other:
        assert one.run != other.run
        assert one.run.startswith(one.path.name)
    with again(one.path) as later:
        assert later.run == one.run


def test_what_a_killed_process_has_left_is_removed(tmp_path: Path) -> None:
    with started(tmp_path) as run:
        run.begin([])
        run.checkpoint(complete(1))
    for folder in (run.path, run.path / "checkpoint"):
        (folder / ".adapter.safetensors.0123456789abcdef").write_bytes(b"half")
    (run.path / ".notes").write_text("somebody's")
    (tmp_path / f".latest.{run.path.name}").symlink_to(run.path.name)
    started(tmp_path)  # a later one
    with again(run.path) as later:
        assert len([*run.path.rglob(".*")]) == 3  # so far nothing was written
        later.begin([])
    assert [path.name for path in run.path.rglob(".*")] == [".notes"]
    assert (tmp_path / "latest").resolve() == run.path


def test_another_version_of_the_package_is_reported(tmp_path: Path) -> None:
    with started(tmp_path) as run:
        assert not run.with_other_package
    with again(run.path) as later:
        assert not later.with_other_package
    with RunFolder(Settings(results_dir=str(tmp_path), resume=run.path.name), "4567") as later:
        assert later.with_other_package


def test_runs_of_the_same_second_get_folders_of_their_own_and_latest_is_the_last(tmp_path: Path) -> None:
    made = [started(tmp_path).path for _ in range(5)]
    assert len(set(made)) == 5
    assert (tmp_path / "latest").resolve() == made[-1]
    assert not list(tmp_path.glob(".*"))


def test_how_a_run_ended_is_written_down(tmp_path: Path) -> None:
    def summary(run: RunFolder) -> dict[str, object]:
        written: dict[str, object] = json.loads((run.path / "summary.json").read_text())
        return written

    run, failures = started(tmp_path), [Failure(1, "north", "out of memory")]
    assert summary(run) == {"status": "running", "round": 0, "failures": []}
    run.begin(failures, 2)
    run.checkpoint(complete(3))
    failures.append(Failure(4, "south", "no answer"))
    with pytest.raises(UserError), run:
        raise UserError("no site is there")
    assert summary(run) == {
        "status": "failed",
        "why": "no site is there",
        "round": 3,
        "failures": [
            {"round": 1, "site": "north", "why": "out of memory"},
            {"round": 4, "site": "south", "why": "no answer"},
        ],
    }
    with pytest.raises(ZeroDivisionError), (other := started(tmp_path)):
        _ = 1 / 0
    assert summary(other)["why"] == "ZeroDivisionError('division by zero')"
    for leaves in (SystemExit, KeyboardInterrupt):
        with pytest.raises(leaves), (stopped := started(tmp_path)):
            raise leaves
        assert summary(stopped)["status"] == "stopped"
    with (good := started(tmp_path)):
        good.finish({"status": "completed"})
    assert summary(good) == {"status": "completed"}


def test_results_that_cannot_be_written_are_reported(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"\): set results-dir to another folder"):
        started(tmp_path / "file")


NO_ROOM = """
import resource, sys
from fedclip_flwr.base.settings import Settings
from fedclip_flwr.base.errors import UserError
from fedclip_flwr.runs.folder import RunFolder
from tests.runs.test_folder import complete
with RunFolder(Settings(results_dir=sys.argv[1]), "0123") as run:
    run.checkpoint(complete(1))
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
    try:
        run.checkpoint(complete(2))
    except UserError as error:
        print(error)
        raise
"""


def test_on_a_full_disk_the_last_checkpoint_is_kept_and_the_user_warned(tmp_path: Path) -> None:
    script = "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n" + NO_ROOM
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, cwd=Path(__file__).parents[2]
    )
    assert "set results-dir to another folder" in done.stdout, done.stderr
    folder = tmp_path / "latest"
    assert json.loads((folder / "summary.json").read_text())["status"] == "failed"
    assert len(list((folder / "checkpoint").iterdir())) == 1
    with again(folder) as run:
        assert run.before
        assert run.before.state.round == 1


def again(path: Path, **settings: object) -> RunFolder:
    return started(path.resolve().parent, resume=path.name, **settings)


def test_a_run_continues_in_its_folder_with_the_lines_up_to_its_last_complete_round(tmp_path: Path) -> None:
    first = started(tmp_path, adapter="gate")
    first.begin([], 2)
    for number in range(3):
        first.line(RoundResult(number, {}, {}, 0, 0.0))
        if number < 2:
            first.checkpoint(complete(number + 1, first.metrics))
    with pytest.raises(SystemExit), first:
        raise SystemExit
    started(tmp_path)  # a later one
    with again(first.path, adapter="gate", num_server_rounds=7, early_stop=3) as run:
        assert run.path == first.path
        assert run.before
        assert len((run.path / "metrics.jsonl").read_text().splitlines()) == 3  # so far nothing was written
        run.begin([], 2)
        assert [line["round"] for line in run.metrics] == [0, 1]
        assert run.metrics == [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
        settings = json.loads((run.path / "settings.json").read_text())
        assert (settings["num-server-rounds"], settings["resume"], settings["sites"]) == (7, "", 2)
        assert (tmp_path / "latest").resolve() == first.path
        assert "after round 2 with resume='" in run.how_to_resume
    with again(tmp_path / "latest", adapter="gate") as run:
        assert run.path == first.path
    given, sites = saved_settings(Settings(results_dir=str(tmp_path), resume="latest"))
    assert (given["adapter"], given["num-server-rounds"], given["early-stop"], sites) == ("gate", 7, 3, 2)
    facts = json.loads((first.path / "settings.json").read_text())
    (first.path / "settings.json").write_text(json.dumps(facts | {"sites": "3"}))
    assert saved_settings(Settings(results_dir=str(tmp_path), resume=first.path.name))[1] is None
    assert given.keys() == Settings.keys().keys() - {"name", "resume", "results-dir"}


def test_a_run_with_a_name_has_it_for_its_folder_and_keeps_it(tmp_path: Path) -> None:
    first = started(tmp_path, name="gate-b32", adapter="gate")
    first.begin([], 2)
    first.line(RoundResult(0, {}, {}, 0, 0.0))
    first.checkpoint(complete(1, first.metrics))
    with pytest.raises(SystemExit), first:
        raise SystemExit
    assert first.path == tmp_path / "gate-b32"
    assert first.run.startswith("gate-b32-")
    with pytest.raises(UserError, match=f"name = 'gate-b32': {tmp_path} has a run of that name; give another one, or"):
        started(tmp_path, name="gate-b32")
    with pytest.raises(UserError, match="has a run of that name"):
        open_run({"name": "gate-b32", "results-dir": str(tmp_path)})
    with pytest.raises(UserError, match="a resumed run keeps its name; leave it out"):
        Settings.from_run_config({"name": "other", "resume": "gate-b32"})
    with again(first.path, adapter="gate") as run:
        run.begin([], 2)
    assert json.loads((first.path / "settings.json").read_text())["name"] == "gate-b32"


def test_what_a_run_can_not_resume_from_is_reported_and_nothing_is_written(tmp_path: Path) -> None:
    with started(tmp_path, adapter="gate", seed=7) as first:
        first.begin([], 2)
        first.checkpoint(complete(1))
        first.finish({"status": "completed"})
        with pytest.raises(UserError, match=f"resume = '{first.path.name}': that run is still under way"):
            again(first.path, adapter="gate", seed=7)
    before = {path: path.read_bytes() for path in first.path.rglob("*.*")}
    with pytest.raises(UserError, match='that run has different settings; give the same: adapter="gate" seed=7'):
        again(first.path)
    with pytest.raises(UserError, match=f"there is no such run in {tmp_path}; the latest are {first.path.name}"):
        again(tmp_path / "yesterday")
    with pytest.raises(UserError, match=r"there is no such run in .*; it has no runs yet"):
        started(tmp_path / "empty", resume="latest")
    with pytest.raises(UserError, match="too few sites"), again(first.path, adapter="gate", seed=7):
        raise UserError("too few sites")
    assert {path: path.read_bytes() for path in first.path.rglob("*.*")} == before
    (first.path / "checkpoint" / "adapter.safetensors").write_bytes(b"?")
    with pytest.raises(UserError, match="can't be read"):
        again(first.path, adapter="gate", seed=7)
    (first.path / "settings.json").write_text("{")
    with pytest.raises(UserError, match=r"settings.json is damaged .*restore a copy"):
        again(first.path, adapter="gate", seed=7)


@pytest.mark.parametrize("dp", ["central", "local"])
def test_the_number_of_sites_that_have_all_noise_can_not_change(tmp_path: Path, dp: str) -> None:
    private: dict[str, Any] = {"method": "one-round", "dp": dp, "dp_unit": "image", "epsilon": 1.0}
    private["secure_aggregation"] = True
    with started(tmp_path, **private, min_sites=9) as first:
        first.begin([], 9)
    if dp == "local":
        again(first.path, **private, min_sites=3)
        return
    with pytest.raises(UserError, match="that run has different settings; give the same: min-sites=9"):
        again(first.path, **private, min_sites=3)
    again(first.path, **private, min_sites=9)


def test_a_run_that_came_to_no_round_begins_anew(tmp_path: Path) -> None:
    with pytest.raises(SystemExit), (first := started(tmp_path)):
        raise SystemExit
    with again(first.path) as run:
        assert run.before is None
        assert run.how_to_resume == ""


def test_once_stopped_nothing_more_is_written_by_whoever_does_not_know_yet(tmp_path: Path) -> None:
    """In a simulation, whoever stops it is another thread than the run."""
    run = started(tmp_path)
    run.begin([], 2)
    run.checkpoint(complete(1))
    run.stop()
    before = {path: path.read_bytes() for path in run.path.rglob("*.*")}
    with pytest.raises(SystemExit), run:
        run.checkpoint(complete(2))
    assert {path: path.read_bytes() for path in run.path.rglob("*.*")} == before
    summary = json.loads((run.path / "summary.json").read_text())
    assert (summary["status"], summary["round"]) == ("stopped", 1)
    assert summary["why"] == f"it was stopped from outside. Resume it after round 1 with resume='{run.path.name}'."


def test_who_looks_whether_a_folder_is_held_does_not_keep_a_run_from_going_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with RunFolder(Settings(results_dir=str(tmp_path)), "0123") as run:
        pass
    looking = os.open(run.path, os.O_RDONLY)
    fcntl.flock(looking, fcntl.LOCK_SH)  # as history.held does for a moment
    monkeypatch.setattr("fedclip_flwr.runs.folder.time.sleep", lambda _: fcntl.flock(looking, fcntl.LOCK_UN))
    with RunFolder(Settings(results_dir=str(tmp_path), resume="latest"), "0123") as again:
        assert again.path == run.path
    os.close(looking)
