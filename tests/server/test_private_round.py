"""One round that hides each image: exact without noise, the claimed noise with it, and nothing without it leaves."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from flwr.app import Message, MessageType

from fedclip_flwr.base.errors import UserError
from fedclip_flwr.base.settings import Settings
from fedclip_flwr.base.tensors import State
from fedclip_flwr.exchange import noise, records
from fedclip_flwr.exchange.noise import sigma_for
from fedclip_flwr.experiments.simulate import Result, Wrap, simulate
from fedclip_flwr.flower.grids import Node
from fedclip_flwr.inference.card import card_of
from fedclip_flwr.learning.gradient import COUNTED, SENT, WHOLE, OneGradient, gradient_of
from fedclip_flwr.learning.noised_sums import most_of
from fedclip_flwr.learning.sums import BITS, sums_of, unit_of
from fedclip_flwr.learning.training import evaluate
from fedclip_flwr.operations import forget
from fedclip_flwr.report import writing
from fedclip_flwr.runs import history, runlist
from fedclip_flwr.runs.saved import load_adapter
from tests.extras import needs
from tests.server.test_one_round import CLASSES, DIM, classes, images, sites
from tests.versions import Federation, files_with
from tests.versions import images as few

PLAIN = Settings(method="one-round", statistics="gradient")
CENTRAL = replace(PLAIN, dp="central", dp_unit="image", epsilon=1.0)
LOCAL = replace(CENTRAL, dp="local")
SHARES = replace(CENTRAL, secure_aggregation=True, min_sites=4)
NUMBERS = (CLASSES + 1) * DIM + CLASSES
pytestmark = needs("privacy")


@lru_cache
def sigma() -> int:
    """The noise of one with ε = 1, in units."""
    return sigma_for(1.0, 1e-5, WHOLE, NUMBERS)


@pytest.fixture(autouse=True)
def seeded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same noise at every call: the machine's own differs each time."""
    chance = Random(7)
    plain = noise.noised
    monkeypatch.setattr(
        "fedclip_flwr.exchange.private_sums.noised", lambda sums, sigmas: plain(sums, sigmas, chance.randbytes)
    )


def federation(count: int, settings: Settings, parts: int = 5, wrap: Wrap = lambda name, node: node) -> Result:
    train = images(count, 0)
    rows = list(torch.tensor_split(torch.randperm(count, generator=torch.Generator().manual_seed(1)), parts))
    return simulate(sites(train, rows), classes(), None, settings, wrap=wrap)


def exact(count: int) -> State:
    learner = OneGradient.new(classes().ready().text)
    return gradient_of(images(count, 0), learner.prompts, float(classes().scale))


def difference(result: Result, count: int) -> torch.Tensor:
    """The noise in the result's sums."""
    truth = exact(count)
    return torch.cat([(result.state[name] - truth[name]).reshape(-1) for name in SENT]).double()


@pytest.mark.parametrize(("parts", "masked"), [(1, False), (4, False), (60, False), (4, True), (60, True)])
def test_without_noise_the_gradient_is_the_same_to_the_bit_wherever_images_are(parts: int, masked: bool) -> None:
    result = federation(600, replace(PLAIN, secure_aggregation=masked), parts)
    assert not difference(result, 600).any()
    assert (int(result.state["images"]), float(result.state["noise"])) == (600, 0.0)
    assert (result.selected.seen or 0.0) > (evaluate(None, images(60, 7), classes()).accuracy or 0.0)


@pytest.mark.parametrize(
    ("settings", "times"),
    [(CENTRAL, 1.0), (LOCAL, 5**0.5), (SHARES, (5 / 4) ** 0.5)],
    ids=["central", "local", "shares"],
)
def test_the_total_has_the_noise_that_is_claimed_and_the_state_says_it(settings: Settings, times: float) -> None:
    """Of 900 numbers: within 15 % is six standard errors and more."""
    result = federation(600, settings)
    found, deviation = difference(result, 600), times * sigma()
    assert found.std() == pytest.approx(deviation, rel=0.15)
    assert found.mean().abs() < 6 * deviation / NUMBERS**0.5
    assert float(result.state["noise"]) == pytest.approx(deviation, rel=1e-6)
    assert int(result.state["images"]) == 600


