from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel, CLIPModel
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from fedclip_flwr.base.errors import UserError
from fedclip_flwr.data.drawn import CLASSES, picture
from fedclip_flwr.features import clip, models
from fedclip_flwr.features.clip import Clip
from fedclip_flwr.features.pixels import Unpacking, packed
from fedclip_flwr.features.whole import WholeModel
from fedclip_flwr.learning.base import Classes, Examples
from fedclip_flwr.learning.recipes import RECIPES
from fedclip_flwr.learning.training import evaluate, train
from tests.models import small_clip, small_siglip, small_siglip2

IMAGES = [picture(11, domain, figure, 0)[0] for domain in ("photo", "sketch") for figure in CLASSES]


def test_the_bundled_model_is_a_small_clip_without_pickles() -> None:
    files = list(models.BUNDLED.iterdir())
    assert sum(f.stat().st_size for f in files) < 8 * 2**20
    assert {"config.json", "model.safetensors", "preprocessor_config.json", "tokenizer.json"} <= {f.name for f in files}
    assert not any(f.suffix in (".bin", ".pt", ".pkl") for f in files)
    assert json.loads((models.BUNDLED / "config.json").read_text())["architectures"] == ["CLIPModel"]


PROMPTS = [f"a picture of a {name}" for name in CLASSES]
MODELS: dict[str, Callable[[Path], Path]] = {
    "the bundled one": lambda folder: Path(shutil.copytree(models.BUNDLED, folder)),
    "clip": small_clip,
    "siglip": small_siglip,
    "siglip 2": small_siglip2,
}


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_features_and_logits_equal_transformers_own_forward_pass(make: Callable[[Path], Path], tmp_path: Path) -> None:
    folder = make(tmp_path / "model")
    loaded = Clip(models.find(str(folder)))
    net = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    siglip = net.config.model_type.startswith("siglip")
    tokenizer, padding = AutoTokenizer.from_pretrained(folder), "max_length" if siglip else True
    with torch.no_grad():
        expected = net(
            **AutoImageProcessor.from_pretrained(folder)(IMAGES, return_tensors="pt"),
            **tokenizer(PROMPTS, padding=padding, truncation=True, return_tensors="pt"),
        )
    batches = list(loaded.encode_images(iter(IMAGES), batch_size=8))
    assert [len(b) for b in batches] == [8, 8, 4]
    images, prompts = torch.cat(batches), loaded.encode_prompts(PROMPTS, batch_size=3)
    with torch.no_grad():
        given = net.get_image_features(**AutoImageProcessor.from_pretrained(folder)(IMAGES, return_tensors="pt"))
    torch.testing.assert_close(images, given.pooler_output, rtol=1e-5, atol=1e-5)
    images = F.normalize(images, dim=1)
    torch.testing.assert_close(images, expected.image_embeds, rtol=0, atol=1e-5)
    torch.testing.assert_close(prompts, expected.text_embeds, rtol=0, atol=1e-5)
    logits = Classes(prompts, loaded.scale, loaded.bias).logits(images)
    torch.testing.assert_close(logits, expected.logits_per_image, rtol=1e-5, atol=1e-5 * loaded.scale)
    assert loaded.parameters == sum(p.numel() for p in net.parameters())
    assert models.find(str(folder)).dim == images.shape[1]
    assert loaded.bias == (pytest.approx(net.logit_bias.item()) if siglip else 0.0)


@pytest.mark.parametrize("name", ["the bundled one", "clip", "siglip"])
def test_a_full_model_sees_pixels_as_the_frozen_one_sees_images(name: str, tmp_path: Path) -> None:
    loaded = Clip(models.find(str(MODELS[name](tmp_path / "model"))))
    prepare = loaded.preparer(torch.uint8)
    batches = [prepare(IMAGES[i : i + 8])["pixel_values"] for i in range(0, len(IMAGES), 8)]
    assert [len(b) for b in batches] == [8, 8, 4]
    assert batches[0].dtype == torch.uint8
    whole = WholeModel.copy_of(loaded, [*PROMPTS, *(f"a {name}" for name in CLASSES)], templates=2)
    features, seen = torch.cat(list(loaded.encode_images(IMAGES))), whole(torch.cat(batches))
    torch.testing.assert_close(seen.detach(), F.normalize(features, dim=1), rtol=0, atol=1e-5)
    classes = whole.against(Classes(torch.zeros(10, features.shape[1]), 1.0))
    one, other = loaded.encode_prompts(PROMPTS), loaded.encode_prompts([f"a {name}" for name in CLASSES])
    torch.testing.assert_close(classes.text.detach(), F.normalize(one + other, dim=1), rtol=0, atol=1e-5)
    scale, bias = torch.as_tensor(classes.scale).item(), torch.as_tensor(classes.bias).item()
    assert (scale, bias) == pytest.approx((loaded.scale, loaded.bias))


