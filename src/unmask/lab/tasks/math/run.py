"""The kind of task of arithmetic word problems: trained as prompt and completion, scored by what the model generates."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset
from transformers import EvalPrediction, PreTrainedModel, PreTrainedTokenizerBase, Trainer

from unmask.delta.fingerprint import digest
from unmask.distributed.processes import is_main
from unmask.errors import ConfigError, DataError
from unmask.lab.models import longest_input
from unmask.lab.tasks.math.generate import GenerationSettings
from unmask.lab.tasks.math.outputs import is_of
from unmask.lab.tasks.math.problems import TEST_SETS, ArithmeticData, load_arithmetic, load_problems, seen_in_training
from unmask.lab.tasks.math.prompts import IGNORED, Completions, PadRight, Prompter
from unmask.lab.tasks.math.solve import SolveSettings, solve
from unmask.lab.tasks.protocol import Kind, Request, Scored, Source, Stage
from unmask.lab.tasks.split import evaluate_splits

SOLVED = "solved"
"""The folder in a run's folder that holds the outputs of each problem."""
_SOLVE_OPTIONS = ("prompt", "rule")
_GENERATION_OPTIONS = tuple(f.name for f in fields(GenerationSettings) if f.name not in ("batch_size", "stop"))


def token_accuracy(guesses: Any, labels: Any) -> float:
    """Computes the share of the completions' tokens that the model finds most likely, given the tokens before them.

    Args:
        guesses: The guesses, int of shape (rows, length): place t has the guess for the token at t + 1.
        labels: The tokens, of the same shape; `IGNORED` where nothing is to be guessed.

    Example:
        >>> token_accuracy(np.array([[7, 8, 9]]), np.array([[-100, 7, 5]]))
        0.5
    """
    wanted, guessed = np.asarray(labels)[:, 1:], np.asarray(guesses)[:, :-1]
    return float((guessed == wanted)[wanted != IGNORED].mean())


@dataclass(frozen=True)
class GenerationPrepared:
    """A `Prepared` of completions. Their loss is computed along the run, and the test sets are solved after it."""

    source: Source
    tokenizer: PreTrainedTokenizerBase
    max_length: int
    train_set: Completions
    step_sets: Mapping[str, Dataset]
    collate: PadRight
    notes: tuple[str, ...]
    main_metric: str
    greater_is_better: bool
    step_metric: str = "token_accuracy"

    def reduce_logits(self, logits: Any, labels: Any) -> Tensor:
        """Reduces logits to the most likely token at each place, int64 of shape (rows, length)."""
        scores: Tensor = logits[0] if isinstance(logits, tuple) else logits
        return scores.argmax(-1)

    def step_metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        return {"token_accuracy": token_accuracy(prediction.predictions, prediction.label_ids)}

    def evaluate(self, trainer: Trainer, stage: Stage) -> dict[str, float]:
        """Computes loss and token accuracy on the held-out problems, and solves the test sets after training.

        The test sets give the accuracy on each of them, and the mean over the sets.
        """

        def scored(_: str, guesses: Any, labels: Any) -> Mapping[str, float]:
            return {"token_accuracy": token_accuracy(guesses, labels)}

        metrics = evaluate_splits(trainer, self.step_sets, scored, ("token_accuracy",), stage)
        if stage == "before" or not self.source.test_sets or not is_main():  # one process writes the outputs
            return metrics
        parameters: list[Tensor] = [p for group in trainer.optimizer.param_groups for p in group["params"]]  # type: ignore[union-attr]
        trained = hashlib.sha256(" ".join(digest(p.detach()) for p in parameters).encode()).hexdigest()
        folder, settings = Path(self.source.output) / SOLVED, _settings(self.source)
        identity = {"model": self.source.model, "trained": trained}
        fresh = not is_of(folder, settings.identity(**identity))  # an earlier run may have left outputs in the folder
        solved = list(solve(trainer.model, self.tokenizer, settings, folder, identity, overwrite=fresh))  # type: ignore[arg-type]
        metrics |= {f"{one.name}_{key}": value for one in solved for key, value in one.metrics().items()}
        return metrics | {"accuracy": fmean(one.accuracy for one in solved)}

    def describe(self) -> dict[str, Any]:
        return {
            "kind": "generation",
            "name": self.source.task,
            "prompt": self.source.prompt,
            "max_length": self.max_length,
            "max_new_tokens": self.source.max_new_tokens,
        }


