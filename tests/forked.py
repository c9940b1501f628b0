"""Processes that begin with torch and this package loaded, in a few hundredths of a second: forks of a server.

What a process of `python -c SCRIPT` does, down to being killed and to the limits that it sets itself, a fork of that
server does as well. What a fresh interpreter shows (what is imported, how a command starts) it does not.
"""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from collections.abc import Mapping
from multiprocessing.connection import Connection
from types import TracebackType
from typing import IO

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["fedclip_flwr.features.encoded", "fedclip_flwr.experiments.sweep", "tests.forked"])


class Python:
    """`python -c SCRIPT ARGUMENTS` with pipes, as a `Popen` of texts; it has the environment of this process now."""

    def __init__(self, script: str, *arguments: str, env: Mapping[str, str] | None = None) -> None:
        ends = [CONTEXT.Pipe(duplex=False) for _ in range(3)]
        (theirs_in, ours_in), *outs = ends
        theirs = (theirs_in, *(theirs for _, theirs in outs))
        self._process = CONTEXT.Process(target=_play, args=(script, arguments, dict(env or os.environ), *theirs))
        self._process.start()
        for end in theirs:
            end.close()
        self.stdin = _file(ours_in, "w")
        self.stdout, self.stderr = (_file(ours, "r") for ours, _ in outs)
        self.args = ["python", "-c", script, *arguments]

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def kill(self) -> None:
        self._process.kill()  # unless it has ended meanwhile

    def wait(self) -> int:
        self._process.join()
        assert self._process.exitcode is not None
        return self._process.exitcode

    def communicate(self) -> tuple[str, str]:
        self.stdin.close()
        output = self.stdout.read(), self.stderr.read()  # nothing here says so much on the latter that it would stop
        self.wait()
        return output

    def __enter__(self) -> Python:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()
        self.wait()


def run(
    script: str, *arguments: str, given: str = "", env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """What such a process says, once it has ended; it is `given` that on its standard input."""
    with Python(script, *arguments, env=env) as process:
        process.stdin.write(given)
        out, err = process.communicate()
        return subprocess.CompletedProcess(process.args, process.wait(), out, err)


def _file(end: Connection, mode: str) -> IO[str]:
    file: IO[str] = os.fdopen(os.dup(end.fileno()), mode, errors="surrogateescape")
    end.close()
    return file


def _play(script: str, arguments: tuple[str, ...], env: dict[str, str], *pipes: Connection) -> None:
    os.environ.clear()
    os.environ.update(env)
    for number, pipe in enumerate(pipes):
        os.dup2(pipe.fileno(), number)
        pipe.close()
    sys.stdin, sys.stdout, sys.stderr = (os.fdopen(n, mode, closefd=False) for n, mode in enumerate("rww"))
    sys.argv = ["-c", *arguments]
    exec(compile(script, "<string>", "exec"), {"__name__": "__main__"})
