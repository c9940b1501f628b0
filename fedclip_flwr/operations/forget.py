"""`fedclip forget`: takes what a site has given out of a result of one round, in all its versions, exactly.

The result is a sum over the sites, so that of the others is the result of a federation without the site, to the bit.
Every file of a version is written again without it, removed, or made anew. The site's own sums go last: a `forget` that
was interrupted can be repeated.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fedclip_flwr.base import UserError, content, files
from fedclip_flwr.base.settings import ONE_ROUND
from fedclip_flwr.base.text import some
from fedclip_flwr.data import held_out
from fedclip_flwr.features import models
from fedclip_flwr.learning import OneRound, examine
from fedclip_flwr.learning.metrics import mean_of
from fedclip_flwr.learning.one_round import SUMS, Constants
from fedclip_flwr.learning.sums import unit_of
from fedclip_flwr.report import writing
from fedclip_flwr.report.heldout import open_held_out
from fedclip_flwr.runs import Run, checkpoint, history, ledger
from fedclip_flwr.runs.folder import locked, remove
from fedclip_flwr.runs.saved import FACTS, TENSORS, learnt_classes, load_adapter, write_json, write_tensors
from fedclip_flwr.runs.summary import results_of
from fedclip_flwr.server import RoundResult
from fedclip_flwr.server.nodes import LETTER_FROM
from fedclip_flwr.server.one_round import bounded_sums, share_of

MADE_ANEW = ("report.html", "held_out.json", "plots", "tensorboard", "checkpoint")
"""What is removed of a version: it was made with the site. The report is made again, the rest isn't needed."""


def forget(name: str, site: str, root: Path | None, earlier: bool, say: Callable[[str], None]) -> str:
    """Forgets the site in all versions of the run; with `earlier` only what it gave before the newest one."""
    run = history.find(name, root)
    if run.known.method != ONE_ROUND:
        raise UserError(
            f"{run.name} was trained in rounds: each round's adapter depends on all updates before it, so what came "
            f"from {site} can't be taken out. Train again without it, from the start; or use method=one-round, whose "
            "results can forget a site exactly"
        )
    if not run.known.keeps_sums:
        raise UserError(
            f"{run.name} keeps no sums of its sites, as it has noise or is a gradient: start a new run without {site}"
        )
    found = history.versions(run.path)
    complete = [one for one in found if one.completed]
    affected = [one for one in found if holds(one, site)]
    if earlier:
        latest = mark_of(complete[-1], site) if complete else ""
        affected = [one for one in affected if one.completed and mark_of(one, site) != latest]
    if not affected:
        none = "no earlier version has other sums of it" if earlier else f"no version of {run.name} has anything of it"
        sites = some(sorted(run.summary.get("examples", {})))
        raise UserError(f"{site}: {none}; the sites of {run.name} are {sites}{unread(run)}")
    hidden = run.known.secure_aggregation
    if hidden and complete and complete[-1] in affected and gave(complete[-1], site):
        raise UserError(
            f"with secure aggregation only {site} itself can take out its sums: first `fedclip update "
            f"{complete[-1].name} leave={site}`, which asks it to"
        )
    with contextlib.ExitStack() as stack:
        affected = [one for one in found if one in affected or not one.completed]
        for one in affected:  # all, before the first is changed
            stack.enter_context(locked(one.path, one.name))
        if history.versions(run.path) != found:
            raise UserError(f"{run.name} has just been changed by another process: run this again")
        for number, one in enumerate(affected):
            try:
                take_out(one, site, say)
            except BaseException:  # also when it is interrupted
                left = [other.name for other in affected[number:]]
                say(f"{site} is not forgotten in {some(left)} yet: run this again")
                raise
    return f"{closing(site, complete, affected)}{unread(run)}."


