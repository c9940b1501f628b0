from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, CLIPModel

from fedclip_flwr.base.errors import UserError
from fedclip_flwr.base.settings import Settings
from fedclip_flwr.data.folder import ImageFolder
from fedclip_flwr.data.vocabulary import Vocabulary
from fedclip_flwr.features import lora, models
from fedclip_flwr.features.base import Features
from fedclip_flwr.features.clip import Clip
from fedclip_flwr.features.encoded import Pixels
from fedclip_flwr.features.folder import FeatureFolder
from fedclip_flwr.features.opening import open_features
from fedclip_flwr.learning.base import Examples
from fedclip_flwr.runs.opening import open_run
from tests import forked
from tests.extras import needs

OPEN = """
import sys
from pathlib import Path
from fedclip_flwr.features import clip
from fedclip_flwr.base import content
from fedclip_flwr.features import opening
from fedclip_flwr.base.settings import Settings
opened = opening.open_features(Settings(data=f"folder:{sys.argv[1]}"), root=Path(sys.argv[2]), progress=False)
"""


def opened(tree: Path, **settings: Any) -> Features:
    return open_features(Settings(data=f"folder:{tree}", **settings), root=tree / "store", progress=False)


def python(script: str, tree: Path) -> forked.Python:
    return forked.Python(OPEN + script, str(tree), str(tree / "store"))


@pytest.fixture
def truth(tree: Path) -> Examples:
    """The photos' features by transformers' own forward pass, and their labels."""
    pictures = list(ImageFolder(tree).pictures("photo"))
    net = CLIPModel.from_pretrained(models.BUNDLED, dtype=torch.float32).eval()
    processor = AutoImageProcessor.from_pretrained(models.BUNDLED)
    with torch.no_grad():
        pixels = processor([picture.image for picture in pictures], return_tensors="pt")
        features = net.get_image_features(**pixels).pooler_output
    return Examples(features, torch.tensor([picture.label for picture in pictures]))


def assert_right(found: Examples, truth: Examples) -> None:
    torch.testing.assert_close(found.features, truth.features, rtol=0, atol=1e-5)
    assert torch.equal(found.labels, truth.labels)


