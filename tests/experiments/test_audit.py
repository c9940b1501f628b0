"""`fedclip audit` on folders as runs leave them, of made-up features: no federation is run over the network."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F
from typer.testing import CliRunner

from fedclip_flwr.base.settings import Settings
from fedclip_flwr.cli import app
from fedclip_flwr.exchange import noise, privacy, private_sums
from fedclip_flwr.experiments import audit
from fedclip_flwr.experiments.canaries import found_images, found_sites
from fedclip_flwr.experiments.simulate import make_sites, simulate
from fedclip_flwr.features.opening import new_learner, open_features
from fedclip_flwr.inference import export
from fedclip_flwr.inference.model import FedCLIP
from fedclip_flwr.learning.membership import Findings
from fedclip_flwr.runs import history, saved
from fedclip_flwr.site import Site
from tests.extras import needs
from tests.finished import finished
from tests.learnt import lora_run, whole_model_run
from tests.server.test_one_round import classes, images, sites

CLASSES = ["cat", "dog", "fish", "hen"]
DIM = 32


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A feature folder of two domains, which three sites can divide."""
    root = tmp_path_factory.mktemp("features")
    facts = {"model": "made-up", "embedding_dim": DIM, "logit_scale": 20.0, "prompt": "a {}", "class_names": CLASSES}
    (root / "features.json").write_text(json.dumps(facts | {"domains": ["photo", "sketch"]}))
    chance = torch.Generator().manual_seed(0)
    text = F.normalize(torch.randn(4, DIM, generator=chance), dim=1)
    save_file({"text_features": text}, root / "classes.safetensors")
    for domain in ("photo", "sketch"):
        labels = torch.arange(160) % 4
        images = F.normalize(text[labels] + 0.4 * torch.randn(160, DIM, generator=chance), dim=1)
        save_file({"image_features": images, "labels": labels}, root / f"{domain}.safetensors")
    return root


@pytest.fixture(autouse=True)
def seeded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same noise at every call: the machine's own differs each time."""
    chance = np.random.default_rng(3)
    monkeypatch.setattr(privacy, "_normal", chance.standard_normal)
    whole = partial(noise.noised, source=chance.bytes)
    monkeypatch.setattr(private_sums, "noised", whole)


def made(root: Path, data: Path, **given: Any) -> Path:
    """The folder of a completed run of three sites."""
    how = {"data": f"features:{data}", "holdout": "", **given}
    settings = Settings(**how)
    features = open_features(settings)
    sites, _ = make_sites(features, "", 3, settings.seed)
    result = simulate(sites, features.classes.ready(), None, settings, test_every_round=False)
    examples = numbers(sites)
    epsilon = privacy.spent(settings, [settings.rounds])
    spent = {"dp": settings.dp, "epsilon": epsilon, "delta": settings.delta} if epsilon is not None else None
    summary = {"holdout": None, "examples": examples, "privacy": spent}
    path = finished(root, summary=summary, sites=3, **how)
    saved.save_adapter(path, result.state, settings, features, result.selected.round, blend=result.blend)
    return path


def numbers(sites: Sequence[Site]) -> dict[str, list[int]]:
    """Of the examples of each site, as a run's summary has them."""
    return {each.name: [len(p.labels) for p in (each.train, each.validation, each.test)] for each in sites}


def run(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["audit", *map(str, arguments)])
    return result.exit_code, result.stdout, result.stderr


def facts(*arguments: object) -> dict[str, Any]:
    code, stdout, stderr = run(*arguments, "--json")
    assert code == 0, stderr
    found: dict[str, Any] = json.loads(stdout)
    return found


@pytest.mark.parametrize("statistics", ["span", "full"])
def test_sums_give_every_image_away_and_the_same_twice(tmp_path: Path, data: Path, statistics: str) -> None:
    path = made(tmp_path, data, method="one-round", statistics=statistics)
    found = facts(path)
    assert found["bits"] == found["guesses"] == found["right"] > 100
    assert (found["auc"], found["epsilon_of"], found["epsilon_claimed"]) == (
        1.0,
        "image",
        {"image": None, "site": None},
    )
    assert found["epsilon_at_least"] > 1.5
    assert facts(path) == found
    fewer = facts(path, "--site", "photo-0")
    assert 10 <= fewer["bits"] < found["bits"]
    assert fewer["attacker"] == "the result, and the images of photo-0"


