"""Which kind a run's task is of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from unmask.config import TrainConfig
from unmask.kinds.generation import GENERATION
from unmask.kinds.protocol import Kind
from unmask.kinds.sequence import SEQUENCE
from unmask.kinds.token import TOKEN
from unmask.modeling import head_of
from unmask.tasks.names import TASKS

KINDS: Mapping[str, Kind] = {kind.head: kind for kind in (SEQUENCE, TOKEN, GENERATION)}


def kind_for(config: TrainConfig) -> Kind:
    """The kind of a run's task; the user's own files without a task are texts to classify.

    Example:
        >>> kind_for(TrainConfig(model="m", output="o", task="rte", budget="1%")).head
        'sequence'
    """
    return KINDS["sequence" if config.task is None else TASKS[config.task]]


def kind_of(described: Mapping[str, Any]) -> Kind:
    """The kind of the task that a delta's metadata describe.

    Raises:
        DeltaError: A kind that this unmask does not know.
    """
    return KINDS[head_of(described)]
