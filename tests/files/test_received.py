"""Files from anyone, with a right checksum and nonsense inside: an error of ours, whatever is done with them."""

import errno
import hashlib
import json
import os
import socket
import threading

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import fasttrace
from fasttrace.errors import FasttraceError, StoreError
from fasttrace.files import received
from fasttrace.files.received import parsed, patiently, read_regular
from fasttrace.files.writing import as_utf8
from fasttrace.reports import page as report
from fasttrace.reports.averages import average
from fasttrace.reports.exports import EXPORTS, export
from fasttrace.reports.page import write_report
from fasttrace.results.result import load
from fasttrace.runs.manifest import _checksum
from fasttrace.runs.parts import PLAIN_COLUMNS, DamagedPartError, read_part
from fasttrace.runs.store import Store
from tests.helpers.records import FINGERPRINT, make_result, rewrite, skipped, traced

DEEP = json.loads("[" * 60 + "]" * 60)
NONSENSE = [
    *(None, True, -1, 2**63, 10**400, 1e308, float("nan")),
    *("", "../../x", "\ud800", "a\nb" * 500),
    *([], [1], [None], [[1, 2]], {}, {"x": 1}, {"block_output": -1}, DEEP),
]


def set_at(value, path, new):
    """The same JSON value with another one at a place, or without it."""
    head, *rest = path
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[head] = set_at(copy[head], rest, new) if rest else new
    return copy


