"""The command line on a tiny random GPT-2 with a tokenizer of its own."""

import errno
import inspect
import io
import json
import os
import subprocess
import sys
from dataclasses import fields

import pandas as pd
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
from typer.testing import CliRunner

import fasttrace
from fasttrace.cli import app as cli
from fasttrace.cli import facts as cli_runs
from fasttrace.cli import folder as outputs
from fasttrace.cli import tutorial
from fasttrace.experiment.metrics import FOIL_METRICS, METRICS
from fasttrace.experiment.settings import Settings
from fasttrace.models import embedded as demo

PROMPT = "The Space Needle is in downtown"
TEXT = [PROMPT + " Seattle", "The Eiffel Tower is located in the city of Paris"] * 20
CSV_FILES = ["attention_output.csv", "block_output.csv", "mlp_activation.csv"]
DATA_FILES = [*CSV_FILES, "trace.parquet"]
ALL_FILES = sorted([*DATA_FILES, "figure.png"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A local folder as `save_pretrained` makes it."""
    path = tmp_path_factory.mktemp("tiny-gpt2")
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(path)
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=3, n_head=2, n_positions=32)
    GPT2LMHeadModel(config).save_pretrained(path)
    return str(path)


@pytest.fixture
def without_figure(monkeypatch):
    """As if plotnine were not installed: drawing is slow and tested elsewhere."""
    monkeypatch.setattr(cli, "find_spec", lambda name: None)


def tiny_tokenizer():
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator(TEXT, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe)


def run(*arguments):
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def trace(folder, *options, prompt=PROMPT, subject="The Space Needle", target=" Seattle"):
    fixed = ("--model", folder, "--subject", subject, "--target", target, "--samples", 2, "--noise", "0.5")
    return run("trace", prompt, *fixed, *options)


def names_in(path):
    return sorted(file.name for file in path.iterdir())


def test_trace_prints_tokens_effects_cells_and_cost(folder):
    done = trace(folder)
    assert done.exit_code == 0, done.output
    for words in (
        "clean run",
        "corrupted run",
        "total effect",
        "attention_output",
        "token-blocks",
        '" Seattle"',
    ):
        assert words in done.stdout
    assert done.stderr.splitlines() == [f"loading {folder}", "tracing"]


def test_json_prints_the_summary_of_the_same_trace_and_nothing_else(folder):
    done = trace(folder, "--json", "--window", 2, "--seed", 5, "--stream", "mlp_output")
    found = json.loads(done.stdout)
    tracer = fasttrace.Tracer.from_pretrained(folder, device="cpu")
    expected = tracer.trace(
        PROMPT,
        subject="The Space Needle",
        target=" Seattle",
        streams=("mlp_output",),
        window=2,
        noise=0.5,
        samples=2,
        seed=5,
    )
    assert list(found["streams"]) == ["mlp_output"]
    assert found["clean_prob"] == pytest.approx(expected.clean_prob)
    assert found["corrupted_prob"] == pytest.approx(expected.corrupted_prob)
    best = found["streams"]["mlp_output"]["strongest"][0]
    assert best["prob"] == pytest.approx(expected.grid("mlp_output")[best["layer"], best["position"]])


def test_every_option_reaches_the_api(folder, tmp_path, monkeypatch):
    seen = {}

    def spy(self, prompt, **options):
        seen.update(options, prompt=prompt, fuse=self.fuse, revision=self.revision, dtype=self.dtype)
        raise fasttrace.PlanError("enough seen")

    subjects = tmp_path / "subjects.txt"
    subjects.write_text("The Space Needle\n\nThe Eiffel Tower\n")
    monkeypatch.setattr(fasttrace.Tracer, "trace", spy)
    done = run(
        *("trace", PROMPT, "--span", "0:3", "--target", " Seattle", "--model", folder),
        *("--stream", "block_output", "--stream", "mlp_output", "--window", 3, "--noise", "s2"),
        *(
            "--noise-subjects",
            subjects,
            "--samples",
            4,
            "--seed",
            9,
            "--engine",
            "rows",
            "--dtype",
            "float64",
        ),
        *("--device", "cpu", "--budget", 77, "--first-target-token", "--revision", "main", "--no-fuse"),
    )
    assert done.stderr.splitlines()[-1] == "error: enough seen"
    del seen["progress"]
    assert seen == {
        "prompt": PROMPT,
        "subject": (0, 3),
        "target": " Seattle",
        "counterfactual": None,
        "foil": None,
        "streams": ("block_output", "mlp_output"),
        "window": 3,
        "noise": "s2",
        "noise_subjects": ["The Space Needle", "The Eiffel Tower"],
        "samples": 4,
        "seed": 9,
        "direction": "denoising",
        "engine": "rows",
        "budget": 77,
        "first_target_token": True,
        "fuse": False,
        "revision": "main",
        "dtype": torch.float64,
    }


def test_token_ids_give_the_same_trace_as_their_text(folder):
    ids = tiny_tokenizer()(PROMPT)["input_ids"]
    (target,) = tiny_tokenizer()(" Seattle")["input_ids"]
    text = json.loads(trace(folder, "--json").stdout)
    fixed = ("--model", folder, "--noise", 0.5, "--samples", 2, "--json")
    span = "{}:{}".format(*text["span"])
    done = run("trace", " ".join(map(str, ids)), "--ids", "--span", span, "--target", target, *fixed)
    assert json.loads(done.stdout)["corrupted_prob"] == text["corrupted_prob"]


def test_subjects_for_the_noise_are_read_from_json_too(folder, tmp_path):
    lines, facts = tmp_path / "subjects.txt", tmp_path / "facts.json"
    lines.write_text("The Eiffel Tower\nThe Space Needle\n")
    facts.write_text(json.dumps([{"subject": "The Eiffel Tower"}, {"subject": "The Space Needle"}]))
    sigmas = [
        json.loads(trace(folder, "--json", "--noise", "s3", *extra).stdout)["sigma"]
        for extra in ((), ("--noise-subjects", lines), ("--noise-subjects", facts))
    ]
    assert sigmas[0] != sigmas[1] == sigmas[2]


def test_a_run_writes_its_files_and_the_csv_has_the_tutorials_columns(folder, tmp_path, without_figure):
    out = tmp_path / "deep" / "run"
    done = trace(folder, "--out", out)
    assert done.exit_code == 0, done.output
    assert names_in(out) == DATA_FILES
    assert names_in(out.parent) == ["run"]
    columns = list(pd.read_csv(out / "mlp_activation.csv").columns)
    assert columns == ["layer", "pos", *(name for name in METRICS if name not in FOIL_METRICS)]
    assert fasttrace.load(out / "trace.parquet").metadata["model"] == os.path.basename(folder)
    assert "no figure without plotnine" in done.stdout


def test_the_same_run_again_is_fine(folder, tmp_path, without_figure):
    assert trace(folder, "--out", tmp_path).exit_code == 0
    first = fasttrace.load(tmp_path / "trace.parquet")
    assert trace(folder, "--out", tmp_path).exit_code == 0
    again = fasttrace.load(tmp_path / "trace.parquet")
    pd.testing.assert_frame_equal(first.to_frame(), again.to_frame())


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--seed", 2), "seed 1 there, 2 here"),
        (("--noise", "s3"), "noise 0.5 there, 's3' here"),
        (("--window", 2), "window 10 there, 2 here"),
        (("--stream", "block_output"), "windows"),
        (("--dtype", "bfloat16"), "dtype 'float32' there, 'bfloat16' here"),
    ],
    ids=["seed", "noise", "window", "streams", "dtype"],
)
def test_a_folder_of_another_run_is_refused_before_anything_is_computed(
    folder, tmp_path, without_figure, monkeypatch, options, named
):
    assert trace(folder, "--out", tmp_path).exit_code == 0
    before = (tmp_path / "trace.parquet").read_bytes()
    monkeypatch.setattr(cli, "_load", lambda *_args, **_options: pytest.fail("the model was loaded"))
    done = trace(folder, "--out", tmp_path, *options)
    assert done.exit_code == 2
    assert named in done.stderr
    assert (tmp_path / "trace.parquet").read_bytes() == before


def test_a_difference_that_only_the_run_itself_shows_is_refused_too(folder, tmp_path, without_figure):
    subjects = tmp_path / "subjects.txt"
    subjects.write_text("The Eiffel Tower")
    out = tmp_path / "run"
    assert trace(folder, "--noise", "s3", "--out", out).exit_code == 0
    done = trace(folder, "--noise", "s3", "--noise-subjects", subjects, "--out", out)
    assert done.exit_code == 2
    assert "sigma" in done.stderr


def test_overwrite_replaces_another_run_and_removes_its_stale_files(folder, tmp_path, without_figure):
    assert trace(folder, "--out", tmp_path).exit_code == 0
    (tmp_path / "figure.png").write_text("of the first run")
    (tmp_path / "notes.txt").write_text("mine")
    done = trace(folder, "--out", tmp_path, "--stream", "mlp_output", "--overwrite")
    assert done.exit_code == 0, done.output
    assert names_in(tmp_path) == ["mlp_output.csv", "notes.txt", "trace.parquet"]


def test_an_overwrite_that_is_cut_short_leaves_no_data_file_and_is_refused_until_it_is_overwritten(
    folder, tmp_path, without_figure, monkeypatch
):
    out = tmp_path / "run"
    assert trace(folder, "--out", out).exit_code == 0
    right = os.replace

    def cut(old, new):
        if os.fspath(new).endswith("run/trace.parquet"):
            raise KeyboardInterrupt
        return right(old, new)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", cut)
        assert trace(folder, "--out", out, "--seed", 2, "--overwrite").exit_code == 130
    assert "trace.parquet" not in names_in(out)
    done = trace(folder, "--out", out, "--seed", 2)
    assert done.exit_code == 2
    assert "of an unreadable earlier run" in done.stderr
    (tmp_path / ".fasttrace-0123456789abcdef").mkdir()  # of a writer that was killed
    assert trace(folder, "--out", out, "--seed", 2, "--overwrite").exit_code == 0
    assert names_in(out) == DATA_FILES
    assert names_in(tmp_path) == ["run"]


def test_of_two_runs_that_write_into_one_new_folder_one_is_refused(folder, tmp_path, without_figure, monkeypatch):
    others = []
    to_csv = fasttrace.TraceResult.to_csv

    def slow(result, where):
        if not others:
            others.append(1)
            others.append(trace(folder, "--out", tmp_path / "run", "--seed", 2))
        return to_csv(result, where)

    monkeypatch.setattr(fasttrace.TraceResult, "to_csv", slow)
    done = trace(folder, "--out", tmp_path / "run")
    assert others[1].exit_code == 0
    assert done.exit_code == 2
    assert "holds another run (seed 2 there, 1 here)" in done.stderr
    assert names_in(tmp_path) == ["run"]
    assert fasttrace.load(tmp_path / "run" / "trace.parquet").metadata["seed"] == 2


def test_files_of_a_run_that_cannot_be_told_are_not_replaced(folder, tmp_path, without_figure):
    (tmp_path / "figure.png").write_text("somebody's")
    done = trace(folder, "--out", tmp_path)
    assert done.exit_code == 2
    assert "figure.png of an unreadable earlier run" in done.stderr
    assert names_in(tmp_path) == ["figure.png"]


def test_an_output_folder_that_is_a_file_is_refused_before_anything_is_computed(folder, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(cli, "_load", lambda *_args, **_options: pytest.fail("the model was loaded"))
    done = trace(folder, "--out", tmp_path / "file" / "run")
    assert done.exit_code == 2
    assert "is a file, expected a folder" in done.stderr


def test_a_write_that_fails_leaves_neither_folder_nor_files(folder, tmp_path, without_figure, monkeypatch):
    def full(_self, _path):
        raise OSError("no space left on device")

    monkeypatch.setattr(fasttrace.TraceResult, "save", full)
    done = trace(folder, "--out", tmp_path / "run")
    assert done.exit_code == 2
    assert "no space left on device" in done.stderr
    assert names_in(tmp_path) == []


def test_ctrl_c_ends_with_130_one_line_and_no_output(folder, tmp_path, monkeypatch):
    def interrupted(_self, _prompt, *, progress, **_options):
        progress(1, 3)
        raise KeyboardInterrupt

    monkeypatch.setattr(fasttrace.Tracer, "trace", interrupted)
    done = trace(folder, "--out", tmp_path / "run")
    assert done.exit_code == 130
    assert done.stderr.splitlines()[-1] == "interrupted: nothing half-written was left"
    assert names_in(tmp_path) == []


def test_ctrl_c_while_files_are_written_leaves_no_partial_folder(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(outputs, "_draw", raising(KeyboardInterrupt()))
    done = trace(folder, "--out", tmp_path / "run")
    assert done.exit_code == 130
    assert names_in(tmp_path) == []


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"subject": "The Eiffel Tower"}, "does not occur in the prompt"),
        ({"target": " nowhere"}, "first_target_token"),
        ({"prompt": " "}, "empty"),
    ],
    ids=["absent subject", "long target", "empty prompt"],
)
def test_an_error_is_one_line_on_stderr_with_exit_code_2(folder, options, named):
    done = trace(folder, **options)
    assert done.exit_code == 2
    assert done.stdout == ""
    line = done.stderr.splitlines()[-1]
    assert line.startswith("error: ")
    assert named in line


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ((), "--subject TEXT or --span BEGIN:END"),
        (("--subject", "The", "--span", "0:1"), "--subject TEXT or --span BEGIN:END"),
        (("--span", "0-4"), "expected two token positions such as 0:4"),
        (("--subject", "The", "--stream", "mlp"), "mlp"),
        (("--subject", "The", "--window", 0), "window"),
        (("--subject", "The", "--engine", "fast"), "unknown engine 'fast'"),
        (("--subject", "The", "--dtype", "int8"), "unknown dtype 'int8'"),
        (("--subject", "The", "--samples", 0), "samples"),
        (("--subject", "The", "--noise", "nan"), "nan"),
        (("--subject", "The", "--budget", "much"), "budget"),
        (("--subject", "The", "--noise-subjects", "absent.txt"), "cannot read subjects"),
    ],
)
def test_an_option_that_cannot_be_used_is_named(folder, options, named):
    done = run("trace", PROMPT, "--model", folder, "--target", " Seattle", *options)
    assert done.exit_code == 2
    assert named in done.stderr.splitlines()[-1]


def test_debug_lets_the_error_through(folder):
    done = run("--debug", "trace", PROMPT, "--model", folder, "--subject", "absent")
    assert isinstance(done.exception, fasttrace.PromptError)


def test_plot_draws_the_figure_and_single_streams_again(folder, tmp_path):
    assert trace(folder, "--out", tmp_path).exit_code == 0
    assert names_in(tmp_path) == ALL_FILES
    (tmp_path / "figure.png").unlink()
    assert run("plot", tmp_path).exit_code == 0
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    done = run("plot", tmp_path / "trace.parquet", "--stream", "mlp_activation", "--out", tmp_path / "mlp.svg")
    assert done.exit_code == 0, done.output
    assert "<svg" in (tmp_path / "mlp.svg").read_text()
    done = run("plot", tmp_path, "--metric", "kl", "--out", tmp_path / "kl.svg")
    assert done.exit_code == 0, done.output
    assert run("plot", tmp_path, "--metric", "logit_diff").exit_code == 2


def test_plot_of_what_is_not_there_says_so(folder, tmp_path, without_figure):
    assert run("plot", tmp_path).exit_code == 2
    assert trace(folder, "--out", tmp_path, "--stream", "mlp_output").exit_code == 0
    done = run("plot", tmp_path, "--stream", "block_output")
    assert done.exit_code == 2
    assert "unknown stream 'block_output'" in done.stderr


def test_info_shows_devices_cache_and_the_engine_a_model_gets(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("FASTTRACE_CACHE", str(tmp_path))
    done = run("info", folder)
    assert done.exit_code == 0, done.output
    for words in (torch.__version__, "dtype auto: float32", str(tmp_path), "not there yet", "self-check"):
        assert words in done.stdout
    assert "wavefront" in done.stdout
    assert "the model's own code" in done.stdout, "a narrow model is not worth a compiled attention"


def test_verify_runs_its_whole_path_and_reports_the_mismatch_of_a_random_model(folder, tmp_path, without_figure):
    done = run("verify", "--model", folder, "--out", tmp_path / "run")
    assert done.exit_code == 1, done.output
    for words in (
        "0.976379",
        "0.026176",
        '" Bellev"',
        '" Los"',
        "0.0329",
        "does not give the published numbers",
    ):
        assert words in done.output
    result = fasttrace.load(tmp_path / "run" / "trace.parquet")
    assert result.metadata["sigma"] == tutorial.NOISE
    assert result.windows == {"block_output": 1, "mlp_activation": 10, "attention_output": 10}
    assert result.metadata["samples"] == 1


def test_verify_agrees_within_its_tolerance(folder, monkeypatch):
    ours = json.loads(trace(folder, "--json", "--noise", tutorial.NOISE, "--samples", 1).stdout)
    published = {run: ((" Seattle", ours[f"{run}_prob"] * 1.0005),) for run in ("clean", "corrupted")}
    monkeypatch.setattr(tutorial, "PUBLISHED", published)
    assert run("verify", "--model", folder).exit_code == 0
    assert run("verify", "--model", folder, "--tolerance", 1e-4).exit_code == 1


def test_the_demo_traces_its_case_and_names_its_files(folder, tmp_path, without_figure, monkeypatch):
    monkeypatch.setattr(demo, "model_folder", lambda name: folder)
    done = run("demo", "--out", tmp_path / "demo")
    assert done.exit_code == 0, done.output
    assert '" Paris"' in done.stdout
    result = fasttrace.load(tmp_path / "demo" / "trace.parquet")
    assert (result.metadata["prompt"], result.target) == (demo.CASE.prompt, " Paris")
    assert (result.metadata["samples"], result.metadata["model"]) == (10, "smollm2")
    for name in DATA_FILES:
        assert str(tmp_path / "demo" / name) in done.stdout


def test_a_model_that_is_nowhere_is_one_clear_sentence(monkeypatch):
    done = run("trace", PROMPT, "--subject", "The", "--model", "./no/such/folder")
    assert done.exit_code == 2
    assert "./no/such/folder" in done.stderr.splitlines()[-1]


def test_the_version_is_printed():
    assert run("--version").stdout == f"fasttrace {fasttrace.__version__}\n"


def test_python_m_fasttrace_is_the_command_line():
    done = subprocess.run([sys.executable, "-m", "fasttrace", "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    for command in ("demo", "trace", "plot", "info", "verify"):
        assert command in done.stdout


def raising(error):
    def action(*_args, **_kwargs):
        raise error

    return action


def test_a_target_without_its_space_is_told_of_and_is_the_same_run_again(folder, tmp_path, without_figure):
    done = trace(folder, "--out", tmp_path, target="Seattle")
    assert done.exit_code == 0, done.output
    notes = fasttrace.load(tmp_path / "trace.parquet").metadata["notes"]
    assert len(notes) == 1
    assert notes[0].startswith("target 'Seattle' follows the prompt after a space: scoring ' Seattle' (token id ")
    assert trace(folder, "--out", tmp_path, target="Seattle").exit_code == 0
    assert trace(folder, "--out", tmp_path, target=" Seattle").exit_code == 0


def test_a_target_may_be_a_token_id(folder, tmp_path, without_figure):
    fixed = ("--model", folder, "--subject", "Needle", "--samples", 1, "--noise", "0.5", "--out", tmp_path)
    assert run("trace", PROMPT, *fixed, "--target-id", 5).exit_code == 0
    assert fasttrace.load(tmp_path / "trace.parquet").target_id == 5
    twice = run("trace", PROMPT, *fixed, "--target-id", 5, "--target", "Seattle")
    assert twice.exit_code == 2
    assert "the target is given twice" in twice.stderr


def test_info_shows_where_the_parts_are_and_takes_other_places(folder):
    done = run("info", folder)
    assert done.exit_code == 0, done.output
    for words in ("transformer.h.0.attn", "mlp.c_proj", "block_output, mlp_activation, attention_output", "wavefront"):
        assert words in done.stdout
    moved = run("info", folder, "--module", "attention=attn.c_proj")
    assert "transformer.h.0.attn.c_proj" in moved.stdout
    wrong = run("info", folder, "--module", "attention=self_attn")
    assert wrong.exit_code == 2
    assert "modules['attention'] is 'self_attn', and GPT2Block has no such module; it has ln_1, attn" in wrong.stderr
    assert "expected a part and its path, such as attention=self_attn" in run("info", folder, "--module", "attn").stderr


def test_a_device_map_is_passed_on_and_a_wrong_one_is_an_error(folder, tmp_path, without_figure):
    assert trace(folder, "--device-map", "auto", "--offload-folder", tmp_path / "weights").exit_code == 0
    wrong = run("info", folder, "--device-map", "everywhere")
    assert wrong.exit_code == 2
    assert "device_map is 'everywhere': give auto, balanced" in wrong.stderr


# What is wrong whatever the model is said before it is loaded; see `test_facts.py` for runs.


def unloaded(monkeypatch):
    monkeypatch.setattr("fasttrace.api.load", lambda *_args, **_options: pytest.fail("the model was loaded"))
    monkeypatch.setattr(demo, "model_folder", lambda *_args, **_options: pytest.fail("the model was fetched"))


def said(done):
    """The one line on stderr."""
    assert done.exit_code == 2, done.output
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    [line] = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert done.stdout == ""
    return line


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--window", 0), "window is 0"),
        (("--window", 10**30), "window is 1000"),
        (("--window", "x"), "Invalid value for '--window'"),
        (("--samples", 0), "samples is 0"),
        (("--samples", 10**8), "samples is 100000000: expected a whole number from 1 to 1000000"),
        (("--samples", 10**30), "samples is 1000"),
        (("--samples", 2.5), "Invalid value for '--samples'"),
        (("--seed", -1), "seed is -1: expected a whole number from 0 to 4294967295"),
        (("--seed", 2**32), "seed is 4294967296"),
        (("--noise", "x"), "noise rule 'x' is unknown"),
        (("--noise", "nan"), "noise has standard deviation nan"),
        (("--noise", "-1"), "noise has standard deviation -1.0"),
        (("--noise", "s" + "9" * 400), "the factor of noise is inf"),
        (("--budget", "x"), "budget is 'x'"),
        (("--budget", 0), "budget is 0"),
        (("--budget", "9" * 5000), "budget is"),
        (("--engine", "x"), "unknown engine 'x'"),
        (("--stream", "x"), "unknown stream 'x'"),
        (("--stream", "mlp_output", "--stream", "mlp_output"), "given twice"),
        (("--dtype", "x"), "unknown dtype 'x'"),
        (("--device", "x"), "unknown device 'x'"),
        (("--device", "cuda:99"), "device 'cuda:99' is not there"),
        (("--device", "meta"), "device 'meta'"),
        (("--device-map", "x"), "device_map is 'x'"),
        (("--device", "cpu", "--device-map", "auto"), "give one of them"),
        (("--module", "x"), "--module is 'x'"),
        (("--noise-subjects", "none.txt"), "cannot read subjects from none.txt"),
        (("--target-id", -1), "--target-id is -1"),
        (("--target-id", 1, "--target", "a"), "the target is given twice"),
        (("--target", ""), "the target is empty"),
        (("--span", "0:2"), "the subject is given twice"),
        (("--no-such-option",), "--no-such-option"),
    ],
)
def test_a_wrong_option_is_one_line_before_the_model_is_loaded(options, named, monkeypatch):
    unloaded(monkeypatch)
    assert named in said(run("trace", PROMPT, "--subject", "The Space Needle", *options))


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("trace", PROMPT), "the subject is missing"),
        (("trace", PROMPT, "--span", "5:2"), "--span is '5:2' and holds no token"),
        (("trace", PROMPT, "--span", "x"), "--span is 'x'"),
        (("trace", PROMPT, "--span", f"0:{'9' * 5000}"), "--span has a number of 5000 digits"),
        (("trace", " ", "--subject", "a"), "prompt is empty"),
        (("trace", PROMPT, "--subject", ""), "subject is empty"),
        (("trace", "1 2 x", "--ids", "--span", "0:1"), "the prompt is '1 2 x', expected token ids"),
        (("trace", "1 -2", "--ids", "--span", "0:1"), "expected token ids"),
        (("trace", "9" * 5000, "--ids", "--span", "0:1"), "the prompt has a number of 5000 digits"),
        (("trace", "a\udcffb", "--subject", "a"), "half of a character"),
        (("trace",), "Missing argument"),
        (("--no-such-option",), "--no-such-option"),
        (("demo", "--engine", "x"), "unknown engine 'x'"),
        (("demo", "--dtype", "x", "--out", "new"), "unknown dtype 'x'"),
        (("verify", "--engine", "x"), "unknown engine 'x'"),
        (("verify", "--tolerance", "nan"), "tolerance is nan"),
        (("verify", "--tolerance", "-1"), "tolerance is -1"),
        (("plot", "nowhere"), "nothing at nowhere"),
        (("plot", "nowhere", "--dpi", 0), "--dpi"),
        (("no-such-command",), "no-such-command"),
    ],
)
def test_a_wrong_call_is_one_line_before_the_model_is_loaded(arguments, named, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    unloaded(monkeypatch)
    assert named in said(run(*arguments))


def test_dots_per_inch_have_their_bounds(folder, tmp_path, without_figure):
    assert trace(folder, "--out", tmp_path / "run").exit_code == 0
    for dpi in (1, 10**30):
        assert f"dpi is {str(dpi)[:5]}" in said(run("plot", tmp_path / "run", "--dpi", dpi))


@pytest.mark.parametrize("place", ["/proc/x", "file/run", "file", "x" * 300, "new/" + "x" * 300])
@pytest.mark.parametrize("command", [("trace", PROMPT, "--subject", "The"), ("demo",), ("verify",)])
def test_a_folder_that_cannot_be_written_to_is_one_line_before_the_model_is_loaded(
    command, place, monkeypatch, tmp_path
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    unloaded(monkeypatch)
    assert "expected" in (line := said(run(*command, "--out", place))) or "cannot be written to" in line
    assert names_in(tmp_path) == ["file"]


def test_a_folder_that_is_not_made_is_not_left_behind(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = trace(folder, "--out", "new/deep/run", "--device", "x")
    assert "unknown device" in said(done)
    assert names_in(tmp_path) == []


# Output that gets through.


def started(*arguments, stdout, **environment):
    """The command line in a process of its own."""
    code = "from fasttrace.cli.app import app; app()"
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, env={**os.environ, **environment})


ODD_PROMPT = "The Space Needle ist in Zürich 東京 🗼 is in downtown"


@pytest.mark.parametrize("encoding", ["latin-1", "cp1252", "ascii", "utf-8"])
@pytest.mark.parametrize("options", [(), ("--json",)], ids=["text", "json"])
def test_every_encoding_of_the_terminal_gets_the_result_and_the_files(
    encoding, options, folder, tmp_path, monkeypatch, without_figure
):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding=encoding))
    words = ["trace", ODD_PROMPT, "--subject", "The Space Needle", "--model", folder, "--samples", "1"]
    with pytest.raises(SystemExit) as ended:
        cli.app([*words, "--noise", "0.5", "--out", str(tmp_path / "run"), *options])
    assert ended.value.code == 0
    text = written.getvalue().decode(encoding)
    assert names_in(tmp_path / "run") == sorted([*CSV_FILES, "trace.parquet"])
    if options:
        assert json.loads(text)["prompt"] == ODD_PROMPT
    else:
        assert (ODD_PROMPT if encoding == "utf-8" else "\\u6771\\u4eac") in text


class Failing(io.TextIOWrapper):
    """A standard output that cannot be written to."""

    def __init__(self, error):
        super().__init__(io.BytesIO(), encoding="utf-8")
        self.error, self.written = error, False

    def write(self, text):
        self.written = True
        return len(text)

    def flush(self):
        if self.written:
            raise self.error


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), 141, None),
        (OSError(errno.ENOSPC, "No space left on device"), 2, "error: cannot write to standard output (No space left"),
    ],
)
def test_output_that_nobody_takes_ends_quietly_when_the_files_are_written(
    error, code, line, folder, tmp_path, monkeypatch, without_figure, capfd
):
    monkeypatch.setattr(sys, "stdout", Failing(error))
    words = ["trace", PROMPT, "--subject", "The Space Needle", "--model", folder, "--samples", "1", "--noise", "0.5"]
    with pytest.raises(SystemExit) as ended:
        cli.app([*words, "--out", str(tmp_path / "run")])
    monkeypatch.undo()
    assert ended.value.code == code
    assert names_in(tmp_path / "run") == sorted([*CSV_FILES, "trace.parquet"])
    found = capfd.readouterr().err.splitlines()
    assert found[-1].startswith(line) if line else found == [f"loading {folder}", "tracing"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_a_full_disk_behind_stdout_is_one_line_and_no_second_error_at_the_end():
    with open("/dev/full", "wb") as full:
        done = started("--version", stdout=full)
    assert done.returncode == 2
    [line] = done.stderr.decode().splitlines()
    assert line.startswith("error: cannot write to standard output (No space left on device)")


def test_a_closed_pipe_ends_without_a_word():
    reader, writer = os.pipe()
    os.close(reader)
    done = started("--version", stdout=writer)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")


def test_closed_streams_are_no_error(folder, monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    words = ["trace", PROMPT, "--subject", "The Space Needle", "--model", folder, "--samples", "1", "--noise", "0.5"]
    with pytest.raises(SystemExit) as ended:
        cli.app(words)
    assert ended.value.code == 0


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("Unable to allocate 9.1 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.1 GiB"),
    ],
)
def test_memory_that_runs_out_is_one_line_that_says_what_to_lower(error, folder, monkeypatch):
    monkeypatch.setattr(fasttrace.Tracer, "trace", raising(error))
    done = trace(folder)
    assert done.exit_code == 2
    assert done.stderr.splitlines()[-1].startswith("error: out of memory (")
    assert "lower --samples or --budget" in done.stderr.splitlines()[-1]


def test_an_error_that_nobody_expects_keeps_its_traceback(folder, monkeypatch):
    monkeypatch.setattr(fasttrace.Tracer, "trace", raising(RuntimeError("a fault of ours")))
    assert isinstance(trace(folder).exception, RuntimeError)


def test_an_errors_message_is_one_line_whatever_it_quotes(folder):
    done = trace(folder, subject="The\nEiffel\nTower")
    assert done.exit_code == 2
    assert done.stderr.splitlines()[-1].startswith("error: ")


def test_the_defaults_of_the_command_line_are_those_of_settings():
    for call in (cli.trace, cli_runs.run):
        parameters = inspect.signature(call).parameters
        names = {field.name for field in fields(Settings)} & parameters.keys()
        assert len(names) >= 6
        for name in names:
            default = getattr(Settings, name)
            assert parameters[name].default == (str(default) if name in ("noise", "budget") else default), name


def test_a_pair_is_traced_and_shown(tmp_path):
    prompt = "When John and Mary went to the shops, John gave the bag to"
    other = prompt.replace(", John", ", Mary")
    options = ["--target", " Mary", "--foil", " John", "--stream", "block_output", "--out", str(tmp_path / "pair")]
    done = CliRunner().invoke(cli.app, ["trace", prompt, "--counterfactual", other, *options])
    assert done.exit_code == 0, done.output
    assert '(9: " John" -> " Mary")' in done.stdout
    effects = done.stdout.partition("effects\n")[2].splitlines()
    assert effects[0].split() == ['p("', 'Mary")', 'logit("', 'Mary")', "-", 'logit("', 'John")']
    result = fasttrace.load(tmp_path / "pair" / "trace.parquet")
    shown = [float(line.split()[-1]) for line in effects[1:4]]
    runs = [result.run_value(run, "logit_diff") for run in ("clean", "corrupted")]
    assert shown == pytest.approx([*runs, runs[0] - runs[1]], abs=1e-4)
    assert "cells that bring back most of logit(" in done.stdout
    assert '  differing       "John" (tokens 9 to 9)' in done.stdout
    again = CliRunner().invoke(
        cli.app, ["trace", prompt, "--counterfactual", prompt.replace(", John", ", Sarah"), *options]
    )
    assert again.exit_code == 2
    assert "holds another run (counterfactual" in again.stderr
    unequal = CliRunner().invoke(
        cli.app, ["trace", prompt, "--counterfactual", prompt.replace(", John", ", Annabelle")]
    )
    assert unequal.exit_code == 2
    assert [line.split("|")[0].strip() for line in unequal.stderr.splitlines()[-2:]] == ["prompt", "counterfactual"]
    assert CliRunner().invoke(cli.app, ["trace", prompt]).exit_code == 2


def test_trace_takes_a_direction(folder, tmp_path):
    done = trace(folder, "--direction", "noising", "--out", tmp_path)
    assert done.exit_code == 0
    assert "cells that take away most of p(" in done.stdout
    assert fasttrace.load(tmp_path / "trace.parquet").direction == "noising"
    again = trace(folder, "--out", tmp_path)
    assert again.exit_code == 2
    assert "holds another run (direction" in again.stderr
    wrong = trace(folder, "--direction", "up")
    assert wrong.exit_code == 2
    assert "unknown direction 'up': give one of denoising, noising" in wrong.stderr
