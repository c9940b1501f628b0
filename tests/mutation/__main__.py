"""Whether tests notice that code is wrong: each mutation of `table.py` is made in a copy, and its tests are run there.

    python -m tests.mutation [--jobs N] [WORD …]

With words, only the mutations are tried whose line here has one of them, such as `codecs` or `seed_of`. Before that
their tests must pass without a mutation. The exit status is 1 if a mutation lives without a reason.

Tests run in forks of this process, which has loaded the packages that take long and nothing of this project.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from textwrap import shorten
from typing import NamedTuple, NoReturn

from tests.mutation.table import MUTATIONS, Mutation

TREE = Path(__file__).parents[2]
COPIED = ("fedclip_flwr", "tests", "benchmarks", "deploy", "harness", "reliability", "docker", "docs")
FILES = ("pyproject.toml", "server_app.py", "client_app.py", "README.md")
LOADED = ("flwr.clientapp", "flwr.serverapp.strategy", "flwr.superlink.grid", "hypothesis", "safetensors.torch")
LIMIT = 600
"""Seconds that tests may take without a mutation."""
WIDTH = 100
"""Of a mutation in a line; the summary has the whole."""


class Trial(NamedTuple):
    """Tests that are run with a mutation, or without one; a mutation with which they wait for ever is noticed, too."""

    tests: Sequence[str]
    mutation: Mutation | None = None
    limit: int = LIMIT


class Result(NamedTuple):
    """What came of a trial: pytest's exit status, or none at the time limit; what it said; how long it took."""

    status: int | None
    output: str
    seconds: float

    @property
    def notices(self) -> bool:
        return self.status in (1, None)

    @property
    def valid(self) -> bool:
        """Whether the tests have passed or failed; not so where they can't even be collected."""
        return self.status in (0, 1, None)

    @property
    def verdict(self) -> str:
        return ("noticed" if self.notices else "LIVES  ") if self.valid else "INVALID"

    @property
    def failed(self) -> str:
        """The first test that failed."""
        found = re.search(r"^(?:FAILED|ERROR) tests/(.+?)(?: - .*)?$", self.output, re.MULTILINE)
        return found[1] if found else "the time limit"


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutation", description=__doc__.partition("\n")[0])
    parser.add_argument("words", nargs="*", metavar="WORD", help="try only mutations whose line has one of these")
    parser.add_argument("--jobs", type=int, metavar="N", help="processes at once; as many as cores if not given")
    given = parser.parse_args(arguments)
    if unknown := [word for word in given.words if not any(word in str(one) for one in MUTATIONS)]:
        parser.error(f"no mutation has the word {unknown[0]!r}: expected part of a file's name or of its changed code")
    chosen = [one for one in MUTATIONS if not given.words or any(word in str(one) for word in given.words)]
    if problem := next(filter(None, (problem_of(one) for one in chosen)), ""):
        parser.error(problem)

    os.environ |= {"OMP_NUM_THREADS": "1", "GRPC_ENABLE_FORK_SUPPORT": "0"}
    for package in (*LOADED, "pytest"):
        importlib.import_module(package)
    begun, jobs = time.monotonic(), max(1, given.jobs or len(os.sched_getaffinity(0)))
    plain = [Trial([test]) for test in sorted({test for one in chosen for test in one.tests})]
    took, alive, invalid = dict[str, float](), list[Mutation](), list[tuple[Mutation, Result]]()
    with tempfile.TemporaryDirectory(prefix="mutation-") as place:
        Path(place).chmod(0o755)  # some tests become another user
        copies = [copied(Path(place, str(number))) for number in range(jobs)]
        for number, (trial, result) in enumerate(tried(plain, copies), 1):
            if result.status != 0:
                sys.exit(f"{result.output}\n{trial.tests[0]} does not pass without a mutation, see above")
            took[trial.tests[0]] = result.seconds
            print(f"{number:3} of {len(plain)}  passes  {result.seconds:4.0f} s  {trial.tests[0]}", flush=True)
        trials = [Trial(one.tests, one, 60 + 5 * round(sum(took[test] for test in one.tests))) for one in chosen]
        for number, (trial, result) in enumerate(tried(trials, copies), 1):
            assert trial.mutation
            if not result.valid:
                invalid.append((trial.mutation, result))
            elif not result.notices:
                alive.append(trial.mutation)
            line = f"{result.verdict} {result.seconds:4.0f} s  {shorten(str(trial.mutation), WIDTH)}"
            by = f"  by {result.failed}" * result.notices
            print(f"{number:3} of {len(chosen)}  {line}{by}", flush=True)
    unexpected = [one for one in alive if not one.why]
    for one, result in invalid:
        print(f"\n{result.output[-2000:]}\nINVALID, its tests can't be run: {one}")
    for one in alive:
        print(f"\nLIVES: {one}\n  {one.why or 'not noticed by ' + ', '.join(one.tests)}")
    print(
        f"\n{len(chosen)} mutations in {time.monotonic() - begun:.0f} s: "
        f"{len(chosen) - len(alive) - len(invalid)} noticed, {len(alive)} live, {len(unexpected)} of them without a "
        "reason" + f", {len(invalid)} invalid" * bool(invalid)
    )
    return 1 if unexpected or invalid else 0


