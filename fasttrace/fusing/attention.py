"""Ragged attention in one launch per block, where the kernel can do what the model asks; else `attention_ragged` does.

The model says what it wants through the arguments of transformers' attention interface and through its mask. A mask
that is causal, or causal within a window, is read off on the host before it is needed on the device, so that nothing
waits. A kernel that fails, before a trace or in the middle of one, is left out for the model's heads of that size:
their blocks attend group by group.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from fasttrace_kernels.layout import AttentionLayout
from fasttrace_kernels.suffix_attention import suffix_attention, tile_tokens
from torch import Tensor, nn

from fasttrace.errors import FasttraceError
from fasttrace.fusing.measure import Case, case_of, leave_out
from fasttrace.memories import by_module
from fasttrace.models.anatomy import Anatomy
from fasttrace.planning.on_device import sent
from fasttrace.planning.packs import Pack, kept
from fasttrace.planning.plan import BlockPlan

UNDERSTOOD = frozenset({"scaling", "softcap", "s_aux", "dropout", "sliding_window", "is_causal", "position_ids"})
"""Arguments that the kernel does, or that say again what the mask says."""

_TILES = by_module()
"""Tokens of a tile that a model's blocks asked for: set[int]."""
_FAILED = by_module()
"""Heads of a model on which the kernel has failed: set[Case]."""

Visible = dict[int, tuple[Tensor, int | None]]
"""id of a mask -> the mask, so that it lives on, and its window (0: neither causal nor a window; None: no window)."""


