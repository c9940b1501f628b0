"""What each site has given to a result in one round, kept so that it can be replaced, or taken out again, exactly.

`sums/` in the run folder has a file for each site, and `sites.json`: the class names, and for each site whose sums
count the numbers of images and classes in them, and the mark of its images.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from fedclip_flwr.base import Settings, UserError, content, files, store, tensorfile
from fedclip_flwr.base.errors import one_line
from fedclip_flwr.base.tensors import State
from fedclip_flwr.base.text import some
from fedclip_flwr.data import Vocabulary
from fedclip_flwr.exchange import Hello, Report
from fedclip_flwr.exchange.secure.exposure import Part, part_of
from fedclip_flwr.features import Features
from fedclip_flwr.learning import OneRound
from fedclip_flwr.learning.one_round import SUMS, renumbered
from fedclip_flwr.runs import checkpoint, history
from fedclip_flwr.runs.folder import existing, locked
from fedclip_flwr.runs.history import Run
from fedclip_flwr.runs.saved import learnt_classes, load_adapter, write_json
from fedclip_flwr.server.one_round import Given, Ledger

FOLDER, SITES = "sums", "sites.json"
HASHED = re.compile(r"-[0-9a-f]{8}\Z")
"""The end of a name to which `content.file_name` has added a hash."""
DECISIVE = ("strategy", "hostile-share", "one-round-choose", "personalize")
"""Settings that change the result, or what is made of it, even if no site has anything new."""


def read_sites(run: Path) -> dict[str, Given]:
    """The sites whose sums count in a run's result."""
    path = run / FOLDER / SITES
    try:
        sites = files.read_json(path, 2**28)["sites"]
        return {site: Given(int(images), int(classes), str(mark)) for site, (images, classes, mark) in sites.items()}
    except FileNotFoundError:
        raise UserError(
            f"{run} does not have the sums of its sites: an earlier version of this package made it, or its round was "
            "not completed; start a new run"
        ) from None
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{path} can't be read ({one_line(error)}): restore a copy, or start a new run") from None


def write_sites(
    run: Path, sites: Mapping[str, Given], class_names: Sequence[str], setting: str = "FEDCLIP_HOME"
) -> None:
    facts = {"class_names": list(class_names), "sites": {site: [*sites[site]] for site in sorted(sites)}}
    write_json(run / FOLDER / SITES, facts, setting)


def forgotten(sites: int) -> dict[str, Any]:
    """What a summary says of sites that are being forgotten."""
    return {"when": datetime.now().astimezone().isoformat(timespec="seconds"), "sites": sites}


def path_of(run: Path, site: str) -> Path:
    """The file with a site's sums; no two sites have the same."""
    name = content.file_name(site)
    if name == site and HASHED.search(site):  # as a file, another site may have that name
        name = f"{site}-{content.digest(site)[:8]}"
    return run / FOLDER / f"{name}.safetensors"


def read_sums(run: Path, site: str) -> State:
    """The sums that a site has given."""
    path = path_of(run, site)
    try:
        sums = store.checked(path)[0]
        return {name: sums[name].clone() for name in SUMS}  # the file may be removed
    except (OSError, KeyError, SafetensorError) as error:
        raise UserError(f"{path} can't be read ({one_line(error)}): restore a copy, or start a new run") from None


def write_sums(run: Path, site: str, sums: Mapping[str, Tensor], setting: str) -> None:
    facts = tensorfile.with_checksum({}, sums)
    files.write_atomic(path_of(run, site), lambda part: tensorfile.save(sums, part, facts), setting)


def numbers_in(
    vocabulary: Vocabulary, model_content: str | None, result: OneRound, facts: Mapping[str, Any], what: str
) -> list[int]:
    """For each class of a result its number in a run with this vocabulary, or -1.

    Raises a `UserError`, which calls the result `what`, if its sums can't be added to those of the run.
    """
    before, now = learnt_classes(facts), list(vocabulary.class_names)
    models = facts["model_content"], model_content
    if facts["templates"] != list(vocabulary.templates) or (all(models) and models[0] != models[1]):
        raise UserError(f"{what} was made with another model or other prompts: sums of the two can't be added")
    lost = [name for name, images in zip(before, result.counts.tolist(), strict=True) if images and name not in now]
    if lost:
        raise UserError(f"class-names lacks {some(lost)}, of which {what} has images: add it")
    return [now.index(name) if name in now else -1 for name in before]


