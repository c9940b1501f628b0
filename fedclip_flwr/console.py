"""What a run shows its user: the plan before round 1, a line a round, and the closing tables."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from fedclip_flwr.config import Settings
from fedclip_flwr.exchange import Hello, State
from fedclip_flwr.features import Features, home
from fedclip_flwr.federation import Line
from fedclip_flwr.nodes import Failure

HEADINGS = ("round", "seen", "unseen", "val", "loss", "sites", "bytes", "seconds")


def say(text: str) -> None:
    """To the user, at once."""
    print(text, flush=True)


def plan(
    settings: Settings,
    features: Features,
    holdout: str | None,
    hellos: Iterable[Hello],
    tensors: State,
    rate: float,
    folder: Path,
) -> str:
    """All that is decided before round 1."""
    trainable, whole = sum(tensor.numel() for tensor in tensors.values()), features.parameters
    share = f", {100 * trainable / whole:.2f} % of the model's {whole:,}" if whole else ""
    rank = f" of rank {settings.adapter_rank}" if settings.adapter == "gate" else ""
    rounds, epochs = settings.num_server_rounds, settings.local_epochs
    weights = "sites weigh the same" if settings.site_weights == "equal" else "sites weigh by their examples"
    part = settings.fraction_train
    share_of_sites = f", {100 * part:g} % of them train in a round" if part < 1 else ""
    facts = [
        ("model", f"{features.model}, prompt {features.prompt!r}"),
        ("data", settings.data),
        ("classes", f"{len(features.class_names)}: {_some(features.class_names)}"),
        ("held out", f"{holdout}, {len(features.examples(holdout).labels):,} images" if holdout else "nothing"),
        ("adapter", f"{settings.adapter}{rank}: {trainable:,} numbers in {_count(len(tensors), 'tensor')}{share}"),
        ("traffic", f"{_bytes(4 * trainable)} to a site and as much back in each round"),
        ("learning", f"{_count(rounds, 'round')} of {_count(epochs, 'epoch')} in batches of {settings.batch_size}"),
        ("", f"recipe {settings.recipe}, learning rate {rate:g}, seed {settings.seed}"),
        ("averaging", f"{settings.strategy}, {weights}" + share_of_sites),
        ("features", str(home() / "features")),
        ("run folder", str(folder)),
    ]
    sites = sorted(hellos, key=lambda hello: _natural(hello.site))
    nowhere = sorted({*features.domains} - {holdout} - {hello.domain for hello in sites})
    if nowhere and all(hello.domain in features.domains for hello in sites):
        facts.append(("at no site", ", ".join(nowhere)))
    rows = [(h.site, h.domain, f"{h.train:,}", f"{h.validation:,}", f"{h.test:,}", len(h.classes)) for h in sites]
    table = _table([(_count(len(sites), "site"), "domain", "train", "val", "test", "classes"), *rows])
    return "\n".join([*(f"{name:<10}  {text}" for name, text in facts), "", table, ""])


def heading() -> str:
    """Above the lines of the rounds: accuracies in per cent."""
    return "  ".join(f"{name:>8}" for name in HEADINGS)


def line(line: Line) -> str:
    """One round."""
    cells = [
        str(line.round),
        _percent(line.seen),
        _percent(line.unseen),
        _percent(line.validation),
        "–" if line.loss is None else f"{line.loss:.3f}",
        str(len(line.reports)),
        _bytes(line.bytes),
        f"{line.seconds:.1f}",
    ]
    return "  ".join(f"{cell:>8}" for cell in cells) + ("  zero-shot" if line.round == 0 else "")


def closing(summary: dict[str, Any], rounds: int, holdout: str | None, validated: bool, folder: Path) -> str:
    """Zero-shot beside the adapted result, and what it cost."""
    zero, adapted, traffic, seconds = (summary[key] for key in ("zero_shot", "adapted", "traffic", "seconds"))
    sites = sorted(adapted["sites"], key=_natural)
    rows = [(site, zero["sites"].get(site), adapted["sites"].get(site)) for site in sites]
    rows.append(("mean of the seen", zero["seen"], adapted["seen"]))
    if holdout:
        rows.append((f"{holdout}, unseen", zero["unseen"], adapted["unseen"]))
    table = _table(
        [
            ("accuracy, %", "zero-shot", "adapted", "gain"),
            *((n, _percent(z), _percent(a), _gain(z, a)) for n, z, a in rows),
        ]
    )
    if not validated:
        how = "is taken, for no site has validation images to choose by"
    elif adapted["round"]:
        how = "is the best by validation"
    else:
        how = "is the best by validation: nothing was gained over zero-shot"
    parts = [
        "",
        table,
        "",
        f"Round {adapted['round']} of {rounds} {how}; tests are on images no site trained on.",
        _cost(traffic),
        f"{seconds['total']:.0f} s: {seconds['encode']:.0f} s opening features, {seconds['rounds']:.0f} s rounds, "
        "the rest waiting for the sites.",
        *(f"Left out: {text}" for text in failures(summary["failures"])),
        f"Run folder: {folder}",
    ]
    return "\n".join(parts)


def failures(found: Sequence[dict[str, Any]]) -> list[str]:
    """Each failure once, with the rounds in which it happened."""
    rounds: dict[tuple[str, str], list[int]] = {}
    for failure in (Failure(**facts) for facts in found):
        rounds.setdefault((failure.site, failure.why), []).append(failure.round)
    return [
        f"{site}: {why} (round {numbers[0]}" + (f" to {numbers[-1]}, {len(numbers)} times)" if numbers[1:] else ")")
        for (site, why), numbers in sorted(rounds.items())
    ]


def _cost(traffic: dict[str, Any]) -> str:
    text = f"{_bytes(traffic['per_site_round_bytes'])} a site and round"
    if traffic["times_less"] is None:
        return f"{text}, {_bytes(traffic['down_bytes'] + traffic['up_bytes'])} in all."
    whole = _bytes(traffic["full_model_bytes"])
    return f"{text}; FedAVG of the whole model: {whole}, {traffic['times_less']:.0f} times as much."


def _natural(name: str) -> list[tuple[str, int]]:
    """For sorting: site-2 before site-10."""
    return [(text, int(part or -1)) for text, part in re.findall(r"(\D*)(\d*)", name)]


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f}"


def _gain(zero: float | None, adapted: float | None) -> str:
    """The difference of what is shown."""
    return "–" if zero is None or adapted is None else f"{round(100 * adapted, 1) - round(100 * zero, 1):+.1f}"


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _some(names: Sequence[str], most: int = 12) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _table(rows: Sequence[Sequence[object]]) -> str:
    """Columns side by side, the first to the left, numbers to the right."""
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    return "\n".join(
        "  " + "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        for row in cells
    )
