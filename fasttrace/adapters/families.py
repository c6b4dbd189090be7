"""Names that families give to the parts of a block; a family with new names is one more word here.

What the names cannot say stands in `EXCEPTIONS`. Everything else is found by the rules in `rules.py`.
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

MLP = ("mlp", "feed_forward", "ffn", "block_sparse_moe", "moe", "ff", "fc2", "output")
"""Children of a block whose output is its MLP output. OPT-like blocks have no MLP module, only `fc2`."""

DOWN = ("down_proj", "c_proj", "fc2", "dense_4h_to_h", "w2", "fc_out", "output_linear", "wo", "linear_2")
"""Down projections inside an MLP; if none is there, the last linear module of the MLP."""

RESIDUAL_ARGUMENTS = frozenset({"residual", "input_tensor"})
"""A module whose forward has one of these adds the residual stream itself: its last linear module is taken."""

EXCEPTIONS: dict[str, dict[str, str]] = {}
"""By `config.model_type`: paths as in `Tracer(modules=...)`, for families that the rules get wrong."""
