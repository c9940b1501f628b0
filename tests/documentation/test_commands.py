"""Every block of commands in the documentation is run, page by page, as a reader would."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fedclip_flwr import simulation
from tests.documentation import session
from tests.documentation.pages import PAGES, ROOT, Block, blocks

RUN = ("bash", "python")
OF_THEIR_OWN = {"docs/deploy.md": "test_guide.py", "docs/extending.md": "test_extending.py"}
"""Pages that a test of their own follows."""
BEFORE: dict[str, str] = {}
"""What a page takes to be there besides, as commands."""


def page_blocks(path: Path) -> list[Block]:
    return [block for block in blocks(path) if block.language in RUN and "tried by" not in block.said]


PARTS = {str(path.relative_to(ROOT)): page_blocks(path) for path in PAGES}


@pytest.mark.parametrize("page", [page for page, found in PARTS.items() if found and page not in OF_THEIR_OWN])
def test_the_commands_of_a_page_work(page: str, tmp_path: Path) -> None:
    before = BEFORE.get(page, "")
    if any(re.search(r"^flwr ", block.text, re.MULTILINE) for block in PARTS[page]):
        with simulation.temporary() as folder, simulation.superlink(Path(folder)) as env:
            session.run(PARTS[page], tmp_path, before, FLWR_HOME=env["FLWR_HOME"])
    else:
        session.run(PARTS[page], tmp_path, before)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_each_block_says_what_it_is_and_what_is_tried_elsewhere_is_there(path: Path) -> None:
    for block in blocks(path):
        assert block.language, f"{block.place}: a block without a language"
        if where := block.said.get("tried by"):
            there = (ROOT / where).read_text()
            missing = [command for command in block.commands if command not in there]
            assert not missing, f"{block.place}: {where} has no {missing}"
        assert block.said.keys() <= {"tried by", "with", "background"}, block.place
