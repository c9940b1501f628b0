from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fedclip_flwr.base.text import gain
from fedclip_flwr.cli import app
from fedclip_flwr.features.base import Features
from fedclip_flwr.report import output, writing
from fedclip_flwr.runs import history
from tests.report.made import a_run
from tests.report.test_page import words

BIN = Path(sys.executable).parent


def fedclip(*given: object) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["report", *map(str, given)])
    return done.exit_code, done.output


@pytest.fixture
def run(plain: Path, tmp_path: Path) -> Path:
    """A completed run in a folder of its own."""
    path = tmp_path / "runs" / plain.name
    shutil.copytree(plain, path)
    return path


def files(folder: Path) -> dict[str, bytes]:
    names = [
        history.PAGE,
        output.FILE,
        *(f"{output.PLOTS}/{path.name}" for path in (folder / output.PLOTS).iterdir()),
    ]
    return {name: (folder / name).read_bytes() for name in names}


def test_a_report_is_written_into_the_runs_folder_and_is_the_same_each_time(
    run: Path, plain: Path, pages: dict[str, Path]
) -> None:
    code, printed = fedclip(run)
    assert code == 0, printed
    assert printed.splitlines()[-1] == f"Report: {run / 'report.html'}"
    assert "88 kB a site and round" in printed
    before, made = (files(folder) for folder in (pages["plain"].parent, run))
    made[history.PAGE] = made[history.PAGE].replace(bytes(run.parent), bytes(plain.parent))  # it says where the run is
    assert made == before
    assert not list(run.rglob(".*"))


def test_the_newest_run_is_taken_unless_said_and_out_names_another_folder(
    run: Path, tmp_path: Path, undrawn: None
) -> None:
    (run.parent / "latest").symlink_to(run.name)
    before = sorted(run.iterdir())
    code, printed = fedclip("--results-dir", run.parent, "--out", tmp_path / "there")
    assert (code, printed.splitlines()[-1]) == (0, f"Report: {tmp_path / 'there' / 'report.html'}")
    assert (tmp_path / "there" / output.FILE).exists()
    assert sorted(run.iterdir()) == before


def test_runs_of_one_name_are_distinguished_by_their_paths(run: Path, tmp_path: Path, undrawn: None) -> None:
    both = [tmp_path / part / "runs" / "same" for part in ("one", "other")]
    for path in both:
        shutil.copytree(run, path)
    assert fedclip(*both, "--out", tmp_path / "out")[0] == 0
    text = words(tmp_path / "out" / "report.html")
    assert all(text.count(str(path)) > 1 for path in both)


def test_where_the_data_is_not_at_hand_what_was_found_at_the_end_is_shown(
    run: Path, tmp_path: Path, undrawn: None
) -> None:
    assert fedclip(run)[0] == 0
    shutil.copytree(run, away := tmp_path / "elsewhere" / run.name)
    facts = json.loads((away / "settings.json").read_text())
    (away / "settings.json").write_text(json.dumps({**facts, "data": f"folder:{tmp_path / 'gone'}"}))
    code, _ = fedclip(away)
    text = words(away / "report.html")
    assert code == 0
    assert "This is an earlier analysis; it can't be repeated here" in text
    assert "Confusion, adapted" in text
    (away / output.FILE).unlink()
    assert fedclip(away)[0] == 0
    assert "There are no results by class: data = 'folder:" in words(away / "report.html")


def test_several_runs_are_put_side_by_side(
    run: Path, tmp_path: Path, drawn: Features, fedclip_home: Path, undrawn: None
) -> None:
    other = a_run(tmp_path / "other", drawn, adapter="scale", sites=4)
    code, printed = fedclip(run, other)
    assert code == 0, printed
    path = Path(printed.splitlines()[-1].removeprefix("Report: "))
    assert path.parent.parent == fedclip_home / "reports"
    assert run.name in path.parent.name
    text = words(path)
    assert "2 runs compared" in text
    assert f"{run.name} attention" in text
    assert f"{other.name} scale" in text
    assert "Seen accuracy over rounds" in text
    for made, sites in ((run, 3), (other, 4)):
        facts = history.read(made).summary
        zero, adapted = (facts[key]["unseen"] for key in ("zero_shot", "adapted"))
        assert re.search(
            rf"{made.name} completed 3 {sites} \S+ \S+ {100 * adapted:.1f} {re.escape(gain(zero, adapted))} ",
            text,
        )


