"""A run on the terminal: the plan before round 1, a line for each round, and the closing tables."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedclip_flwr.base import Settings, files
from fedclip_flwr.base.roles import HOLDOUT
from fedclip_flwr.base.settings import GRADIENT, LORA, ONE_ROUND
from fedclip_flwr.base.text import bytes_of, counted, gain, natural, percent, some, table
from fedclip_flwr.data import Vocabulary, held_out

if TYPE_CHECKING:  # they import torch, which commands on runs do not need
    from fedclip_flwr.base.tensors import State
    from fedclip_flwr.exchange import Hello
    from fedclip_flwr.features import Features
    from fedclip_flwr.server import RoundResult

HEADINGS = ("round", "seen", "unseen", "val", "loss", "sites", "bytes", "seconds")
UNCOVERED = {
    "site": "not covered: image counts, and the accuracies and losses that select the round",
    "image": "not covered: image counts, which classes a site has, and scores on validation and test images",
}
"""What differential privacy does not hide, by its unit."""
TOWERS = {"vision": "the vision tower", "text": "the text tower", "both": "both towers"}
UNITS = {"site": "a site as a whole", "image": "each image"}
NOT_THE_PAPERS = (
    "its adapter expects features of CLIP's own length, but some features here were normalised to unit length; set "
    "feature-norm=N, or feature_norm in features.json"
)


def say(text: str) -> None:
    """Prints, and flushes the output."""
    print(text, flush=True)


def plan(
    settings: Settings,
    features: Features,
    holdout: str | None,
    hellos: Collection[Hello],
    tensors: State,
    folder: Path,
    memory: int | None = None,
    frozen: State | None = None,
) -> str:
    """The text before round 1: settings, data, sites.

    `memory`: bytes that a step takes, if they were measured. `frozen`: tensors that go to the sites in each message.
    """
    weights = "sites weighted equally" if settings.site_weights == "equal" else "sites weighted by their examples"
    part, pull = settings.fraction_train, f" with mu {settings.proximal:g}" if settings.proximal else ""
    share_of_sites = f", {100 * part:g} % of them train in a round" if part < 1 else ""
    names = features.vocabulary.class_names
    revision = f" at {features.model_revision[:12]}" if features.model_revision else ""
    alpha = f", alpha {settings.alpha:g}" if settings.partition == "dirichlet" else ""
    partition = "" if settings.partition == "domain" else f", partitioned by {settings.partition}{alpha}"
    facts = [
        ("model", f"{features.model}{revision}, {_prompt(features.vocabulary)}"),
        ("data", settings.data + partition),
        ("classes", f"{len(names)}: {some(names)}"),
        ("held out", _held_out(features, holdout, hellos)),
        ("trained", _trained(settings, features, tensors)),
        ("traffic", _traffic(settings, tensors, frozen or {})),
        *(
            [("memory", f"about {bytes_of(memory)} for a batch of {settings.batch_size}, and the model")]
            if memory
            else []
        ),
        *_learning(settings, features, hellos),
        *([("", f"features scaled to length {settings.feature_norm:g}")] if settings.feature_norm else []),
        *(
            [("warning", f"this can't be the paper's result: {NOT_THE_PAPERS}")]
            if settings.sees_given_length and any(hello.unit_length for hello in hellos)
            else []
        ),
        *(
            []
            if settings.method == ONE_ROUND
            else [("averaging", f"{settings.strategy}{pull}, {weights}" + share_of_sites)]
        ),
        *_privacy(settings),
        ("features", str(files.home() / "features")),
        ("run folder", str(folder)),
    ]
    sites = sorted(hellos, key=lambda hello: natural(hello.site))
    domains = {domain for hello in sites for domain in hello.domain.split("+") if hello.role != HOLDOUT}
    apart = {*held_out(holdout, features.domains)}
    nowhere = sorted({*features.domains} - apart - domains) if domains <= {*features.domains} else []
    present = {number for hello in sites for number in hello.classes}
    nowhere += [f"class {name}" for number, name in enumerate(names) if number not in present]
    if nowhere:
        facts.append(("at no site", some(nowhere)))
    rows = [(h.site, _domain(h), f"{h.train:,}", f"{h.validation:,}", f"{h.test:,}", len(h.classes)) for h in sites]
    shown = table([(counted(len(sites), "site"), "domain", "train", "val", "test", "classes"), *rows])
    return "\n".join([*(f"{name:<10}  {text}" for name, text in facts), "", shown, ""])


def _learning(settings: Settings, features: Features, hellos: Collection[Hello]) -> list[tuple[str, str]]:
    if settings.method == ONE_ROUND:
        exact = "every image counts the same"
        how = exact if settings.strategy == "fedavg" else f"{settings.strategy} of the sites' sums"
        return [("learning", f"one round, in closed form; {how}; seed {settings.seed}")]
    rounds, epochs = counted(settings.rounds, "round"), counted(settings.local_epochs, "epoch")
    return [
        ("learning", f"{rounds} of {epochs} in batches of {settings.batch_size}"),
        ("", f"recipe {settings.recipe}, {_rate(settings, features, hellos)}, seed {settings.seed}"),
    ]


def _privacy(settings: Settings) -> list[tuple[str, str]]:
    """The lines on privacy; none without differential privacy and secure aggregation."""
    facts = []
    if settings.hides_images:
        shares = "each site adds its share of the noise" if settings.noise_leaves else "the server adds the noise"
        who = "each site adds all of the noise" if settings.dp == "local" else shares
        facts.append(f"{settings.dp}: {who}; ε = {settings.epsilon:g} for each image at δ = {settings.delta:g}")
    elif settings.dp != "off":
        who, to = ("the server", "their sum") if settings.dp == "central" else ("each site", "its update")
        clip, noise = f"updates are clipped to {settings.clipping_norm:g}", f"noise of {settings.noise_multiplier:g}"
        facts.append(f"{settings.dp}: {clip}; {who} adds {noise} times that to {to}; ε is for δ = {settings.delta:g}")
    if settings.secure_aggregation:
        of = "the total of the sites' sums" if settings.method == ONE_ROUND else "the sum of the updates"
        facts.append(f"secure aggregation: the server sees only {of}")
    if settings.dp != "off" or settings.secure_aggregation:
        facts.append(UNCOVERED[settings.dp_unit])
    return [("" if number else "privacy", fact) for number, fact in enumerate(facts)]


def _held_out(features: Features, holdout: str | None, hellos: Collection[Hello]) -> str:
    """The held-out domains, with their number of images and where these are."""
    places = [f"{hello.test:,} images at {hello.site}" for hello in hellos if hello.role == HOLDOUT]
    if here := sum(len(features.examples(domain).labels) for domain in held_out(holdout, features.domains)):
        places.append(f"{here:,} images here")
    return ", ".join([*([holdout] if holdout else []), *sorted(places)]) or "nothing"


def _domain(hello: Hello) -> str:
    return f"{hello.domain}, unseen" if hello.role == HOLDOUT else hello.domain


def _trained(settings: Settings, features: Features, tensors: State) -> str:
    total, numbers = features.parameters, sum(tensor.numel() for tensor in tensors.values())
    holds = f"{numbers:,} numbers in {counted(len(tensors), 'tensor')}"
    if settings.method == "full-model":
        return f"the whole model: {holds}"
    if settings.method == ONE_ROUND and settings.statistics == GRADIENT:
        return f"nothing: one gradient of the prompts of {counted(len(tensors['counts']), 'class')}"
    if settings.method == ONE_ROUND:
        classes, width = tensors["sums"].shape
        return f"nothing: sums for {counted(classes, 'class')} in {width} of {features.classes.dim} directions"
    share = f", {100 * numbers / total:.2f} % of the model's {total:,}" if total else ""
    blend = {"auto": ", blend chosen at the end", 1.0: ""}.get(settings.blend, f", blend {settings.blend}")
    if settings.method == LORA:
        return f"{lora_of(settings)}: {holds}{share}{blend}"
    from fedclip_flwr.learning.adapters import adapter_class, of_rank  # see above

    name = adapter_class(settings.adapter).name + of_rank(settings.adapter, settings.adapter_rank)
    return f"{name}: {holds}{share}{blend}"


def lora_of(settings: Settings) -> str:
    """LoRA in words: its rank, and where it is."""
    last = int(settings.lora_layers.partition(":")[2] or 0)
    layers = f"the last {'layer' if last == 1 else f'{last} layers'} of " if last else ""
    return f"LoRA of rank {settings.lora_rank} in {layers}{TOWERS[settings.lora_targets]}"


def _traffic(settings: Settings, tensors: State, frozen: State) -> str:
    if settings.method == ONE_ROUND:
        from fedclip_flwr.learning import OneGradient, OneRound  # see above

        form = OneGradient if settings.statistics == GRADIENT else OneRound
        up, all_of_it = (sum(tensors[name].nbytes for name in names) for names in (form.SENT, tuple(tensors)))
        needed = bytes_of(tensors[form.NEEDED].nbytes)
        return f"{needed} to a site, {bytes_of(up)} back, then {bytes_of(all_of_it)} to it"
    from fedclip_flwr.exchange.codecs import packed_size, packs  # see above

    packed = packs(settings.codec)
    size = packed_size(settings.codec, tensors) if packed else sum(tensor.nbytes for tensor in tensors.values())
    how = f", differences in {settings.codec}" if packed else ""
    more = f", and {bytes_of(sum(tensor.nbytes for tensor in frozen.values()))} in each message to it" if frozen else ""
    return f"{bytes_of(size)} to a site and as much back in each round{how}{more}"


def _rate(settings: Settings, features: Features, hellos: Collection[Hello]) -> str:
    """The learning rate, or the sites' lowest and highest."""
    from fedclip_flwr.learning.recipes import learning_rate  # see above

    rates = sorted({learning_rate(settings, features.classes.dim, hello.train) for hello in hellos if hello.train})
    return f"learning rate {rates[0]:.3g}" + (f" to {rates[-1]:.3g}, by size of the site" if rates[1:] else "")


