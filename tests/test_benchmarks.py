"""The benchmarks: that their commands work, and that their page is written whole or not at all."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import threading
from contextlib import nullcontext
from importlib import import_module
from pathlib import Path

import pytest
from PIL import Image

from benchmarks import lora, private_methods, real_features
from benchmarks.__main__ import BENCHMARKS, Benchmark, run
from benchmarks.scale import Measured, Parts, Setting, calculate, load, looked_up, measure, most, per_site
from deploy.relay import relayed
from fedclip_flwr.base.errors import UserError
from fedclip_flwr.base.settings import Settings
from fedclip_flwr.exchange import privacy
from fedclip_flwr.features import models
from fedclip_flwr.features.folder import FeatureFolder
from harness.features import write_features
from harness.machine import OURS, memory, processes, table
from tests import forked
from tests.extras import needs


def python(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", *words], cwd=OURS, capture_output=True, text=True)


@pytest.fixture
def scripts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two small ones: `good` prints a table, `bad` fails after a word."""
    folder = tmp_path / "benchmarks"
    folder.mkdir()
    (folder / "__init__.py").touch()
    (folder / "good.py").write_text("import sys\nprint('| a |\\n| --- |\\n| ' + sys.argv[1] + ' |')\n")
    (folder / "bad.py").write_text("print('half')\nraise SystemExit('it broke')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))


GOOD = Benchmark("good", ("7",), "A title", "A text.")


def test_the_page_has_each_table_under_its_heading_and_command(scripts: None, tmp_path: Path) -> None:
    assert run([GOOD], tmp_path / "page.md") == []
    page = (tmp_path / "page.md").read_text()
    assert page.endswith("## A title\n\nA text.\n\n`python -m benchmarks.good 7`\n\n| a |\n| --- |\n| 7 |\n")
    assert "cores, " in page.split("## A title")[0]


def test_a_page_with_a_failing_benchmark_is_left_as_it_was(
    scripts: None, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "page.md").write_text("before")
    assert run([GOOD, Benchmark("bad", (), "Bad", "."), GOOD], tmp_path / "page.md") == ["bad"]
    assert (tmp_path / "page.md").read_text() == "before"
    assert "it broke" in capfd.readouterr().err


@pytest.mark.parametrize(
    "name",
    dict.fromkeys(
        [
            *(benchmark.name for benchmark in BENCHMARKS),
            *("attacks", "attacks_on_sums", "audit_attack", "constants", "groups", "lessons", "lora"),
            *("private", "private_images", "private_methods"),
        ]
    ),
)
def test_every_benchmark_has_help_and_refuses_what_it_does_not_know(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    main = import_module(f"benchmarks.{name}").main
    for words, status in ((["--help"], 0), (["--rounds", "none", "--nonsense"], 2)):
        monkeypatch.setattr(sys, "argv", [name, *words])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == status
        printed, said = capsys.readouterr()
        assert f"usage: python -m benchmarks.{name}" in (said if status else printed)
        assert (printed if status else said) == ""


def test_a_benchmark_is_a_command() -> None:
    command = "import runpy; runpy.run_module('benchmarks.messages', run_name='__main__', alter_sys=True)"
    asked = forked.run(command, "--help")
    assert (asked.returncode, asked.stderr) == (0, "")
    assert "benchmarks.messages" in asked.stdout
    wrong = forked.run(command, "--nonsense")
    assert (wrong.returncode, wrong.stdout) == (2, "")


@pytest.mark.soak
def test_four_of_the_thousand_sites_are_measured_beside_flower_alone() -> None:
    done = python("benchmarks.many", "--nodes", "4", "--rounds", "2", "--alone-rounds", "2")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line.split(" | ") for line in done.stdout.splitlines() if line.startswith("| ")]
    assert [row[0] for row in rows[2:]] == ["| ours, gate", "| Flower and Ray alone"]
    assert all(float(row[1].removesuffix(" ms")) > 0 for row in rows[2:])


@pytest.mark.soak
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_sites_that_are_only_what_they_say_take_part_in_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDCLIP_HOME", str(tmp_path / "home"))
    found = measure(Setting(3, "scale"), 2, tmp_path)
    whole = load("scale", "float32", trains=True).bytes
    assert whole < found.messages < found.wire
    assert found.messages == pytest.approx(whole, abs=80)  # an answer's own name is not in the calculation
    assert min(found.link, found.app, found.link_memory, found.app_memory) > 0
    assert found.questions >= 2
    assert found.file == 0


@pytest.mark.parametrize("database", [False, True])
def test_flower_is_timed_with_messages_under_way(database: bool) -> None:
    assert all(seconds > 0 for seconds in looked_up(database, 20))


PARTS = Parts(question=0.003, heartbeat=0.02, under_way=1e-4, asked=1e-5)
BASE = Measured(Setting(100), 9.0, 0.05, 0.01, 4000.0, 5000.0, 2.5, 10**8, 3 * 10**8, 0)


def test_a_round_of_more_sites_is_calculated_from_a_measured_one() -> None:
    got = calculate(BASE, PARTS, lambda messages: (messages / 4, messages / 2), 300)
    assert got.wire == 300 * 5000
    assert got.network == pytest.approx(300 * 5000 / 2 * 8 / 1e9)
    assert got.idle == pytest.approx(300 * (0.003 / 3 + 0.02 / 20))
    each = 0.05 - 0.5 * 0.003 + 0.75 * 200 * 1e-4
    assert got.link == pytest.approx(300 * each)
    assert got.app == pytest.approx(3.0)
    assert (got.link_memory, got.app_memory) == (10**8 + 200 * 1000, 3 * 10**8 + 200 * 2000)
    assert (got.shortest, got.longest) == pytest.approx((300 * each, 300 * each / (1 - 0.6)))
    assert calculate(BASE, PARTS, lambda _: (0.0, 0.0), 1).longest == 3.0  # sites ask every 3 seconds
    assert calculate(BASE, PARTS, lambda _: (0.0, 0.0), 500).longest == float("inf")


def test_a_site_takes_memory_by_the_bytes_of_its_messages() -> None:
    def measured(sites: int, adapter: str, messages: float, link: int, app: int) -> Measured:
        return BASE._replace(setting=Setting(sites, adapter), messages=messages, link_memory=link, app_memory=app)

    gates = [measured(10, "gate", 100.0, 1000, 500), measured(110, "gate", 100.0, 6000, 700)]
    others = [measured(10, "attention", 300.0, 9000, 500), measured(20, "attention", 300.0, 10_000, 560)]
    a_site = per_site([*gates, *others, BASE._replace(setting=Setting(50, "attention", "int8"))])
    assert [a_site(messages) for messages in (100.0, 200.0, 300.0)] == [(50.0, 2.0), (75.0, 4.0), (100.0, 6.0)]


def test_the_largest_number_that_fits_is_found() -> None:
    assert [most(frozenset(range(to + 1)).__contains__) for to in (0, 1, 2, 1000)] == [0, 1, 2, 1000]


def test_who_only_evaluates_sends_no_adapter_back() -> None:
    trains, evaluates = (load("gate", "float32", trains) for trains in (True, False))
    assert trains.bytes - evaluates.bytes > 4 * 4612
    assert trains.calls - evaluates.calls == 2 * 9  # four tensors in two objects each, and their list


@needs("privacy")
@pytest.mark.parametrize("dp", ["central", "local"])
@pytest.mark.parametrize("epsilon", [0.5, 8.0])
def test_the_noise_of_adapters_comes_to_the_epsilon_that_is_asked_for(epsilon: float, dp: str) -> None:
    settings = Settings(dp=dp, noise_multiplier=private_methods.multiplier_for(epsilon, dp, 20))
    spent = privacy.spent(settings, [20])
    assert spent is not None
    assert 0.999 * epsilon < spent <= epsilon


@needs("privacy")
def test_one_table_has_every_method_at_the_same_epsilons_and_what_it_hides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_features(tmp_path / "features", {"art": 60, "sketch": 60})
    words = f"--data features:{data} --sites 3 --seeds 1 --staying 3 --epsilons 1,8 --rounds 2 --methods"
    monkeypatch.setattr(sys, "argv", ["x", *words.split(), "gradient", "span", "gate"])
    said = private_methods.main()
    rows = [line[2:-2].split(" | ") for line in capsys.readouterr().out.splitlines()]
    assert rows[0] == ["method", "hides", "noise", "none", "ε = 1", "ε = 8"]
    places = {"an image": ["central", "shares", "local"], "a site": ["central", "local"]}
    methods = {"gradient": "an image", "span": "an image", "gate": "a site"}
    expected = [[method, unit, place] for method, unit in methods.items() for place in places[unit]]
    assert [row[:3] for row in rows[2:]] == expected
    assert [bool(row[3]) for row in rows[2:]] == [place == "central" for _, _, place in expected]
    assert {row[4] for row in rows[2:] if row[0] == "span"} == {"+0.0 / +0.0 (+0.0)"}  # noise hides all of few images
    assert "Don't compare rows that hide an image with rows that hide a site" in said
    assert "adapters: 2 rounds, 1 seed from 0, noise multipliers central " in said


@needs("lora")
def test_lora_is_measured_beside_a_whole_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["x", "--quick"])
    monkeypatch.setattr(lora, "workplace", lambda: nullcontext(tmp_path))
    monkeypatch.setattr(lora, "peak_of", lora.peak)  # without processes of their own
    monkeypatch.setattr(models, "has_bfloat16", lambda: False)
    assert lora.main().startswith("1 turns, ")
    printed = capsys.readouterr().out
    rows = {row[0]: row[1:] for line in printed.splitlines() if (row := line[2:-2].split(" | ")) and len(row) > 1}
    assert [*rows][2:] == [*lora.VARIANTS]
    sent = {name: rows[name][5] for name in lora.VARIANTS}
    assert sent[lora.ALL] == sent["text"] == "35.8 kB"  # 5 layers with 4 + 2 of B's 16 × 8 and 32 × 8, there and back
    assert sent["both"] == "71.7 kB"
    assert (rows[lora.ALL][6], rows[lora.STORED][6], rows["text"][6]) == ("151 kB", "3.2 kB", "2.05 kB")
    assert "float32: a step with last:4 takes " in printed


