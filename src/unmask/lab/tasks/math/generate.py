"""Generates text in batches of prompts of similar length, padded on the left. Decoding is greedy by default."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

from unmask.errors import ConfigError
from unmask.lab.models import quiet
from unmask.lab.tasks.math.prompts import pad

Finish = Literal["end", "stop", "length"]
_TAIL = 16  # A text to stop at is looked for in so many last tokens. The longest of them has fewer.


@dataclass(frozen=True)
class GenerationSettings:
    """The settings of generation.

    Attributes:
        max_new_tokens: The number of tokens to write per prompt, at most.
        batch_size: The number of prompts per batch.
        temperature: The temperature of sampling; 0 means greedy decoding.
        top_p: The share of the probability that is sampled from. It has an effect only with a temperature.
        num_beams: The number of beams of beam search; 1 means none.
        seed: The seed of sampling.
        stop: The texts at which a row is cut, and finished except in beam search.

    Raises:
        ConfigError: A value cannot work.
    """

    max_new_tokens: int = 256
    batch_size: int = 16
    temperature: float = 0.0
    top_p: float = 1.0
    num_beams: int = 1
    seed: int = 0
    stop: tuple[str, ...] = ("### Instruction", "### Response")

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "batch_size", "num_beams"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} = {getattr(self, name)}; it must be 1 or more.")
        if self.temperature < 0 or not 0 < self.top_p <= 1:
            raise ConfigError(
                f"temperature = {self.temperature}, top_p = {self.top_p}; a temperature is 0 (greedy) or more, top_p above 0 and "
                "at most 1."
            )


@dataclass(frozen=True)
class Generated:
    """The text that a model wrote after one prompt.

    Attributes:
        text: The text up to a text to stop at, without special tokens.
        tokens: The number of tokens that were written, the end token included.
        finish: The reason why the text ends: ``"end"`` (the model's end token), ``"stop"`` (a text to stop at) or ``"length"``
            (``max_new_tokens``).
    """

    text: str
    tokens: int
    finish: Finish


def plan_batches(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Sorts rows into batches, the longest prompts first. Little is padded then, and a lack of memory shows at once.

    Example:
        >>> plan_batches([5, 9, 7, 5], 2)
        [[1, 2], [0, 3]]
    """
    order = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
    return [order[low : low + batch_size] for low in range(0, len(order), batch_size)]


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    settings: GenerationSettings,
) -> Iterator[tuple[list[int], list[Generated]]]:
    """Generates a text for each prompt with a causal LM, in batches. Prompts are token ids, special tokens included.

    In greedy decoding, a prompt's text depends on its batch only through rounding: sums over a padded batch are rounded
    differently, which can change the choice between two tokens of nearly equal probability. With equal prompts, batch size,
    dtype and machine it is reproducible. Sampling is seeded per batch, from the seed and the batch's prompts.

    Yields:
        The batch's rows in ``prompts``, and the text of each.

    Raises:
        ConfigError: A prompt and ``max_new_tokens`` exceed the positions that the model has.
    """
    unwrap: Any = getattr(model, "get_base_model", None)  # peft wraps a model with a LoRA
    inner: Any = unwrap() if unwrap else model
    limit, longest = getattr(inner.config, "max_position_embeddings", None), max(map(len, prompts), default=0)
    if limit and longest + settings.max_new_tokens > limit:
        raise ConfigError(
            f"a prompt of {longest} tokens and max_new_tokens = {settings.max_new_tokens} exceed the {limit} positions of the "
            f"model; lower max_new_tokens to {max(1, limit - longest)} or less."
        )
    ends = getattr(inner.generation_config, "eos_token_id", None)
    known = [*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id]
    pad_id: Any = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    if pad_id is None:
        raise ConfigError("the tokenizer has neither a padding nor an end token; give it one (tokenizer.pad_token).")
    sampling, devices = settings.temperature > 0, [inner.device] if inner.device.type == "cuda" else []
    config = GenerationConfig(
        max_new_tokens=settings.max_new_tokens,
        do_sample=sampling,
        num_beams=settings.num_beams,
        eos_token_id=sorted({end for end in known if end is not None}),
        pad_token_id=int(pad_id),
        **({"temperature": settings.temperature, "top_p": settings.top_p, "top_k": 0} if sampling else {}),
    )
    stops = settings.stop if settings.num_beams == 1 else ()
    for rows in plan_batches([len(prompt) for prompt in prompts], settings.batch_size):
        batch = [list(prompts[row]) for row in rows]
        ids = pad(batch, config.pad_token_id, left=True).to(inner.device)
        mask = pad([[1] * len(prompt) for prompt in batch], 0, left=True).to(inner.device)
        criteria = StoppingCriteriaList([_StopAt(tokenizer, stops, ids.shape[1])] if stops else [])
        training, own = inner.training, inner.generation_config  # its own settings (a repetition penalty) are set aside
        inner.eval()
        inner.generation_config = config
        try:
            # inference_mode is not possible, because the model may have a live selection.
            with torch.no_grad(), quiet(), torch.random.fork_rng(devices, enabled=sampling):
                if sampling:
                    seed = hashlib.sha256(f"{settings.seed} {batch}".encode()).digest()[:7]
                    torch.manual_seed(int.from_bytes(seed, "big"))
                written = inner.generate(
                    input_ids=ids, attention_mask=mask, generation_config=config, stopping_criteria=criteria
                )
        finally:
            inner.generation_config = own
            inner.train(training)
        yield rows, [_generated(tokenizer, row, settings, config) for row in written[:, ids.shape[1] :].tolist()]


class _StopAt(StoppingCriteria):
    """Finishes a row when its text contains one of the texts to stop at."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], width: int) -> None:
        self._tokenizer, self._texts, self._width = tokenizer, texts, width

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        tails = self._tokenizer.batch_decode(input_ids[:, self._width :][:, -_TAIL:], skip_special_tokens=True)
        found = [any(text in tail for text in self._texts) for tail in tails]
        return torch.tensor(found, device=input_ids.device)


def _generated(
    tokenizer: PreTrainedTokenizerBase, ids: list[int], settings: GenerationSettings, config: GenerationConfig
) -> Generated:
    """Decodes a row up to its first end token, or up to the padding behind a text to stop at."""
    end = next((at for at, token in enumerate(ids) if token in config.eos_token_id), None)
    kept = ids if end is None else ids[: end + 1]
    text = str(tokenizer.decode(kept, skip_special_tokens=True))
    stops = [at for stop in settings.stop if (at := text.find(stop)) >= 0]
    if not stops:
        return Generated(text, len(kept), "length" if end is None else "end")
    while len(kept) > 1 and kept[-1] == config.pad_token_id:
        kept = kept[:-1]
    return Generated(text[: min(stops)], len(kept), "stop")
