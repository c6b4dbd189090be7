"""Run by torchrun: traces a model whose matrix products the processes share, and saves the grids of each process.

`torchrun --standalone --nproc_per_node 2 -m tests.helpers.tensor_parallel FOLDER`, with a saved model in FOLDER.
"""

import os
import sys
from pathlib import Path

import numpy as np
import torch
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from fasttrace import ENGINES, Tracer

REQUEST = {"prompt": [5, 6, 7, 8], "subject": (1, 2), "samples": 1, "window": 3}


def main(folder: Path) -> None:
    """Traces with every engine."""
    torch.set_num_threads(1)
    shares = DistributedConfig(tp_size=int(os.environ["WORLD_SIZE"]))
    model = AutoModelForCausalLM.from_pretrained(folder, distributed_config=shares).eval()
    assert sum(isinstance(parameter, DTensor) for parameter in model.parameters()) > 7, "the weights are not shared out"
    grids = {}
    for engine in ("auto", *ENGINES):
        result = Tracer(model).trace(**REQUEST, engine=engine)
        assert engine != "auto" or result.metadata["engine"] == "wavefront", result.metadata["engine_reason"]
        grids |= {f"{engine} {stream}": result.grid(stream) for stream in result.streams}
    np.savez(folder / f"process_{os.environ['RANK']}.npz", **grids)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
