"""Small GGUF files, written as llama.cpp's converter writes them."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np

from tests.helpers.tokenizers import byte_level
from tests.helpers.zoo import tiny_model

TOKENIZER = byte_level()
MATRICES = ("attn_", "ffn_")


def write_gguf(path: Path, packed: str = "Q8_0", *, bos: bool | None = None, tokens: bool = True, **values: Any) -> Any:
    """Writes a tiny Qwen 2 with matrices of that type, and gives the model with the weights that the file then has.

    Args:
        path: the file.
        packed: type of the matrices in the blocks; all else is float32.
        bos: what the file says of a token at the beginning of every text.
        tokens: with a tokenizer.
        values: further keys, such as `general__type="adapter"`; they replace the usual ones.
    """
    model = tiny_model("qwen2", vocab_size=len(TOKENIZER), intermediate_size=64, use_sliding_window=False)
    config = model.config
    architecture = values.pop("general__architecture", "qwen2")
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if packed != "F32":
        writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{packed}"])
    if tokens:
        _add_tokenizer(writer, bos)
    for key, value in values.items():
        name = key.replace("__", ".")
        writer.kv_data[0][name] = gguf.gguf_writer.GGUFValue(value, gguf.GGUFValueType.get_type(value))
    _add_weights(writer, model, gguf.GGMLQuantizationType[packed])
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()
    return model


def _add_tokenizer(writer: gguf.GGUFWriter, bos: bool | None) -> None:
    import json

    tokens = sorted(TOKENIZER.get_vocab(), key=TOKENIZER.get_vocab().__getitem__)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL if token == "<s>" else gguf.TokenType.NORMAL for token in tokens])
    merges = json.loads(TOKENIZER.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    if bos is not None:
        writer.add_add_bos_token(bos)


def _add_weights(writer: gguf.GGUFWriter, model: Any, packed: gguf.GGMLQuantizationType) -> None:
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, model.config.num_hidden_layers)
    for name, weight in model.state_dict().items():
        module, _, suffix = name.rpartition(".")
        written = names.get_name(module)
        assert written is not None, name
        values = weight.numpy()
        kind = (
            packed if values.ndim == 2 and any(part in written for part in MATRICES) else gguf.GGMLQuantizationType.F32
        )
        data = values if kind == gguf.GGMLQuantizationType.F32 else gguf.quantize(values, kind)
        writer.add_tensor(f"{written}.{suffix}", data, raw_dtype=kind)
        weight.copy_(weight.new_tensor(np.array(gguf.dequantize(data, kind).reshape(values.shape))))
