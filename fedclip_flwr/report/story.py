"""The figures of a run, completed or not, that the report's page and plots show."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from fedclip_flwr.base import Settings
from fedclip_flwr.base.errors import shown
from fedclip_flwr.base.settings import LORA, ONE_ROUND, place_of
from fedclip_flwr.base.text import bytes_of, counted
from fedclip_flwr.data import held_out
from fedclip_flwr.runs import Run
from fedclip_flwr.runs.console import lora_of

NOTHING: dict[str, Any] = {"seen": None, "unseen": None, "sites": {}, "holdout_sites": {}, "metrics": {}}
STATUS = {
    "failed": "This run failed",
    "stopped": "This run was stopped",
    "killed": "This run was killed",
    "running": "This run is still under way",
}


@dataclass(frozen=True)
class Story:
    """A run and its results so far; `domain` is what its server holds out, if that is known."""

    run: Run
    domain: str | None = None

    @property
    def settings(self) -> Settings:
        return self.run.known

    @property
    def lines(self) -> list[dict[str, Any]]:
        return self.run.metrics

    @property
    def status(self) -> str:
        """A sentence on why the run was not completed; empty if it was."""
        if self.run.completed:
            return ""
        why = shown(self.run.why).rstrip(".")
        return STATUS.get(self.run.status, "How this run ended is not known") + (f": {why}." if why else ".")

    @property
    def gap(self) -> str:
        """A sentence on rounds whose records are missing; empty if none is."""
        lost = self.run.lost
        return f"metrics.jsonl lacks the lines of {counted(lost, 'round')}: they are not shown." if lost else ""

    @cached_property
    def zero(self) -> Mapping[str, Any]:
        """The results of zero-shot; of an incomplete run those of round 0."""
        return self.run.summary["zero_shot"] if self.run.completed else _of_line(self.run.line(0))

    @cached_property
    def adapted(self) -> Mapping[str, Any]:
        """The results of the selected round; of an incomplete run of that so far, or of the last one."""
        if self.run.completed:
            found: dict[str, Any] = self.run.summary["adapted"]
            return found
        return _of_line(self.run.best)

    @property
    def personal(self) -> Mapping[str, float]:
        return self.adapted.get("personal") or {}

    @property
    def own(self) -> Mapping[str, float]:
        """The metrics of personal adapters, as means over the sites."""
        return (self.adapted.get("personal_metrics") or {}).get("seen") or {}

    @cached_property
    def holdout(self) -> str | None:
        """The held-out domain or domains, or else the holdout sites."""
        named = self.run.summary.get("holdout") if self.run.completed else self.domain
        if not named and self.settings.holdout not in ("auto", ""):
            named = self.settings.holdout
        return named or (", ".join(self.adapted["holdout_sites"]) or None)

    @property
    def sites(self) -> int:
        """The number of sites that took part."""
        recorded = self.run.settings.get("sites")
        apart = [*self.adapted["holdout_sites"]]  # several held-out domains of the server are there, too
        seen = [
            len(self.adapted["sites"]) + len(apart) - len(held_out(self.holdout, apart)),
            *(line["sites"] for line in self.lines),
        ]
        return int(max([recorded if isinstance(recorded, int) else 0, *seen]))

    @property
    def whole_bytes(self) -> int | None:
        """The bytes of a site and round with FedAVG of the whole model; None if that is what was trained."""
        return (
            None
            if self.settings.method == "full-model"
            else self.run.summary.get("traffic", {}).get("full_model_bytes")
        )

    @property
    def times_less(self) -> float | None:
        """How many times the bytes of a site and round FedAVG of the whole model takes."""
        each = self.run.bytes_per_site_round
        return self.whole_bytes / each if self.whole_bytes and each else None

    @property
    def seconds(self) -> Mapping[str, float]:
        """The total, and by phase; of an incomplete run only of its rounds."""
        rounds = sum(line["seconds"] for line in self.lines)
        return self.run.summary.get("seconds") or {"rounds": rounds, "total": rounds}

    @property
    def what(self) -> str:
        """The trained part in words."""
        if self.settings.method == "full-model":
            return "the whole model"
        if self.settings.method == ONE_ROUND:
            return "a closed form"
        if self.settings.method == LORA:
            return lora_of(self.settings)
        name, rank = self.run.adapter
        return f"{'an' if name[0] in 'aeiou' else 'a'} {name} adapter" + (f" of rank {rank}" if rank else "")

    @property
    def data(self) -> str:
        """The name of the data: the last part of its path."""
        return place_of(self.settings.data)[1].rstrip("/").rpartition("/")[2]

    @property
    def title(self) -> str:
        held = f", {self.holdout} unseen" if self.holdout else ""
        return f"{self.what[0].upper()}{self.what[1:]} on {self.data}{held}"

    @property
    def sentence(self) -> str:
        """What was run, and its result."""
        model = self.settings.model.rstrip("/").rpartition("/")[2]
        of = "the bundled CLIP" if model == "bundled" else model
        what = self.what[0].upper() + self.what[1:]
        one = self.settings.method == ONE_ROUND
        prefix = "of" if self.settings.method in ("full-model", LORA) else "for"
        made = "made from the sums of" if one else "trained at"
        sites = self.run.summary.get("update", {}).get("sites", self.sites)  # of an update, whose sums count
        text = f"{what} {prefix} {of} was {made} {counted(sites, 'site')} in {counted(self.run.done, 'round')}"
        text += f", with {self.holdout} held out" if self.holdout else ""
        parts: list[str] = []
        for key, where in (
            ("seen", "on the sites’ own images"),
            ("unseen", f"on {self.holdout or 'what is held out'}"),
        ):
            zero, adapted = self.zero[key], self.adapted[key]
            if zero is not None and adapted is not None:
                verb = "rose" if adapted > zero else "fell" if adapted < zero else "stayed"
                change = (
                    f"from {100 * zero:.1f} to {100 * adapted:.1f} %" if verb != "stayed" else f"at {100 * zero:.1f} %"
                )
                same = bool(parts) and parts[-1].startswith(verb)
                parts.append(f"{'' if same else f'{verb} '}{change} {where}")
        return text + (f". Accuracy {' and '.join(parts)}." if parts else ".")

    @property
    def cost(self) -> str:
        """The bytes of a site and round."""
        return "–" if self.run.bytes_per_site_round is None else bytes_of(self.run.bytes_per_site_round)

    @property
    def figures(self) -> str:
        """The key figures as a line."""
        parts = []
        for key in ("seen", "unseen"):
            zero, adapted = self.zero[key], self.adapted[key]
            if zero is not None and adapted is not None:
                parts.append(f"{key} {100 * zero:.1f} → {100 * adapted:.1f} %")
        if self.run.bytes_per_site_round is not None:
            less = f", {self.times_less:,.0f} times less than FedAVG" if self.times_less else ""
            parts.append(f"{self.cost} a site and round{less}")
        state = "" if self.run.completed else f"{self.run.status} after {counted(self.run.done, 'round')}; "
        return f"{self.run.name}: {state}{'; '.join(parts) or 'no round'}"


def _of_line(line: Mapping[str, Any]) -> dict[str, Any]:
    """The results in a round's record."""
    return NOTHING | {key: line.get(key) for key in ("seen", "unseen")}
