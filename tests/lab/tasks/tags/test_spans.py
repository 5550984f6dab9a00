"""Compares spans in IOB tags and their F1 with seqeval, with a definition by enumeration, and with cases worked by hand."""

from __future__ import annotations

import itertools
import random
import warnings

import pytest

from unmask.errors import DataError
from unmask.lab.tasks.tags.spans import score, spans, to_iob2

TAGS = ("O", "B-PER", "I-PER", "B-creative-work", "I-creative-work")

BY_HAND = {
    # The tags, and their entities as conlleval reads them and strictly.
    "O O": ([], []),
    "B-A I-A O": ([("A", 0, 2)], [("A", 0, 2)]),
    "B-A B-A": ([("A", 0, 1), ("A", 1, 2)], [("A", 0, 1), ("A", 1, 2)]),
    "I-A I-A B-A": ([("A", 0, 2), ("A", 2, 3)], [("A", 2, 3)]),  # IOB1
    "O I-A": ([("A", 1, 2)], []),
    "B-A I-B": ([("A", 0, 1), ("B", 1, 2)], [("A", 0, 1)]),
    "B-A I-B I-A": ([("A", 0, 1), ("B", 1, 2), ("A", 2, 3)], [("A", 0, 1)]),
    "B-A O I-A": ([("A", 0, 1), ("A", 2, 3)], [("A", 0, 1)]),
    "B-A-b I-A-b I-A": ([("A-b", 0, 2), ("A", 2, 3)], [("A-b", 0, 2)]),
}


@pytest.mark.parametrize("tags", BY_HAND)
def test_spans_worked_by_hand(tags):
    lenient, strict = BY_HAND[tags]
    assert spans(tags.split()) == lenient
    assert spans(tags.split(), strict=True) == strict


def by_definition(tags):
    """Lists every run of words that is an entity: it begins where one begins, and ends with the last I- of its type."""
    found = []
    for first, stop in itertools.combinations(range(len(tags) + 1), 2):
        kind = tags[first][2:]
        on = f"I-{kind}"
        begins = tags[first].startswith("B-") or first == 0 or tags[first - 1][2:] != kind
        whole = all(tag == on for tag in tags[first + 1 : stop]) and (stop == len(tags) or tags[stop] != on)
        if kind and begins and whole:
            found.append((kind, first, stop))
    return found


def test_spans_equal_those_of_the_definition_for_all_short_sentences():
    for tags in itertools.chain.from_iterable(itertools.product(TAGS, repeat=n) for n in range(1, 6)):
        assert spans(tags) == by_definition(tags), tags


def test_strict_and_lenient_agree_on_iob2_and_conversion_keeps_the_entities():
    for tags in itertools.product(TAGS, repeat=5):
        fixed = to_iob2(tags)
        assert spans(fixed) == spans(fixed, strict=True) == spans(tags)
        assert to_iob2(fixed) == fixed


def test_score_worked_by_hand():
    """Counts by hand: 3 entities are to be found, 4 are found, and 2 of these are right. Of 8 tags 6 are right."""
    gold = [["B-A", "I-A", "O", "B-B"], ["O", "B-A", "O", "O"]]
    guess = [["B-A", "I-A", "O", "B-A"], ["B-B", "B-A", "O", "O"]]
    expected = {"f1": 4 / 7, "precision": 2 / 4, "recall": 2 / 3, "accuracy": 6 / 8}
    assert score(gold, guess) == pytest.approx(expected)
    nothing = [["O", "O"]]
    assert score(nothing, nothing) == {"f1": 0.0, "precision": 0.0, "recall": 0.0, "accuracy": 1.0}
    # The same words of another sentence are another entity.
    assert score([["B-A"], ["O"]], [["O"], ["B-A"]])["f1"] == 0.0


@pytest.mark.parametrize(
    ("gold", "guess", "message"),
    [
        ([["O"]], [["O"], ["O"]], "1 sentences of tags and 2 of predictions"),
        ([["O"], ["O", "O"]], [["O"], ["O"]], "sentence 2 has 2 tags and 1 predictions"),
        ([], [], "no word"),
    ],
)
def test_tags_that_cannot_be_compared_are_refused(gold, guess, message):
    with pytest.raises(DataError, match=message):
        score(gold, guess)


def corpus(draw, sentences, noise):
    """Makes random tags, and a copy with some tags changed."""
    gold = [draw.choices(TAGS, weights=(6, 2, 2, 1, 1), k=draw.randint(1, 12)) for _ in range(sentences)]
    guess = [[draw.choice(TAGS) if draw.random() < noise else tag for tag in tags] for tags in gold]
    return gold, guess


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("noise", [0.0, 0.2, 0.9])
def test_scores_equal_those_of_seqeval(strict, noise):
    metrics = pytest.importorskip("seqeval.metrics")
    from seqeval.scheme import IOB2

    mode = {"mode": "strict", "scheme": IOB2} if strict else {}
    for seed in range(20):
        gold, guess = corpus(random.Random(seed), 30, noise)
        found = score(gold, guess, strict=strict)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            expected = {
                "f1": metrics.f1_score(gold, guess, **mode),
                "precision": metrics.precision_score(gold, guess, **mode),
                "recall": metrics.recall_score(gold, guess, **mode),
                "accuracy": metrics.accuracy_score(gold, guess),
            }
        assert found == pytest.approx(expected, abs=1e-12), seed
