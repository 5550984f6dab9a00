"""Describes what processes that train together must have in common, and names what differs between them.

A fact is a JSON value with a name: a setting, a digest, the step. `Processes.agree` compares digests of the facts of all
processes, and sends the facts themselves only where the digests differ. `difference` then writes the error.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from textwrap import shorten
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from unmask.errors import UnmaskError
from unmask.gradients.entries import bits
from unmask.methods.method import Method

SHOWN = 4  # facts that differ, in one error
POINTS = 64  # points at which a schedule is compared
_DOING, _REFUSED = "doing", "refused"  # facts with a special meaning


def checksum(tensor: Tensor) -> Tensor:
    """Sums the tensor's bits modulo 2^64, as 0-d int64. The result does not depend on the order of the sum.

    Example:
        >>> checksum(torch.zeros(3)).item(), checksum(torch.tensor([1.0])).item()
        (0, 1065353216)
    """
    return bits(tensor).sum(dtype=torch.int64)


def header(doing: str, facts: Mapping[str, Any]) -> tuple[bytes, tuple[int, int]]:
    """Returns the facts as text, and (a digest of the text, its length). Equal facts give equal text in every process.

    Example:
        >>> header("step 3", {"lr": 0.1})[0]
        b'{"doing": "step 3", "lr": 0.1}'
    """
    # Of a value that JSON lacks, the class is given: the value's text may hold an address.
    text = json.dumps({_DOING: doing, **facts}, default=lambda value: type(value).__name__).encode()
    return text, (int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little", signed=True), len(text))


def difference(texts: Sequence[bytes], checksums: Sequence[int], advice: str) -> str:
    """Describes what differs between processes; the text is the same in all of them.

    Each process gives the text of `header` and the checksum of its values; the advice says what to do where facts differ.

    Example:
        >>> texts = [header("step 3", {"lr": rate})[0] for rate in (0.1, 0.1, 0.2)]
        >>> difference(texts, [0, 0, 0], "Give all processes the same.")
        'process 2 differs from process 0 in step 3: lr is 0.2 in process 2 and 0.1 in process 0. Give all processes the same.'
    """
    by_rank = [json.loads(text) for text in texts]
    refused = [
        f"process {rank} refuses in {facts[_DOING]}: {facts[_REFUSED]}"
        for rank, facts in enumerate(by_rank)
        if facts.get(_REFUSED)
    ]
    if refused:
        return " ".join(refused)
    if len({facts[_DOING] for facts in by_rank}) > 1:
        places = "; ".join(f"process {rank} is in {facts[_DOING]}" for rank, facts in enumerate(by_rank))
        return (
            f"the processes are out of step: {places}. All must make the same calls: as many micro-batches per "
            "optimizer.step(), as many steps, load_state_dict() in all or in none. Look at how many batches each process gets "
            "(drop_last, a sampler per process), at its accumulation, and at what skips a batch or a step."
        )
    keys = list(dict.fromkeys(key for facts in by_rank for key in facts))
    differing = [key for key in keys if len({json.dumps(facts.get(key)) for facts in by_rank}) > 1]
    if not differing:
        *_, subject = _odd(checksums)
        return (
            f"{subject} in {by_rank[0][_DOING]}: `values` or a tensor trained whole is another there, "
            "though gradients and settings were the same. The state of an optimizer or a write into `values` was another, or the "
            "processes round differently. Load the same checkpoint in all of them, change `values` in all alike, and use "
            "machines of one kind, with as many threads in each process."
        )
    odd, usual, subject = _odd([json.dumps([facts.get(key) for key in differing]) for facts in by_rank])
    shown = []
    for key in differing[:SHOWN]:
        other, theirs = by_rank[odd].get(key), by_rank[usual].get(key)
        if isinstance(other, list) and isinstance(theirs, list) and len(theirs) > 8:
            # Of two long lists, only the elements that the other lacks are shown.
            other, theirs = (
                [x for x in other if x not in theirs] or other,
                [x for x in theirs if x not in other] or theirs,
            )
        shown.append(f"{key} is {_short(other)} in process {odd} and {_short(theirs)} in process {usual}")
    more = f"; {len(differing) - SHOWN} more differ" if len(differing) > SHOWN else ""
    return f"{subject} in {by_rank[0][_DOING]}: {'; '.join(shown)}{more}. {advice}"


def _odd(values: Sequence[Any]) -> tuple[int, int, str]:
    """Returns the first process that differs from the majority, the first of the majority, and words that name all who differ.

    In a tie, the majority is process 0's.
    """
    most = Counter(values).most_common(1)[0][0]
    odd, usual = [rank for rank, value in enumerate(values) if value != most], list(values).index(most)
    subject = f"process {odd[0]} differs" if len(odd) == 1 else f"processes {', '.join(map(str, odd))} differ"
    return odd[0], usual, f"{subject} from process {usual}"


def _short(value: Any) -> str:
    text = "not there" if value is None else value if isinstance(value, str) else json.dumps(value)
    return shorten(text, 160, placeholder="...")


def refusal(error: BaseException | None) -> dict[str, str | None]:
    """Returns the fact that this process refuses, with the reason; for None, the fact that it does not."""
    if error is None or isinstance(error, UnmaskError):
        return {_REFUSED: None if error is None else str(error)}
    return {_REFUSED: f"{type(error).__name__}: {error}"}


def facts_of_method(method: Method, budget: int) -> dict[str, Any]:
    """Describes a method, with its schedule as numbers: two schedules may be functions of the same name.

    Example:
        >>> import unmask
        >>> method = unmask.id3(8, steps=4).but(schedule=unmask.Schedule.of(lambda t, T, B: t, 4))
        >>> {key: value for key, value in facts_of_method(method, 8).items() if key.startswith("b(")}
        {'b(0)': 0, 'b(1)': 1, 'b(2)': 2, 'b(3)': 8}
    """
    steps = method.schedule.steps
    points = sorted({i * (steps - 1) // max(1, min(steps, POINTS) - 1) for i in range(min(steps, POINTS))})
    return method.describe() | {f"b({t})": method.cumulative(t, budget) for t in points}


def facts_of_state(state: Any) -> dict[str, Any]:
    """Describes a selection's state by digests. Buffers are left out: BatchNorm's differ between processes."""
    if not isinstance(state, Mapping):
        return {"the state": type(state).__name__}
    facts: dict[str, Any] = {}
    for key, value in state.items():
        if isinstance(value, Mapping) and key != "buffers":
            facts |= {f"{key} {name}": _fact(part) for name, part in value.items()}
        elif key != "buffers":
            facts[f"the saved {key}"] = _fact(value)
    return facts


def _fact(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    data = value.detach().cpu().contiguous().view(-1)
    digest = hashlib.blake2b(bits(data).numpy().tobytes(), digest_size=8).hexdigest()
    return f"{value.numel():,} numbers with the digest {digest}"


def settings_of(optimizer: Optimizer) -> dict[str, Any]:
    """Describes an optimizer by its class and by those settings of its groups that are plain values, as the learning rate.

    Example:
        >>> import torch
        >>> settings = settings_of(torch.optim.SGD([torch.zeros(3, requires_grad=True)], lr=0.5))
        >>> settings["optimizer"], settings["lr"], settings["momentum"]
        ('SGD', 0.5, 0)
    """
    several = len(optimizer.param_groups) > 1
    settings: dict[str, Any] = {"optimizer": type(optimizer).__name__}
    for number, group in enumerate(optimizer.param_groups):
        of = f" of group {number}" if several else ""
        settings[f"parameters{of}"] = len(group["params"])
        plain = {key: value.item() if _single(value) else value for key, value in group.items() if key != "params"}
        settings |= {f"{key}{of}": value for key, value in plain.items() if _is_plain(value)}
    return settings


def state_of_optimizer(optimizer: Optimizer) -> dict[str, Any]:
    """Describes an optimizer's state by parameter: tensors by their checksums, and plain values."""
    facts: dict[str, Any] = {}
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for number, parameter in enumerate(parameters):
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                value = value.item() if _single(value) else f"a tensor with checksum {checksum(value.detach()).item()}"
            if _is_plain(value):
                facts[f"the optimizer's {key} of parameter {number}"] = value
    return facts


def _single(value: Any) -> bool:
    return isinstance(value, Tensor) and value.numel() == 1


def _is_plain(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return len(value) <= 8 and all(_is_plain(part) for part in value)
    return value is None or isinstance(value, (bool, int, float, str))
