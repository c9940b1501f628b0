from __future__ import annotations

import re
import shlex
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedclip_flwr.base.settings import Settings
from fedclip_flwr.features import encoding, lora
from fedclip_flwr.features.opening import open_features
from fedclip_flwr.inference import encode
from fedclip_flwr.operations.doctor import holdings
from fedclip_flwr.operations.doctor.findings import Examination
from tests.extras import needs

Found = dict[str, tuple[str, str, str]]


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDCLIP_HOME", str(tmp_path / "home"))


def at_site(tree: Path, run: Settings | None = None, **node: Any) -> tuple[Found, int]:
    """The findings by what was looked at, and the bytes that encoding will take."""
    ex = Examination(lambda _: None)
    run = run or Settings(class_names="car,cat,fish,zebra")
    needed = holdings.examine_site(ex, run, {"site": "north", "data": f"folder:{tree}", **node})
    return by_what(ex), needed


def at_server(**settings: Any) -> tuple[Found, int]:
    ex = Examination(lambda _: None)
    needed = holdings.examine_server(ex, Settings(**settings))
    return by_what(ex), needed


def by_what(ex: Examination) -> Found:
    return {what: (state, found, remedy) for state, what, found, remedy in ex.findings}


def test_a_site_reports_what_it_holds_and_that_nothing_of_it_is_encoded(tree: Path, tmp_path: Path) -> None:
    found, needed = at_site(tree)
    assert {what: state for what, (state, *_) in found.items()} == {
        "device": "ok",
        "model": "ok",
        "data": "ok",
        "classes": "ok",
        "encoding": "ok",
        "site": "ok",
        "features": "note",
    }
    assert found["data"][1] == f"folder:{tree}: cartoon 12, photo 12 images"
    assert found["classes"][1] == "4: car, cat, fish, zebra; no images here of zebra"
    assert found["site"][1] == "north trains on cartoon, photo"
    assert found["features"][1] == "stored: cartoon 0 of 12, photo 0 of 12"
    assert needed == 24 * 128 * 4
    assert not list((tmp_path / "home").glob("features/**/*.*")), "something was encoded"


def test_the_command_that_is_named_encodes_what_is_missing(tree: Path) -> None:
    run = Settings(class_names="car,cat,fish,zebra", prompt="a {} here")
    remedy = at_site(tree, run)[0]["features"][2]
    words = shlex.split(remedy.partition("to encode now: ")[2])
    assert words[:2] == ["fedclip", "encode"]
    encode.encode(words[2:])
    found, needed = at_site(tree, run)
    assert found["features"] == ("ok", "all 24 are stored", "")
    assert needed == 0


def test_what_is_encoded_so_far_is_reported_and_left_alone(tree: Path, tmp_path: Path) -> None:
    (tree / "photo" / "cat" / "0.png").write_bytes(b"no picture")
    run = Settings(data=f"folder:{tree}")
    features = open_features(run, progress=False)
    features.examples("cartoon")
    with encoding.at_most(0), pytest.MonkeyPatch.context() as patch:
        patch.setattr("fedclip_flwr.features.clip.PART", 5)
        with pytest.raises(encoding.UnfinishedError) as unfinished:
            features.examples("photo")
    assert unfinished.value.done == 5
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "home" / "features").rglob("*.*")}
    found, needed = at_site(tree, Settings())
    assert found["features"][1] == "stored: cartoon 12 of 12, photo 5 of 12"
    assert needed == 7 * 128 * 4
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_images_that_can_not_be_read_are_reported(tree: Path) -> None:
    (tree / "photo" / "cat" / "0.png").write_bytes(b"no picture")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(holdings, "TRIED", 12)
        state, text, _ = at_site(tree)[0]["images"]
    assert (state, text) == ("note", "photo: 1 of 12 tested images can't be read: photo/cat/0.png")
    for path in tree.glob("cartoon/*/*.png"):
        path.write_bytes(b"no picture")
    ex = Examination(lambda _: None)
    holdings.examine_site(ex, Settings(), {"site": "north", "data": f"folder:{tree}"})
    failed = [finding for finding in ex.findings if finding.state == "FAIL"]
    assert [finding.what for finding in failed] == ["images"]
    assert failed[0].found.startswith("cartoon: 6 of 6 tested images can't be read: cartoon/")


@pytest.mark.parametrize(
    ("node", "what", "expected"),
    [
        ({"data": "folder:/nowhere"}, "data", "there is no such folder"),
        ({"data": "folder:relative"}, "node config", "expected an absolute path"),
        ({"data": "features:/nowhere"}, "data", "can't be read"),
        ({"model": "/nowhere"}, "model", "folder not found"),
        ({"device": "cuda:77"}, "device", "no CUDA device|has \\d CUDA"),
        ({"site": ""}, "site", "has no name"),
        ({"role": "watch"}, "site", "expected one of train, holdout"),
        ({"domains": "sketch"}, "site", "this site's data has no sketch"),
    ],
)
def test_what_a_sites_owner_has_to_mend_is_reported(tree: Path, node: dict[str, Any], what: str, expected: str) -> None:
    found, _ = at_site(tree, **node)
    assert found[what][0] == "FAIL"
    assert re.search(expected, found[what][1])


def test_classes_that_the_run_does_not_know_are_reported(tree: Path) -> None:
    for names in ("car,cat,dog", "car,cat"):
        found, _ = at_site(tree, Settings(class_names=names))
        assert found["classes"][0] == "FAIL"
        assert "fish" in found["classes"][1]


