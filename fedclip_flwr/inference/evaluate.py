"""The command `fedclip evaluate`: accuracy on labelled images, zero-shot beside adapted."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from fedclip_flwr.base import Settings, UserError
from fedclip_flwr.base.settings import ENCODING_KEYS, STORED, unusable
from fedclip_flwr.base.text import counted, gain, percent, some, table
from fedclip_flwr.data import held_out
from fedclip_flwr.data.vocabulary import SEPARATOR
from fedclip_flwr.features import FeatureFolder, Features, models, open_features
from fedclip_flwr.features.opening import source_of
from fedclip_flwr.inference.learnt import Learnt, find_learnt
from fedclip_flwr.learning import examine
from fedclip_flwr.learning.metrics import Quality, mean_figures
from fedclip_flwr.runs import history, read_settings

OPTIONS = {"data", "model", "model-revision", "prompt", "class-names"}
"""Settings that this command takes as options."""
FIGURES = {"balanced_accuracy": "balanced accuracy", "macro_f1": "macro F1", "calibration_error": "calibration error"}


@dataclass(frozen=True)
class EvaluateOptions:
    """The command's options; empty for the default."""

    data: str
    settings: Sequence[str]
    adapter: str
    classes: str
    prompt: str
    by_class: bool
    as_json: bool
    model: str
    revision: str


class Pair(NamedTuple):
    """The scores on a domain's images."""

    zero: Quality
    adapted: Quality


def evaluate(options: EvaluateOptions) -> str:
    """The tables, or their figures as JSON."""
    learnt = find_learnt(options.adapter, options.revision)
    settings = _settings(options, learnt)
    plain, adapted, own = _opened(settings, learnt, options)
    found = _examined(plain, adapted, learnt, settings)
    if not found:
        raise UserError(f"{options.data}: it has no images that can be read")
    names, known = plain.vocabulary.class_names, _learnt_from(learnt, settings, plain)
    if options.as_json:
        domains = {
            domain: {
                "images": pair.zero.score.examples,
                "zero_shot": _facts(pair.zero, names),
                "adapted": _facts(pair.adapted, names),
            }
            for domain, pair in found.items()
        }
        facts = {"adapter": str(learnt.folder), "model": plain.model, "data": settings.data, "learnt_from": known}
        return json.dumps({**facts, "domains": domains}, indent=2)
    parts = [_table(found)]
    if options.by_class:
        parts.append(_by_class(found, names))
    parts.append(f"{learnt.folder} on {plain.model}; {counted(len(names), 'class')}; in %.")
    if {*own} - {*names}:
        words = [f"{name} = {word}" for name, word in zip(own, names, strict=True)]
        parts[-1] += f"\nThe data's classes, and the names used for them: {some(words)}."
    if known:
        parts[-1] += f"\nThe run was trained on parts of these: {', '.join(known)}."
    return "\n\n".join(parts)


def _settings(options: EvaluateOptions, learnt: Learnt) -> Settings:
    """The settings to open the data with; raises one error with all problems."""
    data, problems = read_settings([f"data={options.data}", f"class-names={options.classes}"])
    given, wrong = read_settings(options.settings)
    for key in given.keys() - ({*ENCODING_KEYS} - OPTIONS):
        wrong.setdefault(key, f"{key}: expected columns, device or precision here; leave it out")
    settings, unfit = Settings.read({**data, **given, "prompt": options.prompt})
    if problems := {**problems, **wrong, **unfit}:
        raise unusable(problems.values())
    return settings if settings.prompt else replace(settings, prompt=SEPARATOR.join(learnt.facts["templates"]))


