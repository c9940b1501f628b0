from __future__ import annotations

import math
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import brentq
from scipy.stats import kstest, norm

from fedclip_flwr.base.errors import UserError
from fedclip_flwr.base.settings import Settings
from fedclip_flwr.base.tensors import State, length_of
from fedclip_flwr.exchange import privacy
from fedclip_flwr.server import noised
from fedclip_flwr.server.strategy import gather_of
from tests.extras import needs

SENT = {"a": torch.full((200, 300), 3.0), "b": torch.zeros(5_000)}
NUMBERS = 65_000


def moved(by: float, seed: int) -> State:
    """A trained state at the distance `by` from the one that was sent."""
    chance = torch.Generator().manual_seed(seed)
    way = {name: torch.randn(tensor.shape, generator=chance) for name, tensor in SENT.items()}
    zero = {name: torch.zeros_like(tensor) for name, tensor in way.items()}
    return {name: SENT[name] + by / length_of(way, zero) * way[name] for name in way}


def difference(state: State, other: State) -> np.ndarray[Any, np.dtype[np.float64]]:
    return np.concatenate([(state[name].double() - other[name].double()).flatten().numpy() for name in SENT])


def mean_of(settings: Settings, updates: dict[str, State], weights: dict[str, float]) -> State:
    gathering = gather_of(settings)(SENT)
    for site, state in updates.items():
        gathering.add(site, state, weights[site])
    made = gathering.close().state
    assert made
    return made


UPDATES = {"small": moved(0.2, 1), "large": moved(40.0, 2), "echo": dict(SENT)}
WEIGHTS = {"small": 10.0, "large": 70.0, "echo": 20.0}


def clean() -> State:
    """By hand: the weighted mean of what is cut to 0.5; of 0.2 nothing is cut, of 40 all but an eightieth."""
    return {
        name: SENT[name].double()
        + 0.1 * (UPDATES["small"][name].double() - SENT[name].double())
        + 0.7 / 80 * (UPDATES["large"][name].double() - SENT[name].double())
        for name in SENT
    }


def test_central_noise_has_the_deviation_that_hides_the_site_that_weighs_most() -> None:
    settings = Settings(dp="central", noise_multiplier=3.0, clipping_norm=0.5)
    noise = difference(mean_of(settings, UPDATES, WEIGHTS), clean())
    sigma = 3.0 * 0.5 * 70 / 100
    assert noise.std() == pytest.approx(sigma, rel=6 / math.sqrt(2 * NUMBERS))
    assert abs(noise.mean()) < 6 * sigma / math.sqrt(NUMBERS)
    assert kstest(noise / sigma, norm.cdf).pvalue > 1e-6
    equal = difference(mean_of(settings, UPDATES, dict.fromkeys(WEIGHTS, 1.0)), clean())
    assert equal.std() == pytest.approx(3.0 * 0.5 / 3, rel=0.02)


def test_without_noise_to_speak_of_the_mean_is_that_of_cut_updates() -> None:
    settings = Settings(dp="central", noise_multiplier=0.01, clipping_norm=0.5)
    np.testing.assert_allclose(difference(mean_of(settings, UPDATES, WEIGHTS), clean()), 0, atol=6 * 0.01 * 0.5 * 0.7)


def test_a_sum_that_the_server_can_not_see_into_gets_the_same_noise() -> None:
    settings = Settings(dp="central", noise_multiplier=3.0, clipping_norm=0.5, secure_aggregation=True)
    noise = difference(noised.of_sum(SENT, SENT, 10, settings), SENT)
    assert noise.std() == pytest.approx(0.15, rel=0.02)
    assert noised.of_sum(UPDATES["large"], SENT, 10, Settings(secure_aggregation=True)) is UPDATES["large"]
    hostile = noised.of_sum(UPDATES["large"], SENT, 10, replace(settings, noise_multiplier=0.01))
    assert length_of(hostile, SENT) == pytest.approx(0.5, rel=0.1)  # one of ten that does not cut, and moves all by 40
    cut = privacy.at_site(UPDATES["large"], SENT, settings)
    assert length_of(cut, SENT) == pytest.approx(0.5, rel=1e-4)


def test_local_noise_is_on_what_a_site_sends_and_does_not_depend_on_its_size() -> None:
    settings = Settings(dp="local", noise_multiplier=2.0, clipping_norm=0.5)
    for update, share in ((UPDATES["small"], 1.0), (UPDATES["large"], 1 / 80), (UPDATES["echo"], 1.0)):
        sent = privacy.at_site(update, SENT, settings)
        noise = difference(sent, SENT) - share * difference(update, SENT)
        assert noise.std() == pytest.approx(1.0, rel=0.02)
        assert sent["a"].dtype == torch.float32
    assert privacy.at_site(UPDATES["large"], SENT, Settings()) is UPDATES["large"]
    assert privacy.at_site(UPDATES["large"], SENT, Settings(dp="central")) is UPDATES["large"]


