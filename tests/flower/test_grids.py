from __future__ import annotations

from flwr.app import ConfigRecord, Message, MessageType, RecordDict

from fedclip_flwr.flower.grids import local_grid, simulated


def message(node: int, number: int) -> Message:
    return Message(RecordDict({"n": ConfigRecord({"number": number})}), node, MessageType.QUERY)


def test_a_node_answers_when_its_reply_is_pulled_and_once() -> None:
    answered: list[int] = []

    def node(message: Message) -> Message:
        answered.append(int(str(message.content.config_records["n"]["number"])))
        return Message(message.content, reply_to=message)

    grid = local_grid({3: node, 7: node})
    assert [*grid.get_node_ids()] == [3, 7]
    one, other, third = grid.push_messages([message(7, 1), message(3, 2), message(3, 3)])
    assert answered == []
    replies = iter(grid.pull_messages([other, one, "unknown"]))
    reply = next(replies)
    assert answered == [2]
    assert (reply.metadata.reply_to_message_id, reply.metadata.src_node_id) == (other, 3)
    assert [r.metadata.src_node_id for r in replies] == [7]
    assert answered == [2, 1]
    assert [*grid.pull_messages([one, other])] == []
    assert [r.metadata.reply_to_message_id for r in grid.pull_messages([third])] == [third]


def test_sites_of_this_process_count_as_simulated() -> None:
    assert simulated(local_grid({}))
