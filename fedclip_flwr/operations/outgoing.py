"""What one round would send from a site, made and shown on its own machine, and not sent: `--show-outgoing`.

The server's own loop runs for one round with this site alone (with secure aggregation, two others are played), over a
wire that ends in this process; the site's own app answers, as it would anywhere. So what is shown is what would leave,
made by the code that would make it.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from flwr.app import Array, ArrayRecord, Context, Message, MessageType, RecordDict

from fedclip_flwr.base import Settings, UserError, content, files, tensorfile
from fedclip_flwr.base.roles import TRAIN
from fedclip_flwr.base.tensors import State
from fedclip_flwr.base.text import bytes_of, counted
from fedclip_flwr.exchange import Hello, Report, Session, records
from fedclip_flwr.exchange.link import Downlink, forget
from fedclip_flwr.exchange.secure import site as secure
from fedclip_flwr.features import open_features
from fedclip_flwr.features.opening import new_learner, told_by_server
from fedclip_flwr.flower.grids import RUN, Node, local_grid
from fedclip_flwr.flower.pinned import own_client_app
from fedclip_flwr.flower.sizes import message_size
from fedclip_flwr.learning.metrics import BINS, Quality, Score
from fedclip_flwr.server import RoundResult, RunState
from fedclip_flwr.server.loop import RoundLoop
from fedclip_flwr.server.nodes import Nodes
from fedclip_flwr.server.strategy import AdapterFedAvg
from fedclip_flwr.site.context import settings_at

NODE = 2**63
"""An id as long as Flower's are."""
SCORE = "examples, how many were right, their summed loss"
MEANINGS = {
    "site": "its name",
    "role": "whether it trains",
    "domain": "what its images are",
    "train": "images to train on",
    "validation": "images to choose a round by",
    "test": "images to test with",
    "classes": "the classes that it has images of, by number",
    "package": "content of the software here",
    "unit_length": "whether its features were brought to unit length",
    "encoded": "images encoded so far",
    "images": "images in all",
    "num-examples": "images that were trained on",
    "test-classes": "for each class: test images, right ones, how often it was found",
    "public": "two public keys, for this round only",
    "to": "to whom, by number",
    "letters": "encrypted for them",
    "of": "of whom, by number",
    "pieces": "of their secrets",
    "digests": "SHA-256 of both pieces for each",
    "seed": "SHA-256 of the secret that is shared",
}
"""What each value is."""
FIGURES = {
    "validation": SCORE,
    "test": f"{SCORE}, balanced accuracy, macro F1, and for each of 15 bins: confidence less right answers",
}
NOTHING_ELSE = """\
Nothing else that was made of this site's images leaves it: no image, no feature, no image's label, no file's name.
Bytes are those of the messages as Flower serialises them. Besides, Flower tells which node it is for which run, its
public key with a signature, that it is there, and how long an answer took. If something goes wrong, one line says what,
in place of an answer; it may name a file. Each answer is held against one list before it leaves: may_leave, in
fedclip_flwr/exchange/records.py, and with secure aggregation ANSWERS, in fedclip_flwr/exchange/secure/protocol.py."""


class Sent(NamedTuple):
    """An answer of the site's, and what it answers to."""

    kind: str
    round: int
    came: int
    leaves: int
    records: Mapping[str, Any]
    error: str


def recorded(node: Node, sent: list[Sent]) -> Node:
    """The node, whose answers are recorded."""

    def answer(message: Message) -> Message:
        reply = node(message)
        number = records.read_task(message.content).round
        leaving = {} if reply.has_error() else dict(reply.content)  # the server will unpack what it gets
        error = records.reason(reply) if reply.has_error() else ""
        sizes = message_size(message), message_size(reply)
        sent.append(Sent(message.metadata.message_type, number, *sizes, leaving, error))
        return reply

    return answer


class _Other:
    """A site that learns nothing: with secure aggregation there must be others."""

    def __init__(self, name: str, package: str) -> None:
        self._hello = Hello(name, TRAIN, "", train=1, validation=0, test=0, classes=[], package=package)
        self._memory = RecordDict().config_records

    def __call__(self, message: Message) -> Message:
        kind, content = message.metadata.message_type, message.content
        none = Score(0, 0, 0.0)
        report = Report(1, none, Quality(none, 0.0, 0.0, [0.0] * BINS))
        if kind == MessageType.QUERY:
            answer = records.write_hello(self._hello)
        elif kind == MessageType.EVALUATE:
            answer = records.write_answer(report)
        elif kind == MessageType.TRAIN:
            arrays = content.array_records["arrays"]
            state = {name: torch.from_numpy(array.numpy()) for name, array in arrays.items()}
            answer = records.write_answer(report, secure.masked(content, self._memory, state, state))
        else:
            answer = secure.STEPS[kind.removeprefix("query.")](content, self._memory)
        return Message(answer, reply_to=message)


@dataclass(frozen=True)
class _Nobody:
    """Watches a run, and keeps nothing of it."""

    def result(self, result: RoundResult) -> None: ...

    def selected(self, number: int, state: State, blend: float) -> None: ...

    def complete(self, state: RunState) -> None: ...


def show(run: Settings, node: Mapping[str, Any], out: str, tell: Callable[[str], None]) -> bool:
    """Tells what would leave, and writes all of it to the folder `out` if there is one; whether no answer is an error.

    `run` are the run's settings as far as they are known here.
    """
    folder = _empty(Path(out).expanduser().absolute()) if out else None
    sent = round_of(run, node)
    tell("What a run of one round would send from this site. Nothing is sent: the server's part is played here.")
    for number, message in enumerate(sent, 1):
        tell(f"\n{number}. {_described(message)}")
        if folder:
            _write(folder / f"{number}-{message.kind.replace('.', '-')}", message)
    total = sum(message.leaves for message in sent)
    tell(f"\n{counted(len(sent), 'message')}, {bytes_of(total)}.\n{NOTHING_ELSE}")
    if folder:
        tell(f"All of it, number by number: {folder}")
    return not any(message.error for message in sent)


