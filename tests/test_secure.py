"""Secure aggregation, over Ray and over gRPC: the sum is right, whoever drops out, and no update or sum can be seen.

The arithmetic alone: secure/. What is written down in a run, and who drops out when: dropouts/sitecustomize.py.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, Context, Message, RecordDict
from safetensors.torch import load_file

import client_app
from fedclip_flwr.base.errors import UserError
from fedclip_flwr.base.roles import TRAIN
from fedclip_flwr.base.settings import Settings
from fedclip_flwr.exchange import records
from fedclip_flwr.exchange.records import ExchangeError, Report
from fedclip_flwr.exchange.secure import site
from fedclip_flwr.exchange.secure.masking import UINT32, UINT64, Numbers, NumberType
from fedclip_flwr.exchange.secure.member import Member
from fedclip_flwr.experiments.simulate import make_sites, simulate
from fedclip_flwr.features import open_features
from fedclip_flwr.learning import Classes
from fedclip_flwr.learning.metrics import BINS, Quality, Score
from fedclip_flwr.site.holdings import Site, SiteConfig, own_site
from reliability.federation import INJECTED
from tests import deployed
from tests.dropouts.sitecustomize import STEPS

DROPOUTS = Path(__file__).parent / "dropouts"
PROJECT = DROPOUTS.parent.parent
ROUNDS = len(STEPS)
SITES = 10
NAMES = [f"site-{n}" for n in range(SITES)]
GONE = ("000003", "000007")
ONE_BY_ONE = [dict.fromkeys(GONE, step) for step in STEPS]
"""In each round, two members drop out in another step."""
FOUR = ("000001", "000003", "000006", "000008")


def planned(place: Path, plan: Sequence[Mapping[str, str]]) -> None:
    """Where a run is written down: for each round, who drops out in which step."""
    (place / "recorded").mkdir()
    (place / "recorded" / "plan.json").write_text(json.dumps(plan))


def recording(place: Path) -> dict[str, str]:
    """The environment of processes in which sites drop out by the plan, and which write down what there is to see."""
    return {"DROPOUTS": str(place / "recorded"), "PYTHONPATH": f"{DROPOUTS}:{INJECTED}:{PROJECT}"}


def over_ray(place: Path, plan: Sequence[Mapping[str, str]] = ONE_BY_ONE, *given: str) -> dict[str, Any]:
    planned(place, plan)
    env = {**os.environ, **recording(place)}
    settings = [*(given or [f"num-server-rounds={ROUNDS}"]), "secure-aggregation=true", f"results-dir={place}/results"]
    command = [str(Path(sys.executable).parent / "fedclip"), "run", "--nodes", str(SITES), *settings]
    done = subprocess.run(command, cwd=PROJECT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    summary: dict[str, Any] = json.loads((place / "results" / "latest" / "summary.json").read_text())
    return {**summary, "log": done.stdout}


def over_grpc(place: Path) -> dict[str, Any]:
    planned(place, ONE_BY_ONE)
    settings = {"num-server-rounds": ROUNDS, "secure-aggregation": True, "min-sites": SITES - 2}
    return deployed.completed(place, {name: {} for name in NAMES}, 200, recording(place), **settings)


@pytest.fixture(
    scope="module",
    params=[pytest.param(over_ray, marks=pytest.mark.federation), pytest.param(over_grpc, marks=pytest.mark.soak)],
)
def place(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What was written down of a run in which two of ten sites drop out in each step once."""
    place = tmp_path_factory.mktemp("secure")
    (place / "summary.json").write_text(json.dumps(request.param(place)))
    return place


def recorded(place: Path, folder: str, name: str) -> list[tuple[str, bytes]]:
    """What was written down under names that begin so, by name."""
    paths = sorted((place / "recorded" / folder).glob(f"{name}*"))
    return [(path.name.partition(".")[0], path.read_bytes()) for path in paths]


def updates(place: Path, number: int, dtype: NumberType = UINT32) -> dict[str, Numbers]:
    """The members' updates, or sums, in a round, as they are before they are masked."""
    return {name[-6:]: np.frombuffer(data, dtype) for name, data in recorded(place, "true", f"update-{number}-")}


def test_a_run_is_completed_when_any_site_drops_out(place: Path) -> None:
    summary = json.loads((place / "summary.json").read_text())
    assert summary["status"] == "completed"
    assert summary["rounds"] == ROUNDS
    whys = [(failure["round"], failure["why"]) for failure in summary["failures"]]
    assert sorted(whys) == sorted((n, f"gone in {step}") for n, step in enumerate(STEPS, 1) for _ in GONE)
    assert "the round is repeated" not in summary["log"]


