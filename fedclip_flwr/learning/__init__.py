"""Tensors in, tensors out: adapters, recipes, training, the selection of rounds, metrics.

Independent of files, of CLIP and of Flower. May import: base.
"""

from fedclip_flwr.learning.adapters import Adapter, make_adapter
from fedclip_flwr.learning.base import Classes, Examples, Learner
from fedclip_flwr.learning.one_round import OneRound
from fedclip_flwr.learning.recipes import RECIPES, Recipe
from fedclip_flwr.learning.training import evaluate, examine, train

__all__ = [
    "RECIPES",
    "Adapter",
    "Classes",
    "Examples",
    "Learner",
    "OneRound",
    "Recipe",
    "evaluate",
    "examine",
    "make_adapter",
    "train",
]
