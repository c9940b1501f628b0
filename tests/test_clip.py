from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoImageProcessor, AutoTokenizer, BertConfig, BertModel, CLIPModel

from fedclip_flwr import clip
from fedclip_flwr.data.drawn import CLASSES, picture
from fedclip_flwr.errors import UserError

IMAGES = [picture(11, domain, figure, 0)[0] for domain in ("photo", "sketch") for figure in CLASSES]


def test_the_bundled_model_is_a_small_clip_without_pickles() -> None:
    files = list(clip.BUNDLED.iterdir())
    assert sum(f.stat().st_size for f in files) < 8 * 2**20
    assert {"config.json", "model.safetensors", "preprocessor_config.json", "tokenizer.json"} <= {f.name for f in files}
    assert not any(f.suffix in (".bin", ".pt", ".pkl") for f in files)
    assert json.loads((clip.BUNDLED / "config.json").read_text())["architectures"] == ["CLIPModel"]


@pytest.mark.parametrize("copied", [False, True])
def test_features_equal_transformers_own_forward_pass(copied: bool, tmp_path: Path) -> None:
    folder = shutil.copytree(clip.BUNDLED, tmp_path / "clip") if copied else clip.BUNDLED
    loaded = clip.find(str(folder) if copied else "bundled").load()
    prompts = [f"a picture of a {name}" for name in CLASSES]
    net = CLIPModel.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = net(
            **AutoImageProcessor.from_pretrained(folder)(IMAGES, return_tensors="pt"),
            **AutoTokenizer.from_pretrained(folder)(prompts, padding=True, return_tensors="pt"),
        )
    batches = list(loaded.encode_images(iter(IMAGES), batch_size=8))
    assert [len(b) for b in batches] == [8, 8, 4]
    torch.testing.assert_close(torch.cat(batches), expected.image_embeds, rtol=0, atol=1e-5)
    torch.testing.assert_close(loaded.encode_prompts(prompts), expected.text_embeds, rtol=0, atol=1e-5)
    logits = loaded.scale * torch.cat(batches) @ loaded.encode_prompts(prompts).T
    torch.testing.assert_close(logits, expected.logits_per_image, rtol=0, atol=1e-3)
    assert loaded.parameters == sum(p.numel() for p in net.parameters())


def test_a_lower_precision_finds_the_same_classes() -> None:
    prompts = [f"a picture of a {name}" for name in CLASSES]
    found = []
    for precision in ("float32", "bfloat16"):
        loaded = clip.find("bundled").load(precision=precision)
        found.append(torch.cat(list(loaded.encode_images(IMAGES))) @ loaded.encode_prompts(prompts).T)
    assert found[1].dtype == torch.float32
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0.03)
    assert not torch.equal(found[0], found[1])


def test_the_content_follows_the_weights_and_the_image_processor(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(clip.BUNDLED, tmp_path / "clip"))
    model = clip.find(str(folder))
    first = model.content(tmp_path / "memory")
    assert first == clip.find("bundled").content(tmp_path / "memory")
    settings = folder / "preprocessor_config.json"
    settings.write_text(settings.read_text().replace("0.5", "0.4"))
    second = model.content(tmp_path / "memory")
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (folder / "model.safetensors").write_bytes(weights)
    assert len({first, second, model.content(tmp_path / "memory")}) == 3


def test_a_missing_folder_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no such folder"):
        clip.find(str(tmp_path / "none"))


def test_a_folder_without_weights_is_told(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(clip.BUNDLED, tmp_path / "clip"))
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"lacks model\.safetensors; save all of it"):
        clip.find(str(folder))


def test_a_hub_id_that_is_neither_here_nor_reachable_is_told_in_one_line() -> None:
    with pytest.raises(UserError, match="some-one/some-clip") as error:
        clip.find("some-one/some-clip")
    assert len(str(error.value).splitlines()) == 1
    assert "hf download some-one/some-clip" in str(error.value)


def test_a_model_from_the_hubs_cache_is_found_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repository = tmp_path / "models--some-one--some-clip"
    shutil.copytree(clip.BUNDLED, repository / "snapshots" / "abc")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    found = clip.find("some-one/some-clip")
    assert found.folder.samefile(repository / "snapshots" / "abc")


def test_damaged_weights_are_told(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(clip.BUNDLED, tmp_path / "clip"))
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(UserError, match="can't be loaded"):
        clip.find(str(folder)).load()


def test_a_model_without_two_towers_is_told(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(clip.BUNDLED, tmp_path / "bert"))
    config = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=761)
    BertModel(config).save_pretrained(folder)
    with pytest.raises(UserError, match="a bert lacks an image tower and a text tower"):
        clip.find(str(folder)).load()


def test_devices_are_picked_by_name() -> None:
    assert clip.pick_device("cpu").type == "cpu"
    assert clip.pick_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(UserError, match="this machine has"):
        clip.pick_device("cuda:99")
