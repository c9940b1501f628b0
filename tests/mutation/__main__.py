"""Whether tests notice that code is wrong: each mutation of `table.py` is made in a copy, and its tests are run.

    python -m tests.mutation [WORDS …]

With words, only those whose file or text has one of them. Ends with 1 if a mutation lives that has no reason to.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue

from tests.mutation.table import MUTATIONS, Mutation

TREE = Path(__file__).parents[2]
COPIED = ("fedclip_flwr", "tests", "benchmarks", "deploy", "reliability", "docker", "docs")
FILES = ("pyproject.toml", "server_app.py", "client_app.py", "README.md")
MOST = 600
"""Seconds that tests may take with a mutation: one that makes them wait for ever is noticed, too."""


@contextmanager
def copies(count: int) -> Iterator[SimpleQueue[Path]]:
    """Copies of the tree, for as many mutations at once."""
    free: SimpleQueue[Path] = SimpleQueue()
    with tempfile.TemporaryDirectory(prefix="mutation-") as place:
        for number in range(count):
            root = Path(place, str(number))
            for name in COPIED:
                shutil.copytree(TREE / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
            for name in FILES:
                shutil.copy(TREE / name, root / name)
            free.put(root)
        yield free


def noticed(root: Path, mutation: Mutation) -> bool:
    """Whether a test fails in the copy with the mutation; afterwards the copy is as it was."""
    path = root / mutation.file
    text = path.read_text()
    path.write_text(text.replace(mutation.old, mutation.new))
    tests = [f"tests/{name}" for name in mutation.tests]
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *tests]
    env = {**os.environ, "PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, timeout=MOST)
    except subprocess.TimeoutExpired:
        return True
    finally:
        path.write_text(text)
    if done.returncode not in (0, 1):  # neither passed nor failed
        raise RuntimeError(
            f"{mutation}: pytest ended with {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
        )
    return done.returncode == 1


def main() -> int:
    words = sys.argv[1:]
    chosen = [one for one in MUTATIONS if not words or any(word in str(one) for word in words)]
    for one in chosen:
        if (count := (TREE / one.file).read_text().count(one.old)) != 1:
            sys.exit(f"{one.file} has {one.old!r} {count} times, expected once: renew tests/mutation/table.py")
    jobs = len(os.sched_getaffinity(0))
    alive = []
    with copies(jobs) as free, ThreadPoolExecutor(jobs) as pool:

        def tried(mutation: Mutation) -> bool:
            root = free.get()
            try:
                return noticed(root, mutation)
            finally:
                free.put(root)

        for number, (one, found) in enumerate(zip(chosen, pool.map(tried, chosen), strict=True), 1):
            print(f"{number:3} of {len(chosen)}  {'noticed' if found else 'LIVES  '}  {one}", flush=True)
            if not found:
                alive.append(one)
    unexpected = [one for one in alive if not one.why]
    print(f"\n{len(chosen)} mutations, of which {len(alive)} live, {len(unexpected)} of them without a reason")
    for one in alive:
        print(f"  {one}: {one.why or 'no test notices it'}")
    return 1 if unexpected else 0


if __name__ == "__main__":
    sys.exit(main())
