"""Runs read by an address; file:// stands for an object store here, through the same file systems of pyarrow."""

import gc

import pytest
from typer.testing import CliRunner

from fasttrace.cli import app as cli
from fasttrace.errors import StoreError
from fasttrace.runs.store import Store
from tests.helpers.records import new_store, skipped, traced


@pytest.fixture
def store(tmp_path):
    store = new_store(tmp_path)
    store.describe("facts", 2, [], ["0", "1"])
    store.write([traced(0), skipped(1)])
    return store


def test_a_run_is_read_by_its_address_from_a_copy_that_goes_with_it(store):
    address = store.folder.as_uri()
    found = Store.read(address)
    assert list(found.records()) == list(Store.read(store.folder).records())
    assert found.damaged == ()
    copy = found.folder
    assert copy.is_dir()
    assert copy != store.folder
    del found
    gc.collect()
    assert not copy.exists()


def test_a_part_that_is_damaged_in_the_object_store_is_named(store):
    part = next((store.folder / "parts").iterdir())
    part.write_bytes(part.read_bytes()[:-1] + b"x")
    assert [path.name for path in Store.read(store.folder.as_uri()).damaged] == [part.name]


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("nosuch://bucket/run", "cannot read nosuch://bucket/run .*check the address"),
        ("file:///nowhere/at/all", r"no manifest\.json|no folder"),
        ("://", "cannot read ://"),
    ],
)
def test_an_address_that_cannot_be_read_is_one_sentence(address, said):
    with pytest.raises(StoreError, match=said) as error:
        Store.read(address)
    assert "\n" not in str(error.value)


def test_commands_read_an_address_and_ask_where_to_write(store, tmp_path):
    address = store.folder.as_uri()
    for name, out in (("average", tmp_path / "a"), ("export", tmp_path / "e"), ("report", tmp_path / "r.html")):
        refused = CliRunner().invoke(cli.app, [name, address])
        assert (refused.exit_code, "--out" in refused.stderr) == (2, True)
        assert CliRunner().invoke(cli.app, [name, address, "--out", str(out)]).exit_code == 0
        assert out.exists()
    assert sorted(path.name for path in store.folder.iterdir()) == ["manifest.json", "parts"]
