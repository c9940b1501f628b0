"""Data sets in Hugging Face's formats: from the hub, or from a local folder (`save_to_disk`, parquet files…).

The contents of a data set are read once and remembered: later runs do not import `datasets`.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from fedclip_flwr.base import UserError, content, files, hub
from fedclip_flwr.base.settings import PLACES, place_of
from fedclip_flwr.data.base import FIND, Columns, Picture
from fedclip_flwr.data.images import changed, content_of, known, read

log = logging.getLogger(__name__)
SAVED = ("dataset_dict.json", "state.json")
"""Files that `save_to_disk` writes."""
DESCRIBED = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
"""Files that describe the images beside them."""
TABLES = (".parquet", ".arrow", ".tar")
NO_DATA = ("*.py", "*.bin", "*.pt", "*.pth", "*.pkl", "*.pickle", "*.safetensors")
"""Patterns of files that are never downloaded: code, pickles, models."""
NAMES = {
    "image": ("image", "img", "picture", "photo"),
    "label": ("label", "labels", "class", "category", "target", "fine_label"),
    "domain": ("domain", "domains", "style", "environment", "source", "site"),
}
"""Usual names of the columns, the likeliest first."""


class Row(NamedTuple):
    """One image: the number of its class, the hash of its bytes, its row."""

    label: int
    mark: str
    number: int


def is_dataset(root: Path) -> bool:
    """True if the folder is a data set that `datasets` can read, and not a tree of images."""
    if any((root / name).exists() for name in SAVED + DESCRIBED):
        return True
    return any(path.suffix in TABLES for pattern in ("*", "*/*") for path in root.glob(pattern))


def from_hub(name: str, prefix: str) -> Path:
    """The data set's folder in the hub's cache, downloaded if it is not there; errors begin with `prefix`."""
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise UserError(
            f"{prefix}: expected drawn, drawn:SEED, pacs, vlcs, office-home, a Hugging Face data set, "
            + " or ".join(f"{head}PATH" for head in PLACES)
        )
    return hub.snapshot(name, kind="dataset", revision="", lacks=_lacks, prefix=prefix, ignore_patterns=NO_DATA)


def _lacks(folder: Path) -> str | None:
    """The missing part of a data set's folder: all data, or one of its numbered files; None if it looks complete."""
    found = [path for path in folder.rglob("*") if path.is_file() and path.suffix not in (".md", "")]
    for path in found:
        if part := re.fullmatch(r"(.*-)\d{5}(-of-(\d{5})\..*)", path.name):
            for number in range(int(part[3])):
                name = f"{part[1]}{number:05}{part[2]}"
                if not (path.parent / name).is_file():
                    return name
    return None if found else "data files"


class DataSet:
    """A data set with an image, a label and optionally a domain in each row; its splits are joined.

    Class names are in sorted order, as in a folder. Rows without a label, or without a domain, are left out.
    """

    def __init__(self, root: Path, name: str, columns: Columns = FIND) -> None:
        self._root, self._prefix = root, f"data = {name!r}"
        self._columns = columns
        self._name = place_of(name)[1].rstrip("/").rpartition("/")[2] or "images"
        names = sorted(os.path.relpath(path, root) for path in root.rglob("*") if path.is_file())
        self._state = content.state_of(root, names, self._name, *self._columns)
        facts = json.loads(content.remembered(self._state, lambda: json.dumps(self._look()), content.memory()))
        self.class_names = tuple(facts["class_names"])
        self._domains: Mapping[str, dict[str, Any]] = facts["domains"]
        self.domains = tuple(sorted(self._domains))
        self._verified: set[str] = set()

    def content(self, domain: str) -> str:
        return str(self._domains[domain]["content"])

    def count(self, domain: str) -> int:
        return int(self._domains[domain]["count"])

    def pictures(self, domain: str, start: int = 0, stop: int | None = None) -> Iterator[Picture]:
        if domain not in self._verified:
            if self.content(domain) != _content_of(self._rows.get(domain, [])):
                content.forget(self._state, content.memory())
                raise changed(f"one of the images in {self._root}")
            self._verified.add(domain)
        for label, hashed, number in self._rows[domain][start:stop]:
            image = known(f"{self._root}: row {number}", self._opened.image(number), hashed)
            yield Picture(f"row {number}", label, image)

    def _look(self) -> dict[str, Any]:
        """Reads the data set, and returns the facts to remember."""
        rows = self._rows
        if not rows:
            raise UserError(f"{self._prefix}: no row has an image and a label")
        if len(self._opened.class_names) < 2:
            raise UserError(f"{self._prefix}: only one class there; expected at least two")
        if without := len(self._opened.labels) - sum(map(len, rows.values())):
            log.warning("%s: %s rows without a label or a domain are left out", self._prefix, f"{without:,}")
        domains = {domain: {"count": len(own), "content": _content_of(own)} for domain, own in rows.items()}
        return {"class_names": self._opened.class_names, "domains": domains}

    @cached_property
    def _opened(self) -> _Table:
        try:
            return _Table(self._root, self._columns, self._name)
        except UserError as error:
            raise UserError(f"{self._prefix}: {error}") from None
        except Exception as error:  # its many formats raise many types
            cause = error.__cause__ if type(error).__name__ == "DatasetGenerationError" else None  # says nothing itself
            reason = (str(cause or error).strip().splitlines() or [type(cause or error).__name__])[0]
            raise UserError(f"{self._prefix}: {self._root} can't be read as a data set ({reason})") from error

    @cached_property
    def _rows(self) -> dict[str, list[Row]]:
        """The rows of each domain, in an order that depends only on images and labels."""
        from tqdm import tqdm

        table = self._opened
        found: dict[str, list[Row]] = {}
        for number, (label, domain) in enumerate(tqdm(table.labels, desc="reading", unit=" images", delay=2)):
            if label is not None and domain is not None:
                mark = content.of_bytes(table.image(number))
                found.setdefault(domain, []).append(Row(label, mark, number))
        return {domain: sorted(rows) for domain, rows in found.items()}


