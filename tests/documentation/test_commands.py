"""Every block of commands in the documentation is run, page by page, as a reader would."""

from __future__ import annotations

import re
import shutil
from collections.abc import Collection, Iterator
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from fedclip_flwr.operations import simulation
from tests.documentation import session
from tests.documentation.pages import PAGES, ROOT, Block, blocks
from tests.documentation.shell import Course
from tests.local_hub import local_hub

if TYPE_CHECKING:
    from fedclip_flwr.features.base import Features

RUN = ("bash", "python")
CI = ".ci/run"
ELSEWHERE = {"tried by", "in parts by"}
OF_THEIR_OWN = {"docs/deploy.md": "test_guide.py", "docs/extending.md": "test_extending.py"}
"""Pages that a test of their own follows."""
WITH_RUNS = {
    "docs/own-images.md": (),
    "docs/report.md": ("20261126-140212", "20261126-141530"),
    "docs/start.md": (),
    "docs/using.md": (),
}
"""Pages that take a run to be there, and further ones that they name."""


def page_blocks(path: Path) -> list[Block]:
    return [block for block in blocks(path) if block.language in RUN and not block.said.keys() & ELSEWHERE]


PARTS = {str(path.relative_to(ROOT)): page_blocks(path) for path in PAGES}


STEPS = {page: {block.place: block for block in found} for page, found in PARTS.items() if page not in OF_THEIR_OWN}
CASES = [pytest.param(page, place, id=place) for page, steps in STEPS.items() for place in steps]


@pytest.fixture(scope="module")
def page(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, drawn: Features) -> Iterator[Course]:
    """A page's blocks, to be run in one session of bash; the drawn pictures are encoded for all of them."""
    name, steps = request.param, STEPS[request.param]
    text = "".join(block.text for block in steps.values())
    if session.in_background(steps.values()) and (why := session.why_not_alone()):
        pytest.skip(f"its servers need a network of their own: {why}")
    for domain in drawn.domains:
        drawn.examples(domain)
    with ExitStack() as stack:
        more = {}
        if re.search(r"^flwr run ", text, re.MULTILINE):
            more["FLWR_HOME"] = stack.enter_context(superlink())["FLWR_HOME"]
        if "--push" in text:
            hub = stack.enter_context(local_hub())
            more |= {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_TOKEN": "a-token", "HF_HUB_OFFLINE": "0"}
        place = tmp_path_factory.mktemp("page")
        shell = stack.enter_context(closing(session.begin(name, steps.values(), place, **more)))
        if name in WITH_RUNS:
            add_runs(place / "home" / ".fedclip" / "runs", drawn, WITH_RUNS[name])
        yield Course({place: partial(shell.run, session.script(block), place) for place, block in steps.items()})


@pytest.mark.documentation
@pytest.mark.parametrize(("page", "place"), CASES, indirect=["page"], scope="module")
def test_a_block_of_commands_works(page: Course, place: str) -> None:
    page.take(place)


def add_runs(results: Path, drawn: Features, names: Collection[str]) -> None:
    """A run that was learnt in this process, which takes no time, and copies of it; real ones: README.md's."""
    from tests.report.made import a_run  # brings torch, and is not needed to collect the tests

    run = a_run(results, drawn)
    for name in names:
        shutil.copytree(run, results / name)


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
