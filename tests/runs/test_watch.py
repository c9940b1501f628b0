from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from fedclip_flwr.base.errors import UserError
from fedclip_flwr.base.settings import Settings
from fedclip_flwr.cli import app
from fedclip_flwr.runs import history, watch
from fedclip_flwr.runs.folder import RunFolder
from tests.past import FAILURE, completed, line, make, summary

BIN = Path(sys.executable).parent
RUNNING = {"status": "running", "round": 1, "failures": []}


def replace(path: Path, text: str) -> None:
    """As a run does: in one step."""
    part = path.with_name(f".{path.name}")
    part.write_text(text)
    part.replace(path)


def write(path: Path, rounds: int, facts: dict[str, Any]) -> None:
    replace(path / "metrics.jsonl", "".join(json.dumps(line(n, 0.5 + n / 10)) + "\n" for n in range(rounds)))
    replace(path / "summary.json", json.dumps(facts))


@contextmanager
def going(root: Path) -> Iterator[Path]:
    """The folder of a run that is under way."""
    with suppress(KeyboardInterrupt), RunFolder(Settings(num_server_rounds=3, results_dir=str(root)), "0123") as run:
        yield run.path
        raise KeyboardInterrupt


def drawn(state: watch.State, width: int = 100) -> str:
    """What the screen shows."""
    screen = Console(file=StringIO(), width=width, record=True)
    screen.print(watch.picture(state))
    return screen.export_text()


def running(path: Path, quiet: float = 0.0) -> watch.State:
    return watch.State(history.read(path), "running", quiet)


def test_a_run_is_followed_as_it_grows_until_it_ends(tmp_path: Path) -> None:
    with going(tmp_path) as path:
        steps: Iterator[Callable[[], None]] = iter(
            [
                lambda: write(path, 1, RUNNING),
                lambda: None,
                lambda: write(path, 3, RUNNING | {"round": 2}),
                lambda: write(path, 4, summary()),
            ]
        )
        states = [*watch.follow(path, lambda: next(steps)())]
    assert [len(state.run.metrics) for state in states] == [0, 1, 1, 3, 4]
    assert [state.status for state in states] == ["running"] * 4 + ["completed"]
    assert states[2].run is states[1].run  # nothing was read again
    assert next(steps, None) is None


@pytest.mark.parametrize("status", ["failed", "stopped"])
def test_a_run_that_ends_otherwise_is_followed_to_there(status: str, tmp_path: Path) -> None:
    with going(tmp_path) as path:
        ends = {"status": status, "why": "no sites", "round": 1, "failures": []}
        (*_, last) = watch.follow(path, lambda: write(path, 2, ends))
    assert last.status == status
    assert watch.ending(last) == f"{path.name} {status} after 1 round: no sites"


def test_a_run_that_was_killed_is_noticed_at_once_or_after_a_while_without_news(tmp_path: Path) -> None:
    path = make(tmp_path / "run", [line(0)], RUNNING)
    (state,) = watch.follow(path, pytest.fail)
    assert state.status == "killed"
    assert "Resume it after round 1 with resume=run" in watch.ending(state)

    looks = 0

    def pause() -> None:
        nonlocal looks
        looks += 1
        if looks == 3:
            os.close(folder)  # with its process

    folder = os.open(path, os.O_RDONLY)
    fcntl.flock(folder, fcntl.LOCK_EX)
    states = [state.status for state in watch.follow(path, pause)]
    assert states == ["running"] * watch.QUIET + ["killed"]


def test_a_run_that_ends_while_it_is_looked_whether_it_was_killed_was_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make(tmp_path / "run", [line(0)], RUNNING)
    look = history.held

    def ends(folder: Path) -> bool:
        write(folder, 4, summary())
        return look(folder)

    monkeypatch.setattr(history, "held", ends)
    assert [state.status for state in watch.follow(path, pytest.fail)] == ["completed"]


