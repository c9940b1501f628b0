"""What the pages list is what there is: a name that is added to the code is listed, and none is left over."""

from __future__ import annotations

import re
from typing import get_type_hints

import pytest

from fedclip_flwr.base.files import own_app
from fedclip_flwr.base.settings import ADAPTERS, PLACES, TRACKERS, Settings
from fedclip_flwr.cli.learning import sweep
from fedclip_flwr.data.presets import PRESETS

HOME = own_app()


def page(name: str) -> str:
    return (HOME / "docs" / name).read_text()


def listed(text: str, heading: str) -> list[str]:
    """The names in the first column of the table with that heading."""
    rows = text.partition(f"\n| {heading} |")[2].partition("\n\n")[0].splitlines()[2:]
    return [name for row in rows for name in re.findall(r"`([^`]+)`", row.split(" | ")[0])]


def methods() -> list[str]:
    from fedclip_flwr.experiments.baselines import METHODS  # brings torch, and is not needed to collect the tests

    return [*METHODS]


def test_tables_list_every_adapter_method_tracker_and_source() -> None:
    assert listed(page("methods.md"), "adapter") == [*ADAPTERS]
    assert listed(page("methods.md"), "method") == methods()
    assert sorted(listed(page("tracking.md"), "tracker")) == sorted(TRACKERS)
    sources = listed(page("data.md"), "`data=`")
    assert {f"{head}PATH" for head in PLACES} | {*PRESETS, "drawn"} <= {*sources}
    assert {source.partition("PATH")[0] for source in sources if source.endswith(":PATH")} == {*PLACES}


def test_what_data_means_names_every_place_and_preset() -> None:
    meaning = Settings.keys()["data"].metadata["meaning"]
    assert all(f"`{name}`" in meaning for name in ("drawn", *PRESETS, *(f"{head}PATH" for head in PLACES)))


def test_the_help_of_a_sweep_lists_every_method() -> None:
    (option,) = get_type_hints(sweep, include_extras=True)["methods"].__metadata__
    assert option.help == f"Comma list of {', '.join(methods())} (default: all but those with LoRA)."


@pytest.mark.parametrize("key", ["method", "recipe", "strategy", "codec", "adapter"])
def test_every_choice_of_what_is_learnt_is_explained(key: str) -> None:
    text = page("methods.md")
    unknown = [c for c in Settings.keys()[key].metadata["choices"] if not re.search(rf"`({key}=)?{c}`", text)]
    assert [c for c in unknown if (key, c) != ("method", "adapter")] == []  # which is what all of the page is about
