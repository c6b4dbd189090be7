"""What the reports of one folder say: rows for README_PERF, the steps, the cases, the kernels, one line of JSON.

    python -m bench.summary bench/results/<device>

Of several reports on the same thing the newest counts. `bench/gpu.sh` also leaves `steps.jsonl`, a line per step, and
each step's output as `<name>.log`; the exit code is 1 if one of them failed. It needs Python alone, so that it tells
what happened where nothing else runs. The last line is JSON.
"""

import argparse
import json
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TIMED_OUT = (124, 137)
"""Exit codes of a command that `timeout` ended, or had to kill."""

TESTS = "tests"
"""What the names of steps that are tests begin with: one that passes nothing, or does not end, has failed."""

OUTPUT_LINES = 6
"""Last lines of its output that are shown of a step that failed."""

Report = dict[str, Any]


@dataclass(frozen=True)
class Step:
    """One step of bench/gpu.sh.

    Attributes:
        code: its exit code; None if it did not begin.
        limit: seconds that it had.
        absent: the package without which it could not begin.
        output: its last lines, those of JSON left out.
    """

    name: str
    code: int | None
    seconds: int
    limit: int
    absent: str = ""
    output: tuple[str, ...] = ()

    @property
    def status(self) -> str:
        """In words."""
        if self.code is None:
            return f"{self.absent} is not installed" if self.absent else "no time left"
        if self.code:
            return "timed out" if self.code in TIMED_OUT else "failed"
        return "ok" if self.passed or not self._is_tests else "ran nothing"

    @property
    def is_wrong(self) -> bool:
        """Whether it failed, or was to show that something is right and did not; an absent pytest is no failure."""
        return self.status == "failed" or (self._is_tests and self.status != "ok" and not self.absent)

    @property
    def passed(self) -> str:
        """Pytest's closing line, if a test passed."""
        return next((line.strip("= ") for line in reversed(self.output) if re.search(r"\d+ passed", line)), "")

    @property
    def _is_tests(self) -> bool:
        return self.name.startswith(TESTS)


@dataclass
class Findings:
    """What the reports of a folder hold together.

    Attributes:
        about: the newest report's card.
        cases, kernels, peers, refused: the reports' lines; each has its report's `commit` beside it.
        problems: of kernels, in words.
        left_out: why, by peer.
        unread: files that are no reports.
    """

    about: Report = field(default_factory=dict)
    steps: list[Step] = field(default_factory=list)
    cases: list[Report] = field(default_factory=list)
    refused: list[Report] = field(default_factory=list)
    kernels: list[Report] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    peers: list[Report] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    slopes: list[Report] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)

    @property
    def wrong(self) -> list[str]:
        """Names of the steps that failed."""
        return [step.name for step in self.steps if step.is_wrong]


def read_folder(folder: Path) -> Findings:
    """Reads all reports in a folder and the folders in it.

    Raises:
        FileNotFoundError: there is neither a report nor a step.
    """
    found = Findings(steps=[step for path in sorted(folder.rglob("steps.jsonl")) for step in read_steps(path)])
    reports = sorted(_reports(folder, found.unread), key=lambda report: report["date"])
    if not reports and not found.steps:
        raise FileNotFoundError(f"{folder} holds no report; expected *.json as bench.run and bench/gpu.sh write them")
    found.about = reports[-1]["card"] if reports else {}
    for report in reports:
        _add(found, report)
    found.cases = _newest(found.cases, ("case", "dtype", "engine", "fuse"))
    found.kernels = _newest(found.kernels, ("task", "size", "dtype", "backend"))
    found.peers = _newest(found.peers, ("case", "dtype", "tool"))
    found.slopes = _newest(found.slopes, ("case", "dtype", "axis"))
    return found


def read_steps(path: Path) -> list[Step]:
    """The steps with the ends of their outputs."""
    return [
        Step(**line, output=_end_of(path.with_name(f"{line['name']}.log")))
        for line in map(json.loads, path.read_text().splitlines())
    ]


def _end_of(log: Path) -> tuple[str, ...]:
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    return tuple([line[:200] for line in lines if line.strip() and not line.startswith("{")][-OUTPUT_LINES:])


def _reports(folder: Path, unread: list[str]) -> Iterator[Report]:
    for path in sorted(folder.rglob("*.json")):
        try:
            report = json.loads(path.read_text())
        except ValueError:
            report = None
        if isinstance(report, dict) and {"card", "date"} <= report.keys():
            yield report
        else:
            unread.append(path.name)


