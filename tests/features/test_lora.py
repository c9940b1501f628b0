"""LoRA in the towers: zero-shot at first, stored activations, and beside a LoRA written out by hand."""

from __future__ import annotations

import copy
import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from fedclip_flwr.base.errors import UserError
from fedclip_flwr.base.settings import Settings
from fedclip_flwr.data import Vocabulary
from fedclip_flwr.data.drawn import CLASSES, picture
from fedclip_flwr.features import Clip, models
from fedclip_flwr.features.encoded import Encoded
from fedclip_flwr.features.encoding import class_features
from fedclip_flwr.features.lora import Lora, bytes_of_step
from fedclip_flwr.features.opening import new_learner, open_features
from fedclip_flwr.features.pixels import Unpacking
from fedclip_flwr.learning import RECIPES, Classes, Examples, Learner, evaluate, train
from fedclip_flwr.learning.lora import LoraTensors, first_a
from tests.extras import needs
from tests.models import small_clip, small_siglip, small_siglip2

pytestmark = needs("lora")
IMAGES = [picture(5, "photo", name, 0)[0].resize((48 - 2 * i, 32)) for i, name in enumerate(CLASSES)]
WORDS = Vocabulary(CLASSES, ("a picture of a {}", "the {}"))
LABELS = torch.arange(len(IMAGES))
MAKERS = {"clip": small_clip, "siglip": small_siglip, "siglip 2": small_siglip2}


def lively(folder: Path) -> Path:
    """The model with greater weights: images and prompts differ by more than rounding."""
    weights, generator = load_file(folder / "model.safetensors"), torch.Generator().manual_seed(0)
    for name, tensor in weights.items():
        if tensor.dim() == 2:
            tensor.copy_(torch.randn(tensor.shape, generator=generator) / tensor.shape[1] ** 0.5)
        elif name == "logit_scale":
            tensor.fill_(2.5)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(scope="module", params=MAKERS.values(), ids=[*MAKERS])
