"""Shared by all tests: a store of their own, a small image folder, and the encoded drawn pictures."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from pathlib import Path

import pytest

from fedclip_flwr.config import Settings
from fedclip_flwr.data.drawn import picture
from fedclip_flwr.features import Features, open_features

HUGGING_FACE = tempfile.mkdtemp(prefix="huggingface-")
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HOME": HUGGING_FACE, "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"  # for a plain `flwr run`, too: see simulation.superlink
atexit.register(shutil.rmtree, HUGGING_FACE, ignore_errors=True)


@pytest.fixture(scope="session", autouse=True)
def fedclip_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """No test reads or writes the user's own store."""
    home = tmp_path_factory.mktemp("home")
    os.environ["FEDCLIP_HOME"] = str(home)
    return home


@pytest.fixture(scope="session")
def drawn() -> Features:
    """The drawn pictures of seed 0 as the bundled CLIP sees them."""
    return open_features(Settings(), progress=False)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A folder domain/class/image: 2 domains, 3 classes, 4 images each."""
    root = tmp_path / "tree"
    for domain in ("photo", "cartoon"):
        for figure in ("car", "cat", "fish"):
            (root / domain / figure).mkdir(parents=True)
            for i in range(4):
                picture(7, domain, figure, i)[0].save(root / domain / figure / f"{i}.png")
    return root
