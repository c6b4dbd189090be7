"""The summary is what people paste: a failure that it hides, or a number from the wrong report, would stay."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from bench import summary
from bench.cases import CASES
from bench.run import GPU_CASES

SCRIPT = Path(__file__).with_name("gpu.sh")
TIMING = {"p20": 0.1, "p50": 0.125, "p80": 0.2, "rounds": 5}
CASE = {
    "case": "gpt2-xl",
    "shape": "gpt2-xl: n_layer=48, n_positions=1024, float16, 7 tokens, subject [0, 4), samples 1",
    "dtype": "float16",
    "engine": "wavefront",
    "fuse": True,
    "prompts": 1,
    "samples": 1,
    "n_blocks": 40,
    "whole_blocks": 48,
    "gate": 1.5e-3,
    "half": {"engine": 2e-3, "plain": 1e-3},
    "timing": TIMING,
    "cells_per_second": 8064.0,
    "gflops": 250e3,
    "share": 0.4,
    "sustained_share": 0.55,
    "peak_bytes": 12_340_000_000,
    "split": {"wall": 0.2, "seconds": {"matmul": 0.1, "idle": 0.05}, "launches": 900, "waits": {"cudaMemcpy": 2}},
}
KERNEL = {"task": "rms_norm", "size": "9 x 9", "dtype": "float16", "timing": TIMING, "limit": 0.05, "bound": "bytes"}
KERNELS = [KERNEL | {"backend": "triton", "share": 0.4}, KERNEL | {"backend": "torch", "share": 0.3}]
PEER = {
    "tool": "rows",
    "seconds": 1.25,
    "fasttrace_seconds": 0.125,
    "ratio": 10.0,
    "ratio_min": 9.0,
    "ratio_max": 11.0,
    "max_relative_difference": 2e-3,
}


def put(folder: Path, name: str, date: str = "2026-01-02", commit: str = "abc", **contents) -> None:
    card = {"device": "GPU 9000", "cores": 16, "commit": commit, "versions": {"torch": "2.11.0"}}
    (folder / name).write_text(json.dumps({"tool": "any", "date": date, "card": card} | contents))


def put_steps(folder: Path, *steps: tuple[str, int | None, str]) -> None:
    lines = [json.dumps({"name": name, "code": code, "seconds": 3, "limit": 60}) for name, code, _ in steps]
    (folder / "steps.jsonl").write_text("\n".join(lines))
    for name, _, output in steps:
        (folder / f"{name}.log").write_text(output)


def printed(folder: Path, capsys: pytest.CaptureFixture[str]) -> tuple[list[str], int]:
    with pytest.raises(SystemExit) as end:
        summary.main([str(folder)])
    assert isinstance(end.value.code, int)
    return capsys.readouterr().out.splitlines(), end.value.code


def test_everything_that_reports_say_is_printed_and_json_comes_last(tmp_path, capsys):
    put(tmp_path, "run.json", cases=[CASE], refused=[{"case": "smollm2", "dtype": "float16", "why": "cells differ"}])
    put(tmp_path, "kernels.json", kernels=KERNELS, problems=["swiglu triton is wrong"])
    put(tmp_path, "peers.json", case="gpt2-12", dtype="float32", peers=[PEER], left_out={"pyvene": "not installed"})
    slope = {"axis": "samples", "time": 0.91, "flops": 1.0}
    put(tmp_path, "scaling.json", case="gpt2-12", dtype="float16", exponents=[slope])
    lines, code = printed(tmp_path, capsys)
    assert code == 0
    for line in (
        "| gpt2-xl, 40 blocks of 48, T = 7, N = 1 | float16 | 1.5e-03 "
        "| 0.125 [0.1-0.2] | 250000 | 0.55 | 0.40 | 12.3 GB |",
        "| gpt2-xl | float16 | 0.125 | 8064 | 250 | 0.55 | 12.3 | 2e-03 | 2e-03 (1e-03) | 25% | cudaMemcpy 2 |",
        "| operation | size | dtype | limit us | triton: us, share | torch: us, share |",
        "| rms_norm | 9 x 9 | float16 | 50000.0 (bytes) | 125000.0, 0.40 | 125000.0, 0.30 |",
        "| gpt2-12 float32 | rows | 1.25 | 0.125 | 10 [9-11] | 2.0e-03 |",
        "gpt2-12 float16: exponent of samples: time 0.91, work 1.00",
        "refused: smollm2 float16: cells differ",
        "kernel: swiglu triton is wrong",
        "left out: pyvene: not installed",
        "GPU 9000, 16 cores; commit abc; torch=2.11.0",
    ):
        assert line in lines
    assert json.loads(lines[-1])["ratios"] == {"gpt2-12 float32 rows": 10.0}


def test_rows_for_readme_perf_have_its_columns():
    columns = summary.readme_cases(summary.Findings(cases=[CASE]))[0]
    assert columns in SCRIPT.parents[1].joinpath("README_PERF.md").read_text().splitlines()


def test_the_newest_report_counts_and_every_commit_is_named(tmp_path, capsys):
    put(tmp_path, "a.json", "2026-01-03", "new", cases=[CASE | {"gate": 3e-3}])
    put(tmp_path, "b.json", "2026-01-02", "old", cases=[CASE, CASE | {"dtype": "bfloat16"}])
    found = summary.read_folder(tmp_path)
    assert {case["dtype"]: case["gate"] for case in found.cases} == {"float16": 3e-3, "bfloat16": 1.5e-3}
    assert "commit new, old;" in summary.about_lines(found)[0]


@pytest.mark.parametrize(
    ("name", "code", "output", "status", "wrong"),
    [
        ("run", 0, "fine", "ok", False),
        ("run", 1, "Traceback", "failed", True),
        ("run", 124, "", "timed out", False),
        ("run", None, "", "no time left", False),
        ("tests-kernels", 0, "3 passed in 1s", "ok", False),
        ("tests-kernels", 0, "323 skipped in 1s", "ran nothing", True),
        ("tests-kernels", 137, "", "timed out", True),
        ("tests-kernels", None, "", "no time left", True),
    ],
)
def test_a_step_that_failed_is_told_and_sets_the_exit_code(tmp_path, capsys, name, code, output, status, wrong):
    put_steps(tmp_path, (name, code, output))
    lines, end = printed(tmp_path, capsys)
    row = next(line for line in lines if line.startswith(f"| {name} |"))
    assert f"| {status} |" in row
    assert end == wrong
    assert json.loads(lines[-1])["wrong"] == [name] * wrong


def test_of_a_failure_the_end_of_its_output_is_shown_without_json(tmp_path, capsys):
    put_steps(tmp_path, ("run", 1, "first\n" + "more\n" * 9 + 'the reason\n{"tool": "run"}\n'))
    lines, _ = printed(tmp_path, capsys)
    assert lines[lines.index("run failed:") + summary.OUTPUT_LINES] == "    the reason"
    assert "    first" not in lines


def test_an_absent_pytest_is_named_and_is_no_failure(tmp_path, capsys):
    line = {"name": "tests-kernels", "code": None, "seconds": 0, "limit": 0, "absent": "pytest"}
    (tmp_path / "steps.jsonl").write_text(json.dumps(line))
    lines, code = printed(tmp_path, capsys)
    assert "| tests-kernels | pytest is not installed | 0 of 0 |  |" in lines
    assert code == 0


def test_half_written_and_older_reports_do_no_harm(tmp_path):
    (tmp_path / "cut.json").write_text('{"tool": "ru')
    older = {key: value for key, value in CASE.items() if key not in ("shape", "half", "samples", "n_blocks", "split")}
    put(tmp_path, "older.json", cases=[older])
    found = summary.read_folder(tmp_path)
    assert found.unread == ["cut.json"]
    assert summary.readme_cases(found)[2].startswith("| gpt2-xl | float16 |")
    assert summary.case_table(found)[2].endswith("| - | - | - |")


def test_an_empty_folder_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        summary.main([str(tmp_path)])
    assert "holds no report; expected" in capsys.readouterr().err


def test_the_script_names_every_case_that_is_measured_on_a_gpu():
    words = set(re.findall(r"[a-z0-9-]+", SCRIPT.read_text()))
    assert words & CASES.keys() >= set(GPU_CASES)


def script(out: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": "/usr/bin:/bin", "PYTHON": sys.executable, "OUT": str(out)} | environment
    command = ["bash", str(SCRIPT), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def pretended(folder: Path, packages: str) -> str:
    """A Python that has a GPU and some packages, and does nothing but the summary; bench.peers fails."""
    path = folder / "python"
    path.write_text(
        f"""#!/usr/bin/env bash
