"""Models of every family, the engine that each should get, and what breaks an engine on them."""

from dataclasses import replace

import pytest
import torch

from fasttrace.engines import attention_forked as fork
from fasttrace.engines import attention_ragged as attention
from fasttrace.engines import readout, wavefront
from tests.helpers import zoo

OWN_ATTENTION = {"bloom", "falcon", "mpt", "xglm", *(name for name in zoo.VARIANTS if name.startswith("falcon"))}
RECURRENT = ("mamba",)
IN_EARLY_5 = zoo.INSTALLED < (5, 17)
if IN_EARLY_5:
    OWN_ATTENTION.add("nemotron")


def family_model(name, dtype=torch.float32):
    model_type, settings = zoo.VARIANTS.get(name, (name, {}))
    return zoo.tiny_model(model_type, dtype, **settings)


def best_engine(name):
    """What "auto" should find."""
    return "rows" if name in RECURRENT else "fork" if name in OWN_ATTENTION else "wavefront"


def prefix_of_the_clean_row(patch, module=attention):
    right = module.after_prefix

    def wrong(base, own, group):
        return right(base[:1].expand_as(base), own, group)

    patch.setattr(module, "after_prefix", wrong)


def prefix_of_the_clean_row_in_fork(patch):
    prefix_of_the_clean_row(patch, fork)


def no_sliding_window(patch):
    right = attention.PackState.tile_mask

    def wrong(state, mask, group):
        return right(state, torch.ones_like(mask, dtype=torch.bool).tril(), group)

    patch.setattr(attention.PackState, "tile_mask", wrong)


def no_mask(patch):
    right = attention.PackState.tile_mask
    patch.setattr(attention.PackState, "tile_mask", lambda *arguments: torch.ones_like(right(*arguments)))


def without(argument):
    """Attention arithmetic that is not told one thing."""

    def mutate(patch):
        right = attention._arithmetic

        def arithmetic(module, implementation):
            function = right(module, implementation)
            return lambda *args, **kwargs: function(*args, **{k: v for k, v in kwargs.items() if k != argument})

        patch.setattr(attention, "_arithmetic", arithmetic)

    return mutate


def no_sinks(patch):
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    patch.setattr(attention, "_arithmetic", lambda *_: sdpa_attention_forward)


def wrong_tables(**changes):
    def mutate(patch):
        right = wavefront.tables_of

        def wrong(*arguments):
            given = right(*arguments)
            blocks = [replace(b, **{name: change(b) for name, change in changes.items()}) for b in given.blocks]
            return replace(given, blocks=blocks)

        patch.setattr(wavefront, "tables_of", wrong)

    return mutate


def earlier(position):
    """Positions of restored rows, one less: the base rows' are right, so that nothing but their relation is wrong."""
    n_base = 3 * (int(position.max()) + 1)
    return torch.cat((position[:n_base], position[n_base:] - 1))


def bare_head(patch):
    """Final norm and head without what the model's forward does after them."""

    def logits(anatomy, states, _):
        model = anatomy.model
        return model.lm_head(model.model.norm(states))

    patch.setattr(readout, "_logits", logits)


MUTATIONS = {
    "prefix keys and values of the clean row": ("llama", prefix_of_the_clean_row),
    "the same in fork": ("bloom", prefix_of_the_clean_row_in_fork),
    "mask dropped": ("llama", no_mask),
    "sliding window dropped": ("mistral", no_sliding_window),
    "sliding window dropped where every other block has one": ("cohere2", no_sliding_window),
    "scores without soft cap": ("gemma2", without("softcap")),
    "scores scaled by the usual factor": ("granite", without("scaling")),
    "sinks dropped": ("gpt_oss", no_sinks),
    "rotary angles of the position before": ("llama", wrong_tables(position=lambda t: earlier(t.position))),
    "position ids of the position before": ("gptj", wrong_tables(position=lambda t: earlier(t.position))),
    "per-layer inputs of the clean row": ("gemma3n_text", wrong_tables(origin=lambda tables: tables.origin % 7)),
    "shared keys and values of restored tokens": ("gemma3n_text", wrong_tables(carried=lambda tables: tables.source)),
    "MLP outputs in the wrong place": (
        "llama",
        wrong_tables(mlp_computed=lambda t: t.mlp_computed and (t.mlp_computed[0], t.mlp_computed[1].roll(1))),
    ),
    "head without its soft cap": ("gemma2", bare_head),
    "head without its scale": ("cohere", bare_head),
    "head without its divisor": ("granite", bare_head),
}


def skip_if_capless(mutation):
    """transformers 5.17 runs Gemma 2 by sdpa, which lets its soft cap go by."""
    if "scores without soft cap" in mutation and family_model("gemma2").config._attn_implementation == "sdpa":
        pytest.skip("this transformers computes the model without a soft cap")
