from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fedclip_flwr import __version__
from fedclip_flwr.base import files
from fedclip_flwr.base.errors import UserError
from fedclip_flwr.base.settings import Settings
from fedclip_flwr.cli import app
from fedclip_flwr.flower import pinned
from fedclip_flwr.operations import scaffold
from fedclip_flwr.runs import history
from tests import forked

FILES = {"server_app.py", "client_app.py", "pyproject.toml"}
FEDCLIP = Path(sys.executable).parent / "fedclip"


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """An initialised folder with two settings of its own."""
    scaffold.init(tmp_path / "study-1", ["num-server-rounds=1", "seed=7"])
    return tmp_path / "study-1"


def test_a_folder_has_the_two_apps_and_every_setting_with_its_meaning(study: Path) -> None:
    assert {path.name for path in study.iterdir()} == FILES
    for name in pinned.APPS:
        assert (study / name).read_bytes() == (files.own_app() / name).read_bytes()
    text = (study / "pyproject.toml").read_text()
    described = tomllib.loads(text)
    assert described["tool"]["flwr"]["app"]["config"] == Settings(num_server_rounds=1, seed=7).as_run_config()
    assert described["project"]["name"] == "study-1"
    assert described["project"]["dependencies"] == [f"fedclip-flwr[simulation]=={__version__}"]
    assert text.startswith("# ")
    assert "fedclip run" in text.split("[project]")[0]
    lines = text.splitlines()
    above = lines[lines.index('codec = "float32"') - 1]
    assert above == "# how tensors travel (float32, bfloat16, int8)"
    plain = " ".join(text.replace("#", " ").split())
    assert all(" ".join(field.metadata["meaning"].split()) in plain for field in Settings.keys().values())


@pytest.mark.parametrize("value", ['say "{}" \\ | ünï {}', "a [[{}]] # 'x'", "{}\u00a0\\u0041"])
def test_any_text_comes_back_as_it_was_given(value: str, tmp_path: Path) -> None:
    given = [f"class-names={value}", "blend=auto", "delta=1e-12", "personalize=true"]
    scaffold.init(tmp_path / "a", given)
    config = tomllib.loads((tmp_path / "a" / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"]
    assert Settings.from_run_config(config) == Settings(class_names=value, blend="auto", delta=1e-12, personalize=True)


@pytest.mark.parametrize("name", sorted(FILES))
def test_nothing_is_overwritten(name: str, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / name).write_text("mine")
    with pytest.raises(UserError, match=rf"mine already has a {name}, and nothing is overwritten"):
        scaffold.init(tmp_path / "mine", [])
    assert [path.read_text() for path in (tmp_path / "mine").iterdir()] == ["mine"]


def test_a_folder_may_have_other_files_and_is_made_with_those_above(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "notes.txt").touch()
    scaffold.init(tmp_path / "a", [])
    scaffold.init(tmp_path / "a" / ".." / "b" / "c", [])
    assert {path.name for path in (tmp_path / "a").iterdir()} == FILES | {"notes.txt"}
    assert {path.name for path in (tmp_path / "b" / "c").iterdir()} == FILES


@pytest.mark.parametrize("name", ["1st", "my_study", "Süd", "a b", "a" * 33, "a-", ".a"])
def test_a_folder_that_flower_would_not_run_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Flower can't run an app from a folder called"):
        scaffold.init(tmp_path / name, [])
    assert not (tmp_path / name).exists()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["x", "see=3", "seed=x", "codec"], ["3 of the settings", "see:", "seed = 'x'", "codec: expected key=value"]),
        (["x", "codec=int8", "secure-aggregation=true"], ["1 of the settings", "codec = 'int8'"]),
        (["file"], ["can't be written to"]),
    ],
)
def test_what_cannot_be_laid_out_is_reported_and_nothing_is_made(
    words: list[str], expected: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    answer = CliRunner().invoke(app, ["init", *words])
    assert answer.exit_code == 2
    assert len(answer.stderr.splitlines()) == len(expected)
    assert all(text in line for text, line in zip(expected, answer.stderr.splitlines(), strict=True))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_sites_take_the_bundle_of_the_folder(study: Path) -> None:
    env = {**os.environ, "FLWR_HOME": str(study.parent / "flwr")}
    script = f"import os; os.chdir({str(study)!r}); from flwr.cli.app import app; app()"
    done = forked.run(script, "build", env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    (bundle,) = study.glob("*.fab")
    pinned.check(bundle.read_bytes())


@pytest.mark.federation
def test_a_run_from_the_folder_has_its_settings(study: Path, tmp_path: Path) -> None:
    command = [str(FEDCLIP), "run", "--nodes", "2", f"results-dir={tmp_path}/runs"]
    done = subprocess.run(command, cwd=study, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    run = history.find("latest", tmp_path / "runs")
    assert (run.status, run.changed) == ("completed", {"num-server-rounds": 1, "seed": 7})
