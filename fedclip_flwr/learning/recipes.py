"""The recipes: loss, learning rates, and rules for selecting a round."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from fedclip_flwr.base import Settings
from fedclip_flwr.base.settings import GRADIENT, LORA, ONE_ROUND
from fedclip_flwr.learning.adapters import Adapter, adapter_class, blank_adapter, make_adapter
from fedclip_flwr.learning.base import Classes
from fedclip_flwr.learning.gradient import OneGradient
from fedclip_flwr.learning.one_round import ClosedForm, OneRound


def class_loss(features: Tensor, labels: Tensor, classes: Classes) -> Tensor:
    """Cross-entropy over the class prompts."""
    return F.cross_entropy(classes.logits(features), labels)


def contrastive_loss(features: Tensor, labels: Tensor, classes: Classes) -> Tensor:
    """CLIP's own loss: each image against the prompts of its batch, and each prompt against the images."""
    logits = classes._replace(text=classes.text[labels]).logits(features)
    targets = torch.arange(len(labels), device=labels.device)
    return (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2


@dataclass(frozen=True)
class Recipe:
    """How a site trains, and how a round is selected."""

    loss: Callable[[Tensor, Tensor, Classes], Tensor]
    whole_rate: float  # the learning rate for the whole model
    lora_rate: float  # for LoRA
    weight_decay: float
    prompt: str
    first_choice: int = 0  # the first round that may be selected
    most_gain: float = 0.05  # the most accuracy gained at a site that counts when rounds are compared
    loss_breaks_ties: bool = True  # if False, the first of equally accurate rounds is selected
    adapter_rate: float | None = None  # the learning rate for adapters; None for each adapter's own
    smallest_batch: int = 1
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-6
    width: int | None = None  # the dimension that the rates of wide adapters and of LoRA are for
    steps: int = 1  # an epoch with fewer steps takes proportionally larger ones
    length: float = 1.0  # of features as the adapter's network sees them; 0: as CLIP gives them

    def rate(self, kind: str, dim: int, steps: int) -> float:
        """An adapter's learning rate for this many steps per epoch.

        Adam moves each number by about the rate in each step. So wider layers take proportionally smaller steps, and
        sites with few steps take larger ones, so that their adapters make progress in a round, too.
        """
        adapter = adapter_class(kind)
        rate = self.adapter_rate or adapter.learning_rate
        rate *= max(1.0, self.steps / max(steps, 1))
        return rate * self.width / dim if self.width and adapter.wide else rate


RECIPES = {
    "default": Recipe(
        loss=class_loss,
        whole_rate=1e-5,
        lora_rate=7.5e-4,
        width=512,
        steps=10,
        weight_decay=0.0,
        prompt="a picture of a {}",
    ),
    "paper": Recipe(
        loss=contrastive_loss,
        whole_rate=5e-5,
        lora_rate=5e-5,
        adapter_rate=5e-5,
        weight_decay=0.2,
        prompt="a picture of a {}",
        first_choice=1,
        most_gain=1.0,
        loss_breaks_ties=False,
        smallest_batch=2,
        length=0.0,
    ),
}


def recipe_of(settings: Settings) -> Recipe:
    """The recipe of these settings. One round is not selected: sites' seen classes say nothing of what it is for."""
    recipe = RECIPES[settings.recipe]
    return replace(recipe, first_choice=1) if settings.method == ONE_ROUND else recipe


def length_of(settings: Settings) -> float:
    """The length to which features are scaled for the adapter's network; 0 leaves them as they are."""
    return settings.feature_norm or RECIPES[settings.recipe].length


def learning_rate(settings: Settings, dim: int, examples: int) -> float:
    """The learning rate from the settings, or by default the recipe's for a site with this many examples."""
    recipe = RECIPES[settings.recipe]
    if settings.method == "full-model":
        return settings.learning_rate or recipe.whole_rate
    if settings.method == LORA:
        return settings.learning_rate or recipe.lora_rate * (recipe.width / dim if recipe.width else 1)
    return settings.learning_rate or recipe.rate(settings.adapter, dim, -(-examples // settings.batch_size))


def starts_as_zero_shot(settings: Settings) -> bool:
    """True if the learner predicts exactly as the frozen model before training, and not only nearly so."""
    if settings.method == LORA:
        return not settings.start
    return settings.method != "adapter" or settings.recipe != "paper" or adapter_class(settings.adapter).exact


def new_part(settings: Settings, classes: Classes) -> Adapter | ClosedForm:
    """What is learnt beside the frozen model: a new adapter, or the closed form without images."""
    if settings.method == ONE_ROUND and settings.statistics == GRADIENT:
        return OneGradient.new(classes.text)
    if settings.method == ONE_ROUND:
        return OneRound.new(settings.statistics, classes.text)
    return new_adapter(settings, classes.dim)


def blank_part(settings: Settings, classes: int, dim: int) -> Adapter | ClosedForm:
    """The same, to load a state into."""
    if settings.method == ONE_ROUND and settings.statistics == GRADIENT:
        return OneGradient(classes, dim)
    if settings.method == ONE_ROUND:
        return OneRound(settings.statistics, classes, dim)
    options = {"blend": settings.trained_blend, "length": length_of(settings)}
    return blank_adapter(settings.adapter, dim, rank=settings.adapter_rank, **options)


def new_adapter(settings: Settings, dim: int) -> Adapter:
    return make_adapter(
        settings.adapter,
        dim,
        rank=settings.adapter_rank,
        blend=settings.trained_blend,
        length=length_of(settings),
        identity=starts_as_zero_shot(settings),
        seed=settings.seed,
    )
