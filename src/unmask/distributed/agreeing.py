"""Facts that processes must have in common, as text of which a digest travels, and how facts that differ are told."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from unmask.errors import UnmaskError

SHOWN = 4  # facts that differ, in one error
_DOING, _REFUSED = "doing", "refused"  # facts with a meaning of their own


def header(doing: str, facts: Mapping[str, Any]) -> tuple[bytes, tuple[int, int]]:
    """(the facts as text, (a digest of the text, its length)); the same facts give the same text in every process.

    Example:
        >>> header("step 3", {"lr": 0.1})[0]
        b'{"doing": "step 3", "lr": 0.1}'
    """
    text = json.dumps({_DOING: doing, **facts}, default=_kind).encode()
    return text, (int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little", signed=True), len(text))


def difference(texts: Sequence[bytes], checksums: Sequence[int], advice: str) -> str:
    """What differs between processes, in words that are the same in all of them.

    Args:
        texts: What `header` made in each process.
        checksums: Of what each process holds.
        advice: What to do where the facts differ.

    Example:
        >>> texts = [header("step 3", {"lr": rate})[0] for rate in (0.1, 0.1, 0.2)]
        >>> difference(texts, [0, 0, 0], "Give all processes the same.")
        'process 2 differs from process 0 in step 3: lr is 0.2 in process 2 and 0.1 in process 0. Give all processes the same.'
    """
    told = [json.loads(text) for text in texts]
    refused = [
        f"process {rank} refuses in {facts[_DOING]}: {facts[_REFUSED]}"
        for rank, facts in enumerate(told)
        if facts.get(_REFUSED)
    ]
    if refused:
        return " ".join(refused)
    if len({facts[_DOING] for facts in told}) > 1:
        places = "; ".join(f"process {rank} is in {facts[_DOING]}" for rank, facts in enumerate(told))
        return (
            f"the processes are out of step: {places}. All must make the same calls: as many micro-batches per "
            "optimizer.step(), as many steps, load_state_dict() in all or in none. Look at how many batches each process gets "
            "(drop_last, a sampler per process), at its accumulation, and at what skips a batch or a step."
        )
    keys = list(dict.fromkeys(key for facts in told for key in facts))
    differing = [key for key in keys if len({json.dumps(facts.get(key)) for facts in told}) > 1]
    if not differing:
        odd, usual = _odd(checksums)
        return (
            f"{_subject(odd)} from process {usual} in {told[0][_DOING]}: `values` or a tensor trained whole is another there, "
            "though gradients and settings were the same. The state of an optimizer or a write into `values` was another, or the "
            "processes round otherwise. Load the same checkpoint in all of them, change `values` in all alike, and use "
            "machines of one kind, with as many threads in each process."
        )
    odd, usual = _odd([json.dumps([facts.get(key) for key in differing]) for facts in told])
    shown = [_contrast(key, told[odd[0]].get(key), told[usual].get(key), odd[0], usual) for key in differing[:SHOWN]]
    more = f"; {len(differing) - SHOWN} more differ" if len(differing) > SHOWN else ""
    return f"{_subject(odd)} from process {usual} in {told[0][_DOING]}: {'; '.join(shown)}{more}. {advice}"


def _odd(values: Sequence[Any]) -> tuple[list[int], int]:
    """The processes that have not what most have (of equally many: what the first has), and the first that has it."""
    most = Counter(values).most_common(1)[0][0]
    return [rank for rank, value in enumerate(values) if value != most], list(values).index(most)


def _subject(odd: Sequence[int]) -> str:
    if len(odd) == 1:
        return f"process {odd[0]} differs"
    return f"processes {', '.join(map(str, odd))} differ"


def _contrast(key: str, other: Any, usual: Any, odd: int, first: int) -> str:
    if isinstance(other, list) and isinstance(usual, list) and len(usual) > 8:  # what one has and the other has not
        other, usual = [x for x in other if x not in usual] or other, [x for x in usual if x not in other] or usual
    return f"{key} is {_short(other)} in process {odd} and {_short(usual)} in process {first}"


def _short(value: Any) -> str:
    text = "not there" if value is None else value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 160 else f"{text[:157]}..."


def _kind(value: Any) -> str:
    """What stands for a value that is no JSON: its text may have an address in it, which no two processes share."""
    return type(value).__name__


def refusal(error: BaseException | None) -> dict[str, str | None]:
    """The fact that this process refuses, and why; None: it does not."""
    if error is None or isinstance(error, UnmaskError):
        return {_REFUSED: None if error is None else str(error)}
    return {_REFUSED: f"{type(error).__name__}: {error}"}
