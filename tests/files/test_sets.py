"""Sets of files: one or the other, never some of each."""

import errno
import os
import threading
import time

import pytest

from fasttrace.errors import StoreError
from fasttrace.files import sets as file_sets
from fasttrace.files.sets import one_set

NAMES = ("a.csv", "b.csv", "sub/c.csv", "mark")


def old(_):
    return NAMES


def write(folder, text, names=NAMES, old=old, **options):
    with one_set(folder, "mark", old, **options) as scratch:
        for name in names:
            (scratch / name).parent.mkdir(exist_ok=True)
            (scratch / name).write_text(text)


def content(folder):
    files = (
        path for path in folder.rglob("*") if path.is_file() and ".fasttrace-" not in str(path.relative_to(folder))
    )
    return {path.relative_to(folder).as_posix(): path.read_text() for path in files}


def test_a_set_replaces_another_and_leaves_files_of_others_alone(tmp_path):
    write(tmp_path / "out", "first")
    assert content(tmp_path / "out") == dict.fromkeys(NAMES, "first")
    (tmp_path / "out" / "sub" / "mine").write_text("mine")
    write(tmp_path / "out", "second", names=("a.csv", "mark"))
    assert content(tmp_path / "out") == {"a.csv": "second", "mark": "second", "sub/mine": "mine"}
    assert os.listdir(tmp_path) == ["out"]
    assert not [name for name in os.listdir(tmp_path / "out") if name.startswith(".")]


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("call", range(14))
def test_a_writer_that_is_killed_leaves_files_of_one_set_and_a_mark_only_on_a_whole_one(tmp_path, call):
    write(tmp_path / "out", "first")
    pid = os.fork()
    if pid == 0:
        count = [0]

        def counted(work):
            def called(*arguments, **options):
                if str(tmp_path / "out") in str(arguments[0]):
                    if count[0] == call:
                        os.kill(os.getpid(), 9)
                    count[0] += 1
                return work(*arguments, **options)

            return called

        for name in ("replace", "unlink", "rmdir"):
            setattr(os, name, counted(getattr(os, name)))
        try:
            write(tmp_path / "out", "second", names=("a.csv", "new.csv", "mark"))
        finally:
            os._exit(0)
    os.waitpid(pid, 0)
    found = content(tmp_path / "out")
    assert len(set(found.values())) <= 1
    if "mark" in found:
        assert set(found) == (set(NAMES) if found["mark"] == "first" else {"a.csv", "new.csv", "mark"})
    whole = found if "mark" in found else ()  # what its owner knows of; the rest is in the journal
    write(tmp_path / "out", "third", names=("a.csv", "mark"), old=lambda _: whole)
    assert content(tmp_path / "out") == {"a.csv": "third", "mark": "third"}
    assert not list(tmp_path.rglob(".fasttrace-*"))


def test_two_writers_of_one_new_folder_leave_one_set(tmp_path):
    both = threading.Barrier(2)

    def slow(text, names):
        with one_set(tmp_path / "out", "mark", lambda _: {"a", "b", "c", "d", "mark"}) as scratch:
            for name in names:
                (scratch / name).write_text(text)
            both.wait()

    for _ in range(5):
        writers = [threading.Thread(target=slow, args=each) for each in [("x", "abc"), ("y", "cd")]]
        for writer in writers:
            writer.start()
        for writer in writers:
            writer.join()
        found = content(tmp_path / "out")
        assert found in ({"a": "x", "b": "x", "c": "x"}, {"c": "y", "d": "y"})


def test_of_two_writers_of_one_new_folder_the_second_asks_first(tmp_path):
    def refused():
        raise StoreError("another set is there")

    def both():
        with one_set(tmp_path / "out", "mark", old, refused) as scratch:
            (scratch / "mark").write_text("second")
            write(tmp_path / "out", "first")

    with pytest.raises(StoreError, match="another set is there"):
        both()
    assert content(tmp_path / "out") == dict.fromkeys(NAMES, "first")
    assert os.listdir(tmp_path) == ["out"]


def test_what_killed_writers_left_is_removed_also_beside_the_folder_and_what_lives_stays(tmp_path):
    for place in (tmp_path, tmp_path / "out"):
        (place / ".fasttrace-0123456789abcdef" / "x").mkdir(parents=True)
    (tmp_path / ".fasttrace-mine").mkdir()
    stale = tmp_path / ".fasttrace-1.csv"
    stale.write_text("")
    os.utime(stale, (time.time() - 7200,) * 2)
    with one_set(tmp_path / "out", "mark", old) as living:
        (living / "mark").write_text("living")
        write(tmp_path / "other", "other")
        write(tmp_path / "out", "first")
        assert living.exists()
    assert sorted(os.listdir(tmp_path)) == [".fasttrace-mine", "other", "out"]
    assert content(tmp_path / "out") == {"mark": "living"}


def test_where_folders_cannot_be_held_only_old_ones_are_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(file_sets, "fcntl", None)
    young, aged = tmp_path / f".fasttrace-{'0' * 16}", tmp_path / f".fasttrace-{'1' * 16}"
    for left in (young, aged):
        left.mkdir()
    os.utime(aged, (time.time() - 7200,) * 2)
    write(tmp_path / "out", "first")
    assert sorted(os.listdir(tmp_path)) == [young.name, "out"]


def test_a_disk_that_is_full_leaves_the_old_set(tmp_path):
    write(tmp_path / "out", "first")
    with (
        pytest.raises(StoreError, match=r"cannot write .*out.*No space left.*give another folder with --out"),
        one_set(tmp_path / "out", "mark", old),
    ):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert content(tmp_path / "out") == dict.fromkeys(NAMES, "first")
    assert not list(tmp_path.rglob(".fasttrace-*"))


def test_names_of_an_unfinished_set_never_lead_out_of_the_folder(tmp_path):
    write(tmp_path / "out", "first")
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "out" / "b.csv").unlink()
    (tmp_path / "out" / "b.csv").symlink_to(tmp_path / "precious")
    hostile = f'["../precious", "{tmp_path}/precious", "sub/../../precious", 5, null]'
    (tmp_path / "out" / ".fasttrace-names.json").write_text(hostile)
    write(tmp_path / "out", "second")
    assert (tmp_path / "precious").read_text() == "mine"


def test_no_file_is_written_through_a_link(tmp_path):
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "out").mkdir()
    for name in ("a.csv", "mark", ".fasttrace-names.json"):
        (tmp_path / "out" / name).symlink_to(tmp_path / "precious")
    write(tmp_path / "out", "first")
    assert (tmp_path / "precious").read_text() == "mine"
    assert content(tmp_path / "out") == dict.fromkeys(NAMES, "first")


def test_a_link_to_a_folder_elsewhere_is_not_written_through(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "c.csv").write_text("mine")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "sub").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StoreError, match="is a link to another folder"):
        write(tmp_path / "out", "first")
    assert (tmp_path / "elsewhere" / "c.csv").read_text() == "mine"


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "file").write_text("mine")
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(StoreError, match="is a file, expected a folder"):
            write(place, "first")
