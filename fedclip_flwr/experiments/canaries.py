"""Canaries: what is put into a new simulation of a run for no other purpose than to be found again.

Each one is in by the toss of a coin, and an attack guesses these coins.

- **images**: features in random directions (with LoRA what it takes in their place: random bytes or activations), of
  random classes, at random sites. The adapter after the last round is compared with that of a second simulation without
  any, which an attacker who knows all other images could make, too. From the sums of one round all other images' sums
  are taken away; noise stays. With `dp=local` the attacker is the server, which sees each site's sums; else the
  attacker has the total with the noise, before anything is made of it: `gradient` is released like that, `span` and
  `full` are mended first.
- **sites**, for runs whose privacy is that of sites: their update is as long as may be, in a direction of their own.
  With `dp=central` one that is out sends an update of zero, and the attacker has the adapter after the last round. With
  `local` it sends the opposite, and the attacker is the server, which sees each update. That is what ε is about there.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from flwr.app import Message, MessageType
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from fedclip_flwr.base import Settings, UserError
from fedclip_flwr.base.seeds import seed_of
from fedclip_flwr.base.settings import ONE_ROUND
from fedclip_flwr.base.tensors import State
from fedclip_flwr.exchange import Report, privacy
from fedclip_flwr.exchange.private_sums import Hiding
from fedclip_flwr.exchange.records import write_answer
from fedclip_flwr.experiments.simulate import Result, Wrap, simulate
from fedclip_flwr.flower.grids import Node
from fedclip_flwr.learning import Classes, ClosedForm, Examples, Learner, OneRound, membership
from fedclip_flwr.learning.membership import Directions, Findings, flat
from fedclip_flwr.learning.metrics import Score, no_quality
from fedclip_flwr.learning.recipes import new_part
from fedclip_flwr.learning.sums import BITS
from fedclip_flwr.site import Site
from fedclip_flwr.site.holdings import together
from fedclip_flwr.site.sums import exact_sums


def found_images(
    sites: Sequence[Site],
    classes: Classes,
    settings: Settings,
    count: int,
    confidence: float,
    start: Learner | None = None,
) -> Findings:
    """The findings on canary images in a simulation of these settings; `start` as in `simulate`."""
    chance = torch.Generator().manual_seed(seed_of(settings.seed, "audit", "canaries"))
    owners = torch.randint(len(sites), (count,), generator=chance)
    inside = torch.rand(count, generator=chance) < 0.5
    canaries = drawn(sites, classes, count, chance)
    with_them = []
    for number, site in enumerate(sites):
        own = canaries.rows((inside & (owners == number)).to(canaries.labels.device))
        train = Examples(*(torch.cat(parts) for parts in zip(site.train, own, strict=True)))
        with_them.append(replace(site, train=train))
    if settings.method == ONE_ROUND and settings.strategy == "fedavg":
        scores = scores_in_sums(sites, with_them, canaries, owners, classes, settings)
        return findings_of(scores, inside, settings.delta, confidence, 0.0)
    unseeing, learner = (learnt(which, classes, settings, start) for which in (sites, with_them))
    attack = membership.drops if isinstance(learner, OneRound) else membership.by_gradients
    scores = attack(learner, unseeing, canaries, classes)
    return findings_of(scores, inside, settings.delta, confidence)


def scores_in_sums(
    sites: Sequence[Site],
    with_them: Sequence[Site],
    canaries: Examples,
    owners: Tensor,
    classes: Classes,
    settings: Settings,
) -> Tensor:
    """For each canary a number, above 0 if it seems to be in, by the sums of one round."""
    learner, held = held_sums(with_them, classes, settings)
    state = learner.state_dict()
    needed, bits = state[learner.NEEDED], int(state.get("bits", BITS))
    like = {name: state[name] for name in learner.SENT}
    hiding = Hiding.of(settings, like, needed, bits) if settings.hides_images else None
    scores = torch.zeros(len(owners), dtype=torch.float64)
    for numbers, sums in held:
        known = exact_sums(together(sites[number].train for number in numbers), classes, settings, needed, bits)
        known = hiding.in_units(known) if hiding else known
        rest = {name: sums[name] - tensor for name, tensor in known.items()}
        own = torch.isin(owners, torch.tensor(numbers))
        mine = canaries.rows(own.to(canaries.labels.device))
        deviations = hiding.deviations(len(numbers)) if hiding else None
        scores[own] = membership.unmixed_images(learner, rest, mine, float(classes.scale), deviations)
    return scores


def held_sums(
    sites: Sequence[Site], classes: Classes, settings: Settings
) -> tuple[ClosedForm, list[tuple[Sequence[int], State]]]:
    """What a simulation ends with, and the sums that the attacker holds, each with the numbers of their sites."""
    answers: dict[str, State] = {}

    def wrap(name: str, node: Node) -> Node:
        """A node whose sums are seen."""

        def answer(message: Message) -> Message:
            reply = node(message)
            if message.metadata.message_type == MessageType.TRAIN:
                answers[name] = arrays_of(reply)
            return reply

        return answer

    learner = new_part(settings, classes)
    assert isinstance(learner, ClosedForm)
    if settings.dp == "local":
        learner.load_state_dict(simulated(sites, classes, replace(settings, secure_aggregation=False), wrap).last)
        return learner, [([number], answers[site.name]) for number, site in enumerate(sites)]
    result = simulated(sites, classes, settings)
    learner.load_state_dict(result.last)
    return learner, [(range(len(sites)), {**result.last, **result.noised})]


def arrays_of(message: Message) -> State:
    return {name: torch.from_numpy(array.numpy()) for name, array in message.content.array_records["arrays"].items()}


def drawn(sites: Sequence[Site], classes: Classes, count: int, chance: torch.Generator) -> Examples:
    """Features in random directions, as long as images' own, of random classes; in place of bytes, random bytes."""
    usual = next(site.train.features for site in sites if len(site.train.labels))
    shape = (count, *usual.shape[1:])
    if usual.dtype == torch.uint8:
        features = torch.randint(256, shape, generator=chance).to(usual)
    else:
        features = F.normalize(torch.randn(shape, generator=chance), dim=-1).to(usual) * usual.norm(dim=-1).mean()
    labels = torch.randint(len(classes.text), (count,), generator=chance).to(usual.device)
    return Examples(features, labels)