def resuming(number: int, with_other_package: bool) -> str:
    """The line for a run that is resumed after round `number`."""
    other = ", with another version of this package or of a plug-in" if with_other_package else ""
    return f"resuming after round {number}{other}\n"


def heading(settings: Settings) -> str:
    """The header of the round lines; accuracies are in per cent."""
    return row(headings(settings.dp != "off"))


def headings(private: bool) -> list[str]:
    return [*HEADINGS, *(["ε"] if private else [])]


def line(result: RoundResult, start: str = "zero-shot") -> str:
    """The line of a round; `start` is the name of round 0."""
    return round_of(result.facts, start)


def round_of(facts: Mapping[str, Any], start: str) -> str:
    """The line of a round from its record in metrics.jsonl."""
    return row(cells(facts)) + (f"  {start}" if facts["round"] == 0 else "")


def cells(facts: Mapping[str, Any]) -> list[str]:
    """The values of a round as text, in the order of the headings."""
    return [
        str(facts["round"]),
        *(percent(facts[part]) for part in ("seen", "unseen", "val")),
        "–" if facts["loss"] is None else f"{facts['loss']:.3f}",
        str(facts["sites"]),
        bytes_of(facts["bytes"]),
        f"{facts['seconds']:.1f}",
        *([f"{facts['epsilon']:.2f}"] if "epsilon" in facts else []),
    ]


