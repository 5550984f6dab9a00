"""Turns word problems into prompts and token ids, for training and for generation.

A prompt is made from a template: a text with ``{instruction}`` and, in most cases, ``{input}`` in a paragraph by itself, which is
left out if a problem has no further input.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from unmask.errors import ConfigError
from unmask.lab.tasks.math.problems import Problem

IGNORED = -100
"""The label of tokens that carry no loss."""
CHAT = "chat"
"""The name of the tokenizer's own chat template, as a ``prompt`` setting."""
ALPACA = (
    "The instruction below describes a task. Reply with a response that carries it out.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
"""A template with sections as in Alpaca and LLM-Adapters. The opening sentence is our own; a file of yours can bring another."""


def load_template(prompt: str) -> str | None:
    """Loads the template that a ``prompt`` setting names; None for ``"chat"``, which is the tokenizer's own.

    Raises:
        ConfigError: There is no such file, or the file has no ``{instruction}``.

    Example:
        >>> load_template("alpaca") == ALPACA
        True
    """
    if prompt == CHAT:
        return None
    if prompt == "alpaca":
        return ALPACA
    path = Path(prompt)
    if not path.is_file():
        raise ConfigError(f"prompt = {prompt!r}; it must be alpaca, chat, or a text file with {{instruction}} in it.")
    template = path.read_text(encoding="utf-8")
    if "{instruction}" not in template:
        raise ConfigError(f"the prompt template {prompt!r} does not hold {{instruction}}.")
    return template


def render(template: str, instruction: str, context: str = "") -> str:
    """Fills a template's ``{instruction}`` and ``{input}``. Without ``{input}``, the context follows the instruction.

    Example:
        >>> render("Q: {instruction}\\n\\nGiven: {input}\\n\\nA:", "What is x?")
        'Q: What is x?\\n\\nA:'
        >>> render("Q: {instruction}\\nA:", "What is x?", "x = 2")
        'Q: What is x?\\nx = 2\\nA:'
    """
    if "{input}" not in template:
        instruction = f"{instruction}\n{context}" if context else instruction
    elif not context:
        template = "\n\n".join(paragraph for paragraph in template.split("\n\n") if "{input}" not in paragraph)
    parts = {"{instruction}": instruction, "{input}": context}
    return re.sub(r"\{instruction\}|\{input\}", lambda match: parts[match[0]], template)


class Prompter:
    """Turns problems into a tokenizer's ids, the same way for training and for generation.

    A chat template brings its own special tokens, and nothing is added to it. To any other prompt the tokenizer's begin token
    is added once, if the tokenizer adds it by itself. It is not added if it is a mark of the tokenizer's chat template, as in
    some converted tokenizers. An end token is never added to a prompt. A completion ends in the tokenizer's end token.

    Raises:
        ConfigError: There is no such template, the tokenizer has no end token, or ``"chat"`` is given for a tokenizer without
            a chat template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt: str = "alpaca") -> None:
        self.tokenizer = tokenizer
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
        """Returns the prompt as text."""
        if self._template is not None:
            return render(self._template, problem.question, problem.context)
        said = "\n".join(part for part in (problem.question, problem.context) if part)
        messages = [{"role": "user", "content": said}]
        return str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))

    def prompt_ids(self, problem: Problem) -> list[int]:
        """Returns the prompt as ids, with the special tokens that belong before it."""
        text, begin = self.text(problem), self.tokenizer.bos_token
        ids = list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        brings_its_own = self._template is None or begin is None or text.startswith(begin)
        return ids if brings_its_own else [*self._adds, *ids]

    def completion_ids(self, solution: str) -> list[int]:
        """Returns a solution as ids, with the end token."""
        end: Any = self.tokenizer.eos_token_id
        return [*self.tokenizer(solution, add_special_tokens=False)["input_ids"], end]


class Completions(Dataset):
    """Prompts with their completions: ``input_ids``, ``attention_mask``, and ``labels``, unpadded.

    The labels ignore the prompt, unless ``train_on_prompt`` is True.

    Attributes:
        cut: The number of completions that were cut, so that they teach no end.
        dropped: The number of problems that were left out because their prompt left no room for a completion.

    Raises:
        ConfigError: No prompt leaves room for a completion.
    """

    def __init__(
        self, problems: Sequence[Problem], prompter: Prompter, max_length: int, train_on_prompt: bool = False
    ) -> None:
        self._rows: list[tuple[list[int], list[int]]] = []
        self.cut = 0
        for problem in problems:
            prompt, completion = prompter.prompt_ids(problem), prompter.completion_ids(problem.solution)
            if len(prompt) >= max_length:
                continue
            self.cut += len(prompt) + len(completion) > max_length
            ids = (prompt + completion)[:max_length]
            self._rows.append((ids, ids if train_on_prompt else [IGNORED] * len(prompt) + ids[len(prompt) :]))
        if not self._rows:
            raise ConfigError(f"every prompt has {max_length} tokens or more; raise max_length.")
        self.dropped = len(problems) - len(self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        ids, labels = self._rows[index]
        return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}


def pad(rows: Sequence[Sequence[int]], value: int, left: bool = False) -> torch.Tensor:
    """Pads lists of ids to one int64 tensor of shape (rows, longest row).

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
    """A function that makes a batch of the rows of `Completions`, padded on the right with the token ``pad_id``."""

    pad_id: int

    def __call__(self, rows: Sequence[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        fills = {"input_ids": self.pad_id, "attention_mask": 0, "labels": IGNORED}
        return {key: pad([row[key] for row in rows], fill) for key, fill in fills.items()}
