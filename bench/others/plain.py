"""Hooks on the model and nothing else: one cell per pass, and many cells in one batch of full rows."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import cached_property, partial

import torch
from torch import Tensor, nn

from bench.cases import Cell
from bench.gate import Plain, draw_noise, editing, restored_modules
from bench.others import Peer

ROWS_PER_PASS = {"cpu": 64, "cuda": 1024}


class OneCellPerPass(Peer):
    """A forward pass per cell, of the clean row and the corrupted ones, as ROME's script does it."""

    def probs(self, cells: Sequence[Cell]) -> list[float]:
        """The cells, one after the other."""
        plain = Plain(self.workload)
        return [plain.cell(cell) for cell in cells]


class FullRows(Peer):
    """Many cells in one batch of full rows: one indexed write per module, the head at the last token only."""

    cell_by_cell = False

    def probs(self, cells: Sequence[Cell]) -> list[float]:
        """The cells, `ROWS_PER_PASS` rows at a time."""
        size = max(1, ROWS_PER_PASS[self.workload.device.type] // self.workload.case.samples)
        chunks = (cells[start : start + size] for start in range(0, len(cells), size))
        return [prob for chunk in chunks for prob in self._batch(chunk)]

    @torch.no_grad()
    def _batch(self, cells: Sequence[Cell]) -> list[float]:
        """Row 0 is clean; the samples of cell i are rows 1 + i * samples onwards."""
        model, samples = self.workload.model, self.workload.case.samples
        prompt = torch.tensor([self.workload.prompt], device=self.workload.device)
        rows = prompt.expand(1 + len(cells) * samples, -1)
        with ExitStack() as hooks:
            hooks.enter_context(editing(model.get_input_embeddings(), self._corrupt))
            for module, index in self._writes(cells):
                hooks.enter_context(editing(module, partial(_write_clean, index=index)))
            logits = model(rows, use_cache=False, logits_to_keep=1).logits[1:, -1]
        probs = logits.float().softmax(-1)[:, self.workload.target]
        return probs.view(-1, samples).mean(1).tolist()

    def _corrupt(self, embedded: Tensor) -> Tensor:
        begin, end = self.workload.case.subject
        subject = embedded[1:, begin:end].unflatten(0, (-1, self.workload.case.samples))
        subject.copy_((subject.double() + self._noise).to(embedded.dtype))
        return embedded

    @cached_property
    def _noise(self) -> Tensor:
        noise = torch.from_numpy(draw_noise(self.workload.case, self.workload.model.config.hidden_size))
        return noise.to(self.workload.device)

    def _writes(self, cells: Sequence[Cell]) -> Iterator[tuple[nn.Module, tuple[Tensor, Tensor]]]:
        """Each restored module with the (row, position) pairs written to in its output."""
        samples, device = self.workload.case.samples, self.workload.device
        written: dict[nn.Module, list[tuple[int, int]]] = {}
        for number, cell in enumerate(cells):
            rows = range(1 + number * samples, 1 + (number + 1) * samples)
            for module in restored_modules(self.workload, cell):
                written.setdefault(module, []).extend((row, cell.position) for row in rows)
        for module, pairs in written.items():
            rows, positions = torch.tensor(pairs, device=device).unbind(1)
            yield module, (rows, positions)


def _write_clean(hidden: Tensor, index: tuple[Tensor, Tensor]) -> Tensor:
    """Overwrites a module's fresh output."""
    rows, positions = index
    hidden[rows, positions] = hidden[0, positions]
    return hidden