def round_of(run: Settings, node: Mapping[str, Any]) -> list[Sent]:
    """All that this site answers in a run of one round."""
    settings, told = settings_at(run.as_run_config(), node), told_by_server(run)
    run = replace(run, secure_aggregation=settings.secure_aggregation)  # in another one, this site takes no part
    features = open_features(settings, told)
    holdout = "" if run.holdout == "auto" else run.holdout
    name = f"show-outgoing-{os.getpid()}"
    session = Session(holdout, told or features.vocabulary, features.model_content or "", name)
    start = {key: tensor.clone() for key, tensor in new_learner(settings, features).state_dict().items()}
    app = own_client_app()
    link, package = Downlink(start, run.codec, run.seed), content.of_package(content.memory())
    context = Context(RUN, NODE, dict(node), RecordDict(), run.as_run_config())
    sent: list[Sent] = []
    sites: dict[int, Node] = {NODE: recorded(lambda message: app(message, context), sent)}
    if settings.secure_aggregation:
        sites |= {NODE + n: _Other(f"another site ({n})", package) for n in (1, 2)}
    with _leaving_nothing(session):
        grid, endless = local_grid(sites), sys.float_info.max
        nodes = Nodes(grid, link, session=session, package=package, timeout=endless, say=lambda _: None)
        while nodes.meet() and not nodes.failures:  # a site that is encoding is asked again
            pass
        if nodes.hellos and not nodes.failures:
            once = replace(run, num_server_rounds=1, fraction_train=1.0, min_sites=0, dp="off")  # asked once
            with suppress(UserError):  # no site has trained: this one only evaluates, or has answered with an error
                strategy = AdapterFedAvg(start, nodes.names, once)
                RoundLoop(nodes, strategy, once, start, lambda *_: {}, _Nobody()).run()
    return [message for message, later in zip(sent, [*sent[1:], None], strict=True) if not _again(message, later)]


def _again(message: Sent, later: Sent | None) -> bool:
    """Whether the same is said once more: a site that encodes tells now and then how far it has come."""
    return later is not None and "progress" in message.records and "progress" in later.records


@contextmanager
def _leaving_nothing(session: Session) -> Iterator[None]:
    """What a site keeps for a session is gone afterwards."""
    try:
        yield
    finally:
        session.forget(content.memory())
        forget(session.key)
        shutil.rmtree(files.home() / "personal" / content.file_name(session.run), ignore_errors=True)


def _described(message: Sent) -> str:
    asks = {
        "query": "Who is there?",
        "query.keys": "What are your public keys for this round?",
        "query.shares": "What of your secrets do you give to others, in letters that only they can open?",
        "train": "How good is this adapter, and what do you make of it?",
        "query.unmask": "What do you have of the secrets of others, to take the masks from the sum?",
    }
    ask = asks.get(message.kind, "How good is this adapter?")
    came, leaves = bytes_of(message.came), f"{message.leaves:,} bytes leave"
    lines = [f"{ask} ({message.kind.upper()}, {came} come, {leaves})"]
    if message.error:
        lines.append(f"   an error: {message.error}")
    for name, record in message.records.items():
        lines.append(f"   {name}")
        meanings = MEANINGS if name in ("hello", "progress") else MEANINGS | FIGURES
        rows = [(key, _value(value), meanings.get(key, "")) for key, value in record.items()]
        width = max((len(key) for key, *_ in rows), default=0)
        lines += [f"     {key:<{width}}  {value}" + f"  ({what})" * bool(what) for key, value, what in rows]
    return "\n".join(lines)


def _value(value: object) -> str:
    if isinstance(value, bytes):
        return f"{len(value)} bytes"
    if isinstance(value, list) and value and isinstance(value[0], bytes):
        return f"{', '.join(str(len(one)) for one in value)} bytes"
    if not isinstance(value, Array):
        return str(value)
    numbers = torch.from_numpy(value.numpy()).double()
    told = f"{value.dtype}{list(value.shape)}, {len(value.data):,} bytes"
    if not numbers.numel():
        return told
    spread = f"mean {numbers.mean():.3g}, deviation {numbers.std(correction=0):.3g}"
    return f"{told}: {numbers.min():.3g} to {numbers.max():.3g}, {spread}"


def _empty(folder: Path) -> Path:
    if any(files.make_folder(folder, "--out").iterdir()):
        raise UserError(f"--out: {folder} holds something already: name another folder")
    return folder


def _write(path: Path, message: Sent) -> None:
    """The records as JSON, the tensors beside them."""
    arrays = next((record for record in message.records.values() if isinstance(record, ArrayRecord)), ArrayRecord())
    others = {name: dict(record) for name, record in message.records.items() if not isinstance(record, ArrayRecord)}
    facts = {"kind": message.kind, "round": message.round, "bytes": message.leaves, "error": message.error}
    text = json.dumps(
        {**facts, "records": others, "tensors": sorted(arrays)}, indent=2, ensure_ascii=False, default=bytes.hex
    )
    path.with_suffix(".json").write_text(f"{text}\n", encoding="utf-8")
    if arrays:
        tensors = {key: torch.from_numpy(value.numpy()) for key, value in arrays.items()}
        tensorfile.save(tensors, path.with_suffix(".safetensors"), {})
