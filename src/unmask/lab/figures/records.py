"""What a figure is drawn from: one record per finished run, plain values as JSON holds them. No torch here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NotRequired, TypedDict, cast

from unmask.errors import DataError


class CurvePoint(TypedDict):
    """One evaluation in the course of a run.

    Attributes:
        step: Optimizer steps taken.
        used: Weights unmasked by then, b(step - 1).
        score: Main metric on the evaluation split, higher is better.
        loss: Mean loss on the evaluation split.
    """

    step: int
    used: int
    score: float
    loss: NotRequired[float]


class AllocationRow(TypedDict):
    """Unmasked weights of one layer and module kind.

    Attributes:
        layer: The layer's number as text, from ``"0"``; ``"other"`` for tensors outside the layers.
        kind: One of `unmask.methods.naming.KINDS`, or ``"other"``.
        unmasked: How many weights are unmasked.
        of: How many weights there are.
    """

    layer: str
    kind: str
    unmasked: int
    of: int


class Snapshot(TypedDict):
    """Where the unmasked weights were after some step; `unmask.analysis.snapshot` makes one.

    Attributes:
        step: Optimizer steps taken; absent where only the count is known (read off the slots' order).
        used: Weights unmasked by then.
        tensor_sparsity: Share of tensors that hold no unmasked weight, 0 to 1.
        sparsity_entropy: Entropy over tensors of their densities, in nats, 0 to ln(``tensors``).
        sparsity_entropy_share: Entropy over tensors of their shares of the unmasked weights, in nats.
        tensors: How many tensors these are taken over.
        rows: The allocation; ``unmasked`` sums to ``used``. Where repeat-S keeps what it tuned, all that was ever tuned.
        picked: The allocation of the B weights that this step picked, where ``rows`` holds more.
    """

    step: NotRequired[int]
    used: int
    tensor_sparsity: float
    sparsity_entropy: float
    sparsity_entropy_share: NotRequired[float]
    tensors: int
    rows: list[AllocationRow]
    picked: NotRequired[list[AllocationRow]]


class RunRecord(TypedDict):
    """One finished run. A figure names the optional entries it needs, and refuses records without them.

    Attributes:
        name: Name of the run, unique among the records.
        method: Name to group and label by: ``"id3"``, ``"lora"``, ``"full"``.
        task: Task, e.g. ``"sst2"``.
        model: Base model's name.
        budget: Trained weights that count: B, or a peer's trainable weights (without the dense head).
        trained: How many weights the run really changed; more than ``budget`` where repeat-S keeps what it tuned. Absent: B.
        share: ``trained`` over the base model's weights, 0 to 1.
        seed: Of the run; runs that differ in nothing else are averaged.
        lr: Peak learning rate.
        best: How many runs at one place count, the highest scores first; they may differ in seed and learning rate. Absent:
            all count, and they differ in the seed alone.
        score: Final main metric, 0 to 1, higher is better.
        columns: Scores by column of a table, 0 to 1: ``{"mnli-m": .., "mnli-mm": ..}``. Absent: the task with its score.
        loss: Final mean loss on the evaluation split.
        metric: The main metric's name, for the axis.
        strategy: ``"static"``, ``"repeat"``, ``"increment"``, or ``"none"`` for peers.
        parameters: The method's parameters: ``eps``, ``exp``, ``schedule``, ``stride``, ...
        curve: Evaluations in the course of the run, by step.
        allocation: Snapshots in the course of the run, by step.
    """

    name: str
    method: str
    task: str
    model: str
    budget: int
    trained: NotRequired[int]
    share: float
    seed: int
    lr: float
    best: NotRequired[int]
    score: float
    columns: NotRequired[dict[str, float]]
    loss: NotRequired[float]
    metric: NotRequired[str]
    strategy: NotRequired[str]
    parameters: NotRequired[dict[str, Any]]
    curve: NotRequired[list[CurvePoint]]
    allocation: NotRequired[list[Snapshot]]


REQUIRED = ("name", "method", "task", "model", "budget", "share", "seed", "lr", "score")


def check_records(records: Iterable[Mapping[str, Any]], *needs: str) -> list[RunRecord]:
    """Refuses records that a figure cannot be drawn from.

    Args:
        records: Runs, as read from JSON.
        *needs: Optional entries that this figure needs too, e.g. ``"curve"``.

    Returns:
        The records.

    Raises:
        DataError: There are none, or one lacks an entry.

    Example:
        >>> run = dict.fromkeys(REQUIRED, 0) | {"name": "a"}
        >>> len(check_records([run]))
        1
    """
    listed = list(records)
    if not listed:
        raise DataError("there are no runs to draw; give the records of at least one finished run.")
    for record in listed:
        lacking = [key for key in (*REQUIRED, *needs) if record.get(key) is None]
        if lacking:
            raise DataError(
                f"the record of run {record.get('name', '?')!r} lacks {', '.join(lacking)}; see unmask.lab.figures.RunRecord."
            )
    return cast(list[RunRecord], listed)


def by_method(records: Sequence[RunRecord]) -> dict[str, list[RunRecord]]:
    """Groups runs by method, methods in order of their first run."""
    groups: dict[str, list[RunRecord]] = {}
    for record in records:
        groups.setdefault(record["method"], []).append(record)
    return groups


def trained(run: RunRecord) -> int:
    """How many weights a run really changed: its budget, if it does not say more."""
    return run.get("trained", run["budget"])


def labels(records: Sequence[RunRecord]) -> dict[str, str]:
    """What each method is called in a figure of strategies.

    Where one method alone has increment-S and one alone repeat-S, these two are called by their strategy; otherwise every
    method has its own name.

    Example:
        >>> labels([{"method": "id3", "strategy": "increment"}, {"method": "repeat_d3", "strategy": "repeat"}])
        {'id3': 'increment-S', 'repeat_d3': 'repeat-S'}
        >>> labels([{"method": "id3", "strategy": "increment"}])
        {'id3': 'id3'}
    """
    names = {record["method"]: record["method"] for record in records}
    strategies = ("increment", "repeat")
    of = {s: {record["method"] for record in records if record.get("strategy") == s} for s in strategies}
    if all(len(methods) == 1 for methods in of.values()):
        names |= {method: f"{strategy}-S" for strategy, methods in of.items() for method in methods}
    return names
