"""Which kind a run's task is of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from unmask.lab.models import head_of
from unmask.lab.tasks.math.run import GENERATION
from unmask.lab.tasks.names import TASKS
from unmask.lab.tasks.protocol import Kind
from unmask.lab.tasks.tags.run import TOKEN
from unmask.lab.tasks.text.run import SEQUENCE
from unmask.lab.training.config import TrainConfig

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