def any_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return lively(request.param(tmp_path_factory.mktemp("any") / "model"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return lively(small_clip(tmp_path_factory.mktemp("small") / "model"))


@cache
def read(folder: Path, precision: str) -> Clip:
    return Clip(models.find(str(folder)), "cpu", precision)


def loaded(folder: Path, precision: str = "float32") -> Clip:
    """The model, to be changed."""
    clip = copy.copy(read(folder, precision))
    clip.net = copy.deepcopy(clip.net)
    return clip


def lora(folder: Path, precision: str = "float32", **given: Any) -> Lora:
    return Lora(loaded(folder, precision), Settings(method="lora", **{"lora_rank": 2, **given}), WORDS)


def pixels_of(clip: Clip) -> Tensor:
    return clip.preparer(torch.uint8)(IMAGES)["pixel_values"]


def frozen(clip: Clip) -> Classes:
    return Classes(class_features(clip, WORDS), clip.scale, clip.bias)


def seen(clip: Clip, learner: Lora) -> Tensor:
    """The images as the learner takes them."""
    inputs = Unpacking(clip.processor)(pixels_of(clip))
    if learner.spec.targets == "text":
        return clip.encode(inputs)
    return clip.encode(inputs, learner.spec.last) if learner.spec.last else pixels_of(clip)


def shaken(learner: Lora, seed: int = 0) -> Lora:
    """With random B: as if trained."""
    generator = torch.Generator().manual_seed(seed)
    learner.take({name: torch.randn(t.shape, generator=generator) for name, t in learner.every.items() if "_B" in name})
    return learner


def learn(learner: Learner, images: Tensor, classes: Classes, **more: Any) -> float:
    given = {"learning_rate": 1e-2, "epochs": 2, "batch_size": 4, "seed": 3, **more}
    return train(learner, Examples(images, LABELS), classes, RECIPES["default"], **given)


def gradients(learner: Lora, images: Tensor, classes: Classes) -> dict[str, Tensor]:
    names, tensors = zip(*learner.named_parameters(), strict=True)
    loss = RECIPES["default"].loss(learner(images), LABELS, learner.against(classes))
    return dict(zip(names, torch.autograd.grad(loss, tensors), strict=True))


@pytest.mark.parametrize("layers", ["all", "last:1"])
@pytest.mark.parametrize("targets", ["vision", "text", "both"])
def test_it_starts_as_the_model_to_the_bit(any_folder: Path, targets: str, layers: str) -> None:
    learner, clip = lora(any_folder, lora_targets=targets, lora_layers=layers), loaded(any_folder)
    images, text = clip.encode(Unpacking(clip.processor)(pixels_of(clip))), frozen(clip)
    with torch.no_grad():
        found = learner.logits(seen(clip, learner), text)
        assert torch.equal(found, text.logits(F.normalize(images, dim=-1)))
        changed = shaken(learner).logits(seen(clip, learner), text)
        assert (found - changed).abs().max() > 0.01


@pytest.mark.parametrize(("targets", "layers"), [("vision", "all"), ("text", "last:1"), ("both", "last:1")])
def test_it_starts_from_what_is_stored_as_zero_shot(
    any_folder: Path, targets: str, layers: str, tmp_path: Path
) -> None:
    for name, image in zip(CLASSES, IMAGES, strict=True):
        (tmp_path / "images" / name).mkdir(parents=True)
        image.save(tmp_path / "images" / name / "a.png")
    given: dict[str, Any] = {"data": f"folder:{tmp_path / 'images'}", "model": str(any_folder), "device": "cpu"}
    settings = Settings(method="lora", lora_targets=targets, lora_layers=layers, lora_rank=2, **given)
    opened = [open_features(of, root=tmp_path, progress=False) for of in (Settings(**given), settings)]
    plain, stored = (features.examples(features.domains[0]) for features in opened)
    classes = opened[0].classes.ready()
    with torch.no_grad():
        found = new_learner(settings, opened[1]).logits(stored.ready().features, classes)
    expected = classes.logits(F.normalize(plain.features, dim=-1))
    torch.testing.assert_close(found / classes.scale, expected / classes.scale, rtol=0, atol=1e-5)


@pytest.mark.parametrize("targets", ["vision", "text", "both"])
def test_the_last_layers_learn_from_what_is_stored_as_in_the_whole_tower(any_folder: Path, targets: str) -> None:
    clip = loaded(any_folder)
    part = shaken(lora(any_folder, lora_targets=targets, lora_layers="last:1"))
    whole = lora(any_folder, lora_targets=targets)
    whole.take(part.state_dict())  # the first layer's B is zero, as without LoRA
    for name, tensor in part.frozen.items():
        assert torch.equal(whole.frozen[name], tensor)
    text = frozen(clip)
    torch.testing.assert_close(part(seen(clip, part)), whole(seen(clip, whole)), rtol=0, atol=1e-6)
    torch.testing.assert_close(part.against(text).text, whole.against(text).text, rtol=0, atol=1e-6)
    found, expected = gradients(part, seen(clip, part), text), gradients(whole, seen(clip, whole), text)
    assert 0 < len(found) < len(expected)
    for name, gradient in found.items():
        assert gradient.abs().max() > 1e-5
        torch.testing.assert_close(gradient, expected[name], rtol=0, atol=1e-6)


class ByHand(nn.Module):
    """A linear layer with LoRA."""

    def __init__(self, linear: nn.Linear, a: Tensor, scaling: float) -> None:
        super().__init__()
        self.linear, self.scaling = linear, scaling
        self.a, self.b = nn.Parameter(a), nn.Parameter(torch.zeros(linear.out_features, len(a)))

    def forward(self, given: Tensor) -> Tensor:
        found: Tensor = self.linear(given) + self.scaling * (given @ self.a.T @ self.b.T)
        return found


class HandLearner(Learner):
    """The vision tower with `ByHand` in each of its attentions."""

    def __init__(self, clip: Clip, seed: int, *, both: bool) -> None:
        super().__init__()
        self.net, self.unpack, self.lora = clip.net, Unpacking(clip.processor), dict[str, nn.Parameter]()
        for number, layer in enumerate(self.net.vision_model.encoder.layers):
            for part in ("q_proj", "v_proj"):
                name, linear = f"vision_model.encoder.layers.{number}.self_attn.{part}", getattr(layer.self_attn, part)
                made = ByHand(linear, first_a(name, 2, linear.in_features, seed), 2.0)
                setattr(layer.self_attn, part, made)
                self.lora |= {f"{name}.lora_A": made.a} if both else {}
                self.lora[f"{name}.lora_B"] = made.b

    def named_parameters(self, *_: object, **__: object) -> Iterator[tuple[str, nn.Parameter]]:
        yield from self.lora.items()

    def forward(self, pixels: Tensor) -> Tensor:
        found = self.net.get_image_features(**self.unpack(pixels))
        return F.normalize(found.pooler_output, dim=-1)


@pytest.mark.parametrize("trained", ["B", "both"])
def test_it_learns_what_lora_by_hand_learns(any_folder: Path, trained: str) -> None:
    given: dict[str, Any] = {"lora_train": trained, "lora_modules": "q_proj,v_proj", "seed": 9}
    learner, text = lora(any_folder, **given), frozen(loaded(any_folder))
    by_hand = HandLearner(loaded(any_folder), 9, both=trained == "both")
    images = pixels_of(loaded(any_folder))
    losses = [learn(one, images, text) for one in (learner, by_hand)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert learner.trained.keys() == by_hand.lora.keys()
    for name, tensor in learner.state_dict().items():
        torch.testing.assert_close(tensor, by_hand.lora[name].detach(), rtol=0, atol=1e-5)
    assert all(tensor.abs().max() > 0.01 for name, tensor in learner.state_dict().items() if "_B" in name)


def test_dropout_is_drawn_from_the_seed_and_never_in_evaluation(folder: Path) -> None:
    images, text = pixels_of(loaded(folder)), frozen(loaded(folder))

    def trained(dropout: float, seed: int = 3) -> Lora:
        torch.rand(seed)  # what others have drawn does not matter
        learner = lora(folder, lora_dropout=dropout)
        learn(learner, images, text, seed=seed)
        return learner

    first, again, other, without = trained(0.5), trained(0.5), trained(0.5, 4), trained(0.0)
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name])
        assert not torch.equal(tensor, other.state_dict()[name])
        assert not torch.equal(tensor, without.state_dict()[name])
    assert not torch.equal(first(images), first(images))
    scores = [evaluate(first, Examples(images, LABELS), text) for _ in range(2)]
    assert scores[0] == scores[1]


def test_what_the_clip_would_drop_in_training_is_kept(folder: Path, tmp_path: Path) -> None:
    changed = Path(shutil.copytree(folder, tmp_path / "model"))
    config = json.loads((changed / "config.json").read_text())
    for tower in ("text_config", "vision_config"):
        config[tower]["attention_dropout"] = 0.5
    (changed / "config.json").write_text(json.dumps(config))
    assert loaded(changed).net.vision_model.encoder.layers[0].self_attn.dropout == 0.5
    images, text = pixels_of(loaded(folder)), frozen(loaded(folder))
    both = [lora(place, lora_targets="both") for place in (folder, changed)]
    for learner in both:
        learn(learner, images, text)
    for name, tensor in both[0].state_dict().items():
        assert torch.equal(tensor, both[1].state_dict()[name])


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_checkpointing_gives_the_same_gradients_to_the_bit(any_folder: Path, dropout: float) -> None:
    images, text = pixels_of(loaded(any_folder)), frozen(loaded(any_folder))
    found = []
    for checkpointing in (False, True):
        more: dict[str, Any] = {"lora_targets": "both", "lora_train": "both", "gradient_checkpointing": checkpointing}
        learner = shaken(lora(any_folder, lora_dropout=dropout, **more))
        torch.manual_seed(1)
        found.append(gradients(learner, images, text))
    assert all(torch.equal(gradient, found[1][name]) for name, gradient in found[0].items())


def test_the_blend_is_the_share_of_lora_that_is_used(any_folder: Path) -> None:
    clip = loaded(any_folder)
    images, plain = pixels_of(clip), lora(any_folder)
    learner = shaken(lora(any_folder))
    found = {}
    with torch.no_grad():
        for learner.blend in (0.0, 0.5, 1.0):
            found[learner.blend] = learner(images)
            tensors = LoraTensors(learner.spec, {**learner.every}, learner.blend)
            merged = loaded(any_folder)
            tensors.merge_into(merged.net)
            own = F.normalize(merged.encode(Unpacking(clip.processor)(images)), dim=-1)
            torch.testing.assert_close(found[learner.blend], own, rtol=0, atol=1e-5)
        assert torch.equal(found[0.0], plain(images))
    assert (found[0.5] - found[1.0]).abs().max() > 0.01


def test_its_state_is_what_is_trained_and_a_copy_has_tensors_of_its_own(folder: Path) -> None:
    images = pixels_of(loaded(folder))
    for trained, ends in (("B", {"B"}), ("both", {"A", "B"})):
        learner = lora(folder, lora_train=trained, lora_modules="q_proj,fc2")
        names = {
            f"vision_model.encoder.layers.{layer}.{part}.lora_{end}"
            for layer in (0, 1)
            for part in ("self_attn.q_proj", "mlp.fc2")
            for end in ends
        }
        assert {*learner.state_dict()} == {name for name, _ in learner.named_parameters()} == names
        assert [*map(id, learner.parameters())] == [*map(id, learner.trained.values())]
        assert {*learner.trained, *learner.frozen} == {*learner.every}
        assert len(learner.every) == 8
        assert learner.first.keys() == names
    copied = copy.deepcopy(learner)
    shaken(copied)
    with torch.no_grad():
        assert torch.equal(learner(images), lora(folder, lora_modules="q_proj,fc2")(images))
        assert (copied(images) - learner(images)).abs().max() > 0.01
        learner.load_state_dict(copied.state_dict())
        assert torch.equal(copied(images), learner(images))
    moved = copied.double()
    inside = {id(parameter) for parameter in moved.net.parameters()}
    assert {id(parameter) for parameter in moved.every.values()} <= inside
    assert {tensor.dtype for tensor in moved.every.values()} == {torch.float64}
    state = learner.state_dict()
    name, tensor = state.popitem()
    for wrong in (state, {**state, name: tensor, "more": tensor}):
        with pytest.raises(KeyError, match="expected"):
            learner.load_state_dict(wrong)


def test_the_memory_of_a_step_by_hand(folder: Path) -> None:
    clip = loaded(folder)
    learner = lora(folder, lora_layers="last:1", lora_modules="fc2")
    image, text = seen(clip, learner)[:1], frozen(clip)
    # Of 17 tokens: what LoRA's B gets, and what the last norm gets of its first token, as a part of all of them. Then
    # mean and deviation of the norm, the feature of 12 numbers, and its length, before and after it is kept from 0.
    by_hand = 4 * (17 * 2 + 17 * 16 + 2 + 12 + 2)
    assert [bytes_of_step(learner, text, image, count) for count in (1, 10)] == [by_hand, 10 * by_hand]


def test_checkpointing_keeps_what_enters_each_layer_and_one_layer_more(folder: Path) -> None:
    learner = lora(folder)
    image, text = pixels_of(loaded(folder))[:1], frozen(loaded(folder))
    whole = bytes_of_step(learner, text, image, 4)
    learner.checkpointing = True
    after_last = 17 * 16 + 2 + 12 + 2  # as above
    assert bytes_of_step(learner, text, image, 4) == 4 * 4 * (2 * 17 * 16 + after_last) + whole // 2
    assert learner.checkpointing


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"lora_modules": "q_proj,query"}, "lora-modules: a layer of the vision tower has no 'query'; it has k_proj, "),
        ({"lora_rank": 17}, "lora-rank = 17: q_proj of the vision tower allows at most 16"),
        ({"lora_layers": "last:3"}, "lora-layers = 'last:3': the vision tower has only 2 layers"),
        ({"lora_layers": "last:3", "lora_targets": "text"}, "the text tower has only 2 layers"),
    ],
)
def test_settings_that_a_model_cannot_follow_are_reported(folder: Path, given: dict[str, Any], expected: str) -> None:
    with pytest.raises(UserError, match=re.escape(expected)) as error:
        lora(folder, **given)
    assert "\n" not in str(error.value)


