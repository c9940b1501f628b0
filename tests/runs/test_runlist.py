from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fedclip_flwr.cli import app
from fedclip_flwr.runs import console, saved
from fedclip_flwr.runs.runlist import show
from fedclip_flwr.server.results import RoundResult
from tests.past import FAILURE, completed, line, make, summary

QUIET = "import sys; from fedclip_flwr.cli import app; app(standalone_mode=False); assert 'torch' not in sys.modules"


def rows(text: str) -> list[list[str]]:
    return [line.split() for line in text.splitlines()]


def as_json(*names: str, root: Path) -> Any:
    return json.loads(show(names, root, True))


def test_all_runs_are_in_a_table_the_newest_last_and_a_damaged_one_hides_none(tmp_path: Path) -> None:
    completed(tmp_path / "20260101-000000", adapter="gate", data="folder:/very/long/path/to/some/images")
    (completed(tmp_path / "20260102-000000") / "summary.json").write_text('{"status": "completed"}')
    (completed(tmp_path / "20260103-000000") / "settings.json").write_text("{")
    failed = {"status": "failed", "why": "no sites\x1b[2J", "round": 1, "failures": []}
    make(tmp_path / "20260104-000000", [line(0), line(1, 0.6, None)], failed)
    make(tmp_path / "20260105-000000")
    text = show([], tmp_path, False)
    table = rows(text)
    assert table[0][:5] == ["run", "status", "data", "method", "rounds"]
    assert table[1][:5] == ["20260101-000000", "completed", "folder:/…path/to/some/images", "gate-4", "3/3"]
    assert " ".join(table[1][5:]) == "50.0 → 75.0 25.0 → 50.0 1 kB"
    assert table[2] == ["20260102-000000", "damaged", *["–"] * 6]
    assert table[3] == ["20260103-000000", "damaged", *["–"] * 6]
    assert " ".join(table[4]) == "20260104-000000 failed drawn attention 1/3 50.0 → 60.0 25.0 → – 1 kB"
    assert " ".join(table[5]) == "20260105-000000 killed drawn attention 0/3 – – –"
    assert [line.partition(" is damaged")[0] for line in text.splitlines()[6:]] == [
        f"20260102-000000: {tmp_path}/20260102-000000/summary.json",
        f"20260103-000000: {tmp_path}/20260103-000000/settings.json",
    ]


def test_without_a_run_it_says_how_to_make_one(tmp_path: Path) -> None:
    assert "`fedclip run` makes one" in show([], tmp_path, False)
    assert as_json(root=tmp_path) == []


def test_one_run_is_shown_in_a_few_lines(tmp_path: Path) -> None:
    private = summary(privacy={"dp": "central", "epsilon": 12.345, "delta": 1e-5}, failures=[FAILURE])
    private["adapted"] |= {"personal": {"art-0": 0.875}, "personal_metrics": {"seen": {"accuracy": 0.875}}}
    path = make(tmp_path / "run", map(line, range(4)), private, dp="central", prompt="a \x1b {}")
    (path / "report.html").touch()
    text = show(["run"], tmp_path, False)
    assert "\x1b" not in text
    lines = text.splitlines()
    assert lines[:11] == [
        "run",
        "  status    completed",
        f"  folder    {path}",
        "  data      drawn, sketch held out",
        "  model     bundled",
        "  trained   attention, by fedavg, 2 nodes",
        '  settings  prompt="a \\u001b {}" num-server-rounds=3 dp="central"',
        "  rounds    3 of 3; round 2 was selected",
        "  traffic   1 kB a site and round, 7 kB in all",
        "            FedAVG of the whole model: 41 times as much",
        "  seconds   12",
    ]
    assert f"  report    {path}/report.html" in lines
    assert "  privacy   ε = 12.35 for a site as a whole" in lines
    assert ["art-0", "50.0", "75.0", "+25.0", "87.5"] in rows(text)
    assert ["mean", "of", "the", "seen", "50.0", "75.0", "+25.0", "87.5"] in rows(text)
    assert ["sketch,", "unseen", "25.0", "50.0", "+25.0", "–"] in rows(text)
    assert lines[-1] == "Left out: photo-0: no answer (round 2)"


def test_a_run_that_was_not_completed_says_why_and_how_far_it_came(tmp_path: Path) -> None:
    stopped = {"status": "stopped", "why": "it was stopped from outside.", "round": 1, "failures": []}
    make(tmp_path / "run", [line(0), line(1, 0.625)], stopped)
    lines = show([str(tmp_path / "run")], None, False).splitlines()
    assert "  status    stopped: it was stopped from outside." in lines
    assert "  rounds    1 of 3" in lines
    assert "  seen      50.0 → 62.5" in lines
    assert not any("report" in line for line in lines)


