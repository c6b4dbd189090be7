"""Metrics: what a run is scored by, by name. What they compute is in `engines/metrics.py`.

Nothing here imports torch.
"""

from collections.abc import Callable, Mapping
from typing import Any

from fasttrace.checks import mapping, shown
from fasttrace.errors import PlanError

__all__ = ["FOIL_METRICS", "METRICS", "check_metric", "own_metrics"]

METRICS: tuple[str, ...] = ("prob", "log_prob", "logit", "logit_diff", "prob_diff", "kl", "rank", "top1")
"""All of them are computed for every run; a, f are the target's and the foil's tokens, y a run's logits, p its softmax.

prob        sum over a of p(a): ROME's
log_prob    its natural logarithm
logit       mean over a of y(a)
logit_diff  mean over a of y(a) minus mean over f of y(f)
prob_diff   sum over a of p(a) minus sum over f of p(f)
kl          KL(clean run || run), natural logarithm, summed over the vocabulary
rank        tokens whose logit is above that of the best target: 0 is the first
top1        id of the most probable token
"""

FOIL_METRICS = frozenset({"logit_diff", "prob_diff"})
"""Those that a prompt without a foil has not."""

MEANLESS = frozenset({"top1"})
"""Those that are names, not numbers: of several samples the most frequent one counts, and nothing is subtracted."""

SPREADLESS = frozenset({"rank", "top1"})
"""Those whose spread over samples is not kept."""


def check_metric(name: Any, known: tuple[str, ...]) -> str:
    """A metric's name.

    Args:
        name: what was asked for.
        known: what there is.

    Raises:
        PlanError: it is none of them.
    """
    if isinstance(name, str) and name in known:
        return str.__str__(name)
    if isinstance(name, str) and name in FOIL_METRICS:
        raise PlanError(f"metric {name!r} compares the target with a foil, and there is none: give foil=")
    raise PlanError(f"unknown metric {shown(name)}: there are {', '.join(known)}")


def own_metrics(metrics: Any) -> tuple[tuple[str, Callable[..., Any]], ...]:
    """A user's own metrics by name, as (name, function) pairs.

    Raises:
        PlanError: no mapping, a name that is taken or cannot be a column, or no function.
    """
    found: Mapping[Any, Any] = mapping("metrics", metrics)
    for name, function in found.items():
        if not isinstance(name, str) or not name.isidentifier() or name in METRICS or name.endswith("_std"):
            raise PlanError(
                f"metrics has a metric named {shown(name)}: give a name of letters, digits and _ that is none of "
                f"{', '.join(METRICS)}"
            )
        if not callable(function):
            raise PlanError(f"metrics[{name!r}] is {shown(function)}: give a function of (logits, read)")
    return tuple(found.items())
