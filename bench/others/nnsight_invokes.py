"""nnsight (0.8): many invokes in one trace, which it runs as one batch; one trace before it for the clean values.

It wraps a deep copy, so that what it leaves on a model does not slow the others. It installs beside transformers 5:
`pip install nnsight==0.8.1 -c constraints.txt`.
"""

from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

from bench.cases import Cell, Workload
from bench.gate import draw_noise
from bench.others import MissingError, Peer
from bench.others.vocabulary import number_tokenizer

INVOKES = 84
"""Cells of one trace: a whole stream of the tutorial's grid on 12 blocks."""


class Invokes(Peer):
    """An invoke per cell."""

    cell_by_cell = False

    def __init__(self, workload: Workload) -> None:
        super().__init__(workload)
        self.nnsight, wrapper = _import_nnsight()
        case = workload.case
        tokenizer = number_tokenizer(workload.model.config.vocab_size)
        self.model = wrapper(deepcopy(workload.model), tokenizer=tokenizer, task="text-generation")
        self.blocks = self.model.transformer.h if case.is_gpt2 else self.model.model.layers
        self.embedding = self.model.transformer.wte if case.is_gpt2 else self.model.model.embed_tokens
        self.rows = torch.tensor([workload.prompt] * case.samples, device=workload.device)
        noise = torch.from_numpy(draw_noise(case, workload.model.config.hidden_size))
        self.noise = noise.to(workload.device)

    @torch.no_grad()
    def probs(self, cells: Sequence[Cell]) -> list[float]:
        """The cells, INVOKES at a time."""
        clean = self._clean_values(sorted({(cell.stream, block) for cell in cells for block in self._window(cell)}))
        found: list[Tensor] = []
        for begin in range(0, len(cells), INVOKES):
            found += self._batch(cells[begin : begin + INVOKES], clean)
        return torch.stack(found).tolist()

    def _clean_values(self, places: Sequence[tuple[str, int]]) -> dict[tuple[str, int], Tensor]:
        """What each module gives in the clean run, [1, position, d_model]."""
        in_order = sorted(places, key=lambda place: (place[1], place[0] == "block_output", place[0]))
        with self.model.trace(self.rows[:1]):
            values = self.nnsight.save({place: _first(self._module(*place).output).clone() for place in in_order})
        return values

    def _batch(self, cells: Sequence[Cell], clean: dict[tuple[str, int], Tensor]) -> list[Tensor]:
        begin, end = self.workload.case.subject
        with self.model.trace() as tracer:
            found = self.nnsight.save([])
            for cell in cells:
                with tracer.invoke(self.rows):
                    subject = self.embedding.output[:, begin:end]
                    subject.copy_(subject.double() + self.noise)
                    for block in self._window(cell):
                        output = _first(self._module(cell.stream, block).output)
                        output[:, cell.position] = clean[cell.stream, block][:, cell.position]
                    logits = self.model.lm_head.output[:, -1].float()
                    found.append(logits.softmax(-1)[:, self.workload.target].mean())
        return found

    def _window(self, cell: Cell) -> range:
        return self.workload.case.window(cell.stream, cell.layer)

    def _module(self, stream: str, number: int) -> Any:
        block = self.blocks[number]
        attention = block.attn if self.workload.case.is_gpt2 else block.self_attn
        return {"block_output": block, "mlp_activation": block.mlp, "attention_output": attention}[stream]


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def _import_nnsight() -> tuple[Any, Any]:
    try:
        import nnsight
        from nnsight.modeling.transformers import TransformersModel
    except ImportError as missing:
        raise MissingError(f"{missing}; pip install nnsight==0.8.1 -c constraints.txt") from missing
    return nnsight, TransformersModel