@pytest.mark.parametrize("name", ["the bundled one", "clip", "siglip"])
def test_every_weight_of_a_full_model_learns_and_the_frozen_one_stays(name: str, tmp_path: Path) -> None:
    loaded = Clip(models.find(str(MODELS[name](tmp_path / "model"))))
    before = loaded.encode_prompts(PROMPTS)
    whole = WholeModel.copy_of(loaded, PROMPTS)
    start = {key: tensor.clone() for key, tensor in whole.state_dict().items()}
    assert sum(tensor.numel() for tensor in start.values()) == loaded.parameters
    examples = Examples(loaded.preparer(torch.uint8)(IMAGES)["pixel_values"], torch.arange(20) % 10)
    frozen = Classes(before, loaded.scale, loaded.bias)
    loss = evaluate(whole, examples, frozen).loss
    train(whole, examples, frozen, RECIPES["default"], learning_rate=1e-4, batch_size=20, epochs=5)
    still = [key for key, tensor in whole.state_dict().items() if torch.equal(tensor, start[key])]
    # a bias that all logits share cancels out, and has nothing to learn from
    assert still in ([], ["net.logit_bias"])
    assert evaluate(whole, examples, frozen).loss < loss
    assert torch.equal(loaded.encode_prompts(PROMPTS), before)


def test_a_full_model_lies_in_memory_as_tensors_travel_also_where_the_frozen_one_does_not() -> None:
    loaded = Clip(models.find("bundled"), "cpu")
    loaded.net.to(memory_format=torch.channels_last)  # as on a GPU
    assert not all(tensor.is_contiguous() for tensor in loaded.net.state_dict().values())
    assert all(tensor.is_contiguous() for tensor in WholeModel.copy_of(loaded, PROMPTS).state_dict().values())


def test_a_full_model_takes_images_of_any_shape_as_their_processor_gives_them(tmp_path: Path) -> None:
    loaded = Clip(models.find(str(small_siglip2(tmp_path / "model"))))
    images = [image.resize((32 + 8 * (number % 5), 40)) for number, image in enumerate(IMAGES)]
    loaded.processor.image_mean, loaded.processor.image_std = [0.3, 0.5, 0.6], [0.2, 0.4, 0.5]
    inputs = loaded.processor(images=images, return_tensors="pt")
    assert len({*map(tuple, inputs["spatial_shapes"].tolist())}) > 1
    assert 0 < inputs["pixel_attention_mask"].float().mean() < 1  # some patches are none
    with torch.no_grad():
        expected = F.normalize(loaded.net.get_image_features(**inputs).pooler_output, dim=-1)
        pixels = loaded.preparer(torch.uint8)(images)["pixel_values"]
        seen = WholeModel.copy_of(loaded, PROMPTS)(pixels)
    assert pixels.dtype == torch.uint8
    torch.testing.assert_close(Unpacking(loaded.processor)(pixels), dict(inputs), rtol=0, atol=1e-5, check_dtype=False)
    torch.testing.assert_close(seen, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", [(2, 16, 3, 8, 8), (2, 16)])
def test_images_that_are_none_can_not_be_stored_as_pixels(shape: tuple[int, ...]) -> None:
    with pytest.raises(UserError, match="the images of other can't be stored as pixels: use method = 'adapter'"):
        packed({"pixel_values": torch.zeros(shape)}, "other")


def test_siglip_takes_texts_that_are_filled_up_whatever_the_others_are(tmp_path: Path) -> None:
    loaded = Clip(models.find(str(small_siglip(tmp_path / "model"))))
    alone, among = loaded.encode_prompts(["a cat"])[0], loaded.encode_prompts(["a cat", "a picture of a big dog"])[0]
    torch.testing.assert_close(alone, among, rtol=0, atol=1e-6)


def test_a_prompt_that_is_too_long_is_cut() -> None:
    assert Clip(models.find("bundled")).encode_prompts(["a picture of a very " * 50]).shape == (1, 128)


def test_a_lower_precision_finds_the_same_classes() -> None:
    prompts = [f"a picture of a {name}" for name in CLASSES]
    found = []
    for precision in ("float32", "bfloat16"):
        loaded = Clip(models.find("bundled"), precision=precision)
        features = torch.cat(list(loaded.encode_images(IMAGES)))
        found.append(F.normalize(features, dim=1) @ loaded.encode_prompts(prompts).T)
    assert found[1].dtype == torch.float32
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0.03)
    assert not torch.equal(found[0], found[1])


