"""What hostile sites come to, with every way to bring the sites' updates together.

    python -m benchmarks.attacks [--data features:PATH] [--sites 10] [--seeds 3] [--rounds 20]

Two of ten sites (a fifth) attack in every round, the first and the last by name. Each also lies about its validation
images: none is recognised, with a huge loss, where the adapter does better than zero-shot, and all are, without any
loss, where it does not. Prints test accuracy in % of the selected adapter, mean over the other sites and the seeds.

    sign flip     the reverse of what it has learnt
    scaled        a hundred times that
    noise         random numbers, ten times as long as what it has learnt
    label flip    what it has learnt from images whose labels are all the next class's
    colluding     both send the same: the reverse of what one has learnt, 2.9 times as long, which the limit lets pass
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import mean

import torch
from flwr.app import Message, MessageType

from benchmarks.common import at_least, finish, opened
from fedclip_flwr.base import Settings
from fedclip_flwr.base.settings import ROBUST
from fedclip_flwr.base.tensors import State, length_of
from fedclip_flwr.exchange.records import read_answer, read_task, write_answer
from fedclip_flwr.experiments.simulate import make_sites, simulate
from fedclip_flwr.features import Features
from fedclip_flwr.flower.grids import Node
from fedclip_flwr.learning import RECIPES, evaluate
from fedclip_flwr.learning.adapters import ADAPTERS
from fedclip_flwr.learning.metrics import Score, mean_accuracy
from fedclip_flwr.learning.recipes import new_adapter
from fedclip_flwr.site import Site
from harness.machine import table

PLAIN = "plain FedAvg"
DEFAULT = "default"
SETTINGS: Mapping[str, dict[str, str | float]] = {
    PLAIN: {"max_update_norm": 0.0, "recipe": "heard"},
    DEFAULT: {},
    **{strategy: {"strategy": strategy} for strategy in ROBUST},
}
REACH = 2.9


def times(state: State, received: State, factor: float) -> State:
    return {name: tensor + factor * (state[name] - tensor) for name, tensor in received.items()}


def noisy(state: State, received: State, chance: torch.Generator) -> State:
    random = {name: torch.randn(tensor.shape, generator=chance) for name, tensor in received.items()}
    far = 10 * length_of(state, received) / length_of(random, {n: torch.zeros_like(t) for n, t in random.items()})
    return {name: tensor + far * random[name] for name, tensor in received.items()}


@dataclass
class Attackers:
    """Those of these names; the others know what the first one has learnt."""

    names: Sequence[str]
    attack: str
    zero_shot: Mapping[str, float]
    seed: int
    learnt: dict[int, State] = field(default_factory=dict)

    def sends(self, number: int, site: str, state: State, received: State) -> State:
        if site not in self.names:
            return state
        return ATTACKS[self.attack](self, number, state, received)

    def claims(self, site: str, score: Score) -> Score:
        if site not in self.names or score.accuracy is None:
            return score
        if score.accuracy > self.zero_shot[site]:
            return score._replace(correct=0, loss=1e6 * score.examples)
        return score._replace(correct=score.examples, loss=0.0)

    def wrap(self, name: str, node: Node) -> Node:
        """The site's node, which sends and claims what an attacker does."""
        if name not in self.names:
            return node

        def answer(message: Message) -> Message:
            reply, content = node(message), message.content
            if message.metadata.message_type == MessageType.QUERY:
                return reply
            arrays = content.array_records["arrays"]
            received: State = {key: torch.from_numpy(array.numpy()) for key, array in arrays.items()}
            trains = message.metadata.message_type == MessageType.TRAIN
            report, state = read_answer(reply.content, received if trains else None)
            report = report._replace(validation=self.claims(name, report.validation))
            sent = self.sends(read_task(content).round, name, state, received) if trains else None
            return Message(write_answer(report, sent), reply_to=message)

        return answer

    def together(self, number: int, state: State, received: State) -> State:
        return times(self.learnt.setdefault(number, state), received, -REACH)


