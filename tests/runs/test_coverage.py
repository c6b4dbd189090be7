"""What is shown is what was asked: by the store, the commands, the page and the files."""

import json
import logging
import shutil
from dataclasses import replace

import pandas as pd
import pytest
from typer.testing import CliRunner

from fasttrace.cli import app as cli
from fasttrace.errors import StoreError
from fasttrace.reports.averages import average
from fasttrace.reports.exports import export
from fasttrace.results.record import Record
from fasttrace.runs import shelf
from fasttrace.runs import store as stores
from fasttrace.runs.parts import read_part
from fasttrace.runs.store import Store
from tests.helpers.records import FINGERPRINT, fact, flip, result_of, skipped, traced

pytest.importorskip("plotly")


def written(folder, *packs, asked=None):
    """A store whose run was asked for some facts, with a part per pack; gives the parts."""
    store = Store.open(folder, FINGERPRINT)
    parts = [store.write(pack) for pack in packs]
    asked = [record.fact.id for pack in packs for record in pack] if asked is None else list(asked)
    store.describe("facts.jsonl", len(asked), ids=asked)
    return parts


def run(*words):
    return CliRunner().invoke(cli.app, list(map(str, words)))


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr("fasttrace.files.writing._sync", lambda _: None)
    monkeypatch.setattr("fasttrace.cli.facts.find_spec", lambda _: None)  # no figures
    monkeypatch.setattr("fasttrace.reports.page._plotly_script", lambda: "")


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "run"


# Counting.


def test_a_whole_store_says_nothing(folder):
    written(folder, [traced(1), skipped(2)], [traced(3)])
    found = Store.read(folder).coverage()
    assert (found.asked, found.traced, found.skipped, found.missing, found.further) == (3, 2, 1, 0, 0)
    assert (found.damaged, found.ids, found.notes, found.complete) == ((), ("1", "2", "3"), (), True)


def test_a_store_that_was_told_nothing_shows_all_it_has(folder):
    Store.open(folder, FINGERPRINT).write([traced(1)])
    found = Store.read(folder).coverage()
    assert (found.asked, found.missing, found.further, found.ids, found.notes) == (None, 0, 0, ("1",), ())


def test_a_store_without_ids_counts_what_is_missing_and_what_is_more(folder):
    store = Store.open(folder, FINGERPRINT)
    store.write([traced(1), traced(2), traced(3)])
    store.describe("facts", 5)
    assert Store.read(folder).coverage().missing == 2
    store.describe("facts", 2)
    found = Store.read(folder).coverage()
    assert (found.missing, found.further, found.ids) == (0, 1, ("1", "2", "3"))
    assert found.notes[0].endswith("included")


def test_a_run_that_is_not_at_its_end_is_unfinished(folder):
    written(folder, [traced(1)], asked="123")
    found = Store.read(folder).coverage()
    assert not found.complete
    assert found.notes == ("unfinished: 1 of 3 facts: start the same run again to trace the others",)


def cut(part):
    part.write_bytes(part.read_bytes()[:-1])


def rename(part):
    part.rename(part.with_name("mine.parquet"))


@pytest.mark.parametrize("damage", [lambda part: flip(part, 500), cut, rename])
def test_a_damaged_part_is_counted_and_named(folder, damage):
    part = written(folder, [traced(1), traced(2)], [traced(3)])[1]
    damage(part)
    found = Store.read(folder).coverage()
    assert (found.missing, len(found.damaged), found.complete) == (1, 1, False)
    assert found.notes[0].startswith("2 of 3 facts; 1 part damaged: start the same run again")
    assert str(folder) not in " ".join(found.notes)


def test_a_part_that_is_gone_leaves_its_facts_missing(folder):
    written(folder, [traced(1), traced(2)], [traced(3)])[0].unlink()
    assert Store.read(folder).coverage().notes[0].startswith("unfinished: 1 of 3 facts")


def test_damage_to_facts_that_another_part_has_is_said_and_nothing_is_missing(folder):
    flip(written(folder, [traced(1)], [traced(1)], asked="1")[0], 500)
    found = Store.read(folder).coverage()
    assert found.complete
    assert found.notes[0].startswith("all 1 facts; 1 part damaged")


def test_where_it_is_not_known_what_was_asked_damage_is_incomplete(folder):
    flip(Store.open(folder, FINGERPRINT).write([traced(1)]), 500)
    found = Store.read(folder).coverage()
    assert not found.complete
    assert "how many facts are missing is not known" in found.notes[0]


@pytest.mark.parametrize("statuses", ["ts", "st"])
def test_of_a_fact_in_two_parts_or_twice_in_one_the_first_counts(folder, statuses):
    kinds = {"t": traced(1), "s": skipped(1)}
    written(folder, [kinds[each] for each in statuses], asked="1")
    assert Store.read(folder).coverage().traced == (statuses[0] == "t")
    store = Store.open(folder, FINGERPRINT)
    store.write([kinds[each] for each in statuses], rank=1)
    assert store.coverage().traced == (statuses[0] == "t")


