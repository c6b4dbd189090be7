"""Names that families give to the parts of a block; a family with new names is one more word here.

What the names cannot say is found by the rules in `rules.py`, or by the self-check. `NOT_PACKED` holds the rest.
"""

ATTENTION = (
    "self_attn",
    "attn",
    "attention",
    "self_attention",
    "linear_attn",
    "mixer",
    "temporal_block",
    "mamba",
    "conv",
)
"""Children of a block whose output is its attention output, first match first; recurrent mixers stand in."""

MLP = ("mlp", "mlp_block", "feed_forward", "ffn", "block_sparse_moe", "moe", "ff", "fc2", "output")
"""Children of a block whose output is its MLP output. OPT-like blocks have no MLP module, only `fc2`."""

DOWN = ("down_proj", "c_proj", "fc2", "dense_4h_to_h", "w2", "fc_out", "output_linear", "wo", "linear_2")
"""Down projections inside an MLP; if none is there, the last linear module of the MLP."""

RESIDUAL_ARGUMENTS = frozenset({"residual", "input_tensor"})
"""A module whose forward has one of these adds the residual stream itself: its last linear module is taken."""

EXPERTS = frozenset({"experts", "expert", "router", "gate"})
"""Modules of a mixture of experts, which has several down projections."""

NOT_PACKED = {
    "llama4_text": "its attention scales queries by their place in the pack beyond 8191 tokens",
    "minimax_m3_vl_text": "its attention picks keys by blocks of the pack",
}
"""By `model_type` of the language model: what makes a large pack wrong although the self-check's small one is right."""
