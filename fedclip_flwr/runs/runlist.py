"""`fedclip runs`: all runs in a table, one run's facts, or several side by side; as text or as JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fedclip_flwr.base import Settings, UserError
from fedclip_flwr.base.errors import one_line, shown
from fedclip_flwr.base.text import bytes_of, counted, gain, percent, table
from fedclip_flwr.runs import console, history
from fedclip_flwr.runs.history import PAGE, Run

DAMAGED = "damaged"
NOTHING = "–"


def show(names: Sequence[str], root: Path | None, as_json: bool) -> str:
    """Text or JSON on the runs of these names, or on all in the folder."""
    if root and not root.is_dir():
        raise UserError(f"--results-dir {root}: there is no such folder")
    root = root or history.runs_folder()
    runs = [history.find(name, root) for name in names]
    listed = [facts(run) for run in runs] or [_facts_or_error(root / name) for name in history.names(root)]
    if as_json:
        return json.dumps(listed, indent=2)
    if not listed:
        return f"There is no run in {root} yet: `fedclip run` makes one there."
    text = _all(listed) if not runs else _beside(listed) if runs[1:] else _one(runs[0], listed[0])
    return "\n".join(shown(line).rstrip() for line in text.split("\n"))


def facts(run: Run) -> dict[str, Any]:
    """The facts of a run, under keys that are always present; accuracies are fractions."""
    try:
        return _facts(run)
    except (LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{run.path / history.SUMMARY} is damaged ({one_line(error)})") from None


def _facts_or_error(path: Path) -> dict[str, Any]:
    """The facts of a run; of a damaged one its name, its path and the error."""
    try:
        return facts(history.read(path))
    except UserError as error:
        blank = dict.fromkeys(_facts(Run(path, history.parse_settings(b"{}"), [], {})))
        return blank | {"name": path.name, "path": str(path), "status": DAMAGED, "why": str(error)}


def _facts(run: Run) -> dict[str, Any]:
    settings, summary, lines = run.settings, run.summary, run.metrics
    if run.completed:
        zero, adapted, traffic = summary["zero_shot"], summary["adapted"], summary["traffic"]
    else:  # from the rounds so far
        best = run.best if any(line["round"] for line in lines) else {}  # round 0 is not adapted
        zero, adapted = ({part: line.get(part) for part in ("seen", "unseen")} for line in (run.line(0), best))
        traffic = {}
    own = adapted.get("personal") or {}
    report = run.path / PAGE
    return {
        "name": run.name,
        "path": str(run.path),
        "status": run.status,
        "why": run.why or None,
        "data": settings["data"],
        "holdout": summary.get("holdout"),
        "model": settings["model"],
        "method": run.method,
        "strategy": settings["strategy"],
        "nodes": settings.get("sites"),
        "settings": run.changed,
        "version": run.version,
        "update": summary.get("update"),
        "forgotten": summary.get("forgotten", []),
        "rounds": run.done,
        "rounds_asked_for": run.wanted,
        "selected_round": run.selected,
        "seen": {"zero_shot": zero.get("seen"), "adapted": adapted.get("seen")},
        "unseen": {"zero_shot": zero.get("unseen"), "adapted": adapted.get("unseen")},
        "personal": ((adapted.get("personal_metrics") or {}).get("seen") or {}).get("accuracy"),
        "sites": {
            site: {"zero_shot": zero["sites"].get(site), "adapted": accuracy, "personal": own.get(site)}
            for site, accuracy in adapted.get("sites", {}).items()
        },
        "unseen_sites": {
            site: {"zero_shot": zero["holdout_sites"].get(site), "adapted": accuracy}
            for site, accuracy in adapted.get("holdout_sites", {}).items()
        },
        "bytes_per_site_round": run.bytes_per_site_round,
        "bytes": traffic["down_bytes"] + traffic["up_bytes"] if traffic else sum(line["bytes"] for line in lines),
        "times_less": traffic.get("times_less"),
        "seconds": summary["seconds"]["total"] if run.completed else sum(line["seconds"] for line in lines),
        "epsilon": run.epsilon,
        "dp_unit": run.unit,
        "failures": [dict(zip(("round", "site", "why"), failure, strict=True)) for failure in run.failures],
        "package": settings.get("package"),
        "report": str(report) if report.is_file() else None,
    }


def _all(runs: Sequence[dict[str, Any]]) -> str:
    """A table with a row for each run, and the errors of damaged ones."""
    headings = ("run", "status", "data", "method", "rounds", "seen, %", "unseen, %", "a site and round")
    rows = [(run["name"], run["status"], *_cells(run)) for run in runs]
    wrong = [f"{run['name']}: {run['why']}" for run in runs if run["status"] == DAMAGED]
    return "\n".join([table([headings, *rows], left=4), *wrong])


def _cells(run: dict[str, Any]) -> Sequence[str]:
    if run["status"] == DAMAGED:
        return [NOTHING] * 6
    return (
        _short(run["data"]),
        run["method"],
        _rounds(run),
        _change(run["seen"]),
        _change(run["unseen"]),
        _bytes(run["bytes_per_site_round"]),
    )


def _one(read: Run, run: dict[str, Any]) -> str:
    """One run in a few lines, and its results by site."""
    changed = " ".join(f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in run["settings"].items())
    held_out = f", {run['holdout']} held out" if run["holdout"] else ""
    so_far = "" if read.completed else " so far"
    selected = "" if run["selected_round"] is None else f"; round {run['selected_round']} was selected{so_far}"
    less = run["times_less"]
    lines = [
        ("status", run["status"] + (f": {run['why']}" if run["why"] else "")),
        ("folder", run["path"]),
        ("data", run["data"] + held_out),
        ("model", run["model"]),
        ("trained", f"{run['method']}, by {run['strategy']}" + _nodes(run["nodes"])),
        ("settings", changed or "defaults"),
        ("update", read.updated),
        ("forgotten", read.forgotten),
        ("rounds", f"{run['rounds']} of {run['rounds_asked_for']}{selected}"),
        *(() if read.completed else (("seen", _change(run["seen"])), ("unseen", _change(run["unseen"])))),
        ("traffic", f"{_bytes(run['bytes_per_site_round'])} a site and round, {_bytes(run['bytes'])} in all"),
        ("", f"FedAVG of the whole model: {less:,.0f} times as much" if less and run["method"] != "full-model" else ""),
        ("seconds", f"{run['seconds']:.0f}"),
        ("privacy", "" if run["epsilon"] is None else f"ε = {run['epsilon']:.2f} for {console.UNITS[run['dp_unit']]}"),
        ("report", run["report"] or ""),
    ]
    by_site, results = list[str](), read.summary
    if read.completed:
        by_site = ["", console.accuracies(results["zero_shot"], results["adapted"], results["holdout"]), ""]
    return "\n".join(
        [
            run["name"],
            *(f"  {name:<10}{text}" for name, text in lines if text),
            *by_site,
            *console.left_out(read.failures),
        ]
    ).rstrip()


def _beside(runs: Sequence[dict[str, Any]]) -> str:
    """A table of the settings that differ, and of results, with a column for each run."""
    names = [run["name"] for run in runs]
    labels = names if len({*names}) == len(names) else [run["path"] for run in runs]
    defaults = Settings().as_run_config()
    values = {key: [run["settings"].get(key, defaults[key]) for run in runs] for key in defaults}
    differ = [
        (key, *(_short(str(value).lower() if isinstance(value, bool) else str(value)) for value in row))
        for key, row in values.items()
        if _differ(row)
    ]
    results = [(name, *(show(run) for run in runs)) for name, show in RESULTS.items()]
    results = [row for row in results if any(cell != NOTHING for cell in row[1:])]
    blank = [""] * len(names)
    heading = "settings that differ" if differ else "the same settings"
    rows = [(heading, *labels), *differ, ("", *blank), ("accuracy in %", *blank), *results]
    other = (
        ["", "They were made with different versions of this package."] if _differ([r["package"] for r in runs]) else []
    )
    return "\n".join([table(rows), *other])


RESULTS: dict[str, Callable[[dict[str, Any]], str]] = {
    "status": lambda run: str(run["status"]),
    "rounds": lambda run: _rounds(run),
    "seen: zero-shot": lambda run: percent(run["seen"]["zero_shot"]),
    "seen: adapted": lambda run: percent(run["seen"]["adapted"]),
    "seen: gain": lambda run: _gain(run["seen"]),
    "unseen: zero-shot": lambda run: percent(run["unseen"]["zero_shot"]),
    "unseen: adapted": lambda run: percent(run["unseen"]["adapted"]),
    "unseen: gain": lambda run: _gain(run["unseen"]),
    "mean of the sites' own": lambda run: percent(run["personal"]),
    "bytes a site and round": lambda run: _bytes(run["bytes_per_site_round"]),
    "seconds": lambda run: f"{run['seconds']:.0f}",
    "ε": lambda run: NOTHING if run["epsilon"] is None else f"{run['epsilon']:.2f} ({run['dp_unit']})",
}
"""The results of runs side by side, and how each is shown."""


def _differ(values: Sequence[object]) -> bool:
    return any(value != values[0] for value in values)


def _short(text: str, most: int = 28) -> str:
    """The text, shortened in the middle: the end of a long path matters more than its beginning."""
    return text if len(text) <= most else f"{text[:8]}…{text[9 - most :]}"


def _nodes(count: int | None) -> str:
    return "" if count is None else f", {counted(count, 'node')}"


def _rounds(run: dict[str, Any]) -> str:
    return f"{run['rounds']}/{run['rounds_asked_for']}"


def _bytes(count: float | None) -> str:
    return NOTHING if count is None else bytes_of(count)


def _change(result: dict[str, float | None]) -> str:
    """Zero-shot and adapted accuracy, as far as they are known."""
    zero, adapted = (percent(result[when]) for when in ("zero_shot", "adapted"))
    return zero if zero == NOTHING else f"{zero} → {adapted}"


def _gain(result: dict[str, float | None]) -> str:
    return gain(result["zero_shot"], result["adapted"])
