"""The settings of a run: typed, frozen, and checked all at once.

They come from Flower's run config (`[tool.flwr.app.config]` and `--run-config`), whose keys have hyphens where the
fields here have underscores. Each field has its default, its meaning and its limits.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedclip_flwr.base import plugins
from fedclip_flwr.base.errors import UserError, shown


def _setting(default: Any, meaning: str, **limits: Any) -> Any:
    """A field with its meaning and its limits: `choices`, `least`, `most`, `above`, `pattern` with `expected`.

    `word`: a word that is allowed in place of a number.
    """
    return dataclasses.field(default=default, metadata={"meaning": meaning, **limits})


OPTIMIZED = ("fedadam", "fedyogi", "fedadagrad")
"""The strategies in which an optimizer at the server takes a step from the sites' mean."""
ADAPTERS = ("attention", "gate", "scale")
ROBUST = ("fedmedian", "fedtrimmedavg", "krum", "multikrum", "bulyan")
"""The strategies that compare the sites' updates with each other."""
CODECS = ("float32", "bfloat16", "int8")
"""How tensors travel: in full, or as differences that `exchange/codecs.py` compresses."""
ONE_ROUND = "one-round"
"""The method without training: sites send sums, and the model follows from them in closed form."""
LORA = "lora"
"""The method that adapts the towers of the CLIP: low-rank changes of their layers, trained in rounds."""
GRADIENT = "gradient"
"""The statistics of `one-round` that hide each image best: one gradient."""
FORMS = ("span", "full")
"""The directions in which `one-round` measures second moments."""
ROBUST_SUMS = ("fedavg", "fedmedian", "fedtrimmedavg")
"""The strategies of `one-round`: the exact sum, and what bounds each site instead."""
TRACKERS = ("tensorboard", "wandb", "mlflow")
"""Experiment trackers that a run can report to."""
STORED = "features:"
"""The start of the setting `data` if the data are already features."""
MOST_NORM = 10.0**4
"""More than the length of any CLIP's features."""
PLACES = ("folder:", STORED)
"""The starts of the setting `data` that name a place on this machine; the path follows."""
_DEVICE = {"pattern": r"auto|cpu|cuda(:[0-9]{1,2})?", "expected": "auto, cpu, cuda or cuda:N"}
_TRACK = {
    "pattern": r"(({0})( *, *({0}))*)?".format("|".join(TRACKERS)),
    "expected": f"some of {', '.join(TRACKERS)}, with commas",
}
_NAME = {"pattern": r"(?!\.)[\w.-]*", "expected": "the name of a run, without slashes"}


