"""A feature folder, `features:PATH`: features made elsewhere, which a site or a server reads instead of images.

`features.json`, `classes.safetensors`, and `DOMAIN.safetensors` for each domain. Image features are as CLIP gives them.
If they were normalized, `feature_norm` in `features.json` may give their average original length.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.nn import functional as F

from fedclip_flwr.base import UserError, content, files, store, tensorfile
from fedclip_flwr.base.errors import one_line
from fedclip_flwr.base.settings import MOST_NORM
from fedclip_flwr.base.tensors import REAL
from fedclip_flwr.data import Vocabulary
from fedclip_flwr.data.vocabulary import SEPARATOR, check_classes, check_plain, numbering, templates_of
from fedclip_flwr.learning import Classes, Examples

FACTS, CLASSES = "features.json", "classes"
MOST = 1e6
"""Upper limit of scale and bias: above those of any model, and low enough for finite logits."""
CHECKED = 1000
"""The number of a domain's features that are checked for unit length."""
INTEGER = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


class FeatureFolder:
    """Features read from a feature folder."""

    model_content: str | None = None
    model_revision = ""

    def __init__(self, root: Path, given: Vocabulary | None = None) -> None:
        """`given` is the vocabulary from the server; the folder's own may have the classes in another order."""
        self._root = root
        self._opened: dict[str, Examples] = {}
        self._unit: dict[str, bool] = {}
        path = root / FACTS
        where = f"data = 'features:{root}': {path}"
        try:
            facts = files.read_json(path)
            self.model = str(facts["model"])
            self.prompt = str(facts["prompt"])
            own = Vocabulary(_texts(facts, "class_names"), templates_of(self.prompt))
            self.domains = tuple(sorted(_texts(facts, "domains")))
            self.parameters = None if facts.get("parameters") is None else int(facts["parameters"])
            self.dim = int(facts["embedding_dim"])
            self._scale, self._bias = float(facts["logit_scale"]), float(facts.get("logit_bias") or 0.0)
            self._norm = None if facts.get("feature_norm") is None else float(facts["feature_norm"])
        except OSError as error:
            raise UserError(f"{where} can't be read ({error.strerror})") from None
        except KeyError as error:
            raise UserError(f"{where} lacks {error}") from None
        except (TypeError, ValueError, AttributeError, OverflowError) as error:
            raise UserError(f"{where} is invalid ({one_line(error)})") from None
        check_plain(f"{where}: a domain", self.domains)
        try:
            check_classes(own)  # else an adapter trained on them could not be loaded
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        if any(Path(name).name != name for name in self.domains):
            raise UserError(f"{where} names a domain that is not a plain file name")
        if not self.domains or len(set(self.domains)) < len(self.domains):
            raise UserError(f"{where} must list at least one domain, each once")
        if not (0 < self._scale <= MOST and abs(self._bias) <= MOST):
            raise UserError(
                f"{where} has the logit_scale {self._scale:g} and the logit_bias {self._bias:g}: expected a scale "
                f"above 0, and both at most {MOST:g}"
            )
        if self._norm is not None and not 0 < self._norm <= MOST_NORM:
            raise UserError(f"{where} has the feature_norm {self._norm:g}: expected more than 0, at most {MOST_NORM:g}")
        self.vocabulary = given or own
        self._numbers = numbering(own.class_names, self.vocabulary.class_names)
        if missing := sorted({*self.vocabulary.class_names} - {*own.class_names}):
            raise UserError(f"this site's features, in {root}, have no prompts for the run's {', '.join(missing)}")
        if own.templates != self.vocabulary.templates:
            raise UserError(
                f"this site's features, in {root}, were made with the prompt {self.prompt!r}; the run's is "
                f"{SEPARATOR.join(self.vocabulary.templates)!r}"
            )

    @cached_property
    def content(self) -> str:
        names = [FACTS, *(f"{name}.safetensors" for name in (CLASSES, *self.domains))]
        return content.of_files(self._root, names, content.memory())

    @cached_property
    def classes(self) -> Classes:
        text = self._tensor(CLASSES, "text_features", (len(self._numbers), self.dim))
        return Classes(text[torch.tensor(self._numbers).argsort()], self._scale, self._bias)

    def examples(self, domain: str) -> Examples:
        if domain not in self._opened:  # reading checks every number
            self._opened[domain] = self._open(domain)
        return self._opened[domain]

    def count(self, domain: str) -> int:
        return len(self.examples(domain).labels)

    stored = count

    def room(self, images: int) -> int:
        return 0

    def _open(self, domain: str) -> Examples:
        features = self._tensor(domain, "image_features", (None, self.dim))
        labels = self._tensor(domain, "labels", (len(features),))
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < len(self._numbers):
            raise UserError(f"{self._root / domain}.safetensors: labels must lie in 0…{len(self._numbers) - 1}")
        self._unit[domain] = _unit(features)
        if self._norm is not None:
            if not self._unit[domain]:
                raise UserError(
                    f"{self._root / FACTS} has a feature_norm, which is for features of unit length; those of "
                    f"{domain} have others: leave it out"
                )
            features = F.normalize(features.float(), dim=1) * self._norm
        return Examples(features, torch.tensor(self._numbers)[labels.long()])

    def has_unit_length(self, domains: Iterable[str] | None = None) -> bool:
        for domain in domains or ():
            self.examples(domain)
        known = [self._unit[domain] for domain in (self._unit if domains is None else domains)]
        return bool(known) and self._norm is None and all(known)

    def _tensor(self, file: str, name: str, shape: tuple[int | None, ...]) -> Tensor:
        """The named tensor; raises unless it has the type and shape of the format and only finite numbers."""
        path = self._root / f"{file}.safetensors"
        try:
            tensor = store.mapped(path)[0].get(name)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path} can't be read ({one_line(error)})") from None
        if tensor is None:
            raise UserError(f"{path} holds no {name}")
        if len(tensor.shape) != len(shape) or any(s not in (None, t) for s, t in zip(shape, tensor.shape, strict=True)):
            expected = tuple("N" if size is None else size for size in shape)
            raise UserError(f"{path}: {name} has shape {tuple(tensor.shape)}, expected {expected}")
        integer = name == "labels"
        if tensor.dtype not in (INTEGER if integer else REAL) or not finite(path, tensor):
            raise UserError(f"{path}: {name} must be {'whole' if integer else 'finite'} numbers")
        return tensor


def _unit(features: Tensor) -> bool:
    """True if the first features have unit length, within the precision of their type."""
    some = features[:CHECKED].float()
    return bool(((some.norm(dim=1) - 1).abs() < 0.01).all())


def _texts(facts: dict[str, Any], key: str) -> tuple[str, ...]:
    """The list of texts under `key`."""
    if not isinstance(facts[key], list):
        raise TypeError(f"{key} is not a list")
    return tuple(map(str, facts[key]))


def finite(path: Path, tensor: Tensor) -> bool:
    """True if the tensor from the file has only finite numbers."""
    return not tensor.is_floating_point() or store.passes_once(path, "finite", lambda: tensorfile.all_finite(tensor))
