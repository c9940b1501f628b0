from __future__ import annotations

from pathlib import Path

import pytest

from fedclip_flwr.base.settings import PLACES
from fedclip_flwr.runs.arguments import read_settings


def test_settings_get_their_types() -> None:
    given = ["seed=3", "blend=1", "learning-rate=1e-4", "personalize=false", "holdout=", "prompt=a {} = b"]
    settings, problems = read_settings(given)
    assert settings == {
        "seed": 3,
        "blend": 1.0,
        "learning-rate": 1e-4,
        "personalize": False,
        "holdout": "",
        "prompt": "a {} = b",
    }
    assert not problems


def test_paths_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    (tmp_path / "clip").mkdir()
    given = ["data=folder:images", "model=clip", "directions=given", "results-dir=~/out"]
    assert read_settings(given)[0] == {
        "data": f"folder:{tmp_path}/images",
        "model": f"{tmp_path}/clip",
        "directions": f"{tmp_path}/given",
        "results-dir": "/home/me/out",
    }
    for head in PLACES:
        assert read_settings([f"data={head}here"])[0] == {"data": f"{head}{tmp_path}/here"}
    assert read_settings(["data=features:/f", "model=bundled"])[0] == {"data": "features:/f", "model": "bundled"}
    assert read_settings(["data=drawn", "model=openai/clip", "results-dir="])[0]["results-dir"] == ""


def test_what_is_no_setting_is_reported() -> None:
    assert read_settings(["seed", "=3", "adapter=gate", "adapter=scale", "nodes=6"]) == (
        {"adapter": "scale"},
        {
            "seed": "seed: expected key=value",
            "=3": "=3: expected key=value",
            "adapter": "adapter: given twice",
            "nodes": "nodes=6: set the number of simulated sites with --nodes",
        },
    )


def test_data_of_this_package_is_no_folder_even_where_there_is_one_of_that_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("drawn", "pacs", "images"):
        (tmp_path / name).mkdir()
    assert [read_settings([f"data={name}"])[0]["data"] for name in ("drawn", "pacs", "images")] == [
        "drawn",
        "pacs",
        f"{tmp_path}/images",
    ]
