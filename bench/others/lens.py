"""TransformerLens (4.3): `get_act_patch_resid_pre`, `_mlp_out` and `_attn_out`, one forward pass per cell.

Its work is another one than the case's: single blocks, not windows; a subject of other tokens, not noise; and the
input of a block where the case has its output. fasttrace is asked for the very same: `block_input` in place of
`block_output`, window 1, and as noise the difference of the two subjects' embeddings.

A bridge switches the model that it is given to eager attention and is made from a deep copy. It installs beside
transformers 5: `pip install transformer-lens==4.3.0 -c constraints.txt`.
"""

from collections.abc import Callable, Sequence
from contextlib import redirect_stderr
from copy import deepcopy
from io import StringIO
from tempfile import TemporaryDirectory
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from transformers import AutoTokenizer

from bench.cases import STREAMS, Cell, Workload
from bench.jobs import Runner
from bench.others import MissingError, Peer
from bench.others.vocabulary import number_tokenizer
from fasttrace.experiment.corruption import Runs

SITES = {"block_output": "block_input"}
"""Where fasttrace restores for a stream of the case."""


class Lens(Peer):
    """A TransformerBridge on a copy of the model; its cache of the clean run is made before anything is timed."""

    work = "block inputs, window 1, replaced tokens"

    def __init__(self, workload: Workload) -> None:
        super().__init__(workload)
        self.patching, wrapper = _import_lens()
        self.bridge = _bridge(wrapper, workload)
        self.corrupted = with_other_subject(workload)
        with torch.no_grad():
            _, self.cache = self.bridge.run_with_cache(_clean(workload))

    @torch.no_grad()
    def probs(self, cells: Sequence[Cell]) -> list[float]:
        """The cells, stream by stream."""
        found: dict[Cell, float] = {}
        for stream in dict.fromkeys(cell.stream for cell in cells):
            wanted = [cell for cell in cells if cell.stream == stream]
            found |= zip(wanted, self._grid(stream, wanted), strict=True)
        return [found[cell] for cell in cells]

    def _grid(self, stream: str, cells: Sequence[Cell]) -> list[float]:
        patching = self.patching
        sweep = {
            "block_output": patching.get_act_patch_resid_pre,
            "mlp_activation": patching.get_act_patch_mlp_out,
            "attention_output": patching.get_act_patch_attn_out,
        }[stream]
        places = pd.DataFrame([(cell.layer, cell.position) for cell in cells], columns=["layer", "pos"])
        with redirect_stderr(StringIO()):  # progress bars
            found = sweep(self.bridge, self.corrupted, self.cache, self._prob, index_axis_names=None, index_df=places)
        return found.tolist()

    def _prob(self, logits: Tensor) -> Tensor:
        return logits[0, -1].float().softmax(-1)[self.workload.target]

    def same_work(self, engine: str) -> Callable[[], list[float]]:
        """Fasttrace's grids of the same sites, window and corruption."""
        return same_sweep(self.workload, engine)


def same_sweep(workload: Workload, engine: str) -> Callable[[], list[float]]:
    """Fasttrace on TransformerLens's work: all cells of a case, in its order."""
    runner = Runner(workload, engine)
    cells = runner.cells([SITES.get(stream, stream) for stream in STREAMS], window=1)
    job = runner.job(cells, _replacement(workload))
    return lambda: runner.run(job)[0].cells.mean(1).tolist()


@torch.no_grad()
def _replacement(workload: Workload) -> Runs:
    """The noise that turns the subject's embeddings into those of the other subject."""
    begin, end = workload.case.subject
    embedding = workload.model.get_input_embeddings()
    clean, corrupted = (embedding(ids).double().cpu() for ids in (_clean(workload), with_other_subject(workload)))
    noise = (corrupted - clean)[:, begin:end]
    return Runs((begin, end), noise)


def with_other_subject(workload: Workload) -> Tensor:
    """The prompt [1, token] with each token of the subject replaced by another."""
    vocabulary, prompt = workload.model.config.vocab_size, _clean(workload)
    subject = prompt[:, slice(*workload.case.subject)]
    subject.add_(vocabulary // 2).remainder_(vocabulary)
    return prompt


def _clean(workload: Workload) -> Tensor:
    return torch.tensor([workload.prompt], device=workload.device)


def _import_lens() -> tuple[Any, Any]:
    try:
        from transformer_lens import patching
        from transformer_lens.model_bridge import TransformerBridge
    except ImportError as missing:
        raise MissingError(f"{missing}; pip install transformer-lens==4.3.0 -c constraints.txt") from missing
    return patching, TransformerBridge


def _bridge(wrapper: Any, workload: Workload) -> Any:
    model: Any = deepcopy(workload.model)
    with TemporaryDirectory() as folder:
        number_tokenizer(model.config.vocab_size).save_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        place = {"device": str(workload.device), "dtype": workload.case.dtype}
        return wrapper.boot_transformers(folder, hf_model=model, tokenizer=tokenizer, **place)
