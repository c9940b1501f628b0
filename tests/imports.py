"""The import graph of the package: circles, floors of wings, and the longest chain of modules.

    python -m tests.imports

A wing's floor is one above the highest wing that it imports from; so is a module's.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from functools import cache
from graphlib import CycleError, TopologicalSorter

import grimp

PACKAGE = "fedclip_flwr"
Graph = Mapping[str, frozenset[str]]


def modules() -> Graph:
    """For each module those that it imports, also within functions."""
    graph = grimp.build_graph(PACKAGE, cache_dir=None)
    return {name: frozenset(graph.find_modules_directly_imported_by(name)) for name in sorted(graph.modules)}


def wings(graph: Graph) -> Graph:
    """The same of wings: the folders, and the modules beside them."""
    found: dict[str, set[str]] = {}
    for name, imported in graph.items():
        own = wing_of(name)
        found.setdefault(own, set()).update({wing_of(other) for other in imported} - {own})
    return {name: frozenset(imported) for name, imported in found.items()}


def wing_of(module: str) -> str:
    return ".".join(module.split(".")[:2])


def circle(graph: Graph) -> list[str]:
    """Modules that import each other in a circle; empty if there is none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def floors(graph: Graph) -> dict[str, int]:
    """The floor of each, from 1; there must be no circle."""

    @cache
    def floor(name: str) -> int:
        return 1 + max(map(floor, graph[name]), default=0)

    return {name: floor(name) for name in graph}


def chain(graph: Graph) -> list[str]:
    """The longest chain of imports."""
    of = floors(graph)
    found = [max(of, key=lambda name: of[name])]
    while below := graph[found[-1]]:
        found.append(max(sorted(below), key=lambda name: of[name]))
    return found


def main() -> int:
    graph = modules()
    if found := circle(graph):
        print(f"circle: {' -> '.join(found)}")
        return 1
    by_floor: dict[int, list[str]] = {}
    for wing, floor in floors(wings(graph)).items():
        by_floor.setdefault(floor, []).append(wing.removeprefix(f"{PACKAGE}."))
    for floor in sorted(by_floor, reverse=True):
        print(f"{floor:>3}  {', '.join(sorted(by_floor[floor]))}")
    longest = chain(graph)
    print(f"{len(graph)} modules, no circle, {max(by_floor)} floors of wings; longest chain of {len(longest)} modules:")
    print("     " + " > ".join(name.removeprefix(f"{PACKAGE}.") for name in longest))
    return 0


if __name__ == "__main__":
    sys.exit(main())