def test_what_can_not_be_reported_is_named_in_a_line(run: Path, tmp_path: Path) -> None:
    for given, why in (
        ((tmp_path / "none",), "there is no such run"),
        ((run, run), "the same run is given twice"),
        ((run, "--out", run / "settings.json"), "can't be written to"),
    ):
        code, printed = fedclip(*given)
        assert code == 2
        assert why in printed
        assert len(printed.splitlines()) == 1


def test_a_comparison_does_not_take_the_place_of_a_runs_report(run: Path, tmp_path: Path, drawn: Features) -> None:
    other = a_run(tmp_path / "other", drawn)
    code, printed = fedclip(run, other, "--out", other)
    assert code == 2
    assert "name another folder" in printed


def test_no_report_takes_the_place_of_another_runs(run: Path, tmp_path: Path, drawn: Features) -> None:
    other = a_run(tmp_path / "other", drawn)
    kept = {path: path.read_bytes() for path in other.rglob("*") if path.is_file()}
    (tmp_path / "latest").symlink_to(other)
    for out in (other, tmp_path / "latest"):
        for names in ([str(run)], [str(run), str(other)]):
            done = CliRunner().invoke(app, ["report", *names, "--out", str(out)])
            assert done.exit_code == 2
            assert "a run is there, whose own report would be lost" in done.stderr
    assert {path: path.read_bytes() for path in other.rglob("*") if path.is_file()} == kept


def test_no_report_lands_among_other_files(run: Path, tmp_path: Path, undrawn: None) -> None:
    (tmp_path / "own").mkdir()
    for name in ("notes.txt", "report.html"):
        (tmp_path / "own" / name).write_text("mine")
        code, printed = fedclip(run, "--out", tmp_path / "own")
        assert code == 2
        assert f"something else is there, such as {name}" in printed
        assert [path.read_text() for path in (tmp_path / "own").iterdir()] == ["mine"]
        (tmp_path / "own" / name).unlink()
    (tmp_path / "own" / "report.html").mkdir()
    code, printed = fedclip(run, "--out", tmp_path / "own")
    assert code == 2
    assert "something else is there, such as report.html" in printed
    (tmp_path / "own" / "report.html").rmdir()
    for _ in range(2):
        assert fedclip(run, "--out", tmp_path / "own")[0] == 0
    assert fedclip(run, "--out", "")[0] == 2


def test_a_report_that_can_not_be_made_costs_a_line_and_not_the_run(run: Path, drawn: Features) -> None:
    (run / "summary.json").write_text("{")
    assert writing.at_end(run, drawn, "sketch").startswith("no report: ")
    shutil.rmtree(run)
    assert writing.at_end(run, drawn, "sketch").startswith("no report: ")


@pytest.mark.federation
def test_a_run_ends_with_its_report(tmp_path: Path, tree: Path) -> None:
    given = ["--nodes", "2", f"data=folder:{tree}", "num-server-rounds=2", f"results-dir={tmp_path}"]
    done = subprocess.run([BIN / "fedclip", "run", *given], env={**os.environ}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    folder = (tmp_path / "latest").resolve()
    assert done.stdout.rstrip().splitlines()[-2:] == [f"Report: {folder / 'report.html'}", f"Run folder: {folder}"]
    text = words(folder / "report.html")
    assert "Held-out images: photo" in text
    assert "fedclip predict" in text
    made = files(folder)
    assert fedclip(folder)[0] == 0
    assert files(folder) == made
