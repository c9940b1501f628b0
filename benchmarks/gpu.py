"""A GPU beside the CPU of its machine: encoding, learning, whole models, predictions, ONNX and real sites.

    python -m benchmarks.gpu [--images DIR] [--only STEP...] [--quick] [--log FILE] [--seconds 600]

All models but the bundled one have random weights: times are the same, and so is how far features are apart. Images are
those of a folder, or drawn ones, in turn until there are enough. A step that fails costs its own tables only: its trace
is in the log. `--quick` has few images and rows, and takes the CPU where there is no GPU. No step is begun after so
many `--seconds`.
"""

from __future__ import annotations

import argparse
import itertools
import os
import subprocess
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from benchmarks.common import at_least, middle, nothing, run_app, workplace
from benchmarks.encoding import write_images, write_model
from benchmarks.predicting import TEMPLATES, Bare, made
from deploy.processes import superlink, supernode
from fedclip_flwr.base import Settings
from fedclip_flwr.base.growing import Growing
from fedclip_flwr.data import drawn
from fedclip_flwr.data.files import Files, find_images
from fedclip_flwr.experiments.simulate import Result, make_sites, simulate
from fedclip_flwr.features import Clip, ahead, clip, encoding, models, open_features
from fedclip_flwr.features.whole import WholeModel
from fedclip_flwr.learning import RECIPES, Classes, Examples, evaluate, make_adapter, train
from fedclip_flwr.operations import simulation
from harness.machine import OURS, machine, table

SITES = 3
LARGE: dict[str, Any] = {
    "text_config": {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_attention_heads": 12,
        "num_hidden_layers": 12,
        "projection_dim": 768,
    },
    "vision_config": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
        "patch_size": 14,
        "projection_dim": 768,
    },
    "projection_dim": 768,
}
"""Of ViT-L/14."""
Told = list[tuple[str, str]]
"""What a step comes to, for the summary."""


