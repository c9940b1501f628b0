from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from typer.testing import CliRunner

from fedclip_flwr.base import content
from fedclip_flwr.base.errors import UserError
from fedclip_flwr.base.settings import Settings
from fedclip_flwr.cli import app
from fedclip_flwr.exchange.codecs import CODECS
from fedclip_flwr.exchange.records import BY_CLASS, CHOICES, FIGURES, HELLO, PROGRESS
from fedclip_flwr.exchange.secure import protocol
from fedclip_flwr.flower.sizes import message_size
from fedclip_flwr.learning.adapters import ADAPTERS, tensor_names
from fedclip_flwr.learning.gradient import SENT
from fedclip_flwr.learning.one_round import SUMS
from fedclip_flwr.operations import outgoing
from tests import forked
from tests.extras import needs
from tests.test_client_app import asked

LORA = Settings(class_names="car,cat,fish", method="lora", lora_layers="last:1", lora_rank=2)
RUN = Settings(class_names="car,cat,fish", prompt="a picture of a {}", seed=7)


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FEDCLIP_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def sent(tree: Path, run: Settings = RUN, **node: Any) -> list[outgoing.Sent]:
    return outgoing.round_of(run, {"site": "north", "data": f"folder:{tree}", **node})


def shown(tree: Path, run: Settings = RUN, out: str = "", **node: Any) -> tuple[bool, str]:
    lines: list[str] = []
    fine = outgoing.show(run, {"site": "north", "data": f"folder:{tree}", **node}, out, lines.append)
    return fine, "\n".join(lines)


def test_a_round_sends_a_hello_a_trained_adapter_and_scores(tree: Path) -> None:
    hello, trained, scored = sent(tree)
    assert [(message.kind, message.round) for message in (hello, trained, scored)] == [
        ("query", 0),
        ("train", 1),
        ("evaluate", 1),
    ]
    assert dict(hello.records["hello"]) == {
        "site": "north",
        "role": "train",
        "domain": "cartoon+photo",
        "train": 14,
        "validation": 4,
        "test": 4,
        "classes": [0, 1, 2],
        "package": content.of_package(content.memory()),
        "unit_length": False,
        "content": "",
        "plugins": [],
    }
    assert set(trained.records) == {"metrics", "arrays"}
    assert set(trained.records["arrays"]) == set(tensor_names("attention"))
    assert set(scored.records) == {"metrics"}
    assert scored.records["metrics"]["validation"][0] == 4


def test_it_is_what_the_app_answers(tree: Path) -> None:
    """Byte by byte, as the same site's app answers the same question when it is asked by itself."""
    answer = asked("query", tree, settings=RUN)
    (hello, *_) = sent(tree)
    assert hello.records == dict(answer.content)
    answer.metadata.__dict__["_reply_to_message_id"] = "0" * 64
    assert 0 <= hello.leaves - message_size(answer) < 30, "ids take a few bytes"


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("codec", ["float32", *CODECS])
def test_every_adapter_and_codec_can_be_shown(tree: Path, own_home: Path, adapter: str, codec: str) -> None:
    fine, text = shown(tree, replace(RUN, adapter=adapter, codec=codec))
    assert fine
    assert text.count(" bytes leave)") == 3
    for name in [codec] if codec in CODECS else tensor_names(adapter):
        assert f"     {name}" in text
    assert ("uint8[" in text) == (codec in CODECS)
    left = {path.relative_to(own_home).parts[0] for path in own_home.rglob("*") if path.is_file()}
    assert left == {"features", "contents"}
    assert not list((own_home / "contents").glob("session-*"))


def test_a_round_with_plug_ins_can_be_shown(
    tree: Path, own_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "shown_plug_in.py").write_text("from fedclip_flwr.learning.adapters import Gate as Own")
    monkeypatch.syspath_prepend(str(tmp_path))
    run = replace(RUN, adapter="shown_plug_in:Own", strategy="shown_plug_in:gone")  # which is the server's
    with pytest.raises(UserError, match="shown_plug_in is not allowed as a plug-in on this machine"):
        shown(tree, run)
    monkeypatch.setenv("FEDCLIP_PLUGINS", "shown_plug_in")
    fine, text = shown(tree, run)
    assert fine
    assert text.count(" bytes leave)") == 3
    assert "shown_plug_in:Own without a version " in text


def test_a_parcel_is_shown_as_it_travels_and_not_as_it_arrives(tree: Path) -> None:
    _, trained, _ = sent(tree, replace(RUN, codec="int8"))
    assert set(trained.records["arrays"]) == {"int8"}
    assert trained.leaves < 40_000 < sent(tree)[1].leaves


