"""A run resumed after its last complete round, from its checkpoint; with real processes: tests/test_running.py."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Error, Message, MessageType

from fedclip_flwr.base.errors import UserError
from fedclip_flwr.exchange.records import Report
from fedclip_flwr.learning.metrics import BINS, ClassCounts, Quality, Score
from fedclip_flwr.runs import checkpoint
from fedclip_flwr.runs.checkpoint import Checkpoint
from fedclip_flwr.server import nodes
from fedclip_flwr.server.results import Outcome, RoundResult, RunState
from tests.server.running import Packing, Running, Site


class PowerCutError(BaseException):
    """What happens to a run."""


def saved(running: Running, at: RunState) -> Checkpoint:
    return Checkpoint(
        at, running.nodes.link.residual, running.strategy.memory, running.nodes.record, "key", {"total": 1.5}, [2], []
    )


def interrupted(
    make: Callable[[], Running], path: Path, after: int, change: Callable[[Running], None] = lambda _: None
) -> tuple[Running, Outcome]:
    """The federation, cut off after that round, and gone on with as another process would; and to what it came.

    What sites keep stays there; node ids are others.
    """
    first = make()

    def complete(state: RunState) -> None:
        checkpoint.write(path, saved(first, state))
        if state.round == after:
            raise PowerCutError

    first.recorder.on_complete = complete  # type: ignore[method-assign]
    with pytest.raises(PowerCutError):
        first.run()
    again = make()
    again.grid.nodes = {node + 100: answer for node, answer in sorted(first.grid.nodes.items(), reverse=True)}
    change(again)
    read = checkpoint.read(path)
    assert read is not None
    again.nodes.link.resume(read.state.state, read.residual)
    again.strategy.memory = read.strategy
    again.nodes.resume(read.nodes, again.settings.min_sites)
    return again, again.resume(state=read.state)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"strategy": "fedadam"},
        {"strategy": "fedyogi", "fraction_train": 0.5},
        {"codec": "int8"},
        {"codec": "int8", "strategy": "fedadagrad", "fraction_train": 0.6, "seed": 3},
        {"recipe": "paper"},
        {"early_stop": 2},
    ],
    ids=str,
)
def test_an_interrupted_run_resumes_to_an_identical_result(settings: dict[str, Any], tmp_path: Path) -> None:
    kind = Packing if "codec" in settings else Site

    def federation(keeps: str) -> Running:
        chance = random.Random(5)
        sites = {n: kind(f"{n}", chance.uniform(0.1, 2.0), {0.0: chance.randrange(10)}) for n in range(4)}
        for n, site in sites.items():
            site.keeps = f"{tmp_path.name}-{keeps}-{n}"
        return Running({**sites}, num_server_rounds=6, **settings)

    def timeless(line: RoundResult) -> RoundResult:
        return replace(line, bytes=0, seconds=0.0)

    uninterrupted = federation("uninterrupted")
    truth = uninterrupted.run()
    for after in {1, 2, truth.rounds - 1, truth.rounds}:
        again, outcome = interrupted(partial(federation, f"cut-{after}"), tmp_path / f"{after}", after)
        assert torch.equal(outcome.state["w"], truth.state["w"])
        assert torch.equal(again.nodes.link.state["w"], uninterrupted.nodes.link.state["w"])
        assert outcome.rounds == truth.rounds
        assert again.recorder.completed == uninterrupted.recorder.completed[after:]
        assert (
            list(map(timeless, again.recorder.results)) == list(map(timeless, uninterrupted.recorder.results))[after:]
        )
        assert timeless(outcome.zero_shot) == timeless(truth.zero_shot)
        assert timeless(outcome.adapted) == timeless(truth.adapted)


def standing() -> RunState:
    by_class = ClassCounts([3, 1], [2, 1], [2, 2])
    quality = Quality(Score(4, 3, 0.1 + 0.2), 1 / 3, 0.7, [0.1] * BINS, by_class)
    reports = {"north": Report(5, Score(10, 7, 1e-17), quality)}
    zero = RoundResult(0, reports, {"sea": replace(quality, classes=None)}, 12, 1 / 7)
    best = RoundResult(1, reports, {}, 13, 0.5, holdouts={"far": reports["north"]}, epsilon=0.75)
    state = {"w": torch.rand(3), "v": torch.rand(2, 2)}
    return RunState(2, state, {"w": torch.rand(3), "v": torch.rand(2, 2)}, zero, best, 99, 0.25, 7, 1234)


def full() -> Checkpoint:
    memory = {"m_t/w": torch.rand(3), "v_t/w": torch.rand(3).double()}
    sites = {"sites": {"north": [5, 10, 4]}, "failures": [[1, "n\u00f6rd", "out of memory"]]}
    metrics: list[dict[str, Any]] = [{"round": 0, "seen": 0.1}, {"round": 1, "seen": None}]
    return Checkpoint(standing(), {"w": torch.rand(3)}, memory, sites, "key", {"total": 0.1}, [1], metrics)


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) and one[name].dtype == other[name].dtype for name in one)


def test_a_checkpoint_comes_back_as_it_was(tmp_path: Path) -> None:
    made = full()
    checkpoint.write(tmp_path / "c", made)
    back = checkpoint.read(tmp_path / "c")
    assert back is not None
    for one, other in (
        (back.state.state, made.state.state),
        (back.state.best_state, made.state.best_state),
        (back.residual, made.residual),
        (back.strategy, made.strategy),
    ):
        assert_same(one, other)
    assert replace(back.state, state={}, best_state={}) == replace(made.state, state={}, best_state={})
    assert back[3:] == made[3:]
    assert checkpoint.read(tmp_path / "none") is None


def test_a_checkpoint_of_before_there_were_several_held_out_domains_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, as_facts = full(), checkpoint._as_facts
    assert made.state.zero is not None
    monkeypatch.setattr(
        checkpoint, "_as_facts", lambda result: as_facts(result) | {"unseen": as_facts(result)["unseen"].get("sea")}
    )
    checkpoint.write(tmp_path / "c", made)
    back = checkpoint.read(tmp_path / "c")
    assert back is not None
    assert back.state.zero is not None
    assert back.state.zero.held_out[0] == made.state.zero.held_out[0]
    assert back.state.best is not None
    assert not back.state.best.unseen


def test_what_is_known_of_many_sites_makes_no_header_that_is_too_long_to_be_read(tmp_path: Path) -> None:
    made = full()
    assert made.state.zero is not None
    report = made.state.zero.reports["north"]
    made.state.zero = replace(made.state.zero, reports={f"site-{n}": report for n in range(3000)})
    checkpoint.write(tmp_path / "c", made)
    assert int.from_bytes((tmp_path / "c").read_bytes()[:8], "little") < 2000
    back = checkpoint.read(tmp_path / "c")
    assert back is not None
    assert back.state.zero == made.state.zero


def test_a_damaged_checkpoint_is_reported_wherever_the_damage_is(tmp_path: Path) -> None:
    path = tmp_path / "c"
    checkpoint.write(path, full())
    intact = path.read_bytes()
    chance = random.Random(0)
    for place in [*range(12), *chance.sample(range(len(intact)), 150)]:
        path.write_bytes(intact[:place] + bytes([intact[place] ^ 1 << chance.randrange(8)]) + intact[place + 1 :])
        with pytest.raises(UserError, match=r"can't be read|another version") as error:
            checkpoint.read(path)
        assert "\n" not in str(error.value)
    for length in (0, 7, 100, len(intact) - 1):
        path.write_bytes(intact[:length])
        with pytest.raises(UserError, match="restore it from a backup, or start a new run"):
            checkpoint.read(path)


def test_real_sites_that_are_gone_or_hold_something_else_are_named_and_the_run_continues(tmp_path: Path) -> None:
    def federation() -> Running:
        return Running({1: Site("north"), 2: Site("south"), 3: Site("west")})

    def others(running: Running) -> None:
        running.grid.nodes = {1: Site("north"), 2: Site("south", train=5)}

    again, outcome = interrupted(federation, tmp_path / "c", 1, others)
    assert outcome.rounds == 3
    assert [line for line in again.said if line.startswith("resuming")] == [
        "resuming with other sites than before: south: its images have changed",
        "resuming with other sites than before: west: it is not connected",
    ]


def test_what_was_selected_after_the_last_complete_round_gives_way_to_what_was_selected_before(tmp_path: Path) -> None:
    """A run that goes on with other sites may not select it again."""

    def federation() -> Running:
        return Running({1: Site("north", 1.0, {1.0: 6})})

    def selects_round_2(running: Running) -> None:
        running.recorder.on_selected(2, {}, 1.0)

    again, outcome = interrupted(federation, tmp_path / "c", 2, selects_round_2)
    assert again.recorder.best == [2, 1]
    assert again.recorder.adapter["w"] == outcome.state["w"] == 1.0


def test_rounds_after_a_stop_are_held_against_the_loss_of_the_best_before(tmp_path: Path) -> None:
    def federation() -> Running:
        return Running({1: Site("north", loss={1.0: 3.0, 2.0: 4.0, 3.0: 3.5})})

    again, outcome = interrupted(federation, tmp_path / "c", 2)
    assert (again.recorder.best, outcome.adapted.round) == ([1], 1)


def test_a_site_that_was_gone_before_is_not_waited_for(tmp_path: Path) -> None:
    def federation() -> Running:
        south = Site("south")
        running = Running({1: Site("north"), 2: south})

        def leaves(message: Message) -> Message | None:
            reply = south(message)
            if message.metadata.message_type == MessageType.TRAIN:
                del running.grid.nodes[2]
            return reply

        running.grid.nodes[2] = leaves
        return running

    again, _ = interrupted(federation, tmp_path / "c", 1)
    assert not [line for line in again.said if line.startswith("resuming")]


def test_simulated_sites_must_be_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fewer(running: Running) -> None:
        monkeypatch.setattr(nodes, "simulated", lambda grid: True)
        running.grid.nodes = {1: Site("north")}

    with pytest.raises(UserError, match="simulate 2 sites"):
        interrupted(lambda: Running({1: Site("north"), 2: Site("south")}), tmp_path / "c", 1, fewer)


def test_what_went_wrong_before_is_still_known_and_who_failed_last_is_not_asked_at_the_end(tmp_path: Path) -> None:
    def federation() -> Running:
        south = Site("south")

        def broken(message: Message) -> Message | None:
            if message.metadata.message_type == MessageType.QUERY:
                return south(message)
            return Message(Error(2, "out of memory"), reply_to=message)

        return Running({1: Site("north"), 2: broken}, num_server_rounds=2)

    again, outcome = interrupted(federation, tmp_path / "c", 2)
    assert [tuple(failure) for failure in again.nodes.failures] == [(n, "south", "out of memory") for n in (1, 2)]
    assert [kind for node, kind in again.grid.asked if node == 102] == ["query"]
    assert outcome.adapted.reports.keys() == {"north"}


def test_traffic_is_counted_over_both_parts(tmp_path: Path) -> None:
    def federation() -> Running:
        return Running({1: Site("north")})

    uninterrupted = federation()
    truth = uninterrupted.run()
    again, outcome = interrupted(federation, tmp_path / "c", 2)
    assert outcome.site_round_bytes == truth.site_round_bytes
    hello = again.nodes.traffic.both - uninterrupted.nodes.traffic.both  # the site was greeted twice
    assert 0 < hello < truth.site_round_bytes
