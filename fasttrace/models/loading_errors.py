"""What went wrong while a model was loaded, in one sentence that says what to do."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from fasttrace.errors import FasttraceError, ModelError, first_line
from fasttrace.models.checkpoints import TRUST, chain_of, damaged_file, folder_of


@contextmanager
def explained(name: str, source: str, revision: str | None) -> Iterator[None]:
    """Turns errors of transformers, accelerate and quantizing packages into ones that say what to do.

    Args:
        name: the model, as the message calls it.
        source: the folder or id that is read.
        revision: of the id.
    """
    try:
        yield
    except BaseException as error:
        if isinstance(error, FasttraceError) or not is_failure(error):
            raise
        raise ModelError(_advice(name, source, revision, error)) from error


def is_failure(error: BaseException) -> bool:
    """Whether it is the model's or its files' fault; packages in Rust panic with no Exception."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def wants_trust(error: BaseException) -> bool:
    """Whether transformers was not allowed to run code that comes with the model."""
    return isinstance(error, ValueError) and "trust_remote_code" in str(error)


def _advice(name: str, source: str, revision: str | None, error: BaseException) -> str:
    reason = first_line(error)
    if wants_trust(error):
        return f"{name} comes with code of its own: {TRUST}; or load it yourself and give Tracer(model, tokenizer)"
    if isinstance(error, ImportError):
        return f"{name} needs a package that is not installed: {reason}"
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error):
        return f"{name} does not fit ({reason}); device_map='auto' uses all GPUs, main memory and disk"
    if "offload_folder" in str(error) or "offload_dir" in str(error):
        return f"weights of {name} would go to disk and have to be written there: pass offload_folder='a/folder'"
    if "AutoModelForCausalLM" in str(error):
        return f"{name} is not a model with a causal language-model head: {reason}"
    folder = folder_of(source, revision)
    if folder is not None and (damage := damaged_file(folder)):
        return f"{name} cannot be loaded: {damage}"
    if not os.path.isdir(source) and (missing := _not_fetched(name, source, revision, error)):
        return missing
    return f"{name} cannot be loaded: {reason}"


def _not_fetched(name: str, source: str, revision: str | None, error: BaseException) -> str | None:
    """Why the files of an id are not here; None where they are."""
    kinds = {type(cause).__name__ for cause in chain_of(error)}
    if "GatedRepoError" in kinds or "gated repo" in str(error):
        return (
            f"{name} is gated: accept its conditions at https://huggingface.co/{source}, then log in with `hf auth "
            "login` or set HF_TOKEN"
        )
    if "RevisionNotFoundError" in kinds:
        return f"{name} has no revision {revision!r}; give a branch, a tag or a commit of its page"
    is_found = "EntryNotFoundError" in kinds
    if isinstance(error, OSError) and error.errno is None and not is_found:  # a full disk's has a number
        what = f"model {name!r}" if name == source else name
        private = "; a private model needs `hf auth login`" if "RepositoryNotFoundError" in kinds else ""
        return (
            f"{what} is not a local folder with a model, not in the local cache, and cannot be fetched; check the name "
            f"and the network, or use the embedded model 'smollm2'{private}"
        )
    return None