def learnt(sites: Sequence[Site], classes: Classes, settings: Settings, start: Learner | None = None) -> Learner:
    """What a simulation has after the last round: which one is selected may depend on canaries."""
    learner = started(settings, classes, start)
    learner.load_state_dict(simulated(sites, classes, settings, start=start).last)
    return learner


def started(settings: Settings, classes: Classes, start: Learner | None) -> Learner:
    """A copy of the `start`; a new adapter by default."""
    return (copy.deepcopy(start) if start else new_part(settings, classes)).to(classes.text.device)


def simulated(
    sites: Sequence[Site],
    classes: Classes,
    settings: Settings,
    wrap: Wrap = lambda name, node: node,
    start: Learner | None = None,
) -> Result:
    how: dict[str, Any] = {"start": start, "test_every_round": False, "wrap": wrap}
    with tqdm(desc="simulating", total=settings.rounds, unit=" rounds", delay=2, leave=False) as bar:
        return simulate(sites, classes, None, settings, after_round=bar.update, **how)


def findings_of(
    scores: Tensor, inside: Tensor, delta: float, confidence: float, middle: float | None = None
) -> Findings:
    """The findings of an attack that guesses a canary to be in if its score is above the middle (default: median)."""
    signed = torch.where(inside, 1, -1) * (scores - (scores.quantile(0.5) if middle is None else middle))
    return membership.findings(scores[inside], scores[~inside], signed, delta, confidence)


def found_sites(
    sites: Sequence[Site],
    classes: Classes,
    settings: Settings,
    count: int,
    confidence: float,
    begin: Learner | None = None,
) -> Findings:
    """The findings on canary sites in a simulation of these settings; `begin` is the `start` of `simulate`."""
    settings = replace(
        settings, codec="float32", secure_aggregation=False, fraction_train=1.0, early_stop=0, site_weights="equal"
    )
    chance = torch.Generator().manual_seed(seed_of(settings.seed, "audit", "canaries"))
    start = started(settings, classes, begin).on_cpu()
    if count > (numbers := len(flat(start.values()))):
        raise UserError(f"--canaries {count}: an adapter of {numbers} numbers has room for as many; take fewer")
    directions = Directions.drawn(numbers, count, chance)
    inside = torch.rand(count, generator=chance) < 0.5
    seen = torch.zeros(count, dtype=torch.float64)
    out = 0.0 if settings.dp == "central" else -1.0
    largest = max(sites, key=lambda site: len(site.train.labels))
    none = largest.train.rows(slice(0))
    names = {f"canary-{number}": number for number in range(count)}
    canaries = [Site(name, largest.train, none, none, "canary") for name in names]

    def wrap(name: str, node: Node) -> Node:
        """A canary's node: it learns nothing, and sends its own update."""
        if name not in names:
            return node
        length = settings.clipping_norm * (1.0 if inside[names[name]] else out)
        update = shaped(length * directions.one(names[name]), start)

        def answer(message: Message) -> Message:
            if message.metadata.message_type != MessageType.TRAIN:
                return node(message)
            received = arrays_of(message)
            sent = privacy.at_site({key: tensor + update[key] for key, tensor in received.items()}, received, settings)
            moved = flat(sent.values()) - flat(received.values())
            seen[names[name]] += directions.along(moved)[names[name]]
            report = Report(len(largest.train.labels), Score(0, 0, 0.0), no_quality(len(classes.text)))
            return Message(write_answer(report, sent), reply_to=message)

        return answer

    result = simulated([*sites, *canaries], classes, settings, wrap, begin)
    if settings.dp == "local":
        return findings_of(seen, inside, settings.delta, confidence, 0.0)
    moved = directions.along(flat(result.last.values()) - flat(start.values()))
    return findings_of(moved, inside, settings.delta, confidence)


def shaped(vector: Tensor, like: State) -> State:
    parts = torch.split(vector, [tensor.numel() for tensor in like.values()])
    return {name: part.view(like[name].shape).float() for name, part in zip(like, parts, strict=True)}
