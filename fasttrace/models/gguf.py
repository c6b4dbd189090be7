"""GGUF files as models: what their header says, and their conversion to a folder of safetensors.

llama.cpp keeps a whole model in one file: its settings, its vocabulary and its weights, mostly of 2 to 8 bits.
transformers unpacks them, in minutes where the vocabulary is large, so the unpacked weights are kept in the cache by
the file's digest. They are float32, which holds every unpacked value exactly; float16 would not.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import logging
import math
from collections import Counter
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fasttrace.errors import FasttraceError, ModelError, first_line
from fasttrace.models import checkpoints
from fasttrace.models.cache import kept, sha256
from fasttrace.models.gguf_header import Header, read_header

__all__ = ["SUFFIX", "convert", "described", "file_in", "folder_of_file"]

SUFFIX = ".gguf"
FILES_BESIDE_WEIGHTS = 100_000_000
"""Bytes of a large vocabulary's tokenizer and of what else a model's folder has."""

logger = logging.getLogger("fasttrace")


def file_in(folder: Path) -> Path | None:
    """The GGUF file of a folder that is no transformers model; None where it has none.

    Raises:
        ModelError: it has several.
    """
    try:
        entries = sorted(folder.iterdir())
    except OSError:  # said where it is read
        return None
    found = [entry.name for entry in entries if entry.name.endswith(SUFFIX) and entry.is_file()]
    if not found or {checkpoints.CONFIG, checkpoints.ADAPTER_CONFIG} & {entry.name for entry in entries}:
        return None
    if len(found) > 1:
        raise ModelError(
            f"{folder} holds {len(found)} GGUF files ({', '.join(found[:4])}{', ...' * (len(found) > 4)}): give one of "
            f"them, such as {folder / found[0]}"
        )
    return folder / found[0]


def folder_of_file(path: Path, name: str) -> Path:
    """The folder of safetensors that a GGUF file is converted to; converted by the first call.

    Args:
        path: the file.
        name: the model's, for messages.

    Raises:
        ModelError: the file cannot be read as a model; see `read_header`, `convert` and `cache.kept`.
    """
    header = _checked(path, name)
    digest = sha256(path)

    def make(_scratch: Path, folder: Path) -> None:
        logger.warning(
            "unpacking %s (%s) to float32 safetensors in the cache, once; a large vocabulary takes minutes",
            name,
            _quantization(header),
        )
        _unpack(path, folder, header, name)
        if sha256(path) != digest:
            raise ModelError(f"{name} changed while it was read: run again once it is written")

    space = 4 * header.weights + FILES_BESIDE_WEIGHTS
    return kept(f"gguf-{digest[:32]}-float32", f"the unpacked weights of {name}", space, make)


def described(config: Any, dtype: Any) -> dict[str, str]:
    """For the metadata of results: how the file that a model comes from keeps its weights; nothing for other models."""
    kept_as = getattr(config, "gguf_quantization", None)
    computed_in = str(dtype).removeprefix("torch.")
    return {"quantization": f"{kept_as} weights, computed in {computed_in}"} if isinstance(kept_as, str) else {}


def convert(path: Path, folder: Path, name: str) -> None:
    """Writes a model, its configuration and its tokenizer as transformers keeps them, the weights in float32.

    Args:
        path: the GGUF file.
        folder: to make.
        name: the model's, for messages.

    Raises:
        ModelError: transformers cannot read it, or its weights are not all of a model's.
    """
    _unpack(path, folder, _checked(path, name), name)


def _unpack(path: Path, folder: Path, header: Header, name: str) -> None:
    try:
        _save_unpacked(path, folder, header, name)
    except FasttraceError:
        raise
    except Exception as error:
        raise ModelError(
            f"{name} could not be converted ({type(error).__name__}: {first_line(error)}): check that "
            "memory and disk have space, and that transformers reads this kind of model from GGUF"
        ) from error


def _checked(path: Path, name: str) -> Header:
    """The header of a file that transformers can read, as far as a header tells."""
    header = read_header(path, name)
    if find_spec("gguf") is None:
        raise ModelError(f"{name} is a GGUF file and needs the package gguf: pip install gguf")
    _check_kind(header, name)
    _check_types(header, name)
    end = header.start + max((begin + _bytes_of(count, kind) for _, count, kind, begin in header.tensors), default=0)
    if end > (size := path.stat().st_size):
        raise ModelError(f"{name} is cut short: it has {size:,} bytes of {end:,}; fetch it again")
    memory, needed = checkpoints.memory(), 4 * header.weights
    if needed > memory:
        raise ModelError(
            f"{name} takes {needed / 2**30:,.0f} GiB in float32, and this machine has {memory / 2**30:,.0f} GiB: "
            "give a smaller model"
        )
    return header


def _check_kind(header: Header, name: str) -> None:
    from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES as READ

    values, architecture = header.values, header.architecture
    kind, parts = values.get("general.type", "model"), values.get("split.count", 1)
    if kind != "model":
        raise ModelError(f"{name} holds a GGUF {kind}, expected a model")
    if parts > 1:
        raise ModelError(f"{name} is one of {parts} parts of a model: join them with llama-gguf-split --merge")
    known = {_plain(each) for each in READ} - {"general", "tokenizer"} | _read_directly()
    if _plain(architecture) not in known:
        raise ModelError(
            f"{name} is a GGUF file of the architecture {architecture!r}, which transformers does not read from GGUF: "
            "give the model as a Hugging Face id, or as a folder with safetensors"
        )
    if "t5" in architecture:
        raise ModelError(f"{name} is an encoder-decoder model; causal tracing needs a decoder-only one")
    scaled = [tensor for tensor, *_ in header.tensors if tensor.startswith(("rope_freqs", "rope_factors"))]
    scaling = values.get(f"{architecture}.rope.scaling.type", "none")
    if scaled or (scaling != "none" and architecture != "gpt-oss"):
        raise ModelError(
            f"{name} scales its rotary frequencies ({scaled[0] if scaled else scaling}), which transformers leaves out "
            "when it reads GGUF, so that all numbers would be wrong: give the model's safetensors"
        )


def _read_directly() -> set[str]:
    """Architectures that newer transformers read without their first reader."""
    try:
        from transformers.integrations.gguf import GGUF_CONFIG_ARCHS
    except ImportError:
        return set()
    return {_plain(each) for each in GGUF_CONFIG_ARCHS}


def _plain(architecture: str) -> str:
    return architecture.replace("-", "").replace("_", "").lower()


def _check_types(header: Header, name: str) -> None:
    """Raises for types that cannot be unpacked."""
    import gguf
    import numpy as np

    for number in {kind for _, _, kind, _ in header.tensors}:
        try:
            kind = gguf.GGMLQuantizationType(number)
            gguf.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
        except (ValueError, KeyError, NotImplementedError):
            raise ModelError(
                f"{name} has weights of the GGUF type {_type_name(number)}, which the package gguf cannot unpack: "
                "install a newer one (pip install -U gguf), or give a file of another quantization"
            ) from None


def _type_name(number: int) -> str:
    import gguf

    try:
        return gguf.GGMLQuantizationType(number).name
    except ValueError:
        return str(number)


def _bytes_of(count: int, number: int) -> int:
    import gguf

    items, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(number)]
    return math.ceil(count / items) * size


def _quantization(header: Header) -> str:
    """As the file calls it, such as "Q4_K_M"; else the type that most weights have."""
    import gguf

    try:
        name = gguf.LlamaFileType(header.values["general.file_type"]).name
    except (KeyError, ValueError):
        counts = Counter[int]()
        for _, count, kind, _ in header.tensors:
            counts[kind] += count
        return _type_name(counts.most_common(1)[0][0]) if counts else "no"
    return name.removeprefix("MOSTLY_").removeprefix("ALL_")


# Conversion.


def _save_unpacked(path: Path, folder: Path, header: Header, name: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    source: dict[str, Any] = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    asked: dict[str, Any] = {"output_loading_info": True, "ignore_mismatched_sizes": True, "trust_remote_code": False}
    with checkpoints.report_dropped():
        loaded: Any = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32, **_unpacking(), **asked)
    checkpoints.check_weights(name, *loaded)
    model = loaded[0]
    model.config.gguf_quantization = _quantization(header)
    model.save_pretrained(folder)
    if "tokenizer.ggml.model" in header.values:
        _save_tokenizer(source, folder, header, name)


def _save_tokenizer(source: Mapping[str, Any], folder: Path, header: Header, name: str) -> None:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(**source, trust_remote_code=False)
    except Exception as error:
        reason = first_line(error)
        logger.warning("the tokenizer of %s cannot be read (%s); give prompts as token ids", name, reason)
        return
    asked = header.values.get("tokenizer.ggml.add_bos_token")
    if isinstance(asked, bool) and asked != _adds_bos(tokenizer):
        _set_bos(tokenizer, asked)
    tokenizer.save_pretrained(folder)


def _adds_bos(tokenizer: Any) -> bool:
    return tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]


def _set_bos(tokenizer: Any, asked: bool) -> None:
    """Early transformers 5 goes by the kind of tokenizer, whatever the file says."""
    from tokenizers.processors import TemplateProcessing

    bos = tokenizer.bos_token
    single, second = ("$A", "$B:1") if not asked else (f"{bos} $A", f"{bos}:1 $B:1")
    special = [(bos, tokenizer.bos_token_id)] if asked else []
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=single, pair=f"{single} {second}", special_tokens=special
    )


def _unpacking() -> dict[str, Any]:
    """Newer transformers keep weights packed where a kernel allows it; packed ones cannot be saved."""
    try:
        from transformers import GgufConfig
    except ImportError:
        return {}
    return {"quantization_config": GgufConfig(dequantize=True)}
