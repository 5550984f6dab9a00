"""The records from which figures are drawn: plain JSON values, one record for each finished run. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from operator import itemgetter
from typing import Any, NotRequired, TypedDict, cast

from unmask.errors import DataError


class CurvePoint(TypedDict):
    """The scores of one evaluation during a run.

    Attributes:
        step: The number of optimizer steps taken.
        used: The number of weights unmasked by then, b(step - 1).
        score: The main metric on the evaluation split; higher is better.
        loss: The mean loss on the evaluation split.
    """

    step: int
    used: int
    score: float
    loss: NotRequired[float]


class AllocationRow(TypedDict):
    """The unmasked weights of one layer and module kind.

    Attributes:
        layer: The layer's number as text, from ``"0"``; ``"other"`` for tensors outside the layers.
        kind: The module kind, one of `unmask.methods.naming.KINDS` or ``"other"``.
        unmasked: How many weights are unmasked.
        of: How many weights there are.
    """

    layer: str
    kind: str
    unmasked: int
    of: int


class Snapshot(TypedDict):
    """The places of the unmasked weights after some step; `unmask.analysis.snapshot` makes a snapshot.

    Attributes:
        step: The number of optimizer steps taken; absent if only the count is known (from the order of the slots).
        used: The number of weights unmasked by then.
        tensor_sparsity: The share of tensors that hold no unmasked weight, 0 to 1.
        sparsity_entropy: The entropy of the tensors' densities, in nats, 0 to ln(``tensors``).
        sparsity_entropy_share: The entropy of the tensors' shares of the unmasked weights, in nats.
        tensors: The number of tensors that these figures cover.
        rows: The allocation; ``unmasked`` sums to ``used``. If repeat-S keeps what it tuned, it covers all weights
            ever tuned.
        picked: The allocation of the B weights that this step picked, if ``rows`` covers more.
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
    """The record of one finished run. A figure names the optional entries that it needs, and refuses records without them.

    Attributes:
        name: The name of the run, unique among the records.
        method: The name by which runs are grouped and labelled: ``"id3"``, ``"lora"``, ``"full"``.
        task: The task, such as ``"sst2"``.
        model: The name of the base model.
        budget: The number of trained weights that count: B, or a peer's trainable weights (without the dense head).
        trained: The number of weights that the run changed. It is more than ``budget`` if repeat-S keeps what it
            tuned. If the entry is absent, it is B.
        share: ``trained`` divided by the number of the base model's weights, 0 to 1.
        seed: The seed of the run; runs that differ in nothing else are averaged.
        lr: The peak learning rate.
        best: How many runs at one place count, the highest scores first; they may differ in seed and learning rate. If
            the entry is absent, all runs count, and they differ in the seed alone.
        score: The final main metric, 0 to 1; higher is better.
        columns: The scores by column of a table, 0 to 1: ``{"mnli-m": .., "mnli-mm": ..}``. If the entry is absent,
            the task is the only column.
        loss: The final mean loss on the evaluation split.
        metric: The name of the main metric, for the axis.
        strategy: ``"static"``, ``"repeat"``, ``"increment"``, or ``"none"`` for peers.
        parameters: The method's parameters: ``eps``, ``exp``, ``schedule``, ``stride``, ...
        curve: The evaluations during the run, by step.
        allocation: The snapshots during the run, by step.
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
    """Returns runs, as read from JSON, as a list, and refuses those from which a figure cannot be drawn.

    Raises:
        DataError: There are no records, or one lacks an entry: one of `REQUIRED`, or one that this figure ``needs`` too.

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


def grouped(records: Iterable[RunRecord], *entries: str) -> dict[Any, list[RunRecord]]:
    """Groups runs by the value of an entry, or by the tuple of several, in the order of each group's first run."""
    groups: dict[Any, list[RunRecord]] = {}
    for record in records:
        groups.setdefault(itemgetter(*entries)(record), []).append(record)
    return groups


def trained(run: RunRecord) -> int:
    """Returns the number of weights that a run changed; it is the budget if the record has no other number."""
    return run.get("trained", run["budget"])


def labels(records: Sequence[RunRecord]) -> dict[str, str]:
    """Returns the label of each method in a figure of strategies.

    If a single method uses increment-S and a single one repeat-S, these two are labelled by their strategies.
    Otherwise every method is labelled by its name.

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