def test_the_content_follows_the_weights_and_the_image_processor(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(models.BUNDLED, tmp_path / "clip"))
    model = models.find(str(folder))
    first = model.content(tmp_path / "memory")
    assert first == models.find("bundled").content(tmp_path / "memory")
    settings = folder / "preprocessor_config.json"
    settings.write_text(settings.read_text().replace("0.5", "0.4"))
    second = model.content(tmp_path / "memory")
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (folder / "model.safetensors").write_bytes(weights)
    assert len({first, second, model.content(tmp_path / "memory")}) == 3


def test_a_missing_folder_is_reported(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="folder not found"):
        models.find(str(tmp_path / "none"))


def test_a_folder_without_weights_is_reported(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(models.BUNDLED, tmp_path / "clip"))
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"lacks model\.safetensors; save it again"):
        models.find(str(folder))


def test_a_hub_id_that_is_neither_here_nor_reachable_is_reported_in_one_line() -> None:
    with pytest.raises(UserError, match="some-one/some-clip") as error:
        models.find("some-one/some-clip")
    assert len(str(error.value).splitlines()) == 1
    assert "downloads are disabled (HF_HUB_OFFLINE); run `hf download some-one/some-clip`" in str(error.value)


def test_a_model_from_the_hubs_cache_is_found_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repository = tmp_path / "models--some-one--some-clip"
    shutil.copytree(models.BUNDLED, repository / "snapshots" / "abc")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    found = models.find("some-one/some-clip")
    assert found.folder.samefile(repository / "snapshots" / "abc")
    assert found.revision == "abc"


def test_truncated_weights_are_reported(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(models.BUNDLED, tmp_path / "clip"))
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(UserError, match=r"lacks a complete model\.safetensors"):
        models.find(str(folder))


def test_a_missing_weight_is_reported_and_not_made_up(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(models.BUNDLED, tmp_path / "clip"))
    weights = load_file(folder / "model.safetensors")
    del weights["visual_projection.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"lacks 1 weights, such as visual_projection\.weight"):
        Clip(models.find(str(folder)))


def test_a_model_that_cannot_be_loaded_is_reported(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(models.BUNDLED, tmp_path / "clip"))
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="can't be loaded") as error:
        Clip(models.find(str(folder)))
    assert "\n" not in str(error.value)


def test_code_that_a_model_brings_is_not_run_whatever_the_user_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(models.BUNDLED, tmp_path / "clip"))
    config = json.loads((folder / "config.json").read_text())
    own = {"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoModel": "own.Model"}}
    (folder / "config.json").write_text(json.dumps({**config, **own}))
    (folder / "own.py").write_text(f"open({str(tmp_path / 'run')!r}, 'w')\n")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(UserError, match="can't be loaded"):
        Clip(models.find(str(folder)))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"model_type": "bert"}, "a bert lacks an image tower and a text tower"),
        ({"model_type": "clip_vision_model", "vision_config": {}}, "a clip_vision_model lacks a text tower"),
        ({"model_type": "clip_text_model", "text_config": {}}, "a clip_text_model lacks an image tower"),
    ],
)
def test_a_model_without_two_towers_is_reported(config: dict[str, Any], expected: str, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(models.BUNDLED, tmp_path / "model"))
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=f"{expected}; expected a CLIP or SigLIP"):
        models.find(str(folder))


def test_a_model_that_compares_nothing_is_reported_when_it_is_loaded(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(models.BUNDLED, tmp_path / "bert"))
    config = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=761)
    BertModel(config).save_pretrained(folder)
    facts = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**facts, "text_config": {}, "vision_config": {}}))
    with pytest.raises(UserError, match="a BertModel does not compare images with texts"):
        Clip(models.find(str(folder)))


@pytest.mark.parametrize(
    ("missing", "expected"),
    [
        ("config.json", r"lacks config\.json"),
        ("preprocessor_config.json", r"lacks preprocessor_config\.json"),
        ("tokenizer.json", "lacks a tokenizer"),
    ],
)
def test_what_a_models_folder_lacks_is_named(missing: str, expected: str, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(models.BUNDLED, tmp_path / "clip"))
    (folder / missing).unlink()
    with pytest.raises(UserError, match=expected):
        models.find(str(folder))


