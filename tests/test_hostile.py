"""Sites that want to harm the others, as real SuperNodes: what they send is not what any ClientApp would."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.deployed import completed

pytestmark = pytest.mark.federation

HOSTILE = Path(__file__).parent / "hostile"
WAYS = ("garbage", "endless", "nameless", "partless")


@pytest.fixture(scope="module")
def summary(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a run of one round came to, with an honest site and a hostile one of each kind."""
    sites = {"honest": {}, **{way: {"HOSTILE": way, "PYTHONPATH": str(HOSTILE)} for way in WAYS}}
    settings = {"adapter": "scale", "num-server-rounds": 1, "round-timeout": 120.0}
    return completed(tmp_path_factory.mktemp("hostile"), sites, 60, {}, **settings)


def test_a_run_with_hostile_sites_is_completed_by_the_others(summary: dict[str, Any]) -> None:
    assert summary["status"] == "completed"
    assert summary["rounds"] == 1
    assert "honest" in summary["adapted"]["sites"]
    assert "Traceback" not in summary["log"]


@pytest.mark.parametrize(
    ("way", "why"),
    [
        ("garbage", "its answer can't be decoded"),
        ("endless", "bytes, expected at most"),
        ("partless", "no answer within 120 s"),
    ],
)
def test_each_is_named_with_what_it_did(summary: dict[str, Any], way: str, why: str) -> None:
    assert any(failure["site"] == way and why in failure["why"] for failure in summary["failures"]), summary["failures"]


def test_who_sent_an_answer_is_not_for_the_site_to_say(summary: dict[str, Any]) -> None:
    """Its answers are good but for that, and count as its own."""
    assert not [failure for failure in summary["failures"] if failure["site"] == "nameless"]
    assert "nameless" in summary["adapted"]["sites"]
