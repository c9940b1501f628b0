"""The ClientApp called as a SuperNode calls it, in this process. Over Ray and gRPC: tests/test_running.py."""

from __future__ import annotations

import errno
import logging
import runpy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from flwr.app import Context, Message, RecordDict

import client_app
from fedclip_flwr.base import content
from fedclip_flwr.base.seeds import seed_of
from fedclip_flwr.base.settings import Settings
from fedclip_flwr.data.vocabulary import Vocabulary
from fedclip_flwr.exchange import records
from fedclip_flwr.exchange.codecs import CODECS
from fedclip_flwr.exchange.link import Downlink
from fedclip_flwr.exchange.session import Session
from fedclip_flwr.features import clip, lora
from fedclip_flwr.features.lora import Lora
from fedclip_flwr.features.opening import new_learner, open_features
from fedclip_flwr.flower.sizes import message_size
from fedclip_flwr.learning import ClosedForm
from fedclip_flwr.learning.choosing import GRID
from fedclip_flwr.learning.recipes import RECIPES, new_adapter, new_part
from fedclip_flwr.learning.sums import BITS
from fedclip_flwr.learning.training import evaluate, examine, train
from fedclip_flwr.runs.saved import load_adapter, load_lora
from fedclip_flwr.site import work
from fedclip_flwr.site.context import open_context
from tests.extras import needs
from tests.failing import failing

NAMES = ("car", "cat", "fish")
SETTINGS = Settings(seed=7, local_epochs=2)


WITH_LORA = replace(SETTINGS, method="lora", lora_layers="last:1", lora_rank=2)
HIDDEN = replace(SETTINGS, method="one-round", dp="local", dp_unit="image", epsilon=1.0)
SHARES = replace(HIDDEN, dp="central", secure_aggregation=True)


def session_of(names: tuple[str, ...] = NAMES, run: str = "", model: str = "") -> Session:
    return Session("", Vocabulary(names, ("a picture of a {}",)), model, run)


def asked(
    kind: str,
    tree: Path,
    state: Any = None,
    names: tuple[str, ...] = NAMES,
    personal: str = "",
    blend: float | None = None,
    choose: bool = False,
    settings: Settings = SETTINGS,
    mark: str = "",
    bits: int = 0,
    **node: Any,
) -> Message:
    """What the site with the images in `tree` answers."""
    session = session_of(names, personal, node.pop("model_content", ""))
    session.remember(content.memory())
    config = records.write_task(session.key, bool(personal), blend, choose)
    if kind == "query":
        config = records.write_greeting(session)
    config["server-round"] = 4
    if mark:
        config["state"] = mark
    if bits:
        config["bits"] = bits
    task = RecordDict({"config": config})
    if state is not None:
        task["arrays"] = records.write_adapter(state)
    given = {"site": "north", "data": f"folder:{tree}", **node}
    node_config = {key: value for key, value in given.items() if value is not None}
    context = Context(1, 2, node_config, RecordDict(), settings.as_run_config())
    return client_app.app(Message(task, 2, kind), context)


def needed(settings: Settings, tree: Path) -> dict[str, torch.Tensor]:
    """What the server sends for one round."""
    part = new_part(settings, open_features(replace(SETTINGS, data=f"folder:{tree}")).classes.ready())
    assert isinstance(part, ClosedForm)
    return {part.NEEDED: part.state_dict()[part.NEEDED]}


@pytest.mark.parametrize("before", [logging.INFO, logging.CRITICAL])
def test_a_client_app_that_is_loaded_late_brings_no_traces_of_flower_back(before: int) -> None:
    """A simulation may load it when its ServerApp has given up: see `flower.serverapp.refuse`."""
    flowers = logging.getLogger("flwr")
    level = flowers.level
    try:
        flowers.setLevel(before)
        runpy.run_path(client_app.__file__)
        assert flowers.level == max(before, logging.ERROR)
    finally:
        flowers.setLevel(level)


def test_a_hello_says_who_is_there(tree: Path) -> None:
    hello = records.read_hello(asked("query", tree).content)
    assert isinstance(hello, records.Hello)
    assert (hello.site, hello.role, hello.domain) == ("north", "train", "cartoon+photo")
    assert (hello.train, hello.validation, hello.test) == (14, 4, 4)
    assert hello.classes == [0, 1, 2]
    assert len(hello.package) == 32


