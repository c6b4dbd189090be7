"""The files of ROME's `causal_trace.py`, for its notebooks and for those who have them already."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fasttrace.checks import shown, whole_number
from fasttrace.errors import PlanError
from fasttrace.experiment.sites import SITE

if TYPE_CHECKING:
    from fasttrace.results.result import TraceResult

__all__ = ["rome_arrays", "rome_file_name", "rome_path"]

ROME_KINDS = {name: site.rome for name, site in SITE.items() if site.rome is not None}
"""Names in ROME's files of the streams that it knows."""

ROME_WINDOW = 10


def rome_file_name(known_id: int, stream: str) -> str:
    """Gives the name of a case in ROME's ``cases`` folder.

    Example:
        >>> rome_file_name(12, "attention_output")
        'knowledge_12_attn.npz'

    Args:
        known_id: number of the fact.
        stream: a stream that ROME knows.

    Returns:
        ``knowledge_{known_id}.npz``, ``..._mlp.npz`` or ``..._attn.npz``.

    Raises:
        PlanError: ROME has no name for the stream.
    """
    kind = _rome_kind(stream)
    known_id = whole_number("known_id", known_id, 0, meaning="number of a fact")
    return f"knowledge_{known_id}{'_' + kind if kind else ''}.npz"


def _rome_kind(stream: str) -> str:
    if not isinstance(stream, str) or stream not in ROME_KINDS:
        raise PlanError(f"ROME has no files for stream {shown(stream)}: it knows {', '.join(ROME_KINDS)}")
    return ROME_KINDS[stream]


def rome_path(path: Path, known_id: int | None, stream: str) -> Path:
    """The file of a case: `path` itself if it ends in .npz, else ROME's name for it in the folder `path`.

    Raises:
        PlanError: a folder without known_id, or a stream without a name in ROME.
    """
    if path.suffix == ".npz":
        return path
    if known_id is None:
        raise PlanError(f"{path} is a folder: give known_id, or a path that ends in .npz")
    return path / rome_file_name(known_id, stream)


def _rome_window(result: "TraceResult", stream: str) -> int:
    if stream != "block_output":
        return result.windows[stream]
    windowed = [width for name, width in result.windows.items() if name != "block_output"]
    return windowed[0] if windowed else ROME_WINDOW


def rome_arrays(result: "TraceResult", stream: str) -> dict[str, np.ndarray]:
    """The arrays of a case by ROME's keys, `correct_prediction` left out.

    Raises:
        PlanError: the stream was not traced, or has no name in ROME.
    """
    answer = str(result.target_id) if result.target is None else result.target
    return {
        "scores": result.grid(stream).T.astype(np.float32),
        "low_score": np.array(result.corrupted_prob, dtype=np.float64),
        "high_score": np.array(result.clean_prob, dtype=np.float32),
        "input_ids": np.array(result.token_ids, dtype=np.int64),
        "input_tokens": np.array(result.tokens, dtype=np.str_),
        "subject_range": np.array(result.span, dtype=np.int64),
        "answer": np.array(answer, dtype=np.str_),
        "window": np.array(_rome_window(result, stream), dtype=np.int64),
        "kind": np.array(_rome_kind(stream), dtype=np.str_),
    }
