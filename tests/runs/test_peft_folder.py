"""A run goes on from a folder in PEFT's format: what is read of it, what is refused, and what training leaves of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Context, RecordDict
from safetensors.torch import load_file, save_file
from torch import Tensor

import client_app
import server_app
from fedclip_flwr.base.errors import UserError
from fedclip_flwr.base.settings import Settings
from fedclip_flwr.experiments.simulate import make_sites, simulate
from fedclip_flwr.features import models
from fedclip_flwr.features.clip import Clip
from fedclip_flwr.features.lora import Lora
from fedclip_flwr.features.opening import open_features
from fedclip_flwr.flower.grids import RUN, local_grid
from fedclip_flwr.inference import export
from fedclip_flwr.inference.model import FedCLIP
from fedclip_flwr.learning.lora import B
from fedclip_flwr.learning.metrics import mean_figures
from fedclip_flwr.learning.training import evaluate, examine
from fedclip_flwr.report import writing
from fedclip_flwr.runs import peft_folder
from fedclip_flwr.runs.directions import start_of
from fedclip_flwr.runs.opening import open_run
from tests.extras import needs
from tests.learnt import lora_run
from tests.models import small_clip

pytestmark = needs("lora")
SMALL: dict[str, Any] = {
    "method": "lora",
    "lora-layers": "last:1",
    "lora-rank": 2,
    "lora-alpha": 2.0,
    "precision": "float32",
}
PART = "vision_model.encoder.layers.{}.self_attn.{}"


@pytest.fixture
def given(tree: Path, tmp_path: Path) -> dict[str, Any]:
    """Settings that fit the folder `start`, which is an export."""
    place, _, _ = lora_run(tree, tmp_path / "before")
    export.write(FedCLIP.from_pretrained(place, precision="float32"), tmp_path / "start")
    return {**SMALL, "data": f"folder:{tree}", "start": str(tmp_path / "start"), "results-dir": str(tmp_path / "runs")}


def settings_of(given: Mapping[str, Any]) -> Settings:
    settings, problems = Settings.read(given)
    assert not problems
    return settings


def refusal(given: Mapping[str, Any]) -> str:
    """The line about `start` among the problems of a run."""
    with pytest.raises(UserError) as caught:
        open_run(given)
    (line,) = [line.strip() for line in str(caught.value).splitlines() if "start = " in line]
    return line


def change(given: Mapping[str, Any], **facts: Any) -> None:
    """Changes entries of the folder's configuration."""
    path = Path(given["start"]) / peft_folder.CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | facts))


def write(given: Mapping[str, Any], tensors: Mapping[str, Tensor], **facts: Any) -> None:
    """Puts these tensors there, as somebody else's PEFT would."""
    folder = Path(given["start"])
    (folder / "config.json").unlink(missing_ok=True)
    save_file(
        {f"base_model.model.{name}.weight": tensor for name, tensor in tensors.items()},
        folder / "adapter_model.safetensors",
    )
    change(given, **facts)


def pairs(*names: str, rank: int = 2, width: int = 128) -> dict[str, Tensor]:
    made: dict[str, Tensor] = {}
    for name in names:
        made |= {f"{name}.lora_A": torch.randn(rank, width), f"{name}.lora_B": torch.randn(width, rank)}
    return made


def test_the_start_is_what_the_export_predicts(given: dict[str, Any], tmp_path: Path) -> None:
    settings, features, _ = open_run({**given, "holdout": ""})
    learner = start_of(settings, features)
    assert isinstance(learner, Lora)
    held = peft_folder.from_peft(load_file(tmp_path / "start" / "adapter_model.safetensors"))
    for name, tensor in learner.every.items():
        assert torch.equal(tensor, held.pop(name))
    assert not held
    model = FedCLIP.from_pretrained(tmp_path / "start", precision="float32")
    examples = features.examples("photo").ready()
    with torch.no_grad():
        logits = learner.logits(examples.features, features.classes.ready())
        wanted = model(**model.prepare([image for _, image in features.pictures("photo", range(12))]))  # type: ignore[attr-defined]
    torch.testing.assert_close(logits, wanted, rtol=0, atol=1e-3)


