"""`--show-outgoing`: what one round would send from a site, made and shown on its own machine, without sending it.

The server's own loop runs for one round with this site alone (with secure aggregation, two more sites are simulated),
over a grid in this process; the site's own app answers, as in any run. So the same code makes what is shown and what is
sent.
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
from fedclip_flwr.base.settings import ONE_ROUND
from fedclip_flwr.base.tensors import State
from fedclip_flwr.base.text import bytes_of, counted
from fedclip_flwr.exchange import Hello, Report, Session, records
from fedclip_flwr.exchange.link import Downlink, forget
from fedclip_flwr.exchange.secure import site as secure
from fedclip_flwr.features import open_features
from fedclip_flwr.features.opening import new_learner, server_vocabulary
from fedclip_flwr.flower.grids import RUN, Node, local_grid
from fedclip_flwr.flower.pinned import own_client_app
from fedclip_flwr.flower.sizes import message_size
from fedclip_flwr.learning import Examples
from fedclip_flwr.learning.lora import A, B
from fedclip_flwr.learning.metrics import BINS, Quality, Score
from fedclip_flwr.learning.sums import sums_of
from fedclip_flwr.server import RoundResult, RunState
from fedclip_flwr.server.loop import RoundLoop
from fedclip_flwr.server.nodes import Nodes
from fedclip_flwr.server.one_round import strategy_of
from fedclip_flwr.site.context import settings_at

NODE = 2**63
"""An id as long as Flower's are."""
SCORE = "number of examples, of correct ones, their summed loss"
MEANINGS = {
    "site": "its name",
    "role": "trains, or only evaluates",
    "domain": "the domain of its images",
    "train": "images to train on",
    "validation": "images for selecting a round",
    "test": "images to test with",
    "classes": "numbers of the classes that it has images of",
    "package": "content hash of the software here",
    "plugins": "plug-ins used here, each with its version and content hash",
    "content": "with exact sums: a mark that changes with its images, made with a secret of this machine",
    "unit_length": "true if its features have unit length",
    "encoded": "images encoded so far",
    "images": "images in all",
    "num-examples": "number of images trained on",
    "choices": "summed losses of the validation images with other constants",
    "test-classes": "for each class: test images, correct ones, number of predictions",
    "counts": "images of each class that it trains on",
    "sums": "for each class the sum of their features; of a class with one image, that image's feature",
    "gradient": "how the class prompts should move, summed over its images, and their mean; each adds a bounded part",
    "moments": "for each two directions the sum of products, over all images",
    "masked": "its update or sums, under masks that cancel out in the sum of all sites",
    "public": "two public keys, for this round only",
    "to": "numbers of the recipients",
    "letters": "encrypted for the recipients",
    "of": "numbers of the sites that the pieces are of",
    "pieces": "pieces of the secrets of these sites",
    "digests": "SHA-256 of both pieces for each recipient",
    "seed": "SHA-256 of the secret that is shared",
}
"""The meaning of each value."""
LORA_PARTS = {
    A: "the first factor of what is added to this layer",
    B: "the second factor of what is added to this layer",
}
"""The meaning of a tensor of LoRA, by the end of its name."""
FIGURES = {
    "validation": SCORE,
    "test": f"{SCORE}, balanced accuracy, macro F1, and for each of 15 bins: confidence minus correct answers",
}
NOTHING_ELSE = """\
Nothing else derived from this site's images leaves it: no image, {}, no image's label, no file name. Bytes are
those of the messages as Flower serialises them. Flower itself also sends the ids of node and run, its public key with a
signature, heartbeats, and how long an answer took. If something goes wrong, one line of error replaces the answer; it
may name a file. Each answer is checked against one list before it leaves: may_leave, in
fedclip_flwr/exchange/records.py, and with secure aggregation ANSWERS, in fedclip_flwr/exchange/secure/protocol.py."""


class Sent(NamedTuple):
    """An answer of the site, and the message that it answers."""

    kind: str
    round: int
    came: int
    leaves: int
    records: Mapping[str, Any]
    error: str


def recorded(node: Node, sent: list[Sent]) -> Node:
    """The node, with its answers recorded in `sent`."""

    def answer(message: Message) -> Message:
        reply = node(message)
        number = records.read_task(message.content).round
        leaving = {} if reply.has_error() else dict(reply.content)  # copied: the server unpacks the reply
        error = records.reason(reply) if reply.has_error() else ""
        sizes = message_size(message), message_size(reply)
        sent.append(Sent(message.metadata.message_type, number, *sizes, leaving, error))
        return reply

    return answer


class _Other:
    """A site that does not train, or has a single image: secure aggregation needs other sites."""

    def __init__(self, name: str, package: str, plugins: list[str], classes: int) -> None:
        facts: dict[str, Any] = {"package": package, "plugins": plugins, "classes": []}
        self._hello = Hello(name, TRAIN, "", train=1, validation=0, test=0, **facts)
        self._memory, self._classes = RecordDict().config_records, classes

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
            if bits := records.read_task(content).bits:
                basis = state["basis"]
                image = Examples(torch.ones(1, basis.shape[1]), torch.zeros(1, dtype=torch.int64))
                masked = secure.masked_sums(content, self._memory, sums_of(image, basis, self._classes, bits))
            else:
                masked = secure.masked(content, self._memory, state, state)
            answer = records.write_answer(report, masked)
        else:
            answer = secure.STEPS[kind.removeprefix("query.")](content, self._memory)
        return Message(answer, reply_to=message)


@dataclass(frozen=True)
class _Nobody:
    """A watcher of a run that keeps nothing."""

    def on_result(self, result: RoundResult) -> None: ...

    def on_selected(self, number: int, state: State, blend: float) -> None: ...

    def on_complete(self, state: RunState) -> None: ...