def _add(found: Findings, report: Report) -> None:
    """Sorts a report's lines; a line keeps the commit and what the head of its report says of the case."""
    head = {key: report[key] for key in ("case", "dtype", "samples") if key in report}
    head["commit"] = report["card"].get("commit", "unknown")
    found.cases += [head | line for line in report.get("cases", ())]
    found.refused += [head | line for line in report.get("refused", ())]
    found.kernels += [head | line for line in report.get("kernels", ())]
    found.peers += [head | line for line in report.get("peers", ())]
    found.slopes += [head | line for line in report.get("exponents", ())]
    found.problems += report.get("problems", ())
    found.left_out |= report.get("left_out", {})


def _newest(lines: Iterable[Report], keys: Sequence[str]) -> list[Report]:
    """Of lines with the same values the last, in the order of the first."""
    return list({tuple(line.get(key) for key in keys): line for line in lines}.values())


def table(header: str, rows: Iterable[Sequence[object]]) -> list[str]:
    """A Markdown table; none if it has no rows.

    >>> table("case | s", [("tiny", 1)])
    ['| case | s |', '|---|---|', '| tiny | 1 |']
    """
    lines = [f"| {' | '.join(map(str, row))} |" for row in rows]
    return [f"| {header} |", "|" + "---|" * len(header.split(" | ")), *lines] if lines else []


def case_label(case: Report) -> str:
    """A case as README_PERF names one: model, blocks, tokens, prompts, samples."""
    tokens = re.search(r"(\d+(?: to \d+)?) tokens", case.get("shape", ""))
    parts = [case["case"]]
    if "n_blocks" in case:
        whole = case["whole_blocks"]
        parts += [f"{case['n_blocks']} blocks" + (f" of {whole}" if whole != case["n_blocks"] else "")]
    parts += [f"T = {tokens[1]}"] if tokens else []
    parts += [f"{case['prompts']} prompts"] if case.get("prompts", 1) > 1 else []
    return ", ".join([*parts, f"N = {case['samples']}"] if "samples" in case else parts)


def readme_cases(found: Findings) -> list[str]:
    """Rows of README_PERF's table of traces."""
    header = "case | dtype | gate | seconds p50 [p20-p80] | GFLOP/s | of peak | of one call | peak memory"
    return table(header, map(_readme_case, found.cases))


def _readme_case(case: Report) -> tuple[object, ...]:
    t = case["timing"]
    seconds = f"{t['p50']:.3g} [{t['p20']:.3g}-{t['p80']:.3g}]"
    shares = f"{case['sustained_share']:.2f}", f"{case['share']:.2f}"
    memory = f"{case['peak_bytes'] / 1e9:.1f} GB"
    return case_label(case), case["dtype"], f"{case['gate']:.1e}", seconds, f"{case['gflops']:.0f}", *shares, memory


def readme_peers(found: Findings) -> list[str]:
    """Rows of README_PERF's table of other tools, with the case before them."""
    header = "case | tool | seconds | fasttrace, same rounds | ratio [min-max] | largest relative difference"
    rows = (
        (
            f"{peer['case']} {peer['dtype']}",
            peer["tool"],
            f"{peer['seconds']:.3g}",
            f"{peer['fasttrace_seconds']:.3g}",
            f"{peer['ratio']:.2g} [{peer['ratio_min']:.2g}-{peer['ratio_max']:.2g}]",
            f"{peer['max_relative_difference']:.1e}",
        )
        for peer in found.peers
    )
    return table(header, rows)


def step_table(found: Findings) -> list[str]:
    """What came of each step."""
    rows = ((step.name, step.status, f"{step.seconds} of {step.limit}", step.passed) for step in found.steps)
    return table("step | result | seconds | tests", rows)


def case_table(found: Findings) -> list[str]:
    """Every case in one line."""
    header = "case | dtype | s | cells/s | TFLOP/s | of peak | GB | gate | from float32 (plain) | GPU idle | waits"
    return table(header, map(_case_row, found.cases))


def _case_row(case: Report) -> tuple[object, ...]:
    half, split = case.get("half"), case.get("split") or {}
    return (
        case["case"],
        case["dtype"],
        f"{case['timing']['p50']:.3g}",
        f"{case['cells_per_second']:.0f}",
        f"{case['gflops'] / 1e3:.3g}",
        f"{case['sustained_share']:.2f}",
        f"{case['peak_bytes'] / 1e9:.1f}",
        f"{case['gate']:.0e}",
        f"{half['engine']:.0e} ({half['plain']:.0e})" if half else "-",
        f"{split['seconds']['idle'] / split['wall']:.0%}" if "idle" in split.get("seconds", ()) else "-",
        _waits(split.get("waits")),
    )


