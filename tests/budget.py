"""A plugin that keeps the suite fast: no test may take longer than a minute, nor all together longer than a budget.

`pytest --longest 60 --budget 400` fails otherwise. The seconds are those of a machine that does a piece of work in
`SPEED`. While the tests run, it is done again and again: where it takes longer, on a slower machine or beside other
work, more seconds are allowed in proportion.
"""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from statistics import fmean

import pytest

SPEED = 0.023
"""Seconds that `_work` takes on the machine on which the budget was set, with nothing beside it."""
PAUSE = 3.0
"""Seconds from one of these measurements to the next."""
SHOWN = 10


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("budget")
    group.addoption("--longest", type=float, metavar="S", help="fail if a test takes longer, its fixtures apart")
    group.addoption("--budget", type=float, metavar="S", help="fail if all tests and their fixtures take longer")


def pytest_configure(config: pytest.Config) -> None:
    limits = config.getoption("longest"), config.getoption("budget")
    if any(limits) and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Budget(*limits))


class Budget:
    """What the tests have taken, and whether that is too long."""

    def __init__(self, longest: float | None, budget: float | None) -> None:
        self._longest, self._budget = longest, budget
        self._works = [_work()]
        self._ended = threading.Event()
        self._measuring = threading.Thread(target=self._measure, daemon=True)
        self._measuring.start()
        self._calls: dict[str, float] = {}
        self._files = defaultdict[str, float](float)

    def _measure(self) -> None:
        while not self._ended.wait(PAUSE):
            self._works.append(_work())

    @property
    def _slower(self) -> float:
        return max(1.0, fmean(self._works) / SPEED)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._files[report.nodeid.partition("::")[0]] += report.duration
        if report.when == "call":
            self._calls[report.nodeid] = report.duration

    def _problems(self) -> list[str]:
        total = sum(self._files.values())
        found = [
            f"{test} took {took:.0f} s: at most {self._longest * self._slower:.0f} s are allowed"
            for test, took in self._calls.items()
            if self._longest and took > self._longest * self._slower
        ]
        if self._budget and total > self._budget * self._slower:
            most = self._budget * self._slower
            found.append(f"the tests took {total:.0f} s together: at most {most:.0f} s are allowed")
        return found

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        self._ended.set()
        self._measuring.join()
        if self._problems() and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        terminalreporter.section("time")
        for file, took in sorted(self._files.items(), key=lambda item: -item[1])[:SHOWN]:
            terminalreporter.line(f"{took:6.1f} s  {file}")
        terminalreporter.line(f"{sum(self._files.values()):6.1f} s  all tests and their fixtures")
        terminalreporter.line(f"{self._slower:6.2f}    times the seconds are allowed that the limits say")
        for problem in self._problems():
            terminalreporter.line(f"TOO SLOW: {problem}", red=True)


def _work() -> float:
    """The seconds that a fixed piece of work takes."""
    begun = time.perf_counter()
    sum(i * i for i in range(400_000))
    return time.perf_counter() - begun
