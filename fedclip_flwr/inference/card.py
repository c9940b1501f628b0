"""The model card: the adapter, its data, its accuracy, its cost, and its limits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from fedclip_flwr.base import files
from fedclip_flwr.base.settings import place_of
from fedclip_flwr.base.text import gain, percent, some
from fedclip_flwr.data.presets import PRESETS
from fedclip_flwr.learning.adapters import ADAPTERS, adapter_class, of_rank
from fedclip_flwr.runs import console, history, saved

LIBRARY, TASK = "fedclip-flwr", "zero-shot-image-classification"
TAGS = ["adapter", "clip", "federated-learning", "flower", "model_hub_mixin"]


def card_of(facts: Mapping[str, Any], origin: Path | None, sites: bool = False) -> ModelCard:
    """The card of an adapter (or a whole model) with these facts, from the folder `origin`.

    For a run's folder it includes the results; for another folder it is the card in that folder. Site names and sizes
    are included only if `sites` is true.
    """
    run = history.read(origin) if origin and (origin / history.SETTINGS).exists() else None
    same = origin is not None and _made_for(origin) == [[*facts["class_names"]], [*facts["templates"]]]
    if origin and same and not run and (origin / "README.md").exists():
        return ModelCard((origin / "README.md").read_text(encoding="utf-8"))
    settings = run.settings if run else {}
    summary = run.summary if run and run.completed else {}
    parts = [
        "# " + _title(facts),
        _what(facts, settings),
        "## Use\n\n```python\nfrom fedclip_flwr import FedCLIP\n\n"
        'model = FedCLIP.from_pretrained("this folder, or its name on the hub")\nmodel.predict(["image.jpg"])\n```\n\n'
        "`model.with_classes([…])` classifies into other classes: the adapter stays, the prompts change.",
        "## Classes and prompts\n\n" + _classes(facts),
    ]
    if run:
        parts.append("## Data and sites\n\n" + _data(settings, summary, sites))
    if summary:
        parts.append("## Results\n\n" + _results(summary, sites) + OTHERS * (not same))
        parts.append("## Cost\n\n" + _cost(summary, settings))
    if run:
        parts.append("## How it was made\n\n" + _recipe(settings))
        parts.append("## Privacy\n\n" + _privacy(settings, summary))
    parts.append("## Limits\n\n" + LIMITS)
    return ModelCard(f"---\n{_data_of_card(facts, settings, summary).to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n")


LIMITS = """- Results are for the data named here; on other images, cameras and places they can be worse: first test it
  on your own images, with `fedclip evaluate folder:PATH`.
- It still has what the frozen CLIP learnt from the web, including its biases.
- It is not a medical device, and must not be the only basis of decisions about people.
- The adapter was trained on images that stayed at their sites. Without differential privacy there is no guarantee that
  it reveals nothing about them."""


OTHERS = " These figures are for the run's own classes and prompts, which differ from those above."


def _made_for(origin: Path) -> list[Any]:
    """The class names and templates that a folder's adapter or model was trained with."""
    for name in (f"model/{saved.WHOLE}", saved.FACTS, saved.CONFIG, saved.WHOLE):
        if (origin / name).exists():
            found = files.read_json(origin / name)
            return [list(found.get("class_names", ())), list(found.get("templates", ()))]
    return []


def _title(facts: Mapping[str, Any]) -> str:
    kind = str(facts.get("kind"))
    what = "A fully trained CLIP" if kind == "full-model" else f"An adapter ({adapter_class(kind).name}) for CLIP"
    return f"{what}, trained by several sites"


