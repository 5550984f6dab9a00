"""Sentences as inputs of a model of limited length: word pieces, labels on first pieces, windows of long sentences."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch.utils.data import Dataset
from transformers import BatchEncoding, PreTrainedTokenizerBase

from unmask.errors import ConfigError
from unmask.lab.tasks.tags.spans import spans
from unmask.lab.tasks.tags.tagged import Sentences

IGNORED = -100  # the label of what takes no part in the loss
_PAUSES = frozenset(".,;:!?")


@dataclass(frozen=True)
class Window:
    """A part of a sentence that fits the model: its words from ``start`` to before ``stop``."""

    sentence: int
    start: int
    stop: int


def cut(pieces: Sequence[int], limit: int, breaks: Sequence[bool], least: float = 0) -> list[tuple[int, int]]:
    """Cuts a sentence into runs of words that fit.

    Each run is as long as fits, or ends at the last good place. A word longer than the limit is a run of its own.

    Args:
        pieces: Word pieces of each word.
        limit: Most pieces of a run.
        breaks: For each word, whether it is good to cut before it.
        least: Fewest pieces of a run for the sake of a good place.

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
    """Tagged sentences, tokenized and cut into windows, unpadded; nothing is left out.

    A word's label stands on its first piece, its other pieces are ignored. A word of which the tokenizer leaves nothing
    (a variation selector, say) is read as the unknown token.

    Args:
        sentences: What to encode.
        tokenizer: A fast one.
        label_names: The tags in the order of their ids.
        max_length: Longest input in tokens.
        training: Cut outside entities where that can be. Otherwise tags must not steer what the model sees: cut after
            punctuation in the window's second half.

    Attributes:
        windows: Which words of which sentence each item holds.

    Raises:
        ConfigError: A tokenizer that cannot tell which word a piece is of, or no room for a word.
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
        _check(tokenizer, limit, max_length)
        words, pieces = _visible(sentences.words, tokenizer)
        breaks = _outside_entities(sentences.tags) if training else _after_pauses(sentences.words)
        least = 0 if training else limit / 2
        self.windows = [
            Window(number, start, stop)
            for number, counts in enumerate(pieces)
            for start, stop in cut(counts, limit, breaks[number], least)
        ]
        parts = [words[w.sentence][w.start : w.stop] for w in self.windows]
        # truncation reaches only a word that alone is longer than the limit
        options = {"is_split_into_words": True, "truncation": True, "max_length": max_length}
        encoded = tokenizer(parts, **options) if parts else BatchEncoding()
        self._inputs = dict(encoded)
        self._firsts = [_first_pieces(encoded.word_ids(row)) for row in range(len(parts))]

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
        """Puts the windows' predictions together again.

        Args:
            predictions: Of each window, a class id for each token (padding may follow).

        Returns:
            Of each sentence, a tag for each word.
        """
        tags: list[list[str]] = [[] for _ in range(len(self.sentences))]
        for window, places, ids in zip(self.windows, self._firsts, predictions, strict=True):
            tags[window.sentence] += [self._names[int(ids[place])] for place in places]
        return tags

    def note(self, split: str) -> str | None:
        """What was cut, for the user; None for nothing."""
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


def _check(tokenizer: PreTrainedTokenizerBase, limit: int, max_length: int) -> None:
    if not tokenizer.is_fast:
        raise ConfigError(
            f"{type(tokenizer).__name__} cannot tell which word a piece is of; tagging needs a model with a fast tokenizer."
        )
    if limit < 1:
        raise ConfigError(f"max_length = {max_length} leaves no room for a word; raise it.")


def _visible(sentences: list[list[str]], tokenizer: PreTrainedTokenizerBase) -> tuple[list[list[str]], list[list[int]]]:
    """The words as the tokenizer is to get them, and how many pieces each makes: 1 or more."""
    if not sentences:
        return [], []
    encoded = tokenizer(sentences, is_split_into_words=True, add_special_tokens=False, verbose=False)
    unknown = tokenizer.unk_token or "?"
    words, pieces = [], []
    for row, sentence in enumerate(sentences):
        counts = [0] * len(sentence)
        for word in encoded.word_ids(row):
            if word is not None:
                counts[word] += 1
        words.append([word if count else unknown for word, count in zip(sentence, counts, strict=True)])
        pieces.append([count or 1 for count in counts])
    return words, pieces


def _first_pieces(word_ids: Sequence[int | None]) -> list[int]:
    """Where each word's first piece stands."""
    return [i for i, word in enumerate(word_ids) if word is not None and (i == 0 or word_ids[i - 1] != word)]


def _outside_entities(tags: Iterable[Sequence[str]]) -> list[list[bool]]:
    return [[not tag.startswith("I-") for tag in sentence] for sentence in tags]  # IOB2: before an I- is inside


def _after_pauses(words: Iterable[Sequence[str]]) -> list[list[bool]]:
    return [[False, *(word in _PAUSES for word in sentence[:-1])] for sentence in words]
