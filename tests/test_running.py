"""The real thing: `fedclip run` and `flwr run` over Ray, and a SuperLink with SuperNodes over gRPC."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from deploy.processes import superlink, supernode
from fedclip_flwr.base import content
from fedclip_flwr.base.settings import Settings
from fedclip_flwr.data.drawn import picture
from fedclip_flwr.exchange.records import may_leave
from fedclip_flwr.experiments.simulate import Result, make_sites, simulate
from fedclip_flwr.experiments.sweep import Cell, solve
from fedclip_flwr.features.base import Features
from fedclip_flwr.features.opening import new_learner, open_features
from fedclip_flwr.flower import lines
from fedclip_flwr.learning.adapters import tensor_names
from fedclip_flwr.learning.one_round import SUMS
from fedclip_flwr.learning.sums import sums_of
from fedclip_flwr.operations import simulation
from fedclip_flwr.runs.saved import load_adapter
from fedclip_flwr.site.holdings import SiteConfig, own_site
from harness.features import write_features
from tests.processes import alive, kill, until_gone

pytestmark = pytest.mark.federation

PROJECT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
ROUNDS = 2


def soak(given: Any) -> Any:
    """One of several that go the same way: `make soak` has it."""
    return pytest.param(given, marks=pytest.mark.soak)


def fedclip(*words: str, cwd: Path = PROJECT, **env: str) -> subprocess.CompletedProcess[str]:
    command = [str(BIN / "fedclip"), *words]
    return subprocess.run(command, cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True)


def run_folder(results: Path) -> Path:
    return (results / "latest").resolve()


def read(folder: Path, name: str) -> Any:
    return json.loads((folder / name).read_text())


def completed(nodes: int, results: Path, *settings: str, **where: Any) -> Path:
    """The folder of a run that was completed."""
    given = [f"num-server-rounds={ROUNDS}", f"results-dir={results}", *settings]
    done = fedclip("run", "--nodes", str(nodes), *given, **where)
    assert done.returncode == 0, done.stdout + done.stderr
    return run_folder(results)


def in_one_process(features: Features, nodes: int, settings: Settings | None = None) -> Result:
    settings = replace(settings or Settings(), num_server_rounds=ROUNDS)
    sites, unseen = make_sites(features, settings.holdout, nodes, settings.seed)
    whole = new_learner(settings, features) if settings.method == "full-model" else None
    return simulate(sites, features.classes, unseen, settings, start=whole)


def assert_same_result(folder: Path, truth: Result) -> None:
    """The run came to what the one-process federation comes to."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["round"] for line in lines] == [line.round for line in truth.rounds]
    for line, expected in zip(lines, truth.rounds, strict=True):
        assert line["seen"] == pytest.approx(expected.seen, abs=0.004)  # one image more or less may be right
        assert line["val"] == pytest.approx(expected.validation, abs=0.004)
        assert line["unseen"] == pytest.approx(expected.unseen, abs=0.002)
    last = truth.rounds[-1]
    assert last.round == ROUNDS
    adapted = read(folder, "summary.json")["adapted"]
    assert (adapted["round"], adapted["blend"]) == (truth.selected.round, truth.blend)
    assert adapted["seen"] == pytest.approx(truth.selected.seen, abs=0.004)
    if (folder / "model").is_dir():
        state = {f"net.{name}": tensor for name, tensor in load_file(folder / "model" / "model.safetensors").items()}
    else:
        state = load_file(folder / "adapter.safetensors")
        assert read(folder, "adapter.json")["round"] == truth.selected.round
        assert read(folder, "adapter.json")["blend"] == truth.blend
    assert state.keys() == truth.state.keys()
    for name, tensor in truth.state.items():
        torch.testing.assert_close(state[name], tensor, rtol=1e-5, atol=1e-6)


@pytest.mark.soak  # ten of them: the bare `flwr run` below
@pytest.mark.parametrize("nodes", [1, 2, 60])
def test_any_number_of_nodes_has_the_result_of_one_process(nodes: int, tmp_path: Path, drawn: Features) -> None:
    folder = completed(nodes, tmp_path)
    assert_same_result(folder, in_one_process(drawn, nodes))
    assert len(read(folder, "summary.json")["adapted"]["sites"]) == nodes


