"""The pages that follow from the code are as the code has them."""

from __future__ import annotations

import importlib.util

import pytest

from fedclip_flwr.base.settings import Settings
from tests.documentation.pages import ROOT

SPEC = importlib.util.spec_from_file_location("reference", ROOT / "docs" / "reference.py")
assert SPEC
assert SPEC.loader
reference = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(reference)


@pytest.mark.parametrize("name", reference.PAGES)
def test_a_page_is_as_it_would_be_written_now(name: str) -> None:
    there = (ROOT / "docs" / name).read_text()
    assert there == reference.PAGES[name](), "run python docs/reference.py"


def test_every_setting_is_named_once_under_a_heading() -> None:
    text = reference.settings()
    assert [line.split("`")[1] for line in text.splitlines() if line.startswith("| `")] == [*Settings.keys()]
    assert [line.removeprefix("## ") for line in text.splitlines() if line.startswith("## ")] == [
        *reference.GROUPS.values()
    ]
    assert "| `alpha` | `0.5` | a number, more than 0.0 |" in text
    assert "| `codec` | `float32` | `float32`, `bfloat16`, `int8` |" in text
    assert "| `personalize` | `false` | `true`, `false` |" in text
