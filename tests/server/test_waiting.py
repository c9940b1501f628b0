"""Which sites the server waits for at the start, and for how long. On a grid in memory."""

from __future__ import annotations

import pytest
from flwr.app import Message, MessageType

from fedclip_flwr.base.errors import UserError
from fedclip_flwr.exchange import records
from fedclip_flwr.exchange.records import Progress
from fedclip_flwr.server import nodes, waiting
from tests.server.running import Answer, Clock, Running, Site


def answering_after(running: Running, clock: Clock, seconds: float, answer: Answer) -> Answer:
    """A node that takes this many seconds to answer."""

    def slow(message: Message) -> Message | None:
        if reply := answer(message):
            clock.later(seconds, lambda: running.grid.late(reply))
        return None

    return slow


def test_the_more_messages_are_under_way_the_seldomer_flower_is_asked(clock: Clock) -> None:
    pauses: list[float] = []
    wait = waiting.Wait(timeout=60.0)
    for under_way in (1, 40, 1000, 100_000):
        wait.answered()
        before = clock.now
        wait.pause(under_way)
        pauses.append(clock.now - before)
    assert pauses == pytest.approx([0.01, 0.01, 0.25, 25.0])


def test_too_few_sites_end_the_run_in_words() -> None:
    with pytest.raises(UserError, match=r": 1, min-sites = 2"):
        Running({5: Site("north")}, min_sites=2).run()


def test_simulated_sites_are_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nodes, "simulated", lambda grid: True)
    with pytest.raises(UserError, match=r"after 0 s: 1, min-sites = 2 are needed: simulate more"):
        Running({5: Site("north")}, min_sites=2, round_timeout=600.0).run()


def test_holdout_sites_do_not_count_among_those_that_are_needed() -> None:
    west = Site("west", role="holdout", train=0, validation=0)
    with pytest.raises(UserError, match=r": 1, min-sites = 2"):
        Running({5: Site("north"), 9: west}, min_sites=2).run()


def test_sites_that_encode_are_asked_again_and_waited_for_as_long_as_they_get_on(clock: Clock) -> None:
    """The slow site needs 40 questions, more than fit into the time that a site without progress is given."""
    north, slow = Site("north"), Site("slow")
    quick = Site("quick")

    def encoding(site: Site, slices: int, images: int) -> Answer:
        asked = 0

        def answer(message: Message) -> Message | None:
            nonlocal asked
            if message.metadata.message_type == MessageType.QUERY and asked < slices:
                asked += 1
                return Message(
                    records.write_progress(Progress(site.hello.site, images * asked, 1000)), reply_to=message
                )
            return site(message)

        return answer

    running = Running({5: north, 7: encoding(quick, 1, 900), 9: encoding(slow, 40, 10)}, round_timeout=0.05)
    running.run()
    assert clock.now > 0.05
    assert slow.trained_in == quick.trained_in == [1, 2, 3]
    assert not running.nodes.failures


def test_a_site_that_does_not_get_on_with_encoding_is_not_waited_for() -> None:
    def stuck(message: Message) -> Message | None:
        return Message(records.write_progress(Progress("stuck", 7, 400)), reply_to=message)

    running = Running({5: Site("north"), 9: stuck})
    running.run()
    assert set(running.nodes.hellos) == {"north"}
    assert "stuck: 7 of 400 images encoded" in running.nodes.readiness


def test_a_node_that_does_not_answer_its_hello_holds_up_the_start_no_longer_than_a_working_site_would(
    clock: Clock,
) -> None:
    """A site that encodes answers after a minute; another minute is given to it for its start."""
    running = Running({5: Site("north"), 7: lambda _: None, 9: lambda _: None}, round_timeout=600.0)
    running.nodes.wait_for(1)
    assert 120 <= clock.now < 125
    assert running.said[-1] == (
        "continuing without node 7, node 9: no answer to the hello so far; a site that answers joins from the next "
        "round on"
    )
    assert not running.nodes.failures


def test_a_node_that_answers_its_hello_after_the_start_takes_part(clock: Clock) -> None:
    late = Site("late")
    running = Running({5: Site("north")}, round_timeout=600.0)
    running.grid.nodes[9] = answering_after(running, clock, 130.0, late)
    running.nodes.wait_for(1)
    assert set(running.nodes.hellos) == {"north"}
    running.grid.nodes[9] = late
    clock.sleep(10.0)
    running.resume()
    assert late.trained_in == [1, 2, 3]


def test_a_node_that_does_not_answer_is_waited_for_where_sites_are_missing(clock: Clock) -> None:
    running = Running({5: Site("north"), 9: lambda _: None}, round_timeout=600.0, min_sites=2)
    with pytest.raises(UserError, match=r"after 60\d s: 1, min-sites = 2"):
        running.nodes.wait_for(2)


def test_a_node_that_does_not_answer_is_waited_for_where_it_may_be_a_site_of_before(clock: Clock) -> None:
    running = Running({5: Site("north")}, round_timeout=600.0)
    running.grid.nodes[9] = answering_after(running, clock, 500.0, Site("south"))
    running.nodes.wait_for(1, expected=["north", "south"])
    assert set(running.nodes.hellos) == {"north", "south"}
    assert not [line for line in running.said if "continuing without" in line]


def test_a_site_that_reports_progress_after_each_slice_is_waited_for(clock: Clock) -> None:
    """Six slices of a minute, each reported some seconds late."""
    site, slices = Site("slow"), list[int]()

    def encoding(message: Message) -> Message | None:
        if message.metadata.message_type == MessageType.QUERY and len(slices) < 6:
            slices.append(len(slices))
            return Message(records.write_progress(Progress("slow", 10 * len(slices), 100)), reply_to=message)
        return site(message)

    running = Running({5: Site("north")}, round_timeout=600.0)
    running.grid.nodes[9] = answering_after(running, clock, 70.0, encoding)
    running.nodes.wait_for(1)
    assert set(running.nodes.hellos) == {"north", "slow"}


def test_a_simulated_site_is_waited_for_till_the_timeout(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nodes, "simulated", lambda grid: True)
    running = Running({5: Site("north")}, round_timeout=600.0)
    running.grid.nodes[9] = answering_after(running, clock, 500.0, Site("south"))
    running.nodes.wait_for(1)
    assert set(running.nodes.hellos) == {"north", "south"}