def _content_of(rows: Iterable[Row]) -> str:
    return content_of((row.label, row.mark) for row in rows)


class _Table:
    """An open data set: images by row, and for each row its class number and domain, either of them None if missing."""

    def __init__(self, root: Path, columns: Columns, name: str) -> None:
        import datasets

        _refuse_references()
        self._root = root
        self._inside = [os.path.abspath(root), os.path.realpath(root), str(datasets.config.HF_DATASETS_CACHE)]
        if any((root / file).exists() for file in SAVED):
            loaded = datasets.load_from_disk(str(root))
        else:
            described = datasets.load_dataset_builder(str(root)).config.data_files or {}
            self._require_inside(file for some in described.values() for file in some)
            loaded = datasets.load_dataset(str(root))
        splits = list(loaded.values()) if isinstance(loaded, dict) else [loaded]
        self._require_inside(file["filename"] for split in splits for file in split.cache_files)
        alike = [split for split in splits if split.features == splits[0].features]
        table = datasets.concatenate_datasets(alike)
        image, label, domain = _find(table.features, columns)
        self._images = table.select_columns([image]).cast_column(image, datasets.Image(decode=False))
        self._image = image
        names = _texts(table, label)
        known = table.features[label]
        self.class_names = sorted(known.names if isinstance(known, datasets.ClassLabel) else {n for n in names if n})
        numbers = {own: number for number, own in enumerate(self.class_names)}
        domains = _texts(table, domain) if domain else [name] * len(names)
        self.labels = [(numbers.get(n) if n else None, d) for n, d in zip(names, domains, strict=True)]

    def image(self, row: int) -> bytes:
        """The image file's bytes as stored; empty if there is none."""
        name = f"{self._root}: row {row}"
        stored = files.with_retries(name, lambda: self._images[row][self._image]) or {"bytes": b""}
        if stored["bytes"] is not None:
            return bytes(stored["bytes"])
        if not stored["path"]:
            return b""
        if not self._is_inside(stored["path"]):  # CVE-2026-66007: datasets from 5.0.1 on refuses most of them itself
            raise UserError(f"row {row} names an image outside the data set: {stored['path']}")
        return read(Path(stored["path"]))

    def _is_inside(self, path: str) -> bool:
        """True for a file of the data set, also one that `datasets` has unpacked or prepared in its cache."""
        return any(Path(os.path.abspath(path)).is_relative_to(place) for place in self._inside)

    def _require_inside(self, names: Iterable[str]) -> None:
        """Raise if a file that the data set names is elsewhere; in an archive it is zip://NAME::ARCHIVE."""
        for name in names:
            if not self._is_inside(name.rpartition("::")[2].removeprefix("file://")):
                raise UserError(f"it names a file outside the data set: {name}")


def _refuse_references() -> None:
    """No file of a data set may be a reference to others: fsspec before 2026.6 runs code in these (CVE-2026-104851).

    Newer ones run it in Jinja's sandbox, and still read files elsewhere.
    """
    import fsspec

    class Refused(fsspec.AbstractFileSystem):  # type: ignore[misc]
        def __init__(self, *_: Any, **__: Any) -> None:
            raise UserError("it has references to files elsewhere (reference://), which may run code: remove them")

    fsspec.register_implementation("reference", Refused, clobber=True)


def _texts(table: Any, column: str) -> list[str | None]:
    """The column's values as texts; a class becomes its name, a missing value None."""
    names = getattr(table.features[column], "names", None)
    values = table[column]
    if names:
        return [names[value] if value is not None and 0 <= value < len(names) else None for value in values]
    return [None if value is None else str(value) for value in values]


def _find(features: Mapping[str, Any], given: Columns) -> tuple[str, str, str]:
    """The names of the image, label and domain columns; the last one is empty if there is none."""
    import datasets

    def is_image(name: str) -> bool:
        return isinstance(features[name], datasets.Image)

    def is_class(name: str) -> bool:
        return isinstance(features[name], datasets.ClassLabel)

    def is_word(name: str) -> bool:
        return (
            is_class(name)
            or re.fullmatch(r"(large_)?string|u?int\d+", str(getattr(features[name], "dtype", ""))) is not None
        )

    there = ", ".join(f"{name} ({getattr(kind, 'dtype', type(kind).__name__)})" for name, kind in features.items())

    def pick(what: str, kind: Callable[[str], bool], own: list[str], taken: tuple[str, ...] = ()) -> str:
        """The given column, the only one of the fitting type, or the likeliest by name; empty if there is none."""
        if named := getattr(given, what):
            if named not in features or not kind(named):
                raise UserError(f"{what}-column = {named!r}: no such column of {what}s; there are {there}")
            return str(named)
        free = [name for name in own if name not in taken]
        if len(free) == 1:
            return free[0]
        likely = {name.casefold(): name for name in features if kind(name) and name not in taken}
        return next((likely[name] for name in NAMES[what] if name in likely), "")

    image = pick("image", is_image, list(filter(is_image, features)))
    domain = pick("domain", is_word, [], (given.label,))
    label = pick("label", is_word, list(filter(is_class, features)), (domain,))
    for what, column in (("image", image), ("label", label)):
        if not column:
            raise UserError(f"no column of {what}s is found; name it with {what}-column: there are {there}")
    return image, label, domain
