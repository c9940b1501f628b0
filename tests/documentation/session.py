"""A stranger's machine for a page's commands: a clone, a home, images, and models of the hub in its cache."""

from __future__ import annotations

import itertools
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path

from fedclip_flwr.data.drawn import picture
from fedclip_flwr.data.presets import PRESETS
from tests.documentation.pages import ROOT, Block
from tests.documentation.shell import Shell

HUB_MODELS = ("openai/clip-vit-base-patch32",)
"""Models that the pages name: here they are the bundled one, in the hub's own cache."""
CLASSES = ("bird", "car", "cat", "fish")
NOT_THEIRS = ("FEDCLIP_HOME", "FLWR_HOME", "ARGS", "MAKEFLAGS", "MAKELEVEL", "MFLAGS")
"""Variables of whoever runs the tests, perhaps by make."""


def clone(place: Path) -> None:
    """A copy of the tree, without an environment."""
    leave = shutil.ignore_patterns(".*", "__pycache__", "build", "dist", "*.egg-info", "docker-run")
    shutil.copytree(ROOT, place, ignore=leave)


def environment(place: Path) -> None:
    """The one of these tests, as make leaves it: whatever has changed since it was made, none is set up."""
    place.mkdir()
    for path in Path(sys.prefix).iterdir():
        (place / path.name).symlink_to(path)
    for name in ("ready", "tools"):
        (place / name).unlink(missing_ok=True)
        (place / name).touch()


def images(folder: Path, domains: Collection[str], classes: Collection[str], count: int) -> None:
    """A folder domain/class/image of drawn pictures, whatever the classes are called."""
    for domain, style in zip(domains, itertools.cycle(("photo", "art", "sketch"))):
        for name, figure in zip(classes, itertools.cycle(CLASSES)):
            (folder / domain / name).mkdir(parents=True)
            for number in range(count):
                picture(7, style, figure, number)[0].save(folder / domain / name / f"{number}.png")


def cached_models(cache: Path) -> None:
    from fedclip_flwr.features import models  # brings torch, and is not needed to collect the tests

    for name in HUB_MODELS:
        folder = cache / "hub" / f"models--{name.replace('/', '--')}"
        sha = "0123456789abcdef0123456789abcdef01234567"
        (folder / "refs").mkdir(parents=True)
        (folder / "refs" / "main").write_text(sha)
        shutil.copytree(models.BUNDLED, folder / "snapshots" / sha)


def lay_out(place: Path) -> tuple[Path, dict[str, str]]:
    """The clone, in which the commands are given, and their environment."""
    home = place / "home"
    (home / ".fedclip").mkdir(parents=True)
    features = Path(os.environ["FEDCLIP_HOME"], "features").resolve()
    features.mkdir(exist_ok=True)
    (home / ".fedclip" / "features").symlink_to(features)
    cached_models(home / "huggingface")
    tree = place / "fedclip-flwr"
    clone(tree)
    environment(tree / ".venv")
    images(tree / "images", ("photo", "art", "sketch"), CLASSES, 10)
    pacs = PRESETS["pacs"]
    images(home / ".fedclip" / "data" / "pacs", pacs.domains, pacs.class_names, 3)
    (tree / "photos").mkdir()
    for number, figure in enumerate(CLASSES):
        picture(8, "photo", figure, number)[0].save(tree / "photos" / f"{figure}.jpg")
    env = {key: value for key, value in os.environ.items() if key not in NOT_THEIRS}
    path = f"{Path(sys.prefix, 'bin')}{os.pathsep}{env['PATH']}"
    return tree, env | {"HOME": str(home), "HF_HOME": str(home / "huggingface"), "PATH": path}


def in_background(blocks: Collection[Block]) -> bool:
    return any("background" in block.said for block in blocks)


def alone() -> list[str]:
    """What begins a command that has the machine's ports for itself, and with which all that it started ends."""
    user = [] if os.geteuid() == 0 else ["--map-root-user"]
    spaces = [*user, "--net", "--pid", "--mount-proc", "--fork", "--kill-child"]
    return ["unshare", *spaces, "bash", "-c", 'ip link set lo up && exec "$@"', "bash"]


def why_not_alone() -> str:
    """Why that can't be here; nothing if it can."""
    if missing := [tool for tool in ("unshare", "ip") if not shutil.which(tool)]:
        return f"not installed here: {', '.join(missing)}"
    return subprocess.run([*alone(), "true"], capture_output=True, text=True).stderr.strip()


def script(block: Block) -> str:
    """What its reader gives to bash."""
    text = block.text.rstrip()
    if block.language == "python":
        name, _, words = block.said.get("as", "from_the_page.py").partition(" ")
        return f"cat > {name} <<'THE END'\n{text}\nTHE END\npython {name} {words}"
    if more := block.said.get("with"):
        text = re.sub(r"( +#.*)?$", rf" {more}\1", text, count=1)  # before what only explains the command
    return f"{{\n{text}\n}} &" if "background" in block.said else text


def begin(page: str, blocks: Collection[Block], place: Path, **more: str) -> Shell:
    """A session of bash for the page's blocks, on such a machine."""
    tree, env = lay_out(place)
    return Shell(page, [*(alone() if in_background(blocks) else []), "bash"], tree, env | more)