def same_tensors(folder: Path, state: Mapping[str, torch.Tensor]) -> None:
    saved = load_file(folder / "adapter.safetensors")
    assert saved.keys() == state.keys()
    assert all(torch.equal(saved[name], state[name]) for name in state)


@pytest.fixture(scope="module")
def encoded(drawn: Features) -> Features:
    """The drawn pictures, stored: what takes half a minute is done here, and not in a test."""
    for domain in drawn.domains:
        drawn.examples(domain)
    return drawn


@pytest.fixture(scope="module")
def one_round(tmp_path_factory: pytest.TempPathFactory, encoded: Features) -> tuple[Path, str, Result]:
    """The results of a simulation, what it printed, and the same federation in one process."""
    settings = Settings(method="one-round")
    sites, unseen = make_sites(encoded, settings.holdout, 5, settings.seed)
    truth = simulate(sites, encoded.classes, unseen, settings)
    results = tmp_path_factory.mktemp("one-round")
    done = fedclip("run", "--nodes", "5", "method=one-round", "personalize=true", f"results-dir={results}")
    assert done.returncode == 0, done.stdout + done.stderr
    return results, done.stdout, truth


def test_one_round_has_the_file_of_one_process_to_the_bit(one_round: tuple[Path, str, Result]) -> None:
    results, said, truth = one_round
    folder = run_folder(results)
    same_tensors(folder, truth.state)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["round"] for line in lines] == [0, 1]
    summary = read(folder, "summary.json")
    assert summary["rounds"] == 1
    assert summary["adapted"]["unseen"] == pytest.approx(truth.selected.unseen, abs=0.002)
    assert summary["adapted"]["unseen"] > summary["zero_shot"]["unseen"] + 0.02
    assert (
        summary["adapted"]["personal"].keys() == summary["adapted"]["sites"].keys() == summary["contributions"].keys()
    )
    assert sum(images for images, _ in summary["contributions"].values()) == truth.state["counts"].sum()
    assert "one round, in closed form; every image counts the same" in said


def test_one_round_is_resumed_with_its_evaluation(one_round: tuple[Path, str, Result]) -> None:
    results, _, truth = one_round
    folder = run_folder(results)
    summary = read(folder, "summary.json")
    stopped = {"status": "stopped", "why": "before its evaluation", "round": 1, "failures": []}
    (folder / "summary.json").write_text(json.dumps(stopped))
    done = fedclip("run", f"results-dir={results}", "resume=latest")
    assert done.returncode == 0, done.stdout + done.stderr
    same_tensors(folder, truth.state)
    again = read(folder, "summary.json")
    assert {**again, **SPENT} == {**summary, **SPENT}
    assert again["resumed"] == [1]


@pytest.mark.soak  # some of them: the run folder below
@pytest.mark.parametrize(
    "given",
    [
        {"recipe": "paper", "holdout": "art+photo"},
        {"codec": "int8", "fraction_train": 0.6},
        {"codec": "bfloat16", "adapter": "gate", "blend": "auto", "seed": 1},
        {"adapter": "scale", "blend": "auto", "strategy": "fedprox", "proximal_mu": 50.0, "seed": 3},
        {"strategy": "fedyogi", "adapter": "scale"},
        {
            "adapter": "gate",
            "adapter_rank": 2,
            "blend": 0.5,
            "local_epochs": 2,
            "batch_size": 100,
            "learning_rate": 3e-3,
            "fraction_train": 0.5,
            "site_weights": "examples",
        },
    ],
    ids=lambda given: " ".join(given),
)
def test_what_can_be_set_does_the_same_in_a_run_as_in_one_process(
    given: dict[str, Any], tmp_path: Path, drawn: Features
) -> None:
    folder = completed(5, tmp_path, *(f"{key.replace('_', '-')}={value}" for key, value in given.items()))
    truth = in_one_process(drawn, 5, Settings(**given))
    assert_same_result(folder, truth)
    plain = in_one_process(drawn, 5, Settings(seed=given.get("seed", 0)))
    assert truth.rounds[1:] != plain.rounds[1:]
    if "fraction_train" not in given:  # then all messages of a round are alike, as a sweep takes them to be
        settings = Settings(**(given | {"holdout": "sketch", "num_server_rounds": 1}))
        predicted = solve(Cell("attention", settings, 5), drawn).bytes
        last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
        assert predicted == pytest.approx(last["bytes"] / 5, rel=0.02)


