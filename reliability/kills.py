"""kill -9 from outside at random moments: of the ServerApp, of the SuperLink, or of everything at once.

The moment is drawn from all that lies between the first message and the end of a run, as long as that took undisturbed,
and so is who is killed. Then what was killed is started again, the run is resumed, and has to come to what the
undisturbed run came to, bit for bit.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

from fedclip_flwr.base import UserError
from reliability.federation import BrokenError, Federation, difference, kill, result
from reliability.trials import SAME, Outcome, Trial

VARIANTS: Mapping[str, Mapping[str, str | int | float]] = {
    "float32": {},
    "`strategy=fedadam`": {"strategy": "fedadam"},
    "`codec=int8`": {"codec": "int8"},
    "`fraction-train=0.6`": {"fraction-train": 0.6},
    "`early-stop=1`": {"early-stop": 1},
}
TARGETS = ("the ServerApp", "the SuperLink", "all processes at once")
COUNT = 10


class Kill(NamedTuple):
    """One that was drawn: which run it falls on, who is killed, and after which part of the time that it takes."""

    variant: str
    target: str
    part: float

    @property
    def name(self) -> str:
        return f"{self.variant}: {self.target}, after {100 * self.part:.0f} % of the run"


def drawn(seed: int, count: int = COUNT) -> list[Kill]:
    """So many kills, all from one seed; all variants and targets in turn, so that few are enough."""
    chance = random.Random(seed)
    variants, targets = list(VARIANTS), list(TARGETS)
    kills = [
        Kill(variants[number % len(variants)], targets[number % len(targets)], chance.random())
        for number in range(count)
    ]
    return sorted(kills, key=lambda kill: (variants.index(kill.variant), kill.part))


def go(federation: Federation, kills: list[Kill], say: Callable[[str], None]) -> list[Outcome]:
    """What becomes of each."""
    return [_one(federation, number, kill, say) for number, kill in enumerate(kills)]


def _one(federation: Federation, number: int, drawn: Kill, say: Callable[[str], None]) -> Outcome:
    say(drawn.name)
    settings = VARIANTS[drawn.variant]
    trial = Trial(federation, federation.place / "results" / f"kill-{number}", settings)
    try:
        expected = federation.undisturbed(**settings)
        since = federation.points.now()
        trial.begin()
        process = trial.passes("server has sent query", since=since)
        time.sleep(drawn.part * federation.seconds(**settings))
        after = trial.run.lines() - 1
        if drawn.target == TARGETS[0]:
            if trial.run.process.poll() is None:
                kill(process)
        elif drawn.target == TARGETS[1]:
            federation.kill_superlink()
            federation.start_superlink()
        else:
            federation.kill_all()
            federation.start_all()
        trial.break_off()
        trial.finish()
        unlike = difference(result(trial.run.folder), expected)
        text = f"not the undisturbed result: {', '.join(unlike)}" if unlike else f"in round {after + 1}: {SAME}"
        return Outcome(drawn.name, text, not unlike)
    except (BrokenError, UserError, OSError) as error:
        return Outcome(drawn.name, str(error), False)
    finally:
        trial.leave()
        federation.heal()
