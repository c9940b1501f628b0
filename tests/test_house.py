"""The wings: their layers, what each may bring, and where Flower's private names live."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedclip_flwr.base.files import PACKAGE, own_app
from tests import imports

HOME = own_app()
WINGS = sorted(path.parent.name for path in PACKAGE.glob("*/__init__.py"))
PUBLIC = {"flwr.app", "flwr.clientapp", "flwr.serverapp", "flwr.serverapp.strategy"}
OURS = [*PACKAGE.rglob("*.py"), *HOME.glob("*_app.py"), *(HOME / "deploy").rglob("*.py")]


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


def test_wings_import_in_layers() -> None:
    done = subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-cache"], cwd=HOME, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


def test_there_is_no_circle_and_no_more_than_ten_floors() -> None:
    graph = imports.modules()
    assert imports.circle(graph) == []
    assert max(imports.floors(imports.wings(graph)).values()) <= 10


def test_circles_and_floors_by_hand() -> None:
    line = {"p.a.x": frozenset({"p.b.y"}), "p.b.y": frozenset({"p.b.z"}), "p.b.z": frozenset[str]()}
    assert imports.floors(line) == {"p.a.x": 3, "p.b.y": 2, "p.b.z": 1}
    assert imports.wings(line) == {"p.a": {"p.b"}, "p.b": frozenset()}
    assert imports.chain(line) == ["p.a.x", "p.b.y", "p.b.z"]
    assert imports.circle(line) == []
    assert {*imports.circle({**line, "p.b.z": frozenset({"p.a.x"})})} == {*line}


@pytest.mark.parametrize("wing", WINGS)
def test_every_wing_says_what_lives_there_and_design_names_its_modules(wing: str) -> None:
    text = ast.get_docstring(ast.parse((PACKAGE / wing / "__init__.py").read_text()))
    assert text, wing
    map_ = (HOME / "docs" / "design.md").read_text()
    assert f"`{wing}/`" in map_
    modules = [path for path in (PACKAGE / wing).glob("*.py") if path.stem[:2] != "__"]
    assert [path.name for path in modules if f"`{wing}/{path.name}`" not in map_] == []


def private_names(path: Path) -> list[tuple[int, str]]:
    """The lines and names that a file imports from what Flower does not make public."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and re.match(r"flwr(\.|$)", node.module):
            if node.module not in PUBLIC:
                found += [(name.lineno, f"{node.module}.{name.name}") for name in node.names]
        elif isinstance(node, ast.Import):
            found += [(name.lineno, name.name) for name in node.names if re.match(r"flwr\.", name.name)]
    return found


def test_private_names_of_flower_are_imported_in_one_wing_only() -> None:
    assert {path for path in OURS if private_names(path)} <= {*(PACKAGE / "flower").glob("*.py")}


@pytest.mark.parametrize("path", sorted((PACKAGE / "flower").glob("*.py")), ids=lambda path: path.stem)
def test_each_private_name_of_flower_has_its_reason(path: Path) -> None:
    lines = path.read_text().splitlines()
    assert [name for line, name in private_names(path) if "  # " not in lines[line - 1]] == []


def test_only_clip_knows_transformers() -> None:
    knowing = {
        path.name for path in PACKAGE.rglob("*.py") if {"transformers"} & {n.split(".")[0] for n in imported(path)}
    }
    assert knowing == {"clip.py", "pretrain.py"}  # that one made the bundled CLIP, once


@pytest.mark.parametrize(
    ("module", "never"),
    [
        ("base", {"torch", "flwr"}),
        ("base.settings", {"torch", "flwr"}),
        ("learning", {"flwr", "safetensors"}),
        ("features", {"flwr", "transformers", "datasets"}),
        ("runs", {"torch", "flwr"}),
        ("runs.history", {"torch", "flwr"}),
        ("runs.console", {"torch", "flwr"}),
        ("runs.runlist", {"torch", "flwr"}),
        ("runs.watch", {"torch", "flwr"}),
        ("runs.arguments", {"torch", "flwr"}),
        ("report", {"jinja2", "matplotlib"}),
        ("operations.simulation", {"torch"}),
        ("cli", {"torch", "flwr"}),
    ],
)
def test_what_a_module_must_not_bring_with_it(module: str, never: set[str]) -> None:
    brought = {name.partition(".")[0] for name in at_once(f"fedclip_flwr.{module}")}
    assert brought & never == set()


def test_no_function_is_longer_than_sixty_lines() -> None:
    long = [
        f"{path.name}: {node.name}"
        for path in [*PACKAGE.rglob("*.py"), *HOME.glob("*_app.py")]
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and (node.end_lineno or 0) - node.lineno >= 60
    ]
    assert long == []