def problem_of(mutation: Mutation) -> str:
    """What is wrong with the table's entry; nothing if it can be tried."""
    count = (TREE / mutation.file).read_text().count(mutation.old)
    if count != 1:
        return f"{mutation.file} has {mutation.old!r} {count} times, expected once: renew tests/mutation/table.py"
    lacking = [name for name in mutation.tests if not (TREE / "tests" / name.partition("::")[0]).exists()]
    return f"there is no tests/{lacking[0]}: renew tests/mutation/table.py" if lacking else ""


def copied(root: Path) -> Path:
    """A copy of the tree, in which one mutation at a time is made."""
    for name in COPIED:
        if (TREE / name).exists():
            shutil.copytree(TREE / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in FILES:
        if (TREE / name).exists():
            shutil.copy(TREE / name, root / name)
    return root


def tried(trials: Sequence[Trial], copies: Sequence[Path]) -> Iterator[tuple[Trial, Result]]:
    """The trials as they end, as many at once as there are copies."""
    waiting, free, under_way = list(trials), list(copies), dict[int, _UnderWay]()
    try:
        while waiting or under_way:
            while waiting and free:
                one = _UnderWay(waiting.pop(0), free.pop(0))
                under_way[one.pid] = one
            pid, status = os.wait()
            ended = under_way.pop(pid)
            result = ended.end(status)
            free.append(ended.root)
            yield ended.trial, result
    finally:
        for one in under_way.values():
            one.kill()


class _UnderWay:
    """A trial in a process of its own, and in a copy that is as it was when the trial has ended."""

    def __init__(self, trial: Trial, root: Path) -> None:
        self.trial, self.root, self._begun = trial, root, time.monotonic()
        self._scratch = root.with_suffix(".tmp")
        self._scratch.mkdir()
        self._output = self._scratch / "output"
        self._output.touch()
        if one := trial.mutation:
            self._text = (root / one.file).read_text()
            (root / one.file).write_text(self._text.replace(one.old, one.new))
        self.pid = os.fork()
        if not self.pid:
            _run(trial, root, self._output, self._scratch)

    def kill(self) -> None:
        """Ends it, and what its tests have started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)

    def end(self, status: int) -> Result:
        self.kill()
        if self.trial.mutation:
            (self.root / self.trial.mutation.file).write_text(self._text)
        output = self._output.read_text(errors="replace")
        shutil.rmtree(self._scratch, ignore_errors=True)
        code = os.waitstatus_to_exitcode(status)
        return Result(None if code == -signal.SIGALRM else code, output, time.monotonic() - self._begun)


def _run(trial: Trial, root: Path, output: Path, scratch: Path) -> NoReturn:
    """In the fork: pytest, in the copy as if it had been started there; it ends with pytest's exit status."""
    status = 70
    try:
        os.setsid()
        signal.alarm(trial.limit)
        for number, file in ((0, os.devnull), (1, output), (2, output)):
            os.dup2(os.open(file, os.O_RDWR | os.O_APPEND), number)
        os.chdir(root)
        os.environ |= {"PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1", "TMPDIR": str(scratch)}
        sys.dont_write_bytecode, tempfile.tempdir, sys.path[0] = True, None, str(root)
        for name in [name for name in sys.modules if name.partition(".")[0] == "tests"]:
            del sys.modules[name]  # this package: the copy has its own
        import pytest

        command = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *(f"tests/{name}" for name in trial.tests)]
        status = pytest.main(command)
        for name, module in list(sys.modules.items()):
            if name.partition(".")[0] in ("fedclip_flwr", "tests") and (path := getattr(module, "__file__", None)):
                assert Path(path).is_relative_to(root), f"{name} is not the copy's: {path}"
    except BaseException:
        import traceback

        traceback.print_exc()
        status = 70
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