def test_fedprox_of_the_full_model_runs_as_in_one_process(tmp_path: Path, tree: Path) -> None:
    given = ["method=full-model", "recipe=paper", "strategy=fedprox", "proximal-mu=5", f"data=folder:{tree}"]
    folder = completed(2, tmp_path, *given, "batch-size=4")
    settings = Settings(
        data=f"folder:{tree}",
        method="full-model",
        recipe="paper",
        strategy="fedprox",
        proximal_mu=5.0,
        batch_size=4,
    )
    assert_same_result(folder, in_one_process(open_features(settings, progress=False), 2, settings))
    traffic = read(folder, "summary.json")["traffic"]
    assert traffic["times_less"] == pytest.approx(1.0, abs=0.02)


def assert_same_checkpoint(one: Path, other: Path) -> None:
    """To the bit, but for what was spent: bytes and seconds."""
    first, second = (load_file(folder / "checkpoint" / "adapter.safetensors") for folder in (one, other))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first.keys() - {"facts/json"})


@pytest.mark.soak
def test_the_same_seed_gives_the_same_adapter_to_the_bit(tmp_path: Path, drawn: Features) -> None:
    first, again = completed(3, tmp_path / "a"), completed(3, tmp_path / "b")
    assert (first / "adapter.safetensors").read_bytes() == (again / "adapter.safetensors").read_bytes()
    assert_same_checkpoint(first, again)
    assert_same_result(first, in_one_process(drawn, 3))


def test_the_papers_recipe_on_features_of_unit_length_with_two_domains_held_out(tmp_path: Path) -> None:
    folder = write_features(tmp_path / "features", dict.fromkeys(("a", "b", "c", "d"), 60))
    for file in folder.glob("?.safetensors"):
        tensors = load_file(file)
        save_file({**tensors, "image_features": F.normalize(tensors["image_features"], dim=1)}, file)
    given = [f"data=features:{folder}", "holdout=b+d", "recipe=paper"]
    results = tmp_path / "results"
    done = fedclip("run", "--nodes", "2", *given, f"num-server-rounds={ROUNDS}", f"results-dir={results}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "warning     this can't be the paper's result" in done.stdout
    assert "This is not the paper's result: its adapter expects features of CLIP's own length" in done.stdout
    made = run_folder(results)
    settings = Settings(data=f"features:{folder}", holdout="b+d", recipe="paper")
    assert_same_result(made, in_one_process(open_features(settings), 2, settings))
    summary = read(made, "summary.json")
    assert (summary["holdout"], summary["unknown_norm"]) == ("b+d", True)
    apart = summary["adapted"]["holdout_sites"]
    assert apart.keys() == {"b", "d"}
    assert summary["adapted"]["unseen"] == pytest.approx((apart["b"] + apart["d"]) / 2)
    assert "b, unseen" in done.stdout
    assert read(made, "adapter.json")["feature_norm"] == 1.0  # which is what it saw
    assert "This is not the paper’s result" in (made / "report.html").read_text()


def test_a_run_folder_is_as_the_contract_says(tmp_path: Path, drawn: Features) -> None:
    given = ["adapter=gate", "adapter-rank=3", "seed=5", "holdout=", "site-weights=examples"]
    folder = completed(2, tmp_path, *given, "codec=int8", "fraction-train=0.5", "blend=auto", "strategy=fedadam")
    made: dict[str, Any] = {"adapter": "gate", "adapter_rank": 3, "seed": 5, "holdout": "", "site_weights": "examples"}
    more: dict[str, Any] = {"codec": "int8", "fraction_train": 0.5, "blend": "auto", "strategy": "fedadam"}
    assert_same_result(folder, in_one_process(drawn, 2, Settings(**made, **more)))
    assert {f.name for f in folder.iterdir()} == {
        "settings.json",
        "metrics.jsonl",
        "adapter.safetensors",
        "adapter.json",
        "checkpoint",
        "summary.json",
        "report.html",
        "plots",
    }
    settings = read(folder, "settings.json")
    assert (settings["adapter"], settings["seed"], settings["results-dir"]) == ("gate", 5, str(tmp_path))
    assert settings["package"] == content.of_package(tmp_path)
    assert {"fedclip-flwr", "flwr", "torch"} <= settings["versions"].keys()
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1].keys() == {"round", "seen", "unseen", "val", "loss", "sites", "bytes", "seconds"}
    assert lines[-1]["unseen"] is None
    summary = read(folder, "summary.json")
    assert summary["status"] == "completed"
    assert summary["failures"] == []
    assert summary["adapted"]["sites"].keys() == {"art-0", "cartoon-0"}
    assert summary["adapted"]["unseen"] is None
    assert summary["adapted"]["personal"] is None
    traffic = summary["traffic"]
    assert traffic["full_model_bytes"] == 2 * 4 * 1_357_697
    assert traffic["per_site_round_bytes"] == sum(line["bytes"] for line in lines[1:]) / (2 * ROUNDS)
    assert traffic["down_bytes"] + traffic["up_bytes"] > sum(line["bytes"] for line in lines)
    assert traffic["times_less"] == pytest.approx(traffic["full_model_bytes"] / traffic["per_site_round_bytes"])
    adapter, facts = load_adapter(folder)
    assert (facts["kind"], facts["rank"], facts["dim"], facts["model"]) == ("gate", 3, 128, "bundled")
    assert facts["prompts"][0] == "a picture of a bird"
    assert adapter(torch.eye(2, 128)).shape == (2, 128)