@pytest.fixture
def no_encoding(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Called once all is stored: from then on, loading a model fails the test."""
    return lambda: monkeypatch.setattr(Clip, "__init__", lambda *_: pytest.fail("encoded again"))


def test_features_are_right_and_encoded_once(tree: Path, truth: Examples, no_encoding: Callable[[], None]) -> None:
    first = opened(tree)
    assert_right(first.examples("photo"), truth)
    text = first.classes.text
    no_encoding()
    again = opened(tree)
    assert_right(again.examples("photo"), truth)
    assert torch.equal(again.classes.text, text)
    assert again.classes.scale == first.classes.scale
    assert again.parameters == first.parameters


def test_another_prompt_encodes_no_image_again(tree: Path, no_encoding: Callable[[], None]) -> None:
    opened(tree).examples("photo")
    one, other = opened(tree).classes.text, opened(tree, prompt="a sketch of a {}").classes.text
    assert not torch.allclose(one, other, atol=1e-3)
    no_encoding()
    opened(tree, prompt="a sketch of a {}").examples("photo")


def test_other_images_or_precision_are_other_features(tree: Path, truth: Examples) -> None:
    opened(tree).examples("photo")
    lower = opened(tree, precision="bfloat16").examples("photo")
    assert not torch.equal(lower.features, truth.features)
    (tree / "photo" / "cat" / "0.png").unlink()
    assert len(opened(tree).examples("photo").labels) == len(truth.labels) - 1


def entry_of(tree: Path) -> Path:
    (path,) = (tree / "store").glob("*/given-*.safetensors")
    return path


def test_features_that_an_earlier_version_brought_to_unit_length_are_encoded_once_more_with_a_word(
    tree: Path, truth: Examples, caplog: pytest.LogCaptureFixture
) -> None:
    opened(tree).examples("photo")
    older = entry_of(tree).with_name(entry_of(tree).name.replace("given-", "images-"))
    entry_of(tree).rename(older)
    assert_right(opened(tree).examples("photo"), truth)
    assert "photo: features stored by an earlier version have unit length: encoding them again" in caplog.text
    caplog.clear()
    assert_right(opened(tree).examples("photo"), truth)
    assert "earlier version" not in caplog.text
    assert not opened(tree).has_unit_length()
    assert older.exists()  # that version may still be in use; what nobody uses is removed in time


@pytest.mark.parametrize("where", [0, 8, 20, 60, 120, 200, -5000, -1])
def test_a_flipped_byte_is_noticed_and_mended(
    tree: Path, truth: Examples, where: int, caplog: pytest.LogCaptureFixture
) -> None:
    opened(tree).examples("photo")
    whole = bytearray(entry_of(tree).read_bytes())
    whole[where] ^= 1
    entry_of(tree).write_bytes(whole)
    assert_right(opened(tree).examples("photo"), truth)
    assert "corrupt and will be made again" in caplog.text
    caplog.clear()
    assert_right(opened(tree).examples("photo"), truth)
    assert not caplog.text


@pytest.mark.parametrize("size", [0, 5, 1000])
def test_a_truncated_entry_is_mended(tree: Path, truth: Examples, size: int) -> None:
    opened(tree).examples("photo")
    entry_of(tree).write_bytes(entry_of(tree).read_bytes()[:size])
    assert_right(opened(tree).examples("photo"), truth)


KILLED = """
import os, signal
from fedclip_flwr.base import tensorfile
save = tensorfile.save
def half(tensors, path, facts):
    save(tensors, path, facts)
    os.truncate(path, os.path.getsize(path) // 2)
    os.kill(os.getpid(), signal.SIGKILL)
tensorfile.save = half
opened.classes
"""


def test_a_writer_that_is_killed_leaves_nothing_behind(tree: Path) -> None:
    process = python(KILLED, tree)
    process.communicate()
    assert process.returncode == -9
    (folder,) = (tree / "store").glob("*-float32")
    assert any(f.name.startswith(".classes-") for f in folder.iterdir())
    assert opened(tree).classes.text.shape == (3, 128)
    assert not any(f.name.startswith(".") for f in folder.iterdir())


ONE_OF_MANY = """
import os
from safetensors.torch import save_file
encode = clip.Clip.encode
def announced(self, inputs):
    print("encoding", flush=True)
    return encode(self, inputs)
clip.Clip.encode = announced
print("ready", flush=True)
sys.stdin.readline()
examples = opened.examples("photo")
save_file({"features": examples.features, "labels": examples.labels}, sys.argv[1] + f"/{os.getpid()}")
"""


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.soak)])
def test_processes_at_once_get_the_right_features_and_encode_once(tree: Path, truth: Examples, count: int) -> None:
    processes = [python(ONE_OF_MANY, tree) for _ in range(count)]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    output = "".join(process.communicate()[0] for process in processes)
    assert [process.returncode for process in processes] == [0] * count
    assert output == "encoding\n"
    for process in processes:
        found = load_file(tree / str(process.pid))
        assert_right(Examples(found["features"], found["labels"]), truth)


WARM_ROUND = """
from fedclip_flwr.learning.adapters import make_adapter
from fedclip_flwr.learning.recipes import RECIPES
from fedclip_flwr.learning.training import evaluate
from fedclip_flwr.learning.training import train
examples, classes = opened.examples("photo").ready(), opened.classes.ready()
adapter = make_adapter("attention", classes.text.shape[1])
train(adapter, examples, classes, RECIPES["default"], learning_rate=1e-3)
evaluate(adapter, examples, classes)
heavy = {"transformers", "datasets", "flwr", "torch._dynamo", "sklearn", "matplotlib"}
print(sorted(heavy & set(sys.modules)))
"""


def test_a_warm_round_imports_nothing_heavy(tree: Path) -> None:
    opened(tree).examples("photo")
    assert len(opened(tree).classes.text) == 3
    command = [sys.executable, "-c", OPEN + WARM_ROUND, str(tree), str(tree / "store")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr


def test_a_store_that_cannot_be_written_is_reported(tree: Path) -> None:
    (tree / "store").write_text("a file where a folder should be")
    with pytest.raises(UserError, match="FEDCLIP_HOME"):
        opened(tree).examples("photo")


NO_ROOM = """
import resource
from fedclip_flwr.base.errors import UserError
resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
try:
    opened.examples("photo")
except UserError as error:
    print(error)
"""


def test_a_file_that_finds_no_room_is_reported_and_is_no_entry(tree: Path, truth: Examples) -> None:
    output, errors = python(NO_ROOM, tree).communicate()
    assert "File too large" in output, errors
    assert "make room there" in output
    assert not list((tree / "store").glob("*/*.safetensors"))
    assert_right(opened(tree).examples("photo"), truth)


def test_stored_features_are_mapped_not_copied(tree: Path) -> None:
    opened(tree).examples("photo")
    examples = opened(tree).examples("photo")
    maps = Path("/proc/self/maps").read_text()
    assert entry_of(tree).name in maps
    del examples


def write_folder(root: Path, dtype: torch.dtype = torch.float16, **changed: Any) -> Path:
    """A small feature folder made by hand, as another program would."""
    facts = {
        "model": "other/clip",
        "embedding_dim": 3,
        "logit_scale": 50.0,
        "prompt": "a {}",
        "class_names": ["cat", "dog"],
        "domains": ["b", "a"],
    }
    root.mkdir(exist_ok=True)
    facts = {k: v for k, v in (facts | changed).items() if v is not None}
    (root / "features.json").write_text(json.dumps(facts))
    save_file({"text_features": torch.eye(2, 3, dtype=torch.float32)}, root / "classes.safetensors")
    for domain in ("a", "b"):
        tensors = {"image_features": torch.full((4, 3), 0.5, dtype=dtype), "labels": torch.tensor([0, 1, 1, 0])}
        save_file(tensors, root / f"{domain}.safetensors")
    return root


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_feature_folder_is_read_as_it_is(tmp_path: Path, dtype: torch.dtype) -> None:
    write_folder(tmp_path, dtype, logit_bias=-2.0, parameters=151_277_313)
    features = open_features(Settings(data=f"features:{tmp_path}"))
    assert features.vocabulary == (("cat", "dog"), ("a {}",))
    assert features.domains == ("a", "b")
    assert (features.classes.scale, features.classes.bias, features.parameters) == (50.0, -2.0, 151_277_313)
    ready = features.examples("a").ready()
    torch.testing.assert_close(ready.features, features.examples("a").features.float())
    assert ready.labels.tolist() == [0, 1, 1, 0]


def test_a_feature_folder_names_its_model(tmp_path: Path) -> None:
    data = f"features:{write_folder(tmp_path)}"
    open_features(Settings(data=data, model="other/clip", prompt="a {}"))
    for wrong in (
        Settings(data=data, model="another/clip"),
        Settings(data=data, prompt="the {}"),
        Settings(data=data, class_names="a,b"),
    ):
        with pytest.raises(UserError, match="leave it out"):
            open_features(wrong)


def test_a_site_with_features_has_the_runs_classes_in_its_own_order(tmp_path: Path) -> None:
    write_folder(tmp_path)
    settings = Settings(data=f"features:{tmp_path}", class_names="dog,cat", prompt="a {}")
    own = open_features(settings, Vocabulary(("dog", "cat"), ("a {}",)))
    assert own.examples("a").labels.tolist() == [1, 0, 0, 1]
    assert own.classes.text.tolist() == [[0, 1, 0], [1, 0, 0]]
    for names, prompts, expected in (
        (("cat", "dog", "emu"), ("a {}",), "have no prompts for the run's emu"),
        (("cat", "emu"), ("a {}",), "classes that the run does not know: dog"),
        (("cat", "dog"), ("a {}", "the {}"), r"made with the prompt 'a {}'; the run's is 'a {}|the {}'"),
    ):
        with pytest.raises(UserError, match=re.escape(expected)):
            open_features(settings, Vocabulary(names, prompts))


def test_images_are_not_encoded_for_prompts_that_are_given_in_a_word(tree: Path) -> None:
    with pytest.raises(UserError, match="prompt = 'those of a list': expected a template with one"):
        open_features(Settings(data=f"folder:{tree}"), Vocabulary(("car", "cat", "fish"), ("those of a list",)))


def test_classes_that_differ_only_in_their_spelling_are_refused(tree: Path) -> None:
    (tree / "photo" / "cat").rename(tree / "photo" / "Cat")
    with pytest.raises(UserError, match="'Cat' and 'cat' would be two classes"):
        opened(tree)
    assert opened(tree, class_names="kitten,auto,tom,trout").vocabulary.class_names[2] == "tom"


def test_several_prompts_are_averaged(tree: Path) -> None:
    one, other = (opened(tree, prompt=prompt).classes.text for prompt in ("a {}", "the {}"))
    both = opened(tree, prompt="a {}|the {}").classes.text
    torch.testing.assert_close(both, torch.nn.functional.normalize(one + other, dim=-1))


def test_the_same_prompts_are_other_classes_with_another_number_of_templates(tree: Path) -> None:
    """Three classes with two templates each, and six classes with one: the same six texts in the same order."""
    three = opened(tree, prompt="a {}|{}")
    six = opened(tree, prompt="{}", class_names="a car,a cat,a fish,car,cat,fish")
    assert three.vocabulary.prompts == six.vocabulary.prompts
    assert (len(three.classes.text), len(six.classes.text)) == (3, 6)


def test_other_class_names_number_the_stored_labels_anew(tree: Path, no_encoding: Callable[[], None]) -> None:
    opened(tree).examples("photo")
    assert len(opened(tree, class_names="fish,car,emu,cat").classes.text) == 4
    no_encoding()
    again = opened(tree, class_names="fish,car,emu,cat")
    assert again.vocabulary.class_names == ("fish", "car", "emu", "cat")
    assert again.examples("photo").labels.tolist() == [1] * 4 + [3] * 4 + [0] * 4


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"class_names": None}, "lacks 'class_names'"),
        ({"embedding_dim": "many"}, "is invalid"),
        ({"class_names": ["cat"]}, "expected at least two names, each once, found cat"),
        ({"domains": []}, "must list at least one domain, each once"),
        ({"domains": ["a", "a"]}, "must list at least one domain, each once"),
        ({"logit_scale": float("nan")}, "the logit_scale nan"),
        ({"domains": ["../a"]}, "not a plain file name"),
        ({"domains": [""]}, "a domain is called ''"),
        ({"domains": ["a\0b"]}, "a domain is called"),
        ({"domains": "ab"}, "is invalid .domains is not a list"),
        ({"class_names": "cat"}, "is invalid .class_names is not a list"),
        ({"class_names": ["cat", "cat"]}, "expected at least two names, each once, found cat, cat"),
        ({"class_names": ["cat", "\x1b[2J"]}, "a class is called"),
        ({"class_names": ["cat", "\ud800"]}, "a class is called"),
        ({"logit_scale": 10**400}, "is invalid"),
        ({"logit_scale": 1e300}, "the logit_scale 1e.300"),
        ({"logit_scale": 0.0}, "expected a scale above 0"),
        ({"embedding_dim": float("inf")}, "is invalid"),
    ],
)
def test_a_damaged_feature_folder_is_reported(tmp_path: Path, changed: dict[str, Any], expected: str) -> None:
    write_folder(tmp_path, **changed)
    with pytest.raises(UserError, match=expected):
        FeatureFolder(tmp_path)


def test_a_feature_folder_that_names_a_domain_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="must list at least one domain, each once"):
        open_features(Settings(data=f"features:{write_folder(tmp_path, domains=['a', 'a'])}"))


def test_a_missing_or_broken_json_is_reported(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="can't be read"):
        FeatureFolder(tmp_path)
    for text in ("{", "[]", "\udcff", "[" * 10**5):
        (tmp_path / "features.json").write_bytes(os.fsencode(text))
        with pytest.raises(UserError, match="is invalid"):
            FeatureFolder(tmp_path)


@pytest.mark.parametrize(
    ("tensors", "expected"),
    [
        ({"labels": torch.zeros(4, dtype=torch.int64)}, "holds no image_features"),
        ({"image_features": torch.ones(4, 2)}, r"shape \(4, 2\), expected \('N', 3\)"),
        ({"image_features": torch.full((4, 3), float("nan"))}, "finite numbers"),
        ({"image_features": torch.ones(4, 3), "labels": torch.zeros(3, dtype=torch.int64)}, "shape"),
        ({"image_features": torch.ones(4, 3), "labels": torch.zeros(4)}, "whole numbers"),
        ({"image_features": torch.ones(4, 3), "labels": torch.zeros(4, dtype=torch.uint16)}, "whole numbers"),
        ({"image_features": torch.ones(4, 3), "labels": torch.zeros(4, dtype=torch.bool)}, "whole numbers"),
        ({"image_features": torch.ones(4, 3).to(torch.float8_e5m2)}, "finite numbers"),
        ({"image_features": torch.ones(4, 3), "labels": torch.tensor([0, 1, 2, 0])}, "labels must lie in 0…1"),
        (None, "can't be read"),
    ],
)
def test_bad_tensors_of_a_feature_folder_are_reported(
    tmp_path: Path, tensors: dict[str, torch.Tensor] | None, expected: str
) -> None:
    path = write_folder(tmp_path) / "a.safetensors"
    if tensors is None:
        path.write_bytes(b"not a tensor")
    else:
        save_file(tensors, path)
    with pytest.raises(UserError, match=expected):
        FeatureFolder(tmp_path).examples("a")


@pytest.mark.parametrize("name", ["features.json", "classes.safetensors", "a.safetensors"])
def test_a_pipe_in_a_feature_folder_is_not_waited_for(tmp_path: Path, name: str) -> None:
    (write_folder(tmp_path) / name).unlink()
    os.mkfifo(tmp_path / name)

    def opened_whole() -> None:
        folder = FeatureFolder(tmp_path)
        assert folder.classes.dim == 3
        folder.examples("a")

    with pytest.raises(UserError, match=f"{name} can't be read"):
        opened_whole()


def test_pixels_are_stored_once_in_the_order_of_the_features(tree: Path, no_encoding: Callable[[], None]) -> None:
    (tree / "photo" / "cat" / "0.png").write_bytes(b"nothing")
    whole = opened(tree, method="full-model")
    assert isinstance(whole, Pixels)
    pixels, features = whole.examples("photo"), opened(tree).examples("photo")
    assert pixels.features.shape == (11, 3, 64, 64)
    assert torch.equal(pixels.labels, features.labels)
    seen = whole.whole_model()(pixels.features).detach()
    torch.testing.assert_close(seen, torch.nn.functional.normalize(features.features), rtol=0, atol=1e-5)
    no_encoding()
    assert torch.equal(opened(tree, method="full-model").examples("photo").features, pixels.features)


def test_a_full_model_computes_in_the_requested_precision_and_keeps_float32_weights(tree: Path) -> None:
    features = [opened(tree, method="full-model", precision=precision) for precision in ("float32", "bfloat16")]
    full, half = (of.whole_model() for of in features if isinstance(of, Pixels))
    for name, tensor in full.state_dict().items():
        assert torch.equal(half.state_dict()[name], tensor)
        assert tensor.dtype == torch.float32
    pixels = features[0].examples("photo").features
    assert half(pixels).dtype == torch.float32
    torch.testing.assert_close(half(pixels), full(pixels), rtol=0, atol=0.03)
    assert not torch.equal(half(pixels), full(pixels))


def test_a_domain_without_a_readable_image_has_no_pixels(tree: Path) -> None:
    for file in (tree / "photo").rglob("*.png"):
        file.write_bytes(b"nothing")
    assert opened(tree, method="full-model").examples("photo").features.shape == (0, 3, 64, 64)


def test_the_full_model_needs_images(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"needs images, but .* has only features"):
        open_features(Settings(data=f"features:{write_folder(tmp_path)}", method="full-model"))


def test_the_content_of_features_follows_all_that_they_are_made_of(tree: Path, tmp_path: Path) -> None:
    first = opened(tree).content
    assert opened(tree).content == first
    others = [
        opened(tree, **how).content
        for how in ({"prompt": "the {}"}, {"class_names": "a,b,c"}, {"method": "full-model"})
    ]
    (tree / "photo" / "cat" / "0.png").unlink()
    folder = write_folder(tmp_path / "folder")
    settings = Settings(data=f"features:{folder}")
    others += [opened(tree).content, open_features(settings).content]
    save_file({"image_features": torch.ones(1, 3), "labels": torch.tensor([0])}, folder / "b.safetensors")
    assert len({first, *others, open_features(settings).content}) == 7


def test_the_content_of_features_follows_the_numbers_of_the_classes(tree: Path) -> None:
    """With the same images in the same folders; `cat` is once the first folder's class, once the second's."""
    own = opened(tree, class_names="cat,car,fish")
    first, before = own.examples("photo").labels[0].item(), own.content
    for domain in own.domains:
        for number, name in enumerate(("car", "cat", "fish")):
            (tree / domain / name).rename(tree / domain / f"class {number}")
    other = opened(tree, class_names="cat,car,fish")
    assert own.vocabulary == other.vocabulary
    assert (first, other.examples("photo").labels[0].item()) == (1, 0)
    assert before != other.content


def test_what_is_opened_twice_is_read_once_and_broken_images_are_reported_once(
    tree: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tree / "photo" / "car" / "0.png").write_bytes(b"no picture")
    features = opened(tree)
    assert features.examples("photo").features is features.examples("photo").features
    assert caplog.text.count("can't be read") == 1


def test_a_run_is_opened_with_its_holdout(tree: Path) -> None:
    settings, features, holdout = open_run({"data": f"folder:{tree}", "seed": 3})
    assert (settings.seed, features.domains, holdout) == (3, ("cartoon", "photo"), "photo")


def test_all_that_is_wrong_with_a_run_is_reported_at_once(tree: Path) -> None:
    wrong = {"data": f"folder:{tree}", "holdout": "moon", "device": "cuda:77", "adapter": "attn"}
    with pytest.raises(UserError) as error:
        open_run(wrong, {"x": "x: expected key=value"})
    first, *others = str(error.value).splitlines()
    assert first.startswith("4 of the settings")
    assert [line.split()[0].rstrip(":") for line in others] == ["x", "adapter", "device", "holdout"]


@needs("lora")
@pytest.mark.parametrize(
    ("wrong", "expected"),
    [
        ({"lora-layers": "last:5"}, "lora-layers = 'last:5': the vision tower has only 4 layers"),
        ({"lora-targets": "both", "lora-rank": 129}, "lora-rank = 129: q_proj of the vision tower allows at most 128"),
        ({"lora-targets": "text", "lora-modules": "fc1, fc3"}, "lora-modules: a layer of the text tower has no 'fc3'"),
    ],
)
def test_lora_that_does_not_fit_the_model_is_reported_before_anything_is_encoded(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: dict[str, Any], expected: str
) -> None:
    monkeypatch.setenv("FEDCLIP_HOME", str(tmp_path / "home"))
    with pytest.raises(UserError) as error:
        open_run({"data": f"folder:{tree}", "method": "lora", "holdout": "moon", **wrong})
    first, *others = str(error.value).splitlines()
    assert first.startswith("2 of the settings")
    assert expected in " ".join(others)
    assert not list((tmp_path / "home").glob("features/**/*.safetensors"))


def test_lora_without_peft_is_reported_before_a_run(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lora, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"method = 'lora' needs peft: pip install 'fedclip-flwr\[lora\]'"):
        open_run({"data": f"folder:{tree}", "method": "lora"})


def test_a_wrong_model_is_reported_beside_a_wrong_data_setting(tree: Path) -> None:
    with pytest.raises(UserError, match=r"(?s)2 of the settings.*data.*model"):
        open_run({"data": "folder:here", "model": "/no/model"})


def test_three_classes_of_a_feature_folder_have_the_runs_numbers(tmp_path: Path) -> None:
    """Moved on by one, not only exchanged: the two ways of numbering are then different ones."""
    write_folder(tmp_path, class_names=["cat", "dog", "emu"])
    save_file({"text_features": torch.eye(3)}, tmp_path / "classes.safetensors")
    tensors = {"image_features": torch.eye(3), "labels": torch.tensor([0, 1, 2])}
    for domain in ("a", "b"):
        save_file(tensors, tmp_path / f"{domain}.safetensors")
    own = open_features(Settings(data=f"features:{tmp_path}"), Vocabulary(("emu", "cat", "dog"), ("a {}",)))
    assert own.examples("a").labels.tolist() == [1, 2, 0]
    assert own.classes.text.tolist() == [[0, 0, 1], [1, 0, 0], [0, 1, 0]]