@pytest.mark.parametrize(
    ("more", "kinds"),
    [
        ({"recipe": "paper"}, ["query", "train", "evaluate", "evaluate"]),
        ({"blend": "auto"}, ["query", "train"] + 4 * ["evaluate"]),
        ({"personalize": True}, ["query", "train", "evaluate", "evaluate"]),
        ({"method": "full-model"}, ["query", "train", "evaluate"]),
        ({"holdout": "photo", "num_server_rounds": 50, "fraction_train": 0.1}, ["query", "train", "evaluate"]),
    ],
)
def test_other_settings_have_their_own_messages(
    tree: Path, own_home: Path, more: dict[str, Any], kinds: list[str]
) -> None:
    assert [message.kind for message in sent(tree, replace(RUN, **more))] == kinds
    assert not list((own_home / "personal").glob("*"))


def test_a_site_that_only_evaluates_sends_scores_only(tree: Path) -> None:
    hello, scored = sent(tree, role="holdout")
    assert hello.records["hello"]["test"] == 24
    assert (scored.kind, set(scored.records)) == ("evaluate", {"metrics"})


def test_counts_by_class_are_shown_if_the_owner_shares_them(tree: Path) -> None:
    owner: dict[str, Any] = {"share-class-counts": True}
    assert "test-classes" not in shown(tree)[1]
    assert "test-classes" in shown(tree, **owner)[1]


