"""What makes a model the same model: its weights, configuration, tokenizer and parts, and no name.

`identity_of` has an entry for all that changes the numbers of a trace by more than rounding. The fingerprint of a
store, the check of a trace's folder and the metadata of results are made of these entries. Where a model lies, what it
is called, how its files are cut and on which devices its weights are makes no difference.

Weights are read to the last byte, wherever they are, and nothing is kept between two calls, so that an edit is always
seen. SHA-256 takes 0.5 to 1 second per GB on a core with instructions for it (BLAKE2b half as much again), and torch's
threads share the tensors. A trace that is not written into a folder does not ask for it.
"""

import hashlib
import json
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import GenerationConfig, PreTrainedModel

from fasttrace.errors import ModelError
from fasttrace.models.anatomy import Anatomy

if TYPE_CHECKING:
    from fasttrace.api import Tracer

__all__ = ["digests", "identity_of", "shown_name", "weights_digest"]

CHUNK_BYTES = 1 << 26
"""Bytes of a tensor on another device that are copied at once."""

COMPUTED_WITH = {"bos_token_id", "eos_token_id", "pad_token_id", "top_k"}
"""Entries that a generation config has too, and that some models compute with."""

_LISTED = """
transformers_version architectures auto_map dtype torch_dtype _pre_quantization_dtype
attn_implementation experts_implementation return_dict torchscript gradient_checkpointing id2label label2id num_labels
problem_type finetuning_task task_specific_params loss_type router_aux_loss_coef initializer_range initializer_factor
gguf_quantization summary_type summary_use_proj summary_activation summary_proj_to_labels chunk_size_feed_forward
"""

NOT_COMPUTED_WITH = {*_LISTED.split()} | (vars(GenerationConfig()).keys() - COMPUTED_WITH)
"""Entries of a configuration that a forward pass in evaluation mode does not depend on, or that stand elsewhere."""

DROPPED = re.compile(r"dropout|pdrop|drop_?path|layerdrop|^p$|name_or_path$")
CHANGED_BY_USE = {"training", "inplace", "max_seq_len_cached", "original_max_seq_len"}

PLAIN_ATTENTION = {"eager", "sdpa", "flash_attention_2", "flash_attention_3", "flash_attention_4", "flex_attention"}
"""Implementations of one function."""

PROBE = 'The Space Needle is in downtown Seattle, 1962: "naïve café"\n\tIt\'s  2 x 605 ft.'
"""A text whose tokens tell what the code of a tokenizer does beside its tables."""

REMOTE_CODE = "transformers_modules"
"""The package under which transformers imports code that came with a model."""


def identity_of(tracer: "Tracer") -> dict[str, Any]:
    """All of a model that changes its numbers by more than rounding, as JSON values.

    Args:
        tracer: the model with its tokenizer.

    Returns:
        weights: a digest of all bytes.
        config: the entries that a forward pass depends on.
        tokenizer: digests of its vocabulary, its rules and what it makes of a text; None without one.
        modules: where the traced parts are.
        module_settings: a digest of what modules hold beside weights: epsilons, scales, which adapters are at work.
        hooks: those on the model's modules, by name, because what they do is not known.
        code: a digest of the code that came with the model; None for a model of transformers.
        attention: None for the model's own, however it is computed; else the implementation's name.
        autocast: the dtype of a surrounding torch.autocast; None without one.

    Raises:
        ModelError: weights are neither in memory nor where accelerate keeps them.
    """
    model, anatomy = tracer.model, tracer.anatomy
    return {
        "weights": weights_digest(model),
        "config": computed_config(model.config),
        "tokenizer": tokenizer_digests(tracer.tokenizer),
        "modules": _modules(anatomy),
        "module_settings": _digest(_settings(model)),
        "hooks": _hooks(model),
        "code": _code_digest(model),
        "attention": _attention(anatomy.config._attn_implementation, anatomy.config.to_dict()),
        "autocast": _autocast(anatomy.device.type),
    }


def digests(identity: Mapping[str, Any]) -> dict[str, Any]:
    """The same entries with long ones as digests, for the metadata of results."""
    return {
        name: _digest([value]) if isinstance(value, Mapping | list) and value else value or None
        for name, value in identity.items()
    }


