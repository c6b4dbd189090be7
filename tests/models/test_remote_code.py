"""Code that comes with a model runs when an option says so, and never otherwise."""

import builtins
import io
import json
import sys

import pytest
from typer.testing import CliRunner

import fasttrace
from fasttrace.cli.app import app
from fasttrace.errors import ModelError
from tests.helpers.run_facts import save_model

CODE = """
from pathlib import Path
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

Path({mark!r}).touch()

class OwnConfig(GPT2Config):
    model_type = "own"

class OwnModel(GPT2LMHeadModel):
    config_class = OwnConfig

class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""


def changed(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture
def mark(tmp_path):
    """What the code makes when it runs."""
    return tmp_path / "ran"


@pytest.fixture
def own_model(tmp_path, mark):
    folder = save_model(tmp_path / "model")
    (folder / "own.py").write_text(CODE.format(mark=str(mark)))
    classes = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    changed(folder / "config.json", model_type="own", architectures=["OwnModel"], auto_map=classes)
    return folder


@pytest.fixture(autouse=True)
def yes_man(monkeypatch):
    """Somebody who answers y to whatever is asked."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 9))
    monkeypatch.setattr(builtins, "input", lambda *_: "y")


def test_code_of_a_model_does_not_run_whatever_stands_on_stdin(own_model, mark):
    with pytest.raises(
        ModelError, match=r"comes with code of its own: it runs only with trust_remote_code=True \(--tr"
    ):
        fasttrace.Tracer.from_pretrained(own_model)
    assert not mark.exists()
    assert sys.stdin.tell() == 0


def test_code_of_a_tokenizer_does_not_run_either(tmp_path, mark, caplog):
    folder = save_model(tmp_path / "model", "bloom")  # a type without a tokenizer class of its own
    (folder / "own.py").write_text(CODE.format(mark=str(mark)))
    auto_map = {"AutoTokenizer": [None, "own.OwnTokenizer"]}
    changed(folder / "tokenizer_config.json", tokenizer_class="Own", auto_map=auto_map)
    assert fasttrace.Tracer.from_pretrained(folder).tokenizer is None
    assert "it comes with code, and it runs only with trust_remote_code=True" in caplog.text
    assert not mark.exists()
    assert sys.stdin.tell() == 0
    assert type(fasttrace.Tracer.from_pretrained(folder, trust_remote_code=True).tokenizer).__name__ == "OwnTokenizer"


def test_a_generation_function_of_the_folder_does_not_run(tmp_path, mark):
    folder = save_model(tmp_path / "model")
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(
        CODE.format(mark=str(mark)) + "\ndef generate(model): ...\n"
    )
    fasttrace.Tracer.from_pretrained(folder)
    assert not mark.exists()


def test_with_the_option_it_runs_and_results_record_it(own_model, mark):
    tracer = fasttrace.Tracer.from_pretrained(own_model, trust_remote_code=True)
    assert mark.exists()
    assert type(tracer.model).__name__ == "OwnModel"
    result = tracer.trace([1, 2, 3], subject=(0, 1), samples=1)
    assert result.metadata["trust_remote_code"] is True


def test_results_of_other_models_do_not_mention_it(tmp_path):
    tracer = fasttrace.Tracer.from_pretrained(save_model(tmp_path / "model"))
    assert "trust_remote_code" not in tracer.trace([1, 2, 3], subject=(0, 1), samples=1).metadata


@pytest.mark.parametrize("value", ["no", "False", None, 1])
def test_the_option_is_true_or_false(tmp_path, value):
    with pytest.raises(ModelError, match=r"trust_remote_code is .*, expected True or False"):
        fasttrace.Tracer.from_pretrained(tmp_path, trust_remote_code=value)


COMMANDS = {
    "trace": ("trace", "The Space Needle is in", "--subject", "The Space Needle", "--samples", 1, "--model"),
    "run": ("run", "--limit", 1, "--samples", 1, "--model"),
    "info": ("info",),
    "verify": ("verify", "--model"),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_that_loads_a_model_has_the_option(own_model, mark, command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = [str(word) for word in (*COMMANDS[command], own_model)]
    refused = CliRunner().invoke(app, words, input="y\n" * 9)
    assert refused.exit_code == 2
    assert "--trust-remote-code" in refused.stderr.splitlines()[-1]
    assert not mark.exists()
    allowed = CliRunner().invoke(app, [*words, "--trust-remote-code"])
    assert "Traceback" not in allowed.output
    assert mark.exists()
