"""Sites that want to harm the others, as real SuperNodes: what they send is not what any ClientApp would."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from benchmarks.common import write_features
from deploy.processes import superlink, supernode
from fedclip_flwr import simulation

HOSTILE = Path(__file__).parent / "hostile"
WAYS = ("garbage", "endless", "nameless", "partless")
PROJECT = HOSTILE.parent.parent


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """What a run of one round came to, with an honest site and a hostile one of each kind."""
    place = tmp_path_factory.mktemp("hostile")
    data = write_features(place / "features", {"art": 60, "sketch": 20})
    with ExitStack() as stack:
        stack.enter_context(pytest.MonkeyPatch.context()).setattr(simulation, "stop_in_order", lambda word: None)
        link = stack.enter_context(superlink(place / "link"))
        nodes = [
            stack.enter_context(
                supernode(link, site, f"site='{site}' data='features:{data}'", HOSTILE=way, PYTHONPATH=str(HOSTILE))
            )
            for site, way in [("honest", ""), *((way, way) for way in WAYS)]
        ]
        link.wait_for(nodes)
        settings = {"data": f"features:{data}", "adapter": "scale", "num-server-rounds": 1, "round-timeout": 30.0}
        settings |= {"results-dir": str(place / "results"), "min-sites": 1}
        given = place / "settings.toml"
        given.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in settings.items()))
        command = ["flwr", "run", str(PROJECT), simulation.CONNECTION, "--stream", "--run-config", str(given)]
        done = subprocess.run(command, env=link.env, capture_output=True, text=True)
        summary = place / "results" / "latest" / "summary.json"
        assert summary.exists(), done.stdout + done.stderr
        yield {**json.loads(summary.read_text()), "log": done.stdout}


def test_a_run_with_hostile_sites_is_completed_by_the_others(told: dict[str, Any]) -> None:
    assert told["status"] == "completed"
    assert told["rounds"] == 1
    assert "honest" in told["adapted"]["sites"]
    assert "Traceback" not in told["log"]


@pytest.mark.parametrize(
    ("way", "why"),
    [
        ("garbage", "its answer can't be put together"),
        ("endless", "bytes and more, expected at most"),
        ("partless", "no answer within 30 s"),
    ],
)
def test_each_is_named_with_what_it_did(told: dict[str, Any], way: str, why: str) -> None:
    assert any(failure["site"] == way and why in failure["why"] for failure in told["failures"]), told["failures"]


def test_who_sent_an_answer_is_not_for_the_site_to_say(told: dict[str, Any]) -> None:
    """Its answers are good but for that, and count as its own."""
    assert not [failure for failure in told["failures"] if failure["site"] == "nameless"]
    assert "nameless" in told["adapted"]["sites"]
