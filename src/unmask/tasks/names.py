"""Every task that has a name, and the kind it is of. No torch: ``unmask --help`` and the configuration use it."""

from __future__ import annotations

from collections.abc import Mapping

from unmask.tasks.arithmetic import ARITHMETIC
from unmask.tasks.glue import GLUE
from unmask.tasks.ner import CUSTOM_NER, NER

TASKS: Mapping[str, str] = {
    **dict.fromkeys(sorted(GLUE), "sequence"),
    **dict.fromkeys((*sorted(NER), CUSTOM_NER), "token"),
    **dict.fromkeys(ARITHMETIC, "generation"),
}
"""The kind's name (`unmask.kinds`) by the task's."""
