"""The numbers published for "The Space Needle is in downtown" on GPT-2 XL, and how far a result is from them.

Source: pyvene's tutorial "Causal Tracing (ROME)", which reproduces figure 1 of Meng et al. (2022).
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from fasttrace.models.embedded import Case

if TYPE_CHECKING:
    from fasttrace.results.result import TraceResult

__all__ = ["CASE", "MODEL_NAME", "NOISE", "PUBLISHED", "WINDOW", "Comparison", "compare"]

MODEL_NAME = "gpt2-xl"
CASE = Case("The Space Needle is in downtown", "The Space Needle", " Seattle", samples=1)
NOISE = 0.13462981581687927
WINDOW = 10

PUBLISHED = {
    "clean": (
        (" Seattle", 0.9763794541358948),
        (" Bellev", 0.0027682818472385406),
        (" Portland", 0.0021577849984169006),
        (",", 0.0015149445971474051),
        (" Vancouver", 0.0014351375866681337),
        (" San", 0.0013575783232226968),
        (" Minneapolis", 0.000938268203753978),
        (".", 0.0007443446083925664),
        (" Tacoma", 0.0006097281584516168),
        (" Washington", 0.0005885555874556303),
    ),
    "corrupted": (
        (" Los", 0.03294256329536438),
        (" San", 0.03194474056363106),
        (" Seattle", 0.026176469400525093),
        (" Toronto", 0.02585919387638569),
        (" Chicago", 0.024749040603637695),
        (" Houston", 0.024224288761615753),
        (" Atlanta", 0.01866454817354679),
        (" Austin", 0.017735302448272705),
        (" St", 0.017606761306524277),
        (" Denver", 0.01740877516567707),
    ),
}
"""Run -> its ten most probable next tokens with their probabilities."""


@dataclass(frozen=True)
class Comparison:
    """One run's probability of the target beside the published one.

    Attributes:
        run: "clean" or "corrupted".
        published: the tutorial's p(target).
        found: ours.
    """

    run: str
    published: float
    found: float

    @property
    def relative_error(self) -> float:
        """Distance from the published number, as a part of it."""
        return abs(self.found - self.published) / self.published


def compare(result: "TraceResult") -> tuple[Comparison, ...]:
    """Sets a result's clean and corrupted p(target) beside the tutorial's."""
    found = {"clean": result.clean_prob, "corrupted": result.corrupted_prob}
    return tuple(Comparison(run, dict(table)[CASE.target], found[run]) for run, table in PUBLISHED.items())
