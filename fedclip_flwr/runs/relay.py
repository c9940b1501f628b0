"""A relay: a site of the federation above whose sums are those of a whole group, from the group's own run of one round.

The group's server keeps them in its run folder. A relay answers with the newest complete version of that run. It has no
images, and what it sends takes the place of what it sent before, as with any site.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from flwr.app import ArrayRecord, RecordDict
from torch import Tensor

from fedclip_flwr.base import UserError
from fedclip_flwr.base.roles import TRAIN
from fedclip_flwr.base.settings import ONE_ROUND
from fedclip_flwr.base.tensors import State
from fedclip_flwr.base.text import counted
from fedclip_flwr.exchange import ExchangeError, Hello, Report, Session
from fedclip_flwr.exchange.records import Task, read_adapter, read_task, write_answer
from fedclip_flwr.exchange.secure.protocol import Memory
from fedclip_flwr.learning import OneRound
from fedclip_flwr.learning.metrics import no_quality
from fedclip_flwr.learning.one_round import SUMS, renumbered
from fedclip_flwr.learning.sums import BITS
from fedclip_flwr.runs import directions, history
from fedclip_flwr.runs.history import Run
from fedclip_flwr.runs.ledger import numbers_in
from fedclip_flwr.runs.saved import load_adapter
from fedclip_flwr.server.one_round import share_of
from fedclip_flwr.site.context import GROUP, settings_at
from fedclip_flwr.site.given import GivenSums, check_noted, note
from fedclip_flwr.site.holdings import keyed_mark, name_of
from fedclip_flwr.site.sums import as_sent

NODE_CONFIG = {"site", GROUP, "secure-aggregation"}
"""The keys that the node config of a relay may have."""
WHAT = "this site's group"


class Group(NamedTuple):
    """The name of a relay, and the newest complete result of its group, with its facts."""

    site: str
    run: Run
    result: OneRound
    facts: dict[str, Any]

    def __str__(self) -> str:
        return f"{counted(self.result.images, 'image')} of {self.run.name}"


def group_of(node: Mapping[str, object]) -> Group:
    """The group of a relay with this node config; a `UserError` if it has nothing to pass on."""
    site = name_of(node)
    if others := sorted(node.keys() - NODE_CONFIG):
        raise UserError(f"{', '.join(others)} in the node config: a relay has no images of its own; leave it out")
    path = Path(str(node[GROUP]))
    if not (path / history.SETTINGS).is_file() and (left := history.later(path)):
        path = path.parent / left[0]  # `forget` has removed the first version
    if not path.is_absolute() or not (path / history.SETTINGS).is_file():
        raise UserError(f"group = {str(path)!r} in the node config: there is no run in that folder")
    run = history.read(path.resolve())
    if run.known.method != ONE_ROUND:
        raise UserError(f"{run.name} was trained in rounds: only the sums of method = {ONE_ROUND!r} can be passed on")
    if not (complete := [one for one in history.versions(run.path) if one.completed]):
        raise UserError(f"{run.name} is not complete ({run.status}): finish it, or start a new run")
    if share_of(complete[-1].known) is not None:
        raise UserError(
            f"strategy = {complete[-1].known.strategy!r} of {complete[-1].name}: its result is not the sum of all "
            "images, which alone can be added; make it with strategy = 'fedavg'"
        )
    if not complete[-1].known.keeps_sums:
        raise UserError(f"{complete[-1].name} has noise or is a gradient: only exact sums can be passed on")
    result, facts = load_adapter(complete[-1].path, exact=True)
    assert isinstance(result, OneRound)
    return Group(site, complete[-1], result, facts)


@dataclass(frozen=True)
class Relay:
    """A group as a site: its sums, in the classes of the federation above, with their directions and unit."""

    site: str
    session: Session
    sums: State
    basis: Tensor
    bits: int
    mark: str

    @classmethod
    def open(cls, run_config: Mapping[str, object], node: Mapping[str, object], session: Session) -> Relay:
        """Raises a `UserError` unless the group's sums can be added to those of a run with this session."""
        settings = settings_at(run_config, node)
        if settings.method != ONE_ROUND:
            raise UserError(f"this site is a relay: it has sums and no images, so it needs method = {ONE_ROUND!r}")
        if not settings.keeps_sums:
            raise UserError(
                "this site is a relay: its sums are exact, so the run can't have a gradient, or noise by dp"
            )
        site, _, result, facts = group_of(node)
        numbers = numbers_in(session.vocabulary, session.model, result, facts, WHAT)
        state = result.state_dict()
        named = json.dumps([facts["class_names"], int(state["bits"])]).encode()
        mark = keyed_mark([named, *(state[name].numpy().data for name in ("basis", *SUMS))])
        sums = renumbered({name: state[name] for name in SUMS}, numbers, len(session.vocabulary.class_names))
        return cls(site, session, sums, state["basis"], int(state["bits"]), mark)

    @property
    def images(self) -> int:
        return int(self.sums["counts"].sum())

    def hello(self, package: str, plugins: Sequence[str]) -> Hello:
        """The group's name and size. It is noted which sums these are: no others may follow in this session."""
        note(self.session.key, self.site, self.mark)
        return Hello(
            site=self.site,
            role=TRAIN,
            domain="",
            train=self.images,
            validation=0,
            test=0,
            classes=self.sums["counts"].nonzero()[:, 0].tolist(),
            package=package,
            plugins=[*plugins],
            content=self.mark,
        )

    def answer_train(self, message: RecordDict, memory: Memory | None) -> RecordDict:
        """The group's sums, masked if there is a `memory` of a site's secrets."""
        task = read_task(message)
        check_noted(self.session.key, self.site, self.mark, f"the sums of {WHAT}")
        basis = directions_in(task)
        if not basis.equal(self.basis) or task.bits != self.bits:
            raise ExchangeError(
                f"{WHAT} has sums in other directions, or of another unit: there, make a new run with "
                f"directions={directions.write(self.site, basis, task.bits)}"
            )
        given = GivenSums(self.site, self.mark, self.session.vocabulary.class_names) if memory is not None else None
        return write_answer(self._report(), as_sent(self.sums, self.basis, message, memory, given))

    def answer_evaluate(self) -> RecordDict:
        """The scores on no image: those that tell how good a result is are at the group's sites."""
        return write_answer(self._report())

    def _report(self) -> Report:
        none = replace(no_quality(0), classes=None)
        return Report(self.images, none.score, none)


def directions_in(task: Task) -> Tensor:
    """The directions in which the server wants sums."""
    arrays = task.arrays or ArrayRecord()
    shape = arrays["basis"].shape if "basis" in arrays else (0, 0)
    if not 0 < task.bits <= BITS or len(shape) != 2:
        raise ExchangeError("malformed message from the server: does it run another version of this package?")
    like = torch.empty(shape, dtype=torch.int32, device="meta")  # no memory: the message may claim any shape
    return read_adapter(arrays, {"basis": like})["basis"]
