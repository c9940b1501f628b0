"""How long the paper's protocol takes on features of PACS's size: every domain held out, 200 rounds, three sites.

    python benchmarks/pacs_size.py [--methods paper] [--rounds 200] [--jobs 0]

Features are random, of 512 dimensions, as many as PACS has images in each domain; times do not depend on their values.
They and the results go to a temporary folder. Prints the table that `fedclip sweep` prints, and the time.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

IMAGES = {"art_painting": 2048, "cartoon": 2344, "photo": 1670, "sketch": 3929}
CLASSES = ("dog", "elephant", "giraffe", "guitar", "horse", "house", "person")
DIM = 512


def write(folder: Path) -> None:
    """A feature folder in which classes are a little easier than chance."""
    generator = torch.Generator().manual_seed(0)
    text = torch.nn.functional.normalize(torch.randn(len(CLASSES), DIM, generator=generator), dim=1)
    save_file({"text_features": text}, folder / "classes.safetensors")
    for domain, count in IMAGES.items():
        labels = torch.randint(0, len(CLASSES), (count,), generator=generator)
        features = 0.1 * text[labels] + torch.randn(count, DIM, generator=generator) / DIM**0.5
        save_file({"image_features": features.half(), "labels": labels}, folder / f"{domain}.safetensors")
    described = {"model": "random", "embedding_dim": DIM, "logit_scale": 100.0, "prompt": "a picture of a {}"}
    facts = {**described, "class_names": CLASSES, "domains": list(IMAGES), "parameters": 151_277_313}
    (folder / "features.json").write_text(json.dumps(facts))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", default="paper")
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--jobs", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "features"
        folder.mkdir()
        write(folder)
        command = [
            str(Path(sys.executable).parent / "fedclip"),
            "sweep",
            "--data",
            f"features:{folder}",
            "--seeds",
            "1",
        ]
        command += ["--methods", given.methods, "--rounds", str(given.rounds), "--jobs", str(given.jobs)]
        begun = time.perf_counter()
        done = subprocess.run(command, env={**os.environ, "FEDCLIP_HOME": place})
        print(f"{sum(IMAGES.values()):,} images, {time.perf_counter() - begun:.0f} s from start to end")
    raise SystemExit(done.returncode)


if __name__ == "__main__":
    main()
