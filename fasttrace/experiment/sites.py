"""Sites: the places of a block whose values a cell can replace, one row a site.

All that fasttrace knows of a site stands here: where its value is found in a model, when the model reaches it, how
grids, figures and ROME's files name it. Names are pyvene's.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

RESIDUAL, ATTENTION, MLP = range(3)
"""Stages of a block in the order in which a model reaches them: its input, its attention output, its MLP output."""

Part = Literal["blocks", "attention", "mlp", "down"]
"""Whose value a site is: a field of `models.rules.Parts`."""


@dataclass(frozen=True)
class Site:
    """One kind of place, the same in every block.

    Attributes:
        name: by which users, edits and files call it.
        part: of a block, whose value it is.
        side: which value of that part.
        stage: RESIDUAL, ATTENTION or MLP; two sites of one stage are one value as far as later computation goes.
        windowed: whether grids restore a window of blocks; in the residual stream a window equals its last block.
        short: in titles of figures; "" where the layer needs no name.
        color: matplotlib's name of its color map.
        rome: in the names of ROME's files; None: ROME has none for it.
    """

    name: str
    part: Part
    side: Literal["input", "output"]
    stage: int
    windowed: bool = True
    short: str = ""
    color: str = "Blues"
    rome: str | None = None

    @property
    def is_next_input(self) -> bool:
        """Whether it is the same value as the input of the next block."""
        return self.stage == RESIDUAL and self.side == "output"


_ROWS = (
    Site("block_input", "blocks", "input", RESIDUAL, windowed=False),
    Site("block_output", "blocks", "output", RESIDUAL, windowed=False, color="Purples", rome=""),
    Site("attention_output", "attention", "output", ATTENTION, short="attn", color="Reds", rome="attn"),
    Site("mlp_activation", "down", "input", MLP, short="mlp", color="Greens", rome="mlp"),
    Site("mlp_output", "mlp", "output", MLP, short="mlp", color="Greens", rome="mlp"),
)

SITE: Mapping[str, Site] = {site.name: site for site in _ROWS}
"""The table, by name."""

SITES: tuple[str, ...] = tuple(SITE)
"""Names of all sites."""


def short_name(stream: str) -> str:
    """What titles of figures call a stream."""
    return (stream in SITE and SITE[stream].short) or stream


def color_map(stream: str) -> str:
    """Matplotlib's name of a stream's color map."""
    return SITE[stream].color if stream in SITE else Site.color
