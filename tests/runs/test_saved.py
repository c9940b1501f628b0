from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fedclip_flwr.base import content, files
from fedclip_flwr.base.errors import UserError
from fedclip_flwr.base.settings import Settings
from fedclip_flwr.features.base import Features
from fedclip_flwr.features.encoded import Pixels
from fedclip_flwr.features.opening import open_features
from fedclip_flwr.learning.adapters import make_adapter
from fedclip_flwr.runs.saved import load_adapter, load_whole, save_adapter, save_model

FACTS: dict[str, Any] = {
    "kind": "attention",
    "rank": 4,
    "dim": 4,
    "blend": 0.5,
    "class_names": ["cat", "dog"],
    "templates": ["a {}"],
}
SCALE = make_adapter("scale", 128)


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


def test_an_adapter_of_before_there_was_a_choice_takes_features_of_unit_length(tmp_path: Path) -> None:
    assert load_adapter(written(tmp_path))[0].length == 1.0
    assert load_adapter(written(tmp_path, feature_norm=0))[0].length == 0.0
    assert load_adapter(written(tmp_path, feature_norm=9.5))[0].length == 9.5


PLUGIN = """
from pathlib import Path
from fedclip_flwr.learning.adapters import Attention as Own
Path(__file__).with_suffix(".imported").touch()
"""