def closing(site: str, complete: Sequence[Run], changed: Sequence[Run]) -> str:
    """What is said at the end, of the complete versions and the changed ones."""
    if not complete:
        return f"{site} is forgotten: no version is left"
    newest, scores = complete[-1], ""
    if newest in changed:
        scores = " The other sites' scores were of the earlier result, and are gone, too"
        if newest.settings.get("simulated"):
            scores += f". Don't update {newest.name}: its sites were simulated, and {site} would take part again."
        else:
            scores += f": `fedclip update {newest.name}` asks for new ones."
    return (
        f"{site} is forgotten.{scores} Copies, exports and trackers outside the run folder still have the earlier "
        "result: replace them"
    )


def unread(run: Run) -> str:
    """What is said of runs beside this one that nobody can read; empty if there are none."""
    if not (names := history.unreadable(run.path.parent)):
        return ""
    return f". The settings of {some(names)} can't be read: look there for versions of {run.name}, too"


def take_out(run: Run, site: str, say: Callable[[str], None]) -> None:
    """Takes the site out of a version; removes one that can't be without it."""
    own = files.home() / "personal" / content.file_name(str(run.settings.get("run"))) / content.file_name(site)
    shutil.rmtree(own, ignore_errors=True)  # of a simulated site; a real one has it on its own machine
    if run.completed and not (run.known.secure_aggregation and gave(run, site)):
        rewrite(run, site)
        say(f"{run.name}: now the result of its other sites")
    else:
        remove(run.path)
        why = f"only {site} itself could take its sums out" if run.completed else "it was not complete"
        say(f"{run.name}: removed, as {why}")


def holds(run: Run, site: str) -> bool:
    """True if a version has anything of the site."""
    if not run.summary:  # its removal was interrupted, or it was killed as it began
        return True
    of_site = (is_of(failure, site) for failure in run.summary.get("failures", []))
    if ledger.path_of(run.path, site).exists() or any(of_site):
        return True
    if not run.completed:
        try:
            saved = checkpoint.read(checkpoint.path_of(run.path))
        except UserError:  # damaged: who can tell?
            return True
        results = (saved.state.zero, saved.state.best) if saved else ()
        return any(site in part for result in results if result for part in (result.reports, result.holdouts))
    return site in run.summary["examples"] or gave(run, site)


def is_of(failure: Mapping[str, Any], site: str) -> bool:
    """True if what failed was this site, also where it could only be named beside its node, or another one for it."""
    named, why = str(failure["site"]), str(failure["why"])
    return named == site or named.startswith(f"{site} (") or why.startswith(f"{site}: ") or why == LETTER_FROM + site


def gave(run: Run, site: str) -> bool:
    """True if the site's sums count in a completed version."""
    return site in ledger.read_sites(run.path)


def mark_of(run: Run, site: str) -> str:
    """The mark of the images that the site gave its sums of."""
    sites = ledger.read_sites(run.path)
    return sites[site].content if site in sites else ""


def rewrite(run: Run, site: str) -> None:
    """Writes all files of a completed run as those of one without the site."""
    before = ledger.read_sites(run.path)
    sites = {name: given for name, given in before.items() if name != site}
    learner, names = write_result(run, sorted(sites)) if site in before else result_of(run)
    for name in MADE_ANEW:  # before the summary, by which a repeated `forget` sees that there is something to do
        path = run.path / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    write_records(run, site, unseen_of(run, learner), len(before), len(sites))
    writing.write(history.read(run.path))
    ledger.path_of(run.path, site).unlink(missing_ok=True)
    ledger.write_sites(run.path, sites, names)


def result_of(run: Run) -> tuple[OneRound, Sequence[str]]:
    """The run's result, and its class names."""
    learner, facts = load_adapter(run.path)
    assert isinstance(learner, OneRound)
    return learner, learnt_classes(facts)


