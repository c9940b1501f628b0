"""`fedclip watch`: follows a run by reading its folder, on a live screen or in lines."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from fedclip_flwr.base.errors import shown
from fedclip_flwr.base.text import bytes_of, counted, gain, percent, table
from fedclip_flwr.runs import console, history
from fedclip_flwr.runs.history import Run

PAUSE = 0.5
"""Seconds between two reads of the folder."""
QUIET = 10
"""The folder's lock is checked after this many reads without news: not at each, because the check takes the lock for a
moment."""
ROWS, REASONS, WIDEST = 8, 5, 48
"""The numbers of rounds, of failures and of a curve's columns that fit on a screen."""
BARS = "▁▂▃▄▅▆▇█"
NOTHING_YET = "No result yet: data and sites are being prepared, or the first answers are pending."
LEFT = 130


@dataclass(frozen=True)
class State:
    """A run as it is now: its status, and the seconds since it last wrote something."""

    run: Run
    status: str
    quiet: float


def watch(name: str, root: Path | None) -> int:
    """Shows the run until it ends or the user presses Ctrl-C. Returns the exit status."""
    path = history.where(name, root)
    screen = Console()
    try:
        last = _live(follow(path), screen) if screen.is_interactive else _plain(follow(path))
    except KeyboardInterrupt:
        _say("", f"Stopped watching; {path.name} is not affected.")
        return LEFT
    _say(ending(last))
    return 0 if last.status == "completed" else 1


def follow(path: Path, pause: Callable[[], object] = lambda: time.sleep(PAUSE)) -> Iterator[State]:
    """The run at each read of its folder, until it has ended."""
    reader, before, quiet_reads = history.Reader(path), None, 0
    while True:
        run = reader.read()
        quiet_reads = quiet_reads + 1 if run is before else 0
        status = run.recorded
        if status == "running" and quiet_reads % QUIET == 0 and (before is None or quiet_reads):
            status = "running" if history.held(path) else "killed"
            if status == "killed" and reader.read() is not run:
                continue  # it ended normally just now
        before = run
        yield State(run, status, max(0.0, time.time() - reader.changed))
        if status != "running":
            return
        pause()


def _plain(states: Iterable[State]) -> State:
    """Prints a line for each new round. Returns the last state."""
    last_shown = -1
    for number, state in enumerate(states):
        if not number:
            _say(about(state.run), console.row(headings(state.run)))
        new = [line for line in state.run.metrics if line["round"] > last_shown]
        _say(*(console.round_of(line, state.run.start) for line in new))
        last_shown = max([last_shown, *(line["round"] for line in new)])
    _say(*console.left_out(state.run.failures))
    return state


def _live(states: Iterable[State], screen: Console) -> State:
    """Redraws the screen at each read. Returns the last state."""
    with Live(console=screen, auto_refresh=False) as drawn:
        for state in states:
            drawn.update(picture(state), refresh=True)
    return state


def picture(state: State) -> Group:
    """The whole screen."""
    run, wrong = state.run, console.left_out(state.run.failures)
    bar = Table.grid(padding=(0, 2))
    bar.add_row(ProgressBar(max(run.wanted, 1), run.done, width=40), _plainly(progress(run)))
    rounds = table([headings(run), *map(console.cells, run.metrics[-ROWS:])], left=0)
    lines = ["", *(rounds if run.metrics else NOTHING_YET).split("\n"), "", *curves(run), *wrong[:REASONS]]
    more = [f"and {len(wrong) - REASONS} more reasons"] if len(wrong) > REASONS else []
    return Group(_plainly(about(run)), bar, *map(_plainly, [*lines, *more, status_line(state)]))


def about(run: Run) -> str:
    """The run's settings in a line."""
    settings = run.settings
    nodes = f" with {counted(settings['sites'], 'node')}" if isinstance(settings.get("sites"), int) else ""
    return f"{run.name}: {run.method} by {settings['strategy']} on {settings['data']}{nodes}, model {settings['model']}"


def headings(run: Run) -> list[str]:
    """The headings above the rounds."""
    return console.headings(run.settings["dp"] != "off")


def progress(run: Run) -> str:
    """The complete rounds, and the time left, estimated from the last few rounds."""
    took = [line["seconds"] for line in run.metrics if line["round"]][-5:]
    rest = run.wanted - run.done if run.recorded == "running" else 0
    eta = f", about {duration(sum(took) / len(took) * rest)} left" if took and rest > 0 else ""
    return f"{run.done} of {counted(run.wanted, 'round')}{eta}"


def curves(run: Run) -> list[str]:
    """The accuracies so far as curves with their gain, and the bytes sent."""
    lines = []
    for part in ("seen", "unseen"):
        values = [line[part] for line in run.metrics if line[part] is not None]
        if values:
            first, last = values[0], values[-1]
            known = values[1:] and run.line(0).get(part) is not None
            gained = f"  {gain(first, last)} over {run.start}" if known else ""
            lines.append(f"{part:<7} {percent(first)} {curve(values)} {percent(last)}{gained}")
    if run.metrics:
        lines.append(f"traffic {bytes_of(sum(line['bytes'] for line in run.metrics))} so far")
    return lines


def curve(values: Sequence[float]) -> str:
    """The values as bars, scaled to their range; of many, as many as fit, with the first and the last."""
    if len(values) > WIDEST:
        values = [values[round(i * (len(values) - 1) / (WIDEST - 1))] for i in range(WIDEST)]
    least, most = min(values), max(values)
    scale = (len(BARS) - 1) / (most - least) if most > least else 0.0
    return "".join(BARS[round((value - least) * scale)] for value in values)


def status_line(state: State) -> str:
    """The status; of a quiet running run with the time since it last wrote something."""
    quiet = f", no news for {duration(state.quiet)}" if state.status == "running" and state.quiet >= 10 else ""
    return f"status  {state.status}{quiet}"


def ending(state: State) -> str:
    """A line on how the run ended."""
    run = state.run
    if state.status != "completed":
        return f"{run.name} {state.status} after {counted(run.done, 'round')}" + (f": {run.why}" if run.why else "")
    zero, adapted = run.summary["zero_shot"], run.summary["adapted"]
    results = [
        f"{part} {percent(zero[part])} → {percent(adapted[part])} %"
        for part in ("seen", "unseen")
        if adapted[part] is not None
    ]
    return f"{run.name} completed after {counted(run.done, 'round')}: {', '.join(results)}; its folder: {run.path}"


def duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min"


def _plainly(line: str) -> Text:
    """The line unwrapped, and without control characters."""
    return Text(shown(line), no_wrap=True, overflow="ellipsis")


def _say(*lines: str) -> None:
    for line in lines:
        console.say(shown(line))
