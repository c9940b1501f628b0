"""What of the package's extras is installed: a test that needs one says so, and is skipped without it."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

MODULES = {
    "lora": "peft",
    "mlflow": "mlflow",
    "onnx": "onnxscript",
    "privacy": "dp_accounting",
    "simulation": "ray",
    "tensorboard": "tensorboard",
    "wandb": "wandb",
}
"""One module of each extra."""


def needs(*extras: str) -> pytest.MarkDecorator:
    """Skips a test, or with `pytestmark` a module, where one of these extras is not installed."""
    missing = [extra for extra in extras if not find_spec(MODULES[extra])]
    return pytest.mark.skipif(bool(missing), reason=f"not installed: the extra {', '.join(missing)}")