@pytest.mark.parametrize("statistics", ["span", "full"])
@pytest.mark.parametrize("settings", [CENTRAL, LOCAL, SHARES], ids=["central", "local", "shares"])
def test_sums_with_little_noise_are_nearly_those_without(settings: Settings, statistics: str) -> None:
    settings = replace(settings, statistics=statistics, epsilon=20.0)
    noisy = federation(4000, settings)
    basis = noisy.state["basis"]
    exact = sums_of(images(4000, 0), basis, CLASSES, BITS, most_of(basis))  # with features shortened likewise
    total, truth = (state["sums"].double() * unit_of(BITS) for state in (noisy.state, exact))
    assert 0 < (total - truth).norm() / truth.norm() < 0.3
    assert noisy.state["counts"].tolist()[-1] == 0  # the class without images
    zero = evaluate(None, images(60, 7), classes()).accuracy or 0.0
    assert (noisy.selected.seen or 0.0) > zero


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        (replace(CENTRAL, statistics="span"), "with 600 images this noise would move the mean of a class by .* 'grad"),
        (
            replace(CENTRAL, epsilon=20.0, delta=1e-8),
            "epsilon = 20 and delta = 1e-08 .* set a larger delta or a smaller",
        ),
        (replace(LOCAL, epsilon=20.0, delta=1e-8), "epsilon = 20 and delta = 1e-08 .* set a larger delta or a smaller"),
        (replace(CENTRAL, epsilon=1e-6, delta=1e-13), "epsilon = 1e-06 and delta = 1e-13 .* set a larger epsilon"),
        (replace(LOCAL, epsilon=1e-6, delta=1e-13), "epsilon = 1e-06 and delta = 1e-13 .* set a larger epsilon"),
        (replace(LOCAL, statistics="span", epsilon=0.001), "epsilon = 0.001 and delta = 1e-05 .* set a larger epsilon"),
    ],
)
def test_sums_whose_noise_will_not_do_are_not_asked_for(settings: Settings, problem: str) -> None:
    asked: list[str] = []

    def wrap(name: str, node: Node) -> Node:
        def answer(message: Message) -> Message:
            asked.append(message.metadata.message_type)
            return node(message)

        return answer

    with pytest.raises(UserError, match=problem):
        federation(600, settings, wrap=wrap)
    assert MessageType.TRAIN not in asked


@pytest.mark.parametrize("settings", [LOCAL, SHARES], ids=["local", "shares"])
def test_a_site_that_is_asked_again_gives_the_same_noised_answer(settings: Settings) -> None:
    """Else the mean of its answers would have less noise. In the first attempt one site is missing."""
    answers: dict[str, list[State]] = {}
    drawn: list[int] = []
    plain = noise.discrete_gaussian

    def counting(count: int, sigma: int, source: Any = None) -> Any:
        drawn.append(count)
        return plain(count, sigma, source)

    def wrap(name: str, node: Node) -> Node:
        def answer(message: Message) -> Message:
            if message.metadata.message_type == MessageType.TRAIN:
                answers.setdefault(name, [])
                if name == "site-0" and not answers[name]:
                    answers[name].append({})
                    return broken(message)
            reply = node(message)
            if message.metadata.message_type == MessageType.TRAIN:
                arrays = reply.content.array_records["arrays"]
                answers[name].append({key: torch.from_numpy(array.numpy()) for key, array in arrays.items()})
            return reply

        return answer

    def broken(message: Message) -> Message:
        return Message(records.write_hello(HELLO), reply_to=message)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(noise, "discrete_gaussian", counting)
        result = federation(600, replace(settings, min_sites=5), wrap=wrap)
    assert len(drawn) == 2 * 5  # a gradient and counts of each site, once
    if settings is LOCAL:
        for name, found in answers.items():
            first, second = found[-2:] if name != "site-0" else (found[-1], found[-1])
            assert all(torch.equal(first[key], second[key]) for key in first)
    assert difference(result, 600).std() > sigma() / 2


HELLO = records.Hello("site-0", "train", "", 1, 0, 0, [], "")


