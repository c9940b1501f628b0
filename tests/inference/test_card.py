"""The model card: what it says, what the hub reads of it, and what it must not say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard, ModelCardData

from fedclip_flwr.base import files
from fedclip_flwr.base.settings import PLACES
from fedclip_flwr.inference import card
from fedclip_flwr.runs import saved
from tests.finished import finished


def card_of(folder: Path, sites: bool = False, **changed: Any) -> str:
    facts = files.read_json(folder / saved.FACTS) | changed
    return str(card.card_of(facts, folder, sites))


def read(text: str) -> ModelCardData:
    """What the hub reads of the card."""
    data = ModelCard(text).data
    assert isinstance(data, ModelCardData)
    return data


def test_the_hub_reads_results_data_and_tags(tmp_path: Path) -> None:
    data = read(card_of(finished(tmp_path, data="pacs")))
    assert (data.library_name, data.pipeline_tag) == ("fedclip-flwr", "zero-shot-image-classification")
    assert data.datasets == ["flwrlabs/pacs"]
    assert data.get("base_model") is None  # the bundled CLIP is not on the hub
    assert {"clip", "federated-learning", "model_hub_mixin"} <= {*(data.tags or [])}
    found = [
        (one.dataset_type, one.dataset_split, one.metric_type, one.metric_value) for one in data.eval_results or []
    ]
    assert found == [
        ("flwrlabs/pacs", "seen", "accuracy", 0.7123),
        ("flwrlabs/pacs", "unseen", "accuracy", 0.375),
    ]


def test_the_hub_links_a_model_of_its_own(tmp_path: Path) -> None:
    text = card_of(finished(tmp_path), model="some/clip", model_revision="0123456789abcdef")
    assert read(text).base_model == "some/clip"
    assert "image features of some/clip at 0123456789ab," in text


def test_results_and_cost_are_those_of_the_run(tmp_path: Path) -> None:
    text = card_of(finished(tmp_path))
    assert "| the sites' own test images, mean | 50.0 | 71.2 | +21.2 |" in text
    assert "| sketch, seen by no site | 25.0 | 37.5 | +12.5 |" in text
    assert "Round 4 of 5, selected by validation." in text
    assert "Sent and received: 2 kB a site and round; FedAVG of the whole model: 4 MB, 2,000 times as much." in text
    assert "- no differential privacy" in text
    assert "3 classes: cat, dog, fish." in text
    assert "| `learning-rate` | the recipe's |" in text
    assert "| `seed` | 0 |" in text


def test_no_site_is_named_unless_that_is_said(tmp_path: Path) -> None:
    folder = finished(tmp_path)
    plain = card_of(folder)
    assert "- sites: 2" in plain
    assert not any(name in plain for name in ("ward", "lab-0", "600"))
    named = card_of(folder, sites=True)
    assert "| lab-0 | 600 | 200 | 200 |" in named
    assert "| ward-0 | 50.0 | 71.2 | +21.2 |" in named


@pytest.mark.parametrize("kind", PLACES)
def test_no_folder_of_the_machine_is_named(kind: str, tmp_path: Path) -> None:
    folder = finished(tmp_path, data=f"{kind}/srv/hospital/images", results_dir="/srv/results", resume="/srv/runs/x")
    text = card_of(folder, sites=True, model="/home/somebody/clips/mine")
    assert f"- data: `{kind}images`" in text
    assert "image features of mine, which" in text
    assert not any(part in text for part in ("/srv", "hospital", "/home", "somebody", str(tmp_path)))
    assert read(text).get("datasets") is None


def test_the_privacy_spent_is_reported(tmp_path: Path) -> None:
    spent = {"privacy": {"dp": "central", "epsilon": 6.573, "delta": 1e-5}}
    text = card_of(finished(tmp_path, summary=spent, dp="central", secure_aggregation=True))
    assert "- differential privacy of sites (central): ε = 6.57 at δ = 1e-05; not covered: image counts" in text
    assert "- secure aggregation: the server saw only the sum" in text
    assert "no differential privacy" not in text


def test_a_run_without_a_domain_held_out_has_one_result(tmp_path: Path) -> None:
    none: dict[str, Any] = {"seen": 0.5, "unseen": None, "sites": {}, "holdout_sites": {}, "round": 1}
    none |= {"personal": None, "personal_metrics": None}
    text = card_of(finished(tmp_path, summary={"holdout": None, "zero_shot": none, "adapted": none}))
    assert [one.dataset_split for one in read(text).eval_results or []] == ["seen"]
    assert "seen by no site" not in text


def test_a_run_that_was_stopped_has_no_results(tmp_path: Path) -> None:
    text = card_of(finished(tmp_path, status="stopped"))
    assert "## Results" not in text
    assert read(text).eval_results is None


def test_figures_of_other_classes_are_marked_as_such(tmp_path: Path) -> None:
    folder = finished(tmp_path)
    note = "These figures are for the run's own classes and prompts, which differ from those above."
    assert note not in card_of(folder)
    text = card_of(folder, class_names=["zebra", "lion"])
    assert note in text
    assert "2 classes: zebra, lion." in text


def test_a_card_that_lies_in_a_folder_is_taken_as_it_is_for_the_same_classes(tmp_path: Path) -> None:
    run = finished(tmp_path)
    facts = files.read_json(run / saved.FACTS)
    elsewhere = tmp_path / "elsewhere"
    saved.write_json(elsewhere / saved.CONFIG, facts)
    (elsewhere / "README.md").write_text("---\nlicense: mit\n---\n\nWritten by hand.\n")
    assert "Written by hand." in str(card.card_of(facts, elsewhere))
    assert "Written by hand." not in str(card.card_of({**facts, "class_names": ["a", "b"]}, elsewhere))
