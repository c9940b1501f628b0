"""`summary.json` of a completed run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fedclip_flwr.base import Settings
from fedclip_flwr.features import Features
from fedclip_flwr.learning.metrics import Quality, mean_accuracy, mean_figures
from fedclip_flwr.server import Outcome, RoundResult
from fedclip_flwr.server.nodes import Nodes


def summary_of(
    outcome: Outcome,
    nodes: Nodes,
    holdout: str | None,
    features: Features,
    settings: Settings,
    seconds: dict[str, float],
    resumed: list[int],
) -> dict[str, Any]:
    """The contents of `summary.json` of a completed run, which was resumed after the rounds `resumed`."""
    traffic, names, parameters = nodes.traffic, features.vocabulary.class_names, features.parameters
    per_round = outcome.site_round_bytes
    full = None if parameters is None else 2 * 4 * parameters  # float32, both directions
    return {
        "status": "completed",
        "holdout": holdout,
        "examples": {
            site: [hello.train, hello.validation, hello.test]
            for site, hello in sorted(nodes.hellos.items())
            if site not in nodes.leaving
        },
        "zero_shot": results_of(outcome.zero_shot, names),
        "adapted": {
            **results_of(outcome.adapted, names),
            "round": outcome.adapted.round,
            "blend": outcome.blend,
            **_personal(outcome, names),
        },
        "traffic": {
            "down_bytes": traffic.down,
            "up_bytes": traffic.up,
            "per_site_round_bytes": per_round,
            "full_model_bytes": full,
            "times_less": None if full is None else full / per_round,
        },
        "privacy": None
        if outcome.epsilon is None
        else {
            "dp": settings.dp,
            "unit": settings.dp_unit,
            "epsilon": outcome.epsilon,
            "delta": settings.delta,
            "shares": settings.shares_noise,
        },
        "seconds": seconds,
        "rounds": outcome.rounds,
        "resumed": resumed,
        "failures": [failure._asdict() for failure in nodes.failures],
        "scaled": dict(sorted(nodes.scaled.items())),
        "contributions": dict(sorted(nodes.contributions.items())),
        "unknown_norm": settings.sees_given_length and any(hello.unit_length for hello in nodes.hellos.values()),
    }


def results_of(result: RoundResult, class_names: Sequence[str]) -> dict[str, Any]:
    """Accuracies, and all other figures under `metrics`."""
    tests = {site: report.test for site, report in result.reports.items()}
    apart = {site: report.test for site, report in result.holdouts.items()}
    if len(result.unseen) > 1:
        apart = {**result.unseen, **apart}
    return {
        "seen": result.seen,
        "unseen": mean_accuracy(result.held_out),
        "sites": {site: quality.accuracy for site, quality in tests.items()},
        "holdout_sites": {site: quality.accuracy for site, quality in apart.items()},
        "metrics": {
            "seen": mean_figures(tests.values()),
            "unseen": _unseen(result, class_names),
            "sites": {site: _figures(quality, class_names) for site, quality in tests.items()},
        },
    }


def _unseen(result: RoundResult, class_names: Sequence[str]) -> dict[str, Any] | None:
    """The figures on held-out images: with recall by class for one set of images, means for several."""
    if len(result.held_out) == 1:
        return _figures(result.held_out[0], class_names)
    return mean_figures(result.held_out) or None


def _figures(quality: Quality, class_names: Sequence[str]) -> dict[str, Any]:
    by_class = {"recall": dict(zip(class_names, quality.classes.recalls, strict=False))} if quality.classes else {}
    return {**quality.figures(), **by_class}


def _personal(outcome: Outcome, class_names: Sequence[str]) -> dict[str, Any]:
    """The results of the sites' own adapters; None without them."""
    tests = {site: report.test for site, report in outcome.personal.items()}
    return {
        "personal": {site: quality.accuracy for site, quality in tests.items()} or None,
        "personal_metrics": {
            "seen": mean_figures(tests.values()),
            "sites": {site: _figures(quality, class_names) for site, quality in tests.items()},
        }
        if tests
        else None,
    }
