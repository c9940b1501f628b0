"""The model card: the adapter, its data, its accuracy, its cost, and its limits; the text is in `card.md`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from fedclip_flwr.base import files
from fedclip_flwr.base.settings import LORA, ONE_ROUND, place_of
from fedclip_flwr.base.text import gain, percent, some
from fedclip_flwr.data.presets import PRESETS
from fedclip_flwr.learning.adapters import ADAPTERS, adapter_class, of_rank
from fedclip_flwr.runs import console, history, saved

TEMPLATE = Path(__file__).with_name("card.md")
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
    found: dict[str, Any] = {**_model(facts), "run": run, "settings": settings, "summary": summary, "sites": sites}
    found |= {"same": same, "data": _data_name(str(settings.get("data", "")))}
    found |= {
        "percent": percent,
        "gain": gain,
        "cost": console.cost,
        "uncovered": console.UNCOVERED[run.unit if run else "site"],
    }
    template, metadata = TEMPLATE.read_text(encoding="utf-8"), _metadata(facts, settings, summary)
    card: ModelCard = ModelCard.from_template(metadata, template_str=template, **found)
    return card


def _made_for(origin: Path) -> list[Any]:
    """The class names and templates that a folder's adapter or model was trained with."""
    for name in (f"model/{saved.WHOLE}", saved.FACTS, saved.CONFIG, saved.WHOLE):
        if (origin / name).exists():
            found = files.read_json(origin / name)
            return [list(found.get("class_names", ())), list(found.get("templates", ()))]
    return []


def _model(facts: Mapping[str, Any]) -> dict[str, Any]:
    """What the card says of the adapter, or the whole model, and of its CLIP."""
    base = model_name(facts)
    base = "the small CLIP that comes with fedclip-flwr" if base == "bundled" else base
    revision = f" at {facts['model_revision'][:12]}" if facts.get("model_revision") else ""
    found = {"facts": facts, "base": base + revision, "classes": some(facts["class_names"], 100)}
    kind = str(facts.get("kind"))
    if kind == "full-model":
        return found | {"whole": True}
    if kind == LORA:
        towers = {"vision": "image tower", "text": "text tower", "both": "image and text towers"}
        name = model_name(facts)
        clip = (
            name
            if facts.get("model_revision")
            else f"the folder of {'the bundled CLIP' if name == 'bundled' else name}"
        )
        return found | {"lora": True, "towers": towers[facts["lora"]["targets"]], "clip": clip}
    if kind == ONE_ROUND:
        return found | {"one_round": True, "learnt": saved.learnt_classes(facts)}
    return found | {
        "name": adapter_class(kind).name,
        "rank": of_rank(kind, facts["rank"]),
        "plugin": kind not in ADAPTERS,
    }


def model_name(facts: Mapping[str, Any]) -> str:
    """The CLIP's name, without the folders of its machine: only names on the hub have a revision."""
    name = str(facts.get("model", ""))
    return name if facts.get("model_revision") else Path(name).name


def _data_name(name: str) -> str:
    """A data set's name, without the folders of its machine."""
    head, path = place_of(name)
    return head + Path(path).name if head else path


def _metadata(facts: Mapping[str, Any], settings: Mapping[str, Any], summary: Mapping[str, Any]) -> ModelCardData:
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
        tags=TAGS + ["lora", "peft"] * (facts.get("kind") == LORA),
        eval_results=results or None,
        model_name="fedclip-adapter" if results else None,
    )
