"""Everything that a run needs to resume after its last complete round, in one file that is replaced atomically.

The latest adapter's tensors have their own names. Beside them are those of the best round so far (`best/`), the
residual (`left/`) and the strategy's memory (`strategy/`). Everything else is JSON, in the bytes of one more tensor
(`facts/json`), because a header is too small for many sites. A checksum covers the whole file.
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
from fedclip_flwr.runs.history import TENSORS
from fedclip_flwr.server import RoundResult, RunState

PARTS = ("best", "left", "strategy")
NO_SCORE = Score(0, 0, 0.0)


class Checkpoint(NamedTuple):
    """The state of a run, the server's residual, and the strategy's memory.

    `nodes` is the record of the sites (`Nodes.record`), `session` the session's key, `seconds` the run's time so far by
    phase. `resumed` are the rounds after which the run was resumed, `metrics` the lines of metrics.jsonl.
    """

    state: RunState
    residual: State
    strategy: State
    nodes: dict[str, Any]
    session: str
    seconds: dict[str, float]
    resumed: list[int]
    metrics: list[dict[str, Any]]


def path_of(run: Path) -> Path:
    """The checkpoint in a run's folder."""
    return run / "checkpoint" / TENSORS


def write(path: Path, made: Checkpoint, setting: str = "FEDCLIP_HOME") -> None:
    run = made.state
    parts = dict(zip(PARTS, (run.best_state, made.residual, made.strategy), strict=True))
    tensors = run.state | {f"{part}/{name}": tensor for part, state in parts.items() for name, tensor in state.items()}
    assert run.zero  # a round is complete
    assert run.best
    numbers = {key: value for key, value in vars(run).items() if key not in ("state", "best_state")}
    facts = {
        "standing": {**numbers, "zero": _as_facts(run.zero), "best": _as_facts(run.best)},
        **{key: value for key, value in made._asdict().items() if key not in ("state", "residual", "strategy")},
    }
    tensors["facts/json"] = torch.frombuffer(bytearray(json.dumps(facts).encode()), dtype=torch.uint8)
    header = tensorfile.with_checksum({"round": str(run.round)}, tensors)
    files.write_atomic(path, lambda part: tensorfile.save(tensors, part, header), setting)


def read(path: Path) -> Checkpoint | None:
    """The checkpoint; None if there is none, a `UserError` if it can't be read."""
    try:
        tensors, _ = store.checked(path)
        facts = tensors.pop("facts/json")
        return _checkpoint_of(tensors, json.loads(tensorfile.bytes_of(facts).tobytes()))
    except FileNotFoundError:
        return None
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{path} can't be read ({' '.join(str(error).split())[:200]}): restore it from a backup, or start a new "
            "run; nothing was changed, and the best adapter so far is in the run folder"
        ) from None
    except (ValueError, KeyError, TypeError, ExchangeError):
        raise UserError(f"{path} was written by another version of this package: resume with that version") from None


def _checkpoint_of(tensors: State, facts: dict[str, Any]) -> Checkpoint:
    parts: dict[str, State] = {part: {} for part in ("", *PARTS)}
    for name, tensor in tensors.items():
        part, slash, own = name.partition("/")
        parts[part if slash else ""][own if slash else name] = tensor.clone()  # the file may be replaced
    run = facts.pop("standing")
    run |= {"zero": _result_of(run["zero"]), "best": _result_of(run["best"])}
    state = RunState(state=parts[""], best_state=parts["best"], **run)
    return Checkpoint(state, parts["left"], parts["strategy"], **facts)


def _as_facts(result: RoundResult) -> dict[str, Any]:
    return {
        "round": result.round,
        "bytes": result.bytes,
        "seconds": result.seconds,
        "epsilon": result.epsilon,
        "unseen": {domain: _figures(Report(0, NO_SCORE, quality)) for domain, quality in result.unseen.items()},
        "reports": {site: _figures(report) for site, report in result.reports.items()},
        "holdouts": {site: _figures(report) for site, report in result.holdouts.items()},
    }


def _result_of(facts: dict[str, Any]) -> RoundResult:
    saved = facts["unseen"] or {}
    by_domain = {"": saved} if "num-examples" in saved else saved  # earlier versions had one domain at most
    unseen = {domain: _report(figures).test for domain, figures in by_domain.items()}
    reports, holdouts = ({site: _report(of) for site, of in facts[part].items()} for part in ("reports", "holdouts"))
    return RoundResult(facts["round"], reports, unseen, facts["bytes"], facts["seconds"], holdouts, facts["epsilon"])


def _figures(report: Report) -> dict[str, Any]:
    """The report as in a message."""
    return dict(write_answer(report).metric_records["metrics"])


def _report(figures: dict[str, Any]) -> Report:
    return read_answer(RecordDict({"metrics": MetricRecord(figures)})).report