def test_a_site_that_encodes_says_how_far_it_has_come(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedclip_flwr.features.clip.PART", 5)
    progress, hello, *_ = sent(tree, replace(RUN, round_timeout=0.001))
    assert dict(progress.records["progress"]) == {"site": "north", "encoded": 22, "images": 24}
    assert set(hello.records) == {"hello"}


def test_an_error_is_shown_as_it_would_leave(tree: Path) -> None:
    fine, text = shown(tree, role="watch")
    assert not fine
    assert "an error: north: role = 'watch': expected one of train, holdout" in text
    (error,) = sent(tree, role="watch")
    assert error.leaves < 400


def test_every_value_has_a_meaning() -> None:
    meanings = outgoing.MEANINGS | outgoing.FIGURES
    masked = frozenset().union(*protocol.ANSWERS.values())
    assert meanings.keys() == HELLO | PROGRESS | FIGURES | CHOICES | BY_CLASS | masked | {*SUMS, *SENT, protocol.MASKED}


@pytest.mark.parametrize("statistics", ["span", "full"])
def test_the_sums_of_one_round_are_shown(tree: Path, statistics: str) -> None:
    run = replace(RUN, method="one-round", statistics=statistics)
    hello, summed, scored = sent(tree, run)
    assert [message.kind for message in (hello, summed, scored)] == ["query", "train", "evaluate"]
    assert set(summed.records) == {"metrics", "arrays"}
    assert set(summed.records["arrays"]) == {*SUMS}
    assert int(summed.records["arrays"]["counts"].numpy().sum()) == 14
    assert set(scored.records) == {"metrics"}
    _, text = shown(tree, run)
    assert "what are the sums over your training images?" in text
    assert "of a class with one image, that image's feature" in text


def test_with_secure_aggregation_there_are_its_steps_and_no_adapter(tree: Path, tmp_path: Path) -> None:
    masked = replace(RUN, secure_aggregation=True, adapter="scale")
    messages = sent(tree, masked)
    steps = ["query", "query.keys", "query.shares", "train", "query.unmask", "evaluate"]
    assert [message.kind for message in messages] == steps
    assert [name for message in messages for name in message.records] == [
        *("hello", "keys", "shares", "metrics", "arrays", "unmask", "metrics")
    ]
    assert set(messages[3].records["arrays"]) == {"masked"}
    by_owner = sent(tree, replace(RUN, adapter="scale"), **{"secure-aggregation": True})
    assert [message.kind for message in by_owner] == steps
    fine, text = shown(tree, masked, out=str(tmp_path / "out"))
    assert fine
    assert "public  98 bytes  (two public keys, for this round only)" in text
    assert "log_scale" not in text
    written = json.loads((tmp_path / "out" / "2-query-keys.json").read_text())
    assert len(bytes.fromhex(written["records"]["keys"]["public"])) == 98


@pytest.mark.parametrize("statistics", ["span", "full"])
def test_with_secure_aggregation_the_sums_are_masked(tree: Path, statistics: str) -> None:
    run = replace(RUN, method="one-round", statistics=statistics, secure_aggregation=True)
    by_owner = replace(run, secure_aggregation=False)
    for messages in (sent(tree, run), sent(tree, by_owner, **{"secure-aggregation": True})):
        assert [message.kind for message in messages] == [
            *("query", "query.keys", "query.shares", "train", "query.unmask", "evaluate")
        ]
        assert not any(message.error for message in messages)
        assert set(messages[3].records["arrays"]) == {"masked"}
        assert messages[3].records["arrays"]["masked"].dtype == "int64"
    fine, text = shown(tree, run)
    assert fine
    assert "what are the sums over your training images?" in text
    assert "its update or sums, under masks" in text
    assert "moments" not in text


def test_a_local_noise_is_in_what_is_shown(tree: Path) -> None:
    """At the norm of 0.5, with noise of 200 times that, numbers are in the hundreds, and others each time."""
    noisy = replace(RUN, dp="local", noise_multiplier=200.0, adapter="scale")
    first, second = (sent(tree, noisy)[1].records["arrays"]["log_scale"].numpy() for _ in range(2))
    assert 80 < first.std() < 120
    assert (first != second).all()


def test_all_of_it_can_be_had_number_by_number(tree: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    fine, text = shown(tree, out=str(folder))
    assert fine
    assert str(folder) in text
    names = ["1-query.json", "2-train.json", "2-train.safetensors", "3-evaluate.json"]
    assert sorted(path.name for path in folder.iterdir()) == names
    hello, trained, _ = sent(tree)
    written = json.loads((folder / "1-query.json").read_text())
    assert written["records"] == {"hello": dict(hello.records["hello"])}
    assert written["bytes"] == hello.leaves
    written = json.loads((folder / "2-train.json").read_text())
    assert written["records"] == {"metrics": dict(trained.records["metrics"])}
    tensors = load_file(folder / "2-train.safetensors")
    assert written["tensors"] == sorted(tensors) == sorted(trained.records["arrays"])
    for name, tensor in tensors.items():
        assert (tensor.numpy() == trained.records["arrays"][name].numpy()).all()
    with pytest.raises(UserError, match=r"--out: .* is not empty"):
        shown(tree, out=str(folder))


ALONE = """
import sys
def watch(event, _):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.sendto", "socket.sendmsg"):
        print("NETWORK", event)
sys.addaudithook(watch)
from fedclip_flwr.cli import app
from tests import forked
app(sys.argv[1:])
"""


def test_the_command_uses_no_network(tree: Path) -> None:
    node = f"site='north' data='folder:{tree}'"
    words = ["doctor", "site", "--show-outgoing", "--node-config", node, "adapter=scale", "codec=int8"]
    done = forked.run(ALONE, *words)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "NETWORK" not in done.stdout
    assert "Nothing is sent" in done.stdout
    assert "int8" in done.stdout
    assert "encoding photo" in done.stderr, "progress is seen"


@pytest.mark.parametrize(
    "words", [["site", "--show-outgoing"], ["site", "--out", "x"], ["--show-outgoing", "--node-config", "site='a'"]]
)
def test_options_that_do_not_go_together_are_refused(words: list[str]) -> None:
    result = CliRunner().invoke(app, ["doctor", *words])
    assert result.exit_code == 2
    assert "fedclip doctor site" in result.output


@needs("lora")
@pytest.mark.parametrize("codec", ["float32", "int8"])
@pytest.mark.parametrize("start", ["", "/where/only/the/server/has/it"], ids=["zero-shot", "start"])
def test_of_lora_only_what_is_trained_leaves(tree: Path, codec: str, start: str) -> None:
    fine, text = shown(tree, replace(LORA, codec=codec, start=start))
    assert fine
    assert text.count(" bytes leave)") == 3 + bool(start)  # the start is tested beside zero-shot
    assert "lora_A" not in text
    assert text.count(".lora_B") == (6 if codec == "float32" else 0)
    if codec == "float32":
        assert "q_proj.lora_B" in text
        assert "(the second factor of what is added to this layer)" in text


@needs("lora")
def test_lora_goes_under_masks_and_after_personalising_nothing_more_leaves(tree: Path) -> None:
    messages = sent(tree, replace(LORA, secure_aggregation=True, personalize=True))
    assert not any(message.error for message in messages)
    (trained,) = (message for message in messages if message.kind == "train")
    assert set(trained.records["arrays"]) == {"masked"}
    assert [m.kind for m in messages if "arrays" in m.records] == ["train"]
