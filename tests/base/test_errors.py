from __future__ import annotations

import pickle
from pathlib import Path

from fedclip_flwr.base.errors import LONGEST, ReadError, UserError
from fedclip_flwr.base.settings import Settings
from fedclip_flwr.runs.arguments import read_settings


def test_what_a_file_is_called_breaks_no_line_and_steers_no_terminal() -> None:
    error = UserError("/data/a\nb\x1b[2J\u2028\u202e/\udcff: lies")
    assert str(error) == "/data/a�b�[2J��/�: lies"
    str(error).encode()


def test_an_error_is_not_endless() -> None:
    assert len(str(UserError("x" * 10**6))) == LONGEST


def test_several_problems_have_a_line_each_also_after_a_journey_between_processes() -> None:
    settings, problems = read_settings(["see\nd=1", "a\nb", "data=\x1b[2J\nx"])
    _, found = Settings.read(settings)
    error = UserError("these:", *{**problems, **found}.values())
    assert len(str(error).splitlines()) == 1 + len({**problems, **found})
    assert "\x1b" not in str(error)
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_an_error_of_a_file_comes_complete_from_another_process() -> None:
    error = ReadError(Path("cat/0.png"), "can't be read now", "try again")
    there = pickle.loads(pickle.dumps(error))
    assert str(there) == str(error) == "cat/0.png can't be read now: try again"
    assert there.unnamed == "a file can't be read now: try again"
