"""Rounds with a codec, on a grid in memory: the results are those without one."""

from __future__ import annotations

import pytest
from flwr.app import Error, Message, MessageType

from fedclip_flwr.exchange.records import LACKS
from tests.server.running import Packing, Running, Site


def test_a_run_with_a_codec_sends_parcels_both_ways_with_the_same_result() -> None:
    one = Packing("one")
    plain = Running({5: Site("one"), 9: Site("two", 3.0)})
    packed = Running({5: one, 9: Packing("two", 3.0)}, codec="int8")
    for running in (plain, packed):
        running.run()
    for (number, value), (_, expected) in zip(packed.recorder.completed, plain.recorder.completed, strict=True):
        assert value == pytest.approx(expected, abs=1e-5), number
    assert [bool(base) for base in one.bases] == [False, True, True, True]
    assert not packed.nodes.failures


def test_a_site_that_lost_its_state_is_sent_the_complete_adapter_in_the_same_round() -> None:
    forgetful = Packing("three")
    forgetful.forgets_in = (3,)
    running = Running({5: forgetful, 9: Packing("four")}, codec="int8")
    running.run()
    assert forgetful.trained_in == [1, 2, 3]
    assert running.grid.asked.count((5, "train")) == 4
    assert [value for _, value in running.recorder.completed] == pytest.approx([1.0, 2.0, 3.0], abs=1e-5)
    assert not running.nodes.failures


def test_a_site_that_can_never_build_on_anything_is_left_out() -> None:
    def lost(message: Message) -> Message | None:
        if message.metadata.message_type == MessageType.QUERY:
            return Site("lost")(message)
        return Message(Error(LACKS, "nothing stays here"), reply_to=message)

    running = Running({5: Packing("five"), 9: lost}, codec="int8")
    running.run()
    assert [(f.round, f.site, f.why) for f in running.nodes.failures] == [
        (number, "lost", "nothing stays here") for number in (1, 2, 3)
    ]
