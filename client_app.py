"""The ClientApp: how a site answers the server's messages."""

from __future__ import annotations

import gc

gc.disable()  # a deployed site starts a process for each message, and garbage collection takes a sixth of the start

import logging
import warnings
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

import torch
from flwr.app import Context, Error, Message, MessageType
from flwr.clientapp import ClientApp

from fedclip_flwr.base import UserError, content, files
from fedclip_flwr.base.errors import ReadError, one_line
from fedclip_flwr.base.settings import GRADIENT, LORA, ONE_ROUND
from fedclip_flwr.exchange import ExchangeError, Hello, Progress, records
from fedclip_flwr.exchange.codecs import packs
from fedclip_flwr.exchange.link import SiteCache, StatesOnDisk, forget
from fedclip_flwr.exchange.records import LACKS, LacksError
from fedclip_flwr.exchange.secure import protocol
from fedclip_flwr.exchange.secure.protocol import LetterError, MaskingError
from fedclip_flwr.exchange.session import Session, recall
from fedclip_flwr.features import encoding
from fedclip_flwr.flower.clientapp import RAISED, ClientAppCallable
from fedclip_flwr.learning import Learner, OneRound
from fedclip_flwr.learning.adapters import tensor_names
from fedclip_flwr.learning.gradient import SENT
from fedclip_flwr.learning.one_round import SUMS
from fedclip_flwr.runs.saved import save_adapter
from fedclip_flwr.site import OpenedContext, open_context
from fedclip_flwr.site.context import GROUP, in_simulation, settings_at
from fedclip_flwr.site.given import GivenSums, check_noted, note
from fedclip_flwr.site.holdings import mark_of_images
from fedclip_flwr.site.work import answer_evaluate, answer_train

if TYPE_CHECKING:
    from fedclip_flwr.runs.relay import Relay

gc.freeze()
gc.enable()

MANY_IMAGES = 50_000
"""From this number of images on, a site trains adapters with several threads. With fewer images, threads on a busy
machine mostly wait for each other, which costs more than they save."""

log = logging.getLogger("fedclip_flwr")
flower_log = logging.getLogger("flwr")
flower_log.setLevel(max(flower_log.level, logging.ERROR))  # a ServerApp of this process may have silenced it further
warnings.filterwarnings("ignore", category=FutureWarning, module="ray")  # advice for users of Ray itself


def guard(message: Message, context: Context, answer: ClientAppCallable) -> Message:
    """Sends only what may leave a site; answers every failure with an error of one line."""
    try:
        reply = answer(message, context)
        if (step := message.metadata.message_type.removeprefix("query.")) in protocol.ANSWERS:
            records.check_leaving(reply.content, {step: protocol.ANSWERS[step]})
        else:
            shared = shares_classes(context), chooses(context)
            records.check_outgoing(reply.content, tensors_to_send(message, context), *shared)
        return reply
    except LacksError as error:
        return Message(Error(LACKS, str(error)), reply_to=message)
    except LetterError as error:
        log.error("this site can't continue in this round: %s", error)
        return Message(Error(records.BLAMES, error.sender), reply_to=message)
    except Exception as error:
        expected = isinstance(error, UserError | ExchangeError | MaskingError)
        why = one_line(error if expected else f"{type(error).__name__}: {error}")
        log.error("this site answers with an error: %s", why, exc_info=None if expected else error)  # only here
        if isinstance(error, ReadError):
            why = one_line(error.unnamed)
        if message.metadata.message_type == MessageType.QUERY and (name := context.node_config.get("site")):
            why = one_line(f"{name}: {why}")  # the server knows only the node's number
        return Message(Error(RAISED, why), reply_to=message)
    finally:
        torch.cuda.empty_cache()  # other processes on this GPU may need it meanwhile


app = ClientApp(mods=[guard])


@app.query()
def hello(message: Message, context: Context) -> Message:
    """The site's name, role and numbers of images; or its progress in encoding, and the server asks again."""
    if masks(context) and not context.run_config.get("secure-aggregation"):
        raise UserError("this site sends its updates only in runs with secure-aggregation = true")
    if relay := relay_for(message, context):
        plugins = settings_at(context.run_config, context.node_config).shared_packages
        answer = relay.hello(content.of_package(content.memory()), plugins)
        return Message(records.write_hello(answer), reply_to=message)
    try:
        with encoding.at_most(records.slice_of(float(context.run_config["round-timeout"]))):
            opened = opened_for(message, context)
    except encoding.UnfinishedError as error:
        name = str(context.node_config.get("site") or f"node {context.node_id}")
        return Message(records.write_progress(Progress(name, error.done, error.of)), reply_to=message)
    site = opened.site
    opened.require_same_model()
    forget()
    mark = mark_of(opened) if opened.settings.keeps_sums else ""  # it tells if images are those of another run
    if mark and masks(context):
        note(opened.session.key, site.name, mark)
    answer = Hello(
        site=site.name,
        role=site.role,
        domain=site.domain,
        train=len(site.train.labels),
        validation=len(site.validation.labels),
        test=len(site.test.labels),
        classes=site.class_numbers,
        package=content.of_package(content.memory()),
        unit_length=opened.features.has_unit_length(),
        plugins=opened.settings.shared_packages,
        content=mark,
    )
    return Message(records.write_hello(answer), reply_to=message)


