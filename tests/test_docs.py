"""What README and docs say is there and works: files, options, targets, links, examples, notebooks."""

import doctest
import json
import re
import shlex
from pathlib import Path

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from fasttrace.cli.app import app

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted(ROOT.glob("docs/tutorials/*.ipynb"))
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/**/*.md"))]
GENERATED_ON_GITHUB = ("http://", "https://", "mailto:", "#")
NUMBER = re.compile(r"[-+]?\d+\.\d+(?:e[-+]?\d+)?")


def read(page):
    return page.read_text(encoding="utf-8")


def code_of(page):
    """Code of a page: what stands in fences and in single backticks; a notebook's cells, texts included."""
    text = read(page)
    fenced = re.findall(r"^```\w*\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    return [*fenced, *re.findall(r"`([^`]+)`", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_inside_the_repository_lead_to_files(page):
    links = re.findall(r"\]\(([^)\s]+)\)", read(page))
    dead = [link for link in links if not link.startswith(GENERATED_ON_GITHUB)]
    dead = [link for link in dead if not (page.parent / link.partition("#")[0]).exists()]
    assert not dead, f"{page.name} links to what is not there: {', '.join(dead)}"


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "CHANGELOG.md"], ids=lambda page: page.name)
def test_files_that_a_page_names_are_there(page):
    named = {
        word for code in code_of(page) for word in re.findall(r"(?<![\w./])(?:[\w.]+/)+[\w.]+\.(?:py|md|sh)\b", code)
    }
    missing = {name for name in named if not (ROOT / name).exists() and not (ROOT / "fasttrace" / name).exists()}
    assert not missing - {"experiments/causal_trace.py"}, f"{page.name} names {', '.join(sorted(missing))}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_of_a_page_have_their_options(page):
    commands = get_command(app).commands
    text = "\n".join(code_of(page)).replace("\\\n", " ")
    for name, rest in re.findall(r"fasttrace (\w+)([^\n`]*)", text):
        if name in commands:
            known = {
                option for parameter in commands[name].params for option in (*parameter.opts, *parameter.secondary_opts)
            }
            wrong = set(re.findall(r"(?<!\S)--[a-z][\w-]*", rest.partition("#")[0])) - known - {"--help"}
            assert not wrong, f"{page.name}: fasttrace {name} has no {', '.join(sorted(wrong))}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_targets_that_a_page_names_are_in_the_makefile(page):
    targets = set(re.findall(r"^([\w-]+):", read(ROOT / "Makefile"), flags=re.MULTILINE))
    named = {name for code in code_of(page) for name in re.findall(r"(?:^|\s)make ([a-z][\w-]*)", code)}
    assert named <= targets, f"{page.name} names make {', '.join(sorted(named - targets))}"


def test_the_readme_counts_families_as_their_table_does():
    last = read(ROOT / "docs/families.md").strip().splitlines()
    counts = next(line for line in last if re.fullmatch(r"(?:[\w ]+ \d+(?:, |$))+", line))
    assert counts in read(ROOT / "README.md")


def test_the_readme_is_short():
    assert len(read(ROOT / "README.md").splitlines()) <= 120


def test_every_command_has_a_help_of_full_sentences():
    for name in get_command(app).commands:
        said = CliRunner().invoke(app, [name, "--help"])
        assert said.exit_code == 0
    for name, command in get_command(app).commands.items():
        for parameter in command.params:
            assert str(getattr(parameter, "help", "")).rstrip()[-1:] in ".)", (
                f"{name} {parameter.name}: {parameter.help}"
            )


@pytest.mark.slow
def test_python_of_the_readme_runs_as_it_stands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```", read(ROOT / "README.md"), flags=re.MULTILINE | re.DOTALL)
    assert blocks
    names = {}
    for block in blocks:
        exec(block, names)
    assert (tmp_path / "figure.png").stat().st_size > 10_000
    result = names["result"]
    assert f"{result.clean_prob:.2f}, {result.corrupted_prob:.2f}" == "0.70, 0.01"
    mlp, attention = (result.strongest(stream, 1).iloc[0] for stream in ("mlp_activation", "attention_output"))
    assert (mlp.layer, mlp.token, round(mlp.indirect_effect, 2)) == (2, "iffel", 0.26)
    assert (attention.layer, attention.token) == (19, " of")
    assert attention.indirect_effect > result.total_effect


@pytest.mark.slow
def test_the_readmes_pair_prints_the_numbers_that_stand_below_it():
    text = read(ROOT / "README.md").partition("## A pair of prompts")[2]
    command = re.search(r"```sh\n(.*?)```", text, flags=re.DOTALL)[1].replace("\\\n", " ")
    done = CliRunner().invoke(app, shlex.split(command)[1:])
    assert done.exit_code == 0, done.output
    numbers = re.search(
        r"is (\S+) in\nthe first prompt and (\S+) in the second; .* block (\d+) .* makes it (\S+)\.\n", text
    )
    clean, corrupted, block, cell = map(float, numbers.groups())
    effects, cells = (done.stdout.partition(f"\n{part}")[2].splitlines() for part in ("effects", "cells that bring"))
    found = [float(line.split()[-1]) for line in effects[2:4]]
    assert found == pytest.approx([clean, corrupted], abs=0.02)
    best = next(line.split() for line in cells if "attention_output" in line)
    assert (float(best[1]), float(best[-2])) == (block, pytest.approx(cell, abs=0.02))


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda notebook: notebook.stem)
def test_a_notebook_is_kept_with_its_outputs_and_without_errors(notebook):
    cells = [cell for cell in json.loads(read(notebook))["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1)), "run it from top to bottom"
    assert not [output for cell in cells for output in cell["outputs"] if output["output_type"] == "error"]


@pytest.mark.slow
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda notebook: notebook.stem)
def test_a_notebook_gives_the_outputs_that_are_kept_in_it(notebook, tmp_path, monkeypatch):
    client = pytest.importorskip("nbclient", reason='the notebooks need pip install "fasttrace[docs]"')
    nbformat = pytest.importorskip("nbformat")
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{ROOT / 'kernels'}")
    kept, found = (nbformat.read(notebook, as_version=4) for _ in range(2))
    client.NotebookClient(
        found, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    for before, after in zip(kept.cells, found.cells, strict=True):
        if before.cell_type == "code":
            assert said(after) == Close(said(before)), before.source


class Close:
    """Equal to a text with the same words, and with numbers that differ by at most 2 % or 2e-4."""

    def __init__(self, text):
        self.text = text

    def __eq__(self, other):
        words, numbers = NUMBER.sub("#", self.text).split(), [float(number) for number in NUMBER.findall(self.text)]
        same = NUMBER.sub("#", other).split() == words
        return same and [float(number) for number in NUMBER.findall(other)] == pytest.approx(
            numbers, rel=0.02, abs=2e-4
        )

    def __repr__(self):
        return self.text


def said(cell):
    """What a cell prints and returns, as text without addresses of objects; figures count as there."""
    found = []
    for output in cell.outputs:
        if output.output_type == "stream" and output.name == "stdout":
            found.append(output.text)
        elif "data" in output:
            found.append(re.sub(r" at 0x[0-9a-f]+", "", output.data.get("text/plain", "")))
            found += sorted(kind for kind in output.data if kind.startswith("image/"))
    return "\n".join(found)


def test_examples_of_the_page_on_extending_give_what_it_says():
    failed, tried = doctest.testfile(str(ROOT / "docs" / "extending.md"), module_relative=False)
    assert (failed, tried > 10) == (0, True)
