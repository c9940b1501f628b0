"""What a round with one site weighs, there and back: its tensors, and the messages as Flower serialises them.

    python -m benchmarks.messages

Adapters are those of CLIP ViT-B/32 (512 dimensions, gate of rank 4). The bytes around the tensors are told apart: those
of two messages without content, which are Flower's; and those of our figures and settings and of the tensors' names,
types and shapes. FedAVG of the whole model sends its 151,277,313 numbers in float32 there and back. What goes over the
wire: benchmarks/deployed.py.
"""

from __future__ import annotations

import argparse

from flwr.app import Message, RecordDict

from fedclip_flwr.exchange import Report, records
from fedclip_flwr.exchange.codecs import CODECS, packed_size
from fedclip_flwr.flower.grids import act_as_server
from fedclip_flwr.flower.sizes import message_size
from fedclip_flwr.learning import make_adapter
from fedclip_flwr.learning.adapters import ADAPTERS
from fedclip_flwr.learning.metrics import BINS, Quality, Score
from harness.features import DIM
from harness.machine import machine, table

WHOLE = 2 * 4 * 151_277_313
GOALS = {
    ("attention", "float32"): 285,
    ("attention", "int8"): 1_000,
    ("gate", "float32"): 20_000,
    ("scale", "float32"): 60_000,
}


def bare() -> int:
    """Two messages without content."""
    question = Message(RecordDict(), dst_node_id=2**63, message_type="train")
    question.metadata.__dict__.update(_run_id=2**63, _src_node_id=1, _message_id="0" * 64)
    return message_size(question) + message_size(Message(RecordDict(), reply_to=question))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.messages", description=__doc__.splitlines()[0])
    parser.parse_args()
    act_as_server()
    score = Score(1000, 1000, 1.0)
    report = Report(1000, score, Quality(score, 1.0, 1.0, [0.5] * BINS))
    rows, missed = [], []
    for kind in ADAPTERS:
        state = make_adapter(kind, DIM).state_dict()
        for codec in ("float32", *CODECS):
            one_way = packed_size(codec, state) if codec in CODECS else sum(t.nbytes for t in state.values())
            whole = records.round_size(state, state, codec, "0" * records.MARK, report)
            less, goal = WHOLE / whole, GOALS.get((kind, codec))
            sizes = [f"{size:,}" for size in (2 * one_way, bare(), whole - bare() - 2 * one_way, whole)]
            rows.append([kind, codec, *sizes, f"{less:,.0f}", f"{goal:,}" if goal else ""])
            missed += [f"{kind} in {codec}"] if goal and less < goal else []
    head = ["adapter", "codec", "tensors", "Flower's envelope", "ours", "a site and round", "times less", "to reach"]
    print(table(head, rows))
    print(f"\nBytes there and back; FedAVG of the whole ViT-B/32: {WHOLE:,}. Missed: {', '.join(missed) or 'none'}.")
    print(f"\n{machine()}")


if __name__ == "__main__":
    main()
