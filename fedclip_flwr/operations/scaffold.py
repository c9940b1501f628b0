"""`fedclip init`: the user's own Flower app in a folder: this package's two apps, and settings with their meanings."""

from __future__ import annotations

import json
import os
import re
import shlex
import textwrap
import tomllib
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from fedclip_flwr.base import Settings, UserError, __version__, files
from fedclip_flwr.base.settings import meaning_of, unusable
from fedclip_flwr.flower.pinned import APPS
from fedclip_flwr.runs import read_settings

DESCRIBED = "pyproject.toml"
NAME = r"[A-Za-z]([A-Za-z0-9-]{0,30}[A-Za-z0-9])?"
"""Valid for Flower as the name of an app's folder, and for Python as that of a project."""
SETTING = "DIR"
"""The argument that names the folder, for errors."""


def init(folder: Path, given: Sequence[str]) -> str:
    """Writes the app with these settings to the folder; returns what to do next."""
    settings = _checked(given)
    folder = Path(os.path.abspath(os.path.expanduser(folder)))
    if not re.fullmatch(NAME, folder.name):
        raise UserError(
            f"{folder}: Flower can't run an app from a folder called {folder.name!r}: expected a letter, then "
            "letters, digits and hyphens, 32 at most; name another folder"
        )
    there = [name for name in (*APPS, DESCRIBED) if os.path.lexists(folder / name)]
    if there:
        raise UserError(f"{folder} already has a {there[0]}, and nothing is overwritten: name another folder")
    own, text = files.own_app(), described(folder.name, settings)
    files.make_folder(folder, SETTING)
    texts = {**{name: (own / name).read_bytes() for name in APPS}, DESCRIBED: text.encode()}
    for name, data in texts.items():
        files.write_atomic(folder / name, partial(Path.write_bytes, data=data), SETTING, os.link)
    return (
        f"The app is in {folder}; its settings, with what they mean, are in {DESCRIBED}.\n"
        f"cd {shlex.quote(str(folder))}\nfedclip run --nodes 4   # or with Flower's own command: flwr run ."
    )


def _checked(given: Sequence[str]) -> dict[str, Any]:
    """All settings: the given ones, from `key=value`, and defaults."""
    settings, problems = read_settings(given)
    checked, more = Settings.read(settings)
    if problems := {**more, **problems}:
        raise unusable(problems.values())
    return checked.as_run_config()


def described(name: str, settings: dict[str, Any]) -> str:
    """The pyproject.toml of an app of that name."""
    app = tomllib.loads((files.own_app() / DESCRIBED).read_text("utf-8"))["tool"]["flwr"]["app"]
    lines = [
        f"# A federation of fedclip-flwr. It needs: pip install 'fedclip-flwr[simulation]=={__version__}'",
        "#   fedclip run --nodes 4                      simulate four sites on this machine",
        "#   fedclip run num-server-rounds=50 seed=1    with other settings than those below",
        "#   flwr run .                                 the same with Flower's own command",
        "#   fedclip run --on NAME data=none class-names=cat,dog    with real sites and their SuperLink",
        "",
        "[project]",
        f"name = {_toml(name)}",
        'version = "0.1.0"',
        'description = "A federation of fedclip-flwr"',
        f"dependencies = [{_toml(f'fedclip-flwr[simulation]=={__version__}')}]",
        "",
        "[tool.flwr.app]",
        f"publisher = {_toml(app['publisher'])}",
        f"fab-include = {_toml(app['fab-include'])}",
        "",
        "# Sites run only the two files that their own fedclip-flwr has: leave them as they are.",
        "[tool.flwr.app.components]",
        *(f"{key} = {_toml(value)}" for key, value in app["components"].items()),
        "",
        "[tool.flwr.app.config]",
    ]
    for key, field in Settings.keys().items():
        lines += [
            *textwrap.wrap(meaning_of(field), 110, initial_indent="# ", subsequent_indent="#   "),
            f"{key} = {_toml(settings[key])}",
        ]
    return "\n".join(lines) + "\n"


def _toml(value: str | float | Sequence[str]) -> str:
    """The value in TOML, which for these types is the same as in JSON."""
    return json.dumps(value, ensure_ascii=False)
