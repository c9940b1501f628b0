"""The last step of the image's build: checks torch, removes unused files, and writes bytecode of what runs use.

python docker/finish.py cpu|cuda
"""

from __future__ import annotations

import pkgutil
import shutil
import sys
import sysconfig
from importlib import import_module
from importlib.metadata import distribution
from pathlib import Path

import fedclip_flwr
from fedclip_flwr.flower import lines

PLACE = Path(sysconfig.get_path("purelib"))
UNUSED = (
    *("torch/bin/[!t]*", "torch/bin/test_*", "torch/include", "torch/test", "**/tests"),
    *("pyarrow/include", "pyarrow/*flight*", "pyarrow/*s3*", "pyarrow/_pyarrow_cpp_tests*"),
    *("matplotlib/mpl-data/sample_data", "Crypto/SelfTest", "**/*.pyi", "**/*.pyx", "**/*.c"),
)
"""Other projects' tests, headers, stubs and sources, and pyarrow's parts for Flight servers and for Amazon S3."""


def main(variant: str) -> None:
    import torch

    print(f"torch {torch.__version__}, CUDA {torch.version.cuda or 'not built in'}")
    if variant == "cuda" and not torch.version.cuda:
        sys.exit(
            "VARIANT=cuda: expected torch with CUDA, found one without. Give the index of torch's wheels for your "
            "version of CUDA, from PyTorch's installation page: --build-arg TORCH_INDEX=URL"
        )
    if variant == "cpu" and torch.version.cuda:
        print(
            "This image works, but is several gigabytes large: its torch includes CUDA. For a small one give the "
            "index of torch's wheels for the CPU, from PyTorch's installation page: --build-arg TORCH_INDEX=URL"
        )
    for pattern in UNUSED:
        for path in [*PLACE.glob(pattern)]:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
    for name in ("uv", "uvx"):  # Flower would use it to install packages at run time, which is off
        Path(sys.prefix, "bin", name).unlink(missing_ok=True)
    use()


def use() -> None:
    """Imports what the server and a site import: this writes the bytecode, which pip has not written."""
    unused = ("pretrain", *(f"_{line.name}" for line in lines.LINES if line is not lines.line()))
    for module in pkgutil.walk_packages(fedclip_flwr.__path__, "fedclip_flwr."):
        if not module.name.endswith(unused):  # the script that made the bundled model; the other line of Flower
            import_module(module.name)
    for script in distribution("flwr").entry_points.select(group="console_scripts"):
        script.load()
    import datasets  # noqa: F401
    from PIL import Image

    from fedclip_flwr.features import Clip, models

    model = Clip(models.find("bundled"))
    model.encode_prompts(["a picture"])
    list(model.encode_images([Image.new("RGB", (8, 8))]))


if __name__ == "__main__":
    main(sys.argv[1])