@pytest.mark.parametrize("number", range(1, ROUNDS + 1))
def test_the_sum_is_that_of_the_updates_that_came(place: Path, number: int) -> None:
    """To the bit; before, each number was rounded to half a step of 2⁻²⁵ or less."""
    own = updates(place, number)
    assert len(own) == (SITES - 2 if STEPS[number - 1] in ("keys", "shares") else SITES)
    came = [update for name, update in own.items() if STEPS[number - 1] == "unmask" or name not in GONE]
    assert len(came) == (SITES if STEPS[number - 1] == "unmask" else SITES - 2)
    ((_, made),) = recorded(place, "made", str(number))
    total = np.frombuffer(made, np.uint32)
    assert np.array_equal(total, sum(came[1:], came[0]))
    assert np.abs(total.view(np.int32)).max() > 1000  # that there is something to be seen


def test_no_single_update_and_no_secret_is_to_be_seen_at_the_server(place: Path) -> None:
    """In none of the bytes that came, and in none of the masked numbers."""
    owns = [own for number in range(1, ROUNDS + 1) for own in updates(place, number).values()]
    nothing_is_seen(place, owns, 2 * (SITES - 2) + SITES + SITES - 2)


def nothing_is_seen(place: Path, owns: list[Numbers], masked: int) -> None:
    """What the server received has so many masked vectors, and, like the run's folder, no part of these ones or of a
    secret."""
    kinds = {name.partition("-")[0] for name, _ in recorded(place, "seen", "")}
    assert kinds == {"query", "train", "evaluate"}
    vectors = [np.frombuffer(data, owns[0].dtype) for name, data in recorded(place, "seen", "train-masked")]
    assert len(vectors) == masked
    assert {name for name, _ in recorded(place, "seen", "train-")} == {"train-masked", "train-whole"}
    kept = [path.read_bytes() for path in (place / "results" / "latest").rglob("*") if path.is_file()]
    assert len(kept) > 4
    everything = b"".join([data for name, data in recorded(place, "seen", "") if name.endswith("whole")] + kept)
    secrets = [data for _, data in recorded(place, "true", "secret-")]
    assert len(secrets) > 3 * SITES
    assert not [secret for secret in secrets if secret in everything]
    for own in owns:
        moved = np.flatnonzero(own)
        assert len(moved) > 50
        for first in (moved[0], len(own) // 2, len(own) - 8):
            window = own[first : first + 8]
            assert not window.any() or window.tobytes() not in everything
        for vector in vectors:
            assert np.mean(vector == own) < 0.001
            assert random_bits(vector - own)
    assert all(map(random_bits, vectors))


def random_bits(numbers: Numbers) -> bool:
    """True if as many bits are set as if a coin had been thrown for each."""
    bits = np.unpackbits(numbers.view(np.uint8))
    return bool(abs(bits.mean() - 0.5) < 6 * 0.5 / len(bits) ** 0.5)


# One round: the sums are exact


def check_total(
    place: Path, summary: Mapping[str, Any], plan: Mapping[str, str], sites: Sequence[Site], classes: Classes
) -> None:
    """The state is that of an open run of the sites whose sums came, to the bit; no site's own sums can be seen."""
    lost = {failure["site"]: failure["why"] for failure in summary["failures"]}
    assert sorted(lost.values()) == sorted(f"gone in {step}" for step in plan.values())
    assert "the round is repeated" not in summary["log"]
    assert "secure aggregation: the server sees only the total of the sites' sums" in summary["log"]
    assert summary["contributions"] == {}
    came = [site for site in sites if lost.get(site.name, "gone in unmask") == "gone in unmask"]
    assert len(came) == SITES - sum(step != "unmask" for step in plan.values())
    truth = simulate(came, classes, None, Settings(method="one-round")).state
    saved = load_file(place / "results" / "latest" / "adapter.safetensors")
    assert saved.keys() == truth.keys()
    assert all(torch.equal(saved[name], tensor) for name, tensor in truth.items())
    own = updates(place, 1, UINT64)
    ((_, made),) = recorded(place, "made", "1")
    total = sum((vector for name, vector in own.items() if plan.get(name) != "masked"), np.uint64(0))
    assert np.array_equal(np.frombuffer(made, np.uint64), total)
    assert [path.name for path in (place / "results" / "latest" / "sums").iterdir()] == ["sites.json"]
    nothing_is_seen(place, [*own.values()], len(came))


@pytest.mark.soak
def test_the_total_of_one_round_is_exact_over_ray_when_a_site_drops_out_in_each_step(tmp_path: Path) -> None:
    plan = dict(zip(FOUR, STEPS, strict=True))
    summary = over_ray(tmp_path, [plan], "method=one-round")
    features = open_features(Settings(), progress=False)
    check_total(tmp_path, summary, plan, make_sites(features, "auto", SITES)[0], features.classes)


@pytest.fixture(scope="module")
def ten(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, deployed.Run]]:
    """A federation of ten sites over gRPC, and its place."""
    place = tmp_path_factory.mktemp("ten")
    with deployed.federation(place, {name: {} for name in NAMES}, 200, recording(place)) as run:
        yield place, run


