"""What a site has given under masks: the server never saw it, so only the site can replace it, or take it back."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from fedclip_flwr.base import content, files, store, tensorfile
from fedclip_flwr.base.tensors import State
from fedclip_flwr.exchange import ExchangeError
from fedclip_flwr.learning.one_round import renumbered


def note(session: str, site: str, mark: str) -> None:
    """Notes at a site's hello what its sums are of: no others may follow in the session."""
    content.remember(content.digest("given", session, site), mark, content.memory())


def check_noted(session: str, site: str, mark: str, what: str) -> None:
    """Raises an `ExchangeError` if the hello was about others: the server takes this mark for that of the sums."""
    if content.recall(content.digest("given", session, site), content.memory()) not in (None, mark):
        raise ExchangeError(f"{what} have changed since its hello: the next update takes the new ones")


class GivenSums:
    """The sums that a site gave, on its disk, by the mark of the images that they are of; `mark` is that of today's."""

    def __init__(self, site: str, mark: str, class_names: Sequence[str]) -> None:
        self._folder, self._names = files.home() / "given" / content.file_name(site), class_names
        self._mark = mark

    def difference(self, sums: Mapping[str, Tensor], unit: str, before: str, leave: bool) -> State:
        """What is to be sent so that these sums take the place of those of the images `before`, if that is a mark.

        With `leave` nothing takes their place. `unit` names the directions, and the unit, that the sums are in.
        """
        if not leave:
            path = self._folder / f"{content.digest(self._mark, unit)}.safetensors"
            with files.writing_to(self._folder, mode=0o700):
                self._folder.chmod(0o700)  # earlier versions let everybody read it
                files.write_atomic(path, lambda part: self._save(sums, part))
        now = {name: torch.zeros_like(tensor) if leave else tensor for name, tensor in sums.items()}
        if not before:
            return now
        earlier = self._read(content.digest(before, unit))
        return {name: tensor - earlier[name] for name, tensor in now.items()}

    def _save(self, sums: Mapping[str, Tensor], path: Path) -> None:
        path.touch(0o600)
        facts = tensorfile.with_checksum({"class_names": json.dumps(list(self._names))}, sums)
        tensorfile.save(sums, path, facts)

    def _read(self, name: str) -> State:
        try:
            sums, facts = store.checked(self._folder / f"{name}.safetensors")
            numbers = [self._names.index(own) if own in self._names else -1 for own in json.loads(facts["class_names"])]
            return renumbered(sums, numbers, len(self._names))
        except (OSError, SafetensorError, ValueError, KeyError):
            raise ExchangeError(
                "this site no longer has what it gave before, so it can't send the difference: a new run is needed"
            ) from None
