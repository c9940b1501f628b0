"""Sends an adapter to every site once a round, and waits promptly: what Flower itself costs."""

from __future__ import annotations

import time
from pathlib import Path

from flwr.app import ArrayRecord, Context, Message, MessageType, RecordDict
from flwr.serverapp import Grid, ServerApp

from fedclip_flwr.learning import make_adapter

DIM = 512
PAUSE = 0.1
app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    given = context.run_config
    arrays = ArrayRecord(make_adapter(str(given["adapter"]), DIM).state_dict())
    folder = Path(str(given["results-dir"])) / "latest"
    folder.mkdir()
    while len(nodes := list(grid.get_node_ids())) < int(given["sites"]):
        time.sleep(PAUSE)
    for number in range(1, int(given["num-server-rounds"]) + 1):
        content = RecordDict({"arrays": arrays})
        waiting = set(grid.push_messages([Message(content, node, MessageType.TRAIN) for node in nodes]))
        while waiting:
            for reply in grid.pull_messages(waiting):
                waiting.discard(reply.metadata.reply_to_message_id)
                if reply.has_error():
                    raise RuntimeError(reply.error.reason)
            time.sleep(PAUSE if waiting else 0)
        with (folder / "metrics.jsonl").open("a") as file:
            file.write(f'{{"round": {number}}}\n')
