"""Adapters, sources of images, codecs and strategies from other installed packages.

A setting names one as `package.module:Name`, or by a short name that an installed package declares as an entry point of
one of the `GROUPS`. A site runs only what its owner installed for this: what a server or a downloaded file names is
imported only if it is such an entry point, or if the variable `FEDCLIP_PLUGINS` lists its package.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import re
import sys
from collections.abc import Callable, Mapping
from functools import lru_cache
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import TypeVar, cast

from fedclip_flwr.base import content
from fedclip_flwr.base.errors import UserError, one_line

T = TypeVar("T")
GROUPS = {
    "adapter": "fedclip_flwr.adapters",
    "codec": "fedclip_flwr.codecs",
    "data": "fedclip_flwr.sources",
    "strategy": "fedclip_flwr.strategies",
}
"""The group of entry points for each setting that can name a plug-in."""
ALLOWED = "FEDCLIP_PLUGINS"
"""The environment variable with packages of which anything may be imported."""
HOW = "an installed plug-in, or package.module:Name"
REFERENCE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*", re.ASCII)


@lru_cache
def declared(group: str) -> Mapping[str, str]:
    """The references by the short names that installed packages declare."""
    return {entry.name: entry.value for entry in importlib.metadata.entry_points(group=group)}


def reference_of(setting: str, name: str) -> str | None:
    """What the name stands for, as `package.module:Name`; None if it names no plug-in."""
    reference = declared(GROUPS[setting]).get(name, name)
    return reference if REFERENCE.fullmatch(reference) else None


def load(
    setting: str, name: str, own: Mapping[str, T], fits: Callable[[object], bool], expected: str, chosen: bool = False
) -> T:
    """The one of that name, of our `own` or of another package.

    `chosen`: this machine's user named it, so its package may be imported.
    """
    if name in own:
        return own[name]
    problem = f"{setting} = {name!r}"
    reference = reference_of(setting, name)
    if reference is None:
        raise UserError(f"{problem}: expected one of {', '.join([*own, HOW])}")
    if not (chosen or _is_allowed(setting, reference)):
        found = _imported_already(reference)
        if found is None:
            package = _package(reference)
            raise UserError(
                f"{problem}: {package} is not allowed as a plug-in on this machine: its owner can set "
                f"{ALLOWED}={package}, or declare an entry point in the package"
            )
    else:
        found = _imported(reference, problem)
    if not fits(found):
        raise UserError(f"{problem}: expected {expected}")
    return cast(T, found)


def _is_allowed(setting: str, reference: str) -> bool:
    return reference in declared(GROUPS[setting]).values() or _package(reference) in _listed()


def _imported_already(reference: str) -> object:
    """What the reference stands for if its module is imported; nothing is run for it, not even a lazy module's code."""
    module, _, attribute = reference.partition(":")
    return vars(sys.modules[module]).get(attribute) if module in sys.modules else None


def _imported(reference: str, problem: str) -> object:
    name, _, attribute = reference.partition(":")
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise UserError(f"{problem}: no module named {error.name!r}: install its package here") from None
    except (Exception, SystemExit) as error:  # another's code can raise anything
        raise UserError(f"{problem}: {name} can't be imported ({one_line(error)})") from error
    try:
        return getattr(module, attribute)
    except AttributeError:
        raise UserError(f"{problem}: {name} has no {attribute}") from None


def packages(named: Mapping[str, str]) -> list[str]:
    """The plug-ins, `named` by setting: each as `package.module:Name`, its package's version and content hash."""
    references = {reference for setting, name in named.items() if (reference := reference_of(setting, name))}
    return sorted(f"{reference} {_version_of(_package(reference))}" for reference in references)


def allowed() -> dict[str, str]:
    """What a server or a file may name here, with version and content hash; the latter empty if it is not installed."""
    names = {*_listed(), *(reference for group in GROUPS.values() for reference in declared(group).values())}
    return {name: _version_of(_package(name)) if _found(_package(name)) else "" for name in sorted(names)}


def _package(reference: str) -> str:
    return re.split(r"[.:]", reference, maxsplit=1)[0]


def _listed() -> set[str]:
    """The packages that this machine's owner allows as a whole."""
    return {*filter(str.isidentifier, map(str.strip, os.environ.get(ALLOWED, "").split(",")))}


def _found(package: str) -> ModuleSpec | None:
    try:
        return importlib.util.find_spec(package)
    except ValueError:  # a module without a spec, such as the program itself
        return None


def _version_of(package: str) -> str:
    """Its version and content hash; the same only for the same code."""
    found = _found(package)
    if not found:
        raise UserError(f"no module named {package!r}: install its package here")
    names = importlib.metadata.packages_distributions().get(package, [])
    version = importlib.metadata.version(names[0]) if names else "without a version"
    hashes = [_content(Path(place)) for place in found.submodule_search_locations or [str(found.origin)]]
    return f"{version} {content.digest(*hashes)[:16]}"


def _content(place: Path) -> str:
    """The hash of a package's folder, or of a module's file."""
    if place.is_file():
        return content.of_file(place)
    if not place.is_dir():
        raise UserError(f"{place} is no file or folder: install the plug-in's package unpacked")
    found = (path for path in place.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return content.of_files(place, sorted(path.relative_to(place).as_posix() for path in found), content.memory())
