"""Many federations in a row, each with a SuperLink and a Ray of its own: do all of them run, and how long do they take?

    python benchmarks/starts.py [--runs 20] [--nodes 10] [KEY=VALUE]...

The first one encodes the images unless `FEDCLIP_HOME` knows them; the others differ only in what starting costs.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--nodes", type=int, default=10)
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE")
    given = parser.parse_args()
    seconds, failed, adapters = [], 0, set()
    for number in range(1, given.runs + 1):
        with tempfile.TemporaryDirectory() as results:
            command = [str(Path(sys.executable).with_name("fedclip")), "run", "--nodes", str(given.nodes)]
            command += [f"results-dir={results}", *given.settings]
            begun = time.perf_counter()
            done = subprocess.run(command, capture_output=True, text=True)
            seconds.append(time.perf_counter() - begun)
            adapter = Path(results, "latest", "adapter.safetensors")
            if done.returncode == 0:
                adapters.add(hashlib.sha256(adapter.read_bytes()).hexdigest())
            else:
                failed += 1
                print(done.stdout + done.stderr)
        print(f"run {number}: exit status {done.returncode}, {seconds[-1]:.1f} s", flush=True)
    print(
        f"{given.runs} runs of {given.nodes} sites, {failed} failed, {len(adapters)} different adapters; "
        f"first {seconds[0]:.0f} s, then median {median(seconds[1:] or seconds):.0f} s, at most "
        f"{max(seconds[1:] or seconds):.0f} s; {os.cpu_count()} cores, {platform.machine()}"
    )


if __name__ == "__main__":
    main()
