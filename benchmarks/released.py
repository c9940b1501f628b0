"""The recipe `paper` beside FedCLIP's released code: the same features go through both, and the adapters are compared.

    python -m benchmarks.released --code PATH [--features PATH] [--rounds 1,3] [--lengths 1,10,varying]

PATH is a checkout of github.com/microsoft/PersonalizedFL. Its own `train`, `communication` and `test` run, on its own
`ClipModelat`; nothing of it is in this project. In place of the package `clip` it gets a model whose images are stored
features and whose texts are numbers of prompts, and in place of `torchvision` nothing. What its script does around
these functions (a new Adam each round, which round is kept) is done here. The order in which rows are drawn is ours.

The features are those of a feature folder, the last domain held out, or random ones; they are brought to each of the
lengths (`varying`: 5 to 15, for each image its own), and divided among two equal sites, then among three of which two
have 36 images to train on and one the rest. Told is the greatest difference of any number of the adapter, and how far
the adapter went in the first round. To reach: at most 1e-6, the same accuracies in each round, and the same round
selected.
"""

from __future__ import annotations

import argparse
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from statistics import median
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.common import at_least, finish, workplace
from fedclip_flwr.base import Settings, UserError
from fedclip_flwr.base.seeds import seed_of
from fedclip_flwr.experiments.simulate import simulate
from fedclip_flwr.features import FeatureFolder
from fedclip_flwr.learning import RECIPES, Classes, Examples, train
from fedclip_flwr.learning.recipes import new_adapter
from fedclip_flwr.site import Site
from fedclip_flwr.site.holdings import divide
from harness.features import DIM, write_features
from harness.machine import table

SEED, HELD_OUT = 7, "held out"
FUNCTIONS = ("train", "communication", "test")
RECIPE = RECIPES["paper"]
LAYERS = {"0.weight": "inner.weight", "0.bias": "inner.bias", "2.weight": "outer.weight", "2.bias": "outer.bias"}
"""Their tensors' names, and ours."""
State = dict[str, Tensor]
Batches = list[tuple[Tensor, Tensor, Tensor]]


class StoredClip(nn.Module):
    """What the released code takes for CLIP: images are features already, texts are numbers of prompts."""

    def __init__(self, classes: Classes) -> None:
        super().__init__()
        self.register_buffer("text", classes.text)
        self.logit_scale = nn.Parameter(torch.tensor(float(classes.scale)).log())

    def encode_image(self, images: Tensor) -> Tensor:
        return images

    def encode_text(self, numbers: Tensor) -> Tensor:
        return self.get_buffer("text")[numbers]


