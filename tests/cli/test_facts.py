"""`fasttrace run` and `fasttrace export` on a tiny random model."""

import json
import os

import pandas as pd
import pytest
from typer.testing import CliRunner

import fasttrace
from fasttrace.cli import app as cli
from fasttrace.reports.averages import average
from fasttrace.runs import run as runs
from fasttrace.runs.store import Store
from tests.helpers.run_facts import FLAGS, facts_of, one_of_each, save_model, write_facts

FACTS = facts_of(6)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a model and facts."""
    path = tmp_path_factory.mktemp("home")
    save_model(path / "model")
    write_facts(path / "facts.jsonl", FACTS)
    return path


@pytest.fixture(scope="module")
def finished(home):
    """A run that is done, and its folder."""
    done = run(home, home / "run")
    assert done.exit_code == 0, done.output
    return home / "run"


def run(home, out, *others, facts="facts.jsonl"):
    fixed = ("run", "--model", home / "model", "--facts", home / facts, "--out", out, *FLAGS, "--device", "cpu")
    return CliRunner().invoke(cli.app, [str(word) for word in (*fixed, *others)])


def export(*words):
    return CliRunner().invoke(cli.app, ["export", *map(str, words)])


def last_line(done):
    return done.stderr.splitlines()[-1]


# What it says and leaves.


def test_a_run_says_how_far_it_is_what_it_did_and_what_comes_next(home, tmp_path):
    done = run(home, tmp_path / "run")
    assert done.exit_code == 0, done.output
    assert done.stdout.splitlines()[0] == f"6 facts traced, 0 skipped: {tmp_path / 'run'}"
    assert f"next: fasttrace report {tmp_path / 'run'}" in done.stdout.splitlines()[-1]
    assert done.stderr.splitlines()[0] == f"loading {home / 'model'}"
    assert "0 of 6 facts, 0 skipped" in done.stderr.splitlines()
    assert last_line(done).startswith("6 of 6 facts, 0 skipped, ")
    store = Store.read(tmp_path / "run")
    assert [record.fact for record in one_of_each(store).values()] == FACTS
    assert store.description == {"name": "facts.jsonl", "n_facts": 6, "bad_rows": []}


def test_a_run_again_says_what_was_there_before(home, finished):
    parts = sorted((finished / "parts").iterdir())
    done = run(home, finished)
    assert done.exit_code == 0, done.output
    assert "6 facts traced, 0 skipped (6 were there before)" in done.stdout
    assert sorted((finished / "parts").iterdir()) == parts


def test_quiet_shows_no_progress(home, tmp_path):
    done = run(home, tmp_path / "run", "--quiet")
    assert done.exit_code == 0, done.output
    assert " of 6 facts" not in done.stderr
    assert "6 facts traced" in done.stdout


def test_a_limit_reads_so_many_facts_and_a_larger_one_goes_on(home, tmp_path):
    assert "2 facts traced, 0 skipped: " in run(home, tmp_path / "run", "--limit", 2).stdout
    assert "4 facts traced, 0 skipped (2 were there before): " in run(home, tmp_path / "run", "--limit", 4).stdout
    assert list(one_of_each(Store.read(tmp_path / "run"))) == ["0", "1", "2", "3"]


def test_rows_that_are_no_facts_are_counted_and_listed(home, tmp_path):
    (home / "mixed.jsonl").write_text('{"prompt": "The Needle is"}\n' + (home / "facts.jsonl").read_text())
    done = run(home, tmp_path / "run", facts="mixed.jsonl")
    assert done.exit_code == 0, done.output
    assert f"malformed rows of mixed.jsonl, skipped: 1, see {tmp_path / 'run' / 'manifest.json'}" in done.stdout
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["facts"]["bad_rows"] == ["line 1: subject is missing: expected prompt and subject, found prompt"]


def test_facts_that_the_model_does_not_know_are_skipped_when_asked_to(home, tmp_path):
    never = [{"prompt": fact.prompt, "subject": fact.subject, "target": "~never~"} for fact in FACTS]
    (home / "never.json").write_text(json.dumps(never))
    done = run(home, tmp_path / "run", "--require-correct", facts="never.json")
    assert done.exit_code == 2
    assert "0 facts traced, 6 skipped" in done.stdout
    assert last_line(done).startswith("error: none of the 6 facts could be traced: the model goes on with ")
    refused = export(tmp_path / "run")
    assert refused.exit_code == 2
    assert "holds no traced facts, only 6 skipped" in refused.stderr


def test_every_option_reaches_the_run(home, tmp_path, monkeypatch):
    seen = {}

    def spy(tracer, facts, folder, **options):
        seen.update(options, facts=len(facts), folder=folder, fuse=tracer.fuse, dtype=str(tracer.dtype))
        raise fasttrace.PlanError("enough seen")

    (tmp_path / "subjects.txt").write_text("The Needle\nSeattle\n")
    monkeypatch.setattr(runs, "run", spy)
    others = ("--stream", "mlp_output", "--noise-subjects", tmp_path / "subjects.txt", "--seed", 9, "--engine", "rows")
    more = ("--dtype", "float64", "--budget", 77, "--shard", "cells", "--require-correct", "--strict", "--no-fuse")
    done = run(home, tmp_path / "run", *others, *more, "--limit", 5)
    assert last_line(done) == "error: enough seen"
    assert (seen.pop("ranks").world, callable(seen.pop("progress"))) == (1, True)
    assert seen == {
        "facts": 5,
        "folder": tmp_path / "run",
        "fuse": False,
        "dtype": "torch.float64",
        "compat": None,
        "shard": "cells",
        "direction": "denoising",
        "window": 3,
        "noise": 1.0,
        "noise_subjects": ["The Needle", "Seattle"],
        "samples": 2,
        "seed": 9,
        "engine": "rows",
        "budget": 77,
        "require_correct": True,
        "strict": True,
        "streams": ("mlp_output",),
    }


def test_the_rule_for_what_is_known_and_missing_answers_are_checked_before_a_model_is_loaded(
    home, tmp_path, monkeypatch
):
    (home / "unanswered.json").write_text(
        json.dumps([{"prompt": "The Needle is", "subject": "The Needle", "word": "in"}])
    )
    done = run(home, tmp_path / "run", "--require-correct", "--compat", "rome", "--limit", 2)
    assert "0 facts traced, 2 skipped" in done.stdout
    fingerprint = Store.read(tmp_path / "run").fingerprint
    assert fingerprint["target"] == "clean top token, if correct by ROME's rule (it is the whole answer)"
    monkeypatch.setattr("fasttrace.cli.facts.load_model", None)
    done = run(home, tmp_path / "other", "--compat", "Rome")
    assert last_line(done) == "error: compat is 'Rome': give \"rome\", or None"
    done = run(home, tmp_path / "other", "--require-correct", facts="unanswered.json")
    assert "its columns are prompt, subject, word; rename the one that holds the answers to target" in last_line(done)


def test_an_interrupted_run_ends_with_130_and_goes_on(home, tmp_path, monkeypatch):
    right = Store.write

    def write(store, records, **options):
        right(store, records, **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(Store, "write", write)
    done = run(home, tmp_path / "run", "--budget", 300)
    assert done.exit_code == 130
    assert last_line(done).startswith("interrupted")
    monkeypatch.undo()
    assert "6 facts traced, 0 skipped (1 were there before)" in run(home, tmp_path / "run", "--budget", 300).stdout


# What it refuses.


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("no.json", "{this is no JSON", "no.json"),
        ("columns.csv", "question,answer\nwhere,here\n", "prompt"),
        ("empty.jsonl", "", "empty.jsonl: it is empty; give at least one usable row"),
        ("none.jsonl", '{"prompt": "a", "subject": "b"}\n', "none.jsonl: line 1: subject 'b' does not occur"),
        ("facts.txt", "The Needle is", "facts.txt"),
    ],
)
def test_a_file_without_facts_is_refused_before_a_model_is_loaded(home, tmp_path, name, content, message):
    (home / name).write_text(content)
    done = run(home, tmp_path / "run", facts=name)
    assert done.exit_code == 2
    assert last_line(done).startswith("error: ")
    assert message in last_line(done)
    assert "loading" not in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_file_that_is_not_there_is_refused(home, tmp_path):
    done = run(home, tmp_path / "run", facts="none.jsonl.gone")
    assert done.exit_code == 2
    assert "none.jsonl.gone" in last_line(done)


def test_strict_stops_at_a_row_that_is_no_fact(home, tmp_path):
    (home / "strict.jsonl").write_text((home / "facts.jsonl").read_text() + '{"prompt": "The Needle is"}\n')
    done = run(home, tmp_path / "run", "--strict", facts="strict.jsonl")
    assert done.exit_code == 2
    assert "strict.jsonl, line 7: subject is missing" in last_line(done)
    assert "correct it, or skip it without strict" in last_line(done)


def test_strict_stops_at_a_fact_that_the_model_cannot_take(home, tmp_path):
    write_facts(home / "long.jsonl", [fasttrace.Fact("long", "Needle" + " is" * 40, "Needle"), *FACTS])
    done = run(home, tmp_path / "run", "--strict", facts="long.jsonl")
    assert done.exit_code == 2
    assert "fact 'long'" in last_line(done)
    assert "6 facts traced, 1 skipped" in run(home, tmp_path / "run", facts="long.jsonl").stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--shard", "rows"), "unknown shard 'rows': give one of facts, cells"),
        (("--stream", "mlp"), "mlp"),
        (("--noise", "much"), "much"),
        (("--budget", "much"), "much"),
        (("--engine", "warp"), "warp"),
        (("--window", "0"), "window"),
        (("--samples", "0"), "samples"),
        (("--seed", "-1"), "seed"),
        (("--noise-subjects", "none.txt"), "none.txt"),
    ],
)
def test_options_that_cannot_be_used_are_refused(home, tmp_path, options, message):
    done = run(home, tmp_path / "run", *options)
    assert done.exit_code == 2, done.output
    assert last_line(done).startswith("error: ")
    assert message in last_line(done)
    assert not (tmp_path / "run").exists()


def test_a_limit_below_one_is_refused(home, tmp_path):
    done = run(home, tmp_path / "run", "--limit", 0)
    assert done.exit_code == 2
    assert "--limit" in done.stderr


def test_another_runs_folder_is_refused_with_the_difference(home, finished):
    done = run(home, finished, "--seed", 4)
    assert done.exit_code == 2
    assert "holds another run (seed 1 there, 4 here): give another folder" in last_line(done)


def test_a_folder_that_is_a_file_is_refused(home, tmp_path):
    (tmp_path / "run").write_text("not a folder")
    done = run(home, tmp_path / "run")
    assert done.exit_code == 2
    assert str(tmp_path / "run") in last_line(done)


@pytest.mark.skipif(os.name != "posix", reason="folders have no permissions here")
def test_a_folder_that_may_not_be_written_to_is_refused(home, tmp_path, monkeypatch):
    if os.geteuid() == 0:  # who may write anywhere
        monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.W_OK)
    (tmp_path / "run").mkdir()
    (tmp_path / "run").chmod(0o555)
    done = run(home, tmp_path / "run")
    assert done.exit_code == 2
    assert "cannot be written to" in last_line(done) or "cannot write" in last_line(done)


# Export.


@pytest.mark.parametrize(("kind", "listing"), [("csv", "facts.csv"), ("rome-npz", "cases.csv")])
def test_a_run_is_exported_into_its_folder_or_another(finished, tmp_path, kind, listing):
    for where, out in ((finished / kind, ()), (tmp_path / "there", ("--out", tmp_path / "there"))):
        done = export(finished, "--format", kind, *out)
        assert done.exit_code == 0, done.output
        count = sum(path.is_file() for path in where.rglob("*"))
        assert done.stdout == f"wrote {count} files to {where}\n"
        assert count == 1 + 3 * 6
        assert len(pd.read_csv(where / listing)) == 6


@pytest.mark.parametrize("value", ["indirect_effect", "normalized_effect", "mean_of_ratios", "kl"])
def test_a_run_is_averaged_in_the_metric_that_is_asked_for(finished, tmp_path, value, monkeypatch):
    monkeypatch.setattr("fasttrace.cli.facts.find_spec", lambda _: None)
    done = CliRunner().invoke(
        cli.app, ["average", str(finished), "--metric", "kl", "--value", value, "--out", str(tmp_path)]
    )
    assert done.exit_code == 0, done.output
    expected = average(Store.read(finished), metric="kl", value=value)
    cells = pd.read_csv(tmp_path / "averages.csv")
    pd.testing.assert_frame_equal(cells, expected.to_frame(), check_dtype=False)
    assert done.stdout.startswith("6 facts averaged, kl, denoising\n")
    extreme = cells[cells.stream == "block_output"]["mean"]
    falls = value in ("indirect_effect", "kl")
    assert expected.strongest("block_output")["mean"][0] == (extreme.min() if falls else extreme.max())
    assert f"with the {'smallest' if falls else 'largest'} means" in done.stdout


def test_a_report_has_the_metrics_that_are_asked_for(finished, tmp_path):
    pytest.importorskip("plotly")
    for words, names in (((), ("prob", "kl")), (("--metric", "rank", "--metric", "logit"), ("prob", "rank", "logit"))):
        out = tmp_path / "r.html"
        done = CliRunner().invoke(cli.app, ["report", str(finished), "--out", str(out), *words])
        assert done.exit_code == 0, done.output
        _, _, data = out.read_text("utf-8").partition('<script type="application/json" id="data">')
        assert tuple(m["name"] for m in json.loads(data.partition("</script>")[0])["metrics"]) == names


def test_an_unknown_format_is_refused(finished):
    done = export(finished, "--format", "xlsx")
    assert done.exit_code == 2
    assert last_line(done) == "error: unknown format 'xlsx': choose from rome-npz, csv"


def test_a_folder_without_a_run_is_refused(tmp_path):
    done = export(tmp_path)
    assert done.exit_code == 2
    assert f"no manifest.json at {tmp_path}: expected a folder written by 'fasttrace run'" in last_line(done)


# What is wrong whatever the model is said before it is loaded.


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--samples", 0), "samples is 0"),
        (("--samples", 10**30), "samples is 1000"),
        (("--window", 0), "window is 0"),
        (("--seed", -1), "seed is -1"),
        (("--noise", "x"), "noise rule 'x'"),
        (("--noise", "inf"), "noise has standard deviation inf"),
        (("--budget", "x"), "budget is 'x'"),
        (("--engine", "x"), "unknown engine 'x'"),
        (("--stream", "x"), "unknown stream 'x'"),
        (("--shard", "x"), "unknown shard 'x': give one of facts, cells"),
        (("--compat", "x"), "compat is 'x'"),
        (("--dtype", "x"), "unknown dtype 'x'"),
        (("--device", "cuda:99"), "device 'cuda:99' is not there"),
        (("--device", "auto", "--device-map", "x"), "device_map is 'x'"),
        (("--module", "x"), "--module is 'x'"),
        (("--noise-subjects", "none.txt"), "none.txt"),
        (("--limit", 0), "--limit"),
        (("--out", "/proc/x"), "cannot be written to"),
        (("--out", "x" * 300), "cannot be written to (File name too long)"),
        (("--facts", "none.jsonl"), "none.jsonl"),
        (("--facts", "."), "."),
        (("--facts", ""), "facts are read from"),
    ],
)
def test_a_wrong_option_of_a_run_is_one_line_before_the_model_is_loaded(home, tmp_path, options, named, monkeypatch):
    monkeypatch.setattr("fasttrace.api.load", lambda *_args, **_options: pytest.fail("the model was loaded"))
    monkeypatch.chdir(tmp_path)
    done = run(home, tmp_path / "run", *options)
    assert done.exit_code == 2, done.output
    assert isinstance(done.exception, SystemExit)
    [line] = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert named in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("average", "--seed", -1), "seed is -1"),
        (("average", "--bootstrap", 0), "--bootstrap"),
        (("average", "--bootstrap", 10**30), "bootstrap is 1000"),
        (("average", "--value", "x"), "unknown value 'x'"),
        (("average", "--metric", "x"), "unknown metric 'x'"),
        (("average", "--metric", "top1"), "metric 'top1' has no average"),
        (("average", "--metric", "logit_diff"), "6 without logit_diff"),
        (("average", "--metric", "kl", "--compat", "rome"), "ROME's notebook averages 'prob'"),
        (("average", "--compat", "x"), "unknown compat 'x'"),
        (("average", "--out", "/proc/x"), "cannot be written to"),
        (("export", "--format", "x"), "unknown format 'x'"),
        (("export", "--out", "/proc/x"), "cannot"),
        (("report", "--out", "/proc/x/a.html"), "cannot write"),
        (("report", "--metric", "top1"), "metric 'top1' has no average"),
    ],
)
def test_a_wrong_option_behind_a_run_is_one_line(finished, words, named):
    command, *options = words
    done = CliRunner().invoke(cli.app, [str(word) for word in (command, finished, *options)])
    assert done.exit_code == 2, done.output
    assert isinstance(done.exception, SystemExit)
    [line] = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert named in line