def shown_name(name: str | os.PathLike[str]) -> str:
    """A model's name for files that are made to be shared: a path's last name, or a model's id, and no path."""
    if not (os.path.isabs(name) or os.path.exists(name)):
        return str(name)
    path = os.path.abspath(name)
    cached = re.search(r"models--([^/\\]+)[/\\]snapshots[/\\]", path)
    return cached[1].replace("--", "/") if cached else Path(path).name or "model"


# Weights.


def weights_digest(model: nn.Module) -> str:
    """SHA-256 over names, types, shapes and all bytes of parameters and persistent buffers, packed ones included.

    Raises:
        ModelError: weights are neither in memory nor where accelerate keeps them.
    """
    values = model.state_dict(keep_vars=True)  # tied weights are one object, and quantized linears give their scales
    distinct = {id(value): (name, value) for name, value in values.items()}
    # Processes that share tensors out put them together in one order.
    workers = 1 if any(hasattr(value, "full_tensor") for value in values.values()) else torch.get_num_threads()
    with ThreadPoolExecutor(workers, "fasttrace-digest") as pool:
        found = dict(zip(distinct, pool.map(lambda each: _value_digest(model, *each), distinct.values()), strict=True))
    return _digest(f"{name} {found[id(values[name])]}" for name in sorted(values))


def _value_digest(model: nn.Module, name: str, value: Any) -> str:
    if isinstance(value, Tensor) and value.is_meta:
        value = _offloaded(model, name)
    digest = hashlib.sha256()
    with torch.no_grad():
        for piece in _pieces(value):
            digest.update(piece)
    return digest.hexdigest()


def _offloaded(model: nn.Module, name: str) -> Tensor:
    """A weight that accelerate brings to its device only when it is used."""
    words = name.split(".")
    for cut in range(len(words) - 1, -1, -1):
        hook = getattr(model.get_submodule(".".join(words[:cut])), "_hf_hook", None)
        kept: Any = getattr(hook, "weights_map", None) or {}
        with suppress(KeyError):  # the hook of another place
            return kept[".".join(words[cut:])]
    raise ModelError(f"the weight {name} is not in memory, and accelerate keeps it nowhere: load the model anew")


def _pieces(value: Any) -> Iterator[Any]:
    """All that an entry of a state dict holds, as bytes."""
    if isinstance(value, tuple):
        yield from (piece for item in value for piece in _pieces(item))
    elif not isinstance(value, Tensor):
        yield repr(value).encode()
    elif (whole := getattr(value, "full_tensor", None)) is not None:  # shared out over processes
        yield from _pieces(whole())
    elif is_traceable_wrapper_subclass(value):  # packed, as torchao's
        names, about = value.__tensor_flatten__()
        yield f"{type(value).__name__} {about}".encode()
        yield from (piece for inner in names for piece in _pieces(getattr(value, inner)))
    elif value.is_quantized:
        yield from _pieces(value.dequantize())
    else:
        yield f"{value.dtype} {tuple(value.shape)} ".encode()
        yield from _bytes_of(value)


def _bytes_of(tensor: Tensor) -> Iterator[memoryview]:
    flat = tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)
    for chunk in flat.split(CHUNK_BYTES):
        yield chunk.cpu().numpy().data


# Everything else.


def computed_config(config: Any) -> dict[str, Any]:
    """What of a configuration a forward pass depends on, as JSON values; without paths."""
    return _computed(json.loads(json.dumps(config.to_dict(), default=str)))


def _computed(values: Any) -> Any:
    if isinstance(values, dict):
        kept = {key: value for key, value in values.items() if key not in NOT_COMPUTED_WITH and not DROPPED.search(key)}
        return {key: _computed(value) for key, value in kept.items()}
    return shown_name(values) if isinstance(values, str) and os.path.isabs(values) else values