def places_in(value, path=()):
    """Every place in a JSON value, itself excepted."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*path, key)
        if not isinstance(item, list) or len(item) < 4:
            yield from places_in(item, (*path, key))


def error_of(action):
    """What an error of our family says, on one line; None without one."""
    try:
        action()
    except FasttraceError as error:
        text = str(error)
    else:
        return None
    assert "\n" not in text
    return text


@pytest.fixture
def use(monkeypatch, tmp_path):
    """Does everything that can be done with a store; gives the errors, all of our family."""
    monkeypatch.setattr(report, "_plotly_script", lambda: "")
    monkeypatch.setattr("fasttrace.files.writing._sync", lambda _: None)

    def used(folder):
        def store():
            return Store.read(folder)

        actions = [
            lambda: store().done,
            lambda: store().damaged,
            lambda: store().facts(),
            lambda: store().frame(),
            lambda: list(store().records()),
            lambda: average(store().records(), bootstrap=2),
            lambda: write_report(
                store().records(), tmp_path / "r.html", title=as_utf8(store().description.get("name") or None)
            ),
            *(lambda kind=kind: export(store(), tmp_path / kind, kind) for kind in EXPORTS),
        ]
        errors = [error for error in map(error_of, actions) if error]
        left = {path.name for path in tmp_path.iterdir()} - {"run", "r.html", *EXPORTS}
        assert not left
        return errors

    return used


@pytest.fixture
def folder(tmp_path):
    store = Store.open(tmp_path / "run", FINGERPRINT)
    store.describe("facts", 2, [], ["1", "2"])
    store.write([traced(1), skipped(2)])
    return tmp_path / "run"


def part_of(folder):
    (path,) = (folder / "parts").iterdir()
    return path


def replace_part(folder, table):
    """Another table in the place of the only part, under a name with a right checksum."""
    part_of(folder).unlink()
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    content = sink.getvalue().to_pybytes()
    name = f"part-000-000000-00000000-{hashlib.sha256(content).hexdigest()[:16]}.parquet"
    (folder / "parts" / name).write_bytes(content)


def with_column(table, name, values):
    column = pa.array(values, table.schema.field(name).type if not isinstance(values, pa.Array) else None)
    return table.set_column(table.schema.get_field_index(name), name, column)


def test_what_is_right_is_used_without_an_error(folder, use):
    assert use(folder) == []
    replace_part(folder, pq.read_table(part_of(folder)))
    assert use(folder) == []


@pytest.mark.slow
@pytest.mark.parametrize("value", NONSENSE, ids=lambda value: repr(value)[:20])
def test_nonsense_in_the_details_of_a_part_is_an_error_that_names_the_part(folder, use, value):
    table = pq.read_table(part_of(folder))
    first, second = table.column("details").to_pylist()
    right, used = json.loads(first), set()
    for path in places_in(right):
        if path[0] == "metadata" and path[1:] not in [(), ("model",)]:
            continue  # any value is right
        details = json.dumps(set_at(right, path, value))
        replace_part(folder, with_column(table, "details", [details, second]))
        error = error_of(lambda: list(Store.read(folder).records()))
        assert error is None or part_of(folder).name in error
        if error is None and path[0] not in used:
            assert use(folder) == []
            used.add(path[0])


@pytest.mark.parametrize("details", [None, "", "null", "[]", "{}", "[" * 100_000, '{"exact": {"id": "9"}}', "1" * 5000])
def test_details_that_are_no_details_are_an_error_that_names_the_part(folder, use, details):
    table = pq.read_table(part_of(folder))
    replace_part(folder, with_column(table, "details", [details, table.column("details")[1].as_py()]))
    assert sum(part_of(folder).name in error for error in use(folder)) == 6


CELLS = [("id", None), ("status", None), ("status", "done"), ("prompt", None), ("subject", None), ("reason", None)]
CELLS += [(name, value) for name in ("n_layers", "n_positions") for value in (None, 0, -1, 3, 2**62)]
CELLS += [(name, value) for name in ("span_start", "span_stop", "target_id") for value in (None, -5)]
CELLS += [(name, value) for name in ("tokens", "token_ids") for value in (None, [], [None] * 7)]
CELLS += [(name, None) for name in ("clean_prob", "corrupted_prob", "corrupted_std")]
CELLS += [(f"{kind}_block_output", value) for kind in ("prob", "std") for value in (None, [], [None] * 35, [1.0] * 36)]


@pytest.mark.parametrize(("name", "value"), CELLS, ids=lambda value: str(value)[:20])
def test_nonsense_in_a_cell_of_a_part_is_an_error(folder, use, name, value):
    table = pq.read_table(part_of(folder))
    first, second = table.column(name).to_pylist()
    changed = [first, value] if name == "reason" else [value, second]
    replace_part(folder, with_column(table, name, changed))
    store = Store.read(folder)
    if not store.damaged:
        with pytest.raises(DamagedPartError, match=part_of(folder).name):
            list(store.records())
    use(folder)


def test_columns_that_are_missing_of_another_type_or_unknown_streams_are_damage(folder, use):
    table = pq.read_table(part_of(folder))
    grid = table.column("prob_block_output")
    changed = [table.drop([name]) for name in (*PLAIN_COLUMNS.names, "details")]
    changed += [with_column(table, name, pa.array([b"\xff", b"\xfe"])) for name in table.column_names]
    changed += [with_column(table, name, pa.array([1, 2])) for name in ("id", "details", "prob_block_output")]
    changed += [table.append_column(name, grid) for name in ("prob_../../x", "prob_", "std_/tmp/x", "id")]
    for metadata in ({}, {"fasttrace": "{"}, {"fasttrace": "[" * 100_000}, {"fasttrace": "[]"}, {"fasttrace": "{}"}):
        changed.append(table.replace_schema_metadata(metadata))
    for about in ({"format_version": "9"}, {"format_version": True}, {"format_version": -1}, {"fingerprint": []}):
        right = {"format_version": 1, "fingerprint": FINGERPRINT}
        changed.append(table.replace_schema_metadata({"fasttrace": json.dumps(right | about)}))
    for each in changed:
        replace_part(folder, each)
        assert Store.read(folder).damaged == (part_of(folder),), each.schema
        use(folder)


def test_a_fact_twice_and_columns_of_others_are_no_damage(folder, use):
    table = pq.read_table(part_of(folder))
    replace_part(folder, pa.concat_tables([table, table]).append_column("mine", pa.array([1, 2, 3, 4])))
    assert use(folder) == []
    assert len(Store.read(folder).facts()) == 2


def test_texts_that_are_no_unicode_are_damage(folder, use):
    table = pq.read_table(part_of(folder))
    broken = pa.array([b"\xff\xfe", b"ok"]).view(pa.string())
    replace_part(folder, with_column(table, "prompt", broken))
    errors = use(folder)
    assert errors


@pytest.mark.slow
@pytest.mark.parametrize("value", NONSENSE, ids=lambda value: repr(value)[:20])
def test_nonsense_in_a_manifest_is_an_error_that_names_it(folder, use, value):
    path = folder / "manifest.json"
    right = json.loads(path.read_text())
    del right["checksum"]
    for place in places_in(right):
        changed = set_at(right, place, value)
        path.write_text(json.dumps({**changed, "checksum": _checksum(changed)}))
        error = error_of(lambda: Store.read(folder))
        for each in [error] if error else use(folder):
            assert str(folder) in each or "no fact to average" in each


@pytest.mark.parametrize("key", ["format_version", "fingerprint", "facts"])
def test_a_manifest_without_one_of_its_values_is_refused(folder, key):
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["checksum"], manifest[key]
    path.write_text(json.dumps({**manifest, "checksum": _checksum(manifest)}))
    with pytest.raises(StoreError, match=r"manifest\.json"):
        Store.read(folder)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 50_000, "1" * 10_000, '"\\ud800"'])
def test_json_that_is_nested_deeply_or_is_no_object_is_no_manifest(folder, text):
    (folder / "manifest.json").write_text(text)
    with pytest.raises(StoreError, match="no manifest of fasttrace, or a damaged one"):
        Store.read(folder)
    with pytest.raises(StoreError, match="no manifest of fasttrace, or a damaged one"):
        Store.open(folder, FINGERPRINT)


@pytest.mark.slow
@pytest.mark.parametrize("value", NONSENSE, ids=lambda value: repr(value)[:20])
def test_nonsense_in_a_traces_file_is_an_error_that_names_it(tmp_path, value, monkeypatch):
    monkeypatch.setattr("fasttrace.files.writing._sync", lambda _: None)
    path, changed = tmp_path / "trace.parquet", tmp_path / "changed.parquet"
    make_result().save(path)
    payload = json.loads(pq.read_table(path).schema.metadata[b"fasttrace"])
    for place in places_in(payload):
        changed.write_bytes(path.read_bytes())
        rewrite(changed, lambda _, place=place: json.dumps(set_at(payload, place, value)).encode())
        error = error_of(lambda: load(changed))
        assert error is None or str(changed) in error
        if error is None:
            result = load(changed)
            result.to_frame()
            result.summary()
            error_of(lambda result=result: result.top_tokens("clean", 1))  # it may keep none
            assert {file.parent for file in result.to_csv(tmp_path / "csv")} == {tmp_path / "csv"}


@pytest.mark.parametrize("name", ["../x", "/tmp/x", "x", "Block_output", "block_output "])
def test_a_stream_that_is_no_site_is_refused_when_it_is_read(folder, tmp_path, name):
    grids = {"prob": {name: make_result().prob["block_output"]}, "prob_std": {name: make_result().prob["block_output"]}}
    odd = make_result(**grids, windows={name: 1})
    odd.save(tmp_path / "trace.parquet")
    with pytest.raises(StoreError, match="unknown stream"):
        load(tmp_path / "trace.parquet")
    (path,) = odd.to_csv(tmp_path / "csv")
    assert path.parent == tmp_path / "csv"
    part = Store.open(tmp_path / "other", FINGERPRINT).write([traced(1, **grids, windows={name: 1})])
    with pytest.raises(DamagedPartError, match="unknown stream"):
        read_part(part)
    assert any("unknown stream" in note for note in Store.read(tmp_path / "other").coverage().notes)


# Only regular files are read.


def make_odd(path, kind):
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        with socket.socket(socket.AF_UNIX) as made:
            here = os.getcwd()
            os.chdir(path.parent)  # the path of a socket is short
            try:
                made.bind(path.name)
            finally:
                os.chdir(here)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs here")
@pytest.mark.parametrize("kind", ["fifo", "folder", "device", "socket"])
@pytest.mark.parametrize("place", ["parts", "manifest.json", "trace.parquet"])
def test_what_is_no_regular_file_is_an_error_at_once(folder, tmp_path, kind, place):
    path = tmp_path / place if place == "trace.parquet" else folder / place
    if place == "parts":
        path = path / "part-000-000099-00000000-0123456789abcdef.parquet"
    elif place == "manifest.json":
        path.unlink()
    make_odd(path, kind)
    found = []

    def read():
        try:
            found.append(load(path) if place == "trace.parquet" else Store.read(folder).done)
        except StoreError as error:
            found.append(str(error))

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    reader.join(20)
    assert found, "it waits for ever"
    assert f"a {'FIFO' if kind == 'fifo' else kind} at {path}: expected a regular file" in found[0]


def test_a_link_to_a_regular_file_is_read(folder, tmp_path):
    part = part_of(folder)
    part.rename(tmp_path / "elsewhere")
    part.symlink_to(tmp_path / "elsewhere")
    assert Store.read(folder).done == {"1", "2"}


# A read that fails is tried again, and is no damage.


@pytest.fixture
def failing(monkeypatch):
    """Lets so many reads of files of some name fail."""
    monkeypatch.setattr(received, "WAITS", (0.0, 0.0, 0.0))
    right, left = os.open, []

    def opened(path, *arguments, **options):
        if left and left[0][0] in str(path):
            name, number, times = left.pop()
            left.extend([(name, number, times - 1)] if times > 1 else [])
            raise OSError(number, os.strerror(number), str(path))
        return right(path, *arguments, **options)

    monkeypatch.setattr(received.os, "open", opened)
    return lambda name, number, times: left.append((name, number, times))


PASSING = [errno.ESTALE, errno.EIO, errno.EMFILE, errno.ENFILE, errno.EACCES, errno.ENOMEM, errno.ETIMEDOUT]


@pytest.mark.parametrize("number", PASSING)
def test_a_part_that_cannot_be_read_twice_is_read_the_third_time(folder, failing, number):
    failing("part-", number, 2)
    store = Store.open(folder, FINGERPRINT)
    assert store.done == {"1", "2"}
    assert store.damaged == ()
    assert not (folder / "damaged").exists()


@pytest.mark.parametrize("number", PASSING)
def test_a_part_that_cannot_be_read_at_all_is_named_and_stays_where_it_is(folder, failing, number):
    failing("part-", number, 1000)
    for use in (lambda: Store.open(folder, FINGERPRINT), lambda: Store.read(folder).coverage()):
        with pytest.raises(StoreError, match=r"cannot read .*part-.*tried 4 times") as found:
            use()
        assert not isinstance(found.value, DamagedPartError)
        assert os.strerror(number) in str(found.value)
    assert part_of(folder).exists()
    assert not (folder / "damaged").exists()


@pytest.mark.parametrize("name", ["manifest", "trace"])
def test_a_manifest_and_a_trace_are_tried_again_too(folder, tmp_path, failing, name):
    make_result().save(tmp_path / "trace.parquet")
    read = {"manifest": lambda: Store.read(folder), "trace": lambda: fasttrace.load(tmp_path / "trace.parquet")}[name]
    failing(name, errno.EIO, 3)
    read()
    failing(name, errno.EIO, 1000)
    with pytest.raises(StoreError, match=rf"cannot read .*{name}.*tried 4 times"):
        read()


def test_a_folder_that_cannot_be_listed_once_is_listed_again(folder, monkeypatch):
    monkeypatch.setattr(received, "WAITS", (0.0,))
    calls = []

    def listed():
        calls.append(1)
        if len(calls) == 1:
            raise OSError(errno.ESTALE, "stale")
        return 7

    assert patiently(listed) == 7
    with pytest.raises(FileNotFoundError):
        patiently(lambda: read_regular(folder / "nothing"))


def test_json_as_deep_as_ours_is_read():
    assert parsed('{"a": [[{"b": null}]]}') == {"a": [[{"b": None}]]}
    with pytest.raises(ValueError, match="nested more than 40 deep"):
        parsed("[" * 41 + "]" * 41)
