from __future__ import annotations

import pytest
from scipy import stats

from fedclip_flwr.experiments.paired import difference, quantile, within

VALUES = [1.2, 0.4, -0.3, 2.0, 0.9, 1.1]


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 5, 8, 9, 30, 31, 200])
def test_the_t_distribution_is_scipys(freedom: int) -> None:
    assert quantile(0.95, freedom) == pytest.approx(stats.t.ppf(0.975, freedom), rel=1e-9)
    for t in (0.0, 0.3, 2.0, 9.0):
        assert within(t, freedom) == pytest.approx(1 - 2 * stats.t.sf(t, freedom), abs=1e-12)


@pytest.mark.parametrize("count", [2, 3, 6])
def test_interval_and_test_are_scipys(count: int) -> None:
    values = VALUES[:count]
    found, truth = difference(values), stats.ttest_1samp(values, 0)
    low, high = truth.confidence_interval(0.95)
    assert (found.low, found.high, found.p) == pytest.approx((low, high, truth.pvalue))
    assert found[:2] == pytest.approx((sum(values) / count, count))


def test_of_one_pair_or_of_equal_ones_there_is_no_interval() -> None:
    assert difference([1.5]) == (1.5, 1, None, None, None)
    assert difference([0.1 + 0.2, 0.3, 0.3])[2:] == (None, None, None)


def test_in_words() -> None:
    assert difference([1.5]).text() == "+1.5"
    assert difference([-1.0, -3.0, -2.0]).text() == "-2.0 [-4.5, +0.5], p = 0.074"
    assert difference([5.0, 5.2, 5.0, 5.2, 5.2]).text() == "+5.1 [+5.0, +5.3], p < 0.001"
