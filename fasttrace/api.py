"""The straight line from a prompt to a grid: one call per module."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

import pandas as pd
import torch
from torch import nn

from fasttrace.checks import function, memory_told
from fasttrace.engines.memory import Budget, check_samples, tokens_allowed
from fasttrace.engines.passes import Progress
from fasttrace.engines.self_check import EngineChoice, choose
from fasttrace.engines.sources import check_source, vectors_of
from fasttrace.engines.state import follow, state_of
from fasttrace.errors import FasttraceError, ModelError, PlanError, PromptError
from fasttrace.experiment.cells import Cell, windows_of
from fasttrace.experiment.corruption import sigma_of
from fasttrace.experiment.grids import OF_A_SUBJECT, Grid
from fasttrace.experiment.own_cells import own_cells
from fasttrace.experiment.settings import (
    AblateOptions,
    BothOptions,
    ManyOptions,
    Settings,
    SweepOptions,
    TraceOptions,
    engine_name,
    takes,
)
from fasttrace.facts.dataset import Fact, FactSet, check_answers, read_facts
from fasttrace.fusing.cpu_linears import library_asked
from fasttrace.models.anatomy import Anatomy, anatomy_of, module_paths
from fasttrace.models.arguments import check_model, check_modules, checked_label, checked_name, explain_call
from fasttrace.models.gguf import described
from fasttrace.models.identity import identity_of, shown_name
from fasttrace.models.loading import load
from fasttrace.prompts.pairs import with_counterfactual, with_foil
from fasttrace.prompts.prompt import Prompt, encode, subjects_of
from fasttrace.prompts.tokenization import check_tokenizer
from fasttrace.results.record import Record
from fasttrace.results.result import Directions, TraceResult
from fasttrace.study import Encoded, Study, encoded_facts

if TYPE_CHECKING:
    from fasttrace.runs.run import Outcome, Told

LARGEST_DRAW = 10.0
"""Standard deviations; normal draws beyond it do not occur."""


class Tracer:
    """Traces prompts on one model, as it is when a trace begins.

    Threads may trace one model, with one tracer or several: they take turns. Other calls of the model meanwhile give
    what they always give, except that a model in training mode is in evaluation mode while a trace is at work.

    Attributes:
        model: a decoder-only Hugging Face model; fasttrace leaves it as it is.
        tokenizer: its tokenizer, or None if prompts are given as token ids.
        name, revision: what the results record.
        trust_remote_code: code that came with the model was allowed to run; the results record that too.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any = None,
        *,
        name: str | None = None,
        revision: str | None = None,
        modules: Mapping[str, str] | None = None,
        fuse: bool = True,
        cpu_matmul: str = "auto",
    ):
        """Wraps a loaded model.

        Args:
            model: from AutoModelForCausalLM, on its device(s).
            tokenizer: needed for prompts, subjects and targets given as text.
            name: recorded in results; the model's own name by default. Of a path the last name alone.
            revision: recorded in results.
            modules: paths of modules that the rules do not find, or find wrongly: "embedding" and "blocks" (the
                list of transformer blocks) from the model; "attention", "mlp" and "down" (the MLP's down projection)
                from a block. For example {"blocks": "model.layers", "attention": "self_attn", "mlp": "mlp"}.
            fuse: compute with faster equivalents of the model's modules while a trace runs; see `fasttrace.fusing`.
            cpu_matmul: the library that multiplies matrices on a CPU: "mkl", "onednn", or "auto" for what is faster in
                this process, unless the environment variable FASTTRACE_CPU_MATMUL names one. A trace raises EngineError
                where a named one cannot.

        Raises:
            ModelError: not a decoder-only language model, one inside a wrapper, parts that are not found, or no Hugging
                Face tokenizer.
            PlanError: an unknown library.
        """
        check_model(model)
        check_modules(modules)
        library_asked(cpu_matmul)
        name, self.revision = checked_label("name", name), checked_label("revision", revision)
        self.model, self.tokenizer, self.fuse = model, check_tokenizer(tokenizer), fuse
        self.trust_remote_code = False
        self._modules = modules
        try:
            self._anatomy = follow(anatomy_of(model, modules, cpu_matmul), modules)
        except FasttraceError:
            raise
        except Exception as error:
            raise ModelError(explain_call(model, error)) from error
        config: Any = model.config
        self.name = _name_of(name, str(getattr(config, "name_or_path", "") or type(model).__name__))
        self.revision = self.revision or getattr(config, "_commit_hash", None)

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        dtype: str | torch.dtype = "auto",
        device: str = "auto",
        revision: str | None = None,
        modules: Mapping[str, str] | None = None,
        fuse: bool = True,
        cpu_matmul: str = "auto",
        device_map: str | Mapping[str, int | str] | None = None,
        max_memory: Mapping[int | str, int | str] | None = None,
        offload_folder: str | Path | None = None,
        trust_remote_code: bool = False,
    ) -> "Tracer":
        """Loads a model.

        Args:
            name: Hugging Face id, local folder (of a PEFT adapter too), GGUF file (a path, or owner/name/file.gguf of
                the Hub), or an embedded model: "smollm2", "gemma3-270m".
            dtype: "auto" is float16 on a GPU and float32 on a CPU.
            device: "auto" is the first GPU if there is one.
            revision: of the Hugging Face repository.
            modules: see the constructor.
            fuse: see the constructor.
            cpu_matmul: see the constructor.
            device_map: for a model larger than the device: "auto" spreads it over GPUs, main memory and disk.
            max_memory: with a device map, the most to use of each device, such as {0: "20GiB", "cpu": "60GiB"}.
            offload_folder: with a device map, where weights that have to be rewritten are kept on disk.
            trust_remote_code: run code that comes with the model, which can do whatever you can. Without it no such
                code runs.

        Raises:
            ModelError: the model cannot be found, read or traced; its files lack weights, or have others than the
                model; it comes with code; an unknown dtype or device.
        """
        name = checked_name(name)
        check_modules(modules)
        places = {"device_map": device_map, "max_memory": max_memory, "offload_folder": offload_folder}
        library_asked(cpu_matmul)
        model, tokenizer = load(name, dtype, device, revision, trust_remote_code=trust_remote_code, **places)
        about: Any = {"name": shown_name(name), "revision": revision, "modules": modules}
        tracer = cls(model, tokenizer, fuse=fuse, cpu_matmul=cpu_matmul, **about)
        tracer.trust_remote_code = trust_remote_code
        return tracer

    @property
    def anatomy(self) -> Anatomy:
        """The model's parts as they are now."""
        self._anatomy = follow(self._anatomy, self._modules)
        return self._anatomy

    @property
    def streams(self) -> tuple[str, ...]:
        """The figure's streams, as far as the model has them: without MLP modules no MLP stream."""
        return self._anatomy.streams

    @property
    def modules(self) -> dict[str, str]:
        """Where the parts were found: of every block path that the first block has, from the model."""
        return module_paths(self._anatomy)

    @property
    def dtype(self) -> torch.dtype:
        """Of the model."""
        return self._anatomy.dtype

    @property
    def device(self) -> torch.device:
        """Where the model takes its tokens."""
        return self._anatomy.device

    def identity(self) -> dict[str, Any]:
        """What makes the model this one, whatever its name; see `fasttrace.models.identity`. It reads all weights.

        `fasttrace run` and `fasttrace trace --out` record it and compare it with what a folder holds; `trace` does not
        ask for it, because for a large model it takes longer than a trace.
        """
        return identity_of(self)

    def choose_engine(self, engine: str = "auto") -> EngineChoice:
        """The engine a trace would get, and why.

        Raises:
            EngineError: an unknown engine, or none that passes the self-check.
        """
        name, state = engine_name(engine), state_of(self.model)
        self._anatomy = follow(self._anatomy, self._modules, state)
        return choose(self._anatomy, name, self.fuse, state)

    @takes(TraceOptions)
    def trace(
        self,
        prompt: str | Sequence[int],
        *,
        subject: str | tuple[int, int] | None = None,
        target: str | int | None = None,
        counterfactual: str | Sequence[Any] | None = None,
        foil: str | int | None = None,
        progress: Progress | None = None,
        **options: Unpack[TraceOptions],
    ) -> TraceResult:
        """Causal traces of one prompt: a grid of restored runs per stream.

        Args:
            prompt: text, or token ids.
            subject: text that occurs once in the prompt as a whole word, or else once; or a half-open token span, as a
                pair, a range or a slice. Needed for noise; with a counterfactual only shown.
            target: text of one token behind the prompt (a space is put before it where running text has one), a token
                id, or None for the clean run's top token.
            counterfactual: another prompt of as many tokens (text or token ids), or several: these are the corrupted
                runs, and there is no noise. Without a subject the span goes from the first to the last token
                that differs.
            foil: an answer that the target is compared with, given as the target is.
            streams: sites whose clean values are restored, one grid each; None: those of the figure that the model
                has, see `streams`.
            window: blocks restored together, except in the residual stream (one block); None: 10 with noise, 1 with a
                counterfactual.
            noise: standard deviation of the noise on the subject's embeddings, or "s3" for 3 x that of the
                embedding outputs of the subject's tokens.
            noise_subjects: subjects (text or token ids) to measure for "s3" in place of the prompt's own.
            samples: noise samples, averaged.
            seed: of the noise.
            direction: "denoising" puts clean values into the corrupted run and asks what is sufficient; "noising" puts
                corrupted values into the clean run and asks what is necessary. See `trace_both`.
            engine: "auto", "wavefront", "fork", "rows" or "reference".
            budget: largest number of tokens in a pack, or "auto" from free memory.
            first_target_token: of a target of several tokens, score the first.
            progress: called with (steps done, steps in all).

        Raises:
            PromptError: prompt, subject or target cannot be used.
            PlanError: streams, window, noise, samples, seed, direction or budget cannot be used.
            ModelError: the model does not have a stream.
            EngineError: the engine is unknown or wrong for the model.
            NumericsError: inf or NaN, naming the block.

        Source: Meng et al. (2022), "Locating and Editing Factual Associations in GPT", section 2.
        """
        settings = Settings(**options)
        function("progress", progress)
        with memory_told("tracing"):
            asked = {"subject": subject, "target": target, "counterfactual": counterfactual, "foil": foil}
            encoded = self._encoded(prompt, settings, asked)
            study = self._study_of_prompt(settings, encoded)
            ((scores, cost),) = study.scores([study.job(encoded)], progress=progress)
            return study.result(encoded, scores, cost)

    @takes(BothOptions)
    def trace_both(
        self,
        prompt: str | Sequence[int],
        *,
        subject: str | tuple[int, int] | None = None,
        target: str | int | None = None,
        counterfactual: str | Sequence[Any] | None = None,
        foil: str | int | None = None,
        progress: Progress | None = None,
        **options: Unpack[BothOptions],
    ) -> Directions:
        """Traces one prompt in both directions in one pass: what is sufficient, and what is necessary.

        Args:
            prompt: see `trace`, as all that is not named here.
            subject: see `trace`.
            target: see `trace`.
            counterfactual: see `trace`.
            foil: see `trace`.
            progress: see `trace`.
            options: see `trace`.

        Returns:
            Two results, `denoising` and `noising`.

        Raises:
            FasttraceError: see `trace`.
        """
        settings = Settings(**options)
        function("progress", progress)
        asked = {"subject": subject, "target": target, "counterfactual": counterfactual, "foil": foil}
        with memory_told("tracing"):
            encoded = self._encoded(prompt, settings, asked)
            return self._study_of_prompt(settings, encoded).both(encoded, progress)

    @takes(SweepOptions)
    def sweep(
        self,
        prompt: str | Sequence[int],
        cells: Iterable[Any] | Grid,
        *,
        subject: str | tuple[int, int] | None = None,
        target: str | int | None = None,
        counterfactual: str | Sequence[Any] | None = None,
        foil: str | int | None = None,
        progress: Progress | None = None,
        **options: Unpack[SweepOptions],
    ) -> pd.DataFrame:
        """Scores cells of the user's own, all in as few passes as memory allows.

        Args:
            prompt: see `trace`, as all that is not named here.
            cells: an `experiment.grids.Grid`, which makes cells of all blocks, of windows of several widths, at each
                position or at sets of them; or a list of cells, each an edit (site, layer, position), which puts the
                clean value back there; or a list of edits; or a mapping with these under "edits" and the cell's
                coordinates under names of its own. A fourth item of an edit is its source: "clean", "corrupted" or a
                vector (`experiment.cells.Vector`). The coordinate "background" says in which run the edits are made,
                "corrupted" by default. Negative positions count from the prompt's end.
            subject: see `trace`.
            target: see `trace`.
            counterfactual: see `trace`.
            foil: see `trace`.
            progress: see `trace`.
            options: see `trace`.

        Returns:
            A row per cell, in the cells' order: coordinates (of a cell without them its first edit's site, layer and
            position), a column per metric, averaged over the corrupted runs, and a column with ``_effect`` behind the
            metric's name, which is less what the cell's background gives. ``attrs["runs"]`` has both runs' metrics.

        Raises:
            PlanError: no cells, an edit outside the model or the prompt, a cell that writes one place twice, or see
                `trace`, as for other errors.

        >>> tracer.sweep(prompt, [("mlp_output", 3, -1)], subject="Paris")  # doctest: +SKIP
        """
        settings = Settings(**options)
        function("progress", progress)
        asked = {"subject": subject, "target": target, "counterfactual": counterfactual, "foil": foil}
        with memory_told("tracing"):
            encoded = self._encoded(prompt, settings, asked)
            found = self._cells(cells, encoded)
            return self._frame(self._study_of_prompt(settings, encoded), encoded, *found, progress)

    @takes(AblateOptions)
    def ablate(
        self,
        prompt: str | Sequence[int],
        streams: str | Sequence[str] | None = None,
        *,
        source: Any = "zero",
        positions: Any = "each",
        window: Any = 1,
        subject: str | tuple[int, int] | None = None,
        target: str | int | None = None,
        foil: str | int | None = None,
        progress: Progress | None = None,
        **options: Unpack[AblateOptions],
    ) -> pd.DataFrame:
        """What a prompt's answer loses without the values of a stream: they are replaced in the clean run.

        There is no corrupted run.

        Args:
            prompt: see `trace`, as all that is not named here.
            streams: sites whose values are replaced; None: those of the figure that the model has.
            source: "zero"; or a tensor [width of the stream] or [n_layers, width of the stream], such as a mean over
                other prompts; or a mapping of streams to such tensors.
            positions: "each" position by itself; "all", "subject", "subject_last" or "last" together; or a list of
                columns, each a position or a list of positions.
            window: blocks whose values are replaced together, one width or several; in the residual stream one block.
            subject: for positions that need one; see `trace`.
            target: see `trace`.
            foil: see `trace`.
            progress: see `trace`.
            options: see `trace`.

        Returns:
            A row per cell: stream, window, layer, position, a column per metric, and one with ``_effect`` behind its
            name, which is less what the clean run has. ``attrs["runs"]`` has the clean run's metrics.

        Raises:
            PlanError: source, positions, window or streams cannot be used, or see `trace`, as for other errors.

        >>> tracer.ablate(prompt, "attention_output", positions="last")  # doctest: +SKIP
        """
        settings, grid, source = Settings(**options), Grid(streams, window, positions), check_source(source)
        function("progress", progress)
        with memory_told("tracing"):
            asked = {"subject": subject, "target": target, "counterfactual": None, "foil": foil}
            encoded = self._encoded(prompt, settings, asked, corrupts=False)
            if subject is None and grid.positions in OF_A_SUBJECT:
                raise PromptError(f"positions is {grid.positions!r} and no subject is given: give subject=")
            vectors = vectors_of(self._anatomy, grid.streams or self.streams, source)
            found = self._cells(grid.sourced(lambda stream, layer: vectors[stream][layer]), encoded)
            study = replace(self._study(settings, {}, None), corrupts=False)
            frame = self._frame(study, encoded, *found, progress)
            frame.attrs["source"] = source if isinstance(source, str) else "given"
            return frame

    def _cells(self, cells: Any, prompt: Prompt) -> tuple[list[dict[str, Any]], tuple[Cell, ...]]:
        """The coordinates of cells, and the cells, of sites that the model has."""
        n_layers, n_positions = self._anatomy.n_layers, len(prompt.token_ids)
        if isinstance(cells, Grid):
            found = cells.cells(n_layers, n_positions, prompt.span, self.streams)
        else:
            found = own_cells(cells, n_layers, n_positions)
        for site in {edit.site for cell in found[1] for edit in cell}:
            self._anatomy.modules_at(site)
        return found

    def _frame(
        self,
        study: Study,
        prompt: Prompt,
        coordinates: Sequence[Mapping[str, Any]],
        cells: tuple[Cell, ...],
        progress: Progress | None,
    ) -> pd.DataFrame:
        ((scores, _),) = study.scores([study.job(prompt, cells)], progress=progress)
        return study.frame(coordinates, cells, prompt, scores)

    def _study_of_prompt(self, settings: Settings, prompt: Prompt) -> Study:
        pair = bool(prompt.counterfactuals)
        windows = self.windows(settings.streams, settings.width(pair))
        if not pair:
            check_samples(self._anatomy, settings.samples, windows, [prompt])
        return self._study(settings, windows, None if pair else [prompt.token_ids[slice(*prompt.span)]])

    def _encoded(self, prompt: Any, settings: Settings, asked: Mapping[str, Any], corrupts: bool = True) -> Prompt:
        """A prompt with what it is compared with."""
        subject, counterfactual, first = asked["subject"], asked["counterfactual"], settings.first_target_token
        if corrupts and subject is None and counterfactual is None:
            raise PromptError(
                "neither subject nor counterfactual is given: name the subject, whose embeddings get noise, or a "
                "counterfactual prompt of as many tokens"
            )
        vocabulary = self._anatomy.vocabulary
        encoded = self.encode(prompt, subject, asked["target"], first_target_token=first)
        if counterfactual is not None:
            encoded = with_counterfactual(self.tokenizer, encoded, counterfactual, vocabulary)
        if asked["foil"] is not None:
            encoded = with_foil(self.tokenizer, encoded, asked["foil"], vocabulary, first)
        return encoded

    @takes(ManyOptions)
    def trace_many(
        self,
        facts: Iterable[Fact | Mapping[str, Any]],
        **options: Unpack[ManyOptions],
    ) -> Iterator[Record]:
        """Causal traces of many prompts, several in one forward pass, yielded as they finish.

        Prompts are packed without padding, so their lengths, subjects and targets may differ. Grids equal those of
        `trace` up to the rounding of other matrix shapes, whatever the budget and the order.

        Args:
            facts: prompts with subjects and expected answers, of which the first token is scored; also mappings with
                the keys prompt, subject, and if there are id and target.
            streams: see `trace`, as all that is not named here.
            window: see `trace`.
            noise: a standard deviation, or "s3" for 3 x that of the embedding outputs of all facts' subjects together.
            noise_subjects: subjects to measure for "s3" in place of the facts' own.
            samples: see `trace`.
            seed: see `trace`; every prompt gets a generator of its own.
            direction: see `trace`.
            engine: see `trace`; those that cannot share a pass take one prompt after the other.
            budget: largest number of tokens in a pack, or "auto": from free memory, on a CPU what suits its caches. A
                prompt that needs more takes several passes. When memory runs out, the budget is halved.
            require_correct: skip facts that the model does not know: whose clean top token is not the first token of
                the expected answer, as that is tokenized behind the prompt. A fact without answer is not known.
            strict: raise at the first fact that cannot be traced, instead of a record that says why it was skipped.
            compat: "rome" tells what is known as the code published with Meng et al. (2022) does: the clean top token
                and the whole answer are the same text, space around them aside; that token is then scored. The rule
                is in the results' metadata as "target_rule".

        Yields:
            A record of every fact, with its result or the reason why there is none.

        Raises:
            PromptError: no facts, malformed ones, or, if strict, one that cannot be traced.
            PlanError, ModelError, EngineError: see `trace`.
            NumericsError: inf or NaN, if strict.
        """
        settings = Settings(first_target_token=True, **options)
        study, encoded, refused = self.study_of(read_facts(facts, strict=settings.strict), settings)
        return study.trace_all(encoded, refused)

    @takes(ManyOptions)
    def run(
        self,
        facts: Any,
        folder: str | os.PathLike[str],
        *,
        shard: str = "facts",
        progress: "Callable[[Told], None] | None" = None,
        **options: Unpack[ManyOptions],
    ) -> "Outcome":
        """Traces a set of facts into a folder; what is there already is not computed again.

        Processes that `accelerate launch` or `torchrun` started share the work, as do several starts on one folder.

        Args:
            facts: what `read_facts` takes, or gives; the same in every process.
            folder: of the store, made when missing; all processes see it.
            shard: "facts" deals packs of prompts to processes; "cells" lets all of them work on one prompt after the
                other, each on a part of its cells.
            progress: called in the first process after each pack, with how far the run is.
            options: see `trace_many`.

        Returns:
            The counts, and the store as `Store.read` gives it.

        Raises:
            StoreError: the folder cannot be written to, or holds another run; it lists what differs.
            PromptError: no facts, malformed ones, other facts in another process, or see `trace_many`.
            PlanError: an unknown shard, processes that would run different things, or see `trace_many`, as for other
                errors.
        """
        from fasttrace.runs.run import run

        Settings(**options)  # what is wrong with them is said before a file is read
        function("progress", progress)
        found = read_facts(facts, strict=options.get("strict", False))
        return run(self, found, folder, shard=shard, progress=progress, **options)

    def study_of(self, facts: FactSet, settings: Settings) -> tuple[Study, list[Encoded], list[Record]]:
        """A study, its facts as tokens, and those that cannot be.

        Raises:
            PromptError: `settings.require_correct` and no answers, or, if strict, a fact that cannot be traced.
            PlanError, ModelError, EngineError: see `trace`.
        """
        if settings.require_correct:
            check_answers(facts)
        windows = self.windows(settings.streams, settings.width())
        tokens_allowed(self._anatomy, settings.budget)
        encoded, refused = encoded_facts(facts.facts, self._encode_fact, settings.strict)
        check_samples(self._anatomy, settings.samples, windows, [each.prompt for each in encoded])
        study = self._study(settings, windows, facts.subjects)
        return replace(study, about={**study.about, "target_rule": study.target_rule}), encoded, refused

    def _encode_fact(self, fact: Fact) -> Prompt:
        where = {} if fact.subject_start is None else {"subject_start": fact.subject_start}
        prompt = self.encode(fact.prompt, fact.subject, fact.target, first_target_token=True, tell=False, **where)
        return replace(prompt, notes=(*fact.notes, *prompt.notes)) if fact.notes else prompt

    def encode(
        self,
        prompt: Any,
        subject: Any,
        target: Any = None,
        *,
        subject_start: int | None = None,
        first_target_token: bool = False,
        tell: bool = True,
    ) -> Prompt:
        """A prompt, its subject and its target as tokens of this model; see `trace` and `prompts.encode`.

        Raises:
            PromptError: one of them cannot be used; it shows the tokens.
        """
        anatomy = self._anatomy
        return encode(
            self.tokenizer,
            prompt,
            subject,
            target,
            vocabulary=anatomy.vocabulary,
            max_positions=anatomy.max_positions,
            subject_start=subject_start,
            first_target_token=first_target_token,
            tell=tell,
        )

    def windows(self, streams: Sequence[str] | None, window: int) -> dict[str, int]:
        """Blocks restored together by stream; None for the streams of the figure that the model has.

        Raises:
            PlanError: unknown streams, or a window below 1.
            ModelError: the model does not have a stream.
        """
        windows = windows_of(self.streams if streams is None else streams, window)
        for site in windows:
            self._anatomy.modules_at(site)
        return windows

    def _study(self, settings: Settings, windows: Mapping[str, int], subjects: Sequence[Any] | None) -> Study:
        """The settings bound to the model: with its engine, and the noise measured on subjects if they name none.

        Subjects are None where there is no noise.

        Raises:
            PlanError: subjects that the noise cannot be measured on, or noise beyond the model's dtype.
            EngineError: an unknown engine, or none that passes the self-check.
        """
        noise = 0.0 if subjects is None else settings.noise
        subjects = settings.noise_subjects or subjects or ()
        ids = subjects_of(self.tokenizer, subjects, self._anatomy.vocabulary) if isinstance(noise, str) else []
        if not isinstance(noise, str):
            _check_sigma(noise, noise, self.dtype)
        choice = self.choose_engine(settings.engine)  # before the noise is measured: the model may have moved
        sigma = sigma_of(noise, self._anatomy.embedding, ids, self.device)
        _check_sigma(noise, sigma, self.dtype)
        about = {"model": self.name, "revision": self.revision, "fuse": self.fuse}
        about |= described(self.model.config, self.dtype)
        about |= {"trust_remote_code": True} if self.trust_remote_code else {}
        budget = Budget(tokens_allowed(self._anatomy, settings.budget))
        return Study(self._anatomy, self.tokenizer, settings, windows, sigma, choice, self.fuse, budget, about)


def _check_sigma(noise: float | str, sigma: float, dtype: torch.dtype) -> None:
    """Raises where drawn noise, or its square in a norm, would not be finite in the model's dtype."""
    squared_in = torch.promote_types(dtype, torch.float32)
    most = min(torch.finfo(dtype).max, torch.finfo(squared_in).max ** 0.5) / LARGEST_DRAW
    if not sigma <= most:
        measured = f", of the rule {noise!r}," if isinstance(noise, str) else ""
        raise PlanError(
            f"noise has standard deviation {sigma:g}{measured} and {dtype} holds noise of up to {most:.3g}: give less"
        )


def _name_of(given: str | None, own: str) -> str:
    return given if given and not os.path.isabs(given) else shown_name(given or own)
