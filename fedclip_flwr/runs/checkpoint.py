"""What a run needs to go on after its last complete round, in one file that is replaced as a whole or not at all.

The latest adapter's tensors have their own names. Beside them are those of the best round so far (`best/`), what
rounding left over (`left/`) and what the strategy remembers (`strategy/`). All else is JSON, in the bytes of one more
(`facts/json`), for a header may not be as long as that of many sites; a checksum is over everything.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from flwr.app import MetricRecord, RecordDict
from safetensors import SafetensorError

from fedclip_flwr.base import UserError, files, store, tensorfile
from fedclip_flwr.base.tensors import State
from fedclip_flwr.exchange import ExchangeError, Report
from fedclip_flwr.exchange.records import read_answer, write_answer
from fedclip_flwr.learning.metrics import Score
from fedclip_flwr.server import RoundResult, RunState

PARTS = ("best", "left", "strategy")
NO_SCORE = Score(0, 0, 0.0)


class Checkpoint(NamedTuple):
    """The state of a run, the server's residual, and the strategy's memory.

    `nodes` is the record of the sites (`Nodes.record`), `session` the session's key, `seconds` the time that the run
    has taken so far. It was `resumed` after these rounds; `metrics` are the lines of metrics.jsonl.
    """

    state: RunState
    residual: State
    strategy: State
    nodes: dict[str, Any]
    session: str
    seconds: dict[str, float]
    resumed: list[int]
    metrics: list[dict[str, Any]]


def write(path: Path, of: Checkpoint, setting: str = "FEDCLIP_HOME") -> None:
    at = of.state
    parts = dict(zip(PARTS, (at.best_state, of.residual, of.strategy), strict=True))
    tensors = at.state | {f"{part}/{name}": tensor for part, state in parts.items() for name, tensor in state.items()}
    assert at.zero  # a round is complete
    assert at.best
    numbers = {key: value for key, value in vars(at).items() if key not in ("state", "best_state")}
    facts = {
        "standing": {**numbers, "zero": _of_line(at.zero), "best": _of_line(at.best)},
        **{key: value for key, value in of._asdict().items() if key not in ("state", "residual", "strategy")},
    }
    tensors["facts/json"] = torch.frombuffer(bytearray(json.dumps(facts).encode()), dtype=torch.uint8)
    told = {"round": str(at.round)}
    sums = {name: (tensorfile.spec_of(tensor), tensorfile.crc_of(tensor)) for name, tensor in tensors.items()}
    told["checksum"] = tensorfile.checksum(told, sums)
    files.write_whole(path, lambda part: tensorfile.save(tensors, part, told), setting)


def read(path: Path) -> Checkpoint | None:
    """The checkpoint, if there is one; a `UserError` if it can't be read."""
    try:
        tensors, told = store.mapped(path)
        claimed = told.pop("checksum", "")
        if tensorfile.checksum_of_file(path, told) != claimed:
            raise SafetensorError("its checksum is another one")
        facts = tensors.pop("facts/json")
        return _made(tensors, json.loads(tensorfile.bytes_of(facts).tobytes()))
    except FileNotFoundError:
        return None
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{path} can't be read ({' '.join(str(error).split())[:200]}): bring it back from a backup, or begin a new "
            "run; nothing was changed, and the best adapter so far is beside it"
        ) from None
    except (ValueError, KeyError, TypeError, ExchangeError):
        raise UserError(f"{path} is of another version of this package: go on with that one") from None


def _made(tensors: State, facts: dict[str, Any]) -> Checkpoint:
    parts: dict[str, State] = {part: {} for part in ("", *PARTS)}
    for name, tensor in tensors.items():
        part, slash, own = name.partition("/")
        parts[part if slash else ""][own if slash else name] = tensor.clone()  # the file may be replaced
    at = facts.pop("standing")
    at |= {"zero": _line(at["zero"]), "best": _line(at["best"])}
    state = RunState(state=parts[""], best_state=parts["best"], **at)
    return Checkpoint(state, parts["left"], parts["strategy"], **facts)


def _of_line(line: RoundResult) -> dict[str, Any]:
    return {
        "round": line.round,
        "bytes": line.bytes,
        "seconds": line.seconds,
        "epsilon": line.epsilon,
        "unseen": {domain: _figures(Report(0, NO_SCORE, quality)) for domain, quality in line.unseen.items()},
        "reports": {site: _figures(report) for site, report in line.reports.items()},
        "holdouts": {site: _figures(report) for site, report in line.holdouts.items()},
    }


def _line(facts: dict[str, Any]) -> RoundResult:
    of = facts["unseen"] or {}
    by_domain = {"": of} if "num-examples" in of else of  # as it was with a single domain at most
    unseen = {domain: _report(figures).test for domain, figures in by_domain.items()}
    reports, holdouts = ({site: _report(of) for site, of in facts[part].items()} for part in ("reports", "holdouts"))
    return RoundResult(facts["round"], reports, unseen, facts["bytes"], facts["seconds"], holdouts, facts["epsilon"])


def _figures(report: Report) -> dict[str, Any]:
    """As they travel."""
    return dict(write_answer(report).metric_records["metrics"])


def _report(figures: dict[str, Any]) -> Report:
    return read_answer(RecordDict({"metrics": MetricRecord(figures)})).report
