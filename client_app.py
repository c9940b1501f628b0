"""What one site does with a message from the server."""

from __future__ import annotations

import gc

gc.disable()  # a deployed site answers each message in a new process, and a sixth of its start is looking for garbage

import logging
import warnings
from collections.abc import Collection
from dataclasses import replace

import torch
from flwr.app import Context, Error, Message, MessageType
from flwr.clientapp import ClientApp
from flwr.clientapp.typing import ClientAppCallable
from flwr.common.constant import ErrorCode

from fedclip_flwr.base import content, files
from fedclip_flwr.base.errors import ReadError, UserError, one_line
from fedclip_flwr.exchange import privacy, records
from fedclip_flwr.exchange.codecs import CODECS
from fedclip_flwr.exchange.link import Shelf, forget
from fedclip_flwr.exchange.records import LACKS, ExchangeError, Hello, LacksError, Progress, Report, Task
from fedclip_flwr.exchange.secure import protocol
from fedclip_flwr.exchange.secure.protocol import LetterError, MaskingError
from fedclip_flwr.exchange.session import recall
from fedclip_flwr.features import encoding
from fedclip_flwr.learning.adapters import Adapter, tensor_names
from fedclip_flwr.learning.base import Learner
from fedclip_flwr.learning.training import evaluate, examine
from fedclip_flwr.runs.saved import save_adapter
from fedclip_flwr.site.context import Desk, in_simulation, open_desk
from fedclip_flwr.site.work import learn as learn_on
from fedclip_flwr.site.work import learn_alone

gc.freeze()
gc.enable()

MANY = 50_000
"""Images of a site, from which on adapters learn with more than one thread: on a busy machine threads mostly wait for
each other, and that costs far more than they ever save for fewer."""

log = logging.getLogger("fedclip_flwr")
flowers = logging.getLogger("flwr")
flowers.setLevel(max(flowers.level, logging.ERROR))  # a ServerApp in this process, which gave up, may want less of it
warnings.filterwarnings("ignore", category=FutureWarning, module="ray")  # a tip for Ray's own users


def guard(message: Message, context: Context, answer: ClientAppCallable) -> Message:
    """Lets nothing out but what may leave a site; what goes wrong is answered as an error of one line."""
    try:
        reply = answer(message, context)
        if (step := message.metadata.message_type.removeprefix("query.")) in protocol.ANSWERS:
            records.check_leaving(reply.content, {step: protocol.ANSWERS[step]})
        else:
            records.check_outgoing(reply.content, travelling(message, context), shares_classes(context))
        return reply
    except LacksError as error:
        return Message(Error(LACKS, str(error)), reply_to=message)
    except LetterError as error:
        log.error("this site can't go on in this round: %s", error)
        return Message(Error(records.BLAMES, error.sender), reply_to=message)
    except Exception as error:
        expected = isinstance(error, UserError | ExchangeError | MaskingError)
        why = one_line(error if expected else f"{type(error).__name__}: {error}")
        log.error("this site answers with an error: %s", why, exc_info=None if expected else error)  # the trace stays
        if isinstance(error, ReadError):
            why = one_line(error.unnamed)
        if message.metadata.message_type == MessageType.QUERY and (name := context.node_config.get("site")):
            why = one_line(f"{name}: {why}")  # the server knows its number only
        return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, why), reply_to=message)
    finally:
        torch.cuda.empty_cache()  # others on this GPU may need it before the next message comes


app = ClientApp(mods=[guard])


@app.query()
def hello(message: Message, context: Context) -> Message:
    """Who this site is and how much it holds; or how far it has come with encoding, to be asked again."""
    task = records.read_task(message.content)
    if masks(context) and not context.run_config.get("secure-aggregation"):
        raise UserError("this site gives its updates only in runs with secure-aggregation = true")
    try:
        with encoding.at_most(records.slice_of(float(context.run_config["round-timeout"]))):
            desk = desk_of(context, task)
    except encoding.UnfinishedError as error:
        name = str(context.node_config.get("site") or f"node {context.node_id}")
        return Message(records.write_progress(Progress(name, error.done, error.of)), reply_to=message)
    site = desk.site
    desk.require()
    forget()
    counts = {part: len(getattr(site, part).labels) for part in ("train", "validation", "test")}
    said = Hello(
        site=site.name,
        role=site.role,
        domain=site.domain,
        classes=site.class_numbers,
        package=content.of_package(content.memory()),
        unit_length=desk.features.has_unit_length(),
        **counts,
    )
    return Message(records.write_hello(said), reply_to=message)