def test_a_word_in_the_node_config_that_nothing_reads_is_noted(tree: Path) -> None:
    state, text, _ = at_site(tree, sight="north")[0]["node config"]
    assert (state, text) == ("note", "unknown keys: sight")


def test_what_a_sites_owner_accepts_at_most_is_known(tree: Path) -> None:
    run = Settings(
        class_names="car,cat,fish,zebra", method="one-round", dp="local", dp_unit="image", epsilon=1.0, delta=1e-6
    )
    assert "node config" not in at_site(tree, run, epsilon=1.0, delta=1e-6)[0]
    assert at_site(tree, run, epsilon=0.5)[0]["node config"][0] == "FAIL"


def test_only_the_domains_that_a_site_takes_are_looked_for(tree: Path) -> None:
    found, needed = at_site(tree, role="holdout", domains="photo")
    assert found["site"][1] == "north only evaluates, on photo"
    assert found["features"][1] == "stored: photo 0 of 12"
    assert needed == 12 * 128 * 4
    found, _ = at_site(tree, Settings(holdout="photo"))
    assert found["site"][1] == "north trains on cartoon"


def test_a_simulated_sites_share_is_not_worked_out(tree: Path) -> None:
    node: dict[str, Any] = {"partition-id": 0, "num-partitions": 2}
    found, needed = at_site(tree, **node)
    assert "site" not in found
    assert needed == 24 * 128 * 4


def test_a_feature_folder_needs_no_model(tree: Path, tmp_path: Path) -> None:
    folder = tmp_path / "features"
    encode.encode([f"data=folder:{tree}"], str(folder))
    shutil.rmtree(tmp_path / "home")
    found, needed = at_site(tree, Settings(), data=f"features:{folder}")
    assert {what: state for what, (state, *_) in found.items()} == dict.fromkeys(
        ("device", "classes", "site", "features"), "ok"
    )
    assert found["features"][1] == "all 24 are stored"
    assert needed == 0
    found, _ = at_site(tree, Settings(prompt="another {}"), data=f"features:{folder}")
    assert found["data"][0] == "FAIL"
    (folder / "photo.safetensors").write_bytes(b"damaged")
    found, _ = at_site(tree, Settings(), data=f"features:{folder}")
    assert found["features"][0] == "FAIL"


def trained_on(tree: Path, run: Settings) -> int:
    """The room for what the run is trained on, which the command that is named encodes."""
    found, needed = at_site(tree, run)
    words = shlex.split(found["features"][2].partition("to encode now: ")[2])
    encode.encode(words[2:])
    assert at_site(tree, run)[0]["features"] == ("ok", "all 24 are stored", "")
    return needed


def test_pixels_of_a_full_model_take_more_room(tree: Path) -> None:
    assert trained_on(tree, Settings(method="full-model", class_names="car,cat,fish")) == 24 * 3 * 64 * 64


@needs("lora")
def test_what_lora_takes_needs_its_room(tree: Path) -> None:
    tower = Settings(method="lora", class_names="car,cat,fish")
    assert trained_on(tree, tower) == 24 * 3 * 64 * 64
    assert trained_on(tree, replace(tower, lora_layers="last:1")) == 24 * 4 * 65 * 128
    assert trained_on(tree, replace(tower, lora_targets="text")) == 24 * 128 * 4  # plain features


@needs("lora")
def test_lora_that_does_not_fit_is_found_before_a_run(tree: Path, tmp_path: Path) -> None:
    wrong = Settings(method="lora", lora_layers="last:99", class_names="car,cat,fish")
    for found, needed in (at_site(tree, wrong), at_server(data=f"folder:{tree}", method="lora", lora_layers="last:99")):
        assert found["lora"][:2] == ("FAIL", "lora-layers = 'last:99': the vision tower has only 4 layers")
        assert "features" not in found
        assert needed == 0
    found, _ = at_server(data=f"folder:{tree}", method="lora", start=str(tmp_path))
    assert found["start"][0] == "FAIL"
    assert "expected a folder that PEFT has saved" in found["start"][1]
    assert "start" not in at_site(tree, Settings(method="lora", start="/only/at/the/server"))[0]


def test_a_site_without_peft_learns_it_before_a_run(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lora, "find_spec", lambda name: None)
    found, _ = at_site(tree, Settings(method="lora"))
    assert found["node config"][0] == "FAIL"
    assert "method = 'lora' needs peft: pip install" in " ".join(found["node config"])


def test_a_server_reports_its_own_data(tree: Path) -> None:
    found, needed = at_server(data=f"folder:{tree}")
    assert {what: state for what, (state, *_) in found.items()} == {
        "device": "ok",
        "model": "ok",
        "data": "ok",
        "classes": "ok",
        "encoding": "ok",
        "holdout": "ok",
        "features": "note",
    }
    assert found["holdout"][1] == "photo"
    assert needed == 24 * 128 * 4


def test_a_server_without_images_needs_class_names(tmp_path: Path) -> None:
    found, needed = at_server(data="none", class_names="car,cat")
    assert found["data"][1] == "none: no images here, only at the sites"
    assert found["classes"][1] == "2: car, cat"
    assert "features" not in found
    assert needed == 0
    found, _ = at_server(data="none")
    assert found["classes"][0] == "FAIL"


def test_what_a_servers_administrator_has_to_mend_is_reported(tree: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    found, _ = at_server(data=f"folder:{tree}", holdout="sketch", results_dir=str(tmp_path / "file"))
    assert found["holdout"][0] == found["results-dir"][0] == "FAIL"
    assert "there is no such domain" in found["holdout"][1]
    assert "can't be written to" in found["results-dir"][1]