def test_the_table_says_what_it_means(tmp_path: Path, data: Path) -> None:
    path = made(tmp_path, data, method="one-round")
    code, stdout, _ = run(path)
    assert code == 0
    assert "ε of a site, claimed         none\n" in stdout
    assert (
        "any claim of a smaller ε of an image would be wrong. A stronger attack may find more. (δ = 1e-05, " in stdout
    )
    assert all(line == line.rstrip() for line in stdout.splitlines())
    for file in ("sums", "report.html"):  # it only reads
        assert not (path / file).exists()


def test_a_real_site_audits_its_own_images(tmp_path: Path, data: Path) -> None:
    path = made(tmp_path, data, method="one-round")
    features = open_features(Settings(data=f"features:{data}", holdout=""))
    own, _ = make_sites(features, "sketch", 1, 0)
    examples = [len(part.labels) for part in (own[0].train, own[0].validation, own[0].test)]
    summary = json.loads((path / history.SUMMARY).read_text())
    saved.write_json(path / history.SUMMARY, summary | {"examples": {"photo-0": examples}, "holdout": "sketch"})
    found = facts(path, "--site", "photo-0", "--data", f"features:{data}")
    assert found["bits"] > 50
    assert "--data: the name that the site has in the run is needed, too" in run(path, "--data", data)[2]


def test_canaries_in_an_adapter_without_noise_are_found(tmp_path: Path, data: Path) -> None:
    path = made(tmp_path, data, adapter="gate", num_server_rounds=10, learning_rate=0.01)
    found = facts(path, "--canaries", 60)
    assert found["epsilon_of"] == "image"
    assert found["epsilon_at_least"] > 0
    assert found["bits"] == 60


def test_canaries_in_sums_are_all_found(tmp_path: Path, data: Path) -> None:
    found = facts(made(tmp_path, data, method="one-round"), "--canaries", 60)
    assert (found["right"], found["guesses"]) == (60, 60)
    assert found["epsilon_at_least"] > 2


@pytest.mark.parametrize(
    ("dp", "multiplier"), [("central", 1.0), ("central", 4.0), ("central", 16.0), ("local", 2.0), ("local", 16.0)]
)
def test_canary_sites_stay_below_what_is_claimed(tmp_path: Path, data: Path, dp: str, multiplier: float) -> None:
    pytest.importorskip("dp_accounting")
    how = {"adapter": "gate", "num_server_rounds": 2, "dp": dp, "noise_multiplier": multiplier}
    path = made(tmp_path, data, **how)
    found = facts(path, "--canaries", 60)
    assert found["epsilon_of"] == "site"
    assert found["epsilon_at_least"] < found["epsilon_claimed"]["site"] == history.read(path).epsilon
    assert multiplier > 2 or found["epsilon_at_least"] > 0.3
    own = facts(path)
    assert own["epsilon_of"] == "image"
    assert own["epsilon_claimed"] == found["epsilon_claimed"]