@dataclass(frozen=True)
class GenerationTask:
    """A `Task` of word problems: data to train on, or a request for sets to solve."""

    name: str
    data: ArithmeticData | None = None
    request: Request | None = None
    notes: tuple[str, ...] = ()
    num_labels: None = None
    label_names: None = None

    def prepare(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, source: Source) -> GenerationPrepared:
        assert self.data is not None, "the task comes from `load`"
        length, prompter = longest_input(model, tokenizer, source.max_length), Prompter(tokenizer, source.prompt)
        train = Completions(self.data.train, prompter, length, source.train_on_prompt)
        held_out = Completions(self.data.held_out, prompter, length)
        notes = []
        if train.dropped:
            notes.append(f"{train.dropped:,} problems are left out: their prompts alone have {length} tokens or more.")
        if train.cut:
            notes.append(f"{train.cut:,} of {len(train):,} solutions are cut at {length} tokens (max_length).")
        for name in TEST_SETS if source.data_dir else ():
            try:
                test = load_problems(name, "test", source.data_dir)
            except DataError:
                continue
            seen = seen_in_training([*self.data.train, *self.data.held_out], test)  # published Math10K holds some
            if seen:
                notes.append(
                    f"{seen:,} of {len(test):,} questions of {name} are in the training data: its score is too good."
                )
        collate = PadRight(int(tokenizer.pad_token_id))  # type: ignore[arg-type]  # `load_base` sets it
        return GenerationPrepared(
            source,
            tokenizer,
            length,
            train,
            step_sets={"": held_out},
            collate=collate,
            notes=tuple(notes),
            main_metric="accuracy" if source.test_sets else "loss",
            greater_is_better=bool(source.test_sets),
        )

    def score(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, described: Mapping[str, Any], batch_size: int
    ) -> Iterator[Scored]:
        """Solves the sets that were asked for. If there are several, the mean over them comes last."""
        assert self.request is not None, "the task comes from `reload`"
        settings = _requested(described, self.request, batch_size)
        path, base = self.request.delta, self.request.model
        default = Path("runs") / SOLVED / Path(base).name if path is None else Path(path).parent / SOLVED
        delta = None if path is None else hashlib.sha256(Path(path).read_bytes()).hexdigest()
        output, overwrite = Path(self.request.output or default), self.request.overwrite
        solved = []
        for one in solve(model, tokenizer, settings, output, {"model": base, "delta": delta}, overwrite=overwrite):
            solved.append(one)
            yield Scored(one.name, one.count, one.metrics())
        if len(solved) > 1:
            mean = fmean(one.accuracy for one in solved)  # each set has the same weight
            yield Scored("mean of the sets", sum(one.count for one in solved), {"accuracy": mean})


def load(source: Source) -> GenerationTask:
    """Loads problems to train on. The test sets are looked for now, and not after hours of training."""
    data = load_arithmetic(str(source.task), source.data_dir, held_out=source.held_out, seed=source.seed)
    if source.test_sets:
        for name in _settings(source).sets:
            load_problems(name, "test", source.data_dir)
    return GenerationTask(data.name, data, notes=data.notes)


def reload(described: Mapping[str, Any], request: Request) -> GenerationTask:
    """Chooses the test sets to solve: those of the request (comma-separated), else all six.

    Raises:
        ConfigError: The request has a file instead of sets, an unknown set, or an unknown option.
    """
    if request.data is not None:
        raise ConfigError(
            f"the delta solves word problems; give --task with some of {', '.join(TEST_SETS)}, not --data."
        )
    _requested(described, request, 1)
    return GenerationTask(str(described["name"]), request=request)


def _settings(source: Source) -> SolveSettings:
    generation = GenerationSettings(max_new_tokens=source.max_new_tokens, batch_size=source.test_batch_size)
    return SolveSettings(source.test_sets, source.data_dir, source.prompt, source.test_limit, generation=generation)


def _requested(described: Mapping[str, Any], request: Request, batch_size: int) -> SolveSettings:
    sets = tuple(name.strip() for name in request.task.split(",")) if request.task else TEST_SETS
    trained = {key: described[key] for key in ("prompt", "max_new_tokens") if key in described}
    options = trained | dict(request.options)
    unknown = sorted(set(options) - {*_SOLVE_OPTIONS, *_GENERATION_OPTIONS})
    if unknown:
        raise ConfigError(
            f"unknown setting {unknown[0]!r}; word problems have {', '.join((*_SOLVE_OPTIONS, *_GENERATION_OPTIONS))}."
        )
    generation: dict[str, Any] = {}
    for key in [key for key in _GENERATION_OPTIONS if key in options]:
        value, kind = options.pop(key), type(getattr(GenerationSettings(), key))
        try:
            generation[key] = kind(value)
        except ValueError as error:
            raise ConfigError(f"{key} = {value!r} must be of type {kind.__name__}.") from error
    settings = GenerationSettings(batch_size=batch_size, **generation)
    return SolveSettings(sets, request.data_dir, limit=request.limit, generation=settings, **options)


GENERATION = Kind("generation", load, reload, eval_batches=1)
