"""What may be given as a model: a name, a loaded object, paths of its modules."""

import os
from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from fasttrace.errors import ModelError, first_line
from fasttrace.models.rules import PATHS


def checked_name(name: Any) -> str:
    """A model's name as text; a Path is one, and "~" is the home folder.

    Raises:
        ModelError: what cannot be the name of a model: an empty one, an address, a file, another object.
    """
    if isinstance(name, os.PathLike):
        name = os.fspath(name)
    if not isinstance(name, str):
        hint = "; a model that is loaded already goes into Tracer(model, tokenizer)" if hasattr(name, "forward") else ""
        raise ModelError(f"the model's name is a {type(name).__name__}, expected an id, a folder or a GGUF file{hint}")
    if not name.strip() or "\0" in name:
        raise ModelError(f"the model's name is {name!r}, expected an id such as 'gpt2-xl', or a folder")
    if "://" in name:
        raise ModelError(f"the model's name is the address {name!r}; give its id, such as 'org/model', or a folder")
    if name.startswith("~"):
        name = os.path.expanduser(name)
    if os.path.isfile(name) and not name.endswith(".gguf"):
        raise ModelError(
            f"{name} is a file: give the folder that holds it, with its config.json; of single files only .gguf is read"
        )
    return name


def checked_label(what: str, value: Any) -> str | None:
    """What results record as a model's name or revision, as text.

    Raises:
        ModelError: it is neither text nor a path.
    """
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, os.PathLike):
        return str(value)
    raise ModelError(f"{what} is {value!r}, expected text for the results to record")


def check_modules(modules: Any) -> None:
    """Raises for `modules` that are not paths by the names of a model's parts."""
    if modules is None:
        return
    if not isinstance(modules, Mapping) or not all(isinstance(path, str) for path in modules.values()):
        raise ModelError(f"modules is {modules!r}, expected paths by name, such as {{'blocks': 'model.layers'}}")
    if unknown := [key for key in modules if key not in PATHS]:
        raise ModelError(f"modules has {unknown[0]!r}; its keys are {', '.join(PATHS)}")


def check_model(model: Any) -> None:
    """Raises for an object that is not a loaded model, and says what to give instead of it."""
    kind = model.__name__ if isinstance(model, type) else type(model).__name__
    if isinstance(model, (str, os.PathLike)):
        raise ModelError(f"the model is {str(model)!r}; Tracer.from_pretrained({str(model)!r}) loads one by its name")
    if isinstance(model, type):
        raise ModelError(
            f"the model is the class {model.__name__}; give one that {model.__name__}.from_pretrained loads"
        )
    if isinstance(model, (tuple, list)):
        raise ModelError(f"the model is a {kind}; give model and tokenizer one by one: Tracer(model, tokenizer)")
    path, inner = "", model
    while not isinstance(inner, PreTrainedModel) and (name := _wrapping(inner)):
        path, inner = f"{path}.{name}", getattr(inner, name)
    if path:
        raise ModelError(f"{kind} wraps the model; give what is inside: Tracer(model{path}, tokenizer)")
    if not isinstance(model, nn.Module) and isinstance(getattr(model, "model", None), nn.Module):
        raise ModelError(f"{kind} holds a model; give that: Tracer(x.model, x.tokenizer)")
    if isinstance(model, nn.Module):
        configs = (getattr(module, "config", None) for module in model.modules())
        if any(getattr(config, "return_dict", True) is not True for config in configs):
            raise ModelError(f"{kind} has return_dict=False, and returns tuples; set model.config.return_dict = True")


def _wrapping(module: Any) -> str | None:
    """Where a wrapper of torch or accelerate keeps the model: DataParallel, DistributedDataParallel, torch.compile."""
    inside = getattr(module, "_modules", {})
    return next((name for name in ("module", "_orig_mod") if isinstance(inside.get(name), nn.Module)), None)


def explain_call(model: nn.Module, error: Exception) -> str:
    """Why a model that was called on token ids alone failed."""
    kind, reason = type(model).__name__, first_line(error)
    if "pixel" in reason or "image" in reason:
        inside = getattr(model, "language_model", None)
        advice = "; its language model can be: Tracer(model.language_model, tokenizer)" if inside is not None else ""
        return f"{kind} needs images beside the tokens and cannot be traced ({reason}){advice}"
    return (
        f"{kind} fails on plain token ids ({reason}): it needs other inputs and cannot be traced, or its configuration "
        "does not fit its weights"
    )
