"""Writes the pages of reference that follow from the code: `python docs/reference.py`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import typer

from audit import files
from fedclip_flwr.base import Settings
from fedclip_flwr.cli import app

HERE = Path(__file__).parent
GROUPS = {
    "model": "Model and data",
    "method": "What is learnt",
    "num-server-rounds": "Rounds and steps",
    "strategy": "What the server makes of the sites' work",
    "dp": "Privacy",
    "codec": "Traffic and waiting",
    "partition": "Simulated sites",
    "personalize": "The machine and the run",
}
"""Headings of the settings, each by the first setting under it."""
SETTINGS = """# Settings

Every setting of a run, with its default: as `fedclip run key=value …`, in `flwr run . --run-config "key='value' …"`,
and in the `pyproject.toml` that `fedclip init` writes. Everything that is wrong with them is told at once, before
anything starts. What a real site may set for itself is in its [node config](deploy.md#a-sites-administrator).

This page is written by `python docs/reference.py`.
"""
COMMANDS = """# Commands

`fedclip COMMAND --help` says the same. What users can mend is told in one line, with exit status 2; `--debug` anywhere
shows where an error was raised.

This page is written by `python docs/reference.py`.
"""


def _default(value: Any) -> str:
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`{value}`" if value != "" else "empty"


def _limits(field: dataclasses.Field[Any]) -> str:
    """What a setting may be, beside what its meaning says."""
    limits = field.metadata
    if choices := limits.get("choices"):
        return ", ".join(f"`{choice}`" for choice in choices)
    if expected := limits.get("expected"):
        return str(expected)
    if isinstance(field.default, bool):
        return "`true`, `false`"
    words = [f"`{limits['word']}`, or"] if "word" in limits else []
    kinds = {str: "a text", int: "a whole number", float: "a number"}
    words.append(kinds[type(field.default)])
    bounds = {"above": "more than", "least": "at least", "most": "at most"}
    return " ".join(words) + "".join(f", {text} {limits[key]}" for key, text in bounds.items() if key in limits)


def settings() -> str:
    """The page of settings."""
    lines = [SETTINGS]
    for key, field in Settings.keys().items():
        if key in GROUPS:
            lines += [
                f"\n## {GROUPS[key]}\n",
                "| setting | default | may be | what it means |",
                "| --- | --- | --- | --- |",
            ]
        cells = [f"`{key}`", _default(field.default), _limits(field), field.metadata["meaning"]]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines).replace("\n\n\n", "\n\n") + "\n"


def _parts(text: str) -> str:
    """A command's help as Markdown: its examples, which stand last, as a block."""
    before, _, examples = " ".join(text.split("\n\n\b")[0].split("\n")).replace("  ", "\n\n").partition("Example")
    examples = examples.partition(": ")[2]
    return before.strip() + "\n" + (f"\n```text\n{examples.replace('; ', chr(10)).strip()}\n```\n" if examples else "")


def commands() -> Iterator[str]:
    """The page of commands."""
    yield COMMANDS
    group = typer.main.get_command(app)
    context = typer.Context(group, info_name="fedclip")
    for name, command in group.commands.items():  # type: ignore[attr-defined]
        inner = typer.Context(command, parent=context, info_name=name)
        usage = " ".join(command.collect_usage_pieces(inner))
        yield f"\n## fedclip {name}\n\n`fedclip {name} {usage}`\n\n{_parts(command.help or '')}"
        rows = [record for parameter in command.params if (record := parameter.get_help_record(inner))]
        if rows := [row for row in rows if row[0].startswith("-")]:
            yield "\n| option | what it does |\n| --- | --- |\n"
            yield from (f"| `{option}` | {text.replace('|', chr(92) + '|')} |\n" for option, text in rows)


def advisories() -> str:
    """The page of advisories, with the exceptions of now in its table."""
    known = files.read_copy(files.ADVISORIES).advisories

    def fixed_in(one: files.Excepted) -> str:
        ranges = (span for advisory in known if one.covers(one.line, advisory) for span in advisory.ranges)
        return ", ".join(str(span["fixed"]) for span in ranges if "fixed" in span) or "no version"

    excepted: dict[files.Excepted, list[str]] = {}
    for one in files.read_exceptions(files.EXCEPTIONS):
        excepted.setdefault(one._replace(line=""), []).append(f"`{one.line}`")
    rows = [
        f"| {one.id} | {one.package} | {fixed_in(one)} | {', '.join(lines)} | {one.kept_by or '–'} | {one.reachable} "
        f"| {one.reason} |\n"
        for one, lines in excepted.items()
    ]
    before, ruler, after = (
        (HERE / "advisories.md").read_text("utf-8").partition("| --- | --- | --- | --- | --- | --- | --- |\n")
    )
    return before + ruler + "".join(rows) + "\n" + after.partition("\n\n")[2]


PAGES: dict[str, Callable[[], str]] = {
    "settings.md": settings,
    "commands.md": lambda: "".join(commands()),
    "advisories.md": advisories,
}


def main() -> None:
    for name, text in PAGES.items():
        (HERE / name).write_text(text(), "utf-8")


if __name__ == "__main__":
    main()