def row(cells: Iterable[str]) -> str:
    """Headings or values as one aligned line."""
    return "  ".join(f"{cell:>8}" for cell in cells)


def closing(summary: dict[str, Any], settings: Settings, holdout: str | None, validated: bool) -> str:
    """The text after the last round: zero-shot beside the adapted result, and its cost."""
    zero, adapted, traffic, seconds = (summary[key] for key in ("zero_shot", "adapted", "traffic", "seconds"))
    own = adapted["personal"]
    if settings.method == ONE_ROUND:
        how = "is the closed form of all sums: nothing was selected"
    elif not validated:
        how = "is used, because no site has validation images to select by"
    elif adapted["round"]:
        how = "was selected by validation"
    else:
        how = "was selected by validation: no gain over zero-shot"
    blend = f", with {adapted['blend']:g} of the adapted feature" if settings.blend != 1.0 else ""
    parts = [
        "",
        accuracies(zero, adapted, holdout),
        "",
        _figures(summary),
        "",
        *_weakest(adapted, holdout or "the unseen"),
        *(["Own: adapters that the sites personalised from the adapted one, and keep."] if own else []),
        *(
            [f"Stopped early, after round {summary['rounds']}: no gain in {counted(settings.early_stop, 'round')}."]
            if summary["rounds"] < settings.rounds
            else []
        ),
        f"Round {adapted['round']} of {summary['rounds']} {how}{blend}; tests are on images set apart before training.",
        *([f"This is not the paper's result: {NOT_THE_PAPERS}."] if summary.get("unknown_norm") else []),
        cost(traffic, settings.method),
        *_spent(summary),
        f"{seconds['total']:.0f} s: {seconds['encode']:.0f} s opening features, {seconds['rounds']:.0f} s rounds, "
        "the rest waiting for the sites.",
        *left_out((f["round"], f["site"], f["why"]) for f in summary["failures"]),
    ]
    return "\n".join(parts)