def _opened(settings: Settings, learnt: Learnt, options: EvaluateOptions) -> tuple[Features, Features, Sequence[str]]:
    """The data's features for the frozen CLIP and for the trained model, and the class names in the data.

    Both features are the same object, unless the whole model or LoRA in it was trained.
    """
    given = None if options.classes else learnt.vocabulary._replace(templates=tuple(settings.prompt.split(SEPARATOR)))
    if settings.data.startswith(STORED):
        learnt.check_features(settings.data, FeatureFolder(Path(settings.data.removeprefix(STORED))))
        features = open_features(settings, given)
        return features, features, features.vocabulary.class_names
    own = source_of(settings)[0].class_names
    if given and (others := sorted({*own} - {*given.class_names})):
        raise UserError(
            f"{options.data} has classes that {learnt.folder} does not know: {some(others)}; name another run "
            "with --adapter, or names for all of the data's classes with --classes"
        )
    frozen = learnt.frozen(options.model)
    plain = open_features(_with(settings, frozen), given)
    if not learnt.whole:
        learnt.check_dim(plain.classes.dim, frozen.name)
    if not (learnt.whole or learnt.lora):
        return plain, plain, own
    model = learnt.model(options.model)
    return plain, open_features(_with(settings, model), given, model=model), own


def _with(settings: Settings, model: models.Model) -> Settings:
    return replace(settings, model=model.name, model_revision=model.revision)


def _examined(plain: Features, adapted: Features, learnt: Learnt, settings: Settings) -> dict[str, Pair]:
    """The scores by domain, of domains that have images."""
    device = models.pick_device(settings.device)
    adapter = learnt.adapter.to(device) if learnt.adapter else None
    classes = plain.classes.ready(device)
    learnt_classes = learnt.numbered(adapted.classes.ready(device), adapted.vocabulary.class_names)
    found = {}
    for domain in plain.domains:
        qualities = [
            examine(learner, features.examples(domain).ready(device), known)
            for learner, features, known in ((None, plain, classes), (adapter, adapted, learnt_classes))
        ]
        if qualities[0].score.examples:
            found[domain] = Pair(*qualities)
    return found


def _learnt_from(learnt: Learnt, settings: Settings, features: Features) -> list[str]:
    """The domains that the run's sites trained on, if this is the run's own data."""
    if not (learnt.folder / history.SETTINGS).exists():
        return []
    run = history.read(learnt.folder)
    if run.settings["data"] != settings.data:
        return []
    apart = held_out(run.summary.get("holdout"), features.domains)
    return [domain for domain in features.domains if domain not in apart]


def _facts(quality: Quality, names: Sequence[str]) -> dict[str, Any]:
    recalls = quality.classes.recalls if quality.classes else []
    return {**quality.figures(), "recall": dict(zip(names, recalls, strict=False))}


def _table(found: dict[str, Pair]) -> str:
    """Accuracy in each domain and its mean; then the means of the other metrics."""
    rows = [(domain, f"{pair.zero.score.examples:,}", *_accuracies([pair])) for domain, pair in found.items()]
    pairs = list(found.values())
    if len(found) > 1:
        rows.append(("mean", "", *_accuracies(pairs)))
    means = [mean_figures(qualities) for qualities in zip(*pairs, strict=True)]
    others = [(title, *(percent(figures[name]) for figures in means)) for name, title in FIGURES.items()]
    accuracy = table([("accuracy, %", "images", "zero-shot", "adapted", "gain"), *rows])
    return accuracy + "\n\n" + table([("in %, means", "zero-shot", "adapted"), *others])


def _accuracies(pairs: Sequence[Pair]) -> tuple[str, str, str]:
    zero, adapted = (mean_figures(qualities)["accuracy"] for qualities in zip(*pairs, strict=True))
    return percent(zero), percent(adapted), gain(zero, adapted)


def _by_class(found: dict[str, Pair], names: Sequence[str]) -> str:
    """The recall of each class, zero-shot and adapted."""
    rows: list[tuple[str, ...]] = [("recognised", *(head for domain in found for head in (domain, "adapted")))]
    recalls = {
        domain: [quality.classes.recalls for quality in (pair.zero, pair.adapted) if quality.classes]
        for domain, pair in found.items()
    }
    for number, name in enumerate(names):
        of_class = [one[number] for domain in found for one in recalls[domain]]
        if any(recall is not None for recall in of_class):
            rows.append((name, *map(percent, of_class)))
    return table(rows)