def write_result(run: Run, sites: Sequence[str]) -> tuple[OneRound, Sequence[str]]:
    """Writes the result of these sites in place of the run's; returns it, and its class names."""
    learner, facts = load_adapter(run.path)
    assert isinstance(learner, OneRound)
    state = {name: tensor.clone() for name, tensor in learner.state_dict().items()}
    state |= {name: torch.zeros_like(state[name]) for name in SUMS}
    state["constants"] = torch.tensor(Constants(), dtype=torch.float64)  # the site may have helped to choose others
    given = (ledger.read_sums(run.path, site) for site in sites)
    if (share := share_of(run.known)) is None:
        for sums in given:
            for name, tensor in sums.items():
                state[name] += tensor
    elif sites:
        state |= bounded_sums([*given], share, unit_of(int(state["bits"])))
    header = files.read_header(run.path / TENSORS)
    write_tensors(run.path / TENSORS, state, int(header.pop("round")), **header)
    write_json(run.path / FACTS, {**facts, "tensors": content.of_file(run.path / TENSORS)})
    learner.load_state_dict(state)
    return learner, learnt_classes(facts)


def unseen_of(run: Run, learner: OneRound) -> RoundResult:
    """What the server's own held-out images say of the result, if they are here."""
    unseen = {}
    with contextlib.suppress(UserError):
        features, holdout = open_held_out(run.known)
        device = models.pick_device(run.known.device)
        classes, learner = features.classes.ready(device), learner.to(device)
        for domain in held_out(holdout, features.domains):
            unseen[domain] = examine(learner, features.examples(domain).ready(device), classes)
    return RoundResult(run.summary["adapted"]["round"], {}, unseen, 0, 0.0)


def write_records(run: Run, site: str, result: RoundResult, before: int, left: int) -> None:
    """Writes settings, metrics and summary without the site, and without scores of the earlier result.

    Of the sites `before`, whose sums counted, so many are `left`.
    """
    summary: dict[str, Any] = json.loads(json.dumps(run.summary))  # a copy
    zero, adapted, known = summary["zero_shot"], summary["adapted"], site in summary["examples"]
    for part in (summary["examples"], summary["contributions"], summary["scaled"], zero["sites"]):
        part.pop(site, None)
    figures = zero["metrics"]["sites"]
    figures.pop(site, None)
    zero["seen"] = mean_of(share for share in zero["sites"].values() if share is not None)
    zero["metrics"]["seen"] = {
        name: mean_of(of[name] for of in figures.values() if name in of) for name in zero["metrics"]["seen"] if figures
    }
    personal = {"personal": None, "personal_metrics": None}
    again = results_of(result, learnt_classes(files.read_json(run.path / FACTS)))
    if zero["holdout_sites"].pop(site, None) is not None:  # means had its images
        for part in (zero, again):
            part["unseen"] = part["metrics"]["unseen"] = None
    summary["adapted"] = {**again, "round": adapted["round"], "blend": adapted["blend"], **personal}
    summary["failures"] = [failure for failure in summary["failures"] if not is_of(failure, site)]
    if "update" in summary:
        known |= summary["update"]["sites"] == before > left  # it was not connected then
        for kind in ("new", "changed"):
            summary["update"][kind] = [name for name in summary["update"][kind] if name != site]
        summary["update"]["sites"] = left
    if known:  # else this continues one that was interrupted
        summary["forgotten"] = [*summary.get("forgotten", []), ledger.forgotten(1)]
    lines = [{**line, "val": None, "loss": None, "sites": len(zero["sites"])} for line in run.metrics]
    for line, seen, unseen in zip(lines, (zero["seen"], None), (zero["unseen"], again["unseen"]), strict=False):
        line |= {"seen": seen, "unseen": unseen}
    settings = json.loads((run.path / history.SETTINGS).read_text(encoding="utf-8"))
    write_json(run.path / history.SETTINGS, {**settings, "sites": len(summary["examples"])})
    files.write_text(run.path / history.METRICS, "".join(json.dumps(line) + "\n" for line in lines))
    write_json(run.path / history.SUMMARY, summary)