def _waits(waits: dict[str, int] | None) -> str:
    """Calls that wait for the GPU between the first block and the readout; `-` where nobody looked."""
    if waits is None:
        return "-"
    return ", ".join(f"{name} {count}" for name, count in waits.items()) or "none"


def kernel_table(found: Findings) -> list[str]:
    """Every operation in one line per size: each backend's share of the limit, the limit, the error."""
    backends = list(dict.fromkeys(line["backend"] for line in found.kernels))
    groups: dict[tuple[str, ...], dict[str, Report]] = {}
    for line in found.kernels:
        groups.setdefault((line["task"], line["size"], line["dtype"]), {})[line["backend"]] = line
    header = " | ".join(["operation", "size", "dtype", "limit us", *(f"{name}: us, share" for name in backends)])
    return table(header, (_kernel_row(key, lines, backends) for key, lines in groups.items()))


def _kernel_row(key: tuple[str, ...], lines: dict[str, Report], backends: Iterable[str]) -> list[str]:
    first = next(iter(lines.values()))
    found = (lines.get(name) for name in backends)
    cells = (f"{1e6 * line['timing']['p50']:.1f}, {line['share']:.2f}" if line else "-" for line in found)
    return [*key, f"{1e6 * first['limit']:.1f} ({first['bound']})", *cells]


def trouble(found: Findings) -> list[str]:
    """What failed, was refused or is missing, in words."""
    lines = [f"refused: {line['case']} {line['dtype']}: {line['why']}" for line in found.refused]
    lines += [f"kernel: {problem}" for problem in found.problems]
    lines += [f"left out: {name}: {why}" for name, why in found.left_out.items()]
    lines += [f"not a report: {name}" for name in found.unread]
    for step in found.steps:
        if step.code:
            lines += [f"{step.name} {step.status}:", *(f"    {line}" for line in step.output)]
    return lines


def slope_lines(found: Findings) -> list[str]:
    """How time and counted work grow."""
    return [
        f"{line['case']} {line['dtype']}: exponent of {line['axis']}: time {line['time']:.2f}, work {line['flops']:.2f}"
        for line in found.slopes
    ]


def about_lines(found: Findings) -> list[str]:
    """The newest report's card, with the commits of all that is shown."""
    about = found.about
    if not about:
        return ["no report: nothing is known of the machine"]
    versions = " ".join(f"{name}={version}" for name, version in about["versions"].items())
    shown = (*found.cases, *found.kernels, *found.peers, *found.slopes)
    commits = ", ".join(dict.fromkeys([about["commit"], *(line["commit"] for line in shown)]))
    return [f"{about['device']}, {about['cores']} cores; commit {commits}; {versions}"]


def sections(found: Findings) -> dict[str, list[str]]:
    """The parts of the summary, by title; the longest and least urgent first."""
    return {
        "For README_PERF": readme_cases(found),
        "Peers": readme_peers(found),
        "Kernels: share of the limit": kernel_table(found),
        "Growth": slope_lines(found),
        "Machine": about_lines(found),
        "Cases": case_table(found),
        "Trouble": trouble(found),
        "Steps": step_table(found),
    }


def last_line(found: Findings) -> Report:
    """The summary as one short line of JSON; the reports have the whole of it."""
    return {
        "wrong": found.wrong,
        "steps": {step.name: step.status for step in found.steps},
        "seconds": {f"{case['case']} {case['dtype']}": case["timing"]["p50"] for case in found.cases},
        "ratios": {f"{p['case']} {p['dtype']} {p['tool']}": round(p["ratio"], 2) for p in found.peers},
        "refused": len(found.refused),
        "kernel_problems": len(found.problems),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the summary; the last line is JSON. The exit code is 1 if a step failed."""
    parser = argparse.ArgumentParser("python -m bench.summary", description="What a folder of reports says.")
    parser.add_argument("folder", type=Path, help="bench/results/<device>, or the output folder of bench/gpu.sh")
    options = parser.parse_args(arguments)
    try:
        found = read_folder(options.folder)
    except FileNotFoundError as problem:
        parser.error(str(problem))
    for title, lines in sections(found).items():
        if lines:
            print(f"## {title}\n", *lines, "", sep="\n")
    print(json.dumps(last_line(found)))
    sys.exit(bool(found.wrong))


if __name__ == "__main__":
    main()