def test_an_adapter_of_peft_itself_is_gone_on_from(
    given: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from peft import LoraConfig, get_peft_model

    net = Clip(models.find("bundled"), "cpu", "float32").net
    config = LoraConfig(
        r=4, lora_alpha=6, target_modules=["v_proj", "q_proj"], use_rslora=True, init_lora_weights=False
    )
    made = get_peft_model(net, config)
    made.save_pretrained(tmp_path / "theirs")
    theirs = {**given, "start": str(tmp_path / "theirs"), "holdout": ""}
    wanted = "lora-targets=both lora-layers=all lora-modules=q_proj,v_proj lora-rank=4 lora-alpha=12"
    assert refusal(theirs).endswith(f"its LoRA is another one: set {wanted}")
    config.base_model_name_or_path = "somebody/another-clip"
    made.save_pretrained(tmp_path / "theirs")
    settings, features, _ = open_run(
        {**theirs, **dict(word.split("=") for word in wanted.split()), "lora-rank": 4, "lora-alpha": 12.0}
    )
    learner = start_of(settings, features)
    assert "made for 'somebody/another-clip', by its own words; this run's model is 'bundled'" in caplog.text
    tensors = dict(made.named_parameters())
    for name, tensor in learner.state_dict().items():
        assert torch.equal(tensor, tensors[f"base_model.model.{name}.default.weight"])
    assert isinstance(learner, Lora)
    assert {layer.scaling["default"] for layer in learner._layers.values()} == {6 / 4**0.5}


@pytest.mark.parametrize(
    ("changed", "wanted"),
    [
        ({"lora-rank": 4}, "lora-layers=last:1 lora-modules=q_proj,k_proj,v_proj,out_proj,fc1,fc2 lora-rank=2"),
        ({"lora-alpha": 0.0}, "lora-rank=2 lora-alpha=2"),
        ({"lora-targets": "both"}, "lora-targets=vision lora-layers=last:1"),
        ({"lora-layers": "all"}, "lora-targets=vision lora-layers=last:1"),
        ({"lora-modules": "q_proj"}, "lora-modules=fc1,fc2,k_proj,out_proj,q_proj,v_proj lora-rank=2"),
    ],
    ids=str,
)
def test_settings_that_differ_are_given(changed: dict[str, Any], wanted: str, given: dict[str, Any]) -> None:
    assert wanted in refusal({**given, **changed})


@pytest.mark.parametrize(
    ("facts", "why"),
    [
        ({"use_dora": True}, "it has use_dora = true: only plain LoRA can be trained here"),
        ({"bias": "lora_only"}, 'it has bias = "lora_only": only'),
        ({"modules_to_save": ["visual_projection"]}, "it has modules_to_save = "),
        ({"rank_pattern": {"q_proj": 4}}, 'it has rank_pattern = {"q_proj": 4}'),
        ({"alpha_pattern": {"q_proj": 4}}, "it has alpha_pattern"),
        ({"init_lora_weights": "pissa"}, 'it has init_lora_weights = "pissa"'),
        ({"peft_type": "LOHA"}, "does not describe LoRA"),
        ({"r": "2"}, "its r is '2' and its lora_alpha 2: expected numbers above 0"),
        ({"lora_alpha": 0}, "its lora_alpha 0: expected numbers above 0"),
        ({"r": 3}, "expected rank 3"),
        ({"r": 10**400, "use_rslora": True}, "its r is 1000"),
        ({"r": 10**5}, "expected numbers above 0, up to 16,384 and 1,000,000"),
    ],
    ids=range(12),
)
def test_what_is_no_plain_lora_is_refused(facts: dict[str, Any], why: str, given: dict[str, Any]) -> None:
    change(given, **facts)
    assert why in refusal(given)


@pytest.mark.parametrize(
    ("tensors", "why"),
    [
        (pairs("visual_projection"), "only LoRA in the linear parts of the towers' layers can be trained here"),
        ({"text_model.embeddings.token_embedding.lora_embedding_A": torch.ones(2, 8)}, "it has text_model.embeddings"),
        ({**pairs(PART.format(3, "q_proj")), "logit_scale": torch.ones(1)}, "it has logit_scale: only"),
        ({PART.format(3, "q_proj.lora_A"): torch.ones(2, 128)}, "its tensors are not pairs of LoRA"),
        (pairs(PART.format(1, "q_proj"), PART.format(3, "q_proj")), "is not in the same parts of all last layers"),
        (pairs(PART.format(2, "q_proj"), PART.format(3, "k_proj")), "is not in the same parts of all last layers"),
        (pairs(PART.format(1, "q_proj")), "is not in the same parts of all last layers"),
        ({k: v * float("inf") for k, v in pairs(PART.format(3, "q_proj")).items()}, "numbers that are not finite"),
        (pairs(PART.format(3, "q_proj"), rank=4), "expected rank 2"),
        ({k: v.to(torch.float8_e4m3fn) for k, v in pairs(PART.format(3, "q_proj")).items()}, "LoRA of torch.float8"),
    ],
    ids=range(10),
)
def test_tensors_elsewhere_are_refused(tensors: dict[str, Tensor], why: str, given: dict[str, Any]) -> None:
    write(given, tensors)
    assert why in refusal(given)


def test_another_model_is_refused(given: dict[str, Any], tmp_path: Path) -> None:
    other = {**given, "model": str(small_clip(tmp_path / "small"))}
    assert "it is for another model: set model to the one that it was made with" in refusal(other)
    (tmp_path / "start" / "config.json").unlink()
    assert "it is for another model, or for some of its layers: it has " in refusal(other)


def test_a_folder_that_lacks_something_is_refused_and_no_pickle_is_read(given: dict[str, Any], tmp_path: Path) -> None:
    start = tmp_path / "start"
    assert "adapter_config.json is missing: expected a folder that PEFT has saved" in refusal(
        {**given, "start": str(tmp_path)}
    )
    assert "adapter_config.json is missing" in refusal({**given, "start": str(start / peft_folder.CONFIG)})
    (start / peft_folder.TENSORS).rename(start / peft_folder.PICKLE)
    assert "only adapter_model.bin, a pickle, which is never read: save it again as safetensors" in refusal(given)
    (start / peft_folder.TENSORS).write_bytes(b"no tensors")
    assert "adapter_model.safetensors can't be read" in refusal(given)
    (start / peft_folder.CONFIG).write_text("[1")
    assert "adapter_config.json can't be read" in refusal(given)
    assert "start" in Settings.read({**given, "start": "theirs"})[1]  # no absolute path
    problems = Settings.read({"start": str(start)})[1]
    assert "start" in problems  # it is for method = 'lora'


def serve(config: Mapping[str, Any]) -> None:
    """A federation of two sites."""

    def site(number: int) -> Any:
        node: dict[str, Any] = {"partition-id": number, "num-partitions": 2, "data": config["data"]}
        context = Context(RUN, 1, node, RecordDict(), dict(config))
        return lambda message: client_app.app(message, context)

    server_app.serve(local_grid({2: site(0), 3: site(1)}), config)


@pytest.mark.parametrize("more", [{}, {"codec": "int8"}, {"lora-train": "both"}, {"lora-targets": "text"}], ids=str)
def test_a_run_goes_on_from_it(
    more: dict[str, Any],
    tree: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(writing, "at_end", lambda *_: "no report")
    place, learner, features = lora_run(tree, tmp_path / "before", lora_targets=more.get("lora-targets", "vision"))
    export.write(FedCLIP.from_pretrained(place, precision="float32"), tmp_path / "start")
    config: dict[str, Any] = {**Settings().as_run_config(), **SMALL, "start": str(tmp_path / "start"), "holdout": ""}
    config |= {"data": f"folder:{tree}", "results-dir": str(tmp_path / "runs"), "name": "after"}
    config |= {"num-server-rounds": 1, **more}

    serve(config)
    after = tmp_path / "runs" / "after"
    summary = json.loads((after / "summary.json").read_text())
    assert summary["failures"] == []
    lines = [json.loads(line) for line in (after / "metrics.jsonl").read_text().splitlines()]
    sites, _ = make_sites(features, "", 2)
    classes = features.classes.ready()
    for learner.blend in (0.5, 0.0):  # of an alpha of 4: the export has half of it
        validation = [evaluate(learner, one.validation, classes) for one in sites]
        loss = sum(score.loss for score in validation) / sum(score.examples for score in validation)
        figures = mean_figures([examine(learner, one.test, classes) for one in sites])["calibration_error"]
        if learner.blend:
            assert lines[0]["loss"] == pytest.approx(loss, abs=1e-4)
            assert lines[0]["loss"] != pytest.approx(lines[1]["loss"], abs=1e-5)
        else:
            assert summary["zero_shot"]["metrics"]["seen"]["calibration_error"] == pytest.approx(figures, abs=1e-3)
            assert lines[0]["loss"] != pytest.approx(loss, abs=1e-3)
    assert len(lines) == 2
    printed = capsys.readouterr().out
    assert "  start\n" in printed
    assert ("and 9.22 kB in each message to it" in printed) == (more.get("lora-train") != "both")
    held, now = (
        load_file(path) for path in (tmp_path / "start" / "adapter_model.safetensors", after / "adapter.safetensors")
    )
    held = peft_folder.from_peft(held)
    assert now.keys() == held.keys()
    trained = {name for name, tensor in held.items() if not torch.equal(tensor, now[name])}
    if json.loads((after / "adapter.json").read_text())["round"]:
        assert trained == {name for name in held if name.endswith(B) or "lora-train" in more}
    else:
        assert not trained


def test_a_simulation_sends_what_is_not_trained(given: dict[str, Any]) -> None:
    settings = settings_of({**given, "num-server-rounds": 1, "holdout": ""})
    features = open_features(settings, progress=False)
    start = start_of(settings, features)
    sites, _ = make_sites(features, "", 2)
    result = simulate(sites, features.classes, {}, settings, start=start)
    with torch.no_grad():
        scores = [examine(start, site.test, features.classes.ready()).score for site in sites]
    assert result.rounds[0].seen == pytest.approx(sum(score.accuracy or 0.0 for score in scores) / 2)
    assert any(not torch.equal(tensor, result.last[name]) for name, tensor in start.state_dict().items())


def test_a_run_resumes_only_from_the_start_that_it_had(given: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "at_end", lambda *_: "no report")
    config = {**Settings().as_run_config(), **given, "holdout": "", "num-server-rounds": 1}
    serve(config)
    longer = {**config, "num-server-rounds": 2, "resume": "latest"}
    path = Path(given["start"]) / peft_folder.TENSORS
    held = path.read_bytes()
    save_file({name: tensor * 2 for name, tensor in load_file(path).items()}, path)
    with pytest.raises(UserError, match="it has changed since the run began; restore it, or start a new run"):
        serve(longer)
    path.write_bytes(held)
    serve(longer)
    lines = (Path(given["results-dir"]) / "latest" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["round"] for line in lines] == [0, 1, 2]