@dataclass(frozen=True)
class Bench:
    """Where all is done, and with how much."""

    root: Path
    device: str
    quick: bool
    folder: str

    def many(self, number: int, few: int) -> int:
        return few if self.quick else number

    @cached_property
    def paths(self) -> list[str]:
        """The images there are."""
        if self.folder:
            return find_images([self.folder])
        write_images(self.root / "drawn")
        return find_images([str(self.root / "drawn")])

    def files(self, count: int) -> list[str]:
        return list(itertools.islice(itertools.cycle(self.paths), count))

    @cached_property
    def base(self) -> models.Model:
        return self._model("base", {"text_config": {}, "vision_config": {}})

    @cached_property
    def large(self) -> models.Model:
        return self._model("large", LARGE)

    def _model(self, name: str, config: Mapping[str, Any]) -> models.Model:
        layers = {"num_hidden_layers": 1} if self.quick else {}
        towers = {part: {**config[part], **layers} for part in ("text_config", "vision_config")}
        return write_model(self.root / name, **{**config, **towers})

    def seconds(self, work: Callable[[], object], times: int = 1) -> float:
        """The median, to the end of what the GPU does."""
        found = []
        for _ in range(times):
            self.wait()
            begun = time.perf_counter()
            work()
            self.wait()
            found.append(time.perf_counter() - begun)
        return median(found)

    def wait(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    def free(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def show(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    print(table(head, rows) + "\n", flush=True)


def environment(bench: Bench) -> Told:
    """The machine, and what `fedclip doctor` finds."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    print(f"{name}, CUDA {torch.version.cuda}; {machine()}\n")
    first = bench.seconds(lambda: torch.ones(8, device=bench.device).sum().item())
    done = subprocess.run(
        ["fedclip", "doctor"], env=simulation.commands_found(os.environ), capture_output=True, text=True, timeout=120
    )
    print(f"```\n{(done.stdout + done.stderr).strip()}\n```\n", flush=True)
    return [("doctor's exit status", str(done.returncode)), (f"the first sum on {bench.device}", f"{first:.2f} s")]


# Encoding


@contextmanager
def so_many_workers(count: int | None) -> Iterator[list[int]]:
    """Meanwhile images are prepared by so many processes, or as many as are thought to pay; these are noted."""
    known, noted = ahead.workers, list[int]()

    def workers(preparing: float, encoding: float, remaining: int) -> int:
        noted.append(known(preparing, encoding, remaining) if count is None else min(count, remaining))
        return noted[-1]

    ahead.workers = workers
    try:
        yield noted
    finally:
        ahead.workers = known


def from_files(bench: Bench, loaded: clip.Clip, count: int, workers: int | None) -> tuple[float, int]:
    """Images a second from files to the finished entry, and how many processes prepared them."""
    work = ahead.Work(Files(bench.files(count)), "files", loaded.preparer(), loaded.batch_size)
    pinned = loaded.device.type == "cuda"

    def encode() -> None:
        with Growing(bench.root / f"{time.time_ns()}.safetensors", count) as growing:
            encoding.encode(growing, work, loaded.encode, lambda: torch.empty(0, 512), pinned=pinned, progress=False)
            growing.finish()

    with so_many_workers(workers) as noted:
        took = bench.seconds(encode)
    return count / took, noted[-1] if noted else 0


def files_table(bench: Bench) -> Told:
    """From files: the first time, when a GPU has yet to start, then with no and with many processes beside."""
    count, cores = bench.many(6144, 96), bench.many(min(ahead.MAX_WORKERS, os.cpu_count() or 1), 1)
    rows, figures = [], []
    loaded = Clip(bench.base, bench.device, "auto")
    for name, images, workers in (
        ("as many processes as are thought to pay, the first time", count, None),
        ("the same again", count, None),
        ("no process beside", bench.many(512, 48), 0),
        (f"{cores}", count, cores),
    ):
        speed, used = from_files(bench, loaded, images, workers)
        rows.append([name, f"{images:,}", str(used), f"{speed:,.0f}"])
        figures.append((f"B/32 from files, {name}: processes, images/s", f"{used}, {speed:,.0f}"))
    show(["ViT-B/32 from files", "images", "processes beside", "images/s"], rows)
    return figures


def prepared_table(bench: Bench, name: str, model: models.Model, few: int) -> Told:
    """Prepared images on the device: our `encode` beside transformers alone, whose weights have the precision."""
    rows, figures = [], []
    for device, precision in dict.fromkeys([(bench.device, "float32"), (bench.device, "bfloat16"), ("cpu", "float32")]):
        if device == "cpu" and precision == "bfloat16" and not models.has_bfloat16():
            continue
        loaded = Clip(model, device, precision)
        batch = loaded.batch_size if device != "cpu" else few
        count = 4 * batch if device != "cpu" else batch
        pixels = torch.randn(count, 3, 224, 224, device=device).to(loaded.dtype)
        ours = partial(
            lambda loaded, pixels, batch: [
                loaded.encode({"pixel_values": part}) for part in torch.split(pixels, batch)
            ],
            loaded,
            pixels,
            batch,
        )
        ours()
        ours_speed = count / bench.seconds(ours, 3)
        net: Any = loaded.net.to(loaded.dtype)

        def bare(net: Any = net, pixels: Tensor = pixels, batch: int = batch) -> None:
            with torch.no_grad():
                for part in torch.split(pixels, batch):
                    net.get_image_features(pixel_values=part)

        bare()
        bare_speed = count / bench.seconds(bare, 3)
        share = ours_speed / bare_speed
        rows.append([f"{device}, {precision}", str(batch), f"{bare_speed:,.0f}", f"{ours_speed:,.0f}", f"{share:.2f}"])
        figures.append(
            (f"{name} prepared, {device}, {precision}: images/s", f"{ours_speed:,.0f} ({share:.2f} of bare)")
        )
        del loaded, net, pixels, ours, bare
        bench.free()
    show([f"{name}, prepared images", "batch", "transformers alone, images/s", "ours", "share"], rows)
    return figures


def agreement_table(bench: Bench, name: str, model: models.Model, count: int) -> Told:
    """How far the features of real images are from those that the CPU computes in float32."""
    images = [Image.open(path).convert("RGB") for path in bench.files(count)]
    found = {}
    for device, precision in dict.fromkeys(
        [("cpu", "float32"), (bench.device, "float32"), (bench.device, "bfloat16"), (bench.device, "float16")]
    ):
        if device != "cpu" or precision == "float32":
            loaded = Clip(model, device, precision)
            found[f"{device}, {precision}"] = F.normalize(torch.cat([*loaded.encode_images(images, 32)]), dim=1)
            del loaded
            bench.free()
    known, rows, figures = found["cpu, float32"], [], []
    for way, features in found.items():
        cosine = F.cosine_similarity(features.double(), known.double()).min().item()
        apart = (features - known).abs().max().item()
        rows.append([way, f"{1 - cosine:.1e}", f"{apart:.1e}"])
        figures.append((f"{name}, {way}: 1 - least cosine", f"{1 - cosine:.1e}"))
    show([f"{name}, {count} images", "1 - least cosine to the CPU's float32", "greatest difference"], rows)
    return figures[1:]


def encode_base(bench: Bench) -> Told:
    return [
        *agreement_table(bench, "B/32", bench.base, bench.many(64, 8)),
        *prepared_table(bench, "B/32", bench.base, bench.many(128, 8)),
    ]


def encode_large(bench: Bench) -> Told:
    figures = [
        *prepared_table(bench, "L/14", bench.large, bench.many(16, 4)),
        *agreement_table(bench, "L/14", bench.large, bench.many(8, 4)),
    ]
    loaded = Clip(bench.large, bench.device, "auto")
    speed, used = from_files(bench, loaded, bench.many(2048, 16), bench.many(ahead.MAX_WORKERS, 1))
    figures.append(("L/14 from files: processes, images/s", f"{used}, {speed:,.0f}"))
    return figures


# Learning


def epochs_table(bench: Bench) -> Told:
    """An epoch on stored features."""
    rows, figures, cores = [], [], torch.get_num_threads()
    ways = [("cpu", 1), ("cpu", cores), *([(bench.device, 1)] if bench.device != "cpu" else [])]
    for kind, dim, count in (
        ("attention", 512, 1_200),
        ("attention", 768, 1_200),
        ("gate", 512, 1_200),
        ("scale", 512, 1_200),
        ("attention", 512, bench.many(100_000, 4_000)),
        ("attention", 768, bench.many(100_000, 4_000)),
        ("gate", 512, bench.many(100_000, 4_000)),
    ):
        generator = torch.Generator().manual_seed(0)
        examples = Examples(torch.randn(count, dim, generator=generator), torch.arange(count) % 7)
        classes = Classes(torch.randn(7, dim, generator=generator), 100.0)
        times = []
        for device, threads in ways:
            there, against = examples.ready(device), classes.ready(device)
            adapter = make_adapter(kind, dim).to(device)
            epoch = partial(train, adapter, there, against, RECIPES["default"], learning_rate=1e-4)
            torch.set_num_threads(threads)
            train(adapter, there.rows(slice(64)), against, RECIPES["default"], learning_rate=1e-4)
            times.append(bench.seconds(epoch, 3 if count < 2_000 else 1))
        torch.set_num_threads(cores)
        rows.append([kind, str(dim), f"{count:,}", *(f"{took:.3f} s" for took in times)])
        figures.append((f"epoch, {kind} {dim}, {count:,} rows", " / ".join(f"{took:.3f}" for took in times) + " s"))
    show(["an epoch", "dim", "rows", *(f"{device}, threads: {threads}" for device, threads in ways)], rows)
    return figures


def federation_table(bench: Bench) -> Told:
    """The drawn pictures, encoded and learnt from on both: the same accuracies, and twice the same to the bit."""
    opened = {
        device: open_features(Settings(device=device), root=bench.root / f"features-{device}", progress=False)
        for device in ("cpu", bench.device)
    }
    units = {device: [F.normalize(of.examples(d).features, dim=1) for d in of.domains] for device, of in opened.items()}
    apart = max(float((a - b).abs().max()) for a, b in zip(units["cpu"], units[bench.device], strict=True))
    settings, cores = Settings(num_server_rounds=bench.many(20, 2)), torch.get_num_threads()
    found: dict[str, Result] = {}
    rows = []
    for name, device in (("cpu", "cpu"), ("GPU", bench.device), ("GPU again", bench.device)):
        sites, unseen = make_sites(opened["cpu"], "sketch", 10, 0, device=device)
        classes = opened["cpu"].classes.ready(device)
        torch.set_num_threads(1)  # as sites have it
        begun = time.perf_counter()
        found[name] = simulate(sites, classes, unseen, settings)
        took = time.perf_counter() - begun
        torch.set_num_threads(cores)
        line = found[name].selected
        figures = [f"{value:.4f}" if value is not None else "" for value in (line.seen, line.validation, line.unseen)]
        rows.append([name, f"{took:.1f} s", str(line.round), *figures])
    show(["a federation of 10 sites in one process", "time", "round", "seen", "validation", "unseen"], rows)
    states = [{name: tensor.cpu() for name, tensor in result.state.items()} for result in found.values()]
    differ = max(float((states[0][name] - states[1][name]).abs().max()) for name in states[0])
    same = all(torch.equal(states[1][name], states[2][name]) for name in states[1])
    lines = [
        abs((one.unseen or 0.0) - (other.unseen or 0.0))
        for one, other in zip(found["cpu"].rounds, found["GPU"].rounds, strict=True)
    ]
    return [
        ("bundled CLIP, float32: greatest difference of a feature, GPU to CPU", f"{apart:.1e}"),
        ("adapters, GPU to CPU: greatest difference", f"{differ:.1e}"),
        ("unseen accuracy in any round, GPU to CPU: greatest difference", f"{max(lines):.4f}"),
        ("twice on the GPU: the same adapter to the bit", "yes" if same else "no"),
        ("federation of 10 sites: CPU, GPU", ", ".join(row[1] for row in rows[:2])),
    ]


def arriving(bench: Bench) -> Told:
    """Every way in which a federation in one process sends and averages, on the GPU: that it works."""
    features = open_features(Settings(device="cpu"), root=bench.root / "features-cpu", progress=False)
    sites, unseen = make_sites(features, "sketch", 3, 0, device=bench.device)
    classes, figures = features.classes.ready(bench.device), []
    for given in (
        {"codec": "int8"},
        {"codec": "bfloat16"},
        {"strategy": "fedadam"},
        {"strategy": "fedmedian"},
        {"strategy": "fedprox"},
        {"dp": "central"},
        {"dp": "local"},
        {"recipe": "paper"},
        {"blend": "auto"},
    ):
        settings = replace(Settings(num_server_rounds=1), **given)  # type: ignore[arg-type]
        try:
            line = simulate(sites, classes, unseen, settings).selected
            answer = f"unseen {line.unseen:.4f}" if line.unseen is not None else "no unseen"
        except Exception as error:
            traceback.print_exc()
            answer = f"FAILED: {type(error).__name__}: {error}"[:150]
        figures.append((", ".join(f"{key}={value}" for key, value in given.items()), answer))
    return figures


def whole_table(bench: Bench) -> Told:
    """Steps of a whole model, from pixels."""
    rows, figures, batch = [], [], bench.many(32, 4)
    prompts = [TEMPLATES[0].format(name) for name in drawn.CLASSES]
    loaded = Clip(bench.base, bench.device, "float32")
    generator = torch.Generator().manual_seed(0)
    for device, dtype, steps in (
        (bench.device, torch.float32, bench.many(16, 1)),
        (bench.device, torch.bfloat16, bench.many(16, 1)),
        ("cpu", torch.float32, 1),
    ):
        count = batch * steps
        pixels = torch.randint(0, 256, (count, 3, 224, 224), dtype=torch.uint8, generator=generator)
        examples = Examples(pixels, torch.arange(count) % len(prompts)).ready(device)
        classes = Classes(torch.randn(len(prompts), 512, generator=generator), 100.0).ready(device)
        learner = WholeModel.copy_of(loaded, prompts, dtype=dtype).to(device)
        epoch = partial(train, learner, examples, classes, RECIPES["default"], learning_rate=1e-5, batch_size=batch)
        if device != "cpu":
            torch.cuda.reset_peak_memory_stats()
            epoch()
        took = bench.seconds(epoch) / steps
        loss = evaluate(learner, examples, classes).loss / count
        most = torch.cuda.max_memory_allocated() / 1e9 if device != "cpu" else 0.0
        way = f"{device}, {str(dtype).removeprefix('torch.')}"
        rows.append([way, f"{took:.3f} s", f"{batch / took:,.0f}", f"{most:.1f} GB" if most else "", f"{loss:.3f}"])
        figures.append((f"B/32, whole, {way}: a step of {batch}", f"{took:.3f} s"))
        assert all(tensor.is_contiguous() for tensor in learner.state_dict().values())
        del learner, examples
        bench.free()
    show(["ViT-B/32, method=full-model", f"a step of {batch}", "images/s", "GPU memory at most", "loss after"], rows)
    return figures


# Using


def predictions_table(bench: Bench) -> Told:
    """Predictions of files."""
    rows, speeds = [], []
    for device, precision, count in dict.fromkeys(
        [
            (bench.device, "float32", bench.many(1024, 32)),
            (bench.device, "auto", bench.many(1024, 32)),
            ("cpu", "float32", bench.many(256, 32)),
        ]
    ):
        model = made(bench.base, device=device, precision=precision)
        bare = Bare(bench.base.folder, model.loaded.batch_size, device, model.loaded.dtype)
        paths = bench.files(count)
        few = paths[: bench.many(64, 4)]
        bare.predict(few)
        list(model.stream_files(few))
        both = [bench.seconds(partial(bare.predict, paths)), bench.seconds(partial(model.predict, paths))]
        speeds.append([count / took for took in both])
        way = f"{device}, {str(model.loaded.dtype).removeprefix('torch.')}"
        rows.append([way, f"{count:,}", *(f"{speed:,.0f}" for speed in speeds[-1]), f"{both[0] / both[1]:.2f}"])
        del model, bare
        bench.free()
    show(["ViT-B/32, files", "images", "transformers alone, images/s", "ours", "share"], rows)
    return [(f"predictions, {row[0]}: images/s", f"{row[3]} ({row[4]} of transformers alone)") for row in rows]


def onnx_table(bench: Bench) -> Told:
    """The ONNX file of a model that is on the GPU, beside torch on the CPU, and that model itself."""
    from fedclip_flwr.inference import onnx_file

    model, folder = made(models.find("bundled"), device=bench.device), bench.root / "onnx"
    folder.mkdir()
    found = onnx_file.write(model, folder)
    pictures = [drawn.picture(0, "sketch", figure, 1)[0] for figure in drawn.CLASSES]
    place = model.text.device.type
    labels = [answer.label for answer in model.predict(pictures)]
    return [
        (f"ONNX from {place}: same class as torch", f"{found.same} of {found.pictures}"),
        ("ONNX: greatest difference of a probability", f"{found.difference:.1e}"),
        ("predictions go on there", str(len(labels))),
    ]


def site_folders(bench: Bench, each: int) -> list[Path]:
    """A folder of images for each site."""
    folders = []
    for number in range(SITES):
        folder = bench.root / f"site-{number}"
        for image in range(each):
            figure = drawn.CLASSES[image % len(drawn.CLASSES)]
            (folder / figure).mkdir(parents=True, exist_ok=True)
            drawn.picture(number, "photo", figure, image)[0].save(folder / figure / f"{image}.png")
        folders.append(folder)
    return folders


def sites_table(bench: Bench, device: str = "") -> Told:
    """A SuperLink and SuperNodes as processes, each with images of its own, and all that encode and learn there."""
    folders, rounds, device = site_folders(bench, bench.many(200, 20)), bench.many(3, 2), device or bench.device
    model = bench.base if not bench.quick else models.find("bundled")
    with ExitStack() as stack:
        link = stack.enter_context(superlink(bench.root / f"flower-{device}"))
        nodes = [
            stack.enter_context(supernode(link, folder.name, f"site='{folder.name}' data='folder:{folder}'"))
            for folder in folders
        ]
        link.wait_for(nodes)
        settings: Mapping[str, str | int | float] = {
            "model": model.name,
            "data": f"folder:{folders[0]}",
            "holdout": "",
            "device": device,
            "min-sites": SITES,
            "num-server-rounds": rounds,
        }
        begun = time.perf_counter()
        run = run_app(OURS, settings, link.env, nothing)
        took = time.perf_counter() - begun
    row = [device, f"{run.times[0] - begun:.1f} s", f"{middle([run]):.1f} s", f"{took:.1f} s"]
    show(["three real sites", "to the end of round 1", "a warm round", "all of it"], [row])
    return [(f"three real sites, {device}: a warm round, all", f"{row[2]}, {row[3]}")]


STEPS: dict[str, Callable[[Bench], Told]] = {
    "environment": environment,
    "base": encode_base,
    "files": files_table,
    "federation": federation_table,
    "epochs": epochs_table,
    "whole": whole_table,
    "sites": sites_table,
    "onnx": onnx_table,
    "predictions": predictions_table,
    "large": encode_large,
    "arriving": arriving,
    "sites-cpu": partial(sites_table, device="cpu"),
}
"""What matters most comes first."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--images", default="", help="a folder")
    parser.add_argument("--only", nargs="+", choices=STEPS, metavar="STEP", default=list(STEPS), help=", ".join(STEPS))
    parser.add_argument("--quick", action="store_true", help="on a CPU, too: to see that all of it works")
    parser.add_argument("--log", type=Path, default=Path("gpu.log"), help="for traces")
    parser.add_argument("--seconds", type=at_least(1), default=600, help="after which no step is begun")
    given = parser.parse_args()
    if not (torch.cuda.is_available() or given.quick):
        raise SystemExit("no GPU that CUDA finds; --quick goes without")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    begun, figures, failed = time.monotonic(), list[tuple[str, str]](), list[str]()
    with workplace() as root, given.log.open("w") as log:
        bench = Bench(root, device, given.quick, given.images)
        for name in given.only:
            before = time.monotonic()
            if before - begun > given.seconds:
                figures.append((name, "left out: there was no time"))
                continue
            print(f"## {name}\n", flush=True)
            try:
                found = STEPS[name](bench)
                show([name, ""], found)
                figures += found
            except (Exception, SystemExit) as error:
                traceback.print_exc(file=log)
                log.flush()
                figures.append((name, f"FAILED: {type(error).__name__}: {error}".splitlines()[0][:200]))
                failed.append(name)
                if isinstance(error, SystemExit) and isinstance(error.code, int):  # this process is told to stop
                    break
            bench.free()
            print(f"{name}: {time.monotonic() - before:.0f} s\n", flush=True)
    print("## Summary\n")
    show(["what", "found"], figures)
    print(machine())
    if failed:
        raise SystemExit(f"Failed: {', '.join(failed)}. {given.log} says why.")


if __name__ == "__main__":
    main()
