"""Which sites are accepted and which are refused, with the reason. On a grid in memory."""

from __future__ import annotations

import pytest
from flwr.app import ConfigRecord, Error, Message, MessageType, RecordDict

from fedclip_flwr.base.errors import UserError
from fedclip_flwr.exchange import records
from fedclip_flwr.exchange.records import Progress
from fedclip_flwr.server import nodes
from tests.server.running import SESSION, Answer, Running, Site


def test_a_site_with_other_code_is_refused_by_name_and_never_asked_again() -> None:
    stale = Site("stale", package="older")
    running = Running({5: Site("north"), 9: stale})
    running.run()
    assert [kind for node, kind in running.grid.asked if node == 9] == ["query"]
    (failure,) = running.nodes.failures
    assert failure.round == 0
    assert failure.site.startswith("stale")
    assert "install the same version" in failure.why
    assert len([line for line in running.said if "stale" in line]) == 1


def test_a_site_may_come_back_as_another_node() -> None:
    """As one without a node key does when it is started again."""
    before, after = Site("south"), Site("south")
    running = Running({5: Site("north"), 9: before})

    def restarts(message: Message) -> Message | None:
        reply = before(message)
        if message.metadata.message_type == MessageType.TRAIN:
            del running.grid.nodes[9]
            running.grid.nodes[7] = after
        return reply

    running.grid.nodes[9] = restarts
    outcome = running.run()
    assert (before.trained_in, after.trained_in) == ([1], [2, 3])
    assert set(outcome.adapted.reports) == {"north", "south"}
    assert not running.nodes.failures


def test_a_site_that_was_mended_is_taken_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nodes, "RETRY_AFTER", 0.0)
    mended = Site("mended")

    def mending(message: Message) -> Message | None:
        if running.recorder.completed:
            return mended(message)
        return Message(Error(2, "there is no such folder"), reply_to=message)

    running = Running({5: Site("north"), 9: mending})
    running.run()
    assert mended.trained_in == [2, 3]
    assert {(f.site, f.why) for f in running.nodes.failures} == {("node 9", "there is no such folder")}
    assert len([line for line in running.said if "node 9" in line]) == 1


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        (Site("north"), "its name is taken by another site"),
        (Site("b", package="other"), "its code differs from the server's (package other, here same)"),
        (
            Site("b", plugins=["mine 2 ff"]),
            "its plug-ins differ (mine 2 ff, here mine 1 ab): install the same versions",
        ),
        (Site("b", plugins=[]), "its plug-ins differ (none, here mine 1 ab)"),
        (Site("south", classes=[0, 2]), "classes outside the 2"),
        (Site("south", train=0, validation=0, test=0), "it has no readable image"),
        (lambda m: Message(Error(2, "no such\nfolder"), reply_to=m), "no such folder"),
        (lambda m: Message(RecordDict(), reply_to=m), "malformed hello"),
        (Site("south", role="chief"), "invalid role: chief"),
        (Site("south", role="holdout"), "invalid role: holdout"),  # with images to train on
        (lambda m: Message(records.write_progress(Progress("south", -1, 5)), reply_to=m), "invalid counts"),
        (lambda m: Message(records.write_progress(Progress("south", 6, 5)), reply_to=m), "6 of 5 images"),
        (lambda m: Message(RecordDict({"progress": ConfigRecord()}), reply_to=m), "malformed progress"),
    ],
)
def test_a_refused_hello_is_named_and_the_others_continue(other: Answer, expected: str) -> None:
    running = Running({5: Site("north"), 9: other})
    running.run()
    assert [expected in failure.why for failure in running.nodes.failures] == [True]
    assert running.recorder.results[-1].round == 3


def test_a_hello_has_the_session_and_later_messages_only_its_key() -> None:
    tasks: list[records.Task] = []

    def listening(message: Message) -> Message | None:
        tasks.append(records.read_task(message.content))
        return Site("north")(message)

    Running({5: listening}).run()
    assert tasks[0].session == SESSION
    assert {(task.session, task.key) for task in tasks[1:]} == {(None, SESSION.key)}


def test_if_no_site_has_anything_to_train_on_the_run_does_not_begin() -> None:
    running = Running({5: Site("north", train=0)})
    with pytest.raises(UserError, match="no site has an example to learn from"):
        running.run()
    assert {kind for _, kind in running.grid.asked} == {"query"}