@pytest.mark.federation
@pytest.mark.parametrize("steps", [STEPS[:2], STEPS[2:]], ids=" and ".join)
def test_the_total_of_one_round_is_exact_over_grpc_when_two_sites_drop_out_in_each_step(
    steps: Sequence[str], ten: tuple[Path, deployed.Run]
) -> None:
    (place, run), (first, second) = ten, steps
    plan = dict(zip(FOUR, (first, first, second, second), strict=True))
    planned(place, [plan])
    (own := place / first).mkdir()
    summary = run(own, **{"method": "one-round", "secure-aggregation": True})
    (place / "recorded").rename(own / "recorded")
    features = open_features(Settings(data=f"features:{place / 'features'}"), progress=False)
    sites = [own_site(features, SiteConfig(name, TRAIN, ["art"]), 0, torch.device("cpu")) for name in NAMES]
    check_total(own, summary, plan, sites, features.classes)


# A site, asked by a server that is played


def asked(kind: str, record: dict[str, Any], memory: RecordDict, **more: Any) -> Message:
    content = RecordDict({"masking": ConfigRecord(record), **more})
    context = Context(1, 2, {"site": "north"}, memory, Settings(secure_aggregation=True).as_run_config())
    return client_app.app(Message(content, 2, kind), context)


def test_a_site_answers_each_step_of_an_attempt_once() -> None:
    memory = RecordDict()
    others = [Member.begin(name, "now") for name in ("b", "c")]
    own = asked("query.keys", {"name": "a", "context": "now"}, memory)
    publics = {"a": own.content.config_records["keys"]["public"], **{member.name: member.public for member in others}}
    record = {"context": "now", "of": list(publics), "publics": list(publics.values())}
    first = asked("query.shares", record, memory)
    assert first.content.config_records["shares"]["to"] == ["b", "c"]
    again = asked("query.shares", record, memory)
    assert again.error.reason == "this member is asked for shares, expected to be asked for vectors"
    other = asked("query.shares", {**record, "context": "another"}, memory)
    assert other.error.reason == "this site has no secrets for this attempt: was its SuperNode restarted?"


@pytest.mark.parametrize(
    ("run", "node"),
    [(True, {}), (False, {"secure-aggregation": True}), (True, {"secure-aggregation": False})],
)
def test_a_site_that_masks_its_updates_gives_none_without(run: bool, node: dict[str, Any]) -> None:
    """Whatever the server asks for, and also where it is the site's owner who says so."""
    trained = {"w": torch.ones(3)}
    with pytest.raises(ExchangeError, match="gives its update only with secure aggregation"):
        site.masked(RecordDict(), {}, trained, trained)
    none = Score(0, 0, 0.0)
    content = records.write_answer(Report(1, none, Quality(none, 0.0, 0.0, [0.0] * BINS)), trained)
    context = Context(1, 2, node, RecordDict(), Settings(secure_aggregation=run).as_run_config())
    reply = client_app.guard(Message(RecordDict(), 2, "train"), context, lambda m, c: Message(content, reply_to=m))
    assert "must not leave this site" in str(reply.error.reason)


def test_what_does_not_go_with_it_is_refused() -> None:
    given = {"secure-aggregation": True, "codec": "int8", "strategy": "krum", "site-weights": "examples"}
    with pytest.raises(UserError) as refused:
        Settings.from_run_config(given)
    said = str(refused.value)
    assert "codec = 'int8': with secure-aggregation = true tensors are masked and can't be compressed" in said
    assert (
        "strategy = 'krum': with secure-aggregation = true the server sees no single update, so it can't compare them"
        in said
    )
    assert "site-weights = 'examples': with secure-aggregation = true sites count the same" in said
    with pytest.raises(UserError, match="it is for adapters"):
        Settings.from_run_config({"secure-aggregation": True, "method": "full-model"})
    assert Settings(secure_aggregation=True).least_sites == 3
    assert Settings(secure_aggregation=True, min_sites=5).least_sites == 5