@pytest.mark.parametrize(
    ("settings", "marked"),
    [
        (SETTINGS, False),
        (replace(SETTINGS, method="one-round"), True),
        (replace(SETTINGS, method="one-round", secure_aggregation=True), True),
        (replace(SETTINGS, method="one-round", strategy="fedmedian"), True),
        (replace(SETTINGS, method="one-round", statistics="gradient"), False),
        (HIDDEN, False),
        (replace(HIDDEN, dp="central"), False),
        (SHARES, False),
    ],
)
def test_a_hello_marks_the_images_only_where_updates_can_follow(tree: Path, settings: Settings, marked: bool) -> None:
    hello = records.read_hello(asked("query", tree, settings=settings).content)
    assert isinstance(hello, records.Hello)
    assert bool(hello.content) == marked


def test_a_site_that_is_still_encoding_reports_its_progress(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clip, "PART", 8)
    monkeypatch.setenv("FEDCLIP_HOME", str(tree.parent / "home"))
    settings = replace(SETTINGS, round_timeout=1e-6)
    answers = [records.read_hello(asked("query", tree, settings=settings).content) for _ in range(3)]
    assert answers[:2] == [records.Progress("north", 8, 24), records.Progress("north", 20, 24)]
    assert isinstance(answers[2], records.Hello)


@needs("lora")
@pytest.mark.parametrize("layers", ["last:1", "all"])
def test_a_site_of_a_run_with_lora_encodes_in_slices_too(
    tree: Path, monkeypatch: pytest.MonkeyPatch, layers: str
) -> None:
    monkeypatch.setattr(clip, "PART", 8)
    monkeypatch.setenv("FEDCLIP_HOME", str(tree.parent / "home"))
    settings = replace(WITH_LORA, lora_layers=layers, round_timeout=1e-6)
    answers = [records.read_hello(asked("query", tree, settings=settings).content) for _ in range(2)]
    assert answers == [records.Progress("north", 8, 24), records.Progress("north", 20, 24)]


def test_training_answers_with_the_received_adapters_scores_and_the_trained_adapter(tree: Path) -> None:
    settings = SETTINGS
    adapter = new_adapter(settings, 128)
    state = {name: tensor + 0.01 for name, tensor in adapter.state_dict().items()}
    answer = records.read_answer(asked("train", tree, state).content, state)

    node = {"site": "north", "data": f"folder:{tree}"}
    context = open_context(settings.as_run_config(), node, session_of(), False)
    adapter.load_state_dict(state)
    assert answer.report.validation == evaluate(adapter, context.site.validation, context.classes)
    assert answer.report.test == replace(examine(adapter, context.site.test, context.classes), classes=None)
    assert answer.report.examples == 14
    rate = RECIPES["default"].rate("attention", 128, steps=1)
    seed = seed_of(7, "train", "north", 4)
    train(adapter, context.site.train, context.classes, RECIPES["default"], learning_rate=rate, epochs=2, seed=seed)
    for name, tensor in adapter.state_dict().items():
        torch.testing.assert_close(answer.state[name], tensor)
        assert not torch.equal(answer.state[name], state[name])


def test_a_full_model_learns_from_images_and_comes_back(tree: Path) -> None:
    settings = Settings(method="full-model", recipe="paper", strategy="fedprox", proximal_mu=0.5, seed=7, batch_size=8)
    node = {"site": "north", "data": f"folder:{tree}"}
    context = open_context(settings.as_run_config(), node, session_of(), False)
    model = new_learner(settings, context.features)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    answer = records.read_answer(asked("train", tree, state, settings=settings).content, state)
    assert answer.report.validation == evaluate(model, context.site.validation, context.classes)
    how: dict[str, Any] = {"learning_rate": 5e-5, "batch_size": 8, "proximal": 0.5}
    train(model, context.site.train, context.classes, RECIPES["paper"], seed=seed_of(7, "train", "north", 4), **how)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(answer.state[name], tensor)
    assert sum(not torch.equal(answer.state[name], state[name]) for name in state) == len(state)


