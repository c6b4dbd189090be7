"""A tiny random model of every causal-LM type of the installed transformers; nothing is downloaded.

One rule builds them all: an attribute that a configuration has and `TINY` knows gets a small value. `SETTINGS` holds
what that rule cannot know.
"""

import dataclasses
import inspect
import re
from typing import Any
from unittest import SkipTest

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

INSTALLED = tuple(map(int, transformers.__version__.split(".")[:2]))
"""transformers' version."""

NEWEST = (5, 23)
"""The transformers that has every type named here and in the tests."""

WRONG_BEFORE = {
    "gemma3n_text": (5, 17),  # without a cache it computed another function
    **dict.fromkeys(["cohere_compass_text", "musicgen", "musicgen_melody"], (5, 23)),  # no tiny one can be made
}
"""Types that are left out where transformers is older than this."""

VOCABULARY = 67
N_LAYERS = 4
WINDOW = 3
"""Of sliding attention: shorter than the prompts of the tests."""

ALL = tuple(sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
"""Every type; `UNBUILT` has those that no tiny model stands for, `UNTRACEABLE` those that tracing does not fit."""

_LISTED = """
gpt2 gpt_neo gptj gpt_neox opt bloom falcon mpt xglm biogpt llama mistral mixtral qwen2 qwen3 qwen3_moe
gemma gemma2 gemma3_text gemma3n_text phi phi3 olmo2 olmo3 starcoder2 stablelm cohere cohere2 granite smollm3
glm4 gpt_oss deepseek_v3 nemotron mamba
"""

LISTED = tuple(_LISTED.split())
"""The families that must run."""

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "falcon-rope": ("falcon", {"multi_query": False, "num_kv_heads": 4, "bias": True}),
    "falcon-alibi": ("falcon", {"alibi": True}),
    "falcon-new-decoder": ("falcon", {"new_decoder_architecture": True}),
    "falcon-sequential": ("falcon", {"parallel_attn": False}),
    "gpt2-inverse-layer": ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
    "gpt2-tied": ("gpt2", {"tie_word_embeddings": True}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "gpt_neox-sequential": ("gpt_neox", {"use_parallel_residual": False}),
    "opt-post-norm": ("opt", {"do_layer_norm_before": False, "word_embed_proj_dim": 16}),
    "stablelm-parallel": ("stablelm", {"use_parallel_residual": True, "qk_layernorm": True}),
    "gemma4_text-unshared": ("gemma4_text", {"num_kv_shared_layers": 0}),
    "gemma4_text-wide": ("gemma4_text", {"use_double_wide_mlp": True}),
    "gemma4_text-experts": ("gemma4_text", {"enable_moe_block": True}),
    "gemma4_text-keys-as-values": ("gemma4_text", {"attention_k_eq_v": True, "num_global_key_value_heads": 1}),
    "gemma3n_text-unshared": ("gemma3n_text", {"num_kv_shared_layers": 0}),
    **{name: (name, {}) for name in ("codegen", "gpt_bigcode", "qwen2_moe", "gemma4_text", "deepseek_v2")},
}
"""Name -> type and settings of variants that take other paths through a family's code."""

UNBUILT: dict[str, str] = {
    "gemma3n": "its vision tower needs the package timm",
    "gemma4_assistant": "drafts for another model: reads that model's hidden states and keys, no token ids",
    "gemma4_unified_assistant": "drafts for another model: reads that model's hidden states and keys, no token ids",
}
"""Types without a tiny model, and why."""

UNTRACEABLE: dict[str, str] = {
    "cpmant": "not causal: the tokens of a prompt see each other both ways",
    "prophetnet": "not causal: its relative position biases mix positions",
    "musicgen": "tokens of sound: one embedding module per codebook, none for all",
    "musicgen_melody": "tokens of sound: one embedding module per codebook, none for all",
}
"""Types that have a tiny model, and why causal tracing does not fit them."""

TINY: tuple[tuple[Any, str], ...] = (
    (N_LAYERS, "num_hidden_layers n_layer n_layers num_layers decoder_layers num_decoder_layers"),
    (N_LAYERS, "num_blocks encoder_layers num_encoder_layers"),
    (32, "hidden_size n_embd d_model emb_dim embedding_dim embedding_size word_embed_proj_dim"),
    (32, "max_position_embeddings n_positions n_ctx max_seq_len model_max_length max_target_positions context_length"),
    (4, "num_attention_heads n_head n_heads num_heads attention_heads decoder_attention_heads encoder_attention_heads"),
    (4, "num_decoder_attention_heads num_encoder_attention_heads linear_num_value_heads linear_num_heads"),
    (4, "num_experts n_routed_experts num_local_experts moe_num_experts"),
    (4, "qk_rope_head_dim rotary_dim index_n_heads index_topk mamba_d_conv conv_kernel"),
    (4, "mamba_chunk_size chunk_size block_size attention_chunk_size keep_window_size"),
    (2, "num_key_value_heads num_kv_heads linear_num_key_heads num_kv_shared_layers"),
    (2, "num_experts_per_tok num_experts_per_token moe_topk moe_k moe_top_k top_k_experts n_group max_window_layers"),
    (1, "topk_group n_shared_experts num_shared_experts moe_num_shared_experts"),
    (1, "first_k_dense_replace num_dense_layers"),
    (8, "head_dim qk_nope_head_dim v_head_dim linear_key_head_dim linear_value_head_dim linear_head_dim kv_channels"),
    (8, "index_head_dim mamba_d_state ssm_state_size state_size hidden_size_per_layer_input query_pre_attn_scalar"),
    (8, "mamba_n_heads mamba_num_heads mamba_head_dim mamba_d_head"),
    (16, "q_lora_rank kv_lora_rank laurel_rank"),
    (48, "intermediate_size n_inner ffn_dim decoder_ffn_dim encoder_ffn_dim dff dim_ff ffn_hidden_size d_inner"),
    (24, "moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size"),
    (WINDOW, "sliding_window sliding_window_size window_size attention_window_size"),
    (VOCABULARY, "vocab_size vocab_size_per_layer_input"),
    (0, "pad_token_id"),
    (65, "bos_token_id decoder_start_token_id"),
    (66, "eos_token_id forced_eos_token_id"),
    (3.0, "attn_logit_softcapping final_logit_softcapping"),
    (2.0, "logit_scale embedding_multiplier"),
    (0.5, "logits_scaling attention_multiplier residual_multiplier"),
    (False, "tie_word_embeddings is_encoder_decoder use_mamba_kernels"),
    (True, "is_decoder use_sliding_window"),
)
"""Small value -> the attributes that get it, by any of the names that families have for them."""

VALUES = {name: value for value, names in TINY for name in names.split()}


def _alternating(first: str, second: str, **others: Any) -> dict[str, Any]:
    return {"layer_types": [first, second] * (N_LAYERS // 2), **others}


def _for_all(types: str, settings: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return dict.fromkeys(types.split(), settings)


_MIXED = _alternating("sliding_attention", "full_attention")
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_INKLING = {"swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 8, "rel_extent": 16, "d_rel": 4}

SETTINGS: dict[str, dict[str, Any]] = {
    **_for_all("gemma3_text gemma3n_text ministral kolibri1 laguna mellum", _MIXED),
    **_for_all("gemma4_text gemma4_unified_text", {**_MIXED, "global_head_dim": 16}),
    **_for_all("granitemoehybrid kimi_linear", _alternating("linear_attention", "full_attention")),
    **_for_all("lfm2 lfm2_moe", _alternating("conv", "full_attention", block_multiple_of=8)),
    "inkling_text": _alternating("hybrid_sliding", "hybrid", **_INKLING, logits_mup_width_multiplier=1.0),
    "inkling2_text": _alternating("hybrid_sliding", "hybrid", **_INKLING),
    **_for_all("blt_local_encoder blt_local_decoder", {"hidden_size_global": 64}),
    **_for_all("musicgen_decoder musicgen_melody_decoder", {"num_codebooks": 1}),
    "bailing_hybrid": {"layer_group_size": 2},
    "bamba": {"attn_layer_indices": [1, 3]},
    "big_bird": {"attention_type": "original_full"},
    "bigbird_pegasus": {"attention_type": "original_full"},
    "blt": {"encoder_hash_byte_group_vocab": 64},
    "blt_global_transformer": {"hidden_size": 64, "intermediate_size": 48},
    "cohere_compass_text": {**_MIXED, "rope_parameters": {"sliding_attention": _ROPE, "full_attention": None}},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 2.0, "rope_theta": 10000.0},
        "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 48, "moe_top_k": 2},
    },
    "deepseek_v4": {
        "layer_types": [
            f"{kind}_attention" for kind in ("sliding", "heavily_compressed", "compressed_sparse", "sliding")
        ],
        "compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4},
        "num_key_value_heads": 1,
        "qk_rope_head_dim": 4,
        "o_groups": 2,
        "o_lora_rank": 8,
    },
    "dots3_note": {
        "vision_config": {
            "mlp_layer_types": ["dense"],
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "hidden_size": 32,
            "adapter_in_dim": 32,
            "adapter_out_dim": 32,
        },
        "audio_config": {"adapter_out_dim": 32},
    },
    "dots3_note_text": {
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_q_lora_rank": 16,
        "swa_kv_lora_rank": 16,
        "swa_head_dim": 12,
        "swa_qk_nope_head_dim": 8,
        "swa_v_head_dim": 8,
    },
    "gpt_neo": {"attention_types": [[["global", "local"], N_LAYERS // 2]]},
    "falcon_h1": {"mamba_d_ssm": 64},
    "hrm_text": {"H_cycles": 1, "L_cycles": 2},
    "jamba": {"attn_layer_period": 3, "attn_layer_offset": 1},
    "llama4_text": {"floor_scale": 4, "interleave_moe_layer_step": 2},
    "longcat_flash": {"head_dim": 4, "zero_expert_num": 2, "expert_ffn_hidden_size": 24},
    "mamba2": {"num_heads": 8, "n_groups": 2},
    "minicpm3": {"dim_model_base": 32},
    "minimax_m3_vl_text": {
        **_alternating("minimax_m3_sparse", "full_attention"),
        "mlp_layer_types": ["dense", "sparse"] * (N_LAYERS // 2),
        "dense_intermediate_size": 48,
        "index_block_size": 2,
        "index_topk_blocks": 2,
    },
    "mllama_text_model": {"cross_attention_layers": [1]},
    "modernbert-decoder": {"local_attention": 2 * WINDOW},
    "moshi": {"audio_vocab_size": VOCABULARY},
    "nemotron_h": {"n_groups": 2, "moe_shared_expert_intermediate_size": 24},
    "qwen4_exp_text": {
        **_alternating("linear_attention", "full_attention"),
        "hc_lowrank": 8,
        "ple_layer_ids": [1],
        "heads_per_ngram": 2,
        "ngram_vocab_size_base": 97,
        "make_ngram_vocab_size_divisible_by": 8,
        "split_ngram_parts": 1,
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 4,
        "indexer_compress_ratio": 2,
    },
    "reformer": {
        "attn_layers": ["local", "lsh"] * (N_LAYERS // 2),
        "axial_pos_embds": False,
        "attention_head_size": 8,
        "feed_forward_size": 48,
        "local_attn_chunk_length": 4,
        "lsh_attn_chunk_length": 4,
        "num_buckets": 4,
        "hash_seed": 0,
    },
    "rembert": {"input_embedding_size": 16, "output_embedding_size": 16},
    "roc_bert": {
        "pronunciation_vocab_size": VOCABULARY,
        "pronunciation_embed_dim": 16,
        "shape_vocab_size": VOCABULARY,
        "shape_embed_dim": 16,
    },
    "xlm": {"causal": True},
    "xlnet": {"attn_type": "uni"},
    "xmod": {"default_language": "en_XX"},
    **_for_all("zamba zamba2", {"layers_block_type": ["linear_attention", "hybrid"] * (N_LAYERS // 2)}),
    "zaya": _alternating("hybrid_sliding", "hybrid", router_hidden_size=16, num_experts_per_tok=1),
}
"""What the rule cannot know, by the `model_type` of a configuration or of a part of one."""

_KEPT = re.compile(r"A_log|dt_bias|time_|decay|(^|\.)D$")
"""Parameters of recurrences: redrawn, their states would explode."""


def tiny_config(model_type: str, **settings: Any) -> PreTrainedConfig:
    """The configuration of a tiny model; what is given here wins over the rules."""
    _check_is_known(model_type)
    config_class = CONFIG_MAPPING[model_type]
    return config_class(**_tiny(config_class) | settings)


def is_known(model_type: str) -> bool:
    """Whether the transformers at hand has the type, and a right one."""
    is_missing = model_type not in CONFIG_MAPPING and INSTALLED < NEWEST
    return not is_missing and WRONG_BEFORE.get(model_type, INSTALLED) <= INSTALLED


def _check_is_known(model_type: str) -> None:
    """Skips the test at hand where an older transformers has no such type; a wrong name is an error everywhere."""
    if not is_known(model_type):
        raise SkipTest(f"transformers {transformers.__version__} has no {model_type}, or a wrong one")


def tiny_model(model_type: str, dtype: torch.dtype = torch.float32, **settings: Any) -> PreTrainedModel:
    """A fresh random model in evaluation mode, the same at every call."""
    _check_is_known(model_type)
    model_class = getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type])
    config = tiny_config(model_type, **settings)
    parts = [getattr(config, name) for name in config.sub_configs]
    config = next((part for part in parts if isinstance(part, model_class.config_class)), config)
    # The grouped products that experts are computed with take no float64.
    experts = {"experts_implementation": "eager"} if dtype == torch.float64 else {}
    model = model_class._from_config(config, **experts).to(dtype).eval()
    _redraw(model)
    return model


def _redraw(model: PreTrainedModel) -> None:
    """Draws matrices at 1/sqrt(width), so that grids really vary, and moves everything else a little."""
    generator = torch.Generator().manual_seed(0)
    router_biases = [(name, tensor) for name, tensor in model.named_buffers() if name.endswith("correction_bias")]
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *router_biases]:
            drawn = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            if tensor.dim() > 1 and not _KEPT.search(name):
                tensor.copy_(drawn * tensor.shape[-1] ** -0.5)
            else:
                tensor.add_(0.1 * drawn)
        for name, experts in model.named_buffers():
            if name.endswith("tid2eid"):  # token -> its experts: all zero until a checkpoint fills it
                first = torch.randint(0, VALUES["num_experts"], (len(experts), 1), generator=generator)
                experts.copy_((first + torch.arange(experts.shape[1])) % VALUES["num_experts"])


def _defaults(config_class: type[PreTrainedConfig]) -> dict[str, Any]:
    """What a configuration takes, and the defaults; early transformers 5 has ordinary classes for them."""
    if dataclasses.is_dataclass(config_class):
        return {field.name: field.default for field in dataclasses.fields(config_class)}
    parameters = inspect.signature(config_class.__init__).parameters | inspect.signature(PreTrainedConfig).parameters
    return {name: parameter.default for name, parameter in parameters.items()}


def _tiny(config_class: type[PreTrainedConfig]) -> dict[str, Any]:
    """What the rules give a configuration, its parts as dicts."""
    found: dict[str, Any] = {}
    for name, value in _defaults(config_class).items():
        if name in VALUES:
            found[name] = VALUES[name]
        elif "drop" in name and isinstance(value, float):
            found[name] = 0.0
    if "kv_lora_rank" in found:
        found["num_key_value_heads"] = found["num_attention_heads"]  # latent attention expands its keys to all heads
    default = config_class() if config_class.sub_configs else None
    for name in config_class.sub_configs:
        part = getattr(default, name)
        if isinstance(part, PreTrainedConfig):
            found[name] = {"model_type": part.model_type} | _tiny(type(part))
    return found | SETTINGS.get(config_class.model_type, {})
