"""pyvene (0.1.8): the loop of its causal tracing tutorial.

It installs with `pip install --no-deps pyvene==0.1.8`: of its requirements the loop needs only matplotlib beside what
fasttrace needs itself. It removes every forward hook from a model that it is given, before and after each call.
"""

from collections.abc import Sequence
from contextlib import redirect_stdout
from io import StringIO
from typing import Any

import torch
from torch import Tensor

from bench.cases import Cell, Workload
from bench.gate import draw_noise
from bench.others import MissingError, Peer


class Pyvene(Peer):
    """The loop of pyvene's tutorial: a new IntervenableModel per cell, one source run per restored block.

    Attributes:
        grouped: put all restored blocks into one group, which takes one source run; the tutorial does not.
    """

    def __init__(self, workload: Workload, grouped: bool = False) -> None:
        super().__init__(workload)
        self.pyvene, self.grouped = _import_pyvene(), grouped
        self.noise = _noise_intervention(self.pyvene, workload)
        # The tutorial works on the model without its head and multiplies by the embedding matrix itself.
        self.headless = workload.case.is_gpt2
        self.model = workload.model.get_submodule("transformer") if self.headless else workload.model
        rows = torch.tensor([workload.prompt] * workload.case.samples, device=workload.device)
        self.inputs = {"input_ids": rows}

    def probs(self, cells: Sequence[Cell]) -> list[float]:
        """The cells, one after the other."""
        return [self._prob(cell) for cell in cells]

    def _prob(self, cell: Cell) -> float:
        samples, blocks = self.workload.case.samples, self.workload.case.window(cell.stream, cell.layer)
        intervenable = self.pyvene.IntervenableModel(self._config(cell, blocks), self.model)
        restored = [[[cell.position]] * samples] * len(blocks)
        subject = [list(range(*self.workload.case.subject))] * samples
        n_sources = 1 if self.grouped else len(blocks)
        _, output = intervenable(
            self.inputs,
            [None] + [self.inputs] * n_sources,
            {"sources->base": ([None, *restored], [subject, *restored])},
        )
        return self._target_prob(output)

    def _config(self, cell: Cell, blocks: range) -> Any:
        stream, pyvene = self._component(cell.stream), self.pyvene
        groups = (0, 1) if self.grouped else (None, None)
        return pyvene.IntervenableConfig(
            representations=[
                pyvene.RepresentationConfig(0, "block_input", group_key=groups[0]),
                *(pyvene.RepresentationConfig(block, stream, group_key=groups[1]) for block in blocks),
            ],
            intervention_types=[self.noise] + [pyvene.VanillaIntervention] * len(blocks),
        )

    def _component(self, stream: str) -> str:
        """The name in pyvene, whose `mlp_activation` is another thing on gated MLPs; their output serves."""
        return "mlp_output" if stream == "mlp_activation" and not self.headless else stream

    def _target_prob(self, output: Any) -> float:
        if self.headless:
            distribution = self.pyvene.embed_to_distrib(self.model, output.last_hidden_state, logits=False)
        else:
            distribution = output.logits.softmax(-1)
        return distribution[:, -1, self.workload.target].mean().item()


def _import_pyvene() -> Any:
    try:
        with redirect_stdout(StringIO()):  # it prints about a backend that is not installed
            import pyvene
    except ImportError as missing:
        raise MissingError(f"{missing}; pip install --no-deps pyvene==0.1.8") from missing
    return pyvene


def _noise_intervention(pyvene: Any, workload: Workload) -> type:
    """The intervention that adds the case's noise, drawn whenever one is made, as in the tutorial."""

    class NoiseIntervention(pyvene.ConstantSourceIntervention, pyvene.LocalistRepresentationIntervention):
        def __init__(self, embed_dim: int, **_: Any) -> None:
            super().__init__()
            self.noise = torch.from_numpy(draw_noise(workload.case, int(embed_dim))).to(workload.device)

        def forward(self, base: Tensor, source: Any = None, subspaces: Any = None, **_: Any) -> Tensor:
            base += self.noise
            return base

    return NoiseIntervention
