"""A site's work for a message: evaluate the received adapter, train it, answer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from flwr.app import RecordDict

from fedclip_flwr.base import Settings
from fedclip_flwr.base.seeds import seed_of
from fedclip_flwr.base.settings import ONE_ROUND
from fedclip_flwr.exchange import ExchangeError, Report, Task, privacy
from fedclip_flwr.exchange.link import SiteCache
from fedclip_flwr.exchange.records import read_adapter, read_task, write_answer
from fedclip_flwr.exchange.secure.protocol import Memory
from fedclip_flwr.features.lora import Lora
from fedclip_flwr.learning import (
    RECIPES,
    Classes,
    ClosedForm,
    Learner,
    OneRound,
    choosing,
    evaluate,
    examine,
    one_round,
    train,
)
from fedclip_flwr.learning.recipes import learning_rate
from fedclip_flwr.learning.training import personalize
from fedclip_flwr.site.context import SiteContext
from fedclip_flwr.site.given import GivenSums
from fedclip_flwr.site.holdings import Site
from fedclip_flwr.site.sums import blank_form, sums_to_send


def answer_train(
    content: RecordDict,
    context: SiteContext,
    cache: SiteCache,
    *,
    by_class: bool = False,
    memory: Memory | None = None,
    given: GivenSums | None = None,
) -> RecordDict:
    """The scores of the received adapter on this site's images, and the trained adapter.

    With `by_class` the scores include counts by class. `memory` holds the secrets of a site that masks what it sends,
    and `given` the sums that it sent so before.
    """
    task, settings = read_task(content), context.settings
    if settings.method == ONE_ROUND:
        sums = sums_to_send(content, context, cache, memory, given)
        return write_answer(report_on(None, context, by_class), sums)
    learner = received(task, context, cache)
    report = report_on(learner, context, by_class)
    before = learner.on_cpu() if memory is not None or settings.dp != "off" else {}
    learn(learner, context.site, context.classes, settings, task.round)
    trained = {name: tensor.cpu() for name, tensor in learner.state_dict().items()}
    trained = privacy.at_site(trained, before, settings)
    if memory is None:
        return write_answer(report, cache.pack(trained, context.site.name, task.round, settings.seed))
    from fedclip_flwr.exchange.secure import site  # imports cryptography, which few runs need

    return write_answer(report, site.masked(content, memory, trained, before))


def answer_evaluate(
    content: RecordDict,
    context: SiteContext,
    cache: SiteCache,
    *,
    by_class: bool = False,
    keep: Callable[[Learner, int, float], None] = lambda adapter, number, chosen: None,
) -> RecordDict:
    """The scores of the received adapter; if the server asks to personalise, of the adapter that this site makes of it.

    `keep` is called with the personalised adapter, the round that it starts from, and what was selected by validation:
    the epoch, or with one round the weight of the site's class frequencies.
    """
    task = read_task(content)
    learner = received(task, context, cache)
    if task.personal:
        keep(learner, task.round, learn_alone(learner, context.site, context.classes, context.settings))
    report = report_on(learner, context, by_class)
    if task.choose and isinstance(learner, OneRound):
        report = report._replace(choices=choosing.scores(learner, context.site.validation, context.classes))
    return write_answer(report)


def received(task: Task, context: SiteContext, cache: SiteCache) -> Learner:
    """The adapter in the message, or the whole model."""
    learner = blank_form(task, context) if context.settings.method == ONE_ROUND else context.blank()
    state = cache.take(task, learner.state_dict(), context.start)
    learner.load_state_dict({name: tensor.clone() for name, tensor in state.items()}, assign=True)
    learner.blend = context.settings.trained_blend if task.blend is None else task.blend
    if isinstance(learner, Lora) and context.settings.start and learner.frozen:
        if task.frozen is None:
            raise ExchangeError("the server's message lacks the tensors that are not trained")
        learner.take(read_adapter(task.frozen, learner.frozen))
    return learner.to(context.device)


def report_on(learner: Learner | None, context: SiteContext, by_class: bool) -> Report:
    """The learner's scores, or zero-shot's, on the site's validation and test images."""
    if isinstance(learner, ClosedForm) and not learner.counts.any():
        learner = None  # its own arithmetic would differ in the last digits
    site, test = context.site, examine(learner, context.site.test, context.classes)
    validation = evaluate(learner, site.validation, context.classes)
    return Report(len(site.train.labels), validation, test if by_class else replace(test, classes=None))


def learn(learner: Learner, site: Site, classes: Classes, settings: Settings, number: int) -> None:
    """Trains the learner in place for round `number`."""
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


def learn_alone(learner: Learner, site: Site, classes: Classes, settings: Settings) -> float:
    """Personalises the learner in place, an adapter for as many epochs as in the run; returns what was selected."""
    if isinstance(learner, OneRound):
        return one_round.personalize(learner, site.train, site.validation, classes)
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
