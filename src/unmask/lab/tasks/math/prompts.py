"""Prompts: an instruction laid into a template.

A template is a text with ``{instruction}`` and, mostly, ``{input}`` in a paragraph of its own, which is left out where a problem
has no further input.
"""

from __future__ import annotations

import re
from pathlib import Path

from unmask.errors import ConfigError

CHAT = "chat"  # the tokenizer's own chat template
ALPACA = (
    "The instruction below describes a task. Reply with a response that carries it out.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
"""Sections as in Alpaca and LLM-Adapters; the opening sentence is our own. A file of yours can bring another."""


def load_template(prompt: str) -> str | None:
    """The template that a ``prompt`` setting names: ``"alpaca"``, a file's path, or ``"chat"`` (None: the tokenizer's own).

    Raises:
        ConfigError: Neither, or a file without ``{instruction}``.

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
    """Fills a template.

    Args:
        template: Holds ``{instruction}``, and may hold ``{input}``.
        instruction: The question.
        context: The further input; where the template has no place for one, it follows the instruction.

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
