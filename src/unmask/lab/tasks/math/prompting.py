"""From problems to token ids: prompts for a model, and prompt-completion pairs of which only the completion is trained on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from unmask.errors import ConfigError
from unmask.lab.tasks.math.problems import Problem
from unmask.lab.tasks.math.prompts import load_template, render

IGNORED = -100  # the label of tokens that carry no loss


class Prompter:
    """Turns problems into a tokenizer's ids, the same way for training and for generation.

    Special tokens: a chat template brings its own, and nothing is added to it. To any other prompt the tokenizer adds what it
    adds at the start of a text, once; never an end token, and no begin token that is a mark of its chat template (some
    converted tokenizers have one). A completion ends in the tokenizer's end token.

    Args:
        tokenizer: The model's.
        prompt: ``"alpaca"``, ``"chat"``, or the path of a template.

    Raises:
        ConfigError: No such template, a tokenizer without an end token, or ``"chat"`` for one without a chat template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt: str = "alpaca") -> None:
        self.tokenizer, self.prompt = tokenizer, prompt
        self._template = load_template(prompt)
        if self._template is None and not tokenizer.chat_template:
            raise ConfigError("the tokenizer has no chat template; take prompt = alpaca, or a template file.")
        if tokenizer.eos_token_id is None:
            raise ConfigError("the tokenizer has no end token (eos_token), so a model could not learn where to stop.")
        begin: Any = tokenizer.bos_token_id
        adds = begin is not None and list(tokenizer("a")["input_ids"])[:1] == [begin]
        a_mark = adds and str(tokenizer.bos_token) in str(tokenizer.chat_template or "")
        self._adds = [begin] if adds and not a_mark else []

    def text(self, problem: Problem) -> str:
        """The prompt as text."""
        if self._template is not None:
            return render(self._template, problem.question, problem.context)
        said = "\n".join(part for part in (problem.question, problem.context) if part)
        messages = [{"role": "user", "content": said}]
        return str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))

    def prompt_ids(self, problem: Problem) -> list[int]:
        """The prompt as ids, with the special tokens that belong before it."""
        text = self.text(problem)
        ids = list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        return ids if self._template is None else [*self._begin(text), *ids]

    def completion_ids(self, solution: str) -> list[int]:
        """A solution as ids, with the end token."""
        end: Any = self.tokenizer.eos_token_id
        return [*self.tokenizer(solution, add_special_tokens=False)["input_ids"], end]

    def _begin(self, text: str) -> list[int]:
        """What the tokenizer puts before a text by itself, if the text does not bring it."""
        begin = self.tokenizer.bos_token
        return [] if begin is None or text.startswith(begin) else self._adds


@dataclass(frozen=True)
class Fitted:
    """How problems fit into a length.

    Attributes:
        cut: How many completions were cut, so that they teach no end.
        dropped: How many problems were left out because their prompt left no room for a completion.
    """

    cut: int
    dropped: int


class Completions(Dataset):
    """Prompts with their completions: ``input_ids``, ``attention_mask``, and ``labels`` that ignore the prompt, unpadded.

    Args:
        problems: With solutions.
        prompter: Makes the ids.
        max_length: Longest input in tokens.
        train_on_prompt: Let the prompt carry loss too.

    Raises:
        ConfigError: No prompt leaves room for a completion.

    Attributes:
        fitted: What `max_length` cost.
    """

    def __init__(
        self, problems: Sequence[Problem], prompter: Prompter, max_length: int, train_on_prompt: bool = False
    ) -> None:
        rows, cut = [], 0
        for problem in problems:
            prompt, completion = prompter.prompt_ids(problem), prompter.completion_ids(problem.solution)
            if len(prompt) >= max_length:
                continue
            cut += len(prompt) + len(completion) > max_length
            ids = (prompt + completion)[:max_length]
            rows.append((ids, ids if train_on_prompt else [IGNORED] * len(prompt) + ids[len(prompt) :]))
        if not rows:
            raise ConfigError(f"every prompt has {max_length} tokens or more; raise max_length.")
        self._rows, self.fitted = rows, Fitted(cut, len(problems) - len(rows))

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        ids, labels = self._rows[index]
        return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}


def pad(rows: Sequence[Sequence[int]], value: int, left: bool = False) -> torch.Tensor:
    """Lists of ids as one int64 tensor of shape (rows, longest row).

    Example:
        >>> pad([[1, 2], [3]], 0, left=True)
        tensor([[1, 2],
                [0, 3]])
    """
    longest = max(len(row) for row in rows)
    fill = [[value] * (longest - len(row)) for row in rows]
    return torch.tensor([[*f, *r] if left else [*r, *f] for f, r in zip(fill, rows, strict=True)], dtype=torch.int64)


@dataclass(frozen=True)
class PadRight:
    """Makes a batch of `Completions`' rows.

    Attributes:
        pad_id: The padding token.
    """

    pad_id: int

    def __call__(self, rows: Sequence[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        fills = {"input_ids": self.pad_id, "attention_mask": 0, "labels": IGNORED}
        return {key: pad([row[key] for row in rows], fill) for key, fill in fills.items()}