def test_an_adapter_of_a_plug_in_is_loaded_only_if_its_owner_allows_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "saved_plug_in.py").write_text(PLUGIN)
    monkeypatch.syspath_prepend(str(tmp_path))
    folder = written(tmp_path, kind="saved_plug_in:Own")
    with pytest.raises(UserError, match="saved_plug_in is not allowed as a plug-in on this machine"):
        load_adapter(folder)
    assert not (tmp_path / "saved_plug_in.imported").exists()
    monkeypatch.setenv("FEDCLIP_PLUGINS", "saved_plug_in")
    assert load_adapter(folder)[0].name == "attention"
    assert (tmp_path / "saved_plug_in.imported").exists()


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"kind": "other"}, "can't be read .adapter = 'other': expected one of attention, gate, scale"),
        ({"kind": ["gate"]}, "can't be read"),
        ({"kind": None}, "lacks 'kind'"),
        ({"class_names": None}, "lacks 'class_names'"),
        ({"class_names": "cat"}, "its class_names must be a list of texts"),
        ({"templates": [1]}, "its templates must be a list of texts"),
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
        ({"feature_norm": -1.0}, "expected a number from 0 to 10,000"),
        ({"feature_norm": "10"}, "expected a number from 0 to 10,000"),
        ({"feature_norm": True}, "expected a number from 0 to 10,000"),
    ],
)
def test_facts_that_cannot_be_are_reported(tmp_path: Path, changed: dict[str, Any], expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        load_adapter(written(tmp_path, **changed))


def test_an_adapter_with_numbers_that_are_not_finite_is_refused(tmp_path: Path) -> None:
    state = make_adapter("attention", 4).state_dict()
    state["outer.bias"][1] = torch.inf
    save_file(state, written(tmp_path) / "adapter.safetensors")
    with pytest.raises(UserError, match="not finite"):
        load_adapter(tmp_path)


@pytest.mark.parametrize("text", ["[" * 10**5, "[]", "9" * 5000, "{", "\0"])
def test_a_damaged_json_is_reported(tmp_path: Path, text: str) -> None:
    (written(tmp_path) / "adapter.json").write_text(text)
    with pytest.raises(UserError, match=r"adapter\.json can't be read"):
        load_adapter(tmp_path)


@pytest.mark.parametrize("name", ["adapter.json", "adapter.safetensors"])
def test_a_pipe_is_not_waited_for(tmp_path: Path, name: str) -> None:
    (written(tmp_path) / name).unlink()
    os.mkfifo(tmp_path / name)
    with pytest.raises(UserError, match=f"{name} can't be read"):
        load_adapter(tmp_path)


class KilledError(BaseException):
    """What ends a process between two files."""


def killed_before(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on a process is killed when it writes the file of that name."""
    write = files.write_atomic

    def write_or_die(path: Path, *given: Any) -> None:
        if path.name == name:
            raise KilledError
        write(path, *given)

    monkeypatch.setattr(files, "write_atomic", write_or_die)


@pytest.mark.parametrize("number", [1, 2])
def test_an_adapter_that_was_replaced_in_part_is_read_with_its_own_facts(
    number: int, tmp_path: Path, drawn: Features, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if the older one is of the same round, as a site's own adapter may be."""
    old, new = ({name: torch.full_like(t, x) for name, t in SCALE.state_dict().items()} for x in (1.0, 2.0))
    settings = Settings(adapter="scale")
    save_adapter(tmp_path, old, settings, drawn, 1, site="north", personal_epoch=3)
    with monkeypatch.context() as patch:
        killed_before("adapter.json", patch)
        with pytest.raises(KilledError):
            save_adapter(tmp_path, new, settings, drawn, number, blend=0.5, site="north", personal_epoch=7)
    adapter, facts = load_adapter(tmp_path)
    assert all(torch.equal(tensor, new[name]) for name, tensor in adapter.state_dict().items())
    assert adapter.blend == 0.5
    assert (facts["round"], facts["blend"], facts["site"], facts["personal_epoch"]) == (number, 0.5, "north", 7)
    assert facts["class_names"] == list(drawn.vocabulary.class_names)
    assert facts["tensors"] == content.of_file(tmp_path / "adapter.safetensors")
    save_adapter(tmp_path, old, settings, drawn, 1)  # as a resumed run does
    adapter, facts = load_adapter(tmp_path)
    assert all(torch.equal(tensor, old[name]) for name, tensor in adapter.state_dict().items())
    assert (facts["round"], adapter.blend) == (1, 1.0)
    assert json.loads((tmp_path / "adapter.json").read_text()) == facts


def test_a_blend_that_was_written_by_hand_counts(tmp_path: Path, drawn: Features) -> None:
    save_adapter(tmp_path, SCALE.state_dict(), Settings(adapter="scale"), drawn, 1)
    facts = json.loads((tmp_path / "adapter.json").read_text())
    (tmp_path / "adapter.json").write_text(json.dumps({**facts, "blend": 0.25}))
    assert load_adapter(tmp_path)[0].blend == 0.25


def test_the_same_adapter_makes_the_same_file(tmp_path: Path, drawn: Features) -> None:
    for n in range(8):
        save_adapter(tmp_path / f"{n}", SCALE.state_dict(), Settings(adapter="scale"), drawn, 1)
    assert len({(tmp_path / f"{n}" / "adapter.safetensors").read_bytes() for n in range(8)}) == 1


@pytest.mark.parametrize("blend", ["[" * 10**5, "x", "2", '"x"'])
def test_facts_of_tensors_that_can_not_be_are_reported(tmp_path: Path, blend: str) -> None:
    state = load_file(written(tmp_path, tensors="another") / "adapter.safetensors")
    save_file(state, tmp_path / "adapter.safetensors", {"blend": blend})
    with pytest.raises(UserError, match="can't be read"):
        load_adapter(tmp_path)


def test_a_full_model_that_was_replaced_in_part_has_its_own_round(
    tmp_path: Path, tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = open_features(Settings(data=f"folder:{tree}", method="full-model"), progress=False)
    assert isinstance(pixels, Pixels)
    state = pixels.whole_model().state_dict()
    save_model(tmp_path, state, pixels, 1)
    with monkeypatch.context() as patch:
        killed_before("fedclip.json", patch)
        with pytest.raises(KilledError):
            save_model(tmp_path, state, pixels, 2)
    assert load_whole(tmp_path)["round"] == 2
