"""A site's answer in one round: the sums over its training images, exact, noised, or masked."""

from __future__ import annotations

from flwr.app import RecordDict
from torch import Tensor

from fedclip_flwr.base import Settings
from fedclip_flwr.base.settings import GRADIENT
from fedclip_flwr.base.tensors import State
from fedclip_flwr.exchange import ExchangeError, Task
from fedclip_flwr.exchange.link import SiteCache
from fedclip_flwr.exchange.records import mark_of, read_task
from fedclip_flwr.exchange.secure.protocol import Memory
from fedclip_flwr.learning import Classes, ClosedForm, Examples, OneRound
from fedclip_flwr.learning.gradient import gradient_of
from fedclip_flwr.learning.noised_sums import most_of
from fedclip_flwr.learning.sums import BITS, FINE, sums_of
from fedclip_flwr.site.context import SiteContext
from fedclip_flwr.site.given import GivenSums


def blank_form(task: Task, context: SiteContext) -> ClosedForm:
    """A learner for the state in the message: classes may have been added since the directions were chosen."""
    learner = context.blank()
    assert isinstance(learner, ClosedForm)
    if isinstance(learner, OneRound) and task.arrays and "basis" in task.arrays:
        width, dim = (*task.arrays["basis"].shape, 0)[0], learner.basis.shape[1]
        if width and width != len(learner.basis) and width < dim:
            return OneRound("", len(learner.counts), dim, width)
    return learner


def sums_to_send(
    content: RecordDict, context: SiteContext, cache: SiteCache, memory: Memory | None, given: GivenSums | None
) -> State:
    """The tensors of the answer."""
    task, settings, site = read_task(content), context.settings, context.site
    learner = blank_form(task, context)
    needed = cache.take(task, {learner.NEEDED: learner.state_dict()[learner.NEEDED]}, context.start)[learner.NEEDED]
    if not 0 < task.bits <= BITS:
        raise ExchangeError(f"the server asks for sums in parts of {task.bits} bits, expected 1 to {BITS}")
    if settings.hides_images and task.bits not in FINE:
        raise ExchangeError(f"the server asks for sums in parts of {task.bits} bits: too coarse to hide an image")
    sums = exact_sums(site.train, context.classes, settings, needed, task.bits)
    if settings.noise_leaves:
        from fedclip_flwr.exchange.private_sums import Hiding  # imports an extra

        exact, hiding = sums, Hiding.of(settings, sums, needed, task.bits)
        asked = f"{mark_of({'needed': needed})} {sorted(hiding.at_site.items())}"
        sums = cache.once(site.name, asked, lambda: hiding.leaving(exact))
    return as_sent(sums, needed, content, memory, given)


def exact_sums(examples: Examples, classes: Classes, settings: Settings, needed: Tensor, bits: int) -> State:
    """What a site with these images answers before noise and masks; `needed` and `bits` come from the server."""
    if settings.statistics == GRADIENT:
        return gradient_of(examples, needed, float(classes.scale))
    most = most_of(needed) if settings.hides_images else 1.0
    return sums_of(examples, needed, len(classes.text), bits, most)


def as_sent(sums: State, needed: Tensor, content: RecordDict, memory: Memory | None, given: GivenSums | None) -> State:
    """The sums as they answer the message: masked if there is a `memory`, in place of what was `given` before."""
    if memory is None:
        return sums
    from fedclip_flwr.exchange.secure import site  # imports cryptography, which few runs need

    if given:
        unit = f"{mark_of({'basis': needed})}/{read_task(content).bits}"
        sums = given.difference(sums, unit, *site.replacing(content))
    return site.masked_sums(content, memory, sums)
