"""A plugin that keeps the suite fast: no test may take longer than a minute, nor all together longer than a budget.

`pytest --longest 60 --budget 400` fails otherwise. The seconds are those of the machine on which `SPEED` was measured:
on a slower one they are as many times longer.
"""

from __future__ import annotations

import time
from collections import Counter

import pytest

SPEED = 0.11
"""Seconds that `_work` takes on the machine on which the budget was set."""
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
        slower = max(1.0, _work() / SPEED)
        self._longest, self._budget = (limit and limit * slower for limit in (longest, budget))
        self._calls: dict[str, float] = {}
        self._files: Counter[str] = Counter()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._files[report.nodeid.partition("::")[0]] += report.duration
        if report.when == "call":
            self._calls[report.nodeid] = report.duration

    def _problems(self) -> list[str]:
        total = sum(self._files.values())
        found = [
            f"{test} took {took:.0f} s: at most {self._longest:.0f} s are allowed"
            for test, took in self._calls.items()
            if self._longest and took > self._longest
        ]
        if self._budget and total > self._budget:
            found.append(f"the tests took {total:.0f} s together: at most {self._budget:.0f} s are allowed")
        return found

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self._problems() and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        terminalreporter.section("time")
        for file, took in self._files.most_common(SHOWN):
            terminalreporter.line(f"{took:6.1f} s  {file}")
        limit = f", at most {self._budget:.0f} s are allowed" if self._budget else ""
        terminalreporter.line(f"{sum(self._files.values()):6.1f} s  all tests and their fixtures{limit}")
        for problem in self._problems():
            terminalreporter.line(f"TOO SLOW: {problem}", red=True)


def _work() -> float:
    """The least of a few times that a fixed piece of work takes: what else the machine does counts little."""
    times = []
    for _ in range(5):
        begun = time.perf_counter()
        sum(i * i for i in range(2_000_000))
        times.append(time.perf_counter() - begun)
    return min(times)