case "$*" in
    "- 0") echo {folder} ;;
    "-c import "*) [[ " {packages} " == *" ${{2#import }} "* ]] ;;
    *bench.summary*) exec {sys.executable} "$@" ;;
    *bench.peers*) echo it differs; exit 1 ;;
    *) echo "$*: 1 passed" ;;
esac
"""
    )
    path.chmod(0o755)
    return str(path)


def test_the_script_stops_at_once_where_there_is_no_gpu(tmp_path):
    ended = script(tmp_path, CUDA_VISIBLE_DEVICES="")
    assert ended.returncode == 2
    assert "sees no GPU; bench/gpu.sh --rehearse runs tiny cases on the CPU" in ended.stderr
    assert not list(tmp_path.iterdir())


def test_the_script_goes_on_after_a_step_that_failed(tmp_path):
    ended = script(tmp_path / "out", PYTHON=pretended(tmp_path, "pytest xdist"))
    found = json.loads(ended.stdout.splitlines()[-1])
    assert ended.returncode == 1
    assert found["wrong"] == ["peers-xl-float16", "peers-float32"]
    assert next(iter(found["steps"])) == "tests-kernels"
    assert next(reversed(found["steps"])) == "scaling"
    assert (tmp_path / "out" / "summary.md").read_text().splitlines()[-1] == ended.stdout.splitlines()[-1]
    assert "-n 6 -m gpu" in (tmp_path / "out" / "tests-kernels.log").read_text()
    again = script(tmp_path / "out", PYTHON=pretended(tmp_path, "pytest"))
    assert again.returncode == 2
    assert "holds an earlier run" in again.stderr


def test_the_script_says_that_pytest_is_absent(tmp_path):
    ended = script(tmp_path / "out", PYTHON=pretended(tmp_path, ""))
    found = json.loads(ended.stdout.splitlines()[-1])
    assert found["steps"]["tests-kernels"] == "pytest is not installed"
    assert found["wrong"] == ["peers-xl-float16", "peers-float32"]


def test_no_step_begins_when_the_budget_is_spent(tmp_path):
    ended = script(tmp_path / "out", "--budget", "20", PYTHON=pretended(tmp_path, "pytest"))
    found = json.loads(ended.stdout.splitlines()[-1])
    assert set(found["steps"].values()) == {"no time left"}
    assert found["wrong"] == ["tests-kernels", "tests-others"]


@pytest.mark.parametrize("arguments", [("--fast",), ("--budget", "long")])
def test_the_script_refuses_what_it_does_not_know(tmp_path, arguments):
    ended = script(tmp_path, *arguments)
    assert ended.returncode == 2
    assert arguments[-1] in ended.stderr