def test_noise_that_is_left_out_is_noticed(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("dp_accounting")
    path = made(tmp_path, data, adapter="gate", num_server_rounds=1, dp="local", noise_multiplier=8.0)
    monkeypatch.setattr(privacy, "noised", lambda state, deviation: state)
    code, stdout, _ = run(path, "--canaries", 60)
    assert code == 0
    assert "The attack finds more than the claimed ε allows: the claim is wrong." in stdout


def test_what_can_not_be_audited_is_told_in_a_line(tmp_path: Path, data: Path, tree: Path) -> None:
    path = made(tmp_path, data, method="one-round")
    for words, expected in (
        (["nowhere"], "nowhere: there is no such run"),
        (
            [path, "--site", "ward"],
            f"--site ward: {path.name} has no such site; its sites are photo-0, photo-1, sketch-0",
        ),
        ([path, "--canaries", 5], "--canaries 5: expected 10 to 2,000"),
        ([path, "--canaries", -1], "--canaries -1: expected 10 to 2,000"),
        ([path, "--canaries", 10**9], "--canaries 1000000000: expected 10 to 2,000"),
        ([path, "--canaries", 50, "--site", "photo-0"], "--canaries: they are put into a simulation of all sites"),
        ([path, "--confidence", 1], "--confidence 1: expected at least 0.5, and less than 1"),
        ([path, "--site", "photo-0", "--data", f"features:{data}"], "these are not the images that photo-0 had in"),
    ):
        code, _, stderr = run(*words)
        assert code == 2, words
        assert expected in stderr
        assert stderr.count("\n") == 1
    summary = json.loads((path / history.SUMMARY).read_text())
    saved.write_json(path / history.SUMMARY, summary | {"status": "failed"})
    assert "is not completed, so it has no result to audit: it is failed" in run(path)[2]


def test_a_server_without_images_leaves_it_to_the_sites(tmp_path: Path, data: Path) -> None:
    path = made(tmp_path, data, method="one-round")
    settings = json.loads((path / history.SETTINGS).read_text())
    saved.write_json(path / history.SETTINGS, settings | {"data": "none"})
    assert "its server had no images; a site can audit its own with --data and --site" in run(path)[2]


def test_a_whole_model_is_attacked_by_its_losses(tmp_path: Path, tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, _, pixels = whole_model_run(tree, tmp_path / "runs", 0.01)
    site = make_sites(pixels, "", 1, 0)[0][0]
    examples = {site.name: [len(part.labels) for part in (site.train, site.validation, site.test)]}
    other = finished(tmp_path / "other", summary={"holdout": None, "examples": examples})
    saved.write_json(path / history.SUMMARY, json.loads((other / history.SUMMARY).read_text()))
    settings = json.loads((path / history.SETTINGS).read_text())
    saved.write_json(path / history.SETTINGS, settings | {"sites": 1})
    assert "of the same site and class; at least 10 are needed" in run(path)[2]
    monkeypatch.setattr(audit, "LEAST", 3)
    found = facts(path)
    assert 3 <= found["bits"] < 10
    assert (found["guesses"], found["epsilon_at_least"]) == (found["bits"], 0.0)
    assert "trained the whole model; canaries are for other methods" in run(path, "--canaries", 20)[2]


def test_who_is_left_after_one_was_forgotten_has_the_same_images(tmp_path: Path, data: Path) -> None:
    path = made(tmp_path, data, method="one-round")
    summary, settings = (json.loads((path / name).read_text()) for name in (history.SUMMARY, history.SETTINGS))
    summary["examples"].pop("photo-0")
    saved.write_json(path / history.SUMMARY, summary)
    saved.write_json(path / history.SETTINGS, settings | {"sites": 2, "simulated": 3})
    assert facts(path)["attacker"].endswith("the images of all 2 sites")
    assert facts(path, "--canaries", 20)["bits"] == 20


@needs("privacy")
def test_of_a_run_that_hides_images_their_epsilon_is_claimed(tmp_path: Path, data: Path) -> None:
    path = made(tmp_path, data, method="one-round", statistics="gradient", dp="central", dp_unit="image", epsilon=2.0)
    found = facts(path)
    assert found["epsilon_claimed"] == {"image": 2.0, "site": None}
    assert found["epsilon_at_least"] < 2.0


@pytest.mark.parametrize(
    ("least", "claimed", "sentence"),
    [
        (0.0, 1.0, "This attack finds nothing for certain."),
        (0.5, 1.0, "The attack finds no more than the claimed ε allows. A stronger attack may find more."),
        (1.5, 1.0, "The attack finds more than the claimed ε allows: the claim is wrong."),
        (1.5, None, "The attack finds members: any claim of a smaller ε of an image would be wrong."),
    ],
)
def test_the_sentence_compares_the_floor_with_the_claim(least: float, claimed: float | None, sentence: str) -> None:
    found = Findings(100, 10, 9, 0.6, 0.5, 0.7, 0.1, least)
    text = audit.Audit("study", "all", "the result", "image", found, 0.95, 1e-5, claimed, "image").text()
    assert sentence in text


@pytest.mark.parametrize("masked", [False, True])
def test_canaries_in_a_gradient_without_noise_are_all_found(tmp_path: Path, data: Path, masked: bool) -> None:
    path = made(tmp_path, data, method="one-round", statistics="gradient", secure_aggregation=masked)
    found = facts(path, "--canaries", 60)
    assert (found["right"], found["guesses"]) == (60, 60)
    assert found["epsilon_at_least"] > 2
    assert found["attacker"] == "what a new simulation ends with, and all other images"


@needs("privacy")
@pytest.mark.parametrize(
    ("statistics", "place", "epsilon", "least"),
    [
        ("gradient", "central", 1.0, 0.0),
        ("gradient", "central", 8.0, 0.4),
        ("gradient", "shares", 8.0, 0.4),
        ("gradient", "local", 8.0, 0.4),
        ("full", "central", 4.0, 0.4),
        ("full", "shares", 8.0, 0.8),
        ("full", "local", 8.0, 0.8),
    ],
)
def test_canary_images_in_noise_stay_below_what_is_claimed(
    tmp_path: Path, data: Path, statistics: str, place: str, epsilon: float, least: float
) -> None:
    how = {"statistics": statistics, "dp_unit": "image", "epsilon": epsilon, "secure_aggregation": place == "shares"}
    path = made(tmp_path, data, method="one-round", dp="local" if place == "local" else "central", **how)
    found = facts(path, "--canaries", 200)
    assert found["epsilon_of"] == "image"
    assert found["epsilon_claimed"] == {"image": epsilon, "site": None}
    assert least <= found["epsilon_at_least"] < epsilon
    seen = "each site's noised sums" if place == "local" else "the noised total"
    assert found["attacker"] == f"{seen} of a new simulation, and all other images"


@needs("privacy")
@pytest.mark.parametrize(
    ("statistics", "dp", "epsilon"),
    [("gradient", "central", 1.0), ("gradient", "local", 1.0), ("full", "central", 2.0)],
)
def test_noise_for_images_that_is_left_out_is_noticed(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch, statistics: str, dp: str, epsilon: float
) -> None:
    path = made(tmp_path, data, method="one-round", statistics=statistics, dp=dp, dp_unit="image", epsilon=epsilon)
    monkeypatch.setattr(private_sums, "noised", lambda sums, sigmas: {**sums})
    code, stdout, stderr = run(path, "--canaries", 100)
    assert code == 0, stderr
    assert "The attack finds more than the claimed ε allows: the claim is wrong." in stdout


@needs("privacy")
@pytest.mark.parametrize("masked", [False, True], ids=["central", "shares"])
def test_canaries_are_found_where_features_are_shortened_in_the_span(masked: bool) -> None:
    """With 64 directions of 80."""
    rows = list(torch.arange(4000).chunk(4))
    settings = Settings(method="one-round", dp="central", dp_unit="image", epsilon=16.0, secure_aggregation=masked)
    assert 1.5 < found_images(sites(images(4000, 0), rows), classes(), settings, 200, 0.95).epsilon < 16


@needs("lora")
def test_lora_is_attacked_by_its_losses(tmp_path: Path, tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    how: dict[str, Any] = {"method": "lora", "lora_layers": "last:1", "lora_rank": 2, "learning_rate": 0.02}
    how |= {"data": f"folder:{tree}", "holdout": "", "num_server_rounds": 2}
    settings = Settings(**how)
    features = open_features(settings, progress=False)
    sites, _ = make_sites(features, "", 1)
    start = new_learner(settings, features)
    result = simulate(sites, features.classes.ready(), None, settings, start=start, test_every_round=False)
    examples = numbers(sites)
    path = finished(tmp_path, summary={"holdout": None, "examples": examples}, sites=1, **how)
    saved.save_adapter(path, {**result.last, **start.frozen}, settings, features, 2, blend=result.blend)
    monkeypatch.setattr(audit, "LEAST", 3)
    found = facts(path)
    assert 3 <= found["bits"] < 10
    assert found["guesses"] == found["bits"]
    found = facts(path, "--canaries", 20)
    assert (found["attacked"], found["bits"]) == ("20 canary images, each in by the toss of a coin", 20)
    assert found["auc"] > 0.8


@needs("lora", "privacy")
def test_canary_sites_in_a_lora_stay_below_what_is_claimed(tree: Path) -> None:
    how: dict[str, Any] = {"method": "lora", "lora_layers": "last:1", "lora_rank": 2, "data": f"folder:{tree}"}
    settings = Settings(dp="central", num_server_rounds=1, holdout="", **how)
    features = open_features(settings, progress=False)
    every, _ = make_sites(features, "", 2)
    start = new_learner(settings, features)
    found = found_sites(every, features.classes.ready(), settings, 20, 0.95, start)
    claimed = privacy.spent(settings, [1])
    assert found.bits == 20
    assert claimed is not None
    assert found.epsilon <= claimed


@needs("lora")
def test_canaries_are_put_into_a_run_with_the_start_that_the_run_had(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, learner, features = lora_run(tree, tmp_path / "before")
    export.write(FedCLIP.from_pretrained(place, precision="float32"), tmp_path / "start")
    how: dict[str, Any] = {"method": "lora", "lora_layers": "last:1", "lora_rank": 2, "lora_alpha": 2.0, "holdout": ""}
    how |= {"data": f"folder:{tree}", "start": str(tmp_path / "start"), "precision": "float32"}
    starts: list[Any] = []

    def noted(*given: Any) -> Findings:
        starts.append(given[-1])
        return Findings(2, 1, 1, 0.5, 0.0, 1.0, 0.0, 0.0)

    monkeypatch.setattr(audit, "found_images", noted)
    sites, _ = make_sites(features, "", 2)
    path = finished(tmp_path / "runs", summary={"holdout": None, "examples": numbers(sites)}, sites=2, **how)
    saved.save_adapter(path, {**learner.on_cpu(), **learner.frozen}, Settings(**how), features, 1)
    facts(path, "--canaries", 20)
    assert all(torch.equal(starts[0].every[name], tensor) for name, tensor in learner.every.items())
