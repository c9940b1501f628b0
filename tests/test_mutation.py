"""The table of `python -m tests.mutation`, and the tool itself in a tree of two files."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.mutation.__main__ import main, problem_of
from tests.mutation.table import MUTATIONS

LARGER = """
def larger(one, other):
    return one if one > other else other
"""
TEST = """
from fedclip_flwr.room import larger

def test_larger():
    assert larger(1, 2) == 2
"""
TRY = """
import sys
from pathlib import Path
from tests.mutation import __main__ as tool
from tests.mutation.table import changes
tool.TREE, tool.LOADED = Path(sys.argv[1]), ()
tool.MUTATIONS = changes(
    "fedclip_flwr/room.py",
    "test_room.py",
    ("one > other", "one < other"),
    ("one > other", "one >= other", "they are equal"),
    ("if one > other else", "if 2 > other else"),
    ("def larger", "def smaller"),
)
sys.exit(tool.main(["--jobs", "1"]))
"""


def test_every_mutation_can_be_made_and_few_live() -> None:
    assert [problem for one in MUTATIONS if (problem := problem_of(one))] == []
    assert Counter((one.file, one.old, one.new) for one in MUTATIONS).most_common(1)[0][1] == 1
    assert len([one for one in MUTATIONS if one.why]) <= 3


def test_a_planted_mutation_is_noticed_or_lives(tmp_path: Path) -> None:
    for folder, name, text in (("fedclip_flwr", "room.py", LARGER), ("tests", "test_room.py", TEST)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "__init__.py").touch()
        (tmp_path / folder / name).write_text(text)
    env = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}  # for they take longer than all else here
    done = subprocess.run([sys.executable, "-c", TRY, str(tmp_path)], env=env, capture_output=True, text=True)
    assert re.findall(r"of 4  (\w+) +\d+ s  .* → (.+)", done.stdout) == [
        ("noticed", "one < other  by test_room.py::test_larger"),
        ("LIVES", "one >= other"),
        ("LIVES", "if 2 > other else"),
        ("INVALID", "def smaller"),
    ], done.stderr
    assert "1 noticed, 2 live, 1 of them without a reason, 1 invalid" in done.stdout
    assert done.returncode == 1


def test_a_word_that_no_mutation_has_is_reported(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["codecs", "coddecs"])
    assert ended.value.code == 2
    assert "no mutation has the word 'coddecs'" in capsys.readouterr().err.splitlines()[-1]
