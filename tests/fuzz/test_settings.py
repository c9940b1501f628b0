"""Settings from a command line, a run config, and what they open."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fedclip_flwr.base.errors import UserError
from fedclip_flwr.base.settings import Settings
from fedclip_flwr.runs.arguments import read_settings
from fedclip_flwr.runs.opening import open_run
from tests.fuzz.hostile import NAMES, NUMBERS, SIMPLE, TEXT, VALUES, Tried, assert_plain

KEYS = sorted(Settings.keys())
DEFAULTS = Settings().as_run_config()
WORDS = st.sampled_from(
    [
        *("auto", "cpu", "cuda", "cuda:0", "cuda:99", "cuda:" + "9" * 400, "cuda:٣", "true", "false", "True", "1e400"),
        *("drawn", "drawn:1", "drawn:-1", "drawn:" + "9" * 5000, "drawn:²", "none", "folder:", "folder:/", "features:"),
        *("folder:/dev/null", "features:/dev/null", "folder:/proc/self/fd", "/", "~", "~nobody/x", ".", "./x", "*"),
        *("features:/nowhere", "folder:/a\0b", "features:/a\0b", "folder:" + "x" * 5000, "folder:/" + "x" * 5000),
        *("attention", "gate", "scale", "adapter", "full-model", "paper", "int8", "a {}|the {}", "{} {}", "{", "a,b"),
        *("/etc/passwd", "/dev/zero", "/dev/null", "a,a", "a\x1b[2J,b", ",,,", "a|b,c", "nan", "-inf", "0x10", "1_0"),
        *("9" * 5000, "-" + "9" * 30, "٣", "1e5", "+1", " 1", "١", "\N{FULLWIDTH DIGIT ONE}"),
    ]
)
TEXTS = WORDS | NAMES | TEXT
GIVEN = st.dictionaries(
    st.sampled_from(KEYS) | st.sampled_from(KEYS).map(str.upper) | NAMES | TEXT,
    TEXTS | SIMPLE | VALUES,
    max_size=6,
)
LINES = st.lists(
    st.builds("{}={}".format, st.sampled_from(KEYS) | NAMES, TEXTS | NUMBERS.map(str)) | TEXTS,
    max_size=6,
)
MANY = 2 * len(KEYS)


def assert_usable(settings: Settings) -> None:
    """It comes back from the text that Flower makes of it."""
    config = settings.as_run_config()
    text = "".join(f"{key} = {json.dumps(value, ensure_ascii=False)}\n" for key, value in config.items())
    assert Settings.from_run_config(tomllib.loads(text)) == settings


@given(given=GIVEN)
def test_a_run_config(tried: Tried, given: dict[str, Any]) -> None:
    with tried.one(MANY):
        settings, problems = Settings.read(given)
        for problem in problems.values():
            assert_plain(str(UserError(problem)))
        assert_usable(settings)
        Settings.from_run_config(given)


@given(lines=LINES)
def test_a_command_line(tried: Tried, lines: list[str]) -> None:
    with tried.one(MANY):
        settings, problems = read_settings(lines)
        assert set(problems) <= {*lines, *settings}
        Settings.from_run_config(settings)


OPENED = [
    *("data", "model", "model-revision", "class-names", "prompt", "holdout", "device", "results-dir", "precision"),
    *("image-column", "label-column", "domain-column", "method"),
]


@given(given=st.dictionaries(st.sampled_from(OPENED), TEXTS, max_size=4))
@example(given={"data": "~\0"})
@example(given={"model": "~\0"})
@example(given={"model": "auto", "model-revision": "/"})
@example(given={"data": "drawn:" + "9" * 5000})
def test_what_settings_open(tmp_path: Path, tried: Tried, given: dict[str, str]) -> None:
    """All but what would be asked of a network, or look through this machine's own folders."""
    if given.get("data") in ("folder:/", "/") or str(given.get("results-dir", "")).startswith("/"):
        given = {**given, "data": "drawn", "results-dir": ""}
    lines = [f"{key}={value}" for key, value in given.items()]
    if "results-dir" in given:
        lines.remove(f"results-dir={given['results-dir']}")
        lines.append(f"results-dir={tmp_path}/{given['results-dir']}")
    with tried.one(MANY):
        settings, problems = read_settings(lines)
        opened, features, holdout = open_run({**DEFAULTS, **settings}, problems)
        assert holdout is None or holdout in features.domains or opened.data == "none"
        assert len(set(features.vocabulary.class_names)) >= 2
        features.vocabulary.prompts[0].encode()


@pytest.mark.parametrize("key", KEYS)
def test_every_default_is_taken(key: str) -> None:
    assert Settings.read({key: DEFAULTS[key]})[1] == {}