def test_a_missing_part_of_the_weights_is_reported(tmp_path: Path) -> None:
    folder = small_clip(tmp_path / "clip")
    CLIPModel.from_pretrained(folder).save_pretrained(folder, max_shard_size="40KB")
    (folder / "model.safetensors").unlink(missing_ok=True)
    assert Clip(models.find(str(folder))).parameters
    first, *_ = sorted(folder.glob("model-*.safetensors"))
    first.unlink()
    with pytest.raises(UserError, match=f"lacks {first.name}"):
        models.find(str(folder))


def test_weights_that_are_a_pickle_only_are_not_read(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(models.BUNDLED, tmp_path / "clip"))
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="exist only as a pickle, which is never loaded"):
        models.find(str(folder))


def test_only_models_of_the_hub_have_revisions() -> None:
    with pytest.raises(UserError, match="only models of the Hugging Face hub have revisions"):
        models.find("bundled", "main")


def test_devices_are_picked_by_name() -> None:
    assert models.pick_device("cpu").type == "cpu"
    assert models.pick_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(UserError, match="this machine has"):
        models.pick_device("cuda:99")


@pytest.mark.parametrize(
    ("facts", "has"),
    [
        ("processor\t: 0\nflags\t\t: fpu avx512f avx512_bf16 amx_tile\n", True),
        ("processor\t: 0\nflags\t\t: fpu amx_bf16\n", True),
        ("processor\t: 0\nFeatures\t: fp asimd bf16\n", True),
        ("processor\t: 0\nflags\t\t: fpu avx2\nbugs\t\t: bf16\n", False),
        ("", False),
    ],
)
def test_a_cpu_says_whether_it_has_bfloat16(tmp_path: Path, facts: str, has: bool) -> None:
    (tmp_path / "cpuinfo").write_text(facts)
    assert models.has_bfloat16(tmp_path / "cpuinfo") is has
    assert not models.has_bfloat16(tmp_path / "none")


@pytest.mark.parametrize("able", [True, False])
def test_large_models_compute_in_bfloat16_on_cpus_that_have_it(able: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "has_bfloat16", lambda: able)
    model = models.find("bundled")
    assert models.pick_precision("auto", model, "cpu") == torch.float32
    assert models.pick_precision("bfloat16", model, "cpu") == torch.bfloat16
    monkeypatch.setattr(models, "LARGE", model.size)
    assert models.pick_precision("auto", model, "cpu") == (torch.bfloat16 if able else torch.float32)
    assert models.pick_precision("float32", model, "cpu") == torch.float32


def test_a_batch_for_which_there_is_no_memory_is_encoded_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = Clip(models.find("bundled"))
    inputs = loaded.preparer()(IMAGES)
    expected = loaded.encode(inputs)
    see, room = loaded._run, 6

    def full(part: clip.Inputs, before_last: int) -> torch.Tensor:
        if len(part["pixel_values"]) > room:
            raise torch.OutOfMemoryError
        return see(part, before_last)

    monkeypatch.setattr(loaded, "_run", full)
    torch.testing.assert_close(loaded.encode(inputs), expected, rtol=0, atol=1e-6)
    room = 0
    with pytest.raises(UserError, match="is out of memory for a single image"):
        loaded.encode(inputs)


def test_float32_is_not_cut_short_where_a_gpu_would_and_others_keep_their_choice() -> None:
    seen = []
    loaded = Clip(models.find("bundled"), "cpu", "float32")
    loaded.net.vision_model.embeddings.patch_embedding.register_forward_hook(
        lambda *_: seen.append(torch.backends.cudnn.allow_tf32)
    )
    before = torch.backends.cudnn.allow_tf32
    next(loaded.encode_images([picture(1, "photo", "cat", 0)[0]]))
    assert seen == [False]
    assert torch.backends.cudnn.allow_tf32 is before is True


def test_images_are_prepared_by_pillow_whatever_else_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    load = AutoImageProcessor.from_pretrained

    def watched(*words: Any, **named: Any) -> Any:
        asked.append(named.get("backend"))
        return load(*words, **named)

    monkeypatch.setattr(AutoImageProcessor, "from_pretrained", watched)
    Clip(models.find("bundled"), "cpu")
    assert asked == ["pil"]
