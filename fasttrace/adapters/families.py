"""The table of families: where each keeps what the engines touch. A new family is one row here."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """Module paths of one family.

    Attributes:
        blocks: from the model to the list of blocks.
        attention, mlp: from a block to the module whose output joins the residual stream.
        down: from a block to the MLP's down projection; its input is `mlp_activation`.
    """

    blocks: str
    attention: str
    mlp: str
    down: str


LLAMA = Family(blocks="model.layers", attention="self_attn", mlp="mlp", down="mlp.down_proj")

FAMILIES = {
    "gpt2": Family(blocks="transformer.h", attention="attn", mlp="mlp", down="mlp.c_proj"),
    "llama": LLAMA,
}
"""By `config.model_type`."""