class Released:
    """The released code's functions on stored features."""

    def __init__(self, checkout: Path, classes: Classes) -> None:
        root = checkout / "fedclip"
        if not (root / "methods" / "fed_at_clip.py").is_file():
            raise UserError(f"--code {checkout}: there is no fedclip/methods/fed_at_clip.py: name a checkout of it")
        self._clip = StoredClip(classes)
        stand_ins: dict[str, dict[str, Any]] = {
            "clip": {"load": lambda *_, **__: (self._clip, None), "tokenize": lambda number: torch.tensor([number])},
            "torchvision": {},
            "torchvision.datasets": {},
            "torchvision.transforms": dict.fromkeys(("Compose", "Resize", "CenterCrop", "ToTensor"), _nothing),
        }
        stand_ins["torchvision.transforms"]["Normalize"] = _nothing
        for name, members in stand_ins.items():
            sys.modules[name] = ModuleType(name)
            sys.modules[name].__dict__.update(members)
        sys.path.insert(0, str(root))
        self.code = import_module("methods.fed_at_clip")
        self._model = import_module("nets.models").ClipModelat
        words = import_module("utils.clip_util").get_text_features_list
        words.__defaults__ = ("cpu", False)  # it says cuda, whatever the machine has
        self._classes = len(classes.text)

    def model(self, start: State) -> Any:
        """One of its models with our first weights."""
        made = self._model("ViT-B/32", device="cpu")
        made.initdgatal([(torch.zeros(1, len(start["inner.bias"])), None, torch.zeros(1))])
        made.img_adap.load_state_dict({name: start[own] for name, own in LAYERS.items()})
        made.setselflabel(range(self._classes))
        return made

    def optimizer(self, model: Any) -> torch.optim.Optimizer:
        return torch.optim.Adam(
            [{"params": model.img_adap.parameters()}], lr=5e-5, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.2
        )

    def rounds(self, start: State, case: Case, count: int) -> tuple[list[State], list[list[float]], int]:
        """The server's adapter and the accuracies after each round, and the round that its script keeps."""
        server = self.model(start)
        names, apart = [site.name for site in case.sites], len(case.sites)
        models = [self.model(start) for _ in range(apart + 1)]
        args = Namespace(test_envs=[apart])
        states, found, best, kept = [], [], 0.0, 0
        for number in range(1, count + 1):
            for site, model in zip(case.sites, models, strict=False):
                batches = in_order(site.train, seed_of(SEED, "train", site.name, number))
                self.code.train(args, model, batches, self.optimizer(model), "cpu")
            server, models = self.code.communication(args, server, models, [1 / apart] * (apart + 1))
            states.append({own: server.img_adap.state_dict()[name].clone() for name, own in LAYERS.items()})
            validation = [self._tested(m, s.validation) for s, m in zip(case.sites, models, strict=False)]
            tests = [self._tested(m, s.test) for s, m in zip(case.sites, models, strict=False)]
            found.append([sum(part) / len(names) for part in (validation, tests)] + [self._tested(server, case.unseen)])
            if sum(validation) > best:
                best, kept = sum(validation), number
        return states, found, kept

    def _tested(self, model: Any, examples: Examples) -> float:
        batches = [(x, None, y) for x, y in zip(*(torch.split(tensor, 32) for tensor in examples), strict=True)]
        return float(self.code.test(Namespace(), model, batches, "cpu"))


class Case(NamedTuple):
    """What both learn from."""

    sites: Sequence[Site]
    unseen: Examples
    classes: Classes


def _nothing(*_: object, **__: object) -> None:
    """In place of a transform that is built and never called."""


def in_order(examples: Examples, seed: int) -> Batches:
    """The batches that ours draws with this seed, as theirs takes them: the labels are the texts' numbers."""
    order = torch.randperm(len(examples.labels), generator=torch.Generator().manual_seed(seed))
    return [(x, y, y) for x, y in (examples.rows(rows) for rows in torch.split(order, 32))]


def brought_to(length: str, examples: Examples) -> Examples:
    """The features with such a length, or each with its own."""
    long: Tensor | float = 5 + 10 * torch.rand(len(examples.labels), 1, generator=torch.Generator().manual_seed(1))
    if length != "varying":
        long = float(length)
    return Examples(F.normalize(examples.features.float(), dim=1) * long, examples.labels)


def divided(examples: Examples, sizes: Sequence[int]) -> list[Site]:
    """Sites with so many images, of which 60 % are for training."""
    order = torch.randperm(len(examples.labels), generator=torch.Generator().manual_seed(SEED))
    rows = torch.split(order, list(sizes))
    return [divide(f"site-{number}", "", examples.rows(own), SEED) for number, own in enumerate(rows)]