def accuracies(zero: Mapping[str, Any], adapted: Mapping[str, Any], holdout: str | None) -> str:
    """A table of accuracies by site, zero-shot beside adapted, from the results in summary.json."""
    own, own_mean = adapted["personal"] or {}, (adapted["personal_metrics"] or {}).get("seen", {}).get("accuracy")
    seen, unseen = adapted["sites"], adapted["holdout_sites"]
    found = [(site, zero["sites"].get(site), seen[site], own.get(site)) for site in sorted(seen, key=natural)]
    found.append(("mean of the seen", zero["seen"], adapted["seen"], own_mean))
    for site in sorted(unseen, key=natural):
        found.append((f"{site}, unseen", zero["holdout_sites"].get(site), unseen[site], None))
    if adapted["unseen"] is not None and [adapted["unseen"]] != [*unseen.values()]:
        name = "mean of the unseen" if unseen else f"{holdout}, unseen"
        found.append((name, zero["unseen"], adapted["unseen"], None))
    rows: list[tuple[str, ...]] = [("accuracy, %", "zero-shot", "adapted", "gain", "own")]
    rows += [(name, percent(z), percent(a), gain(z, a), percent(o)) for name, z, a, o in found]
    return table(rows if own else [row[:-1] for row in rows])


def _figures(summary: dict[str, Any]) -> str:
    """A table of the other metrics, in per cent."""
    zero, adapted = summary["zero_shot"]["metrics"], summary["adapted"]["metrics"]
    columns = [("seen: zero-shot", zero["seen"]), ("adapted", adapted["seen"])]
    if own := summary["adapted"]["personal_metrics"]:
        columns.append(("own", own["seen"]))
    if adapted["unseen"]:
        columns += [("unseen: zero-shot", zero["unseen"] or {}), ("adapted", adapted["unseen"])]
    names = ("balanced_accuracy", "macro_f1", "calibration_error")
    rows = [
        (name.replace("_f1", " F1").replace("_", " "), *(percent(f.get(name)) for _, f in columns)) for name in names
    ]
    return table([("in %, means", *(name for name, _ in columns)), *rows])


def _weakest(adapted: dict[str, Any], unseen: str, most: int = 3) -> list[str]:
    """The classes with the lowest recall on the unseen images."""
    recalls = (adapted["metrics"]["unseen"] or {}).get("recall", {})
    known = sorted((recall, name) for name, recall in recalls.items() if recall is not None)[:most]
    if not known:
        return []
    return [f"Weakest in {unseen}: {', '.join(f'{n} {percent(r)} %' for r, n in known)}; all classes: summary.json."]


def _prompt(vocabulary: Vocabulary) -> str:
    first, *more = vocabulary.templates
    return f"prompt {first!r}" + (f" and {len(more)} more, averaged" if more else "")


def _spent(summary: dict[str, Any]) -> list[str]:
    """A line on the privacy spent, if any."""
    if not (private := summary.get("privacy")):
        return []
    unit = private.get("unit", "site")
    whom = against(private["dp"] == "local" or private.get("shares", False))
    spent = f"ε = {private['epsilon']:.2f} at δ = {private['delta']:g}"
    return [f"Privacy of {UNITS[unit]} {whom}: {spent}; {UNCOVERED[unit]}."]


def against(hidden: bool) -> str:
    """Whom the noise keeps from knowing more; `hidden` if the server never sees anything without it."""
    return "against anyone, including the server" if hidden else "against anyone but the server"


def left_out(failures: Iterable[tuple[int, str, str]]) -> list[str]:
    """A line for each reason, with the sites that were left out for it, and the rounds."""
    rounds: dict[tuple[str, str], list[int]] = {}
    for number, site, why in failures:
        rounds.setdefault((site, why), []).append(number)
    sites: dict[tuple[str, str], list[str]] = {}
    for (site, why), numbers in rounds.items():
        when = f"round {numbers[0]}" + (f" to {numbers[-1]}" if numbers[-1] > numbers[0] else "")
        when += f", {len(numbers)} times" if numbers[1:] else ""
        sites.setdefault((why, when), []).append(site)
    return sorted(
        f"Left out: {some(sorted(names, key=natural))}: {why} ({when})" for (why, when), names in sites.items()
    )


def cost(traffic: dict[str, Any], method: str) -> str:
    """The bytes that a site sends and receives in a round, compared with FedAVG of the whole model."""
    text = f"{bytes_of(traffic['per_site_round_bytes'])} a site and round"
    if traffic["times_less"] is None or method == "full-model":
        return f"{text}, {bytes_of(traffic['down_bytes'] + traffic['up_bytes'])} in all."
    full = bytes_of(traffic["full_model_bytes"])
    return f"{text}; FedAVG of the whole model: {full}, {traffic['times_less']:,.0f} times as much."
