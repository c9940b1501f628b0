"""The ClientApp called as a SuperNode calls it, in this process. Over Ray and gRPC: tests/test_running.py."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Context, Message, RecordDict

import client_app
from fedclip_flwr import exchange
from fedclip_flwr.config import Settings
from fedclip_flwr.learning import RECIPES, evaluate, seed_of, train
from fedclip_flwr.sites import new_adapter, open_desk

NAMES = ("car", "cat", "fish")


def asked(kind: str, tree: Path, state: Any = None, names: tuple[str, ...] = NAMES, **node: Any) -> Message:
    """What the site with the images in `tree` answers."""
    config = exchange.write_task("", names)
    config["server-round"] = 4
    content = RecordDict({"config": config})
    if state is not None:
        content["arrays"] = exchange.write_adapter(state)
    node_config = {"site": "north", "data": f"folder:{tree}", **node}
    context = Context(1, 2, node_config, RecordDict(), Settings(seed=7, local_epochs=2).as_run_config())
    return client_app.app(Message(content, 2, kind), context)


def test_a_hello_tells_who_is_there(tree: Path) -> None:
    hello = exchange.read_hello(asked("query", tree).content)
    assert (hello.site, hello.role, hello.domain) == ("north", "train", "cartoon+photo")
    assert (hello.train, hello.validation, hello.test) == (14, 4, 4)
    assert hello.classes == [0, 1, 2]
    assert len(hello.package) == 32


def test_training_answers_with_the_received_adapters_scores_and_the_trained_adapter(tree: Path) -> None:
    settings = Settings(seed=7, local_epochs=2)
    adapter = new_adapter(settings, 128)
    state = {name: tensor + 0.01 for name, tensor in adapter.state_dict().items()}
    answer = exchange.read_answer(asked("train", tree, state).content, state)

    node = {"site": "north", "data": f"folder:{tree}"}
    desk = open_desk(settings.as_run_config(), node, "", False)
    adapter.load_state_dict(state)
    assert answer.report.validation == evaluate(adapter, desk.site.validation, desk.classes)
    assert answer.report.test == evaluate(adapter, desk.site.test, desk.classes)
    assert answer.report.examples == 14
    rate = RECIPES["default"].rate("attention", 128)
    seed = seed_of(7, "train", "north", 4)
    train(adapter, desk.site.train, desk.classes, RECIPES["default"], learning_rate=rate, epochs=2, seed=seed)
    for name, tensor in adapter.state_dict().items():
        torch.testing.assert_close(answer.state[name], tensor)
        assert not torch.equal(answer.state[name], state[name])


def test_evaluating_sends_no_adapter(tree: Path) -> None:
    state = new_adapter(Settings(), 128).state_dict()
    assert set(asked("evaluate", tree, state).content) == {"metrics"}


@pytest.mark.parametrize(
    ("kind", "options", "told"),
    [
        ("query", {"names": ("car", "cat", "dog")}, "it has also fish and lacks dog"),
        ("query", {"data": "folder:/nowhere"}, "there is no such folder"),
        ("train", {}, "the server's message lacks the adapter"),
        ("train", {"state": {"w": torch.zeros(3)}}, "the adapter lacks inner.bias"),
        ("evaluate", {"state": new_adapter(Settings(), 64).state_dict()}, "expected float32[128, 128]"),
    ],
)
def test_what_goes_wrong_is_answered_as_an_error_of_one_line(
    kind: str, options: dict[str, Any], told: str, tree: Path
) -> None:
    reply = asked(kind, tree, **options)
    assert reply.has_error()
    assert told in str(reply.error.reason)
    assert "\n" not in str(reply.error.reason)


def test_a_surprise_is_answered_in_one_line_and_its_trace_stays_here(
    tree: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def surprise(*_: object) -> None:
        raise MemoryError("too\nmuch")

    monkeypatch.setattr(client_app, "report_on", surprise)
    reply = asked("evaluate", tree, new_adapter(Settings(), 128).state_dict())
    assert reply.error.reason == "MemoryError: too much"
    assert "Traceback" in caplog.text


def test_nothing_leaves_that_is_not_on_the_list(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = exchange.write_answer

    def more(*given: Any) -> RecordDict:
        content = write(*given)
        content.metric_records["metrics"]["labels"] = [1, 2, 3]
        return content

    monkeypatch.setattr(exchange, "write_answer", more)
    reply = asked("evaluate", tree, new_adapter(Settings(), 128).state_dict())
    assert "must not leave this site" in str(reply.error.reason)


WARM = """
import sys
from pathlib import Path
from tests.test_client_app import Settings, asked, new_adapter
for kind in ("query", "train", "evaluate"):
    state = None if kind == "query" else new_adapter(Settings(), 128).state_dict()
    assert asked(kind, Path(sys.argv[1]), state).has_content()
heavy = {"transformers", "datasets", "flwr_datasets", "ray", "torch._dynamo", "sklearn", "matplotlib"}
print(sorted(heavy & set(sys.modules)))
"""


def test_a_site_whose_features_are_stored_imports_nothing_heavy_to_answer(tree: Path) -> None:
    asked("query", tree)
    done = subprocess.run([sys.executable, "-c", WARM, str(tree)], capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stdout + done.stderr