def show(run: Settings, node: Mapping[str, Any], out: str, tell: Callable[[str], None]) -> bool:
    """Shows what would leave, and writes it to the folder `out` if given; returns False if an answer is an error.

    `run` has the run's settings, as far as they are known at this site.
    """
    folder = _empty(Path(out).expanduser().absolute()) if out else None
    sent = round_of(run, node)
    tell("What a run of one round would send from this site. Nothing is sent: the server is simulated here.")
    for number, message in enumerate(sent, 1):
        tell(f"\n{number}. {_described(message, run.method)}")
        if folder:
            _write(folder / f"{number}-{message.kind.replace('.', '-')}", message)
    total = sum(message.leaves for message in sent)
    feature = "no feature but in these sums" if run.method == ONE_ROUND else "no feature"
    tell(f"\n{counted(len(sent), 'message')}, {bytes_of(total)}.\n{NOTHING_ELSE.format(feature)}")
    if folder:
        tell(f"All values are in {folder}")
    return not any(message.error for message in sent)


def round_of(run: Settings, node: Mapping[str, Any]) -> list[Sent]:
    """All answers of this site in a run of one round."""
    settings, vocabulary = settings_at(run.as_run_config(), node), server_vocabulary(run)
    run = replace(run, secure_aggregation=settings.secure_aggregation)  # otherwise this site would not take part
    features = open_features(settings, vocabulary)
    holdout = "" if run.holdout == "auto" else run.holdout
    name = f"show-outgoing-{os.getpid()}"
    session = Session(holdout, vocabulary or features.vocabulary, features.model_content or "", name)
    learner = new_learner(settings, features)
    start = {key: tensor.clone() for key, tensor in learner.state_dict().items()}
    app = own_client_app()
    link, package = Downlink(start, run.codec, run.seed), content.of_package(content.memory())
    context = Context(RUN, NODE, dict(node), RecordDict(), run.as_run_config())
    sent: list[Sent] = []
    sites: dict[int, Node] = {NODE: recorded(lambda message: app(message, context), sent)}
    if settings.secure_aggregation:
        like = package, settings.shared_packages, len(session.vocabulary.class_names)
        sites |= {NODE + n: _Other(f"another site ({n})", *like) for n in (1, 2)}
    with _leaving_nothing(session):
        grid, endless = local_grid(sites), sys.float_info.max
        more: dict[str, Any] = {"package": package, "plugins": settings.shared_packages}
        nodes = Nodes(grid, link, session=session, **more, timeout=endless, say=lambda _: None)
        nodes.frozen = learner.frozen if run.start else {}
        while nodes.meet() and not nodes.failures:  # a site that is encoding is asked again
            pass
        if nodes.hellos and not nodes.failures:
            once = replace(run, num_server_rounds=1, fraction_train=1.0, min_sites=0, dp="off", strategy="fedavg")
            with suppress(UserError):  # no site has trained: this site only evaluates, or its answer is an error
                strategy = strategy_of(once, start, nodes.names, nodes.examples)
                RoundLoop(nodes, strategy, once, start, lambda *_: {}, _Nobody()).run()
    return [message for message, later in zip(sent, [*sent[1:], None], strict=True) if not _again(message, later)]


def _again(message: Sent, later: Sent | None) -> bool:
    """True if the next answer repeats this one: a site that encodes reports its progress several times."""
    return later is not None and "progress" in message.records and "progress" in later.records


@contextmanager
def _leaving_nothing(session: Session) -> Iterator[None]:
    """Removes afterwards what a site keeps for a session."""
    try:
        yield
    finally:
        session.forget(content.memory())
        forget(session.key)
        shutil.rmtree(files.home() / "personal" / content.file_name(session.run), ignore_errors=True)


def _described(message: Sent, method: str) -> str:
    asks = {
        "query": "Which site is this?",
        "query.keys": "What are your public keys for this round?",
        "query.shares": "Which shares of your secrets do you send to others, encrypted for them?",
        "train": "How good is this adapter, and what is your update?",
        ONE_ROUND: "How good is zero-shot, and what are the sums over your training images?",
        "query.unmask": "Which shares of others' secrets do you have, to remove the masks from the sum?",
    }
    kind = ONE_ROUND if (message.kind, method) == (MessageType.TRAIN, ONE_ROUND) else message.kind
    ask = asks.get(kind, "How good is this adapter?")
    came, leaves = bytes_of(message.came), f"{message.leaves:,} bytes leave"
    lines = [f"{ask} ({message.kind.upper()}, {came} come, {leaves})"]
    if message.error:
        lines.append(f"   an error: {message.error}")
    for name, record in message.records.items():
        lines.append(f"   {name}")
        meanings = MEANINGS if name in ("hello", "progress") else MEANINGS | FIGURES
        rows = [(key, _value(value), meanings.get(key, LORA_PARTS.get(key[-7:], ""))) for key, value in record.items()]
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
    description = f"{value.dtype}{list(value.shape)}, {len(value.data):,} bytes"
    if not numbers.numel():
        return description
    spread = f"mean {numbers.mean():.3g}, deviation {numbers.std(correction=0):.3g}"
    return f"{description}: {numbers.min():.3g} to {numbers.max():.3g}, {spread}"


def _empty(folder: Path) -> Path:
    if any(files.make_folder(folder, "--out").iterdir()):
        raise UserError(f"--out: {folder} is not empty: name another folder")
    return folder


def _write(path: Path, message: Sent) -> None:
    """Writes the records as JSON, and the tensors beside them."""
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
