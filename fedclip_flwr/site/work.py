"""What one site learns: in a round of the run, or alone at its end."""

from __future__ import annotations

from fedclip_flwr.base.seeds import seed_of
from fedclip_flwr.base.settings import Settings
from fedclip_flwr.learning.base import Classes, Learner
from fedclip_flwr.learning.recipes import RECIPES, learning_rate
from fedclip_flwr.learning.training import personalize, train
from fedclip_flwr.site.holdings import Site


def learn(learner: Learner, site: Site, classes: Classes, settings: Settings, number: int) -> None:
    """What a site does in round `number`."""
    train(
        learner,
        site.train,
        classes,
        RECIPES[settings.recipe],
        learning_rate=learning_rate(settings, classes.dim, len(site.train.labels)),
        epochs=settings.local_epochs,
        batch_size=settings.batch_size,
        proximal=settings.proximal,
        seed=seed_of(settings.seed, "train", site.name, number),
    )


def learn_alone(learner: Learner, site: Site, classes: Classes, settings: Settings) -> int:
    """Makes the learner the site's own, by as much training as it had in the run; the epoch that was kept."""
    return personalize(
        learner,
        site.train,
        site.validation,
        classes,
        RECIPES[settings.recipe],
        learning_rate=learning_rate(settings, classes.dim, len(site.train.labels)),
        epochs=settings.num_server_rounds * settings.local_epochs,
        batch_size=settings.batch_size,
        seed=seed_of(settings.seed, "personal", site.name),
    )
