from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from fedclip_flwr.adapters import make_adapter
from fedclip_flwr.errors import UserError
from fedclip_flwr.saved import load_adapter

FACTS: dict[str, Any] = {
    "kind": "attention",
    "rank": 4,
    "dim": 4,
    "blend": 0.5,
    "class_names": ["cat", "dog"],
    "templates": ["a {}"],
}


def written(folder: Path, **changed: Any) -> Path:
    facts = {key: value for key, value in {**FACTS, **changed}.items() if value is not None}
    (folder / "adapter.json").write_text(json.dumps(facts))
    save_file(make_adapter("attention", 4, identity=False).state_dict(), folder / "adapter.safetensors")
    return folder


def test_an_adapter_that_was_written_by_hand_is_read(tmp_path: Path) -> None:
    adapter, facts = load_adapter(written(tmp_path, blend=1))
    assert (adapter.blend, facts["class_names"]) == (1.0, ["cat", "dog"])
    made = make_adapter("attention", 4, identity=False)
    ones = torch.ones(1, 4) / 2
    assert torch.equal(adapter(ones), made(ones))
    (tmp_path / "adapter.safetensors").write_bytes(b"")  # what was read is no longer in the file
    assert torch.equal(adapter(ones), made(ones))


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"kind": "other"}, "its kind is 'other', expected one of attention, gate, scale"),
        ({"kind": ["gate"]}, "can't be read"),
        ({"kind": None}, "lacks 'kind'"),
        ({"class_names": None}, "lacks 'class_names'"),
        ({"class_names": "cat"}, "its class_names are no list of texts"),
        ({"templates": [1]}, "its templates are no list of texts"),
        ({"templates": []}, "there are no prompts"),
        ({"class_names": ["cat", "cat"]}, "at least two names, each once"),
        ({"class_names": ["cat", "\x1b[2J"]}, "give it a name of plain characters"),
        ({"dim": 2**16}, "does not hold the attention adapter"),
        ({"dim": 10**6}, "whole numbers from 1 to 65,536"),
        ({"dim": -4}, "whole numbers from 1"),
        ({"dim": 4.0}, "whole numbers from 1"),
        ({"rank": 10**12}, "whole numbers from 1"),
        ({"blend": 1.5}, "expected a number from 0 to 1"),
        ({"blend": float("nan")}, "expected a number from 0 to 1"),
        ({"blend": "auto"}, "expected a number from 0 to 1"),
    ],
)
def test_facts_that_cannot_be_are_told(tmp_path: Path, changed: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        load_adapter(written(tmp_path, **changed))


def test_an_adapter_with_numbers_that_are_not_finite_is_refused(tmp_path: Path) -> None:
    state = make_adapter("attention", 4).state_dict()
    state["outer.bias"][1] = torch.inf
    save_file(state, written(tmp_path) / "adapter.safetensors")
    with pytest.raises(UserError, match="not finite"):
        load_adapter(tmp_path)


@pytest.mark.parametrize("text", ["[" * 10**5, "[]", "9" * 5000, "{", "\0"])
def test_a_damaged_json_is_told(tmp_path: Path, text: str) -> None:
    (written(tmp_path) / "adapter.json").write_text(text)
    with pytest.raises(UserError, match=r"adapter\.json can't be read"):
        load_adapter(tmp_path)


@pytest.mark.parametrize("name", ["adapter.json", "adapter.safetensors"])
def test_a_pipe_is_not_waited_for(tmp_path: Path, name: str) -> None:
    (written(tmp_path) / name).unlink()
    os.mkfifo(tmp_path / name)
    with pytest.raises(UserError, match=f"{name} can't be read"):
        load_adapter(tmp_path)