def tokenizer_digests(tokenizer: Any) -> dict[str, str] | None:
    """Digests of what a tokenizer does; None without one.

    Returns:
        vocabulary; tokens, what is made of a text, with special tokens and without; and rules, merges and all other
        tables, which a later version of transformers may write otherwise. Chat templates, padding and truncation are in
        none of them: prompts have none.
    """
    if tokenizer is None:
        return None
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    probed = [list(tokenizer(PROBE, add_special_tokens=added)["input_ids"]) for added in (False, True)]
    found = {"vocabulary": tokenizer.get_vocab(), "tokens": [special, probed], "rules": _rules(tokenizer)}
    return {name: _digest([value]) for name, value in found.items()}


def _rules(tokenizer: Any) -> Any:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        return json.loads(backend.to_str()) | {"padding": None, "truncation": None}
    paths = (getattr(tokenizer, name, None) for name in tokenizer.vocab_files_names)  # one that is written in Python
    files = [Path(path).read_bytes() for path in paths if isinstance(path, str) and os.path.isfile(path)]
    return [hashlib.sha256(content).hexdigest() for content in files]


def _modules(anatomy: Anatomy) -> dict[str, Any]:
    """Where the traced parts are: one path inside a block, or one for each block if blocks differ."""
    names = {module: name for name, module in anatomy.model.named_modules()}
    blocks = [names[block] for block in anatomy.blocks]
    found = {"embedding": names[anatomy.embedding], "blocks": blocks[0].rpartition(".")[0]}
    for part in ("attention", "mlp", "down"):
        modules = getattr(anatomy.parts, part)
        paths = [
            module and names[module].removeprefix(f"{block}.") for block, module in zip(blocks, modules, strict=True)
        ]
        found[part] = paths[0] if len(set(paths)) == 1 else paths
    return found


def _settings(model: nn.Module) -> Iterator[list[Any]]:
    """Name, class and plain values of every module: epsilons, scales, activations; of adapters which are at work."""
    for name, module in model.named_modules():
        kinds = (float,) if isinstance(module, PreTrainedModel) else (bool, int, float, str)
        values = {
            key: value
            for key, value in vars(module).items()
            if type(value) in kinds and key[0] != "_" and key not in NOT_COMPUTED_WITH | CHANGED_BY_USE
        }
        values = {key: value for key, value in values.items() if not DROPPED.search(key)}
        if hasattr(module, "merged_adapters"):
            values |= {key: getattr(module, key) for key in ("active_adapters", "disable_adapters", "merged_adapters")}
            values |= {"scaling": getattr(module, "scaling", None)}
        yield [name, type(module).__name__, values]


def _hooks(model: nn.Module) -> list[str]:
    """Hooks on the modules, and methods that stand in for a module's own `forward`."""
    found = []
    for name, module in model.named_modules():
        hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
        if "forward" in vars(module) and not hasattr(module, "_hf_hook"):
            hooks.append(vars(module)["forward"])
        found += [f"{name or 'model'}: {_name_of(hook)}" for hook in hooks]
    return found


def _name_of(hook: Any) -> str:
    return getattr(hook, "__qualname__", type(hook).__qualname__)


def _code_digest(model: nn.Module) -> str | None:
    """SHA-256 over the files of code that came with a model, those that they import included."""
    homes = {type(module).__module__.rpartition(".")[0] for module in model.modules()}
    homes = {home for home in homes if home.partition(".")[0] == REMOTE_CODE}
    modules = {name: module for name, module in sys.modules.items() if name.rpartition(".")[0] in homes}
    paths = sorted(Path(file) for module in modules.values() if (file := getattr(module, "__file__", None)))
    return _digest([path.name, path.read_text(encoding="utf-8")] for path in paths) if paths else None


def _attention(name: Any, config: Mapping[str, Any]) -> str | None:
    """None for the model's own attention, however computed; sdpa may leave soft caps out."""
    name, capped = str(name), config.get("attn_logit_softcapping") is not None
    return None if name in PLAIN_ATTENTION and not (capped and name == "sdpa") else name


def _autocast(device: str) -> str | None:
    if not torch.is_autocast_enabled(device):
        return None
    return str(torch.get_autocast_dtype(device)).removeprefix("torch.")


def _digest(values: Iterable[Any]) -> str:
    """The first half of the SHA-256 of values that JSON can hold."""
    digest = hashlib.sha256()
    for value in values:
        digest.update(json.dumps(value, sort_keys=True, default=str).encode() + b"\n")
    return digest.hexdigest()[:32]
