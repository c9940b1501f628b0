"""From the setting `data` to a source of images."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from fedclip_flwr.base import UserError, files, plugins
from fedclip_flwr.base.settings import STORED, place_of
from fedclip_flwr.data.base import FIND, Columns, Picture, Source
from fedclip_flwr.data.presets import PRESETS, Canonical, Preset, fitting
from fedclip_flwr.data.vocabulary import check_plain

Open = Callable[[Path, str, Columns], Source]
"""Opens the source at a path on this machine. It also gets the complete setting `data`, for errors, and the columns.

The source must be picklable and quick to open: each process opens its own."""


class NoImages:
    """The source of a server that holds no images."""

    class_names: tuple[str, ...] = ()
    domains: tuple[str, ...] = ()

    def content(self, domain: str) -> str:
        raise KeyError(domain)

    def count(self, domain: str) -> int:
        raise KeyError(domain)

    def pictures(self, domain: str, start: int = 0, stop: int | None = None) -> Iterator[Picture]:
        raise KeyError(domain)


def open_source(data: str, columns: Columns = FIND) -> tuple[Source, Preset | None]:
    """The source that the setting `data` names, and the preset that it matches, or None."""
    kind, _, rest = data.partition(":")
    if kind == "drawn":
        from fedclip_flwr.data.drawn import Drawn

        if not re.fullmatch(r"[0-9]{0,18}", rest):
            raise UserError(f"data = {data!r}: expected a whole number of at most 18 digits after drawn:")
        return Drawn(int(rest or 0)), None
    if data == "none":
        return NoImages(), None
    head, path = place_of(data)
    if head not in ("", STORED):
        source = _local(head, Path(path), data, columns)
    elif data in PRESETS:
        source = _preset(data, columns)
    else:
        source = _of_hub(data, columns)
    check_plain(f"data = {data!r}: a domain", source.domains)
    check_plain(f"data = {data!r}: a class", source.class_names)
    preset = fitting(source.domains, source.class_names)
    if data in PRESETS and preset is not PRESETS[data]:
        raise UserError(
            f"data = {data!r}: expected the domains {', '.join(PRESETS[data].domains)} with the classes of that data "
            f"set, found {', '.join(source.domains)} with {', '.join(source.class_names)}"
        )
    return (Canonical(source, preset), preset) if preset else (source, None)


def _local(head: str, path: Path, data: str, columns: Columns) -> Source:
    """Opens a source on this machine; errors of the file system become a `UserError`."""
    try:
        return _opener(head)(path, data, columns)
    except PermissionError as error:
        raise UserError(
            f"data = {data!r}: this user may not read {path} and all below ({error.strerror}: {error.filename}): "
            "give it permission to read the files and enter the folders"
        ) from None
    except OSError as error:
        raise UserError(f"data = {data!r}: {path} can't be read ({error.strerror}: {error.filename})") from None


def _opener(head: str) -> Open:
    """The function, or the class, that opens what follows the head; a plug-in's if it is not one of ours."""
    expected = "a class, called with path, data and columns"
    return LOCAL.get(head) or plugins.load("data", head[:-1], {}, callable, expected, chosen=True)


def _folder(root: Path, data: str, columns: Columns) -> Source:
    """Opens a tree of images or a data set."""
    from fedclip_flwr.data.dataset import DataSet, is_dataset
    from fedclip_flwr.data.folder import ImageFolder

    if not root.is_dir():
        raise UserError(f"data = {data!r}: there is no such folder")
    if is_dataset(root):
        return DataSet(root, data, columns)
    if given := [f"{name}-column" for name, column in columns._asdict().items() if column]:
        raise UserError(f"{', '.join(given)}: {root} is a folder of images, not a data set, and has no columns")
    return ImageFolder(root)


LOCAL: dict[str, Open] = {"folder:": _folder}
"""For each of `settings.PLACES` except `features:`."""


def _of_hub(data: str, columns: Columns) -> Source:
    from fedclip_flwr.data.dataset import DataSet, from_hub

    try:
        return DataSet(from_hub(data, f"data = {data!r}"), data, columns)
    except UserError as error:
        near = difflib.get_close_matches(data.lower(), ("drawn", *PRESETS), 1)
        raise UserError(f"{error}; or did you mean {near[0]}?") if near else error from None


def _preset(name: str, columns: Columns) -> Source:
    """A well-known data set: from its place in FEDCLIP_HOME, else from the hub."""
    from fedclip_flwr.data.dataset import DataSet, from_hub

    place, hub_id = files.home() / "data" / name, PRESETS[name].hub_id
    if place.is_dir():
        return _local("folder:", place, name, columns)
    elsewhere = f"put its tree domain/class/image into {place}, or give data=folder:PATH"
    if not hub_id:
        raise UserError(f"data = {name!r}: the hub does not have it; {elsewhere}")
    try:
        return DataSet(from_hub(hub_id, f"data = {name!r}: {hub_id}"), hub_id, columns)
    except UserError as error:
        raise UserError(f"{error}; or {elsewhere}") from None