@dataclass
class KernelState:
    """What one forward pass knows beside `PackState`.

    Attributes:
        n_positions: tokens of the longest prompt.
        blocks: the plan's.
        number: the block being computed; the engine sets it.
        layouts: by (block, tokens of a tile), for all passes of the pack.
        masks: the model's.
        tiles: tokens of a tile that the model's blocks asked for, in any pass; made beforehand in the next one.
        failed: heads of the model on which the kernel has failed, in any pass.
        attended: blocks of this pass that it did, and that it did not.
    """

    n_positions: int
    blocks: tuple[BlockPlan, ...]
    number: int = 0
    layouts: dict[tuple, AttentionLayout] = field(default_factory=dict)
    masks: Visible = field(default_factory=dict)
    tiles: set[int] = field(default_factory=set)
    failed: set[Case] = field(default_factory=set)
    attended: dict[bool, int] = field(default_factory=lambda: {True: 0, False: 0})

    @classmethod
    def of(cls, anatomy: Anatomy, pack: Pack) -> "KernelState":
        """For one pass of a model, with the layouts that its last pass needed; new ones in one copy to the device."""
        tiles = _TILES.setdefault(anatomy.model, set())
        layouts = _layouts(pack, anatomy.device)
        state = cls(pack.width, pack.blocks, tiles=tiles, layouts=layouts, failed=failed_heads(anatomy.model))
        born = sorted({*map(state._born, range(len(pack.blocks)))})
        missing = [(number, tile) for tile in tuple(tiles) for number in born if (number, tile) not in state.layouts]
        layouts = [layout_of(pack.blocks[number], tile) for number, tile in missing]
        state.layouts.update(zip(missing, _all_sent(layouts, anatomy.device), strict=True))
        return state

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, arguments: dict[str, Any]
    ) -> Tensor | None:
        """[1, token, head, d_value], or None where the model asks for more than the kernel does, or where it fails.

        Args:
            module: the attention module.
            query: [1, head, token, d_head].
            key: [1, kv_head, token, d_head].
            value: [1, kv_head, token, d_value].
            mask: the model's, for one prompt.
            arguments: the other ones of the attention interface.
        """
        attended = self._attended(module, query, key, value, mask, arguments)
        self.attended[attended is not None] += 1
        return attended

    @property
    def by(self) -> str:
        """What has attended in this pass, for results."""
        return " and ".join(what for what, did in (("kernel", True), ("groups", False)) if self.attended[did])

    def _attended(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, arguments: dict[str, Any]
    ) -> Tensor | None:
        given = {name for name, argument in arguments.items() if argument is not None and argument is not False}
        _, window = self.masks.get(id(mask), (mask, 0))
        if window == 0 or not given <= UNDERSTOOD:
            return None
        sinks = arguments.get("s_aux")
        if getattr(module, "sinks", None) is not sinks or (query.dtype == torch.float64 and query.is_cuda):
            return None
        q, k, v = (states[0].transpose(0, 1) for states in (query, key, value))
        case = case_of("attention", (q.shape[1], k.shape[1], q.shape[2], v.shape[2]), q.dtype, q.device)
        if case in self.failed:
            return None
        try:
            attended = suffix_attention(
                q,
                k,
                v,
                self._layout(q, k, v),
                scale=arguments.get("scaling"),
                window=window,
                softcap=arguments.get("softcap") or 0.0,
                sinks=None if sinks is None else sinks.float(),
            )
        except FasttraceError:  # of the check in float32
            raise
        except Exception as error:  # what compiles kernels raises anything
            leave_out(case, error, "attention goes group by group")
            self.failed.add(case)
            return None
        return attended.unsqueeze(0)

    def _layout(self, q: Tensor, k: Tensor, v: Tensor) -> AttentionLayout:
        tile = tile_tokens(q.dtype, max(k.shape[-1], v.shape[-1]), q.shape[1] // k.shape[1], self.n_positions)
        key = self._born(self.number), tile
        if key not in self.layouts:
            self.layouts[key] = layout_of(self.blocks[key[0]], tile).to(q.device)
            self.tiles.add(tile)
        layout = self.layouts[key]
        return layout if layout.tiles.device == q.device else layout.to(q.device)

    def _born(self, number: int) -> int:
        """The last block up to this one in which rows were born: since then the pack is laid out as before."""
        while number > 0 and self.blocks[number].source is None:
            number -= 1
        return number

    def watched(self, build: Callable[..., Tensor | None]) -> Callable[..., Tensor | None]:
        """A mask builder that also notes what its masks let a query see."""

        def built(*args: Any, **kwargs: Any) -> Tensor | None:
            mask = build(*args, **kwargs)
            if mask is not None:
                on_host = mask if mask.device.type == "cpu" else build(*args, **(kwargs | {"device": "cpu"}))
                self.masks[id(mask)] = mask, window_of_mask(on_host)
            return mask

        return built


def failed_heads(model: nn.Module) -> set[Case]:
    """Heads of a model on which the kernel has failed in this process."""
    return _FAILED.setdefault(model, set())


@kept
def _layouts(_pack: Pack, _device: torch.device) -> dict[tuple, AttentionLayout]:
    """What passes of one pack on one device share."""
    return {}


def _all_sent(layouts: Sequence[AttentionLayout], device: torch.device) -> list[AttentionLayout]:
    """Layouts on a device, in one copy; the tiles first, which stay aligned."""
    tables = [*(layout.tiles for layout in layouts), *(layout.tokens for layout in layouts)]
    if not tables:
        return []
    parts = sent(torch.cat([table.flatten() for table in tables]), device).split([table.numel() for table in tables])
    moved = [part.view(table.shape) for part, table in zip(parts, tables, strict=True)]
    pairs = zip(layouts, moved[: len(layouts)], moved[len(layouts) :], strict=True)
    return [replace(layout, tiles=tiles, tokens=tokens) for layout, tiles, tokens in pairs]


def layout_of(block: BlockPlan, tile: int) -> AttentionLayout:
    """The rows of one block's pack, as the kernel wants them."""
    columns = []
    base_rows_at = {group.n_positions: group.start for group in block.groups if group.has_base_rows}
    for group in block.groups:
        length, base = group.stop - group.first, np.repeat(group.base, group.tile_rows)
        start = group.start + np.arange(len(base)) * length
        base_start = base_rows_at[group.n_positions] + base * group.n_positions
        columns.append((start, np.full_like(start, length), np.full_like(start, group.first), base_start))
    return AttentionLayout.build(*map(np.concatenate, zip(*columns, strict=True)), block=tile)


def window_of_mask(mask: Tensor | None) -> int | None:
    """How many tokens a query sees: None for all before it, 0 for a mask that is not such a band.

    Args:
        mask: [batch, 1, position, position] on the host; True or 0 where a key is seen.
    """
    if mask is None or mask.dim() != 4 or mask.shape[1] != 1 or mask.shape[2] != mask.shape[3]:
        return 0
    seen = mask[0, 0] if mask.dtype == torch.bool else mask[0, 0] == 0
    n_positions = len(seen)
    window = int(seen[-1].sum())
    ones = torch.ones(n_positions, n_positions, dtype=torch.bool, device="cpu")
    band = ones.tril() & ones.triu(1 - window)
    if not torch.equal(seen, band):
        return 0
    return None if window == n_positions else window