def test_a_table_is_markdown() -> None:
    assert table(["a", "b"], [["1", "2"]]) == "| a | b |\n| --- | --- |\n| 1 | 2 |"


def test_the_relay_passes_on_and_counts_both_directions() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            connection, _ = server.accept()
            with connection:
                assert connection.recv(100) == b"hello"
                connection.sendall(b"hi")

        thread = threading.Thread(target=answer)
        thread.start()
        with relayed(server.getsockname()[1]) as relay:
            with socket.create_connection(("127.0.0.1", relay.port)) as client:
                client.sendall(b"hello")
                assert client.makefile("rb").read() == b"hi"
            assert relay.bytes == len(b"hello") + len(b"hi")
        thread.join()


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_processes_are_found_by_command_and_environment(tmp_path: Path) -> None:
    command = [str(tmp_path / "python-of-a-test"), "-c", "print(flush=True); input()"]
    Path(command[0]).symlink_to(sys.executable)
    mark = f"MARK={tmp_path}"
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, env={"MARK": str(tmp_path)}) as process:
        assert process.stdout is not None
        process.stdout.readline()  # the kernel fills in a command line only after the call that starts it has returned
        assert processes("python-of-a-test", mark) == [process.pid]
        assert processes("python-of-a-test", "MARK=other") == []
        assert memory(process.pid, "VmHWM") >= memory(process.pid, "VmRSS") // 2 > 0
        process.communicate(b"\n")
    assert memory(process.pid, "VmRSS") == 0


