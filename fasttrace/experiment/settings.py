"""Settings: what is done to every prompt, checked when they are made, before a model is loaded.

Their defaults are those of `Tracer.trace`, of `Tracer.trace_many` and of the command line. Nothing here imports torch.
"""

import inspect
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import wraps
from typing import Any, TypedDict, TypeVar, cast

from fasttrace.checks import flag, items, one_of, real_number, shown, text, token_ids, whole_number
from fasttrace.errors import EngineError, PlanError
from fasttrace.experiment.cells import stream_names, window_width
from fasttrace.experiment.grids import DENOISING, direction_name

__all__ = [
    "ENGINE_NAMES",
    "AblateOptions",
    "BothOptions",
    "ManyOptions",
    "Settings",
    "SweepOptions",
    "TraceOptions",
    "engine_name",
    "noise_factor",
    "noise_value",
    "takes",
    "token_budget",
]

ENGINE_NAMES = ("wavefront", "fork", "rows", "reference")
"""Names of `engines.ENGINES`, in the order in which "auto" tries them."""

NOISE_WINDOW = 10
"""Blocks restored together where noise corrupts, as in Meng et al. (2022)."""

MOST_SAMPLES = 1_000_000
"""Noise draws; each takes memory for its noise and its scores, and so many say nothing that a hundredth does not."""

Subject = str | tuple[int, ...]
Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass(frozen=True)
class Settings:
    """How prompts are traced.

    Values may come as numpy's or torch's scalars; they are Python's own afterwards, and lists are tuples.

    Attributes:
        streams: sites whose clean values are restored; None: those of the figure that the model has.
        window: blocks restored together, except in the residual stream; None: NOISE_WINDOW, with a counterfactual 1.
        noise: standard deviation of the noise, or a rule such as "s3".
        noise_subjects: subjects, as text or token ids, to measure a noise rule on; None: the prompts' own.
        samples: noise draws, averaged.
        seed: of the noise.
        direction: "denoising" (clean values into the corrupted run) or "noising" (the other way).
        engine: "auto" or one of ENGINE_NAMES.
        budget: largest number of tokens in a pack, or "auto".
        first_target_token: of a target of several tokens, score the first.
        require_correct: skip prompts whose answer the model does not know.
        strict: raise at the first prompt that cannot be traced.
        compat: "rome" for what ROME's code takes for known with `require_correct`; None for the answer's own token.

    Raises:
        PlanError: a value that cannot be used, whatever the model; it names the setting.
        EngineError: an unknown engine.
    """

    streams: Sequence[str] | None = None
    window: int | None = None
    noise: float | str = "s3"
    noise_subjects: Sequence[str | Sequence[int]] | None = None
    samples: int = 10
    seed: int = 1
    direction: str = DENOISING
    engine: str = "auto"
    budget: int | str = "auto"
    first_target_token: bool = False
    require_correct: bool = False
    strict: bool = False
    compat: str | None = None

    def __post_init__(self) -> None:
        checked = {
            "streams": None if self.streams is None else stream_names(self.streams),
            "window": None if self.window is None else window_width(self.window),
            "noise": noise_value(self.noise),
            "noise_subjects": None if self.noise_subjects is None else _subjects(self.noise_subjects),
            "samples": whole_number("samples", self.samples, 1, MOST_SAMPLES, meaning="noise draws"),
            "seed": whole_number("seed", self.seed, 0, 2**32 - 1, meaning="seed of the noise"),
            "direction": direction_name(self.direction),
            "engine": engine_name(self.engine),
            "budget": token_budget(self.budget),
            "compat": None if self.compat is None else _compat(self.compat),
            **{name: flag(name, getattr(self, name)) for name in ("first_target_token", "require_correct", "strict")},
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    def width(self, pair: bool = False) -> int:
        """Blocks restored together, except in the residual stream.

        Args:
            pair: the prompt has a counterfactual.
        """
        if self.window is not None:
            return self.window
        return 1 if pair else NOISE_WINDOW

    def experiment(self) -> dict[str, Any]:
        """The settings that change a prompt's numbers by more than rounding, by the names they have in results.

        The fingerprint of a run, the metadata of results and the check of a folder are made of it. The direction is
        among them where it is not the one that older runs, which do not say it, have.
        """
        turned = {} if self.direction == DENOISING else {"direction": self.direction}
        return {"noise": self.noise, "samples": self.samples, "seed": self.seed, **turned}

    def described(self) -> dict[str, Any]:
        """The settings by name, as values that JSON holds."""
        return json.loads(json.dumps(asdict(self)))


class AblateOptions(TypedDict, total=False):
    """Settings that `Tracer.ablate` takes by name."""

    engine: str
    budget: int | str
    first_target_token: bool


class SweepOptions(AblateOptions, total=False):
    """Settings that `Tracer.sweep` takes by name."""

    noise: float | str
    noise_subjects: Sequence[str | Sequence[int]] | None
    samples: int
    seed: int


class BothOptions(SweepOptions, total=False):
    """Settings that `Tracer.trace_both` takes by name."""

    streams: Sequence[str] | None
    window: int | None


class TraceOptions(BothOptions, total=False):
    """Settings that `Tracer.trace` takes by name."""

    direction: str


class ManyOptions(TypedDict, total=False):
    """Settings that `Tracer.trace_many` and `Tracer.run` take by name."""

    streams: Sequence[str] | None
    window: int | None
    noise: float | str
    noise_subjects: Sequence[str | Sequence[int]] | None
    samples: int
    seed: int
    direction: str
    engine: str
    budget: int | str
    require_correct: bool
    strict: bool
    compat: str | None


def takes(options: type) -> Callable[[Function], Function]:
    """Gives a function whose last parameter is ``**options`` a signature with each option and its default.

    Args:
        options: a TypedDict; its names are Settings' own.
    """

    def with_signature(function: Function) -> Function:
        signature = inspect.signature(function)
        *before, _ = signature.parameters.values()
        named = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=getattr(Settings, name), annotation=kind)
            for name, kind in options.__annotations__.items()
        ]

        @wraps(function)
        def called(*args: Any, **given: Any) -> Any:
            whole.bind(*args, **given)  # a name that is none is Python's own TypeError
            return function(*args, **given)

        whole = signature.replace(parameters=[*before, *named])
        vars(called)["__signature__"] = whole
        return cast("Function", called)

    return with_signature


