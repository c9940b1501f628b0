from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fedclip_flwr.base.errors import UserError
from fedclip_flwr.base.settings import Settings
from fedclip_flwr.cli import app
from fedclip_flwr.features import models
from fedclip_flwr.flower import lines
from fedclip_flwr.operations import simulation
from fedclip_flwr.runs.folder import RunFolder
from tests.extras import needs
from tests.processes import until_gone

PROJECT = Path(__file__).parents[2]


def test_a_machine_of_a_real_site_cannot_simulate_and_says_what_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match="extra `simulation`, or give --on NAME"):
        simulation.prepared(3, [])


def test_flowers_commands_install_nothing_at_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (name,) = lines.NO_INSTALLATION
    monkeypatch.delenv(name)
    assert simulation.environment(tmp_path)[name] == "1"


@needs("simulation")
def test_a_run_that_was_stopped_before_it_met_its_sites_asks_how_many_there_are(tmp_path: Path) -> None:
    results = f"results-dir={tmp_path}"
    with RunFolder(Settings(results_dir=str(tmp_path)), "0123") as run:
        assert json.loads((run.path / "settings.json").read_text())["sites"] is None
    with pytest.raises(UserError, match="it was stopped before its sites connected: set --nodes"):
        simulation.prepared(None, ["resume=latest", results])
    with pytest.raises(UserError, match=r"update = '.*': it was stopped before its sites connected: set --nodes"):
        simulation.prepared(None, ["update=latest", results])
    assert simulation.prepared(3, ["resume=latest", results])[2] == 3
    with RunFolder(Settings(results_dir=str(tmp_path), resume=run.path.name), "0123") as run:
        run.begin([], 4)
    assert simulation.prepared(None, ["resume=latest", results])[2] == 4
    updates = ["update=latest", "method=one-round", results]
    assert simulation.prepared(5, updates)[2] == 5
    with pytest.raises(UserError, match=r"--nodes 3: latest had 4 sites; .* would count twice: give at least 4"):
        simulation.prepared(3, updates)
    with pytest.raises(UserError, match="--nodes 0: expected at least 1"):
        simulation.prepared(0, ["resume=latest", results])


