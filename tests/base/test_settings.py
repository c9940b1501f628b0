from __future__ import annotations

import dataclasses
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from fedclip_flwr.base.errors import UserError
from fedclip_flwr.base.settings import PLACES, TRACKERS, Settings
from fedclip_flwr.data.opening import LOCAL
from fedclip_flwr.exchange.codecs import CODECS
from fedclip_flwr.learning.adapters import ADAPTERS
from fedclip_flwr.learning.recipes import RECIPES
from fedclip_flwr.runs import trackers
from fedclip_flwr.server.robust import STRATEGIES
from fedclip_flwr.server.strategy import OPTIMIZERS

CONTRACT: dict[str, Any] = {
    "model": "bundled",
    "model-revision": "",
    "data": "drawn",
    "image-column": "",
    "label-column": "",
    "domain-column": "",
    "holdout": "auto",
    "method": "adapter",
    "lora-targets": "vision",
    "lora-layers": "all",
    "lora-modules": "q_proj,k_proj,v_proj,out_proj,fc1,fc2",
    "lora-rank": 8,
    "lora-alpha": 0.0,
    "lora-dropout": 0.0,
    "lora-train": "B",
    "gradient-checkpointing": False,
    "start": "",
    "statistics": "span",
    "one-round-choose": False,
    "adapter": "attention",
    "adapter-rank": 4,
    "blend": 1.0,
    "recipe": "default",
    "feature-norm": 0.0,
    "prompt": "",
    "class-names": "",
    "num-server-rounds": 20,
    "local-epochs": 1,
    "batch-size": 32,
    "learning-rate": 0.0,
    "seed": 0,
    "strategy": "fedavg",
    "proximal-mu": 0.001,
    "site-weights": "equal",
    "codec": "float32",
    "fraction-train": 1.0,
    "min-sites": 1,
    "round-timeout": 600.0,
    "partition": "domain",
    "alpha": 0.5,
    "personalize": False,
    "device": "auto",
    "precision": "auto",
    "name": "",
    "resume": "",
    "update": "",
    "directions": "",
    "leave": "",
    "early-stop": 0,
    "server-learning-rate": 0.0,
    "results-dir": "",
    "max-update-norm": 3.0,
    "hostile-share": 0.2,
    "max-site-weight": 3.0,
    "dp": "off",
    "dp-unit": "site",
    "epsilon": 0.0,
    "noise-multiplier": 1.0,
    "clipping-norm": 0.5,
    "delta": 1e-5,
    "secure-aggregation": False,
    "track": "",
}


def test_the_keys_and_defaults_are_those_of_the_contract() -> None:
    assert Settings().as_run_config() == CONTRACT
    assert Settings.from_run_config(CONTRACT) == Settings()


def test_the_app_has_the_same_settings() -> None:
    described = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    assert described["tool"]["flwr"]["app"]["config"] == CONTRACT


def test_every_setting_says_what_it_means() -> None:
    assert all(field.metadata["meaning"] for field in dataclasses.fields(Settings))


def test_every_choice_is_one_that_is_there_and_all_that_are_there_can_be_chosen() -> None:
    choices = {key: field.metadata.get("choices") for key, field in Settings.keys().items()}
    assert choices["adapter"] == (*ADAPTERS,)
    assert choices["codec"] == ("float32", *CODECS)
    assert choices["recipe"] == (*RECIPES,)
    assert choices["strategy"] == ("fedavg", "fedprox", *OPTIMIZERS, *STRATEGIES)
    assert (*trackers.TRACKERS,) == TRACKERS
    assert {*PLACES} == {*LOCAL, "features:"}


def test_settings_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Settings().seed = 1  # type: ignore[misc]


