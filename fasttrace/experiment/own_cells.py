"""A user's own cells: any edits under any coordinates, checked as they are read.

Nothing here imports torch.
"""

from collections.abc import Mapping
from typing import Any

from fasttrace.checks import items, shown, whole_number
from fasttrace.errors import PlanError
from fasttrace.experiment.cells import CORRUPTED, RUNS, Cell, Edit, EditsIn, Vector
from fasttrace.experiment.metrics import METRICS
from fasttrace.experiment.sites import SITES

__all__ = ["EDITS", "own_cells"]

EDITS, BACKGROUND = "edits", "background"
"""Under which a cell with coordinates of its own has its edits, and the run in which they are made."""

EXPECTED = (
    'a list of cells, each an edit (site, layer, position), a list of edits, or a mapping with "edits" and coordinates'
)


def own_cells(cells: Any, n_layers: int, n_positions: int) -> tuple[list[dict[str, Any]], tuple[Cell, ...]]:
    """The coordinates of cells, and the cells.

    Args:
        cells: each an `Edit`, or a tuple (site, layer, position) with a source behind it if that is not "clean"; or a
            list of these; or a mapping with these under "edits" and coordinates under other names. Without coordinates
            they are the first edit's site, layer and position. The coordinate "background" says in which run the edits
            are made: "corrupted" (the default: what is sufficient) or "clean" (what is necessary).
        n_layers: of the model.
        n_positions: of the prompt; negative positions count from its end.

    Raises:
        PlanError: no cells, one that is none, an edit outside the model or the prompt, or a cell that writes one place
            twice; it names the cell.
    """
    given = items("cells", cells, EXPECTED)
    if not given:
        raise PlanError(f"cells is empty: give {EXPECTED}")
    coordinates, found = [], []
    for number, cell in enumerate(given):
        name = f"cells[{number}]"
        own, edits = _parts(name, cell)
        background = _word(name, BACKGROUND, own.get(BACKGROUND, CORRUPTED), RUNS)
        read = tuple(_edit(f"{name}, edit {place},", each, n_layers, n_positions) for place, each in enumerate(edits))
        _check_once(name, read)
        first = {"site": read[0].site, "layer": read[0].layer, "position": read[0].position} if read else {}
        coordinates.append(own or first)
        found.append(read if background == CORRUPTED else EditsIn(background, read))
    return coordinates, tuple(found)


def _parts(name: str, cell: Any) -> tuple[dict[str, Any], list[Any]]:
    if isinstance(cell, Mapping):
        if EDITS not in cell:
            raise PlanError(f"{name} is {shown(cell)}: it has no {EDITS!r}; expected {EXPECTED}")
        own = {key: value for key, value in cell.items() if key != EDITS}
        for key in own:
            if not isinstance(key, str) or key in METRICS or key.removesuffix("_effect") in METRICS:
                raise PlanError(f"{name} has a coordinate named {shown(key)}: give another name, a text")
        return own, _edits(name, cell[EDITS])
    return {}, _edits(name, cell)


def _edits(name: str, edits: Any) -> list[Any]:
    if isinstance(edits, Edit):
        return [edits]
    found = items(name, edits, EXPECTED)
    return [found] if found and isinstance(found[0], str) else found


def _edit(name: str, edit: Any, n_layers: int, n_positions: int) -> Edit:
    values = list(edit) if isinstance(edit, Edit) else items(name, edit, "an edit such as ('mlp_output', 5, 3)")
    if not 3 <= len(values) <= 4:
        raise PlanError(f"{name} is {shown(edit)}: expected an edit such as ('mlp_output', 5, 3), or with a source")
    site, layer, position, source = [*values, "clean"][:4]
    source = source if isinstance(source, Vector) else _word(name, "source", source, RUNS)
    site = _word(name, "site", site, SITES)
    layer = whole_number(f"{name} layer", layer, 0, n_layers - 1)
    position = whole_number(f"{name} position", position, -n_positions, n_positions - 1)
    return Edit(site, layer, position % n_positions, source)


def _word(name: str, what: str, word: Any, known: tuple[str, ...]) -> str:
    if not isinstance(word, str) or word not in known:
        raise PlanError(f"{name} has the unknown {what} {shown(word)}; choose from {', '.join(known)}")
    return str.__str__(word)


def _check_once(name: str, edits: tuple[Edit, ...]) -> None:
    places = [edit[:3] for edit in edits]
    twice = next((place for number, place in enumerate(places) if place in places[:number]), None)
    if twice is not None:
        raise PlanError(f"{name} writes {twice} twice: keep one of the edits")