RELEASED = {
    "methods/fed_at_clip.py": """
import torch
from torch.nn.functional import cross_entropy
from utils.clip_util import get_text_features_list


def features(model, images):
    images = model.model.encode_image(images).float()
    images = model.img_adap(images) * images
    return images / images.norm(dim=1, keepdim=True)


def train(args, model, loader, optimizer, device):
    for images, texts, _ in loader:
        if len(texts) > 1:
            logits = model.model.logit_scale.exp() * features(model, images) @ model.model.encode_text(texts).T
            own = torch.arange(len(texts))
            loss = (cross_entropy(logits, own) + cross_entropy(logits.T, own)) / 2
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


@torch.no_grad()
def test(args, model, loader, device):
    text = get_text_features_list(model.labels, model.model)
    found = [((features(model, x) @ text.T).argmax(1) == y) for x, _, y in loader]
    return float(torch.cat(found).float().mean())


@torch.no_grad()
def communication(args, server, models, weights):
    apart = args.test_envs
    for name, mean in server.img_adap.state_dict().items():
        own = [(w, m.img_adap.state_dict()[name]) for n, (w, m) in enumerate(zip(weights, models)) if n not in apart]
        mean.copy_(sum(weight * tensor for weight, tensor in own))
        for _, tensor in own:
            tensor.copy_(mean)
    return server, models
""",
    "nets/models.py": """
import clip
from torch import nn


class ClipModelat:
    def __init__(self, name, device):
        self.model, _ = clip.load(name, device=device)

    def initdgatal(self, loader):
        dim = loader[0][0].shape[1]
        self.img_adap = nn.Sequential(nn.Linear(dim, dim), nn.Tanh(), nn.Linear(dim, dim), nn.Softmax(dim=1))

    def setselflabel(self, labels):
        self.labels = labels
""",
    "utils/clip_util.py": """
import clip
import torch


def get_text_features_list(texts, model, device="cuda", train=False):
    return model.encode_text(torch.cat([clip.tokenize(text) for text in texts]).to(device))
""",
}
"""Functions of the released code's names, written anew after what they do."""


