"""What one site does with a message from the server."""

from __future__ import annotations

import logging
import sys
import warnings

import torch
from flwr.app import Context, Error, Message
from flwr.clientapp import ClientApp
from flwr.clientapp.typing import ClientAppCallable
from flwr.common.constant import ErrorCode

from fedclip_flwr import content, exchange
from fedclip_flwr.adapters import Adapter, tensor_names
from fedclip_flwr.config import Settings
from fedclip_flwr.errors import UserError
from fedclip_flwr.exchange import ExchangeError, Hello, Report, Task
from fedclip_flwr.features import home
from fedclip_flwr.learning import RECIPES, evaluate, seed_of, train
from fedclip_flwr.sites import Desk, new_adapter, open_desk

log = logging.getLogger("fedclip_flwr")
logging.getLogger("flwr").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", category=FutureWarning, module="ray")  # a tip for Ray's own users


def guard(message: Message, context: Context, answer: ClientAppCallable) -> Message:
    """Lets nothing out but what may leave a site; what goes wrong is answered as an error of one line."""
    try:
        reply = answer(message, context)
        exchange.check_outgoing(reply.content, tensor_names(Settings.from_run_config(context.run_config).adapter))
        return reply
    except Exception as error:
        expected = isinstance(error, UserError | ExchangeError)
        why = exchange.one_line(error if expected else f"{type(error).__name__}: {error}")
        log.error("this site answers with an error: %s", why, exc_info=None if expected else error)  # the trace stays
        return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, why), reply_to=message)


app = ClientApp(mods=[guard])


@app.query()
def hello(message: Message, context: Context) -> Message:
    """Who this site is and how much it holds."""
    task = exchange.read_task(message.content)
    desk = desk_of(context, task)
    site = desk.site
    desk.require(task.class_names)
    counts = {part: len(getattr(site, part).labels) for part in ("train", "validation", "test")}
    said = Hello(
        site=site.name,
        role="train",
        domain=site.domain,
        classes=site.class_numbers,
        package=content.of_package(home() / "contents"),
        **counts,
    )
    return Message(exchange.write_hello(said), reply_to=message)


@app.train()
def learn(message: Message, context: Context) -> Message:
    """How the received adapter does here, and the adapter trained on."""
    task = exchange.read_task(message.content)
    desk = desk_of(context, task)
    adapter = received(task, desk)
    report = report_on(adapter, desk)
    settings, recipe = desk.settings, RECIPES[desk.settings.recipe]
    train(
        adapter,
        desk.site.train,
        desk.classes,
        recipe,
        learning_rate=settings.learning_rate or recipe.rate(settings.adapter, desk.classes.text.shape[1]),
        epochs=settings.local_epochs,
        batch_size=settings.batch_size,
        seed=seed_of(settings.seed, "train", desk.site.name, task.round),
    )
    return Message(exchange.write_answer(report, adapter.state_dict()), reply_to=message)


@app.evaluate()
def score(message: Message, context: Context) -> Message:
    """How the received adapter does here."""
    task = exchange.read_task(message.content)
    desk = desk_of(context, task)
    return Message(exchange.write_answer(report_on(received(task, desk), desk)), reply_to=message)


def desk_of(context: Context, task: Task) -> Desk:
    simulated = "ray" in sys.modules  # a real site's process has no use for it
    if simulated:
        torch.set_num_threads(1)  # simulated sites share the cores: more threads would wait for each other
    return open_desk(context.run_config, context.node_config, task.holdout, simulated)


def received(task: Task, desk: Desk) -> Adapter:
    """The adapter that came with the message."""
    if task.state is None:
        raise ExchangeError("the server's message lacks the adapter")
    adapter = new_adapter(desk.settings, desk.classes.text.shape[1])
    adapter.load_state_dict(exchange.read_adapter(task.state, adapter.state_dict()))
    return adapter.to(desk.device)


def report_on(adapter: Adapter, desk: Desk) -> Report:
    site = desk.site
    return Report(
        examples=len(site.train.labels),
        validation=evaluate(adapter, site.validation, desk.classes),
        test=evaluate(adapter, site.test, desk.classes),
    )
