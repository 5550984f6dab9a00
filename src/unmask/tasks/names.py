"""Every task that has a name, and the kind it is of. No torch: ``unmask --help`` and the configuration use it."""

from __future__ import annotations

from collections.abc import Mapping

from unmask.tasks.arithmetic import ARITHMETIC
from unmask.tasks.glue import GLUE

TASKS: Mapping[str, str] = dict.fromkeys(sorted(GLUE), "sequence") | dict.fromkeys(ARITHMETIC, "generation")
"""The kind's name (`unmask.kinds`) by the task's."""