@dataclass(frozen=True, kw_only=True)
class Settings:
    model: str = _setting("bundled", "`bundled`, a Hugging Face id, or a folder saved by `save_pretrained`")
    model_revision: str = _setting("", "a commit, tag or branch of a Hugging Face model")
    data: str = _setting(
        "drawn",
        "`drawn`, `drawn:SEED`, `pacs`, `vlcs`, `office-home`, a Hugging Face data set, `folder:PATH` (images as "
        "domain/class/image or class/image, or a data set) or `features:PATH`; `none` if only real sites have data",
    )
    image_column: str = _setting("", "the data set's column of images; empty to find it by type and name")
    label_column: str = _setting("", "the data set's column of class labels; empty to find it by type and name")
    domain_column: str = _setting("", "the data set's column of domains; empty to find it by type and name")
    holdout: str = _setting(
        "auto",
        "the domain no site trains on, or several with + between; `auto` is the last in sorted order, empty for none",
    )
    method: str = _setting(
        "adapter",
        "`adapter`, `lora` and `full-model` are trained in rounds; `one-round` is a closed form from sums over all "
        "images",
        choices=("adapter", "full-model", LORA, ONE_ROUND),
    )
    lora_targets: str = _setting("vision", "with lora: which tower it adapts", choices=("vision", "text", "both"))
    lora_layers: str = _setting(
        "all",
        "with lora: the layers that it adapts, `all` or `last:N`; those before run once, and their output is stored",
        pattern=r"all|last:[1-9][0-9]{0,2}",
        expected="all or last:N, with N from 1",
    )
    lora_modules: str = _setting(
        "q_proj,k_proj,v_proj,out_proj,fc1,fc2",
        "with lora: the linear parts of a layer that it adapts, with commas",
        pattern=r"\w+( *, *\w+)*",
        expected="names with commas, such as q_proj,v_proj",
    )
    lora_rank: int = _setting(8, "with lora: its rank", least=1, most=2**14)
    lora_alpha: float = _setting(
        0.0, "with lora: its changes are scaled by this, divided by the rank; 0 for twice the rank", least=0.0, most=1e6
    )
    lora_dropout: float = _setting(0.0, "with lora: dropout before its layers", least=0.0, most=0.9)
    lora_train: str = _setting(
        "B",
        "with lora: `B` is trained and sent, and A stays as the seed makes it: the mean is exact then; or `both`",
        choices=("B", "both"),
    )
    gradient_checkpointing: bool = _setting(
        False, "with lora: layers are computed again for their gradients, for less memory and more time"
    )
    start: str = _setting("", "with lora: a folder in PEFT's format to go on from; empty for zero-shot")
    statistics: str = _setting(
        "span",
        "with one-round: second moments in the span of the class prompts, or in the full space; or one gradient",
        choices=(*FORMS, GRADIENT),
    )
    one_round_choose: bool = _setting(
        False, "with one-round: sites score a grid of its constants on validation images, in one more message"
    )
    directions: str = _setting(
        "", "with one-round: a file with the directions and the unit of the sums, which a relay has written"
    )
    adapter: str = _setting("attention", "the trainable part", choices=ADAPTERS)
    adapter_rank: int = _setting(4, "rank of adapters that have one (`gate`)", least=1, most=2**14)
    blend: float | str = _setting(
        1.0,
        "share of the adapted feature; `auto` is chosen by validation after the last round",
        least=0.0,
        most=1.0,
        word="auto",
    )
    recipe: str = _setting("default", "loss, optimizer and prompt", choices=("default", "paper"))
    feature_norm: float = _setting(
        0.0,
        "length to which image features are scaled for the adapter's network; 0 for the recipe's default: 1, or "
        "with paper the length that CLIP gives them",
        least=0.0,
        most=MOST_NORM,
    )
    prompt: str = _setting(
        "", "overrides the recipe's template; `{}` stands for the class name; several with | between"
    )
    class_names: str = _setting("", "overrides the data's class names: a comma list, or a file with one in each line")
    num_server_rounds: int = _setting(20, "rounds", least=1)
    local_epochs: int = _setting(1, "epochs at a site in a round", least=1)
    batch_size: int = _setting(32, "examples a step", least=1)
    learning_rate: float = _setting(0.0, "0 for the recipe's default", least=0.0)
    seed: int = _setting(0, "the seed of everything random", least=0, most=2**63 - 1)
    strategy: str = _setting(
        "fedavg",
        "how the server aggregates the sites' updates",
        choices=("fedavg", "fedprox", *OPTIMIZED, *ROBUST),
    )
    server_learning_rate: float = _setting(0.0, "of fedadam, fedyogi, fedadagrad; 0: the strategy's default", least=0.0)
    proximal_mu: float = _setting(0.001, "how strongly fedprox pulls sites to the start of a round", least=0.0)
    max_update_norm: float = _setting(
        3.0,
        "updates longer than this many times the sites' lower median are scaled down to that length, far longer ones "
        "are left out; 0 for no limit; for adapters, and not with recipe = paper",
        least=0.0,
    )
    hostile_share: float = _setting(
        0.2, "share of the sites assumed hostile by fedtrimmedavg, krum, multikrum and bulyan", least=0.0, most=0.5
    )
    site_weights: str = _setting("equal", "how the adapters of the sites are weighted", choices=("equal", "examples"))
    max_site_weight: float = _setting(
        3.0,
        "with site-weights = examples, a site counts for at most this many times the lower median; 0 for no limit",
        least=0.0,
    )
    dp: str = _setting(
        "off",
        "differential privacy: noise that the server adds to the sites' mean or total, or each site to what it sends",
        choices=("off", "central", "local"),
    )
    dp_unit: str = _setting(
        "site", "with dp: what it hides, a site as a whole or, with one-round, each image", choices=("site", "image")
    )
    epsilon: float = _setting(
        0.0,
        "with dp-unit = image: the ε that each image gets, and from which the noise follows",
        least=0.0,
        most=20.0,
    )
    noise_multiplier: float = _setting(
        1.0, "with dp: the noise's standard deviation in clipping norms", least=0.01, most=1000.0
    )
    clipping_norm: float = _setting(0.5, "with dp: the length to which updates are clipped", least=1e-4, most=100.0)
    delta: float = _setting(1e-5, "with dp: the δ for which ε is reported", least=1e-15, most=0.5)
    secure_aggregation: bool = _setting(
        False, "the server sees only the sum of the sites' updates (with one-round: sums), none of them alone"
    )
    codec: str = _setting("float32", "how tensors travel", choices=CODECS)
    fraction_train: float = _setting(1.0, "share of the sites that train in a round; all evaluate", above=0.0, most=1.0)
    early_stop: int = _setting(0, "rounds since the selected one after which the run ends; 0 for never", least=0)
    min_sites: int = _setting(1, "good replies that a round needs", least=1)
    round_timeout: float = _setting(600.0, "seconds that a round waits for replies", above=0.0)
    partition: str = _setting(
        "domain", "how simulated sites divide the data", choices=("domain", "dirichlet", "iid", "classes")
    )
    alpha: float = _setting(0.5, "concentration of the dirichlet partition", above=0.0)
    personalize: bool = _setting(
        False, "each site makes an adapter of its own after the last round, which it never sends"
    )
    device: str = _setting("auto", "where encoding and learning run", **_DEVICE)
    precision: str = _setting(
        "auto",
        "precision of encoding; with lora and full-model of training, too",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    name: str = _setting("", "name of the run and its folder; empty for one made from the time", **_NAME)
    resume: str = _setting("", "the run to resume after its last complete round, or `latest`", **_NAME)
    update: str = _setting(
        "",
        "with one-round: the run to go on from: only sites whose images have changed are asked for sums; or `latest`",
        **_NAME,
    )
    leave: str = _setting("", "with update and secure-aggregation: sites that take back what they gave; with commas")
    results_dir: str = _setting("", "where run folders go; empty for `$FEDCLIP_HOME/runs`")
    track: str = _setting("", "experiment trackers to report to: tensorboard, wandb, mlflow; with commas", **_TRACK)

    @classmethod
    def read(cls, given: Mapping[str, Any]) -> tuple[Settings, dict[str, str]]:
        """Settings from Flower's run config, and the problems by key; a key with a problem keeps its default."""
        fields = cls.keys()
        values, problems = {}, {}
        for key, value in given.items():
            if key not in fields:
                near = difflib.get_close_matches(key, fields, 1)
                problems[key] = f"{key}: there is no such setting" + (f"; did you mean {near[0]}?" if near else "")
                continue
            if key == "data" and isinstance(value, str) and value.startswith("/"):
                value = f"folder:{value}"
            try:
                values[fields[key].name] = _checked(key, value, fields[key])
            except ValueError as error:
                problems[key] = f"{key} = {value!r}: {error}"
        settings = cls(**values)
        if settings.recipe == "paper" and settings.batch_size < 2:
            problems["batch-size"] = "batch-size = 1: the paper's recipe skips a batch of one; expected at least 2"
        found = {key: f"{key} = {_value(settings, key)!r}: {why}" for key, why in _contradictions(settings).items()}
        problems = {**found, **problems}
        return settings, problems

    @property
    def rounds(self) -> int:
        """The number of rounds."""
        return 1 if self.method == ONE_ROUND else self.num_server_rounds

    @property
    def proximal(self) -> float:
        """FedProx's μ; 0 with any other strategy."""
        return self.proximal_mu if self.strategy == "fedprox" else 0.0

    @property
    def update_limit(self) -> float:
        """The longest update that counts in full, as a multiple of the sites' median length; 0 for no limit."""
        limited = self.method in ("adapter", LORA) and self.recipe != "paper"  # a sum of whole models is large
        return self.max_update_norm if limited else 0.0

    @property
    def sees_given_length(self) -> bool:
        """True if the adapter's network sees image features with the length that CLIP gives them."""
        return self.recipe == "paper" and self.method == "adapter" and not self.feature_norm

    @property
    def least_sites(self) -> int:
        """Good replies that a round needs; of a sum of two, each site could compute the other's part."""
        return max(self.min_sites, 3) if self.secure_aggregation else self.min_sites

    @property
    def hides_images(self) -> bool:
        """True if noise hides each image."""
        return self.dp != "off" and self.dp_unit == "image"

    @property
    def noise_leaves(self) -> bool:
        """True if what a site sends has noise that hides each image, or its share of it under masks."""
        return self.hides_images and (self.dp == "local" or self.secure_aggregation)

    @property
    def shares_noise(self) -> bool:
        """True if each site adds a share of the noise, all of which `min-sites` of them have."""
        return self.noise_leaves and self.dp == "central"

    @property
    def keeps_sums(self) -> bool:
        """True if the result is the plain sum, which updates can go on from."""
        return self.method == ONE_ROUND and self.statistics in FORMS and self.dp == "off"

    @property
    def leaving(self) -> list[str]:
        """The sites that take back what they gave."""
        return [name for part in self.leave.split(",") if (name := part.strip())]

    @property
    def compares_updates(self) -> bool:
        """True if the strategy sees each site's update: one of `ROBUST`, or a plug-in."""
        return self.strategy not in ("fedavg", "fedprox", *OPTIMIZED)

    def packages(self, *of: str) -> list[str]:
        """The packages of the plug-ins that these settings name, each with its version and content hash."""
        named = {key: place_of(self.data)[0][:-1] if key == "data" else str(_value(self, key)) for key in of}
        own = {key: {*self.keys()[key].metadata.get("choices", ()), *(head[:-1] for head in PLACES), ""} for key in of}
        return plugins.packages({key: name for key, name in named.items() if name not in own[key]})

    @property
    def shared_packages(self) -> list[str]:
        """Those that server and sites must have alike."""
        return self.packages("codec", *(["adapter"] if self.method == "adapter" else []))

    @property
    def trained_blend(self) -> float:
        """The share of the adapted feature while adapters are trained."""
        return self.blend if isinstance(self.blend, float) else 1.0

    @classmethod
    def from_run_config(cls, given: Mapping[str, Any]) -> Settings:
        """Settings from Flower's run config; raises one `UserError` with every problem."""
        settings, problems = cls.read(given)
        if problems:
            raise unusable(problems.values())
        return settings

    @classmethod
    def keys(cls) -> dict[str, dataclasses.Field[Any]]:
        """The fields under the keys of the run config."""
        return {field.name.replace("_", "-"): field for field in dataclasses.fields(cls)}

    def as_run_config(self) -> dict[str, Any]:
        """The settings as a run config, the inverse of `from_run_config`."""
        return {name.replace("_", "-"): value for name, value in dataclasses.asdict(self).items()}


def place_of(data: str) -> tuple[str, str]:
    """The one of `PLACES` or plug-in that `data` starts with, and the path; else an empty text and `data` itself."""
    head = next((head for head in PLACES if data.startswith(head)), "") or _plugin_head(data)
    return head, data.removeprefix(head)


def _plugin_head(data: str) -> str:
    name, _, rest = data.partition(":")
    if not rest or name == "drawn":
        return ""
    reference = f"{name}:{rest.partition(':')[0]}"
    if ":" in rest and plugins.REFERENCE.fullmatch(reference):
        return f"{reference}:"
    return f"{name}:" if plugins.reference_of("data", name) else ""


def meaning_of(field: dataclasses.Field[Any]) -> str:
    """A setting's meaning, with its choices if it has any."""
    meaning, choices = field.metadata["meaning"], field.metadata.get("choices")
    return f"{meaning} ({', '.join(choices)})" if choices else str(meaning)


def _value(settings: Settings, key: str) -> Any:
    return getattr(settings, key.replace("-", "_"))


def _contradictions(settings: Settings) -> dict[str, str]:
    """Settings that contradict each other: for the key to change, the reason and the remedy."""
    found: dict[str, str] = {}
    if settings.name == "latest":
        found["name"] = "'latest' always means the newest run; choose another name"
    if settings.name and settings.resume:
        found["name"] = "a resumed run keeps its name; leave it out"
    robust, strategy = settings.compares_updates, f"strategy = {settings.strategy!r}"
    if robust and settings.site_weights != "equal":
        found["site-weights"] = f"with {strategy} sites count the same; leave it out"
    if robust and settings.dp == "central":
        found["dp"] = f"its noise is for a mean, which {strategy} does not use; set dp = 'local', or another strategy"
    if settings.recipe == "paper" and settings.max_update_norm not in (0.0, Settings.max_update_norm):
        found["max-update-norm"] = "with recipe = 'paper' updates of any length count in full; leave it out"
    elif 0 < settings.max_update_norm < 0.1:
        found["max-update-norm"] = "expected 0, for no limit, or at least 0.1"
    if settings.secure_aggregation:
        how = "with secure-aggregation = true "
        if robust:
            found["strategy"] = how + "the server sees no single update, so it can't compare them; use fedavg"
        if settings.codec != "float32":
            found["codec"] = how + "tensors are masked and can't be compressed; leave it out"
        if settings.site_weights != "equal" and settings.method != ONE_ROUND:
            found["site-weights"] = how + "sites count the same; leave it out"
        if settings.one_round_choose:
            found["one-round-choose"] = how + "each site's own losses would be seen; leave it out"
    found |= _of_privacy(settings)
    if settings.leave and not (settings.update and settings.secure_aggregation):
        found["leave"] = "it is for updates with secure-aggregation = true; else use `fedclip forget`"
    if settings.method == ONE_ROUND:
        found |= _of_rounds(settings)
    else:
        for key in ("statistics", "one-round-choose", "directions", "update"):
            if _value(settings, key) != _value(Settings(), key):
                found[key] = f"it is for method = {ONE_ROUND!r}; leave it out, or set that method"
    if settings.method != LORA:
        for key in (*LORA_KEYS, "gradient-checkpointing", "start"):
            if _value(settings, key) != _value(Settings(), key):
                found[key] = f"it is for method = {LORA!r}; leave it out, or set that method"
    elif settings.feature_norm:
        found["feature-norm"] = f"it is for adapters; leave it out with method = {LORA!r}"
    if settings.method == "full-model":
        plain = {"feature-norm": 0.0, "blend": 1.0, "personalize": False, "dp": "off", "secure-aggregation": False}
        for key in [key for key, value in plain.items() if _value(settings, key) != value]:
            found[key] = "it is for adapters; leave it out with method = 'full-model'"
    return found


def _of_privacy(settings: Settings) -> dict[str, str]:
    """Settings of differential privacy that do not fit together."""
    found = {}
    if settings.dp_unit == "image" and settings.method != ONE_ROUND:
        found["dp-unit"] = f"it is for method = {ONE_ROUND!r}; adapters that are trained hide sites"
    elif settings.dp_unit == "image" and settings.dp == "off":
        found["dp-unit"] = "set dp = 'central' or 'local', too"
    elif settings.hides_images:
        if not settings.epsilon:
            found["epsilon"] = "dp-unit = 'image' needs it: the smaller, the more noise; 1 to 8 are usual"
        for key in ("noise-multiplier", "clipping-norm"):
            if _value(settings, key) != _value(Settings(), key):
                found[key] = "it is for dp-unit = 'site'; with 'image', epsilon sets the noise"
        if settings.strategy != "fedavg":
            found["strategy"] = "with noise for each image the total is a plain one; leave it out"
        if settings.one_round_choose:
            found["one-round-choose"] = "what sites choose by has no noise; leave it out with dp"
    elif settings.method == ONE_ROUND and settings.dp != "off":
        found["dp"] = "with one-round it hides each image: set dp-unit = 'image', and epsilon"
    if settings.epsilon and not settings.hides_images:
        found["epsilon"] = "it is for dp-unit = 'image'; else noise-multiplier sets the noise"
    if settings.statistics == GRADIENT:
        for key in ("strategy", "one-round-choose", "personalize", "directions"):
            if _value(settings, key) != _value(Settings(), key):
                found[key] = f"leave it out with statistics = {GRADIENT!r}"
    if settings.update and settings.method == ONE_ROUND and not settings.keeps_sums:
        found["update"] = "only exact sums, without noise, can be updated; start a new run"
    return found


def _of_rounds(settings: Settings) -> dict[str, str]:
    """Settings of methods that train, which `one-round` can't follow."""
    found = {}
    if settings.num_server_rounds not in (1, Settings.num_server_rounds):
        found["num-server-rounds"] = f"method = {ONE_ROUND!r} has a single round; leave it out"
    trained = ("recipe", "feature-norm", "blend", "codec")
    if settings.strategy not in ROBUST_SUMS:
        found["strategy"] = f"with method = {ONE_ROUND!r} expected one of {', '.join(ROBUST_SUMS)}"
    for key in (*trained, "fraction-train"):
        if _value(settings, key) == _value(Settings(), key):
            continue
        found[key] = f"it is for adapters that are trained; leave it out with method = {ONE_ROUND!r}"
    return found


def unusable(problems: Collection[str]) -> UserError:
    """One error that lists all problems of the settings."""
    return UserError(f"{len(problems)} of the settings can't be used:", *problems)


def _checked(key: str, value: Any, field: dataclasses.Field[Any]) -> Any:
    """The value, converted to its field's type; a `ValueError` says what was expected."""
    kind: type = type(field.default)
    if value == field.metadata.get("word", math.nan):
        return value
    if type(value) is int and abs(value) >= 2**63:
        raise ValueError("expected at most 63 bits")
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        names = {str: "a text", int: "a whole number", float: "a number", bool: "true or false"}
        raise ValueError(f"expected {names[kind]}" + (f" or {word}" if (word := field.metadata.get("word")) else ""))
    limits = field.metadata
    if "choices" in limits and value not in limits["choices"]:
        extensible = key in plugins.GROUPS
        if not extensible or plugins.reference_of(key, str(value)) is None:
            expected = [*limits["choices"], *([plugins.HOW] if extensible else [])]
            raise ValueError(f"expected one of {', '.join(expected)}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError("expected a finite number")
    if value < limits.get("least", value):
        raise ValueError(f"expected at least {limits['least']:g}")
    if value > limits.get("most", value):
        raise ValueError(f"expected at most {limits['most']:g}")
    if "above" in limits and value <= limits["above"]:
        raise ValueError(f"expected more than {limits['above']:g}")
    if isinstance(value, str):
        if shown(value) != value:
            raise ValueError("expected plain characters, without line breaks")
        if not re.fullmatch(limits.get("pattern", ".*"), value, re.DOTALL):
            raise ValueError(f"expected {limits['expected']}")
        _check_text(key, value)
    return value


def _check_text(key: str, value: str) -> None:
    """Checks a text beyond its field's limits; a `ValueError` says what was expected."""
    if key in ("model", "data") and not value:
        raise ValueError("expected a name; it is empty")
    if key == "prompt" and value and any(part.count("{}") != 1 for part in value.split("|")):
        raise ValueError("expected a template with one {} for the class name, such as 'a photo of a {}'")
    head, path = "", value
    if key == "data":
        head, rest = place_of(value)
        path = rest if head or value.startswith((".", "~")) else ""
        if head and not path:
            raise ValueError(f"expected a path after {head}")
    elif key in ("model", "class-names"):
        path = value if value.startswith((".", "~", "/")) else ""
    elif key not in ("directions", "results-dir", "start"):
        return
    if path and not Path(path).is_absolute():
        absolute = Path(os.path.expanduser(path)).absolute()
        raise ValueError(f"expected an absolute path, such as {head}{absolute}")


LORA_KEYS = ("lora-targets", "lora-layers", "lora-modules", "lora-rank", "lora-alpha", "lora-dropout", "lora-train")
"""The keys of the settings that say what LoRA is."""
ENCODING_KEYS = (
    *("data", "image-column", "label-column", "domain-column"),
    *("model", "model-revision", "prompt", "class-names", "device", "precision"),
)
"""The keys of the settings that encoding uses."""
STORING_KEYS = (*ENCODING_KEYS, "method", *LORA_KEYS)
"""Those that say what is stored of an image: features, or what a tower is trained with."""
