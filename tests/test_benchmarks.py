"""The benchmarks: that their commands work, and that their page is written whole or not at all."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from benchmarks.__main__ import BENCHMARKS, Benchmark, run
from benchmarks.common import OURS, memory, processes, table
from deploy.relay import relayed


def python(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", *words], cwd=OURS, capture_output=True, text=True)


@pytest.fixture
def scripts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two small ones: `good` prints a table, `bad` fails after a word."""
    folder = tmp_path / "benchmarks"
    folder.mkdir()
    (folder / "__init__.py").touch()
    (folder / "good.py").write_text("import sys\nprint('| a |\\n| --- |\\n| ' + sys.argv[1] + ' |')\n")
    (folder / "bad.py").write_text("print('half')\nraise SystemExit('it broke')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))


GOOD = Benchmark("good", ("7",), "A title", "A text.")


def test_the_page_has_each_table_under_its_heading_and_command(scripts: None, tmp_path: Path) -> None:
    assert run([GOOD], tmp_path / "page.md") == []
    told = (tmp_path / "page.md").read_text()
    assert told.endswith("## A title\n\nA text.\n\n`python -m benchmarks.good 7`\n\n| a |\n| --- |\n| 7 |\n")
    assert "cores, " in told.split("## A title")[0]


def test_a_page_with_a_failing_benchmark_is_left_as_it_was(
    scripts: None, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "page.md").write_text("before")
    assert run([GOOD, Benchmark("bad", (), "Bad", "."), GOOD], tmp_path / "page.md") == ["bad"]
    assert (tmp_path / "page.md").read_text() == "before"
    assert "it broke" in capfd.readouterr().err


@pytest.mark.parametrize("name", [benchmark.name for benchmark in BENCHMARKS])
def test_every_benchmark_has_help_and_refuses_what_it_does_not_know(name: str) -> None:
    asked = python(f"benchmarks.{name}", "--help")
    assert (asked.returncode, asked.stderr) == (0, "")
    assert f"benchmarks.{name}" in asked.stdout
    wrong = python(f"benchmarks.{name}", "--rounds", "none", "--nonsense")
    assert wrong.returncode == 2
    assert wrong.stdout == ""


def test_four_of_the_thousand_sites_are_measured_beside_flower_alone() -> None:
    done = python("benchmarks.many", "--nodes", "4", "--rounds", "2", "--alone-rounds", "2")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line.split(" | ") for line in done.stdout.splitlines() if line.startswith("| ")]
    assert [row[0] for row in rows[2:]] == ["| ours, gate", "| Flower and Ray alone"]
    assert all(float(row[1].removesuffix(" ms")) > 0 for row in rows[2:])


def test_a_table_is_markdown() -> None:
    assert table(["a", "b"], [["1", "2"]]) == "| a | b |\n| --- | --- |\n| 1 | 2 |"


def test_the_relay_passes_on_and_counts_both_directions() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            connection, _ = server.accept()
            with connection:
                assert connection.recv(100) == b"hello"
                connection.sendall(b"hi")

        thread = threading.Thread(target=answer)
        thread.start()
        with relayed(server.getsockname()[1]) as relay:
            with socket.create_connection(("127.0.0.1", relay.port)) as client:
                client.sendall(b"hello")
                assert client.makefile("rb").read() == b"hi"
            assert relay.bytes == len(b"hello") + len(b"hi")
        thread.join()


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_processes_are_found_by_command_and_environment(tmp_path: Path) -> None:
    command = [str(tmp_path / "python-of-a-test"), "-c", "input()"]
    Path(command[0]).symlink_to(sys.executable)
    mark = f"MARK={tmp_path}"
    with subprocess.Popen(command, stdin=subprocess.PIPE, env={"MARK": str(tmp_path)}) as process:
        assert processes("python-of-a-test", mark) == [process.pid]
        assert processes("python-of-a-test", "MARK=other") == []
        assert memory(process.pid, "VmHWM") >= memory(process.pid, "VmRSS") // 2 > 0
        process.communicate(b"\n")
    assert memory(process.pid, "VmRSS") == 0