@pytest.fixture(scope="module")
def flower() -> Iterator[dict[str, str]]:
    """The environment of a SuperLink that simulates."""
    with simulation.temporary() as folder, simulation.superlink(Path(folder)) as env:
        yield env


def flwr_run(env: Mapping[str, str], *options: str) -> tuple[str, str]:
    """What a plain `flwr run . --stream` prints, and the run's status."""
    command = ["flwr", "run", str(PROJECT), simulation.CONNECTION, "--stream", *options]
    printed = subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout
    number = printed.split("Successfully started run ")[1].split()[0]
    return printed, simulation.status_of(number, env)


def test_a_bare_flwr_run_simulates_sites(flower: dict[str, str], tmp_path: Path, drawn: Features) -> None:
    """As many as Flower does without being told: ten until 1.31, then two."""
    nodes = 10 if lines.line() is lines.GRPC else 2
    printed, status = flwr_run(flower, "--run-config", f"num-server-rounds={ROUNDS} results-dir='{tmp_path}'")
    assert status == "finished:completed"
    assert_same_result(run_folder(tmp_path), in_one_process(drawn, nodes))
    for expected in (
        f"{nodes} sites",
        "33,024 numbers in 4 tensors, 2.43 % of the model's 1,357,697",
        "zero-shot",
        "gain",
    ):
        assert expected in printed
    assert printed.rstrip().endswith(f"Run folder: {run_folder(tmp_path)}")
    for chatter in ("aggregate_train", "ClientAppActor", "FutureWarning", "Traceback"):
        assert chatter not in printed


def test_wrong_settings_end_a_flwr_run_as_failed_with_one_message(flower: dict[str, str], tmp_path: Path) -> None:
    wrong = f"adapter='attn' learning-rate=-1 data='folder:{tmp_path}/none' results-dir='somewhere'"
    printed, status = flwr_run(flower, "--run-config", wrong)
    assert status == "finished:failed"
    assert "4 of the settings can't be used" in printed
    for expected in ("attention, gate, scale", "at least 0", "no such folder", f"{os.sep}somewhere"):
        assert expected in printed
    assert "Traceback" not in printed
    assert "zero-shot" not in printed


@pytest.mark.soak
def test_simulated_sites_need_data_to_share(flower: dict[str, str], tmp_path: Path) -> None:
    given = f"data='none' class-names='cat,dog' results-dir='{tmp_path}'"
    printed, status = flwr_run(flower, "--run-config", given)
    assert status == "finished:failed"
    assert "simulated sites have no images of their own" in printed


@pytest.mark.soak  # on a grid in memory: tests/server/test_waiting.py
def test_a_simulation_with_too_few_sites_does_not_wait_for_more(flower: dict[str, str], tmp_path: Path) -> None:
    printed, status = flwr_run(flower, "--run-config", f"min-sites=11 results-dir='{tmp_path}'")
    assert status == "finished:failed"
    assert "10, min-sites = 11 are needed: simulate more" in printed
    assert "min-sites = 11" in read(run_folder(tmp_path), "summary.json")["why"]


