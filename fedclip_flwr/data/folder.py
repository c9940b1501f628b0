"""Images in a folder: `domain/class/image`, or `class/image` for a single domain."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from functools import lru_cache
from itertools import filterfalse
from pathlib import Path, PurePosixPath
from typing import NoReturn

from fedclip_flwr.base import UserError
from fedclip_flwr.base.errors import shown
from fedclip_flwr.base.text import counted
from fedclip_flwr.data.images import FileSource

log = logging.getLogger(__name__)
ENDINGS = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
LAYOUTS = "domain/class/image, or class/image for one domain"


class ImageFolder(FileSource):
    """A tree of images. The one domain of a tree `class/image` gets the name of the tree's folder."""

    def __init__(self, root: Path) -> None:
        prefix = f"data = 'folder:{root}'"
        files = [path for path in _files(root, 3) if len(path.parts) > 1]
        found = list(filter(_is_image, files))
        _warn_of_others(root, tuple(sorted(path.suffix.lower() for path in files if not _is_image(path))))
        depths = {len(path.parts) for path in found}
        if not found:
            raise UserError(f"{prefix}: {_elsewhere(root)}; expected {LAYOUTS}")
        if len(depths) > 1:
            one, other = (next(path for path in found if len(path.parts) == depth) for depth in (2, 3))
            raise UserError(f"{prefix}: images at different depths, such as {one} and {other}; expected {LAYOUTS}")
        alone = root.name or "images"
        images = [(str(path), path.parts[-2], path.parts[0] if depths == {3} else alone) for path in found]
        super().__init__(root, images)
        if len(self.class_names) < 2:
            raise UserError(
                f"{prefix}: only one class ({self.class_names[0]}) there; expected at least two, as {LAYOUTS}"
            )


def _files(root: Path, depth: int, links: bool = True) -> Iterator[PurePosixPath]:
    """The files below the folder, down to `depth` levels, in sorted order, without hidden ones.

    Links to folders are followed, unless they lead back to a folder above them.
    """
    for folder, below, files in os.walk(root, onerror=_raise, followlinks=links):
        here = PurePosixPath(os.path.relpath(folder, root))
        deeper = len(here.parts) < depth - 1
        below[:] = sorted(n for n in below if deeper and not _hidden(n) and not _leads_back(folder, n))
        yield from (here / name for name in sorted(filterfalse(_hidden, files)))


def _leads_back(folder: str, name: str) -> bool:
    path = os.path.join(folder, name)
    return os.path.islink(path) and f"{os.path.realpath(folder)}/".startswith(f"{os.path.realpath(path)}/")


def _raise(error: OSError) -> NoReturn:
    """A folder that can't be read is an error: its images must not be missing silently."""
    raise error


def _is_image(path: PurePosixPath) -> bool:
    return path.suffix.lower() in ENDINGS


def _hidden(name: str) -> bool:
    """True for hidden files, and for what macOS adds to archives."""
    return name.startswith((".", "__MACOSX"))


@lru_cache
def _warn_of_others(root: Path, endings: tuple[str, ...]) -> None:
    """Warns, once per process, of files that are not read as images."""
    if endings:
        kinds = ", ".join(shown(ending)[:20] or "none" for ending in sorted(set(endings))[:8])
        log.warning("%s: ignored %s without an image extension: %s", root, counted(len(endings), "file"), kinds)


def _elsewhere(root: Path) -> str:
    """Where the images are instead of the expected place, as text for an error."""
    path = next(filter(_is_image, _files(root, 6, links=False)), None)  # links may be many, and form cycles
    if path is None:
        return f"no images ({', '.join(ENDINGS)}) there"
    if len(path.parts) == 1:
        return f"its images, such as {path}, are not in a class folder"
    return f"its images are too deep, such as {path}: point to the folder that holds the domains"