@dataclass(frozen=True)
class Earlier:
    """The version that a run goes on from: its folder, its result, and what that is in the classes of the run."""

    run: Run
    result: OneRound
    start: OneRound
    numbers: Sequence[int]
    """For each of its classes its number in the run, or -1."""
    sites: Mapping[str, Given]
    """The sites whose sums count in it."""

    @classmethod
    def open(cls, settings: Settings, features: Features) -> Earlier:
        """Raises a `UserError` unless a run with these settings and features can go on from it."""
        path = existing(history.results(settings)[0], settings.update, "update")
        run = history.read(path)
        if not run.completed:
            raise UserError(f"{path} is not complete ({run.status}): resume it, or update another version")
        with locked(path, f"update = {path.name!r}"):  # `forget` changes both
            sites = read_sites(path) if run.known.keeps_sums else {}
            result, facts = load_adapter(path, exact=True)
        if not isinstance(result, OneRound):
            raise UserError(f"{path} was trained in rounds, and has no sums to go on from: set method = 'one-round'")
        numbers = numbers_in(features.vocabulary, features.model_content, result, facts, str(path))
        return cls(run, result, result.for_classes(features.classes.ready().text), numbers, sites)

    def check(self) -> None:
        """Raises if `forget` has changed it since it was opened; from now on the next version's lock prevents that."""
        with locked(self.path, f"update = {self.path.name!r}"):
            if history.read(self.path) != self.run:
                raise UserError(f"{self.path} has just been changed by another process: run this again")

    def totals(self, own: Path) -> list[set[Part]]:
        """What the totals of all versions are of, for the run in the folder `own`, which is one of them."""
        found = []
        for run in history.versions(self.path):
            if run.status == "running" and run.path != own:
                raise UserError(f"{run.path} is under way: with secure aggregation, update one after the other")
            if (run.path / FOLDER / SITES).exists():
                found.append({part_of(site, given.content) for site, given in read_sites(run.path).items()})
        return found

    def of(self, sums: Mapping[str, Tensor]) -> State:
        """Its sums in the classes of the run."""
        return renumbered(sums, self.numbers, len(self.start.counts))

    @property
    def path(self) -> Path:
        return self.run.path

    def answers(self, settings: Settings) -> bool:
        """True if it is what a run with these settings would make, and has the scores of its sites."""
        now = settings.as_run_config()
        same = all(self.run.settings[key] == now[key] for key in DECISIVE)
        return same and self.same_classes and bool(self.run.summary["adapted"]["sites"])

    def scores(self, sites: Collection[str]) -> dict[str, Report]:
        """Zero-shot's scores at these sites, as far as they are known."""
        saved = checkpoint.read(checkpoint.path_of(self.path)) if self.same_classes else None
        zero = saved.state.zero if saved else None
        return {site: report for site, report in zero.reports.items() if site in sites} if zero else {}

    def changes(self, now: Mapping[str, Given], leaving: Collection[str]) -> dict[str, Any]:
        """What a summary says of an update to these sites."""
        new = sorted(now.keys() - self.sites.keys())
        changed = sorted(site for site in now.keys() & self.sites.keys() if now[site] != self.sites[site])
        update = {"of": self.path.name, "new": new, "changed": changed, "sites": len(now)}
        return {"update": update, **({"forgotten": [forgotten(len(leaving))]} if leaving else {})}

    @property
    def same_classes(self) -> bool:
        return list(self.numbers) == list(range(len(self.start.counts)))


class SumsOnDisk(Ledger):
    """The ledger of a run, in its folder."""

    def __init__(
        self, run: Path, class_names: Sequence[str], before: Earlier | None, setting: str, hidden: bool = False
    ) -> None:
        """`hidden`: the server does not see any site's sums."""
        self._run, self._names, self._before, self._setting = run, class_names, before, setting
        self._hidden = hidden
        self._kept: set[str] = set()
        if before:
            state = before.result.state_dict()
            self.total, self.bits = before.of({name: state[name] for name in SUMS}), int(state["bits"])

    @property
    def sites(self) -> Mapping[str, Given]:
        return self._before.sites if self._before else {}

    def earlier(self, site: str) -> State:
        assert self._before
        return self._before.of(read_sums(self._before.path, site))

    def keep(self, site: str, sums: Mapping[str, Tensor]) -> None:
        write_sums(self._run, site, sums, self._setting)
        self._kept.add(site)

    def settle(self, given: Mapping[str, tuple[int, int]], hellos: Mapping[str, Hello]) -> None:
        """Keeps the sums of the sites that gave these now, and of all others those of the earlier version.

        With secure aggregation there are none to keep, but the sites are.
        """
        now = {site: Given(*of, hellos[site].content) for site, of in given.items()}
        for site in self._kept - now.keys():  # of an attempt that failed
            path_of(self._run, site).unlink(missing_ok=True)
        for site in () if self._hidden else self.sites.keys() - now.keys():
            assert self._before
            if self._before.same_classes:
                link(path_of(self._before.path, site), path_of(self._run, site), self._setting)
            else:
                write_sums(self._run, site, self.earlier(site), self._setting)
        counted = {site: given for site, given in {**self.sites, **now}.items() if given.images}
        for site in now.keys() - counted.keys():  # it no longer has images
            path_of(self._run, site).unlink(missing_ok=True)
        write_sites(self._run, counted, self._names, self._setting)


def link(source: Path, target: Path, setting: str) -> None:
    """Makes the target the same file as the source; a copy where the file system has no links."""

    def fill(part: Path) -> None:
        try:
            os.link(source, part)
        except OSError:
            shutil.copyfile(source, part)

    files.write_atomic(target, fill, setting)
