"""The table of sites agrees with the models and with itself."""

from dataclasses import fields

import pytest

from fasttrace.experiment.cells import STREAMS, windows_of
from fasttrace.experiment.sites import MLP, RESIDUAL, SITE, SITES
from fasttrace.models.rules import Parts
from tests.conftest import tiny_anatomy


def test_every_site_is_found_in_every_block(family):
    anatomy = tiny_anatomy(family)
    assert {site.part for site in SITE.values()} <= {field.name for field in fields(Parts)}
    assert [len(anatomy.modules_at(name)) for name in SITES] == [anatomy.n_layers] * len(SITES)


def test_names_are_those_of_the_rows_and_streams_are_sites():
    assert [site.name for site in SITE.values()] == list(SITES)
    assert set(STREAMS) <= set(SITES)


@pytest.mark.parametrize("name", SITES)
def test_the_residual_stream_alone_is_restored_in_single_blocks(name):
    assert windows_of([name], 7) == {name: 1 if SITE[name].stage == RESIDUAL else 7}


def test_an_mlp_is_one_value_by_two_names():
    assert [name for name in SITES if SITE[name].stage == MLP] == ["mlp_activation", "mlp_output"]
    assert [name for name in SITES if SITE[name].is_next_input] == ["block_output"]
