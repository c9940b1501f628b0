"""What a round costs a site once its features are stored.

    python -m benchmarks.warm_epoch

One epoch of the attention adapter over 1,200 stored features of 512 dimensions in batches of 32, each in a new process
(the first epoch pays for what is loaded late), beside the same loop with torch.optim.Adam.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from statistics import median

from benchmarks.common import workplace
from harness.features import write_features
from harness.machine import machine, table

RUNS = 5
SITE = """
import json, sys, time
start = time.perf_counter()
from fedclip_flwr.learning.adapters import make_adapter
from fedclip_flwr.base.settings import Settings
from fedclip_flwr.features import open_features
from fedclip_flwr.learning import RECIPES, train
imported = time.perf_counter()
features = open_features(Settings(data="features:" + sys.argv[1]))
examples, classes = features.examples("site").ready(), features.classes.ready()
adapter = make_adapter("attention", 512)
opened = time.perf_counter()
train(adapter, examples, classes, RECIPES["default"], learning_rate=2e-4)
first = time.perf_counter()
train(adapter, examples, classes, RECIPES["default"], learning_rate=2e-4)
second = time.perf_counter()
optimizer = __import__("torch").optim.Adam(adapter.parameters(), lr=2e-4)
for rows in __import__("torch").randperm(1200).split(32):
    batch = examples.rows(rows)
    loss = RECIPES["default"].loss(adapter(batch.features), batch.labels, classes)
    optimizer.zero_grad(); loss.backward(); optimizer.step()
plain = time.perf_counter()
print(json.dumps({
    "imports": imported - start, "opening": opened - imported, "first epoch": first - opened,
    "second epoch": second - first, "first epoch, torch.optim.Adam": plain - second,
}))
"""


def main() -> None:
    argparse.ArgumentParser(prog="python -m benchmarks.warm_epoch", description=__doc__.splitlines()[0]).parse_args()
    with workplace() as place:
        command = [sys.executable, "-c", SITE, str(write_features(place / "features", {"site": 1200}))]
        runs = [json.loads(subprocess.check_output(command)) for _ in range(RUNS)]
    rows = []
    for part in runs[0]:
        times = [run[part] for run in runs]
        rows.append([part, *(f"{found(times):.3f}" for found in (median, min, max))])
    print(table(["part of a site's work", "median seconds", "least", "most"], rows))
    print(f"\n{RUNS} new processes; {machine()}")


if __name__ == "__main__":
    main()