def test_noise_is_another_each_time_whatever_was_seeded() -> None:
    settings = Settings(dp="central")
    found = []
    for _ in range(2):
        torch.manual_seed(0)
        np.random.seed(0)
        found.append(mean_of(settings, UPDATES, WEIGHTS))
    assert not (difference(*found) == 0).any()


def test_only_echoes_crash_nothing() -> None:
    settings = Settings(dp="central", noise_multiplier=1.0, clipping_norm=1.0)
    noise = difference(mean_of(settings, {"echo": dict(SENT)}, {"echo": 1.0}), SENT)
    assert noise.std() == pytest.approx(1.0, rel=0.02)


def test_numbers_that_can_not_be_averaged_are_refused() -> None:
    gathering = gather_of(Settings(dp="central"))(SENT)
    with pytest.raises(UserError, match="expected numbers below 16,384"):
        gathering.add("bad", {**SENT, "a": SENT["a"] * float("nan")}, 1.0)
    assert gathering.close().state is None


def exact(multiplier: float, rounds: int, delta: float) -> float:
    """Of so many Gaussian mechanisms, by Balle and Wang (arXiv 1805.06530, theorem 8), solved by bisection."""
    mu = math.sqrt(rounds) / multiplier

    def too_much(epsilon: float) -> float:
        return float(norm.cdf(mu / 2 - epsilon / mu) - math.exp(epsilon + norm.logcdf(-mu / 2 - epsilon / mu)) - delta)

    return float(brentq(too_much, 0, 1e4))


@needs("privacy")
@pytest.mark.parametrize(("multiplier", "rounds", "delta"), [(1.0, 20, 1e-5), (8.0, 20, 1e-6), (30.0, 500, 1e-3)])
def test_epsilon_is_what_other_accountants_find(multiplier: float, rounds: int, delta: float) -> None:
    """The closed form, and Google's numerical composition of privacy losses round by round."""
    from dp_accounting import GaussianDpEvent, SelfComposedDpEvent
    from dp_accounting.pld import PLDAccountant

    central, local = (Settings(dp=dp, noise_multiplier=multiplier, delta=delta) for dp in ("central", "local"))
    for settings, own in ((central, multiplier), (local, multiplier / 2)):
        epsilon = privacy.spent(settings, [rounds, 3, 1])
        assert epsilon == pytest.approx(exact(own, rounds, delta), rel=1e-6)
        accountant = PLDAccountant()
        accountant.compose(SelfComposedDpEvent(GaussianDpEvent(own), rounds))
        assert epsilon == pytest.approx(accountant.get_epsilon(delta), rel=1e-3)


@needs("privacy")
def test_nothing_is_spent_before_the_first_round_and_nothing_reported_without_noise() -> None:
    assert privacy.spent(Settings(dp="central"), []) == 0.0
    assert privacy.spent(Settings(dp="local"), [0, 0]) == 0.0
    assert privacy.spent(Settings(), [5]) is None


def test_without_the_accountant_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    privacy._epsilon.cache_clear()
    with pytest.raises(UserError, match=r"pip install 'fedclip-flwr\[privacy\]'"):
        privacy.spent(Settings(dp="central"), [1])


def test_what_does_not_go_with_it_is_refused() -> None:
    with pytest.raises(UserError, match="its noise is for a mean, which strategy = 'krum' does not use"):
        Settings.from_run_config({"dp": "central", "strategy": "krum"})
    Settings.from_run_config({"dp": "local", "strategy": "krum", "codec": "int8"})
    with pytest.raises(UserError, match=r"noise-multiplier = 0: expected at least 0\.01"):
        Settings.from_run_config({"dp": "central", "noise-multiplier": 0})
    with pytest.raises(UserError, match="it is for adapters"):
        Settings.from_run_config({"dp": "central", "method": "full-model"})


def test_only_what_is_longer_than_the_norm_is_cut_and_then_to_it() -> None:
    base, state = {"a": torch.tensor([1.0, 1.0])}, {"a": torch.tensor([4.0, 5.0])}  # an update of 3 and 4: 5 long
    assert privacy.clipped(state, base, 1.0)["a"].tolist() == pytest.approx([1.6, 1.8])
    assert privacy.clipped(state, base, 10.0)["a"].tolist() == [4.0, 5.0]
    assert privacy.clipped(base, base, 1.0)["a"].tolist() == [1.0, 1.0]
