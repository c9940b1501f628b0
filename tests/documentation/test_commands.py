"""Every block of commands in the documentation is run, page by page, as a reader would."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from fedclip_flwr import simulation
from tests.documentation import session
from tests.documentation.pages import PAGES, ROOT, Block, blocks
from tests.local_hub import local_hub

RUN = ("bash", "python")
WITH_RUN = "fedclip run --nodes 2 num-server-rounds=2"
CI = ".ci/run"
ELSEWHERE = {"tried by", "in parts by"}
OF_THEIR_OWN = {"docs/deploy.md": "test_guide.py", "docs/extending.md": "test_extending.py"}
"""Pages that a test of their own follows."""
BEFORE = {
    "docs/methods.md": "fedclip encode data=folder:images --out features",
    "docs/report.md": f"{WITH_RUN}\nfor name in 20261126-140212 20261126-141530; do "
    "cp -r ~/.fedclip/runs/latest/ ~/.fedclip/runs/$name; done",
    "docs/start.md": WITH_RUN,
    "docs/using.md": WITH_RUN,
}
"""What a page takes to be there besides, as commands."""


def page_blocks(path: Path) -> list[Block]:
    return [block for block in blocks(path) if block.language in RUN and not block.said.keys() & ELSEWHERE]


PARTS = {str(path.relative_to(ROOT)): page_blocks(path) for path in PAGES}


@pytest.mark.documentation
@pytest.mark.parametrize("page", [page for page, found in PARTS.items() if found and page not in OF_THEIR_OWN])
def test_the_commands_of_a_page_work(page: str, tmp_path: Path) -> None:
    text = "".join(block.text for block in PARTS[page])
    if session.in_background(PARTS[page]) and (why := session.why_not_alone()):
        pytest.skip(f"its servers need a network of their own: {why}")
    with ExitStack() as stack:
        more = {}
        if re.search(r"^flwr run ", text, re.MULTILINE):
            more["FLWR_HOME"] = stack.enter_context(superlink())["FLWR_HOME"]
        if "--push" in text:
            hub = stack.enter_context(local_hub())
            more |= {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_TOKEN": "a-token", "HF_HUB_OFFLINE": "0"}
        session.run(PARTS[page], tmp_path, BEFORE.get(page, ""), **more)


@contextmanager
def superlink() -> Iterator[dict[str, str]]:
    """The environment of one that is not Flower's own in the background, which would stay."""
    with simulation.temporary() as folder, simulation.superlink(Path(folder)) as env:
        yield env


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_each_block_says_what_it_is_and_what_is_tried_elsewhere_is_there(path: Path) -> None:
    for block in blocks(path):
        assert block.language, f"{block.place}: a block without a language"
        if where := block.said.get("tried by"):
            there = (ROOT / where).read_text() if where == CI else "".join(run.text for run in PARTS[where])
            missing = [command for command in block.commands if command not in there]
            assert not missing, f"{block.place}: {where} has no {missing}"
        assert (ROOT / block.said.get("in parts by", "")).exists()
        assert block.said.keys() <= {*ELSEWHERE, "with", "background", "as"}, block.place
