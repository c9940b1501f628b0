"""A session of bash that is given its commands one after the other, and steps that build on each other."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import pytest

PATIENCE = 600
_MARK = "--- that was all ---"


class Shell:
    """A session of bash, which ends at the first command that fails."""

    def __init__(
        self, name: str, command: Sequence[str], cwd: Path | None = None, env: Mapping[str, str] | None = None
    ) -> None:
        self.name = name
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            command,
            cwd=cwd,
            env=env,
            stdin=pipe,
            stdout=pipe,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        self.run("set -eo pipefail")

    def run(self, text: str, name: str = "") -> str:
        """What the commands print; an assertion tells which failed, and pytest what was said until then."""
        process, name = self.process, name or self.name
        output: list[str] = []
        assert process.stdin
        assert process.stdout
        print(f"--- {name}\n{text}\n---")
        late = threading.Timer(PATIENCE, os.killpg, (process.pid, signal.SIGKILL))
        late.start()
        try:
            process.stdin.write(f"{{\n{text}\n}} </dev/null 2>&1\necho '{_MARK}'\n")
            process.stdin.flush()
            for line in process.stdout:
                line, mark, _ = line.partition(_MARK)  # before it a line may stand that had no end yet
                output.append(line)
                print(line, end="", flush=True)
                if mark:
                    return "".join(output)
        finally:
            late.cancel()
        raise AssertionError(f"{name}: {text}\nended with {process.wait()}:\n{''.join(output)[-3000:]}")

    def close(self) -> None:
        assert self.process.stdin
        with suppress(BrokenPipeError):
            self.process.stdin.close()
        try:
            self.process.wait(30)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)


class Course:
    """Steps by name, of which each builds on those before it: taken in order, each once, none after one that failed."""

    def __init__(self, steps: Mapping[str, Callable[[], object]]) -> None:
        self._left = dict(steps)
        self._failed = ""

    def take(self, name: str) -> None:
        """This step, and first those before it, which are taken already when all the tests are run."""
        while name in self._left:
            if self._failed:
                pytest.fail(f"not tried: {self._failed} failed before it", pytrace=False)
            self._failed = next(iter(self._left))
            self._left[self._failed]()
            del self._left[self._failed]
            self._failed = ""