def test_facts_of_an_earlier_start_are_left_out_and_counted_unless_everything_is_asked_for(folder):
    written(folder, [traced(1), traced(2), skipped(3)], asked=["2", "9"])
    store = Store.read(folder)
    found = store.coverage()
    assert (found.asked, found.missing, found.further, found.ids) == (2, 1, 2, ("2",))
    assert found.notes[1].startswith("2 further facts in the folder are not among those")
    assert [record.fact.id for record in store.records()] == store.facts().id.tolist() == ["2"]
    assert store.frame().fact.unique().tolist() == ["2"]
    whole = store.coverage(everything=True)
    assert (whole.ids, whole.further, whole.missing) == (("1", "2", "3"), 2, 1)
    assert store.facts(whole).id.tolist() == ["1", "2", "3"]
    assert whole.notes[1].endswith("included")


def test_what_others_write_after_the_count_is_not_shown(folder):
    written(folder, [traced(1)], asked="12")
    store = Store.read(folder)
    shown = store.coverage()
    Store.open(folder, FINGERPRINT).write([traced(2)])
    assert store.done == {"1", "2"}
    assert [record.fact.id for record in store.records(shown)] == store.facts(shown).id.tolist() == ["1"]


def test_who_does_not_count_is_warned(folder, caplog):
    written(folder, [traced(1)], asked="12")
    for use in (lambda store: list(store.records()), Store.facts, Store.frame):
        caplog.clear()
        with caplog.at_level(logging.WARNING, "fasttrace"):
            use(Store.read(folder))
        assert "unfinished: 1 of 2 facts" in caplog.text
    caplog.clear()
    store = Store.read(folder)
    list(store.records(store.coverage()))
    assert not caplog.records


def test_a_start_with_fewer_facts_and_then_with_all_finds_all_again(folder):
    facts = [record.fact for record in (traced(1), traced(2))]
    written(folder, [traced(1), traced(2)], asked="1")
    assert Store.open(folder, FINGERPRINT).remaining(facts) == []


# The commands.


def test_of_a_whole_store_all_commands_exit_with_0_and_say_nothing_new(folder):
    written(folder, [traced(1), traced(2)])
    for command in ("average", "report", "export"):
        done = run(command, folder)
        assert (done.exit_code, done.stderr) == (0, ""), done.output
    notes = [line for line in run("average", folder).stdout.splitlines() if line.startswith("note")]
    assert notes == ["note: bootstrap intervals are too narrow for 2 facts (it takes 30): read low and high"]
    assert not list(folder.rglob("coverage.txt"))
    assert page(folder)["notes"] == []
    assert "missing" not in page(folder)["counts"]


def page(folder):
    text = (folder / "report.html").read_text("utf-8")
    return json.loads(text.split('id="data">')[1].split("</script>")[0])


@pytest.mark.parametrize("command", ["average", "report", "export"])
@pytest.mark.parametrize("allow", [(), ("--allow-incomplete",)])
def test_what_is_missing_is_said_in_text_page_and_file_with_an_exit_code(folder, command, allow):
    flip(written(folder, [traced(1), traced(2)], [traced(3)])[1], 500)
    done = run(command, folder, *allow)
    assert done.exit_code == (0 if allow else 3), done.output
    assert "note: 2 of 3 facts; 1 part damaged" in done.stderr
    if command == "report":
        assert page(folder)["notes"][0].startswith("2 of 3 facts; 1 part damaged")
        assert page(folder)["counts"]["missing"] == 1
    else:
        place = {"average": "averages", "export": "csv"}[command]
        assert (folder / place / "coverage.txt").read_text().startswith("2 of 3 facts; 1 part damaged")
    if command == "average":
        assert done.stdout.splitlines()[:2] == ["2 facts averaged", f"note: {done.stderr[6:].splitlines()[0]}"]


def test_a_finished_run_removes_the_note_of_an_unfinished_one(folder):
    written(folder, [traced(1)], asked="12")
    for command in ("average", "export"):
        assert run(command, folder).exit_code == 3
    Store.open(folder, FINGERPRINT).write([traced(2)])
    for command in ("average", "export"):
        assert run(command, folder).exit_code == 0
    assert not list(folder.rglob("coverage.txt"))


def test_everything_shows_the_facts_of_earlier_starts_too(folder):
    written(folder, [traced(1), traced(2), traced(3)], asked="12")
    done = run("average", folder)
    assert done.exit_code == 0
    assert done.stdout.startswith("2 facts averaged\nnote: 1 further fact in the folder is not among those")
    assert run("average", folder, "--everything").stdout.startswith("3 facts averaged\nnote: 1 further fact")
    run("export", folder, "--everything")
    assert len(pd.read_csv(folder / "csv" / "facts.csv")) == 3
    run("report", folder)
    assert [fact["id"] for fact in page(folder)["facts"]] == ["1", "2"]


def test_errors_say_what_is_damaged_too(folder):
    flip(written(folder, [traced(1)])[0], 500)
    for command in ("average", "export"):
        done = run(command, folder)
        assert done.exit_code == 2
        assert "0 of 1 facts; 1 part damaged" in done.stderr
    assert run("report", folder).exit_code == 3


