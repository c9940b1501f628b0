"""Commands in running text, tables and examples: what they name is there. `test_commands.py` runs those in blocks."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import typer

from fedclip_flwr.base.settings import Settings
from fedclip_flwr.cli import app
from fedclip_flwr.runs.arguments import read_settings
from tests.documentation.pages import PAGES, ROOT, blocks

TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
SETTINGS = {*Settings.keys()}
OF_A_SITE = {"site", "role", "domains", "share-class-counts", "group", "partition-id", "num-partitions"}
TAKES_SETTINGS = re.compile("fedclip (run|init|encode|sweep) ")
NO_SETTINGS = {"num-supernodes"}


def commands(path: Path) -> Iterator[str]:
    """What stands in backticks, and in blocks of text, and begins with one of the commands."""
    plain = re.sub(r"^ *```.*?^ *```$", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    found = [" ".join(words.split()) for words in re.findall(r"`([^`]+)`", plain)]
    found += [line for block in blocks(path) if block.language in ("text", "bash") for line in block.commands]
    for line in found:
        command = line.removeprefix(".venv/bin/").removeprefix("$as ")
        if re.match(r"(fedclip|flwr|make|python) [^ A-Z]", command) and "…" not in command:
            yield command


ALL = sorted({(str(path.relative_to(ROOT)), command) for path in PAGES for command in commands(path)})


def of(name: str) -> list[tuple[str, str]]:
    """The pages and commands of that program."""
    return [(page, command) for page, command in ALL if command.startswith(f"{name} ")]


def parsed(program: typer.Typer, command: str) -> click.Context:
    """Its words as the program takes them; raises if there is no such command or option."""
    words = [word for word in shlex.split(command, comments=True)[1:] if word not in ("&", "\\")]
    inner: click.Command = typer.main.get_command(program)
    context = click.Context(inner)
    while isinstance(inner, click.Group) and words and not words[0].startswith("-"):
        name = words.pop(0)
        found = inner.get_command(context, name)
        assert found is not None, f"{command}: there is no {name}"
        inner, context = found, click.Context(found, parent=context, info_name=name)
    if not context.ignore_unknown_options and not inner.context_settings.get("ignore_unknown_options"):
        inner.make_parser(context).parse_args(words)
    return context


def settings_named(words: list[str]) -> set[str]:
    return {match[1] for word in words if (match := re.fullmatch(r"([a-z-]+)=.*", word))}


@pytest.mark.parametrize(("page", "command"), of("fedclip"))
def test_a_command_of_ours_has_the_options_and_settings_that_are_named(page: str, command: str) -> None:
    parsed(app, command)
    words = [inner for word in shlex.split(command, comments=True) for inner in word.replace("'", "").split()]
    assert settings_named(words) <= SETTINGS | OF_A_SITE, page


@pytest.mark.parametrize(("page", "command"), [found for found in of("fedclip") if TAKES_SETTINGS.match(found[1])])
def test_the_settings_of_a_command_can_be_used_together(page: str, command: str) -> None:
    """Not every run of the pages is run by the tests."""
    words = [word for word in shlex.split(command, comments=True) if re.match("[a-z-]+=", word)]
    given, problems = read_settings(words)
    assert not {**problems, **Settings.read(given)[1]}, page


@pytest.mark.parametrize(("page", "command"), of("flwr"))
def test_a_command_of_flowers_is_one_that_it_has(page: str, command: str) -> None:
    from flwr.cli.app import app as flower  # takes its time, which collecting the tests need not

    parsed(flower, command)
    words = [inner for word in shlex.split(command, comments=True) for inner in word.replace("'", "").split()]
    assert settings_named(words) <= SETTINGS | NO_SETTINGS, page


@pytest.mark.parametrize(("page", "command"), of("make"))
def test_a_target_is_in_the_makefile(page: str, command: str) -> None:
    target = next(word for word in command.split()[1:] if "=" not in word)
    assert target in TARGETS, page


@pytest.mark.parametrize(("page", "command"), of("python"))
def test_a_script_has_the_options_that_are_named(page: str, command: str) -> None:
    """The script is there, and each option is in it or in what its kind share."""
    words = shlex.split(command, comments=True)[1:]
    if words[0] in ("-X", "-c") or words[0].endswith("see.py"):
        return
    name = words[1] if words[0] == "-m" else words[0].removesuffix(".py").replace("/", ".")
    if name in ("venv", "build", "pip", "twine"):
        return
    base = ROOT / Path(*name.split("."))
    files = [base / "__main__.py", *base.glob("*.py")] if base.is_dir() else [base.with_suffix(".py")]
    text = "".join(file.read_text() for file in [*files, *base.parent.glob("common.py")])
    for word in words[1:]:
        if word.startswith("--"):
            assert f'"{word}"' in text, f"{page}: {command}"


def test_commands_were_found_in_the_pages_at_all() -> None:
    assert len(ALL) > 100
    assert {page for page, _ in ALL} >= {"README.md", "docs/deploy.md", "docs/commands.md", "docs/security.md"}
