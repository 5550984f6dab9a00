"""Encodes tagged sentences for a model of limited length. A long sentence is cut into windows: runs of words that fit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch.utils.data import Dataset
from transformers import BatchEncoding, PreTrainedTokenizerBase

from unmask.errors import ConfigError
from unmask.lab.tasks.tags.spans import score, spans
from unmask.lab.tasks.tags.spec import Sentences

IGNORED = -100
"""The label of tokens that take no part in the loss."""
_PAUSES = frozenset(".,;:!?")


@dataclass(frozen=True)
class Window:
    """A part of a sentence that fits the model: the words ``start`` to ``stop - 1``. All three numbers count from 0."""

    sentence: int
    start: int
    stop: int


def cut(pieces: Sequence[int], limit: int, breaks: Sequence[bool], least: float = 0) -> list[tuple[int, int]]:
    """Cuts a sentence, given the number of each word's pieces, into runs of words that have at most ``limit`` pieces.

    A run ends at the last good place that leaves it ``least`` pieces, or is as long as possible. ``breaks`` is True for each
    word before which a cut is good. A word that is longer than the limit is a run by itself.

    Returns:
        Pairs (first word, one past the last word), without gaps or overlaps.

    Example:
        >>> cut([1, 1, 1, 1, 1, 1], 4, [False, False, True, True, False, False])
        [(0, 3), (3, 6)]
    """
    runs, start = [], 0
    while start < len(pieces):
        stop, total = start, 0
        while stop < len(pieces) and (total + pieces[stop] <= limit or stop == start):
            total += pieces[stop]
            stop += 1
        if stop < len(pieces):
            good = [word for word in range(stop, start, -1) if breaks[word] and sum(pieces[start:word]) >= least]
            stop = good[0] if good else stop
        runs.append((start, stop))
        start = stop
    return runs


class Windows(Dataset):
    """Tagged sentences, tokenized and cut into windows, unpadded. No word is left out.

    A word's label is on its first piece, and its other pieces are ignored. A word of which the tokenizer leaves nothing (such
    as a variation selector) is read as the unknown token.

    The tokenizer must be a fast one. In training, sentences are cut outside entities where possible. Otherwise the tags must not
    influence what the model sees, so sentences are cut after punctuation in the window's second half.

    Attributes:
        windows: The words that each item holds.

    Raises:
        ConfigError: The tokenizer cannot tell which word a piece belongs to, or there is no room for a word.
    """

    def __init__(
        self,
        sentences: Sentences,
        tokenizer: PreTrainedTokenizerBase,
        label_names: Sequence[str],
        max_length: int,
        training: bool,
    ) -> None:
        self.sentences, self._names = sentences, tuple(label_names)
        limit = max_length - tokenizer.num_special_tokens_to_add(pair=False)
        if not tokenizer.is_fast:
            raise ConfigError(
                f"{type(tokenizer).__name__} cannot tell which word a piece is of; tagging needs a model with a fast "
                "tokenizer."
            )
        if limit < 1:
            raise ConfigError(f"max_length = {max_length} leaves no room for a word; raise it.")

        def encode(rows: list[list[str]], **options: Any) -> BatchEncoding:
            return tokenizer(rows, is_split_into_words=True, **options) if rows else BatchEncoding()

        # The words as the tokenizer is to get them, and the number of pieces of each, which is 1 or more.
        words, pieces = [], []
        unknown = tokenizer.unk_token or "?"
        alone = encode(sentences.words, add_special_tokens=False, verbose=False)
        for row, sentence in enumerate(sentences.words):
            counts = Counter(alone.word_ids(row))
            words.append([word if counts[place] else unknown for place, word in enumerate(sentence)])
            pieces.append([counts[place] or 1 for place in range(len(sentence))])
        if training:  # in IOB2, a cut before an I- is inside an entity
            breaks = [[not tag.startswith("I-") for tag in sentence] for sentence in sentences.tags]
        else:
            breaks = [[False, *(word in _PAUSES for word in sentence[:-1])] for sentence in sentences.words]
        self.windows = [
            Window(number, start, stop)
            for number, counts in enumerate(pieces)
            for start, stop in cut(counts, limit, breaks[number], 0 if training else limit / 2)
        ]
        parts = [words[w.sentence][w.start : w.stop] for w in self.windows]
        # Truncation reaches only a word that alone is longer than the limit.
        encoded = encode(parts, truncation=True, max_length=max_length)
        self._inputs = dict(encoded)
        words_of = [encoded.word_ids(row) for row in range(len(parts))]  # the word of each piece
        self._firsts = [
            [i for i, word in enumerate(ids) if word is not None and (i == 0 or ids[i - 1] != word)] for ids in words_of
        ]

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        inputs = {key: values[index] for key, values in self._inputs.items()}
        window = self.windows[index]
        tags = self.sentences.tags[window.sentence][window.start : window.stop]
        labels = [IGNORED] * len(inputs["input_ids"])
        for place, tag in zip(self._firsts[index], tags, strict=True):
            labels[place] = self._names.index(tag)
        return inputs | {"labels": labels}

    def tags_of(self, predictions: Iterable[Sequence[int]]) -> list[list[str]]:
        """Puts the windows' class ids for each token (padding may follow) together to the tags of each sentence's words."""
        tags: list[list[str]] = [[] for _ in range(len(self.sentences))]
        for window, places, ids in zip(self.windows, self._firsts, predictions, strict=True):
            tags[window.sentence] += [self._names[int(ids[place])] for place in places]
        return tags

    def score(self, predictions: Iterable[Sequence[int]]) -> dict[str, float]:
        """Computes the metrics of the sentences (see `unmask.lab.tasks.tags.spans.score`) from such class ids."""
        return score(self.sentences.tags, self.tags_of(predictions))

    def note(self, split: str) -> str | None:
        """Tells the user how many sentences were cut; None if none was."""
        starts = [window for window in self.windows if window.start > 0]
        if not starts:
            return None
        across = sum(
            first < w.start < stop for w in starts for _, first, stop in spans(self.sentences.tags[w.sentence])
        )
        count = len({window.sentence for window in starts})
        return (
            f"{split}: {count:,} of {len(self.sentences):,} sentences are longer than the model's input and are cut into "
            f"{count + len(starts):,} parts, no word left out; {across:,} entities lie across a cut"
        )