def test_the_app_is_the_one_in_the_current_folder_or_this_projects(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert simulation.app_folder() == Path(simulation.__file__).parents[2]
    (tmp_path / "pyproject.toml").write_text("[project]\nname = 'other'\n")
    assert simulation.app_folder() != tmp_path
    (tmp_path / "pyproject.toml").write_text("[tool.flwr.app.config]\nseed = 7\n")  # somebody else's app
    assert simulation.app_folder() != tmp_path
    ours = (Path(simulation.__file__).parents[2] / "pyproject.toml").read_text()
    (tmp_path / "pyproject.toml").write_text(ours)
    assert simulation.app_folder() == tmp_path
    older = (tmp_path / "pyproject.toml").read_text().replace('track = ""\n', "")
    (tmp_path / "pyproject.toml").write_text(older)
    with pytest.raises(UserError, match="it lacks the settings track; copy them from a new folder of `fedclip init`"):
        simulation.app_folder()


@needs("simulation")
@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (
            ["adapter=attn", "learning-rate=-1", "epochs", "seed=x"],
            ["attention, gate", "at least 0", "key=value", "seed"],
        ),
        (["holdout=moon"], ["no such domain; the data has art, cartoon, photo, sketch"]),
        (["data=folder:/there/is/none"], ["no such folder"]),
        (["personalize=maybe"], ["true or false"]),
        (["--nodes", "3", "min-sites=5"], ["there are 3 sites"]),
        (["--nodes", "0"], ["expected at least 1"]),
        (["results-dir=/proc/none"], ["set results-dir to another folder"]),
        (["data=none"], ["class-names must list the classes"]),
        (["--on", "hospitals", "data=folder:images", "alpha=0"], ["expected an absolute path", "more than 0"]),
    ],
)
def test_fedclip_run_says_what_is_wrong_before_anything_starts(
    given: list[str], expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(PROJECT)
    monkeypatch.setattr(simulation, "stop_in_order", lambda word: None)
    done = CliRunner().invoke(app, ["run", *given])
    assert done.exit_code == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 + len(expected)
    assert all(text in done.stderr for text in expected)


@needs("simulation")
def test_the_settings_say_what_is_wrong_with_data_and_model_before_anything_starts(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tree.parent)
    monkeypatch.setattr(simulation, "stop_in_order", lambda word: None)

    def stderr_of(*given: str) -> str:
        done = CliRunner().invoke(app, ["run", *given])
        assert done.exit_code == 2
        return done.stderr

    shutil.copytree(models.BUNDLED, tmp_path / "half")
    (tmp_path / "half" / "model.safetensors").unlink()
    assert "lacks model.safetensors" in stderr_of("data=tree", "class-names=a,b", f"model={tmp_path}/half")
    assert "class-names has 2 names and lacks car, cat, fish" in stderr_of("data=tree", "class-names=a,b")
    missing = stderr_of("data=pacs")
    assert len(missing.splitlines()) == 2
    assert "hf download --repo-type dataset flwrlabs/pacs" in missing


def test_a_superlink_has_sites_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(PROJECT)
    monkeypatch.setattr(simulation, "stop_in_order", lambda word: None)
    done = CliRunner().invoke(app, ["run", "--on", "hospitals", "--nodes", "3"])
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr == "--nodes 3: the SuperLink hospitals has its own sites; leave it out\n"


STOPPED_FROM_OUTSIDE = """
import os, signal, subprocess, sys
from pathlib import Path
from fedclip_flwr.features import clip
from fedclip_flwr.operations import simulation
from fedclip_flwr.cli import app

class Popen(subprocess.Popen):
    def __init__(self, *words, **options):
        super().__init__(*words, **options)
        os.kill(os.getpid(), signal.SIGTERM)  # nobody knows of the process yet
        for _ in range(1000):
            pass

subprocess.Popen = Popen
simulation.stop_in_order("Stopped")
with simulation.started(["sleep", "1000"], os.environ, Path(sys.argv[1])):
    print("went on")
"""


def test_a_process_is_ended_that_was_just_being_started_when_all_had_to_stop(tmp_path: Path) -> None:
    command = [sys.executable, "-c", STOPPED_FROM_OUTSIDE, str(tmp_path / "log")]
    done = subprocess.run(command, env={**os.environ, "MARK": str(tmp_path)}, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (128 + signal.SIGTERM, "", "\nStopped\n")
    until_gone(f"MARK={tmp_path}")


def test_what_flower_says_is_not_held_back_until_the_end(capfd: pytest.CaptureFixture[str]) -> None:
    code = "import sys; print('Successfully started run 7'); print('at once:', sys.stdout.write_through)"
    without = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}

    assert simulation._show([sys.executable, "-c", code], without) == "7"

    assert capfd.readouterr().out == "at once: True\n"


def test_on_a_busy_machine_what_came_too_late_is_named(capfd: pytest.CaptureFixture[str]) -> None:
    late = simulation.RAY_IS_LATE
    node = pytest.importorskip("ray._private.node", reason="not installed: the extra simulation")
    assert late in Path(node.__file__).read_text()
    hint = "Ray, which simulates sites, did not start in time: is this machine busy? Try again.\n"
    for said, expected in ((f"{late}. This could", hint), ("A trace", "")):
        simulation._show([sys.executable, "-c", f"print({said!r}); print('More')"], os.environ)
        assert capfd.readouterr() == (f"{said}\nMore\n", expected)


@pytest.mark.parametrize(
    ("details", "expected"),
    [
        ("", "finished:failed"),
        ("N/A", "finished:failed"),
        ("No heartbeat received from the task", "finished:failed (No heartbeat received from the task)"),
        ("ServerApp failed with exception: no such folder", "finished:failed"),  # the app's own words were shown
        ("Simulation failed with exception: no such folder", "finished:failed"),
    ],
)
def test_a_runs_status_says_why_where_the_app_could_not(details: str, expected: str, tmp_path: Path) -> None:
    """In Flower's own words, from a command that prints them as Flower's does."""
    answer = json.dumps(
        {"success": True, "runs": [{"run-id": "7", "status": "finished:failed", "status-details": details}]}
    )
    command = tmp_path / "flwr"
    command.write_text(f"#!{sys.executable}\nprint({answer!r})\n")
    command.chmod(0o755)
    assert simulation.status_of("7", {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}) == expected
