"""Images without labels: single files, and all images below folders."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NoReturn

from fedclip_flwr.base import UserError, content, files
from fedclip_flwr.base.errors import ReadError
from fedclip_flwr.data.base import Picture
from fedclip_flwr.data.folder import ENDINGS
from fedclip_flwr.data.images import decoded, mark, read


def find_images(places: Iterable[str]) -> list[str]:
    """The given files, and all images below the given folders in sorted order; hidden files are left out."""
    found: list[str] = []
    for place in places:
        if os.path.isdir(place):
            inside = list(_inside(place))
            if not inside:
                raise UserError(f"{place}: no images ({', '.join(ENDINGS)}) there")
            found += inside
        elif os.path.exists(place):
            found.append(place)
        else:
            raise UserError(f"{place}: there is no such file or folder")
    return found


def _inside(root: str) -> Iterator[str]:
    for folder, below, here in os.walk(root, onerror=_raise):
        below[:] = sorted(name for name in below if not name.startswith("."))
        for name in sorted(here):
            if name.lower().endswith(ENDINGS) and not name.startswith("."):
                yield os.path.join(folder, name)


def _raise(error: OSError) -> NoReturn:
    raise UserError(f"{error.filename} can't be read ({error.strerror})") from None


class Files:
    """Image files as a source; an image's label is its position in the list."""

    class_names: tuple[str, ...] = ()
    domains = ("files",)

    def __init__(self, paths: Sequence[str]) -> None:
        self._paths = paths

    def content(self, domain: str) -> str:
        return content.digest(*(mark(Path(path)) for path in self._paths))

    def count(self, domain: str) -> int:
        return len(self._paths)

    def pictures(self, domain: str, start: int = 0, stop: int | None = None) -> Iterator[Picture]:
        for number, path in enumerate(self._paths[start:stop], start):
            try:
                image = files.with_retries(path, partial(decoded, read(Path(path))))
            except ReadError:  # nothing is stored: the next call reads it again
                image = None
            yield Picture(path, number, image)
