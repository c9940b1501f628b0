"""Shared by all tests: a store of their own, a small image folder, and the encoded drawn pictures."""

from __future__ import annotations

import atexit
import os
import re
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from random import Random

import pytest
from hypothesis import HealthCheck, settings
from hypothesis.configuration import set_hypothesis_home_dir
from xdist.scheduler import LoadScopeScheduling

from fedclip_flwr.base.settings import Settings
from fedclip_flwr.features.base import Features
from fedclip_flwr.features.opening import open_features
from fedclip_flwr.flower import lines
from fedclip_flwr.flower.grids import act_as_server
from tests import budget
from tests.learnt import saved_adapter
from tests.trees import draw

HUGGING_FACE = tempfile.mkdtemp(prefix="huggingface-")
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HOME": HUGGING_FACE, "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # results are a CPU's, to the bit; GPUs: benchmarks/gpu.py
os.environ |= {"GRPC_ENABLE_FORK_SUPPORT": "0", **lines.NO_INSTALLATION}  # for a plain `flwr run`, too: docs/flower.md
atexit.register(shutil.rmtree, HUGGING_FACE, ignore_errors=True)

act_as_server()

set_hypothesis_home_dir(f"{HUGGING_FACE}/hypothesis")  # nothing is left in the tree
settings.register_profile("patient", deadline=None, database=None, suppress_health_check=list(HealthCheck))
PATIENT = settings.get_profile("patient")
settings.register_profile("quick", PATIENT, max_examples=60, derandomize=True)
settings.register_profile("soak", PATIENT, max_examples=10_000, print_blob=True)
settings.load_profile("quick")  # another one: --hypothesis-profile=soak


TOGETHER = (
    "test_deploy",
    "test_hostile",
    "test_reliability",
    "test_secure",
    "test_traffic",
    "flower/test_superlink",
    "documentation/test_site",
    "documentation/test_extending",
    "documentation/test_guide",
    "operations/doctor/",
    "report/",
    "base/test_hub",
    "runs/test_trackers",
    "inference/test_onnx_file",
    "data/test_drawn",
)
"""Tests that share what takes long to make: `pytest -n` gives those of a file, or of a folder, to one process."""
LINE = re.compile(r":\d+\]$")
"""The end of a test that is one of a page's lines: they go to one process, too, and stay in order."""
FIRST = (
    *TOGETHER[:6],
    "documentation/test_guide",
    "documentation/test_site",
    "documentation/",
    "test_running",
    "test_relay",
    *TOGETHER,
    "experiments/test_sweep",
)
"""What takes long is begun first there, so that at the end no process is alone with it."""


def place(nodeid: str, parts: Sequence[str]) -> int:
    """Of the part of `tests/` that a test is in; the number of parts if it is in none."""
    inside = nodeid.removeprefix("tests/")
    return next((number for number, part in enumerate(parts) if inside.startswith(part)), len(parts))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> LoadScopeScheduling:
    """Not xdist's own groups: of them, xdist 3.8 and pytest 9.2 do not understand each other."""
    config.option.loadscopereorder = False
    scheduling = LoadScopeScheduling(config, log)
    scheduling._split_scope = lambda nodeid: (*TOGETHER, LINE.sub("", nodeid))[place(nodeid, TOGETHER)]
    return scheduling


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--shuffle", type=int, metavar="SEED", help="run files, and the tests in each, in random order")
    budget.pytest_addoption(parser)


def pytest_configure(config: pytest.Config) -> None:
    budget.pytest_configure(config)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if (seed := config.getoption("shuffle")) is not None:
        items.sort(
            key=lambda item: [Random(f"{seed} {name}").random() for name in (item.path.name, LINE.sub("", item.nodeid))]
        )
    elif hasattr(config, "workerinput"):
        items.sort(key=lambda item: place(item.nodeid, FIRST))


@pytest.fixture(scope="session", autouse=True)
def fedclip_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """No test reads or writes the user's own store; the processes of `pytest -n` share the features of theirs."""
    home = tmp_path_factory.mktemp("home")
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = tmp_path_factory.getbasetemp().parent / "features"
        shared.mkdir(exist_ok=True)
        (home / "features").symlink_to(shared)
    os.environ["FEDCLIP_HOME"] = str(home)
    return home


@pytest.fixture(scope="session")
def drawn() -> Features:
    """The drawn pictures of seed 0 as the bundled CLIP sees them."""
    return open_features(Settings(), progress=False)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A folder domain/class/image: 2 domains, 3 classes, 4 images each."""
    return draw(tmp_path / "tree", ("photo", "cartoon"), ("car", "cat", "fish"), 4)


@pytest.fixture
def hard_tree(tmp_path: Path) -> Path:
    """As `tree`, with 8 images each, and a domain in which the bundled CLIP makes mistakes."""
    return draw(tmp_path / "hard", ("photo", "sketch"), ("bird", "house", "tree"), 8)


@pytest.fixture
def features(tree: Path) -> Features:
    """The tree's images as the bundled CLIP sees them."""
    return open_features(Settings(data=f"folder:{tree}"), progress=False)


@pytest.fixture
def folder(tmp_path: Path, features: Features) -> Path:
    """One with an adapter for them."""
    saved_adapter(tmp_path / "learnt", features)
    return tmp_path / "learnt"