@app.train()
def learn(message: Message, context: Context) -> Message:
    """The scores of the received adapter on this site's images, and the trained adapter."""
    memory = context.state.config_records if masks(context) else None
    if relay := relay_for(message, context):
        return Message(relay.answer_train(message.content, memory), reply_to=message)
    opened = opened_for(message, context)
    given = None
    if masks(context) and opened.settings.keeps_sums:
        mark = mark_of(opened)
        check_noted(opened.session.key, opened.site.name, mark, "this site's images")
        given = GivenSums(opened.site.name, mark, opened.session.vocabulary.class_names)
    how: dict[str, Any] = {"by_class": shares_classes(context), "memory": memory, "given": given}
    return Message(answer_train(message.content, opened, cache_of(opened), **how), reply_to=message)


@app.query("keys")
@app.query("shares")
@app.query("unmask")
def mask(message: Message, context: Context) -> Message:
    """The steps of secure aggregation before and after a masked update."""
    from fedclip_flwr.exchange.secure import site  # imports cryptography, which few runs need

    step = site.STEPS[message.metadata.message_type.removeprefix("query.")]
    return Message(step(message.content, context.state.config_records), reply_to=message)


@app.evaluate()
def score(message: Message, context: Context) -> Message:
    """The scores of the received adapter; at the end of a run that personalises, of the site's own adapter."""
    if relay := relay_for(message, context):
        return Message(relay.answer_evaluate(), reply_to=message)
    opened = opened_for(message, context)

    def keep(adapter: Learner, number: int, chosen: float) -> None:
        save_own(adapter, opened, number, chosen)

    by_class = shares_classes(context)
    return Message(
        answer_evaluate(message.content, opened, cache_of(opened), by_class=by_class, keep=keep), reply_to=message
    )


def save_own(adapter: Learner, opened: OpenedContext, number: int, chosen: float) -> None:
    """Saves the site's own adapter, which is never sent."""
    run, name = content.file_name(opened.session.run), opened.site.name
    folder = files.home() / "personal" / run / content.file_name(name)
    state = {name: tensor.cpu() for name, tensor in {**adapter.state_dict(), **adapter.frozen}.items()}
    about: dict[str, Any] = {"site": name}
    if isinstance(adapter, OneRound):
        about["personal_weight"] = chosen
    else:
        about |= {"blend": adapter.blend, "personal_epoch": chosen}
    save_adapter(folder, state, opened.settings, opened.features, number, **about)


def opened_for(message: Message, context: Context) -> OpenedContext:
    """The site's context for the message."""
    simulated = in_simulation()
    if simulated:
        torch.set_num_threads(1)  # simulated sites share the cores
    opened = open_context(context.run_config, context.node_config, session_of(message), simulated)
    if opened.settings.method not in ("full-model", LORA) and len(opened.site.train.labels) < MANY_IMAGES:
        torch.set_num_threads(1)
    return opened


def session_of(message: Message) -> Session:
    """The session of the message. A hello has it itself, later messages its key."""
    task = records.read_task(message.content)
    if task.session:
        task.session.remember(content.memory())
    return task.session or recall(task.key, content.memory())


def relay_for(message: Message, context: Context) -> Relay | None:
    """The relay that answers, if this site's owner has named a group in place of images."""
    if GROUP not in context.node_config:
        return None
    from fedclip_flwr.runs.relay import Relay  # imports the server's side, which other sites don't need

    return Relay.open(context.run_config, context.node_config, session_of(message))


def cache_of(opened: OpenedContext) -> SiteCache:
    return SiteCache(StatesOnDisk(opened.session.key), opened.settings.codec)


def mark_of(opened: OpenedContext) -> str:
    return mark_of_images(opened.site, opened.session.vocabulary.class_names)


def shares_classes(context: Context) -> bool:
    """True if the site's owner shares counts by class."""
    return context.node_config.get("share-class-counts") is True


def chooses(context: Context) -> bool:
    """True if sites score constants in this run."""
    return context.run_config.get("method") == ONE_ROUND and context.run_config.get("one-round-choose") is True


def masks(context: Context) -> bool:
    """True if this site sends masked updates only, by the run's settings or its owner's."""
    return any(config.get("secure-aggregation") is True for config in (context.run_config, context.node_config))


def tensors_to_send(message: Message, context: Context) -> Collection[str]:
    """The names of the tensors that may be sent: the adapter's, the whole model's, sums or, if packed, the codec's."""
    if masks(context):
        return [protocol.MASKED]
    codec, method, adapter = (str(context.run_config.get(key, "")) for key in ("codec", "method", "adapter"))
    if packs(codec or "float32"):
        return [codec]
    if method == ONE_ROUND:
        return SENT if context.run_config.get("statistics") == GRADIENT else SUMS
    if method == "adapter":
        return tensor_names(adapter)
    if method == LORA:  # the other answers have none: the model need not be loaded
        return opened_for(message, context).start() if message.metadata.message_type == MessageType.TRAIN else ()
    return message.content.array_records.get("arrays", {}).keys()