def _what(facts: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    base = model_name(facts)
    base = "the small CLIP that comes with fedclip-flwr" if base == "bundled" else base
    revision = f" at {facts['model_revision'][:12]}" if facts.get("model_revision") else ""
    if facts.get("kind") == "full-model":
        return f"All of {base}{revision}, trained by federated averaging; no image left its site."
    kind = str(facts.get("kind"))
    adapter = f"{adapter_class(kind).name} adapter{of_rank(kind, facts['rank'])}"
    code = f" Its code is `{kind}`, in a package that must be installed too." if kind not in ADAPTERS else ""
    return (
        f"A small {adapter} on the image features of {base}{revision}, which stays frozen. "
        "Sites trained it together: only its numbers travelled, no image left its site "
        f"([FedCLIP](https://arxiv.org/abs/2302.13485), with [Flower](https://flower.ai)).{code}"
    )


def model_name(facts: Mapping[str, Any]) -> str:
    """The CLIP's name, without the folders of its machine: only names on the hub have a revision."""
    name = str(facts.get("model", ""))
    return name if facts.get("model_revision") else Path(name).name


def _data_name(name: str) -> str:
    """A data set's name, without the folders of its machine."""
    head, path = place_of(name)
    return head + Path(path).name if head else path


def _classes(facts: Mapping[str, Any]) -> str:
    names = facts["class_names"]
    prompts = ", ".join(f"`{template}`" for template in facts["templates"])
    return f"{len(names)} classes: {some(names, 100)}.\n\nPrompts: {prompts}."


def _data(settings: Mapping[str, Any], summary: Mapping[str, Any], sites: bool) -> str:
    holdout = summary.get("holdout")
    examples: Mapping[str, Sequence[int]] = summary.get("examples", {})
    lines = [f"- data: `{_data_name(settings['data'])}`"]
    if holdout:
        lines.append(f"- held out, seen by no site: {holdout}")
    lines.append(f"- sites: {len(examples) or settings.get('sites') or 'unknown'}")
    text = "\n".join(lines)
    if sites and examples:
        rows = [(name, *(f"{count:,}" for count in counts)) for name, counts in examples.items()]
        text += "\n\n" + _table([("site", "training", "validation", "test"), *rows])
    return text


def _results(summary: Mapping[str, Any], sites: bool) -> str:
    zero, adapted = summary["zero_shot"], summary["adapted"]
    rows = [("the sites' own test images, mean", zero["seen"], adapted["seen"])]
    if adapted["unseen"] is not None:
        rows.append((f"{summary['holdout'] or 'unseen sites'}, seen by no site", zero["unseen"], adapted["unseen"]))
    if sites:
        rows += [(name, zero["sites"].get(name), value) for name, value in adapted["sites"].items()]
    table = [(name, percent(z), percent(a), gain(z, a)) for name, z, a in rows]
    caption = f"Test accuracy in %. Round {adapted['round']} of {summary['rounds']}, selected by validation."
    return _table([("images", "zero-shot", "adapted", "gain"), *table]) + f"\n\n{caption}"


def _cost(summary: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    return "Sent and received: " + console.cost(summary["traffic"], settings["method"])


def _recipe(settings: Mapping[str, Any]) -> str:
    keys = [
        *("recipe", "num-server-rounds", "local-epochs", "batch-size", "learning-rate", "strategy", "site-weights"),
        *("codec", "fraction-train", "partition", "seed"),
    ]
    versions = ", ".join(f"{name} {version}" for name, version in settings.get("versions", {}).items())
    rows = [(f"`{key}`", str(settings[key] or (0 if key == "seed" else "the recipe's"))) for key in keys]
    return _table([("setting", "value"), *rows]) + (f"\n\nMade with {versions}." if versions else "")


def _privacy(settings: Mapping[str, Any], summary: Mapping[str, Any]) -> str:
    weights = "the model's weights" if settings["method"] == "full-model" else "adapter tensors"
    lines = [
        f"- what left a site: {weights}; its name, its domain, which classes it has, its numbers of images; "
        "accuracies, losses, and the counts and sums that other figures need (by class only if its owner shares them)"
    ]
    if settings["secure-aggregation"]:
        lines.append("- secure aggregation: the server saw only the sum of the sites' updates")
    if private := summary.get("privacy"):
        spent = f"ε = {private['epsilon']:.2f} at δ = {private['delta']:g}"
        lines.append(f"- differential privacy of sites ({private['dp']}): {spent}; {console.UNCOVERED}")
    elif settings["dp"] == "off":
        lines.append("- no differential privacy")
    return "\n".join(lines)


def _table(rows: Sequence[Sequence[str]]) -> str:
    cells = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    cells.insert(1, ["---"] * len(cells[0]))
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def _data_of_card(facts: Mapping[str, Any], settings: Mapping[str, Any], summary: Mapping[str, Any]) -> ModelCardData:
    """The card's metadata, which the hub reads."""
    data = str(settings.get("data", ""))
    hub_data = PRESETS[data].hub_id if data in PRESETS else data if "/" in data and ":" not in data else None
    name = _data_name(data) or "unknown"
    found = {"seen": "the sites' own test images", "unseen": "images of no site that trained"}
    results = [
        EvalResult(  # without a split, the hub's library merges both into one data set
            *(TASK, hub_data or name, f"{name}, {what}", "accuracy", round(summary["adapted"][key], 4)),
            dataset_split=key,
        )
        for key, what in found.items()
        if summary and summary["adapted"][key] is not None
    ]
    return ModelCardData(
        base_model=model_name(facts) if facts.get("model_revision") else None,
        datasets=[hub_data] if hub_data else None,
        library_name=LIBRARY,
        pipeline_tag=TASK,
        tags=TAGS,
        eval_results=results or None,
        model_name="fedclip-adapter" if results else None,
    )
