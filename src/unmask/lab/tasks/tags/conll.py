"""Reads the column format of the CoNLL shared tasks, whose lines hold a word first and its tag last."""

from __future__ import annotations

from pathlib import Path

from unmask.errors import DataError
from unmask.lab.tasks.tables import listing, open_text
from unmask.lab.tasks.tags.spans import is_tag
from unmask.lab.tasks.tags.spec import Sentences, normalised
from unmask.reading import shown

SUFFIXES = (".conll", ".txt", ".bio", ".iob", ".iob2", ".tsv")
_BLANK = " \t\r\n\ufeff"  # a byte-order mark may stand alone on a line, where files were joined


def read_conll(path: Path) -> tuple[Sentences, tuple[str, ...]]:
    """Reads words and tags from the first and the last column. Lines are split at tabs if there are any, else at blanks.

    This covers the four columns of CoNLL-2003 (word, part of speech, chunk, tag) and the two of WNUT17. A line without
    content ends a sentence, and so does a ``-DOCSTART-`` line, which is no word.

    Returns:
        The sentences in IOB2, and a note if the file is not in IOB2.

    Raises:
        DataError: The file is missing, is not UTF-8 or has no words; a line has one column or another number of columns
            than the first; or a tag is none of ``O``, ``B-type``, ``I-type``.
    """
    if not path.is_file():
        raise DataError(f"there is no file {str(path)!r}; {listing(path.parent)}.")
    words: list[list[str]] = [[]]
    tags: list[list[str]] = [[]]
    width = 0
    with open_text(path, "conll") as file:
        for number, text in enumerate(file, 1):
            if not text.strip(_BLANK) or text.startswith("-DOCSTART-"):
                if words[-1]:
                    words.append([])
                    tags.append([])
                continue
            text = text.rstrip("\r\n")
            # split() is not used, because a no-break space may be part of a word.
            cells = text.split("\t") if "\t" in text else [cell for cell in text.split(" ") if cell]
            width = width or len(cells)
            if len(cells) != width or width < 2:
                raise DataError(
                    f"{path}, line {number} has {len(cells)} columns where {max(width, 2)} are needed (the word first, the "
                    "tag last, split at tabs, or at blanks where there is no tab). Mend or drop the line."
                )
            word, tag = cells[0], cells[-1].strip()
            if not word:
                raise DataError(f"{path}, line {number}: the word is empty; mend or drop the line.")
            if not is_tag(tag):
                raise DataError(
                    f"{path}, line {number}: {shown(tag)} is not a tag; the last column must be O, B-type or I-type (IOB1 "
                    "or IOB2). Convert other schemes (BIOES, BILOU) first."
                )
            words[-1].append(word)
            tags[-1].append(tag)
    if not words[-1]:
        words.pop()
        tags.pop()
    if not words:
        raise DataError(f"{str(path)!r} is empty: it holds no words.")
    return normalised(words, tags, path.name)