def test_a_model_whose_layers_are_elsewhere_is_reported(folder: Path) -> None:
    clip = loaded(folder)
    clip.net.vision_model.encoder.blocks = clip.net.vision_model.encoder.layers
    del clip.net.vision_model.encoder.layers
    with pytest.raises(UserError, match="the layers of this clip are not where those of CLIP and SigLIP are") as error:
        Lora(clip, Settings(method="lora"), WORDS)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("layers", ["all", "last:1"])
def test_what_is_far_from_zero_is_stored_as_the_model_has_it(
    folder: Path, tree: Path, tmp_path: Path, layers: str
) -> None:
    """In bfloat16 the model goes on where float16 ends."""
    settings = Settings(data=f"folder:{tree}", model=str(folder), method="lora", lora_layers=layers)
    settings = replace(settings, device="cpu", precision="bfloat16")
    features = open_features(settings, root=tmp_path, progress=False)
    assert isinstance(features, Encoded)
    with torch.no_grad():
        features._clip.net.vision_model.encoder.layers[0].mlp.fc2.bias[0] = 1e5
    stored = features.examples(features.domains[0])
    assert stored.features.isfinite().all()
    assert stored.features.dtype == (torch.uint8 if layers == "all" else torch.bfloat16)


def test_it_is_made_on_the_models_device(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clip = loaded(folder)
    monkeypatch.setattr(Lora, "on_cpu", lambda self: {})  # "meta" has no values
    clip.net.to("meta")
    assert Lora(clip, Settings(method="lora"), WORDS).unpack.factor.device.type == "meta"


@pytest.mark.parametrize("layers", ["all", "last:1"])
def test_in_bfloat16_lora_itself_stays_float32(any_folder: Path, layers: str) -> None:
    given = {"lora_targets": "both", "lora_layers": layers}
    exact, lower = shaken(lora(any_folder, **given)), shaken(lora(any_folder, "bfloat16", **given))
    clip, low = loaded(any_folder), loaded(any_folder, "bfloat16")
    with torch.no_grad():
        logits = exact.logits(seen(clip, exact), frozen(clip)), lower.logits(seen(low, lower), frozen(clip))
    assert logits[1].dtype == torch.float32
    torch.testing.assert_close(logits[0] / clip.scale, logits[1] / clip.scale, rtol=0, atol=0.1)
    loss = evaluate(lower, Examples(seen(low, lower), LABELS), frozen(clip)).loss
    learn(lower, seen(low, lower), frozen(clip), epochs=5)
    assert {tensor.dtype for tensor in lower.every.values()} == {torch.float32}
    assert evaluate(lower, Examples(seen(low, lower), LABELS), frozen(clip)).loss < loss
