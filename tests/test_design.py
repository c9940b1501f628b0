"""docs/design.md is the map: every room is in its table, and imports no more from elsewhere than the table says."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedclip_flwr.base.files import own_app

HOME = own_app()
PACKAGE = HOME / "fedclip_flwr"
BROUGHT = {
    "numpy": "torch",
    "tqdm": "torch",
    "PIL": "Pillow",
    "grpc": "flwr",
    "click": "typer",
    "httpx": "huggingface_hub",
}
"""What comes with another package, or is called otherwise."""


def rooms() -> list[tuple[str, str]]:
    """The table's paths, each with what it may import."""
    table = (HOME / "docs" / "design.md").read_text().partition("## The rooms")[2].partition("\n\n## ")[0]
    rows = [re.split(r" \| ", line.strip("| ")) for line in table.splitlines() if line.startswith("| `")]
    assert all(len(row) == 3 for row in rows)
    return [(name, may) for names, _, may in rows for name in re.findall(r"`([^`]+)`", names)]


def sources(room: str) -> list[Path]:
    place = HOME / room
    return [place] if place.is_file() else sorted(place.rglob("*.py"))


def imported(path: Path, *, at_once: bool = False) -> Iterator[str]:
    """The modules that a file imports, but not for types alone; `at_once`: as soon as it is itself imported."""
    waiting: list[ast.AST] = [ast.parse(path.read_text())]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: imports are written out"
            assert node.module
            yield node.module
            yield from (f"{node.module}.{name.name}" for name in node.names)
        elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            waiting += node.orelse
        elif not (at_once and isinstance(node, ast.FunctionDef)):
            waiting += ast.iter_child_nodes(node)


def others(path: Path) -> set[str]:
    """The packages from elsewhere that a file imports."""
    packages = {module.partition(".")[0] for module in imported(path)}
    return packages - sys.stdlib_module_names - {"fedclip_flwr", "benchmarks", "deploy", "reliability", "tests"}


def at_once(module: str) -> set[str]:
    """All that comes with a module of the package, ours and others', directly or not."""
    found, waiting = set[str](), [module]
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        found.add(name)
        place = HOME / Path(*name.split("."))
        path = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
        if name.startswith("fedclip_flwr") and path.is_file():
            waiting += [*imported(path, at_once=True), *filter(None, [name.rpartition(".")[0]])]
    return found


def test_every_file_and_folder_is_in_the_table_once() -> None:
    named = [name for name, _ in rooms()]
    modules = [path for path in PACKAGE.iterdir() if path.suffix == ".py" and path.name != "__init__.py"]
    folders = [path.parent for path in [*PACKAGE.glob("*/__init__.py"), *HOME.glob("*/__init__.py")]]
    there = {f"{path.relative_to(HOME)}{'/' * path.is_dir()}" for path in [*modules, *folders, *HOME.glob("*_app.py")]}
    assert there - {*named} == {"fedclip_flwr/"}
    assert [name for name in named if not (HOME / name).exists()] == []
    assert len(named) == len({*named})


def test_every_part_of_a_folder_that_the_table_names_is_there() -> None:
    table = (HOME / "docs" / "design.md").read_text().partition("## The rooms")[2].partition("\n\n## ")[0]
    for line in table.splitlines():
        if line.startswith("| `fedclip_flwr/") and "/`" in line.split(" | ")[0]:
            folder = HOME / re.findall(r"`([^`]+)`", line)[0]
            parts = re.findall(r"`([\w*]+(?:\.\w+|/))`", line.split(" | ")[1])
            assert [part for part in parts if not [*folder.glob(part)]] == [], folder


@pytest.mark.parametrize(("room", "may"), rooms())
def test_a_room_imports_no_more_than_it_may(room: str, may: str) -> None:
    if room.startswith("fedclip_flwr/") or room.endswith("_app.py"):
        words = {*re.findall(r"\w+", may.lower().replace("-", "_"))}
        found = {BROUGHT.get(name, name) for path in sources(room) for name in others(path)}
        assert {name for name in found if name.lower() not in words} == set(), may


def test_only_clip_knows_transformers() -> None:
    knowing = {path.name for path in PACKAGE.rglob("*.py") if "transformers" in others(path)}
    assert knowing == {"clip.py", "pretrain.py"}  # that one made the bundled CLIP, once


@pytest.mark.parametrize(
    ("module", "never"),
    [
        ("config", {"torch", "flwr", "fedclip_flwr.base.content"}),
        ("kinds", {"torch", "flwr", "fedclip_flwr.base.settings"}),
        ("learning", {"flwr", "safetensors", "fedclip_flwr.base.content", "fedclip_flwr.features.clip"}),
        ("adapters", {"flwr", "safetensors", "fedclip_flwr.base.content", "fedclip_flwr.features.clip"}),
        ("codecs", {"flwr", "safetensors", "fedclip_flwr.base.content"}),
        ("metrics", {"flwr", "fedclip_flwr.base.content"}),
        ("inprocess", {"flwr"}),
        ("history", {"torch", "flwr"}),
        ("console", {"torch", "flwr"}),
        ("runlist", {"torch", "flwr"}),
        ("watch", {"torch", "flwr"}),
        ("arguments", {"torch", "flwr"}),
        ("simulation", {"torch"}),
        ("cli", {"torch", "flwr"}),
    ],
)
def test_what_a_room_must_not_bring_with_it(module: str, never: set[str]) -> None:
    brought = at_once(f"fedclip_flwr.{module}")
    assert {name for name in brought if name in never or name.partition(".")[0] in never} == set()