def test_of_a_full_model_only_what_came_goes_back(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings(method="full-model")
    context = open_context(settings.as_run_config(), {"site": "north", "data": f"folder:{tree}"}, session_of(), False)
    state = new_learner(settings, context.features).state_dict()
    write = records.write_adapter
    monkeypatch.setattr(work, "write_answer", lambda *_: RecordDict({"arrays": write({"pixels": torch.ones(2)})}))
    assert "pixels in it must not leave" in str(asked("train", tree, state, settings=settings).error.reason)


def test_an_adapter_is_evaluated_and_made_the_sites_own_with_the_blend_that_is_asked_for(
    tree: Path, fedclip_home: Path
) -> None:
    settings = Settings(adapter="scale", seed=7)
    adapter = new_adapter(settings, 128)
    state = {"log_scale": torch.linspace(-2, 2, 128)}
    adapter.load_state_dict(state)
    context = open_context(settings.as_run_config(), {"site": "north", "data": f"folder:{tree}"}, session_of(), False)
    reports = []
    for blend in (None, 0.25):
        adapter.blend = 1.0 if blend is None else blend
        report = records.read_answer(asked("evaluate", tree, state, blend=blend, settings=settings).content).report
        assert report.validation == evaluate(adapter, context.site.validation, context.classes)
        reports.append(report)
    assert reports[0] != reports[1]
    asked("evaluate", tree, state, blend=0.25, personal="blended", settings=settings)
    assert load_adapter(fedclip_home / "personal" / "blended" / "north")[1]["blend"] == 0.25


@pytest.mark.parametrize("codec", CODECS)
def test_with_a_codec_a_site_makes_the_first_adapter_itself_and_answers_with_a_parcel(tree: Path, codec: str) -> None:
    settings = replace(SETTINGS, codec=codec)
    start = new_adapter(settings, 128).state_dict()
    node: dict[str, Any] = {"site": f"with-{codec}"}
    plain = records.read_answer(asked("train", tree, start, **node).content, start)
    reply = asked("train", tree, settings=settings, mark=records.mark_of(start), **node)
    assert set(reply.content["arrays"]) == {codec}
    assert message_size(reply) < 0.6 * message_size(asked("train", tree, start, **node))
    Downlink(start, codec, 0).receive(reply, start)
    packed = records.read_answer(reply.content, start)
    assert packed.report == plain.report
    for name, tensor in plain.state.items():
        step = (tensor - start[name]).abs().max()
        torch.testing.assert_close(packed.state[name], tensor, rtol=0, atol=float(step / 100))
    assert reply.content["metrics"] == asked("train", tree, start, **node).content["metrics"]


def test_a_site_asks_for_the_complete_adapter_if_it_has_no_base(tree: Path) -> None:
    reply = asked("train", tree, settings=replace(SETTINGS, codec="int8"), mark="0123456789abcdef")
    assert reply.error.code == records.LACKS


def test_evaluating_sends_no_adapter(tree: Path) -> None:
    state = new_adapter(Settings(), 128).state_dict()
    assert set(asked("evaluate", tree, state).content) == {"metrics"}


def test_a_site_scores_constants_only_in_a_run_that_lets_sites_choose(tree: Path) -> None:
    closed = replace(SETTINGS, method="one-round")
    learner = new_part(closed, open_features(replace(closed, data=f"folder:{tree}"), progress=False).classes.ready())
    state = {**learner.state_dict(), "counts": torch.tensor([3, 4, 5])}
    report = records.read_answer(asked("evaluate", tree, state, settings=closed).content).report
    assert report.choices == ()
    chooses = replace(closed, one_round_choose=True)
    report = records.read_answer(asked("evaluate", tree, state, choose=True, settings=chooses).content).report
    assert len(report.choices) == 2 * len(GRID)
    refused = asked("evaluate", tree, state, choose=True, settings=closed).error.reason or ""
    assert "choices" in refused
    assert "must not leave this site" in refused


def test_counts_by_class_are_sent_only_if_the_owner_shares_them(tree: Path) -> None:
    state = new_adapter(Settings(), 128).state_dict()
    kept = records.read_answer(asked("evaluate", tree, state).content).report.test
    owner: dict[str, Any] = {"share-class-counts": True}
    shared = records.read_answer(asked("evaluate", tree, state, **owner).content).report.test
    assert kept.classes is None
    assert shared.classes
    assert sum(shared.classes.examples) == shared.score.examples == 4
    assert replace(shared, classes=None) == kept


def test_a_site_makes_and_keeps_an_adapter_of_its_own(tree: Path, fedclip_home: Path) -> None:
    state = new_adapter(Settings(), 128).state_dict()
    options: dict[str, Any] = {"personal": "../20260101", "site": "north/1"}
    answer = records.read_answer(asked("evaluate", tree, state, **options).content)
    (folder,) = (fedclip_home / "personal").glob("*20260101*/north_1-*")
    adapter, facts = load_adapter(folder)
    assert facts["site"] == "north/1"
    context = open_context(
        Settings(seed=7).as_run_config(), {"site": "north/1", "data": f"folder:{tree}"}, session_of(), False
    )
    assert answer.report.validation == evaluate(adapter, context.site.validation, context.classes)
    before = evaluate(new_adapter(Settings(), 128), context.site.validation, context.classes)
    assert answer.report.validation.loss <= before.loss
    assert (facts["personal_epoch"] > 0) == any(not torch.equal(adapter.state_dict()[k], state[k]) for k in state)


@needs("lora")
@pytest.mark.parametrize("codec", ["float32", "int8"])
def test_of_lora_a_site_sends_only_what_is_trained(tree: Path, codec: str) -> None:
    settings = replace(WITH_LORA, codec=codec)
    learner = new_learner(settings, open_features(replace(settings, data=f"folder:{tree}"), progress=False))
    start = learner.on_cpu()
    assert {name.rpartition(".")[2] for name in start} == {"lora_B"}
    given: dict[str, Any] = {"mark": records.mark_of(start)} if codec == "int8" else {"state": start}
    reply = asked("train", tree, settings=settings, **given, site=f"lora-{codec}")
    assert set(reply.content["arrays"]) == ({*start} if codec == "float32" else {codec})
    if codec == "float32":
        assert any(tensor.any() for tensor in records.read_answer(reply.content, start).state.values())
    else:
        assert message_size(reply) < 5000


@needs("lora")
@pytest.mark.parametrize("trains", ["B", "both"])
def test_a_site_makes_and_keeps_a_lora_of_its_own_with_both_factors(
    tree: Path, fedclip_home: Path, trains: str
) -> None:
    settings = replace(WITH_LORA, lora_train=trains, personalize=True, num_server_rounds=2, learning_rate=0.02)
    learner = new_learner(settings, open_features(replace(settings, data=f"folder:{tree}"), progress=False))
    assert isinstance(learner, Lora)
    run = f"own-lora-{trains}"
    reply = asked("evaluate", tree, learner.on_cpu(), personal=run, settings=settings)
    assert set(reply.content) == {"metrics"}
    found, facts = load_lora(fedclip_home / "personal" / run / "north")
    assert found.spec == learner.spec
    assert set(found.state) == set(learner.every)
    if trains == "B":
        assert all(torch.equal(found.state[name], tensor) for name, tensor in learner.frozen.items())
    learner.take(found.state)
    context = open_context(settings.as_run_config(), {"site": "north", "data": f"folder:{tree}"}, session_of(), False)
    own = evaluate(learner, context.site.validation, context.classes)
    assert records.read_answer(reply.content).report.validation == own
    assert facts["personal_epoch"] > 0


@needs("lora")
@pytest.mark.parametrize("settings", [WITH_LORA, replace(SETTINGS, method="full-model")], ids=["lora", "full-model"])
def test_a_site_without_images_to_validate_with_trains_a_tower(tree: Path, settings: Settings) -> None:
    for path in [*tree.rglob("1.png"), *tree.rglob("2.png"), *tree.rglob("3.png"), *tree.rglob("fish/0.png")]:
        path.unlink()  # four are left: two to train on, two to test with
    learner = new_learner(settings, open_features(replace(settings, data=f"folder:{tree}"), progress=False))
    start = learner.on_cpu()
    reply = asked("train", tree, start, names=("car", "cat", "fish"), settings=settings)
    assert records.read_answer(reply.content, start).report.validation.examples == 0


def test_a_site_without_peft_says_so_at_once(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lora, "find_spec", lambda name: None)
    for kind in ("query", "train"):
        reply = asked(kind, tree, settings=WITH_LORA, site=f"bare-{kind}")
        assert "method = 'lora' needs peft: pip install 'fedclip-flwr[lora]'" in str(reply.error.reason)


def test_a_site_without_the_classes_says_so(tree: Path) -> None:
    state = new_adapter(Settings(), 128).state_dict()
    task = RecordDict({"config": records.write_task("unknown"), "arrays": records.write_adapter(state)})
    context = Context(1, 2, {"site": "north", "data": f"folder:{tree}"}, RecordDict(), Settings().as_run_config())
    assert "session not found" in str(client_app.app(Message(task, 2, "train"), context).error.reason)


@pytest.mark.parametrize(
    ("kind", "options", "expected"),
    [
        ("query", {"names": ("car", "cat", "dog")}, "classes that the run does not know: fish"),
        ("query", {"model_content": "0123"}, "differs from the server's"),
        ("query", {"data": "folder:/nowhere"}, "there is no such folder"),
        ("train", {}, "the server's message lacks the adapter"),
        ("train", {"state": {"w": torch.zeros(3)}}, "the adapter lacks inner.bias"),
        ("evaluate", {"state": new_adapter(Settings(), 64).state_dict()}, "expected float32[128, 128]"),
    ],
)
def test_what_goes_wrong_is_answered_as_an_error_of_one_line(
    kind: str, options: dict[str, Any], expected: str, tree: Path
) -> None:
    reply = asked(kind, tree, **options)
    assert reply.has_error()
    assert expected in str(reply.error.reason)
    assert str(reply.error.reason).startswith("north: ") == (kind == "query")
    assert "\n" not in str(reply.error.reason)


def test_an_image_that_cannot_be_read_now_is_answered_without_its_name_and_is_asked_for_again(
    tree: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tree / "photo" / "cat" / "0.png").rename(tree / "photo" / "cat" / "Smith.png")
    with monkeypatch.context() as meanwhile:
        failing(meanwhile, "Smith.png", OSError(errno.EIO, "Input/output error"))
        reply = asked("query", tree)
    assert str(reply.error.reason).startswith("north: a file can't be read now (Input/output error): check that its")
    assert "photo/cat/Smith.png can't be read now" in caplog.text
    hello = records.read_hello(asked("query", tree).content)
    assert isinstance(hello, records.Hello)
    assert hello.train + hello.validation + hello.test == 22


def test_a_surprise_is_answered_in_one_line_and_its_trace_stays_here(
    tree: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def surprise(*_: object) -> None:
        raise MemoryError("too\nmuch")

    monkeypatch.setattr(work, "report_on", surprise)
    reply = asked("evaluate", tree, new_adapter(Settings(), 128).state_dict())
    assert reply.error.reason == "MemoryError: too much"
    assert "Traceback" in caplog.text


def test_a_gpus_memory_is_given_back_after_each_message(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given_back: list[str] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: given_back.append("all"))
    asked("query", tree)
    assert asked("train", tree).has_error()
    assert given_back == ["all", "all"]


def test_nothing_leaves_that_is_not_on_the_list(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = records.write_answer

    def more(*given: Any) -> RecordDict:
        answer = write(*given)
        answer.metric_records["metrics"]["labels"] = [1, 2, 3]
        return answer

    monkeypatch.setattr(work, "write_answer", more)
    reply = asked("evaluate", tree, new_adapter(Settings(), 128).state_dict())
    assert "must not leave this site" in str(reply.error.reason)


WARM = """
import sys
from dataclasses import replace
from pathlib import Path
from fedclip_flwr.flower.grids import act_as_server
from tests.test_client_app import Settings, asked, new_adapter
act_as_server()
for kind in ("query", "train", "evaluate"):
    state = None if kind == "query" else new_adapter(Settings(), 128).state_dict()
    assert asked(kind, Path(sys.argv[1]), state).has_content()
heavy = {"transformers", "datasets", "ray", "torch._dynamo", "sklearn", "matplotlib"}
heavy |= {"fedclip_flwr.server.nodes", "fedclip_flwr.server.strategy", "dp_accounting"}
heavy |= {"fedclip_flwr.exchange.secure.site"}
print(sorted(heavy & set(sys.modules)))
"""


def test_a_site_whose_features_are_stored_imports_nothing_heavy_to_answer(tree: Path) -> None:
    asked("query", tree)
    done = subprocess.run([sys.executable, "-c", WARM, str(tree)], capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stdout + done.stderr


@pytest.mark.parametrize(("run", "owner"), [(True, {}), (False, {"secure-aggregation": True})])
def test_a_site_that_masks_its_sums_gives_none_without(tree: Path, run: bool, owner: dict[str, Any]) -> None:
    """Whatever the server asks for, and also where it is the site's owner who says so."""
    settings = replace(SETTINGS, method="one-round", secure_aggregation=run)
    basis = needed(settings, tree)
    reply = asked("train", tree, basis, bits=BITS, settings=settings, **owner)
    assert "gives its update only with secure aggregation" in (reply.error.reason or "")
    plain = replace(settings, secure_aggregation=False)
    assert not asked("train", tree, basis, bits=BITS, settings=plain).has_error()


@needs("privacy")
@pytest.mark.parametrize("statistics", ["span", "gradient"])
def test_a_site_that_hides_images_gives_no_sums_in_coarse_units(tree: Path, statistics: str) -> None:
    hidden = replace(HIDDEN, statistics=statistics)
    for bits in range(1, BITS + 2):
        run = f"{statistics}-{bits}"
        reply = asked("train", tree, needed(hidden, tree), personal=run, bits=bits, settings=hidden)
        assert reply.has_error() == (bits not in (4, 5))
        assert not reply.has_error() or "bits" in str(reply.error.reason)
    plain = replace(hidden, dp="off", dp_unit="site", epsilon=0.0)
    assert not asked("train", tree, needed(plain, tree), bits=1, settings=plain).has_error()


@needs("privacy")
@pytest.mark.parametrize(
    ("first", "then"),
    [
        (HIDDEN, replace(HIDDEN, epsilon=2.0)),
        (HIDDEN, replace(HIDDEN, delta=1e-6)),
        (replace(SHARES, min_sites=9), replace(SHARES, min_sites=4)),
    ],
    ids=["epsilon", "delta", "shares"],
)
def test_a_site_that_is_asked_again_for_less_noise_gives_none(
    tree: Path, first: Settings, then: Settings, request: pytest.FixtureRequest
) -> None:
    state = needed(first, tree)

    def why(settings: Settings, state: dict[str, torch.Tensor] = state) -> str:
        reply = asked("train", tree, state, personal=request.node.callspec.id, bits=BITS, settings=settings)
        return (reply.error.reason or "") if reply.has_error() else ""

    fine = "gives its update only with secure aggregation" if first.secure_aggregation else ""
    refused = "this site gives noised sums only once in a run"
    assert fine in why(first)
    assert why(then).startswith(refused)
    assert why(first, {name: tensor.flip(0) for name, tensor in state.items()}).startswith(refused)
    assert fine in why(first)
    assert refused not in why(first)


def test_a_real_site_opens_no_path_that_the_server_names_even_if_something_there_imports_ray(
    tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", ModuleType("ray"))
    reply = asked("query", tree, settings=replace(SETTINGS, data=f"folder:{tree}"), data=None)
    assert reply.has_error()
    assert "this site's data is not set" in str(reply.error.reason)


@pytest.mark.parametrize("method", ["adapter", "one-round"])
def test_a_site_that_masks_its_updates_takes_part_in_no_other_run(tree: Path, method: str) -> None:
    own: dict[str, Any] = {"secure-aggregation": True}
    run = replace(SETTINGS, method=method)
    answer = asked("query", tree, settings=run, **own)
    assert answer.error.reason == "north: this site sends its updates only in runs with secure-aggregation = true"
    secure = replace(run, secure_aggregation=True)
    assert not asked("query", tree, settings=secure).has_error()
    undone: dict[str, Any] = {"site": "a", "data": f"folder:{tree}", "secure-aggregation": False}
    assert open_context(secure.as_run_config(), undone, session_of(), False).settings.secure_aggregation


@pytest.mark.parametrize(
    ("node", "why"),
    [
        ({"dp": "central"}, "dp = 'central' in the node config: expected 'local': a site can only add noise"),
        ({"dp": "off"}, "dp = 'off' in the node config"),
        ({"noise-multiplier": 0.1}, "noise-multiplier and clipping-norm in the node config need dp='local' there"),
        ({"dp": "local"}, "dp='local' in the node config needs noise-multiplier there"),
        ({"dp": "local", "noise-multiplier": 2.0, "clipping-norm": -1.0}, "clipping-norm = -1.0: expected at least"),
        ({"dp": "local", "noise-multiplier": 1.0}, "noise-multiplier = 1 in the node config: expected at least 1.5"),
    ],
)
def test_what_a_sites_owner_says_of_noise_can_only_add_some(tree: Path, node: dict[str, Any], why: str) -> None:
    noisy = replace(SETTINGS, dp="local", noise_multiplier=1.5)
    assert why in str(asked("query", tree, settings=noisy, **node).error.reason)


def test_a_sites_owner_can_add_noise_that_the_run_does_not_ask_for(tree: Path) -> None:
    start = new_adapter(SETTINGS, 128).state_dict()
    own: dict[str, Any] = {"dp": "local", "noise-multiplier": 100.0, "clipping-norm": 1.0}
    plain, noisy = (
        asked("train", tree, start, **node).content.array_records["arrays"]["inner.bias"].numpy() for node in ({}, own)
    )
    assert 70 < (noisy - plain).std() < 130
