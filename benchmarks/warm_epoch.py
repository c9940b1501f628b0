"""What a round costs a site once its features are stored.

    python benchmarks/warm_epoch.py

One epoch of the attention adapter over 1,200 stored features of 512 dimensions in batches of 32, each in a new process
(the first epoch pays for what is loaded late), beside the same loop with torch.optim.Adam.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.nn import functional as F

RUNS = 5
SITE = """
import json, sys, time
start = time.perf_counter()
from fedclip_flwr.adapters import make_adapter
from fedclip_flwr.config import Settings
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


def write_features(folder: Path) -> None:
    """A feature folder of random features: learning takes the same time on them."""
    torch.manual_seed(0)
    names = [f"class {i}" for i in range(7)]
    facts = {"model": "random", "embedding_dim": 512, "logit_scale": 100.0, "prompt": "{}", "class_names": names}
    (folder / "features.json").write_text(json.dumps({**facts, "domains": ["site"]}))
    save_file({"text_features": F.normalize(torch.randn(7, 512), dim=1)}, folder / "classes.safetensors")
    tensors = {"image_features": F.normalize(torch.randn(1200, 512), dim=1), "labels": torch.randint(0, 7, (1200,))}
    save_file(tensors, folder / "site.safetensors")


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        write_features(Path(name))
        command = [sys.executable, "-c", SITE, name]
        runs = [json.loads(subprocess.check_output(command)) for _ in range(RUNS)]
    print("| part of a site's work | median seconds | least | most |")
    print("| --- | --- | --- | --- |")
    for part in runs[0]:
        times = [run[part] for run in runs]
        print(f"| {part} | {statistics.median(times):.3f} | {min(times):.3f} | {max(times):.3f} |")
    print(f"\n{RUNS} new processes, {os.cpu_count()} cores, {platform.machine()}, torch {torch.__version__}")


if __name__ == "__main__":
    main()
