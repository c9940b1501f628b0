"""A feature folder of real images, of the kind that the tables of real features are from: Caltech-101 and CIFAR-10.

    python -m benchmarks.real_features [--caltech DATA] [--cifar DATA] [--model NAME] [--each 50] --out FOLDER

Both data sets are sites' domains in one space of 49 classes: 40 of Caltech-101, and the 10 of CIFAR-10, which have the
airplane in common. DATA is what the setting `data` takes: a data set of the Hugging Face hub, or `folder:PATH` with
class/image. The first images of each class are taken, at most `--each`; they are put into a folder for the time being,
and encoded as `fedclip encode` does, with the prompt `a {}`: features keep the length that CLIP gives them.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

from tqdm import tqdm

from benchmarks.common import at_least, workplace
from fedclip_flwr.base import UserError
from fedclip_flwr.data import open_source
from fedclip_flwr.data.presets import normalized_name
from fedclip_flwr.inference import encode

CALTECH = (
    *("Leopards", "accordion", "airplanes", "ant", "barrel", "butterfly", "camera", "cannon"),
    *("ceiling_fan", "chair", "chandelier", "crab", "crocodile", "cup", "dalmatian", "dolphin"),
    *("dragonfly", "elephant", "ferry", "flamingo", "helicopter", "kangaroo", "lamp", "laptop"),
    *("lobster", "pigeon", "pizza", "saxophone", "scissors", "soccer_ball", "stapler", "starfish"),
    *("stop_sign", "strawberry", "sunflower", "tick", "umbrella", "watch", "wheelchair", "wrench"),
)
CIFAR = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
RENAMED = {"Leopards": "leopard", "airplanes": "airplane", "automobile": "car (automobile)"}
"""Under which names the class prompts have them; the others only lose their underscores."""


def taken(data: str, classes: Iterable[str], each: int, domain: str, root: Path) -> None:
    """Puts the images of these classes into root/domain/class."""
    source, _ = open_source(data)
    wanted = {normalized_name(name): RENAMED.get(name, name.replace("_", " ")) for name in classes}
    names: Mapping[int, str] = {
        number: wanted[normalized_name(name)]
        for number, name in enumerate(source.class_names)
        if normalized_name(name) in wanted
    }
    if lacking := {*wanted.values()} - {*names.values()}:
        raise UserError(f"--{domain} {data}: it has no class for {', '.join(sorted(lacking))}")
    found = Counter[int]()
    for part in source.domains:
        pictures = source.pictures(part)
        for picture in tqdm(pictures, total=source.count(part), desc=f"reading {domain}", unit=" images"):
            label = picture.label
            if label in names and picture.image is not None and found[label] < each:
                place = root / domain / names[label]
                place.mkdir(parents=True, exist_ok=True)
                picture.image.save(place / f"{found[label]:05}.png")
                found[label] += 1


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.real_features", description=__doc__.splitlines()[0].partition(":")[0]
    )
    parser.add_argument("--caltech", default="flwrlabs/caltech101", help="as the setting data")
    parser.add_argument("--cifar", default="uoft-cs/cifar10", help="as the setting data")
    parser.add_argument("--model", default="openai/clip-vit-base-patch32", help="as the setting model")
    parser.add_argument("--each", type=at_least(5), default=50, help="images of a class at most")
    parser.add_argument("--out", required=True, help="the feature folder")
    given = parser.parse_args()
    out = Path(given.out).expanduser().absolute()
    with workplace() as place:
        images = place / "images"
        taken(given.caltech, CALTECH, given.each, "caltech", images)
        taken(given.cifar, CIFAR, given.each, "cifar", images)
        print(encode.encode([f"data=folder:{images}", f"model={given.model}", "prompt=a {}"], str(out)))


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        raise SystemExit(str(error)) from None