def test_the_lock_is_left_alone_while_there_is_news(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[Path] = []

    def held(path: Path) -> bool:
        looks.append(path)
        return True

    monkeypatch.setattr(history, "held", held)
    path = make(tmp_path / "run", [line(0)], RUNNING)
    for number, _ in zip(range(30), watch.follow(path, lambda: write(path, 2, RUNNING)), strict=False):
        assert looks == [path], number


def test_the_screen_shows_where_the_run_is(tmp_path: Path) -> None:
    unfinished = {"status": "running", "round": 2, "failures": [FAILURE, FAILURE | {"round": 3}]}
    lines = [line(0), line(1, 0.6, None, seconds=4.0), line(2, 0.7, 0.4, seconds=8.0)]
    path = make(tmp_path / "run", lines, unfinished, **{"num-server-rounds": 12})
    shown = [text.strip() for text in drawn(running(path, quiet=90.0)).splitlines()]
    assert shown[0] == "run: attention by fedavg on drawn with 2 nodes, model bundled"
    assert shown[1].endswith("2 of 12 rounds, about 60 s left")  # ten of six seconds
    assert shown[3].split() == ["round", "seen", "unseen", "val", "loss", "sites", "bytes", "seconds"]
    assert shown[5].split() == ["1", "60.0", "–", "50.0", "0.750", "2", "2", "kB", "4.0"]
    assert "seen    50.0 ▁▅█ 70.0  +20.0 over zero-shot" in shown
    assert "unseen  25.0 ▁█ 40.0  +15.0 over zero-shot" in shown
    assert "traffic 6 kB so far" in shown
    assert "Left out: photo-0: no answer (round 2 to 3, 2 times)" in shown
    assert shown[-1] == "status  running, no news for 90 s"
    assert "news" not in drawn(running(path))


def test_the_screen_has_epsilon_where_there_is_any_and_fits(tmp_path: Path) -> None:
    lines = [line(number, epsilon=number / 4) for number in range(100)]
    whys = [FAILURE | {"why": f"reason {number}"} for number in range(9)]
    path = make(tmp_path / "run", lines, RUNNING | {"failures": whys}, dp="central", data="x" * 300)
    shown = drawn(running(path), width=80).splitlines()
    assert max(map(len, shown)) <= 80
    assert len(shown) < 24
    assert shown[3].split()[-1] == "ε"
    rounds = [text.split() for text in shown if text.endswith("2.0  24.75") or " 2.0 " in text]
    assert [cells[0] for cells in rounds] == [str(number) for number in range(92, 100)]
    assert rounds[-1][-1] == "24.75"
    assert sum("reason" in text for text in shown) == watch.REASONS + 1
    assert "and 4 more reasons" in [text.strip() for text in shown]


def test_the_screen_of_a_run_without_rounds_and_with_hostile_names_is_harmless(tmp_path: Path) -> None:
    first = drawn(running(make(tmp_path / "run")))
    assert "0 of 3 rounds" in first
    assert watch.NOTHING_YET in first
    unfinished = RUNNING | {"failures": [FAILURE | {"site": "\x1b[2J[bold]", "why": "a\nb"}]}
    shown = drawn(running(make(tmp_path / "run", [line(0, None, None, loss=None)], unfinished)))
    assert "\x1b" not in shown
    assert "�[2J[bold]: a�b" in shown


def test_what_was_gained_is_shown_only_beside_the_start(tmp_path: Path) -> None:
    lines = [line(0, 0.5), line(1, 0.6), line(2, 0.7)]
    assert "+20.0 over" in watch.curves(history.read(make(tmp_path / "run", lines)))[0]
    assert "over" not in watch.curves(history.read(make(tmp_path / "run", lines[1:])))[0]  # its line is lost
    late = [line(0, 0.5, None), line(1, 0.6, 0.4), line(2, 0.7, 0.5)]  # there was nobody with an unseen domain at first
    seen, unseen, _ = watch.curves(history.read(make(tmp_path / "run", late)))
    assert "+20.0 over" in seen
    assert "over" not in unseen


def test_a_curve_spans_its_values() -> None:
    assert watch.curve([0.1, 0.2, 0.8]) == "▁▂█"
    assert watch.curve([0.5, 0.5]) == "▁▁"
    long = watch.curve([number / 999 for number in range(1000)])
    assert (len(long), long[0], long[-1]) == (watch.WIDEST, "▁", "█")


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0 s"), (99, "99 s"), (100, "2 min"), (7500, "2 h 05 min")])
def test_a_time_is_shown_in_what_suits_it(seconds: float, text: str) -> None:
    assert watch.duration(seconds) == text


def test_without_a_terminal_there_is_a_line_for_each_round_and_one_at_the_end(tmp_path: Path) -> None:
    completed(tmp_path / "run")
    make(tmp_path / "killed", [line(0)], RUNNING | {"failures": [FAILURE]})
    answer = CliRunner().invoke(app, ["watch", "run", "--results-dir", str(tmp_path)])
    lines = answer.stdout.splitlines()
    assert answer.exit_code == 0
    assert [text.split()[0] for text in lines[:6]] == ["run:", "round", "0", "1", "2", "3"]
    end = f"run completed after 3 rounds: seen 50.0 → 75.0 %, unseen 25.0 → 50.0 %; its folder: {tmp_path}/run"
    assert lines[6:] == [end]
    answer = CliRunner().invoke(app, ["watch", str(tmp_path / "killed")])
    assert answer.exit_code == 1
    assert answer.stdout.splitlines()[-2] == "Left out: photo-0: no answer (round 2)"
    assert answer.stdout.splitlines()[-1].startswith("killed killed after 1 round: ")


def test_a_run_that_is_not_there_is_not_waited_for(tmp_path: Path) -> None:
    answer = CliRunner().invoke(app, ["watch", "--results-dir", str(tmp_path)])
    assert (answer.exit_code, answer.stdout) == (2, "")
    assert answer.stderr.startswith("there is no run in ")


def test_a_folder_that_is_damaged_or_gone_while_it_is_watched_is_reported(tmp_path: Path) -> None:
    with going(tmp_path) as path, pytest.raises(UserError, match=r"settings.json is damaged .the file is missing"):
        [*watch.follow(path, (path / "settings.json").unlink)]


def test_ctrl_c_ends_the_watching_and_not_the_run(tmp_path: Path) -> None:
    heeded = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"  # also in the background
    code = f"{heeded}; from fedclip_flwr.cli import app; app()"
    with going(tmp_path) as path:
        command = [sys.executable, "-c", code, "watch", str(path)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert process.stdout is not None
        assert process.stdout.readline().startswith(path.name)  # it has begun
        process.send_signal(signal.SIGINT)
        said, wrong = process.communicate(timeout=60)
        assert (process.returncode, wrong) == (watch.LEFT, "")
        assert said.splitlines()[-1] == f"Stopped watching; {path.name} is not affected."
        assert history.read(path).status == "running"


@pytest.mark.federation
def test_a_real_run_is_watched_to_its_end_without_torch(tmp_path: Path) -> None:
    given = ["run", "--nodes", "2", "num-server-rounds=2", f"results-dir={tmp_path}"]
    watching = (
        "import sys; from fedclip_flwr.runs import watch; code = watch.watch(sys.argv[1], None); "
        "assert 'torch' not in sys.modules; sys.exit(code)"
    )
    with subprocess.Popen([BIN / "fedclip", *given], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for said in process.stdout:  # the plan says where the run is
            if said.startswith("run folder"):
                break
        path = Path(said.split(maxsplit=2)[2].strip())
        answer = subprocess.run([sys.executable, "-c", watching, path], capture_output=True, text=True)
        assert "Run folder:" in process.stdout.read()
    lines = answer.stdout.splitlines()
    assert (answer.returncode, answer.stderr) == (0, "")
    assert [text.split()[0] for text in lines[:5]] == [f"{path.name}:", "round", "0", "1", "2"]
    assert lines[-1].startswith(f"{path.name} completed after 2 rounds: seen ")


def test_the_time_without_news_is_that_since_something_was_written(tmp_path: Path) -> None:
    with going(tmp_path) as path:
        for file in path.iterdir():
            os.utime(file, (0, os.stat(file).st_mtime - 7200))
        assert 7200 <= next(watch.follow(path)).quiet < 10_000


def test_on_a_terminal_there_is_a_screen(tmp_path: Path) -> None:
    screen = Console(file=StringIO(), force_terminal=True, width=100)
    assert watch._live(watch.follow(completed(tmp_path / "run"), pytest.fail), screen).status == "completed"
    assert "status  completed" in screen.file.getvalue()  # type: ignore[attr-defined]