def test_the_papers_recipe_is_held_beside_functions_like_those_that_were_released(tmp_path: Path) -> None:
    for name, text in RELEASED.items():
        (tmp_path / "fedclip" / name).parent.mkdir(parents=True)
        (tmp_path / "fedclip" / name).write_text(text)
    command = "import runpy; runpy.run_module('benchmarks.released', run_name='__main__', alter_sys=True)"
    done = forked.run(command, "--code", str(tmp_path), "--images", "240", "--rounds", "1,2", "--lengths", "10,varying")
    assert done.returncode == 0, done.stderr
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines() if "|" in line][2:]
    compared = [row for row in rows if len(row) == 7]
    assert [row[:3] for row in compared] == [
        [length, sites, rounds]
        for length in ("10", "varying")
        for sites in ("72, 72", "36, 36, 72")
        for rounds in ("1", "2")
    ]
    assert all(float(row[3]) <= 1e-6 and row[5] == "0.00" for row in compared)
    assert [row[6] for row in compared] == ["", "yes"] * 4
    lacking = forked.run(command, "--code", str(tmp_path / "nowhere"))
    assert (lacking.returncode, lacking.stdout) == (1, "")
    assert "there is no fedclip/methods/fed_at_clip.py: name a checkout of it" in lacking.stderr


def test_features_of_real_images_are_made_from_folders_of_two_data_sets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, classes in (("caltech", (*real_features.CALTECH, "Faces")), ("cifar", real_features.CIFAR)):
        for number, figure in enumerate(classes):
            (tmp_path / name / figure).mkdir(parents=True)
            for shade in range(6):
                place = tmp_path / name / figure / f"{shade}.png"
                Image.new("RGB", (32, 32), (number * 5, shade * 40, len(name))).save(place)
    places = [f"--{name}=folder:{tmp_path / name}" for name in ("caltech", "cifar")]
    monkeypatch.setattr(sys, "argv", ["x", *places, "--model=bundled", "--each=5", f"--out={tmp_path / 'out'}"])
    monkeypatch.setenv("FEDCLIP_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(real_features, "workplace", lambda: nullcontext(tmp_path))
    real_features.main()
    assert "250 images in 49 classes: caltech 200, cifar 50" in capsys.readouterr().out
    made = FeatureFolder(tmp_path / "out")
    names = made.vocabulary.class_names
    assert {"leopard", "airplane", "car (automobile)", "stop sign"} < {*names}
    assert "Faces" not in names
    assert made.vocabulary.templates == ("a {}",)
    assert not made.has_unit_length(made.domains)
    shutil.rmtree(tmp_path / "cifar" / "ship")
    shutil.rmtree(tmp_path / "images")
    with pytest.raises(UserError, match=r"--cifar folder:.*: it has no class for ship"):
        real_features.main()