@pytest.mark.parametrize("lie", ["counts", "long", "noised"])
def test_what_no_images_can_give_is_refused(lie: str) -> None:
    settings = LOCAL if lie == "noised" else PLAIN

    def wrap(name: str, node: Node) -> Node:
        def answer(message: Message) -> Message:
            reply = node(message)
            if name == "site-1" and message.metadata.message_type == MessageType.TRAIN:
                arrays = reply.content.array_records["arrays"]
                state = {key: torch.from_numpy(array.numpy()).clone() for key, array in arrays.items()}
                if lie == "counts":
                    state["counts"][0] += COUNTED
                else:
                    state["gradient"][0, 0] += 1000 * WHOLE
                reply.content["arrays"] = records.write_adapter(state)
            return reply

        return answer

    result = federation(600, settings, wrap=wrap)
    assert int(result.state["images"]) == 480


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Federation:
    monkeypatch.setattr(writing, "at_end", lambda *_: "no report")
    return Federation(tmp_path, sites={"north": few(90, 1), "south": few(60, 2), "west": few(75, 3)})


NOISED: dict[str, Any] = {"statistics": "gradient", "dp": "central", "dp_unit": "image", "epsilon": 2.0}


def test_with_the_servers_noise_exact_sums_reach_no_file(study: Federation, capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[State] = []
    plain = noise.noised

    def watching(sums: State, *more: Any) -> State:
        seen.append({name: tensor.clone() for name, tensor in sums.items()})
        return plain(sums, *more)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("fedclip_flwr.exchange.private_sums.noised", watching)
        run = study.run("study", **NOISED)
    writing.write(history.read(run))
    (total,) = seen
    rows = [total["gradient"][0, :3].numpy().tobytes(), total["gradient"][-1, :3].numpy().tobytes()]
    assert files_with(run, *rows) == []
    assert not (run / "sums").exists()
    summary = json.loads((run / "summary.json").read_text())
    assert summary["privacy"] == {"dp": "central", "unit": "image", "epsilon": 2.0, "delta": 1e-5, "shares": False}
    assert summary["contributions"] == {}
    shown = capsys.readouterr().out
    assert "central: the server adds the noise; ε = 2 for each image at δ = 1e-05" in shown
    assert (
        "Privacy of each image against anyone but the server: ε = 2.00 at δ = 1e-05; not covered: image counts" in shown
    )
    assert "ε = 2.00 for each image" in runlist.show([str(run)], None, False)
    assert "privacy of an image: ε" in (run / "report.html").read_text()
    assert "differential privacy of images (central): ε = 2.00" in str(card_of(load_adapter(run)[1], run))
    with pytest.raises(UserError, match="study keeps no sums of its sites, as it has noise or is a gradient"):
        forget.forget("study", "north", study.results, False, print)


@pytest.mark.parametrize(
    ("run", "most", "joins"),
    [
        ({}, 1.0, False),
        (NOISED, 2.0, False),
        (NOISED | {"dp": "local"}, 2.0, True),
        (NOISED | {"dp": "local"}, 1.5, False),
        (NOISED | {"secure_aggregation": True}, 2, True),
    ],
)
def test_a_sites_owner_sets_the_largest_epsilon(
    study: Federation, run: dict[str, Any], most: float, joins: bool
) -> None:
    study.node_config = {"epsilon": most}
    if joins:
        study.run("study", **run)
        return
    with pytest.raises(
        UserError, match=r"this site takes part only in runs that hide each image before anything leaves"
    ):
        study.run("study", **run)


def test_a_gradient_is_used_like_any_result(study: Federation) -> None:
    run = study.run("study", statistics="gradient")
    learner, facts = load_adapter(run)
    assert isinstance(learner, OneGradient)
    assert (facts["kind"], facts["statistics"]) == ("one-round", "gradient")
    assert int(learner.state_dict()["images"]) == sum(
        train for train, *_ in json.loads((run / "summary.json").read_text())["examples"].values()
    )
    with pytest.raises(UserError, match="only exact sums, without noise, can be updated"):
        study.run("", update="study", statistics="gradient")