def cases(features: FeatureFolder, lengths: Sequence[str]) -> dict[tuple[str, str], Case]:
    """By the length, and by the sites in words."""
    *seen, apart = features.domains
    made = {}
    for length in lengths:
        whole = Examples(*(torch.cat(parts) for parts in zip(*map(features.examples, seen), strict=True)))
        whole, unseen = (brought_to(length, part) for part in (whole, features.examples(apart)))
        count = len(whole.labels)
        for sizes in ([count // 2, count - count // 2], [60, 60, count - 120]):
            sites = divided(whole, sizes)
            counts = ", ".join(f"{len(site.train.labels):,}" for site in sites)
            made[length, counts] = Case(sites, unseen.ready(), features.classes.ready())
    return made


def ours(case: Case, rounds: int) -> tuple[State, Mapping[int, list[float]], int]:
    """The last round's adapter, the accuracies after each, and the round that is selected."""
    settings, unseen = Settings(recipe="paper", seed=SEED, num_server_rounds=rounds), {HELD_OUT: case.unseen}
    chosen = simulate(case.sites, case.classes, unseen, settings)
    blind = [replace(site, validation=site.validation.rows(slice(0))) for site in case.sites]
    last = simulate(blind, case.classes, None, settings)  # nothing to choose by: the last round is taken
    lines = {line.round: [line.validation or 0.0, line.seen or 0.0, line.unseen or 0.0] for line in chosen.rounds}
    return last.state, lines, chosen.selected.round


def furthest(one: State, other: State) -> float:
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def timed(work: Callable[[], object], steps: int) -> float:
    begun = time.perf_counter()
    work()
    return (time.perf_counter() - begun) / steps


def step_times(released: Released, case: Case, start: State, times: int = 7) -> tuple[float, float]:
    """Median seconds of a step, of theirs and of ours, in turn."""
    site = max(case.sites, key=lambda site: len(site.train.labels))
    batches = in_order(site.train, 0)
    model, learner = released.model(start), new_adapter(Settings(recipe="paper", seed=SEED), case.classes.dim)
    how: dict[str, Any] = {"learning_rate": 5e-5, "batch_size": 32, "seed": 0}
    found = []
    for _ in range(times + 1):  # the first is warming up
        optimizer = released.optimizer(model)
        theirs = timed(lambda o=optimizer: released.code.train(None, model, batches, o, "cpu"), len(batches))  # type: ignore[misc]
        own = timed(lambda: train(learner, site.train, case.classes, RECIPE, **how), len(batches))
        found.append((theirs, own))
    return median(theirs for theirs, _ in found[1:]), median(own for _, own in found[1:])


def main() -> str:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.released", description=__doc__.splitlines()[0])
    parser.add_argument("--code", type=Path, required=True, help="a checkout of github.com/microsoft/PersonalizedFL")
    parser.add_argument("--features", type=Path, help="a feature folder; else random features")
    parser.add_argument("--rounds", default="1,3", help="the adapters are compared after so many rounds")
    parser.add_argument("--lengths", default="1,10,varying", help="to which features are brought")
    parser.add_argument("--images", type=at_least(200), default=1500, help="random ones, of each of two domains")
    given = parser.parse_args()
    torch.set_num_threads(1)  # the matrices are small: more threads only wait for each other
    with workplace() as place:
        images = {"seen": given.images, "unseen": given.images}
        features = FeatureFolder(given.features or write_features(place / "features", images))
        released = Released(given.code.absolute(), features.classes.ready())
        start = new_adapter(Settings(recipe="paper", seed=SEED), features.dim).state_dict()
        rounds = sorted(map(int, given.rounds.split(",")))
        rows, worst, case = [], 0.0, None
        for (length, sizes), case in cases(features, given.lengths.split(",")).items():
            theirs, accuracies, kept = released.rounds(start, case, rounds[-1])
            for count in rounds:
                state, lines, selected = ours(case, count)
                apart = max(abs(a - b) for n in range(count) for a, b in zip(accuracies[n], lines[n + 1], strict=True))
                same = "yes" if selected == kept else f"theirs {kept}, ours {selected}"
                same = same if count == rounds[-1] else ""
                difference = furthest(state, theirs[count - 1])
                worst = max(worst, difference)
                moved = f"{furthest(theirs[0], start):.1e}" if count == rounds[0] else ""
                rows.append([length, sizes, str(count), f"{difference:.1e}", moved, f"{100 * apart:.2f}", same])
        head = ["length", "images to train on", "rounds", "adapters differ by", "round 1 moved them by"]
        print(table([*head, "accuracies differ by, points", "same round selected"], rows))
        print(f"\nTo reach: at most 1e-6. Found: {worst:.1e}.\n")
        assert case
        theirs_s, ours_s = step_times(released, case, start)
        print(
            table(
                ["a step of 32 stored features", "theirs", "ours", "times less"],
                [["", f"{1e3 * theirs_s:.2f} ms", f"{1e3 * ours_s:.2f} ms", f"{theirs_s / ours_s:.1f}"]],
            )
        )
        described = given.features.name if given.features else f"random features of {DIM} numbers"
        return f"\n{described}, one thread"


if __name__ == "__main__":
    finish(main)
