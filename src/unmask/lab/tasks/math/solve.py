"""Solves word problems by generation, and keeps every output on disk, so that a killed run can be continued."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from unmask.errors import ConfigError, DataError
from unmask.files import write_json
from unmask.lab.tasks.math.answers import RULES, Rule, extract, is_right
from unmask.lab.tasks.math.generate import GenerationSettings, generate
from unmask.lab.tasks.math.outputs import OutputFile, claim
from unmask.lab.tasks.math.problems import TEST_SETS, Problem, load_problems
from unmask.lab.tasks.math.prompts import Prompter
from unmask.reading import fields, plain, read_json, refusing, text

SCORES = "scores.json"


@dataclass(frozen=True)
class SolveSettings:
    """The test sets to solve, and the settings that decide how.

    Attributes:
        sets: The names of the test sets.
        data_dir: The folder of the sets; None for the hub (which has gsm8k only).
        prompt: The prompt: ``"alpaca"``, ``"chat"``, or the path of a template.
        limit: The number of problems of each set to solve; None for all.
        rule: The rule by which answers are read (see `unmask.lab.tasks.math.answers`).
        generation: The settings of generation.

    Raises:
        ConfigError: A set or the rule is unknown, or the limit is below 1.
    """

    sets: tuple[str, ...]
    data_dir: str | None = None
    prompt: str = "alpaca"
    limit: int | None = None
    rule: Rule = "marked"
    generation: GenerationSettings = field(default_factory=GenerationSettings)

    def __post_init__(self) -> None:
        unknown = [name for name in self.sets if name not in TEST_SETS]
        if unknown or not self.sets:
            raise ConfigError(f"test sets {', '.join(unknown) or '(none)'}: they must be of {', '.join(TEST_SETS)}.")
        if self.rule not in RULES:
            raise ConfigError(f"rule = {self.rule!r}; it must be one of {', '.join(RULES)}.")
        if self.limit is not None and self.limit < 1:
            raise ConfigError(f"limit = {self.limit}; it must be 1 or more, or none for all problems.")

    def identity(self, **model: Any) -> dict[str, Any]:
        """Returns the settings that decide the outputs, as JSON values.

        The batch size is not one of them, because it changes the outputs by rounding only.
        """
        generation = asdict(self.generation) | {"stop": list(self.generation.stop)}
        del generation["batch_size"]
        return {**model, "prompt": self.prompt, "generation": generation}


@dataclass(frozen=True)
class Solved:
    """The outcome on one test set: the numbers of problems, right answers, outputs without an answer, and cut outputs."""

    name: str
    count: int
    right: int
    unanswered: int
    cut: int

    @property
    def accuracy(self) -> float:
        """The share of right answers. An output without an answer is wrong."""
        return self.right / self.count

    def metrics(self) -> dict[str, float]:
        """Returns the accuracy, and the shares of outputs without an answer and of those cut at ``max_new_tokens``."""
        return {"accuracy": self.accuracy, "unanswered": self.unanswered / self.count, "cut": self.cut / self.count}


def solve(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    settings: SolveSettings,
    output: Path,
    identity: Mapping[str, Any],
    *,
    overwrite: bool = False,
    console: Console | None = None,
) -> Iterator[Solved]:
    """Solves test sets one after the other.

    Every output is kept in ``output/SET.jsonl``, and the outcomes in ``scores.json``. Outputs that are in these files already
    are not generated again, so a run that was killed continues where it was. ``identity`` holds the JSON values that tell this
    model from others: outputs of another model are refused, unless ``overwrite`` deletes them. Without a console, the progress
    bar is drawn on standard error.

    Yields:
        The outcome of each set, as soon as it is solved.

    Raises:
        ConfigError: The folder holds outputs of another model or of other settings.
        DataError: A test set cannot be read.
    """
    prompter = Prompter(tokenizer, settings.prompt)
    problems = {name: load_problems(name, "test", settings.data_dir)[: settings.limit] for name in settings.sets}
    files = [*(f"{name}.jsonl" for name in TEST_SETS), SCORES]
    claim(output, settings.identity(**identity), files, overwrite)
    path = output / SCORES
    for name, wanted in problems.items():
        solved = _solve_set(model, prompter, name, wanted, settings, OutputFile(output / f"{name}.jsonl"), console)
        with refusing(DataError, repr(str(path)), "Delete it, or give another --output."):
            scores = fields({})(read_json(path), "the scores") if path.is_file() else {}
        write_json(path, {**scores, name: {**asdict(solved), "accuracy": solved.accuracy}}, indent=2)
        yield solved


_WRITTEN = fields({**dict.fromkeys(("prompt", "generated", "finish", "kind"), text), "gold": plain})


def _solve_set(
    model: PreTrainedModel,
    prompter: Prompter,
    name: str,
    problems: Sequence[Problem],
    settings: SolveSettings,
    file: OutputFile,
    console: Console | None,
) -> Solved:
    prompts = [hashlib.sha256(prompter.text(problem).encode()).hexdigest()[:16] for problem in problems]
    with refusing(DataError, repr(str(file.path)), "Delete the file, or give another --output."):
        held = {number: _WRITTEN(row, f"row {number}") for number, row in file.read().items()}
    rows = {number: _scored(row, settings.rule) for number, row in held.items()}
    for number, prompt in enumerate(prompts):
        if number in rows and rows[number].get("prompt") != prompt:
            raise ConfigError(
                f"{str(file.path)!r} holds an output for another prompt in row {number}: the data or the template have "
                "changed; give another --output, or --overwrite."
            )
    todo = [number for number in range(len(problems)) if number not in rows]
    ids = [prompter.prompt_ids(problems[number]) for number in todo]
    columns = (
        TextColumn(name),
        BarColumn(bar_width=28),
        MofNCompleteColumn(),
        TextColumn("right {task.fields[right]}"),
    )
    with Progress(*columns, TimeRemainingColumn(), console=console or Console(stderr=True)) as bar:
        shown = bar.add_task(name, total=len(problems), right="-")

        def show() -> None:
            done = [rows[number]["right"] for number in range(len(problems)) if number in rows]
            bar.update(shown, completed=len(done), right=f"{sum(done) / len(done):.1%}" if done else "-")

        show()
        for places, written in generate(model, prompter.tokenizer, ids, settings.generation):
            batch = []
            for number, generated in zip((todo[place] for place in places), written, strict=True):
                problem = problems[number]
                row = {
                    "id": f"{name}-{number}",
                    "row": number,
                    "prompt": prompts[number],
                    "question": problem.question,
                    "generated": generated.text,
                    "tokens": generated.tokens,
                    "finish": generated.finish,
                    "gold": problem.answer,
                    "kind": problem.kind,
                }
                batch.append(_scored(row, settings.rule))
            rows |= {row["row"]: row for row in file.append(batch)}
            show()
    file.rewrite(rows)  # in order, and with the answers as they are read now
    final = [rows[number] for number in range(len(problems))]
    return Solved(
        name,
        len(final),
        right=sum(row["right"] for row in final),
        unanswered=sum(row["extracted"] is None for row in final),
        cut=sum(row["finish"] == "length" for row in final),
    )


def _scored(row: Mapping[str, Any], rule: Rule) -> dict[str, Any]:
    """Reads a row's answer again: generating a text is expensive, but reading it is not."""
    extracted = extract(row["generated"], row["kind"], rule)
    return {**row, "extracted": extracted, "right": is_right(extracted, row["gold"], row["kind"])}
