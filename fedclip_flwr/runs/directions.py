"""The directions in which one round measures, and the unit of its sums, as a file.

Only sums that have both in common can be added. A relay writes those of the federation above, and with `directions` a
run of its group takes them.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from fedclip_flwr.base import Settings, UserError, content, files, store, tensorfile
from fedclip_flwr.base.errors import one_line
from fedclip_flwr.features import Features
from fedclip_flwr.features.opening import new_learner
from fedclip_flwr.learning import Learner, OneRound
from fedclip_flwr.learning.one_round import width_of
from fedclip_flwr.learning.sums import BITS
from fedclip_flwr.runs import peft_folder


def write(relay: str, basis: Tensor, bits: int) -> Path:
    """Writes those that this relay is asked for, in place of earlier ones; returns the path."""
    tensors = {"basis": basis, "bits": torch.tensor(bits)}
    path = files.home() / "directions" / f"{content.file_name(relay)}.safetensors"
    files.write_atomic(path, lambda part: tensorfile.save(tensors, part, tensorfile.with_checksum({}, tensors)))
    return path


def start_of(settings: Settings, features: Features) -> Learner:
    """The initial state of what the run makes; with `directions`, in those of the file; with `start`, that folder's."""
    if settings.start:
        return peft_folder.start_of(settings, features)
    if not settings.directions:
        return new_learner(settings, features)
    text, path = features.classes.ready().text, Path(settings.directions)
    try:
        tensors, _ = store.checked(path)
        basis, bits = tensors["basis"].clone(), tensors["bits"].clone()
    except KeyError as error:
        raise UserError(f"directions = {settings.directions!r}: {path} lacks {error}") from None
    except (OSError, SafetensorError) as error:
        raise UserError(f"directions = {settings.directions!r}: {path} can't be read ({one_line(error)})") from None
    every = width_of(settings.statistics, *text.shape) == text.shape[1]
    if not (
        (basis.dtype, basis.dim(), basis.shape[-1:]) == (torch.int32, 2, text.shape[1:])
        and (len(basis) == 0 if every else 0 < len(basis) < text.shape[1])
        and bits.numel() == 1
        and 0 < int(bits) <= BITS
    ):
        raise UserError(
            f"directions = {settings.directions!r}: they are for another model, or not for statistics = "
            f"{settings.statistics!r}: set what the federation has that they are from"
        )
    return OneRound.within(basis, bits, text)