Attack = Callable[[Attackers, int, State, State], State]
ATTACKS: Mapping[str, Attack] = {
    "sign flip": lambda who, number, state, received: times(state, received, -1),
    "scaled": lambda who, number, state, received: times(state, received, -100),
    "noise": lambda who, number, state, received: noisy(
        state, received, torch.Generator().manual_seed(1000 * who.seed + number)
    ),
    "label flip": lambda who, number, state, received: state,
    "colluding": Attackers.together,
}


def flipped(site: Site, classes: int) -> Site:
    return replace(site, train=site.train._replace(labels=(site.train.labels + 1) % classes))


def accuracy(features: Features, sites: Sequence[Site], settings: Settings, attack: str = "") -> tuple[float, float]:
    """Of the other sites' test images, in %: zero-shot, and by the selected adapter."""
    names = [sites[0].name, sites[-1].name]
    honest = [site for site in sites if site.name not in names]
    hostile = None
    if attack:
        classes = len(features.classes.text)
        zero = {site.name: evaluate(None, site.validation, features.classes).accuracy or 0.0 for site in sites}
        hostile = Attackers(names, attack, zero, settings.seed)
        if attack == "label flip":
            sites = [flipped(site, classes) if site.name in names else site for site in sites]
    result = simulate(
        sites,
        features.classes,
        None,
        settings,
        test_every_round=False,
        wrap=hostile.wrap if hostile else lambda name, node: node,
    )
    adapter = new_adapter(settings, features.classes.dim)

    def tested() -> float:
        return 100 * (mean_accuracy(evaluate(adapter, site.test, features.classes) for site in honest) or 0.0)

    before = tested()
    adapter.load_state_dict(result.state)
    return before, tested()


def compare(features: Features, many: int, seeds: int, rounds: int, adapter: str) -> str:
    """The table, and below it what holds of it."""
    RECIPES["heard"] = replace(RECIPES["default"], most_gain=1.0)  # selection by the plain mean of what sites claim
    columns = ["none", *ATTACKS]
    found: dict[tuple[str, str], float] = {}
    zero = 0.0
    rows = []
    for name, given in SETTINGS.items():
        for attack in columns:
            tries = []
            for seed in range(seeds):
                sites, _ = make_sites(features, "", many, seed)
                how = Settings(**{**given, "adapter": adapter, "num_server_rounds": rounds, "seed": seed})  # type: ignore[arg-type]
                tries.append(accuracy(features, sites, how, "" if attack == "none" else attack))
            zero, found[name, attack] = (mean(values) for values in zip(*tries, strict=True))
        rows.append([name, *(f"{found[name, attack]:.1f}" for attack in columns)])
        print(" ".join(f"{cell:>14}" for cell in rows[-1]), file=sys.stderr, flush=True)
    clean = found[DEFAULT, "none"]
    kept = {attack: (found[DEFAULT, attack] - zero) / (clean - zero) for attack in ATTACKS}
    near = {
        attack: [name for name in SETTINGS if name != PLAIN and found[name, attack] >= clean - 1] for attack in ATTACKS
    }
    words = [
        f"Zero-shot: {zero:.1f}; the default without attacks: {clean:.1f}. Of that gain it keeps under attack: "
        + ", ".join(f"{attack} {100 * share:.0f} %" for attack, share in kept.items())
        + ".",
        "Within 1 point of it: "
        + "; ".join(f"{attack}: {', '.join(names) or '**none**'}" for attack, names in near.items())
        + ".",
    ]
    return "\n\n".join([table(["", *columns], rows), *words])


def main() -> str:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.attacks", description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="drawn")
    parser.add_argument("--adapter", default="attention", choices=ADAPTERS)
    parser.add_argument("--sites", type=at_least(3), default=10)
    parser.add_argument("--seeds", type=at_least(1), default=3)
    parser.add_argument("--rounds", type=at_least(1), default=20)
    given = parser.parse_args()
    logging.getLogger("flwr").setLevel(logging.WARNING)
    features = opened(given.data)
    print(compare(features, given.sites, given.seeds, given.rounds, given.adapter))
    described = f"{given.sites} sites, {given.adapter}, {given.rounds} rounds, {given.seeds} seeds from 0"
    return f"\n{described}"


if __name__ == "__main__":
    finish(main)