def test_a_part_of_another_run_is_an_error_of_all_commands(folder, tmp_path):
    written(folder, [traced(1)])
    other = Store.open(tmp_path / "other", FINGERPRINT | {"samples": 3})
    shutil.copy(other.write([traced(2)]), folder / "parts")
    for command in ("average", "report", "export"):
        done = run(command, folder)
        assert done.exit_code == 2
        assert "holds another run (samples 3 there, 10 here)" in done.stderr


def test_a_store_without_parts_has_nothing_to_show(folder):
    written(folder, asked="12")
    shutil.rmtree(folder / "parts")
    for command, code in (("average", 2), ("export", 2), ("report", 3)):
        done = run(command, folder)
        assert done.exit_code == code
        assert "unfinished: 0 of 2 facts" in done.stderr


@pytest.mark.parametrize("command", ["average", "export"])
def test_a_link_in_a_folder_from_someone_else_is_not_followed(folder, tmp_path, command):
    written(folder, [traced(1)])
    (tmp_path / "home").mkdir()
    (folder / {"average": "averages", "export": "csv"}[command]).symlink_to(tmp_path / "home")
    done = run(command, folder)
    assert done.exit_code == 2
    assert "say where to write with --out" in done.stderr
    assert not list((tmp_path / "home").iterdir())


def test_averages_of_another_time_do_not_lie_beside_new_ones(folder, tmp_path):
    written(folder, [traced(1)])
    assert run("average", folder, "--out", tmp_path / "out").exit_code == 0
    (tmp_path / "out" / "roles.png").write_text("of a start that drew figures")
    (tmp_path / "out" / "mine.txt").write_text("mine")
    assert run("average", folder, "--out", tmp_path / "out").exit_code == 0
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["averages.csv", "averages_totals.csv", "mine.txt"]


@pytest.mark.parametrize("command", ["average", "report", "export"])
def test_a_file_is_no_place_for_the_files_of_a_command(folder, tmp_path, command):
    written(folder, [traced(1)])
    (tmp_path / "file").write_text("mine")
    done = run(command, folder, "--out", tmp_path / "file" / "out")
    assert done.exit_code == 2
    assert done.stderr.startswith("error: ")
    assert (tmp_path / "file").read_text() == "mine"


# How an average is written.


@pytest.mark.parametrize(
    ("scale", "pattern"),
    [
        (1.0, r"-?\d\.\d{4}  [+-]\d\.\d{4} to [+-]\d\.\d{4}"),
        (1e-7, r"-?\d\.\de-\d\d  [+-]\d\.\de-\d\d to [+-]\d\.\de-\d\d"),
        (1e9, r"-?\d\.\de\+\d\d  [+-]\d\.\de\+\d\d to [+-]\d\.\de\+\d\d"),
    ],
)
def test_an_interval_has_the_digits_of_its_mean(scale, pattern):
    from fasttrace.cli.words import averages_text

    def scaled(name):
        result = result_of(name)
        prob = {stream: 0.5 + scale * (0.2 + 0.1 * grid) for stream, grid in result.prob.items()}
        return Record(fact(name), replace(result, prob=prob, corrupted_prob=0.5))

    text = averages_text(average([scaled(1), scaled(2), scaled(3)], bootstrap=2))
    line = next(line for line in text.splitlines() if "indirect_effect" in line)
    assert pd.Series([line]).str.contains(pattern).all(), line


def test_one_fact_has_no_interval_to_print():
    from fasttrace.cli.words import averages_text

    assert "nan" not in averages_text(average([traced(1)], bootstrap=2))


# Reading.


def shuffled_store(folder, parts=16, each=8):
    store = Store.open(folder, FINGERPRINT)
    for number in range(parts):
        store.write([traced(number + parts * i) for i in range(each)])
    return Store.read(folder), [str(number) for number in range(parts * each)]


@pytest.mark.parametrize("in_memory", [shelf.IN_MEMORY, 0])
def test_each_part_is_read_once_for_the_records_and_once_to_find_them(folder, monkeypatch, in_memory):
    monkeypatch.setattr(shelf, "IN_MEMORY", in_memory)
    monkeypatch.setattr(shelf, "OPEN_TABLES", 2)
    store, expected = shuffled_store(folder)
    read = []

    def counted(path, *columns):
        read.append(path.name)
        return read_part(path, *columns)

    monkeypatch.setattr(stores, "read_part", counted)
    monkeypatch.setattr(shelf, "read_part", counted)
    records = list(store.records())
    assert [record.fact.id for record in records] == expected
    assert records[17] == traced(17)
    assert len(read) == 2 * 16
    read.clear()
    export(store, folder / "csv", "csv")
    assert len(read) == 16


def test_a_temporary_file_that_has_no_room_is_said(folder, monkeypatch):
    store, _ = shuffled_store(folder, parts=2, each=1)
    monkeypatch.setattr(shelf, "IN_MEMORY", 0)

    def full(**_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shelf.tempfile, "TemporaryFile", full)
    with pytest.raises(StoreError, match=r"no room for a temporary copy.*No space left.*TMPDIR"):
        list(store.records())
