"""Quantiles of Student's t against the printed tables and against what is known of it."""

import math

import pytest

from fasttrace.reports.student import t_quantile

TABLE = {  # degrees of freedom: upper 0.95, 0.975, 0.995
    1: (6.313752, 12.706205, 63.656741),
    2: (2.919986, 4.302653, 9.924843),
    3: (2.353363, 3.182446, 5.840909),
    4: (2.131847, 2.776445, 4.604095),
    5: (2.015048, 2.570582, 4.032143),
    9: (1.833113, 2.262157, 3.249836),
    10: (1.812461, 2.228139, 3.169273),
    23: (1.713872, 2.068658, 2.807336),
    24: (1.710882, 2.063899, 2.796940),
    30: (1.697261, 2.042272, 2.749996),
    60: (1.670649, 2.000298, 2.660283),
    99: (1.660391, 1.984217, 2.626405),
    120: (1.657651, 1.979930, 2.617421),
}


@pytest.mark.parametrize("degrees", TABLE)
def test_quantiles_are_those_of_the_tables(degrees):
    found = [t_quantile(probability, degrees) for probability in (0.95, 0.975, 0.995)]
    assert found == pytest.approx(TABLE[degrees], abs=1e-6)


@pytest.mark.parametrize("probability", [0.6, 0.975, 0.9995])
def test_one_and_two_degrees_of_freedom_have_closed_forms(probability):
    assert t_quantile(probability, 1) == pytest.approx(math.tan(math.pi * (probability - 0.5)), rel=1e-12)
    spread = 2 * probability - 1
    assert t_quantile(probability, 2) == pytest.approx(spread * math.sqrt(2 / (1 - spread**2)), rel=1e-11)


@pytest.mark.parametrize("degrees", [1000, 1001, 100_000, 999_999])
def test_many_degrees_of_freedom_are_nearly_normal(degrees):
    normal = 1.959963984540054
    expected = normal + (normal**3 + normal) / (4 * degrees)  # Cornish and Fisher's first term
    assert t_quantile(0.975, degrees) == pytest.approx(expected, abs=3 / degrees**2 + 1e-10)


def test_without_a_degree_of_freedom_there_is_no_quantile():
    assert math.isnan(t_quantile(0.975, 0))
