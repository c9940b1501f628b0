"""The two ends of a link, without a grid between them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, RecordDict

from fedclip_flwr.base import files
from fedclip_flwr.base.tensors import State
from fedclip_flwr.exchange import records
from fedclip_flwr.exchange.codecs import CODECS
from fedclip_flwr.exchange.link import Downlink, SiteCache, StatesInMemory, StatesOnDisk, forget
from fedclip_flwr.exchange.records import ExchangeError, LacksError, Task, mark_of, write_adapter
from fedclip_flwr.learning.adapters import make_adapter

START = make_adapter("gate", 64, identity=False).state_dict()


def moved(state: State, by: float) -> State:
    return {
        name: tensor + by * torch.linspace(-1, 1, tensor.numel()).view(tensor.shape) for name, tensor in state.items()
    }


def sent(link: Downlink, node: int, state: State | None = None) -> RecordDict:
    """The content that is sent to the node."""
    config = ConfigRecord({"session": "s", "server-round": 1})
    whole = RecordDict({"arrays": write_adapter(state or link.state), "config": config})
    message = Message(whole, node, MessageType.TRAIN)
    link.address([message], state or link.state)
    return message.content


def taken(content: RecordDict, site: str = "a", codec: str = "int8") -> State:
    """The state that the site reads from it."""
    return SiteCache(StatesOnDisk(site), codec).take(records.read_task(content), START, lambda: START)


def packed(session: str, codec: str, trained: State, received: State, site: str, number: int) -> State:
    """The tensors that the site sends for the state that it trained from the received one."""
    cache = SiteCache(StatesOnDisk(session), codec)
    cache.take(Task(number, None, "s", False, None, "", "", write_adapter(received)), START, lambda: START)
    return cache.pack(trained, site, number, 0)


def answered(link: Downlink, node: int, state: State | None = None, **records: Any) -> Message:
    reply = Message(RecordDict(records), reply_to=Message(RecordDict(), node, MessageType.TRAIN))
    link.receive(reply, state or link.state)
    return reply


def equal(one: State, other: State) -> bool:
    return all(torch.equal(one[name], other[name]) for name in START)


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FEDCLIP_HOME", str(tmp_path))
    return tmp_path


def test_float32_sends_complete_adapters_and_keeps_nothing(own_home: Path) -> None:
    link = Downlink(START, "float32", 0)
    wished = moved(START, 0.1)
    assert link.advance(wished, 1) is wished
    content = sent(link, 5)
    assert "state" not in content["config"]
    assert equal(taken(content, codec="float32"), wished)
    assert packed("a", "float32", wished, START, "north", 1) is wished
    assert not any(own_home.iterdir())


@pytest.mark.parametrize("codec", CODECS)
def test_a_site_makes_the_first_adapter_itself_and_gets_parcels_from_then_on(codec: str) -> None:
    link, wished = Downlink(START, codec, 0), START
    for number in range(4):
        content = sent(link, 5)
        assert set(content) == ({"config", "arrays"} if number else {"config"})
        assert number == 0 or set(content["arrays"]) == {codec}
        assert equal(taken(content, codec=codec), link.state)
        answered(link, 5)
        wished = moved(wished, 0.1)
        link.advance(wished, number + 1)
    for name, tensor in wished.items():  # what rounding took away came later
        torch.testing.assert_close(link.state[name], tensor, rtol=0, atol=2e-3)


def test_what_a_site_has_is_not_sent_again() -> None:
    link = Downlink(START, "int8", 0)
    best = moved(START, 0.3)
    assert equal(taken(sent(link, 5, best)), best)
    answered(link, 5, best)
    content = sent(link, 5, best)
    assert set(content) == {"config"}
    assert equal(taken(content), best)
    assert set(sent(link, 5)) == {"config", "arrays"}  # it no longer has the first one


def test_a_site_that_missed_a_round_gets_the_complete_adapter() -> None:
    link = Downlink(START, "int8", 0)
    link.advance(moved(START, 0.1), 1)
    answered(link, 5)
    for number in (2, 3):
        link.advance(moved(START, 0.1 * number), number)
    content = sent(link, 5)
    assert set(content["arrays"]) == set(START)
    assert equal(taken(content), link.state)


def test_a_site_that_lacks_a_parcels_base_says_so_and_gets_the_complete_adapter() -> None:
    link = Downlink(START, "int8", 0)
    for number in (1, 2):
        link.advance(moved(START, 0.1 * number), number)
        answered(link, 5)
    link.advance(moved(START, 0.3), 3)
    content = sent(link, 5)
    with pytest.raises(LacksError):
        taken(content)
    link.lacks(5)
    assert equal(taken(sent(link, 5)), link.state)


def test_a_parcel_that_comes_again_is_taken_again_and_no_more_is_kept_than_that_takes(own_home: Path) -> None:
    """As in a round that is repeated, or to a second site on the same machine."""
    link, marks = Downlink(START, "int8", 0), list[str]()
    for number in (1, 2, 3):
        link.advance(moved(START, 0.1 * number), number)
        marks.append(mark_of(link.state))
        content = sent(link, 5)
        for _ in range(2):
            assert equal(taken(content), link.state)
        answered(link, 5)
    assert {path.stem for path in (own_home / "exchange" / "a").iterdir()} == {*marks[1:]}


def test_a_site_that_would_make_something_else_of_it_says_so() -> None:
    """Such as one whose first adapter comes out otherwise, or whose disk has rotted."""
    link = Downlink(moved(START, 1e-6), "int8", 0)
    with pytest.raises(LacksError):
        taken(sent(link, 5))
    taken(sent(link, 5, moved(START, 0.1)))
    kept = next(Path(files.home() / "exchange" / "a").glob("*.safetensors"))
    whole = bytearray(kept.read_bytes())
    whole[-1] ^= 1
    kept.write_bytes(whole)
    with pytest.raises(LacksError, match="differs from the one"):
        taken(RecordDict({"config": ConfigRecord({"state": kept.stem})}))


@pytest.mark.parametrize(
    ("records", "expected"),
    [
        ({}, "lacks the adapter"),
        ({"config": {"state": "../../etc/passwd"}}, "invalid adapter mark"),
        ({"config": {"state": "01", "base": mark_of(START)}}, "lacks the difference"),
        ({"config": {"state": "01", "base": mark_of(START)}, "arrays": START}, "lacks int8"),
        ({"config": {"state": "01", "base": mark_of(START)}, "arrays": {"int8": torch.zeros(9)}}, "expected uint8"),
    ],
)
def test_a_message_that_will_not_do_is_refused(records: dict[str, Any], expected: str) -> None:
    record = RecordDict({"config": ConfigRecord(records.get("config", {}))})
    if "arrays" in records:
        record["arrays"] = write_adapter(records["arrays"])
    with pytest.raises(ExchangeError, match=expected):
        taken(record)


@pytest.mark.parametrize("codec", CODECS)
def test_what_a_site_sends_builds_on_what_it_was_sent(codec: str) -> None:
    link = Downlink(START, codec, 0)
    received = link.advance(moved(START, 0.1), 1)
    trained = moved(received, 0.05)
    parcel = packed("a", codec, trained, received, "north", 2)
    assert set(parcel) == {codec}
    reply = answered(link, 5, arrays=write_adapter(parcel))
    arrays = reply.content["arrays"]
    assert isinstance(arrays, ArrayRecord)
    for name, tensor in records.read_adapter(arrays, START).items():
        torch.testing.assert_close(tensor, trained[name], rtol=0, atol=0.05 / 127 + 1e-6)


def test_what_a_site_could_not_send_goes_with_the_next_round_whatever_process_that_is(own_home: Path) -> None:
    """Also when a round is done once more: then what was left over before it counts."""
    trained = moved(START, 0.05)
    first = packed("a", "int8", trained, START, "north/1", 1)
    second = packed("a", "int8", trained, START, "north/1", 2)
    again = packed("a", "int8", trained, START, "north/1", 2)
    fresh = packed("b", "int8", trained, START, "north/1", 2)
    other = packed("a", "int8", trained, START, "south", 2)
    assert torch.equal(second["int8"], again["int8"])
    assert not torch.equal(second["int8"], fresh["int8"])
    assert not torch.equal(first["int8"], other["int8"])
    for number in (3, 4, 5):
        packed("a", "int8", trained, START, "north/1", number)
    (folder,) = (own_home / "exchange" / "a").glob("north*")
    assert sorted(path.stem for path in folder.iterdir()) == ["4", "5"]


def test_a_damaged_residual_is_lost_and_no_more(own_home: Path) -> None:
    trained = moved(START, 0.05)
    fresh = packed("b", "int8", trained, START, "north", 2)
    packed("a", "int8", trained, START, "north", 1)
    (own_home / "exchange" / "a" / "north" / "1.safetensors").write_bytes(b"rotten")
    assert torch.equal(packed("a", "int8", trained, START, "north", 2)["int8"], fresh["int8"])


def test_numbers_that_are_not_finite_are_not_sent_and_not_kept(own_home: Path) -> None:
    trained = {**START, "inner.bias": torch.full((4,), float("nan"))}
    with pytest.raises(ExchangeError, match="not finite"):
        packed("a", "int8", trained, START, "north", 1)
    assert not any(own_home.rglob("1.safetensors"))


def states_of(kind: str) -> Callable[[], StatesOnDisk | StatesInMemory]:
    """Makes what several processes have of one session."""
    here = StatesInMemory()
    return lambda: StatesOnDisk("s") if kind == "disk" else here


@pytest.mark.parametrize("kind", ["disk", "memory"])
def test_what_two_processes_make_of_noise_at_once_is_made_once(kind: str) -> None:
    states = states_of(kind)

    def once(number: int, make: Callable[[], object] = lambda: None) -> State:
        def made() -> State:
            make()
            return {"sums": torch.tensor([number])}

        return SiteCache(states(), "float32").once("north", "asked", made)

    inner: list[State] = []
    outer = once(1, lambda: inner.append(once(2)))  # the other process is faster
    assert outer["sums"].tolist() == inner[0]["sums"].tolist() == once(3)["sums"].tolist() == [2]
    assert outer.keys() == {"sums"}


@pytest.mark.parametrize("kind", ["disk", "memory"])
def test_who_asks_for_other_noise_gets_no_second_answer(kind: str) -> None:
    states = states_of(kind)

    def once(asked: str) -> State:
        return SiteCache(states(), "float32").once("north", asked, lambda: {"sums": torch.tensor([len(asked)])})

    assert once("more")["sums"].tolist() == [4]
    with pytest.raises(ExchangeError, match="only once in a run"):
        once("less of it")
    assert once("more")["sums"].tolist() == [4]


def test_a_damaged_noised_answer_is_not_made_again(own_home: Path) -> None:
    cache = SiteCache(StatesOnDisk("s"), "float32")
    cache.once("north", "asked", lambda: {"sums": torch.tensor([1])})
    (path,) = own_home.rglob("north.safetensors")
    path.write_bytes(b"?")
    with pytest.raises(ExchangeError, match="only once in a run"):
        cache.once("north", "asked", lambda: {"sums": torch.tensor([2])})


def test_a_parcel_of_another_size_is_refused() -> None:
    link = Downlink(START, "int8", 0)
    for bad in ({"int8": torch.zeros(7, dtype=torch.uint8)}, START):
        with pytest.raises(ExchangeError):
            answered(link, 5, arrays=write_adapter(bad))


def test_sites_forget_a_session_that_is_over_and_old_ones(own_home: Path) -> None:
    import os

    for name in ("over", "running", "old"):
        taken(RecordDict({"arrays": write_adapter(START), "config": ConfigRecord({})}), name)
    os.utime(own_home / "exchange" / "old", (0, 0))
    forget("over")
    assert [folder.name for folder in (own_home / "exchange").iterdir()] == ["running"]


def test_a_task_without_a_mark_is_a_complete_adapter() -> None:
    task = Task(1, None, "s", False, None, "", "", write_adapter(moved(START, 0.2)))
    assert equal(SiteCache(StatesOnDisk("a"), "int8").take(task, START, lambda: START), moved(START, 0.2))
    kept = files.home() / "exchange" / "a" / f"{mark_of(moved(START, 0.2))}.safetensors"
    assert kept.exists()


def test_a_parcel_that_leads_to_numbers_that_are_not_finite_is_refused_though_its_mark_is_right() -> None:
    count = sum(tensor.numel() for tensor in START.values())
    parcel = write_adapter({"bfloat16": torch.full((count,), torch.nan, dtype=torch.bfloat16).view(torch.uint8)})
    made = {name: torch.full_like(tensor, torch.nan) for name, tensor in START.items()}
    config = ConfigRecord({"state": mark_of(made), "base": mark_of(START)})
    with pytest.raises(ExchangeError, match="not finite"):
        taken(RecordDict({"arrays": parcel, "config": config}), codec="bfloat16")


def test_what_rounding_takes_from_small_steps_adds_up_and_is_sent() -> None:
    """In bfloat16, steps of 1 + 2⁻⁹ arrive as 1; the third brings what is left of the first two along, 2⁻⁸."""
    link = Downlink({"w": torch.zeros(1)}, "bfloat16", 0)
    for number in (1, 2, 3):
        link.advance({"w": link.state["w"] + 1 + 2**-9}, number)
    assert link.state["w"].tolist() == [3 + 2**-7]
    assert link.residual["w"].tolist() == [-(2**-9)]


def test_a_site_that_has_the_latest_adapter_is_sent_an_earlier_one_in_full() -> None:
    link, best = Downlink(START, "int8", 0), moved(START, 0.3)
    link.advance(moved(START, 0.1), 1)
    taken(sent(link, 5))
    answered(link, 5)
    link.advance(moved(START, 0.2), 2)
    content = sent(link, 5, best)
    assert set(content["arrays"]) == set(START)
    assert equal(taken(content), best)


def test_sites_round_by_chances_of_their_own_in_each_round() -> None:
    """If all rounded the same numbers in the same direction, their mean would be no nearer than each of them."""
    trained = moved(START, 0.05)
    parcels = [
        packed(f"{site} {number}", "int8", trained, START, site, number)["int8"]
        for site, number in (("north", 1), ("south", 1), ("north", 2))
    ]
    assert not any(torch.equal(parcels[one], parcels[other]) for one, other in ((0, 1), (0, 2), (1, 2)))
