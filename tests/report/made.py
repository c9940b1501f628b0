"""Run folders as runs leave them behind: learnt for real in one process, with as many sites named as are wanted."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedclip_flwr.base import tensorfile
from fedclip_flwr.base.settings import ONE_ROUND, Settings
from fedclip_flwr.base.tensors import State
from fedclip_flwr.data.holdout import pick_holdout
from fedclip_flwr.experiments.simulate import make_sites, simulate
from fedclip_flwr.features.base import Features
from fedclip_flwr.features.opening import new_learner, open_features
from fedclip_flwr.runs.folder import RunFolder

ROUNDS = 3
FIGURES = ("accuracy", "balanced_accuracy", "macro_f1", "calibration_error")


def figures(accuracy: float) -> dict[str, float]:
    return dict(zip(FIGURES, (accuracy, accuracy - 0.01, accuracy - 0.02, 0.1), strict=True))


def results(seen: float, unseen: float | None, sites: dict[str, float], holdouts: dict[str, float]) -> dict[str, Any]:
    return {
        "seen": seen,
        "unseen": unseen,
        "sites": sites,
        "holdout_sites": holdouts,
        "metrics": {"seen": figures(seen), "unseen": None if unseen is None else figures(unseen), "sites": {}},
    }


def a_run(
    root: Path,
    features: Features | None = None,
    *,
    sites: int = 3,
    personal: bool = False,
    holdouts: Sequence[str] = (),
    failures: Sequence[dict[str, Any]] = (),
    ends: str = "completed",
    learning: int = 3,
    epsilon: float | None = None,
    **given: Any,
) -> Path:
    """The folder of a run with these settings, with the given number of sites; what it has learnt is of `learning`."""
    settings = Settings(results_dir=str(root), num_server_rounds=ROUNDS, personalize=personal, **given)
    features = features or open_features(settings, progress=False)
    made, unseen = make_sites(features, settings.holdout, learning, settings.seed)
    start = new_learner(settings, features)
    learnt = simulate(made, features.classes, unseen, settings, start=start)
    with RunFolder(settings, "0123456789abcdef") as folder:
        folder.begin([], sites)
        folder.adapter(learnt.selected.round, {**learnt.state, **start.frozen}, features, learnt.blend)
        lines = [
            {
                "round": line.round,
                "seen": line.seen,
                "unseen": line.unseen,
                "val": line.validation,
                "loss": 0.9 - 0.02 * line.round,
                "sites": sites,
                "bytes": 88_000 * sites,
                "seconds": 0.5 + 0.1 * (line.round % 2),
                **({} if epsilon is None else {"epsilon": epsilon * line.round / ROUNDS}),
            }
            for line in learnt.rounds
        ]
        folder._lines = [json.dumps(line) + "\n" for line in lines]
        folder._write_lines()
        zero, best = learnt.rounds[0], learnt.selected
        names = [f"site-{number}" for number in range(sites)]
        before = {name: round(0.4 + 0.4 * (7 * n % sites) / sites, 4) for n, name in enumerate(names)}
        after = {
            name: round(min(1.0, value + 0.02 + 0.1 * (n % 3)), 4) for n, (name, value) in enumerate(before.items())
        }
        apart = {name: 0.5 + 0.05 * n for n, name in enumerate(holdouts)}
        adapted = results(best.seen or 0.0, best.unseen, after, {name: value + 0.06 for name, value in apart.items()})
        own = {name: min(1.0, value + 0.03) for name, value in after.items()}
        parameters, one_round = features.parameters, settings.method == ONE_ROUND
        summary = {
            "status": "completed",
            "holdout": pick_holdout(settings.holdout, features.domains),
            "zero_shot": results(zero.seen or 0.0, zero.unseen, before, apart),
            "adapted": {
                **adapted,
                "round": best.round,
                "blend": learnt.blend,
                "personal": own if personal else None,
                "personal_metrics": {"seen": figures(0.8), "sites": {}} if personal else None,
            },
            "traffic": {
                "down_bytes": 44_000 * sites * ROUNDS,
                "up_bytes": 44_000 * sites * ROUNDS,
                "per_site_round_bytes": 88_000.0,
                "full_model_bytes": parameters and 8 * parameters,
                "times_less": parameters and 8 * parameters / 88_000,
            },
            "privacy": None if epsilon is None else {"dp": settings.dp, "epsilon": epsilon, "delta": settings.delta},
            "seconds": {"encode": 1.0, "rounds": 1.6, "total": 4.5},
            "rounds": ROUNDS,
            "resumed": [],
            "failures": list(failures),
            "scaled": {},
            "contributions": {name: [60 + 20 * n, 5] for n, name in enumerate(names)}
            if one_round and not settings.secure_aggregation
            else {},
        }
        if ends == "completed":
            folder.finish(summary)
    if ends != "completed":
        facts = {"status": ends, "why": "usable answers: 0", "round": ROUNDS - 1, "failures": list(failures)}
        (folder.path / "summary.json").write_text(json.dumps(facts))
    return folder.path


def feature_folder(root: Path, features: Features, names: Sequence[str] = ("photo", "sketch"), each: int = 200) -> Path:
    """Features of some domains as a folder that `features:` takes."""
    root.mkdir(parents=True)
    facts = {
        "model": "someone/clip",
        "embedding_dim": features.classes.dim,
        "logit_scale": float(features.classes.scale),
        "prompt": features.vocabulary.templates[0],
        "class_names": list(features.vocabulary.class_names),
        "domains": list(names),
    }
    (root / "features.json").write_text(json.dumps(facts))
    tensorfile.save({"text_features": features.classes.text}, root / "classes.safetensors", {})
    for name in names:
        image_features, labels = features.examples(name)
        tensors: State = {
            "image_features": image_features[:each].clone(),
            "labels": labels[:each].clone(),
        }
        tensorfile.save(tensors, root / f"{name}.safetensors", {})
    return root


def many_classes(features: Features, classes: int) -> dict[str, Any]:
    """An analysis of a domain with that number of classes, without images."""
    confusion = [[true, true, 6 + true % 5] for true in range(classes)]
    confusion += [
        [true, (3 * true + 1) % classes, 1 + true % 4] for true in range(classes) if (3 * true + 1) % classes != true
    ]
    images = sum(count for *_, count in confusion)
    counts = {
        "correct": sum(count for true, said, count in confusion if true == said),
        "confusion": confusion,
        "bins": {
            "images": [0] * 14 + [images],
            "confidence": [0.0] * 14 + [0.95 * images],
            "correct": [0] * 14 + [images],
        },
    }
    return {
        "learnt": "",
        "domain": "sketch",
        "images": images,
        "class_names": [
            f"class {number} with a long name" if number % 7 == 3 else f"class {number}" for number in range(classes)
        ],
        "zero_shot": counts,
        "adapted": {**counts, "confusion": [[t, s, c + (t == s)] for t, s, c in confusion]},
        "weights": None,
        "changed": {"mended": 0, "spoilt": 0},
        "mended": [],
        "spoilt": [],
    }


__all__ = ["a_run", "feature_folder", "many_classes", "replace"]
