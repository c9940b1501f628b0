"""What holds for all fuzzing: no input may blow memory up or hang, and the number of inputs is reported."""

from __future__ import annotations

import re
import resource
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.fuzz.hostile import Tried

ROOM = 2**33
"""Of address space, so that what blows up does not take the machine down."""
GROWTH = 2**29
"""Of memory in use: all that is fuzzed is small, and a bomb is gigabytes."""
FORGET = Path("/proc/self/clear_refs")
counted: dict[str, dict[str, object]] = {}


def _memory(what: str) -> int:
    found = re.search(rf"{what}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1024


@pytest.fixture(autouse=True)
def bounded(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fails a test that takes much more memory than its inputs have: `GROWTH`, of its module if that has one."""
    if not FORGET.exists():
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    FORGET.write_text("5")  # the peak begins anew
    before = _memory("VmRSS")
    resource.setrlimit(resource.RLIMIT_AS, (_memory("VmSize") + ROOM, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    grown = _memory("VmHWM") - before
    assert grown < getattr(request.module, "GROWTH", GROWTH), f"memory grew by {grown / 2**20:.0f} MiB"


@pytest.fixture
def tried(record_property: Callable[[str, object], None]) -> Iterator[Tried]:
    """Counts the inputs: all, and those that were refused in words."""
    counts = Tried()
    yield counts
    record_property("inputs", counts.inputs)
    record_property("refused", counts.refused)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    properties = dict(report.user_properties)
    if report.when == "teardown" and "inputs" in properties:
        counted[report.nodeid] = properties


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if counted:
        terminalreporter.section("fuzzed inputs")
    for name, counts in sorted(counted.items()):
        terminalreporter.line(f"{name}: {counts['inputs']:,} tried, {counts['refused']:,} of them refused")