def test_a_whole_number_is_accepted_where_a_number_is_meant() -> None:
    rate = Settings.from_run_config({"learning-rate": 1}).learning_rate
    assert rate == 1.0
    assert type(rate) is float


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("adapter", "attn", "attention, gate, scale"),
        ("learning-rate", -1, "at least 0"),
        ("learning-rate", float("nan"), "finite"),
        ("blend", 1.5, "at most 1"),
        ("fraction-train", 0.0, "more than 0"),
        ("num-server-rounds", 0, "at least 1"),
        ("num-server-rounds", 2.0, "whole number"),
        ("num-server-rounds", True, "whole number"),
        ("personalize", 1, "true or false"),
        ("seed", "0", "whole number"),
        ("seed", 2**63, "at most"),
        ("device", "gpu", "cuda:N"),
        ("resume", "../elsewhere", "without slashes"),
        ("name", "../elsewhere", "without slashes"),
        ("name", "latest", "always means the newest run"),
        ("prompt", "a picture", "one {}"),
        ("model", "", "empty"),
        ("data", "folder:", "a path after folder:"),
        ("data", "folder:images", "folder:/"),
        ("data", "features:~/f", "features:/"),
        ("model", "./clip", "/clip"),
        ("results-dir", "results", "/results"),
        ("codec", "int4", "expected one of float32, bfloat16, int8"),
        ("method", "whole", "adapter, full-model, lora, one-round"),
        ("statistics", "half", "expected one of span, full"),
        ("strategy", "fedsum", "fedavg, fedprox"),
        ("blend", "best", "a number or auto"),
        ("prompt", "a {}|a thing", "one {}"),
        ("class-names", "./names.txt", "/names.txt"),
        ("data", "./images", "/images"),
        ("track", "neptune", "some of tensorboard, wandb, mlflow, with commas"),
        ("track", "mlflow,", "some of tensorboard, wandb, mlflow, with commas"),
        ("bach-size", 3, "did you mean batch-size?"),
    ],
)
def test_a_bad_setting_is_reported_with_what_was_expected(key: str, value: Any, expected: str) -> None:
    with pytest.raises(UserError) as error:
        Settings.from_run_config({key: value})
    assert key in str(error.value)
    assert expected in str(error.value)


def test_a_blend_may_be_chosen_later_and_is_one_until_then() -> None:
    settings = Settings.from_run_config({"blend": "auto"})
    assert (settings.blend, settings.trained_blend) == ("auto", 1.0)
    assert Settings.from_run_config({"blend": 0.5}).trained_blend == 0.5


@pytest.mark.parametrize("what", [{"blend": 0.5}, {"blend": "auto"}, {"personalize": True}, {"feature-norm": 10}])
def test_what_is_for_adapters_is_refused_for_the_full_model(what: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="it is for adapters"):
        Settings.from_run_config({"method": "full-model", **what})
    assert Settings.from_run_config({"method": "full-model", "blend": 1, "personalize": False})


@pytest.mark.parametrize(
    "what",
    [
        {"recipe": "paper"},
        {"feature-norm": 10},
        {"blend": "auto"},
        {"codec": "int8"},
        {"fraction-train": 0.5},
    ],
)
def test_what_is_for_training_is_refused_for_one_round(what: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="it is for adapters that are trained"):
        Settings.from_run_config({"method": "one-round", **what})


def test_the_sums_of_one_round_may_be_masked_unless_single_ones_are_needed() -> None:
    given = {"method": "one-round", "secure-aggregation": True}
    assert Settings.from_run_config({**given, "site-weights": "examples"}).least_sites == 3
    with pytest.raises(UserError, match=r"strategy = 'fedmedian': .* the server sees no single update"):
        Settings.from_run_config({**given, "strategy": "fedmedian"})
    with pytest.raises(UserError, match=r"one-round-choose = True: .* each site's own losses would be seen"):
        Settings.from_run_config({**given, "one-round-choose": True})


def test_one_round_has_one_round() -> None:
    with pytest.raises(UserError, match="expected one of fedavg, fedmedian, fedtrimmedavg"):
        Settings.from_run_config({"method": "one-round", "strategy": "krum"})
    assert Settings.from_run_config({"method": "one-round", "strategy": "fedmedian"})
    assert Settings.from_run_config({"method": "one-round"}).rounds == 1
    assert Settings.from_run_config({"method": "one-round", "num-server-rounds": 1}).rounds == 1
    assert Settings(num_server_rounds=7).rounds == 7
    with pytest.raises(UserError, match="has a single round"):
        Settings.from_run_config({"method": "one-round", "num-server-rounds": 5})


def test_batches_of_one_are_refused_for_the_papers_recipe_which_skips_them() -> None:
    with pytest.raises(UserError, match="skips a batch of one"):
        Settings.from_run_config({"recipe": "paper", "batch-size": 1})
    assert Settings.from_run_config({"batch-size": 1}).batch_size == 1