def test_of_a_run_that_was_not_completed_the_round_selected_so_far_is_shown(tmp_path: Path) -> None:
    stopped = {"status": "stopped", "why": "it was stopped from outside.", "round": 3, "failures": []}
    path = make(tmp_path / "run", [line(0), line(1, 0.625), line(2, 0.75), line(3, 0.5)], stopped)
    saved.write_tensors(path / "adapter.safetensors", {}, 2)
    (path / "adapter.json").write_text('{"round": 1}')  # of a run that was killed before it was replaced
    lines = show(["run"], tmp_path, False).splitlines()
    assert "  rounds    3 of 3; round 2 was selected so far" in lines
    assert "  seen      50.0 → 75.0" in lines
    assert json.loads(show(["run"], tmp_path, True))[0]["selected_round"] == 2
    (path / "adapter.safetensors").write_text("{")
    lines = show(["run"], tmp_path, False).splitlines()
    assert "  rounds    3 of 3" in lines
    assert "  seen      50.0 → 50.0" in lines


def test_a_trained_round_is_not_taken_for_the_start_whose_line_is_lost(tmp_path: Path) -> None:
    stopped = {"status": "stopped", "why": "it was stopped from outside.", "round": 2, "failures": []}
    make(tmp_path / "run", [line(1, 0.625), line(2, 0.75)], stopped)
    (run,) = json.loads(show(["run"], tmp_path, True))
    assert run["seen"] == {"zero_shot": None, "adapted": 0.75}


def test_runs_side_by_side_show_what_differs(tmp_path: Path) -> None:
    completed(tmp_path / "a", **{"secure-aggregation": True})
    make(tmp_path / "b", [line(0), line(1, 0.25, 0.25, epsilon=3.0)], None, seed=7, package="4567")
    table = rows(text := show(["a", "b"], tmp_path, False))
    assert table[:3] == [
        ["settings", "that", "differ", "a", "b"],
        ["seed", "0", "7"],
        ["secure-aggregation", "true", "false"],
    ]
    assert ["status", "completed", "killed"] in table
    assert ["seen:", "adapted", "75.0", "25.0"] in table
    assert ["seen:", "gain", "+25.0", "-25.0"] in table
    assert ["unseen:", "gain", "+25.0", "+0.0"] in table
    assert ["seconds", "12", "4"] in table
    assert ["ε", "–", "3.00", "(site)"] in table
    assert "own" not in text  # neither has any
    assert text.endswith("different versions of this package.")
    again = show(["a", str(tmp_path / "a")], tmp_path, False)
    assert rows(again)[0][:3] == ["the", "same", "settings"]
    assert "versions" not in again


def test_json_has_the_same_keys_for_every_run(tmp_path: Path) -> None:
    completed(tmp_path / "20260101-000000", seed=3)
    make(tmp_path / "20260102-000000", [line(0)])
    (completed(tmp_path / "20260103-000000") / "metrics.jsonl").write_text("{")
    done, killed, damaged = as_json(root=tmp_path)
    assert done.keys() == killed.keys() == damaged.keys()
    assert [run["status"] for run in (done, killed, damaged)] == ["completed", "killed", "damaged"]
    assert done["settings"] == {"seed": 3, "num-server-rounds": 3}
    assert done["seen"] == {"zero_shot": 0.5, "adapted": 0.75}
    assert done["sites"]["art-0"] == {"zero_shot": 0.5, "adapted": 0.75, "personal": None}
    assert killed["unseen"] == {"zero_shot": 0.25, "adapted": None}
    assert (done["bytes"], killed["bytes"], damaged["bytes"]) == (7000, 2000, None)
    assert as_json("20260101-000000", root=tmp_path) == [done]
    assert as_json("20260101-000000", "20260102-000000", root=tmp_path) == [done, killed]


def test_the_command_answers_without_torch(tmp_path: Path) -> None:
    completed(tmp_path / "20260101-000000")
    command = [sys.executable, "-c", QUIET, "runs", "--json", "--results-dir", str(tmp_path)]
    answer = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(answer.stdout)[0]["name"] == "20260101-000000"


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["nope"], "nope: there is no such run, neither as a folder nor by name; the latest in "),
        (["--results-dir", "/nowhere"], "--results-dir /nowhere: there is no such folder"),
        (["broken"], "is damaged"),
    ],
)
def test_what_cannot_be_shown_is_one_line(words: list[str], why: str, tmp_path: Path) -> None:
    completed(tmp_path / "broken").joinpath("summary.json").write_text("{")
    answer = CliRunner().invoke(app, ["runs", "--results-dir", str(tmp_path), *words])
    assert (answer.exit_code, answer.stdout) == (2, "")
    assert why in answer.stderr
    assert len(answer.stderr.splitlines()) == 1


def test_a_line_of_a_run_shows_what_its_folder_has_of_it() -> None:
    assert console.line(RoundResult(0, {}, {}, 10, 1.0)) == console.round_of(
        RoundResult(0, {}, {}, 10, 1.0).facts, "zero-shot"
    )
