"""Folders of drawn pictures, domain/class/image."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from fedclip_flwr.data.drawn import picture


def draw(root: Path, domains: Iterable[str], classes: Iterable[str], each: int) -> Path:
    """A folder with `each` pictures of each class in each domain."""
    for domain in domains:
        for figure in classes:
            (root / domain / figure).mkdir(parents=True)
            for i in range(each):
                picture(7, domain, figure, i)[0].save(root / domain / figure / f"{i}.png")
    return root
