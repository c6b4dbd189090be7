"""The order of the rooms: who may import whom, written down once."""

import ast
import re
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "fasttrace"
ORDER = (
    "errors",
    "checks",
    "memories",
    "files",
    "prompts",
    "experiment",
    "planning",
    "models",
    "fusing",
    "engines",
    "facts",
    "results",
    "study",
    "runs",
    "api",
    "reports",
    "cli",
    "__main__",
)
"""Lowest first: a module imports from its own room and from those before it."""

MODULES = {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in PACKAGE.rglob("*.py")}


def names_of(node):
    """Modules of fasttrace that an import statement names."""
    if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "fasttrace":
        inside = node.module.partition(".")[2]
        for alias in node.names:
            longer = f"{inside}.{alias.name}".lstrip(".")
            yield next(
                (name for name in (longer, f"{longer}.__init__", inside) if name in MODULES), f"{inside}.__init__"
            )


def imports_of(module, everywhere):
    """What a module imports when it is loaded, or also what its functions do; imports for types alone are left out."""
    body = list(ast.parse(MODULES[module].read_text()).body)
    found = set()
    while body:
        node = body.pop()
        found.update(names_of(node))
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if everywhere or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            body.extend(ast.iter_child_nodes(node))
    return found


def room_of(module):
    return module.split(".")[0]


@pytest.mark.parametrize("module", sorted(set(MODULES) - {"__init__"}))
def test_a_module_imports_from_its_room_and_those_below(module):
    own = ORDER.index(room_of(module))
    above = {name for name in imports_of(module, everywhere=True) - {".__init__"} if ORDER.index(room_of(name)) > own}
    assert not above, f"{module} imports {', '.join(sorted(above))}, which is above it: see ORDER in this file"


def test_modules_do_not_import_each_other_in_a_circle():
    try:
        TopologicalSorter({module: imports_of(module, everywhere=False) for module in MODULES}).prepare()
    except CycleError as circle:
        pytest.fail(" -> ".join(circle.args[1]))


def test_no_test_module_imports_another():
    """What two of them need lies in tests/helpers or a conftest."""
    tests = {path: path.read_text() for path in Path(__file__).parent.rglob("test_*.py")}
    assert not [
        str(path) for path, text in tests.items() if re.search(r"^\s*(from|import) tests\S*\.test_", text, re.M)
    ]


def test_the_map_for_contributors_has_the_rooms_in_this_order():
    page = (PACKAGE.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rows = [line.split("|")[1] for line in page.splitlines() if line.startswith("| `")]
    names = [name.strip(" `").rstrip("/").removesuffix(".py") for row in rows for name in row.split(",")]
    assert [name for name in names if name in ORDER] == list(ORDER[:-1])