@app.train()
def learn(message: Message, context: Context) -> Message:
    """How the received adapter does here, and the adapter trained on."""
    task = records.read_task(message.content)
    desk = desk_of(context, task)
    shelf = Shelf(desk.session.key, desk.settings.codec)
    learner = received(task, desk, shelf)
    report = report_on(learner, desk, context)
    protected = masks(context) or desk.settings.dp != "off"
    before = learner.on_cpu() if protected else {}
    learn_on(learner, desk.site, desk.classes, desk.settings, task.round)
    trained = {name: tensor.cpu() for name, tensor in learner.state_dict().items()}
    trained = privacy.at_site(trained, before, desk.settings)
    if masks(context):
        from fedclip_flwr.exchange.secure import site  # not for all: it brings cryptography

        sent = site.masked(message.content, context.state.config_records, trained, before)
    else:
        sent = shelf.pack(trained, desk.site.name, task.round, desk.settings.seed)
    return Message(records.write_answer(report, sent), reply_to=message)


@app.query("keys")
@app.query("shares")
@app.query("unmask")
def mask(message: Message, context: Context) -> Message:
    """With secure aggregation, the steps before and after an update that is masked."""
    from fedclip_flwr.exchange.secure import site

    step = site.STEPS[message.metadata.message_type.removeprefix("query.")]
    return Message(step(message.content, context.state.config_records), reply_to=message)


@app.evaluate()
def score(message: Message, context: Context) -> Message:
    """How the received adapter does here; or, at the end of a run that personalises, the site's own made from it."""
    task = records.read_task(message.content)
    desk = desk_of(context, task)
    learner = received(task, desk, Shelf(desk.session.key, desk.settings.codec))
    if task.personal:
        keep_own(learner, desk, task.round)
    return Message(records.write_answer(report_on(learner, desk, context)), reply_to=message)


def keep_own(adapter: Learner, desk: Desk, number: int) -> None:
    """Makes the adapter the site's own and keeps it here."""
    assert isinstance(adapter, Adapter)  # the settings have it so
    site = desk.site
    epoch = learn_alone(adapter, site, desk.classes, desk.settings)
    folder = files.home() / "personal" / content.file_name(desk.session.run) / content.file_name(site.name)
    state = {name: tensor.cpu() for name, tensor in adapter.state_dict().items()}
    save_adapter(
        folder,
        state,
        desk.settings,
        desk.features,
        number,
        blend=adapter.blend,
        site=site.name,
        personal_epoch=epoch,
    )


def desk_of(context: Context, task: Task) -> Desk:
    simulated = in_simulation()
    if simulated:
        torch.set_num_threads(1)  # simulated sites share the cores: more threads would wait for each other
    if task.session:
        task.session.remember(content.memory())
    session = task.session or recall(task.key, content.memory())
    desk = open_desk(context.run_config, context.node_config, session, simulated)
    if desk.settings.method == "adapter" and len(desk.site.train.labels) < MANY:
        torch.set_num_threads(1)
    return desk


def shares_classes(context: Context) -> bool:
    """Whether the site's owner shares counts by class."""
    return context.node_config.get("share-class-counts") is True


def masks(context: Context) -> bool:
    """Whether this site gives its updates masked only: by the run's settings, or by its owner's."""
    return any(config.get("secure-aggregation") is True for config in (context.run_config, context.node_config))


def travelling(message: Message, context: Context) -> Collection[str]:
    """The names of the tensors that may go back: an adapter's, or those of the whole model; packed, the codec's."""
    if masks(context):
        return [protocol.MASKED]
    codec, method, adapter = (str(context.run_config.get(key, "")) for key in ("codec", "method", "adapter"))
    if codec in CODECS:
        return [codec]
    if method == "adapter":
        return tensor_names(adapter)
    return message.content.array_records.get("arrays", {}).keys()


def received(task: Task, desk: Desk, shelf: Shelf) -> Learner:
    """The adapter that the message brings, or whatever else is trained."""
    learner = desk.blank()
    state = shelf.take(task, learner.state_dict(), desk.start)
    learner.load_state_dict({name: tensor.clone() for name, tensor in state.items()}, assign=True)
    if task.blend is not None and isinstance(learner, Adapter):
        learner.blend = task.blend
    return learner.to(desk.device)


def report_on(learner: Learner, desk: Desk, context: Context) -> Report:
    site = desk.site
    test = examine(learner, site.test, desk.classes)
    return Report(
        examples=len(site.train.labels),
        validation=evaluate(learner, site.validation, desk.classes),
        test=test if shares_classes(context) else replace(test, classes=None),
    )