def _compat(value: Any) -> str:
    if not isinstance(value, str) or value != "rome":
        raise PlanError(f'compat is {shown(value)}: give "rome", or None')
    return str.__str__(value)


def engine_name(value: Any) -> str:
    """An engine's name, or "auto".

    Raises:
        EngineError: an unknown one.
    """
    known = ("auto", *ENGINE_NAMES)
    try:
        return one_of("engine", value, known)
    except PlanError:
        raise EngineError(f"unknown engine {shown(value)}; choose from {', '.join(known)}") from None


def noise_factor(rule: str) -> float:
    """The factor of a noise rule: 3.0 for "s3", 1.0 for "s".

    Raises:
        PlanError: it is no rule.
    """
    match = re.fullmatch(r"s([0-9]*\.?[0-9]*)", rule.strip())
    if match is None or match[1] == ".":
        raise PlanError(
            f'noise rule {shown(rule)} is unknown: give a number, or "s3" for 3 x std of the subject embeddings'
        )
    return real_number("the factor of noise", float(match[1] or 1))


def noise_value(value: Any) -> float | str:
    """A standard deviation of noise, or a rule such as "s3".

    Raises:
        PlanError: it is neither.
    """
    if isinstance(value, str):
        rule = str.__str__(value).strip()
        noise_factor(rule)
        return rule
    try:
        return real_number("noise", value, 0)
    except PlanError:
        raise PlanError(
            f'noise has standard deviation {shown(value)}: give a finite number >= 0, or a rule such as "s3"'
        ) from None


def _subjects(value: Any) -> tuple[Subject, ...]:
    """One subject or several, each a text or token ids."""
    name = "noise_subjects"
    if isinstance(value, str):
        return (_text(name, value),)
    found = items(name, value, "a list of subjects, each a text or token ids")
    if not found:
        raise PlanError(f"{name} is empty: give at least one subject, or None for the prompts' own")
    if all(_is_id(each) for each in found):
        return (tuple(token_ids(name, found, error=PlanError)),)
    return tuple(_subject(f"{name}[{place}]", each) for place, each in enumerate(found))


def _subject(name: str, value: Any) -> Subject:
    return _text(name, value) if isinstance(value, str) else tuple(token_ids(name, value, error=PlanError))


def _text(name: str, value: str) -> str:
    return text(name, value, empty=bool(value))  # a space may be a token


def _is_id(value: Any) -> bool:
    try:
        whole_number("noise_subjects", value)
    except PlanError:
        return False
    return True


def token_budget(value: Any) -> int | str:
    """Largest number of tokens in a pack, or "auto".

    Raises:
        PlanError: it is neither.
    """
    if isinstance(value, str) and value == "auto":
        return "auto"
    try:
        return whole_number("budget", value, 1)
    except PlanError:
        raise PlanError(
            f'budget is {shown(value)}: give "auto", or the largest number of tokens of a pack, a whole number >= 1'
        ) from None