def test_with_the_papers_recipe_updates_have_no_limit() -> None:
    assert Settings().update_limit == 3.0
    assert Settings(recipe="paper").update_limit == 0.0
    assert Settings(method="full-model").update_limit == 0.0
    with pytest.raises(
        UserError, match=r"max-update-norm = 5.0: with recipe = 'paper' updates of any length count in full"
    ):
        Settings.from_run_config({"recipe": "paper", "max-update-norm": 5})
    assert Settings.from_run_config({"recipe": "paper", "max-update-norm": 0}).update_limit == 0.0


def test_a_pull_to_the_start_is_fedproxs_only() -> None:
    assert Settings(strategy="fedprox", proximal_mu=0.5).proximal == 0.5
    assert Settings(proximal_mu=0.5).proximal == 0.0


def test_a_bare_path_is_a_folder() -> None:
    assert Settings.from_run_config({"data": "/images"}).data == "folder:/images"


def test_all_bad_settings_are_reported_at_once() -> None:
    with pytest.raises(UserError) as error:
        Settings.from_run_config({"adapter": "attn", "learning-rate": -1, "seed": 3, "colour": "red"})
    first, *lines = str(error.value).splitlines()
    assert first.startswith("3 of the settings")
    assert [line.split()[0].rstrip(":") for line in lines] == ["adapter", "learning-rate", "colour"]


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("alpha", 10**400, "at most 63 bits"),
        ("seed", 2**63, "at most 63 bits"),
        ("adapter-rank", 10**9, "at most 16384"),
        ("device", "cuda:999", "cuda:N"),
        ("prompt", "a {}\n", "plain characters"),
        ("model", "/a\0b", "plain characters"),
        ("data", "~nobody-of-that-name/x", "an absolute path"),
    ],
)
def test_unusable_values_are_reported(key: str, value: object, expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        Settings.from_run_config({key: value})


IMAGE = {"method": "one-round", "dp": "central", "dp-unit": "image", "epsilon": 1}


@pytest.mark.parametrize(
    ("given", "why"),
    [
        (
            {"dp-unit": "image"},
            "dp-unit = 'image': it is for method = 'one-round'; adapters that are trained hide sites",
        ),
        ({"method": "one-round", "dp-unit": "image"}, "dp-unit = 'image': set dp = 'central' or 'local', too"),
        (
            {"method": "one-round", "dp": "local"},
            "with one-round it hides each image: set dp-unit = 'image', and epsilon",
        ),
        (IMAGE | {"epsilon": 0}, "epsilon = 0.0: dp-unit = 'image' needs it"),
        (IMAGE | {"epsilon": 21}, "epsilon = 21: expected at most 20"),
        ({"epsilon": 1}, "epsilon = 1.0: it is for dp-unit = 'image'; else noise-multiplier sets the noise"),
        (IMAGE | {"noise-multiplier": 2}, "noise-multiplier = 2.0: it is for dp-unit = 'site'"),
        (IMAGE | {"strategy": "fedmedian"}, "with noise for each image the total is a plain one; leave it out"),
        (IMAGE | {"one-round-choose": True}, "what sites choose by has no noise; leave it out with dp"),
        (IMAGE | {"update": "latest"}, "only exact sums, without noise, can be updated; start a new run"),
        ({"method": "one-round", "statistics": "gradient", "personalize": True}, "leave it out with statistics"),
        ({"method": "one-round", "statistics": "gradient", "directions": "/a"}, "leave it out with statistics"),
        ({"method": "one-round", "statistics": "gradient", "strategy": "fedmedian"}, "leave it out with statistics"),
        ({"method": "one-round", "leave": "north"}, "it is for updates with secure-aggregation = true"),
    ],
)
def test_noise_for_images_and_what_does_not_go_with_it(given: dict[str, Any], why: str) -> None:
    with pytest.raises(UserError, match=re.escape(why)):
        Settings.from_run_config(given)
    settings = Settings.from_run_config({**IMAGE, "statistics": "gradient"})
    assert (settings.hides_images, settings.noise_leaves, settings.keeps_sums) == (True, False, False)
