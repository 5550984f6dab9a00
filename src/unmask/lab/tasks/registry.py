"""Finds the kind of a task: from a run's settings, or from what a delta says it was trained on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from unmask.lab.models import head_of
from unmask.lab.tasks.math.run import GENERATION
from unmask.lab.tasks.names import TASKS
from unmask.lab.tasks.protocol import Kind
from unmask.lab.tasks.tags.run import TOKEN
from unmask.lab.tasks.text.run import SEQUENCE

KINDS: Mapping[str, Kind] = {kind.head: kind for kind in (SEQUENCE, TOKEN, GENERATION)}


def kind_for(task: str | None) -> Kind:
    """Returns the kind of a named task. None means the user's own files without a task, which are texts to classify.

    Example:
        >>> kind_for("wnut17").head, kind_for(None).head
        ('token', 'sequence')
    """
    return KINDS["sequence" if task is None else TASKS[task]]


def kind_of(described: Mapping[str, Any]) -> Kind:
    """Returns the kind of the task that a delta's metadata describe.

    Raises:
        DeltaError: This version of unmask does not know the kind.
    """
    return KINDS[head_of(described)]
