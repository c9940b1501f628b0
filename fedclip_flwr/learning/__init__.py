"""Tensors in, tensors out: adapters, recipes, training, the selection of rounds, metrics.

Independent of files, of CLIP and of Flower. May import: base.
"""

from fedclip_flwr.learning.adapters import Adapter, make_adapter
from fedclip_flwr.learning.base import Classes, Examples, Learner
from fedclip_flwr.learning.gradient import OneGradient
from fedclip_flwr.learning.one_round import ClosedForm, OneRound
from fedclip_flwr.learning.recipes import RECIPES, Recipe
from fedclip_flwr.learning.training import evaluate, examine, train

__all__ = [
    "RECIPES",
    "Adapter",
    "Classes",
    "ClosedForm",
    "Examples",
    "Learner",
    "OneGradient",
    "OneRound",
    "Recipe",
    "evaluate",
    "examine",
    "make_adapter",
    "train",
]
