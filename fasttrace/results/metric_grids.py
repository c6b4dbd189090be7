"""MetricGrids: what a trace found in one metric, averaged over samples."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from fasttrace.experiment.metrics import MEANLESS, SPREADLESS

__all__ = ["MetricGrids"]


class MetricGrids(NamedTuple):
    """One metric of the restored runs, and of the two they are compared with, over the samples.

    `prob` is float64, as ROME's; all others are float32, in which logits are computed: a store of all metrics is half
    the size.

    Attributes:
        mean: stream -> [layer, position] mean over samples; of `top1` the most frequent one, the smallest of several.
        std: stream -> [layer, position] population standard deviation over samples; of `rank` and `top1` none.
        clean: of the clean run.
        corrupted: of the corrupted runs, averaged as `mean` is.
        corrupted_std: their standard deviation; 0 where `std` has none.
    """

    mean: Mapping[str, np.ndarray]
    std: Mapping[str, np.ndarray]
    clean: float
    corrupted: float
    corrupted_std: float = 0.0

    @staticmethod
    def of_samples(name: str, streams: Sequence[str], cells: np.ndarray, base: np.ndarray) -> "MetricGrids":
        """Averages one metric.

        Args:
            name: of the metric.
            streams: those traced.
            cells: float64 [stream, layer, position, sample].
            base: float64 [1 + sample] of the clean run and the corrupted ones.
        """
        middle = _most_frequent if name in MEANLESS else np.mean
        spread = {} if name in SPREADLESS else dict(zip(streams, cells.std(-1), strict=True))
        corrupted_std = 0.0 if name in SPREADLESS else float(base[1:].std())
        grids = dict(zip(streams, middle(cells, axis=-1), strict=True))
        return MetricGrids(grids, spread, float(base[0]), float(middle(base[1:], axis=-1)), corrupted_std)

    def plain(self) -> "MetricGrids":
        """The same in float32, read-only."""
        with np.errstate(over="ignore"):
            numbers = (float(np.float32(number)) for number in (self.clean, self.corrupted, self.corrupted_std))
            return MetricGrids(_float32(self.mean), _float32(self.std), *numbers)


def _float32(grids: Mapping[str, Any]) -> dict[str, np.ndarray]:
    copies = {stream: np.array(grid, dtype=np.float32) for stream, grid in grids.items()}
    for grid in copies.values():
        grid.flags.writeable = False
    return copies


def _most_frequent(values: np.ndarray, axis: int) -> np.ndarray:
    """The most frequent value along an axis, the smallest of several: the longest run of equal ones when sorted."""
    ordered = np.sort(np.moveaxis(values, axis, -1), axis=-1)
    first = np.ones(ordered.shape, dtype=bool)
    first[..., 1:] = ordered[..., 1:] != ordered[..., :-1]
    number = np.arange(ordered.shape[-1])
    lengths = number - np.maximum.accumulate(np.where(first, number, 0), axis=-1)
    return np.take_along_axis(ordered, lengths.argmax(-1)[..., None], -1)[..., 0]
