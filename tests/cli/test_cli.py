from __future__ import annotations

import subprocess
import sys

import pytest
from typer.testing import CliRunner

from fedclip_flwr.cli import app
from fedclip_flwr.operations import keys

START = "import sys; from fedclip_flwr.cli import app; sys.argv[0] = 'fedclip'; "


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, list(arguments))
    return result.exit_code, result.stderr


def test_an_error_is_a_line_and_with_debug_a_trace() -> None:
    code, output = run("predict", "nowhere.png")
    assert (code, output) == (2, "nowhere.png: there is no such file or folder\n")
    for words in (("--debug", "predict", "nowhere.png"), ("predict", "nowhere.png", "--debug")):
        code, output = run(*words)
        assert code == 2
        assert "Traceback" in output
        assert output.endswith("nowhere.png: there is no such file or folder\n")


def test_a_defect_is_a_line_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> str:
        raise ZeroDivisionError("of\nall things")

    monkeypatch.setattr(keys, "make", fails)
    code, output = run("keys", "folder")
    assert (code, output) == (1, "fedclip failed: ZeroDivisionError: of all things (--debug shows where)\n")
    code, output = run("keys", "folder", "--debug")
    assert code == 1
    assert "in fails" in output


def test_ctrl_c_ends_a_command_with_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*_: object) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(keys, "make", stopped)
    assert run("keys", "folder") == (130, "\nStopped.\n")


def test_help_has_an_example_for_each_command_and_needs_no_torch() -> None:
    (group,) = [app.registered_callback]
    assert group
    for command in app.registered_commands:
        name = command.callback.__name__ if command.callback else ""
        result = CliRunner().invoke(app, [name, "--help"])
        assert result.exit_code == 0
        assert f"fedclip {name}" in " ".join(result.stdout.partition("Example")[2].split()), name
        assert "\\[" not in result.stdout, name
    code = "import sys; from fedclip_flwr.cli import app; print('torch' in sys.modules)"
    output = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert output.stdout == "False\n"


def test_shells_complete_commands() -> None:
    env = {"_FEDCLIP_COMPLETE": "complete_bash", "COMP_WORDS": "fedclip pre", "COMP_CWORD": "1"}
    done = subprocess.run(
        [sys.executable, "-c", START + "app(prog_name='fedclip')"], env=env, capture_output=True, text=True
    )
    assert done.stdout.split() == ["predict"]