@pytest.mark.parametrize("how", [signal.SIGINT, soak(signal.SIGTERM)])
def test_fedclip_run_stopped_in_the_middle_leaves_nothing_behind(how: signal.Signals, tmp_path: Path) -> None:
    env = {**os.environ, "TMPDIR": str(tmp_path), "MARK": str(tmp_path)}  # too long a folder for Ray's sockets
    command = [str(BIN / "fedclip"), "run", "--nodes", "2", "num-server-rounds=100000", f"results-dir={tmp_path}/runs"]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, env=env, start_new_session=True, **pipes) as process:
        assert process.stdout is not None
        while "zero-shot" not in process.stdout.readline():
            assert process.poll() is None
        folders = {Path(found["FLWR_HOME"]) for found in alive(f"MARK={tmp_path}") if "FLWR_HOME" in found}
        assert any(folder.exists() for folder in folders)
        for _ in range(3):  # the user is impatient
            os.killpg(process.pid, how)
        assert "Stopped" in process.stdout.read()
    assert process.returncode == 128 + how
    until_gone(f"MARK={tmp_path}")
    assert not any(folder.exists() for folder in folders)
    folder = run_folder(tmp_path / "runs")
    assert load_adapter(folder)[1]["round"] >= 0
    summary = read(folder, "summary.json")
    assert summary["status"] == "stopped"
    if how is signal.SIGINT:
        rounds = max(1, summary["round"])
        done = fedclip("run", f"results-dir={tmp_path}/runs", "resume=latest", f"num-server-rounds={rounds}")
        assert done.returncode == 0, done.stdout + done.stderr
        assert read(folder, "summary.json")["resumed"] == [summary["round"]] * bool(summary["round"])
        lines = [json.loads(line)["round"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert lines == list(range(rounds + 1))


def cut_off(after: int, results: Path, *settings: str) -> Path:
    """The folder of a run of two sites whose process is killed from outside some time after that round."""
    mark = f"results-dir={results}"
    command = [str(BIN / "fedclip"), "run", "--nodes", "2", mark, *settings]
    with subprocess.Popen(command, env={**os.environ, "MARK": mark}, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None:
            if (results / "latest").exists() and read(run_folder(results), "summary.json").get("round", 0) >= after:
                assert kill(f"MARK={mark}", "flwr-simulation") == 1
                break
            time.sleep(0.05)
        process.wait()
    assert process.returncode == 1
    until_gone(f"MARK={mark}")
    return run_folder(results)


@pytest.mark.soak  # real sites: tests/test_reliability.py
def test_a_killed_simulation_resumes_to_an_identical_adapter(tmp_path: Path) -> None:
    given = ["num-server-rounds=40", "codec=int8", "strategy=fedadam", "fraction-train=0.5", "adapter=gate"]
    done = fedclip("run", "--nodes", "2", f"results-dir={tmp_path / 'whole'}", *given)
    assert done.returncode == 0, done.stdout + done.stderr
    whole = run_folder(tmp_path / "whole")
    folder = cut_off(3, tmp_path / "cut", *given)
    summary = read(folder, "summary.json")
    assert summary["status"] == "running"
    assert 3 <= summary["round"] <= 40
    done = fedclip("run", f"results-dir={tmp_path / 'cut'}", "resume=latest")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"resuming after round {summary['round']}" in done.stdout
    assert (whole / "adapter.safetensors").read_bytes() == (folder / "adapter.safetensors").read_bytes()
    assert_same_checkpoint(whole, folder)
    lines = [[json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in (whole, folder)]
    for one, other in zip(*lines, strict=True):
        assert {**one, "seconds": 0, "bytes": 0} == {**other, "seconds": 0, "bytes": 0}
    first, second = read(whole, "summary.json"), read(folder, "summary.json")
    assert second["resumed"] == [summary["round"]]
    assert {**first, **SPENT} == {**second, **SPENT}


SPENT: dict[str, Any] = {"traffic": None, "seconds": None, "resumed": None}


@pytest.mark.soak
def test_a_folder_of_images_with_a_relative_path(tree: Path, tmp_path: Path) -> None:
    folder = completed(3, tmp_path / "results", "data=folder:tree", cwd=tree.parent)
    assert read(folder, "settings.json")["data"] == f"folder:{tree}"
    assert read(folder, "summary.json")["adapted"]["sites"].keys() == {"cartoon-0", "cartoon-1", "cartoon-2"}


def spoiled(tmp_path: Path, spoil: str) -> tuple[Path, list[dict[str, Any]]]:
    """A run of eight sites, five of which go wrong, and all that the sites sent."""
    app, sent = tmp_path / "app", tmp_path / f"sent-{spoil}"
    app.mkdir(exist_ok=True)
    sent.mkdir()
    shutil.copy(PROJECT / "server_app.py", app)
    shutil.copy(PROJECT / "client_app.py", app / "honest.py")
    shutil.copy(PROJECT / "tests" / "apps" / "spoiling.py", app / "client_app.py")
    described = (PROJECT / "pyproject.toml").read_text()
    (app / "README.md").touch()
    (app / "pyproject.toml").write_text(described.replace('"client_app.py"]', '"client_app.py", "honest.py"]'))
    folder = completed(8, tmp_path / f"results-{spoil}", cwd=app, SPOIL=spoil, SENT=str(sent))
    return folder, [json.loads(file.read_text()) for file in sent.iterdir()]


@pytest.mark.soak  # on a grid in memory: tests/server/test_rounds.py, tests/server/test_strategy.py
def test_five_bad_sites_are_named_and_change_nothing(tmp_path: Path) -> None:
    without, _ = spoiled(tmp_path, "away")
    folder, sent = spoiled(tmp_path, "spoil")
    assert (folder / "adapter.safetensors").read_bytes() == (without / "adapter.safetensors").read_bytes()
    assert (folder / "metrics.jsonl").read_text().count('"sites": 3') == ROUNDS + 1
    failures = read(folder, "summary.json")["failures"]
    whys = {failure["site"]: failure["why"] for failure in failures}
    assert whys == {
        "cartoon-0": "outer.bias has numbers that are not finite",
        "photo-0": "inner.weight is float32[128, 127], expected float32[128, 128]",
        "art-1": "RuntimeError: the disk is on fire and nobody is looking",
        "cartoon-1": "the adapter has unexpected tensors: images",
        "photo-1": "validation: 750 of 150 examples are reported as correct, expected no more than there are",
    }
    assert len(failures) == 5 * ROUNDS

    # and of the honest sites nothing has left but what may
    honest = [line["content"] for line in sent if line["node"]["partition-id"] in (0, 6, 7)]
    assert len(honest) == 3 * (1 + ROUNDS + 1)
    allowed = may_leave(tensor_names("attention"), by_class=False)
    assert all(set(record) <= allowed[name] for content in honest for name, record in content.items())
    trained = [content for content in honest if "arrays" in content]
    assert len(trained) == 3 * ROUNDS
    assert all(
        content["arrays"]
        == {"inner.weight": [128, 128], "inner.bias": [128], "outer.weight": [128, 128], "outer.bias": [128]}
        for content in trained
    )


def test_one_round_of_real_sites_goes_on_with_those_that_come_later_and_forgets(tree: Path, tmp_path: Path) -> None:
    """Each has another domain, and one lacks a class; the sum is the one of all their training images, to the bit."""
    shutil.rmtree(tree / "photo" / "cat")
    results = f"results-dir={tmp_path}/results"
    with ExitStack() as stack:
        home = str(tmp_path / "home")
        link = stack.enter_context(superlink(tmp_path / "flower", FEDCLIP_HOME=home, OMP_NUM_THREADS="1"))
        configs = {name: f"site='{name}' data='folder:{tree}' domains='{name}'" for name in ("cartoon", "photo")}
        made = [
            "data=none",
            "class-names=car,cat,fish",
            "method=one-round",
            "statistics=full",
            "holdout=",
            "name=study",
        ]
        for command, site in ((["run", *made], "cartoon"), (["update", "study"], "photo")):
            node = stack.enter_context(supernode(link, site, configs[site]))
            link.wait_for([node])
            command += ["--on", simulation.CONNECTION, results]
            done = subprocess.run(["fedclip", *command], env=link.env, capture_output=True, text=True)
            assert done.returncode == 0, done.stdout + done.stderr
    folder = run_folder(tmp_path / "results")
    summary = read(folder, "summary.json")
    assert summary["update"] == {"of": "study", "new": ["photo"], "changed": [], "sites": 2}
    adapter, _ = load_adapter(folder)
    features = open_features(Settings(data=f"folder:{tree}"), progress=False)
    expected = adapter.state_dict()
    for name in SUMS:
        expected[name] = torch.zeros_like(expected[name])
    for domain in ("cartoon", "photo"):
        own = own_site(features, SiteConfig(domain, "train", [domain]), 0, torch.device("cpu"))
        for name, tensor in sums_of(own.train, expected["basis"], 3).items():
            expected[name] += tensor
    same_tensors(folder, expected)
    assert expected["counts"].sum() == sum(train for train, *_ in summary["examples"].values())
    alone = (tmp_path / "results" / "study" / "adapter.safetensors").read_bytes()
    done = fedclip("forget", "study.2", "--site", "photo", "--results-dir", str(tmp_path / "results"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert (folder / "adapter.safetensors").read_bytes() == alone


def test_real_sites_over_grpc_with_data_of_their_own(tree: Path, tmp_path: Path) -> None:
    """One site lacks a class, one shares its counts by class and has a broken file, one doesn't know of its data, one
    only evaluates, on the domain that is held out. The server has no images.
    """
    north = tmp_path / "north"
    for figure in ("cat", "fish"):
        (north / "clinic" / figure).mkdir(parents=True)
        for i in range(5):
            picture(9, "photo", figure, i)[0].save(north / "clinic" / figure / f"{i}.png")
    (tree / "cartoon" / "car" / "0.png").write_bytes(b"no picture")
    configs = {
        "north": f"site='north' data='folder:{north}'",
        "south": f"site='south' data='folder:{tree}' share-class-counts=true",
        "west": f"site='west' data='folder:{tree}' domains='photo' role='holdout'",
        "nobody": "partition-id=0 num-partitions=1",
    }
    with ExitStack() as stack:
        home = str(tmp_path / "home")
        link = stack.enter_context(superlink(tmp_path / "flower", FEDCLIP_HOME=home, OMP_NUM_THREADS="1"))
        nodes = [stack.enter_context(supernode(link, site, config)) for site, config in configs.items()]
        link.wait_for(nodes)
        command = ["fedclip", "run", "--on", simulation.CONNECTION, "data=none", "class-names=car,cat,fish"]
        command += [
            "holdout=photo",
            "codec=int8",
            f"num-server-rounds={ROUNDS}",
            "min-sites=2",
            f"results-dir={tmp_path}/results",
        ]
        done = subprocess.run(command, env=link.env, capture_output=True, text=True)
    printed = done.stdout
    assert done.returncode == 0, printed + done.stderr
    summary = read(run_folder(tmp_path / "results"), "summary.json")
    assert summary["status"] == "completed"
    assert summary["adapted"]["sites"].keys() == {"north", "south"}
    assert {failure["why"].split(":")[0] for failure in summary["failures"]} == {"this site's data is not set"}
    unseen = summary["adapted"]["unseen"]
    assert summary["adapted"]["holdout_sites"] == {"west": unseen}
    assert summary["zero_shot"]["holdout_sites"].keys() == {"west"}
    figures = summary["adapted"]["metrics"]["sites"]
    assert figures["south"]["recall"].keys() == {"car", "cat", "fish"}
    assert "recall" not in figures["north"]

    # differences travelled, there and back, and each process found what the one before had kept
    lines = [json.loads(line) for line in (run_folder(tmp_path / "results") / "metrics.jsonl").read_text().splitlines()]
    numbers = sum(
        tensor.numel() for tensor in load_file(run_folder(tmp_path / "results") / "adapter.safetensors").values()
    )
    travelled = (2 + 2 + 1) * numbers  # west sends none back
    assert [1.0 < line["bytes"] / travelled < 1.2 for line in lines[2:]] == [True]
    assert [line["unseen"] is not None for line in lines] == [True] * (1 + ROUNDS)
    assert lines[1]["bytes"] < 0.6 * lines[2]["bytes"]  # the first adapter is not sent
    (kept,) = (tmp_path / "home" / "exchange").iterdir()
    assert {path.name for path in kept.iterdir() if path.is_dir()} == {"north", "south"}
    rows = [line.split() for line in printed.splitlines()]
    assert ["north", "clinic", "6", "2", "2", "2"] in rows
    assert ["west", "photo,", "unseen", "0", "0", "12", "3"] in rows
    assert ["south", "cartoon", "6", "2", "2", "3"] in rows  # one of its twelve can't be read, photo is held out
