"""Adapters that PEFT has trained: a folder of few weights that names its base model."""

import os
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.utils import find_adapter_config_file

from fasttrace.errors import ModelError
from fasttrace.models.checkpoints import ADAPTER_CONFIG, CONFIG, check_folder, differences, read_json, weight_files

NAME = "default"
"""By which PEFT calls an adapter that stands alone."""


@dataclass(frozen=True)
class Adapter:
    """What an adapter says of its base model: id or folder, and the revision."""

    base: str
    revision: str | None


def adapter_of(source: str, revision: str | None) -> Adapter | None:
    """The base model of an adapter; None where the source is a whole model.

    Raises:
        ModelError: the folder cannot be read, holds adapter and model at once, or names no base model; peft is missing.
    """
    folder = Path(source)
    if folder.is_dir():
        check_folder(folder)
    path = find_adapter_config_file(source, revision=revision)
    if path is None:
        return None
    if any(not file.name.startswith("adapter_") for file in weight_files(folder)):
        raise ModelError(
            f"{source} holds a model and an adapter ({ADAPTER_CONFIG}): give the adapter's files a folder of their "
            "own to trace with it, or take them away to trace without it"
        )
    if folder.is_dir() and not weight_files(folder):
        raise ModelError(f"{source} has {ADAPTER_CONFIG} and no adapter_model.safetensors: fetch the adapter again")
    settings = read_json(Path(path))
    base, base_revision = settings.get("base_model_name_or_path"), settings.get("revision")
    if not isinstance(base, str) or not base:
        raise ModelError(f"{ADAPTER_CONFIG} of {source} names no base model: write it there as base_model_name_or_path")
    if find_spec("peft") is None:
        raise ModelError(f"{source} is an adapter of {base} and needs the package peft: pip install peft")
    if os.path.isdir(base) and not (Path(base) / CONFIG).is_file():
        raise ModelError(f"{base}, the base model of the adapter {source}, has no {CONFIG}: it has to be a whole model")
    return Adapter(base, base_revision if isinstance(base_revision, str) else None)


def add_adapter(model: Any, name: str, source: str, revision: str | None) -> nn.Module:
    """A base model with an adapter's modules in it.

    Args:
        model: the base model, which is changed.
        name: the adapter's, for messages.
        source: its folder or id.
        revision: of the id.

    Raises:
        ModelError: the adapter's weights are not those that its settings describe, or it is a prefix of the prompt.
    """
    from peft import PeftConfig, PeftModelForCausalLM, get_peft_model_state_dict

    settings = PeftConfig.from_pretrained(source, revision=revision)
    if settings.is_prompt_learning:
        kind = getattr(settings.peft_type, "value", settings.peft_type)
        raise ModelError(
            f"the adapter {name} ({kind}) puts positions of its own before the prompt, and cannot "
            "be traced; adapters inside of modules can, such as LoRA's"
        )
    if "disk" in getattr(model, "hf_device_map", {}).values():
        raise ModelError(f"the adapter {name} needs a base model in memory: leave 'disk' out of the device_map")
    settings.inference_mode = True
    wrapped = PeftModelForCausalLM(model, settings, NAME)
    own = get_peft_model_state_dict(wrapped, adapter_name=NAME, save_embedding_layers=False).values()
    stored = {tensor.data_ptr() for tensor in own}
    waiting = [path for path, weight in wrapped.named_parameters() if weight.data_ptr() in stored]
    with torch.no_grad():
        for path in waiting:  # PEFT does not tell of every weight that stays as it was
            wrapped.get_parameter(path).fill_(torch.nan)
    found = wrapped.load_adapter(source, NAME, revision=revision)
    missing = {path for path in waiting if wrapped.get_parameter(path).isnan().all()}
    if said := differences(missing | set(found.missing_keys), found.unexpected_keys):
        raise ModelError(f"the weights of the adapter {name} do not fit it: {'; '.join(said)}: fetch the files again")
    return wrapped.get_base_model()
